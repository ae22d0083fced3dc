"""Preference files: which of two answers to a question about a video is better. One reader for every published shape.

    pairs, report = read_preferences(["prefs.json"])        # each row one pair, or skipped with a reason and counted
    write_preferences("mine.json", pairs, format="trl")

A row names its video as an annotation file does (data.py) and is one of these:
  VLM-RLAIF, LLaVA-RLHF   {"conversations": [.., {"from": "gpt", ..}], "output_1", "output_2", "preference": 1 | 2}
                          the last turn, if it is an answer, is a place holder: the outputs stand for it
  TRL                     {"prompt", "chosen", "rejected"}: strings, or messages; the prompt may also be what chosen and
                          rejected begin with (its "implicit prompt"), or be called question (RLAIF-V)
  chat                    {"messages" | "conversations": [..], "chosen", "rejected"}, each a string or a turn; or the
                          chosen answer as the last message and "rejected" (or "rejected_response") beside it

A pair is a dict: `id`, `clip` (a Clip, None for text), `question` (a string, or messages that end with it), `chosen`,
`rejected`, `task_type`, `file`, and what else the row tells: `answer`, the label (never seen by training; None), and
EXTRA. Of these `ended`, {"chosen": bool, "rejected": bool}, matters to training: an answer that was cut has no EOS. A
draw, or two equal answers, is no preference: the row is skipped and counted. `rejected` may be empty (a model that says
nothing has said something worse), `chosen` may not.

Papers  VLM-RLAIF arXiv:2402.03746    LLaVA-RLHF arXiv:2309.14525
"""

import json
import os
from pathlib import Path

import torch

import harness
from data import READ, ROLES, DataError, is_text, parse_turns, read_rows
from video_llm import Prefix

EXTRA = ("margin", "scores", "source", "sources", "ended", "narrative")  # kept as they are where a row has them
OWN = [f"{side}_{kind}" for side in ("chosen", "rejected") for kind in ("video", "videos", "image", "images")]
READ_PAIR = (*READ, "output_1", "output_2", "preference", "prompt", "question", "chosen", "rejected",
             "rejected_response", "answer", *OWN, *EXTRA)


# ---------------------------------------------------------------------------------------------------------------
# What a reward model reads
# ---------------------------------------------------------------------------------------------------------------
def one_line(answer):
    """An answer as a judge or reward model reads it: a line break would let it begin a "Response 2:" of its own."""
    return " ".join(answer.split())


def reward_prompt(question, narrative=None, answer=None, own=None):
    """The narrative, where the reward model is trained with one, then the question; with `answer`, the answer between
    them, beside the judge's `own` answer if there is one: the judge's task, word for word (oracle.judge_prompt)."""
    said = [f"Response {k}: {one_line(text)}" for k, text in ((1, answer), (2, own)) if text is not None]
    said += ["Which response is better?"] * bool(said)
    if isinstance(question, str):
        return "\n".join([*[narrative] * bool(narrative), *said, question])
    turns = [*question[:-1], {**question[-1], "content": "\n".join([*said, question[-1]["content"]])}]
    return [{**turns[0], "content": f"{narrative}\n{turns[0]['content']}"}, *turns[1:]] if narrative else turns


def as_read(processor, answer, answer_first, max_tokens=None):
    """An answer as the reward model reads it, cut: its text on one line, or, where it stands last, its ids."""
    ids = processor.answer_ids(answer, max_tokens)
    if not answer_first:
        return ids
    whole = ids[-1] == processor.tokenizer.eos_token_id
    return one_line(answer if whole else processor.tokenizer.decode(ids))


def told(processor, question, narrative, own, video, answer_first, max_tokens=None):
    """The narrative as the reward model reads it: cut at its end, so that the prompt, whatever the answer, has at most
    `max_tokens` beside it. Question and judge's answer are never cut: ValueError where they alone have more."""
    beside = ("", own) if answer_first else ()
    length = lambda story: len(processor.prompt_ids(reward_prompt(question, story, *beside), video))
    if max_tokens is None or (over := length(narrative) - max_tokens) <= 0:
        return narrative
    ids = processor.answer_ids(narrative or "")[:-1]
    for keep in range(len(ids) - over, 0, -1):  # text cut in two can take a token more
        story = processor.tokenizer.decode(ids[:keep]).strip()
        if length(story) <= max_tokens:
            return story
    if (least := length(None)) > max_tokens:
        raise ValueError(f"a prompt of {least} tokens without its narrative is longer than {max_tokens}")
    return None


def reward_batch(rows, clips, processor, cache, device, answer_first, max_prompt_tokens=None, max_answer_tokens=None):
    """rows[b] = [(question, narrative, answer, judge's own answer or None), ...], about clips[b] (None: text only).

    -> Prefix of what the texts of a row have in common (video and narrative, at least), tokens (B,G,T) and lengths
    (B,G) of what differs; rows with fewer texts than the longest are filled up with an EOS each. The reward stands at a
    text's last token: of the prompt where the answer comes before the question, else of the answer (EOS). ValueError:
    see `told`.
    """
    heads, tails = [], []
    for row, clip in zip(rows, clips):
        texts, stories = [], {}
        for question, narrative, answer, own in row:
            asked = str(question), own  # the same narrative for all answers to a question
            if asked not in stories:
                stories[asked] = told(processor, question, narrative, own, clip is not None, answer_first,
                                      max_prompt_tokens)
            said = as_read(processor, answer, answer_first, max_answer_tokens)
            prompt = reward_prompt(question, stories[asked], *(said, own) if answer_first else ())
            texts.append(processor.prompt_ids(prompt, clip is not None) + ([] if answer_first else said))
        shared = len(os.path.commonprefix([ids[:-1] for ids in texts]))  # equal texts keep a token each
        heads.append(texts[0][:shared])
        tails.append([ids[shared:] for ids in texts])
    G = max(map(len, tails))
    flat = [tail for row in tails for tail in row + [[processor.tokenizer.eos_token_id]] * (G - len(row))]
    tokens = processor.pad(flat, "right")[0].view(len(rows), G, -1).to(device)
    lengths = torch.tensor([len(tail) for tail in flat], device=device).view(-1, G)
    videos = [clip for clip in clips if clip]
    features = cache(videos) if videos else (None, None)
    prefix = Prefix(*(x if x is None else x.to(device) for x in (*processor.pad(heads, "left"), *features)))
    return prefix, tokens, lengths


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------
def read_preferences(files, video_root=None):
    """Preference files in any of the shapes above -> (pairs, report); files, videos and report as in read_records."""
    return read_rows(files, video_root or None, parse_pair, READ_PAIR)


def parse_pair(row, find):
    """One row -> [pair]. Raises DataError("reason: details")."""
    if not isinstance(row, dict):
        raise DataError(f"no JSON object: {row}")
    said = next((row[k] for k in ("conversations", "messages", "prompt", "question") if row.get(k)), None)
    turns = [{"role": "user", "content": said}] if isinstance(said, str) else said
    if "output_1" in row and "output_2" in row:
        first, second = answer_of(row["output_1"]), answer_of(row["output_2"])
        if isinstance(row.get("preference"), bool) or row.get("preference") not in (1, 2):
            raise DataError(f"no preference: preference is {row.get('preference')!r}, not 1 or 2")
        chosen, rejected = (first, second) if row["preference"] == 1 else (second, first)
    elif turns is None and isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        turns = common_turns(row["chosen"], row["rejected"])  # TRL's implicit prompt
        chosen, rejected = (answer_of(row[k][len(turns) :]) for k in ("chosen", "rejected"))
    else:
        chosen, rejected = row.get("chosen"), row.get("rejected", row.get("rejected_response"))
        if chosen is None and isinstance(turns, list) and turns and role(turns[-1]) == "assistant":
            chosen = turns[-1]
        if chosen is None or rejected is None:
            raise DataError(f"no two answers: the keys are {', '.join(row)}")
        chosen, rejected = answer_of(chosen), answer_of(rejected)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"no question: the keys are {', '.join(row)}")
    if role(turns[-1]) == "assistant":
        turns = turns[:-1]  # a place holder for the two answers
    if chosen == rejected:
        raise DataError(f"no preference: two equal answers, {chosen!r}")
    listed = lambda key: row[key] if isinstance(row[key], list) else [row[key]]
    shown = [listed(key) for key in ("video", "videos", "video_id", "image", "images") if row.get(key)]
    if other := next((key for key in OWN if row.get(key) and listed(key) not in shown), None):
        raise DataError(f"an answer has a video of its own: {other} {row[other]}")

    # The rest of the row (video, range of seconds, roles, empty texts) is read and checked as an annotation's.
    place = {k: v for k, v in row.items() if k not in ("output_1", "output_2", "conversations", "messages", "q")}
    whole = lambda text: {**place, "conversations": [*turns, {"role": "assistant", "content": text}]}
    other, _ = parse_turns(whole(rejected), find) if rejected else ([{"content": ""}], None)
    turns, clip = parse_turns(whole(chosen), find)
    question = turns[0]["content"] if len(turns) == 2 else turns[:-1]
    label = row.get("answer")
    if label is not None and not is_text(label):
        raise DataError(f"answer is no text: {label}")
    ended = row.get("ended", {})
    if not isinstance(ended, dict) or not {type(ended.get(side, True)) for side in ("chosen", "rejected")} <= {bool}:
        raise DataError(f"ended does not say true or false of chosen and rejected: {ended}")
    return [dict(clip=clip, question=question, chosen=turns[-1]["content"], rejected=other[-1]["content"], answer=label,
                 task_type=row.get("task_type"), **{k: row[k] for k in EXTRA if k in row})]


def role(turn):
    return ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None


def answer_of(said):
    """The text of an answer: a string, a turn, or a list with one turn. Who said it does not matter."""
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    if isinstance(said, dict):
        said = said.get("value", said.get("content"))
    if isinstance(said, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in said):
        said = "".join(p["text"] for p in said)
    if not isinstance(said, str):
        raise DataError(f"answer is no text: {said!r}")
    return said.strip()


def common_turns(a, b):
    """The turns with which two conversations begin."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------
def preference_row(pair, format="vlm_rlaif", folder="."):
    """A pair as a row of a preference file that lies in `folder`, in VLM-RLAIF's shape or in TRL's.

    A pair may say which place its chosen answer had (`place`, 1 or 2; else 1), so that the file holds both.
    """
    row = {"id": str(pair["id"])}
    if pair["clip"]:
        path, start, end = pair["clip"]
        inside = lambda p: os.path.relpath(p, folder) if Path(p).resolve().is_relative_to(Path(folder).resolve()) else (
            os.path.abspath(p))
        row |= {"images": [inside(p) for p in path]} if isinstance(path, tuple) else {"video": inside(path)}
        row |= {k: v for k, v in (("start", start), ("end", end)) if v is not None}
    question = pair["question"]
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else [dict(t) for t in question]
    if pair["clip"]:
        turns[0]["content"] = f"<video>\n{turns[0]['content']}"
    if format == "trl":
        say = lambda text: [{"role": "assistant", "content": text}]
        row |= dict(prompt=turns, chosen=say(pair["chosen"]), rejected=say(pair["rejected"]))
    else:
        place = pair.get("place", 1)
        names = {"user": "human", "assistant": "gpt"}
        turns = [{"from": names[t["role"]], "value": t["content"]} for t in turns] + [{"from": "gpt", "value": "\n"}]
        answers = (pair["chosen"], pair["rejected"]) if place == 1 else (pair["rejected"], pair["chosen"])
        outputs = ({"from": "gpt", "value": text} for text in answers)
        row |= dict(conversations=turns, output_1=next(outputs), output_2=next(outputs), preference=place)
    return row | {k: pair[k] for k in ("answer", "task_type", *EXTRA) if pair.get(k) is not None}


def write_preferences(path, pairs, format="vlm_rlaif"):
    """Write pairs as one JSON list (a line per row) that `read_preferences` reads back; aside first, then renamed."""
    if format not in ("vlm_rlaif", "trl"):
        raise ValueError(f"format {format!r}: choose vlm_rlaif or trl")
    path = Path(path)
    rows = [json.dumps(preference_row(pair, format, path.parent), ensure_ascii=False) for pair in pairs]
    harness.write(path, "[\n" + ",\n".join(rows) + "\n]\n")
