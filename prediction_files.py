"""Predictions in the benchmarks' own formats: read, joined with their questions, written. The readers of
benchmark_files.py know all shapes; here is what concerns whole files of them.

    columns, report = predictions("video_mme", ["mine.json"])          # {column: rows that hold what was said}
    rows = join(rows, columns[""], report)                             # questions with the predictions put in
    contents = in_own_format("video_mme", rows)                        # {file name: content}, for the official scorers
"""

import glob
import os
from collections import Counter

from benchmark_files import LETTERS, READERS, SAID, load
from data import DataError
from metrics import letter_official
from ranks import final_answer


def predictions(benchmark, files):
    """Prediction files -> ({column: rows}, report). A table with one column per model gives several columns, any other
    file one, named "". An id that occurs twice counts once, with its last prediction, as in jsonl that was resumed."""
    columns, report, several = {}, dict(files=list(map(str, files)), duplicates=[], blank=0), False
    paths = [p for f in files for p in (sorted(glob.glob(os.path.join(glob.escape(str(f)), "*.json*")))
                                        if os.path.isdir(f) else [f])]
    if not paths:
        raise DataError(f"{files[0]}: no prediction file in that folder")
    for file in paths:
        value = load(file)
        parts = {"": value}
        if str(file).endswith(".csv") and value and "sample_id" in value[0]:
            several = True
            names = [k for k in value[0] if k not in ("sample_id", "answer", *SAID)]
            parts = {name: {row["sample_id"]: row[name] for row in value} for name in names}
            uses = Counter(row["sample_id"] for row in value)
            report["duplicates"] += [id for id, n in uses.items() if n > 1]
        for name, part in parts.items():
            columns.setdefault(name, []).extend(READERS[benchmark](file, part, benchmark))
    for name, rows in columns.items():
        if not rows:
            raise DataError(f"{paths[0]}: no predictions")
        kept, twice = {}, []
        for row in rows:
            key = (row["id"], row.get("criteria")) if benchmark == "video_chatgpt" else row["id"]
            twice += [row["id"]] if key in kept else []
            kept[key] = row
        columns[name] = list(kept.values())
        report["duplicates"] += [] if several else twice
        report["blank"] += sum(row["said"] is not None and not all(t and t.strip() for t in row["said"])
                               for row in kept.values())
    return columns, report


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
        raise DataError(f"{report['files'][0]}: none of its {len(said)} ids is a question of the benchmark; "
                        f"{said[0]['id']!r} there, {rows[0]['id']!r} here")
    return out


def in_own_format(benchmark, rows):
    """Rows with predictions as the benchmark's own scorer reads them -> {file name: content}."""
    if benchmark == "video_chatgpt":
        parts = {}
        for row in rows:
            keys = ("pred1", "pred2") if len(row["asks"]) == 2 else ("pred",)
            asked = ({"Q1": row["asks"][0], "Q2": row["asks"][1]} if len(row["asks"]) == 2 else {"Q": row["asks"][0]})
            record = {**asked, "A": row["answer"], "video_name": row["video"]}
            parts.setdefault(row["groups"]["part"], []).append(record | dict(zip(keys, row["said"])))
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
            out.setdefault(row["video"], {})[row["id"].removeprefix(f"{row['video']}_")] = row["said"][0]
        return {benchmark: out}
    if isinstance(rows[0]["answer"], list) or benchmark in ("ucf101", "hmdb51"):
        return {benchmark: [{"video_id": row["id"], "question_id": row["id"], "answer": row["said"][0],
                             "gt": row["answer"] if isinstance(row["answer"], list) else [row["answer"]]}
                            for row in rows]}
    return {benchmark: [{"id": row["id"], "question": row["question"], "answer": row["answer"],
                         "pred": row["said"][0]} for row in rows]}
