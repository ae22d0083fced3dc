"""Preference files: which of two answers to a question about a video is better.

One reader for every published shape:

    pairs, report = read_preferences(["prefs.json"])    # rows: a pair, or skipped and counted
    write_preferences("mine.json", pairs, format="trl")

A row names its video as an annotation file does (inputs/records.py) and is one of these:
  VLM-RLAIF,    {"conversations": [.., {"from": "gpt", ..}], "output_1", "output_2",
  LLaVA-RLHF    "preference": 1 | 2}; the outputs stand for the last turn, if it is an answer
  TRL           {"prompt", "chosen", "rejected"}: strings, or messages; the prompt may also be what
                both begin with (TRL's "implicit prompt"), or be called question (RLAIF-V)
  chat          {"messages" | "conversations": [..], "chosen", "rejected"}, each a string or a turn;
                or the chosen answer as the last message and "rejected", or "rejected_response"

A pair is a dict: `id`, `clip` (a Clip, None for text), `question` (a string, or messages that end
with it), `chosen`, `rejected`, `task_type`, `file`, and what else the row tells: `answer`, the
label (never seen by training; None), and EXTRA. Of these `ended`, {"chosen": bool, "rejected":
bool}, matters to training: an answer that was cut has no EOS. A draw, or two equal answers, is no
preference: the row is skipped and counted. `rejected` may be empty (a model that says nothing has
said something worse), `chosen` may not.

Papers  VLM-RLAIF arXiv:2402.03746    LLaVA-RLHF arXiv:2309.14525
"""

import json
import os
from pathlib import Path

from inputs.records import READ, ROLES, DataError, is_text, parse_turns, read_rows
from plumbing import files

# kept as they are where a row has them
EXTRA = ("margin", "scores", "source", "sources", "ended", "narrative")
OWN = [f"{side}_{kind}" for side in ("chosen", "rejected")
       for kind in ("video", "videos", "image", "images")]
READ_PAIR = (*READ, "output_1", "output_2", "preference", "prompt", "question", "chosen",
             "rejected", "rejected_response", "answer", *OWN, *EXTRA)


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------
def read_preferences(files, video_root=None):
    """Preference files in any of the shapes above -> (pairs, report); files, videos and report as
    in read_records."""
    return read_rows(files, video_root or None, parse_pair, READ_PAIR)


def parse_pair(row, find):
    """One row -> [pair]. Raises DataError("reason: details")."""
    if not isinstance(row, dict):
        raise DataError(f"no JSON object: {row}")
    keys = ("conversations", "messages", "prompt", "question")
    turns = next((row[k] for k in keys if row.get(k)), None)
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if "output_1" in row and "output_2" in row:
        first, second = answer_of(row["output_1"]), answer_of(row["output_2"])
        if isinstance(row.get("preference"), bool) or row.get("preference") not in (1, 2):
            raise DataError(f"no preference: preference is {row.get('preference')!r}, not 1 or 2")
        chosen, rejected = (first, second) if row["preference"] == 1 else (second, first)
    elif turns is None and all(isinstance(row.get(k), list) for k in ("chosen", "rejected")):
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
    shown = [listed(key) for key in ("video", "videos", "video_id", "image", "images")
             if row.get(key)]
    if other := next((key for key in OWN if row.get(key) and listed(key) not in shown), None):
        raise DataError(f"an answer has a video of its own: {other} {row[other]}")

    # The rest of the row (video, seconds, roles, empty texts) is read and checked as an annotation.
    ours = ("output_1", "output_2", "conversations", "messages", "q")
    rest = {k: v for k, v in row.items() if k not in ours}
    annotation = lambda text: {
        **rest, "conversations": [*turns, {"role": "assistant", "content": text}]}
    other, _ = parse_turns(annotation(rejected), find) if rejected else ([{"content": ""}], None)
    turns, clip = parse_turns(annotation(chosen), find)
    question = turns[0]["content"] if len(turns) == 2 else turns[:-1]
    label = row.get("answer")
    if label is not None and not is_text(label):
        raise DataError(f"answer is no text: {label}")
    ended = row.get("ended", {})
    if not isinstance(ended, dict) or any(
            type(ended.get(side, True)) is not bool for side in ("chosen", "rejected")):
        raise DataError(f"ended does not say true or false of chosen and rejected: {ended}")
    return [dict(clip=clip, question=question, chosen=turns[-1]["content"],
                 rejected=other[-1]["content"], answer=label, task_type=row.get("task_type"),
                 **{k: row[k] for k in EXTRA if k in row})]


def role(turn):
    return ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None


def answer_of(text):
    """The text of an answer: a string, a turn, or a list with one turn. Its role is ignored."""
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if isinstance(text, dict):
        text = text.get("value", text.get("content"))
    is_part = lambda part: isinstance(part, dict) and isinstance(part.get("text"), str)
    if isinstance(text, list) and all(map(is_part, text)):
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str):
        raise DataError(f"answer is no text: {text!r}")
    return text.strip()


def common_turns(a, b):
    """The turns with which two conversations begin."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------
def preference_row(pair, format="vlm_rlaif", folder="."):
    """A pair as a row of a preference file that lies in `folder`, in VLM-RLAIF's shape or in TRL's.

    A pair may say which place its chosen answer had (`place`, 1 or 2; else 1), so that the file
    holds both."""
    row = {"id": str(pair["id"])}
    if pair["clip"]:
        path, start, end = pair["clip"]
        base = Path(folder).resolve()

        def inside(p):
            near = Path(p).resolve().is_relative_to(base)
            return os.path.relpath(p, folder) if near else os.path.abspath(p)

        frames = isinstance(path, tuple)
        row |= {"images": [inside(p) for p in path]} if frames else {"video": inside(path)}
        row |= {k: v for k, v in (("start", start), ("end", end)) if v is not None}
    question = pair["question"]
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    turns = [dict(turn) for turn in question]
    if pair["clip"]:
        turns[0]["content"] = f"<video>\n{turns[0]['content']}"
    if format == "trl":
        say = lambda text: [{"role": "assistant", "content": text}]
        row |= dict(prompt=turns, chosen=say(pair["chosen"]), rejected=say(pair["rejected"]))
    else:
        place = pair.get("place", 1)
        names = {"user": "human", "assistant": "gpt"}
        turns = [{"from": names[t["role"]], "value": t["content"]} for t in turns]
        gpt = lambda text: {"from": "gpt", "value": text}
        answers = gpt(pair["chosen"]), gpt(pair["rejected"])
        first, second = answers if place == 1 else answers[::-1]
        row |= dict(conversations=[*turns, gpt("\n")], output_1=first, output_2=second,
                    preference=place)
    return row | {k: pair[k] for k in ("answer", "task_type", *EXTRA) if pair.get(k) is not None}


def write_preferences(path, pairs, format="vlm_rlaif"):
    """Write pairs as one JSON list (a line per row) that `read_preferences` reads back; aside
    first, then renamed."""
    if format not in ("vlm_rlaif", "trl"):
        raise ValueError(f"format {format!r}: choose vlm_rlaif or trl")
    path = Path(path)
    rows = [json.dumps(preference_row(pair, format, path.parent), ensure_ascii=False)
            for pair in pairs]
    files.write(path, "[\n" + ",\n".join(rows) + "\n]\n")
