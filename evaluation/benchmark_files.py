"""The public benchmarks' files as their makers publish them: questions and videos. Nothing here
runs a model.

    rows, report = questions("video_mme", folder)                      # the questions of a
                                                                       benchmark, videos found

A row is a dict, the same for every benchmark:
    id          text, unique            asks      what the model is asked: [prompt], two for a
                consistency pair
    question    as the file has it      answer    text; a letter for multiple choice; the class;
                [captions]
    video       its name in the file    names     the names its file may have; clip: where it was
                found, or None
    options     ["A. ..", ..] or []     groups    {"task_type": "Counting Problem", ..}: what the
                report splits by
    record      the file's own record   said      [prediction per ask] or None; reply: a judge's
                verdict
Rows of an annotation file have no `said`; a prediction file that repeats questions and answers is
complete on its own (evaluation/prediction_files.py reads those, with the same readers).

Files are .json (a list, a dict with one as annotations / data, a dict by id, JSON lines), .jsonl,
.csv, .tsv or .parquet (needs pyarrow); a byte-order mark and trailing commas, as Video-MME's own
template has them, are read. What cannot be used ends in a DataError that names file and record;
what is left out (no answer in the second file, an id twice) is counted.
"""

import contextlib
import csv
import glob
import io
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.metrics import nextqa_groups
from inputs.frames import VideoError, clip_seconds
from inputs.records import Clip, DataError, video_finder

ACTIVITYNET_TYPES = ("motion", "spatial", "temporal", "yes/no", "color", "object", "location",
                     "number", "other")
LETTERS = "ABCDE"
SAID = ("pred", "prediction", "response", "model_prediction", "filtered_resps",
        "video-llm-prediction", "predicted_answer", "pred_answer", "predict", "output", "text")
READ = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


class Files(NamedTuple):
    """Where a benchmark's annotation lies: names of its folder below --data, and patterns, the
    first that matches."""
    folders: tuple
    patterns: tuple


QA = ("test_q.json", "test_qa.json", "val_q.json", "val_qa*.json", "train_q.json", "*.parquet",
      "*qa*.json", "*qa*.jsonl", "*.csv", "*.tsv")
BENCHMARKS = {"msvd_qa": Files(("msvd_qa", "MSVD_Zero_Shot_QA"), ("msvd_qa.json", *QA)),
              "msrvtt_qa": Files(("msrvtt_qa", "MSRVTT_Zero_Shot_QA"), ("msrvtt_qa.json", *QA)),
              "activitynet_qa": Files(("activitynet_qa", "ActivityNet_Zero_Shot_QA"),
                                      ("anet_qa.json", *QA)),
              "video_chatgpt": Files(("video_chatgpt", "video_chatgpt_bench"),
                                     ("*_qa*.json", "*.parquet", "*.json")),
              "video_mme": Files(("video_mme",),
                                 ("videomme*.json", "*.parquet", "*.jsonl", "*.json")),
              "msvd_retrieval": Files(("msvd_retrieval", "msvd_ret"),
                                      ("*caption*.json", "*annotation*.json")),
              "msrvtt_retrieval": Files(("msrvtt_retrieval", "msrvtt_ret"),
                                        ("captions.json", "MSRVTT_JSFUSION_test*.csv",
                                         "MSRVTT_data*.json", "*.csv")),
              "ucf101": Files(("ucf101", "ucfTrainTestlist"),
                              tuple(f"testlist0{k}.txt" for k in (1, 2, 3))),
              "hmdb51": Files(("hmdb51",),
                              tuple(f"{sub}*_test_split{k}.txt" for k in (1, 2, 3)
                                    for sub in ("", "*/"))),
              "mmaip_v": Files(("mmaip_v", "msrvtt_qa"), ("mmaip*.json*", *QA)),
              "nextqa": Files(("nextqa",), ("val.csv", "test.csv", "*.csv")),
              "nextoe": Files(("nextoe",), ("val.csv", "test.csv", "*.csv")),}
BENCHMARKS["video_mme_subtitles"] = BENCHMARKS["video_mme"]
# scored from files; their questions are in the predictions
ONLY_PREDICTIONS = ("tempcompass", "cvrr_es")
VIDEO_FOLDERS = ("", "videos", "Test_Videos", "data", "video", "all_test", "NExTVideo", "..",
                 "../videos")


# --------------------------------------------------------------------------------------------------
# Files to records
# --------------------------------------------------------------------------------------------------
def load(file):
    """What a file holds: a list of records or a dict, of whatever shape. Raises DataError."""
    name = str(file).lower()
    try:
        if name.endswith(".parquet"):
            return parquet(file)
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: cannot be read, it is no text in UTF-8; read are "
                        f"{', '.join(READ)}") from e
    except (OSError, ValueError) as e:
        raise DataError(f"{file}: cannot be read ({getattr(e, 'strerror', None) or e})") from e
    if name.endswith((".csv", ".tsv")):
        table = csv.DictReader(io.StringIO(text), delimiter="\t" if name.endswith(".tsv") else ",")
        rows = list(table)
        short = next((n for n, row in enumerate(rows, 1) if None in row or None in row.values()),
                     None)
        if short or not table.fieldnames:
            raise DataError(f"{file} record {short or 1}: not as many fields as the header names")
        return rows
    if name.endswith(".jsonl"):
        return [parse(line, f"{file} line {n}")
                for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if name.endswith(".txt"):
        return [line for line in text.splitlines() if line.strip()]
    try:
        return parse(text, file)
    except DataError as e:
        lines = [[n, line] for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        with contextlib.suppress(ValueError, RecursionError):  # JSON lines under another name
            if len(lines) > 1 and isinstance(json.loads(lines[0][1]), (dict, list)):
                return [parse(line, f"{file} line {n}") for n, line in lines]
        if not name.endswith(READ):
            raise DataError(f"{e}; read are {', '.join(READ)}") from None
        raise


def parse(text, place):
    """JSON, also with trailing commas."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        strict = re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', lambda m: m[1] or "", text)
    try:
        return json.loads(strict)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{place}: no JSON ({e})") from e


def parquet(file):
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise DataError(f"{file}: reading parquet needs `pip install pyarrow`, which nothing else "
                        "here does") from e
    return pq.read_table(file).to_pylist()


def records_of(file, value):
    """[(place, id or None, record)] of what a file holds. A record is a dict, or a judged [verdict,
    record]."""
    if isinstance(value, dict):
        inner = next((value[k] for k in ("annotations", "data", "questions")
                      if isinstance(value.get(k), list)), None)
        if inner is None and not one_record(value):
            return [(f"{file} record {key!r}", str(key), record) for key, record in value.items()]
        value = [value] if inner is None else inner
    if not isinstance(value, list):
        raise DataError(f"{file}: neither a list of records nor a dict of them")
    return [(f"{file} record {n}", None, record) for n, record in enumerate(value, 1)]


def one_record(value):
    """Is this dict a record, as in JSON lines of one line, and no dict by id?"""
    named = value.keys() & {"id", "question_id", "sample_id", "qid", "video_name", "video_id"}
    return bool(named) and bool(value.keys() & {"question", "q", "Q", "answer", *SAID}) and not any(
        isinstance(part, dict) for part in value.values())


def text_of(record, place, *keys, default=None):
    """The first of `keys` that the record has, as text; numbers become text. DataError if it is
    anything else."""
    for key in keys:
        value = record.get(key)
        if value is not None and not (isinstance(value, float) and np.isnan(value)):
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise DataError(f"{place}: {key} is no text: {str(value)[:60]!r}")
            return (value if isinstance(value, str) else f"{value:g}" if isinstance(value, float)
                    else str(value))
    if default is None:
        raise DataError(f"{place}: no {' or '.join(keys)}; its keys are "
                        f"{', '.join(map(str, record))[:200]}")
    return default


def said_of(record, place, keys=SAID):
    """A prediction's text: None where the record has none; the first of a list; a LLaVA-Hound
    {status, message}."""
    value = next((record[k] for k in keys if k in record), None)
    value = value[0] if isinstance(value, list) and value else value
    value = value[0] if isinstance(value, list) and value else value  # lmms-eval: resps [["B."]]
    if isinstance(value, dict) and "message" in value:
        value = value["message"] if value.get("status") == "success" else ""
    if isinstance(value, (dict, list)):
        raise DataError(f"{place}: the prediction is no text: {str(value)[:60]!r}")
    return None if value is None else value if isinstance(value, str) else str(value)


def row_of(id, video, question, answer, record, *, asks=None, options=(), groups=(), names=(),
           said=None, reply=None, **more):
    return dict(more, id=id, video=video, names=list(dict.fromkeys([video, *names])),
                question=question, answer=answer, asks=asks or [question], options=list(options),
                groups=dict(groups), record=record, clip=None, said=said, reply=reply)


# --------------------------------------------------------------------------------------------------
# Records to rows, one function per family. `value`: what the file holds, `file`: its name, `keys`:
# where predictions stand. They do not know whether a file is an annotation or a prediction file:
# that differs by `said` alone.
# --------------------------------------------------------------------------------------------------
def qa_rows(file, value, benchmark):
    """MSVD-QA, MSRVTT-QA, ActivityNet-QA in all shapes; also CVRR-ES and any judged [verdict,
    record]."""
    rows, seen = [], Counter()
    for place, key, record in records_of(file, value):
        reply = None
        if isinstance(record, list) and len(record) == 2 and isinstance(record[1], dict):  # judged
            reply, record = record
        if isinstance(record, dict) and benchmark == "nextoe" and key and "question" not in record:
            for qid, text in record.items():  # {video: {qid: prediction}}
                rows.append(row_of(f"{key}_{qid}", key, "", None, {},
                                   said=[said_of({"pred": text}, place)]))
            continue
        if isinstance(record, str) and key:  # {id: prediction}
            record = {"id": key, "pred": record}
        if not isinstance(record, dict):
            raise DataError(f"{place}: no record: {str(record)[:60]!r}")
        video = text_of(record, place, "video_name", "video", "video_id", "modal_path", default="")
        unnamed = not video
        video = video or text_of(record, place, "id", "question_id", default=key or place)
        if (unnamed and benchmark == "activitynet_qa"
            and (named := re.fullmatch(r"v_(.+)_\d+", video))):
            video, unnamed = named[1], False
        video = video if not video.isdigit() else {"msvd_qa": "vid",
                                                   "msrvtt_qa": "video"}.get(benchmark, "") + video
        question = text_of(record, place, "question", "q", "Q", "query", "prompt",
                           default="").replace("<video>", "")
        said = said_of(record, place)
        answer = text_of(record, place, "answer", "a", "A", "gt", default="") or None
        given = text_of(record, place, "question_id", "id", "qid", default=key or "")
        if benchmark == "nextoe":
            given = f"{video}_{given}"
        seen[video] += 1
        kind = text_of(record, place, "type", "question_type", default="")
        groups = {}
        if benchmark == "activitynet_qa" and kind:
            number = int(kind) if kind.isdigit() else -1
            groups["type"] = ACTIVITYNET_TYPES[number] if 0 <= number < 9 else kind
        elif benchmark == "nextoe" and kind:
            groups = nextqa_groups(kind)
        elif benchmark == "cvrr_es":
            groups["dimension"] = Path(file).stem
            given = given or f"{Path(file).stem}_{len(rows)}"
        elif question.strip() and benchmark != "mmaip_v":
            word = question.split()[0].lower()
            groups["first word"] = word if word in ("what", "who", "how", "when",
                                                    "where") else "other"
        rows.append(row_of(given or f"{video}_{seen[video] - 1}", video, question.strip(), answer,
                           record, groups=groups, said=None if said is None else [said],
                           reply=reply, unnamed=unnamed))
    return rows


def video_chatgpt_rows(file, value, benchmark):
    """Video-ChatGPT's benchmark. Which of the five criteria a file is for is in its name, as its
    makers have it."""
    words = ("generic", "temporal", "consistency", "correctness", "detail", "context")
    part = next((word for word in words if word in Path(file).stem.lower()), None)
    rows, seen, half = [], Counter(), {}
    for place, key, record in records_of(file, value):
        reply = None
        if isinstance(record, list) and len(record) == 2 and isinstance(record[1], dict):
            reply, record = record
        if not isinstance(record, dict):
            raise DataError(f"{place}: no record: {str(record)[:60]!r}")
        pair = any(k in record for k in ("Q1", "question_1", "q1"))
        if not pair and part in (None, "consistency"):
            raise DataError(f"{place}: is it generic or temporal? the file's name must say so, or "
                            "have Q1 and Q2")
        name = "consistency" if pair else part
        video = text_of(record, place, "video_name", "video",
                        default=(key or "").rpartition("_")[0])
        answer = text_of(record, place, "A", "answer", "a", default="") or None
        if pair:
            asks = [text_of(record, place, f"Q{k}", f"question_{k}", f"q{k}") for k in (1, 2)]
            said = [said_of(record, place, (f"pred{k}",)) for k in (1, 2)]
            if "None" in asks:  # the parquet files have one of the two questions per row
                known = half.pop((video, answer), None)
                if known is None:
                    half[video, answer] = asks, said
                    continue
                asks, said = ([b if a == "None" else a for a, b in zip(x, y)]
                              for x, y in zip((asks, said), known))
        else:
            asks, said = [text_of(record, place, "Q", "question", "q")], [said_of(record, place)]
        groups = {"part": name if name in words[:3] else "generic"}
        id = f"{groups['part']}:{key}" if key else f"{groups['part']}:{video}_{seen[video]}"
        seen[video] += 1
        criteria = {"generic": ("correctness", "detail", "context"),
                    "temporal": ("temporal",)}.get(name, (name,))
        rows.append(row_of(id, video, asks[0], answer, record, asks=asks, groups=groups,
                           reply=reply, said=None if None in said else said)
                    | {"criteria": criteria})
    return rows


def video_mme_rows(file, value, benchmark):
    """Video-MME: flat rows, the official nested results, lmms-eval's samples, a wide table
    {sample_id: letter}."""
    flat = []
    for place, key, record in records_of(file, value):
        if not isinstance(record, (dict, str)) or isinstance(record, str) and not key:
            raise DataError(f"{place}: no record: {str(record)[:60]!r}")
        record = {"question_id": key, "response": record} if isinstance(record, str) else record
        if isinstance(record.get("questions"), list):
            for k, question in enumerate(record["questions"], 1):
                if not isinstance(question, dict):
                    raise DataError(f"{place} question {k}: no record: {str(question)[:60]!r}")
                flat.append((f"{place} question {k}",
                             {**{k: v for k, v in record.items() if k != "questions"}, **question}))
        else:
            inner = record.get("videomme_perception_score", record.get("videomme_percetion_score"))
            flat.append((place, {**record, **inner} if isinstance(inner, dict) else record))
    rows = []
    for place, r in flat:
        groups = {name: text_of(r, place, *keys, default="")
                  for name, *keys in (("duration", "duration"), ("domain", "domain", "category"),
                                      ("sub_category", "sub_category"),
                                      ("task_type", "task_type", "task_category"))}
        id = text_of(r, place, "question_id", "sample_id", "id")
        options = r.get("options")
        options = list(options) if isinstance(options, (list, np.ndarray)) else []
        answer = text_of(r, place, "answer", "target", default="").strip().upper() or None
        if answer is not None and answer not in tuple("ABCD"):
            raise DataError(f"{place}: the answer is no letter: {answer[:60]!r}")
        said = said_of(r, place, (*SAID, "resps"))
        question = text_of(r, place, "question", default="")
        video = text_of(r, place, "videoID", "video_id", default=id.partition("-")[0])
        rows.append(row_of(id, video, question, answer, r, options=options,
                           said=None if said is None else [said],
                           groups={k: v for k, v in groups.items() if v},
                           names=[r.get("video_id") or video], unnamed=video == id,
                           asks=[choice_prompt(question, options)]))
    return rows


def choice_prompt(question, options, subtitles=None):
    """Video-MME's official prompt; with subtitles, those at the sampled frames stand before it."""
    letters = [*LETTERS[: len(options) or 4]]
    named = f"({', '.join(letters[:-1])}, or {letters[-1]})"
    told = f"This video's subtitles are listed below:\n{subtitles}\n" if subtitles else ""
    return (f"{told}Select the best answer to the following multiple-choice question based on the "
            f"video. Respond with only the letter {named} of the correct option.\n"
            + "\n".join([question, *options, "The best answer is:"]))


def nextqa_rows(file, value, benchmark):
    """NExT-QA multiple choice: the csv, IG-VLM's csv, and results {"<video>_<qid>": {"prediction",
    "answer"}}."""
    rows = []
    for place, key, r in records_of(file, value):
        r = {"prediction": r} if key and isinstance(r, (int, str)) else r
        if not isinstance(r, dict):
            raise DataError(f"{place}: no record: {str(r)[:60]!r}")
        video = text_of(r, place, "video", "video_name", default=(key or "").rpartition("_")[0])
        qid = text_of(r, place, "qid", "question_id", default=(key or "").rpartition("_")[2])
        number = text_of(r, place, "answer_number", "answer", default="")
        if number and not (number.isdigit() and int(number) < 5):
            raise DataError(f"{place}: the answer is no number of an option, 0 to 4: "
                            f"{number[:60]!r}")
        said, kind = said_of(r, place), text_of(r, place, "type", "question_type", default="")
        if said is not None and re.fullmatch(r"\d+", said.strip()):
            said = LETTERS[int(said)] if int(said) < 5 else ""
        options = [f"{LETTERS[k]}. {text_of(r, place, f'a{k}')}"
                   for k in range(5) if r.get(f"a{k}") is not None]
        question = text_of(r, place, "question", default="")
        rows.append(row_of(key or f"{video}_{qid.removeprefix(video)}", video, question,
                           LETTERS[int(number)] if number else None, r, options=options,
                           groups=nextqa_groups(kind) if kind else {},
                           asks=[choice_prompt(question, options)],
                           said=None if said is None else [said]))
    return rows


def caption_rows(file, value, benchmark):
    """Retrieval: MSRVTT's 1k-A table, MSRVTT_data.json, {clip: [captions]}, VLM-Eval's annotations
    and predictions."""
    rows, listed = [], Path(file).with_name("test_list.txt")
    wanted = {line.strip() for line in load(listed)} if listed.exists() else None
    if isinstance(value, dict) and isinstance(value.get("sentences"), list):
        said_in = {}
        try:
            test = [v["video_id"] for v in value.get("videos", []) if v.get("split") == "test"]
            for sentence in value["sentences"]:
                said_in.setdefault(sentence["video_id"], []).append(sentence["caption"])
        except (AttributeError, LookupError, TypeError) as e:
            raise DataError(f"{file}: a video or sentence without its video_id or caption "
                            f"({e})") from e
        value = {video: said_in[video] for video in test or said_in if video in said_in}
    for place, key, r in records_of(file, value):
        r = {"video_id": key, "gt": r} if key and isinstance(r, list) else r
        if not isinstance(r, dict):
            raise DataError(f"{place}: no record: {str(r)[:60]!r}")
        predicted = "gt" in r and isinstance(r.get("answer"), str)
        captions = r.get("gt", r.get("sentence", None if predicted else r.get("answer")))
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, (list, type(None))) or captions is not None and not (
                captions and all(isinstance(c, str) for c in captions)):
            raise DataError(f"{place}: no caption: {str(captions)[:60]!r}")
        video = text_of(r, place, "video_id", "video_name", "video", "image")
        if wanted is not None and captions and video not in wanted and not predicted:
            continue
        said = r["answer"] if predicted else said_of(r, place)
        rows.append(row_of(video, video,
                           text_of(r, place, "question", default="Describe the video concisely."),
                           captions, r,
                           names=[r[k] for k in ("image", "video") if isinstance(r.get(k), str)],
                           said=None if said is None else [said]))
    return rows


def spoken(name):
    """A class as words: ApplyEyeMakeup -> Apply Eye Makeup, brush_hair -> brush hair."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ")


def hmdb_class(file):
    """The class of a split file: brush_hair_test_split1.txt -> brush_hair."""
    return re.sub(r"_test_split\d+\.txt$", "", Path(file).name)


def action_rows(file, value, benchmark):
    """UCF101's test list, HMDB51's split file of one class (2: test), or VLM-Eval's predictions."""
    rows = []
    if not str(file).endswith(".txt"):
        for row in caption_rows(file, value, benchmark):
            rows.append(row
                        | {"answer": row["answer"] and spoken(row["answer"][0]),
                           "id": Path(row["video"]).stem if row["record"].get("gt") is None
                           else row["id"]})
        return rows
    ask = "Describe the main action in the video concisely."
    for n, line in enumerate(value, 1):
        if benchmark == "ucf101":
            name, label = line.split()[0], line.partition("/")[0]
            if "/" not in line:
                raise DataError(f"{file} record {n}: no <class>/<video>: {line[:60]!r}")
        else:
            name, _, flag = line.strip().rpartition(" ")
            label = hmdb_class(file)
            if flag not in ("0", "1", "2") or not name:
                raise DataError(f"{file} record {n}: no '<video> <0, 1 or 2>': {line[:60]!r}")
            if flag != "2":
                continue
            name = f"{label}/{name}"
        rows.append(row_of(Path(name).stem, name, ask, spoken(label), {},
                           groups={"class": spoken(label)}, names=[Path(name).name]))
    return rows


def tempcompass_rows(file, value, benchmark):
    """TempCompass: {video: {aspect: [{question, answer, prediction}]}}; judged files have a rating
    as well, and then need no question. A caption is rated by a judge alone: one without a rating is
    left out."""
    rows, task = [], Path(file).stem
    for place, video, aspects in records_of(file, value):
        if not isinstance(aspects,
                          dict) or not all(isinstance(part, list) for part in aspects.values()):
            raise DataError(f"{place}: no {{aspect: [questions]}}")
        for aspect, part in aspects.items():
            for k, r in enumerate(part, 1):
                at = f"{place} {aspect} {k}"
                if not isinstance(r, dict):
                    raise DataError(f"{at}: no record: {str(r)[:60]!r}")
                said, rated = said_of(r, at), r.get("rating") in (0, 1)  # -1: the judge failed
                question = text_of(r, at, "question", default="" if "rating" in r else None)
                caption = "Generated Caption:" in question or task == "captioning"
                answer = text_of(r, at, "answer", "gt-answer",
                                 default="" if "rating" in r or caption else None)
                rows.append(row_of(f"{task}:{video}_{aspect}_{k}", video, question, answer, r,
                                   groups={"task": task, "aspect": f"{task} {aspect}"},
                                   reply=r["rating"] if rated else None,
                                   said=None if said is None else [said],
                                   is_caption=caption,
                                   left_out="captions without a judge's rating" if caption
                                   and not rated else None))
    return rows


READERS = dict(msvd_qa=qa_rows, msrvtt_qa=qa_rows, activitynet_qa=qa_rows, cvrr_es=qa_rows,
               nextoe=qa_rows, mmaip_v=qa_rows, video_chatgpt=video_chatgpt_rows,
               video_mme=video_mme_rows, nextqa=nextqa_rows, video_mme_subtitles=video_mme_rows,
               msvd_retrieval=caption_rows, msrvtt_retrieval=caption_rows, ucf101=action_rows,
               hmdb51=action_rows, tempcompass=tempcompass_rows)


# --------------------------------------------------------------------------------------------------
# A benchmark's questions, with their videos
# --------------------------------------------------------------------------------------------------
def annotation_files(benchmark, data):
    """The annotation files of a benchmark: `data` itself, the files of a pattern
    ("DIR/*_test_split2.txt"), or those of the first of the benchmark's patterns that matches below
    it."""
    if os.path.isfile(data):
        return [str(data)]
    if not os.path.exists(data) and (found := sorted(glob.glob(str(data)))):
        return found
    if benchmark in ONLY_PREDICTIONS:
        raise DataError(f"{data}: --data is not for {benchmark}, whose questions are in its "
                        "prediction files")
    files = BENCHMARKS[benchmark]
    folders = [Path(data, name)
               for name in files.folders if Path(data, name).is_dir()] + [Path(data)]
    for folder in folders:
        for pattern in files.patterns:
            found = sorted(glob.glob(str(folder / pattern)))
            if pattern == "*_qa*.json" and benchmark == "video_chatgpt":
                found = [f
                         for f in found if re.search("generic|temporal|consistency", Path(f).stem)]
            if found:
                return found
    raise DataError(f"{data}: nothing of {benchmark} there, neither {', '.join(files.patterns)} "
                    f"nor below {' or '.join(files.folders)}")


def questions(benchmark, data, video_root=None):
    """The questions of a benchmark in a folder or file, their videos looked for. -> rows, coverage
    report."""
    files, rows, skipped = annotation_files(benchmark, data), [], Counter()
    for file in files:
        value = load(file)
        if str(file).endswith("_q.json"):
            value = with_answers(file, value, skipped)
        rows += READERS[benchmark](file, value, benchmark)
    uses = Counter(row["id"] for row in rows)
    if twice := [id for id, n in uses.items() if n > 1]:
        kept = {row["id"]: row for row in rows}
        skipped[f"the same id twice, e.g. {twice[0]}; the last counts"] += len(rows) - len(kept)
        rows = list(kept.values())
    if without := [row for row in rows if row["answer"] is None]:
        skipped[f"no answer, e.g. {without[0]['id']}"] += len(without)
        rows = [row for row in rows if row["answer"] is not None]
    if not rows:
        raise DataError(f"{files[0]}: no question")
    folder = os.path.dirname(files[0]) or "."
    missing = find_videos(rows, [video_root] if video_root else [folder], folder)
    report = dict(files=files, questions=len(rows), skipped=dict(skipped), missing=missing,
                  videos=len({row["video"] for row in rows}),
                  videos_found=len({r["video"] for r in rows if r["clip"]}),
                  questions_with_video=sum(row["clip"] is not None for row in rows))
    return rows, report


def with_answers(file, rows, skipped):
    """test_q.json with the answers of test_a.json beside it: joined by question_id, by place where
    it has none."""
    answers_file = file.removesuffix("_q.json") + "_a.json"
    answers = load(answers_file)
    for name, part in ((file, rows), (answers_file, answers)):
        bad = next((n for n, r in enumerate(part, 1) if not isinstance(r, dict)),
                   None) if isinstance(part, list) else 0
        if bad is not None:
            raise DataError(f"{name} record {bad}: no list of records")
    if not all("question_id" in r for r in rows + answers):
        if len(rows) != len(answers):
            raise DataError(f"{answers_file}: {len(answers)} answers without ids to {len(rows)} "
                            f"questions of {file}")
        return [{**a, **q} for q, a in zip(rows, answers)]
    by_id = {str(a["question_id"]): a for a in answers}
    if lost := sum(str(q["question_id"]) not in by_id for q in rows):
        skipped[f"no answer in {answers_file}"] += lost
    return [{**by_id[str(q["question_id"])], **q} for q in rows if str(q["question_id"]) in by_id]


def find_videos(rows, roots, folder):
    """Set `clip` of every row whose video is found. -> {name: number of questions} of the
    missing."""
    places = [os.path.join(root, sub) for root in roots for sub in VIDEO_FOLDERS]
    find, aliases, missing = (video_finder([p for p in places if os.path.isdir(p)]),
                              mapping(folder), Counter())
    for row in rows:
        names = row["names"] + [aliases[n] for n in row["names"] if n in aliases]
        try:
            path = next(filter(None, map(find, names)), None)
        except DataError as e:  # a name that leaves the folder
            raise DataError(f"question {row['id']}: {e}") from e
        row["clip"] = path and Clip(path)
        missing[row["video"]] += path is None
    return {name: n for name, n in missing.items() if n}


def mapping(folder):
    """{name in the annotations: name of the file} of mapping files beside them, in both
    directions."""
    out = {}
    # MSVD: <YouTube id>_<start>_<end> vid<N>
    for file in glob.glob(os.path.join(folder, "*mapping*.txt")):
        for n, line in enumerate(load(file), 1):
            if len(pair := line.split()) != 2:
                raise DataError(f"{file} record {n}: no two names: {line[:60]!r}")
            out[pair[0]], out[pair[1]] = pair[1], pair[0]
    for file in glob.glob(os.path.join(folder, "map_vid*.json")):  # NExT-QA: video -> folder/video
        if not isinstance(names := load(file),
                          dict) or not all(isinstance(name, str) for name in names.values()):
            raise DataError(f"{file}: not one object of names")
        out |= names
    return out


def coverage_lines(report):
    """What was found, for people."""
    head = ("{questions} questions about {videos} videos; {videos_found} videos found, with "
            "{questions_with_video}")
    lines = [f"{', '.join(map(str, report['files'][:3]))}: {head.format(**report)}"]
    lines += [f"left out: {n} questions, {why}" for why, n in report["skipped"].items()]
    if report["missing"]:
        some = ", ".join(list(report["missing"])[:5])
        lines.append(f"left out: {sum(report['missing'].values())} questions, video missing: {some}"
                     + (", ..." if len(report["missing"]) > 5 else ""))
    return lines


def class_names(benchmark, data, rows):
    """All classes: UCF101's classInd.txt, HMDB51's label_map.txt or split files; else those of the
    rows."""
    files = annotation_files(benchmark, data)
    if benchmark == "hmdb51" and len(files) > 1:
        return [spoken(hmdb_class(f)) for f in files]
    lists = [Path(files[0]).with_name(name) for name in ("classInd.txt", "label_map.txt")]
    listed = next((load(f) for f in lists if f.exists()), None)
    names = [spoken(line.split()[-1])
             for line in listed] if listed else sorted({row["answer"] for row in rows})
    if unknown := {row["answer"] for row in rows} - set(names):
        raise DataError(f"{files[0]}: class {sorted(unknown)[0]!r} is not in the list of classes")
    return names


def subtitles(clip, folder, num_frames):
    """Video-MME: the lines of <folder>/subtitle/<video>.srt that are shown at the sampled frames,
    or None."""
    stem = Path(clip.path if isinstance(clip.path, str) else clip.path[0]).stem
    file = next((f for f in (Path(folder, sub, f"{stem}.srt")
                             for sub in ("subtitle", "subtitles", "")) if f.exists()), None)
    if file is None:
        return None
    stamp = r"(\d+):(\d+):(\d+)[,.](\d+)"
    try:
        blocks = re.split(r"\n\s*\n",
                          file.read_text(encoding="utf-8-sig", errors="replace").replace("\r", ""))
        times = np.linspace(*clip_seconds(clip), num_frames)
    except (OSError, VideoError):
        return None
    lines = []
    for block in blocks:
        if m := re.search(rf"{stamp}\s*-->\s*{stamp}[^\n]*\n(.*)", block, re.S):
            h, mi, s, ms, h2, mi2, s2, ms2 = (int(x) for x in m.groups()[:8])
            start, end = h * 3600 + mi * 60 + s + ms / 1000, h2 * 3600 + mi2 * 60 + s2 + ms2 / 1000
            if ((times >= start) & (times <= end)).any():
                lines.append(" ".join(re.sub(r"<[^>]*>", "", m[9]).split()))
    return "\n".join(dict.fromkeys(filter(None, lines))) or None
