"""Accuracy of checkpoints: on the held-out questions side by side, and on every benchmark that the papers report.

Runs         python evaluate.py --runs runs/sft/policy_s0 runs/grpo_rank/context_s0      one column per argument
             python evaluate.py --runs "runs/sft/policy_s*" "runs/grpo_rank/context_s*" --labels A,B --out results/a
Benchmarks   python evaluate.py --checkpoint runs/sft/policy_s0 --benchmark all               the embedded world's files
             python evaluate.py --checkpoint runs/sft/mine --benchmark msvd_qa,video_mme --data DIR --judge api ...
             python evaluate.py --predictions mine.json --benchmark video_mme                  no model: others' answers
             python evaluate.py --compare runs/sft/policy_s0 runs/grpo_rank/context_s0 --benchmark all
             torchrun --nproc_per_node=2 evaluate.py --checkpoint ...                          the same, shared out

--runs makes <run>/predictions_<data>.json, used again while checkpoint, questions and videos are the same, so that a
table is cheap to redraw; with --out also results/demo.json, .md and .png. Benchmarks make <run>/benchmarks/: answers
that a killed run continues from, predictions in each benchmark's own format, report.json, report.md, report.png.

accuracy    (--runs) share of greedy answers that match the label exactly (lower case, no punctuation, no articles), in
            %; "a ± b": mean and sample standard deviation over the seeds of a column
chance      accuracy of the training file's most frequent answer to the same question text: what needs no video
difference  to the first column, on the same questions and the same seeds; [low, high] is a 95 % interval from a
            bootstrap over videos (questions about one video are not independent), after averaging over the seeds. It
            says what other videos would give, not what other seeds would: for that see the row "over seeds".

Rules of the benchmarks: metrics.py; their files: benchmark_files.py, prediction_files.py; how a checkpoint answers:
answers.py; judges: judges.py; tables and pictures: report.py.

D1      Benchmarks of descriptions have prompts of their own, drawn at random from paraphrases by VLM-Eval; ours is one
        fixed prompt. In the embedded world it is the question that this world asks for a synopsis.
"""

import glob
import json
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

from transformers.hf_argparser import HfArg

from flags import JUDGE, WEIGHTS, WORLD, ApiArgs, answer_help, parse_args

CLIP = "openai/clip-vit-base-patch32"  # VLM-Eval's README


@dataclass
class Args(ApiArgs):
    # -- what is scored
    runs: list[str] = HfArg(default_factory=list, help="run or checkpoint folders, one column each; a quoted glob is "
                            "one column of seeds")
    checkpoint: str = HfArg(default="", help="run or checkpoint folder to score on --benchmark")
    predictions: str = HfArg(default="", help="prediction file(s), comma-separated, or a folder of them, to score")
    compare: list[str] = HfArg(default_factory=list, help="run folders or prediction files: scores side by side, "
                               "differences to the first")
    watch: str = HfArg(default="", help="folder of a run in progress: its curve is drawn into <out>.png at every "
                       "evaluation")
    benchmark: str = HfArg(default="all", help="held_out | msvd_qa | msrvtt_qa | activitynet_qa | video_chatgpt | "
                           "video_mme | msvd_retrieval | msrvtt_retrieval | ucf101 | hmdb51 | mmaip_v | nextqa | "
                           "nextoe | video_mme_subtitles | with --predictions also tempcompass | cvrr_es; several "
                           "comma-separated, or all")
    labels: str = HfArg(default="", help="names of the columns, comma-separated; empty: folder names without _s<seed>")
    # -- data and models
    data: str = HfArg(default="", help="--runs: annotation file(s), comma-separated; else the folder or file of the "
                      "benchmarks. Empty: the embedded world")
    video_root: str = HfArg(default="", help="where the videos are; empty: beside the annotation file")
    chance_data: str = HfArg(default="", help="training file, for chance; empty: train.json beside --data, if any")
    # -- judges and answers
    judge: str = HfArg(default="exact", help="exact: no model | local: --judge_model | api: --api_url, --api_model")
    judge_model: str = HfArg(default=JUDGE, help="checkpoint of --judge local")
    clip: str = HfArg(default="", help="CLIP whose text features retrieval and action recognition use; empty: the "
                      f"embedded one, with --data {CLIP}")
    choose: str = HfArg(default="", help="multiple choice: generate a letter | likelihood of the options; empty: "
                        "likelihood in the embedded world, generate with --data (answers.py, D1)")
    max_new_tokens: int = HfArg(default=48, help="longest answer in a benchmark")
    batch_size: int = HfArg(default=100, help="questions at a time")
    limit: int = HfArg(default=0, help="questions per benchmark, drawn by a fixed seed; 0: all")
    # -- plumbing
    out: str = HfArg(default="", help="write <out>.json, <out>.md and <out>.png; benchmarks of a checkpoint: empty is "
                     "<run>/benchmarks/report")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features and verdicts")
    groups: dict = field(init=False)  # {label: [Run, ...]}
    names: list = field(init=False)  # benchmarks
    sources: list = field(init=False)  # [Source, ...] of the benchmarks

    def __post_init__(self):
        modes = [m for m in ("runs", "checkpoint", "predictions", "compare", "watch") if getattr(self, m)]
        if len(modes) != 1:
            raise ValueError("give one of --runs, --checkpoint, --predictions, --compare, --watch")
        labels = [x.strip() for x in self.labels.split(",")] if self.labels else None
        self.groups, self.sources = group_runs(self.runs, labels), find_sources(self, labels)
        every = ["held_out", *benchmark_files.BENCHMARKS]
        self.names = every if self.benchmark == "all" else [x.strip() for x in self.benchmark.split(",")]
        known = every + list(benchmark_files.ONLY_PREDICTIONS) * bool(self.predictions or self.compare)
        if unknown := [x for x in self.names if x not in known]:
            raise ValueError(f"--benchmark {unknown[0]}: choose of {', '.join(known)}, all")
        if any(s.files for s in self.sources) and len(self.names) != 1:
            raise ValueError("prediction files hold the answers of one benchmark: name it with --benchmark")
        for flag, value, choice in (("judge", self.judge, ("exact", "local", "api")),
                                    ("choose", self.choose, ("", "generate", "likelihood"))):
            if value not in choice:
                raise ValueError(f"--{flag} {value}: choose of {', '.join(filter(None, choice))}")
        if min(self.max_new_tokens, self.batch_size) < 1 or self.limit < 0:
            raise ValueError("--max_new_tokens and --batch_size must be at least 1, --limit at least 0")
        self.check_api(needed=self.judge == "api")
        if self.runs:
            self.data = self.data or BENCHMARK.data
            self.chance_data = self.chance_data or str(Path(self.data.split(",")[0]).parent / "train.json")
        self.choose = self.choose or ("generate" if self.data else "likelihood")
        self.clip = self.clip or (CLIP if self.data else f"{WEIGHTS}/clip")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

import benchmark_files
import harness
from answers import Answering, Run, answer, fingerprint
from data import DataError, FeatureCache, read_records, report_lines
from frames import VideoError
from judges import ClipText, make_judge, never_read, score_rows
from metrics import over_seeds, paired_bootstrap, spread
from moving_shapes import TASK_TYPES
from oracle import DESCRIBE, token_f1
from prediction_files import in_own_format, join, predictions
from ranks import final_answer, normalize
from report import (
    as_markdown,
    as_text,
    facts,
    group_tables,
    overview,
    paired,
    plot_benchmarks,
    plot_curve,
    plot_runs,
    side_by_side,
    summarise,
    uneven_counts,
)
from video_llm import load_model, unwrap

SYNOPSIS = "what happens in the video?"  # [D1]
LEGEND = "a ± b: mean and standard deviation over seeds; [low, high]: 95 % interval over videos, seeds as they are"


# --- Answers and benchmarks ----------------------------------------------------------------------------------------
def is_correct(prediction, reference):
    """Exact match of normalised text (lower case, no punctuation, no articles), thinking apart."""
    return normalize(final_answer(prediction)) == normalize(final_answer(reference))


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


# --- Numbers -------------------------------------------------------------------------------------------------------
def by_task_type(values, types):
    """{task type: mean of its values} and "all": the mean over all questions, not over types. values (R,), types (R,).
    Video-MME's types come in their usual order, then the user's own as they occur."""
    values, order = np.asarray(values, dtype=float), list(dict.fromkeys(types))
    order.sort(key=lambda t: TASK_TYPES.index(t) if t in TASK_TYPES else len(TASK_TYPES))
    return {t: float(values[np.array(types) == t].mean()) for t in order} | {"all": float(values.mean())}


def chance(train, records):
    """(R,) bools: is the most frequent training answer to the question's text (if new: to its task type) right?"""
    text = lambda r: normalize(r["question"] if isinstance(r["question"], str) else r["question"][-1]["content"])
    counts = {}
    for r in train:
        for key in (("text", text(r)), ("type", r["task_type"])):
            counts.setdefault(key, Counter())[normalize(final_answer(r["answer"]))] += 1
    best = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    guesses = [best.get(("text", text(r)), best.get(("type", r["task_type"]))) for r in records]
    return [guess == normalize(final_answer(r["answer"])) for guess, r in zip(guesses, records)]


# --- Runs and their predictions ------------------------------------------------------------------------------------
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
    """Arguments of --runs -> {label: [Run, ...]}: a column per argument. Arguments with the same label, such as seeds
    of one name that the shell's own glob found, are one column. ValueError says what is wrong."""
    found = [[find_run(p) for p in ([a] if os.path.exists(a) else sorted(glob.glob(a)) or [a])] for a in arguments]
    named, labels = bool(labels), labels or [runs[0].name for runs in found]
    if len(labels) != len(found):
        raise ValueError(f"--labels has {len(labels)} names, --runs {len(found)} arguments")
    groups = {}
    for label, runs in zip(labels, found):
        groups.setdefault(label, []).extend(runs)
    for label, runs in groups.items():
        places = sorted({re.sub(r"_s\d+$", "", str(run.folder.resolve().parent)) for run in runs})
        if len(places) > 1 and not named:  # several scripts call a run "context": that is not one column of seeds
            where = " and ".join(map(os.path.relpath, places[:2]))
            raise ValueError(f"--runs: column {label!r} would mix runs of {where}; name the columns by --labels")
        seeds = {run.seed for run in runs}
        if len(runs) > 1 and (None in seeds or len(seeds) < len(runs)):
            raise ValueError(f"--runs: column {label!r} needs folders of different _s<seed>; part columns by --labels")
    return groups


def predict(run, records, stem, cache_dir, rank=0, world=1):
    """Answers of one run, shared out over the processes and kept in predictions_<stem>.json -> a row per record, its
    prediction None where the video cannot be read; {video: reason} of those. The same in every process."""
    file, mark = run.folder / f"predictions_{stem}.json", fingerprint(run.checkpoint, records)
    kept = json.loads(file.read_text()) if file.exists() else {}
    if all(harness.all_gather(kept.get("fingerprint") == mark)):
        print(f"{run.folder}: {len(records)} answers of {file.name} are used again", flush=True) if rank == 0 else None
        return kept["predictions"], kept["left_out"]
    began, screen = time.time(), sys.stderr.isatty() and rank == 0
    try:
        model, processor = load_model(run.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    except SafetensorError as e:
        raise OSError(f"{run.checkpoint}: {e}") from e
    cache = FeatureCache(unwrap(model), processor, cache_dir)
    mine = sorted({r["clip"] for r in records}, key=str)[rank::world]
    shares = harness.all_gather(cache.prepare(mine, progress=screen))
    broken = {clip: reason for share in shares for clip, reason in share.items()}
    rows = [dict(id=r.get("id"), video=str(r["clip"].path), question=r["question"], task_type=r["task_type"],
                 answer=r["answer"], prediction=None, correct=None, ended=None) for r in records]
    todo = [i for i, r in enumerate(records) if r["clip"] not in broken]
    parts, done = [todo[k : k + 100] for k in range(0, len(todo), 100)][rank::world], []
    for part in tqdm(parts, desc=f"{run.folder}, 100 questions each", leave=False, disable=not screen):
        texts, ended = answer(model.eval(), processor, cache, [records[i] for i in part], return_ended=True)
        done += zip(part, texts, ended)
    for i, text, end in [row for share in harness.all_gather(done) for row in share]:
        rows[i] |= dict(prediction=text, correct=BENCHMARK.correct(text, records[i]["answer"]), ended=end)
    left_out = {str(clip.path): reason for clip, reason in broken.items()}
    if rank == 0:
        harness.write(file, json.dumps(dict(fingerprint=mark, left_out=left_out, predictions=rows), indent=1))
        print(f"{run.folder}: {len(todo)} questions answered in {time.time() - began:.0f} s", flush=True)
    return rows, left_out


def learning_curve(folder):
    """{step: eval/accuracy} of a run's metrics.jsonl; empty where it has none."""
    file = Path(folder, "metrics.jsonl")
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


def main_runs(args):
    rank, world, _ = harness.setup_dist()
    say = print if rank == 0 else lambda *_, **__: None
    if args.data.startswith(WORLD):
        harness.build_if_missing(f"{WORLD}/clips.json", ["moving_shapes.py"], "under a minute", rank)
    files, predictions, left_out, guesses = args.data.split(","), {}, {}, None
    with harness.one_line_errors(DataError, OSError):
        records, report = BENCHMARK.questions(files, args.video_root or None)
        if not records:
            raise DataError(f"{args.data}: no labelled question about a video")
        say("\n".join(report_lines(report)))
        try:  # the training videos need not be here to score the held-out ones
            guesses = chance(BENCHMARK.questions([args.chance_data], args.video_root or None)[0], records)
        except DataError as e:
            say(f"no chance column: {e}")
        for label, runs in args.groups.items():
            done = [predict(run, records, "+".join(Path(f).stem for f in files), args.cache, rank, world)
                    for run in runs]
            predictions[label] = [rows for rows, _ in done]
            left_out |= {video: reason for _, broken in done for video, reason in broken.items()}
        summary = compare(args.groups, predictions, guesses)
        title = f"Accuracy on {args.data}: {summary['counts']['all']} questions about {summary['videos']} videos"
        missing = [f"left out of every column: {reason}" for reason in left_out.values()]
        missing += [f"{len(missing)} videos with {summary['left_out']} questions are left out"] if missing else []
        say("\n" + "\n".join([*missing, title, "", as_text(table(summary)), LEGEND]))
        if args.out and rank == 0:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            about = dict(title=title, command=" ".join(sys.argv), git_commit=harness.git_commit(), broken=left_out)
            Path(f"{args.out}.json").write_text(json.dumps(about | summary, indent=1) + "\n")
            parts = [title, *missing, as_markdown(table(summary)), LEGEND]
            Path(f"{args.out}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
            curves = {label: [c for c in (learning_curve(run.folder) for run in runs) if c]
                      for label, runs in args.groups.items()}
            plot_runs(summary, curves, title, f"{args.out}.png")
            print(f"\nwritten: {args.out}.json, {args.out}.md, {args.out}.png")


def watch(folder, out, pause=2.0):
    """Draw <out>.png anew at every evaluation of the run in `folder`, until it has finished (or this is stopped)."""
    drawn, finished = {}, False
    while not finished:
        finished = Path(folder, "final").exists()  # first: the last row was written before it
        curve = learning_curve(folder)
        if curve != drawn:
            drawn = curve
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            plot_curve({Path(folder).name: [curve]}, f"{out}.png")
        time.sleep(0 if finished else pause)


# --- Benchmarks: questions -> answers of a checkpoint, or of a file -> values -> report --------------------------
class Source(NamedTuple):
    """What is scored: a run, or a column of prediction files."""
    label: str
    run: Run | None
    files: list


def find_sources(args, labels):
    """The columns of a report, in the order of the arguments; none for --runs. ValueError says what is wrong."""
    if args.predictions:
        out = [Source(Path(args.predictions.split(",")[0]).stem, None, args.predictions.split(","))]
    elif args.checkpoint:
        run = find_run(args.checkpoint, "--checkpoint")
        out = [Source(run.folder.name, run, [])]
    else:
        out = []
        for name in args.compare:  # a file, or a folder that holds JSON and no checkpoint, is predictions
            run_there = Path(name, "final").is_dir() or glob.glob(f"{glob.escape(name)}/*config.json")
            file = Path(name.split(",")[0]).suffix in benchmark_files.READ
            if not run_there and (file or glob.glob(f"{glob.escape(name)}/*.json*")):
                out.append(Source(Path(name.split(",")[0]).stem, None, name.split(",")))
            else:
                run = find_run(name, "--compare")
                out.append(Source(run.folder.name, run, []))
        if len({s.label for s in out}) < len(out):
            out = [s._replace(label=name) for s, name in zip(out, args.compare)]
    if labels and out:
        if len(set(labels)) != len(out):
            raise ValueError(f"--labels has {len(set(labels))} different names for {len(out)} columns")
        out = [s._replace(label=label) for s, label in zip(out, labels)]
    return out


def questions_of(name, args):
    """Rows, coverage lines and the folder of a benchmark. DataError where its files are not there."""
    if name == "held_out":
        files = (args.data or BENCHMARK.data).split(",")
        records, report = open_questions(files, args.video_root or None)
        rows = [benchmark_files.row_of(str(r["id"]), str(r["clip"].path), r["question"], r["answer"], r,
                                       groups={"task_type": r["task_type"]}) | {"clip": r["clip"]} for r in records]
        return rows, report_lines(report), str(Path(files[0]).parent)
    folder = args.data or f"{WORLD}/benchmarks"
    rows, report = benchmark_files.questions(name, folder, args.video_root or None)
    for row in rows:
        row |= {"said": None, "reply": None}
        if not args.data and name in ("ucf101", "hmdb51", "msvd_retrieval", "msrvtt_retrieval"):
            row["asks"] = [SYNOPSIS]  # [D1]
    return rows, benchmark_files.coverage_lines(report), str(Path(report["files"][0]).parent)


def score_source(source, said, args, judge, clip_text):
    """{benchmark: (rows, coverage lines, folder)} with predictions in the rows -> the source's part of the report."""
    parts, items = {}, {}
    for name, (rows, coverage, folder) in said.items():
        described = name in ("ucf101", "hmdb51", "msvd_retrieval", "msrvtt_retrieval")
        classes = None
        if name in ("ucf101", "hmdb51"):
            classes = (sorted({row["answer"] for row in rows}) if folder is None
                       else benchmark_files.class_names(name, folder, rows))
        rule = "held_out" if name == "held_out" else name
        values, problems = score_rows(rule, rows, judge, clip_text() if described else None, classes)
        asked = not described and name not in ("video_mme", "video_mme_subtitles", "nextqa", "tempcompass")
        own = any(row["reply"] is not None for row in rows)
        about = "none" if not asked and not own else "verdicts in the file (unnamed)" if own else judge.name
        parts[name] = summarise(values, rows) | dict(judge=about, clip=clip_text().name if described else None,
                                                     problems=problems, coverage=coverage)
        if classes:
            parts[name]["classes"] = len(classes)
        items[name] = {row["id"]: (row["video"], v) for row, v in zip(rows, values)}
        for row, v in zip(rows, values):
            row["values"] = v
    return dict(label=source.label, source=str(source.run.checkpoint if source.run else ",".join(source.files)),
                benchmarks=parts), items


def from_files(source, args):
    """Prediction files -> [(Source, {benchmark: (rows, coverage, folder)})], one per column of the file."""
    (name,) = args.names
    if name == "held_out":
        raise DataError("--predictions: held_out is scored from a checkpoint; name a public benchmark")
    columns, report = predictions(name, source.files)
    out = []
    for column, said in columns.items():
        lines = [f"{', '.join(report['files'])}: {len(said)} predictions" + (f" of {column}" if column else "")]
        if args.data or any(row["answer"] is None for row in said if row["reply"] is None):
            if not args.data:
                lost = next(row for row in said if row["answer"] is None)
                raise DataError(f"{source.files[0]}: id {lost['id']!r} has no correct answer there; give the "
                                "benchmark's files with --data")
            rows, coverage, folder = questions_of(name, args)
            counts = {}
            rows = join(rows, said, report)
            if column:  # a table of several models is about the questions it lists
                rows = [row for row in rows if row["said"] is not None]
            counts = {"questions without a prediction": report["without"] * (not column),
                      "predictions for no question": report["unknown"]}
            lines += coverage[:1] + [f"{len(ids)} {what}, e.g. {ids[0]}" for what, ids in counts.items() if ids]
        else:
            rows, folder = said, None
        lines += [f"left out: {n} {why}" for why, n in report["left_out"].items()]
        if unnamed := sum(row.get("unnamed", False) for row in rows):
            lines.append(f"{unnamed} predictions name no video: intervals are over questions; with a video beside "
                         "them, or with --data, they are over videos")
        if report["duplicates"]:
            lines.append(f"{len(report['duplicates'])} ids twice, e.g. {report['duplicates'][0]}; the last counts")
        out.append((source._replace(label=column or source.label), {name: (rows, lines, folder)}))
    return out


def main_benchmarks(args):
    rank, world, device = harness.setup_dist()
    if not args.data and any(source.run for source in args.sources):
        harness.build_if_missing(f"{WORLD}/benchmarks/nextqa", ["moving_shapes.py"], "under a minute", rank)
    harness.ship_weights([args.clip, args.judge_model], rank)
    say = lambda *lines: print(*lines, sep="\n", flush=True) if rank == 0 and lines else None
    with harness.one_line_errors(DataError, OSError, SafetensorError, ValueError, VideoError):
        done = []
        for source in args.sources:
            if source.run is None:
                done += from_files(source, args)
                continue
            said, ask = {}, Answering(source.run, args.choose, args.max_new_tokens, args.batch_size,
                                      args.cache, rank, world, device)
            for name in args.names:  # the coverage of every benchmark, before any model is loaded
                try:
                    if name == "mmaip_v" and args.judge == "exact":
                        raise DataError("its judge must see the video: --judge local or api")
                    rows, coverage, folder = questions_of(name, args)
                    say(*(f"{name}: {line}" for line in coverage))
                    if not any(row["clip"] for row in rows):
                        raise DataError(f"{folder}: no video of {name} found")
                except DataError as e:
                    if args.benchmark != "all":
                        raise
                    say(f"{name}: left out ({e})")
                    continue
                if args.limit and len(rows) > args.limit:
                    chosen = sorted(random.Random(0).sample(range(len(rows)), args.limit))
                    rows, coverage = [rows[i] for i in chosen], [*coverage, f"--limit: {args.limit} of them"]
                said[name] = rows, coverage, folder
            if not said:
                raise DataError(f"{args.data}: no benchmark there")
            for name, (rows, coverage, folder) in said.items():
                coverage += ask(name, rows, folder)
                said[name] = ([row for row in rows if row["said"]], coverage, folder)  # what could be asked
                write_predictions(source.run, name, said[name][0]) if rank == 0 else None
            done.append((source, said))
        if rank == 0:
            judge, loaded = make_judge(args, device), {}
            clip_text = lambda: loaded.get("clip") or loaded.setdefault("clip", ClipText(args.clip, device))
            scored = [score_source(source, said, args, judge, clip_text) for source, said in done]
            if never_read(judge):
                raise DataError(f"{judge.name}: not one verdict on {judge.asked} predictions could be "
                                "read")
            write_report(scored, done, args)
        harness.barrier()


def write_predictions(run, name, rows):
    """<run>/benchmarks/<benchmark>.json, in the benchmark's own format."""
    for stem, content in in_own_format(name, rows).items() if rows else []:
        harness.write(run.folder / "benchmarks" / f"{stem}.json", json.dumps(content, indent=1))


def write_report(scored, done, args):
    results = [result for result, _ in scored]
    (_, first), *others = scored
    differences = {r["label"]: {name: paired(first[name], mine[name]) for name in mine if name in first}
                   for r, mine in others}
    rows = side_by_side(results, differences) if others else overview(results[0])
    uneven = uneven_counts(results)
    print("\n" + as_text(rows) + "".join(f"\n\n{line}" for line in uneven))
    print("\n" + facts(results))
    out = args.out or (str(done[0][0].run.folder / "benchmarks" / "report") if args.checkpoint else "")
    if not out:
        return
    about = dict(command=" ".join(sys.argv), git_commit=harness.git_commit(), choose=args.choose)
    content = about | dict(results=results, differences=differences)
    harness.write(Path(f"{out}.json"), json.dumps(content, indent=1) + "\n")
    text = [f"# Benchmarks: {', '.join(r['label'] for r in results)}", "Brackets: 95 % interval over videos. Shares in "
            "%, scores from 0 to 5. Metrics in `_all` count an answer that could not be read, and a question without a "
            "prediction in a file, as wrong; questions whose video a checkpoint could not read count nowhere.",
            as_markdown(rows), *uneven]
    text += ["## Where the numbers come from", facts(results)]
    for r in results:
        text += [f"## {r['label']}, by group", *group_tables(r)]
    harness.write(Path(f"{out}.md"), "\n\n".join(text) + "\n")
    lines = [json.dumps(dict(source=source.label, benchmark=name, id=row["id"], video=row["video"], said=row["said"],
                             verdict=row.get("verdict"), values=row["values"]))
             for source, said in done for name, (part, _, _) in said.items() for row in part]
    harness.write(Path(f"{out}_items.jsonl"), "\n".join(lines) + "\n")
    plot_benchmarks(results, f"{out}.png")
    print(f"\nwritten: {out}.json, {out}.md, {out}.png, {out}_items.jsonl")


def main(args):
    if args.watch:
        watch(args.watch, args.out or "runs/watch")
    else:
        main_runs(args) if args.runs else main_benchmarks(args)


if __name__ == "__main__":
    main(parse_args(Args))
