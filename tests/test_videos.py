"""Videos from anywhere: damaged at random, hostile, unreadable. Each decodes or is refused with one
line, in bounded time and memory; `inputs/check_videos.py` says which. The long mode damages a
thousand, the short one thirty-two."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from conftest import REPO
from inside import main_of
from mutations import KINDS, mutated
from test_frames import numbers, write

from inputs import frames
from inputs.check_videos import in_workers, video_paths
from inputs.frames import VideoError, read_frames

# and damage other than to single bits shows
LENGTH_KNOWN = ("a.mp4", "start.mp4", "a.mkv", "a.avi", "a.mov")
GOOD = {"a.mp4": ("libx264", {}), "start.mp4": ("libx264", {"movflags": "faststart"}),
        "a.mkv": ("libx264", {}),
        "a.webm": ("libvpx", {}), "a.avi": ("mpeg4", {}), "a.mov": ("mpeg4", {}),
        "a.ts": ("libx264", {}),
        "a.gif": ("gif", {"pix_fmt": "rgb8"})}


def look(path):
    """What a worker tells about a file: a refusal, or numbers, shape, times, brightest dot."""
    try:
        found, times = read_frames(path, 8)
    except VideoError as e:
        return dict(refused=str(e))
    told = numbers(found) if found.shape[2] == 88 else []
    return dict(numbers=told, shape=found.shape, times=times.tolist(), brightest=int(found.max()))


def fuzz(folder, seeds):
    """Damage good videos, read each in a worker. -> [(name, kind, result)], numbers of the good
    ones."""
    noise = np.random.default_rng(0).integers(1, 2048, 40)
    paths = {name: write(folder / name, noise, codec, **options)
             for name, (codec, options) in GOOD.items()}
    good = {name: open(path, "rb").read() for name, path in paths.items()}
    expected, jobs, kinds = numbers(read_frames(paths["a.mp4"], 8)[0]), [], {}
    for seed in seeds:
        name = list(good)[seed % len(good)]
        kind, data = mutated(good[name], [d for n, d in good.items() if n != name], seed)
        path = folder / f"{seed}_{name}"
        path.write_bytes(data)
        jobs.append((str(path),))
        kinds[str(path)] = (name, kind)
    done = in_workers(jobs, look, workers=2, time_limit=20, memory_gib=2)
    return [(*kinds[path], path, result) for (path,), result, _ in done], expected


def check_fuzz(results, expected, count):
    assert len(results) == count and {kind for _, kind, _, _ in results} == set(KINDS)
    other = known = 0
    for name, kind, path, result in results:
        assert isinstance(result, dict), f"{kind}: {result}"  # else it crashed, hung or grew
        if "refused" in result:
            assert (result["refused"].startswith(f"{path}: ")
                    and len(result["refused"].splitlines()) == 1)
            continue
        sound = result["shape"][0] == 8 == len(result["times"]) and result["brightest"] > 24
        assert sound, (kind, path, result)
        assert (np.diff(result["times"]) >= 0).all()
        if name in LENGTH_KNOWN:
            known, other = known + 1, other + (result["numbers"] != expected)
    return other, sum(name in LENGTH_KNOWN for name, *_ in results)


def test_damaged_videos(tmp_path):
    results, expected = fuzz(tmp_path, range(32))
    other, of = check_fuzz(results, expected, 32)
    # a flipped bit inside a compressed picture is a valid other picture: no checksum there
    assert other <= of / 10
    assert sum("refused" in r for *_, r in results) >= 20


@pytest.mark.slow
def test_a_thousand_damaged_videos(tmp_path):
    results, expected = fuzz(tmp_path, range(1000))
    other, of = check_fuzz(results, expected, 1000)
    print(f"{sum('refused' in r for *_, r in results)} of 1000 refused; of {of} in a format that "
          "knows its length "
          f"{other} decode to other frames")
    assert other <= of / 10


# --- a decoder that hangs, crashes, never ends, or takes all memory -------------------------------
def test_a_hanging_decoder_ends_the_process_with_a_line(tmp_path):
    path = write(tmp_path / "a.mp4", range(4))
    code = ("import sys, time\nfrom inputs import frames\nframes.STALL = 0.5\n"
            "frames._scan = lambda path: time.sleep(600)\n"
            "frames.read_frames(sys.argv[1], 4)")
    done = subprocess.run([sys.executable, "-c", code, path], cwd=REPO, capture_output=True,
                          text=True, timeout=120,
                          env={**os.environ, "RANK": "3"})
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"rank 3: {path}: the decoder hangs")


def test_a_slow_but_living_decoder_is_left_alone(tmp_path, monkeypatch):
    path, scan = write(tmp_path / "a.mp4", range(4)), frames._scan

    def slowly(path):
        for _ in range(35):
            time.sleep(0.1)
            frames._tick()
        return scan(path)

    monkeypatch.setattr(frames, "STALL", 3.0)
    monkeypatch.setattr(frames, "_scan", slowly)
    assert numbers(read_frames(path, 4)[0]) == [0, 1, 2, 3]


def test_too_much_time_or_memory_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", range(40))
    for name, value, reason in (("SLOWEST", 0.0, "too long"),
                                ("PIXELS", 1000, "88 x 48 are too large"),
                                ("BYTES", 8 * 88 * 48 * 3 - 1,
                                 "8 frames of 88 x 48 are too large")):
        with monkeypatch.context() as patched:
            patched.setattr(frames, name, value)
            with pytest.raises(VideoError, match=f"a.mp4: .*{reason}"):
                read_frames(path, 8)
    assert len(read_frames(path, 8)[0]) == 8


def test_workers_survive_what_kills_a_decoder(tmp_path):
    def fate(path):
        if "crash" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in path:
            while True:
                pass
        if "grow" in path:
            return np.ones(2**31, np.uint8).sum()
        return "fine"

    def cut_narrative(path):
        try:
            return fate(path)
        except MemoryError:
            return f"{path}: no memory"

    jobs = [(name,) for name in ("a", "crash", "b", "hang", "c", "grow", "d")]
    results = {job[0]: result
               for job, result, _ in in_workers(jobs, cut_narrative, 2, time_limit=2, memory_gib=1)}
    assert [results[name] for name in "abcd"] == ["fine"] * 4
    assert "crashes the decoder" in results["crash"] and "not done after 2 s" in results["hang"]
    assert results["grow"] == "grow: no memory"


AV_ERRORS = [e
             for _, e in inspect.getmembers(av.error, inspect.isclass) if issubclass(e, Exception)]


@pytest.mark.parametrize("place", ["open", "scan", "decode"])
def test_every_error_of_pyav_is_a_line(tmp_path, monkeypatch, place):
    assert len(AV_ERRORS) > 40
    path = write(tmp_path / "a.mp4", range(4))
    where = dict(open=(av, "open"), scan=(frames, "_scan"), decode=(frames, "_store"))[place]
    for error in [*AV_ERRORS, RuntimeError, NotImplementedError, OverflowError, AssertionError,
                  StopIteration]:
        made = (
            error(1, "it broke") if issubclass(error, av.error.FFmpegError) else error("it broke")
        )
        with monkeypatch.context() as patched:
            patched.setattr(*where, lambda *_, **__: (_ for _ in ()).throw(made))
            with pytest.raises(VideoError) as caught:
                read_frames(path, 2)
        assert str(caught.value).startswith(path) and len(str(caught.value).splitlines()) == 1


def test_a_gif_without_its_end_is_refused(tmp_path):
    path = write(tmp_path / "a.gif", range(40), "gif", pix_fmt="rgb8")
    data = open(path, "rb").read()
    assert len(read_frames(path, 4)[0]) == 4
    for cut in (len(data) // 2, len(data) - 1):
        open(path, "wb").write(data[:cut])
        with pytest.raises(VideoError, match="a.gif: .*cut off"):
            read_frames(path, 4)


# --- the checker ----------------------------------------------------------------------------------
def test_the_checker_names_what_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "videos/sub").mkdir(parents=True)
    good = write(tmp_path / "videos/good.mp4", range(20))
    data = open(good, "rb").read()
    (tmp_path / "videos/sub/half.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "videos/empty.MKV").write_bytes(b"")
    (tmp_path / "videos/notes.txt").write_text("no video")
    write(tmp_path / "videos/night.mp4", [0] * 20)  # stripes at brightness 15
    assert [os.path.basename(p) for p in video_paths(str(tmp_path / "videos"))] == [
        "empty.MKV", "good.mp4", "night.mp4", "half.mp4"]
    flags = ["--videos", "videos", "--workers", "2", "--out", "out/broken.json"]
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, tmp_path, "inputs/check_videos.py", *flags)
    said = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and len(said) == 4
    assert sorted(line.split(":")[0] for line in said[:3]) == ["black", "refused", "refused"]
    assert said[3].startswith("4 files: 2 can be read, 1 of them are black; 2 refused")
    broken = json.loads((tmp_path / "out/broken.json").read_text())
    assert list(broken) == ["videos/empty.MKV", "videos/sub/half.mp4"]
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, tmp_path, "inputs/check_videos.py", "--videos", "videos/good.mp4")
    assert not stop.value.code


NAMES = [b"caf\xe9.mp4", b"\xff\xfe.mkv", b"two\nlines.mp4", "\u2028 \u3042.mp4".encode(),
         "\U0001f600.avi".encode()]


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_the_checker_takes_every_name(tmp_path, encoding):
    """A name that is no UTF-8 or not of the terminal's encoding, or that has a line break, is one
    line like others."""
    data = open(write(tmp_path / "good.mp4", range(4)), "rb").read()
    night = open(write(tmp_path / "night.mp4", [0] * 4), "rb").read()
    for kind, content in (("good", data), ("night", night), ("broken", b"no video")):
        os.makedirs(tmp_path / "videos" / kind)
        for name in NAMES:
            with open(os.path.join(os.fsencode(tmp_path / "videos" / kind), name), "wb") as f:
                f.write(content)
    os.remove(os.path.join(os.fsencode(tmp_path / "videos/good"), NAMES[3]))
    done = subprocess.run(
        [sys.executable, REPO / "inputs/check_videos.py", "--videos", "videos", "--workers", "1",
         "--out",
         "broken.json"],
        cwd=tmp_path, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONIOENCODING": encoding})
    said = done.stdout.decode(encoding.split(":")[0]).splitlines()
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert sorted(line.split(":")[0] for line in said[:-1]) == ["black"] * 5 + ["refused"] * 5
    assert said[-1].startswith("14 files: 9 can be read, 5 of them are black; 5 refused; ")
    listed = json.loads((tmp_path / "broken.json").read_text())
    assert {os.path.basename(os.fsencode(name)) for name in listed} == set(NAMES)


def test_what_is_hidden_is_passed_over(tmp_path, monkeypatch, capsys):
    good = open(write(tmp_path / "a.mp4", range(4)), "rb").read()
    place = tmp_path / ".data" / "videos"  # where the user points to is meant, hidden or not
    for name in ("a.mp4", "sub/b.mp4", "..c/d.mp4", "_e.mp4", "._a.mp4", "sub/._b.mp4",
                 "__MACOSX/sub/b.mp4",
                 "__MACOSX/._a.mp4", ".Trash/f.mkv", "sub/.g.webm", "MACOSX/h.mp4"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"no video" if "._" in name else good)
    for name in (".DS_Store", "Thumbs.db", "sub/desktop.ini"):
        (place / name).write_bytes(b"")
    assert [os.path.relpath(p, place) for p in video_paths(str(place))] == [
        "MACOSX/h.mp4", "_e.mp4", "a.mp4", "sub/b.mp4"]
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, tmp_path, "inputs/check_videos.py", "--videos", ".data/videos",
                "--workers", "1")
    assert not stop.value.code and "4 files: 4 can be read" in (said := capsys.readouterr().out)
    assert ("0 refused, 7 hidden ones passed over, e.g. .data/videos/" in said
            and said.count("\n") == 1)
    assert video_paths(str(place / "._a.mp4")) == [str(place / "._a.mp4")]  # named by the user
    (tmp_path / "packed" / "__MACOSX").mkdir(parents=True)
    (tmp_path / "packed" / "__MACOSX" / "._a.mp4").touch()
    with pytest.raises(
        SystemExit, match="no file there has the extension of a video, 1 hidden ones passed over"
    ):
        main_of(monkeypatch, tmp_path, "inputs/check_videos.py", "--videos", "packed")


@pytest.mark.parametrize("flags", ["", "--videos . --num_frames 0", "--videos . --time_limit 0",
                                   "--videos . --workers 0", "--videos . --memory_gib nan",
                                   "--video ."])
def test_flags_of_the_checker(tmp_path, monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, tmp_path, "inputs/check_videos.py", *flags.split())
    said = capsys.readouterr()
    assert (stop.value.code == 2 and said.err.count("\n") == 1
            and said.err.startswith("check_videos.py: "))


def test_an_empty_folder_is_said(tmp_path, monkeypatch):
    for place, words in ((".", "no file there has the extension"),
                         ("nowhere", "nowhere: no such file or folder")):
        with pytest.raises(SystemExit, match=words):
            main_of(monkeypatch, tmp_path, "inputs/check_videos.py", "--videos", place)
