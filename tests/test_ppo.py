"""PPO: each equation against numbers by hand or a slow double loop, the loop (`main`) against a
plain version."""

import ast
import json
import math
import re
import shutil
import signal
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO
from inside import apart, main_of
from safetensors.torch import load_file
from test_video_llm import lively, plain_logprobs, plain_scores

import plumbing.run
import ppo_rlaif
from inputs.features import FeatureCache
from oracle import ReferenceOracle, RewardModelOracle, differ, finite
from plumbing.batches import by_length
from plumbing.flags import parse_args
from plumbing.validation import Validation
from ppo_rlaif import (Args, Roles, adapter_of, centered, gae, lr_at, moments, next_kl_coef,
                       normal_of, policy_loss, shaped_scores, token_rewards, value_loss, whiten)
from video_llm import (Prefix, add_lora, add_scalar_head, answer_mask, load_model, save_model,
                       token_scores)

t = torch.tensor
LENGTHS = t([3, 1, 4, 2])
MASK = answer_mask(LENGTHS, 4)
PPO = ["ppo_rlaif.py", "--data", "data/moving_shapes/train.json", "--oracle", "reference",
       "--prompts_per_step", "4",
       "--tokens_per_micro_batch", "300", "--G", "3", "--max_new_tokens", "6", "--eval_data", "",
       "--value_warmup", "0"]
SHORT = [*PPO, "--steps", "2"]


def near(a, b, eps=1e-6):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=eps,
                               atol=eps)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- equations ------------------------------------------------------------------------------------
def test_the_score_stands_at_the_last_real_token_and_the_kl_at_each():
    logprobs, ref = -noise(4, 4).abs(), -noise(4, 4, seed=1).abs()
    logprobs[MASK == 0] = 77.0  # whatever stands behind an answer
    rewards = token_rewards(t([1.0, 2.0, 3.0, 4.0]), logprobs, ref, LENGTHS, 0.5)
    for n, length in enumerate(LENGTHS.tolist()):
        for i in range(4):
            kl = logprobs[n, i] - ref[n, i]
            expected = (-0.5 * kl if i < length else 0.0) + (n + 1 if i == length - 1 else 0.0)
            near(rewards[n, i], expected)
    # no KL: the score alone
    near(token_rewards(t([1.0, 2.0, 3.0, 4.0]), ref, ref, LENGTHS, 9.0).sum(-1), [1, 2, 3, 4])


def test_kl_penalty_pays_back():
    """k1 has both signs: a token likelier than in the start costs, one less likely earns (no clamp
    at 0)."""
    rewards = token_rewards(t([0.0]), t([[-1.0, -3.0, -9.0]]), t([[-2.0, -1.0, -9.0]]), t([3]), 0.1)
    near(rewards, [[-0.1, 0.2, 0.0]])


def test_shaped_scores_by_hand():
    scores, ended, lengths = t([[1.0, 1.0, 1.0]]), t([[True, False, True]]), t([[2, 8, 4]])
    near(shaped_scores(scores, ended, lengths, 3.0, 0.0, 8), [[1, -2, 1]])
    near(shaped_scores(scores, ended, lengths, 3.0, 10.0, 8), [[1 - 2.5, -2 - 10, 1 - 5]])


def test_gae_by_hand():
    # one answer of two tokens; delta_1 = 5 - 3 = 2, delta_0 = 1 + .5*3 - 2 = .5, A_0 = .5 + .5*.8*2
    # = 1.3
    A, R = gae(t([[1.0, 5.0, 0.0]]), t([[2.0, 3.0, 9.0]]), t([[1.0, 1.0, 0.0]]), 0.5, 0.8)
    near(A, [[1.3, 2.0, 0.0]])
    near(R, [[3.3, 5.0, 0.0]])


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.8, 0.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, over an answer's
    real tokens."""
    rewards, values = noise(4, 4) * MASK, noise(4, 4, seed=1)
    values[MASK == 0] = 55.0  # a value model has opinions on pads: nobody asks
    A, R = gae(rewards, values, MASK, gamma, lam)
    for n, T in enumerate(LENGTHS.tolist()):
        V = [*values[n, :T].tolist(), 0.0]
        for i in range(T):
            expected = 0.0
            for k in range(i, T):
                expected += (gamma * lam) ** (k - i) * (
                    rewards[n, k].item() + gamma * V[k + 1] - V[k]
                )
            near(A[n, i], expected, 1e-5)
            near(R[n, i], expected + V[i], 1e-5)
        assert (A[n, T:] == 0).all() and (R[n, T:] == 0).all()


def test_with_lambda_1_returns_are_the_rewards_to_come_whatever_the_values():
    rewards = noise(4, 4) * MASK
    for seed in (1, 2):
        _, R = gae(rewards, noise(4, 4, seed=seed) * MASK, MASK, 1.0, 1.0)
        near(R, rewards.flip(1).cumsum(1).flip(1) * MASK)


def test_whitening_sees_real_tokens_only():
    x = 3 * noise(4, 4) + 7
    real = x[MASK == 1]
    mean, std = moments(x.masked_fill(MASK == 0, 1e6), MASK)
    near(mean, real.mean(), 1e-5)
    near(std, real.std(unbiased=False), 1e-5)
    w = whiten(x.masked_fill(MASK == 0, 1e6), MASK, mean, std)
    near(w[MASK == 1].mean(), 0.0)
    near(w[MASK == 1].std(unbiased=False), 1.0)
    assert (w[MASK == 0] == 0).all()
    # no sign is lost
    assert (w[0].argsort()[-3:] != 3).any() and (w[MASK == 1].argsort() == real.argsort()).all()


def test_whitening_of_equal_advantages_is_finite():
    assert whiten(torch.ones(2, 3), torch.ones(2, 3),
                  *moments(torch.ones(2, 3), torch.ones(2, 3))).abs().max() == 0


@pytest.mark.parametrize("log_ratio, A, loss, slope", [
    (0.0, 2.0, -2.0, -2.0),  # on-policy: the gradient is -A
    (math.log(1.5), 2.0, -2.4, 0.0),  # good and already likelier than 1.2: no more
    (math.log(0.5), 2.0, -1.0, -1.0),  # good and unlikelier: the gradient lives
    (math.log(1.5), -2.0, 3.0, 3.0),  # bad and likelier: the gradient lives
    (math.log(0.5), -2.0, 1.6, 0.0)])    # bad and already below 0.8: no more
def test_policy_loss_sign_table(log_ratio, A, loss, slope):
    logprobs = t([[-1.0 + log_ratio]], requires_grad=True)
    out = policy_loss(logprobs, t([[-1.0]]), t([[A]]), 0.2)
    near(out, [[loss]])
    near(torch.autograd.grad(out.sum(), logprobs)[0], [[slope]])


@pytest.mark.parametrize("value, old, target, loss, slope", [
    (1.0, 1.0, 3.0, 2.0, -2.0),  # inside the range: plain squared error
    # has moved by more than 0.2 towards its return: waits for the next batch
    (1.5, 1.0, 3.0, 0.5 * 1.8**2, 0.0),
    (0.5, 1.0, 3.0, 0.5 * 2.5**2, -2.5),  # has moved the wrong way: comes back
    (3.5, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # shot past it
    (3.0, 2.9, 1.0, 2.0, 2.0)])
def test_value_clipping(value, old, target, loss, slope):
    v = t([[value]], requires_grad=True)
    out = value_loss(v, t([[old]]), t([[target]]), 0.2)
    near(out, [[loss]])
    near(torch.autograd.grad(out.sum(), v)[0], [[slope]])


def test_kl_controller():
    near(next_kl_coef(0.1, 6.0, 6.0, 256, 10000), 0.1)
    near(next_kl_coef(0.1, 6.6, 6.0, 100, 1000), 0.1 * (1 + 0.1 * 0.1))
    near(next_kl_coef(0.1, 60.0, 6.0, 100, 1000), 0.1 * (1 + 0.2 * 0.1))  # clipped
    near(next_kl_coef(0.1, 0.0, 6.0, 100, 1000), 0.1 * (1 - 0.2 * 0.1))


def test_schedules():
    linear = [lr_at(s, 100, 1.0, 4, "linear") for s in (0, 1, 4, 50, 99)]
    near(linear, [0.2, 0.4, 0.96, 0.5, 0.01])
    near([lr_at(s, 100, 2.0, 4, "cosine") for s in (0, 50, 75)],
         [0.4, 1.0, 2 * 0.5 * (1 - math.cos(math.pi / 4))])


def test_centred_scores_compare_the_answers_to_one_question():
    near(centered(t([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0]])), [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    # what Bradley-Terry leaves open changes nothing
    near(centered(t([[3.0, 1.0, 2.0]]) + 50), [[1.0, -1.0, 0.0]])


def test_scores_are_normalised_once_over_what_could_be_scored():
    scores, ok = t([[1.0, 3.0], [100.0, 100.0], [5.0, 7.0]]), t([True, False, True])
    mean, gain = normal_of(scores, ok)
    near((scores[ok] - mean) * gain, [[-3 / 5**0.5, -1 / 5**0.5], [1 / 5**0.5, 3 / 5**0.5]])
    near(normal_of(torch.full((2, 2), 0.25), t([True, True])), (0.25, 1.0))  # nothing to scale by
    for bad in (
        math.inf,
        -math.inf,
        math.nan,
        3.4e38,
    ):  # of a masked group, whose numbers are nobody's
        scores[1] = bad
        near(normal_of(scores, ok), (mean, gain))


def test_scores_that_are_no_numbers_are_zeros_of_masked_groups():
    for bad in (math.inf, -math.inf, math.nan):
        scores, ok = finite(t([[1.0, 2.0], [bad, 4.0], [5.0, 6.0]]))
        assert scores.tolist() == [[1, 2], [0, 0], [5, 6]] and ok.tolist() == [True, False, True]
        points, ok = finite(torch.full((2, 3, 4), 2.0).index_put((t([1]), t([2]), t([3])), t(bad)))
        assert (points[0] == 2).all() and (points[1] == 0).all() and ok.tolist() == [True, False]


def test_a_mini_batch_without_scored_answers_moves_no_weights(world, policy, monkeypatch):
    """One of four questions is scored: of two mini-batches one has nothing to learn from."""
    score, steps, real = ReferenceOracle.score, [], torch.optim.AdamW.step

    def one_alone(self, *asked):
        scores, ok = score(self, *asked)
        return scores, ok & (torch.arange(len(ok)) == 2)

    monkeypatch.setattr("oracle.ReferenceOracle.score", one_alone)
    monkeypatch.setattr(
        "ppo_rlaif.differ", lambda answers: torch.ones(len(answers), dtype=torch.bool)
    )
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a, **k: steps.append(1) or real(self, *a, **k)
    )
    main_of(
        monkeypatch, world, *SHORT, "--name", "sparse", "--ppo_epochs", "3", "--mini_batches", "2"
    )
    assert len(steps) == 2 * 3  # steps x epochs, one mini-batch each


def test_micro_batches_hold_every_question_once():
    parts = by_length(t([0, 2, 3, 4]), t([6, 4, 18, 2, 7]), 21)
    assert [p.tolist() for p in parts] == [[3, 0, 4], [2]]
    assert not by_length(t([], dtype=torch.long), t([6, 4]), 21)


# --- what the header says -------------------------------------------------------------------------
def test_every_implementation_detail_is_where_the_header_says():
    text = (REPO / "ppo_rlaif.py").read_text()
    header = ast.get_docstring(ast.parse(text), clean=False)
    body = text[text.index(header) + len(header) :]
    listed = re.findall(r"^ *(?:rollout|reward|value|update)? *I(\d+) +(.*)$", header, re.M)
    assert [int(n) for n, _ in listed] == list(range(1, len(listed) + 1)) and len(listed) >= 20
    used = {int(n) for n in re.findall(r"\bI(\d+)\b", body)}
    numbers = set(range(1, len(listed) + 1))
    assert used == numbers, f"not in the file: {numbers - used}"
    functions = {n.name: ast.get_source_segment(text, n) for n in ast.walk(ast.parse(text))
                 if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    elsewhere = [(REPO / f"{name}.py").read_text() for name in ("video_llm",)]
    steps = re.split(r"^        # (\d)\. ", body, flags=re.M)
    steps = dict(zip(map(int, steps[1::2]), steps[2::2]))  # {number of the step: its text}
    for n, line in listed:
        where = re.split(r"\s{2,}", line.strip())[-1]
        places = [steps[int(k)] for k in re.findall(r"step (\d)", where)]
        for name in (name.split(".")[-1]
                     for name in re.findall(r"[A-Za-z_.]{3,}", where.replace("step", ""))):
            if name in functions:
                places.append(functions[name])
            else:
                assert any(re.search(rf"(def|class) {name}\b", source)
                           for source in elsewhere), f"{line}: no {name}"
        assert all(re.search(rf"\bI{n}\b", place)
                   for place in places), f"I{n} is not where the header says: {where}"


def preset(*flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo_rlaif.py", *flags])
    return parse_args(Args)


def test_preset_paper_is_the_published_script_and_flags_still_win(monkeypatch):
    args = preset("--preset", "paper", monkeypatch=monkeypatch)
    assert ((args.lr, args.kl_coef, args.target_kl, args.gamma, args.lam)
            == (3e-5, 0.1, 0.0, 1.0, 1.0))
    assert (args.prompts_per_step, args.G, args.mini_batches, args.ppo_epochs) == (256, 1, 2, 2)
    assert (args.reward_scale, args.missing_eos_penalty, args.length_penalty) == (10.0, 8.0, 10.0)
    assert ((args.quantize, args.lora_r, args.lora_alpha, args.max_new_tokens)
            == ("nf4", 64, 16, 896))
    assert (args.adam_beta2, args.adam_eps, args.zero_value_head) == (0.999, 1e-8, True)
    assert args.steps == round(99_000 / args.prompts_per_step)  # one epoch
    default = preset(monkeypatch=monkeypatch)
    assert default.lr != args.lr and default.lora_r == 0
    assert {f for f in Args.PRESETS["paper"]} <= {f for f in vars(args)}
    ours = preset("--preset", "paper", "--lr", str(default.lr), "--lora_r", "8",
                  monkeypatch=monkeypatch)
    # even where it is the other default
    assert (ours.lr, ours.lora_r, ours.kl_coef) == (default.lr, 8, 0.1)


def test_the_preset_multiplies_the_whole_reward_by_hand(monkeypatch):
    """Score 1, no EOS, 896 tokens, no KL: 10 (1 - 8 - 10) = -170; a nat at the first token: -1
    more."""
    args = preset("--preset", "paper", monkeypatch=monkeypatch)
    shaped = shaped_scores(t([[1.0]]), t([[False]]), t([[896]]), args.missing_eos_penalty,
                           args.length_penalty, args.max_new_tokens)
    near(shaped, [[-17.0]])
    logprobs = torch.full((1, 896), -2.0)
    of = lambda ref: token_rewards(shaped.view(-1), logprobs, ref, t([896]), args.kl_coef,
                                   args.reward_scale)
    near(of(logprobs)[0, -1], -170.0)
    assert not of(logprobs)[0, :-1].any()
    unlikelier = logprobs.clone()
    unlikelier[0, 0] -= 1.0
    near((of(unlikelier)[0, 0], of(unlikelier).sum()), (-1.0, -171.0), 1e-5)


def test_reward_scale_in_the_loop(world, policy, reward_model, monkeypatch):
    """The whole reward times 10; with --zero_value_head the first values are 0."""
    flags = ["--reward_scale", "10", "--center_scores", "False", "--missing_eos_penalty", "8",
             "--length_penalty", "10", "--oracle", "reward_model", "--reward_model", reward_model,
             "--lr", "1e-2"]
    for name, zero in (("scaled", False), ("scaled_zero", True)):
        main_of(monkeypatch, world, *SHORT, *flags, "--zero_value_head", str(zero), "--name", name)
        first, second = rows(world / f"runs/ppo_rlaif/{name}_s0")
        assert (first["value/value"] == 0) == zero and second["objective/kl"] != 0
        for row in (first, second):
            price = 8 * (1 - row["rollout/eos_rate"]) + 10 * row["rollout/len"] / 6
            total = 10 * (row["objective/score"] - price - 0.1 * row["objective/kl"])
            assert row["objective/reward_total"] == pytest.approx(total, rel=1e-4)
            assert row["objective/kl_penalty"] == pytest.approx(-row["objective/kl"], abs=1e-3)


BAD = ["--G 0", "--G 1", "--steps 0", "--oracle god", "--oracle reference,god", "--stop_oracle god",
       "--preset best",
       "--lr 0",
       "--oracle judge --stop_oracle judge", "--quantize nf4", "--quantize int8 --lora_r 4",
       "--gamma 1.5", "--lam -1",
       "--prompts_per_step 7", "--mini_batches 5", "--ppo_epochs 0", "--clip_range 1",
       "--clip_range 0", "--lora_r -1",
       "--value_clip_range 0", "--kl_coef -1", "--target_kl 6 --kl_coef 0", "--schedule step",
       "--adam_eps 0",
       "--stop_oracle context --eval_questions 0", "--patience 0", "--temperature 0",
       "--missing_eos_penalty -1",
       "--kl_coef nan", "--lr nan", "--beta 0.1", "--stop_oracle api", "--resume --unknown",
       "--random_reward maybe",
       "--G 1 --center_scores False --oracle judge"]


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capfd, flags):
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, tmp_path, "ppo_rlaif.py", *flags.split())
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1, err
    assert err.startswith("ppo_rlaif.py: "), err
    assert not list(tmp_path.iterdir())


# --- the loop -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reward_model(policy):
    """A reward model without a narrative on the policy's own network: whole, and as an adapter."""
    folder = policy.parent.parent / "made/reward"
    model, processor = load_model(policy)
    torch.manual_seed(3)
    adapter = add_lora(add_scalar_head(model), 4, 16)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if p.requires_grad:
                p += 0.3 * noise(*p.shape, seed=len(name))
    save_model(adapter, processor, folder / "adapter")
    save_model(load_model(folder / "adapter")[0].merge_and_unload(), processor, folder / "final")
    for name in ("adapter", "final"):
        about = dict(narrative_clips=0, narrative_model="", answer_first=False, guided=False)
        (folder / name / "reward_model.json").write_text(json.dumps(about))
    return folder / "final"


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def weights(folder):
    return load_file(folder / "final/model.safetensors")


def moved(policy, folder):
    a, b = load_file(policy / "model.safetensors"), weights(folder)
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_end_to_end(world, policy, monkeypatch, capfd):
    flags = ["--eval_data", "data/moving_shapes/val.json", "--eval_questions", "5", "--eval_steps",
             "1",
             "--stop_oracle", "judge", "--oracle_model", policy, "--lr", "1e-2", "--save_steps",
             "1"]
    main_of(monkeypatch, world, *SHORT, *flags, "--name", "e2e")
    folder = world / "runs/ppo_rlaif/e2e_s0"
    first, second, last = rows(folder)
    assert first["objective/kl"] == 0  # exactly, before the first update
    assert abs(first["objective/kl_penalty"]) < 1e-6  # a difference of two sums
    assert second["objective/kl"] != 0 and second["objective/kl_penalty"] != 0
    # four optimizer steps per batch
    assert first["policy/ratio"] != 1 and first["policy/approx_kl"] > 0
    # score mean is 0
    assert first["objective/reward_total"] == pytest.approx(first["rollout/eos_rate"] - 1, abs=1e-5)
    assert second["objective/kl_penalty"] == pytest.approx(-0.1 * second["objective/kl"], rel=1e-4)
    # a zero head
    assert (first["value/value"] == 0
            and first["value/explained_variance"] == pytest.approx(0, abs=1e-5))
    assert (
        first["eval/margin"] == 0
        and set(last) == {"step", "eval/accuracy", "eval/margin"}
        and last["step"] == 2
    )
    assert not any(name.startswith("vision_tower") for name in moved(policy, folder))
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert (len(sample["answers"]) == len(sample["scores"]) == len(sample["kl"])
            == len(sample["advantages"]) == 3)
    labelled = set(json.loads((policy.parent / "labelled_clips.json").read_text()))
    assert (sample["video"] not in labelled
            and "6 of 6 clips labelled in SFT" in capfd.readouterr().out)
    assert load_model(folder / "final")[0].config.scalar_head is False
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob("*tmp*"))


def test_first_steps_teach_the_value_model_alone(world, policy, monkeypatch):
    main_of(monkeypatch, world, *SHORT, "--value_warmup", "2", "--name", "warmup",
            "--random_reward", "True")
    folder = world / "runs/ppo_rlaif/warmup_s0"
    assert not moved(policy, folder)
    assert all("policy/ratio" not in row and row["objective/kl"] == 0 for row in rows(folder))
    assert rows(folder)[0]["value/grad_norm"] > 0 and rows(folder)[1]["value/value"] != 0


def test_the_gradient_of_a_step(world, policy, monkeypatch):
    """Policy and value gradient against the slow way: scores 3, 1, 2, the third of four questions
    not scored, a reference that is not the start, a value model that is not the policy, one answer
    per forward pass, no packing."""
    seen = {}

    def stop_there(params, limit):
        seen[len(seen)] = [p.grad.clone() if p.grad is not None else torch.zeros_like(p)
                           for p in params]
        if len(seen) == 2:
            sys.exit("enough")
        return t(1.0)

    def generate(*args, **kwargs):
        seen_rollout.append((args[1], original(*args, **kwargs)))
        return seen_rollout[-1][1]

    class Lively(Roles):
        def __init__(self, *args):
            super().__init__(*args)
            lively(self.value, seed=5)
            with torch.no_grad():
                self.value.score_head.weight.copy_(
                    noise(1, self.value.score_head.in_features) * 0.3
                )

            @contextmanager
            def reference():
                yield other
            self.reference = reference
            seen_roles.append((self.value, [*self.params["policy"]], [*self.params["value"]]))

    seen_rollout, seen_roles, original = [], [], ppo_rlaif.generate
    other = lively(load_model(policy)[0], seed=4).requires_grad_(False)
    ok = t([True, True, False, True])
    monkeypatch.setattr(ppo_rlaif, "generate", generate)
    monkeypatch.setattr(ppo_rlaif, "Roles", Lively)
    # D9: a constant each
    scores = t([[3.0, 1.0, 2.0], [-7.0, -9.0, -8.0], [3.0, 1.0, 2.0], [13.0, 11.0, 12.0]])
    monkeypatch.setattr("oracle.ReferenceOracle.score", lambda *_: (scores, ok))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop_there)
    flags = ["--mini_batches", "1", "--ppo_epochs", "1", "--temperature", "0.7", "--kl_coef", "0.3",
             "--gamma", "0.9",
             "--lam", "0.8", "--missing_eos_penalty", "2", "--length_penalty", "0.5", "--name",
             "gradient"]
    with pytest.raises(SystemExit, match="enough"):
        main_of(monkeypatch, world, *SHORT, *flags)

    (prefix, (tokens, lengths, _)), = seen_rollout
    value_model, policy_names, value_names = seen_roles[0]
    model, processor = load_model(policy)
    eos = processor.tokenizer.eos_token_id
    logprobs, _ = plain_logprobs(model, prefix, tokens, lengths, 0.7)
    values = plain_scores(value_model, prefix, tokens, lengths, before=True)
    reference, _ = plain_logprobs(other, prefix, tokens, lengths, 0.7)
    A, R = torch.zeros(logprobs.shape), torch.zeros(logprobs.shape)
    used = torch.zeros(logprobs.shape)
    std = (2 / 3) ** 0.5  # of 3, 1, 2
    for n, T in enumerate(lengths.flatten().tolist()):
        if not ok[n // 3]:
            continue
        ended = tokens.view(12, -1)[n, T - 1] == eos
        score = ([3.0, 1.0, 2.0][n % 3] - 2) / std - (0 if ended else 2) - 0.5 * T / 6
        V, kl = [*values[n, :T].tolist(), 0.0], (logprobs - reference)[n].tolist()
        for i in range(T):
            r = [-0.3 * kl[k] + (score if k == T - 1 else 0) for k in range(T)]
            A[n, i] = sum((0.9 * 0.8) ** (k - i) * (r[k] + 0.9 * V[k + 1] - V[k])
                          for k in range(i, T))
            R[n, i], used[n, i] = A[n, i] + V[i], 1
    # ragged
    assert Counter(lengths.flatten().tolist()).keys() - {6} and used.sum() < (tokens >= 0).sum()
    real = A[used == 1]
    white = (A - real.mean()) / real.std(unbiased=False) * used
    policy_term, value_term = -white * logprobs, 0.5 * (values - R).square() * used
    for k, loss, network, names in ((0, policy_term.sum() / used.sum(), model, policy_names),
                                    (1, value_term.sum() / used.sum(), value_model, value_names)):
        named = dict(network.named_parameters())
        expected = torch.autograd.grad(loss, [named[n] for n in names])
        ours, theirs = (torch.cat([g.flatten() for g in grads]).double()
                        for grads in (seen[k], expected))
        assert theirs.norm() > 0.01 and (ours - theirs).norm() < 2e-4 * theirs.norm(), k


def test_pad_may_be_eos(world, policy, monkeypatch):
    """Masks come from lengths: with another pad token, in prompts and behind answers, not a number
    changes."""
    for name in ("word", "eos"):
        start = world / f"runs/sft/pad_{name}/final"
        shutil.copytree(policy.parent, start.parent)
        model, processor = load_model(policy)
        eos = processor.tokenizer.eos_token
        word = processor.tokenizer.tokenize("what")[0]
        processor.tokenizer.pad_token = eos if name == "eos" else word
        assert ((processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id)
                == (name == "eos"))
        save_model(model, processor, start)
        main_of(monkeypatch, world, *SHORT, "--model", start, "--name", f"pad_{name}")
    a, b = (world / f"runs/ppo_rlaif/pad_{name}_s0" for name in ("word", "eos"))
    assert rows(a) == rows(b) and all(torch.equal(x, y)
                                      for x, y in zip(weights(a).values(), weights(b).values()))


def test_the_value_model_starts_from_the_reward_model(world, policy, reward_model, monkeypatch):
    """Its head is rescaled with the scores: at an answer's end it says the normalised score of the
    first batch; of centred scores it expects nothing yet."""
    seen = {}

    def score(self, clips, questions, answers):
        seen["asked"] = clips, questions, answers
        seen["scores"] = original(self, clips, questions, answers)
        return seen["scores"]

    def stop_there(self, mean, gain):
        rescale(self, mean, gain)
        seen["roles"], seen["normal"] = self, (mean, gain)
        sys.exit("enough")

    original, rescale = RewardModelOracle.score, Roles.rescale_head
    monkeypatch.setattr(RewardModelOracle, "score", score)
    monkeypatch.setattr(Roles, "rescale_head", stop_there)
    flags = [*SHORT, "--oracle", "reward_model", "--reward_model", reward_model]
    with pytest.raises(SystemExit, match="enough"):
        main_of(monkeypatch, world, *flags, "--name", "rm_centred")
    assert (not seen["roles"].value.score_head.weight.any()
            and not seen["roles"].value.score_head.bias.any())
    with pytest.raises(SystemExit, match="enough"):
        main_of(monkeypatch, world, *flags, "--center_scores", "False", "--name", "rm")
    roles, (scores, _), (mean, gain) = seen["roles"], seen["scores"], seen["normal"]
    near(((scores - mean) * gain).mean(), 0.0, 1e-5)
    near(((scores - mean) * gain).std(unbiased=False), 1.0, 1e-5)
    clips, questions, answers = seen["asked"]
    cache = FeatureCache(roles.value, roles.processor, world / "cache")
    prefix = Prefix.build(roles.processor, cache, questions, clips)
    rows = [roles.processor.answer_ids(a) for group in answers for a in group]
    lengths = torch.tensor([len(row) for row in rows]).view(len(answers), -1)
    tokens = roles.processor.pad(rows, "right")[0].view(*lengths.shape, -1)
    with torch.no_grad():
        values = token_scores(roles.value, prefix, tokens, lengths).view(tokens.shape)
    near(values.gather(-1, lengths.unsqueeze(-1) - 1).squeeze(-1), (scores - mean) * gain, 1e-4)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_lora_is_one_network_in_four_roles(
    world, policy, reward_model, monkeypatch, capfd, quantize
):
    seen = []

    class Seen(Roles):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self)
    monkeypatch.setattr(ppo_rlaif, "Roles", Seen)
    loads = []
    monkeypatch.setattr("plumbing.run.load_model",
                        lambda *a, **k: loads.append(a) or load_model(*a, **k))
    monkeypatch.setattr("oracle.load_model", lambda *a, **k: pytest.fail("a second network"))
    name = f"lora_{quantize}"
    main_of(monkeypatch, world, *SHORT, "--oracle", "reward_model", "--reward_model", reward_model,
            "--lora_r", "4",
            "--quantize", quantize, "--lr", "1e-2", "--name", name)
    assert "one base network: policy, value, reward, reference" in capfd.readouterr().out
    assert len(loads) == 1 and len(seen) == 1
    folder = world / f"runs/ppo_rlaif/{name}_s0"
    first, second = rows(folder)
    assert first["objective/kl"] == 0 != second["objective/kl"]
    assert first["objective/score"] != second["objective/score"] and second["value/value"] != 0
    changed = moved(policy, folder)
    assert changed and all(n.startswith("language_model.") and n.endswith("proj.weight")
                           for n in changed)
    assert ({p.name for p in (folder / "adapter").iterdir()}
            >= {"adapter_model.safetensors", "adapter_config.json"})
    assert not (folder / "adapter/value").exists() and not (folder / "adapter/reward").exists()


def test_roles_take_turns(policy, reward_model):
    """Training one role leaves the others as they are, and the reward adapter scores as the reward
    model does."""
    args = Args(oracle="reward_model", reward_model=str(reward_model), model=str(policy), lora_r=4)
    torch.manual_seed(0)
    run = plumbing.run.Run.__new__(plumbing.run.Run)
    run.args, run.checkpoint, run.device = args, None, "cpu"
    roles = Roles(run)
    assert roles.policy is roles.value and set(roles.adapters) == {"policy", "value", "reward"}
    names = {role: set(params) for role, params in roles.params.items()}
    assert not names["policy"] & names["value"] and not any(
        "reward" in n for ns in names.values() for n in ns
    )
    assert (any("score_head" in n for n in names["value"])
            and not any("score_head" in n for n in names["policy"]))
    before = {n: p.detach().clone() for n, p in roles.policy.named_parameters()}
    ids = t([[5, 6, 7]])
    prefix = Prefix(ids, torch.ones_like(ids), None, None)
    tokens, lengths = t([[[8, 9], [9, 2]]]), t([[2, 1]])
    with roles.as_("reward") as model, torch.no_grad():
        ours = token_scores(model, prefix, tokens, lengths)
    whole = load_model(reward_model)[0]
    near(ours, token_scores(whole, prefix, tokens, lengths).detach(), 1e-4)
    with roles.as_("value") as model:
        near(token_scores(model, prefix, tokens, lengths).detach(), ours, 1e-4)
        token_scores(model, prefix, tokens, lengths).sum().backward()
    graded = {n for n, p in roles.policy.named_parameters() if p.grad is not None}
    assert graded and graded <= names["value"]
    optimizer = torch.optim.SGD([p for params in roles.params.values() for p in params.values()],
                                lr=1.0)
    optimizer.step()
    assert {n for n, p in roles.policy.named_parameters()
            if not torch.equal(p, before[n])} <= names["value"]
    with roles.as_("reward") as model, torch.no_grad():
        assert torch.equal(token_scores(model, prefix, tokens, lengths), ours)


def test_an_adapter_of_another_base_is_refused(world, policy, reward_model, monkeypatch, tmp_path):
    assert adapter_of(reward_model, policy) == reward_model.parent / "adapter"
    assert adapter_of(reward_model.parent / "adapter", policy) == reward_model.parent / "adapter"
    assert adapter_of(reward_model, tmp_path) is None and adapter_of(tmp_path, policy) is None
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, world, *SHORT, "--value_model", policy, "--lora_r", "4", "--name",
                "wrong_base")
    assert "--value_model" in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("flags", [["--value_model", "nowhere"], ["--model", "nowhere"],
                                   ["--data", "nowhere.json"],
                                   ["--oracle", "reward_model", "--reward_model", "nowhere"]])
def test_missing_files_are_one_line(world, policy, monkeypatch, flags):
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, world, *SHORT, *flags, "--name", f"missing{len(' '.join(flags))}")
    assert "nowhere" in str(stop.value) and "\n" not in str(stop.value)


# --- the early stop -------------------------------------------------------------------------------
class FakeRoles:
    def __init__(self):
        self.processor, self.saved = None, []

    as_ = lambda self, name: nullcontext()
    reference = lambda self: nullcontext()
    save_policy = lambda self, file: self.saved.append(file.name)


def fake_run(folder, **flags):
    """A run of 100 steps in one process."""
    args = Args(oracle="reference", stop_oracle="context", patience=2, eval_steps=10, steps=100,
                **flags)
    run = plumbing.run.Run.__new__(plumbing.run.Run)
    run.args, run.rank, run.world, run.folder, run.first_step = args, 0, 1, folder, 0
    run.start(100)
    return run


def test_the_best_policy_is_kept_and_patience_ends(tmp_path, monkeypatch):
    """Margins 0, .3, .2, .3, .1 every 10 steps, patience 2: the second is the best, the fourth is
    no progress."""
    margins = iter([0.0, 0.3, 0.2, 0.3, 0.1])
    texts = iter([["z", "z"]] + [["a", "a"]] * 5)
    monkeypatch.setattr("plumbing.validation.answer", lambda *asked: next(texts))
    # the second question cannot be scored and must not count
    fake = lambda clips, questions, answers: (
        t([[next(margins) + 1, 1.0], [9.0, 0.0]]),
        t([True, False]),
    )
    oracle = SimpleNamespace(score=fake)
    run, roles, state = fake_run(tmp_path), FakeRoles(), dict(best=None, best_step=0)
    records = [dict(clip=None, question="q", answer=a) for a in ("a", None)]
    validate = Validation(run, roles, records, None, oracle, differ, state)
    assert [validate(step) for step in (0, 5, 10, 20, 25, 30, 40)] == [False] * 5 + [True, True]
    assert (state["best_step"] == 10 and state["best"] == pytest.approx(0.3)
            and len(roles.saved) == 2)
    assert run.log.sums["eval/accuracy"] == (5.0, 5.0)  # only what has a label


def test_without_held_out_questions_nothing_is_measured(tmp_path):
    run = fake_run(tmp_path)
    validate = Validation(run, FakeRoles(), [], None, None, differ, {})
    assert not validate(0) and not validate(100) and not run.log.sums


def test_a_policy_that_still_says_what_the_start_says_is_not_stopped(tmp_path, monkeypatch):
    """As in the steps in which only the value model learns. The oracle is asked about no pair then,
    so it has seen no lack of progress; from the first answer that differs on it counts."""
    texts = iter([*[["a"]] * 6, *[["b"]] * 3])
    monkeypatch.setattr("plumbing.validation.answer", lambda *asked: next(texts))
    oracle = SimpleNamespace(score=lambda clips, questions, answers: (
        t([[0.5 - 0.1 * (a != b), 0.5] for a, b in answers]), t([True])))
    state, records = dict(best=None, best_step=0), [dict(clip=None, question="q", answer="b")]
    roles = FakeRoles()
    validate = Validation(fake_run(tmp_path), roles, records, None, oracle, differ, state)
    # patience 2: two evaluations with other answers, both worse, after five with the start's
    assert [validate(step) for step in (0, 10, 20, 30, 40, 50, 60)] == [False] * 6 + [True]
    assert state["best"] == 0 and len(roles.saved) == 1


def test_an_early_stop_whose_oracle_is_dead(tmp_path, monkeypatch):
    """Pairs equal to the start's answers are tied unasked. An evaluation of these alone is no lack
    of progress; three of them in a row, or one at the end, end the run. Answers are as long as in
    training."""
    texts, lengths = iter([["a", "b"], *[["a", "c"]] * 20]), set()
    alive = iter([1, 0, 0, 1, 0, 0, 0])
    monkeypatch.setattr(
        "plumbing.validation.answer", lambda *asked: lengths.add(asked[4]) or next(texts)
    )

    def score(clips, questions, answers):
        ok, live = [len(set(pair)) == 1 for pair in answers], next(alive)
        scores = t([[0.5 - 0.1 * (not same), 0.5] for same in ok])
        return scores, t([same or bool(live) for same in ok])

    run, state = fake_run(tmp_path, max_new_tokens=7), dict(best=None, best_step=0)
    records = [dict(clip=None, question="q", answer=a) for a in "ab"]
    validate = Validation(run, FakeRoles(), records, None, SimpleNamespace(score=score), differ,
                          state)
    assert [validate(step) for step in (0, 10, 20, 30, 40, 50)] == [False] * 6
    assert state["best_step"] == 0 and lengths == {7}
    with pytest.raises(SystemExit, match="--stop_oracle has ranked nothing"):
        validate(60)
    alive = iter([0])
    run.start(100)
    with pytest.raises(SystemExit, match="--stop_oracle has ranked nothing"):
        validate(100)


def test_a_policy_that_only_gets_worse_ends_as_the_start(world, policy, monkeypatch):
    """By its oracle, that is: here one that finds every change bad."""
    monkeypatch.setattr("oracle.ReferenceOracle.score", lambda self, clips, questions, answers: (
        t([[-1.0 * (a != group[-1]) for a in group] for group in answers]),
        torch.ones(len(clips), dtype=torch.bool)))
    flags = ["--steps", "5", "--eval_data", "data/moving_shapes/val.json", "--eval_questions", "5",
             "--eval_steps", "1",
             "--patience", "2", "--stop_oracle", "reference", "--random_reward", "True", "--lr",
             "3e-2"]
    main_of(monkeypatch, world, *PPO, *flags, "--name", "worse")
    folder = world / "runs/ppo_rlaif/worse_s0"
    assert [row["step"] for row in rows(folder)] == [0, 1, 2] and set(rows(folder)[-1]) == {
        "step", "eval/accuracy", "eval/margin"}
    assert rows(folder)[2]["eval/margin"] < 0 and not moved(policy, folder)


# --- processes and interruptions ------------------------------------------------------------------
ALL = ["--eval_data", "data/moving_shapes/val.json", "--eval_questions", "5", "--eval_steps", "2",
       "--target_kl", "0.1",
       "--kl_horizon", "100", "--random_reward", "True", "--value_warmup", "1"]
STOP = ["--stop_oracle", "judge", "--patience", "9", "--oracle_model", "runs/sft/policy_s0/final"]


def test_two_processes_equal_one(world, policy, forked, monkeypatch):
    flags = [*PPO, *ALL, *STOP, "--steps", "3", "--prompts_per_step", "8"]
    main_of(monkeypatch, world, *flags, "--name", "one")
    # nor may this show
    flags = [*flags, "--tokens_per_micro_batch", "450"]
    assert forked.run(world, *flags, "--name", "two", world=2) == [0, 0], (
        forked.said() + forked.said(1)
    )
    one, two = (world / f"runs/ppo_rlaif/{name}_s0" for name in ("one", "two"))
    assert [json.loads((f / "args.json").read_text())["world_size"] for f in (one, two)] == [1, 2]
    assert len(rows(one)) == len(rows(two)) == 4
    for a, b in zip(rows(one), rows(two)):
        assert a.keys() == b.keys() and len(a) >= (3 if a["step"] == 3 else 20)
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), f"step {a['step']}: {key}"
    assert bool(moved(policy, one)) == bool(moved(policy, two))
    if moved(policy, one):  # else the start was best
        part, name = apart(one / "final", two / "final", policy)
        assert part < 0.01, name


SUICIDE = """
import os, signal
plain = plumbing.run.Log.step
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
plumbing.run.Log.step = lambda log, step, show: die() if step == 5 else plain(log, step, show)
"""


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_killed_and_resumed_equals_uninterrupted(world, policy, forked, monkeypatch, lora):
    flags = [*PPO, *ALL, "--steps", "7", "--save_steps", "2",
             *(["--lora_r", "4", *STOP] if lora else [])]
    whole, broken = (world / f"runs/ppo_rlaif/{name}{lora}_s0" for name in ("whole", "broken"))
    if lora:  # interrupted in this process
        class Killed(BaseException):
            pass

        def killed(self, step, show, plain=plumbing.run.Log.step):
            if step == 5:
                raise Killed
            return plain(self, step, show)
        with monkeypatch.context() as m, pytest.raises(Killed):
            m.setattr(plumbing.run.Log, "step", killed)
            main_of(m, world, *flags, "--name", f"broken{lora}")
    else:
        codes = forked.run(world, *flags, "--name", f"broken{lora}", plant=SUICIDE)
        assert codes == [-signal.SIGKILL], forked.said()
    saved = [p.name for p in broken.glob("checkpoint-*") if p.suffix != ".tmp"]
    assert len(saved) == 1 and saved[0] == "checkpoint-4"
    main_of(monkeypatch, world, *flags, "--name", f"broken{lora}", "--resume")
    main_of(monkeypatch, world, *flags, "--name", f"whole{lora}")
    assert rows(broken) == rows(whole) and len(rows(whole)) == 8
    coefs = [row["charts/kl_coef"] for row in rows(whole)[:7]]
    assert len(set(coefs)) == 7 and coefs[0] == 0.1  # the controller's state counts
    a, b = weights(whole), weights(broken)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert lora or moved(policy, whole)
    assert (whole / "samples.jsonl").read_text() == (broken / "samples.jsonl").read_text()
