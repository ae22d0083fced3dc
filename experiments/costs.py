"""What runs cost and reach, and what their reward did beside the true accuracy: <out>_cost.md,
_bars.png, _curves.png.

    python experiments/costs.py --runs "runs/ppo_rlaif/context_s*" "runs/grpo_rank/context_s*"
        --out docs/results/x

Answers and seconds are those of metrics.jsonl, memory is that of cost.json (all processes of a run
together). --accuracy puts the numbers of a table of evaluate.py beside them.
"""

import argparse
import glob
import json
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.report import COLORS  # noqa: E402


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cost_of(folder):
    """-> sampled answers in thousands, optimizer steps, seconds, peak memory in GB of one run; NaN:
    not recorded. Seconds: the median step times the steps, so that what disturbed the machine for a
    while is not in them."""
    if not (folder / "args.json").exists():  # an iteration of a run
        return [np.nan] * 4
    args, lines_of = (json.loads((folder / "args.json").read_text())["args"],
                      lambda file: file.read_text().splitlines())
    # a last evaluation has a row, too
    steps = [row["time/step_s"] for row in rows_of(folder) if "charts/lr" in row]
    answers, seconds = len(steps) * args.get("prompts_per_step",
                                             0) * args.get("G", 0), np.median(steps) * len(steps)
    # DPO: the zoo's answers, some of them in the run that --preferences is of; no clock there
    if "alphas" in args:
        files = list(folder.glob("iteration_*/answers.jsonl"))
        files += [Path(args["preferences"]).with_name("answers.jsonl")] * bool(args["preferences"])
        answers, seconds = sum(len(lines_of(file)) for file in files), np.nan
    updates = args.get("ppo_epochs", args.get("inner_epochs", 1)) * args.get("mini_batches", 1)
    cost = folder / "cost.json"
    peak = json.loads(cost.read_text())["peak_gb"] if cost.exists() else np.nan
    return answers / 1000, len(steps) * updates, seconds, peak


def cost_table(groups, accuracy):
    """accuracy: the columns of a table that evaluate.py wrote, as rows here; or nothing."""
    heads = ["accuracy, %", "difference to the first"] * bool(accuracy)
    heads += ["sampled answers, thousands", "optimizer steps", "seconds", "peak memory, GB"]
    lines = [f"| per run, mean over seeds | {' | '.join(heads)} |",
             "| --- |" + " ---: |" * len(heads)]
    known, commits = {column["label"]: column for column in accuracy}, set()
    for label, folders in groups.items():
        cells = []
        if accuracy:
            whole, change = known[label]["accuracy"]["all"], known[label].get("difference")
            plus = lambda x: "" if x is None else f" ± {100 * x:.1f}"
            cells.append(f"{100 * whole['mean']:.1f}{plus(whole['spread'])}")
            mean, low, high = (f"{100 * change[k]:+.1f}" if change else ""
                               for k in ("mean", "low", "high"))
            cells.append(f"{mean} [{low}, {high}]{plus(change['spread'])}" if change else "")
        numbers = np.mean([cost_of(f) for f in folders], 0)
        cells += ["-" if np.isnan(x) else f"{x:.{digits}f}"
                  for x, digits in zip(numbers, (1, 0, 0, 2))]
        lines.append(f"| {label} | {' | '.join(cells)} |")
        files = [file for f in folders for file in f.glob("args.json")]
        commits |= {json.loads(file.read_text())["git_commit"] for file in files}
    note = ("[low, high]: 95 % interval over videos, ± over seeds; -: not recorded; " if accuracy
            else "")
    lines += ["", f"{note}commit {', '.join(sorted(commits))}; {os.cpu_count()} CPU cores, one "
                  "thread a process"]
    return "\n".join(lines) + "\n"


def plot_bars(summary, file):
    """A bar for every column of a table of evaluate.py: accuracy over all questions, its seeds as
    dots, and chance."""
    columns = summary["columns"][::-1]
    fig, axis = plt.subplots(figsize=(8, 0.9 + 0.3 * len(columns)), layout="constrained")
    for y, column in enumerate(columns):
        whole, first = column["accuracy"]["all"], column is columns[-1]
        axis.barh(y, 100 * whole["mean"], color=COLORS[0 if first else 2], alpha=0.75)
        axis.plot([100 * run for run in whole["runs"]], [y] * len(whole["runs"]), ".",
                  color="black")
    axis.axvline(100 * columns[-1]["accuracy"]["all"]["mean"], color=COLORS[0], linestyle="--",
                 linewidth=1)
    if summary["chance"]:
        axis.axvline(100 * summary["chance"]["all"], color="black", linestyle=":", label="chance")
        axis.legend(loc="upper right", frameon=False)
    axis.set_yticks(range(len(columns)), [column["label"] for column in columns])
    axis.set(xlabel="accuracy (%); dots: seeds; dashed: the start")
    axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(file, dpi=130)


def smooth(values, width=10):
    """Mean over the last `width` values."""
    return np.array([np.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))])


def plot_curves(groups, file):
    """One panel a group: the reward it was trained on (left axis) and the true held-out accuracy
    (right axis)."""
    fig, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4), squeeze=False,
                             layout="constrained")
    for axis, (title, folders) in zip(axes[0], groups.items()):
        other = axis.twinx()
        for folder in folders:
            rows = rows_of(folder)
            score = [(r["step"], r["objective/score"]) for r in rows if "objective/score" in r]
            right = [(r["step"], 100 * r["eval/accuracy"]) for r in rows if "eval/accuracy" in r]
            axis.plot([s for s, _ in score], smooth([v for _, v in score]), color="tab:orange",
                      alpha=0.7)
            other.plot([s for s, _ in right], [v for _, v in right], "o-", color="tab:blue",
                       alpha=0.7)
        axis.set(title=title, xlabel="step")
        axis.set_ylabel("reward (mean of 10 steps)", color="tab:orange")
        other.set_ylabel("accuracy on held-out questions, %", color="tab:blue")
    fig.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", default=[],
                        help="rows of the table; a glob is one row of seeds")
    parser.add_argument("--labels", default="", help="their names, comma-separated")
    parser.add_argument("--accuracy", default="", help="a .json of evaluate.py with these labels: "
                                                       "its numbers beside")
    parser.add_argument("--curves", nargs="*", default=[],
                        help="panels of the plot; a glob is one panel of seeds")
    parser.add_argument("--titles", default="", help="their names, comma-separated")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    def groups(patterns, names):
        names = names.split(",") if names else patterns
        if len(names) != len(patterns):
            sys.exit(f"{len(patterns)} groups of runs, {len(names)} names")
        found = {name: [Path(f) for f in sorted(glob.glob(pattern))]
                 for name, pattern in zip(names, patterns)}
        for name, pattern in zip(names, patterns):
            if not found[name]:
                sys.exit(f"{pattern}: no such run")
        return found

    if args.runs:
        summary = json.loads(Path(args.accuracy).read_text()) if args.accuracy else dict(columns=[])
        table = cost_table(groups(args.runs, args.labels), summary["columns"])
        if args.accuracy:
            plot_bars(summary, f"{args.out}_bars.png")
        Path(f"{args.out}_cost.md").write_text(table, encoding="utf-8")
        print(table)
    if args.curves:
        plot_curves(groups(args.curves, args.titles), f"{args.out}_curves.png")


if __name__ == "__main__":
    main()
