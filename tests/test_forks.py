"""The forks of docs/ablations.md: a copy of a script and a small diff. Each applies to the code as
it is, and trains."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from inside import main_of

REPO = Path(__file__).resolve().parent.parent
FLAGS = ["--data", "data/moving_shapes/train.json", "--steps", "2", "--G", "3", "--max_new_tokens",
         "6",
         "--eval_data", "", "--prompts_per_step", "8", "--oracle", "reference", "--name", "fork"]
DIFFS = sorted((REPO / "docs/forks").glob("*.diff"))
FORKS = ("no_kl", "borda", "majority", "linear", "k3_corrected")


def copied(folder, name):
    """`cp grpo_rank.py grpo_rank_<name>.py && git apply docs/forks/<name>.diff` -> the copy."""
    copy = folder / f"grpo_rank_{name}.py"
    shutil.copy(REPO / "grpo_rank.py", copy)
    diff = str(REPO / "docs/forks" / f"{name}.diff")
    done = subprocess.run(["git", "apply", diff], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert copy.read_text() != (REPO / "grpo_rank.py").read_text()
    assert max(map(len, copy.read_text().splitlines())) <= 100
    return copy


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_applies_and_trains(world, policy, monkeypatch, tmp_path, name):
    monkeypatch.syspath_prepend(copied(tmp_path, name).parent)
    main_of(monkeypatch, world, f"grpo_rank_{name}.py", *FLAGS)
    # of its own: a copy never writes into its parent's runs
    run = world / f"runs/grpo_rank_{name}/fork_s0"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and ("objective/kl" in rows[0]) == (name != "no_kl")
    assert (run / "final/model.safetensors").exists()


def equations(folder, name):
    space = {"__name__": "fork"}
    exec(compile(copied(folder, name).read_text(), name, "exec"), space)
    return space


def test_what_the_forks_change_by_hand(tmp_path):
    """Five answers, ranks 0 1 1 3 4: places 0 1.5 1.5 3 4, their mean 2."""
    ranks = torch.tensor([[0, 1, 1, 3, 4]])
    A = equations(tmp_path, "borda")["rank_advantages"]("oracle_rank", ranks, ranks)
    assert A.tolist() == [[2, 0.5, 0.5, -1, -2]]
    A = equations(tmp_path, "linear")["rank_advantages"]("oracle_rank", ranks, ranks)
    assert A.tolist() == [[2, 0.5, 0.5, -1, -2]]  # 2 - 4 place / 4, whose mean is 0
    oracle = equations(tmp_path, "majority")["MajorityOracle"]()
    scores, ranks, ok = oracle.rank([None], ["what?"], [["red", "Red.", "blue", "red"]])
    assert (scores.tolist() == [[0.75, 0.75, 0.25, 0.75]] and ranks.tolist() == [[0, 0, 3, 0]]
            and ok.all())


def test_k3_corrected_has_k3s_value_and_the_gradient_of_the_kl_of_pi_and_ref(tmp_path):
    """pi = (.5, .3, .2), ref = (.2, .5, .3): d KL(pi || ref) / d logit_k = pi_k (log(pi_k / ref_k)
    - KL)."""
    kl_k3 = equations(tmp_path, "k3_corrected")["kl_k3"]
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logits = pi.log().requires_grad_()
    kl = kl_k3(logits.log_softmax(-1)[None], ref.log()[None])[0]
    torch.testing.assert_close(kl.detach(), ref / pi - 1 - (ref / pi).log())
    (pi * kl).sum().backward()  # the exact mean over pi
    difference = (pi / ref).log()
    torch.testing.assert_close(logits.grad, pi * (difference - (pi * difference).sum()))


def test_every_diff_is_small_and_has_its_place():
    page = (REPO / "docs/ablations.md").read_text()
    assert sorted(file.stem for file in DIFFS) == sorted(FORKS)
    for file in DIFFS:
        lines = file.read_text().splitlines()
        changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        assert len(changed) <= 30 and len({line for line in lines if line.startswith("+++")}) == 1
        assert re.search(
            rf"cp grpo_rank.py grpo_rank_{file.stem}.py\s+git apply docs/forks/{file.name}", page)
        assert f"(forks/{file.name})" in page
