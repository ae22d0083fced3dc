"""Numbers that are none, and answers that degenerate: what stops a run, what warns, what the log
shows."""

import json

import pytest
import torch
from forked import a_world
from inside import main_of
from test_killed import SCRIPTS, rows, steps_done

import plumbing.run
from oracle import differ

LOSSES = dict(sft="sft_loss", grpo_rank="kl_k3", ppo_rlaif="value_loss",
              reward_model="bradley_terry",
              dpo_iter_w2s="dpo_loss")


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_loss_that_is_no_number_stops_before_the_weights_change(
    world, policy, forked, tmp_path, name, number
):
    """An infinite constant has a finite gradient: the loss itself is looked at. Counted are the
    optimizer's steps."""
    place, folder = a_world(world, tmp_path / "x"), tmp_path / "x" / SCRIPTS[name][1]
    plant = ("import torch\nloss, steps = getattr(module, what), [0]\ndef wrong(*args):\n    out = "
             "loss(*args)\n"
             f"    bad = float('{number}') if torch.is_grad_enabled() and steps[0] == 3 else 0.0\n"
             "    return (out[0] + bad, *out[1:]) if isinstance(out, tuple) else out + bad\n"
             "setattr(module, what, wrong)\nstep = torch.optim.AdamW.step\n"
             "def counted(*args, **more):\n    steps[0] += 1\n    print('STEP', flush=True)\n"
             "    return step(*args, **more)\ntorch.optim.AdamW.step = counted")
    assert forked.run(place, *SCRIPTS[name][0],
                      plant=f"what = '{LOSSES[name]}'\n{plant}") == [1], forked.said()
    said = forked.said().splitlines()
    stop = [line for line in said if "weights untouched" in line]
    assert len(stop) == 1 and "Traceback" not in forked.said() and forked.said().count("STEP") == 3
    (batch,) = folder.glob("not_finite_step*.json")
    assert str(batch.relative_to(place)) in stop[0] and json.loads(batch.read_text())
    assert steps_done(folder) <= 3 and not (folder / "final").exists()


def test_pretraining_stops_as_well(world, tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    for name in ("clips.json", "pretrain.json", "videos"):
        (tmp_path / "small" / name).symlink_to(world / "data/moving_shapes" / name)
    monkeypatch.setattr("embedded_world.pretrain_tiny.attribute_loss",
                        lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(SystemExit, match="stage 1: attributes, step 0: the loss is nan"):
        main_of(monkeypatch, tmp_path, "embedded_world/pretrain_tiny.py", "--data", "small",
                "--steps", "2",
                "--batch_size", "4")
    assert not (tmp_path / "small/hub").exists()


def test_an_exploding_kl_is_warned_of_once(tmp_path, capfd):
    log = plumbing.run.Log(tmp_path, 5, 0, 0)
    for step, kl in enumerate((0.1, 9.0, 50.0, 1e9, 1e3)):
        log.add("objective/kl", kl)
        log.step(step, show=[])
    said = capfd.readouterr().err
    assert (said.count("warning") == 1 and "step 3: the KL to the start is 50 nats" in said
            and "--lr" in said)


@pytest.mark.parametrize("name", ["grpo_rank", "ppo_rlaif"])
def test_empty_and_endless_answers_show_in_the_log(world, policy, forked, tmp_path, name):
    """Steps 0-2 as sampled, then nothing but the end token, then answers without one."""
    place = a_world(world, tmp_path / "x")
    plant = ("count, sample = [0], module.generate\ndef worse(model, prefix, uniforms, eos, "
             "*rest):\n"
             "    tokens, lengths, logprobs = sample(model, prefix, uniforms, eos, *rest)\n    "
             "count[0] += 1\n"
             "    if 3 < count[0] <= 6:\n        tokens, lengths = tokens * 0 + eos, lengths * 0 + "
             "1\n"
             "        tokens, logprobs = tokens[..., :1], logprobs[..., :1] if logprobs.ndim == 3 "
             "else logprobs\n"
             "    if count[0] > 6:\n        other = (eos + 1) % 50\n        tokens = tokens * 0 + "
             "other\n"
             "        lengths = lengths * 0 + tokens.shape[-1]\n"
             "    return tokens, lengths, logprobs\nmodule.generate = worse")
    assert forked.run(place, *SCRIPTS[name][0], plant=plant) == [0], forked.said()
    seen = [(row["rollout/len"], row["rollout/eos_rate"]) for row in rows(place / SCRIPTS[name][1])
            if "rollout/len" in row]
    assert all(1 < n < 6 for n, _ in seen[:3]) or any(n > 1 for n, _ in seen[:3])
    assert set(seen[3:6]) == {(1.0, 1.0)} and all(rate == 0 and n > 1 for n, rate in seen[6:])


@pytest.mark.parametrize("name", ["grpo_rank", "ppo_rlaif"])
def test_a_step_without_a_ranking_moves_no_weights_and_three_end_the_run(
    world, policy, forked, tmp_path, name
):
    """Ranked are the steps 0, 2 and 3: step 1 makes no optimizer step, though Adam has momentum; 4
    to 6 end the run."""
    place = a_world(world, tmp_path / "x")
    plant = ("import torch\nmake, calls, did = module.make_oracle, [0], [0]\ndef silent(*args, "
             "**more):\n"
             "    oracle = make(*args, **more)\n    score = oracle.score\n    def scored(*asked):\n"
             "        values, ok = score(*asked)\n        calls[0] += 1\n"
             "        return values, ok & (calls[0] in (1, 3, 4))\n    oracle.score = scored\n    "
             "return oracle\n"
             "module.make_oracle = silent\nadd = module.Run.scored_or_stop\ndef noted(run, step, "
             "*rest):\n"
             "    print('STEPS', step, did[0], flush=True)\n    did[0] = 0\n    return add(run, "
             "step, *rest)\n"
             "module.Run.scored_or_stop = noted\nreal = torch.optim.AdamW.step\n"
             "def counted(*args, **more):\n    did[0] += 1\n    return real(*args, **more)\n"
             "torch.optim.AdamW.step = counted")
    assert forked.run(place, *SCRIPTS[name][0], plant=plant) == [1], forked.said()
    told = [line.split()[1:] for line in forked.said().splitlines() if line.startswith("STEPS")]
    moved = {int(step): int(updates) > 0 for step, updates in told}  # in the step before this one
    assert moved == {0: False, 1: True, 2: False, 3: True, 4: True, 5: False, 6: False}
    said = [line for line in forked.said().splitlines() if "ranked nothing" in line]
    assert len(said) == 1 and said[0].startswith("step 6: ") and "--resume" in said[0]


def run_of(folder, steps):
    """A run of so many steps, of which there is but its log."""
    run = object.__new__(plumbing.run.Run)
    run.log = plumbing.run.Log(folder, steps, 0, 0)
    return run


@pytest.mark.parametrize(
    "groups, learns",
    [  # of each step (ordered, asked in vain, all alike and ok, all alike and not)
        (
            [(3, 1, 0, 0), (0, 0, 4, 0), (1, 3, 0, 0)],
            [True, True, True],
        ),  # a live oracle; a step of equal answers
        ([(0, 0, 4, 0)] * 9, [True] * 9),  # a policy that always says the same needs no order
        (
            [(0, 1, 3, 0)] * 3,
            [False, False, "end"],
        ),  # equal answers are tied unasked: they hide no dead oracle
        (
            [(0, 1, 3, 0), (0, 0, 4, 0), (0, 4, 0, 0), (0, 0, 4, 0), (0, 1, 0, 3)],
            [False, False, False, False, "end"],
        ),
        (
            [(0, 2, 2, 0), (0, 2, 2, 0), (1, 0, 3, 0), (0, 4, 0, 0), (0, 4, 0, 0)],
            [False, False, True, False, False],
        ),
        ([(0, 0, 0, 4)] * 3, [False, False, "end"]),
        ([(0, 0, 3, 1)] * 4, [True] * 4),
    ],
)
def test_only_groups_that_need_an_order_show_that_an_oracle_lives(tmp_path, groups, learns):
    run, answers = run_of(tmp_path, 50), (["a", "b"], ["a", "c"], ["The a.", "a"], ["a", "a"])
    for step, (numbers, learn) in enumerate(zip(groups, learns)):
        some = [answer for answer, n in zip(answers, numbers) for _ in range(n)]
        ok = torch.tensor(
            [good for good, n in zip((True, False, True, False), numbers) for _ in range(n)]
        )
        if learn == "end":
            with pytest.raises(SystemExit, match=f"step {step}: .*ranked nothing"):
                run.scored_or_stop(step, ok, differ(some))
        else:
            assert run.scored_or_stop(step, ok, differ(some)) is learn


def test_masked_groups_stand_on_the_progress_line(tmp_path, capsys):
    run, needed = run_of(tmp_path, 3), torch.tensor([True] * 4)
    for step, ok in enumerate(([1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1])):
        run.scored_or_stop(step, torch.tensor(ok, dtype=torch.bool), needed)
        run.log.add("rollout/len", 1.0)
        run.log.step(step, ["rollout/len"])
    said = capsys.readouterr().out.splitlines()
    assert ["masked" in line for line in said] == [False, True, False] and "masked 2 |" in said[1]
