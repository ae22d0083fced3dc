"""Accuracy of checkpoints: on the held-out questions side by side, and on every benchmark that the
papers report.

Runs         python evaluate.py --runs runs/sft/policy_s0 runs/grpo_rank/context_s0
             python evaluate.py --runs "runs/sft/policy_s*" "runs/grpo_rank/context_s*" --labels A,B
Benchmarks   python evaluate.py --checkpoint runs/sft/policy_s0 --benchmark all
             python evaluate.py --checkpoint runs/sft/mine_s0 --benchmark msvd_qa,video_mme
                 --data DIR --judge api ...
             python evaluate.py --predictions mine.json --benchmark video_mme      others' answers
             python evaluate.py --compare runs/sft/policy_s0 mine.json --benchmark video_mme
             torchrun --nproc_per_node=2 evaluate.py --checkpoint ...        the same, shared out

--runs makes <run>/predictions_<data>.json, used again while checkpoint, questions and videos are
the same, so that a table is cheap to redraw; with --out also results/demo.json, .md and .png.
Benchmarks make <run>/benchmarks/: answers that a killed run continues from, predictions in each
benchmark's own format, report.json, report.md, report.png.

accuracy    (--runs) share of greedy answers that match the label (lower case, no punctuation, no
            articles), in %; "a ± b": mean and sample standard deviation over a column's seeds
chance      accuracy of the training file's most frequent answer to the same question: no video
difference  to the first column, on the same questions and the same seeds; [low, high] is a 95 %
            interval from a bootstrap over videos, after averaging over the seeds. It says what
            other videos would give; for other seeds see the row "over seeds".

Rules of the benchmarks: evaluation/metrics.py; their files: evaluation/benchmark_files.py,
evaluation/prediction_files.py; how a checkpoint answers:
evaluation/answers.py; judges: evaluation/judges.py; tables and pictures: evaluation/report.py.

D1      Benchmarks of descriptions have prompts of their own, drawn at random from paraphrases by
        VLM-Eval; ours is one fixed prompt. In the embedded world it is its question for a synopsis.
"""

import glob
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from plumbing.flags import JUDGE, WEIGHTS, WORLD, ApiArgs, answer_help, flag, parse_args

CLIP = "openai/clip-vit-base-patch32"  # VLM-Eval's README
TEST = f"{WORLD}/test.json"  # the held-out questions of the embedded world


@dataclass
class Args(ApiArgs):
    # -- what is scored
    runs: list[str] = flag(list, "run or checkpoint folders, one column each; a quoted glob is "
                            "one column of seeds")
    checkpoint: str = flag("", "run or checkpoint folder to score on --benchmark")
    predictions: str = flag("",
                            "prediction file(s), comma-separated, or a folder of them, to score")
    compare: list[str] = flag(list, "run folders or prediction files: scores side by side, "
                               "differences to the first")
    watch: str = flag("", "folder of a run in progress: its curve is drawn into <out>.png at every "
                       "evaluation")
    benchmark: str = flag("all", "held_out | msvd_qa | msrvtt_qa | activitynet_qa | video_chatgpt "
                                 "| video_mme | msvd_retrieval | msrvtt_retrieval | ucf101 | "
                                 "hmdb51 | mmaip_v | nextqa | nextoe | video_mme_subtitles | with "
                                 "--predictions also tempcompass | cvrr_es; several "
                                 "comma-separated, or all")
    labels: str = flag("",
                       "names of the columns, comma-separated; empty: folder names without "
                       "_s<seed>")
    # -- data and models
    data: str = flag("",
                     "--runs: annotation file(s), comma-separated; else the folder or file of the "
                      "benchmarks. Empty: the embedded world")
    video_root: str = flag("", "where the videos are; empty: beside the annotation file")
    chance_data: str = flag("",
                            "training file, for chance; empty: train.json beside --data, if any")
    # -- judges and answers
    judge: str = flag("exact",
                      "exact: no model | local: --judge_model | api: --api_url, --api_model",
                      choices=("exact", "local", "api"))
    judge_model: str = flag(JUDGE, "checkpoint of --judge local")
    clip: str = flag("",
                     "CLIP whose text features retrieval and action recognition use; empty: the "
                      f"embedded one, with --data {CLIP}")
    choose: str = flag("", "multiple choice: generate a letter | likelihood of the options; empty: "
                        "likelihood in the embedded world, generate with --data "
                        "(evaluation/answers.py, D1)",
                      choices=("", "generate", "likelihood"))
    max_new_tokens: int = flag(48, "longest answer in a benchmark", low=1)
    batch_size: int = flag(100, "questions at a time", low=1)
    limit: int = flag(0, "questions per benchmark, drawn by a fixed seed; 0: all", low=0)
    # -- plumbing
    out: str = flag("", "write <out>.json, <out>.md and <out>.png; benchmarks of a checkpoint: "
                        "empty is <run>/benchmarks/report")
    cache: str = flag("cache", "folder of cached CLIP features and verdicts")

    def __post_init__(self):
        """Sets, too: groups, {label: [Run, ...]}; names, the benchmarks; sources, [Source, ...] of
        them."""
        super().__post_init__()
        modes = [m for m in ("runs", "checkpoint", "predictions", "compare", "watch")
                 if getattr(self, m)]
        if len(modes) != 1:
            raise ValueError("give one of --runs, --checkpoint, --predictions, --compare, --watch")
        labels = [x.strip() for x in self.labels.split(",")] if self.labels else None
        self.groups, self.sources = group_runs(self.runs, labels), find_sources(self, labels)
        every = ["held_out", *benchmark_files.BENCHMARKS]
        self.names = every if self.benchmark == "all" else [x.strip()
                                                            for x in self.benchmark.split(",")]
        known = every + list(benchmark_files.ONLY_PREDICTIONS) * bool(self.predictions
                                                                      or self.compare)
        if unknown := [x for x in self.names if x not in known]:
            raise ValueError(f"--benchmark {unknown[0]}: choose of {', '.join(known)}, all")
        if any(s.files for s in self.sources) and len(self.names) != 1:
            raise ValueError("prediction files hold the answers of one benchmark: name it with "
                             "--benchmark")
        self.check_api(needed=self.judge == "api")
        if self.runs:
            self.data = self.data or TEST
            self.chance_data = self.chance_data or str(Path(self.data.split(",")[0]).parent
                                                       / "train.json")
        self.choose = self.choose or ("generate" if self.data else "likelihood")
        self.clip = self.clip or (CLIP if self.data else f"{WEIGHTS}/clip")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import plumbing.run
from evaluation import benchmark_files
from evaluation.answers import Answering, Run, fingerprint
from evaluation.judges import ClipText, make_judge, score_rows, verdicts
from evaluation.prediction_files import in_own_format, join, predictions
from evaluation.report import (as_markdown, as_text, facts, group_tables, overview, paired,
                               plot_benchmarks, plot_curve, plot_runs, side_by_side, summarise,
                               uneven_counts)
from evaluation.runs import chance, compare, find_run, group_runs, learning_curve, table
from inputs.features import FeatureCache
from inputs.frames import VideoError
from inputs.records import DataError, read_records, report_lines
from plumbing import embedded, files, processes
from plumbing.text import DESCRIBE, is_correct
from video_llm import answer, load_model, unwrap

SYNOPSIS = "what happens in the video?"  # [D1]
LEGEND = ("a ± b: mean and standard deviation over seeds; [low, high]: 95 % interval over videos, "
          "seeds as they are")


# --- Questions
def open_questions(files, video_root):
    """Labelled questions about videos; requests for descriptions have no single right answer. ->
    records, report."""
    records, report = read_records(files, video_root)
    records = [r for r in records if r["clip"] and r["answer"] and r["question"] != DESCRIBE]
    return [{**r, "task_type": r["task_type"] or "no task type"} for r in records], report


# --- Runs and their predictions


def predict(run, records, stem, cache_dir, rank=0, world=1):
    """Answers of one run, shared out over the processes and kept in predictions_<stem>.json -> a
    row per record, its prediction None where the video cannot be read; {video: reason} of those.
    The same in every process."""
    file, mark = run.folder / f"predictions_{stem}.json", fingerprint(run.checkpoint, records)
    kept = json.loads(file.read_text()) if file.exists() else {}
    if all(processes.all_gather(kept.get("fingerprint") == mark)):
        print(f"{run.folder}: {len(records)} answers of {file.name} are used again",
              flush=True) if rank == 0 else None
        return kept["predictions"], kept["left_out"]
    began, screen = time.time(), sys.stderr.isatty() and rank == 0
    try:
        model, processor = load_model(run.checkpoint,
                                      device="cuda" if torch.cuda.is_available() else "cpu")
    except SafetensorError as e:
        raise OSError(f"{run.checkpoint}: {e}") from e
    cache = FeatureCache(unwrap(model), processor, cache_dir)
    mine = sorted({r["clip"] for r in records}, key=str)[rank::world]
    shares = processes.all_gather(cache.prepare(mine, progress=screen))
    broken = {clip: reason for share in shares for clip, reason in share.items()}
    rows = [dict(id=r.get("id"), video=str(r["clip"].path), question=r["question"],
                 task_type=r["task_type"],
                 answer=r["answer"], prediction=None, correct=None, ended=None) for r in records]
    todo = [i for i, r in enumerate(records) if r["clip"] not in broken]
    parts, done = [todo[k : k + 100] for k in range(0, len(todo), 100)][rank::world], []
    for part in tqdm(parts, desc=f"{run.folder}, 100 questions each", leave=False,
                     disable=not screen):
        texts, ended = answer(model.eval(), processor, cache, [records[i] for i in part],
                              return_ended=True)
        done += zip(part, texts, ended)
    for i, text, end in [row for share in processes.all_gather(done) for row in share]:
        rows[i] |= dict(prediction=text, correct=is_correct(text, records[i]["answer"]), ended=end)
    left_out = {str(clip.path): reason for clip, reason in broken.items()}
    if rank == 0:
        files.write(file, json.dumps(dict(fingerprint=mark, left_out=left_out, predictions=rows),
                                     indent=1))
        print(f"{run.folder}: {len(todo)} questions answered in {time.time() - began:.0f} s",
              flush=True)
    return rows, left_out


def main_runs(args):
    rank, world, _ = processes.setup_dist()
    say = print if rank == 0 else lambda *_, **__: None
    if args.data.startswith(WORLD):
        embedded.build_world(rank)
    files, predictions, left_out, guesses = args.data.split(","), {}, {}, None
    with processes.one_line_errors(DataError, OSError):
        records, report = open_questions(files, args.video_root or None)
        if not records:
            raise DataError(f"{args.data}: no labelled question about a video")
        say("\n".join(report_lines(report)))
        try:  # the training videos need not be here to score the held-out ones
            guesses = chance(open_questions([args.chance_data], args.video_root or None)[0],
                             records)
        except DataError as e:
            say(f"no chance column: {e}")
        for label, runs in args.groups.items():
            done = [predict(run, records, "+".join(Path(f).stem for f in files), args.cache, rank,
                            world)
                    for run in runs]
            predictions[label] = [rows for rows, _ in done]
            left_out |= {video: reason for _, broken in done for video, reason in broken.items()}
        summary = compare(args.groups, predictions, guesses)
        asked, videos = summary["counts"]["all"], summary["videos"]
        title = f"Accuracy on {args.data}: {asked} questions about {videos} videos"
        missing = [f"left out of every column: {reason}" for reason in left_out.values()]
        missing += [f"{len(missing)} videos with {summary['left_out']} questions are left "
                    "out"] if missing else []
        say("\n" + "\n".join([*missing, title, "", as_text(table(summary)), LEGEND]))
        if args.out and rank == 0:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            about = dict(title=title, command=" ".join(sys.argv),
                         git_commit=plumbing.run.git_commit(), broken=left_out)
            Path(f"{args.out}.json").write_text(json.dumps(about | summary, indent=1) + "\n")
            parts = [title, *missing, as_markdown(table(summary)), LEGEND]
            Path(f"{args.out}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
            curves = {label: [c for c in (learning_curve(run.folder) for run in runs) if c]
                      for label, runs in args.groups.items()}
            plot_runs(summary, curves, title, f"{args.out}.png")
            print(f"\nwritten: {args.out}.json, {args.out}.md, {args.out}.png")


def watch(folder, out, pause=2.0):
    """Draw <out>.png anew at every evaluation of the run in `folder`, until it has finished (or
    this is stopped)."""
    drawn, finished = {}, False
    while not finished:
        finished = Path(folder, "final").exists()  # first: the last row was written before it
        curve = learning_curve(folder)
        if curve != drawn:
            drawn = curve
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            plot_curve({Path(folder).name: [curve]}, f"{out}.png")
        time.sleep(0 if finished else pause)


# --- Benchmarks: questions -> answers of a checkpoint, or of a file -> values -> report
class Source(NamedTuple):
    """What is scored: a run, or a column of prediction files."""
    label: str
    run: Run | None
    files: list


def find_sources(args, labels):
    """The columns of a report, in the order of the arguments; none for --runs. ValueError says what
    is wrong."""
    if args.predictions:
        out = [Source(Path(args.predictions.split(",")[0]).stem, None, args.predictions.split(","))]
    elif args.checkpoint:
        run = find_run(args.checkpoint, "--checkpoint")
        out = [Source(run.folder.name, run, [])]
    else:
        out = []
        # a file, or a folder that holds JSON and no checkpoint, is predictions
        for name in args.compare:
            run_there = Path(name,
                             "final").is_dir() or glob.glob(f"{glob.escape(name)}/*config.json")
            first = Path(name.split(",")[0])
            file = first.suffix.lower() in benchmark_files.READ or first.is_file()
            if not run_there and (file or glob.glob(f"{glob.escape(name)}/*.json*")):
                out.append(Source(Path(name.split(",")[0]).stem, None, name.split(",")))
            else:
                run = find_run(name, "--compare")
                out.append(Source(run.folder.name, run, []))
        if len({s.label for s in out}) < len(out):
            out = [s._replace(label=name) for s, name in zip(out, args.compare)]
    if labels and out:
        if len(set(labels)) != len(out):
            raise ValueError(f"--labels has {len(set(labels))} different names for {len(out)} "
                             "columns")
        out = [s._replace(label=label) for s, label in zip(out, labels)]
    return out


def questions_of(name, args):
    """Rows, coverage lines and the folder of a benchmark. DataError where its files are not
    there."""
    if name == "held_out":
        files = (args.data or TEST).split(",")
        records, report = open_questions(files, args.video_root or None)
        rows = [benchmark_files.row_of(str(r["id"]), str(r["clip"].path), r["question"],
                                       r["answer"], r,
                                       groups={"task_type": r["task_type"]}) | {"clip": r["clip"]}
                                       for r in records]
        return rows, report_lines(report), str(Path(files[0]).parent)
    folder = args.data or f"{WORLD}/benchmarks"
    rows, report = benchmark_files.questions(name, folder, args.video_root or None)
    for row in rows:
        row |= {"said": None, "reply": None}
        if not args.data and name in ("ucf101", "hmdb51", "msvd_retrieval", "msrvtt_retrieval"):
            row["asks"] = [SYNOPSIS]  # [D1]
    return rows, benchmark_files.coverage_lines(report), str(Path(report["files"][0]).parent)


def score_source(source, said, args, judge, clip_text):
    """{benchmark: (rows, coverage lines, folder)} with predictions in the rows -> the source's part
    of the report, {benchmark: values by id}, the benchmarks without a single verdict."""
    parts, items, silent = {}, {}, []
    for name, (rows, coverage, folder) in said.items():
        described = name in ("ucf101", "hmdb51", "msvd_retrieval", "msrvtt_retrieval")
        classes = None
        if name in ("ucf101", "hmdb51"):
            classes = (sorted({row["answer"] for row in rows}) if folder is None
                       else benchmark_files.class_names(name, folder, rows))
        rule = "held_out" if name == "held_out" else name
        before = verdicts(judge)
        values, problems = score_rows(rule, rows, judge, clip_text() if described else None,
                                      classes)
        wanted, read = (now - then for now, then in zip(verdicts(judge), before))
        silent += [f"{source.label}, {name}"] * (wanted > 0 == read)
        asked = not described and name not in ("video_mme", "video_mme_subtitles", "nextqa",
                                               "tempcompass")
        own = any(row["reply"] is not None for row in rows)
        about = "verdicts in the file (unnamed)" if own else judge.name if asked else "none"
        parts[name] = summarise(values, rows) | dict(judge=about,
                                                     clip=clip_text().name if described else None,
                                                     problems=problems, coverage=coverage)
        if classes:
            parts[name]["classes"] = len(classes)
        items[name] = {row["id"]: (row["video"], v) for row, v in zip(rows, values)}
        for row, v in zip(rows, values):
            row["values"] = v
    return dict(label=source.label,
                source=str(source.run.checkpoint if source.run else ",".join(source.files)),
                benchmarks=parts), items, silent


def from_files(source, args):
    """Prediction files -> [(Source, {benchmark: (rows, coverage, folder)})], one per column of the
    file."""
    (name,) = args.names
    if name == "held_out":
        raise DataError("--predictions: held_out is scored from a checkpoint; name a public "
                        "benchmark")
    columns, report = predictions(name, source.files)
    out = []
    for column, said in columns.items():
        lines = [f"{', '.join(report['files'])}: {len(said)} predictions"
                 + (f" of {column}" if column else "")]
        if args.data or any(row["answer"] is None for row in said if row["reply"] is None):
            if not args.data:
                lost = next(row for row in said if row["answer"] is None)
                raise DataError(f"{source.files[0]}: id {lost['id']!r} has no correct answer "
                                "there; give the benchmark's files with --data")
            rows, coverage, folder = questions_of(name, args)
            counts = {}
            rows = join(rows, said, report)
            if column:  # a table of several models is about the questions it lists
                rows = [row for row in rows if row["said"] is not None]
            counts = {"questions without a prediction": report["without"] * (not column),
                      "predictions for no question": report["unknown"]}
            lines += coverage[:1] + [f"{len(ids)} {what}, e.g. {ids[0]}"
                                     for what, ids in counts.items() if ids]
        else:
            rows, folder = said, None
        lines += [f"left out: {n} {why}" for why, n in report["left_out"].items()]
        if unnamed := sum(row.get("unnamed", False) for row in rows):
            lines.append(f"{unnamed} predictions name no video: intervals are over questions; with "
                         "a video beside them, or with --data, they are over videos")
        if report["duplicates"]:
            lines.append(f"{len(report['duplicates'])} ids twice, e.g. {report['duplicates'][0]}; "
                         "the last counts")
        out.append((source._replace(label=column or source.label), {name: (rows, lines, folder)}))
    return out


def main_benchmarks(args):
    rank, world, device = processes.setup_dist()
    if not args.data and any(source.run for source in args.sources):
        command = ["embedded_world/moving_shapes.py"]
        embedded.build_if_missing(f"{WORLD}/benchmarks/nextqa", command, "under a minute", rank)
    embedded.ship_weights([args.clip, args.judge_model], rank)
    say = lambda *lines: print(*lines, sep="\n", flush=True) if rank == 0 and lines else None
    with processes.one_line_errors(DataError, OSError, SafetensorError, ValueError, VideoError):
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
                    rows, coverage = [rows[i] for i in chosen], [*coverage,
                                                                 f"--limit: {args.limit} of them"]
                said[name] = rows, coverage, folder
            if not said:
                raise DataError(f"{args.data}: no benchmark there")
            for name, (rows, coverage, folder) in said.items():
                coverage += ask(name, rows, folder)
                # what could be asked
                said[name] = ([row for row in rows if row["said"]], coverage, folder)
                write_predictions(source.run, name, said[name][0]) if rank == 0 else None
            done.append((source, said))
        if rank == 0:
            judge, loaded = make_judge(args, device), {}
            clip_text = lambda: loaded.get("clip") or loaded.setdefault("clip",
                                                                        ClipText(args.clip, device))
            scored = [score_source(source, said, args, judge, clip_text) for source, said in done]
            asked, read = verdicts(judge)
            if asked > 0 == read:
                raise DataError(f"{judge.name}: not one verdict on {asked} predictions could be "
                                "read")
            silent = [which for _, _, names in scored for which in names]
            write_report([(part, items) for part, items, _ in scored], done, args)
            if silent:
                raise DataError(f"{judge.name}: not one verdict could be read on "
                                f"{'; '.join(silent)}: the zeros there are no accuracy")
        processes.barrier()


def write_predictions(run, name, rows):
    """<run>/benchmarks/<benchmark>.json, in the benchmark's own format."""
    for stem, content in in_own_format(name, rows).items() if rows else []:
        files.write(run.folder / "benchmarks" / f"{stem}.json", json.dumps(content, indent=1))


def write_report(scored, done, args):
    results = [result for result, _ in scored]
    (_, first), *others = scored
    differences = {r["label"]: {name: paired(first[name], mine[name]) for name in mine
                                if name in first}
                   for r, mine in others}
    rows = side_by_side(results, differences) if others else overview(results[0])
    uneven = uneven_counts(results)
    print("\n" + as_text(rows) + "".join(f"\n\n{line}" for line in uneven))
    print("\n" + facts(results))
    out = args.out or (str(done[0][0].run.folder / "benchmarks" / "report") if args.checkpoint
                       else "")
    if not out:
        return
    about = dict(command=" ".join(sys.argv), git_commit=plumbing.run.git_commit(),
                 choose=args.choose)
    content = about | dict(results=results, differences=differences)
    files.write(Path(f"{out}.json"), json.dumps(content, indent=1) + "\n")
    text = [f"# Benchmarks: {', '.join(r['label'] for r in results)}",
            "Brackets: 95 % interval over videos. Shares in %, scores from 0 to 5. Metrics in "
            "`_all` count an answer that could not be read, and a question without a prediction in "
            "a file, as wrong; questions whose video a checkpoint could not read count nowhere.",
            as_markdown(rows), *uneven]
    text += ["## Where the numbers come from", facts(results)]
    for r in results:
        text += [f"## {r['label']}, by group", *group_tables(r)]
    files.write(Path(f"{out}.md"), "\n\n".join(text) + "\n")
    lines = [json.dumps(dict(source=source.label, benchmark=name, id=row["id"], video=row["video"],
                             said=row["said"],
                             verdict=row.get("verdict"), values=row["values"]))
             for source, said in done for name, (part, _, _) in said.items() for row in part]
    files.write(Path(f"{out}_items.jsonl"), "\n".join(lines) + "\n")
    plot_benchmarks(results, f"{out}.png")
    print(f"\nwritten: {out}.json, {out}.md, {out}.png, {out}_items.jsonl")


def main(args):
    if args.watch:
        watch(args.watch, args.out or "runs/watch")
    else:
        main_runs(args) if args.runs else main_benchmarks(args)


if __name__ == "__main__":
    main(parse_args(Args))
