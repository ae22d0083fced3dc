"""The reward model of VLM-RLAIF: an AI that knows the video's narrative prefers one of two answers; a scalar learns it.

Run      python reward_model.py                                  collect preferences, then train; builds what is missing
         torchrun --nproc_per_node=4 reward_model.py              the same on four processes
         python reward_model.py --stage collect --oracle judge    the preference file alone; here without a narrative
         python reward_model.py --oracle reference --name truth   ground-truth preferences: an upper bound, not RLAIF
         python reward_model.py --preferences my.json --base my_sft --narrative False --guided False --name mine
Papers   [V] VLM-RLAIF arXiv:2402.03746, Sec. 3.1      [BT] Bradley and Terry 1952, as in InstructGPT arXiv:2203.02155
         [C] centring: Eisenstein et al. arXiv:2312.09244, as in TRL      [N] normalising: arXiv:1909.08593
Makes    runs/reward_model/<name>_s<seed>/final: what `oracle.py --oracle reward_model` and `ppo_rlaif.py` read, and
         runs/reward_model/preferences/*.json: a preference file in VLM-RLAIF's own format

Differs  D1  every two *different* answers among --samples draws are compared (equal but for case, punctuation and
             articles: the same), up to six pairs a question. [V] draws two; those of a 7B model are long and never
             agree, those of `tiny` are a word or two and often do.
         D2  near-ties (--min_margin) are dropped and counted. [V] asks the judge once and takes what it says; ours is
             asked in both orders, and where the two nearly cancel its choice is its taste for a place. An exact tie is
             always dropped; nobody learns to prefer an empty answer, but one can be rejected.
         D3  the answer stands *before* the question, as in the judge's task ("Response 1: .. Which response is better?
             <question>"), and the reward is the scalar at the prompt's last token: a small model compares an answer
             with what it would say itself where it is about to say it. [V] shows it last; its code pads on the left and
             reads position -1 behind a turn that asks for a quality score. `--guided False --answer_first False`: at
             the answer's last token (EOS), found by its length; a row of the ablation.
         D4  the reward model reads the narrative too (--narrative). [V]'s reward prompt has a slot for a caption that
             the released code fills with None. `--narrative False` leaves it out: a row of the ablation, as good on the
             one seed measured.
         D5  what it starts from (--base): the SFT model that judges and describes, as in [V] (there the 13B model),
             and not the weaker one that answers; from that one: another row of the ablation.
         D6  the centring term is [C]'s mean of squares per pair; [V]'s |batch mean| depends on the micro-batch.
         D7  accuracy is measured on pairs whose *videos* were not trained on; [V]'s scripts pass one file for both.
         D8  at the end the head is shifted and scaled so that the rewards have mean 0 and deviation 1 over (up to 1,000
             groups of) the training pairs [N]: rewards of different models can be read side by side, and --reward_scale
             of ppo_rlaif.py means the same for each; by default PPO normalises again. [V] multiplies by 10.
         D9  `tiny` trains all weights; [V]: LoRA r = 64, alpha = 16, learning rate 2e-5, one epoch, 40k pairs.
         D10  the judge's own answer to the question stands beside the one to be rewarded (--guided), so that the prompt
             is the judge's task word for word. A scalar that is read where the network has only just made up its mind
             has no layer left to compare that with an answer; with both in the prompt it has all of them. References
             of a judge's own making: Zheng et al. arXiv:2306.05685, Sec. 3.4. `--guided False`: a row of the ablation.
         D11  the head has a learning rate of its own: it starts from zero, and at the rate of weights that know
             something it would spend most of a short training on growing. [V]: one rate for all.

What is read (the narrative told anew by --oracle_model, the one in a file is not read):
         <video> narrative / Response 1: the answer / Response 2: the judge's own / Which response is better? / question
and r stands at the last token. One thing makes it fast: the pairs about one video share one prefix, video and narrative
(`packed` in video_llm.py).

symbol        name        shape    meaning                                                          made in
P             p           ()       judge's probability that the first answer is better, both orders  collect
              prefix      (B,L)    what the prompts about a video have in common; B groups of pairs  step 2
y_c, y_r      tokens      (B,G,T)  a group's different answers, each once, and the rest of a prompt  step 2
              places      (n,2)    where in B*G the answers of each pair are, chosen first           step 2
r             rewards     (n,2)    the scalar at the texts' last tokens, n pairs, chosen first       step 2
"""

import functools
import json
import math
import os
import random
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from flags import (
    JUDGE,
    WORLD,
    ModelArgs,
    above_zero,
    answer_help,
    at_least,
    check_start,
    check_training,
    parse_args,
)

JUDGES = ("context", "judge", "reference")
SIDES = ("chosen", "rejected")
MEASURES = ("accuracy", "margin", "reward", "truth_accuracy", "oracle_accuracy")
COLLECTED_WITH = ("model", "data", "video_root", "oracle", "oracle_model", "clips", "prompts", "samples", "temperature",
                  "max_new_tokens", "min_margin", "seed")  # the flags that decide what a preference file holds


@dataclass
class Args(ModelArgs):  # --dtype, ...: flags.py
    # -- algorithm
    stage: str = HfArg(default="train", help="train (collects first where the file is missing), or collect alone")
    # -- preferences
    oracle: str = HfArg(default="context", help="context: a judge that knows the narrative [V]; judge: without it; "
                        "reference: token F1 with the label, not RLAIF")
    clips: int = HfArg(default=3, help="parts the video is cut into for the narrative [V: 3]")
    prompts: int = HfArg(default=10000, help="questions to collect answers to [V: 40k]")
    samples: int = HfArg(default=4, help="answers drawn to a question; all different ones are compared (D1) [V: 2]")
    temperature: float = HfArg(default=1.0, help="sampling temperature [V: 1.0]")
    max_new_tokens: int = HfArg(default=16, help="longest sampled answer, EOS included")
    min_margin: float = HfArg(default=0.1, help="drop pairs with |P - 1/2| below this (D2)")
    # -- the reward model
    narrative: bool = HfArg(default=True, help="the reward model reads the narrative before the question (D4)")
    guided: bool = HfArg(default=True, help="the judge's own answer stands beside the one to be rewarded (D10)")
    answer_first: bool = HfArg(default=True, help="the answer stands before the question, not behind it (D3)")
    centring: float = HfArg(default=0.01, help="weight of the centring term [V: 1e-3] (D6)")
    lora_r: int = HfArg(default=0, help="LoRA rank on the decoder [V: 64]; 0 trains all weights but CLIP's (D9)")
    lora_alpha: int = HfArg(default=16, help="LoRA alpha [V: 16]")
    quantize: str = HfArg(default="none", help="none, or nf4: QLoRA, needs --lora_r")
    # -- budget
    epochs: float = HfArg(default=4.0, help="passes over the pairs [V: 1]")
    prompts_per_step: int = HfArg(default=16, help="groups (up to --pack pairs about a video) per optimizer step")
    pack: int = HfArg(default=8, help="pairs about one video that share its prefix, at most")
    micro_batch_size: int = HfArg(default=4, help="groups per forward pass and process")
    lr: float = HfArg(default=5e-4, help="peak learning rate; short warm-up, then linear to zero [V: 2e-5]")
    head_lr: float = HfArg(default=1e-2, help="peak learning rate of the scalar head, which starts from zero (D11)")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay [V: 0]")
    share: float = HfArg(default=1.0, help="train on this share of the training pairs, drawn by --seed [V Fig. 5]")
    eval_share: float = HfArg(default=0.15, help="share of the videos held out (D7)")
    eval_steps: int = HfArg(default=25, help="steps between measurements on the held-out pairs")
    # -- data and models
    preferences: str = HfArg(default="", help="preference files, comma-separated; shapes: docs/reward_model.md; empty: "
                             "runs/reward_model/preferences/<oracle>_c<clips>_s<seed>.json, collected if missing")
    data: str = HfArg(default=f"{WORLD}/train.json", help="collect: videos and questions")
    video_root: str = HfArg(default="", help="where the videos are; empty: beside the annotation or preference file")
    model: str = HfArg(default="", help="collect: the SFT model that answers; empty: runs/sft/policy_s<seed>/final")
    oracle_model: str = HfArg(default=JUDGE, help="the model that judges and tells the narrative")
    base: str = HfArg(default=JUDGE, help="train: what the reward model starts from (D5)")
    max_prompt_tokens: int = HfArg(default=512, help="longest prompt, the answer not counted: of a longer one the "
                                   "narrative is cut; collect: the question's end, never the video")
    max_answer_tokens: int = HfArg(default=96, help="longer answers are cut")
    # -- plumbing
    name: str = HfArg(default="context", help="run name: runs/reward_model/<name>_s<seed>")
    seed: int = HfArg(default=0, help="choice of questions, sampled answers, held-out videos, order of the pairs")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features and narratives")
    save_steps: int = HfArg(default=50, help="steps between checkpoints")
    resume: bool = HfArg(default=False, help="continue the run of this name where it stopped")

    def __post_init__(self):
        if self.stage not in ("train", "collect"):
            raise ValueError(f"--stage {self.stage}: choose train or collect")
        if self.oracle not in JUDGES:
            raise ValueError(f"--oracle {self.oracle}: choose one of {', '.join(JUDGES)}")
        at_least(self, clips=1, prompts=2, samples=2, max_new_tokens=1, min_margin=0, centring=0, lora_r=0,
                 weight_decay=0, prompts_per_step=1, pack=1, micro_batch_size=1, eval_steps=1, save_steps=1,
                 max_prompt_tokens=1, max_answer_tokens=1)
        if not (0 < self.eval_share < 1 and 0 < self.share <= 1 and self.min_margin < 0.5):
            raise ValueError("--eval_share must lie between 0 and 1, --share in (0, 1], --min_margin below 0.5")
        if self.guided and not self.answer_first:
            raise ValueError("--answer_first False: the judge's task ends with the question; add --guided False")
        above_zero(self, "epochs", "lr", "head_lr", "temperature")
        check_training(self, batch="prompts_per_step")
        if self.stage == "collect" and "," in self.preferences:
            raise ValueError(f"--preferences {self.preferences}: --stage collect writes one file")
        self.model = self.model or sft_start(self.seed)
        check_start(self, "base")
        self.own_file = bool(self.preferences)
        parts = f"_c{self.clips}" if self.oracle == "context" else ""
        default = f"runs/reward_model/preferences/{self.oracle}{parts}_s{self.seed}.json"
        self.preferences = self.preferences or default

    @property
    def raters(self):
        return [self.oracle]


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch
import torch.nn.functional as F

import harness
from data import DataError, FeatureCache, read_records, report_lines
from evaluate import is_correct
from oracle import JudgeOracle, ReferenceOracle, normalize
from preferences import as_read, read_preferences, reward_batch, told, write_preferences
from questions import build_embedded, question_indices, sft_start, usable_questions
from video_llm import Prefix, add_lora, add_scalar_head, generate, load_model, token_scores, unwrap


# ---------------------------------------------------------------------------------------------------------------
# Equations: tensors in, tensors out
# ---------------------------------------------------------------------------------------------------------------
def bradley_terry(rewards):
    """[BT] -log P(chosen is better), P = sigmoid(r_c - r_r). rewards (B,2), chosen first -> (B,)."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


def centring_term(rewards):
    """[C; D6] (r_c + r_r)^2: Bradley-Terry leaves the mean of the rewards free, this holds it at 0. (B,2) -> (B,)."""
    return rewards.sum(-1).square()


def read_rewards(scores, lengths):
    """[D3] The scalar at each text's last token. scores (N,T) with row b*G + g, lengths (B,G) -> rewards (B,G)."""
    return scores.gather(1, lengths.reshape(-1, 1) - 1).view(lengths.shape)


@torch.no_grad()
def normalise_head(head, mean, std):
    """[D8; N] Change the head so that the rewards it gave, with this mean and deviation, have 0 and 1. In place."""
    head.weight.div_(std)
    head.bias.sub_(mean).div_(std)


def lr_at(step, steps, lr):
    return lr * min((step + 1) / 10, (steps - step) / steps)


# ---------------------------------------------------------------------------------------------------------------
# Collect: answers, the judge's choices                                                               [V Sec. 3.1]
# ---------------------------------------------------------------------------------------------------------------
def collect(args, rank, world, device):
    """Write args.preferences. Beside it grows <file>.answers.jsonl: a first row with the flags, then one row for each
    question asked, dropped ones too; a killed collection goes on behind its last whole row."""
    file, done = Path(args.preferences), 0
    with harness.one_line_errors(DataError, OSError):
        needed = args.oracle == "reference"  # labels
        records, report = read_records(args.data.split(","), args.video_root or None, labelled=needed)
        policy, processor = load_model(args.model, device=str(device))
        done = open_answers(file, args, rank)
    policy.requires_grad_(False).eval()
    cache = FeatureCache(policy, processor, args.cache)
    records = usable_questions(args, records, report, cache, file.parent, rank, world)
    asked = random.Random(f"{args.seed} prompts").sample(records, min(args.prompts, len(records)))
    with harness.one_line_errors(OSError):
        oracle = ReferenceOracle(records) if args.oracle == "reference" else JudgeOracle(
            args.oracle_model, args.cache, args.oracle == "context", str(device), clips=args.clips, dtype=args.dtype)
    if args.oracle != "reference":
        unseen = unseen_by(oracle, [r["clip"] for r in asked], rank, world)
        asked = [r for r in asked if r["clip"] not in unseen]
    harness.barrier()
    before = [json.loads(row)["id"] for row in answers_file(file).read_text().splitlines()[1 : done + 1]]
    if before != [r["id"] for r in asked[:done]]:
        sys.exit(f"{answers_file(file)}: its answers are to other questions (videos or labels have changed); remove it")
    for n in range(done, len(asked), 48):
        # Each question's draws are keyed by it alone: world size and interruptions do not change the answers.
        chunk = asked[n : n + 48]
        mine = list(range(n, n + len(chunk)))[rank::world]
        rows = ask([asked[i] for i in mine], mine, policy, processor, cache, oracle, device, args) if mine else []
        rows = {i: row for part in harness.all_gather(dict(zip(mine, rows))) for i, row in part.items()}
        if rank == 0:
            with open(answers_file(file), "a") as f:
                f.write("".join(json.dumps(rows[i]) + "\n" for i in sorted(rows)))
            print(f"\rpreferences: {n + len(chunk)} of {len(asked)} questions", end="", flush=True)
    if rank == 0:
        print()
        rows = [json.loads(line) for line in answers_file(file).read_text().splitlines()[1:]]
        pairs, counts = choose_pairs(rows, asked, args.min_margin)
        if not pairs:
            sys.exit(f"{file}: no preference among {len(rows)} questions: {counts}")
        harness.write(file.with_suffix(".report.json"), json.dumps(dict(counts=counts, flags=flags_of(args)), indent=2))
        write_preferences(file, pairs)
        print(f"{file}: {len(pairs)} pairs; " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    harness.barrier()


def ask(batch, indices, policy, processor, cache, oracle, device, args):
    """The different answers among --samples draws and the oracle's choice in each pair of them [D1]. -> rows."""
    clips, questions = [r["clip"] for r in batch], [r["question"] for r in batch]
    prefix = Prefix.build(processor, cache, questions, clips, device, args.max_prompt_tokens)
    draw = lambda i: np.random.default_rng([args.seed, i]).random((args.samples, args.max_new_tokens))
    uniforms = torch.from_numpy(np.stack([draw(i) for i in indices]))
    eos = processor.tokenizer.eos_token_id
    tokens, lengths, _ = generate(policy, prefix, uniforms, eos, args.temperature)  # (B,samples,T)
    sampled = processor.decode_answers(tokens, lengths)
    distinct = [list({normalize(a): a for a in reversed(group)}.values()) for group in sampled]
    distinct = [sorted(some, key=group.index) for some, group in zip(distinct, sampled)]  # the first of each kind
    K = max(map(len, distinct))
    groups = [(d * K)[:K] for d in distinct]  # filled up with copies, which are not compared
    if isinstance(oracle, ReferenceOracle):
        scores, stories = oracle.score(clips, questions, groups)[0], [None] * len(batch)  # (B,K)
        prefers = 0.5 + (scores.unsqueeze(2) - scores.unsqueeze(1)) / 2  # (B,K,K)
    else:
        prefers = oracle.preferences(clips, questions, groups)  # (B,K,K) both orders averaged
        stories = oracle.narratives(clips) if oracle.narrative else [None] * len(batch)
    return [dict(id=r["id"], answers=d, narrative=story,
                 p=[[i, j, round(float(p[i, j]), 6)] for j in range(len(d)) for i in range(j)])
            for r, d, p, story in zip(batch, distinct, prefers, stories)]


def choose_pairs(rows, records, min_margin):
    """[D2] Rows of `ask` and the records they belong to -> pairs, counts. Labels serve the counts alone."""
    pairs, right = [], {"all": [], "kept": []}
    counts = dict(asked=len(rows), same_answer=0, near_tie=0, empty_chosen=0)
    for row, record in zip(rows, records):
        counts["same_answer"] += len(row["answers"]) == 1
        for i, j, p in row["p"]:
            a, b = row["answers"][i], row["answers"][j]
            drop = not abs(p - 0.5) >= max(min_margin, 1e-6)  # also where P is no number
            counts["near_tie"] += drop
            truth = [is_correct(x, record["answer"]) for x in (a, b)] if record["answer"] else [False, False]
            if truth[0] != truth[1]:
                vote = 0.5 if abs(p - 0.5) < 1e-6 else float((p > 0.5) == truth[0])
                for which in ["all"] + ["kept"] * (not drop):
                    right[which].append(vote)
            chosen, rejected = (a, b) if p > 0.5 else (b, a)
            if not drop and not chosen:
                counts["empty_chosen"] += 1  # nobody learns to say nothing
            elif not drop:
                pairs.append(dict(id=f"{row['id']} {i}-{j}", clip=record["clip"], question=record["question"],
                                  chosen=chosen, rejected=rejected, place=1 if p > 0.5 else 2,
                                  margin=round(abs(p - 0.5), 6), answer=record["answer"],
                                  task_type=record["task_type"], narrative=row["narrative"]))
    for which, votes in right.items():
        counts[f"one_right_{which}"] = len(votes)
        counts[f"oracle_accuracy_{which}"] = round(sum(votes) / len(votes), 4) if votes else None
    return pairs, counts


def answers_file(file):
    return file.with_suffix(".answers.jsonl")


def flags_of(args):
    return {k: v for k, v in asdict(args).items() if k in COLLECTED_WITH}


def open_answers(file, args, rank):
    """-> how many questions are answered already. A last row cut by a kill is taken off; other flags are refused."""
    harness.own(file.with_suffix(".lock"), rank)
    rows = answers_file(file).read_text().splitlines() if answers_file(file).exists() else []
    if rows and not rows[-1].endswith("}"):
        rows = rows[:-1]
    if rows:
        check_flags(json.loads(rows[0])["flags"], args, answers_file(file))
    harness.barrier()  # every process has read it before the first one writes
    if rank == 0:
        harness.write(answers_file(file), "".join(f"{r}\n" for r in rows or [json.dumps(dict(flags=flags_of(args)))]))
    return max(0, len(rows) - 1)


def check_flags(flags, args, file):
    changed = [k for k, v in flags_of(args).items() if flags.get(k) != v]
    if changed:
        raise DataError(f"{file} was collected with another --{changed[0]} ({flags.get(changed[0])}): use the same, or "
                        f"another --preferences file")


# ---------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------
def main(args):
    rank, world, device = harness.setup_dist()
    if args.stage == "collect" or not args.own_file:
        build_embedded(args, rank)
        if not Path(args.preferences).exists():
            collect(args, rank, world, device)
        elif args.stage == "collect":
            sys.exit(f"{args.preferences} is there already")
    if args.stage == "collect":
        return
    harness.ship_weights([args.base, args.oracle_model], rank)
    if not args.own_file:  # the file of the default name, but of which flags?
        with harness.one_line_errors(DataError, OSError):
            report = json.loads(Path(args.preferences).with_suffix(".report.json").read_text())
            check_flags(report["flags"], args, args.preferences)
    folder = f"runs/reward_model/{args.name}_s{args.seed}"
    checkpoint = harness.open_run(folder, args, rank)
    torch.manual_seed(args.seed)  # the initialisation of LoRA; every other draw has a key of its own

    # 1. Pairs: training and held-out ones share no video (D7)
    with harness.one_line_errors(DataError, OSError):
        pairs, report = read_preferences(args.preferences.split(","), args.video_root)
        model, processor = load_model(checkpoint or args.base, **harness.load_options(args, device))
    harness.check_same(f"{args.preferences}: its pairs", [[str(p[k]) for k in ("question", *SIDES)] for p in pairs])
    if not checkpoint:
        add_scalar_head(model)
        model = add_lora(model, args.lora_r, args.lora_alpha) if args.lora_r else model
    model.eval()  # no dropout anywhere: both answers and every epoch see the same network
    words = unwrap(model).get_output_embeddings().weight
    if words is not unwrap(model).get_input_embeddings().weight:
        words.requires_grad_(False)  # no word is predicted here
    for name, p in model.named_parameters():
        if "score_head" in name and name.endswith("bias"):  # Bradley-Terry cannot see it, and D8 sets it at the end
            p.requires_grad_(False)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    params, body = list(trained.values()), [p for n, p in trained.items() if "score_head" not in n]
    head = [p for n, p in trained.items() if "score_head" in n]
    optimizer = torch.optim.AdamW([dict(params=body), dict(params=head)], betas=(0.9, 0.98),
                                  weight_decay=args.weight_decay)
    start = harness.load_trainer(checkpoint, optimizer) if checkpoint else 0
    cache = FeatureCache(unwrap(model), processor, args.cache)
    broken = harness.prepare_videos(cache, [p["clip"] for p in pairs if p["clip"]], folder, rank, world)
    judge = None
    if args.narrative or args.guided:
        with harness.one_line_errors(OSError):
            judge = JudgeOracle(args.oracle_model, args.cache, args.narrative, str(device), clips=args.clips,
                                dtype=args.dtype)
        broken |= dict.fromkeys(unseen_by(judge, [p["clip"] for p in pairs if p["clip"]], rank, world))
    #    What it cannot read, or not tell apart, is left out: met within a step it would end the run, or teach nothing.
    whole, *early = readable_pairs([p for p in pairs if p["clip"] not in broken], {}, {}, processor, args)
    train, held = split_by_video(whole, args.eval_share, args.seed)
    train = random.Random(f"{args.seed} share").sample(train, math.ceil(args.share * len(train)))
    stories, owns = tell(args, judge, train + held, rank, world)
    (train, *a), (held, *b) = (readable_pairs(some, stories, owns, processor, args) for some in (train, held))
    lost, cut = early[0] + a[0] + b[0], a[1] + b[1]
    if rank == 0:
        print("\n".join(report_lines(report)))
        print(f"{len(train)} pairs to train on, {len(held)} on other videos to measure; {len(broken)} broken videos")
        print(f"pairs left out: {lost['equal']} equal once cut, {lost['long']} whose question alone exceeds "
              f"--max_prompt_tokens {args.max_prompt_tokens}; cut: {cut['answers']} answers at --max_answer_tokens "
              f"{args.max_answer_tokens}, {cut['narratives']} narratives")
    groups, held_groups = by_video(train, args.pack), by_video(held, args.pack)
    if len(groups) < args.prompts_per_step or len(held_groups) < world:
        sys.exit(f"{args.preferences}: {len(train)} pairs to train on and {len(held)} held out are too few; left out: "
                 f"{lost['equal']} equal once cut, {lost['long']} too long")
    steps = math.ceil(args.epochs * len(groups) / args.prompts_per_step)
    ddp = harness.distribute(model, device, find_unused=report["text_only"] > 0)
    log = harness.Log(folder, steps, start, rank)

    def rewards_of(m, some):  # groups of pairs -> (n,2), and the pairs in the order of the rows
        prefix, tokens, lengths, places = collate(some, stories, owns, processor, cache, device, args)
        rewards = read_rewards(token_scores(m, prefix, tokens, lengths), lengths)  # (B,G)
        return rewards.view(-1)[places], [p for group in some for p in group]

    for step in range(start, steps):
        # 2. Rewards of the answers behind one prefix per video, Bradley-Terry and centring        [BT, C; D3, D6]
        #    Groups of like size and length together, so that a micro-batch holds little padding.
        batch = sorted((groups[i] for i in question_indices(len(groups), step, args)), key=group_size)
        n_pairs = sum(map(len, batch))
        mine = batch[rank::world]
        micros = [mine[i : i + args.micro_batch_size] for i in range(0, len(mine), args.micro_batch_size)]
        for g, peak in zip(optimizer.param_groups, (args.lr, args.head_lr)):  # D11
            g["lr"] = lr_at(step, steps, peak)
        for k, micro in enumerate(micros):
            with harness.no_sync(ddp, when=k < len(micros) - 1):
                rewards, pairs = rewards_of(ddp, micro)  # (n,2)
                bt, centring = bradley_terry(rewards), args.centring * centring_term(rewards)  # (n,), (n,)
                ((bt + centring).sum() * world / n_pairs).backward()  # DDP averages over processes; * world undoes it
            log.add("losses/bradley_terry", bt.detach().sum(), len(pairs))
            log.add("losses/centring", centring.detach().sum(), len(pairs))
            measured = measure(rewards.detach().cpu(), pairs)
            for key in MEASURES:
                log.add(f"rm/{key}", *measured[key])

        # 3. Update
        grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        asked = [[str(p["question"]), p["chosen"], p["rejected"]] for group in mine for p in group]
        harness.stop_if_not_finite(grad_norm, log, folder, step, asked)
        optimizer.step()
        optimizer.zero_grad()
        log.add("policy/grad_norm", grad_norm)
        log.add("charts/lr", lr_at(step, steps, args.lr))

        # 4. Measure on held-out videos, log, save
        if (step + 1) % args.eval_steps == 0 or step + 1 == steps:
            some = held_groups[rank::world]
            for i in range(0, len(some), args.micro_batch_size):
                with torch.no_grad():
                    rewards, pairs = rewards_of(model, some[i : i + args.micro_batch_size])
                measured = measure(rewards.cpu(), pairs)
                for key in MEASURES:
                    log.add(f"eval/{key}", *measured[key])
        row = log.step(step, show=["losses/bradley_terry", "rm/accuracy", "eval/accuracy", "eval/truth_accuracy"])
        harness.checkpoint(log, folder, step + 1, steps, args.save_steps, model, processor, optimizer)

    # 5. Normalise (D8) and say how the model is to be used
    mine, rewards = groups[:1000][rank::world], torch.zeros(0, dtype=torch.float64)  # enough for two numbers
    with torch.no_grad():
        for i in range(0, len(mine), args.micro_batch_size):
            part = rewards_of(model, mine[i : i + args.micro_batch_size])[0]
            rewards = torch.cat([rewards, part.flatten().cpu().double()])
    sums = torch.stack([torch.tensor(float(len(rewards)), dtype=torch.float64), rewards.sum(), rewards.square().sum()])
    n, total, squares = harness.all_sum(sums).tolist()
    mean, std = total / n, math.sqrt(max(squares / n - (total / n) ** 2, 1e-12))
    normalise_head(unwrap(model).score_head, mean, std)
    settings = dict(narrative_clips=args.clips if args.narrative else 0, narrative_model=args.oracle_model,
                    answer_first=args.answer_first, guided=args.guided, max_prompt_tokens=args.max_prompt_tokens,
                    max_answer_tokens=args.max_answer_tokens, mean=mean, std=std, pairs=len(train),
                    held_out_pairs=len(held), **{k: row[k] for k in row if "eval/" in k})
    harness.finish(folder, model, processor, rank, about={"reward_model.json": settings})


def readable_pairs(pairs, stories, owns, processor, args):
    """-> the pairs that the reward model can read and tell apart; Counter of the others: equal, long; Counter of what
    is cut: answers, narratives (one for each question). stories, owns: see `tell`; empty: not known yet."""
    out, lost, cut, told_of = [], Counter(), Counter(), {}
    read = functools.cache(lambda text: as_read(processor, text, args.answer_first, args.max_answer_tokens))
    long = functools.cache(lambda text: len(processor.answer_ids(text)) > args.max_answer_tokens)
    for p in pairs:
        story, own, asked = stories.get(p["clip"]), owns.get(about(p)), about(p)
        if asked not in told_of:
            try:
                told_of[asked] = [told(processor, p["question"], story, own, p["clip"] is not None, args.answer_first,
                                       args.max_prompt_tokens)]
                cut["narratives"] += told_of[asked] != [story]
            except ValueError:  # no room for the question
                told_of[asked] = []
        if not told_of[asked]:
            lost["long"] += 1
        elif read(p["chosen"]) == read(p["rejected"]):
            lost["equal"] += 1
        else:
            out.append(p)
            cut["answers"] += long(p["chosen"]) + long(p["rejected"])
    return out, lost, cut


def split_by_video(pairs, share, seed):
    """-> training pairs, held-out pairs; no video (not even another part of its file, or other frames of it) is in
    both. Each video draws for itself: it is on the same side in every file of pairs, and whatever happens to the
    others."""
    def held_out(pair):
        name = video_name(pair["clip"].path) if pair["clip"] else pair["question"]
        return random.Random(f"{seed} held out {name}").random() < share

    return [p for p in pairs if not held_out(p)], [p for p in pairs if held_out(p)]


def video_name(path):
    """The name of a clip's video, wherever the project lies. Several images are frames: the folder's name, with what
    their names share before the number, if that says more than "frame"; so it does where a folder holds many videos."""
    if isinstance(path, str) or len(path) == 1:
        return os.path.relpath(path if isinstance(path, str) else path[0])
    folder, stem = os.path.split(os.path.splitext(path[0])[0])
    begins = re.sub(r"[\W_]*\d+$", "", stem)
    same = all(os.path.basename(p).startswith(begins) for p in path)
    plain = not same or begins.lower() in ("", "f", "frame", "frames", "img", "image")
    return os.path.relpath(folder if plain else os.path.join(folder, begins))


def unseen_by(judge, clips, rank, world):
    """The clips that the judge cannot read, whole or in the parts it tells of; the same set on every process."""
    mine = sorted(set(clips), key=str)[rank::world]
    return set().union(*harness.all_gather(judge.unreadable(mine)))


def tell(args, judge, pairs, rank, world):
    """-> {clip: narrative}, {clip and question, as `about` writes them: the judge's own answer}: what the reward model
    reads beside the answers, empty where it does not. Narratives are cached on disk."""
    stories, owns = {}, {}
    if args.narrative:
        clips = sorted({p["clip"] for p in pairs if p["clip"]}, key=str)
        judge.narratives(clips[rank::world])
        harness.barrier()
        stories = dict(zip(clips, judge.narratives(clips)))
    if args.guided:
        asked = {about(p): p for p in pairs if p["clip"]}
        mine = sorted(asked)[rank::world]
        said = judge.answer([asked[k]["clip"] for k in mine], [asked[k]["question"] for k in mine])
        owns = {k: v for part in harness.all_gather(dict(zip(mine, said))) for k, v in part.items()}
    return stories, owns


def about(pair):
    return f"{pair['clip']} {pair['question']}"


def by_video(pairs, pack):
    """Groups of up to `pack` pairs about the same (part of a) video. Pairs of text only: alone."""
    clips = {}
    for k, p in enumerate(pairs):
        clips.setdefault(p["clip"] or k, []).append(p)
    return [members[i : i + pack] for members in clips.values() for i in range(0, len(members), pack)]


def group_size(group):
    """Number of pairs, then the longest of them."""
    return len(group), max(len(f"{p['question']} {p['chosen']} {p['rejected']}") for p in group)


def collate(groups, stories, owns, processor, cache, device, args):
    """Groups of n pairs in all -> Prefix of B videos, tokens (B,G,T), lengths (B,G) of their different answers, and
    where each pair's are among these B*G: (n,2), chosen first."""
    clips, rows, places = [group[0]["clip"] for group in groups], [], []
    for b, group in enumerate(groups):
        key = lambda p, side: (str(p["question"]), p[side])
        texts = {key(p, side): (p["question"], stories.get(clips[b]), p[side], owns.get(about(p)))
                 for p in group for side in SIDES}
        rows.append(list(texts.values()))  # an answer that is in several pairs is read once
        places += [[b, *(list(texts).index(key(p, side)) for side in SIDES)] for p in group]
    prefix, tokens, lengths = reward_batch(rows, clips, processor, cache, device, args.answer_first,
                                           args.max_prompt_tokens, args.max_answer_tokens)
    places = torch.tensor(places, device=device)
    return prefix, tokens, lengths, places[:, :1] * lengths.shape[1] + places[:, 1:]


def measure(rewards, pairs):
    """rewards (n,2) of n pairs -> {one of MEASURES: (sum, count)}. accuracy: the oracle's choice has the higher reward,
    equal ones count 1/2. truth_accuracy: the right answer has it, where a label is known and exactly one answer is
    right; oracle_accuracy: on those pairs the oracle chose the right one, which says nothing of the reward model."""
    margin, n = rewards[:, 0] - rewards[:, 1], len(pairs)  # (n,)
    won = (margin > 0).float() + (margin == 0).float() / 2
    right = [[p["answer"] is not None and is_correct(p[k], p["answer"]) for k in ("chosen", "rejected")] for p in pairs]
    truth = torch.tensor([float(c) - float(r) for c, r in right])  # 1: the oracle chose the right one, -1: the wrong
    true = torch.where(truth > 0, won, 1 - won)[truth != 0].sum()
    sums = (won.sum(), margin.sum(), rewards.mean(-1).sum(), true, (truth > 0).sum())
    return dict(zip(MEASURES, zip(sums, (n, n, n, (truth != 0).sum(), (truth != 0).sum()))))


if __name__ == "__main__":
    main(parse_args(Args))
