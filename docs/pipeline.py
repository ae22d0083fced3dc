"""Draw docs/pipeline.png, the picture on the first screen of the README.

Run      python docs/pipeline.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from embedded_world.moving_shapes import make_scene, render  # noqa: E402

INK, SOFT, LINE = "#1f2933", "#5b6672", "#55606c"
GREY, BLUE = ("#f1f3f5", "#c3cad1"), ("#e3eefb", "#2f6fb5")  # face, edge
ORANGE, GREEN = ("#fdeedd", "#c8781c"), ("#e4f3ea", "#2b8a57")

figure = plt.figure(figsize=(16, 7), dpi=100, facecolor="white")
axis = figure.add_axes((0, 0, 1, 1))
axis.set(xlim=(0, 1600), ylim=(700, 0))  # pixels, y points down
axis.axis("off")


def box(x, y, width, height, title, note="", colors=GREY, mono=False):
    """A rounded box with a bold title and a softer note below it, both centred."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=12",
                           linewidth=1.8, facecolor=colors[0], edgecolor=colors[1], zorder=2)
    axis.add_patch(shape)
    style = dict(ha="center", zorder=3, linespacing=1.25)
    font = dict(family="DejaVu Sans Mono") if mono else {}
    lines, title_lines = note.count("\n") + 1 if note else 0, title.count("\n") + 1
    top = y + height / 2 - (25 * lines + 27 * title_lines) / 2
    axis.text(x + width / 2, top + 27 * title_lines / 2, title, color=INK, fontsize=15.5,
              weight="bold", va="center", **style, **font)
    below = top + 27 * title_lines + 25 * lines / 2
    axis.text(x + width / 2, below, note, color=SOFT, fontsize=14, va="center", **style)


def panel(x, y, width, height, title, note, colors):
    """A wide frame around a part of the picture, its name in the upper left corner."""
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=16",
                                  linewidth=1.4, facecolor="#fafbfc", edgecolor=colors[1],
                                  zorder=1))
    style = dict(fontsize=16, weight="bold", family="DejaVu Sans Mono", va="center")
    name = axis.text(x + 20, y + 28, title, color=INK, **style)
    right = name.get_window_extent(figure.canvas.get_renderer()).x1
    axis.text(right + 18, y + 28, note, color=SOFT, fontsize=14, va="center")


def arrow(*points, color=LINE):
    """A line through the points with right angles as they are given, an arrow head at its end."""
    xs, ys = zip(*points)
    axis.plot(xs[:-1], ys[:-1], color=color, linewidth=2.2, solid_joinstyle="round", zorder=4)
    head = dict(arrowstyle="-|>,head_length=0.55,head_width=0.28", color=color, linewidth=2.2,
                shrinkA=0, shrinkB=0)
    axis.annotate("", xy=points[-1], xytext=points[-2], arrowprops=head, zorder=4)


def badge(x, y, number):
    """The number of a step, as in the comments of the loop in grpo_rank.py, on a corner of its
    box."""
    axis.plot(x, y, "o", markersize=23, color=BLUE[1], zorder=5)
    axis.text(x, y, number, color="white", fontsize=14, weight="bold", ha="center",
              va="center_baseline", zorder=6)


# the model
panel(24, 20, 1552, 178, "video_llm.py", "the one model: policy and oracle are both made of it",
      GREY)
scene = next(s for s in (make_scene(0, k) for k in range(100)) if len(s.shapes) == 3
             and not s.together)
frames = render(scene)
for k, frame in enumerate((0, len(frames) // 2, len(frames) - 1)):
    span = (48 + 78 * k, 120 + 78 * k, 142, 70)
    axis.imshow(frames[frame], extent=span, interpolation="bicubic", zorder=3, aspect="auto")
axis.set(xlim=(0, 1600), ylim=(700, 0))
axis.text(162, 168, "MP4 videos", color=INK, fontsize=15.5, weight="bold", ha="center", va="center")
box(376, 72, 240, 102, "CLIP", "frozen, features\ncached on disk")
box(706, 72, 240, 102, "Q-Former", "all frames to a few\nvideo tokens", BLUE)
box(1036, 72, 240, 102, "LLaMA", "reads video tokens\nand the question", BLUE)
axis.text(1476, 123, "answer", color=INK, fontsize=15.5, weight="bold", ha="center", va="center")
for start, end in ((290, 372), (620, 702), (950, 1032), (1280, 1426)):
    arrow((start, 123), (end, 123))

# two models from labels
for y, labels, made, colors in ((330, "few", "policy\nstart", BLUE),
                                (592, "many", "oracle\nmodel", ORANGE)):
    box(24, y - 42, 124, 84, f"{labels}\nlabels")
    box(192, y - 42, 124, 84, "sft.py", mono=True)
    box(360, y - 42, 140, 84, made, colors=colors)
    arrow((152, y), (188, y))
    arrow((320, y), (356, y))
    arrow((504, y), (794, y), color=colors[1])

# the loop
panel(540, 220, 834, 460, "grpo_rank.py", "the loop: no labels, only an order", BLUE)
box(566, 408, 166, 106, "unlabelled", "video and\nquestion")
box(798, 275, 242, 110, "sample", "the policy gives\nG answers", BLUE)
box(798, 528, 242, 128, "oracle.py", "ranks the G answers;\ncontext: a narrative\nfrom 3 clips",
    ORANGE, mono=True)
box(1104, 537, 242, 110, "rank advantage", "zero-sum in\nthe group")
box(1104, 275, 242, 110, "update", "clipped,\nKL to the start", BLUE)
for corner, number in (((800, 277), 1), ((800, 530), 2), ((1106, 539), 3), ((1106, 277), 4)):
    badge(*corner, number)
arrow((736, 461), (860, 461), (860, 389))
arrow((736, 461), (860, 461), (860, 524))
arrow((966, 389), (966, 524))
axis.text(980, 457, "G answers", color=SOFT, fontsize=14, va="center")
arrow((1044, 592), (1100, 592))
arrow((1225, 533), (1225, 389))
arrow((1100, 330), (1044, 330))

box(1406, 275, 170, 110, "evaluate.py", "held-out videos:\ntable and plot", GREEN, mono=True)
arrow((1350, 330), (1402, 330))

figure.savefig(HERE / "pipeline.png")
print("written: docs/pipeline.png")
