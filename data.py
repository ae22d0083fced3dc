"""Files of the user: frames out of videos, records out of annotation files. What is broken is refused with one line."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.stream import Disposition
from safetensors.torch import load_file, save_file
from tqdm import tqdm

av.logging.set_level(None)  # ffmpeg's own messages stay off stderr; what goes wrong is said by VideoError
WHOLE = 1000  # videos of up to so many frames are always decoded as a whole, so that damage anywhere is found


class VideoError(Exception):
    """One line that names the file and says why it, or the asked part of it, cannot be read."""


def read_frames(video, num_frames, start=None, end=None, sampling="linspace"):
    """Read ``num_frames`` frames spread evenly over the time of a video.

    ``video`` is a video file, a list of image files (the frames of one video), or a folder of jpg / png images in
    natural order; images count as one per second. ``start`` and ``end`` are seconds after the first frame.

    ``linspace``: the frames shown at ``num_frames`` times from the first to the last frame (or start to end), both
    included; at a constant frame rate exactly the frames ``np.linspace(0, N - 1, num_frames).astype(int)``.
    ``midpoint``: the middles of ``num_frames`` equal segments; at a constant rate exactly those of Video-ChatGPT.

    Returns the frames, uint8 (F, H, W, 3) RGB and upright, and their times, float (F,) seconds after the first frame.
    F is always ``num_frames``: a video of fewer frames repeats some. Whatever is wrong with a file is a VideoError.
    Of more than ``WHOLE`` frames only the needed parts are decoded, so damage elsewhere can go unnoticed.
    """
    if num_frames < 1 or sampling not in ("linspace", "midpoint"):
        raise ValueError(f"num_frames must be at least 1, sampling linspace or midpoint: {num_frames}, {sampling!r}")
    is_list = isinstance(video, (list, tuple))
    name, images = ("list of images", video) if is_list else (video, None)
    try:
        if not is_list and os.path.isdir(video):
            files = [f for f in os.listdir(video) if re.fullmatch(r"[^.].*\.(jpe?g|png)", f, re.I | re.S)]
            files.sort(key=lambda f: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f)])  # 2 before 10
            images = [os.path.join(video, f) for f in files]
        if images is None:
            return _read_video(video, num_frames, start, end, sampling)
        if not images:
            raise VideoError("no images")
        ranks = _choose(np.arange(len(images)), 1.0, len(images), num_frames, start, end, sampling)
        out = None
        for rank in np.unique(ranks):
            name = images[rank]
            out = _store(out, _decode_all(name, np.zeros(1, int), 1)[0][0], ranks == rank)
        return out, ranks.astype(float)
    except Exception as exc:  # besides FFmpegError, PyAV raises OSError, ValueError, MemoryError, UnicodeError, ...
        raise _video_error(name, exc) from exc


def clip_seconds(clip):
    """(start, end) of a clip in seconds; of the whole video where it has none. Raises VideoError."""
    end = clip.end
    try:
        if end is None:
            still = isinstance(clip.path, tuple) or os.path.isdir(clip.path)
            end = float(len(video_files(clip.path))) if still else _scan(clip.path)[3]
    except Exception as exc:
        raise _video_error(clip.path, exc) from exc
    return clip.start or 0.0, end


def video_files(path):
    """The files that a video's content lies in: itself, or its images."""
    if isinstance(path, (list, tuple)):
        return list(path)
    if os.path.isdir(path):
        return sorted(os.path.join(path, f) for f in os.listdir(path))
    return [path]


def _video_error(name, exc):
    words = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    reason = words if isinstance(exc, VideoError) else f"cannot be read ({words})"
    # File names may hold line breaks and bytes that are no text; the message is one printable line all the same.
    return VideoError(" ".join(f"{name}: {reason}".split()).encode("utf-8", "backslashreplace").decode())


def _read_video(path, num_frames, start, end, sampling):
    """Choose frames by the time stamps of the packets, which cost no decoding, then decode what these frames need."""
    packets, base, rate, length = _scan(path)
    # The stamps of the shown frames in display order. Raw streams have none: there frames are numbered.
    ticks = [pts for pts, _, shown in packets if shown]
    stamped = None not in ticks
    ticks, base = (np.sort(ticks), base) if stamped else (np.arange(len(ticks)), 1 / rate)
    ranks = _choose(ticks, base, length, num_frames, start, end, sampling)
    out = None
    if len(packets) > WHOLE and len({pts for pts, _, _ in packets} - {None}) == len(packets):
        out = _decode_seeking(path, packets, ticks[ranks])
    if out is None:
        out, seen = _decode_all(path, ranks, len(ticks))
        seen = np.sort(seen) if stamped and None not in seen else np.arange(len(seen))
        if not np.array_equal(seen, ticks):
            # Not one frame per packet (fields, or frames whose references are missing at the start): as long as the
            # frames cover the time, they are the video. The choice is made anew among them.
            _check_covered((seen[-1] - seen[0]) * base, (ticks[-1] - ticks[0]) * base, 0)
            ticks, ranks = seen, _choose(seen, base, length, num_frames, start, end, sampling)
            out, _ = _decode_all(path, ranks, len(ticks))
    return out, (ticks[ranks] - ticks[0]) * base


def _choose(ticks, base, length, num_frames, start, end, sampling):
    """Numbers (in display order) of the frames to take. ``ticks`` are of ``base`` seconds, ``length`` is in seconds."""
    start, end = 0 if start is None else start, length if end is None else end
    if not 0 <= start <= end <= length + 0.1:  # a tenth of a second of grace for rounded annotations
        raise VideoError(f"no range of {start} to {end} s in a video of {length:.2f} s")
    # Clocks round: 30 frames a second show as steps of 33 and 34 ms. Stamps that lie within one tick of a straight
    # line are a constant rate, and time is counted in whole frames: no rounding then makes a target miss its frame.
    count = np.arange(len(ticks))
    step = (ticks[-1] - ticks[0]) / max(len(ticks) - 1, 1)
    constant = step > 0 and np.abs(ticks[0] + step * count - ticks).max() <= min(1, step / 3)
    clock, unit = (count, base * step) if constant else (ticks - ticks[0], base)
    first, last = np.minimum(np.round(np.array([start, end]) / unit, 6), clock[-1])
    targets = np.linspace(first, last, num_frames)
    if sampling == "midpoint":  # segments go from frame to frame; of these the middle
        edges = np.rint(np.interp(np.linspace(first, last, num_frames + 1), clock, count)).astype(int)
        targets = (clock[edges[:-1]] + clock[edges[1:]]) / 2
    return np.interp(targets, clock, count).astype(int)  # the last frame that is not later than the target


def _open(path):
    """A container (closed by ``with``) and its video stream: the one marked default, else the first."""
    if not os.path.isfile(path):  # a pipe or a device could hang
        raise VideoError("no such file")
    # "file:" keeps a name like "a:b.mp4" from being taken for an address, the whitelist keeps playlists off the net.
    container = av.open(f"file:{os.fspath(path)}", options={"protocol_whitelist": "file"}, metadata_errors="ignore")
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # no cover pictures
    if not streams:
        container.close()
        raise VideoError("no video stream")
    stream = next((s for s in streams if s.disposition & Disposition.default), streams[0])
    stream.thread_type = "AUTO"  # several frames at once, not only several slices of one
    return container, stream


def _scan(path):
    """Read the packets without decoding. Returns (pts, is key, is shown) of each in file order, the seconds per tick,
    the frame rate and the length in seconds. Refuses a file that holds clearly less than its header promises."""
    packets, ends = [], {}  # the last tick of every stream
    container, stream = _open(path)
    with container:
        base, rate = float(stream.time_base), float(stream.average_rate or stream.guessed_rate or 25)
        for packet in container.demux():
            if packet.size and packet.pts is not None:
                end = packet.pts + (packet.duration or 0)
                ends[packet.stream_index] = max(ends.get(packet.stream_index, end), end)
            if packet.size and packet.stream_index == stream.index:
                if packet.is_corrupt:  # the file ends within it
                    raise VideoError(f"cut off after {len(packets)} of {max(stream.frames, len(packets) + 1)} frames")
                # Edit lists mark packets as discard: the decoder needs them, but they are not part of the video.
                packets.append((packet.pts, packet.is_keyframe, not packet.is_discard))
        shown = [pts for pts, _, is_shown in packets if is_shown]
        if not shown:
            raise VideoError("no frames")
        if None in [pts for pts, _, _ in packets]:
            return packets, base, rate, len(shown) / rate
        # mp4 and avi tell the number of frames (hidden ones included) and the length of the stream, mkv and webm only
        # the length of the file, which may be that of its sound. Compared is the time, which suits any frame rate.
        stamps = np.sort([pts for pts, _, _ in packets])
        gap = np.diff(stamps).max(initial=0) * base
        covered = (ends[stream.index] - stamps[0]) * base
        _check_covered(covered, max(stream.frames / rate, (stream.duration or 0) * base), gap)
        if stream.duration is None and container.duration is not None:
            covered = max(end * float(container.streams[index].time_base) for index, end in ends.items())
            _check_covered(covered, container.duration / av.time_base, gap)
        return packets, base, rate, (ends[stream.index] - min(shown)) * base


def _check_covered(covered, promised, gap):
    """Refuse a video that ends clearly too early. How long the last frame lasts is often a guess, so as much as the
    longest frame (``gap``), a quarter of a second, or a twentieth may be missing."""
    if promised - covered > max(gap, 0.25, promised / 20):
        raise VideoError(f"cut off, only {max(covered, 0):.2f} of {promised:.2f} s are there")


def _decode_all(path, ranks, total):
    """Decode the whole video. Returns the frames numbered ``ranks`` in the order in which the decoder gives them, which
    is the display order even where the stamps are wrong, and the stamps of all frames."""
    out, seen = None, []
    container, stream = _open(path)
    with container:
        try:
            for frame in container.decode(stream):
                if len(seen) in ranks:
                    out = _store(out, frame, ranks == len(seen))
                seen.append(frame.pts)
        except av.error.FFmpegError as exc:
            raise VideoError(f"broken after {len(seen)} of {total} frames") from exc
    if not seen:
        raise VideoError("no frame can be decoded")
    return out, seen


def _decode_seeking(path, packets, wanted):
    """Decode only from the key frame before each wanted stamp. Returns the frames, or None where decoding everything
    costs about the same, or anything is odd: then _decode_all has the word, on errors as well."""
    place = {pts: i for i, (pts, _, _) in enumerate(packets)}
    keys = [i for i, (_, is_key, _) in enumerate(packets) if is_key]
    runs = {}  # wanted stamps by their key frame
    for pts in np.unique(wanted).tolist():
        # A frame that follows a key frame in the file but is shown before it needs the key frame before that.
        key = max((k for k in keys if k <= place[pts] and packets[k][0] <= pts), default=0)
        runs.setdefault(key, []).append(pts)
    if sum(max(place[pts] for pts in run) - key + 1 for key, run in runs.items()) > 0.75 * len(packets):
        return None
    out, found, left = None, [], len(packets)
    try:
        container, stream = _open(path)
        with container:
            for key, run in runs.items():
                container.seek(packets[key][0], stream=stream)
                last = -np.inf
                for number, packet in enumerate(container.demux(stream)):
                    left -= 1
                    if number == 0 and (not packet.is_keyframe or place.get(packet.pts, key + 1) > key) or left < 0:
                        return None  # seeking leads to somewhere else, or always far back
                    # on the way to a wanted frame those that no other refers to (half of H.264's) need no decoding
                    stream.codec_context.skip_frame = "DEFAULT" if packet.pts in run or not packet.size else "NONREF"
                    for frame in packet.decode():
                        if frame.pts is None or frame.pts <= last:
                            return None  # stamps that run backwards name no frames
                        last = frame.pts
                        if last in run:
                            found.append(last)
                            out = _store(out, frame, wanted == last)
                    if last >= run[-1]:
                        break
    except (VideoError, av.error.FFmpegError):
        return None
    return out if found == np.unique(wanted).tolist() else None


def _store(out, frame, places):
    """Put a frame, upright and RGB, at ``places`` of the output. That is made with the first: nothing is held twice."""
    if isinstance(frame, av.VideoFrame):
        if frame.is_corrupt:
            raise VideoError("damaged, a frame can be decoded only in part")
        # rotation is by how many degrees counterclockwise the picture is to be turned, which is how rot90 turns.
        frame = np.rot90(frame.to_ndarray(format="rgb24", threads=1), round(frame.rotation / 90))
    if out is None:
        out = np.empty((len(places), *frame.shape), np.uint8)
    if out.shape[1:] != frame.shape:
        raise VideoError(f"frames of different sizes, {out.shape[1:3]} and {frame.shape[:2]}")
    out[places] = frame
    return out


# ---------------------------------------------------------------------------------------------------------------
# Annotation files
# ---------------------------------------------------------------------------------------------------------------
EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
FEATURES = (".pkl", ".npy", ".npz", ".pt")  # some lists name a file of features; the video of that name is meant
IMAGES = (".jpg", ".jpeg", ".png")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Clip(NamedTuple):
    """A video file, a folder of frames or a tuple of image files, and the part of it that is meant, in seconds."""
    path: str | tuple
    start: float | None = None
    end: float | None = None


class DataError(Exception):
    """One line that names the annotation file, and the record where there is one, and says what is wrong with it."""


def read_records(files, video_root=None):
    """Read annotation files, as their makers publish them, into one record per answer. Returns (records, report).

    Files are .jsonl or .json (a list of rows, a dict with one as ``annotations`` or ``data``, or a dict id -> row).
    A row is one of these, with ``id``, ``start`` and ``end`` (in seconds) and ``task_type`` where wanted:
        {"video" | "image(s)", "conversations": [{"from", "value"}, ..]}   LLaVA, Video-ChatGPT, VLM-RLAIF, LLaVA-Hound
        {"videos", "messages": [{"role", "content"}, ..]}                  chat; content is text or a list of parts
        {"video_id", "q", "a"}                                             VideoInstruct100K
    A record is a dict: ``id`` (made unique by #2, #3, ..), ``clip`` (a Clip, None for rows of text; several images are
    the frames of one video), ``question`` (a string; after earlier turns a list of {"role", "content"} that ends with
    it), ``answer``, ``task_type`` (or None), ``file``. Texts are without video tokens; a system turn becomes the start
    of the first question. Videos are looked for in ``video_root``, then in the annotation file's folder and its
    ``videos`` (see _find), but not opened. Rows that cannot be used are skipped as a whole and counted in the report.
    """
    def answers(row, find):
        turns, clip = parse_turns(row, find)
        return [dict(clip=clip, question=turns[0]["content"] if n == 1 else turns[:n], answer=turns[n]["content"],
                     task_type=row.get("task_type")) for n in range(1, len(turns), 2)]

    return read_rows(files, video_root, answers)


def read_rows(files, video_root, parse):
    """What read_records and read_preferences share. parse(row, find) gives a row's records or raises DataError("reason:
    details"); find(name, is_image) gives the path of a video. Returns (records with ``id`` and ``file``, report)."""
    if video_root is not None and not os.path.isdir(video_root):
        raise DataError(f"video root {_line(video_root)}: no such folder")

    listing = functools.cache(_listing)  # every folder is listed once
    records, uses, num_rows, skipped = [], Counter(), 0, {}
    for file in files:
        folder, rows, reasons, before = os.path.dirname(file), _load(file), Counter(), len(records)
        roots = [video_root] * (video_root is not None) + [folder or ".", os.path.join(folder, "videos")]
        find = functools.cache(functools.partial(_find, roots=roots, listing=listing))
        for place, row in rows:
            given = row.get("id", row.get("video_id")) if isinstance(row, dict) else None
            try:
                found = parse(row, find)
            except DataError as exc:
                reason = str(exc).partition(": ")[0]
                example = _line(f"{file} {place}{'' if given is None else f' (id {_line(given, 60)})'}: {exc}")
                reasons[reason] += 1
                count, examples = skipped.get(reason, {"count": 0, "examples": []}).values()
                skipped[reason] = {"count": count + 1, "examples": (examples + [example])[:5]}
                continue
            base = f"{os.path.basename(file)} {place}" if given is None else str(given)
            for record in found:
                uses[base] += 1
                name = base if uses[base] == 1 else f"{base}#{uses[base]}"
                records.append(dict(id=name, **record, file=file))
        if len(records) == before:
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            why = f"none of {len(rows)} rows can be used ({why}), e.g. {example}" if rows else "no rows"
            raise DataError(_line(f"{file}: {why}", 900))
        num_rows += len(rows)
    paths = [record["clip"] and record["clip"].path for record in records]
    return records, {"files": len(files), "rows": num_rows, "records": len(records), "videos": len(set(paths) - {None}),
                     "text_only": paths.count(None), "skipped": skipped}


def report_lines(report):
    """The report of read_records for people: what there is, then what was skipped and why, the most frequent first."""
    head = "{records} records from {rows} rows of {files} files: {videos} videos, {text_only} records without video"
    skipped = sorted(report["skipped"].items(), key=lambda item: -item[1]["count"])
    return [head.format(**report)] + [f"skipped {s['count']} rows, {why}; {s['examples'][0]}" for why, s in skipped]


def _line(value, limit=300):
    """Any value as one printable line of limited length."""
    line = " ".join(str(value).split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= limit else line[:limit - 3] + "..."


def _load(file):
    """The rows of an annotation file with their places: [("record 1", row), ..]."""
    try:
        with open(file, encoding="utf-8-sig") as f:  # -sig: a byte order mark may be there
            text = f.read()
        if file.lower().endswith(".jsonl"):  # not splitlines: it splits at U+2028 as well, which JSON allows in text
            rows = [[f"line {n}", line] for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            for row in rows:
                with contextlib.suppress(ValueError, RecursionError):  # a broken line stays text and is refused
                    row[1] = json.loads(row[1])
            return rows
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(_line(f"{file}: cannot be read ({getattr(exc, 'strerror', None) or exc})")) from exc
    if isinstance(data, dict):
        data = next((data[key] for key in ("annotations", "data") if isinstance(data.get(key), list)), data)
    if isinstance(data, dict) and all(isinstance(row, dict) for row in data.values()):
        data = [{"id": key, **row} for key, row in data.items()]
    if not isinstance(data, list):
        raise DataError(f"{_line(file)}: no list of rows, dict with one as annotations or data, or dict id -> row")
    return [(f"record {n}", row) for n, row in enumerate(data, 1)]


def parse_turns(row, find):
    """A row as (turns, Clip or None); DataError("reason: details") if it cannot be used. The turns are
    [{"role": "user", "content": text}, {"role": "assistant", ..}, ..]; the last can be a question without answer."""
    if not isinstance(row, dict):
        raise DataError(f"no JSON object: {row}")
    said = row.get("conversations", row.get("messages"))
    if "q" in row:
        said = [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row.get("a")}]
    # Rows with two answers to compare (output_1, output_2) have turns too; the last is one to be replaced by them.
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said) or "output_1" in row:
        raise DataError(f"no question and answer: the keys are {', '.join(row)}")
    if not isinstance(row.get("task_type"), str | None):
        raise DataError(f"task_type is no text: {row['task_type']}")
    named, turns, opening, needs_video = {"video": [], "image": []}, [], "", "q" in row
    for key in ("video", "videos", "video_id", "image", "images"):
        if row.get(key) and not named[key[:5]]:
            named[key[:5]] = row[key] if isinstance(row[key], list) else [row[key]]
    for turn in said:
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        pieces = [piece.strip() for piece in re.split("<(?:video|image)>", _text(content, named))]
        text, needs_video = " ".join(filter(None, pieces)), needs_video or len(pieces) > 1
        expected = ("user", "assistant")[len(turns) % 2]
        if role == "system" and not turns:
            opening += text + "\n"
            continue
        if ROLES.get(str(role)) != expected:
            raise DataError(f"user and assistant do not take turns: turn {len(turns) + 1} is of {role}")
        if not text:
            raise DataError(f"empty text of {expected}")
        turns.append({"role": expected, "content": text if turns else (opening + text).strip()})
    if len(turns) < 2:
        raise DataError("no answer")
    return turns, _clip(row, named["video"], named["image"], needs_video, find)


def _text(content, named):
    """The text of a turn, with a token for each part that is a video or image; their names are added to ``named``."""
    text = ""
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("video", "image"):
            name = part.get(kind) or []
            named[kind] = named[kind] + (name if isinstance(name, list) else [name])
            text += f"<{kind}>"
        elif kind == "text" and isinstance(part.get("text"), str) and not re.search(r"[\ud800-\udfff]", part["text"]):
            text += part["text"]  # half a surrogate pair is refused: no tokenizer takes it
        else:
            raise DataError(f"no text in a turn: {part}")
    return text


def _clip(row, videos, images, needs_video, find):
    """The Clip of a row that names these videos and images, None if it is text only."""
    if not all(isinstance(name, str) for name in videos + images):
        raise DataError(f"video name is no text: {videos + images}")
    if len(videos) > 1 and all(name.lower().endswith(IMAGES) for name in videos):
        videos, images = [], videos + images
    if len(set(videos)) + bool(images) > 1 or needs_video and not videos + images:
        raise DataError(f"not one video: {', '.join(videos + images) or 'none named'}")
    span = [row.get("start"), row.get("end")]
    times = [t for t in span if t is not None]
    if not all(type(t) in (int, float) and 0 <= t < 1e9 for t in times) or times != sorted(times):
        raise DataError(f"no range of seconds: start {span[0]}, end {span[1]}")
    paths = tuple(find(name, bool(images)) for name in images or videos[:1])
    if None in paths:
        raise DataError(f"video missing: {(images or videos)[paths.index(None)]}")
    return Clip(paths if images else paths[0], *span) if paths else None


def video_finder(roots):
    """A function: the name of a video, as annotation files give it, to its path in one of the folders, or None."""
    find = functools.partial(_find, is_image=False, roots=roots, listing=functools.cache(_listing))
    return functools.cache(find)


def _listing(folder):
    """Names in a folder; far cheaper than to ask for every name that a video could have."""
    return set(os.listdir(folder)) if os.path.isdir(folder) and os.access(folder, os.R_OK) else set()


def _find(name, is_image, roots, listing):
    """The path of a video or image, or None: the file of that name; for a video also one with another extension, with
    or without a leading ``v_``, else a folder of that name that holds images. The first root that has any decides."""
    name = os.path.normpath(name.removeprefix("file://"))
    if name.split(os.sep)[0] == "..":
        raise DataError(f"video outside of the data folder: {name}")
    folder, base = os.path.split(name)
    stem, ext = os.path.splitext(base)
    stem = stem if ext.lower() in EXTENSIONS + FEATURES else base  # a dot can be part of the name
    stems = [] if is_image else [stem, stem[2:] if stem.startswith("v_") else "v_" + stem]
    files = [base] * (ext.lower() not in FEATURES)
    files += [s + e for s in stems for small in EXTENSIONS for e in (small, small.upper())]
    for root in roots:
        place = os.path.join(root, folder)  # of an absolute name just its folder
        there = [os.path.join(place, file) for file in files + stems if file in listing(place)]
        found = [path for path in there if os.path.isfile(path)] or [
            path for path in there if not is_image and any(file.lower().endswith(IMAGES) for file in listing(path))]
        if found:
            return found[0]


# ---------------------------------------------------------------------------------------------------------------
# Features: every video is decoded and encoded once
# ---------------------------------------------------------------------------------------------------------------
class FeatureCache:
    """Frozen CLIP features of clips, computed once: `cache(clips)` -> features (B,F,S,D), frame_mask (B,F).

    One safetensors file per clip under `folder`, keyed by everything that the features depend on: file content,
    part, frame sampling, vision tower. Written aside and renamed, so a killed run or a second process leaves no half
    file. Up to `memory_gib` is also held in memory.
    """

    def __init__(self, model, processor, folder, memory_gib=4.0):
        self.model, self.processor, self.folder = model, processor, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.memory, self.room, self.keys = {}, memory_gib * 2**30, {}
        weights = hashlib.sha256(json.dumps(model.config.vision_config.to_dict(), sort_keys=True, default=str).encode())
        for p in model.vision_tower.state_dict().values():
            weights.update(p.detach().cpu().float().numpy().tobytes())
        image = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
        self.setup = f"{weights.hexdigest()}|{model.config.vision_layer}|{image}|{model.vision_tower.dtype}"

    def key(self, clip, num_frames):
        if (clip, num_frames) not in self.keys:
            if clip.path not in self.keys:
                content = hashlib.sha256()
                for part in video_files(clip.path):
                    with open(part, "rb") as f:
                        while block := f.read(1 << 20):
                            content.update(block)
                self.keys[clip.path] = content.hexdigest()
            what = f"{self.setup}|{self.keys[clip.path]}|{clip.start}|{clip.end}|{num_frames}|{self.processor.sampling}"
            self.keys[clip, num_frames] = hashlib.sha256(what.encode()).hexdigest()
        return self.keys[clip, num_frames]

    def one(self, clip, num_frames=None):
        """Features (F,S,D) of one clip. Raises VideoError."""
        num_frames = num_frames or self.processor.num_frames
        try:
            key = self.key(clip, num_frames)
        except OSError as e:
            raise VideoError(f"{clip.path}: {e.strerror or e}") from None
        if key in self.memory:
            return self.memory[key]
        file = self.folder / key[:2] / f"{key}.safetensors"
        if file.exists():
            features = load_file(file)["features"]
        else:
            frames, _ = read_frames(clip.path, num_frames, clip.start, clip.end, self.processor.sampling)
            pixels = self.processor.image_processor(images=list(frames), return_tensors="pt")["pixel_values"]
            features = self.model.encode_frames(pixels.to(self.model.vision_tower.device)).cpu().contiguous()
            file.parent.mkdir(exist_ok=True)
            aside = file.with_suffix(f".{os.getpid()}.tmp")
            save_file({"features": features}, aside)
            os.replace(aside, file)
        size = features.numel() * features.element_size()
        if size <= self.room:
            self.memory[key], self.room = features, self.room - size
        return features

    def __call__(self, clips, num_frames=None):
        rows = [self.one(c, num_frames) for c in clips]
        features = torch.zeros(len(rows), max(map(len, rows)), *rows[0].shape[1:], dtype=rows[0].dtype)
        mask = torch.zeros(features.shape[:2], dtype=torch.bool)
        for i, row in enumerate(rows):
            features[i, : len(row)], mask[i, : len(row)] = row, True
        return features, mask

    def prepare(self, clips, num_frames=None, progress=True):
        """Check and encode all clips before training starts -> {clip: one-line reason} of the broken ones."""
        broken, threads = {}, torch.get_num_threads()
        torch.set_num_threads(1)  # frames of one clip are too little work to share between cores
        for clip in tqdm(list(dict.fromkeys(clips)), desc="video features", mininterval=5, disable=not progress):
            try:
                self.one(clip, num_frames)
            except VideoError as e:
                broken[clip] = str(e)
        torch.set_num_threads(threads)
        return broken
