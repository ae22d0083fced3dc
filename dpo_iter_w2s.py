"""Iter-W2S-RLAIF: preference pairs out of the answers of many models, iterative DPO, parameter extrapolation.

Run      torchrun --nproc_per_node=4 dpo_iter_w2s.py             the embedded world; builds what is missing, the zoo too
         python dpo_iter_w2s.py                                  the same on one process
         python dpo_iter_w2s.py --stage build --name data        the preference data of the first iteration, no training
         python dpo_iter_w2s.py --zoo policy --samples 10 --name self     pairs out of the policy's own answers alone
         python dpo_iter_w2s.py --oracle reference --name upper  a perfect oracle: the upper bound, not RLAIF
Papers   [W] Iter-W2S-RLAIF / MMAIP-V, arXiv:2411.16201      [D] DPO, arXiv:2305.18290      [E] ExPO, arXiv:2404.16792
Claim    with few labels, the answers of weak models, scored by an AI that sees the video, improve the policy.
         Extrapolating gains nothing, iterating no more than as many steps on the first pairs (docs/dpo_iter_w2s.md).

Differs  D1  the zoo. [W] samples from well-aligned models of other makers; our embedded zoo is the policy and relatives
             of it that saw the same labels (preference_zoo.py says why). `policy` in --zoo is the policy of the moment.
         D2  pairs. [W] takes the best and the worst answer. So do we, but only where their scores differ by --min_gap
             or more: if the oracle hardly tells two answers apart, the pair would teach its noise. No source may give
             more than --max_share of the chosen answers (pairs with the smallest gap go first), else DPO learns to
             imitate one model's style. An empty answer scores 0: it can be rejected, never chosen.
         D3  alpha. [W] prints none, [E] tunes it on a development set. Here the oracle scores the greedy answers of
             all --alphas to held-out questions; 0 is always among them, so by this measure extrapolating never hurts.
             The list goes on to the other side: alpha = -1 is theta_{k-1} again, so neither does iterating.
         D4  what becomes the next reference is not said in [W]: here the extrapolated weights, which also are the next
             start. So every iteration starts with margin 0, and alpha = 0 gives plain iterative DPO.
         D5  LoRA: an adapter an iteration, merged at its end. Its base then *is* the reference (adapter off), and to
             extrapolate is to scale its delta by 1 + alpha, exactly.
         D6  unpublished in [W]: beta, learning rate, number of iterations, alpha. Ours were chosen in single runs
             on validation questions (a third of the rate, or twice of it, gains less); the public relatives use beta
             0.1, 3-4 iterations with fresh pairs, alpha 0.3-0.5.

Oracle   --oracle scores each answer 0-5 on four aspects (relevance, accuracy, detail, clarity); their mean is the score
         of the answer. `api` asks for them; the default, a local judge, has no such scale: each aspect is a stand-in
         (oracle.py, JudgeOracle.aspects). Of several raters the mean counts, aspect by aspect.
Left out before step 1: videos the policy cannot decode (broken_videos.json), clips whose labels SFT saw, requests for
         descriptions (questions.py).
Missing  an answer that a source did not give (no reply, broken video: preference_zoo.py) has no score; nor has any
         answer to a question that the oracle could not score. A question with fewer than two scores makes no pair; the
         data card counts it. In step 5 a question that could not be scored counts for no alpha. A server that answers
         401 or 404 ends the run.
Resume   answers and scores go on behind the last whole part, DPO at its last checkpoint; an iteration with final/ is
         skipped. What failed stays failed: to have it asked again, delete answers.jsonl and scores.jsonl.
Cut      an answer that did not end within --max_new_tokens is trained without EOS: to be cut is not to end.
Gradient only log pi has one. The reference and CLIP are frozen; all other weights are trained, with --lora_r the
         adapters of the decoder alone.
Loss     the sum over all pairs of all processes, divided by --prompts_per_step.

symbol      name       shape    meaning                                                                made in
y_w, y_l    tokens     (B,2,T)  chosen and rejected answer to B questions, one prefix for both         answer_logps
log pi      logps      (B,2)    log-probability of each answer as a whole                              answer_logps
r           rewards    (B,2)    beta (log pi - log pi_ref), the implicit reward                        dpo_loss
theta_k     theta      (..)     weights after the DPO of iteration k, before step 5                    line_of
theta_k-1   theta_ref  (..)     start and reference of iteration k: the SFT start, then final/ of iteration k-1, which
                                is extrapolated (D4). With LoRA both are B's (D5)                      line_of
alpha       alpha      ()       how far to go beyond theta_k, as a multiple of the step theta_k - theta_{k-1};
                                negative: back                                                         step 5
"""

import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from flags import (
    SCORERS,
    WORLD,
    ModelArgs,
    OracleArgs,
    above_zero,
    answer_help,
    at_least,
    check_start,
    check_training,
    parse_args,
)

SIDES = ("chosen", "rejected")
PAIR_METRICS = ("losses/dpo", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
                "logps/chosen", "logps/rejected")


@dataclass
class Args(OracleArgs, ModelArgs):  # the last groups: flags.py
    # -- algorithm
    zoo: list[str] = HfArg(default_factory=list, help="who answers: policy, checkpoint folders, http://host/v1#model; "
                           "empty: policy and, in the embedded world, four relatives of it (D1)")
    samples: int = HfArg(default=2, help="answers of each source to a question; servers give one")
    min_gap: float = HfArg(default=0.5, help="least difference of a pair's scores, of 5 (D2)")
    max_share: float = HfArg(default=0.5, help="largest share of one source among the chosen answers (D2)")
    preferences: str = HfArg(default="", help="pairs of the first iteration out of files instead, comma-separated")
    iterations: int = HfArg(default=2, help="rounds of DPO, extrapolation, new reference")
    fresh_pairs: bool = HfArg(default=True, help="new questions and answers of the current policy in each iteration")
    alphas: list[float] = HfArg(default_factory=lambda: [-1.0, -0.5, 0.0, 0.3, 0.5], help="extrapolations to choose "
                                "from (D3); 0 is always among them, those below go back towards theta_{k-1}")
    beta: float = HfArg(default=0.1, help="DPO's beta, scale of the implicit rewards; larger keeps the policy nearer "
                        "to the reference")
    lora_r: int = HfArg(default=0, help="LoRA rank on the decoder (D5); 0 trains all weights but CLIP's")
    lora_alpha: int = HfArg(default=16, help="LoRA alpha")
    quantize: str = HfArg(default="none", help="none, or nf4: QLoRA, needs --lora_r")
    # -- budget (D6)
    questions: int = HfArg(default=1600, help="questions of an iteration")
    steps: int = HfArg(default=75, help="optimizer steps of an iteration")
    prompts_per_step: int = HfArg(default=48, help="pairs per step, over all processes; where an epoch ends one can "
                                  "come twice")
    micro_batch_size: int = HfArg(default=12, help="pairs per forward pass and process")
    lr: float = HfArg(default=3e-4, help="scale of the learning rate: the smaller of a rise over 10 steps and a linear "
                      "fall to zero, in each iteration")
    max_prompt_tokens: int = HfArg(default=512, help="longer questions are cut at their end, never the video")
    max_new_tokens: int = HfArg(default=16, help="longest answer, EOS included; longer ones of --preferences are cut")
    temperature: float = HfArg(default=1.0, help="sampling temperature of the zoo's checkpoints")
    # -- data and models
    data: str = HfArg(default=f"{WORLD}/train.json", help="videos and questions; answers: the data card and --oracle "
                      "reference only")
    video_root: str = HfArg(default="", help="where the videos are; empty: beside the annotation file")
    eval_data: str = HfArg(default=f"{WORLD}/val.json", help="held-out questions: choice of alpha (no labels), curve")
    eval_questions: int = HfArg(default=500, help="how many of them")
    eval_steps: int = HfArg(default=25, help="steps between evaluations")
    model: str = HfArg(default="", help="the SFT start; empty: runs/sft/policy_s<seed>/final, built if missing")
    # -- plumbing
    stage: str = HfArg(default="all", help="build: stop when the first iteration's pairs are written | all")
    name: str = HfArg(default="context", help="run name: runs/dpo_iter_w2s/<name>_s<seed>")
    seed: int = HfArg(default=0, help="choice and order of the questions, all sampled answers")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features, narratives and servers' replies")
    save_steps: int = HfArg(default=50, help="steps between checkpoints")
    resume: bool = HfArg(default=False, help="continue the run of this name where it stopped")

    @property
    def collects(self):  # or are all pairs given?
        return not self.preferences or self.fresh_pairs and self.iterations > 1

    def __post_init__(self):
        super().__post_init__()
        if not set(self.raters) <= set(SCORERS):
            raise ValueError(f"--oracle {self.oracle}: those that score four aspects are {', '.join(SCORERS)}")
        if self.stage not in ("build", "all"):
            raise ValueError(f"--stage {self.stage}: choose build or all")
        if self.stage == "build" and self.preferences:
            raise ValueError("--stage build makes the pairs of the first iteration, --preferences gives them: drop one")
        at_least(self, samples=1, min_gap=0, iterations=1, questions=1, steps=1, prompts_per_step=1,
                 micro_batch_size=1, max_prompt_tokens=1, max_new_tokens=1, eval_questions=0, eval_steps=1,
                 save_steps=1, lora_r=0)
        check_training(self, batch="prompts_per_step")
        above_zero(self, "beta", "temperature", "lr")
        self.model = self.model or sft_start(self.seed)
        check_start(self, "model")
        self.zoo = self.zoo or default_zoo(self.model, self.seed)
        for source in self.zoo:
            check_source(source)
        names = [name_of(source) for source in self.zoo]
        if len(set(names)) < len(names):
            raise ValueError(f"--zoo: two sources are called {Counter(names).most_common(1)[0][0]}")
        if len(names) > 1 and not 1 / len(names) <= self.max_share <= 1:
            raise ValueError(f"--max_share {self.max_share}: must lie between 1/{len(names)} (sources) and 1")
        if self.samples * len(names) < 2:
            raise ValueError("--samples 1 of one source makes no pair")
        if not all(math.isfinite(alpha) for alpha in self.alphas):
            raise ValueError("--alphas: they must be numbers")
        self.alphas = sorted({0.0, *self.alphas}, key=lambda a: (abs(a), a))
        if len(self.alphas) > 1 and not (self.eval_data and self.eval_questions):
            raise ValueError("--alphas are chosen on --eval_data: give some, or --alphas 0")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
import harness
from answers import fits
from api_oracle import ASPECTS, ApiError
from data import DataError, FeatureCache, read_records, report_lines
from oracle import make_oracle, normalize, token_f1
from preference_zoo import build_zoo, check_source, collect, default_zoo, name_of, score
from preferences import read_preferences, write_preferences
from questions import build_embedded, choose_questions, held_out_questions, question_indices, sft_start
from video_llm import Prefix, add_lora, has_adapter, load_model, merged, reference_of, token_logprobs, unwrap


# ---------------------------------------------------------------------------------------------------------------
# Equations
# ---------------------------------------------------------------------------------------------------------------
def dpo_loss(logps, ref_logps, beta):
    """[D Eq. 7] -log sigmoid(r_w - r_l) with r = beta (log pi - log pi_ref). logps, ref_logps (B,2): chosen, rejected
    -> loss (B,), rewards (B,2). The gradient in r_w - r_l is -sigmoid(r_l - r_w): most where the order is wrong."""
    rewards = beta * (logps - ref_logps)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def extrapolated(theta, theta_ref, alpha):
    """[E Eq. 2] theta + alpha (theta - theta_ref), in float32 whatever the weights are stored in. Tensors of one shape.

    `lerp` is exact at both ends: alpha = 0 gives theta, alpha = -1 theta_ref, bit for bit.
    """
    return torch.lerp(theta_ref.float(), theta.float(), 1.0 + alpha).to(theta.dtype)


def best_and_worst(answers, scores, min_gap):
    """[W Sec. 3.1; D2] The places of the best and of the worst answers to one question, copies and ties included: two
    lists. Or the reason why it makes no pair. answers [G]; scores [G], None where there is none."""
    scored = [i for i, s in enumerate(scores) if s is not None]
    if len(scored) < 2:
        return "fewer than two scores"
    if len({normalize(answers[i]) for i in scored}) == 1:
        return "one answer"
    high, low = (end(scores[i] for i in scored) for end in (max, min))
    if high == low:
        return "all equal"
    if high - low < min_gap:
        return "near-tie"
    return [i for i in scored if scores[i] == high], [i for i in scored if scores[i] == low]


def make_pairs(groups, min_gap):
    """Groups (see preference_zoo.collect) -> pairs, Counter of the groups without one by reason. Of several answers
    with the best score one is taken whose source has fewest so far; the same for the worst."""
    pairs, dropped, uses = [], Counter(), {side: Counter() for side in SIDES}
    for g in groups:
        total = [None if s is None else sum(s) / len(s) for s in g["scores"]]
        found = best_and_worst(g["answers"], total, min_gap)
        if isinstance(found, str):
            dropped[found] += 1
            continue
        scored = [t for t in total if t is not None]
        pair = dict(id=g["record"]["id"], clip=g["record"]["clip"], question=g["record"]["question"], scores={},
                    sources={}, ended={}, margin=round(max(scored) - min(scored), 4))
        for side, places in zip(SIDES, found):
            i = min(places, key=lambda i: (uses[side][g["sources"][i]], i))
            uses[side][g["sources"][i]] += 1
            pair[side], pair["sources"][side], pair["ended"][side] = g["answers"][i], g["sources"][i], g["ended"][i]
            pair["scores"][side] = dict(zip(ASPECTS, g["scores"][i]))
        pairs.append(pair)
    return pairs, dropped


def cap_share(pairs, max_share):
    """[D2] The pairs in which no source gives more than `max_share` of the chosen answers: of a source with too many
    those with the smallest gaps go, until it fits; and so on, as this makes the others' shares larger."""
    pairs = list(pairs)
    while pairs:
        source, n = Counter(p["sources"]["chosen"] for p in pairs).most_common(1)[0]
        if n <= max_share * len(pairs) + 1e-9:
            break
        keep = int(max_share / (1 - max_share) * (len(pairs) - n) + 1e-9)
        theirs = [i for i, p in enumerate(pairs) if p["sources"]["chosen"] == source]
        theirs.sort(key=lambda i: (-pairs[i]["margin"], i))
        gone = set(theirs[keep:])
        pairs = [p for i, p in enumerate(pairs) if i not in gone]
    return pairs


def choose_alpha(alphas, scores):
    """[E Sec. 3; D3] The alpha of the highest score; of equals the one nearest to 0. With 0 among them the choice never
    scores below plain DPO."""
    return min(zip(alphas, scores), key=lambda pair: (-pair[1], abs(pair[0])))[0]


def lr_at(step, args):
    """step: counted within its iteration."""
    return args.lr * min((step + 1) / 10, (args.steps - step) / args.steps)


# ---------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------
def main(args):
    rank, world, device = harness.setup_dist()
    build_embedded(args, rank)
    if args.collects:
        build_zoo(args, rank)
    folder = Path(f"runs/dpo_iter_w2s/{args.name}_s{args.seed}")
    checkpoint = harness.open_run(folder, args, rank)

    records, given, evals, oracle, cache = open_data(args, folder, rank, world, device)
    stage = lambda k: folder / f"iteration_{k}_s{args.seed}"  # evaluate.py reads the seed from the folder's name
    start_of = lambda k: str(stage(k - 1) / "final") if k > 1 else args.model  # theta_{k-1}: start *and* reference
    done = sum((stage(k) / "theta").exists() for k in range(1, args.iterations + 1))  # iterations trained
    start = done * args.steps
    if checkpoint:  # one of an iteration that is over is of no use
        saved = int(checkpoint.name.split("-")[1])
        checkpoint, start = (checkpoint, saved) if saved > start else (None, start)
    log = harness.Log(folder, args.iterations * args.steps, start, rank)

    for k in range(1, args.iterations + 1):
        if (stage(k) / "final").exists():
            continue

        # 1. Answers  y_1..y_G ~ every model of the zoo, among them the policy as it is now            [W Sec. 3.1; D1]
        # 2. Scores   of each answer, 0-5 on four aspects, by an oracle that sees the video                [W Sec. 3.1]
        # 3. Pairs    (y_w, y_l): the best and the worst answer to each question                       [W Sec. 3.1; D2]
        pairs_of = k if args.fresh_pairs else 1  # the iteration whose pairs are used
        pairs = given
        if pairs_of > 1 or not given:
            sources = {name_of(s): start_of(pairs_of) if s == "policy" else s for s in args.zoo}
            which = questions_of(pairs_of, len(records), args)
            with harness.one_line_errors(ApiError, OSError):
                groups, cost = collect(stage(pairs_of), pairs_of, sources, records, which, oracle, args, device, rank,
                                       world)
            found, dropped = make_pairs(groups, args.min_gap)
            pairs = cap_share(found, args.max_share) if len(sources) > 1 else found
            dropped["over --max_share"] = len(found) - len(pairs)
            if rank == 0 and pairs_of == k:
                write_preferences(stage(k) / "preferences.json", pairs, "trl")
                write_card(stage(k), k, pairs, dropped, groups, cache.processor, cost)
        if len(pairs) < args.prompts_per_step:
            sys.exit(f"iteration {k}: {len(pairs)} pairs, fewer than --prompts_per_step {args.prompts_per_step}")
        if args.stage == "build":
            print(f"pairs: {stage(k)}/preferences.json; --stage all --resume makes the same and trains on them; edited "
                  "ones: --preferences, with a new --name") if rank == 0 else None
            return

        # 4. DPO      against theta_{k-1}                                                 [W Sec. 4.1; D Eq. 7; D4, D5]
        torch.manual_seed(args.seed)  # the initialisation of LoRA; every other draw has a key of its own
        trained = (stage(k) / "theta").exists()
        at = stage(k) / "theta" if trained else checkpoint if k == done + 1 else None
        with harness.one_line_errors(OSError):
            load = lambda path: load_model(path, **harness.load_options(args, device))
            model, processor = load(at or start_of(k))
            if args.lora_r and not at:
                model = add_lora(model, args.lora_r, args.lora_alpha)
            same = args.lora_r or not at  # the reference: LoRA: the adapter off; else a frozen copy of the start
            reference = reference_of(model if same else load(start_of(k))[0])
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
        if at and not trained:
            harness.load_trainer(at, optimizer)
        ddp = harness.distribute(model, device)
        logps_of = lambda m, some: answer_logps(m, some, processor, cache, args, device)
        for step in range(k * args.steps if trained else max(start, (k - 1) * args.steps), k * args.steps):
            if evals and step % args.eval_steps == 0:
                log_greedy(log, evals[rank::world], model, processor, cache, args)
            began, local = time.time(), step - (k - 1) * args.steps
            mine = [pairs[i] for i in question_indices(len(pairs), step, args)[rank::world]]
            mine.sort(key=lambda p: max(len(p["chosen"]), len(p["rejected"])))  # micro-batches of like length
            micros = [mine[i : i + args.micro_batch_size] for i in range(0, len(mine), args.micro_batch_size)]
            for g in optimizer.param_groups:
                g["lr"] = lr_at(local, args)
            for i, micro in enumerate(micros):
                with torch.no_grad(), reference() as ref:
                    ref_logps, _ = logps_of(ref, micro)  # (B,2)
                with harness.no_sync(ddp, when=i < len(micros) - 1):
                    logps, lengths = logps_of(ddp, micro)  # (B,2), (B,2)
                    loss, rewards = dpo_loss(logps, ref_logps, args.beta)  # (B,), (B,2)
                    (loss.sum() / args.prompts_per_step * world).backward()  # DDP averages; * world undoes it
                log_pairs(log, loss, rewards, logps, lengths)
            grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
            asked = [[str(p["question"]), p["chosen"], p["rejected"]] for p in mine]
            harness.stop_if_not_finite(grad_norm, log, folder, step, asked)
            optimizer.step()
            optimizer.zero_grad()
            log.add("policy/grad_norm", grad_norm)
            log.add("charts/lr", lr_at(local, args))
            log.add("charts/iteration", k)
            log.add("time/update_s", time.time() - began)
            log.step(step, show=["losses/dpo", "rewards/accuracies", "rewards/margins", "eval/accuracy", "eval/len"])
            harness.checkpoint(log, folder, step + 1, k * args.steps, args.save_steps, model, processor, optimizer)
        if rank == 0 and not trained:
            harness.save_checkpoint(stage(k), "theta", model, processor)

        # 5. ExPO     theta_k + alpha (theta_k - theta_{k-1}), alpha chosen by the oracle            [W Sec. 4.2; E; D3]
        line, curve, answers = line_of(model, reference), [], []
        for alpha in args.alphas:
            go_to(line, alpha)
            texts, row = greedy(evals[rank::world], model, processor, cache, args)
            curve.append({"alpha": alpha} | all_means(row | rewards_on(pairs[:192][rank::world], logps_of, model,
                                                                       reference, args)))
            answers.append(texts)
        with harness.one_line_errors(ApiError):
            scores = oracle_scores(oracle, evals[rank::world], answers)
        for row, mine in zip(curve, scores):
            row |= all_means({"score": mine})
        if len(args.alphas) > 1 and "score" not in curve[0]:
            sys.exit(f"iteration {k}: the oracle scored none of {len(evals)} held-out questions, "
                     f"which choose alpha; when it can again: {harness.resume_command()}")
        alpha = choose_alpha(args.alphas, [row.get("score", 0.0) for row in curve])
        go_to(line, alpha)

        # 6. The result is the next start and the next reference                                        [W Sec. 4.1; D4]
        if rank == 0:
            write_curve(stage(k), k, alpha, curve)
        if k == args.iterations:
            harness.finish(folder, model, processor, rank)
        elif rank == 0:
            save_result(stage(k), model, processor)
        harness.barrier()


# ---------------------------------------------------------------------------------------------------------------
# Parts of the algorithm that need a model
# ---------------------------------------------------------------------------------------------------------------
def answer_logps(model, pairs, processor, cache, args, device):
    """log pi of both answers of B pairs, packed behind one prefix -> logps (B,2), lengths (B,2), EOS counted."""
    prefix = Prefix.build(processor, cache, [p["question"] for p in pairs], [p["clip"] for p in pairs], device,
                          args.max_prompt_tokens)
    ids = [ids_of(p, side, processor, args.max_new_tokens) for p in pairs for side in SIDES]
    tokens = processor.pad(ids, "right")[0].view(len(pairs), 2, -1).to(device)  # (B,2,T)
    lengths = torch.tensor([len(i) for i in ids]).view(-1, 2).to(device)
    return token_logprobs(model, prefix, tokens, lengths)[0].sum(-1).view(-1, 2), lengths


def ids_of(pair, side, processor, max_length=None):
    """An answer's ids, with EOS where it ended; a file that does not say so holds answers that did."""
    ids, ended = processor.answer_ids(pair[side], max_length), pair.get("ended", {}).get(side, True)
    return ids if ended or ids[-1] != processor.tokenizer.eos_token_id else ids[:-1]


def line_of(model, reference):
    """The line through theta_{k-1} and theta_k: [(parameter, its theta, its theta_ref)].

    [D5] With LoRA W = W_{k-1} + s B A: A held, B goes from 0 to B_k, so the merged weights go exactly to W_k.
    """
    lora = has_adapter(model)
    with reference() as ref:
        before = dict(ref.named_parameters())
    line = []
    for name, p in model.named_parameters():
        if "lora_B" in name if lora else p.requires_grad:
            theta, theta_ref = p.detach().clone(), torch.zeros_like(p) if lora else before[name]
            line.append((p, theta, theta_ref))
    return line


@torch.no_grad()
def go_to(line, alpha):
    """Put the model at theta_k + alpha (theta_k - theta_{k-1})."""
    for p, theta, theta_ref in line:
        p.copy_(extrapolated(theta, theta_ref, alpha))


@torch.no_grad()
def rewards_on(pairs, logps_of, model, reference, args):
    """What DPO logs, on fixed pairs, for the model as it is now -> {key: (sum, count)}."""
    out = Counter()
    for i in range(0, len(pairs), args.micro_batch_size):
        micro = pairs[i : i + args.micro_batch_size]
        with reference() as ref:
            ref_logps, _ = logps_of(ref, micro)
        logps, _ = logps_of(model, micro)
        for key, value in pair_metrics(*dpo_loss(logps, ref_logps, args.beta), logps).items():
            out[key] += float(value.sum())
    return {key: (total, len(pairs)) for key, total in out.items()}


def pair_metrics(loss, rewards, logps):
    """loss (B,), rewards (B,2), logps (B,2) -> {key: (B,)} for the keys of PAIR_METRICS, which TRL's users know."""
    margins = rewards[:, 0] - rewards[:, 1]
    values = (loss, rewards[:, 0], rewards[:, 1], (margins > 0).float(), margins, logps[:, 0], logps[:, 1])
    return dict(zip(PAIR_METRICS, values))


def greedy(records, model, processor, cache, args):
    """Greedy answers, and {"accuracy", "len"}: (sum, count). A question without label counts for no accuracy."""
    texts = evaluate.answer(model, processor, cache, records, args.max_new_tokens)
    right = [evaluate.is_correct(t, r["answer"]) for t, r in zip(texts, records) if r["answer"] is not None]
    return texts, {"accuracy": (sum(right), len(right)),
                   "len": (sum(len(processor.answer_ids(t)) for t in texts), len(texts))}


def oracle_scores(oracle, records, answers):
    """answers: a list of texts to `records` for each alpha -> (sum of scores 0-5, count) for each alpha."""
    if not records:
        return [(0.0, 0)] * len(answers)
    groups = score(oracle, [r["clip"] for r in records], [r["question"] for r in records],
                   [list(group) for group in zip(*answers)])
    whole = [g for g in groups if None not in g]  # a question that the oracle could not score counts for no alpha
    return [(sum(sum(g[a]) / len(g[a]) for g in whole), len(whole)) for a in range(len(answers))]


# ---------------------------------------------------------------------------------------------------------------
# Plumbing
# ---------------------------------------------------------------------------------------------------------------
def open_data(args, folder, rank, world, device):
    """-> records to ask about, pairs given by --preferences, held-out records, the oracle, the cache of features."""
    given, records, report = [], [], {}
    with harness.one_line_errors(DataError, OSError):
        if args.preferences:
            given, read = read_preferences(args.preferences.split(","), args.video_root or None)
        if args.collects:
            labelled = "reference" in args.raters  # no other oracle reads a label
            records, report = read_records(args.data.split(","), args.video_root or None, labelled=labelled)
        cache = features_alone(args, device)
    harness.check_same(f"{args.preferences}: its pairs", [[str(p[k]) for k in ("question", *SIDES)] for p in given])
    if args.preferences:
        print("\n".join(report_lines(read))) if rank == 0 else None
        given = usable_pairs(given, args, cache, folder, rank, world)
    if args.collects:
        records, evals = choose_questions(args, records, report, cache, folder, rank, world)
    else:
        evals = held_out_questions(args, cache, folder, rank, world)
    with harness.one_line_errors(DataError, OSError):
        oracle = make_oracle(args, records + evals, str(device))
    return records, given, evals, oracle, cache


def features_alone(args, device):
    """The cache of CLIP features. It lives as long as the run: decoder and Q-Former would lie there unused."""
    model, processor = load_model(args.model, **harness.load_options(args, device))
    model = unwrap(model)
    del model.language_model, model.qformer, model.projection
    return FeatureCache(model, processor, args.cache)


def usable_pairs(read, args, cache, folder, rank, world):
    """Of the pairs of --preferences those with a video that can be read, a prompt that can be cut to
    --max_prompt_tokens and two answers that still differ where --max_new_tokens cuts them. None at all ends the run: it
    would go on with pairs of its own."""
    seen = [p for p in read if p["clip"]]
    broken = harness.prepare_videos(cache, [p["clip"] for p in seen], folder, rank, world)
    there = [p for p in seen if p["clip"] not in broken]
    whole = [p for p in there if fits(cache.processor, p, args.max_prompt_tokens)]
    ids = lambda p, length=None: [ids_of(p, side, cache.processor, length) for side in SIDES]
    given = [p for p in whole if len({*map(tuple, ids(p, args.max_new_tokens))}) == 2]
    cut = sum(len(answer) > args.max_new_tokens for p in given for answer in ids(p))
    if rank == 0:
        print(f"{len(given)} pairs; {len(broken)} broken videos; {cut} answers are cut at --max_new_tokens "
              f"{args.max_new_tokens}; {len(whole) - len(given)} pairs left out, equal once cut; "
              f"{len(there) - len(whole)} whose prompts cannot be cut to --max_prompt_tokens {args.max_prompt_tokens}")
    if not given:
        sys.exit(f"{args.preferences}: none of {len(read)} pairs can be used ({len(read) - len(seen)} without video, "
                 f"{len(seen) - len(there)} with a broken one, {len(there) - len(whole)} whose prompts cannot be cut "
                 f"to --max_prompt_tokens {args.max_prompt_tokens}, {len(whole)} equal at --max_new_tokens "
                 f"{args.max_new_tokens})")
    return given


def questions_of(k, count, args):
    """The questions of iteration k, indices: the next --questions of a permutation keyed by the seed, then from its
    start again."""
    order, n = np.random.default_rng([args.seed, 0]).permutation(count).tolist(), min(args.questions, count)
    return [order[i % count] for i in range((k - 1) * n, k * n)]


@torch.no_grad()
def log_pairs(log, loss, rewards, logps, lengths):
    values = pair_metrics(loss, rewards, logps)
    for key in PAIR_METRICS:
        log.add(f"{key}", values[key].sum(), len(loss))
    log.add("length/chosen", lengths[:, 0].sum(), len(loss))
    log.add("length/rejected", lengths[:, 1].sum(), len(loss))


def log_greedy(log, records, model, processor, cache, args):
    sums = greedy(records, model, processor, cache, args)[1]
    log.add("eval/accuracy", *sums["accuracy"])
    log.add("eval/len", *sums["len"])


def all_means(sums):
    """{key: (sum, count) of this process} -> {key: mean over all processes}; nothing counted: no key."""
    keys = sorted(sums)
    both = harness.all_sum(torch.tensor([[float(x) for x in sums[key]] for key in keys], dtype=torch.float64))
    return {key: total / count for key, (total, count) in zip(keys, both.tolist()) if count}


def save_result(folder, model, processor):
    """folder/final, a whole model: what `harness.finish` does at the end of a run."""
    if has_adapter(model):
        harness.save_checkpoint(folder, "adapter", model, processor)
        model = merged(folder / "adapter")
    harness.save_checkpoint(folder, "final", model, processor)


def write_curve(folder, k, chosen, curve):
    harness.write(folder / "extrapolation.json", json.dumps(dict(chosen=chosen, curve=curve), indent=1) + "\n")
    for row in curve:
        keys = [key for key in ("score", "accuracy", "len", "rewards/margins", "logps/chosen") if key in row]
        print(f"iteration {k}, alpha {row['alpha']:g}: " + " ".join(f"{key} {row[key]:.3f}" for key in keys)
              + (" <- chosen" if row["alpha"] == chosen else ""), flush=True)


def write_card(folder, k, pairs, dropped, groups, processor, cost):
    """data_card.json and .md: what is in the pairs. Labels, where the questions have some, are read here alone."""
    truth = {g["record"]["id"]: g["record"]["answer"] for g in groups if g["record"]["answer"] is not None}
    labelled = [p for p in pairs if p["id"] in truth]
    mean = lambda values: round(sum(values) / max(len(values), 1), 4)
    missing = Counter(source for g in groups for source, a in zip(g["sources"], g["answers"]) if a is None)
    card = dict(iteration=k, questions=len(groups), labelled=len(truth), answers=sum(len(g["answers"]) for g in groups),
                no_answer=sum(not a for g in groups for a in g["answers"]), missing=dict(missing), pairs=len(pairs),
                dropped=dict(dropped))
    for side in SIDES:
        card[side] = dict(
            sources=dict(Counter(p["sources"][side] for p in pairs).most_common()),
            tokens=mean([len(ids_of(p, side, processor)) for p in pairs]),
            cut=sum(not p["ended"][side] for p in pairs),
            score=mean([sum(p["scores"][side].values()) / len(ASPECTS) for p in pairs]))
    card["oracle"] = {key: round(n, 1) for key, n in cost.items()}  # requests, tokens and refusals of a server
    listed = lambda counts: ", ".join(f"{name} {n}" for name, n in counts.items() if n) or "none"
    rows = [("questions", f"{card['questions']} ({len(truth)} with a label)"),
            ("answers", f"{card['answers']} ({card['no_answer']} empty or missing)"), ("missing", listed(missing)),
            ("pairs", card["pairs"]), ("questions without a pair", listed(dropped))]
    for side in SIDES:
        c = card[side]
        rows += [(f"{side}: sources", listed(c["sources"])), (f"{side}: mean length in tokens", c["tokens"]),
                 (f"{side}: answers that were cut", c["cut"]), (f"{side}: mean score, 0-5", c["score"])]
    if labelled:
        right = {side: [evaluate.is_correct(p[side], truth[p["id"]]) for p in labelled] for side in SIDES}
        for side in SIDES:
            c = card[side]
            c |= dict(right=mean(right[side]), token_f1=mean([token_f1(p[side], truth[p["id"]]) for p in labelled]))
            rows += [(f"{side}: share that equals the label", c["right"]),
                     (f"{side}: token F1 with the label", c["token_f1"])]
        decided = [c for c, r in zip(right["chosen"], right["rejected"]) if c != r]
        share = card["right_before_wrong"] = dict(share=mean(decided), pairs=len(decided))
        rows.append(("chosen right, of the pairs with one right answer", f"{share['share']} of {share['pairs']}"))
    rows += [("oracle", listed(card["oracle"]))] if cost else []
    lines = [f"# Preference pairs of iteration {k}", "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    harness.write(folder / "data_card.json", json.dumps(card, indent=1) + "\n")
    harness.write(folder / "data_card.md", "\n".join(lines) + "\n")
    print(f"iteration {k}: {len(pairs)} pairs; no pair: {listed(dropped)}; {folder}/data_card.md", flush=True)


if __name__ == "__main__":
    main(parse_args(Args))
