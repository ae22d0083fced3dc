"""Where extrapolating helps: what runs of dpo_iter_w2s.py wrote into extrapolation.json, as a table
and a picture.

    python experiments/alphas.py --labels "AI oracle,reference" --out docs/results/dpo_alphas \
        --runs "runs/dpo_iter_w2s/context_s*" "runs/dpo_iter_w2s/reference_s*"
"""

import argparse
import glob
import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.report import COLORS, tidy  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", required=True, help="quoted globs, one for each label")
    parser.add_argument("--labels", required=True, help="comma-separated")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    # found: (label, iteration) -> what each seed found
    found, commits, labels = {}, set(), args.labels.split(",")
    for label, pattern in zip(labels, args.runs, strict=True):
        for run in sorted(glob.glob(pattern)):
            commits.add(json.loads(Path(run, "args.json").read_text())["git_commit"])
            for k, file in enumerate(sorted(Path(run).glob("iteration_*/extrapolation.json")), 1):
                found.setdefault((label, k), []).append(json.loads(file.read_text()))
    alphas = sorted({row["alpha"] for seeds in found.values() for seed in seeds
                     for row in seed["curve"]})
    lines = [f"| accuracy in %, alpha = | {' | '.join(f'{a:g}' for a in alphas)} | chosen, seed by "
             "seed |", "| --- |" + " ---: |" * len(alphas) + " --- |"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (label, k), seeds in found.items():
        curves = [{row["alpha"]: row for row in seed["curve"]} for seed in seeds]
        mean = lambda key, curves=curves: [statistics.mean(c[a][key] for c in curves)
                                           for a in alphas]
        cells = [f"{100 * x:.1f}"
                 for x in mean("accuracy")] + [", ".join(f"{seed['chosen']:g}" for seed in seeds)]
        lines.append(f"| {label}, iteration {k} | {' | '.join(cells)} |")
        line = dict(color=COLORS[1 + labels.index(label)], marker="o",
                    linestyle="-" if k > 1 else "--", label=f"{label}, iteration {k}")
        axes[0].plot(alphas, mean("score"), **line)
        axes[1].plot(alphas, [100 * x for x in mean("accuracy")], **line)
    axes[0].set(xlabel="alpha", ylabel="the oracle's score, 0 to 5")
    axes[1].set(xlabel="alpha", ylabel="accuracy (%)")
    for axis in axes:
        axis.axvline(0, color="#999999", linewidth=0.8)
        tidy(axis)
    axes[1].legend(frameon=False, fontsize=8)
    lines += ["", f"on the validation questions that alpha is chosen on, mean over {len(seeds)} "
                  "seeds; -1: the iteration undone, 0: DPO, above 0: extrapolated; commit "
                  f"{', '.join(sorted(commits))}"]
    Path(f"{args.out}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure.savefig(f"{args.out}.png", dpi=150)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
