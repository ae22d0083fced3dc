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
from moving_shapes import make_scene, render  # noqa: E402

INK, SOFT, LINE = "#1f2933", "#5b6672", "#55606c"
GREY, BLUE, ORANGE, GREEN = ("#f1f3f5", "#c3cad1"), ("#e3eefb", "#2f6fb5"), ("#fdeedd", "#c8781c"), ("#e4f3ea", "#2b8a57")

figure = plt.figure(figsize=(16, 7.3), dpi=100, facecolor="white")
axis = figure.add_axes((0, 0, 1, 1))
axis.set(xlim=(0, 1600), ylim=(730, 0))  # pixels, y points down
axis.axis("off")


def box(x, y, width, height, title, note="", colors=GREY, mono=False):
    """A rounded box with a bold title and a softer note below it, both centred."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=12", linewidth=1.8,
                           facecolor=colors[0], edgecolor=colors[1], zorder=2)
    axis.add_patch(shape)
    style = dict(ha="center", zorder=3, linespacing=1.25)
    font = dict(family="DejaVu Sans Mono") if mono else {}
    lines, title_lines = note.count("\n") + 1 if note else 0, title.count("\n") + 1
    top = y + height / 2 - (25 * lines + 27 * title_lines) / 2
    axis.text(x + width / 2, top + 27 * title_lines / 2, title, color=INK, fontsize=15.5, weight="bold", va="center",
              **style, **font)
    axis.text(x + width / 2, top + 27 * title_lines + 25 * lines / 2, note, color=SOFT, fontsize=14, va="center", **style)


def panel(x, y, width, height, title, note, colors):
    """A wide frame around a part of the picture, its name in the upper left corner."""
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=16", linewidth=1.4,
                                  facecolor="#fafbfc", edgecolor=colors[1], zorder=1))
    name = axis.text(x + 20, y + 28, title, color=INK, fontsize=16, weight="bold", family="DejaVu Sans Mono", va="center")
    right = name.get_window_extent(figure.canvas.get_renderer()).x1
    axis.text(right + 18, y + 28, note, color=SOFT, fontsize=14, va="center")


def arrow(*points, color=LINE):
    """A line through the points with right angles as they are given, an arrow head at its end."""
    xs, ys = zip(*points)
    axis.plot(xs[:-1], ys[:-1], color=color, linewidth=2.2, solid_joinstyle="round", zorder=4)
    head = dict(arrowstyle="-|>,head_length=0.55,head_width=0.28", color=color, linewidth=2.2, shrinkA=0, shrinkB=0)
    axis.annotate("", xy=points[-1], xytext=points[-2], arrowprops=head, zorder=4)


# the model
panel(24, 20, 1552, 182, "video_llm.py", "the one model: policy and oracle are both made of it", GREY)
scene = next(s for s in (make_scene(0, k) for k in range(100)) if len(s.shapes) == 3 and not s.together)
frames = render(scene)
for k, frame in enumerate((0, len(frames) // 2, len(frames) - 1)):
    left, top = 52 + 78 * k, 74 + 0 * k
    axis.imshow(frames[frame], extent=(left, left + 72, top + 72, top), interpolation="bicubic", zorder=3, aspect="auto")
axis.text(166, 168, "MP4 videos", color=INK, fontsize=15.5, weight="bold", ha="center", va="center")
axis.set(xlim=(0, 1600), ylim=(730, 0))
box(370, 74, 240, 100, "CLIP", "frozen, features\ncached on disk")
box(680, 74, 240, 100, "Q-Former", "all frames to a few\nvideo tokens", BLUE)
box(990, 74, 240, 100, "LLaMA", "reads video tokens\nand the question", BLUE)
axis.text(1316, 124, "answer", color=INK, fontsize=15.5, weight="bold", va="center")
for start, end in ((290, 366), (614, 676), (924, 986), (1234, 1302)):
    arrow((start, 124), (end, 124))

# two models from labels
box(24, 292, 130, 84, "few\nlabels")
box(200, 292, 124, 84, "sft.py", mono=True)
box(370, 292, 140, 84, "policy\nstart", colors=BLUE)
box(24, 570, 130, 84, "many\nlabels")
box(200, 570, 124, 84, "sft.py", mono=True)
box(370, 570, 140, 84, "oracle\nmodel", colors=ORANGE)
for y in (334, 612):
    arrow((158, y), (196, y))
    arrow((328, y), (366, y))

# the loop
panel(556, 226, 784, 484, "grpo_rank.py", "the loop: no labels, only an order", BLUE)
box(586, 420, 160, 106, "unlabelled", "video and\nquestion")
box(812, 278, 216, 112, "sample", "the policy gives\nG answers", BLUE)
box(812, 556, 216, 132, "oracle.py", "ranks the G answers;\ncontext: a narrative\nfrom 3 clips", ORANGE, mono=True)
box(1096, 567, 216, 110, "rank advantage", "zero-sum in\nthe group")
box(1096, 278, 216, 112, "update", "clipped,\nKL to the start", BLUE)
arrow((514, 334), (808, 334), color=BLUE[1])
arrow((514, 612), (808, 612), color=ORANGE[1])
arrow((750, 473), (870, 473), (870, 394))
arrow((750, 473), (870, 473), (870, 552))
arrow((970, 394), (970, 552))
axis.text(986, 473, "G answers", color=SOFT, fontsize=14, va="center")
arrow((1032, 622), (1092, 622))
arrow((1204, 563), (1204, 394))
arrow((1092, 334), (1032, 334))

box(1396, 278, 180, 112, "evaluate.py", "held-out videos,\ntable and plot", GREEN, mono=True)
arrow((1316, 334), (1392, 334))

figure.savefig(HERE / "pipeline.png")
print(HERE / "pipeline.png")
