"""The scoring rules on hand-computed cases, replies as models and judges really give them, and
retrieval, top-k and the bootstrap against second, plain implementations."""

import json
import random

import numpy as np
import pytest

from evaluation import metrics as m


# --- judge replies --------------------------------------------------------------------------------
@pytest.mark.parametrize("reply, right, score", [
    ("{'pred': 'yes', 'score': 4}", 1, 4),
    ("{'pred': 'no', 'score': 0}", 0, 0),
    ('{"pred": "Yes", "score": "5"}', 1, 5),
    ("{'pred': 'yes', 'score': 4.8}", 1, 4),  # the prompt's own example: int() cuts
    ("{'pred': 'yes', 'score': '4.8'}", 1, 4),
    ("{'pred': 'yes', 'score': 4,}", 1, 4),
    ("\ufeff{'pred': 'yes', 'score': 4}\n", 1, 4),
    ("```json\n{\"pred\": \"no\", \"score\": 1}\n```", 0, 1),
    ("Sure! {'pred': 'yes', 'score': 3}. I hope this helps.", 1, 3),
    ("{''pred'': ''yes'', ''score'': 4.8}", 1, 4),  # doubled quotes, as in the published prompt
    ("[{'pred': 'yes', 'score': 4}]", 1, 4),
    ([{"pred": "yes", "score": 4}], 1, 4),
    ([[{"pred": "no", "score": 2}], "x"], 0, 2),
    ({"type": "yes", "score": 2}, 1, 2),  # the key that CVRR-ES's parser accepts
    ("{'pred': 'unknown', 'score': 1}", 0, 1),  # 'no' is in it: the official substring test
    ("{'Pred': 'yes', 'SCORE': 4}", 1, 4), ('{"pred": true, "score": 4}', 1, 4),
    ("{'pred': False, 'score': 1}", 0, 1), ("{'pred': true, 'score': 4}", 1, 4),
    ("{'result': {'pred': 'no', 'score': 1}}", 0, 1),
    ("{'pred': 'yes', 'score': 4}\n{'pred': 'Yes', 'score': '4.0', 'why': 'again'}", 1, 4),
    ("<think>Maybe {'pred': 'yes', 'score': 5}?</think>{'pred': 'no', 'score': 0}", 0, 0),
    ("It could be {'pred': 'yes', 'score': 5}.</think>\n{'pred': 'no', 'score': 0}", 0, 0),
    ("The set {'cat'} is not {'dog': 1}: {'pred': 'no', 'score': 2}", 0, 2),
])
def test_replies_that_count(reply, right, score):
    values, problem = m.qa_values(reply)
    assert problem is None and values == dict(
        accuracy=right, accuracy_all=right, score=score, score_all=score
    )


@pytest.mark.parametrize("reply, problem", [
    ("", "no dictionary"), ("The answer is correct.", "no dictionary"), ("yes", "no dictionary"),
    ("{", "no dictionary"),
    (None, "no dictionary"), ([], "no dictionary"), ("[]", "no dictionary"),
    ("(" * 5000, "no dictionary"),
    ("__import__('os').system('true')", "no dictionary"),
    ("{'pred': print(1), 'score': 4}", "no dictionary"),
    ("<think>{'pred': 'yes', 'score': 5}", "no dictionary"),
    ("<think>{'pred': 'yes', 'score': 5}</think>yes", "no dictionary"),
    # a verdict named twice in one dictionary: the last one would count
    ("{'pred': 'no', 'score': 0, 'pred': 'yes', 'score': 5}", "no dictionary"),
    ('It says {"pred": "no", "score": 0, "Score": 5}', "no dictionary"),
    ({"pred": "no", "Pred": "yes", "score": 5}, "several verdicts"),
    *((said, "several verdicts") for said in (
        "{'pred': 'yes', 'score': 4}{'pred': 'no', 'score': 0}",
        "The answer is: a cat {'pred': 'yes', 'score': 5}. It is wrong: {'pred': 'no', 'score': 0}",
        "a cat {'pred': 'yes', 'score': 5}. It is wrong: {'pred': wrong, 'score': 0}",
        "a cat {'pred': 'yes', 'score': 5}. It is wrong: {'pred': 'no', 'sc",
        "[{'pred': 'yes', 'score': 5}, {'pred': 'no', 'score': 0}]",
        "{'pred': 'yes', 'score': 5}, {'pred': 'yes', 'score': 0}",
        "{'said': {'pred': 'yes', 'score': 5}, 'mine': {'pred': 'no', 'score': 0}}")),
    ("{'prediction': 'yes', 'score': 4}", "no verdict"), ("{'score': 4}", "no verdict"),
    ("{'pred': 'yes'}", "no score of 0 to 5"),
    ("{'pred': 'yes', 'score': None}", "no score of 0 to 5"),
    ("{'pred': 'yes', 'score': 7}", "no score of 0 to 5"),
    ("{'pred': 'yes', 'score': -1}", "no score of 0 to 5"),
    ("{'pred': 'yes', 'score': True}", "no score of 0 to 5"),
    ("{'pred': 'yes', 'score': 1e999}", "no score of 0 to 5"),
    ("{'pred': 'yes', 'score': '4/5'}", "no score of 0 to 5"),
    ('{"pred": "no", "score": NaN}', "no score of 0 to 5"),
])
def test_replies_that_do_not_count_are_wrong_in_one_convention_and_dropped_in_the_other(
    reply, problem
):
    assert m.qa_values(reply) == (dict(accuracy=None, accuracy_all=0, score=None, score_all=0),
                                  problem)


def test_a_verdict_neither_way_leaves_its_score():
    values, problem = m.qa_values("{'pred': 'partially correct', 'score': 3}")
    assert (
        values == dict(accuracy=None, accuracy_all=0, score=3, score_all=3)
        and problem == "verdict neither way"
    )


@pytest.mark.parametrize("said, right", [
    ("correct", 1), ("incorrect", 0), ("Correct", 1), ("partially correct", None), ("yes", None),
    ("not correct", None),
])
def test_cvrr_verdicts_are_compared_whole(said, right):
    assert m.qa_values({"pred": said, "score": 2}, "correct")[0]["accuracy"] == right


def any_value(rng, depth=0):
    """What a model may write: texts with the signs that matter, numbers, and nestings of them."""
    text = "".join(rng.choices(["{", "}", "[", "]", "'", '"', ":", ",", "pred", "score", "yes",
                                "no", "4.8", " ", "\n",
                                "é", "\x00", "-", "1e9", "None", "nan"], k=rng.randrange(12)))
    plain = [text, None, True, rng.randrange(-3, 9), rng.uniform(-9, 9), float("nan"), float("inf")]
    if depth > 2 or rng.random() < 0.5:
        return rng.choice(plain)
    parts = [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    verdict = {"pred": rng.choice(["yes", "no", text]), "score": rng.choice([4, "3.5", *plain])}
    return rng.choice([parts, dict(zip(rng.sample(["pred", "score", "type"], 3), parts)), verdict,
                       str(verdict)])


def test_any_reply_gives_values_and_never_an_error():
    counted = 0
    for seed in range(3000):
        reply = any_value(random.Random(seed))
        values, problem = m.qa_values(reply)
        assert values["accuracy"] in (None, 0, 1) and values["score_all"] in range(6)
        assert (values["score"] is None) == (problem not in (None, "verdict neither way"))
        again, _ = m.score_values(reply, "detail")
        assert again["detail"] is None or again["detail"] == again["detail_all"]
        counted += problem is None
    assert counted > 50


# --- letters --------------------------------------------------------------------------------------
OPTIONS = ["A. Apples.", "B. Candles.", "C. Berries.", "D. The same."]


@pytest.mark.parametrize("reply, official, strict", [
    ("C", "C", "C"), ("C.", "C", "C"), ("(C)", "C", "C"), ("C. Berries.", "C", "C"),
    ("**C**", "C", "C"),
    ("The best answer is: B", "B", "B"), ("Answer: D", "D", "D"),
    ("The correct option is (D).", "D", "D"),
    ("", "", ""), ("!!!!", "", ""), ("berries", "", "C"), ("Berries.", "B", "C"),
    ("Based on the video, (C)", "B", "C"),  # the official rule takes the first of A-D anywhere
    ("According to the video, the answer is C.", "A", "C"),
    ("A or B", "A", ""), ("(A) or (B)", "A", ""), ("A. or B.", "A", ""),
    ("A man lights candles", "A", ""),
    ("I do not know which one of these it could possibly be at all", "", ""), ("E", "", ""),
])
def test_letters(reply, official, strict):
    assert (m.letter_official(reply), m.letter_strict(reply, OPTIONS)) == (official, strict)


LOOKS_NEAR = "<think>Option A looks near: apples are green, so (A) or (B).</think>"


@pytest.mark.parametrize("reply", [
    "<think>Apples are green here, so ...</think>\n<answer>C</answer>", LOOKS_NEAR + "C",
    LOOKS_NEAR + "\n\nBerries.",
    LOOKS_NEAR.removeprefix("<think>") + "The answer is C.", "<think>(A)? <answer>C</answer>",
    "<answer>C. Berries.",
    "\\boxed{C}", "So it is $\\boxed{\\text{C. Berries}}$.", "<answer>\\boxed{(C)}</answer>",
    "<answer>The answer is C.</answer>",
    "Answer: $C", "Answer: $\\mathrm{C}$", "ANSWER: [C]", "Answer: \\(C\\)",
    "The answer is **(C)**", "answer - C",
    "c", "(c).", "[C]", "C: Berries", "Answer:\nC", "The answer should be C",
    "The answer is Berries.",
    "C\nBecause (A) is green.", "(C)\nOptions A and B are not there; option D is no answer.",
    "Because (A) is green:\n**C**",
    "Berries.\nOption A is green.", "I considered (A), but it is green. Final answer: C.",
    "(A) is green.\n**Final Answer:**\n\nC",
    "Final answer: C. (A) was near.", "(B)? The final choice is option C",
    "I considered (A), but the answer is C.",
    "Option A is green, not option B. Final answer: Berries", "It is (C), not (A).",
    "The answer is C, because A is green",
])
def test_the_one_option_that_is_named_in_the_end(reply):
    assert m.letter_strict(reply, OPTIONS) == "C"


@pytest.mark.parametrize("reply", [
    LOOKS_NEAR, "<think>The answer is C", LOOKS_NEAR + "I do not know", "<answer></answer>C",
    "<answer>A</answer><answer>C</answer>",
    "\\boxed{A} or \\boxed{C}", "Final answer: A or C", "Final answer: A. or C.",
    "Final answer: A. Final answer: C.",
    "Answer: A, C", "Answer: A and C", "Answer: A/C", "The answer is A. No wait, (C).",
    "A\nThe answer is C.", "A\nC", "A C",
    "A. Apples.\nB. Candles.\nC. Berries.\nD. The same.", "It is not (A).", "The answer is not C.",
    "The answer isn't (C).",
    "Neither (A) nor (C)", "The answer is A man who sells candles", "Pottery of 300 B.C. is there",
    "A B C D", "The", "...",
])
def test_no_or_several_options_named(reply):
    assert m.letter_strict(reply, OPTIONS) == ""


def test_an_options_text_is_told_from_its_neighbours():
    orders = ["A. (a)(b)(c).", "B. (c)(a)(b).", "C. (a)(c)(b).", "D. (b)(a)(c)."]
    for options in (orders, [text[3:] for text in orders]):
        for said in ("(c)(a)(b).", "(C)(A)(B)", "B. (c)(a)(b).", "The answer is (c)(a)(b)."):
            assert m.letter_strict(said, options) == "B"
        assert m.letter_strict("(c)(b)", options) == ""
    for said, options, letter in (
            ("-5", ["A. 5", "B. -5"], "B"), ("C++", ["A. C", "B. C++", "C. C#"], "B"),
            ("C", ["A. C", "B. D", "C. E"], "C"),
            ("plan A", ["A. plan B", "B. plan", "C. plan A"], "C"), ("", ["A. The", "B. A"], ""),
            ("\u0915\u093f", ["A. \u0915", "B. \u0915\u0940", "C. \u0915\u093f"], "C")):
        assert m.letter_strict(said, options) == letter


def test_the_official_letter_is_read_out_of_the_thinking_too():
    values, problem = m.choice_values(LOOKS_NEAR + "<answer>C</answer>", "C", OPTIONS)
    assert values == dict(acc_answered=0, acc_all=0, acc_strict=1) and problem is None


def test_long_replies_take_no_time():
    for text in ("Answer: ", "final answer ", "(A) ", "\\", "answer" + " " * 5000, "A, ", "\n",
                 "<answer>", "\\boxed{"):
        m.letter_strict(text * (20_000 // len(text)), OPTIONS)  # quadratic in length: minutes
    for text in ("{", "{}", "[", "{'pred': 1}"):
        m.qa_values(text * (20_000 // len(text)))


def test_an_unread_letter_is_dropped_officially_and_wrong_over_all():
    assert m.choice_values("!!!!", "C", OPTIONS) == (
        dict(acc_answered=None, acc_all=0, acc_strict=0),
        "no letter",
    )
    assert m.choice_values("Based on the video, (C)", "C",
                           OPTIONS)[0] == dict(acc_answered=0, acc_all=0, acc_strict=1)
    assert (m.letter_official("E", "ABCDE") == "E"
            == m.letter_strict("The answer is E", letters="ABCDE"))


@pytest.mark.parametrize("reply, answer, right", [
    ("A", "A. dunking", 1), ("B", "A. dunking", 0), ("A. anything", "A. dunking", 1),
    ("A) x", "A. dunking", 1),
    ("A. dunking</s>", "A. dunking", 1), ("dunking", "A. dunking", None),
    ("The answer is A", "A. dunking", None),
    ("Yes, he is", "yes", 1), ("yes", "no", 0), ("No.", "no", 1), ("It is", "yes", None),
    ("", "no", None),
])
def test_tempcompass_rules(reply, answer, right):
    assert m.tempcompass(reply, answer) == right


@pytest.mark.parametrize("reply, answer, right", [
    ("A", "A. dunking", 1), (LOOKS_NEAR + "\nC", "C. passing", 1),
    ("<answer>B</answer>", "A. dunking", 0), ("dunking", "A. dunking", 1),
    ("The answer is A", "A. dunking", 1), ("", "A. dunking", 0),
    (" A. dunking</s>", "A. dunking", 1), ("A or C", "A. dunking", 0),
    ("<think>no?</think>Yes, he is", "yes", 1), ("<think>yes", "yes", 0), (" Yes.", "yes", 1),
    ("Nothing", "no", 0), ("yes or no", "yes", 0),
    ("\\boxed{No}", "no", 1), ("He runs.\nNo.", "no", 1), ("**Answer:** yes", "yes", 1),
    ("Yes. So the answer is no.", "yes", 0), ("It is", "yes", 0),
    ("he dunks", "a caption", None),
])
def test_tempcompass_read_after_the_thinking(reply, answer, right):
    question = "What is he doing?\nA. dunking\nB. dribbling\nC. passing"
    assert m.tempcompass_strict(reply, answer, question) == right


@pytest.mark.parametrize("reply, right", [
    ("Option 2: he dunks", 1), ("2", 1), ("Option 2", 1), ("he dunks.", 1),
    ("Option 1: he dribbles", 0), ("", 0),
    (LOOKS_NEAR + "<answer>Option 2</answer>", 1), ("1 or 2", 0),
    ("I thought of option 1. Final answer: 2", 1),
])
def test_tempcompass_captions_read_after_the_thinking(reply, right):
    for name in ("Option", "Caption", "Sentence"):
        question = f"Which one?\n{name} 1: he dribbles\n{name} 2: he dunks"
        said = reply.replace("Option", name)
        assert m.tempcompass_strict(said, f"{name} 2: he dunks", question) == right


def test_next_qa_counts_tp_as_tn():
    assert m.nextqa_groups("TP") == m.nextqa_groups("TN") == {"type": "TN", "Acc@": "T"}
    assert m.nextqa_groups("CW") == {"type": "CW", "Acc@": "C"}


# --- retrieval and top-k --------------------------------------------------------------------------
def plain_topk(similarity, target, k):
    """Hits by sorting each row, averaged over every order of its ties: 500 random orders."""
    out = []
    for row, t in zip(similarity, target):
        hits = 0
        for trial in range(500):
            order = list(range(len(row)))
            random.Random(trial).shuffle(order)
            hits += t in sorted(order, key=lambda j: -row[j])[:k]
        out.append(hits / 500)
    return out


def test_topk_by_hand_and_against_sorting():
    similarity = np.array([[3.0, 2, 1], [1, 2, 3], [2, 2, 1], [1, 1, 1]])
    hits = m.topk_hits(similarity, np.array([0, 0, 1, 2]), (1, 2))
    assert (hits[1].tolist() == [1, 0, 0.5, pytest.approx(1 / 3)]
            and hits[2].tolist() == [1, 0, 1, pytest.approx(2 / 3)])
    rng = np.random.default_rng(0)
    similarity, target = rng.integers(0, 4, (6, 7)).astype(float), rng.integers(0, 7, 6)
    for k, got in m.topk_hits(similarity, target, (1, 5)).items():
        assert np.allclose(got, plain_topk(similarity, target, k), atol=0.08)


def plain_retrieval(captions, texts, embed, k):
    """VLM-Eval's two loops, for texts and captions without ties: every different caption looks for
    the description of its video among all, every description for its caption among the different
    captions; divided by the predictions."""
    cos = lambda a, b: float(embed([a])[0] @ embed([b])[0])
    texts = [t.replace(".", "")[:77] for t in texts]
    different, t2v, v2t = sorted(set(captions)), 0, 0
    for text, caption in zip(texts, captions):
        v2t += caption in sorted(different, key=lambda c: -cos(text, c))[:k]
    for caption in different:
        last = max(i for i, c in enumerate(captions) if c == caption)
        t2v += last in sorted(range(len(texts)), key=lambda i: -cos(texts[i], caption))[:k]
    return t2v / len(texts), v2t / len(texts)


def letters_embedding(texts):
    """A deterministic stand-in for CLIP: letter counts, with a little noise by text so that nothing
    ties."""
    count = lambda t, c: t.count(c) + 1e-4 * random.Random(t + c).random()
    out = np.array([[count(t, c) for c in "abcdefghijklmnopqrstuvwxyz "] for t in texts])
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def test_retrieval_against_two_plain_loops():
    rng, words = random.Random(1), "red blue circle square moves turns left right up".split()
    captions = [" ".join(rng.sample(words, 4)) for _ in range(12)]
    captions[7] = captions[3]  # one caption for two videos
    texts = [" ".join(rng.sample(c.split(), 3) + rng.sample(words, 1)) + "." for c in captions]
    got = m.retrieval_hits(captions, texts, letters_embedding)
    for k in (1, 5):
        t2v, v2t = plain_retrieval(captions, texts, letters_embedding, k)
        assert (got[f"t2v_r{k}"].mean() == pytest.approx(t2v)
                and got[f"v2t_r{k}"].mean() == pytest.approx(v2t))
    assert 0 < got["t2v_r1"].mean() < 1


def test_one_description_for_all_gains_nothing():
    got = m.retrieval_hits(["a b", "c d", "e f", "g h"], ["same"] * 4, letters_embedding)
    assert got["t2v_r1"].tolist() == [0.25] * 4 and got["v2t_r1"].mean() == 0.25


def test_action_classes_are_the_full_list():
    classes = ["moves left", "turns", "jumps"]
    labels, texts = ["turns", "moves left", "turns"], ["it turns.", "turns", " "]
    got = m.class_hits(labels, texts, classes, letters_embedding, (1, 2))
    assert got["top1"].tolist() == [1, 0, 0] and got["top2"][2] == 0  # a blank text is never right


def test_texts_are_cut_as_vlm_eval_cuts_them():
    assert m.for_clip("a.b." + "x" * 100) == "ab" + "x" * 75


# --- statistics -----------------------------------------------------------------------------------
def plain_bootstrap(values, clips, resamples, seed):
    """Draw clips with replacement, pool their items, take the mean; percentiles of many such
    means."""
    rng, by_clip = random.Random(seed), {}
    for v, c in zip(values, clips):
        by_clip.setdefault(c, []).append(v)
    groups, means = list(by_clip.values()), []
    for _ in range(resamples):
        pooled = [v for g in rng.choices(groups, k=len(groups)) for v in g if not np.isnan(v)]
        if pooled:
            means.append(sum(pooled) / len(pooled))
    return np.quantile(means, [0.025, 0.975])


def test_bootstrap_against_a_plain_one():
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 25, 200)
    values = (rng.random(200) < 0.2 + 0.6 * (clips % 2)).astype(float)  # items of a clip are alike
    holes = np.where(rng.random(200) < 0.3, np.nan, values)
    results = m.bootstrap(np.stack([values, holes], 1), clips)
    for (mean, low, high), column in zip(results, (values, holes)):
        assert mean == pytest.approx(np.nanmean(column))
        assert np.allclose([low, high], plain_bootstrap(column, clips, 1000, 1), atol=0.03)
    alone = m.bootstrap(values[:, None], np.arange(200))[0]
    # clusters widen the interval
    assert alone[2] - alone[1] < 0.7 * (results[0][2] - results[0][1])


def test_an_empty_column_has_no_value_and_a_rare_group_survives():
    values = np.full((30, 2), np.nan)
    values[4, 1] = 1
    assert m.bootstrap(values, np.arange(30)) == [None, (1, 1, 1)]


@pytest.mark.parametrize("seed", range(12))
def test_an_interval_holds_within_the_values_and_does_not_depend_on_order(seed):
    rng = random.Random(seed)
    n = rng.randrange(1, 30)
    values, clips = (np.array([rng.choice([0.0, 1.0]) for _ in range(n)]),
                     np.array(rng.choices("abcde", k=n)))
    (mean, low, high), = m.bootstrap(values[:, None], clips, 500)
    assert values.min() <= low <= high <= values.max() and mean == values.mean()
    assert m.bootstrap(values[::-1, None], clips[::-1], 500)[0] == pytest.approx((mean, low, high))


def test_literal_never_runs_code():
    assert (m.literal("__import__('os')") is None
            and m.literal("[1, {'a': None}]") == [1, {"a": None}])
    assert m.literal(json.dumps({"a": None, "b": True})) == {"a": None, "b": True}
