"""Predictions in the benchmarks' own formats: read, joined with their questions, written. The
readers of evaluation/benchmark_files.py know all shapes; here is what concerns whole files of them.

    columns, report = predictions("video_mme", ["mine.json"])          # {column: rows that hold
                                                                       what was said}
    rows = join(rows, columns[""], report)                             # questions with the
                                                                       predictions put in
    contents = in_own_format("video_mme", rows)                        # {file name: content}, for
                                                                       the official scorers
"""

import glob
import os
from collections import Counter
from pathlib import Path

from evaluation.benchmark_files import LETTERS, READ, READERS, SAID, load
from evaluation.metrics import letter_official
from inputs.records import DataError
from plumbing.text import final_answer


def predictions(benchmark, files):
    """Prediction files -> ({column: rows}, report). A table with one column per model gives several
    columns, any other file one, named "". An id that occurs twice counts once, with its last
    prediction, as in jsonl that was resumed. A file without any prediction is refused."""
    columns, several = {}, False
    report = dict(files=list(map(str, files)), duplicates=[], blank=0, left_out=Counter())
    for file, value in contents(files):
        parts = {"": value}
        if str(file).endswith((".csv", ".tsv")) and value and "sample_id" in value[0]:
            several = True
            names = [k for k in value[0] if k not in ("sample_id", "answer", *SAID)]
            parts = {name: {row["sample_id"]: row[name] for row in value} for name in names}
            uses = Counter(row["sample_id"] for row in value)
            report["duplicates"] += [id for id, n in uses.items() if n > 1]
        for name, part in parts.items():
            rows = with_answers_as_said(READERS[benchmark](file, part, benchmark))
            if not any(row["reply"] is not None or any(t and t.strip() for t in row["said"] or ())
                       for row in rows):
                raise DataError(f"{file}: no predictions{f' of {name}' * bool(name)}; they are "
                                f"read under {', '.join(SAID)}")
            for row in rows:
                if not row["video"]:  # not all of one nameless video: each of its own
                    row |= dict(video=row["id"], unnamed=True)
            columns.setdefault(name, []).extend(row for row in rows if not row.get("left_out"))
            report["left_out"] += Counter(row["left_out"] for row in rows if row.get("left_out"))
    if not any(columns.values()):
        why = ", ".join(f"{n} {reason}" for reason, n in report["left_out"].items())
        raise DataError(f"{files[0]}: no prediction can be scored; left out: {why}")
    for name, rows in columns.items():
        kept, twice = {}, []
        for row in rows:
            key = (row["id"], row.get("criteria")) if benchmark == "video_chatgpt" else row["id"]
            twice += [row["id"]] if key in kept else []
            kept[key] = row
        columns[name] = list(kept.values())
        report["duplicates"] += [] if several else twice
        report["blank"] += sum(row["said"] is not None
                               and not all(t and t.strip() for t in row["said"])
                               for row in kept.values())
    return columns, report


def contents(files):
    """[(file, what it holds)] of prediction files and folders of them. A folder of one judged
    question a file, named by its id, as Video-ChatGPT's scripts write them, is one dict by id; what
    it is for is in the folder's name."""
    out = []
    for place in map(str, files):
        if place.lower().endswith(".txt"):  # benchmark_files.py knows lists of videos by that
            raise DataError(f"{place}: no prediction file; read are {', '.join(READ)}")
        if not os.path.isdir(place):
            value = load(place)
            out.append((place, {Path(place).stem: value} if judged(value) else value))
            continue
        every = sorted(f for f in glob.glob(os.path.join(glob.escape(place), "*"))
                       if f.lower().endswith(READ))
        there = [f for f in every if f.lower().endswith((".json", ".jsonl"))] or every
        if not there:
            raise DataError(f"{place}: no prediction file in that folder; read are "
                            f"{', '.join(READ)}")
        loaded = [(file, load(file)) for file in there]
        single = {Path(file).stem: value for file, value in loaded if judged(value)}
        out += [(file, value) for file, value in loaded if not judged(value)]
        out += [(os.path.normpath(place), single)] if single else []
    return out


def judged(value):
    """Is it one [verdict, record]? The verdict has no question, the record has one."""
    asks = (lambda x: isinstance(x, dict)
            and any(key in x for key in ("q", "Q", "q1", "Q1", "question", "question_1")))
    return isinstance(value, list) and len(value) == 2 and asks(value[1]) and not asks(value[0])


def with_answers_as_said(rows):
    """ActivityNet-QA's own format: {question_id, answer} without a question is a prediction, not a
    label, where nothing in the file is called a prediction."""
    if any(row["said"] is not None or row["reply"] is not None or row["question"] for row in rows):
        return rows
    said = lambda row: [row["answer"] or ""] if isinstance(row["record"].get("answer"),
                                                           (str, int)) else None
    return [row | dict(said=said(row), answer=None) for row in rows]


def join(rows, said, report):
    """Annotation rows with the predictions of `said` put in, by id, else by video and question."""
    by_id = {row["id"]: row for row in said}
    by_text = {(row["video"], *row["asks"]): row for row in said if row["question"]}
    out, used = [], set()
    for row in rows:
        found = by_id.get(row["id"]) or by_text.get((row["video"], *row["asks"]))
        used.add(found and found["id"])
        out.append(row | {"said": found and found["said"], "reply": found and found["reply"]}
                   | ({"criteria": found["criteria"]} if found and "criteria" in found else {}))
    report["without"] = [row["id"] for row in out if row["said"] is None and row["reply"] is None]
    report["unknown"] = [row["id"] for row in said if row["id"] not in used]
    if not used - {None}:
        raise DataError(f"{report['files'][0]}: none of its {len(said)} ids is a question of the "
                        f"benchmark; {said[0]['id']!r} there, {rows[0]['id']!r} here")
    return out


def in_own_format(benchmark, rows):
    """Rows with predictions as the benchmark's own scorer reads them -> {file name: content}."""
    if benchmark == "video_chatgpt":
        parts = {}
        for row in rows:
            keys = ("pred1", "pred2") if len(row["asks"]) == 2 else ("pred",)
            asked = ({"Q1": row["asks"][0], "Q2": row["asks"][1]} if len(row["asks"]) == 2
                     else {"Q": row["asks"][0]})
            record = {**asked, "A": row["answer"], "video_name": row["video"]}
            parts.setdefault(row["groups"]["part"],
                             []).append(record | dict(zip(keys, row["said"])))
        return {f"video_chatgpt_{part}": part_rows for part, part_rows in parts.items()}
    if benchmark.startswith("video_mme"):
        videos = {}
        for row in rows:
            r = row["record"]
            keep = ("video_id", "duration", "domain", "sub_category")
            video = videos.setdefault(row["video"], {k: r.get(k) for k in keep} | {"questions": []})
            keep = ("question_id", "task_type", "question", "options", "answer")
            video["questions"].append({k: r.get(k) for k in keep} | {"response": row["said"][0]})
        return {benchmark: list(videos.values())}
    if benchmark == "nextqa":
        letter = lambda row: letter_official(final_answer(row["said"][0]), LETTERS) or "none"
        return {benchmark: {row["id"]: {"prediction": LETTERS.find(letter(row)),
                                        "answer": LETTERS.find(row["answer"])} for row in rows}}
    if benchmark == "nextoe":
        out = {}
        for row in rows:
            out.setdefault(row["video"],
                           {})[row["id"].removeprefix(f"{row['video']}_")] = row["said"][0]
        return {benchmark: out}
    if isinstance(rows[0]["answer"], list) or benchmark in ("ucf101", "hmdb51"):
        return {benchmark: [{"video_id": row["id"], "question_id": row["id"],
                             "answer": row["said"][0],
                             "gt": row["answer"] if isinstance(row["answer"], list)
                             else [row["answer"]]} for row in rows]}
    return {benchmark: [{"id": row["id"], "video": row["video"], "question": row["question"],
                         "answer": row["answer"], "pred": row["said"][0]} for row in rows]}
