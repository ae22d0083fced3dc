"""What runs cost, and what their reward did beside the true accuracy: <out>_cost.md and <out>_curves.png.

    python benchmarks/costs.py --runs "runs/ppo_rlaif/context_s*" "runs/grpo_rank/context_s*" --out docs/results/x

Answers and seconds are those of metrics.jsonl, memory is that of cost.json (all processes of a run together).
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


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cost_of(folder):
    """-> sampled answers in thousands, optimizer steps, seconds, peak memory in GB of one run."""
    args, rows = json.loads((folder / "args.json").read_text())["args"], rows_of(folder)
    done = sum("charts/lr" in row for row in rows)  # a last evaluation has a row, but is no step
    answers = done * args["prompts_per_step"] * args["G"] if "G" in args else 0
    answers += sum(len(file.read_text().splitlines()) for file in folder.glob("iteration_*/answers.jsonl"))  # DPO
    updates = args.get("ppo_epochs", args.get("inner_epochs", 1)) * args.get("mini_batches", 1)
    cost = folder / "cost.json"
    peak = json.loads(cost.read_text())["peak_gb"] if cost.exists() else float("nan")
    return answers / 1000, done * updates, sum(row["time/step_s"] for row in rows), peak


def cost_table(groups):
    lines = ["| per run, mean over seeds | sampled answers, thousands | optimizer steps | seconds | peak memory, GB |",
             "| --- | ---: | ---: | ---: | ---: |"]
    for label, folders in groups.items():
        answers, steps, seconds, peak = np.mean([cost_of(f) for f in folders], 0)
        lines.append(f"| {label} | {answers:.1f} | {steps:.0f} | {seconds:.0f} | {peak:.2f} |")
    commits = {json.loads((f / "args.json").read_text())["git_commit"] for fs in groups.values() for f in fs}
    lines += ["", f"commit {', '.join(sorted(commits))}; {os.cpu_count()} CPU cores, one thread a process"]
    return "\n".join(lines) + "\n"


def smooth(values, width=10):
    """Mean over the last `width` values."""
    return np.array([np.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))])


def plot_curves(groups, file):
    """One panel a group: the reward it was trained on (left axis) and the true held-out accuracy (right axis)."""
    fig, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4), squeeze=False, layout="constrained")
    for axis, (title, folders) in zip(axes[0], groups.items()):
        other = axis.twinx()
        for folder in folders:
            rows = rows_of(folder)
            score = [(r["step"], r["objective/score"]) for r in rows if "objective/score" in r]
            right = [(r["step"], 100 * r["eval/accuracy"]) for r in rows if "eval/accuracy" in r]
            axis.plot([s for s, _ in score], smooth([v for _, v in score]), color="tab:orange", alpha=0.7)
            other.plot([s for s, _ in right], [v for _, v in right], "o-", color="tab:blue", alpha=0.7)
        axis.set(title=title, xlabel="step")
        axis.set_ylabel("reward (mean of 10 steps)", color="tab:orange")
        other.set_ylabel("accuracy on held-out questions, %", color="tab:blue")
    fig.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", default=[], help="rows of the table; a glob is one row of seeds")
    parser.add_argument("--labels", default="", help="their names, comma-separated")
    parser.add_argument("--curves", nargs="*", default=[], help="panels of the plot; a glob is one panel of seeds")
    parser.add_argument("--titles", default="", help="their names, comma-separated")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    def groups(patterns, names):
        names = names.split(",") if names else patterns
        if len(names) != len(patterns):
            sys.exit(f"{len(patterns)} groups of runs, {len(names)} names")
        found = {name: [Path(f) for f in sorted(glob.glob(pattern))] for name, pattern in zip(names, patterns)}
        for name, pattern in zip(names, patterns):
            if not found[name]:
                sys.exit(f"{pattern}: no such run")
        return found

    if args.runs:
        table = cost_table(groups(args.runs, args.labels))
        Path(f"{args.out}_cost.md").write_text(table)
        print(table)
    if args.curves:
        plot_curves(groups(args.curves, args.titles), f"{args.out}_curves.png")


if __name__ == "__main__":
    main()
