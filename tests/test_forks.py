"""The diffs of docs/ablations.md apply to the code as it is, and train."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FLAGS = ["--data", "data/moving_shapes/train.json", "--steps", "2", "--G", "3", "--max_new_tokens", "6",
         "--eval_data", "", "--prompts_per_step", "8"]
DIFFS = sorted((REPO / "docs/forks").glob("*.diff"))


@pytest.mark.parametrize("diff, flags", [
    ("no_kl", ["--oracle", "reference"]), ("borda", ["--oracle", "reference", "--advantage", "borda"]),
    ("majority", ["--oracle", "majority"])])  # fmt: skip
def test_a_fork_applies_and_trains(world, policy, forked, tmp_path, diff, flags):
    for name in ("grpo_rank.py", "oracle.py", "flags.py"):
        shutil.copy(REPO / name, tmp_path)
    file = REPO / "docs/forks" / f"{diff}.diff"
    done = subprocess.run(["git", "apply", str(file)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / n).read_text() != (REPO / n).read_text() for n in ("grpo_rank.py", "oracle.py", "flags.py"))
    # as a process that was started there: what reads the changed files is imported again
    anew = (f"import os, sys\nsys.path.insert(0, '{tmp_path}')\nfor name, its in [*sys.modules.items()]:\n"
            f"    if os.path.dirname(getattr(its, '__file__', None) or '') == '{REPO}':\n"
            "        if name not in ('video_llm', 'packing'):  # they register themselves in transformers\n"
            "            del sys.modules[name]")
    codes = forked.run(world, tmp_path / "grpo_rank.py", *FLAGS, *flags, "--name", diff, plant=anew)
    assert codes == [0], forked.said()
    rows = [json.loads(line) for line in (world / f"runs/grpo_rank/{diff}_s0/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and ("objective/kl" in rows[0]) == (diff != "no_kl")


def test_every_diff_is_small_and_has_its_place():
    page = (REPO / "docs/ablations.md").read_text()
    assert len(DIFFS) == 3
    for file in DIFFS:
        lines = file.read_text().splitlines()
        changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        assert len(changed) <= 30 and f"git apply docs/forks/{file.name}" in page and f"(forks/{file.name})" in page
