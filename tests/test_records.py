import json
import os
import random
import sys
import unicodedata

import pytest

from inputs.records import Clip, DataError, read_records, report_lines


def qa(video=None, question="what?", answer="a cat", **more):
    """A row of the LLaVA shape."""
    row = {"conversations": [{"from": "human", "value": question},
                             {"from": "gpt", "value": answer}], **more}
    return row | ({"video": video} if video else {})


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(path)


def touch(*paths):
    for path in paths:
        write(path, "")


@pytest.fixture
def one(tmp_path):
    """Reads a single row, or a list of them, beside a video a.mp4 and a folder f of frames."""
    touch(tmp_path / "a.mp4", *(tmp_path / "f" / f"{i:02}.jpg" for i in range(50)))
    return lambda row: read_records(
        [write(tmp_path / "x.json", row if isinstance(row, list) else [row])]
    )


def test_every_shape_gives_the_same_record(one, tmp_path):
    a, f = str(tmp_path / "a.mp4"), str(tmp_path / "f")
    frames = [f"f/{i:02}.jpg" for i in range(50)]
    parts = [{"type": "video"}, {"type": "text", "text": "what?"}]
    for path, row in [
        (a, qa("a.mp4", "<video>\nwhat?")),
        (a, qa("a.mp4", "what?\n<video>")),
        (a, qa(["a.mp4"], "<image>" * 8 + "\nwhat?")),
        (a, qa("a.pkl", "<video>\nwhat?")),
        (a, {"q": "what?", "a": "a cat", "video_id": "v_a", "extra": 1}),
        (a, {"messages": [{"role": "user", "content": "<video>what?"},
                          {"role": "assistant", "content": "a cat"}],
             "videos": ["a.mp4"]}),
        (a, {"messages": [{"role": "user", "content": parts},
                          {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
             "videos": ["a.mp4"]}),
        (a, {"messages": [{"role": "user",
                           "content": [{"type": "video", "video": "file://" + a}] + parts[1:]},
                          {"role": "assistant", "content": "a cat"}]}),
        (f, qa("f", "<video>\nwhat?")),
        (tuple(str(tmp_path / i) for i in frames),
         qa(None, "<image>\n" * 50 + "what?", images=frames, uid=7)),
        (tuple(str(tmp_path / i) for i in frames), qa(frames)),
        ((f"{f}/07.jpg",), qa(None, "<image>\nwhat?", image="f/07.jpg")),
        (None, qa()),
    ]:
        (record,), report = one(row)
        assert record["clip"] == (path and Clip(path)), row
        assert ((record["question"], record["answer"], record["task_type"])
                == ("what?", "a cat", None))
        assert record["file"] == str(tmp_path / "x.json") and isinstance(record["id"], str)
        assert not report["skipped"] and report["text_only"] == (path is None)
        assert hash(record["clip"]) is not None


def test_turns(one):
    """One record per answer with all that was said before; the system turn opens the first
    question."""
    said = [("system", "Be brief."), ("human", "<video>\none?"), ("gpt", "1"), ("human", "two?"),
            ("gpt", "2"),
            ("human", "open?")]
    records, report = one({"id": 5, "video": "a.mp4", "task_type": "Count", "start": 1, "end": 2.5,
                           "conversations": [{"from": who, "value": text} for who, text in said]})
    assert ([r["id"] for r in records] == ["5", "5#2"]
            and [r["answer"] for r in records] == ["1", "2"])
    assert records[0]["question"] == "Be brief.\none?"
    assert records[1]["question"] == [{"role": "user", "content": "Be brief.\none?"},
                                      {"role": "assistant", "content": "1"},
                                      {"role": "user", "content": "two?"}]
    assert ({r["clip"][1:] for r in records} == {(1, 2.5)}
            and {r["task_type"] for r in records} == {"Count"})
    assert (report["rows"], report["records"], report["videos"]) == (1, 2, 1)


def parts(**more):
    """A chat row whose question is a video and a text, with more keys of the video."""
    said = [{"type": "video", "video": "a.mp4", **more}, {"type": "text", "text": "what?"}]
    return {"messages": [{"role": "user", "content": said},
                         {"role": "assistant", "content": "a cat"}]}


@pytest.mark.parametrize("row", [
    qa("a.mp4", video_start=1, video_end=2.5), qa("a.mp4", start_time=1, end_time=2.5),
    qa("a.mp4", start=1, end=2.5),
    qa("a.mp4", start=1, video_start=1, end=2.5), parts(video_start=1, video_end=2.5),
    parts(start=1, end=2.5)])
def test_a_part_of_a_video_by_any_name(one, row, tmp_path):
    (record,), report = one(row)
    assert record["clip"] == Clip(str(tmp_path / "a.mp4"), 1, 2.5) and not report["not_understood"]


@pytest.mark.parametrize("row", [qa("a.mp4", start=1, video_start=2), qa("a.mp4", video_end="3"),
                                 parts(video_start=3, video_end=2)])
def test_a_part_that_is_none(one, row):
    _, report = one([row, qa()])
    assert list(report["skipped"]) == ["no range of seconds"]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_column_opens_the_first_question(one, key):
    (record,), report = one(qa("a.mp4", "<video>\nwhat?", **{key: " Be brief. "}))
    assert record["question"] == "Be brief.\nwhat?" and not report["not_understood"]
    said = [{"from": who, "value": text}
            for who, text in [("system", "Now."), ("human", "what?"), ("gpt", "a cat")]]
    assert one({key: "Be brief.",
                "conversations": said})[0][0]["question"] == "Be brief.\nNow.\nwhat?"
    assert one({key: "", "conversations": said})[0][0]["question"] == "Now.\nwhat?"
    assert list(one([qa(**{key: 3}), qa()])[1]["skipped"]) == ["system is no text"]


def test_keys_that_nobody_reads_are_counted_each_once(one, tmp_path):
    rows = [qa("a.mp4", fps=2, uid=7), qa("a.mp4", fps=1, note=None, tags=[]), qa("b.mp4", lost=1),
            parts(nframes=8, resized_height=28), qa(clip=[0, 1], weight=0)]
    rows[1]["conversations"][1]["loss"] = False
    records, report = one(rows)
    # they are read all the same; what the skipped row holds is not counted
    assert len(records) == 4
    assert {key: n["count"] for key, n in report["not_understood"].items()} == {
        "fps": 2, "uid": 1, "conversations: loss": 1, "messages: content: nframes": 1,
        "messages: content: resized_height": 1, "clip": 1, "weight": 1}
    lines = report_lines(report)
    assert (f"not understood: fps, in 2 rows; {tmp_path / 'x.json'} record 1" in lines
            and len(lines) == 2 + 7)


def test_markup_stays_in_answers_and_goes_from_questions(one):
    (first, second), _ = one({"video": "a.mp4", "conversations": [
        {"from": "human", "value": "<image>\nwhich <video> tag?"},
        {"from": "gpt", "value": "The `<video>` tag, not `<image>`."},
        {"from": "human", "value": "why?"}, {"from": "gpt", "value": "a red</s> circle"}]})
    assert (first["question"] == "which tag?"
            and first["answer"] == "The `<video>` tag, not `<image>`.")
    assert (second["question"][1]["content"] == first["answer"]
            and second["answer"] == "a red</s> circle")
    (text,), report = one(qa(None, "which tag?", "The <video> tag."))
    assert (text["clip"] is None and text["answer"] == "The <video> tag."
            and report["text_only"] == 1)


def test_containers(tmp_path):
    rows = [qa(question="line\u2028one?"), qa(question="two?", id="b")]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name, data in [("l.json", rows), ("a.json", {"annotations": rows, "info": {}}),
                       ("d.json", {"data": rows}),
                       ("k.json", {"k0": rows[0], "k1": rows[1]}),
                       ("b.json", "\ufeff" + json.dumps(rows)),
                       ("w.jsonl", "\ufeff" + lines.replace("\n", "\r\n\r\n") + "\n\n"),
                       ("n.JSONL", lines),
                       ("lines.json", lines), ("z.json", "\ufeff" + lines + "\n\n")]:
        records, _ = read_records([write(tmp_path / name, data)])
        assert [r["question"] for r in records] == ["line\u2028one?", "two?"], name
        assert [r["id"] for r in records] == ["k0" if name == "k.json" else records[0]["id"], "b"]
    records, report = read_records([write(tmp_path / "l.json", rows), str(tmp_path / "w.jsonl")])
    assert len({r["id"] for r in records}) == 4 and report["files"] == 2 and report["rows"] == 4


@pytest.mark.parametrize("given, there", [
    ("x.mp4", "x.mp4"), ("x.mp4", "x.mkv"), ("x", "x.webm"), ("x", "x.AVI"), ("x", "v_x.mov"),
    ("v_x", "x.gif"),
    ("v_x.pkl", "v_x.mp4"), ("x.mp4", "x"), ("x", "v_x"), ("v_x.pkl", "v_x"),
    ("x.y_87.100", "x.y_87.100.avi"),
    ("sub/x.npy", "sub/v_x.MP4"), ("./sub/../x.mp4", "x.mp4"), ("x.mpg", "x.mpg"), ("x/", "x")])
def test_names_are_found(tmp_path, given, there):
    for number, root in enumerate([tmp_path / "root", tmp_path / "ann",
                                   tmp_path / "ann" / "videos"]):
        touch(root / there / "1.png" if there in ("x", "v_x") else root / there)
        file = write(tmp_path / "ann" / "x.json", [qa(given)])
        (record,), _ = read_records([file], str(tmp_path / "root") if number == 0 else None)
        assert record["clip"].path == str(root / there)
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("given, there", [
    ("café.mp4", "café.mp4"), ("café", "café.webm"), ("café.mp4", "v_café.mkv"),
    ("v_café.pkl", "café.mp4"),
    ("été/café.mp4", "été/café.mp4"), ("a/été/ñ/x", "a/été/ñ/x.mp4"),
    ("été", "été/1.png"),
    ("Å.x", "Å.x.avi"),
    ("가나.mp4", "가나.mp4"), ("ệ.gif", "ệ.gif")])
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.skipif("utf" not in sys.getfilesystemencoding(), reason="no such file names here")
def test_letters_that_can_be_written_in_two_ways(tmp_path, given, there, on_disk):
    """A Mac decomposes é into e and an accent, most others compose it."""
    other = {"NFC": "NFD", "NFD": "NFC"}[on_disk]
    given, there = unicodedata.normalize(other, given), unicodedata.normalize(on_disk, there)
    assert given not in there
    touch(tmp_path / "root" / there, tmp_path / "ann" / "videos" / "other.mp4")
    found = tmp_path / "root" / (os.path.dirname(there) if there.endswith("png") else there)
    for name in (given, str(tmp_path / "root" / given)):
        file = write(tmp_path / "ann" / "x.json", [qa(name)])
        (record,), _ = read_records([file], str(tmp_path / "root"))
        assert record["clip"].path == str(found)
    if there.endswith("png"):
        (record,), _ = read_records(
            [write(tmp_path / "ann" / "x.json", [qa(None, images=[f"{given}/1.png"])])],
            str(tmp_path / "root"),
        )
        assert record["clip"].path == (str(tmp_path / "root" / there),)
    touch(tmp_path / "root"
          / (os.path.join(given, "1.png") if there.endswith("png") else given + ".mp4"))
    if not os.path.splitext(given)[1]:  # where both are there, each is itself
        file = write(tmp_path / "ann" / "x.json", [qa(given)])
        (record,), _ = read_records([file], str(tmp_path / "root"))
        assert unicodedata.is_normalized(other, record["clip"].path[len(str(tmp_path)):])


@pytest.mark.parametrize("suffix",
                         ["webp", "bmp", "png", "jpeg", "JPG", "jfif", "tif", "TIFF", "ppm", "pgm"])
def test_folders_of_every_kind_of_image(tmp_path, suffix):
    images = [f"f/{k}.{suffix}" for k in range(3)]
    touch(*(tmp_path / image for image in images))
    file = write(tmp_path / "x.json",
                 [qa("f"), qa("f.mp4"), qa(None, images=images), qa(None, videos=images)])
    records, _ = read_records([file])
    paths = tuple(str(tmp_path / image) for image in images)
    assert [r["clip"].path for r in records] == [str(tmp_path / "f")] * 2 + [paths] * 2


def test_what_a_mac_or_windows_leaves_is_no_video(one, tmp_path):
    touch(tmp_path / "e" / "._1.jpg", tmp_path / "e" / ".DS_Store", tmp_path / "e" / "Thumbs.db",
          tmp_path / "__MACOSX" / "g" / "._1.jpg", tmp_path / "._h.mp4")
    records, report = one([qa("a"), qa("e"), qa("g"), qa("h")])
    assert len(records) == 1 and report["skipped"]["video missing"]["count"] == 3


def test_which_of_several_is_found(one, tmp_path):
    """video_root before the annotation's folder; a file before a folder; features and empty folders
    never."""
    touch(tmp_path / "root" / "a.mp4", tmp_path / "g.pkl", tmp_path / "f.mp4",
          tmp_path / "h" / "notes.txt")
    file = write(tmp_path / "y.json", [qa("a"), qa("f")])
    clips = [r["clip"].path for r in read_records([file], str(tmp_path / "root"))[0]]
    assert clips == [str(tmp_path / "root" / "a.mp4"), str(tmp_path / "f.mp4")]
    rows = [qa("g.pkl"), qa("h"), qa(None, images=["f"]), qa(None, images=["f/01.jpg", "f/99.jpg"])]
    records, report = one([qa("a")] + rows)
    assert len(records) == 1 and report["skipped"]["video missing"]["count"] == 4


def test_names_that_leave_the_folder(tmp_path):
    touch(tmp_path / "secret.mp4", tmp_path / "d" / "a.mp4")
    rows = [qa("../secret.mp4"), qa("q/../../secret"), qa("file://../secret.mp4"),
            qa(None, images=["../secret.mp4"])]
    file = write(tmp_path / "d" / "x.json", rows + [qa("a"), qa(str(tmp_path / "secret"))])
    records, report = read_records([file])
    assert [r["clip"].path for r in records] == [
        str(tmp_path / "d" / "a.mp4"),
        str(tmp_path / "secret.mp4"),
    ]
    assert list(report["skipped"]) == ["video outside of the data folder"]
    assert report["skipped"]["video outside of the data folder"]["count"] == 4


BROKEN = {
    "no JSON object": ["text", None, 3],
    "no question and answer": [{}, {"conversations": "hi"}, {"conversations": [1]},
                               qa("a.mp4", output_1={}),
                               {"prompt": "a", "chosen": "b", "rejected": "c"}],
    "no answer": [{"conversations": []}, {"conversations": [{"from": "human", "value": "?"}]}],
    "empty text of assistant": [qa("a.mp4", answer=" \n"), qa("a.mp4", answer="<video>")],
    "empty text of user": [qa("a.mp4", "<video>\n")],
    "no text in a turn": [qa("a.mp4", answer=3), qa("a.mp4", [{"type": "audio"}]),
                          qa("a.mp4", answer="\ud83d"),
                          {"q": "what?", "video_id": "a"}],
    "user and assistant do not take turns": [{"messages": [{"role": "assistant", "content": "hi"}]},
                                             {"messages": [{"role": [], "content": "hi"}]},
                                             {"messages": [{"role": "user", "content": "hi"}] * 2}],
    "video missing": [qa("b.mp4"), qa("a\0.mp4"), qa("a\0/b.mp4"), qa("\ud83d/\ud83d")],
    "not one video": [qa(None, "<video>what?"), {"q": "what?", "a": "a cat"},
                      qa(["a.mp4", "b.mp4"]),
                      qa("a.mp4", image="f/01.jpg")],
    "video name is no text": [qa(7), qa([["a.mp4"]]), qa({"a": 1})],
    "task_type is no text": [qa("a.mp4", task_type=3)],
    "no range of seconds": [qa("a.mp4", start="1"), qa("a.mp4", start=-1),
                            qa("a.mp4", end=float("nan")),
                            qa("a.mp4", start=2, end=1), qa("a.mp4", start=True),
                            qa("a.mp4", end=10 ** 400)],
}
BROKEN = [(reason, row) for reason, rows in BROKEN.items() for row in rows]


@pytest.mark.parametrize("reason, row", BROKEN)
def test_broken_rows_are_counted(one, reason, row, tmp_path):
    if isinstance(row, dict):
        row["id"] = "bad\nid"
    records, report = one([row, qa("a.mp4"), row])
    assert (len(records) == 1 and list(report["skipped"]) == [reason]
            and report["skipped"][reason]["count"] == 2)
    label = " (id bad id)" if isinstance(row, dict) else ""
    assert report["skipped"][reason]["examples"][1].startswith(
        f"{tmp_path / 'x.json'} record 3{label}: {reason}")
    for line in report_lines(report) + report["skipped"][reason]["examples"]:
        assert len(line.splitlines()) == 1 and line.encode() and len(line) < 600


def test_report(one, tmp_path):
    rows = ([qa("b.mp4", id=i) for i in range(7)] + [qa("a.mp4")] * 3
            + [qa(), qa("a.mp4", answer="")])
    _, report = one(rows)
    assert len(report["skipped"]["video missing"]["examples"]) == 5
    assert {k: v for k, v in report.items() if k != "skipped"} == {
        "files": 1, "rows": 12, "records": 4, "videos": 1, "text_only": 1, "not_understood": {}}
    assert report_lines(report) == [
        "4 records from 12 rows of 1 files: 1 videos, 1 records without video",
        f"skipped 7 rows, video missing; {tmp_path / 'x.json'} record 1 (id 0): video missing: "
        "b.mp4",
        f"skipped 1 rows, empty text of assistant; {tmp_path / 'x.json'} record 12: empty text of "
        "assistant"]


def test_questions_without_labels(tmp_path):
    touch(tmp_path / "a.mp4")
    rows = [
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nwhat?"}]},
        {
            "video": "a.mp4",
            "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "\n"}],
        },
        {"video_id": "a", "q": "what?"},
        {"video_id": "a", "q": "what?", "a": None},
        qa("a.mp4", "what?", "red"),
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    records, report = read_records([str(tmp_path / "x.json")], labelled=False)
    assert [(r["question"], r["answer"]) for r in records] == [("what?", None)] * 4 + [
        ("what?", "red")
    ]
    assert not report["skipped"] and read_records([str(tmp_path / "x.json")])[1]["records"] == 1
    rows[0]["conversations"] = [*qa("a.mp4", "what?", "red")["conversations"],
                                {"from": "human", "value": "and then?"}]
    (tmp_path / "x.json").write_text(json.dumps(rows[:1]))
    first, second = read_records([str(tmp_path / "x.json")], labelled=False)[0]
    assert (first["answer"] == "red" and second["answer"] is None
            and second["question"][-1]["content"] == "and then?")


@pytest.mark.parametrize("name, data, words", [
    ("x.json", "", "cannot be read"), ("x.json", "[{", "cannot be read"),
    ("x.json", "[" * 99999, "cannot be read"),
    ("x.json", "[]", "no rows"), ("x.json", "3", "no list of rows"),
    ("x.json", '{"a": []}', "no list of rows"),
    ("x.json", [qa("b.mp4")] * 3 + [{}],
     "none of 4 rows can be used (3 video missing, 1 no question and answer)"),
    ("x.jsonl", "{\n{", "none of 2 rows can be used (2 no JSON object)"),
    ("x.jsonl", "\n", "no rows")])
def test_files_without_records(tmp_path, name, data, words):
    file = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        read_records([file])
    assert str(caught.value).startswith(f"{file}: ") and words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'[{"q": "\xe9"}]')
    (tmp_path / "table.xlsx").write_bytes(b"PK\x03\x04\xff\xfe")
    for file, said in (("none.json", ""), ("", ""), ("latin.json", "no text in UTF-8"),
                       ("table.xlsx", "read are .json and .jsonl")):
        with pytest.raises(DataError, match=f"cannot be read.*{said}"):
            read_records([str(tmp_path / file)])
    with pytest.raises(DataError, match="no such folder"):
        read_records([write(tmp_path / "x.json", [qa()])], str(tmp_path / "none"))


def test_a_broken_line_is_one_row(tmp_path):
    records, report = read_records(
        [write(tmp_path / "x.jsonl", json.dumps(qa()) + '\n\n{"id": \n')]
    )
    assert len(records) == 1 and report["rows"] == 2
    assert " line 3: no JSON object: " in report["skipped"]["no JSON object"]["examples"][0]


def test_random_damage_never_stops_the_reading(one):
    """Any value of a row replaced by anything: read or counted, and what is read has the types it
    should have."""
    rng = random.Random(0)
    junk = [None, True, -1, 1.5, 10 ** 400, "", "a.mp4", "\0", "..", [], [[]], [None], {},
            {"type": "video"}]

    def damage(value):
        if rng.random() < 0.15:
            return rng.choice(junk)
        if isinstance(value, dict):
            return {key: damage(item) for key, item in value.items() if rng.random() > 0.03}
        return [damage(item) for item in value] if isinstance(value, list) else value

    shapes = [row for _, row in BROKEN]
    shapes += [qa("a.mp4", id=1, start=0, end=1, task_type="x"), qa(None, images=["f/01.jpg"])] * 20
    rows = [damage(rng.choice(shapes)) for _ in range(5000)]
    records, report = one(rows + [qa("a.mp4")])
    assert (
        report["rows"] == 5001 and sum(told["count"] for told in report["skipped"].values()) < 5001
    )
    for r in records:
        assert (isinstance(r["id"], str) and r["answer"] and isinstance(r["answer"], str)
                and r["question"])
        assert isinstance(r["task_type"], str | None) and (
            r["clip"] is None or isinstance(r["clip"], Clip)
        )
    assert len({r["id"] for r in records}) == len(records)


def test_many_rows_are_fast(tmp_path, monkeypatch):
    """10k rows of 50 frames: each folder is listed once, each file looked at once."""
    touch(*(tmp_path / f"v_{v}" / f"{i:02}.jpg" for v in range(20) for i in range(50)))
    frames = [[f"v_{v}/{i:02}.jpg" for i in range(50)] for v in range(20)]
    file = write(tmp_path / "x.jsonl",
                 "\n".join(json.dumps(qa(None, images=frames[n % 20])) for n in range(10000)))
    asked, listdir, isfile = [], os.listdir, os.path.isfile
    monkeypatch.setattr(os, "listdir", lambda path: (asked.append(path), listdir(path))[1])
    monkeypatch.setattr(os.path, "isfile", lambda path: (asked.append(path), isfile(path))[1])
    records, report = read_records([file])
    assert len(records) == 10000 and report["videos"] == 20
    assert len(asked) < 2000 and len(set(asked)) > 1000
