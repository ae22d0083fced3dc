"""The scoring rules of the public benchmarks, and the statistics of the tables: texts and numbers
in, numbers out.

Every rule turns one prediction into values of one item: {metric: 1.0 / 0.0 / a score / None}. A
metric is the mean of its values that are not None. So both conventions for what cannot be read are
two metrics of the same items:

    accuracy      the official rule: what cannot be read is left out of numerator and denominator
                  (None)
    accuracy_all  every question counts; what cannot be read, and a question without a prediction,
                  is wrong (0)

  rule                    official scorer                                             here
  verdict yes / no        Video-ChatGPT evaluate_activitynet_qa.py (substring test)   qa_values
  verdict in/correct      CVRR-ES results_parser.py (equality)
                          qa_values(words="correct")
  score 0-5               the same files: mean of int(score)                          qa_values,
                          score_values
  letter                  Video-MME eval_your_results.py
                          letter_official
  letter, yes / no        TempCompass eval_multi-choice.py, eval_yes_no.py            tempcompass
  multiple choice         NExT-QA eval_mc.py (TP counts as TN)                        choice_values,
                          nextqa_groups
  text-text retrieval     VLM-Eval retrival_v2t_t2v.py                                retrieval_hits
  action recognition      VLM-Eval action_acc.py, over the full class list            topk_hits

D1      `letter_official` takes the first of A-D anywhere, so "Based on ..." reads as B.
        `letter_strict` beside it takes a reply only if it names one option and no other, after its
        thinking; both are reported.
D2      Where several candidates of a retrieval are equally similar, the hit is shared among them
        (its expected value under a random order); the official code leaves the order of ties to
        chance, and a model that gives every video one description would profit from it.
"""

import ast
import contextlib
import json
import math
import re

import numpy as np

from plumbing.text import final_answer, normalize, strip_thinking

SCORES = 5  # judges give 0..5


# --------------------------------------------------------------------------------------------------
# What a judge replied
# --------------------------------------------------------------------------------------------------
def literal(text):
    """The Python or JSON value that a text spells, or a mixture of both; None. Never eval()."""
    name = {"true": "True", "false": "False", "null": "None"}
    python = lambda t: python_value(re.sub(r"\b(true|false|null)\b", lambda m: name[m[0]], t))
    json_value = lambda t: json.loads(t, object_pairs_hook=one_verdict)
    for read in (python_value, json_value, python):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return read(text)


def python_value(text):
    """ast.literal_eval, but ValueError for a dictionary that `one_verdict` refuses."""
    tree = ast.parse(text.lstrip(" \t"), mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            one_verdict([(getattr(key, "value", None), None) for key in node.keys])
    return ast.literal_eval(tree)


def one_verdict(pairs):
    """The dictionary of these keys and values. ValueError where it names pred, type or score twice:
    the last one would count."""
    pairs = list(pairs)
    names = [key.strip().lower() for key, _ in pairs if isinstance(key, str)]
    if any(names.count(name) > 1 for name in ("pred", "type", "score")):
        raise ValueError("several verdicts")
    return dict(pairs)


def reply_dict(reply):
    """A judge's dictionary, its keys in lower case, and why there is none. It is given as it is,
    alone in a list, as Python or JSON text, or in a longer text (code fences, prose, thinking). An
    answer can bring a verdict of its own, which the judge repeats: several verdicts that differ, or
    beside one that cannot be read, are none."""
    while isinstance(reply, list) and reply:  # [{...}], also [{...}, the question]
        reply = reply[0]
    found = dictionaries(reply) if isinstance(reply, str) else [reply]
    if not found or not all(isinstance(d, dict) for d in found):
        return None, "several verdicts" if len(found) > 1 else "no dictionary"
    try:
        found = [one_verdict((k.strip().lower(), v) for k, v in d.items() if isinstance(k, str))
                 for d in found]
    except ValueError:
        return None, "several verdicts"
    verdicts = [d for d in found if "pred" in d or "score" in d] or found
    said = lambda d: (str(d.get("pred", d.get("type"))).lower(), read_score(d.get("score")))
    several = len(set(map(said, verdicts))) > 1
    return (None, "several verdicts") if several else (verdicts[0], None)


def dictionaries(text):
    """The dictionaries in a judge's text, in order; None for a verdict that cannot be read."""
    value = literal(text.strip().lstrip("\ufeff"))
    if isinstance(value, (dict, list, tuple)):
        return inside(value)
    text = strip_thinking(text)
    between = text[text.find("{") : text.rfind("}") + 1]
    unquoted = lambda t: literal(t.replace("''", "'").replace('""', '"'))  # as the prompt has it
    value = literal(between) or unquoted(between)
    if isinstance(value, (dict, tuple)) and text.rfind("{") < text.rfind("}"):  # none is cut off
        return inside(value)
    out = []
    for part in in_braces(text):
        value = literal(part) or unquoted(part)
        lost = value is None and re.search("pred|score", part, re.I)
        out += inside(value) or [None] * bool(lost)
    return out


def in_braces(text):
    """The parts {...} of a text that stand in no other braces; the last one may be cut off."""
    out, depth, start = [], 0, 0
    for brace in re.finditer("[{}]", text):
        start = brace.start() if depth == 0 else start
        depth = max(0, depth + (1 if brace[0] == "{" else -1))
        if depth == 0 and brace[0] == "}":
            out.append(text[start : brace.end()])
    return out + [text[start:]] * (depth > 0)


def inside(value):
    """The dictionaries in a value, in order; of one without a verdict those in its values."""
    todo, out = [value], []
    while todo:
        value = todo.pop(0)
        if isinstance(value, (list, tuple)):
            todo = [*value, *todo]
        elif isinstance(value, dict):
            nested = [v for v in value.values() if isinstance(v, (dict, list))]
            plain = any(str(key).strip().lower() in ("pred", "type", "score") for key in value)
            out += [value] if plain or not nested else []
            todo = [*(nested if not plain else []), *todo]
    return out


def read_score(value):
    """A judge's score as the official rule takes it: int(), which cuts 4.8 to 4. None if it is no
    number in 0..5."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = math.nan if isinstance(value, bool) else float(value)
        return int(number) if 0 <= number <= SCORES else None


def read_verdict(said, words="yes"):
    """True, False, or None for anything else, such as 'partially correct'.

    words="yes": "yes" anywhere, else "no" anywhere (Video-ChatGPT); words="correct": exactly
    correct or incorrect."""
    if isinstance(said, bool):
        return said
    if not isinstance(said, str):
        return None
    said = said.lower()
    if words == "correct":
        return {"correct": True, "incorrect": False}.get(said)
    return True if "yes" in said else False if "no" in said else None


def qa_values(reply, words="yes"):
    """One judged answer -> its values, and why the reply is not usable (None if it is). A verdict
    may stand under 'type', as CVRR-ES's parser allows. A reply without a verdict or a score at all
    counts as none: official code stops there. A verdict that is neither yes nor no leaves its score
    in the mean, as officially."""
    found, key = reply_dict(reply)
    said = None if found is None else found.get("pred", found.get("type"))
    score = None if found is None else read_score(found.get("score"))
    if found is None or said is None or score is None:
        key = key or ("no verdict" if said is None else "no score of 0 to 5")
        return dict(accuracy=None, accuracy_all=0.0, score=None, score_all=0.0), key
    right = read_verdict(said, words)
    values = dict(accuracy=None if right is None else float(right), accuracy_all=float(bool(right)),
                  score=float(score), score_all=float(score))
    return values, "verdict neither way" if right is None else None


def score_values(reply, name):
    """One reply {'score': n} -> {name: n or None, name_all: n or 0}, problem."""
    found, problem = reply_dict(reply)
    score = None if found is None else read_score(found.get("score"))
    problem = problem or ("no score of 0 to 5" if score is None else None)
    return {name: score if score is None else float(score),
            f"{name}_all": float(score or 0)}, problem


def unanswered(names):
    """The values of a question without a prediction, or that no judge could read: out of one mean,
    0 in the other."""
    return {name: None for name in names} | {f"{name}_all": 0.0 for name in names}


# --------------------------------------------------------------------------------------------------
# Letters
# --------------------------------------------------------------------------------------------------
# Two entries of the official list lack a comma and are fused, so that four prefixes never match;
# kept as they act.
PREFIXES = ("The best answer is", "The correct answer is", "The answer is", "The answer",
            "The best option is" "The correct option is", "Best answer:" "Best option:", "Answer:",
            "Option:", "The correct answer", "The correct option")


def letter_official(reply, letters="ABCD"):
    """Video-MME's letter: known prefixes deleted, then the first of A-D anywhere; '' where there is
    none."""
    reply = reply.strip()
    for prefix in PREFIXES:
        reply = reply.replace(prefix, "")
    found = re.search(f"[{letters}]", reply)
    return found[0] if found else ""


def letter_strict(reply, options=(), letters="ABCD"):
    """[D1] The letter of the one option that a reply names, '' if it names none or several.

    Named is: the letter alone; marked as in (C), C. or C); after 'answer' or 'option'; or an
    option's own text. Thinking is no part of the reply, and of <answer> or \\boxed{} what is inside
    counts. A 'final answer' outdoes what else is named, so does a first or last line that is an
    option and nothing else, and an 'answer is' after which no other option comes."""
    letters, text = letters[: len(options)] if options else letters, final_answer(reply)
    bare = [re.sub(rf"^\s*\(?{x}[.):]\s*", "", option) for x, option in zip(letters, options)]
    options = [[normalize(option) for option in some] for some in (options, bare)]
    if option := option_of(text, options, letters):
        return option
    the_one = lambda letters: letters.pop() if len(letters) == 1 else ""
    if final := stated(text, FINAL, options, letters):
        return the_one(set().union(*final.values()))
    answers = stated(text, STATED, options, letters)
    said = set().union(*answers.values())
    lines = [option_of(line, options, letters) for line in text.split("\n") if line.strip()]
    if lines and (lines[0] or lines[-1]):
        return the_one({*lines, *said} - {""})
    if len(said) == 1 and named(text[max(answers) :], letters) <= said:
        return the_one(said)
    return the_one(named(text, letters) | said)


STATED = r"(?i)\banswer\b[\s*_]*(?:is|was|(?:would|should|must) be)?[\s*_]*[:：=-]?[\s*_]*"
FINAL = STATED.replace("answer", r"final\s+(?:answer|choice|option)")
NEGATED = r"(?i)(?:\b(?:not|nor|neither|except)|n['’]t(?: be)?)\s+(?:(?:option|choice)\s+)?$"
OPEN = r"(?:[\s\"'“*_`(\[{<$（]|\\[a-z]*+)*+"  # before a letter, as in Answer: $\text{C}$
ALONE = r"(?![\w'’])"
ARTICLE = r"(?<=A)\s+(?!because|since|as|is|and|or|for|due|based)[a-z]"  # the answer is A man


def option_of(text, options, letters):
    """The letter of the option that a text is, letter or text or both, and nothing else; or ''."""
    if len(text) > 80 + 4 * max(map(len, sum(options, [])), default=0):  # it says more
        return ""
    said, alone = normalize(text), re.fullmatch(r"[\W_]*([^\W_])[^\w+#]*_*", text)
    if alone and alone[1].upper() in letters:
        return alone[1].upper()
    for texts in options:
        same = [letter for letter, option in zip(letters, texts) if option == said != ""]
        if len(same) == 1:
            return same[0]
    return ""


def stated(text, pattern, options, letters):
    """{place behind it: letters} of every 'answer is' in a text that an option follows."""
    one = rf"{OPEN}([{letters}]){ALONE}(?!{ARTICLE})"
    others = rf"((?:[\s.)\]*\"']*+(?:,|/|&|\bor\b|\band\b){one})*)"
    out = {}
    for m in re.finditer(pattern, text):
        rest = text[m.end() : m.end() + 500].split("\n")[0]
        if found := re.match(rf"(?:(?i:option|choice|letter)\s+)?{one}{others}", rest):
            out[m.end() + found.end()] = {found[1], *re.findall(rf"(?<!\w)[{letters}]", found[2])}
        else:
            sentence = re.split(r"(?<=[.!?])\s", rest)[0]
            option = option_of(rest, options, letters) or option_of(sentence, options, letters)
            out |= {m.end() + len(rest): {option}} if option else {}
    return out


def named(text, letters):
    """The letters that a text marks or names as options, but for those that it rules out."""
    one = f"([{letters}])"
    marked = rf"[(（]{one}[)）]|(?<![\w.]){one}[.):：](?=\s|$)|\*\*{one}\*\*"
    after = rf"(?i:\banswer)(?i:\s+is)?\s*+:?{OPEN}{one}{ALONE}(?!{ARTICLE})"
    after += rf"|(?i:option|choice)(?i:\s+is)?\s*+:?{OPEN}{one}{ALONE}"
    places = re.finditer(f"{marked}|{after}", text)
    out = {next(filter(None, m.groups())) for m in places
           if not re.search(NEGATED, text[max(0, m.start() - 30) : m.start()])}
    pairs = re.findall(rf"(?<!\w){one}(?:[.)])?\s+or\s+\(?{one}(?!\w)", text)
    return out | {letter for pair in pairs for letter in pair}


def choice_values(reply, answer, options=(), letters="ABCD"):
    """A reply to a multiple-choice question with the answer's letter -> values, problem."""
    official, strict = letter_official(reply, letters), letter_strict(reply, options, letters)
    values = dict(acc_answered=float(official == answer) if official else None,
                  acc_all=float(official == answer), acc_strict=float(strict == answer))
    return values, None if official else "no letter"


def tempcompass(reply, answer, question=""):
    """TempCompass: right or wrong by its matching rules, None where they do not match (official:
    asked of a judge, or 0 with --disable_llm). The kind of question is seen from its answer: yes /
    no, 'Caption A: text', else 'A. text'."""
    reply = reply.replace("</s>", "").strip()
    if answer in ("yes", "no"):
        said = next((word for word in ("yes", "no") if reply.lower().startswith(word)), None)
        return None if said is None else float(said == answer)
    if re.match(r"(Caption|Sentence|Option) \w+: ", answer):
        return matched_caption(reply, answer, question)
    if reply == answer:
        return 1.0
    if reply in ("A", "B", "C", "D") or re.match(r"[ABCD][.)]", reply):
        return float(reply[0] == answer[0])
    return None


def tempcompass_strict(reply, answer, question):
    """[D1] The same of what is said after the thinking, wherever it says it: yes or no, or the one
    option. None for an answer of another kind."""
    text = final_answer(reply.replace("</s>", ""))
    if answer in ("yes", "no"):
        word = r"(yes|no)\b(?!\W+(?:or|and)\W+(?:yes|no)\b)"
        lead = r"(?i)\W*(?:(?:the )?(?:final |correct )?answer(?: is)?\W*)?"
        begins = re.match(lead + word, text[:300])
        ends = re.search(rf"(?i)(?:\n|\banswer(?: is)?\W)\W*{word}\W*$", text[-300:])
        said = {found[1].lower() for found in (begins, ends) if found}
        return float(said == {answer})
    kind = r"(?:(?:Caption|Sentence|Option) (?=\w: )|(?=[A-D][.)] ))"  # Option 1: text, A. text
    options = re.findall(rf"(?m)^{kind}(.+)$", question)
    if not (right := re.match(rf"{kind}(\w)", answer or "")):
        return None
    names = "".join(option[0] for option in options) or "ABCD"
    text = re.sub(r"\b(?:Caption|Sentence)(?= \w\b)", "Option", re.sub(kind, "", text))
    return float(letter_strict(text, options, names) == right[1])


def matched_caption(reply, answer, question):
    """eval_caption_matching.py: a reply names an option by all of its line, its sentence ('A) '
    before it or not), its name or letter; the last that fits counts."""
    said, behind = None, reply.split(") ")[1] if ") " in reply else None
    for line in question.split("\n")[1:]:
        name, *text = line.split(": ")[:2]
        named = {reply, reply.replace(".", "")} & {name, name.split(" ")[-1]}
        if text and (reply == line or text[0] in (reply, behind) or named):
            said = name
    return None if said is None else float(said == answer.split(": ")[0])


def nextqa_groups(kind):
    """NExT-QA's type -> type (TP counts as TN) and its group: causal, temporal, descriptive."""
    kind = "TN" if kind == "TP" else kind
    return {"type": kind, "Acc@": kind[:1]}


# --------------------------------------------------------------------------------------------------
# Text against text
# --------------------------------------------------------------------------------------------------
def for_clip(text):
    """A generated text as VLM-Eval gives it to CLIP: no full stops, the first 77 characters."""
    return text.replace(".", "")[:77]


def topk_hits(similarity, target, ks=(1, 5)):
    """similarity (R,C), target (R,) the right column of each row -> {k: hits (R,) in [0,1]}, ties
    shared [D2]."""
    right = np.take_along_axis(similarity, target[:, None], 1)  # (R,1)
    better = (similarity > right).sum(1)
    tied = (similarity == right).sum(1)  # itself included
    return {k: np.clip((k - better) / tied, 0, 1) for k in ks}


def retrieval_hits(captions, texts, embed, ks=(1, 5)):
    """VLM-Eval's retrieval. captions, texts: per video the first true caption and the generated
    description; embed: list of texts -> unit vectors (n,D). -> {"t2v_r1": (R,), ...}.

    Text to video: every *different* caption ranks all descriptions and looks for that of its (last)
    video; the sum is divided by the number of predictions, so that a caption which occurs twice
    counts once.
    """
    texts = [for_clip(t) for t in texts]
    names = list(dict.fromkeys(captions))
    # equal texts, equal vectors
    vectors = dict(zip(distinct := list(dict.fromkeys(texts + names)), embed(distinct)))
    # (R,C)
    similarity = np.stack([vectors[t] for t in texts]) @ np.stack([vectors[n] for n in names]).T
    column = np.array([names.index(c) for c in captions])
    last = {c: i for i, c in enumerate(captions)}
    owners = np.array([last[name] for name in names])  # (C,) the video that a caption looks for
    out = {f"v2t_r{k}": hits for k, hits in topk_hits(similarity, column, ks).items()}
    for k, hits in topk_hits(similarity.T.copy(), owners, ks).items():
        out[f"t2v_r{k}"] = np.zeros(len(texts))
        out[f"t2v_r{k}"][owners] = hits
    return out


def class_hits(labels, texts, classes, embed, ks=(1, 5)):
    """Zero-shot action recognition: the generated text against the names of all classes -> {"top1":
    (R,), ...}."""
    texts = [for_clip(t) for t in texts]
    vectors = dict(zip(distinct := list(dict.fromkeys([*texts, *classes])), embed(distinct)))
    similarity = np.stack([vectors[t] for t in texts]) @ np.stack([vectors[c] for c in classes]).T
    hits = topk_hits(similarity, np.array([classes.index(label) for label in labels]), ks)
    # A blank text has an embedding too, and could be near a class by accident; it says nothing, so
    # it is wrong.
    said = np.array([bool(t.strip()) for t in texts])
    return {f"top{k}": h * said for k, h in hits.items()}


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------
def spread(values):
    """Sample standard deviation (n - 1) over seeds; None for a single one, whose spread is unknown,
    not zero."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def over_seeds(values):
    return dict(mean=float(np.mean(values)), spread=spread(values), runs=[float(v) for v in values])


def bootstrap(values, clips, resamples=10_000, seed=0):
    """Column means with 95 % percentile intervals over resampled clips: values (R,M), NaN where an
    item does not count, clips (R,) -> [(mean, low, high), ...]; None for an empty column.

    A clip is drawn with all its items, because questions about one video are not independent. The
    mean of a resample is sum(W d) / sum(W n), with W (K,C) how often each of K resamples holds each
    of C clips.
    """
    there = ~np.isnan(values)
    clip = np.unique(np.asarray(clips), return_inverse=True)[1]
    C, M = clip.max() + 1, values.shape[1]
    d, n = np.zeros((C, M)), np.zeros((C, M))
    np.add.at(d, clip, np.where(there, values, 0))
    np.add.at(n, clip, there)
    # a chunk of W holds 16 MB
    rng, chunk, means = np.random.default_rng(seed), max(1, 2_000_000 // C), []
    for k in range(0, resamples, chunk):
        # (K,C)
        W = rng.multinomial(C, np.full(C, 1 / C), size=min(chunk, resamples - k)).astype(float)
        with np.errstate(invalid="ignore"):
            means.append((W @ d) / (W @ n))  # NaN: a resample without any item of the column
    means, out = np.concatenate(means), []
    for m in range(M):
        kept = means[~np.isnan(means[:, m]), m]
        mean = values[there[:, m], m].mean() if len(kept) else None
        out.append((float(mean), *np.quantile(kept, [0.025, 0.975]).tolist()) if len(kept)
                   else None)
    return out


def paired_bootstrap(a, b, clips, resamples=10_000, seed=0):
    """Mean of b - a with its interval over clips: (mean, low, high). a (S,R), b (S',R) on the same
    R questions; seeds are averaged first; clips (R,) the clip of each question."""
    difference = np.mean(b, axis=0, dtype=float) - np.mean(a, axis=0, dtype=float)  # (R,)
    return bootstrap(difference[:, None], clips, resamples, seed)[0]
