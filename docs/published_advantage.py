"""The five-answer example of docs/published_advantage.md: its table and its picture.

Run      python docs/published_advantage.py        then python docs/fill.py
"""

import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from grpo_rank import gain, penalty, rank_advantages  # noqa: E402

# "Where does the red circle go?" One answer is right, and the policy finds it the least likely of
# the five.
ANSWERS = ["right", "up", "left", "down", "nowhere"]
ORACLE, POLICY = torch.tensor([[0, 1, 1, 1, 1]]), torch.tensor([[4, 0, 1, 2, 3]])
KINDS = ("published", "signed", "oracle_rank")
COLOURS = ("#d55e00", "#999999", "#0072b2")

A = {kind: rank_advantages(kind, ORACLE, POLICY)[0].tolist() for kind in KINDS}
columns = [ORACLE[0].tolist(), POLICY[0].tolist(),
           *(x[0].tolist() for x in (gain(ORACLE)[0], gain(POLICY)[0])),
           penalty(ORACLE, POLICY)[0].tolist(), *A.values()]
with open(HERE / "results" / "published_advantage.md", "w", encoding="utf-8") as f:
    f.write("| answer | oracle's rank t | policy's rank p | g(t) | g(p) | delta(t, p) | "
            + " | ".join(KINDS) + " |\n")
    f.write("| --- |" + " ---: |" * len(columns) + "\n")
    for answer, *row in zip(ANSWERS, *columns):
        cells = ([str(x) if isinstance(x, int) else f"{x:.4f}" for x in row[:5]]
                 + [f"{x:+.4f}" for x in row[5:]])
        f.write(f"| {answer} | {' | '.join(cells)} |\n")

figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
for ax, kind, colour in zip(axes, KINDS, COLOURS):
    ax.bar(range(5), A[kind], color=colour)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(range(5), ["right\n(unlikely)", "up\n(likeliest)", *ANSWERS[2:]], fontsize=8)
    ax.set_title(f"--advantage {kind}", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("advantage of the answer")
figure.savefig(HERE / "published_advantage.png", dpi=120)
