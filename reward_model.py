"""The reward model of VLM-RLAIF: an AI that knows a video's narrative prefers one of two answers.

Run     python reward_model.py                           collect preferences, then train
        torchrun --nproc_per_node=4 reward_model.py      the same on four processes
        python reward_model.py --stage collect --oracle judge        only the preference file
        python reward_model.py --oracle reference --name truth       an upper bound, not RLAIF
        python reward_model.py --preferences my.json --base my_sft --narrative False --guided False
Papers  [V] VLM-RLAIF arXiv:2402.03746, Sec. 3.1    [BT] Bradley and Terry 1952, as in InstructGPT
        arXiv:2203.02155    [C] centring: Eisenstein et al. arXiv:2312.09244, as in TRL
        [N] normalising: Ziegler et al. arXiv:1909.08593
Makes   runs/reward_model/<name>_s<seed>/final: what oracle.py and ppo_rlaif.py read, and
        runs/reward_model/preferences/*.json: a preference file in VLM-RLAIF's own format

The algorithm:
  Collect  The policy draws --samples answers to each question. A judge that has read a narrative of
           the video chooses the better one of every two different answers, in both orders.
  1. Split the pairs: training and held-out pairs share no video.
  2. Rewards of the answers after one prefix per video; Bradley-Terry loss and a centring term.
  3. Update.
  4. Every --eval_steps steps, accuracy on the held-out pairs; log, save.
  5. Normalise the rewards, and say how the model is to be used (reward_model.json).

Differs D1  Every two *different* answers among --samples draws are compared, up to six pairs a
            question. [V] draws two; those of a 7B model never agree, those of `tiny` often do.
        D2  Near-ties (--min_margin) are dropped and counted. [V] asks the judge once; ours is asked
            in both orders: where the two cancel, its choice is its taste for a place. An empty
            answer can be rejected, never chosen.
        D3  The answer stands *before* the question, as in the judge's task, and the reward is the
            scalar at the prompt's last token: a small model compares an answer with its own where
            it is about to say it. [V] shows the answer last. `--guided False --answer_first
            False`: at the answer's last token (EOS), found by its length; a row of the ablation.
        D4  The reward model reads the narrative (--narrative). [V]'s prompt has a slot for a
            caption that the released code fills with None. `--narrative False`: ablation.
        D5  It starts from --base, the SFT model that judges and describes, as in [V] (there the 13B
            model), not from the weaker one that answers; from that one: a row of the ablation.
        D6  Centring is [C]'s mean of squares per pair; [V]'s |batch mean| depends on micro-batches.
        D7  Held-out pairs are about other *videos* than training; [V]'s scripts pass one file.
        D8  At the end the head is shifted and scaled: mean 0 and deviation 1 over up to 1,000
            groups of training pairs [N], so that --reward_scale of ppo_rlaif.py means the same for
            each reward model. [V] normalises nothing; its PPO multiplies the shaped reward by 10.
        D9  `tiny` trains all weights; [V]: LoRA r = 64, alpha = 16, rate 2e-5, 1 epoch, 40k pairs.
        D10  The judge's own answer stands beside the one to be rewarded (--guided): the prompt is
            the judge's task word for word. References of a judge's making: Zheng et al.
            arXiv:2306.05685, Sec. 3.4. `--guided False`: a row of the ablation.
        D11  The head has a learning rate of its own: it starts from zero, and at the rate of the
            other weights it would spend a short training on growing. [V]: one rate for all.

It reads: <video> narrative / Response 1: the answer / Response 2: the judge's own / Which response
is better? / question. The pairs about one video share one prefix (video_llm.packed).

symbol   name      shape    example           meaning
P        p         ()       0.83              judge's probability that the first answer is better
         prefix    (B,P)    [7, 7, 31, 12]    what the prompts about a video share
y_c,y_r  tokens    (B,G,T)  [[5, 9, 2], ..]   a group's different answers, the rest of the prompt
         places    (n,2)    [[0, 3], ..]      where each pair's answers are in B*G, chosen first
r        rewards   (n,2)    [[1.2, -.4], ..]  the scalars at the last tokens, chosen first
"""

import json
import math
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from plumbing.flags import JUDGE, WORLD, ModelArgs, answer_help, flag, parse_args

JUDGES = ("context", "judge", "reference")
SIDES = ("chosen", "rejected")
MEASURES = ("accuracy", "margin", "reward", "truth_accuracy", "oracle_accuracy")
COLLECTED_WITH = ("model", "data", "video_root", "oracle", "oracle_model", "clips", "prompts",
                  "samples", "temperature", "max_new_tokens", "min_margin", "seed")


@dataclass
class Args(ModelArgs):  # --dtype, ...: plumbing/flags.py
    # -- algorithm
    stage: str = flag("train", "train (collects first where the file is missing), or only collect",
                      choices=("train", "collect"))
    # -- preferences
    oracle: str = flag("context", "context: a judge that knows the narrative [V]; judge: without "
                       "it; reference: token F1 with the label, not RLAIF", choices=JUDGES)
    clips: int = flag(3, "parts the video is cut into for the narrative [V: 3]", low=1)
    prompts: int = flag(10000, "questions to collect answers to [V: 40k]", low=2)
    samples: int = flag(4, "answers drawn to a question (D1) [V: 2]", low=2)
    temperature: float = flag(1.0, "sampling temperature [V: 1.0]", above=0)
    max_new_tokens: int = flag(16, "longest sampled answer, EOS included", low=1)
    min_margin: float = flag(0.1, "drop pairs with |P - 1/2| below this (D2)", low=0, below=0.5)
    # -- the reward model
    narrative: bool = flag(True, "the reward model reads the narrative before the question (D4)")
    guided: bool = flag(True, "the judge's own answer stands beside the one to be rewarded (D10)")
    answer_first: bool = flag(True, "the answer stands before the question (D3)")
    centring: float = flag(0.01, "weight of the centring term [V: 1e-3] (D6)", low=0)
    lora_r: int = flag(0, "LoRA rank on the decoder [V: 64]; 0: all weights but CLIP's (D9)", low=0)
    lora_alpha: int = flag(16, "LoRA alpha [V: 16]", low=1)
    quantize: str = flag("none", "none, or nf4: QLoRA, needs --lora_r", choices=("none", "nf4"))
    # -- budget
    epochs: float = flag(4.0, "passes over the pairs [V: 1]", above=0)
    prompts_per_step: int = flag(16, "groups (up to --pack pairs about a video) per step", low=1)
    pack: int = flag(8, "pairs about one video that share its prefix, at most", low=1)
    tokens_per_micro_batch: int = flag(2048, "tokens in a forward pass, padding included", low=1)
    lr: float = flag(5e-4, "peak learning rate; 10 steps up, linear to zero [V: 2e-5]", above=0)
    head_lr: float = flag(1e-2, "peak learning rate of the head (D11)", above=0)
    weight_decay: float = flag(0.0, "AdamW weight decay [V: 0]", low=0)
    share: float = flag(1.0, "train on this share of the training pairs [V Fig. 5]", above=0)
    eval_share: float = flag(0.15, "share of the videos held out (D7)", above=0, below=1)
    eval_steps: int = flag(25, "steps between measurements on the held-out pairs", low=1)
    # -- data and models
    preferences: str = flag("", "preference files, comma-separated: docs/reward_model.md; empty: "
                            "runs/reward_model/preferences/<oracle>_c<clips>_s<seed>.json")
    data: str = flag(f"{WORLD}/train.json", "collect: videos and questions")
    video_root: str = flag("", "where the videos are; empty: beside the annotation file")
    model: str = flag("", "collect: who answers; empty: runs/sft/policy_s<seed>/final")
    oracle_model: str = flag(JUDGE, "the model that judges and tells the narrative")
    base: str = flag(JUDGE, "train: what the reward model starts from (D5)")
    max_prompt_tokens: int = flag(512, "longest prompt without the answer: of a longer one the "
                                  "narrative is cut; collect: the question's end", low=1)
    max_answer_tokens: int = flag(96, "longer answers are cut", low=1)
    # -- plumbing
    name: str = flag("", "run name: runs/reward_model/<name>_s<seed>; empty: --oracle")
    seed: int = flag(0, "questions, sampled answers, held-out videos, order of the pairs", low=0)
    cache: str = flag("cache", "folder of cached CLIP features and narratives")
    save_steps: int = flag(50, "steps between checkpoints", low=1)
    resume: bool = flag(False, "continue the run of this name where it stopped")

    def __post_init__(self):
        super().__post_init__()
        if self.share > 1:
            raise ValueError(f"--share {self.share}: must be at most 1")
        if self.guided and not self.answer_first:
            raise ValueError("--answer_first False: the judge's task ends with the question; add "
                             "--guided False")
        self.name = self.name or self.oracle
        self.check_training("prompts_per_step")
        if self.stage == "collect" and "," in self.preferences:
            raise ValueError(f"--preferences {self.preferences}: --stage collect writes one file")
        self.model = self.model or sft_start(self.seed)
        self.check_start("base")
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

from inputs.features import FeatureCache
from inputs.preferences import read_preferences, write_preferences
from inputs.records import DataError, report_lines
from model.packing import batches
from oracle import JudgeOracle, ReferenceOracle, as_read, cut_narrative, reward_batch
from plumbing import files, processes
from plumbing.batches import micro_batches
from plumbing.embedded import build_embedded, sft_start, ship_weights
from plumbing.pairs import Reading, by_video, group_size, unseen_by
from plumbing.questions import prepare_videos, question_indices, read_questions, usable_questions
from plumbing.run import Job, Run
from plumbing.text import is_correct, normalize
from video_llm import Prefix, add_scalar_head, generate, load_model, token_scores, unwrap


# --------------------------------------------------------------------------------------------------
# Equations: tensors in, tensors out
# --------------------------------------------------------------------------------------------------
def bradley_terry(rewards):
    """[BT] -log P(chosen is better), P = sigmoid(r_c - r_r). rewards (B,2), chosen first."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


def centring_term(rewards):
    """[C; D6] (r_c + r_r)^2. Bradley-Terry leaves the mean of the rewards free; this holds it at 0.
    rewards (B,2) -> (B,)."""
    return rewards.sum(-1).square()


def read_rewards(scores, lengths):
    """[D3] The scalar at each text's last token.

    scores (N,T) with row b*G + g, lengths (B,G) -> rewards (B,G)."""
    return scores.gather(1, lengths.reshape(-1, 1) - 1).view(lengths.shape)


@torch.no_grad()
def normalise_head(head, mean, std):
    """[D8; N] Change the head in place: rewards of this mean and deviation get 0 and 1."""
    head.weight.div_(std)
    head.bias.sub_(mean).div_(std)


def lr_at(step, steps, peak):
    return peak * min((step + 1) / 10, (steps - step) / steps)


# --------------------------------------------------------------------------------------------------
# Collect: answers, the judge's choices                                              [V Sec. 3.1]
# --------------------------------------------------------------------------------------------------
def collect(job):
    """Write --preferences. Beside it grows <file>.answers.jsonl, a row for each question asked, 48
    at a time; a killed collection continues from there."""
    args, file = job.args, Path(job.args.preferences)
    records, report = read_questions(job, answers=True)
    with processes.one_line_errors(DataError, OSError):
        policy, processor = load_model(args.model, device=str(job.device))
    processes.own(file.with_suffix(".lock"), job.rank)
    policy.requires_grad_(False).eval()
    cache = FeatureCache(policy, processor, args.cache)
    records = usable_questions(job, records, report, cache)
    rng = random.Random(f"{args.seed} prompts")
    records = rng.sample(records, min(args.prompts, len(records)))
    with processes.one_line_errors(OSError):
        oracle = ReferenceOracle(records) if args.oracle == "reference" else JudgeOracle(
            args.oracle_model, args.cache, args.oracle == "context", str(job.device),
            clips=args.clips, dtype=args.dtype)
    if args.oracle != "reference":
        unseen = unseen_by(job, oracle, [r["clip"] for r in records])
        records = [r for r in records if r["clip"] not in unseen]
    # Draws are keyed by the question: neither the number of processes nor a kill changes an answer.
    rows_of = lambda _, indices: ask(indices, records, policy, processor, cache, oracle, job)
    parts = [(None, part, 1) for part in files.in_chunks(range(len(records)), 48)]
    with processes.one_line_errors(DataError):
        rows = files.collect_rows(job, file.with_suffix(".answers.jsonl"), parts, rows_of,
                                  flags=flags_of(args), ids=[r["id"] for r in records])
    if job.rank == 0:
        pairs, counts = choose_pairs(rows, records, args.min_margin)
        if not pairs:
            sys.exit(f"{file}: no preference among {len(records)} questions: {counts}")
        about = dict(counts=counts, flags=flags_of(args))
        files.write(file.with_suffix(".report.json"), json.dumps(about, indent=2))
        write_preferences(file, pairs)
        print(f"{file}: {len(pairs)} pairs; " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    processes.barrier()


def ask(indices, records, policy, processor, cache, oracle, job):
    """[D1] The different answers among --samples draws to these questions, and the oracle's choice
    in each pair of them. -> a list with a row for each question."""
    args, batch = job.args, [records[i] for i in indices]
    clips, questions = [r["clip"] for r in batch], [r["question"] for r in batch]
    prefix = Prefix.build(processor, cache, questions, clips, job.device, args.max_prompt_tokens)
    shape = args.samples, args.max_new_tokens
    uniforms = np.stack([np.random.default_rng([args.seed, i]).random(shape) for i in indices])
    tokens, lengths, _ = generate(policy, prefix, torch.from_numpy(uniforms),
                                  processor.tokenizer.eos_token_id, args.temperature)
    sampled = processor.decode_answers(tokens, lengths)  # B lists of --samples strings
    distinct = [first_of_each_kind(group) for group in sampled]
    K = max(map(len, distinct))
    groups = [(d * K)[:K] for d in distinct]  # filled up with copies, which are not compared
    narratives = [None] * len(batch)
    if isinstance(oracle, ReferenceOracle):
        scores = oracle.score(clips, questions, groups)[0]  # (B,K)
        prefers = 0.5 + (scores.unsqueeze(2) - scores.unsqueeze(1)) / 2  # (B,K,K)
    else:
        prefers = oracle.preferences(clips, questions, groups)  # (B,K,K) both orders averaged
        narratives = oracle.narratives(clips) if oracle.narrative else narratives
    return [[dict(id=r["id"], answers=d, narrative=narrative,
                  p=[[i, j, round(float(p[i, j]), 6)] for j in range(len(d)) for i in range(j)])]
            for r, d, p, narrative in zip(batch, distinct, prefers, narratives)]


def first_of_each_kind(answers):
    """The answers that differ (after `normalize`), each as it was said first."""
    kinds = {}
    for a in answers:
        kinds.setdefault(normalize(a), a)
    return list(kinds.values())


def choose_pairs(rows, records, min_margin):
    """[D2] Rows of `ask` and their records -> pairs, counts. Only the counts use labels."""
    pairs, right = [], {"all": [], "kept": []}
    counts = dict(asked=len(rows), same_answer=0, near_tie=0, empty_chosen=0)
    for row, record in zip(rows, records):
        counts["same_answer"] += len(row["answers"]) == 1
        for i, j, p in row["p"]:
            a, b = row["answers"][i], row["answers"][j]
            drop = not abs(p - 0.5) >= max(min_margin, 1e-6)  # also where P is no number
            counts["near_tie"] += drop
            truth = [bool(record["answer"]) and is_correct(x, record["answer"]) for x in (a, b)]
            if truth[0] != truth[1]:
                vote = 0.5 if abs(p - 0.5) < 1e-6 else float((p > 0.5) == truth[0])
                for which in ["all"] + ["kept"] * (not drop):
                    right[which].append(vote)
            chosen, rejected = (a, b) if p > 0.5 else (b, a)
            if not drop and not chosen:
                counts["empty_chosen"] += 1  # nobody learns to say nothing
            elif not drop:
                pairs.append(dict(id=f"{row['id']} {i}-{j}", clip=record["clip"],
                                  question=record["question"], chosen=chosen,
                                  rejected=rejected, place=1 if p > 0.5 else 2,
                                  margin=round(abs(p - 0.5), 6), answer=record["answer"],
                                  task_type=record["task_type"], narrative=row["narrative"]))
    for which, votes in right.items():
        counts[f"one_right_{which}"] = len(votes)
        counts[f"oracle_accuracy_{which}"] = round(sum(votes) / len(votes), 4) if votes else None
    return pairs, counts


def flags_of(args):
    return {k: v for k, v in asdict(args).items() if k in COLLECTED_WITH}


# --------------------------------------------------------------------------------------------------
# The algorithm
# --------------------------------------------------------------------------------------------------
def main(args):
    if args.stage == "collect" or not args.own_file:
        job = Job(args, Path(args.preferences).parent)
        build_embedded(args, job.rank)
        if not Path(args.preferences).exists():
            collect(job)
        elif args.stage == "collect":
            sys.exit(f"{args.preferences} is there already")
    if args.stage == "collect":
        return
    run = Run(__file__, args)
    ship_weights([args.base, args.oracle_model], run.rank)
    torch.manual_seed(args.seed)  # LoRA's initialisation; other draws have keys of their own

    # 1. Pairs: training and held-out ones share no video (D7)
    with processes.one_line_errors(DataError, OSError):
        if not args.own_file:  # the file of the default name, but of which flags?
            about = json.loads(Path(args.preferences).with_suffix(".report.json").read_text())
            files.check_flags(args.preferences, about["flags"], flags_of(args))
        pairs, report = read_preferences(args.preferences.split(","), args.video_root)
        same = [[str(p[k]) for k in ("question", *SIDES)] for p in pairs]
        processes.check_same(f"{args.preferences}: its pairs", same)
        model, processor = run.load_policy(args.base, prepare=add_scalar_head)
    cache = FeatureCache(unwrap(model), processor, args.cache)
    clips = [p["clip"] for p in pairs if p["clip"]]
    broken = prepare_videos(run, cache, clips)
    judge = None
    if args.narrative or args.guided:
        with processes.one_line_errors(OSError):
            judge = JudgeOracle(args.oracle_model, args.cache, args.narrative, str(run.device),
                                clips=args.clips, dtype=args.dtype)
        broken |= dict.fromkeys(unseen_by(run, judge, clips))
    reading = Reading(args, processor, as_read, cut_narrative)
    train, held = reading.split(run, judge, [p for p in pairs if p["clip"] not in broken])
    groups, held_groups = by_video(train, args.pack), by_video(held, args.pack)
    if run.rank == 0:
        print(*report_lines(report), reading.summary(train, held, broken), sep="\n")
    if len(groups) < args.prompts_per_step or len(held_groups) < run.world:
        sys.exit(f"{args.preferences}: {len(train)} pairs to train on and {len(held)} held out are "
                 f"too few; left out: {reading.lost['equal']} equal once cut, "
                 f"{reading.lost['long']} too long")
    model.eval()  # no dropout anywhere: both answers and every epoch see the same network
    body, head = trained_parts(model)
    optimizer = torch.optim.AdamW([dict(params=body), dict(params=head)], betas=(0.9, 0.98),
                                  weight_decay=args.weight_decay)
    run.resume(optimizer, model)
    steps = math.ceil(args.epochs * len(groups) / args.prompts_per_step)
    ddp, log = run.distribute(model, report["text_only"] > 0), run.start(steps)

    batch_of = lambda groups: collate(groups, reading, processor, cache, run.device, args)
    row_tokens = lambda batch: batch.prefix.attention_mask.sum(-1) + batch.lengths.sum(-1)  # (B,)

    @torch.no_grad()
    def rewards_on(groups):  # rewards (n,2) and pairs of one micro-batch after the other
        for some in files.in_chunks(groups, args.prompts_per_step // run.world):
            batch = batch_of(some)
            for i in batches(row_tokens(batch), args.tokens_per_micro_batch):
                yield rewards_of(model, batch, i)

    for step in range(run.first_step, steps):
        # 2. Rewards, Bradley-Terry, centring                                       [BT, C; D3, D6]
        asked = [groups[i] for i in question_indices(len(groups), step, args)]
        n_pairs = sum(map(len, asked))
        mine = sorted(asked, key=group_size)[run.rank :: run.world]
        batch = batch_of(mine)
        micros = micro_batches(row_tokens(batch), args.tokens_per_micro_batch)  # of like length
        for k, i in enumerate(micros):
            with processes.no_sync(ddp, when=k < len(micros) - 1):
                rewards, pairs = rewards_of(ddp, batch, i)  # (n,2), n pairs
                bt = bradley_terry(rewards)  # (n,)
                centring = args.centring * centring_term(rewards)  # (n,)
                # DDP averages over processes; * world undoes it
                ((bt + centring).sum() * run.world / n_pairs).backward()
            log.add("losses/bradley_terry", bt.detach().sum(), len(pairs))
            log.add("losses/centring", centring.detach().sum(), len(pairs))
            measured = measure(rewards.detach().cpu(), pairs)
            for key in MEASURES:
                log.add(f"rm/{key}", *measured[key])

        # 3. Update
        for group, peak in zip(optimizer.param_groups, (args.lr, args.head_lr)):  # D11
            group["lr"] = lr_at(step, steps, peak)
        grad_norm = processes.clip_gradients([*body, *head])
        pairs = [p for group in mine for p in group]
        run.check_finite(step, grad_norm, [p["question"] for p in pairs],
                         [[p[side] for side in SIDES] for p in pairs])
        optimizer.step()
        optimizer.zero_grad()
        log.add("policy/grad_norm", grad_norm)
        log.add("charts/lr", lr_at(step, steps, args.lr))

        # 4. Measure on held-out videos, log, save
        if (step + 1) % args.eval_steps == 0 or step + 1 == steps:
            for rewards, pairs in rewards_on(held_groups[run.rank :: run.world]):
                measured = measure(rewards.cpu(), pairs)
                for key in MEASURES:
                    log.add(f"eval/{key}", *measured[key])
        row = log.step(step, show=["losses/bradley_terry", "rm/accuracy", "eval/accuracy",
                                   "eval/truth_accuracy"])
        run.save(step + 1, model, processor, optimizer)

    # 5. Normalise (D8) and say how the model is to be used
    mine = groups[:1000][run.rank :: run.world]
    rewards = torch.cat([r.flatten().cpu().double() for r, _ in rewards_on(mine)])
    sums = torch.stack([torch.ones_like(rewards).sum(), rewards.sum(), rewards.square().sum()])
    n, total, squares = processes.all_sum(sums).tolist()
    mean, std = total / n, math.sqrt(max(squares / n - (total / n) ** 2, 1e-12))
    normalise_head(unwrap(model).score_head, mean, std)
    settings = dict(narrative_clips=args.clips if args.narrative else 0,
                    narrative_model=args.oracle_model, answer_first=args.answer_first,
                    guided=args.guided, max_prompt_tokens=args.max_prompt_tokens,
                    max_answer_tokens=args.max_answer_tokens, mean=mean, std=std,
                    pairs=len(train), held_out_pairs=len(held),
                    **{k: row[k] for k in row if "eval/" in k})
    run.finish(model, processor, about={"reward_model.json": settings})


def trained_parts(model):
    """-> the trained weights of the network, those of the scalar head. Frozen: output embeddings,
    which predict nothing here, and the head's bias, which Bradley-Terry cannot see (D8 sets it)."""
    words = unwrap(model).get_output_embeddings().weight
    if words is not unwrap(model).get_input_embeddings().weight:
        words.requires_grad_(False)
    for name, p in model.named_parameters():
        if "score_head" in name and name.endswith("bias"):
            p.requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [[p for n, p in trained if ("score_head" in n) == head] for head in (False, True)]


class Batch(NamedTuple):
    """B groups of pairs. columns[b] (n,2): which of the texts of row b are the chosen and the
    rejected answer of each of its n pairs."""

    groups: list
    prefix: Prefix
    tokens: torch.Tensor  # (B,G,T), texts that differ
    lengths: torch.Tensor  # (B,G)
    columns: list


def collate(groups, reading, processor, cache, device, args):
    rows, columns = [], []
    for group in groups:
        texts = {}  # an answer that is in several pairs is read once
        for p in group:
            narrative, own = reading.beside(p)
            for side in SIDES:
                texts[str(p["question"]), p[side]] = p["question"], narrative, p[side], own
        order = list(texts)
        rows.append(list(texts.values()))
        columns.append(torch.tensor(
            [[order.index((str(p["question"]), p[side])) for side in SIDES] for p in group]))
    prefix, tokens, lengths = reward_batch(
        rows, [group[0]["clip"] for group in groups], processor, cache, device,
        args.answer_first, args.max_prompt_tokens, args.max_answer_tokens)
    return Batch(groups, prefix, tokens, lengths, columns)


def rewards_of(model, batch, rows):
    """-> rewards (n,2) of the n pairs of these rows, chosen first, and the pairs."""
    G = 1 + max(int(batch.columns[b].max()) for b in rows)
    lengths = batch.lengths[rows, :G]
    tokens = batch.tokens[rows, :G, : lengths.max()]
    has_video = torch.tensor([group[0]["clip"] is not None for group in batch.groups])
    scores = token_scores(model, batch.prefix.rows(rows, has_video), tokens, lengths)
    rewards = read_rewards(scores, lengths)  # (b,G)
    pairs = [p for b in rows for p in batch.groups[b]]
    return torch.cat([r[batch.columns[b]] for r, b in zip(rewards, rows)]), pairs


# --------------------------------------------------------------------------------------------------
# What is logged
# --------------------------------------------------------------------------------------------------
def measure(rewards, pairs):
    """rewards (n,2) of n pairs -> {one of MEASURES: (sum, count)}.

    accuracy: the oracle's choice has the higher reward; equal rewards count 1/2.
    truth_accuracy: the right answer has it, on pairs with a label and exactly one right answer.
    oracle_accuracy: on the same pairs, the oracle chose the right one."""
    margin, n = rewards[:, 0] - rewards[:, 1], len(pairs)  # (n,)
    won = (margin > 0).float() + (margin == 0).float() / 2
    right = [[p["answer"] is not None and is_correct(p[side], p["answer"]) for side in SIDES]
             for p in pairs]
    truth = torch.tensor([float(c) - float(r) for c, r in right])  # 1: the oracle is right, -1: not
    true = torch.where(truth > 0, won, 1 - won)[truth != 0].sum()
    sums = (won.sum(), margin.sum(), rewards.mean(-1).sum(), true, (truth > 0).sum())
    return dict(zip(MEASURES, zip(sums, (n, n, n, (truth != 0).sum(), (truth != 0).sum()))))


if __name__ == "__main__":
    main(parse_args(Args))
