"""Runs side by side: run folders, accuracy by task type, differences, the table."""

import glob
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from embedded_world.moving_shapes import TASK_TYPES
from evaluation.answers import Run
from evaluation.metrics import over_seeds, paired_bootstrap, spread
from inputs.records import DataError
from plumbing.text import final_answer, normalize, token_f1


def by_task_type(values, types):
    """{task type: mean of its values} and "all": the mean over all questions, not over types.
    values (R,), types (R,). Video-MME's types come in their usual order, then the user's own as
    they occur."""
    values, order = np.asarray(values, dtype=float), list(dict.fromkeys(types))
    order.sort(key=lambda t: TASK_TYPES.index(t) if t in TASK_TYPES else len(TASK_TYPES))
    return {t: float(values[np.array(types) == t].mean())
            for t in order} | {"all": float(values.mean())}


def chance(train, records):
    """(R,) bools: is the most frequent training answer to the question's text (if new: to its task
    type) right?"""
    text = lambda r: normalize(r["question"] if isinstance(r["question"], str)
                               else r["question"][-1]["content"])
    counts = {}
    for r in train:
        for key in (("text", text(r)), ("type", r["task_type"])):
            counts.setdefault(key, Counter())[normalize(final_answer(r["answer"]))] += 1
    best = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    guesses = [best.get(("text", text(r)), best.get(("type", r["task_type"]))) for r in records]
    return [guess == normalize(final_answer(r["answer"])) for guess, r in zip(guesses, records)]


def find_run(path, flag="--runs"):
    """A run folder with final/, or a checkpoint folder. ValueError where there is neither."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{flag}: {path} is no folder")
    folder = path.parent if path.name == "final" else path
    configs = ("config.json", "adapter_config.json")
    there = [c for c in (folder / "final", path) if any((c / name).exists() for name in configs)]
    if not there:
        raise ValueError(f"{flag}: {path} holds no final/ with a checkpoint; is the run finished?")
    name, seed = re.fullmatch(r"(.+?)(?:_s(\d+))?", folder.resolve().name).groups()
    return Run(folder, there[0], name, None if seed is None else int(seed))


def group_runs(arguments, labels=None):
    """Arguments of --runs -> {label: [Run, ...]}: a column per argument. Arguments with the same
    label, such as seeds of one name that the shell's own glob found, are one column. ValueError
    says what is wrong."""
    found = [[find_run(p) for p in ([a] if os.path.exists(a) else sorted(glob.glob(a)) or [a])]
             for a in arguments]
    named, labels = bool(labels), labels or [runs[0].name for runs in found]
    if len(labels) != len(found):
        raise ValueError(f"--labels has {len(labels)} names, --runs {len(found)} arguments")
    groups = {}
    for label, runs in zip(labels, found):
        groups.setdefault(label, []).extend(runs)
    for label, runs in groups.items():
        places = sorted({re.sub(r"_s\d+$", "", str(run.folder.resolve().parent)) for run in runs})
        # several scripts call a run "context": that is not one column of seeds
        if len(places) > 1 and not named:
            where = " and ".join(map(os.path.relpath, places[:2]))
            raise ValueError(f"--runs: column {label!r} would mix runs of {where}; name the "
                             "columns by --labels")
        seeds = {run.seed for run in runs}
        if len(runs) > 1 and (None in seeds or len(seeds) < len(runs)):
            raise ValueError(f"--runs: column {label!r} needs folders of different _s<seed>; part "
                             "columns by --labels")
    return groups


def learning_curve(folder):
    """{step: eval/accuracy} of a run's metrics.jsonl; empty where it has none."""
    file = Path(folder, "metrics.jsonl")
    lines = file.read_text().splitlines() if file.exists() else []
    # a killed run may leave half a line
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["step"]: r["eval/accuracy"] for r in rows if "eval/accuracy" in r}


def compare(groups, predictions, guesses=None):
    """{label: [Run]}, {label: [rows of each run]}, chance (R,) or None -> all that table and
    picture show. A question that any run could not answer (broken video) is left out of all of
    them."""
    every = [rows for runs in predictions.values() for rows in runs]
    keep = [i for i in range(len(every[0]))
            if all(rows[i]["prediction"] is not None for rows in every)]
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
            words=mean(lambda row: len(row["prediction"].split())),
            ended=mean(lambda row: row["ended"])))
        if len(columns) > 1:
            columns[-1]["difference"] = difference(columns[0], columns[-1], correct, types, clips)
    counts = {t: types.count(t) for t in columns[0]["accuracy"] if t != "all"} | {"all": len(keep)}
    return dict(videos=len(set(clips)), left_out=len(every[0]) - len(keep), counts=counts,
                columns=columns,
                chance=by_task_type([guesses[i] for i in keep], types) if guesses else None)


def difference(first, other, correct, types, clips):
    """A column minus the first one: on the seeds that both have, or of the means where they share
    none."""
    a, b = correct[first["label"]], correct[other["label"]]
    shared = [s for s in other["seeds"] if s in first["seeds"] and s is not None]
    if shared:
        a, b = (x[[column["seeds"].index(s) for s in shared]]
                for x, column in ((a, first), (b, other)))
    mean, low, high = paired_bootstrap(a, b, clips)
    each = by_task_type(b.mean(0) - a.mean(0), types)
    return dict(to=first["label"], seeds=shared, mean=mean, low=low, high=high, task_types=each,
                worst=min(each.items(), key=lambda item: item[1]),
                spread=spread(b.mean(1) - a.mean(1)) if shared else None)


def table(summary):
    """The summary as rows of cells; the first row is the heading, the first cell of a row its
    name."""
    columns, guess, blank = summary["columns"], summary["chance"], [""]
    cell = lambda x: f"{100 * x['mean']:.1f}" + ("" if x["spread"] is None
                                                 else f" ± {100 * x['spread']:.1f}")
    out = [["accuracy in %", *(c["label"] for c in columns), *(["chance"] if guess else []),
            "questions"]]
    for t, n in summary["counts"].items():
        guessed = [f"{100 * guess[t]:.1f}"] if guess else []
        out.append([t, *(cell(c["accuracy"][t]) for c in columns), *guessed, str(n)])
    if changes := [c["difference"] for c in columns[1:]]:
        show = lambda d: f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        loss = (lambda d: f"{100 * d['worst'][1]:+.1f} {d['worst'][0]}" if d["worst"][1] < 0
                else "none")
        out.append([f"difference to {columns[0]['label']}", "", *map(show, changes)])
        if any(d["spread"] is not None for d in changes):
            apart = ("" if d["spread"] is None else f"± {100 * d['spread']:.1f}" for d in changes)
            out.append(["  over seeds", "", *apart])
        out.append(["  largest loss", "", *map(loss, changes)])
    out += [[name, *(cell(c[key]) for c in columns)]
            for name, key in (("token F1", "token_f1"), ("ended", "ended"))]
    out.append(["words per answer", *(f"{c['words']['mean']:.2f}" for c in columns)])
    out.append(["seeds",
                *(" ".join("-" if s is None else str(s) for s in c["seeds"]) for c in columns)])
    return [row + blank * (len(out[0]) - len(row)) for row in out]
