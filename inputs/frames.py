"""Frames out of any video. What is broken is refused with one line; check_videos.py does that for a
whole folder."""

import contextlib
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition

# ffmpeg's own messages stay off stderr; what goes wrong is said by VideoError
av.logging.set_level(None)
IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm",
          ".pgm")
SLOW, SLOWEST, STALL = 30.0, 600.0, 30.0  # seconds: see _watched
PIXELS, BYTES = 2**26, 2**32  # of one frame, 8192 x 8192; of all frames read of a video
CORES = min(os.cpu_count(), 16)  # threads that decode
THREADED = 2**17  # pixels of a frame from which ffmpeg's own threads share the work
# the parts of a Matroska file: head, all the rest, cluster of frames; then those that are stepped
# over
MATROSKA = [bytes.fromhex(name)
            for name in ("1a45dfa3 18538067 1f43b675 114d9b74 1549a966 1654ae6b 1c53bb6b 1941a469 "
                                             "1043a770 1254c367 e7 a3 a0 ab a7 af 5854 ec "
                                             "bf").split()]
# up to so many frames and pixels all is decoded, so that damage anywhere is found
WHOLE, WHOLE_PIXELS = 1000, 10**8


@classmethod
def _unnamed(cls, value):
    """PyAV has no name for some of what ffmpeg attaches to a frame, such as EXIF (31). Its error
    would hide all."""
    member = object.__new__(cls)
    member._name_, member._value_ = f"TYPE_{value}", value
    return member


Type._missing_ = _unnamed


class VideoError(Exception):
    """One line that names the file and says why it, or the asked part of it, cannot be read."""


def read_frames(video, num_frames, start=None, end=None, sampling="linspace"):
    """Read ``num_frames`` frames spread evenly over the time of a video.

    ``video`` is a video file, a list of image files (the frames of one video), or a folder of
    images (``IMAGES``) in natural order; images count as one per second. ``start`` and ``end`` are
    seconds after the first frame.

    ``linspace``: the frames shown at ``num_frames`` times from the first to the last frame (or
    start to end), both included; at a constant frame rate exactly the frames ``np.linspace(0, N -
    1, num_frames).astype(int)``. ``midpoint``: the middles of ``num_frames`` equal segments; at a
    constant rate exactly those of Video-ChatGPT.

    Returns the frames, uint8 (F, H, W, 3) RGB and upright, and their times, float (F,) seconds
    after the first frame. F is always ``num_frames``: a video of fewer frames repeats some.
    Whatever is wrong with a file is a VideoError. Of longer and larger videos than ``WHOLE`` only
    the needed parts are decoded: damage elsewhere can go unnoticed."""
    if num_frames < 1 or sampling not in ("linspace", "midpoint"):
        raise ValueError("num_frames must be at least 1, sampling linspace or midpoint: "
                         f"{num_frames}, {sampling!r}")
    is_list = isinstance(video, (list, tuple))
    name, images = ("list of images", video) if is_list else (video, None)
    try:
        if not is_list and os.path.isdir(video):
            images = image_files(video)
        with _watched(name):
            if images is None:
                return _read_video(video, num_frames, start, end, sampling)
            if not images:
                raise VideoError("no images")
            ranks = _choose(np.arange(len(images)), 1.0, len(images), num_frames, start, end,
                            sampling)
            out = None
            for rank in np.unique(ranks):
                name = images[rank]
                out = _store(out, _decode_all(name, np.zeros(1, int), 1)[0][0], ranks == rank)
            return out, ranks.astype(float)
    # besides FFmpegError, PyAV raises OSError, ValueError, MemoryError, UnicodeError, ...
    except Exception as exc:
        raise _video_error(name, exc) from exc


def clip_seconds(clip):
    """(start, end) of a clip in seconds; of the whole video where it has none. Raises
    VideoError."""
    end = clip.end
    try:
        if end is None:
            still = isinstance(clip.path, tuple) or os.path.isdir(clip.path)
            with _watched(clip.path):
                end = float(len(video_files(clip.path))) if still else _scan(clip.path)[3]
    except Exception as exc:
        raise _video_error(clip.path, exc) from exc
    return clip.start or 0.0, end


def video_files(path):
    """The files that a video's content lies in: itself, or its images."""
    if isinstance(path, (list, tuple)):
        return list(path)
    return image_files(path) if os.path.isdir(path) else [path]


def image_files(folder):
    """The frames in a folder: its visible images in natural order, 2 before 10; nothing else
    counts."""
    names = [f.name for f in os.scandir(folder) if is_frame(f.name) and not f.is_dir()]
    names.sort(key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)])
    return [os.path.join(folder, name) for name in names]


def is_frame(name):
    """Is a file of this name a frame? Hidden ones are none: a Mac puts ._1.jpg beside 1.jpg."""
    return not name.startswith(".") and name.lower().endswith(IMAGES)


# of the video that this thread reads: .until, .last, .beats; see _watched
_reading = threading.local()


@contextlib.contextmanager
def _watched(name):
    """Limits the processor's time of every thread that reads a video: SLOW seconds and a tenth of
    one per packet, at most SLOWEST; so a busy machine changes nothing. Between two packets or
    frames that is a VideoError. A decoder that gives no sign of life for STALL seconds cannot be
    stopped from within its process: a line names the video and the process ends, so that nobody
    waits for it in vain."""
    over, now, beats = threading.Event(), time.thread_time(), [0]
    _reading.until, _reading.last, _reading.beats = now + SLOW, now + SLOWEST, beats

    def watch():
        quiet, seen = 0, 0
        while not over.wait(STALL / 10):  # in tenths: a process that was suspended does not hang
            quiet, seen = quiet + 1 if beats[0] == seen else 0, beats[0]
            if quiet >= 10:
                why = VideoError(f"the decoder hangs for {STALL:.0f} s, this process ends; take "
                                 "the file away")
                os.write(2,
                         f"rank {os.environ.get('RANK', 0)}: {_video_error(name, why)}\n".encode())
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _tick(more=0.0):
    """A sign of life, once per packet and frame. more: seconds by which the limit grows."""
    _reading.beats[0] += 1
    _reading.until += more
    if time.thread_time() > min(_reading.until, _reading.last):
        raise VideoError("takes too long to decode")


def _video_error(name, exc):
    words = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    words = words if isinstance(exc, VideoError) else f"cannot be read ({words})"
    return VideoError(one_line(f"{name}: {words}"))


def one_line(text):
    """A text as one line that can be printed: file names may hold line breaks and bytes that are no
    text."""
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode()


def _read_video(path, num_frames, start, end, sampling):
    """Choose frames by the time stamps of the packets, which cost no decoding, then decode what
    these frames need."""
    packets, base, rate, length, seekable = _scan(path)
    # The stamps of the shown frames in display order. Raw streams have none: there frames are
    # numbered.
    ticks = [pts for pts, _, shown in packets if shown]
    stamped = None not in ticks
    ticks, base = (np.sort(ticks), base) if stamped else (np.arange(len(ticks)), 1 / rate)
    ranks = _choose(ticks, base, length, num_frames, start, end, sampling)
    out = None
    if seekable:
        out = _decode_seeking(path, packets, ticks[ranks])
    if out is None:
        out, seen = _decode_all(path, ranks, len(ticks))
        seen = np.sort(seen) if stamped and None not in seen else np.arange(len(seen))
        if not np.array_equal(seen, ticks):
            # Not one frame per packet (fields, or frames whose references are missing at the
            # start): as long as the frames cover the time, they are the video. The choice is made
            # anew among them.
            _check_covered((seen[-1] - seen[0]) * base, (ticks[-1] - ticks[0]) * base, 0)
            ticks, ranks = seen, _choose(seen, base, length, num_frames, start, end, sampling)
            out, _ = _decode_all(path, ranks, len(ticks))
    return out, (ticks[ranks] - ticks[0]) * base


def _choose(ticks, base, length, num_frames, start, end, sampling):
    """Numbers (in display order) of the frames to take. ``ticks`` are of ``base`` seconds,
    ``length`` is in seconds."""
    start, end = 0 if start is None else start, length if end is None else end
    # a tenth of a second of grace for rounded annotations
    if not 0 <= start <= end <= length + 0.1:
        raise VideoError(f"no range of {start} to {end} s in a video of {length:.2f} s")
    # Clocks round: 30 frames a second show as steps of 33 and 34 ms. Stamps that lie within one
    # tick of a straight line are a constant rate, and time is counted in whole frames: no rounding
    # then makes a target miss its frame.
    count = np.arange(len(ticks))
    step = (ticks[-1] - ticks[0]) / max(len(ticks) - 1, 1)
    constant = step > 0 and np.abs(ticks[0] + step * count - ticks).max() <= min(1, step / 3)
    clock, unit = (count, base * step) if constant else (ticks - ticks[0], base)
    first, last = np.minimum(np.round(np.array([start, end]) / unit, 6), clock[-1])
    targets = np.linspace(first, last, num_frames)
    if sampling == "midpoint":  # segments go from frame to frame; of these the middle
        edges = np.rint(np.interp(np.linspace(first, last, num_frames + 1), clock,
                                  count)).astype(int)
        targets = (clock[edges[:-1]] + clock[edges[1:]]) / 2
    # the last frame that is not later than the target
    return np.interp(targets, clock, count).astype(int)


def _open(path, threads):
    """A container (closed by ``with``) and its video stream: the one marked default, else the
    first; what is decoded of it is decoded by so many threads."""
    if not os.path.isfile(path):  # a pipe or a device could hang
        raise VideoError("no such file")
    # "file:" keeps a name like "a:b.mp4" from being taken for an address, the whitelist keeps
    # playlists off the net.
    container = av.open(f"file:{os.fspath(path)}", options={"protocol_whitelist": "file"},
                        metadata_errors="ignore")
    # no cover pictures
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        container.close()
        raise VideoError("no video stream")
    stream = next((s for s in streams if s.disposition & Disposition.default), streams[0])
    if stream.width * stream.height > PIXELS:
        container.close()
        raise VideoError(f"frames of {stream.width} x {stream.height} are too large")
    stream.codec_context.options = {"max_pixels": str(PIXELS)}  # they may grow on the way
    # Several frames at once; but of small ones each is decoded in less time than it takes to hand
    # it over and back.
    stream.thread_type = "AUTO" if stream.width * stream.height >= THREADED else "NONE"
    stream.codec_context.thread_count = threads
    return container, stream


def _scan(path):
    """Read the packets without decoding. Returns (pts, is key, is shown) of each in file order, the
    seconds per tick, the frame rate, the length in seconds, and whether to seek in it. Refuses a
    file that holds clearly less than its header promises."""
    packets, ends = [], {}  # the last tick of every stream
    early = late = 0  # ticks of decoding; they count from zero but for what an edit list shifts
    container, stream = _open(path, 1)
    with container:
        base, rate = float(stream.time_base), float(stream.average_rate or stream.guessed_rate
                                                    or 25)
        video, is_mp4 = stream.index, "mp4" in container.format.name
        for number, packet in enumerate(container.demux()):
            if number % 64 == 0:
                _tick(more=6.4)
            index, pts = packet.stream_index, packet.pts
            if not packet.size:
                continue
            # Edit lists mark packets as discard: the decoder needs them, but they are not part of
            # the video.
            if pts is not None and not packet.is_discard:
                ends[index] = max(ends.get(index, pts), pts + (packet.duration or 0))
            if index == video:
                dts = packet.dts or 0
                early, late = min(early, dts), max(late, dts + (packet.duration or 0))
                if packet.is_corrupt:  # the file ends within it
                    raise VideoError(f"cut off after {len(packets)} of "
                                     f"{max(stream.frames, len(packets) + 1)} frames")
                packets.append((pts, packet.is_keyframe, not packet.is_discard))
        if container.format.name == "gif" and not _tail(path).endswith(b";"):  # it marks its end
            raise VideoError(f"cut off after {len(packets)} frames")
        # The table of an mp4 has a row for every packet, where an edit list or fragments have
        # changed it as well.
        if is_mp4 and len(stream.index_entries) > len(packets):
            told = sum(entry.size > 0 for entry in stream.index_entries)
            if len(packets) < told * 0.95:
                raise VideoError(f"cut off after {len(packets)} of {told} frames")
        shown = [pts for pts, _, is_shown in packets if is_shown]
        if not shown:
            raise VideoError("no frames")
        stamps = [pts for pts, _, _ in packets]
        if None in stamps:
            return packets, base, rate, len(shown) / rate, False
        length = (ends[video] - min(shown)) * base
        # avi tells the length of the stream, mkv and webm only that of the file, which may be of
        # its sound. Of an mp4 with a table no length is asked: with B frames or an edit list it can
        # be off by seconds.
        covered = promised = 0
        if stream.duration is not None:
            if not (is_mp4 and stream.frames):
                start = min(shown) if stream.start_time is None else min(*shown, stream.start_time)
                covered = (ends[video] - start) * base
                if is_mp4:  # of fragments it is the end in the order of decoding
                    covered = (max(ends[video], late) - early) * base
                promised = max(stream.duration * base, stream.frames / rate)
        elif container.duration is not None:
            covered = max(end * float(container.streams[index].time_base)
                          for index, end in ends.items())
            promised = container.duration / av.time_base
        try:
            _check_covered(covered, promised, np.diff(np.sort(shown)).max(initial=0) * base)
        except VideoError:
            if not _is_whole(path):
                raise
            length += promised - covered  # for so long the last frame stays
        large = len(packets) > WHOLE or len(packets) * stream.width * stream.height > WHOLE_PIXELS
        # Stamps must name frames: those of AVI are of decoding, which is another order where there
        # are B frames.
        named = (np.diff(np.sort(stamps)) > 0).all() and not (
            container.format.name == "avi" and stream.codec_context.has_b_frames)
        return packets, base, rate, length, large and named


def _is_whole(path):
    """Do the parts of an avi, mkv or webm file follow each other, as their sizes say, up to its
    very end? One that is cut off ends within a part, and damage puts something between them."""
    at, size, ends = 0, os.path.getsize(path), []  # of the parts that we are in
    with open(path, "rb") as f:
        kind = f.read(4)
        while at < size:
            _tick()
            f.seek(at)
            head = f.read(16)
            if kind == b"RIFF":  # an identifier of four letters, the size; parts have even places
                name, start, length = head[:4], at + 8, int.from_bytes(head[4:8], "little")
                known, inside = all(32 <= c < 127 for c in name), name in (b"RIFF", b"LIST")
                inner, end = start + 4, start + length + length % 2
            # identifier and size both begin with as many zero bits as bytes follow the first
            elif kind == MATROSKA[0]:
                width = 9 - head[0].bit_length()
                name, rest = head[:width], head[width:]
                digits = 9 - rest[0].bit_length() if rest else 9
                start, length = at + width + digits, int.from_bytes(rest[:digits],
                                                                    "big") - (1 << 7 * digits)
                known, inside = name in MATROSKA and digits <= min(8,
                                                                   len(rest)), name in MATROSKA[1:3]
                # live: no end
                inner, end = start, size if length == (1 << 7 * digits) - 1 else start + length
            else:
                return False
            if not known or end > (ends or [size])[-1]:
                return False
            if inside:
                ends.append(end)
            at = inner if inside else end
            while ends and at == ends[-1]:
                ends.pop()
    return at == size and bool(_tail(path))  # zeros at the end: room for what never came


def _tail(path):
    with open(path, "rb") as f:
        f.seek(max(0, os.path.getsize(path) - 64))
        return f.read().rstrip(b"\0\r\n ")


def _check_covered(covered, promised, gap):
    """Refuse a video that ends clearly too early. How long the last frame lasts is often a guess,
    so as much as the longest frame (``gap``), a quarter of a second, or a twentieth may be
    missing."""
    if promised - covered > max(gap, 0.25, promised / 20):
        raise VideoError(f"cut off, only {max(covered, 0):.2f} of {promised:.2f} s are there")


def _decode_all(path, ranks, total):
    """Decode the whole video. Returns the frames numbered ``ranks`` in the order in which the
    decoder gives them, which is the display order even where the stamps are wrong, and the stamps
    of all frames."""
    out, seen = None, []
    container, stream = _open(path, CORES)
    with container:
        try:
            for frame in container.decode(stream):
                _tick()
                if len(seen) in ranks:
                    out = _store(out, _rgb(frame), ranks == len(seen))
                seen.append(frame.pts)
        except av.error.FFmpegError as exc:
            raise VideoError(f"broken after {len(seen)} of {total} frames") from exc
    if not seen:
        raise VideoError("no frame can be decoded")
    return out, seen


def _decode_seeking(path, packets, wanted):
    """Decode only from the key frame before each wanted stamp, CORES such runs at a time. Returns
    the frames, or None where anything is odd: then _decode_all has the word, on errors too."""
    place = {pts: i for i, (pts, _, _) in enumerate(packets)}
    keys = [i for i, (_, is_key, _) in enumerate(packets) if is_key]
    runs = {}  # wanted stamps by their key frame
    for pts in np.unique(wanted).tolist():
        # A frame that follows a key frame in the file but is shown before it needs the key frame
        # before that.
        key = max((k for k in keys if k <= place[pts] and packets[k][0] <= pts), default=0)
        runs.setdefault(key, []).append(pts)
    out, found, todo, lock = None, [], iter(runs.items()), threading.Lock()
    workers = min(len(runs), CORES)
    budget = min(_reading.until, _reading.last) - time.thread_time()

    def work(beats):
        """Decode one run after the other until there are none. -> False where anything is odd."""
        nonlocal out
        left, last_moment = 2 * len(packets), time.thread_time() + budget  # stretches may overlap
        _reading.until, _reading.last, _reading.beats = last_moment, last_moment, beats
        container, stream = _open(path, CORES // workers)
        try:
            for key, run in todo:
                container.seek(packets[key][0], stream=stream)
                last = -np.inf
                for number, packet in enumerate(container.demux(stream)):
                    _tick()
                    left -= 1
                    if number == 0 and (not packet.is_keyframe or place.get(packet.pts, key + 1)
                                        > key) or left < 0:
                        return False  # seeking leads to somewhere else, or always far back
                    # on the way to a wanted frame those that no other refers to (half of H.264's)
                    # need no decoding
                    needed = packet.pts in run or not packet.size
                    stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
                    for frame in packet.decode():
                        if frame.pts is None or frame.pts <= last:
                            return False  # stamps that run backwards name no frames
                        last = frame.pts
                        if last in run:
                            image = _rgb(frame)
                            with lock:
                                found.append(last)
                                out = _store(out, image, wanted == last)
                    if last >= run[-1]:
                        break
            return True
        finally:
            container.close()
            for _ in todo:  # nobody else goes on
                pass

    try:
        with ThreadPoolExecutor(workers) as pool:
            if not all(pool.map(work, [_reading.beats] * workers)):
                return None
    except (VideoError, av.error.FFmpegError):
        return None
    return out if sorted(found) == np.unique(wanted).tolist() else None


def _rgb(frame):
    """A decoded frame as an upright image, uint8 (H, W, 3)."""
    if frame.is_corrupt:
        raise VideoError("damaged, a frame can be decoded only in part")
    matrix, frame = frame.side_data.get("DISPLAYMATRIX"), frame.reformat(format="rgb24", threads=1)
    # where it lies: to_ndarray copies
    rows = np.frombuffer(frame.planes[0], np.uint8).reshape(frame.height, -1)
    image = rows[:, : frame.width * 3].reshape(frame.height, frame.width, 3)
    if matrix is None:
        return image
    # The point (x, y) is to be shown at (a x + c y, b x + d y). A negative determinant mirrors: x
    # goes to -x first.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(float)
    if a * d < b * c:
        a, b, image = -a, -b, image[:, ::-1]
    # b > 0 is clockwise, as y points down
    return np.rot90(image, round(-np.arctan2(b, a) / (np.pi / 2)))


def _store(out, image, places):
    """Put an image at ``places`` of the output. That is made with the first: nothing is held
    twice."""
    if out is None:
        if len(places) * image.size > BYTES:
            raise VideoError(f"{len(places)} frames of {image.shape[1]} x {image.shape[0]} are too "
                             "large")
        out = np.empty((len(places), *image.shape), np.uint8)
    if out.shape[1:] != image.shape:
        raise VideoError(f"frames of different sizes, {out.shape[1:3]} and {image.shape[:2]}")
    for place in np.flatnonzero(places):
        out[place] = image
    return out
