"""Pure functions around rankings: when two answers are the same, ranks out of scores, how far two rankings agree.

Shapes: B groups of G answers. Scores are higher for better answers; ranks are 0 for the best.
"""

import random
import re
import unicodedata
from collections import Counter

import torch

THINKING = re.compile(
    r"<\s*/?\s*(?:seed:)?(?:think|thinking|thought|reasoning)\s*>|\[/?THINK\]|◁/?think▷"
    r"|<\|(?:begin|end)_of_thought\|>",
    re.I,
)


def strip_thinking(text):
    """What a reasoning model says beside its thinking: without <think>...</think>, however many
    blocks, in any case, also <thinking> and [THINK]. What stands before a closing tag is thinking
    even where the prompt had the opening one; thinking that was cut off goes to the end."""
    kept, opened, at = [], False, 0
    for tag in THINKING.finditer(text):
        closing = "/" in tag[0] or "end_" in tag[0].lower()
        if not opened and not closing:
            kept.append(text[at : tag.start()])
        opened, at = not closing, tag.end()
    return "".join(kept if opened else [*kept, text[at:]]).strip()


NAMES = r"\s*(?:(?:final_)?answer|conclusion)\s*>|<\|{}_of_(?:box|solution)\|>"
OPENING = re.compile("<" + NAMES.format("begin"), re.I)
CLOSING = re.compile(r"<\s*/" + NAMES.format("end"), re.I)
BOX = re.compile(r"\\boxed\s*\{")


def final_answer(text):
    """What a reply says in the end: without its thinking, and of <answer>...</answer> or
    \\boxed{...} what is inside. Several that differ are no answer: then all of it stays."""
    rest = strip_thinking(text)
    if not rest and len(parts := CLOSING.split(text)) > 1 and not parts[-1].strip():
        rest = "".join(OPENING.split(parts[-2])[1:][-1:])  # it never closed its thinking
    if OPENING.search(rest) or CLOSING.search(rest):
        before, *parts = OPENING.split(rest)
        rest = only_one([CLOSING.split(part)[0] for part in parts or [before]], rest)
    return only_one(boxed(rest), rest) if BOX.search(rest) else rest


def only_one(texts, otherwise):
    """What all texts that are not blank say, `otherwise` where they differ, "" where all are."""
    said = {normalize(t): t.strip() for t in texts if t.strip()}
    return otherwise if len(said) > 1 else next(iter(said.values()), "")


def boxed(text):
    """What stands in the \\boxed{...} of a text, with the braces in it but without \\text{}."""
    out, at = [], 0
    while (found := BOX.search(text, at)) is not None:
        depth, at = 1, found.end()
        while depth and at < len(text):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        inside = text[found.end() : at - (not depth)].strip()
        out.append(re.sub(r"^\\(?:text|math)\w*\s*\{(.*)\}$", r"\1", inside, flags=re.S))
    return out


# "A", "plan A" and "A, C" name something: as an article, a stands before a word.
ARTICLE = re.compile(r"\b(?:a\s(?=\W*\w)|an\b|the\b)")
NUMBER = re.compile(r"[$£€¥]?\.?\d")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
DASHES = str.maketrans("\u2212\u2013\u2010\u2011\uff0d\uff0b\uff05", "-----+%")


def normalize(text):
    """Lower case, no punctuation, no articles, single spaces: what two answers must share to count
    as the same. What changes the meaning stays: signs (-5, 3.5, 1/2, 5 %, C++), the vowel signs of
    other scripts. Only a blank text becomes empty: one of nothing but punctuation keeps it."""
    text = text.lower()
    if not text.isascii():
        text = INVISIBLE.sub("", unicodedata.normalize("NFC", text)).translate(DASHES)
    words = lambda text: re.sub(r"[^\w\s]", kept_sign, text).split()
    return " ".join(words(ARTICLE.sub(" ", text)) or words(text) or text.split())


def kept_sign(match):
    """What stands for a character that is no letter, digit or space: a space if punctuation."""
    sign, i = match[0], match.start()
    past, rest = match.string[max(i - 8, 0) : i], match.string[i + 1 : i + 17]
    before, after = past[-1:], rest[:1]
    left, right = past.rstrip()[-1:].isdigit(), rest.lstrip()[:1].isdigit()
    if not sign.isascii():
        kind = unicodedata.category(sign)
        return sign if kind[0] == "M" else f" {sign} " if kind in ("Sm", "Sc") else " "
    if sign == ".":
        return "." if after.isdigit() and not re.match(r"[^\W\d]|[.)]", before) else " "
    if sign in "+-" and NUMBER.match(rest) and not re.match(r"[\w)]", before):
        return f" {sign}"  # -5
    if sign in "+#" and re.search(r"\w\+*$", past) and not re.match(r"\w", after):
        return sign  # C++, C#, A+, 5+
    if sign == "-" and re.search(r"(?<!\w)([a-z]|ab)$", past) and not re.match(r"\w", after):
        return sign  # A-
    apart = (
        sign in "+-*/:^=<>" and left and right  # 1/2, 3:15, 2 - 1
        or sign == "%" and left
        or sign == "$" and NUMBER.match(rest) and not re.match(r"[\d.,]+\$", rest)  # no LaTeX $5$
        or sign == "^" and re.match(r"[\w(-]", after) and re.match(r"[\w)]", before)
        or sign in "<>=" and before not in ("-", "=") and re.match(r"[=>]?\s*[-$.]*\d", rest)
    )  # fmt: skip
    return f" {sign} " if apart else " "


def one_of_equals(answers):
    """For every answer, the place of the one that stands for it: of the answers in its group that are equal to it the
    shortest, whatever their order ("left" for "The left."). B lists of G strings -> B lists of G places."""
    out = []
    for group in answers:
        plain = {}
        for k in sorted(range(len(group)), key=lambda k: (len(group[k]), group[k])):
            plain.setdefault(normalize(group[k]), k)
        out.append([plain[normalize(a)] for a in group])
    return out


def token_f1(prediction, reference):
    """Harmonic mean of token precision and recall in [0,1] (SQuAD's F1) of the final answers; two
    blank ones agree."""
    return f1_parts(prediction, reference)[1]


def f1_parts(prediction, reference):
    """Token precision, F1 and recall in [0,1]."""
    p, r = (normalize(final_answer(text)).split() for text in (prediction, reference))
    if not p or not r:
        return (float(p == r),) * 3
    common = sum((Counter(p) & Counter(r)).values())
    return common / len(p), 2 * common / (len(p) + len(r)), common / len(r)


def differ(answers):
    """Which groups hold answers that differ, and so need an order? B lists of G strings -> (B,)."""
    return torch.tensor([len(set(one)) > 1 for one in one_of_equals(answers)])


def ranks_of(scores):
    """scores (B,G), higher is better -> ranks (B,G) long: the number of strictly better answers; ties share a rank."""
    return (scores.unsqueeze(1) > scores.unsqueeze(2)).sum(-1)


def places_of(scores):
    """scores (B,G) -> (B,G) float: the mean of the places 0..G-1 that an answer and those tied with it occupy."""
    tied = (scores.unsqueeze(1) == scores.unsqueeze(2)).sum(-1)
    return ranks_of(scores) + (tied - 1) / 2


def mean_rank(scores):
    """Scores of several raters, R x (B,G) -> (B,G): 1 - mean place / (G-1), 1 where all put an answer first."""
    places = torch.stack([places_of(s) for s in scores]).mean(0)
    return 1 - places / max(scores[0].shape[1] - 1, 1)


def pairwise_accuracy(scores, correct):
    """Share of (right, wrong) answer pairs of one group in which the right one scores higher; ties count one half.

    scores (B,G) float, correct (B,G) bool -> accuracy, number of pairs.
    """
    mixed = correct.unsqueeze(2) & ~correct.unsqueeze(1)  # (B,G,G) i right, j wrong
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)  # (B,G,G)
    better = (difference > 0).float() + (difference == 0).float() / 2
    pairs = mixed.sum().item()
    return (better * mixed).sum().item() / max(pairs, 1), pairs


def kendall_tau(scores, truth):
    """Kendall's tau-b of every group, averaged over the groups in which the truth prefers anything.

    scores, truth (B,G) float -> tau in [-1,1], number of groups. tau-b = (agreeing - disagreeing pairs) /
    sqrt(pairs not tied in scores x pairs not tied in truth); a group that the scores leave tied counts 0.
    """
    order = lambda x: torch.sign(x.unsqueeze(2) - x.unsqueeze(1)).double()  # (B,G,G)
    a, b = order(scores), order(truth)
    untied, known = a.abs().sum((1, 2)), b.abs().sum((1, 2))  # (B,)
    tau = (a * b).sum((1, 2)) / (untied * known).sqrt().clamp(min=1)
    groups = (known > 0).sum().item()
    return tau[known > 0].sum().item() / max(groups, 1), groups


def random_scores(answers, indices, step, seed):
    """Control: a random order of the distinct answers of each group, keyed like the rollouts."""
    rows = []
    for group, i in zip(answers, indices):
        draw = random.Random(f"{seed} {step} {i} control")
        value = {a: draw.random() for a in dict.fromkeys(group)}
        rows.append([value[a] for a in group])
    return torch.tensor(rows)
