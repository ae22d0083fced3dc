import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

import frames
from data import Clip
from frames import VideoError, clip_seconds, read_frames, video_files


def write(path, numbers, codec="libx264", stamps=None, rotation=None, pix_fmt="yuv420p", size=(88, 48), **options):
    """A video at 25 ticks a second. Frame k tells numbers[k] by stripes, eleven bits, and is shown at stamps[k]."""
    options = {"b": "4M", "g": 50, **options}
    with av.open(str(path), "w", options={k: options.pop(k) for k in ("movflags",) if k in options}) as container:
        stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        (stream.width, stream.height), stream.pix_fmt = size, pix_fmt
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for k, number in enumerate(numbers):
            stripes = (int(number) >> (np.arange(size[0]) * 11 // size[0])) & 1
            image = np.broadcast_to((stripes * 220 + 15).astype(np.uint8)[:, None], (size[1], size[0], 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image))
            frame.pts, frame.time_base = (k if stamps is None else int(stamps[k])), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def numbers(found):
    """The numbers that frames tell."""
    middles = (np.arange(11) * 2 + 1) * found.shape[2] // 22
    return ((found[:, found.shape[1] // 2, middles].mean(axis=2) > 127) << np.arange(11)).sum(axis=1).tolist()


def video_chatgpt(total, count):
    edges = [int(np.round(i * float(total - 1) / count)) for i in range(count + 1)]
    return [(a + b) // 2 for a, b in zip(edges, edges[1:])]


FORMATS = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx"), ("a.gif", "gif"),
           ("a.ts", "libx264"), ("a.h264", "libx264"), ("a.mov", "mpeg4")]


@pytest.mark.parametrize("name, codec", FORMATS)
@pytest.mark.parametrize("total", [50, 7])
def test_constant_rate(tmp_path, name, codec, total):
    path = write(tmp_path / name, range(total), codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p")
    for count in (1, 2, 4, 8, 50, 60):
        for sampling, expected in (("linspace", np.linspace(0, total - 1, count).astype(int).tolist()),
                                   ("midpoint", video_chatgpt(total, count))):
            found, times = read_frames(path, count, sampling=sampling)
            assert found.shape == (count, 48, 88, 3) and found.dtype == np.uint8
            assert numbers(found) == expected and np.allclose(times, np.array(expected) / 25, atol=0.0011)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif"])
def test_variable_rate_is_even_in_time(tmp_path, name):
    stamps = np.array([0, 1, 2, 3, 20, 21, 40, 80])
    codec, pix_fmt = ("gif", "rgb8") if name == "a.gif" else ("libx264", "yuv420p")
    path = write(tmp_path / name, range(8), codec, stamps=stamps, pix_fmt=pix_fmt)
    _, times = read_frames(path, 5)  # targets 0, 20, 40, 60, 80
    assert np.allclose(times * 25, [0, 20, 40, 40, 80], atol=0.03)
    _, times = read_frames(path, 2, sampling="midpoint")  # halves 0 to 40 to 80, middles 20 and 60
    assert np.allclose(times * 25, [20, 40], atol=0.03)


def test_part_of_a_video(tmp_path):
    path = write(tmp_path / "a.mp4", range(50), stamps=np.arange(50) + 1000)  # the first stamp is 40 s
    found, times = read_frames(path, 3, start=0.4, end=0.8)
    assert numbers(found) == [10, 15, 20] and np.allclose(times, [0.4, 0.6, 0.8])
    assert numbers(read_frames(path, 2, start=1)[0]) == [25, 49]
    assert numbers(read_frames(path, 2, end=0.99)[0]) == [0, 24]  # shown at 0.99 s
    assert numbers(read_frames(path, 2, start=0.5, end=0.5)[0]) == [12, 12]
    for start, end in ((-1, 1), (1, 0.5), (0, 2.2), (3, None), (float("nan"), 1), (0, float("nan"))):
        with pytest.raises(VideoError, match="a.mp4: no range"):
            read_frames(path, 2, start=start, end=end)


@pytest.mark.parametrize("angle", [0, 90, 180, -90])
def test_rotation(tmp_path, angle):
    found = read_frames(write(tmp_path / "a.mp4", [0b11111] * 3, rotation=angle), 1)[0][0]  # the left side is bright
    assert found.shape == ((48, 88, 3) if angle in (0, 180) else (88, 48, 3))
    # Turned counterclockwise by 90 degrees, the left side becomes the lower side.
    bright = {0: found[:, :20], 90: found[-20:], 180: found[:, -20:], -90: found[:20]}[angle]
    dark = {0: found[:, -20:], 90: found[:20], 180: found[:, :20], -90: found[-20:]}[angle]
    assert bright.min() > 200 and dark.max() < 50


def test_odd_size_alpha_and_ten_bit(tmp_path):
    for name, codec, pix_fmt in (("a.mp4", "libx264", "yuv444p"), ("b.mp4", "libx264", "yuv420p10le"),
                                 ("c.mov", "png", "rgba"), ("d.mkv", "ffv1", "gray16le")):
        size = (88, 48) if name == "b.mp4" else (77, 21)
        found, _ = read_frames(write(tmp_path / name, range(20), codec, pix_fmt=pix_fmt, size=size), 4)
        assert found.shape == (4, size[1], size[0], 3) and numbers(found) == [0, 6, 12, 19]


def test_stamps_that_run_backwards(tmp_path):
    """AVI has no display stamps: frames with B frames between come out with stamps such as 1, 3, 2, 4, 6, 5."""
    for total in (100, 1200):
        path = write(tmp_path / "a.avi", range(total), bf=3)
        with av.open(path) as container:
            assert (np.diff([f.pts for f in container.decode(video=0)]) < 0).any()
        found, times = read_frames(path, 12)
        assert numbers(found) == np.linspace(0, total - 1, 12).astype(int).tolist() and (np.diff(times) > 0).all()


def result_of(results, name):
    """As it must be: ts seeks by file position, which is given up; in avi with B frames it is not tried."""
    return not results if name == "b.avi" else (results.pop() is None) == (name == "a.ts")


LONG = [("a.mp4", "libx264", {"bf": 3}), ("b.mp4", "libx264", {"x264-params": "open-gop=1"}),
        ("a.mkv", "libx264", {"bf": 3}), ("a.avi", "mpeg4", {}), ("a.ts", "libx264", {}), ("b.avi", "mpeg4", {"bf": 2}),
        ("a.webm", "libvpx", {"auto-alt-ref": 1, "lag-in-frames": 10, "deadline": "realtime"}),
        ("variable.mp4", "libx264", {"bf": 3})]


@pytest.mark.parametrize("name, codec, options", LONG)
def test_long_video_by_seeking_equals_whole_decoding(tmp_path, monkeypatch, name, codec, options):
    stamps = np.cumsum(np.random.default_rng(0).integers(1, 9, 1500)) if name == "variable.mp4" else np.arange(1500)
    path = write(tmp_path / name, range(1500), codec, stamps, **options)
    seeking, results = frames._decode_seeking, []
    for count, span in ((1, {}), (7, {}), (14, {}), (5, {"start": 30.5, "end": 34.0})):
        monkeypatch.setattr(frames, "_decode_seeking", lambda *args: results.append(seeking(*args)) or results[-1])
        found, times = read_frames(path, count, **span)
        assert result_of(results, name)
        if not span and name != "variable.mp4":
            assert numbers(found) == np.linspace(0, 1499, count).astype(int).tolist()
        assert np.allclose(times * 25, stamps[numbers(found)] - stamps[0], atol=0.03)
        monkeypatch.setattr(frames, "_decode_seeking", lambda *args: None)
        again, same_times = read_frames(path, count, **span)
        assert np.array_equal(found, again) and np.array_equal(times, same_times)


@pytest.mark.parametrize("name, codec, options", LONG)
def test_large_video_by_seeking_equals_whole_decoding(tmp_path, monkeypatch, name, codec, options):
    """Also where most frames are wanted and there is but one key frame, or one every ten frames."""
    seeking, results = frames._decode_seeking, []
    for gap, cores in ((10, 1), (10, 3), (250, 2)):
        monkeypatch.setattr(frames, "CORES", cores)
        path = write(tmp_path / name, range(100), codec, **{**options, "g": gap})
        for count in (1, 7, 60, 130):
            monkeypatch.setattr(frames, "WHOLE_PIXELS", 10**8)
            monkeypatch.setattr(frames, "_decode_seeking", lambda *args: pytest.fail("small videos are decoded whole"))
            whole, times = read_frames(path, count)
            assert numbers(whole) == np.linspace(0, 99, count).astype(int).tolist()
            monkeypatch.setattr(frames, "WHOLE_PIXELS", 100)
            monkeypatch.setattr(frames, "_decode_seeking", lambda *args: results.append(seeking(*args)) or results[-1])
            found, same_times = read_frames(path, count)
            assert result_of(results, name)
            assert np.array_equal(found, whole) and np.array_equal(times, same_times)


def test_the_limit_of_time_holds_in_every_thread(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", range(100), g=10)
    monkeypatch.setattr(frames, "WHOLE_PIXELS", 100)
    with frames._watched(path):
        packets, _, _, _, seekable = frames._scan(path)
        wanted = np.array([packets[0][0], packets[-1][0]])
        assert seekable and frames._decode_seeking(path, packets, wanted) is not None
        frames._reading.last = 0  # `until` grows with the packets
        assert frames._decode_seeking(path, packets, wanted) is None


@pytest.mark.parametrize("gap, refused", [(5, False), (50, True)])
def test_frames_that_cannot_be_decoded(tmp_path, gap, refused):
    """Without its first packet a video begins with frames that nothing can be made of, up to the next key frame."""
    source, path = write(tmp_path / "a.mkv", range(100), g=gap, bf=0), str(tmp_path / "b.mkv")
    with av.open(source) as container, av.open(path, "w") as target:
        stream = target.add_stream_from_template(container.streams.video[0])
        for number, packet in enumerate(container.demux(video=0)):
            if number and packet.size:
                packet.stream = stream
                target.mux(packet)
    if refused:
        with pytest.raises(VideoError, match="b.mkv: "):
            read_frames(path, 4)
    else:
        found, times = read_frames(path, 4)
        assert numbers(found)[0] == 5 and numbers(found)[-1] == 99 and times[0] == 0
        assert np.allclose(times * 25, np.array(numbers(found)) - numbers(found)[0], atol=0.03)


def test_images(tmp_path):
    for k in range(12):
        write(tmp_path / f"frame{k}.png", [k], "png", pix_fmt="rgb24")
    (tmp_path / "notes.txt").write_text("no image")
    found, times = read_frames(tmp_path, 4)
    assert numbers(found) == [0, 3, 7, 11] and times.tolist() == [0, 3, 7, 11]
    paths = [tmp_path / f"frame{k}.png" for k in (5, 3, 8)]
    assert numbers(read_frames(paths, 5)[0]) == [5, 5, 3, 3, 8]
    assert numbers(read_frames(tmp_path, 1, start=2, end=3)[0]) == [2]
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_text("no image")
    write(tmp_path / "large.png", [0], "png", pix_fmt="rgb24", size=(80, 40))
    for video, reason in ((tmp_path / "empty", "empty: no images"), ([], "no images"),
                          ([paths[0], tmp_path / "bad.jpg"], "bad.jpg: "),
                          ([paths[0], tmp_path / "none.jpg"], "none.jpg: no such file"),
                          ([paths[0], tmp_path / "large.png"], "large.png: frames of different sizes")):
        with pytest.raises(VideoError, match=reason):
            read_frames(video, 2)


def test_whatever_else_lies_in_a_folder_of_frames_is_no_frame(tmp_path):
    images = [write(tmp_path / f"{k}.png", [k], "png", pix_fmt="rgb24") for k in range(11)]
    for name in (".DS_Store", "times.txt", "._3.png"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "thumbs.png").mkdir()
    assert [str(f) for f in video_files(str(tmp_path))] == [str(f) for f in images]  # 2 before 10
    assert clip_seconds(Clip(str(tmp_path))) == (0, 11)
    assert numbers(read_frames(str(tmp_path), 11)[0]) == list(range(11))


def broken(tmp_path):
    """Files that must be refused, by name, each with words of the reason."""
    noise = np.random.default_rng(0).integers(0, 2048, 100)
    good = {name: open(write(tmp_path / f"good_{name}", noise, codec, **options), "rb").read() for name, codec, options
            in (("a.mp4", "libx264", {}), ("a.mkv", "libx264", {}), ("a.webm", "libvpx", {}), ("a.avi", "mpeg4", {}))}
    start = open(write(tmp_path / "start.mp4", noise, movflags="faststart"), "rb").read()
    middle = bytearray(start)
    middle[len(start) * 6 // 10 : len(start) * 7 // 10] = b"\xff" * (len(start) * 7 // 10 - len(start) * 6 // 10)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    half = lambda data: data[: len(data) // 2]
    return {
        "half.mp4": (half(good["a.mp4"]), "cannot be read"), "half.mkv": (half(good["a.mkv"]), "cut off"),
        "half.webm": (half(good["a.webm"]), "cut off"), "half.avi": (half(good["a.avi"]), "cut off"),
        "half_start.mp4": (start[: len(start) * 3 // 4], "cut off after [0-9]+ of 100 frames"),
        "middle.mp4": (bytes(middle), "broken after [0-9]+ of 100 frames"),
        "sound.mp4": ((tmp_path / "sound.mp4").read_bytes(), "no video stream"), "empty.mp4": (b"", "cannot be read"),
        "text.mp4": (b"version https://git-lfs.github.com/spec/v1\n" * 3, "cannot be read"),
        "list.mp4": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "cannot be read"),
        "random.mp4": (np.random.default_rng(1).bytes(9999), "cannot be read"),
        "new\nline.mp4": (b"", "new line.mp4: cannot be read"), "colon:a.mp4": (b"", "colon:a.mp4: cannot be read"),
    }


def test_broken_files(tmp_path):
    for name, (data, reason) in broken(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        for count in (1, 8):
            with pytest.raises(VideoError, match=reason) as caught:
                read_frames(tmp_path / name, count)
            assert "\n" not in str(caught.value) and " ".join(name.split()) in str(caught.value)
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "none.mp4", tmp_path / "pipe.mp4", "null\0byte.mp4", os.fsdecode(b"\xff.mp4")):
        with pytest.raises(VideoError):
            read_frames(path, 1)


def test_unusual_names(tmp_path):
    for name in ("a:b.mp4", "frame%03d.mp4", "a\nb ü?.mp4", "-i.mp4", "concat:x.mp4"):
        name = os.fsdecode(name.encode())  # these bytes, whatever the locale
        (tmp_path / name).write_bytes(open(write(tmp_path / "plain.mp4", range(4)), "rb").read())
        assert numbers(read_frames(tmp_path / name, 4)[0]) == [0, 1, 2, 3]


def test_one_frame_and_wrong_arguments(tmp_path):
    kinds = ("a.mp4", "libx264", "yuv420p"), ("a.gif", "gif", "gray"), ("a.jpg", "mjpeg", "yuvj420p")
    for name, codec, pix_fmt in kinds:
        path = write(tmp_path / name, [1234], codec, pix_fmt=pix_fmt)
        for sampling in ("linspace", "midpoint"):
            found, times = read_frames(path, 3, sampling=sampling)
            assert numbers(found) == [1234] * 3 and times.tolist() == [0, 0, 0]
    for wrong in ({"num_frames": 0}, {"num_frames": 1, "sampling": "random"}):
        with pytest.raises(ValueError):
            read_frames(path, **wrong)


def test_errors_of_any_kind(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", range(4))
    for error in (MemoryError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), OSError("I/O"), IndexError("x")):
        with monkeypatch.context() as patched:
            patched.setattr(frames, "_scan", lambda path: (_ for _ in ()).throw(error))
            with pytest.raises(VideoError, match="a.mp4: cannot be read"):
                read_frames(path, 2)


def test_nothing_on_stderr(tmp_path):
    for name, (data, _) in broken(tmp_path).items():
        (tmp_path / name).write_bytes(data)
    code = ("import sys, frames\nfor path in sys.argv[1:]:\n try: frames.read_frames(path, 4)\n"
            " except frames.VideoError as error: print(error)")
    names = [str(tmp_path / name) for name in broken(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=os.path.dirname(os.path.abspath(frames.__file__)),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == len(names)
