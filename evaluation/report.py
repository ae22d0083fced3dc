"""Tables and pictures of evaluate.py: numbers in, text, Markdown and PNG out."""

import os
from itertools import groupby

import numpy as np

from evaluation.judges import CRITERIA, VISION
from evaluation.metrics import bootstrap

# after Okabe-Ito
COLORS = ("#8c8c8c", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800")
POINTS = ("score", *CRITERIA, *VISION)  # metrics from 0 to 5; all others are shares, shown in %


def is_points(metric):
    return metric.removesuffix("_all") in POINTS


# --------------------------------------------------------------------------------------------------
# Summaries of one benchmark
# --------------------------------------------------------------------------------------------------
def summarise(values, rows):
    """[{metric: value or None}], rows -> {"metrics": {metric: {mean, low, high, n}}, "groups":
    {kind: {name: same}}, "macro": {kind: {metric: mean over the kind's groups}}}; intervals over
    videos (metrics.bootstrap)."""
    metrics = list(dict.fromkeys(m for v in values for m in v))
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["groups"]))
    videos = [row["video"] for row in rows]
    columns, places = [], []
    for kind in [None, *kinds]:
        names = [None] if kind is None else list(dict.fromkeys(r["groups"].get(kind) for r in rows))
        for name in names:
            member = [kind is None or r["groups"].get(kind) == name for r in rows]
            for m in metrics:
                column = [v[m] if inside and v.get(m) is not None else np.nan
                          for v, inside in zip(values, member)]
                if not np.isnan(column).all():
                    columns.append(column)
                    places.append((kind, name, m))
    out = dict(questions=len(rows), videos=len(set(videos)), metrics={}, groups={}, macro={})
    if columns:
        table = np.array(columns, dtype=float).T
        for (kind, name, m), result, n in zip(places, bootstrap(table, videos),
                                              (~np.isnan(table)).sum(0)):
            cell = dict(zip(("mean", "low", "high"), result), n=int(n))
            (out["metrics"] if kind is None
             else out["groups"].setdefault(kind, {}).setdefault(str(name), {}))[m] = cell
    for kind, groups in out["groups"].items():
        there = [m for m in metrics if all(m in g for g in groups.values())]
        out["macro"][kind] = {m: float(np.mean([g[m]["mean"] for g in groups.values()]))
                              for m in there}
    return out


def paired(a, b):
    """Differences b - a of two sources on the items that count in both: {metric: {mean, low, high,
    n}}. a, b: {id: (video, {metric: value})}."""
    shared = [key for key in a if key in b]
    out = {}
    for m in dict.fromkeys(m for key in shared for m in a[key][1]):
        both = [(a[k][0], b[k][1].get(m), a[k][1].get(m)) for k in shared]
        both = [(video, x - y) for video, x, y in both if x is not None and y is not None]
        if both:
            videos, difference = zip(*both)
            result = bootstrap(np.array(difference, dtype=float)[:, None], videos)[0]
            out[m] = dict(zip(("mean", "low", "high"), result), n=len(both))
    return out


# --------------------------------------------------------------------------------------------------
# Text and Markdown
# --------------------------------------------------------------------------------------------------
def as_text(rows, rule_around="all"):
    """Aligned columns, names to the left, numbers to the right; lines below the heading and around
    the row "all"."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
             for row in rows]
    rule, names = "-" * (sum(widths) + 2 * len(widths) - 2), [row[0] for row in rows]
    if rule_around not in names:
        return "\n".join([lines[0], rule, *lines[1:]])
    at = names.index(rule_around)
    return "\n".join([lines[0], rule, *lines[1:at], rule, lines[at], rule, *lines[at + 1 :]])


def as_markdown(rows):
    cells = [[cell.strip().replace("|", "\\|") for cell in row] for row in rows]
    cells.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def cell(value, metric, sign=""):
    """A metric with its interval: shares in %, points as they are."""
    if value is None:
        return "-"
    scale, digits = (1, 3) if is_points(metric) else (100, 2)
    mean, low, high = (f"{scale * value[k]:{sign}.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def overview(result):
    """One source: a row per benchmark and metric."""
    rows = [["benchmark", "metric", "value [95 %]", "counted", "judge"]]
    for name, part in result["benchmarks"].items():
        for m, value in part["metrics"].items():
            rows.append([name, m, cell(value, m), str(value["n"]), part["judge"].split(" ")[0]])
    return rows


def side_by_side(results, differences):
    """Several sources: a row per benchmark, metric and source, with the difference to the first
    source."""
    first, rows = results[0], [["benchmark", "metric", "of", "value [95 %]",
                                f"difference to {results[0]['label']}"]]
    for name in dict.fromkeys(b for r in results for b in r["benchmarks"]):
        parts = {r["label"]: r["benchmarks"].get(name, {}).get("metrics", {}) for r in results}
        for m in dict.fromkeys(m for part in parts.values() for m in part):
            for label, part in parts.items():
                change = ("" if label == first["label"]
                          else cell(differences[label].get(name, {}).get(m), m, "+"))
                rows.append([name, m, label, cell(part.get(m), m), change])
    return rows


def uneven_counts(results):
    """[] or one line: the metrics for which the columns count different numbers of items."""
    counts = {}
    for r in results:
        for name, part in r["benchmarks"].items():
            for m, value in part["metrics"].items():
                counts.setdefault((name, m), []).append(value["n"])
    apart = [f"{name} {m} {', '.join(map(str, n))}"
             for (name, m), n in counts.items() if len(set(n)) > 1]
    return [f"Warning: the columns do not count equally many items: {'; '.join(apart)}. A "
            "difference is over the items that both columns count, a value over all that its own "
            "column counts."] if apart else []


def group_tables(result):
    """Markdown of every benchmark's groups."""
    out = []
    for name, part in result["benchmarks"].items():
        for kind, groups in part["groups"].items():
            metrics = list(dict.fromkeys(m for g in groups.values() for m in g))
            rows = [[f"{name}, {kind}", *metrics, "counted"]]
            for group, g in groups.items():
                # in the order of the metrics
                counts = dict.fromkeys(str(g[m]["n"]) for m in metrics if m in g)
                rows.append([group, *(cell(g.get(m), m) for m in metrics), ", ".join(counts)])
            mean = part["macro"][kind]
            scaled = lambda m: f"{mean[m]:.2f}" if is_points(m) else f"{100 * mean[m]:.2f}"
            rows.append([f"mean over {kind}", *(scaled(m) if m in mean else "-" for m in metrics),
                         ""])
            out.append(as_markdown(rows))
    return out


def facts(results):
    """Markdown lines on where the numbers come from: judge, CLIP, coverage, what could not be read;
    what several sources share is said once."""
    lines = {}
    for r in results:
        for name, part in r["benchmarks"].items():
            said = [f"judge: {part['judge']}"] + ([f"text features: {part['clip']}"]
                                                  if part.get("clip") else [])
            said += part["coverage"] + [f"{n} {why}" for why, n in part["problems"].items()]
            for line in said:
                lines.setdefault((name, line), []).append(r["label"])
    out = []
    for name in dict.fromkeys(name for name, _ in lines):
        out.append(f"- **{name}**")
        for (of, line), labels in lines.items():
            shared = len(labels) == sum(name in r["benchmarks"] for r in results)
            out += [f"  - {line}" if shared else f"  - {', '.join(labels)}: {line}"] * (of == name)
    return "\n".join(out)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------
def pyplot():
    """matplotlib without a screen, imported when a picture is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def plot_benchmarks(results, file):
    """A panel for shares and one for points; per benchmark its metrics, a bar per source, with
    intervals. Of two conventions of one metric the one that counts every question is drawn."""
    plt = pyplot()

    drawn = []
    for name in dict.fromkeys(b for r in results for b in r["benchmarks"]):
        metrics = dict.fromkeys(m for r in results
                                for m in r["benchmarks"].get(name, {}).get("metrics", {}))
        keep = [m for m in metrics if f"{m}_all" not in metrics
                and m not in ("acc_answered", "acc_strict")]
        drawn += [(name, m) for m in keep]
    panels = [[d for d in drawn if is_points(d[1]) is points] for points in (False, True)]
    panels = [p for p in panels if p]
    width = 0.8 / len(results)
    fig, axes = plt.subplots(len(panels), 1,
                             figsize=(max(7, 0.62 * max(map(len, panels)) + 2), 4.4 * len(panels)),
                             squeeze=False, layout="constrained")
    for ax, panel in zip(axes[:, 0], panels):
        gaps = np.cumsum([0] + [0.6 * (a[0] != b[0]) for a, b in zip(panel, panel[1:])])
        place, scale = np.arange(len(panel)) + gaps, 1 if is_points(panel[0][1]) else 100
        for k, r in enumerate(results):
            cells = [r["benchmarks"].get(name, {}).get("metrics", {}).get(m) for name, m in panel]
            at = [i for i, c in enumerate(cells) if c]
            mean, low, high = (scale * np.array([cells[i][key] for i in at])
                               for key in ("mean", "low", "high"))
            x = place[at] + (k + 0.5) * width - 0.4
            ax.bar(x, mean, 0.94 * width, color=COLORS[k % len(COLORS)], label=r["label"])
            ax.errorbar(x, mean, [np.maximum(mean - low, 0), np.maximum(high - mean, 0)],
                        fmt="none", ecolor="#333333", elinewidth=1.1, capsize=2)
        ax.set_xticks(place, [m.removesuffix("_all") for _, m in panel], rotation=40, ha="right",
                      fontsize=9)
        start = 0
        for name, members in groupby(panel, key=lambda d: d[0]):
            n = len(list(members))
            ax.text(place[start : start + n].mean(), 1.01, name.replace("_", " ", 1), ha="center",
                    va="bottom", fontsize=8, transform=ax.get_xaxis_transform(), rotation=25)
            start += n
        ax.set_ylabel("score (0 to 5)" if scale == 1 else "%", size=12)
        ax.set_ylim(0, 5 if scale == 1 else None)
        tidy(ax)
    if len(results) > 1:
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                   frameon=False)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def plot_runs(summary, curves, title, file):
    """Bars by task type with the spread over seeds, and beside them the learning curves of columns
    that have some."""
    plt = pyplot()

    types, columns, colors = list(summary["counts"]), summary["columns"], {}
    place = np.arange(len(types)) + 0.35 * (np.array(types) == "all")  # a gap before the sum
    width, wide = 0.8 / len(columns), max(7.0, 1.15 * len(types))
    widths = [wide, 5.5] if any(curves.values()) else [wide]
    fig, axes = plt.subplots(1, len(widths), figsize=(sum(widths), 5.4), width_ratios=widths,
                             squeeze=False, layout="constrained")
    bars = axes[0, 0]
    for k, c in enumerate(columns):
        means, spreads = (np.array([100 * (c["accuracy"][t][key] or 0) for t in types])
                          for key in ("mean", "spread"))
        x, colors[c["label"]] = place + (k + 0.5) * width - 0.4, COLORS[k % len(COLORS)]
        bars.bar(x, means, 0.94 * width, color=colors[c["label"]], label=c["label"])
        if len(c["seeds"]) > 1:
            bars.errorbar(x, means, spreads, fmt="none", ecolor="#333333", elinewidth=1.2,
                          capsize=2.5)
    if summary["chance"]:
        bars.hlines([100 * summary["chance"][t] for t in types], place - 0.42, place + 0.42,
                    color="black", linewidth=1.6, linestyle=(0, (2, 1)),
                    label="chance (most frequent answer)")
    bars.set_xticks(place, [t.replace(" ", "\n") for t in types], fontsize=10.5)
    bars.set(ylabel="accuracy (%)", xlim=(place[0] - 0.6, place[-1] + 0.6))
    bars.set_title(title, loc="left", fontsize=13)
    draw_curves(axes[0, -1], curves, colors)
    for ax in axes[0]:
        tidy(ax)
        ax.yaxis.label.set_size(12)
    fig.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=5,
               frameon=False, fontsize=12)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def draw_curves(ax, curves, colors):
    """{label: [{step: accuracy}, a run each]}: the mean over runs and, of several, their deviation
    as a band."""
    for label, runs in curves.items():
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        if steps:
            values = 100 * np.array([[run[s] for s in steps] for run in runs])  # (S,steps)
            mean, band = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else 0
            ax.fill_between(steps, mean - band, mean + band, color=colors[label], alpha=0.2,
                            linewidth=0)
            ax.plot(steps, mean, color=colors[label], linewidth=2.2, marker="o", markersize=4)
            ax.set(xlabel="step", ylabel="validation accuracy (%)")
            ax.set_title("Learning curves", loc="left", fontsize=13)


def plot_curve(curves, file):
    """The learning curve of a run in progress; the file is there as a whole at any moment."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
    draw_curves(ax, curves, dict(zip(curves, COLORS[1:])))
    tidy(ax)
    fig.legend(list(curves), loc="outside lower center", frameon=False)
    fig.savefig(f"{file}.tmp", format="png", dpi=150)
    os.replace(f"{file}.tmp", file)
    plt.close(fig)


def tidy(ax):
    ax.grid(axis="y", color="#dddddd", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
