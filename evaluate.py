"""Held-out accuracy of checkpoints, side by side: table by task type, paired differences, bar plot, learning curves.

Run      python evaluate.py --runs runs/sft/policy_s0 runs/grpo_rank/context_s0         one column per argument
         python evaluate.py --runs "runs/sft/policy_s*" "runs/grpo_rank/context_s*" --labels SFT,GRPO --out results/demo
Makes    <run>/predictions_<data>.json, used again while checkpoint, questions and videos are the same, so that a table
         is cheap to redraw; with --out also results/demo.json, .md and .png

accuracy    share of greedy answers that match the label exactly (lower case, no punctuation, no articles), in %;
            "a ± b": mean and sample standard deviation over the seeds of a column
chance      accuracy of the training file's most frequent answer to the same question text: what needs no video
difference  to the first column, on the same questions and the same seeds; [low, high] is a 95 % interval from a
            bootstrap over videos (questions about one video are not independent), after averaging over the seeds. It
            says what other videos would give, not what other seeds would: for that see the row "over seeds".

symbol  name           shape   meaning
a, b    correct        (S,R)   1 where a run is right: S seeds, R questions
d, n    d, n           (C,)    sum of b - a over the questions of each of C videos, and their number
W       W              (K,C)   how often each of K resamples holds each video
"""

import glob
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib
import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import harness
from data import DataError, FeatureCache, read_records, report_lines, video_files
from moving_shapes import TASK_TYPES
from oracle import DESCRIBE, normalize, token_f1
from video_llm import Prefix, generate, load_model, unwrap

WORLD = "data/moving_shapes"
COLORS = ("#8c8c8c", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800")  # after Okabe-Ito
LEGEND = "a ± b: mean and standard deviation over seeds; [low, high]: 95 % interval over videos, seeds as they are"


# --- Answers and benchmarks ----------------------------------------------------------------------------------------
def answer(model, processor, cache, records, max_new_tokens=48, batch_size=100, return_ended=False):
    """Greedy answers to the questions of `records`, in order: list of strings. return_ended: also a list of bools,
    False where an answer was cut at `max_new_tokens` instead of ending with EOS."""
    device, eos, out, ended = next(model.parameters()).device, processor.tokenizer.eos_token_id, [], []
    for i in range(0, len(records), batch_size):
        some = records[i : i + batch_size]
        prefix = Prefix.build(processor, cache, [r["question"] for r in some], [r["clip"] for r in some], device)
        tokens, lengths, _ = generate(model, prefix, torch.zeros(len(some), 1, max_new_tokens), eos, temperature=0)
        out += [group[0] for group in processor.decode_answers(tokens, lengths)]
        ended += (tokens.gather(-1, lengths.unsqueeze(-1) - 1) == eos).flatten().tolist()
    return (out, ended) if return_ended else out


def is_correct(prediction, reference):
    """Exact match of normalised text (lower case, no punctuation, no articles)."""
    return normalize(prediction) == normalize(reference)


def open_questions(files, video_root):
    """Labelled questions about videos; requests for descriptions have no single right answer. -> records, report."""
    records, report = read_records(files, video_root)
    records = [r for r in records if r["clip"] and r["answer"] and r["question"] != DESCRIBE]
    return [{**r, "task_type": r["task_type"] or "no task type"} for r in records], report


class Benchmark(NamedTuple):
    data: str  # its test split
    questions: Callable  # (files, video_root) -> records, report
    correct: Callable  # (prediction, reference) -> bool


BENCHMARKS = {"moving_shapes": Benchmark(f"{WORLD}/test.json", open_questions, is_correct)}
BENCHMARK = BENCHMARKS["moving_shapes"]


@dataclass
class Args:
    runs: list[str] = HfArg(help="run or checkpoint folders, one column each; a quoted glob is one column of seeds")
    labels: str = HfArg(default="", help="names of the columns, comma-separated; empty: folder names without _s<seed>")
    data: str = HfArg(default=BENCHMARK.data, help="annotation file(s) of the test split, comma-separated")
    video_root: str = HfArg(default="", help="where the videos are; empty: beside the annotation file")
    chance_data: str = HfArg(default="", help="training file, for chance; empty: train.json beside --data, if any")
    out: str = HfArg(default="", help="write <out>.json, <out>.md and <out>.png")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features")
    groups: dict = field(init=False)  # {label: [Run, ...]}

    def __post_init__(self):
        self.groups = group_runs(self.runs, [x.strip() for x in self.labels.split(",")] if self.labels else None)
        self.chance_data = self.chance_data or str(Path(self.data.split(",")[0]).parent / "train.json")


# --- Numbers -------------------------------------------------------------------------------------------------------
def by_task_type(values, types):
    """{task type: mean of its values} and "all": the mean over all questions, not over types. values (R,), types (R,).
    Video-MME's types come in their usual order, then the user's own as they occur."""
    values, order = np.asarray(values, dtype=float), list(dict.fromkeys(types))
    order.sort(key=lambda t: TASK_TYPES.index(t) if t in TASK_TYPES else len(TASK_TYPES))
    return {t: float(values[np.array(types) == t].mean()) for t in order} | {"all": float(values.mean())}


def spread(values):
    """Sample standard deviation (n - 1) over seeds; None for a single one, whose spread is unknown, not zero."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def over_seeds(values):
    return dict(mean=float(np.mean(values)), spread=spread(values), runs=[float(v) for v in values])


def paired_bootstrap(a, b, clips, resamples=10_000, seed=0):
    """Mean of b - a with a 95 % percentile interval over resampled clips: (mean, low, high).

    a (S,R), b (S',R) on the same R questions; clips (R,) the clip of each. Seeds are averaged first; a clip is drawn
    with all its questions, so that the mean of a resample is sum(W d) / sum(W n).
    """
    difference = np.mean(b, axis=0, dtype=float) - np.mean(a, axis=0, dtype=float)  # (R,)
    clip = np.unique(np.asarray(clips), return_inverse=True)[1]
    d, n = np.bincount(clip, difference), np.bincount(clip)  # (C,) (C,)
    rng, chunk, means = np.random.default_rng(seed), max(1, 2_000_000 // len(n)), []  # a chunk of W holds 16 MB
    for k in range(0, resamples, chunk):
        W = rng.multinomial(len(n), np.full(len(n), 1 / len(n)), size=min(chunk, resamples - k))  # (K,C)
        means.append((W @ d) / (W @ n))
    return (float(difference.mean()), *np.quantile(np.concatenate(means), [0.025, 0.975]).tolist())


def chance(train, records):
    """(R,) bools: is the most frequent training answer to the question's text (if new: to its task type) right?"""
    text = lambda r: normalize(r["question"] if isinstance(r["question"], str) else r["question"][-1]["content"])
    counts = {}
    for r in train:
        for key in (("text", text(r)), ("type", r["task_type"])):
            counts.setdefault(key, Counter())[normalize(r["answer"])] += 1
    best = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    guesses = [best.get(("text", text(r)), best.get(("type", r["task_type"]))) for r in records]
    return [guess is not None and is_correct(guess, r["answer"]) for guess, r in zip(guesses, records)]


# --- Runs and their predictions ------------------------------------------------------------------------------------
class Run(NamedTuple):
    folder: Path  # predictions are written here
    checkpoint: Path
    name: str  # the folder's without _s<seed>
    seed: int | None


def find_run(path):
    """A run folder with final/, or a checkpoint folder. ValueError where there is neither."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"--runs: {path} is no folder")
    folder = path.parent if path.name == "final" else path
    configs = ("config.json", "adapter_config.json")
    there = [c for c in (folder / "final", path) if any((c / name).exists() for name in configs)]
    if not there:
        raise ValueError(f"--runs: {path} holds no final/ with a checkpoint; is the run finished?")
    name, seed = re.fullmatch(r"(.+?)(?:_s(\d+))?", folder.resolve().name).groups()
    return Run(folder, there[0], name, None if seed is None else int(seed))


def group_runs(arguments, labels=None):
    """Arguments of --runs -> {label: [Run, ...]}: a column per argument. Arguments with the same label, such as seeds
    of one name that the shell's own glob found, are one column. ValueError says what is wrong."""
    found = [[find_run(p) for p in ([a] if os.path.exists(a) else sorted(glob.glob(a)) or [a])] for a in arguments]
    labels = labels or [runs[0].name for runs in found]
    if len(labels) != len(found):
        raise ValueError(f"--labels has {len(labels)} names, --runs {len(found)} arguments")
    groups = {}
    for label, runs in zip(labels, found):
        groups.setdefault(label, []).extend(runs)
    for label, runs in groups.items():
        seeds = {run.seed for run in runs}
        if len(runs) > 1 and (None in seeds or len(seeds) < len(runs)):
            raise ValueError(f"--runs: column {label!r} needs folders of different _s<seed>; part columns by --labels")
    return groups


def fingerprint(checkpoint, records):
    """Hash of all that predictions depend on: the checkpoint (an adapter's base included), questions, videos."""
    digest = hashlib.sha256()
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model") and not file.name.startswith("predictions_"):
            with open(file, "rb") as f:
                digest.update(f"{file.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
        if file.name == "adapter_config.json":
            base = json.loads(file.read_text())["base_model_name_or_path"]
            digest.update((fingerprint(Path(base), []) if os.path.isdir(base) else base).encode())
    for path in dict.fromkeys(r["clip"].path for r in records):
        stats = [(os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in video_files(path) if os.path.exists(f)]
        digest.update(f"{path} {stats}\n".encode())
    digest.update(json.dumps([(r["clip"], r["question"], r["answer"], r["task_type"]) for r in records]).encode())
    return digest.hexdigest()


def predict(run, records, stem, cache_dir):
    """Answers of one run, kept in predictions_<stem>.json -> a row per record, its prediction None where the video
    cannot be read; {video: reason} of those."""
    file, mark = run.folder / f"predictions_{stem}.json", fingerprint(run.checkpoint, records)
    if file.exists() and (kept := json.loads(file.read_text())).get("fingerprint") == mark:
        print(f"{run.folder}: {len(records)} answers of {file.name} are used again", flush=True)
        return kept["predictions"], kept["left_out"]
    began, screen = time.time(), sys.stderr.isatty()
    try:
        model, processor = load_model(run.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    except SafetensorError as e:
        raise OSError(f"{run.checkpoint}: {e}") from e
    cache = FeatureCache(unwrap(model), processor, cache_dir)
    broken = cache.prepare([r["clip"] for r in records], progress=screen)
    rows = [dict(id=r.get("id"), video=str(r["clip"].path), question=r["question"], task_type=r["task_type"],
                 answer=r["answer"], prediction=None, correct=None, ended=None) for r in records]
    todo = [i for i, r in enumerate(records) if r["clip"] not in broken]
    parts = [todo[k : k + 100] for k in range(0, len(todo), 100)]
    for part in tqdm(parts, desc=f"{run.folder}, 100 questions each", leave=False, disable=not screen):
        texts, ended = answer(model.eval(), processor, cache, [records[i] for i in part], return_ended=True)
        for i, text, end in zip(part, texts, ended):
            rows[i] |= dict(prediction=text, correct=BENCHMARK.correct(text, records[i]["answer"]), ended=end)
    left_out = {str(clip.path): reason for clip, reason in broken.items()}
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(dict(fingerprint=mark, left_out=left_out, predictions=rows), indent=1))
    os.replace(aside, file)
    print(f"{run.folder}: {len(todo)} questions answered in {time.time() - began:.0f} s", flush=True)
    return rows, left_out


def learning_curve(run):
    """{step: eval/accuracy} of a run's metrics.jsonl; empty where it has none."""
    file = run.folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line
    return {r["step"]: r["eval/accuracy"] for r in rows if "eval/accuracy" in r}


# --- The comparison: summary -> table, text, markdown, picture -----------------------------------------------------
def compare(groups, predictions, guesses=None):
    """{label: [Run]}, {label: [rows of each run]}, chance (R,) or None -> all that table and picture show.
    A question that any run could not answer (broken video) is left out of all of them."""
    every = [rows for runs in predictions.values() for rows in runs]
    keep = [i for i in range(len(every[0])) if all(rows[i]["prediction"] is not None for rows in every)]
    if not keep:
        raise DataError("no video of the test split can be read")
    types, clips = ([every[0][i][key] for i in keep] for key in ("task_type", "video"))
    columns, correct = [], {}
    for label, runs in groups.items():
        kept = [[rows[i] for i in keep] for rows in predictions[label]]  # (S,R) rows
        mean = lambda value: over_seeds([np.mean([value(row) for row in rows]) for rows in kept])
        correct[label] = np.array([[row["correct"] for row in rows] for rows in kept])  # (S,R)
        accuracy = [by_task_type(c, types) for c in correct[label]]
        columns.append(dict(
            label=label, runs=[str(run.folder) for run in runs], seeds=[run.seed for run in runs],
            accuracy={t: over_seeds([a[t] for a in accuracy]) for t in accuracy[0]},
            token_f1=mean(lambda row: token_f1(row["prediction"], row["answer"])),
            words=mean(lambda row: len(row["prediction"].split())), ended=mean(lambda row: row["ended"])))
        if len(columns) > 1:
            columns[-1]["difference"] = difference(columns[0], columns[-1], correct, types, clips)
    counts = {t: types.count(t) for t in columns[0]["accuracy"] if t != "all"} | {"all": len(keep)}
    return dict(videos=len(set(clips)), left_out=len(every[0]) - len(keep), counts=counts, columns=columns,
                chance=by_task_type([guesses[i] for i in keep], types) if guesses else None)


def difference(first, other, correct, types, clips):
    """A column minus the first one: on the seeds that both have, or of the means where they share none."""
    a, b = correct[first["label"]], correct[other["label"]]
    shared = [s for s in other["seeds"] if s in first["seeds"] and s is not None]
    if shared:
        a, b = (x[[column["seeds"].index(s) for s in shared]] for x, column in ((a, first), (b, other)))
    mean, low, high = paired_bootstrap(a, b, clips)
    each = by_task_type(b.mean(0) - a.mean(0), types)
    return dict(to=first["label"], seeds=shared, mean=mean, low=low, high=high, task_types=each,
                worst=min(each.items(), key=lambda item: item[1]),
                spread=spread(b.mean(1) - a.mean(1)) if shared else None)


def table(summary):
    """The summary as rows of cells; the first row is the heading, the first cell of a row its name."""
    columns, guess, blank = summary["columns"], summary["chance"], [""]
    cell = lambda x: f"{100 * x['mean']:.1f}" + ("" if x["spread"] is None else f" ± {100 * x['spread']:.1f}")
    out = [["accuracy in %", *(c["label"] for c in columns), *(["chance"] if guess else []), "questions"]]
    for t, n in summary["counts"].items():
        guessed = [f"{100 * guess[t]:.1f}"] if guess else []
        out.append([t, *(cell(c["accuracy"][t]) for c in columns), *guessed, str(n)])
    if changes := [c["difference"] for c in columns[1:]]:
        show = lambda d: f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        loss = lambda d: f"{100 * d['worst'][1]:+.1f} {d['worst'][0]}" if d["worst"][1] < 0 else "none"
        out.append([f"difference to {columns[0]['label']}", "", *map(show, changes)])
        if any(d["spread"] is not None for d in changes):
            apart = ("" if d["spread"] is None else f"± {100 * d['spread']:.1f}" for d in changes)
            out.append(["  over seeds", "", *apart])
        out.append(["  largest loss", "", *map(loss, changes)])
    out += [[name, *(cell(c[key]) for c in columns)] for name, key in (("token F1", "token_f1"), ("ended", "ended"))]
    out.append(["words per answer", *(f"{c['words']['mean']:.2f}" for c in columns)])
    out.append(["seeds", *(" ".join("-" if s is None else str(s) for s in c["seeds"]) for c in columns)])
    return [row + blank * (len(out[0]) - len(row)) for row in out]


def as_text(rows):
    """Aligned columns, names to the left, numbers to the right; lines below the heading and around the row "all"."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    rule, at = "-" * (sum(widths) + 2 * len(widths) - 2), [row[0] for row in rows].index("all")
    return "\n".join([lines[0], rule, *lines[1:at], rule, lines[at], rule, *lines[at + 1 :]])


def as_markdown(rows):
    cells = [[cell.strip().replace("|", "\\|") for cell in row] for row in rows]
    cells.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def plot(summary, curves, title, file):
    """Bars by task type with the spread over seeds, and beside them the learning curves of columns that have some."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    types, columns, colors = list(summary["counts"]), summary["columns"], {}
    place = np.arange(len(types)) + 0.35 * (np.array(types) == "all")  # a gap before the sum
    width, wide = 0.8 / len(columns), max(7.0, 1.15 * len(types))
    widths = [wide, 5.5] if any(curves.values()) else [wide]
    fig, axes = plt.subplots(1, len(widths), figsize=(sum(widths), 5.4), width_ratios=widths, squeeze=False,
                             layout="constrained")
    bars = axes[0, 0]
    for k, c in enumerate(columns):
        means, spreads = (np.array([100 * (c["accuracy"][t][key] or 0) for t in types]) for key in ("mean", "spread"))
        x, colors[c["label"]] = place + (k + 0.5) * width - 0.4, COLORS[k % len(COLORS)]
        bars.bar(x, means, 0.94 * width, color=colors[c["label"]], label=c["label"])
        if len(c["seeds"]) > 1:
            bars.errorbar(x, means, spreads, fmt="none", ecolor="#333333", elinewidth=1.2, capsize=2.5)
    if summary["chance"]:
        bars.hlines([100 * summary["chance"][t] for t in types], place - 0.42, place + 0.42, color="black",
                    linewidth=1.6, linestyle=(0, (2, 1)), label="chance (most frequent answer)")
    bars.set_xticks(place, [t.replace(" ", "\n") for t in types], fontsize=10.5)
    bars.set(ylabel="accuracy (%)", xlim=(place[0] - 0.6, place[-1] + 0.6))
    bars.set_title(title, loc="left", fontsize=13)
    for label, runs in curves.items():
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        if steps:
            values = 100 * np.array([[run[s] for s in steps] for run in runs])  # (S,steps)
            mean, band = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else 0
            axes[0, 1].fill_between(steps, mean - band, mean + band, color=colors[label], alpha=0.2, linewidth=0)
            axes[0, 1].plot(steps, mean, color=colors[label], linewidth=2.2, marker="o", markersize=4)
            axes[0, 1].set(xlabel="step", ylabel="validation accuracy (%)")
            axes[0, 1].set_title("Learning curves", loc="left", fontsize=13)
    for ax in axes[0]:
        ax.grid(axis="y", color="#dddddd", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.yaxis.label.set_size(12)
    fig.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=12)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def main(args):
    if args.data.startswith(WORLD):
        harness.build_if_missing(f"{WORLD}/clips.json", ["moving_shapes.py"], "under a minute", 0)
    files, predictions, left_out, guesses = args.data.split(","), {}, {}, None
    with harness.one_line_errors(DataError, OSError):
        records, report = BENCHMARK.questions(files, args.video_root or None)
        if not records:
            raise DataError(f"{args.data}: no labelled question about a video")
        print("\n".join(report_lines(report)))
        if os.path.exists(args.chance_data):
            guesses = chance(BENCHMARK.questions([args.chance_data], args.video_root or None)[0], records)
        for label, runs in args.groups.items():
            done = [predict(run, records, "+".join(Path(f).stem for f in files), args.cache) for run in runs]
            predictions[label] = [rows for rows, _ in done]
            left_out |= {video: reason for _, broken in done for video, reason in broken.items()}
        summary = compare(args.groups, predictions, guesses)
        title = f"Accuracy on {args.data}: {summary['counts']['all']} questions about {summary['videos']} videos"
        missing = [f"left out of every column: {reason}" for reason in left_out.values()]
        missing += [f"{len(missing)} videos with {summary['left_out']} questions are left out"] if missing else []
        print("\n" + "\n".join([*missing, title, "", as_text(table(summary)), LEGEND]))
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            about = dict(title=title, command=" ".join(sys.argv), git_commit=harness.git_commit(), broken=left_out)
            Path(f"{args.out}.json").write_text(json.dumps(about | summary, indent=1) + "\n")
            parts = [title, *missing, as_markdown(table(summary)), LEGEND]
            Path(f"{args.out}.md").write_text("\n\n".join(parts) + "\n")
            curves = {label: [c for c in map(learning_curve, runs) if c] for label, runs in args.groups.items()}
            plot(summary, curves, title, f"{args.out}.png")
            print(f"\nwritten: {args.out}.json, {args.out}.md, {args.out}.png")


if __name__ == "__main__":
    main(harness.parse_args(Args))
