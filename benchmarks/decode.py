"""Seconds to read 8 and 50 frames out of a video file, taking turns: `read_frames` of
inputs/frames.py, the video loader of `transformers` with every backend that is installed, and a
decoding of the whole file.

Run      pip install decord opencv-python-headless torchcodec==0.12.0  (needs ffmpeg's libraries)
         python benchmarks/decode.py --out docs/results/decode          10 minutes on two CPU cores
         python benchmarks/decode.py --videos my_videos                 your files beside the three

The three files are made here: short (2 s, 320 x 240), long (10 minutes, 320 x 240), 1080p (20 s),
all H.264 at 25 frames a second with its default distance of key frames. Everyone is asked for the
frames np.linspace(0, N - 1, n) and gets whatever threads it takes by default. In a round a file is
read for at least a quarter of a second, a short one several times. Ratios are medians over the
rounds of the other's seconds over ours within a round. Before, the frames are compared: all must be
the same ones (decoders turn colours into RGB by tables of their own, so a mean difference of 3 of
255 is allowed; the next frame of these files is further away).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plumbing.run  # noqa: E402
from inputs.frames import read_frames  # noqa: E402
from inputs.records import EXTENSIONS  # noqa: E402

BACKENDS = ("pyav", "decord", "opencv", "torchcodec")
LEAST = 0.25  # seconds of a measurement
FILES = dict(short=(2, (320, 240)), long=(600, (320, 240)), hd=(20, (1920, 1080)))


def make(path, seconds, size):
    """A bar that moves over a pattern; 11 stripes above count the frames."""
    width, height = size
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 160, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for k in range(25 * seconds):
            image = pattern.copy()
            image[height // 2 :, k * 7 % width : k * 7 % width + width // 8] = 255
            bits = (k >> (np.arange(width) * 14 // width)) & 1
            image[: height // 3] = (bits * 220 + 15)[:, None]
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = k, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def whole(path, n):
    """Every frame decoded and kept as RGB, then the choice."""
    with av.open(path) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    return np.stack([frames[i] for i in np.linspace(0, len(frames) - 1, n).astype(int)])


def loader(backend):
    from transformers.video_utils import load_video

    def choose(metadata, num_frames, **_):
        return np.linspace(0, metadata.total_num_frames - 1, num_frames).astype(int)

    def read(path, n):
        which = lambda metadata, **_: choose(metadata, n)
        return np.asarray(load_video(path, backend=backend, sample_indices_fn=which)[0])

    return read


def sides(path, n):
    """{name: function} of all that can read the file, and {name: why} of those that cannot."""
    everyone = {"ours": lambda path, n: read_frames(path, n)[0], "whole": whole,
                **{backend: loader(backend) for backend in BACKENDS}}
    expected, can, cannot = read_frames(path, n)[0].astype(np.int16), {}, {}
    for name, read in everyone.items():
        try:
            found = read(path, n)
        except Exception as e:  # not installed, or its libraries are missing
            cannot[name] = " ".join(str(e).split())[:100]
            continue
        if name == "torchcodec" and found.shape[-1] != 3:
            found = found.transpose(0, 2, 3, 1)
        apart = np.inf
        if found.shape == expected.shape:  # frame by frame: of 1080p they are large
            apart = max(np.abs(a - b).mean() for a, b in zip(found, expected))
        if apart > 3:
            sys.exit(f"{path}: {name} and ours do not give the same {n} frames ({apart:.1f} apart, "
                     f"{found.shape})")
        can[name] = read
    return can, cannot


def measure(path, n, rounds):
    can, cannot = sides(path, n)
    seconds = {name: [] for name in can}
    for _ in range(rounds):
        for name, read in can.items():
            began, count = time.perf_counter(), 0
            while not count or time.perf_counter() - began < LEAST:
                read(path, n)
                count += 1
            seconds[name].append((time.perf_counter() - began) / count)
    ratios = {name: sorted(a / b for a, b in zip(row, seconds["ours"]))
              for name, row in seconds.items()}
    return dict(frames=n, cannot=cannot,
                sides={name: dict(seconds=statistics.median(row),
                                  ratio=statistics.median(ratios[name]), ratio_low=ratios[name][0],
                                  ratio_high=ratios[name][-1], rounds=row)
                       for name, row in seconds.items()})


def markdown(rows, about):
    lines = [f"{about['rounds']} rounds, commit {about['git_commit']}; seconds, and times ours "
             "[min, max]", ""]
    names = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    lines += [f"| file | frames | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for row in rows:
        cells = [f"{s['seconds']:.3f} ({s['ratio']:.1f} [{s['ratio_low']:.1f}, "
                 f"{s['ratio_high']:.1f}])" if s else "" for s in map(row["sides"].get, names)]
        lines.append(f"| {row['file']} | {row['frames']} | {' | '.join(cells)} |")
    missing = {name: why for row in rows for name, why in row["cannot"].items()}
    return "\n".join([*lines, "",
                      *(f"{name}: not measured, {why}" for name, why in missing.items())]) + "\n"


def plot(rows, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(rows), figsize=(2.6 * len(rows), 3.2), layout="constrained",
                             squeeze=False)
    for ax, row in zip(axes[0], rows):
        names = list(row["sides"])
        ax.bar(names, [row["sides"][n]["seconds"] for n in names],
               color=["#0072b2" if n == "ours" else "#999999" for n in names])
        ax.set_title(f"{row['frames']} of {row['file']}", fontsize=9)
        ax.tick_params(axis="x", rotation=60)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("seconds")
    fig.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", nargs="*", default=list(FILES), choices=list(FILES))
    parser.add_argument("--videos", default="", help="a folder of files of your own, measured as "
                                                     "well")
    parser.add_argument("--frames", nargs="+", type=int, default=[8, 50])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shorten", type=float, default=1,
                        help="make the files so many times shorter: a trial")
    parser.add_argument("--out", default="", help="write <out>.json, <out>.md and <out>.png")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.mp4") for name in args.files]
        for path in paths:
            seconds, size = FILES[path.stem]
            make(path, max(2, int(seconds / args.shorten)), size)
        if args.videos:
            paths += sorted(p for p in Path(args.videos).iterdir()
                            if p.suffix.lower() in EXTENSIONS and p.name[0] != ".")
        for path in paths:
            for n in args.frames:
                rows.append(dict(file=path.stem, **measure(str(path), n, args.rounds)))
                print(markdown(rows[-1:], dict(rounds=args.rounds, git_commit="-")), flush=True)
    about = dict(command=" ".join(["python", *sys.argv]), git_commit=plumbing.run.git_commit(),
                 rounds=args.rounds)
    print(markdown(rows, about))
    if args.out:
        Path(f"{args.out}.json").write_text(json.dumps(dict(about, rows=rows), indent=1) + "\n")
        Path(f"{args.out}.md").write_text(markdown(rows, about), encoding="utf-8")
        plot(rows, f"{args.out}.png")


if __name__ == "__main__":
    main()
