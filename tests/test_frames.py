import base64
import os
import re
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from inputs import frames
from inputs.frames import VideoError, clip_seconds, read_frames, video_files
from inputs.records import Clip


def write(path, numbers, codec="libx264", stamps=None, rotation=None, pix_fmt="yuv420p",
          size=(88, 48), last=1,
          **options):
    """A video at 25 ticks a second. Frame k tells numbers[k] by stripes, eleven bits, and is shown
    at stamps[k], the last one for so many ticks."""
    options = {"b": "4M", "g": 50, **options}
    of_file = {k: options.pop(k) for k in ("movflags",) if k in options}
    with av.open(str(path), "w", options=of_file) as container:
        stream = container.add_stream(codec, rate=25,
                                      options={k: str(v) for k, v in options.items()})
        (stream.width, stream.height), stream.pix_fmt = size, pix_fmt
        if rotation is not None:
            stream.set_display_rotation(rotation)
        packets = []
        for k, number in enumerate(numbers):
            stripes = (int(number) >> (np.arange(size[0]) * 11 // size[0])) & 1
            image = np.broadcast_to((stripes * 220 + 15).astype(np.uint8)[:, None],
                                    (size[1], size[0], 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image))
            frame.pts, frame.time_base = (k if stamps is None else int(stamps[k])), Fraction(1, 25)
            packets += stream.encode(frame)
        packets += stream.encode()
        if last > 1:
            end = max(packets, key=lambda packet: packet.pts)
            end.duration = int(last / 25 / end.time_base)
        container.mux(packets)
    return str(path)


def numbers(found):
    """The numbers that frames tell."""
    middles = (np.arange(11) * 2 + 1) * found.shape[2] // 22
    return ((found[:, found.shape[1] // 2, middles].mean(axis=2)
             > 127) << np.arange(11)).sum(axis=1).tolist()


def video_chatgpt(total, count):
    edges = [int(np.round(i * float(total - 1) / count)) for i in range(count + 1)]
    return [(a + b) // 2 for a, b in zip(edges, edges[1:])]


FORMATS = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx"),
           ("a.gif", "gif"),
           ("a.ts", "libx264"), ("a.h264", "libx264"), ("a.mov", "mpeg4")]


@pytest.mark.parametrize("name, codec", FORMATS)
@pytest.mark.parametrize("total", [50, 7])
def test_constant_rate(tmp_path, name, codec, total):
    path = write(tmp_path / name, range(total), codec,
                 pix_fmt="rgb8" if codec == "gif" else "yuv420p")
    for count in (1, 2, 4, 8, 50, 60):
        for sampling, expected in (("linspace",
                                    np.linspace(0, total - 1, count).astype(int).tolist()),
                                   ("midpoint", video_chatgpt(total, count))):
            found, times = read_frames(path, count, sampling=sampling)
            assert found.shape == (count, 48, 88, 3) and found.dtype == np.uint8
            assert (numbers(found) == expected
                    and np.allclose(times, np.array(expected) / 25, atol=0.0011))


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
    # the first stamp is 40 s
    path = write(tmp_path / "a.mp4", range(50), stamps=np.arange(50) + 1000)
    found, times = read_frames(path, 3, start=0.4, end=0.8)
    assert numbers(found) == [10, 15, 20] and np.allclose(times, [0.4, 0.6, 0.8])
    assert numbers(read_frames(path, 2, start=1)[0]) == [25, 49]
    assert numbers(read_frames(path, 2, end=0.99)[0]) == [0, 24]  # shown at 0.99 s
    assert numbers(read_frames(path, 2, start=0.5, end=0.5)[0]) == [12, 12]
    for start, end in ((-1, 1), (1, 0.5), (0, 2.2), (3, None), (float("nan"), 1),
                       (0, float("nan"))):
        with pytest.raises(VideoError, match="a.mp4: no range"):
            read_frames(path, 2, start=start, end=end)


@pytest.mark.parametrize("angle", [0, 90, 180, -90])
def test_rotation(tmp_path, angle):
    # the left side is bright
    found = read_frames(write(tmp_path / "a.mp4", [0b11111] * 3, rotation=angle), 1)[0][0]
    assert found.shape == ((48, 88, 3) if angle in (0, 180) else (88, 48, 3))
    # Turned counterclockwise by 90 degrees, the left side becomes the lower side.
    bright = {0: found[:, :20], 90: found[-20:], 180: found[:, -20:], -90: found[:20]}[angle]
    dark = {0: found[:, -20:], 90: found[:20], 180: found[:, :20], -90: found[-20:]}[angle]
    assert bright.min() > 200 and dark.max() < 50


CORNERS = np.repeat(np.repeat(np.array([[20, 90], [160, 240]], np.uint8), 24, 0), 44,
                    1)[:, :, None].repeat(3, 2)


def looks_like(found, expected):
    return found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 10


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                                    (0, 1, 1, 0), (0, -1, -1, 0), (0, 1, -1, 0), (0, -1, 1, 0)])
def test_every_display_matrix(tmp_path, suffix, matrix):
    """Its definition: the point (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "4"})
        (stream.width, stream.height), stream.pix_fmt = (88, 48), "yuv420p"
        stream.set_display_matrix([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(CORNERS)))
        container.mux(stream.encode())
    y, x = np.mgrid[:48, :88]
    to_x, to_y = a * x + c * y, b * x + d * y
    expected = np.zeros((88, 48, 3) if b else (48, 88, 3), np.uint8)
    expected[to_y - to_y.min(), to_x - to_x.min()] = CORNERS
    assert looks_like(read_frames(tmp_path / f"a.{suffix}", 1)[0][0], expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_orientation_of_images(tmp_path, suffix):
    upright = {1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1],
               5: CORNERS.transpose(1, 0, 2), 6: np.rot90(CORNERS, -1),
               # as EXIF defines them
               7: CORNERS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(CORNERS)}
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(CORNERS).save(tmp_path / f"{orientation}.{suffix}", exif=exif)
        assert looks_like(read_frames([tmp_path / f"{orientation}.{suffix}"], 1)[0][0],
                          expected), orientation


def test_odd_size_alpha_and_ten_bit(tmp_path):
    for name, codec, pix_fmt in (("a.mp4", "libx264", "yuv444p"),
                                 ("b.mp4", "libx264", "yuv420p10le"),
                                 ("c.mov", "png", "rgba"), ("d.mkv", "ffv1", "gray16le")):
        size = (88, 48) if name == "b.mp4" else (77, 21)
        found, _ = read_frames(write(tmp_path / name, range(20), codec, pix_fmt=pix_fmt, size=size),
                               4)
        assert found.shape == (4, size[1], size[0], 3) and numbers(found) == [0, 6, 12, 19]


def test_stamps_that_run_backwards(tmp_path):
    """AVI has no display stamps: frames with B frames between come out with stamps such as 1, 3, 2,
    4, 6, 5."""
    for total in (100, 1200):
        path = write(tmp_path / "a.avi", range(total), bf=3)
        with av.open(path) as container:
            assert (np.diff([f.pts for f in container.decode(video=0)]) < 0).any()
        found, times = read_frames(path, 12)
        assert (
            numbers(found) == np.linspace(0, total - 1, 12).astype(int).tolist()
            and (np.diff(times) > 0).all()
        )


def result_of(results, name):
    """As it must be: ts seeks by file position, which is given up; in avi with B frames it is not
    tried."""
    return not results if name == "b.avi" else (results.pop() is None) == (name == "a.ts")


LONG = [("a.mp4", "libx264", {"bf": 3}), ("b.mp4", "libx264", {"x264-params": "open-gop=1"}),
        ("a.mkv", "libx264", {"bf": 3}), ("a.avi", "mpeg4", {}), ("a.ts", "libx264", {}),
        ("b.avi", "mpeg4", {"bf": 2}),
        ("a.webm", "libvpx", {"auto-alt-ref": 1, "lag-in-frames": 10, "deadline": "realtime"}),
        ("variable.mp4", "libx264", {"bf": 3})]


@pytest.mark.parametrize("name, codec, options", LONG)
def test_long_video_by_seeking_equals_whole_decoding(tmp_path, monkeypatch, name, codec, options):
    stamps = (np.cumsum(np.random.default_rng(0).integers(1, 9, 1500)) if name == "variable.mp4"
              else np.arange(1500))
    path = write(tmp_path / name, range(1500), codec, stamps, **options)
    seeking, results = frames._decode_seeking, []
    for count, span in ((1, {}), (7, {}), (14, {}), (5, {"start": 30.5, "end": 34.0})):
        monkeypatch.setattr(frames, "_decode_seeking",
                            lambda *args: results.append(seeking(*args)) or results[-1])
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
            monkeypatch.setattr(frames, "_decode_seeking",
                                lambda *args: pytest.fail("small videos are decoded whole"))
            whole, times = read_frames(path, count)
            assert numbers(whole) == np.linspace(0, 99, count).astype(int).tolist()
            monkeypatch.setattr(frames, "WHOLE_PIXELS", 100)
            monkeypatch.setattr(frames, "_decode_seeking",
                                lambda *args: results.append(seeking(*args)) or results[-1])
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


# --- whole files that look as if something were missing, and those that are cut off ---------------
SLOW_START, SLOW_END = [0, 25, *range(50, 110)], [*range(60), 100, 200, 350]
PAUSES = [0, 1, 2, 90, 91, 92, 93, 200, 201, 202, 300]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
@pytest.mark.parametrize("b_frames", [0, 3])
def test_screen_recordings(tmp_path, suffix, b_frames):
    """A frame stays until something changes. With B frames the first ones tell the wrong rate."""
    for number, stamps in enumerate((SLOW_START, SLOW_END, PAUSES)):
        codec, options = ("libvpx", {}) if suffix == "webm" else ("libx264", {"bf": b_frames})
        path = write(tmp_path / f"{number}.{suffix}", range(len(stamps)), codec, stamps, **options)
        found, times = read_frames(path, 9)
        asked = np.linspace(0, stamps[-1], 9)
        assert numbers(found) == [sum(s <= t for s in stamps) - 1 for t in asked]
        assert np.allclose(times * 25, np.array(stamps)[numbers(found)], atol=0.03)
        # with B frames the last packet of an mp4 is not that of the last frame
        length = (stamps[-1] + 1) / 25
        assert (-0.01 < clip_seconds(Clip(path))[1] - length < 0.01 + np.diff(stamps).max() / 25
                * (b_frames > 0))


@pytest.mark.parametrize("name, codec",
                         [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.mp4", "libx264")])
@pytest.mark.parametrize("count", [1, 30])
def test_a_last_frame_that_stays(tmp_path, name, codec, count):
    """Only the head of a Matroska file tells for how long: 20 s more."""
    path = write(tmp_path / name, range(count), codec, last=500)
    found, times = read_frames(path, 3)
    assert numbers(found) == [0, (count - 1) // 2, count - 1] and times[-1] == pytest.approx(
        (count - 1) / 25, abs=0.01
    )
    assert clip_seconds(Clip(path)) == (0, pytest.approx((count + 499) / 25, abs=0.05))
    assert numbers(read_frames(path, 2, start=5, end=15)[0]) == [count - 1] * 2
    data = open(path, "rb").read()
    # as a browser records: sizes that are not known, and a length that a script adds later
    if name != "a.mp4":
        live = bytearray(data)
        for part in (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"):
            place = data.rfind(part) + 4
            width = 9 - live[place].bit_length()
            live[place : place + width] = ((2 << 7 * width) - 1).to_bytes(width, "big")
        assert len(live) == len(data) and live != data
        (tmp_path / f"live_{name}").write_bytes(live)
        assert np.array_equal(read_frames(tmp_path / f"live_{name}", 3)[0], found)
    for kept in (0.4, 0.6, 0.9) if count > 1 else ():
        for broken in (data[: int(kept * len(data))],
                       data[: int(kept * len(data))].ljust(len(data), b"\0")):
            (tmp_path / f"cut_{name}").write_bytes(broken)
            with pytest.raises(VideoError, match=f"cut_{name}: "):
                read_frames(tmp_path / f"cut_{name}", 3)


def test_an_avi_that_ends_in_repeated_frames(tmp_path):
    """Chunks without a byte: the frame before is shown again."""
    data = bytearray(open(write(tmp_path / "a.avi", range(50), "mpeg4"), "rb").read())
    movi, index = data.find(b"movi"), data.rfind(b"idx1")
    (old,) = struct.unpack_from("<I", data, index + 4)
    rows = b"".join(b"00dc" + struct.pack("<III", 0, index - movi + 8 * k, 0) for k in range(100))
    head, table = data[:index], data[index + 8 : index + 8 + old]
    data = (head + b"00dc\0\0\0\0" * 100 + b"idx1" + struct.pack("<I", old + len(rows)) + table
            + rows)
    for place, value in ((4, len(data) - 8), (movi - 4, index - movi + 800),
                         (data.find(b"avih") + 24, 150),
                         (data.find(b"strh") + 40, 150)):
        struct.pack_into("<I", data, place, value)
    (tmp_path / "b.avi").write_bytes(data)
    assert numbers(read_frames(tmp_path / "b.avi", 2)[0]) == [0, 49]
    assert clip_seconds(Clip(str(tmp_path / "b.avi")))[1] == pytest.approx(6)
    for kept in (0.5, 0.8, 1):  # of the frames; each time nothing of what comes behind them
        (tmp_path / "c.avi").write_bytes(data[: movi + int(kept * (index - movi))])
        with pytest.raises(VideoError, match="c.avi: cut off"):
            read_frames(tmp_path / "c.avi", 2)


def boxes(data, *names, start=0, end=None):
    """(start, size) of the first mp4 box under these names."""
    end = len(data) if end is None else end
    while start < end:
        size, name = struct.unpack_from(">I4s", data, start)
        if name == names[0].encode():
            return ((start, size) if len(names) == 1
                    else boxes(data, *names[1:], start=start + 8, end=start + size))
        start += size


def edited(path, edits):
    """Give an mp4 whose last box is moov another edit list: (ticks to show, first tick or None for
    nothing) each."""
    data, delay = bytearray(open(path, "rb").read()), 0
    (movie,) = struct.unpack_from(">I", data, boxes(data, "moov", "mvhd")[0] + 20)
    (media,) = struct.unpack_from(">I", data, boxes(data, "moov", "trak", "mdia", "mdhd")[0] + 20)
    if old := boxes(data, "moov", "trak", "edts"):  # as B frames need one
        (delay,) = struct.unpack_from(">i", data, old[0] + 28)
        del data[old[0] : sum(old)]
    rows = b"".join(struct.pack(">IiI", n * movie // 25,
                                -1 if first is None else first * media // 25 + delay, 1 << 16)
                    for n, first in edits)
    box = struct.pack(">I4sI4sII", 24 + len(rows), b"edts", 16 + len(rows), b"elst", 0,
                      len(edits)) + rows
    head = sum(boxes(data, "moov", "trak", "tkhd"))
    data[head:head] = box
    for place in (boxes(data, "moov")[0], boxes(data, "moov", "trak")[0]):
        (size,) = struct.unpack_from(">I", data, place)
        struct.pack_into(">I", data, place, size + len(box) - (old[1] if old else 0))
    open(path, "wb").write(data)
    return path


EDITS = {"start": [(70, 30)], "within a group": [(63, 37)], "end": [(50, 0)],
         "most of it": [(12, 30)],
         "one frame": [(1, 31)], "delay": [(40, None), (100, 0)],
         "long delay": [(750, None), (100, 0)],
         "delay and part": [(15, None), (25, 63)], "all": [(150, 0)],
         "two parts": [(25, 0), (25, 50)], "in another order": [(25, 50), (25, 0)]}


@pytest.mark.parametrize("gap", [10, 50, 250])
@pytest.mark.parametrize("case", EDITS)
def test_edit_lists(tmp_path, monkeypatch, case, gap):
    """What an edit list hides is not missing, and is not part of the video."""
    expected = [k for n, first in EDITS[case] if first is not None for k in range(first, first + n)]
    expected = [k for k in expected if k < 100]
    # with B-frames and several edits ffmpeg errs by a frame
    for b_frames in (0, 3) if len(EDITS[case]) == 1 or None in EDITS[case][0] else (0,):
        path = edited(write(tmp_path / "a.mp4", range(100), bf=b_frames, g=gap), EDITS[case])
        for pixels in (10**8, 100):  # all decoded, and by seeking
            monkeypatch.setattr(frames, "WHOLE_PIXELS", pixels)
            found, times = read_frames(path, len(expected))
            assert numbers(found) == expected
            assert np.allclose(times * 25, np.arange(len(expected)), atol=0.03)
            assert clip_seconds(Clip(path))[1] == pytest.approx(len(expected) / 25, abs=0.01)


def test_fragments_of_a_stream(tmp_path):
    """Their header ends where decoding does: with B frames later than the last picture, and with
    the first fragments left out (a part of a stream) still as late."""
    flags = "frag_keyframe+empty_moov"
    for number, more in enumerate(("", "+delay_moov", "+negative_cts_offsets")):
        path = write(tmp_path / f"{number}.mp4", range(60), stamps=SLOW_START[:60],
                     movflags=flags + more, bf=3)
        assert numbers(read_frames(path, 2)[0]) == [0, 59]
    path = write(tmp_path / "a.mp4", range(80), g=20, sc_threshold=0,
                 movflags=f"{flags}+default_base_moof")
    data = open(path, "rb").read()
    parts = [found.start() - 4 for found in re.finditer(b"moof", data)]
    assert len(parts) == 4
    (tmp_path / "late.mp4").write_bytes(data[: parts[0]] + data[parts[2] :])
    found, times = read_frames(tmp_path / "late.mp4", 3)
    assert numbers(found) == [40, 59, 79] and np.allclose(times * 25, [0, 19, 39], atol=0.03)
    (tmp_path / "cut.mp4").write_bytes(data[: parts[0]] + data[parts[2] : parts[3] + 600])
    with pytest.raises(VideoError, match="cut off after"):
        read_frames(tmp_path / "cut.mp4", 3)


@pytest.mark.parametrize("options",
                         [{"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"},
                                     {"movflags": "faststart", "bf": 0}])
def test_an_mp4_cut_between_two_frames(tmp_path, options):
    """Nothing is damaged then: what is missing stands in the table."""
    path = write(tmp_path / "a.mp4", range(len(SLOW_END)), stamps=SLOW_END, g=20, **options)
    assert numbers(read_frames(path, 2)[0]) == [0, len(SLOW_END) - 1]
    data = open(path, "rb").read()
    with av.open(path) as container:
        ends = [entry.pos for entry in container.streams.video[0].index_entries]
    for kept in (15, 30, 50, 58):
        (tmp_path / "b.mp4").write_bytes(data[: ends[kept]])
        with pytest.raises(VideoError, match=f"cut off after {kept} of "):
            read_frames(tmp_path / "b.mp4", 2)


# as pages on the web carry it: 8 x 8, one frame without a duration
TINY = ("GkXfo0AgQoaBAUL3gQFC8oEEQvOBCEKCQAR3ZWJtQoeBAkKFgQIYU4BnQI0VSalmQCgq17FAAw9CQE2AQAZ3aGFt"
        "bXlXQUAGd2hhbW15RIlACECPQAAAAAAAFlSua0AxrkAu14EBY8WBAZyBACK1nEADdW5khkAFVl9WUDglhohAA1ZQ"
        "OIOBAeBABrCBCLqBCB9DtnVAIueBAKNAHIEAAIAwAQCdASoIAAgAAUAmJaQAA3AA/vz0AAA=")


def test_a_tiny_webm(tmp_path):
    data = base64.b64decode(TINY)
    (tmp_path / "a.webm").write_bytes(data)
    found, times = read_frames(tmp_path / "a.webm", 3)
    assert len(data) == 185 and found.shape == (3, 8, 8, 3) and times.tolist() == [0, 0, 0]
    assert clip_seconds(Clip(str(tmp_path / "a.webm"))) == (0, 1)
    assert len(read_frames(tmp_path / "a.webm", 2, start=0.2, end=0.9)[0]) == 2
    for kept in (20, 60, 140, 170, 180, 184):
        (tmp_path / "b.webm").write_bytes(data[:kept])
        with pytest.raises(VideoError):
            read_frames(tmp_path / "b.webm", 3)


@pytest.mark.parametrize("gap, refused", [(5, False), (50, True)])
def test_frames_that_cannot_be_decoded(tmp_path, gap, refused):
    """Without its first packet a video begins with frames that nothing can be made of, up to the
    next key frame."""
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
                          ([paths[0], tmp_path / "large.png"],
                           "large.png: frames of different sizes")):
        with pytest.raises(VideoError, match=reason):
            read_frames(video, 2)


@pytest.mark.parametrize("suffix",
                         ["webp", "bmp", "png", "jpeg", "JPG", "jfif", "tif", "TIFF", "ppm", "pgm"])
def test_every_kind_of_image(tmp_path, suffix):
    for k in range(11):
        picture = Image.open(write(tmp_path.parent / f"{tmp_path.name}.png", [k], "png",
                                   pix_fmt="rgb24"))
        picture.convert("L" if suffix == "pgm" else "RGB").save(tmp_path / f"{k}.{suffix}")
    assert ([os.path.basename(f) for f in video_files(str(tmp_path))]
            == [f"{k}.{suffix}" for k in range(11)])
    assert numbers(read_frames(str(tmp_path), 11)[0]) == list(range(11))


def test_whatever_else_lies_in_a_folder_of_frames_is_no_frame(tmp_path):
    images = [write(tmp_path / f"{k}.png", [k], "png", pix_fmt="rgb24") for k in range(11)]
    for name in (".DS_Store", "Thumbs.db", "times.txt", "._3.png", ".4.webp"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "thumbs.png").mkdir(), (tmp_path / "__MACOSX").mkdir()
    assert [str(f) for f in video_files(str(tmp_path))] == [str(f) for f in images]  # 2 before 10
    assert clip_seconds(Clip(str(tmp_path))) == (0, 11)
    assert numbers(read_frames(str(tmp_path), 11)[0]) == list(range(11))


def broken(tmp_path):
    """Files that must be refused, by name, each with words of the reason."""
    noise = np.random.default_rng(0).integers(0, 2048, 100)
    good = {name: open(write(tmp_path / f"good_{name}", noise, codec, **options), "rb").read()
            for name, codec, options
            in (("a.mp4", "libx264", {}), ("a.mkv", "libx264", {}), ("a.webm", "libvpx", {}),
                ("a.avi", "mpeg4", {}))}
    start = open(write(tmp_path / "start.mp4", noise, movflags="faststart"), "rb").read()
    middle = bytearray(start)
    middle[len(start) * 6 // 10 : len(start) * 7 // 10] = b"\xff" * (
        len(start) * 7 // 10 - len(start) * 6 // 10
    )
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    half = lambda data: data[: len(data) // 2]
    return {
        "half.mp4": (half(good["a.mp4"]), "cannot be read"),
        "half.mkv": (half(good["a.mkv"]), "cut off"),
        "half.webm": (half(good["a.webm"]), "cut off"),
        "half.avi": (half(good["a.avi"]), "cut off"),
        "half_start.mp4": (start[: len(start) * 3 // 4], "cut off after [0-9]+ of 100 frames"),
        "middle.mp4": (bytes(middle), "broken after [0-9]+ of 100 frames"),
        "sound.mp4": ((tmp_path / "sound.mp4").read_bytes(), "no video stream"),
        "empty.mp4": (b"", "cannot be read"),
        "text.mp4": (b"version https://git-lfs.github.com/spec/v1\n" * 3, "cannot be read"),
        "list.mp4": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "cannot be read"),
        "random.mp4": (np.random.default_rng(1).bytes(9999), "cannot be read"),
        "new\nline.mp4": (b"", "new line.mp4: cannot be read"),
        "colon:a.mp4": (b"", "colon:a.mp4: cannot be read"),
    }


def test_broken_files(tmp_path):
    for name, (data, reason) in broken(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        for count in (1, 8):
            with pytest.raises(VideoError, match=reason) as caught:
                read_frames(tmp_path / name, count)
            assert "\n" not in str(caught.value) and " ".join(name.split()) in str(caught.value)
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "none.mp4", tmp_path / "pipe.mp4", "null\0byte.mp4",
                 os.fsdecode(b"\xff.mp4")):
        with pytest.raises(VideoError):
            read_frames(path, 1)


def test_unusual_names(tmp_path):
    for name in ("a:b.mp4", "frame%03d.mp4", "a\nb ü?.mp4", "-i.mp4", "concat:x.mp4"):
        name = os.fsdecode(name.encode())  # these bytes, whatever the locale
        (tmp_path / name).write_bytes(open(write(tmp_path / "plain.mp4", range(4)), "rb").read())
        assert numbers(read_frames(tmp_path / name, 4)[0]) == [0, 1, 2, 3]


def test_one_frame_and_wrong_arguments(tmp_path):
    kinds = [("a.gif", "gif", "gray"), ("a.jpg", "mjpeg", "yuvj420p"),
             ("a.webm", "libvpx", "yuv420p"),
             ("a.avi", "mpeg4", "yuv420p"), ("b.mkv", "ffv1", "yuv420p"),
             ("b.avi", "mjpeg", "yuvj420p")]
    kinds += [(f"a.{suffix}", "libx264", "yuv420p")
              for suffix in ("mp4", "mov", "mkv", "ts", "m4v", "flv")]
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
    for error in (MemoryError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), OSError("I/O"),
                  IndexError("x")):
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
    done = subprocess.run([sys.executable, "-c", code, *names],
                          cwd=os.path.dirname(os.path.abspath(frames.__file__)),
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0 and done.stderr == ""
            and len(done.stdout.splitlines()) == len(names))
