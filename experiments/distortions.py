"""Ranks against scores over the distortion of the reward: the runs of distorted_rewards.sh as a
table and a picture.

    python experiments/distortions.py --out docs/results/distortions

Reads what evaluate.py wrote into runs/grpo_rank/*/predictions_test.json. Differences are paired:
the same questions, the same seeds; their intervals are over videos, seeds as they are.
"""

import argparse
import glob
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.metrics import over_seeds, paired_bootstrap, spread  # noqa: E402
from evaluation.report import COLORS, tidy  # noqa: E402

KINDS = {"saturated": "saturation", "heavy tail": "tail", "10 % flipped": "flip10",
         "20 % flipped": "flip20", "30 % flipped": "flip30"}
# distortion: runs on ranks, runs on scores
ROWS = {"none": ("runs/grpo_rank/reference", "runs/grpo_rank/score")}
ROWS |= {name: (f"runs/grpo_rank/{k}_oracle_rank", f"runs/grpo_rank/{k}_score")
         for name, k in KINDS.items()}


def seeds_of(runs):
    return sorted(Path(file).parent for file in glob.glob(f"{runs}_s*/predictions_test.json"))


def correct_of(runs):
    """-> (S,R) which questions every seed answers right, their videos (R,), the seeds' folders."""
    folders = seeds_of(runs)
    if not folders:
        sys.exit(f"{runs}_s*: no predictions_test.json there; bash "
                 "experiments/distorted_rewards.sh makes them")
    rows = [json.loads((f / "predictions_test.json").read_text())["predictions"] for f in folders]
    return np.array([[r["correct"] for r in seed] for seed in rows],
                    float), [r["video"] for r in rows[0]], folders


def cell(values):
    sums = over_seeds(100 * values.mean(1))
    return f"{sums['mean']:.1f}" + ("" if sums["spread"] is None else f" ± {sums['spread']:.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    start, videos, _ = correct_of("runs/sft/policy")
    lines = ["| reward seen through | ranks: oracle_rank | scores: GRPO | ranks less scores | over "
             "seeds |", "| --- | ---: | ---: | ---: | ---: |"]
    found, commits = {}, set()
    missing = [name for name, pair in ROWS.items() if not any(map(seeds_of, pair))]
    for name, (on_ranks, on_scores) in ROWS.items():
        if name in missing:
            continue
        (ranks, _, folders), (scores, _, more) = correct_of(on_ranks), correct_of(on_scores)
        commits |= {json.loads((f / "args.json").read_text())["git_commit"] for f in folders + more}
        mean, low, high = (100 * x for x in paired_bootstrap(scores, ranks, videos))
        apart = spread(100 * (ranks.mean(1) - scores.mean(1)))
        lines.append(f"| {name} | {cell(ranks)} | {cell(scores)} | {mean:+.1f} [{low:+.1f}, "
                     f"{high:+.1f}] | {'' if apart is None else f'± {apart:.1f}'} |")
        found[name] = ranks, scores
    lines += ["", f"accuracy in %, {len(videos)} test questions, {len(start)} seeds; the SFT "
                  f"start: {cell(start)}; [low, high]: 95 % interval over videos, seeds as they "
                  f"are; commit {', '.join(sorted(commits))}"]
    lines += [f"\nnot run yet: {', '.join(missing)}"] * bool(missing)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    panels = {"monotone: the order is right": ["none", "saturated", "heavy tail"],
              "flipped: the order is wrong in places": ["none", "10 % flipped", "20 % flipped",
                                                        "30 % flipped"]}
    for axis, (title, names) in zip(axes, panels.items()):
        names = [name for name in names if name in found]
        for k, (label, color) in enumerate({"ranks": COLORS[2], "scores": COLORS[1]}.items()):
            seeds = 100 * np.array([found[name][k].mean(1) for name in names])  # (X,S)
            x = np.arange(len(names)) + 0.08 * (2 * k - 1)
            axis.plot(x, seeds, ".", color=color, alpha=0.5)
            axis.plot(x, seeds.mean(1), "o-", color=color, label=label)
        axis.axhline(100 * start.mean(), color=COLORS[0], linestyle="--", label="SFT")
        axis.set_xticks(range(len(names)), names)
        axis.set_title(title, loc="left", fontsize=10)
        tidy(axis)
    axes[0].set_ylabel("accuracy (%), dots: seeds")
    axes[0].legend(frameon=False)
    Path(f"{args.out}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure.savefig(f"{args.out}.png", dpi=150)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
