"""What a reply says: without its thinking, and when two answers are the same. Pure functions of
texts."""

import re
import unicodedata
from collections import Counter

DESCRIBE = "Describe this video in detail"  # VLM-RLAIF Sec. 3.1

THINKING = re.compile(
    r"<\s*/?\s*(?:seed:)?(?:think|thinking|thought|reasoning|analysis|reflection|scratchpad)\s*>"
    r"|\[/?THINK\]|◁/?think▷|<\|(?:begin|end)_of_thought\|>|<\|channel\|>[^<]*<\|message\|>",
    re.I,
)


END_MARKS = re.compile(r"(\s*(<[|｜][^<>]*[|｜]>|</s>|<eos>|<end_of_turn>))+\s*$")


def strip_thinking(text):
    """What a reasoning model says beside its thinking: without <think>...</think>, however many
    blocks, in any case, also <thinking>, [THINK] and all channels but the final one. What stands
    before a closing tag is thinking even where the prompt had the opening one; thinking that was
    cut off goes to the end."""
    kept, opened, at = [], False, 0
    for tag in THINKING.finditer(text):
        closing = re.search("(?i)/|end_|>\\s*final", tag[0]) is not None
        if not opened and not closing:
            kept.append(text[at : tag.start()])
        opened, at = not closing, tag.end()
    return "".join(kept if opened else [*kept, text[at:]]).strip()


NAMES = r"\s*(?:(?:final_)?answer|conclusion)\s*>|<\|{}_of_(?:box|solution)\|>"
OPENING = re.compile("<" + NAMES.format("begin"), re.I)
CLOSING = re.compile(r"<\s*/" + NAMES.format("end"), re.I)
BOX = re.compile(r"\\boxed\s*\{")


def final_answer(text):
    """What a reply says in the end: without its thinking and end marks such as </s>, and of
    <answer>...</answer> or \\boxed{...} what is inside. Several that differ are no answer: then all
    of it stays."""
    rest = END_MARKS.sub("", strip_thinking(text))
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


# "A", "plan A", "A, C" and "A > C" name something: as an article, a stands before a word.
ARTICLE = re.compile(r"\b(?:a\s(?!\s*(?:\+|[-!=]{0,2}[<=>][-=>]{0,2})\s)(?=\W*\w)|an\b|the\b)")
# what stands between two words and relates them: x < y, but no <tag>; left -> right, x != y
RELATION = re.compile(r"\s+[<>]\s+|\s*(?:<?[-=]+>|<[-=]+|[!=<>]=|=)\s*")
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
    beside = re.search(r"\w\s*$", past) and re.match(r"\s*\w", rest)
    letter = re.search(r"(?<!\w)\w\s*$", past) or re.match(r"\s*\w(?!\w)", rest)
    apart = (
        sign in "+-*/:^=<>" and left and right  # 1/2, 3:15, 2 - 1
        or sign == "%" and left
        or sign == "$" and NUMBER.match(rest) and not re.match(r"[\d.,]+\$", rest)  # no LaTeX $5$
        or sign == "^" and re.match(r"[\w(-]", after) and re.match(r"[\w)]", before)
        or sign in "<>=" and before not in ("-", "=") and re.match(r"[=>]?\s*[-$.]*\d", rest)
        or sign == "+" and beside and letter  # x + y
    )
    if not apart and sign in "-<>=!":
        head, tail = re.search(r"[-<>=!\s]*$", past)[0], re.match(r"[-<>=!\s]*", rest)[0]
        words = len(head) < len(past) and len(tail) < len(rest)
        if words and RELATION.fullmatch(head + sign + tail):
            return " " * (not head.strip()) + sign + " " * (not tail.strip())
    return f" {sign} " if apart else " "


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


def is_correct(prediction, reference):
    """Exact match of normalised text (lower case, no punctuation, no articles), thinking apart."""
    return normalize(final_answer(prediction)) == normalize(final_answer(reference))
