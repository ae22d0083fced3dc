"""Which questions the scripts that learn from feedback may ask, and what they start from; the same for all of them.

Labels are scarce, as in life: SFT sees the answers of few clips, feedback is given on the videos of the others.
"""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np

import evaluate
import harness
from answers import fits
from data import DataError, read_records, report_lines
from flags import WORLD
from oracle import DESCRIBE, build_oracle

POLICY_SFT = "--steps 200 --batch_size 16 --lr 1e-3"  # annealed and long enough: more steps gain nothing more


def sft_start(seed):
    """The label-scarce start of every embedded run: SFT on the labels of 40 clips, which differ from seed to seed."""
    return f"runs/sft/policy_s{seed}/final"


def build_embedded(args, rank):
    """Data, SFT start and oracle of the embedded default; paths of the user's own are never built."""
    if args.data.startswith(WORLD):
        harness.build_if_missing(f"{WORLD}/clips.json", ["moving_shapes.py"], "under a minute", rank)
    if args.model == sft_start(args.seed):
        harness.build_if_missing(args.model, policy_sft_command(args.seed), "about a minute", rank)
    build_oracle(args, rank)


def policy_sft_command(seed):
    data = f"--data {WORLD}/train.json --num_clips 40 --seed {seed}"
    return f"sft.py --name policy_s{seed} {data} {POLICY_SFT} --resume".split()


def usable_questions(args, records, report, cache, folder, rank, world):
    """The questions feedback may be asked about: not those whose clips the SFT start (--model) saw the labels of, no
    broken videos, no requests for descriptions (an oracle that compares short answers cannot rank them), none whose
    prompt cannot be cut to --max_prompt_tokens, where the script has that flag."""
    seen_file = Path(args.model).parent / "labelled_clips.json"
    seen = {real(path) for path in json.loads(seen_file.read_text())} if seen_file.exists() else set()
    known = {r["clip"] for r in records if r["clip"] and real(r["clip"].path) in seen}
    records = [r for r in records if r["clip"] and r["question"] != DESCRIBE and r["clip"] not in known]
    broken = harness.prepare_videos(cache, [r["clip"] for r in records], folder, rank, world)
    records = [r for r in records if r["clip"] not in broken]
    harness.check_same(f"{args.data}: its records", [[r["id"], r["question"], r["answer"]] for r in records])
    if longest := getattr(args, "max_prompt_tokens", None):
        records, before = [r for r in records if fits(cache.processor, r, longest)], len(records)
        if rank == 0 and len(records) < before:
            print(f"{before - len(records)} questions left out: their prompts cannot be cut to --max_prompt_tokens "
                  f"{longest}")
    if rank == 0:
        print("\n".join(report_lines(report)))
        left_out = len({clip.path for clip in known})
        print(f"{len(records)} questions; {left_out} of {len(seen)} clips labelled in SFT are there and left out; "
              f"{len(broken)} broken")
    return records


def real(path):
    """A video's path, however it is spelt; frames (a tuple, or in a file its text) as they are."""
    return str(path) if isinstance(path, tuple) or path.startswith("(") else os.path.realpath(path)


def choose_questions(args, records, report, cache, folder, rank, world):
    """The questions RL may ask, and those that measure it. -> records, held-out records."""
    records = usable_questions(args, records, report, cache, folder, rank, world)
    if len(records) < args.prompts_per_step:
        sys.exit(f"{args.data}: {len(records)} usable questions, fewer than --prompts_per_step {args.prompts_per_step}")
    return records, held_out_questions(args, cache, folder, rank, world)


def held_out_questions(args, cache, folder, rank, world):
    """`--eval_questions` questions of --eval_data, the same for every seed; broken videos are left out."""
    if not args.eval_data:
        return []
    with harness.one_line_errors(DataError):
        evals, _ = read_records(args.eval_data.split(","), args.video_root or None)
    evals = [r for r in evals if r["clip"] and r["question"] != DESCRIBE]
    evals = random.Random(0).sample(evals, min(args.eval_questions, len(evals)))
    bad = harness.prepare_videos(cache, [r["clip"] for r in evals], folder, rank, world)
    return [r for r in evals if r["clip"] not in bad]


def question_indices(count, step, args):
    """The questions of one step, over all processes: an endless sequence of permutations keyed by (seed, epoch)."""
    first, out = step * args.prompts_per_step, []
    for k in range(first, first + args.prompts_per_step):
        epoch, place = divmod(k, count)
        if not out or place == 0:
            order = np.random.default_rng([args.seed, epoch]).permutation(count)
        out.append(int(order[place]))
    return out


def times_before(indices):
    """How often each question of a step stands in it before: 0, unless an epoch ends within the step. Part of the key
    of all draws, or the two groups would be the same answers."""
    return [indices[:k].count(i) for k, i in enumerate(indices)]


def count_correct(records, model, processor, cache):
    """Greedy answers against the labels -> number right, number asked."""
    answers = evaluate.answer(model, processor, cache, records)
    return sum(evaluate.is_correct(a, r["answer"]) for a, r in zip(answers, records)), len(records)
