"""`make results` without the hours: what its scripts would call. Every run of a table is made by a
line before it."""

import fnmatch
import os
import shlex
import shutil
import subprocess
import sys
from itertools import takewhile

from conftest import REPO

FAKE = """#!/bin/bash
if [ "$1" = "-c" ]; then  # really asked, and once: it imports torch
  kept=asked_$(cksum <<<"$2" | tr ' ' _)
  [ -s "$kept" ] || "{python}" "$@" > "$kept"
  exec cat "$kept"
fi
printf '%q ' "$@" >> calls; echo >> calls
"""
FOLDERS = dict(
    sft="sft",
    grpo_rank="grpo_rank",
    distorted_rewards="grpo_rank",
    ppo_rlaif="ppo_rlaif",
    reward_model="reward_model",
    dpo_iter_w2s="dpo_iter_w2s",
)  # <script>.py writes runs/<folder>/<name>_s<seed>


def made_by(script, flags):
    """The run folder that a call of a training script makes, None for other calls."""
    name, seed = (flags[flags.index(flag) + 1] if flag in flags else default
                  for flag, default in (("--name", "context"), ("--seed", "0")))
    # a fork's runs are its own
    folder = script if script.startswith("grpo_rank_") else FOLDERS.get(script)
    return f"runs/{folder}/{name}_s{seed}" if folder else None


def test_every_run_of_every_table_is_made_before_it(tmp_path):
    for part in ("experiments", "docs"):
        shutil.copytree(REPO / part, tmp_path / part)
    for file in REPO.glob("*.py"):
        shutil.copy(file, tmp_path)
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(FAKE.format(python=sys.executable))
    python.chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)  # forks.sh applies its diffs
    done = subprocess.run(["bash", "experiments/results.sh"], cwd=tmp_path, capture_output=True,
                          text=True,
                          env=os.environ | dict(PY="./python", JOBS="1", PYTHONPATH=str(REPO)))
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    made, tables, asked = set(), [], 0
    for line in calls.read_text().splitlines():
        words = shlex.split(line)
        at = next(k for k, word in enumerate(words) if word.endswith(".py"))
        script, flags = words[at].split("/")[-1].removesuffix(".py"), words[at + 1 :]
        if run := made_by(script, flags):
            made.add(run)
        if "--runs" in flags:
            for pattern in takewhile(lambda flag: not flag.startswith("--"),
                                     flags[flags.index("--runs") + 1 :]):
                asked += 1
                run = "/".join(pattern.split("/")[:3])  # of an iteration: its run
                assert fnmatch.filter(made, run), f"{line}: nothing makes {run}"
        tables += [flags[flags.index("--out") + 1]] if "--out" in flags else []
    assert asked > 60 and len(made) > 60
    pages = "".join(page.read_text()
                    for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")])
    for name in ("grpo_rank", "advantages", "published", "ai_feedback", "ppo_rlaif", "ppo_fair",
                 "dpo_iter_w2s",
                 "dpo_iterations", "distortions", "forks", "systems"):
        assert f"docs/results/{name}" in tables and f"results/{name}.md" in pages
