"""Which questions the scripts that learn from feedback ask, in which order, and with which random
numbers.

Labels are scarce: SFT sees the answers of a few clips, feedback is given on the videos of the
others."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np

from inputs.records import DataError, read_records, report_lines
from plumbing import files, processes
from plumbing.text import DESCRIBE, is_correct
from video_llm import answer, fits


def read_questions(run, answers=False):
    """The records of --data and the report of reading them. RL sees videos and questions only:
    answers stay for --oracle reference, which compares with them, or if `answers`."""
    args, labelled = run.args, "reference" in run.args.raters
    with processes.one_line_errors(DataError, OSError):
        paths, root = args.data.split(","), args.video_root or None
        records, report = read_records(paths, root, labelled=labelled)
    if not (labelled or answers):
        records = [{**r, "answer": None} for r in records]
    return records, report


def usable_questions(run, records, report, cache):
    """The records without four kinds of question: clips labelled in SFT, unreadable videos,
    requests for descriptions (an oracle that compares short answers cannot rank them), prompts too
    long for --max_prompt_tokens."""
    seen_file = Path(run.args.model).parent / "labelled_clips.json"
    seen = ({real(path) for path in json.loads(seen_file.read_text())} if seen_file.exists()
            else set())
    known = {r["clip"] for r in records if r["clip"] and real(r["clip"].path) in seen}
    records = [r for r in records if r["clip"] and r["question"] != DESCRIBE
               and r["clip"] not in known]
    broken = prepare_videos(run, cache, [r["clip"] for r in records])
    records = [r for r in records if r["clip"] not in broken]
    processes.check_same(f"{run.args.data}: its records",
                         [[r["id"], r["question"], r["answer"]] for r in records])
    if longest := getattr(run.args, "max_prompt_tokens", None):
        records, before = [r for r in records if fits(cache.processor, r, longest)], len(records)
        if run.rank == 0 and len(records) < before:
            print(f"{before - len(records)} questions left out: their prompts cannot be cut to "
                  f"--max_prompt_tokens {longest}")
    if run.rank == 0:
        print("\n".join(report_lines(report)))
        left_out = len({clip.path for clip in known})
        print(f"{len(records)} questions; {left_out} of {len(seen)} clips labelled in SFT are "
              f"there and left out; {len(broken)} broken")
    return records


def real(path):
    """A video's real path. Frames (a tuple, or its text in a file) stay as they are."""
    return str(path) if isinstance(path, tuple) or path.startswith("(") else os.path.realpath(path)


def choose_labels(run, records):
    """The records of --num_clips clips, drawn by --seed: all labels that SFT will ever see. They
    are listed in labelled_clips.json, because RL leaves these clips out."""
    args = run.args
    if not args.num_clips:
        return records
    paths = sorted({str(r["clip"].path) for r in records if r["clip"]})
    if args.num_clips > len(paths):
        sys.exit(f"--num_clips {args.num_clips}: the data holds {len(paths)} clips")
    chosen = set(random.Random(args.seed).sample(paths, args.num_clips))
    if run.rank == 0:
        Path(run.folder, "labelled_clips.json").write_text(json.dumps(sorted(chosen)))
    return [r for r in records if r["clip"] and str(r["clip"].path) in chosen]


def fitting_records(run, cache, records, report):
    """The records whose video can be read and whose prompt can be cut to --max_prompt_tokens.
    Others would end the run in the middle of a step, and again at every --resume."""
    args = run.args
    broken = prepare_videos(run, cache, [r["clip"] for r in records if r["clip"]])
    readable = [r for r in records if r["clip"] not in broken]
    records = [r for r in readable if fits(cache.processor, r, args.max_prompt_tokens)]
    count = (f"{len(records)} records are used; {len(broken)} clips cannot be read, "
             f"{len(readable) - len(records)} prompts cannot be cut to --max_prompt_tokens "
             f"{args.max_prompt_tokens}")
    same = [[r["id"], r["question"], r["answer"]] for r in records]
    processes.check_same(f"{args.data}: its records", same)
    if not records:
        sys.exit(f"{args.data}: {count}")
    if run.rank == 0:
        print(*report_lines(report), count, sep="\n")
    return records


def choose_questions(run, records, report, cache):
    """-> the questions of RL, and the held-out questions that measure it."""
    records = usable_questions(run, records, report, cache)
    if len(records) < run.args.prompts_per_step:
        sys.exit(f"{run.args.data}: {len(records)} usable questions, fewer than --prompts_per_step "
                 f"{run.args.prompts_per_step}")
    return records, held_out_questions(run, cache)


def held_out_questions(run, cache):
    """--eval_questions questions of --eval_data, the same for every seed, without unreadable
    videos."""
    if not run.args.eval_data:
        return []
    with processes.one_line_errors(DataError):
        evals, _ = read_records(run.args.eval_data.split(","), run.args.video_root or None)
    evals = [r for r in evals if r["clip"] and r["question"] != DESCRIBE]
    evals = random.Random(0).sample(evals, min(run.args.eval_questions, len(evals)))
    bad = prepare_videos(run, cache, [r["clip"] for r in evals])
    evals = [r for r in evals if r["clip"] not in bad]
    processes.check_same(f"{run.args.eval_data}: its records",
                         [[r["id"], r["question"], r["answer"]] for r in evals])
    # sharded: the same number of forward passes on every process
    return evals[: len(evals) // run.world * run.world] if run.sharded else evals


def step_questions(count, step, args):
    """The questions of one step, over all processes: [(which, how often it came earlier in this
    step), ..]. Both are part of the key of every draw, or the groups of a question that comes twice
    would be the same answers."""
    indices = question_indices(count, step, args)
    return [(i, indices[:k].count(i)) for k, i in enumerate(indices)]


def question_indices(count, step, args):
    """The questions of one step, over all processes: a slice of an endless sequence of
    permutations, each keyed by (seed, epoch)."""
    first, out = step * args.prompts_per_step, []
    for k in range(first, first + args.prompts_per_step):
        epoch, place = divmod(k, count)
        if not out or place == 0:
            order = np.random.default_rng([args.seed, epoch]).permutation(count)
        out.append(int(order[place]))
    return out


def count_correct(records, model, processor, cache):
    """Greedy answers against the labels -> number right, number asked."""
    answers = answer(model, processor, cache, records)
    return sum(is_correct(a, r["answer"]) for a, r in zip(answers, records)), len(records)


def prepare_videos(run, cache, clips):
    """Decode and encode every clip before training, each on one of the processes. -> {clip: reason}
    of the unreadable ones, the same on every process; also written to broken_videos.json in the run
    folder."""
    mine = sorted(set(clips), key=str)[run.rank :: run.world]
    broken = {}
    for part in processes.all_gather(cache.prepare(mine, progress=run.rank == 0)):
        broken |= part
    if run.rank == 0 and broken:
        file = Path(run.folder, "broken_videos.json")  # of training and of held-out questions
        listed = json.loads(file.read_text()) if file.exists() else {}
        listed |= {f"{c.path} [{c.start}, {c.end}]": reason for c, reason in broken.items()}
        files.write(file, json.dumps(listed, indent=2))
        for reason in list(broken.values())[:5]:
            print(f"left out: {reason}")
    return broken
