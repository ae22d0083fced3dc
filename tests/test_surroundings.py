"""Other machines: a locale without letters, a terminal that lacks some, no git, names that are no
text."""

import io
import locale
import sys

import pytest
from inside import flags_of

import plumbing.run
from inputs.records import DataError
from oracle import JudgeOracle
from plumbing import files


@pytest.fixture
def plain_locale(tmp_path):
    """In the locale C, without Python's UTF-8 mode, `open` takes ASCII for the encoding of a
    text."""
    if sys.flags.utf8_mode:
        pytest.skip("in UTF-8 mode `open` looks at no locale")
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")
        with pytest.raises(UnicodeEncodeError):
            (tmp_path / "x").write_text("é")
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def test_narratives_are_utf8_whatever_the_locale(tmp_path, plain_locale):
    judge = object.__new__(JudgeOracle)
    judge.known, judge.unreadable, judge.narrative_file = (
        {},
        lambda videos: set(),
        tmp_path.joinpath,
    )
    judge.rows, judge.clips = 1, 1
    files.write(tmp_path / "video", "ein Würfel")
    assert judge.narratives(["video"]) == ["ein Würfel"]


def test_every_letter_can_be_printed(monkeypatch):
    """A script does not end because a question, a name or "±" is no letter of the terminal."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict"))
        with pytest.raises(UnicodeEncodeError):
            getattr(sys, name).write("±")
    flags_of(monkeypatch, "sft.py")
    for stream in (sys.stdout, sys.stderr):
        print("± \udcff", file=stream, flush=True)
        assert stream.buffer.getvalue() == b"\\xb1 \\udcff\n"


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert plumbing.run.git_commit() == "unknown"


def test_what_is_wrong_with_a_file_is_one_printable_line():
    said = str(DataError("x.json record 1: its keys are \u2028, a\nb, \ud83d"))
    assert said.splitlines() == [said] and said.encode() and said.startswith("x.json record 1: ")
