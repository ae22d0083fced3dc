"""dpo_iter_w2s.py and plumbing/zoo.py: pairs and equations by hand, every stage killed and resumed,
two ranks."""

import copy
import gc
import json
import math
import shutil
import sys
import threading
import weakref
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from inside import apart, main_of
from safetensors.torch import load_file
from test_video_llm import lively, plain_logprobs

import dpo_iter_w2s
import plumbing.run
from dpo_iter_w2s import (Args, best_and_worst, cap_share, choose_alpha, dpo_loss, extrapolated,
                          go_to, ids_of, line_of, lr_at, make_pairs, questions_of, sample, score)
from inputs.features import FeatureCache
from inputs.frames import VideoError
from inputs.preferences import read_preferences, write_preferences
from inputs.records import Clip
from plumbing import embedded, processes, zoo
from plumbing.files import collect_rows
from plumbing.flags import parse_args
from plumbing.zoo import MISSING, Checkpoint, Server, collect_answers, collect_scores, write_card
from video_llm import (Prefix, VideoLLM, add_lora, answer, load_model, merged, reference_of,
                       token_logprobs)

ONE = SimpleNamespace(rank=0, world=1)  # process
# its scores differ where answers differ
JUDGE = ["--oracle", "judge", "--oracle_model", "runs/sft/policy_s0/final"]
SMALL = [*JUDGE, "--samples", "3", "--questions", "12", "--steps", "4", "--prompts_per_step", "4",
         "--tokens_per_micro_batch", "300", "--max_new_tokens", "6", "--eval_questions", "5",
         "--eval_steps", "3",
         "--save_steps", "2", "--min_gap", "0", "--alphas", "0.5", "--lr", "1e-3"]
SELF = ["--zoo", "policy", *SMALL]


def near(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def rows(file):
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the loss -------------------------------------------------------------------------------------
def test_dpo_loss_and_gradient_by_hand():
    """beta 1/2. Pair 1: ratios +1 and 0, margin +.5: log(1 + e^-.5) = .4740770, sigmoid(-.5) =
    .3775407. Pair 2: ratios -1 and +1, margin -1: log(1 + e) = 1.3132617, sigmoid(1) = .7310586."""
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
    loss, rewards = dpo_loss(logps, torch.full((2, 2), -2.0), 0.5)
    near(loss, [0.4740770, 1.3132617])
    near(rewards, [[0.5, 0.0], [-0.5, 0.5]])
    loss.sum().backward()
    # beta times the probability of the wrong order: chosen up (the loss falls as it rises),
    # rejected down
    near(logps.grad, [[-0.1887703, 0.1887703], [-0.3655293, 0.3655293]])


def test_dpo_loss_at_the_reference():
    logps = torch.randn(5, 2)
    loss, rewards = dpo_loss(logps, logps, 0.1)
    near(loss, [math.log(2)] * 5)
    assert (rewards == 0).all()


def test_dpo_loss_far_away_is_finite():
    logps = torch.tensor([[0.0, -1e4], [-1e4, 0.0]], requires_grad=True)
    loss, _ = dpo_loss(logps, torch.zeros(2, 2), 1.0)
    near(loss, [0.0, 1e4])
    loss.sum().backward()
    near(logps.grad, [[0, 0], [-1, 1]])


def test_learning_rate_starts_again_in_each_iteration():
    near([lr_at(s, 100, 2.0) for s in (0, 4, 9, 50, 99)], [0.2, 1.0, 1.82, 1.0, 0.02], 1e-12)


# --- extrapolation --------------------------------------------------------------------------------
def test_extrapolation_by_hand():
    theta, theta_ref = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    near(extrapolated(theta, theta_ref, 0.5), [4.0, -2.0])
    near(extrapolated(theta, theta_ref, 2), [7.0, -5.0])
    near(extrapolated(theta, theta_ref, -0.5), [2.0, 0.0])  # half of the way back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extrapolation_is_exact_at_both_ends(dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1000, generator=generator)
    theta, theta_ref = ((draw() * 10 ** draw()).to(dtype) for _ in range(2))
    assert torch.equal(extrapolated(theta, theta_ref, 0.0), theta)
    assert torch.equal(extrapolated(theta, theta_ref, -1.0), theta_ref)


def test_extrapolation_of_bfloat16_weights_is_rounded_once():
    """1.0078125 lies one step of bfloat16 above 1: .3 of a step farther rounds back, .6 rounds up.
    From -1, .3 of the way is .60234375, and 1.61015625 rounds to 1.609375."""
    theta, one, minus = (torch.tensor([v], dtype=torch.bfloat16) for v in (1.0078125, 1.0, -1.0))
    assert (extrapolated(theta, one, 0.3).item() == 1.0078125
            and extrapolated(theta, one, 0.6).item() == 1.015625)
    assert extrapolated(theta, minus, 0.3).item() == 1.609375
    values = torch.arange(1, 257, dtype=torch.bfloat16)  # all whole numbers that bfloat16 holds
    theta, theta_ref = values.repeat(256), values.repeat_interleave(256)
    exact = theta.double() + 0.3 * (theta.double() - theta_ref.double())
    right = lambda x: (x == exact.to(torch.bfloat16)).double().mean().item()
    ours = extrapolated(theta, theta_ref, 0.3)
    assert ours.dtype == torch.bfloat16
    # arithmetic in bfloat16 rounds thrice
    assert right(ours) > 0.99 > right(theta + 0.3 * (theta - theta_ref))


def some_prefix(model, processor, world, cache, n=2):
    clips = [Clip(str(p))
             for p in sorted((world / "data/moving_shapes/videos/train").glob("*.mp4"))[:n]]
    return Prefix.build(processor, FeatureCache(model, processor, cache), ["what moves?"] * n,
                        clips)


def test_for_lora_scaling_the_delta_is_extrapolating_the_merged_weights(world, policy, tmp_path):
    torch.manual_seed(0)
    model, processor = load_model(policy)
    prefix = some_prefix(model, processor, world, tmp_path / "cache")
    tokens, lengths = torch.randint(5, 60, (2, 2, 4)), torch.tensor([[4, 3], [2, 4]])
    base = copy.deepcopy(model)
    tuned = lively(add_lora(model, 4, 8), seed=3)
    # `lively` moved the base as well: put it back, only the adapter is what training moves
    for (_, p), q in zip(((n, p) for n, p in tuned.named_parameters() if "lora_" not in n),
                         base.parameters()):
        p.data.copy_(q)
    tuned.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(policy)})
    )
    whole = merged(tmp_path / "adapter")  # theta_k
    apart = max((p - q).abs().max().item() for p, q in zip(whole.parameters(), base.parameters()))
    assert apart > 0.01
    before = token_logprobs(tuned, prefix, tokens, lengths)[0]
    near(token_logprobs(whole, prefix, tokens, lengths)[0], before, 1e-4)

    line = line_of(tuned, reference_of(tuned))
    assert len(line) == 21  # the B of every linear layer of the decoder, and nothing else
    theta, theta_ref = dict(whole.named_parameters()), dict(base.named_parameters())
    for alpha in (0.5, -1.0):
        go_to(line, alpha)
        expected = copy.deepcopy(base)
        for name, p in expected.named_parameters():
            p.data.copy_(extrapolated(theta[name], theta_ref[name], alpha))
        ours = token_logprobs(tuned, prefix, tokens, lengths)[0]
        near(ours, token_logprobs(expected, prefix, tokens, lengths)[0], 1e-4)
        assert (ours - before).abs().max() > 1e-2
    go_to(line, 0.0)
    assert torch.equal(token_logprobs(tuned, prefix, tokens, lengths)[0], before)


def test_a_cut_answer_that_says_nothing_weighs_nothing(world, policy, tmp_path):
    model, processor = load_model(policy)
    cache, clip = FeatureCache(model, processor, tmp_path), clips_of(world, 1)[0]
    pair = dict(clip=clip, question="what?", chosen="red", rejected="")
    logps_of = lambda **ended: dpo_iter_w2s.answer_logps(model, [pair | dict(ended=ended)],
                                                         processor, cache, Args(),
                                                         "cpu")
    (logps, lengths), (whole, _) = logps_of(rejected=False), logps_of()
    assert lengths[0, 0] > lengths[0, 1] == 0 and logps[0, 1] == 0 > whole[0, 1]
    near(logps[0, 0].detach(), whole[0, 0].detach(), 1e-5)


def test_the_way_of_all_weights_goes_there_and_back(policy):
    model, _ = load_model(policy)
    reference = reference_of(model)
    start = copy.deepcopy(model.state_dict())
    lively(model, seed=1)
    end = copy.deepcopy(model.state_dict())
    line = line_of(model, reference)
    go_to(line, 1.0)
    name = "projection.weight"
    near(model.state_dict()[name], 2 * end[name].double() - start[name].double(), 1e-5)
    go_to(line, -1.0)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    go_to(line, 0.0)
    assert all(torch.equal(v, end[k]) for k, v in model.state_dict().items())


def test_choice_of_alpha():
    assert choose_alpha([0, 0.3, 0.5, 1], [2.0, 2.5, 2.4, 1.0]) == 0.3
    assert choose_alpha([0, 0.3, 0.5, 1], [2.0, 2.0, 1.0, 2.0]) == 0  # no better: stay
    assert choose_alpha([0, -0.3, 0.5], [1.0, 2.0, 2.0]) == -0.3
    assert Args(alphas=[1.0, 0.3]).alphas == [0.0, 0.3, 1.0]  # 0 always takes part


def test_an_alpha_that_answers_nothing_gets_nothing():
    class Oracle:
        def aspects(self, videos, questions, answers):
            points = torch.tensor([[4.0, 2.0], [3.0, 3.0], [5.0, 5.0]])[..., None].expand(-1, -1, 4)
            return points, torch.tensor([True, True, False])

    asked = [dict(clip=n, question="what?") for n in range(3)]
    # question 0: 4 and 2; question 1: the second alpha says nothing; question 2: the oracle could
    # not score
    assert dpo_iter_w2s.oracle_scores(Oracle(), asked,
                                      [["a", "b", "c"], ["d", "", "e"]]) == [(7.0, 2), (2.0, 2)]


# --- pairs ----------------------------------------------------------------------------------------
def group(answers, scores, sources=None, number=0):
    aspects = [None if s is None else [s - 0.3, s + 0.3, s, s] for s in scores]
    record = dict(id=f"q{number}", clip=Clip(f"{number}.mp4"), question="what?", answer="red")
    return dict(record=record, answers=answers, scores=aspects,
                sources=sources or ["m"] * len(answers),
                ended=[True] * len(answers))


@pytest.mark.parametrize("answers, scores, found", [
    (["a b", "c", "d"], [1.0, 4.0, 2.5], ([1], [0])),
    # copies and ties stay candidates
    (["a", "c", "a", "d"], [1.0, 4.0, 1.0, 4.0], ([1, 3], [0, 2])),
    (["red", "Red.", "the red"], [3.0, 3.0, 3.0], "one answer"),
    (["red", "Red.", "the red"], [3.0, 1.0, 2.0], "one answer"),  # whatever the scores say
    (["a", "b", "c"], [2.0, 2.0, 2.0], "all equal"),
    (["a", "b", "c"], [2.0, 2.2, 2.4], "near-tie"),
    (["a", "b", "c"], [2.0, 2.2, 2.5], ([2], [0])),  # the gap is just enough
    (["a", "b", "c"], [None, 1.0, 4.0], ([2], [1])),  # what has no score is neither best nor worst
    (["a", "b", "c"], [None, None, 4.0], "fewer than two scores"),
    (["a", "b", "c"], [None, None, None], "fewer than two scores"),
    ([None, "b", "b"], [None, 1.0, 1.0], "one answer"),
])
def test_best_and_worst(answers, scores, found):
    assert best_and_worst(answers, scores, 0.5) == found


def test_pairs_of_crafted_scores():
    groups = [group(["a", "b", "c"], [1.0, 3.0, 2.0], ["x", "y", "z"], 0),
              # y and x gave it: y has one already
              group(["a", "a", "c"], [4.0, 4.0, 2.0], ["y", "x", "z"], 1),
              group(["a", "a"], [4.0, 4.0], ["x", "y"], 2),
              group(["a", "b"], [4.0, 4.0], ["x", "y"], 3),
              group(["a", "b"], [4.0, 3.9], ["x", "y"], 4),
              group(["a", "b"], [4.0, None], ["x", "y"], 5)]
    pairs, dropped = make_pairs(groups, 0.5)
    assert ([(p["id"], p["chosen"], p["rejected"]) for p in pairs]
            == [("q0", "b", "a"), ("q1", "a", "c")])
    assert [p["sources"] for p in pairs] == [
        dict(chosen="y", rejected="x"),
        dict(chosen="x", rejected="z"),
    ]
    assert [p["margin"] for p in pairs] == [2.0, 2.0]
    near(list(pairs[0]["scores"]["chosen"].values()), [2.7, 3.3, 3.0, 3.0])
    assert pairs[0]["ended"] == dict(chosen=True, rejected=True)
    assert dropped == {"one answer": 1, "all equal": 1, "near-tie": 1, "fewer than two scores": 1}
    assert len(pairs) + sum(dropped.values()) == len(groups)


def test_an_empty_answer_can_lose_and_never_win():
    class Oracle:
        def aspects(self, videos, questions, answers):
            return (torch.tensor([[2.0, 9.0], [0.0, 9.0]])[..., None].expand(-1, -1, 4),
                    torch.tensor([True, True]))

    scores = score(Oracle(), [1, 2], ["p", "q"], [["red", ""], ["red", ""]])
    groups = [dict(group(["red", ""], [0, 0], number=n), scores=s) for n, s in enumerate(scores)]
    pairs, dropped = make_pairs(groups, 0.0)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("red", "")] and dropped == {
        "all equal": 1
    }


class Words:
    """A processor: a token a word, EOS is 0."""

    class tokenizer:
        eos_token_id = 0

    def answer_ids(self, answer, max_length=None):
        return [*map(len, answer.split()), 0][:max_length]


def test_a_cut_answer_is_trained_without_eos():
    groups = [dict(group(["a bb", "ccc"], [3.0, 1.0]), ended=[False, True])]
    (pair,), _ = make_pairs(groups, 0.5)
    assert pair["ended"] == dict(chosen=False, rejected=True)
    assert (ids_of(pair, "chosen", Words(), 16) == [1, 2]
            and ids_of(pair, "rejected", Words(), 16) == [3, 0])
    assert (ids_of(pair, "chosen", Words(), 2) == [1, 2]
            and ids_of(pair, "chosen", Words(), 1) == [1])
    # a file that does not say
    assert ids_of({"chosen": "a bb"}, "chosen", Words(), 16) == [1, 2, 0]


def test_the_data_card_of_questions_without_labels(tmp_path):
    """Labels of one question in three; of the first: the chosen answer is right, the rejected one
    is not."""
    groups = [group(["red", "blue big", None], [3.0, 1.0, None], ["x", "y", "s"], n)
              for n in range(3)]
    groups[0]["ended"] = [True, False, None]
    for g in groups[1:]:
        g["record"]["answer"] = None
    pairs, dropped = make_pairs(groups, 0.5)
    lengths = {s: [len(ids_of(p, s, Words())) for p in pairs] for s in ("chosen", "rejected")}
    write_card(tmp_path, 1, pairs, dropped, groups, lengths, dict(requests=4.0))
    card = json.loads((tmp_path / "data_card.json").read_text())
    assert (card["questions"], card["labelled"], card["missing"]) == (3, 1, {"s": 3})
    assert (card["chosen"]["right"], card["rejected"]["right"]) == (1.0, 0.0)
    assert card["right_before_wrong"] == dict(share=1.0, pairs=1) and card["oracle"] == dict(
        requests=4.0
    )
    assert (card["rejected"]["cut"] == 1
            and card["rejected"]["tokens"] == pytest.approx(8 / 3, abs=1e-4))
    for g in groups:
        g["record"]["answer"] = None
    write_card(tmp_path, 1, pairs, dropped, groups, lengths, {})
    assert "right" not in json.loads((tmp_path / "data_card.json").read_text())["chosen"]
    said = (tmp_path / "data_card.md").read_text()
    assert "3 (0 with a label)" in said and "the label" not in said and "| missing | s 3 |" in said


def chosen_by(counts):
    """Pairs of these sources; the gap of a source's n-th pair is n."""
    return [dict(sources=dict(chosen=s), margin=float(n)) for s, k in counts.items()
            for n in range(1, k + 1)]


@pytest.mark.parametrize("counts, share, kept", [
    (dict(a=10, b=6, c=4), 0.5, dict(a=10, b=6, c=4)),  # exactly half is allowed
    (dict(a=16, b=6, c=2), 0.5, dict(a=8, b=6, c=2)),
    (dict(a=30, b=6, c=4), 0.4, dict(a=6, b=6, c=4)),  # .4 of the sum: 2/3 of the others' 10 is 6
    (dict(a=9, b=9, c=2), 0.4, dict(a=2, b=2, c=2)),
    (dict(a=9, b=1), 1.0, dict(a=9, b=1)),
    (dict(a=9), 0.5, {}),
])
def test_no_source_gives_more_than_its_share(counts, share, kept):
    pairs = cap_share(chosen_by(counts), share)
    left = {s: [p["margin"] for p in pairs if p["sources"]["chosen"] == s] for s in counts}
    # whichever goes first: all within the share, nothing of the smallest lost
    if kept == dict(a=2, b=2, c=2):
        assert pairs and all(len(v) <= share * len(pairs)
                             for v in left.values()) and len(left["c"]) == 2
        return
    assert {s: len(v) for s, v in left.items() if v} == kept
    for s, v in left.items():  # the surest pairs stay
        assert sorted(v) == list(range(counts[s] - len(v) + 1, counts[s] + 1))


def test_questions_of_the_iterations_are_new_ones():
    args = Args(questions=4, seed=1)
    first, second, third = (questions_of(k, 10, args) for k in (1, 2, 3))
    assert len(set(first + second)) == 8 and sorted(set(first + second + third)) == list(range(10))
    assert first == questions_of(1, 10, args) != questions_of(1, 10, Args(questions=4, seed=2))
    assert sorted(questions_of(2, 3, args)) == [0, 1, 2]  # fewer than asked for: all of them


# --- the zoo --------------------------------------------------------------------------------------
def test_parts_are_continued_behind_the_last_whole_one(tmp_path):
    file, asked = tmp_path / "x.jsonl", []
    parts = [("a", [1, 2, 3], 2), ("b", [1, 2, 3], 1), ("b", [4], 1)]

    def rows_of(what, items):
        asked.append((what, list(items)))
        return [[dict(what=what, item=i, n=n) for n in range(2 if what == "a" else 1)]
                for i in items]

    whole = collect_rows(ONE, file, parts, rows_of)
    text = file.read_text()
    assert [(r["what"], r["item"], r["n"]) for r in whole] == [
        ("a", 1, 0), ("a", 1, 1), ("a", 2, 0), ("a", 2, 1), ("a", 3, 0), ("a", 3, 1), ("b", 1, 0),
        ("b", 2, 0),
        ("b", 3, 0), ("b", 4, 0)]
    for lines, again in ((10, []), (9, [("b", [4])]), (8, [("b", [1, 2, 3]), ("b", [4])]),
                         (6, [("b", [1, 2, 3]),
                         ("b", [4])]), (0, [("a", [1, 2, 3]), ("b", [1, 2, 3]), ("b", [4])])):
        file.write_text("".join(text.splitlines(keepends=True)[:lines]))
        asked.clear()
        assert (
            collect_rows(ONE, file, parts, rows_of) == whole
            and asked == again
            and file.read_text() == text
        )
    file.write_text(text[:-5])  # half a line
    asked.clear()
    assert (
        collect_rows(ONE, file, parts, rows_of) == whole
        and asked == [("b", [4])]
        and file.read_text() == text
    )


@pytest.mark.parametrize("silent, asked, kept", [
    ({3, 4, 5}, 6, 3), ({1, 2, 3}, 4, 1), ({0, 2, 4, 6}, 8, None), ({4, 5, 6}, 8, None),
    ({6, 7}, 8, 6),
    (range(6), 3, 0), ({1, 2, 4, 5}, 8, None)], ids=str)
def test_whoever_answers_nothing_ends_the_run_and_is_asked_again(
    tmp_path, monkeypatch, silent, asked, kept
):
    """Six parts of one source, two of another. Three silent ones in a row, or all that a source
    has, are not kept. In the last case nobody was asked in part 2."""
    parts, seen = [("a", [k], 1) for k in range(6)] + [("b", [k], 1) for k in (6, 7)], []

    def rows_of(what, items):
        seen.extend(items)
        return [
            [dict(said=None if k in silent and k in dead else f"{what}{k}", k=k)] for k in items
        ]

    answered = lambda row: (
        None if row["k"] == 2 and silent == {1, 2, 4, 5} else row["said"] is not None
    )
    dead, file = set(range(8)), tmp_path / "answers.jsonl"
    if kept is None:
        assert len(collect_rows(ONE, file, parts, rows_of, answered)) == 8
        return
    with pytest.raises(SystemExit, match="answered nothing in .* rows"):
        collect_rows(ONE, file, parts, rows_of, answered)
    assert seen == list(range(asked)) and len(rows(file)) == kept
    dead = set()  # it is back
    assert [row["said"] for row in collect_rows(ONE, file, parts, rows_of, answered)] == [
        f"{'a' if k < 6 else 'b'}{k}" for k in range(8)
    ]
    assert seen == [*range(asked), *range(kept, 8)]


def test_a_video_that_one_source_cannot_read_is_a_missing_answer(monkeypatch, capfd):
    def read(clip, *_):
        raise VideoError(f"{clip}: damaged behind frame 900")

    class Cache:
        def prepare(self, clips, progress):
            return {c: f"{c}: damaged behind frame 900" for c in clips if c == "b"}

    def prompt_ids(question, video, most):
        if question == "long?":
            raise ValueError("a prompt of 900 tokens cannot be cut")

    args, records = Args(samples=2), [dict(clip=c, question="what?") for c in "aba"]
    checkpoint = object.__new__(Checkpoint)
    checkpoint.cache, checkpoint.args, checkpoint.warned, checkpoint.model = (
        Cache(),
        args,
        False,
        None,
    )
    checkpoint.processor = type("Processor", (), dict(prompt_ids=prompt_ids))
    checkpoint.sample = lambda model, processor, cache, some, keys, args: [
        [(str(k), True)] * 2 for k in keys
    ]
    assert checkpoint(records, [1, 2, 3]) == [[("1", True)] * 2, [MISSING] * 2, [("3", True)] * 2]
    assert checkpoint(records[1:2], [2]) == [[MISSING] * 2]
    long = dict(records[0], question="long?")  # for this source's video, not for the policy's
    assert checkpoint([long, records[0]], [4, 5]) == [[MISSING] * 2, [("5", True)] * 2]
    monkeypatch.setattr(zoo, "frames_as_urls", read)
    server = object.__new__(Server)
    server.args, server.warned, server.client = args, False, type("Client", (), dict(concurrency=1))
    assert server(records, [1, 2, 3]) == [[MISSING]] * 3
    # once a source
    assert capfd.readouterr().err.count("damaged behind frame 900; more of the kind") == 2


def test_the_cost_of_the_scores_outlives_a_resume(tmp_path):
    class Oracle:
        def __init__(self, asked):
            self.counters = dict(requests=asked)

        def aspects(self, videos, questions, answers):
            self.counters["requests"] += len(videos)
            return torch.ones(len(videos), 1, 4), torch.ones(len(videos), dtype=torch.bool)

    records = [dict(id=str(i), clip=Clip(f"{i}.mp4"), question="what?") for i in range(3)]
    (tmp_path / "answers.jsonl").write_text(
        "".join(  # of an earlier version: without `ended`
            json.dumps(dict(record=i, id=str(i), answer="red", source="policy")) + "\n"
            for i in range(3)
        )
    )
    for asked in (10, 0):  # the second time all scores are there
        run = SimpleNamespace(rank=0, world=1, args=Args(samples=1, zoo=["policy", "y"]))
        groups = collect_answers(run, tmp_path, 1, dict(policy="x"), records, [0, 1, 2], sample)
        cost = collect_scores(run, tmp_path, groups, Oracle(asked), score)
        assert cost == dict(requests=3.0) and [g["ended"] for g in groups] == [[True]] * 3


def test_missing_answers_get_no_score():
    class Oracle:
        def aspects(self, videos, questions, answers):
            self.seen = answers
            return torch.arange(24.0).view(2, 3, 4) / 5, torch.tensor([True, False])

    oracle = Oracle()
    scores = score(oracle, [1, 2], ["p", "q"], [["a", None, ""], ["b", "c", "d"]])
    # a copy in its place is no new comparison
    assert oracle.seen == [["a", "a", "a"], ["b", "c", "d"]]
    assert scores == [[[0.0, 0.2, 0.4, 0.6], None, [0.0] * 4], [None] * 3]


def test_the_embedded_zoo_sees_the_policys_labels_and_no_others(
    world, policy, monkeypatch, tmp_path
):
    import sft

    (tmp_path / "data").symlink_to(world / "data")
    shutil.copytree(policy.parent, tmp_path / "runs/sft/policy_s0")
    monkeypatch.chdir(tmp_path)
    built = []
    monkeypatch.setattr(embedded, "build_if_missing",
                        lambda path, command, *rest: built.append((path, command)))
    args = Args()
    assert len(args.zoo) == 5 and args.zoo[0] == "policy"
    zoo.build_zoo(args, 0)
    assert [path for path, _ in built] == args.zoo[1:]
    labelled = json.loads((policy.parent / "labelled_clips.json").read_text())
    for path, command in built:
        flags = dict(zip(command[1:-1:2], command[2:-1:2]))
        file = Path(flags["--data"])
        assert {f"data/moving_shapes/{r['video']}"
                for r in json.loads(file.read_text())} == set(labelled)
        monkeypatch.setattr(sys, "argv", command)
        parsed = parse_args(sft.Args)
        assert f"runs/sft/{parsed.name}_s{parsed.seed}/final" == path and parsed.resume
        assert parsed.seed != 0 and parsed.num_clips == 6
    assert Args(model="elsewhere").zoo == ["policy"]


# --- the whole script -----------------------------------------------------------------------------
class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code catches it."""


@pytest.fixture(scope="module")
def whole(world, policy):
    """The uninterrupted run: two iterations, a zoo of two, alphas 0 and 0.5."""
    second = world / "runs/sft/second_s0"
    shutil.copytree(policy.parent, second)
    model, processor = load_model(policy)
    lively(model, seed=9).save_pretrained(second / "final")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(zoo, "PART", 5)
        main_of(monkeypatch, world, "dpo_iter_w2s.py", *ZOO, "--name", "whole")
    return world / "runs/dpo_iter_w2s/whole_s0"


ZOO = ["--zoo", "policy", "runs/sft/second_s0/final", *SMALL, "--max_share", "0.8"]


def test_the_files_of_a_run(whole, world):
    assert json.loads((whole / "args.json").read_text())["args"]["iterations"] == 2
    assert isinstance(load_model(whole / "final")[0], VideoLLM) and not list(whole.rglob("*.tmp*"))
    metrics = rows(whole / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(8))
    assert [row["charts/iteration"] for row in metrics] == [1] * 4 + [2] * 4
    for step in (0, 4):  # each iteration starts at its reference
        assert metrics[step]["rewards/margins"] == metrics[step]["rewards/chosen"] == 0
        assert metrics[step]["losses/dpo"] == pytest.approx(math.log(2), abs=1e-6)
        assert metrics[step + 1]["rewards/margins"] != 0
    assert [("eval/accuracy" in row and "eval/len" in row) for row in metrics] == [
        s % 3 == 0 for s in range(8)
    ]
    asked = []
    for k in (1, 2):
        folder = whole / f"iteration_{k}_s0"
        answers, scores = rows(folder / "answers.jsonl"), rows(folder / "scores.jsonl")
        assert (len(answers) == 12 * 2 * 3 and len(scores) == 12
                and all(len(r["scores"]) == 6 for r in scores))
        assert [sum(r["source"] == s for r in answers) for s in ("policy", "second_s0")] == [36, 36]
        asked.append({r["id"] for r in answers})
        card = json.loads((folder / "data_card.json").read_text())
        pairs, report = read_preferences([str(folder / "preferences.json")])
        assert (card["pairs"] == len(pairs) == 12 - sum(card["dropped"].values())
                and not report["skipped"])
        assert (sum(card["chosen"]["sources"].values()) == sum(card["rejected"]["sources"].values())
                == len(pairs))
        assert max(card["chosen"]["sources"].values()) <= 0.8 * len(pairs)
        assert (folder / "data_card.md").read_text().count("\n| ") > 10
        processor = load_model(whole / "final")[1]
        for side in ("chosen", "rejected"):
            tokens = sum(len(ids_of(p, side, processor)) for p in pairs) / len(pairs)
            assert card[side]["tokens"] == pytest.approx(tokens, abs=1e-4)
        told = {(r["id"], r["answer"]): s for i, r in enumerate(answers)
                for s in [next(q["scores"] for q in scores if q["id"] == r["id"])]}
        for p in pairs:
            assert sum(p["scores"]["chosen"].values()) > sum(p["scores"]["rejected"].values())
            assert list(p["scores"]["chosen"].values()) in told[p["id"], p["chosen"]]
            assert p["answer"] is None  # no label leaves with the pairs
        curve = json.loads((folder / "extrapolation.json").read_text())
        assert [row["alpha"] for row in curve["curve"]] == [0, 0.5]
        by_alpha = {row["alpha"]: row["score"] for row in curve["curve"]}
        assert by_alpha[curve["chosen"]] == max(by_alpha.values())
        assert curve["curve"][0]["rewards/margins"] != curve["curve"][1]["rewards/margins"]
    assert not asked[0] & asked[1]
    labelled = set(json.loads((world / "runs/sft/policy_s0/labelled_clips.json").read_text()))
    assert not labelled & {r["video"] for r in answers}


def test_the_result_is_the_extrapolated_model(whole, policy):
    for k, before, after in ((1, policy, whole / "iteration_1_s0/final"),
                             (2, whole / "iteration_1_s0/final", whole / "final")):
        folder = whole / f"iteration_{k}_s0"
        alpha = json.loads((folder / "extrapolation.json").read_text())["chosen"]
        old, theta, new = (load_file(f / "model.safetensors")
                           for f in (before, folder / "theta", after))
        moved = [name for name in theta if not torch.equal(theta[name], old[name])]
        assert moved and not any(name.startswith("vision_tower") for name in moved)
        for name in theta:
            near(new[name],
                 theta[name].double() + alpha * (theta[name].double() - old[name].double()), 1e-5)


def kill_at(monkeypatch, place):
    """Let the n-th call of a function not come back, or not begin."""
    module, name, n, before = place
    function, calls = getattr(module, name), []

    def call(*args, **kwargs):
        calls.append(0)
        if len(calls) == n and before:
            raise Killed
        out = function(*args, **kwargs)
        if len(calls) == n:
            raise Killed
        return out
    monkeypatch.setattr(module, name, call)


# module, function, which of its calls in a run that comes this far alone, or after the stages
# before
STAGES = {
    "sampling": (dpo_iter_w2s, "generate", (3, 3), False),
    "scoring": (dpo_iter_w2s, "score", (2, 2), True),
    "training": (plumbing.run.Run, "check_finite", (4, 4), True),
    "theta": (plumbing.run, "save_checkpoint", (2, 1), True),
    "choice of alpha": (dpo_iter_w2s, "choose_alpha", (1, 1), False),
    "result": (plumbing.run.Run, "write_final", (1, 1), True),
    "second sampling": (dpo_iter_w2s, "generate", (8, 2), False),
    "finish": (plumbing.run.Run, "finish", (1, 1), True)}


@pytest.mark.parametrize("stages", [pytest.param([*STAGES], id="all, one after the other"), *(
    pytest.param([stage], id=stage, marks=pytest.mark.slow) for stage in STAGES)])
def test_killed_at_any_stage_and_resumed_equals_uninterrupted(world, whole, stages, monkeypatch):
    monkeypatch.setattr(zoo, "PART", 5)
    name = stages[0].replace(" ", "_") + str(len(stages))
    ours = world / f"runs/dpo_iter_w2s/{name}_s0"
    for stage in stages:
        module, function, calls, before = STAGES[stage]
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, (module, function, calls[len(stages) > 1], before))
            main_of(patch, world, "dpo_iter_w2s.py", *ZOO, "--name", name,
                    *["--resume"] * (stage != stages[0]))
        assert not (ours / "final").exists()
        if stage in ("sampling", "scoring", "second sampling"):
            half = max(ours.glob("iteration_*/*s.jsonl"), key=lambda file: file.stat().st_mtime_ns)
            half.write_text(half.read_text() + '{"record": 3, "sou')  # and half of a line
    main_of(monkeypatch, world, "dpo_iter_w2s.py", *ZOO, "--name", name, "--resume")
    assert same_weights(whole / "final", ours / "final")
    for k in (1, 2):
        for file in ("answers.jsonl", "scores.jsonl", "preferences.json", "data_card.json",
                     "extrapolation.json"):
            assert ((ours / f"iteration_{k}_s0" / file).read_text()
                    == (whole / f"iteration_{k}_s0" / file).read_text())
    assert rows(ours / "metrics.jsonl") == rows(whole / "metrics.jsonl")


def test_two_processes_equal_one(world, whole, forked):
    flags = [*ZOO, "--tokens_per_micro_batch", "1"]
    codes = forked.run(world, "dpo_iter_w2s.py", *flags, "--name", "two", world=2)
    assert codes == [0, 0], forked.said() + forked.said(1)
    two = world / "runs/dpo_iter_w2s/two_s0"
    # A draw that falls within rounding of the border between two tokens gives another answer where
    # the rows of a batch are others. That is one in many; draws with another key would change
    # nearly all.
    ours, theirs = (rows(f / "iteration_1_s0/answers.jsonl") for f in (whole, two))
    different = sum(a != b for a, b in zip(ours, theirs))
    assert len(ours) == len(theirs) > 50 and different <= len(ours) / 50
    if different:
        return  # from there on they are other runs
    for k in (1, 2):
        one, other = whole / f"iteration_{k}_s0", two / f"iteration_{k}_s0"
        if k == 1:  # later answers are those of policies that differ by rounding
            assert rows(one / "answers.jsonl") == rows(other / "answers.jsonl")
            said = [[(p["id"], p["chosen"], p["rejected"], p["sources"]) for p in
                     read_preferences([str(f / "preferences.json")])[0]] for f in (one, other)]
            assert said[0] == said[1] and len(said[0]) >= 4
        curves = [json.loads((f / "extrapolation.json").read_text())["curve"] for f in (one, other)]
        for a, b in zip(*curves):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
    assert len(rows(two / "metrics.jsonl")) == 8
    for a, b in zip(rows(whole / "metrics.jsonl")[:4], rows(two / "metrics.jsonl")):
        assert a.keys() == b.keys() and len(a) > 10
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    theta = "iteration_1_s0/theta"
    part, name = apart(whole / theta, two / theta, world / "runs/sft/policy_s0/final")
    assert part < 0.01, name


GIVEN = ["--fresh_pairs", "False", "--oracle", "reference", "--alphas", "0", "--eval_data", "",
         "--iterations", "1",
         "--steps", "1"]


def clips_of(world, n):
    return [Clip(str(p))
            for p in sorted((world / "data/moving_shapes/videos/train").glob("*.mp4"))[:n]]


def test_the_gradient_of_a_step(world, policy, monkeypatch, tmp_path):
    """Against plain forward passes, one an answer, and the formula of the gradient; the reference
    is not the start."""
    words = [("red", "blue blue"), ("up", "moves left and turns"), ("two", "two shapes"),
             ("no", "yes")]
    pairs = [dict(id=str(i), clip=clip, question=f"what is it, {i}?", chosen=w, rejected=r)
             for i, (clip, (w, r)) in enumerate(zip(clips_of(world, 4), words))]
    write_preferences(tmp_path / "pairs.json", pairs, "trl")
    other = lively(load_model(policy)[0], seed=4).requires_grad_(False)
    seen = {}

    def stop_there(params, limit):
        seen["grads"] = [p.grad.clone() for p in params]
        sys.exit("enough")

    monkeypatch.setattr(plumbing.run, "reference_of",
                        lambda model, place: lambda: nullcontext(other))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop_there)
    with pytest.raises(SystemExit, match="enough"):
        main_of(monkeypatch, world, "dpo_iter_w2s.py", *GIVEN, "--preferences",
                tmp_path / "pairs.json", "--name",
                "gradient", "--prompts_per_step", "4", "--tokens_per_micro_batch", "1", "--beta",
                "0.7")

    model, processor = load_model(policy)
    prefix = Prefix.build(processor, FeatureCache(model, processor, world / "cache"),
                          [p["question"] for p in pairs],
                          [p["clip"] for p in pairs])
    ids = [processor.answer_ids(p[side]) for p in pairs for side in ("chosen", "rejected")]
    tokens, lengths = (processor.pad(ids, "right")[0].view(4, 2, -1),
                       torch.tensor([len(i) for i in ids]).view(4, 2))
    ours = plain_logprobs(model, prefix, tokens, lengths)[0].sum(-1).view(4, 2)
    with torch.no_grad():
        theirs = plain_logprobs(other, prefix, tokens, lengths)[0].sum(-1).view(4, 2)
        margin = 0.7 * ((ours - theirs)[:, 0] - (ours - theirs)[:, 1])
        assert (margin > 0).any() and (margin < 0).any()
        weight = 0.7 / (1 + margin.exp()) / 4
    # d loss / d theta = - beta sigmoid(-margin) (d log pi(y_w) - d log pi(y_l)), mean over the
    # pairs
    expected = torch.autograd.grad(-(weight * (ours[:, 0] - ours[:, 1])).sum(),
                                   [p for p in model.parameters() if p.requires_grad])
    a, b = (torch.cat([g.flatten() for g in grads]).double() for grads in (seen["grads"], expected))
    assert b.norm() > 0.01 and (a - b).norm() < 1e-4 * b.norm()


def test_preference_files_of_every_format(world, policy, monkeypatch, tmp_path, capfd):
    clips = [str(c.path) for c in clips_of(world, 7)]
    ask = [{"from": "human", "value": "<video>\nwhat moves?"}]
    chat = [{"role": "user", "content": "<video>\nwhat moves?"}]
    said = lambda text: [{"role": "assistant", "content": text}]
    lines = [
        {"video": clips[0], "conversations": [*ask, {"from": "gpt", "value": "\n"}],
         "preference": 2,
         # VLM-RLAIF
         "output_1": {"from": "gpt", "value": "blue"}, "output_2": {"from": "gpt", "value": "red"}},
        # LLaVA-Hound
        {"video": clips[1], "prompt": "what moves?", "chosen": "red", "rejected": "blue"},
        # TRL, messages
        {"videos": [clips[2]], "prompt": chat, "chosen": said("red"), "rejected": said("blue")},
        # TRL, implicit prompt
        {"videos": [clips[3]], "chosen": chat + said("red"), "rejected": chat + said("blue")},
        {"video": clips[4], "conversations": ask, "chosen": {"from": "gpt", "value": "red"},
         "rejected": {"from": "gpt", "value": "blue"}},  # VLFeedback
        # RLAIF-V
        {"video": clips[5], "question": "what moves?", "chosen": "red", "rejected": "blue"},
        {"videos": [clips[6]], "messages": chat + said("red"), "rejected_response": "blue"},  # chat
        # no preference
        {"video": clips[0], "prompt": "what moves?", "chosen": "red", "rejected": "red"},
        # equal once cut
        {"video": clips[0], "prompt": "what moves?", "chosen": "red circle", "rejected": "red dot"},
        {"video": clips[0], "chosen": "red", "rejected": "blue", "messages": [
            {"role": role, "content": "what moves? " * n}
            for role, n in (("user", 300), ("assistant", 1), ("user", 1))]},
        {"prompt": "what moves?", "chosen": "red", "rejected": "blue"}]  # no video
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    used = []
    answer_logps = dpo_iter_w2s.answer_logps
    monkeypatch.setattr(dpo_iter_w2s, "answer_logps", lambda m, some, *rest: (
        used.extend((p["clip"].path, p["question"], p["chosen"], p["rejected"]) for p in some),
        answer_logps(m, some, *rest))[1])
    main_of(monkeypatch, world, "dpo_iter_w2s.py", *GIVEN, "--preferences",
            tmp_path / "pairs.jsonl", "--model", policy,
            "--prompts_per_step", "7", "--tokens_per_micro_batch", "1050", "--max_new_tokens", "1",
            "--name",
            "formats")
    assert set(used) == {(clip, "what moves?", "red", "blue") for clip in clips}
    said = capfd.readouterr().out
    assert "7 pairs; 0 broken videos; 14 answers are cut" in said and "skipped 1 rows" in said
    assert (
        "1 pairs left out, equal once cut; 1 whose prompts cannot be cut to --max_prompt_tokens 512"
    ) in said
    assert not list((world / "runs/dpo_iter_w2s/formats_s0").glob("*/answers.jsonl"))


def test_preferences_of_which_none_can_be_used_are_not_replaced(
    world, policy, monkeypatch, tmp_path
):
    (tmp_path / "text.jsonl").write_text(
        json.dumps({"prompt": "what moves?", "chosen": "red", "rejected": "blue"})
    )
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, world, "dpo_iter_w2s.py", *SELF, "--preferences",
                tmp_path / "text.jsonl", "--name", "no")
    assert "text.jsonl: none of 1 pairs can be used (1 without video" in stop.value.code


def test_memory_holds_no_second_decoder_and_greedy_answers_have_the_length_of_sampled_ones(
        world, policy, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    args = Args(model=str(policy))
    loaded = [load_model(policy)]
    watched = [weakref.ref(getattr(loaded[0][0], part))
               for part in ("language_model", "qformer", "projection")]
    run = SimpleNamespace(args=args, load=lambda path: loaded.pop(), rank=0, world=1,
                          folder=tmp_path, sharded=False,
                          device="cpu")
    monkeypatch.setattr(dpo_iter_w2s, "make_oracle", lambda *_: None)
    cache = dpo_iter_w2s.open_data(run)[-1]
    gc.collect()
    assert [part() for part in watched] == [None] * 3 and cache.tower is not None
    model, processor = load_model(policy)
    lively(model, seed=2)  # it does not end soon
    asked = [dict(clip=clip, question="what moves?", answer=None) for clip in clips_of(world, 3)]
    near(cache([c["clip"] for c in asked])[0],
         FeatureCache(model, processor, "cache")([c["clip"] for c in asked])[0])
    long, short = (answer(model, processor, cache, asked, n) for n in (48, 2))
    texts, sums = dpo_iter_w2s.greedy(asked, model, processor, cache, Args(max_new_tokens=2))
    assert texts == short != long and sums["accuracy"] == (0, 0)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_lora_is_merged_after_each_iteration(world, policy, monkeypatch, quantize):
    name = f"lora_{quantize}"
    flags = [*SELF, "--steps", "3", "--lora_r", "4", "--quantize", quantize, "--lr", "1e-2",
             "--name", name]
    ours = world / f"runs/dpo_iter_w2s/{name}_s0"
    # in the second iteration, behind a checkpoint
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, (plumbing.run.Run, "check_finite", 6, True))
        main_of(patch, world, "dpo_iter_w2s.py", *flags)
    main_of(monkeypatch, world, "dpo_iter_w2s.py", *flags, "--resume")
    metrics = rows(ours / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(6))
    assert (metrics[0]["rewards/margins"] == metrics[3]["rewards/margins"] == 0
            != metrics[4]["rewards/margins"])
    before = load_file(policy / "model.safetensors")
    for folder in (ours / "iteration_1_s0", ours):
        after = load_file(folder / "final/model.safetensors")
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved and all(n.startswith("language_model.") and n.endswith("proj.weight")
                             for n in moved)
        about = json.loads((folder / "adapter/adapter_config.json").read_text())
        assert ((about["base_model_name_or_path"] == str(policy.relative_to(world)))
                == (folder != ours))
        before = after
    if quantize == "none":
        main_of(monkeypatch, world, "dpo_iter_w2s.py", *flags[:-1], "lora_whole")
        whole = world / "runs/dpo_iter_w2s/lora_whole_s0"
        assert (
            same_weights(whole / "final", ours / "final")
            and rows(whole / "metrics.jsonl") == metrics
        )


def test_ai_feedback_and_the_first_stage_alone(world, policy, monkeypatch, capfd):
    flags = [*SELF, "--oracle", "context,judge", "--oracle_model", policy, "--iterations", "1",
             "--name", "ai"]
    main_of(monkeypatch, world, "dpo_iter_w2s.py", *flags, "--stage", "build")
    ours = world / "runs/dpo_iter_w2s/ai_s0"
    assert ((ours / "iteration_1_s0/preferences.json").exists()
            and not (ours / "metrics.jsonl").exists())
    assert "preferences.json; --stage all --resume" in capfd.readouterr().out
    main_of(monkeypatch, world, "dpo_iter_w2s.py", *flags, "--resume")
    assert (ours / "final/model.safetensors").exists() and len(rows(ours / "metrics.jsonl")) == 4
    scores = [s for row in rows(ours / "iteration_1_s0/scores.jsonl") for s in row["scores"] if s]
    assert all(0 <= x <= 5 for s in scores for x in s) and len({tuple(s) for s in scores}) > 5


def test_what_every_process_reads_for_itself_is_compared(world, policy, monkeypatch, tmp_path):
    """Machines with disks of their own: who goes on from other files would wait for ever."""
    compared = {}
    note = lambda what, thing: compared.update({Path(what).name: copy.deepcopy(thing)})
    monkeypatch.setattr(processes, "check_same", note)
    flags = [*SELF, "--iterations", "2", "--stage", "build"]
    main_of(monkeypatch, world, "dpo_iter_w2s.py", *flags, "--name", "same")
    made = world / "runs/dpo_iter_w2s/same_s0/iteration_1_s0"
    assert compared["same_s0: its iterations"] == [[False, False], [False, False]]
    assert compared["same_s0: its last checkpoint"] is None
    assert compared["answers.jsonl: its rows"] == compared["scores.jsonl: its rows"] == []
    assert len(compared["val.json: its records"]) == 5 and compared["train.json: its records"]
    (made / "theta").mkdir()
    main_of(monkeypatch, world, "dpo_iter_w2s.py", *flags, "--name", "same", "--resume")
    assert compared["same_s0: its iterations"] == [[True, False], [False, False]]
    for file in ("answers.jsonl", "scores.jsonl"):
        assert compared[f"{file}: its rows"] == rows(made / file)
    pairs = made / "preferences.json"
    with pytest.raises(SystemExit, match="fewer than --prompts_per_step"):
        main_of(monkeypatch, world, "dpo_iter_w2s.py", *flags[:-2], "--prompts_per_step", "998",
                "--name", "given", "--preferences", pairs)
    assert len(compared["preferences.json: its pairs"]) == len(json.loads(pairs.read_text()))


def test_no_alpha_is_chosen_by_an_oracle_that_scores_nothing(world, policy, monkeypatch):
    monkeypatch.setattr(
        dpo_iter_w2s, "oracle_scores", lambda oracle, records, answers: [(0.0, 0)] * len(answers)
    )
    with pytest.raises(SystemExit, match="scored none of 5 held-out questions.*--resume"):
        main_of(monkeypatch, world, "dpo_iter_w2s.py", *SELF, "--iterations", "1", "--name", "deaf")
    ours = world / "runs/dpo_iter_w2s/deaf_s0"
    assert (ours / "iteration_1_s0/theta").exists() and not (ours / "final").exists()


# --- a server as a source -------------------------------------------------------------------------
def refused(question):
    return len(question) % 3 == 0


@pytest.fixture
def server():
    """-> address, list of what was asked. It knows no answer to some questions, and no key."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.headers.get("Authorization"), body))
            text = body["messages"][0]["content"][-1]["text"]
            status = 401 if body["model"] == "locked" else 400 if refused(text) else 200
            reply = dict(choices=[dict(index=0,
                                       message=dict(role="assistant", content=" a red\nsquare "))])
            out = json.dumps(reply if status == 200
                             else dict(error=dict(message=f"no, {asked[-1][0]}"))).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked
    http.shutdown()


def test_a_server_is_a_source(world, policy, monkeypatch, server, capfd):
    url, asked = server
    monkeypatch.setenv("ORACLE_API_KEY", "sk-secret-secret")
    flags = [*SMALL, "--max_share", "1", "--api_frames", "2", "--stage", "build"]
    main_of(monkeypatch, world, "dpo_iter_w2s.py", "--zoo", "policy", f"{url}#big", *flags,
            "--name", "served")
    ours = world / "runs/dpo_iter_w2s/served_s0"
    answers = [r for r in rows(ours / "iteration_1_s0/answers.jsonl")
               if r["source"] == "big@127.0.0.1"]
    assert len(answers) == 12  # one a question
    unanswered = {r["id"] for r in answers if r["answer"] is None}
    assert unanswered == {r["id"] for r in answers if refused(r["question"])}
    assert {r["answer"] for r in answers} == {"a red square", None}
    scores = {r["id"]: r["scores"] for r in rows(ours / "iteration_1_s0/scores.jsonl")}
    assert all((scores[r["id"]][3] is None) == (r["answer"] is None) for r in answers)
    key, body = asked[0]
    assert key == "Bearer sk-secret-secret" and body["model"] == "big"
    assert [part["type"] for part in body["messages"][0]["content"]].count("image_url") == 2
    card = json.loads((ours / "iteration_1_s0/data_card.json").read_text())
    assert (card["no_answer"] >= len(unanswered)
            and card["missing"] == {"big@127.0.0.1": len(unanswered)})
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, world, "dpo_iter_w2s.py", "--zoo", "policy", f"{url}#locked", *flags,
                "--name", "locked")
    said = capfd.readouterr()
    assert "401" in str(stop.value) and "\n" not in str(stop.value)
    written = "".join(f.read_text() for f in ours.rglob("*.json*"))
    assert "secret" not in written + said.out + said.err + str(stop.value)


# --- what is wrong is said in one line ------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    "--beta 0", "--beta -1", "--lr 0", "--temperature 0", "--samples 0", "--samples 1 --zoo policy",
    "--iterations 0",
    "--min_gap -1", "--min_gap nan", "--max_share 0.1", "--max_share 1.5", "--zoo policy policy",
    "--zoo ftp://x#m",
    "--zoo http://x/v1", "--zoo a/final b/a/final", "--stage train", "--oracle god",
    "--oracle reward_model",
    "--quantize nf4", "--alphas 0.5 --eval_data=", "--alphas nan",
    "--prompts_per_step 0",
    "--stage build --preferences x.json", "--questions 0", "--lora_r -1", "--fresh_pairs maybe",
    "--gap 1",
    "stray"])
def test_bad_flags(flags, world, monkeypatch, capfd):
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, world, "dpo_iter_w2s.py", *flags.split())
    said = capfd.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    assert said.startswith("dpo_iter_w2s.py: "), said


@pytest.mark.parametrize("flags, words", [
    ("--preferences nowhere.json", "nowhere.json"),
    ("--zoo policy runs/sft/nothing/final", "runs/sft/nothing/final"),
    ("--min_gap 6", "0 pairs"), ("--model runs/nothing", "runs/nothing")])
def test_missing_files_and_too_few_pairs(flags, words, world, policy, monkeypatch):
    # a name that is no folder: no waiting
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, world, "dpo_iter_w2s.py", *SELF, "--max_share", "1", *flags.split(),
                "--name",
                f"bad{abs(hash(flags))}")
    assert words in str(stop.value.code) and "\n" not in str(stop.value.code)


def test_finished_and_changed_runs(world, whole, monkeypatch, capfd):
    for flags, words in ((["--name", "whole"], "in use"),
                         (["--name", "whole", "--resume", "--beta", "0.2"], "--beta")):
        with pytest.raises(SystemExit) as stop:
            main_of(monkeypatch, world, "dpo_iter_w2s.py", *ZOO, *flags)
        assert stop.value.code == 1 and words in capfd.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, world, "dpo_iter_w2s.py", *ZOO, "--name", "whole", "--resume")
    assert not stop.value.code and "finished" in capfd.readouterr().out
