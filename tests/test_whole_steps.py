"""Whole steps of every training script against a slow version that shares no code with them: one
forward pass an answer, Python loops. Compared are all weights after the last step. Both go down the
gradient as it is: Adam would hide its size and blow up its rounding.
"""

import copy
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from inside import main_of
from safetensors.torch import load_file
from test_video_llm import lively, plain_logprobs, plain_sample, plain_scores

import dpo_iter_w2s
import grpo_rank
import ppo_rlaif
import reward_model
import sft
from inputs.features import FeatureCache
from inputs.preferences import write_preferences
from inputs.records import Clip, read_records
from oracle import JudgeOracle
from ppo_rlaif import Roles
from video_llm import Prefix, add_scalar_head, load_model, save_model

SHAPES = "data/moving_shapes"
FIVE = ["--data", "five.json", "--video_root", SHAPES, "--eval_data", ""]


@pytest.fixture(scope="module")
def start(world, policy):
    """runs/sft/awake_s0/final: a start that sees the video, whose answers end here and there."""
    model, processor = load_model(policy)
    calm = copy.deepcopy(model.state_dict())
    lively(model, seed=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(calm[name] + 0.25 * (p - calm[name]))
    save_model(model, processor, world / "runs/sft/awake_s0/final")
    return world / "runs/sft/awake_s0/final"


@pytest.fixture(scope="module")
def five(world):
    """five.json: so few questions that each is asked in several steps, and one twice in a step."""
    rows = json.loads((world / SHAPES / "train.json").read_text())
    rows = list({row["video"]: row for row in rows if "escribe" not in json.dumps(row)}.values())
    (world / "five.json").write_text(json.dumps(rows[:5]))


@pytest.fixture
def descent(monkeypatch):
    """Gradient descent in place of AdamW. -> what AdamW was given beside parameters and rate."""
    asked = []

    def made(params, lr=0.0, **more):
        asked.append(more)
        return torch.optim.SGD(params, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", made)
    return asked


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def descend(params, loss, rate):
    """One step down the gradient, which is cut to length 1. -> its length."""
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), grads)]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    with torch.no_grad():
        for p, g in zip(params.values(), grads):
            p -= rate * g / max(1.0, norm)
    return norm


def assert_same_way(before, ours, theirs, within=1e-3):
    """Both have gone the same way from `before`: {name: tensor} each."""
    squares = lambda a, b: [(a[k].double() - b[k].double()).square().sum().item() for k in b]
    far = lambda a, b: math.sqrt(sum(squares(a, b)))
    theirs = {k: p.detach() for k, p in theirs.items()}
    assert far(before, theirs) > 1e-3
    apart = far(ours, theirs) / far(before, theirs)
    assert apart < within, f"{apart:.1%} of the way apart"


def assert_sampled(model, seen, processor, temperature):
    """The answers are those that the model gives to these random numbers, a token at a time."""
    eos, tokens, lengths = processor.tokenizer.eos_token_id, seen["tokens"], seen["lengths"]
    with torch.no_grad():
        for b, rows in enumerate(seen["uniforms"]):
            for g, numbers in enumerate(rows):
                expected = plain_sample(model, seen["prefix"], b, numbers, eos, temperature)
                assert tokens[b, g, : lengths[b, g]].tolist() == expected


def assert_asked(seen, asked, processor, cache):
    """The prompts are those of the questions that the oracle was asked, each with its own video."""
    clips, questions, answers = asked
    prefix = seen["prefix"]
    for b, (clip, question) in enumerate(zip(clips, questions)):
        ids = prefix.input_ids[b][prefix.attention_mask[b].bool()].tolist()
        assert ids == processor.prompt_ids(question)
        assert torch.equal(prefix.video_features[b], cache.one(clip))
        for g, answer in enumerate(answers[b]):
            ids = seen["tokens"][b, g, : seen["lengths"][b, g]]
            assert answer == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def listen(monkeypatch, module, change=lambda uniforms: None):
    """-> list that gets what each call of module.generate was asked and gave."""
    seen, real = [], module.generate

    def generate(model, prefix, uniforms, *rest):
        change(uniforms)
        tokens, lengths, logprobs = real(model, prefix, uniforms, *rest)
        seen.append(dict(prefix=prefix, uniforms=uniforms.clone(), tokens=tokens, lengths=lengths))
        rounding = 1e-5 * torch.arange(logprobs.shape[1])  # large enough to be seen
        return tokens, lengths, logprobs + rounding

    monkeypatch.setattr(module, "generate", generate)
    return seen


def assert_new_numbers(seen):
    """Every question has random numbers of its own, and others whenever it comes again."""
    rows = [tuple(question[0].tolist()) for step in seen for question in step["uniforms"]]
    assert len(set(rows)) == len(rows)


def of_one(ids, clip, cache):
    """The Prefix of one prompt."""
    ids = torch.tensor([ids])
    return Prefix(ids, torch.ones_like(ids), *cache([clip]))


def clips_of(world, n):
    return [Clip(str(p)) for p in sorted((world / SHAPES / "videos/train").glob("*.mp4"))[:n]]


# --- grpo_rank.py ---------------------------------------------------------------------------------
def gains(values):
    """For each value, higher is better: (gain, place), means over what it and its equals occupy."""
    out = []
    for v in values:
        first = sum(w > v for w in values)
        places = range(first, first + sum(w == v for w in values))
        g = sum(math.log2(2 + r) / (1 + r) for r in places) / len(places)
        out.append((g, sum(places) / len(places)))
    return out


def slow_advantages(kind, scaled, scores, logprobs):
    if kind == "signed":
        A = []
        for (gain, place), (shown, at) in zip(gains(scores), gains(logprobs)):
            A.append(math.copysign(abs(gain - shown), at - place) / (1 + math.log(1 + place)))
        A = A if len(set(scores)) > 1 else [0.0] * len(A)
    else:
        A = scores
    A = [a - sum(A) / len(A) for a in A]
    deviation = math.sqrt(sum(a * a for a in A) / len(A))
    return [a / deviation if scaled and deviation > 1e-8 else a for a in A]


@pytest.mark.parametrize("kind, scaled", [("signed", False), ("score", True)])
def test_grpo_rank(world, start, five, monkeypatch, descent, kind, scaled):
    """Two steps of two inner epochs: ties, copies, a group without an order, ragged answers."""
    def copies(uniforms):
        uniforms[:, 3] = uniforms[:, 1]

    def score(self, *asked):
        asks.append(asked)
        return scores * len(asks), torch.tensor(ok)

    asks, ok = [], [True, True, False, True]
    scores = torch.tensor([[3.0, 1, 2, 1], [2, 2, 2, 2], [9, 8, 7, 6], [10, 30, 20, 30]])
    seen = listen(monkeypatch, grpo_rank, copies)
    monkeypatch.setattr("oracle.ReferenceOracle.score", score)
    flags = (f"--model '{start}' --oracle reference --advantage {kind} --scale_advantages {scaled} "
             "--G 4 --prompts_per_step 4 --steps 2 --inner_epochs 2 --temperature 0.7 --beta 0.3 "
             "--lr 0.5 --entropy_coef 0.1 --clip_range 0.05 --max_new_tokens 5 "
             "--tokens_per_micro_batch 150")
    main_of(monkeypatch, world, "grpo_rank.py", *FIVE, *shlex.split(flags), "--name",
            f"step_{kind}")

    model, processor = load_model(start)
    frozen, params = load_model(start)[0], trained(model)
    cache = FeatureCache(model, processor, world / "cache")
    lengths = torch.cat([s["lengths"] for s in seen]).flatten().tolist()
    assert len(seen) == 2 and len(set(lengths)) > 2
    assert descent == [dict(betas=(0.9, 0.98), weight_decay=0.0)]
    assert_new_numbers(seen)
    norms, clipped = [], set()
    for step, rate in enumerate((0.05, 0.1)):
        s = seen[step]
        assert_asked(s, asks[step], processor, cache)
        assert_sampled(model, s, processor, 0.7)
        plain = lambda m: plain_logprobs(m, s["prefix"], s["tokens"], s["lengths"], 0.7)
        with torch.no_grad():
            old, reference = plain(model)[0], plain(frozen)[0]
        A = []
        for b in range(4):
            said = [tuple(x.tolist()) for x in s["tokens"][b]]
            sums = dict(zip(said, old[4 * b : 4 * b + 4].sum(-1).tolist()))
            likely = [sums[x] for x in said]
            A += slow_advantages(kind, scaled, (scores[b] * (step + 1)).tolist(), likely)
        for epoch in range(2):
            logprobs, entropy = plain(model)
            loss, tokens = 0.0, 0
            for n, length in enumerate(s["lengths"].flatten().tolist()):
                for i in range(length * ok[n // 4]):
                    ratio = (logprobs[n, i] - old[n, i]).exp()
                    J = min(ratio * A[n], min(max(ratio, 0.95), 1.05) * A[n])
                    clipped.add((epoch, abs(ratio.item() - 1) > 0.05))
                    log_r = reference[n, i] - logprobs[n, i]
                    loss += -J + 0.3 * (log_r.exp() - 1 - log_r) - 0.1 * entropy[n, i]
                    tokens += 1
            norms.append(descend(params, loss / tokens, rate))
    assert max(norms) > 1.5 and clipped == {(0, False), (1, False), (1, True)}
    ours = load_file(world / f"runs/grpo_rank/step_{kind}_s0/final/model.safetensors")
    assert_same_way(dict(frozen.named_parameters()), ours, params)


# --- ppo_rlaif.py ---------------------------------------------------------------------------------
def test_ppo(world, start, five, monkeypatch, descent):
    """Three steps, the first of the value model alone; two epochs of two mini-batches; ragged
    answers, a group without scores, values that move too far, a KL coefficient with a target."""
    class Watched(Roles):
        def __init__(self, *args):
            super().__init__(*args)
            with torch.no_grad():
                noise = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
                self.value.score_head.weight.copy_(0.1 * noise)
            all_roles.append(self)
            first_value.append(copy.deepcopy(self.value))

    def score(self, *asked):
        asks.append(asked)
        return scores[len(asks) - 1], torch.tensor(ok)

    def in_batches(rows, *rest):
        batches.append(rows.tolist())
        return by_length(rows, *rest)

    all_roles, first_value, asks, batches, by_length = [], [], [], [], ppo_rlaif.by_length
    ok = [True, True, False, True]
    first = torch.tensor([[3.0, 1, 2], [5, 5, 5], [9, 8, 7], [10, 20, 15]])
    scores = [first, 3 * first + 1, 2 * first.flip(0)]
    seen = listen(monkeypatch, ppo_rlaif)
    monkeypatch.setattr("oracle.ReferenceOracle.score", score)
    monkeypatch.setattr(ppo_rlaif, "Roles", Watched)
    monkeypatch.setattr(ppo_rlaif, "by_length", in_batches)
    flags = (f"--model '{start}' --oracle reference --G 3 --prompts_per_step 4 "
             "--tokens_per_micro_batch 1 "
             "--steps 3 --ppo_epochs 2 --mini_batches 2 --temperature 0.7 --kl_coef 0.3 "
             "--target_kl 0.4 --kl_horizon 20 --clip_range 0.05 --value_clip_range 0.02 "
             "--gamma 0.9 --lam 0.8 --lr 0.06 --value_lr 0.15 --missing_eos_penalty 2 "
             "--length_penalty 0.5 --warmup_steps 2 --value_warmup 1 --max_new_tokens 5 "
             "--name step")
    main_of(monkeypatch, world, "ppo_rlaif.py", *FIVE, *shlex.split(flags))

    (model, processor), value = load_model(start), first_value[0]
    before = copy.deepcopy(value)
    frozen, cache = load_model(start)[0], FeatureCache(model, processor, world / "cache")
    params, value_params, eos = trained(model), trained(value), processor.tokenizer.eos_token_id
    assert len(seen) == 3 and descent == [dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)]
    assert_new_numbers(seen)
    kl_coef, norms, clipped, orders = 0.3, [], set(), []
    for step, part in enumerate((1 / 3, 2 / 3, 1 / 3)):
        s = seen[step]
        assert_asked(s, asks[step], processor, cache)
        assert_sampled(model, s, processor, 0.7)
        of = lambda some: (s["prefix"].rows(some), s["tokens"][some], s["lengths"][some])
        plain = lambda m, some=[0, 1, 2, 3]: plain_logprobs(m, *of(some), 0.7)[0]
        values_of = lambda some=[0, 1, 2, 3]: plain_scores(value, *of(some), before=True)
        with torch.no_grad():
            old, reference, old_values = plain(model), plain(frozen), values_of()
        centred = [[x - sum(row) / 3 for x in row] for row in scores[step].tolist()]
        if step == 0:
            known = [x for row, fine in zip(centred, ok) if fine for x in row]
            deviation = math.sqrt(sum(x * x for x in known) / len(known))
        A, R, kls = {}, {}, []
        for n, T in enumerate(s["lengths"].flatten().tolist()):
            if not ok[n // 3]:
                continue
            ended = s["tokens"].flatten(0, 1)[n, T - 1] == eos
            score_here = centred[n // 3][n % 3] / deviation - (0 if ended else 2) - 0.5 * T / 5
            kl = (old - reference)[n, :T].tolist()
            kls.append(sum(kl))
            r = [-kl_coef * x for x in kl]
            r[-1] += score_here
            V = [*old_values[n, :T].tolist(), 0.0]
            delta = [r[i] + 0.9 * V[i + 1] - V[i] for i in range(T)]
            for i in range(T):
                A[n, i] = sum((0.9 * 0.8) ** (k - i) * delta[k] for k in range(i, T))
                R[n, i] = A[n, i] + V[i]
        mean = sum(A.values()) / len(A)
        spread = math.sqrt(sum((a - mean) ** 2 for a in A.values()) / len(A))
        _, *chunks = batches[5 * step : 5 * step + 5]
        assert sorted(chunks[0] + chunks[1]) == sorted(chunks[2] + chunks[3]) == [0, 1, 2, 3]
        orders.append((chunks[:2], chunks[2:]))
        for chunk in chunks:
            logprobs, values, loss, value_loss = plain(model, chunk), values_of(chunk), 0.0, 0.0
            there = [(n, i) for n, i in A if n // 3 in chunk]
            for n, i in there:
                row = 3 * chunk.index(n // 3) + n % 3
                a, ratio = (A[n, i] - mean) / spread, (logprobs[row, i] - old[n, i]).exp()
                loss += max(-a * ratio, -a * min(max(ratio, 0.95), 1.05))
                change = values[row, i] - old_values[n, i]
                near = old_values[n, i] + min(max(change, -0.02), 0.02)
                value_loss += max((values[row, i] - R[n, i]) ** 2, (near - R[n, i]) ** 2) / 2
                clipped.add(("policy", abs(ratio.item() - 1) > 0.05))
                clipped.add(("value", abs(change.item()) > 0.02))
            if there:
                norms.append(descend(value_params, value_loss / len(there), 0.15 * part))
            if there and step >= 1:
                norms.append(descend(params, loss / len(there), 0.06 * part))
        kl_coef *= 1 + min(max(sum(kls) / len(kls) / 0.4 - 1, -0.2), 0.2) * 12 / 20
    assert any(a != b for a, b in orders) and max(norms) > 1.5
    assert clipped == {(who, cut) for who in ("policy", "value") for cut in (False, True)}
    ours = load_file(world / "runs/ppo_rlaif/step_s0/final/model.safetensors")
    assert_same_way(dict(frozen.named_parameters()), ours, params)
    ours = dict(all_roles[0].value.named_parameters())
    assert_same_way(dict(before.named_parameters()), ours, value_params)


# --- dpo_iter_w2s.py ------------------------------------------------------------------------------
def test_dpo(world, start, monkeypatch, descent, tmp_path):
    """Two iterations of two steps; the farthest alpha is the best, by the oracle, not by labels."""
    words = [("red", "blue blue"), ("moves left and turns", "up"), ("two", "two shapes"),
             ("yes", "no")]
    pairs = [dict(id=str(i), clip=clip, question=f"what is it, {i}?", chosen=better, rejected=worse,
                  ended=dict(chosen=i != 1, rejected=True))
             for i, (clip, (better, worse)) in enumerate(zip(clips_of(world, 4), words))]
    write_preferences(tmp_path / "pairs.json", pairs, "trl")
    used, answer_logps = [], dpo_iter_w2s.answer_logps

    def noted(model, some, *rest):
        used.extend(int(p["id"]) for p in some * torch.is_grad_enabled())
        return answer_logps(model, some, *rest)

    monkeypatch.setattr(dpo_iter_w2s, "answer_logps", noted)
    monkeypatch.setattr(dpo_iter_w2s, "score", lambda oracle, clips, questions, answers: (
        [[[float(g)] * 4 for g in range(len(group))] for group in answers]))
    flags = (f"--model '{start}' --preferences '{tmp_path}/pairs.json' --fresh_pairs False "
             f"--oracle reference --eval_data {SHAPES}/val.json --eval_questions 3 --alphas 0.5 "
             "--iterations 2 --steps 2 --prompts_per_step 2 --tokens_per_micro_batch 1 "
             "--beta 0.7 --lr 0.5 --name step")
    main_of(monkeypatch, world, "dpo_iter_w2s.py", *shlex.split(flags))

    model, processor = load_model(start)
    first, params = copy.deepcopy(model), trained(model)
    cache = FeatureCache(model, processor, world / "cache")
    assert len(used) == 8 and sorted(used[:4]) == sorted(used[4:]) == [0, 1, 2, 3]
    assert descent == [dict(betas=(0.9, 0.98), weight_decay=0.0)] * 2

    def logp(m, pair, side):
        ids = processor.answer_ids(pair[side])
        ids = ids if pair["ended"][side] else ids[:-1]
        prefix = of_one(processor.prompt_ids(pair["question"]), pair["clip"], cache)
        tokens, lengths = torch.tensor([[ids]]), torch.tensor([[len(ids)]])
        return plain_logprobs(m, prefix, tokens, lengths)[0].sum()

    def prefers(m, pair):
        return logp(m, pair, "chosen") - logp(m, pair, "rejected")

    norms = []
    for k in range(2):
        reference = copy.deepcopy(model)
        for step, rate in enumerate((0.05, 0.1)):
            loss = 0.0
            for pair in [pairs[i] for i in used[4 * k + 2 * step :][:2]]:
                with torch.no_grad():
                    before = prefers(reference, pair)
                margin = 0.7 * (prefers(model, pair) - before)
                loss += (1 + (-margin).exp()).log() / 2
            norms.append(descend(params, loss, rate))
        with torch.no_grad():
            for p, q in zip(model.parameters(), reference.parameters()):
                p.copy_(p + 0.5 * (p - q))
    assert max(norms) > 1.5
    ours = load_file(world / "runs/dpo_iter_w2s/step_s0/final/model.safetensors")
    assert_same_way(dict(first.named_parameters()), ours, params)


# --- reward_model.py ------------------------------------------------------------------------------
def test_reward_model(world, start, monkeypatch, descent):
    """Three steps; narratives, the judge's own answers beside those to be rewarded, some cut."""
    said = ["red", "a red circle moves left", "down", "three shapes turn"]
    pairs = [dict(id=f"{k}", clip=clip, question=f"which {n}?", chosen=said[(k + n) % 4],
                  rejected=said[(k + n + 1) % 4])
             for k, clip in enumerate(clips_of(world, 12)) for n in range(1 + k % 2)]
    write_preferences(world / "pairs/step.json", pairs, "trl")
    story = lambda clip: f"the story of {Path(clip.path).stem}"
    own = lambda clip, question: f"{Path(clip.path).stem[-1]} in {question}"
    monkeypatch.setattr(JudgeOracle, "unreadable", lambda self, clips: set())
    monkeypatch.setattr(JudgeOracle, "narratives", lambda self, clips: [story(c) for c in clips])
    monkeypatch.setattr(JudgeOracle, "answer", lambda self, *asked: [own(*x) for x in zip(*asked)])
    trained_on, measured, normal, rewards_of = [], [], [], reward_model.rewards_of

    def noted(model, batch, rows):
        where = trained_on if torch.is_grad_enabled() else measured
        where.append([p for b in rows for p in batch.groups[b]])
        return rewards_of(model, batch, rows)

    monkeypatch.setattr(reward_model, "rewards_of", noted)
    monkeypatch.setattr(reward_model, "normalise_head", lambda head, *rest: normal.append(rest))
    flags = (f"--preferences pairs/step.json --base '{start}' --oracle_model '{start}' "
             "--prompts_per_step 2 --tokens_per_micro_batch 1 --pack 2 "
             "--epochs 0.5 --eval_share 0.3 "
             "--eval_steps 1 --max_answer_tokens 4 --centring 0.5 --lr 0.4 --head_lr 1 --name step")
    main_of(monkeypatch, world, "reward_model.py", *shlex.split(flags))

    model, processor = load_model(start)
    add_scalar_head(model)
    before, cache = copy.deepcopy(model), FeatureCache(model, processor, world / "cache")
    params = {name: p for name, p in trained(model).items() if name != "score_head.bias"}

    def rewards(pair):
        for answer in (pair["chosen"], pair["rejected"]):
            ids = processor.answer_ids(answer)
            cut = " ".join(processor.tokenizer.decode(ids[:4]).split())
            lines = (story(pair["clip"]), f"Response 1: {answer if len(ids) <= 4 else cut}",
                     f"Response 2: {own(pair['clip'], pair['question'])}",
                     "Which response is better?", pair["question"])
            prefix = of_one(processor.prompt_ids("\n".join(lines)), pair["clip"], cache)
            yield model(input_ids=prefix.input_ids, attention_mask=prefix.attention_mask,
                        scores=True, **prefix.model_inputs()).logits[0, -1, 0]

    folder = world / "runs/reward_model/step_s0"
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and len(trained_on) == 6
    assert descent == [dict(betas=(0.9, 0.98), weight_decay=0.0)]
    norms = []
    for step, part in enumerate((1 / 10, 2 / 10, 3 / 10)):
        loss, some = 0.0, trained_on[2 * step] + trained_on[2 * step + 1]
        for chosen, rejected in map(rewards, some):
            loss += (1 + (rejected - chosen).exp()).log() + 0.5 * (chosen + rejected) ** 2
        grads = torch.autograd.grad(loss / len(some), list(params.values()), allow_unused=True)
        squares = [g.double().square().sum().item() for g in grads if g is not None]
        norms.append(math.sqrt(sum(squares)))
        with torch.no_grad():
            for (name, p), g in zip(params.items(), grads):
                if g is not None:
                    p -= (1.0 if "score_head" in name else 0.4) * part * g / max(1.0, norms[-1])
    assert max(norms) > 1.5
    ours = load_file(folder / "final/model.safetensors")
    assert_same_way(dict(before.named_parameters()), ours, params)

    # measured after each step, on other videos; then all training pairs, for the head's scale
    held = (len(measured) - 12) // 2
    assert [some for k in range(3) for some in measured[:held]] == measured[: 3 * held]
    videos = lambda parts: {p["clip"] for some in parts for p in some}
    last, training = measured[:held], measured[3 * held :]
    assert len(videos(last)) == held > 1 and len(videos(training)) == 12 - held
    assert not videos(last) & videos(training) and videos(trained_on) <= videos(training)
    with torch.no_grad():
        of_pairs = lambda parts: torch.tensor([list(rewards(p)) for some in parts for p in some])
        margin, level = of_pairs(last).diff().mean().item(), of_pairs(training)
    assert rows[-1]["eval/margin"] == pytest.approx(-margin, rel=1e-2, abs=1e-4)
    expected = level.mean().item(), level.std(correction=0).item()
    assert normal == [pytest.approx(expected, rel=1e-2, abs=1e-4)]


# --- sft.py ---------------------------------------------------------------------------------------
def test_sft(world, start, monkeypatch, descent):
    """Four steps of examples that share a video, comparisons too: two on easy records, two on all.
    """
    seen, encode = [], sft.encode

    def noted(group, *rest):
        seen.append(group)
        return encode(group, *rest)

    monkeypatch.setattr(sft, "encode", noted)
    flags = (f"--data {SHAPES}/train.json --model '{start}' --steps 4 --batch_size 4 "
             "--tokens_per_micro_batch 300 --pack 3 --easy_steps 0.5 --judge_share 0.5 --lr 0.2 "
             "--warmup 0.25 --weight_decay 0.04 --max_answer_tokens 20 --name step")
    main_of(monkeypatch, world, "sft.py", *shlex.split(flags))

    model, processor = load_model(start)
    before, params = copy.deepcopy(model), trained(model)
    cache = FeatureCache(model, processor, world / "cache")
    records = read_records([str(world / SHAPES / "train.json")])[0]
    length = lambda record: len(processor.answer_ids(record["answer"]))
    short = np.quantile([length(r) for r in records], 0.65)
    assert len(seen) == 16 and descent == [dict(betas=(0.9, 0.98), weight_decay=0.04)]
    steps, norms = [seen[4 * k : 4 * k + 4] for k in range(4)], []
    for step, (groups, rate) in enumerate(zip(steps, (0.2, 0.2, 0.4 / 3, 0.2 / 3))):
        examples = [r for group in groups for r in group]
        longest = max(length(r) for r in examples if isinstance(r["question"], str))
        assert (longest <= short) == (step < 2) and groups not in steps[:step]
        loss = 0.0
        for r in examples:
            if isinstance(r["question"], str):
                prompt = processor.prompt_ids(r["question"])
            else:
                prompt = sum(processor.split_prompt_ids(*r["question"]), [])
            ids = processor.answer_ids(r["answer"])[:20]
            tokens, lengths = torch.tensor([[ids]]), torch.tensor([[len(ids)]])
            prefix = of_one(prompt, r["clip"], cache)
            logprobs, _ = plain_logprobs(model, prefix, tokens, lengths)
            loss -= logprobs.mean() / len(examples)
        norms.append(descend(params, loss, rate))
    assert max(norms) > 1.5
    ours = load_file(world / "runs/sft/step_s0/final/model.safetensors")
    assert_same_way(dict(before.named_parameters()), ours, params)
