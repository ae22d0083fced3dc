"""The sides of benchmarks/ that need no TRL take their steps, in this process; and what the tables
of benchmarks/ and experiments/ are made of."""

import json
import sys

import pytest
from conftest import REPO

sys.path[:0] = [str(REPO / "benchmarks"), str(REPO / "experiments")]
import distortions  # noqa: E402
import dpo_step  # noqa: E402
import grpo_step  # noqa: E402
import turns  # noqa: E402


def arguments(module, *flags):
    args = turns.parser_of(module.__doc__, module.POINTS,
                           rounds=1).parse_args(["--threads", "1", *flags])
    args.shape = "tiny"
    return args


@pytest.mark.parametrize("module, point", [(grpo_step, (8, 4, 3, 2)), (dpo_step, (8, 4, 2))])
@pytest.mark.parametrize("side", ["ours", "plain"])
def test_a_side_takes_steps_that_train(module, point, side, monkeypatch):
    made, decoder = [], turns.decoder
    monkeypatch.setattr(turns, "decoder", lambda args: made.append(decoder(args)) or made[-1])
    steps = getattr(module, side)(arguments(module), *point)
    next(steps)
    before = made[0].lm_head.weight.clone()
    for _ in range(2):
        assert next(steps) is None or module is grpo_step
    assert not before.equal(made[0].lm_head.weight)


@pytest.mark.parametrize("module, point", [(grpo_step, (8, 4, 3, 2)), (dpo_step, (8, 4, 2))])
def test_both_sides_have_one_gradient(module, point, monkeypatch):
    note = module.check(arguments(module), "here", *point)
    apart = float(note.split("apart: ")[1].split()[0])
    assert 0 < apart <= 1e-5
    plain_loss = module.plain_loss
    monkeypatch.setattr(module, "plain_loss", lambda *a: 1.001 * plain_loss(*a))
    with pytest.raises(SystemExit, match="apart"):
        module.check(arguments(module), "here", *point)


def test_ratios_are_taken_within_a_round():
    row = lambda seconds: dict(seconds=seconds, sampling=seconds / 2, peak_mib=10 * seconds)
    # the second round was disturbed
    rows = dict(ours=[row(1), row(10), row(2)], trl=[row(3), row(20), row(8)])
    found = turns.summary(rows, floor=1.0, arithmetic=0.5, tokens=100)
    assert ((found["trl"]["ratio"], found["trl"]["ratio_low"], found["trl"]["ratio_high"])
            == (3, 2, 4))
    ours = found["ours"]
    assert (ours["seconds"], ours["tokens_per_second"], ours["of_floor"],
            ours["mfu"]) == (2, 50, 0.5, 0.25)
    assert found["trl"]["peak_mib"] == 200


def test_the_floor_of_a_step_by_hand():
    """10 weights, 2 prompts of 3 tokens, 2 answers of 4, one FLOP a second, a bandwidth that never
    limits: 2 FLOPs a weight for 6 tokens of prompts, 3 tokens of 4 answers, and 8 in training for 2
    rows of 11 tokens."""
    assert (
        grpo_step.floor_seconds(10, 3, 4, 2, 2, 1, 1e9, "float32")
        == 2 * 10 * 6 + 3 * 2 * 10 * 4 + 8 * 10 * 22
    )
    assert dpo_step.floor_seconds(10, 3, 4, 2, 1, "float32") == 8 * 10 * 2 * 11


def test_ranks_against_scores_are_paired(tmp_path, monkeypatch, capsys):
    """Two seeds, four questions of two videos: every number of the table by hand."""
    said = dict(policy=([0, 0, 0, 0], [0, 0, 1, 1]), ranks=([1, 1, 1, 0], [1, 1, 1, 1]),
                scores=([1, 0, 1, 0], [1, 1, 0, 0]))
    rows = {"sft/policy": "policy", "grpo_rank/reference": "ranks", "grpo_rank/score": "scores"}
    for kind in ("saturation", "tail", "flip20", "flip30"):
        rows |= {f"grpo_rank/{kind}_oracle_rank": "ranks", f"grpo_rank/{kind}_score": "scores"}
    for run, which in rows.items():
        for seed, correct in enumerate(said[which]):
            folder = tmp_path / f"runs/{run}_s{seed}"
            folder.mkdir(parents=True)
            (folder / "args.json").write_text('{"git_commit": "abc"}')
            (folder / "predictions_test.json").write_text(json.dumps({"predictions": [
                dict(correct=bool(c), video=f"v{i // 2}") for i, c in enumerate(correct)]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distortions.py", "--out", "here"])
    distortions.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| none | 87.5 ± 17.7 | 50.0 ± 0.0 | +37.5 [+25.0, +50.0] | ± 17.7 |" in lines
    assert lines[-1] == "not run yet: 10 % flipped" and (tmp_path / "here.png").exists()
    assert "the SFT start: 25.0 ± 35.4" in lines[-3]
    for seed in (0, 1):
        (tmp_path / f"runs/grpo_rank/tail_score_s{seed}/predictions_test.json").unlink()
    with pytest.raises(SystemExit,
                       match=r"runs/grpo_rank/tail_score_s\*: no predictions_test.json"):
        distortions.main()
