"""Which videos of a folder can be read? Every file decodes to the right number of frames, or one
line says why not.

Run      python inputs/check_videos.py --videos my_videos      exit code 1 where a file is refused
         python inputs/check_videos.py --videos my_videos --out broken.json

The training scripts leave out what is refused here, and list it in `broken_videos.json`. They
decode in their own process; here each file is decoded in a process of its own kind, with a limit on
time and memory, so that a file which crashes or hangs the decoder is named as well. Of long or
large files what the frames need is decoded, not everything (inputs/frames.py). Found are files with
the extension of a video, in all sub-folders; hidden files and folders, and what a Mac packs beside
them (._a.mp4, __MACOSX), are passed over and counted."""

import json
import multiprocessing
import os
import resource
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.flags import Flags, answer_help, flag, parse_args

MORE = (".3gp", ".264", ".flv", ".h264", ".m4v", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob",
        ".wmv")
BLACK = 24  # of 255; a picture without a brighter dot


@dataclass
class Args(Flags):
    videos: str = flag("", "a folder, or one file")
    num_frames: int = flag(8, "frames to read of each", low=1)
    time_limit: float = flag(60.0,
                             "seconds of the processor for one file, by the clock ten times that",
                             above=0)
    memory_gib: float = flag(4.0, "memory for one file", above=0)
    workers: int = flag(os.cpu_count(), "files at the same time", low=1)
    out: str = flag("", "write {file: why it is refused} into this JSON file")

    def __post_init__(self):
        super().__post_init__()
        if not self.videos:
            raise ValueError("--videos: a folder, or one file")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds


from inputs.frames import VideoError, one_line, read_frames
from inputs.records import EXTENSIONS
from plumbing import files


def examine(path, num_frames):
    """-> (why it is refused or "", all frames are black)."""
    try:
        frames, times = read_frames(path, num_frames)
    except VideoError as e:
        return str(e), False
    if len(frames) != num_frames or len(times) != num_frames:
        return f"{path}: {len(frames)} frames instead of {num_frames}", False
    return "", bool(frames.max() < BLACK)


def work(pipe, function, memory_gib):
    """The life of a worker: a path comes in, what `function` says of it goes out."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = now + int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        pipe.send(function(*pipe.recv()))


class Worker:
    def __init__(self, function, memory_gib):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=work, args=(theirs, function, memory_gib), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, *job):
        self.job, self.since, self.before = job, time.monotonic(), self.used()
        self.pipe.send(job)

    def used(self):
        """Seconds of the processor since the process began."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def in_workers(jobs, function, workers, time_limit, memory_gib):
    """function(*job) of every job in processes that may crash or hang. -> (job, result, seconds),
    as they are ready; a result is a string where there is none of the function's own."""
    jobs, idle, busy = list(jobs)[::-1], [], []
    try:
        while jobs or busy:
            while jobs and len(busy) < workers:
                busy.append(idle.pop() if idle else Worker(function, memory_gib))
                busy[-1].give(*jobs.pop())
            ready = wait([w.pipe for w in busy], timeout=0.2)
            for w in list(busy):
                seconds = time.monotonic() - w.since
                if w.pipe in ready:
                    try:
                        result = w.pipe.recv()
                        idle.append(w)
                    except EOFError:
                        w.process.join()
                        result = f"{w.job[0]}: crashes the decoder (exit code {w.end()})"
                elif max(w.used() - w.before, seconds / 10) > time_limit:
                    w.end()
                    result = f"{w.job[0]}: not done after {time_limit:g} s"
                else:
                    continue
                busy.remove(w)
                yield w.job, result, seconds
    finally:
        for w in busy + idle:
            w.end()


def is_hidden(path):
    """Is a file, or a folder that it lies in, hidden or one of those that a Mac packs beside what
    is meant?"""
    return any(name[0] == "." or name == "__MACOSX" for name in path.split(os.sep))


def video_paths(place, hidden=False):
    """The videos of a folder and its sub-folders, the visible or the hidden ones; a file is
    itself."""
    if os.path.isfile(place):
        return [] if hidden else [place]
    return sorted(path for folder, _, files in os.walk(place) for file in files
                  if file.lower().endswith(EXTENSIONS + MORE)
                  and is_hidden(os.path.relpath(path := os.path.join(folder, file), place))
                  == hidden)


def main(args):
    if not os.path.exists(args.videos):
        sys.exit(one_line(f"check_videos.py: --videos {args.videos}: no such file or folder"))
    paths, hidden = video_paths(args.videos), video_paths(args.videos, hidden=True)
    passed = f", {len(hidden)} hidden ones passed over, e.g. {hidden[0]}" if hidden else ""
    if not paths:
        sys.exit(one_line(f"--videos {args.videos}: no file there has the extension of a "
                          f"video{passed}"))
    refused, black, slowest = {}, 0, (0.0, "")
    jobs = [(path, args.num_frames) for path in paths]
    for (path, _), result, seconds in in_workers(jobs, examine, args.workers, args.time_limit,
                                                 args.memory_gib):
        why, is_black = (result, False) if isinstance(result, str) else result
        slowest = max(slowest, (seconds, path))
        if why:
            refused[path] = why
            print(one_line(f"refused: {why}"), flush=True)
        elif is_black:
            black += 1
            print(one_line(f"black: {path}: no frame shows anything"), flush=True)
    print(one_line(f"{len(paths)} files: {len(paths) - len(refused)} can be read, {black} of them "
                   f"are black; {len(refused)} refused{passed}; the slowest took {slowest[0]:.1f} "
                   f"s: {slowest[1]}"))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        files.write(Path(args.out), json.dumps(dict(sorted(refused.items())), indent=1) + "\n")
    sys.exit(1 if refused else 0)


if __name__ == "__main__":
    main(parse_args(Args))
