"""Malformed records for every reader, found by hypothesis: each is read with the right types, or
refused with one line that names the file, never a traceback."""

import json
import math
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation import benchmark_files, prediction_files
from evaluation.metrics import qa_values, score_values
from inputs.preferences import read_preferences, write_preferences
from inputs.records import Clip, DataError, is_text, read_records, report_lines
from oracle import ASPECTS
from plumbing.api_client import ReplyError, parse_json
from plumbing.replies import read_choice, read_ranking, read_scores

SOME = settings(max_examples=60, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
TEXTS = st.one_of(
    st.sampled_from(["", " ", "a.mp4", "what?", "<video>", "\ud83d", "\0", "../a.mp4",
                     "x/../../a.mp4",
                     "file://../a.mp4", "\ufeff", "\u2028", "None", "1", "nan", "x" * 100_000,
                     "a\nb", "~/a.mp4", "..", "/", "a" * 300]),
    st.text(alphabet=string.printable, max_size=8),
    # all that UTF-8 can hold; to say it so saves hypothesis seconds, in which it asks the codec
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=4))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 7), st.just(10**400), st.floats(),
                    TEXTS)
KEYS = ["id", "video", "videos", "image", "images", "video_id", "conversations", "messages", "q",
        "a", "start", "end",
        "task_type", "from", "value", "role", "content", "type", "text", "output_1", "output_2",
        "preference", "chosen",
        "rejected", "prompt", "question", "answer", "question_id", "video_name", "options", "pred",
        "response", "Q",
        "A",
        "Q1", "Q2", "pred1", "duration", "questions", "a0", "qid", "gt", "caption", "annotations",
        "data", "sentences",
        "score", "margin", "narrative", "label", "class"]
JUNK = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=4),
    st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXTS), inner, max_size=6)),
    max_leaves=12)
SAID = st.fixed_dictionaries({}, optional=dict(
    value=SCALARS, content=JUNK, role=st.sampled_from(["user", "assistant", "system", 3, None]),
    **{"from": st.sampled_from(["human", "gpt", "system", [], {}])}))
ROWS = st.one_of(JUNK, st.fixed_dictionaries({}, optional=dict(
    id=JUNK, video=JUNK, images=JUNK, start=SCALARS, end=SCALARS, task_type=JUNK,
    conversations=st.lists(SAID, max_size=4), messages=st.lists(SAID, max_size=4),
    output_1=SAID, output_2=SAID, preference=SCALARS, chosen=JUNK, rejected=JUNK,
    prompt=JUNK, question=JUNK, q=SCALARS, a=SCALARS, answer=JUNK)))
GOOD = {"id": 1, "video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nwhat?"},
                                                     {"from": "gpt", "value": "a cat"}]}
PAIR = {"id": 1, "video": "a.mp4", "prompt": "what?", "chosen": "a cat", "rejected": "a dog"}


def one_line(error, file):
    said = str(error)
    assert str(file) in said and len(said.splitlines()) == 1, said[:300]
    assert len(said) < 1200 and said.encode(), said[:300]


def place(folder):
    folder.mkdir(exist_ok=True)
    (folder / "a.mp4").touch()
    (folder.parent / "a.mp4").touch()  # what `..` would lead to
    return folder


def write(file, rows):
    file.write_text(json.dumps(rows) if file.suffix == ".json"
                    else "".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def inside(clip, folder):
    """The clip lies under the folder. Absolute names, which a user gives on purpose, are not among
    those drawn."""
    paths = clip.path if isinstance(clip.path, tuple) else (clip.path,)
    return all(str(p).startswith(f"{folder}/") and ".." not in str(p).split("/") for p in paths)


@SOME
@given(rows=st.lists(ROWS, min_size=1, max_size=5), suffix=st.sampled_from([".json", ".jsonl"]))
def test_annotations(tmp_path, rows, suffix):
    folder = place(tmp_path / "data")
    file = write(folder / f"x{suffix}", [*rows, GOOD])
    records, report = read_records([file])
    assert report["rows"] == len(rows) + 1 and len({r["id"] for r in records}) == len(records) > 0
    for r in records:
        assert (is_text(r["answer"]) and r["answer"].strip() and isinstance(r["id"], str)
                and len(r["id"]) < 400)
        turns = (
            r["question"]
            if isinstance(r["question"], list)
            else [dict(role="user", content=r["question"])]
        )
        assert all(is_text(t["content"]) for t in turns) and (
            r["task_type"] is None or is_text(r["task_type"])
        )
        assert r["clip"] is None or isinstance(r["clip"], Clip) and inside(r["clip"], folder)
        assert all(t is None or math.isfinite(t) for t in (r["clip"] or Clip(""))[1:])
        json.dumps(r, ensure_ascii=False, default=str).encode()
    for line in report_lines(report):
        assert len(line.splitlines()) == 1 and len(line) < 1200 and line.encode()


@SOME
@given(rows=st.lists(ROWS, min_size=1, max_size=5))
def test_preferences(tmp_path, rows):
    folder = place(tmp_path / "data")
    pairs, report = read_preferences([write(folder / "x.json", [*rows, PAIR])])
    assert report["rows"] == len(rows) + 1 and len(pairs) > 0
    for p in pairs:
        assert is_text(p["chosen"]) and is_text(p["rejected"]) and p["chosen"] != p["rejected"]
        assert p["clip"] is None or inside(p["clip"], folder)
        assert p["answer"] is None or is_text(p["answer"])
    for format in ("vlm_rlaif", "trl"):  # what is read can be written
        write_preferences(folder / "again.json",
                          [{**p, "margin": None, "scores": None} for p in pairs], format)


@SOME
@given(content=st.one_of(st.binary(max_size=60),
                         st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")),
                         JUNK.map(lambda value: json.dumps(value).encode())),
       mark=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\0"]),
       suffix=st.sampled_from([".json", ".jsonl"]))
def test_whole_files(tmp_path, content, mark, suffix):
    file = place(tmp_path / "data") / f"x{suffix}"
    file.write_bytes(mark + content)
    for read in (read_records, read_preferences):
        try:
            records, _ = read([str(file)])
            assert records
        except DataError as e:
            one_line(e, file)


@pytest.mark.parametrize("read, row", [(read_records, GOOD), (read_preferences, PAIR)])
def test_marks_copies_and_nothing(tmp_path, read, row):
    file = place(tmp_path / "data") / "x.json"
    # a byte-order mark, one id three times
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([row, row, row]).encode())
    records, _ = read([str(file)])
    assert [r["id"] for r in records] == ["1", "1#2", "1#3"]
    for nothing in (b"", b"\xef\xbb\xbf", b"[]", b"{}", b"null", b" \n"):
        file.write_bytes(nothing)
        with pytest.raises(DataError) as e:
            read([str(file)])
        one_line(e.value, file)
    outside = [{**row, "video": name}
               for name in ("../a.mp4", "b/../../a.mp4", "file://../a.mp4", "./../a.mp4", "..")]
    file.write_text(json.dumps([*outside, row, {**row, "video": str(tmp_path / "a.mp4")}]))
    records, report = read([str(file)])
    assert [r["clip"].path for r in records] == [
        str(tmp_path / "data/a.mp4"),
        str(tmp_path / "a.mp4"),
    ]
    assert report["skipped"]["video outside of the data folder"]["count"] == 5


# --- benchmarks and predictions -------------------------------------------------------------------
RECORDS = st.one_of(
    JUNK,
    st.lists(
        st.one_of(JUNK, st.fixed_dictionaries({}, optional={key: JUNK for key in KEYS})), max_size=4
    ),
)


@pytest.mark.parametrize("benchmark", sorted(benchmark_files.READERS))
@settings(SOME, max_examples=25)
@given(value=RECORDS)
def test_benchmark_files(tmp_path, benchmark, value):
    file = place(tmp_path / "data") / "generic_x.json"
    write(file, value)
    for read in (
        lambda: benchmark_files.READERS[benchmark](
            str(file), benchmark_files.load(file), benchmark
        ),
        lambda: prediction_files.predictions(benchmark, [str(file)])[0],
    ):
        try:
            rows = read()
        except DataError as e:
            one_line(e, file)
            continue
        for row in rows if isinstance(rows, list) else rows[""]:
            assert isinstance(row["id"], str) and isinstance(row["video"], str)
            assert row["said"] is None or all(isinstance(s, str | None) for s in row["said"])


@pytest.mark.parametrize("name", ["../a.mp4", "x/../../a"])
def test_a_benchmark_that_names_a_video_outside(tmp_path, name):
    folder = place(tmp_path / "data")
    write(folder / "test_qa.json", [dict(id=7, video_id=name, question="what?", answer="a cat")])
    with pytest.raises(DataError, match="question 7.*outside of the data folder"):
        benchmark_files.questions("msvd_qa", str(folder / "test_qa.json"))


# --- what a server says ---------------------------------------------------------------------------
@SOME
@given(text=st.one_of(TEXTS, JUNK.map(json.dumps), st.dictionaries(
    st.sampled_from([*ASPECTS, "ranking", "better"]), JUNK).map(json.dumps)))
def test_replies(text):
    for read in (lambda reply: read_ranking(reply, 3), read_choice, read_scores):
        try:
            out = read(parse_json(text))
        except ReplyError as e:
            assert e.reason in ("no_json", "missing_answer", "no_permutation") and len(str(e)) < 300
        else:
            assert (out in (1, 2) or sorted(out) == [1, 2, 3] or len(out) == 4
                    and all(0 <= s <= 5 for s in out))
    for values, problem in (qa_values(text), score_values(text, "detail")):
        assert all(v is None or 0 <= v <= 5
                   for v in values.values()) and (problem is None or isinstance(problem, str))
