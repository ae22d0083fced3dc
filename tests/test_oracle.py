"""Oracles: scores and ranks by hand, comparisons against one forward pass per pair, narratives told once."""

import numpy as np
import pytest
import torch

import oracle
from data import Clip, read_records
from oracle import (
    JudgeOracle,
    ReferenceOracle,
    cut,
    judge_prompt,
    normalize,
    pairwise_accuracy,
    ranks_of,
    token_f1,
)

ANSWERS = [["a red circle", "blue", "The red circle.", "it moves left and then it stops"], ["left", "right", "up", ""],
           ["square", "square", "square", "square"]]  # fmt: skip
QUESTIONS = ["what is there?", "where does the red shape move to?", "what is the blue shape?"]


@pytest.mark.parametrize("prediction, reference, f1", [
    ("red circle", "red circle", 1.0), ("A red, circle!", "the RED circle", 1.0), ("blue", "red circle", 0.0),
    ("red", "red circle", 2 / 3),  # precision 1, recall 1/2
    ("red red red circle", "red circle", 2 / 3),  # precision 2/4, recall 1: a word counts as often as it is there
    ("a red circle moves left", "red circle", 2 / 3), ("", "red", 0.0), ("red", "", 0.0), ("", "", 1.0),
    ("the", "a", 1.0), ("one two three", "three four", 0.4),  # 1/3 and 1/2: 2 * (1/6) / (5/6)
])  # fmt: skip
def test_token_f1(prediction, reference, f1):
    assert token_f1(prediction, reference) == pytest.approx(f1)


def test_normalize():
    assert normalize(" The  red-ish Circle,\nmoves. An apple ") == "red ish circle moves apple"


def test_ranks_with_ties():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.1], [0.0, 0, 0, 0, 0], [5, 4, 3, 2, 1]])
    assert ranks_of(scores).tolist() == [[3, 0, 2, 0, 3], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]


def test_reference_oracle_masks_what_it_does_not_know():
    clip, other = Clip("a.mp4"), Clip("b.mp4")
    judge = ReferenceOracle([dict(clip=clip, question="what?", answer="red circle")])
    groups = [["blue", "red circle", "red", "the red circle"], *[["red circle", "x", "y", "z"]] * 2]
    videos, questions = [clip, other, clip], ["what?", "what?", "where?"]
    ranks, ok = judge.rank(videos, questions, groups)
    assert ranks[0].tolist() == [3, 0, 2, 0] and ok.tolist() == [True, False, False]
    scores, ok = judge.score(videos, questions, groups)
    torch.testing.assert_close(scores[0], torch.tensor([0.0, 1.0, 2 / 3, 1.0]))
    assert (scores[1:] == 0).all() and scores.dtype == torch.float32 and not ok[1:].any()


def test_a_record_without_an_answer_is_unknown():
    judge = ReferenceOracle([dict(clip=Clip("a.mp4"), question="what?", answer=None)])
    assert judge.rank([Clip("a.mp4")], ["what?"], [["x", "y"]])[1].tolist() == [False]


def test_pairwise_accuracy():
    correct = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])
    scores = torch.tensor([[0.5, 0.4, 0.5], [0.1, 0.2, 0.3], [0.2, 0.8, 0.6]])
    # right before wrong: yes, tied | no mixed pair | no, yes -> (1 + .5 + 0 + 1) / 4
    assert pairwise_accuracy(scores, correct) == (0.625, 4)


# --- the judge -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def clips(world):
    records = read_records([str(world / "data/moving_shapes/test.json")])[0]
    return list(dict.fromkeys(r["clip"] for r in records if r["clip"].start is None))[:3]


@pytest.fixture(scope="module")
def judge(policy, tmp_path_factory):
    judge = JudgeOracle(policy, tmp_path_factory.mktemp("cache"), narrative=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # after four steps it says the same to everything: shake it
        for name, p in judge.model.named_parameters():
            if p.dim() == 2 and "vision_tower" not in name:
                p += 0.7 * torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5
    return judge


def probability_of_the_first(judge, clip, question, first, second, narrative=None):
    """One comparison in one order, as two unpadded prompts, each followed by one reply: exp(log p1) over their sum."""
    prompt = sum(judge.processor.split_prompt_ids(*judge_prompt(question, first, second, narrative)), [])
    features, frame_mask = judge.cache([clip])
    weights = []
    for text in (first, second):
        reply = judge.processor.answer_ids(text)
        ids = torch.tensor([prompt + reply])
        with torch.no_grad():
            logits = judge.model(input_ids=ids, attention_mask=torch.ones_like(ids), video_features=features,
                                 frame_mask=frame_mask).logits[0, len(prompt) - 1 : -1].double()
        weights.append(logits.log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)].sum().exp().item())
    return weights[0] / sum(weights)


def test_preferences_are_those_of_single_comparisons_in_both_orders(judge, clips):
    prefers = judge.preferences(clips, QUESTIONS, ANSWERS)
    torch.testing.assert_close(prefers + prefers.transpose(1, 2), torch.ones(3, 4, 4))
    assert (prefers.diagonal(dim1=1, dim2=2) == 0.5).all()
    seen = []
    for b in range(2):
        for i in range(4):
            for j in range(i):
                if normalize(ANSWERS[b][i]) != normalize(ANSWERS[b][j]):
                    one = probability_of_the_first(judge, clips[b], QUESTIONS[b], ANSWERS[b][i], ANSWERS[b][j])
                    two = probability_of_the_first(judge, clips[b], QUESTIONS[b], ANSWERS[b][j], ANSWERS[b][i])
                    if {i, j} & {2} and b == 0:
                        continue  # a copy: the comparison of the first of its kind counts
                    seen.append(abs(one + two - 1))
                    assert prefers[b, i, j].item() == pytest.approx((one + 1 - two) / 2, abs=1e-5)
    assert max(seen) > 0.01 and len(seen) == 9  # the orders do differ, so averaging them is tested
    assert (prefers[:2] - 0.5).abs().max() > 0.005


def test_copies_of_an_answer_are_tied_and_inherit_its_comparisons(judge, clips):
    prefers = judge.preferences(clips, QUESTIONS, ANSWERS)
    assert prefers[0, 0, 2] == 0.5 and torch.equal(prefers[0, 0], prefers[0, 2])  # "a red circle", "The red circle."
    assert torch.equal(prefers[0, :, 0], prefers[0, :, 2])
    assert (prefers[2] == 0.5).all()
    ranks, ok = judge.rank(clips, QUESTIONS, ANSWERS)
    assert ranks[0, 0] == ranks[0, 2] and ranks[2].tolist() == [0, 0, 0, 0] and ok.all()
    assert sorted(ranks[1].tolist()) == [0, 1, 2, 3]
    order = prefers[1].mean(-1).argsort(descending=True)
    assert ranks[1][order].tolist() == [0, 1, 2, 3]  # most preferred first


def test_the_order_and_the_company_of_groups_do_not_matter(judge, clips):
    whole = judge.preferences(clips, QUESTIONS, ANSWERS)
    judge.rows, rows = 1, judge.rows  # batches of one group
    try:
        turned = judge.preferences(clips[::-1], QUESTIONS[::-1], ANSWERS[::-1]).flip(0)
    finally:
        judge.rows = rows
    torch.testing.assert_close(turned, whole, rtol=0, atol=1e-5)
    order = [3, 1, 0, 2]
    moved = judge.preferences(clips, QUESTIONS, [[group[i] for i in order] for group in ANSWERS])
    torch.testing.assert_close(moved[1], whole[1][order][:, order], rtol=0, atol=1e-5)


def pretend(judge, monkeypatch, logprob):
    """Replace the model: logprob(first response, second response, reply) is all that it thinks of a reply."""
    def think(model, prefix, tokens, lengths):
        out = torch.zeros(tokens.shape)
        for row, count, place in zip(tokens.flatten(0, 1), lengths.flatten(), out.flatten(0, 1)):
            text = judge.processor.tokenizer.decode(row[:count])
            asked, reply = text.removesuffix("</s>").split("<assistant>")
            one, two = asked.split("Response 1:")[1].split("Response 2:")
            place[count - 1] = logprob(one.strip(), two.split(" Give ")[0].strip(), reply.strip())
        return out.flatten(0, 1), None

    monkeypatch.setattr(oracle, "token_logprobs", think)


def test_a_constant_preference_for_a_place_cancels(judge, clips, monkeypatch):
    pretend(judge, monkeypatch, lambda first, second, reply: -1.0 if reply == first else -4.0)
    questions, answers = QUESTIONS[:2], [["a red circle", "blue", "it moves left"], ["left", "right", "up"]]
    prefers = judge.preferences(clips[:2], questions, answers)
    torch.testing.assert_close(prefers, torch.full((2, 3, 3), 0.5), rtol=0, atol=1e-7)
    assert (judge.rank(clips[:2], questions, answers)[0] == 0).all()


def test_a_judge_that_knows_is_believed_whatever_place_it_likes(judge, clips, monkeypatch):
    worth = {"red": -3.0, "blue": -2.0, "green": -4.0, "it moves left": -1.0}
    for place in (0.0, 0.9, -0.9):
        pretend(judge, monkeypatch, lambda first, second, reply, place=place: worth[reply] + place * (reply == first))
        prefers = judge.preferences(clips[:1], QUESTIONS[:1], [list(worth)])[0]
        assert judge.rank(clips[:1], QUESTIONS[:1], [list(worth)])[0].tolist() == [[2, 1, 3, 0]]
        # sigmoid(1 + place) and sigmoid(-1 + place): .7310586 without a favourite place, (.8698915 + .5249792) / 2 with
        assert prefers[3, 1].item() == pytest.approx(0.6974354 if place else 0.7310586, abs=1e-6)


@pytest.mark.parametrize("answer", ["</s>", "Response 2: 1", "", "<video>", "a\x00b", "\x00",
                                    "a <vi<video>deo>"])  # fmt: skip
def test_any_answer_can_be_judged(judge, clips, answer):
    """Answers are sampled: they can hold whatever a tokenizer can say."""
    prefers = judge.preferences(clips[:1], QUESTIONS[:1], [["red", answer, "blue"]])
    assert prefers.isfinite().all()
    torch.testing.assert_close(prefers + prefers.transpose(1, 2), torch.ones(1, 3, 3))


# --- narratives ----------------------------------------------------------------------------------------------------
def test_a_clip_is_cut_in_equal_parts(clips):
    for clip, start, end in ((Clip(clips[0].path, 0.2, 0.8), 0.2, 0.8), (clips[0], 0.0, None)):
        parts = cut(clip, 3)
        assert len(parts) == 3 and all(p.path == clip.path for p in parts) and parts[0].start == start
        assert all(a.end == b.start for a, b in zip(parts, parts[1:]))
        np.testing.assert_allclose(np.diff([p.end - p.start for p in parts]), 0, atol=1e-9)
        assert parts[2].end == pytest.approx(end) if end else 1.0 < parts[2].end < 2.5


def test_narratives_are_told_once(policy, clips, tmp_path, monkeypatch):
    context = JudgeOracle(policy, tmp_path, narrative=True)
    asked, describe = [], JudgeOracle.describe

    def listen(self, parts):
        asked.extend(parts)
        return [f"<{describe(self, [part])[0]}> from {part.start:.3f}" for part in parts]

    monkeypatch.setattr(JudgeOracle, "describe", listen)
    told = context.narratives([clips[0], clips[1], clips[0]])
    assert told[0] == told[2] and asked == cut(clips[0], 3) + cut(clips[1], 3)
    starts = [f"{part.start:.3f}" for part in cut(clips[0], 3)]
    assert [told[0].index(f"from {s}") for s in starts] == sorted(told[0].index(f"from {s}") for s in starts)
    monkeypatch.setattr(JudgeOracle, "describe", lambda *args: pytest.fail("described again"))
    assert context.narratives([clips[1]]) == [told[1]]
    assert JudgeOracle(policy, tmp_path, narrative=True).narratives([clips[1], clips[0]]) == [told[1], told[0]]
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_model_tells_its_own_narratives(policy, clips, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(JudgeOracle, "describe", lambda self, parts: ["first"] * len(parts))
    JudgeOracle(policy, tmp_path, narrative=True).narratives(clips[:1])
    other = tmp_path / "other"
    model = judge.model
    model.save_pretrained(other)
    judge.processor.save_pretrained(other)
    monkeypatch.setattr(JudgeOracle, "describe", lambda self, parts: ["second"] * len(parts))
    assert JudgeOracle(other, tmp_path, narrative=True).narratives(clips[:1]) == ["second second second"]


def test_descriptions_are_greedy_answers_to_the_papers_request(policy, clips, tmp_path):
    context = JudgeOracle(policy, tmp_path, narrative=True)
    parts = cut(clips[0], 3)
    together = context.describe(parts)
    assert together == [context.describe([p])[0] for p in parts] and len(together) == 3
    assert oracle.DESCRIBE == "Describe this video in detail"


def test_the_narrative_stands_before_the_question(judge, clips, monkeypatch):
    story = "first a red circle moves . then it stops ."
    monkeypatch.setattr(judge, "narrative", True)
    monkeypatch.setattr(judge, "told", {clips[0]: story})
    prefers = judge.preferences(clips[:1], QUESTIONS[:1], [["red", "blue"]])
    one = probability_of_the_first(judge, clips[0], QUESTIONS[0], "red", "blue", story)
    two = probability_of_the_first(judge, clips[0], QUESTIONS[0], "blue", "red", story)
    assert prefers[0, 0, 1].item() == pytest.approx((one + 1 - two) / 2, abs=1e-5)
    plain = probability_of_the_first(judge, clips[0], QUESTIONS[0], "red", "blue")
    assert abs(plain - one) > 1e-3
