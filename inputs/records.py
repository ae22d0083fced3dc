"""Files of the user: records out of annotation files, features of videos. What is broken is refused
with one line."""

import contextlib
import functools
import json
import os
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

from inputs.frames import IMAGES, is_frame, one_line

# --------------------------------------------------------------------------------------------------
# Annotation files
# --------------------------------------------------------------------------------------------------
EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
# some lists name a file of features; the video of that name is meant
FEATURES = (".pkl", ".npy", ".npz", ".pt")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
TOKENS = "<video>|<image>"  # they stand in a question where its video does
STARTS, ENDS = ("start", "video_start", "start_time"), ("end", "video_end", "end_time")
SYSTEM = ("system", "system_prompt")
READ = ("id", "video", "videos", "video_id", "image", "images", "conversations", "messages", "q",
        "a", "task_type",
        *STARTS, *ENDS, *SYSTEM)  # keys of a row
READ_TURN, READ_PART = ("from", "role", "value", "content"), ("type", "text", "video", "image",
                                                              *STARTS, *ENDS)
TURNS = ("conversations", "messages", "prompt", "output_1", "output_2", "chosen", "rejected",
         "rejected_response")  # keys of a row that hold turns


class Clip(NamedTuple):
    """A video file, a folder of frames or a tuple of image files, and the part of it that is meant,
    in seconds."""
    path: str | tuple
    start: float | None = None
    end: float | None = None


class DataError(Exception):
    """One line that names the annotation file, and the record where there is one, and says what is
    wrong with it."""

    def __init__(self, line):  # keys and names out of a file may hold breaks and halves of letters
        line = " ".join(str(line).splitlines()).encode("utf-8", "backslashreplace").decode()
        super().__init__(line if len(line) <= 1000 else f"{line[:1000]} ...")


def read_records(files, video_root=None, labelled=True):
    """Read annotation files, as their makers publish them, into one record per answer. Returns
    (records, report).

    Files are .jsonl or .json (a list of rows, a dict with one as ``annotations`` or ``data``, or a
    dict id -> row). A row is one of these, with ``id``, ``start`` and ``end`` (in seconds; also
    video_start, start_time, ..), ``system`` (or system_prompt) and ``task_type`` where wanted:
        {"video" | "image(s)", "conversations": [{"from", "value"}, ..]}   LLaVA, VLM-RLAIF, ..
        {"videos", "messages": [{"role", "content"}, ..]}     chat; text, or a list of parts
        {"video_id", "q", "a"}                                             VideoInstruct100K
    A record is a dict: ``id`` (made unique by #2, #3, ..), ``clip`` (a Clip, None for rows of text;
    several images are the frames of one video), ``question`` (a string; after earlier turns a list
    of {"role", "content"} that ends with it), ``answer``, ``task_type`` (or None), ``file``.
    Questions are without video tokens; a system text becomes the start of the first one. Videos are
    looked for in ``video_root``, then in the annotation file's folder and its ``videos`` (see
    _find), but not opened. Rows that cannot be used are skipped as a whole and counted in the
    report; so are the keys that nothing here reads. Without ``labelled`` the last question of a row
    may lack its answer: a record with ``answer`` None."""
    def answers(row, find):
        turns, clip = parse_turns(row, find, labelled)
        said = [t["content"] for t in turns] + [None] * (not labelled)
        return [dict(clip=clip, question=said[0] if n == 1 else turns[:n], answer=said[n],
                     task_type=row.get("task_type")) for n in range(1, len(said), 2)]

    return read_rows(files, video_root, answers)


def read_rows(files, video_root, parse, known=READ):
    """What read_records and read_preferences share. parse(row, find) gives a row's records or
    raises DataError("reason: details"); find(name, is_image) gives the path of a video; known: the
    keys of a row that it reads. Returns (records with ``id`` and ``file``, report)."""
    if video_root is not None and not os.path.isdir(video_root):
        raise DataError(f"video root {_line(video_root)}: no such folder")

    listing = functools.cache(_listing)  # every folder is listed once
    records, uses, num_rows, skipped, unread = [], Counter(), 0, {}, {}
    for file in files:
        folder, rows, reasons, before = os.path.dirname(file), _load(file), Counter(), len(records)
        roots = [video_root] * (video_root is not None) + [folder or ".",
                                                           os.path.join(folder, "videos")]
        find = functools.cache(functools.partial(_find, roots=roots, listing=listing))
        for place, row in rows:
            given = row.get("id", row.get("video_id")) if isinstance(row, dict) else None
            try:
                found = parse(row, find)
            except DataError as exc:
                reason = str(exc).partition(": ")[0]
                name = "" if given is None else f" (id {_line(given, 60)})"
                example = _line(f"{file} {place}{name}: {exc}")
                reasons[reason] += 1
                count, examples = skipped.get(reason, {"count": 0, "examples": []}).values()
                skipped[reason] = {"count": count + 1, "examples": (examples + [example])[:5]}
                continue
            for key in unread_keys(row, known):
                unread.setdefault(_line(key, 60),
                                  {"count": 0, "example": _line(f"{file} {place}")})["count"] += 1
            base = f"{os.path.basename(file)} {place}" if given is None else _line(given)
            for record in found:
                uses[base] += 1
                name = base if uses[base] == 1 else f"{base}#{uses[base]}"
                records.append(dict(id=name, **record, file=file))
        if len(records) == before:
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            none = f"none of {len(rows)} rows can be used ({why})"
            why = f"{none}, e.g. {example}" if rows else "no rows"
            raise DataError(_line(f"{file}: {why}", 900))
        num_rows += len(rows)
    paths = [record["clip"] and record["clip"].path for record in records]
    return records, {"files": len(files), "rows": num_rows, "records": len(records),
                     "videos": len(set(paths) - {None}),
                     "text_only": paths.count(None), "skipped": skipped, "not_understood": unread}


def unread_keys(row, known):
    """The keys of a row, of its turns and of their parts that say something and that nothing here
    reads, each once."""
    found = []
    empty = (None, "", [], {})

    def look(thing, read, place=""):
        if isinstance(thing, dict):
            found.extend(place + key
                         for key, value in thing.items() if key not in read and value not in empty)

    look(row, known)
    for key in TURNS:
        turns = row[key] if isinstance(row.get(key), list) else [row.get(key)]
        for turn in turns if key in known else []:
            look(turn, READ_TURN, f"{key}: ")
            parts = turn.get("content") if isinstance(turn, dict) else None
            for part in parts if isinstance(parts, list) else []:
                look(part, READ_PART, f"{key}: content: ")
    return dict.fromkeys(found)


def report_lines(report):
    """The report of read_records for people: what there is, then what was skipped and why, the most
    frequent first, then the keys that were not read."""
    head = ("{records} records from {rows} rows of {files} files: {videos} videos, {text_only} "
            "records without video")
    skipped = sorted(report["skipped"].items(), key=lambda item: -item[1]["count"])
    lines = [f"skipped {s['count']} rows, {why}; {s['examples'][0]}" for why, s in skipped]
    lines += [f"not understood: {key}, in {s['count']} rows; {s['example']}"
              for key, s in report["not_understood"].items()]
    return [head.format(**report)] + lines


def _line(value, limit=300):
    """Any value as one printable line of limited length."""
    line = one_line(str(value))
    return line if len(line) <= limit else line[:limit - 3] + "..."


def is_text(value):
    """A string that can be written: half a surrogate pair, which JSON allows, is refused; no
    tokenizer takes it."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def _load(file):
    """The rows of an annotation file with their places: [("record 1", row), ..]."""
    try:
        with open(file, encoding="utf-8-sig") as f:  # -sig: a byte order mark may be there
            text = f.read()
        if file.lower().endswith(".jsonl") or _is_lines(text):
            # not splitlines: it splits at U+2028 as well, which JSON allows in text
            rows = [[f"line {n}", line]
                    for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            for row in rows:
                # a broken line stays text and is refused
                with contextlib.suppress(ValueError, RecursionError):
                    row[1] = json.loads(row[1])
            return rows
        data = json.loads(text)
    except UnicodeDecodeError as exc:
        why = "is no text in UTF-8; read are .json and .jsonl"
        raise DataError(_line(f"{file}: cannot be read, it {why}")) from exc
    except (OSError, ValueError, RecursionError) as exc:
        why = getattr(exc, "strerror", None) or exc
        raise DataError(_line(f"{file}: cannot be read ({why})")) from exc
    if isinstance(data, dict):
        data = next((data[key] for key in ("annotations", "data")
                     if isinstance(data.get(key), list)), data)
    if isinstance(data, dict) and all(isinstance(row, dict) for row in data.values()):
        data = [{"id": key, **row} for key, row in data.items()]
    if not isinstance(data, list):
        raise DataError(f"{_line(file)}: no list of rows, dict with one as annotations or data, or "
                        "dict id -> row")
    return [(f"record {n}", row) for n, row in enumerate(data, 1)]


def _is_lines(text):
    """Are these JSON lines, under whatever name? A row stands whole in the first line, another one
    in the next."""
    first, _, more = text.strip().partition("\n")
    try:
        return bool(more.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def parse_turns(row, find, labelled=True):
    """A row as (turns, Clip or None); DataError("reason: details") if it cannot be used. The turns
    are [{"role": "user", "content": text}, {"role": "assistant", ..}, ..]; the last can be a
    question without answer. An answer that is missing or blank at the end is left out where none is
    needed (not ``labelled``)."""
    if not isinstance(row, dict):
        raise DataError(f"no JSON object: {row}")
    said = row.get("conversations", row.get("messages"))
    if "q" in row:
        said = [{"role": "user", "content": row["q"]},
                {"role": "assistant", "content": row.get("a")}]
    # Rows with two answers to compare (output_1, output_2) have turns too; the last is one to be
    # replaced by them.
    if not isinstance(said, list) or not all(isinstance(turn, dict)
                                             for turn in said) or "output_1" in row:
        raise DataError(f"no question and answer: the keys are {', '.join(row)}")
    if not is_text(row.get("task_type", "")) and row["task_type"] is not None:
        raise DataError(f"task_type is no text: {row['task_type']}")
    last = said[-1] if said and not labelled else {}
    if ROLES.get(str(last.get("from", last.get("role")))) == "assistant":
        content = last.get("value", last.get("content"))
        if content is None or isinstance(content, str) and not content.strip():
            said = said[:-1]  # VLM-RLAIF's prompts end with an answer of a line feed
    columns = [row[key] for key in SYSTEM if row.get(key) is not None]
    if not all(map(is_text, columns)):
        raise DataError(f"system is no text: {columns}")
    named, turns, needs_video = {"video": [], "image": [], "span": {}}, [], "q" in row
    opening = "".join(f"{text.strip()}\n" for text in columns if text.strip())
    for key in ("video", "videos", "video_id", "image", "images"):
        if row.get(key) and not named[key[:5]]:
            named[key[:5]] = row[key] if isinstance(row[key], list) else [row[key]]
    for turn in said:
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        pieces = [piece.strip()
                  for piece in _pieces(content, named, ROLES.get(str(role)) == "user")]
        text, needs_video = " ".join(filter(None, pieces)), needs_video or len(pieces) > 1
        expected = ("user", "assistant")[len(turns) % 2]
        if role == "system" and not turns:
            opening += text + "\n"
            continue
        if ROLES.get(str(role)) != expected:
            raise DataError(f"user and assistant do not take turns: turn {len(turns) + 1} is of "
                            f"{role}")
        if not re.sub(TOKENS, "", text).strip():
            raise DataError(f"empty text of {expected}")
        turns.append({"role": expected, "content": text if turns else (opening + text).strip()})
    if len(turns) < 1 + labelled:
        raise DataError("no answer" if labelled else "no question")
    return turns, _clip({**row, **named["span"]}, named["video"], named["image"], needs_video, find)


def _pieces(content, named, asks):
    """The text of a turn in pieces, between which videos and images stand: parts of its content,
    whose names are added to ``named``, and, where it ``asks``, the tokens that stand for them; an
    answer may speak of such a token."""
    pieces = [""]
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("video", "image"):
            name = part.get(kind) or []
            named[kind] = named[kind] + (name if isinstance(name, list) else [name])
            named["span"] |= {key: part[key] for key in STARTS + ENDS if part.get(key) is not None}
            pieces.append("")
        elif kind == "text" and is_text(part.get("text")):
            first, *more = re.split(TOKENS, part["text"]) if asks else [part["text"]]
            pieces = [*pieces[:-1], pieces[-1] + first, *more]
        else:
            raise DataError(f"no text in a turn: {part}")
    return pieces


def _clip(row, videos, images, needs_video, find):
    """The Clip of a row that names these videos and images, None if it is text only."""
    if not all(isinstance(name, str) for name in videos + images):
        raise DataError(f"video name is no text: {videos + images}")
    if len(videos) > 1 and all(name.lower().endswith(IMAGES) for name in videos):
        videos, images = [], videos + images
    if len(set(videos)) + bool(images) > 1 or needs_video and not videos + images:
        raise DataError(f"not one video: {', '.join(videos + images) or 'none named'}")
    given = [{key: row[key] for key in keys if row.get(key) is not None} for keys in (STARTS, ENDS)]
    if more := next((times for times in given if len(set(map(str, times.values()))) > 1), None):
        raise DataError(f"no range of seconds: {more}")
    span = [next(iter(times.values()), None) for times in given]
    times = [t for t in span if t is not None]
    if not all(type(t) in (int, float) and 0 <= t < 1e9 for t in times) or times != sorted(times):
        raise DataError(f"no range of seconds: start {span[0]}, end {span[1]}")
    paths = tuple(find(name, bool(images)) for name in images or videos[:1])
    if None in paths:
        raise DataError(f"video missing: {(images or videos)[paths.index(None)]}")
    return Clip(paths if images else paths[0], *span) if paths else None


def video_name(path):
    """The name of a clip's video, wherever the project lies. Several images are frames: the
    folder's name, with what their names share before the number, if that says more than "frame"; so
    it does where a folder holds many videos."""
    if isinstance(path, str) or len(path) == 1:
        return os.path.relpath(path if isinstance(path, str) else path[0])
    folder, stem = os.path.split(os.path.splitext(path[0])[0])
    begins = re.sub(r"[\W_]*\d+$", "", stem)
    same = all(os.path.basename(p).startswith(begins) for p in path)
    plain = not same or begins.lower() in ("", "f", "frame", "frames", "img", "image")
    return os.path.relpath(folder if plain else os.path.join(folder, begins))


def video_finder(roots):
    """A function: the name of a video, as annotation files give it, to its path in one of the
    folders, or None."""
    find = functools.partial(_find, is_image=False, roots=roots, listing=functools.cache(_listing))
    return functools.cache(find)


def _listing(folder):
    """{name: its spelling on the disk} of a folder; far cheaper than to ask for every name that a
    video could have."""
    names = os.listdir(folder) if os.path.isdir(folder) and os.access(folder, os.R_OK) else []
    return {_composed(name): name for name in names} | {name: name for name in names}


def _composed(name):
    """A name as most systems write it: é is one character or, from a Mac, two. A file has one of
    the two names."""
    return unicodedata.normalize("NFC", name)


def _spelled(folder, listing):
    """A folder's path as it is on the disk; itself where there is none."""
    parent, name = os.path.split(folder)
    if not name or os.path.isdir(folder):
        return folder
    parent = _spelled(parent, listing)
    return os.path.join(parent, listing(parent).get(_composed(name), name))


def _find(name, is_image, roots, listing):
    """The path of a video or image, or None: the file of that name; for a video also one with
    another extension, with or without a leading ``v_``, else a folder of that name that holds
    images. The first root that has any decides."""
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
        names = listing(place) or listing(place := _spelled(place, listing))
        there = [names.get(file, names.get(_composed(file))) for file in files + stems]
        there = [os.path.join(place, file) for file in there if file is not None]
        found = [path for path in there if os.path.isfile(path)] or [
            path for path in there if not is_image and any(map(is_frame, listing(path)))]
        if found:
            return found[0]


