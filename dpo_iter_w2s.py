"""Iter-W2S-RLAIF: many models answer, an AI scores, DPO on the best against the worst answer.

Run      torchrun --nproc_per_node=4 dpo_iter_w2s.py       the embedded world; builds the zoo, too
         python dpo_iter_w2s.py                            the same on one process
         python dpo_iter_w2s.py --stage build --name data  only the pairs of the first iteration
         python dpo_iter_w2s.py --zoo policy --samples 10 --name self    the policy's own answers
         python dpo_iter_w2s.py --oracle reference         a perfect oracle: upper bound, not RLAIF
Papers   [W] Iter-W2S-RLAIF / MMAIP-V, arXiv:2411.16201   [D] DPO, arXiv:2305.18290
         [E] ExPO, arXiv:2404.16792
Claim    With few labels, the answers of weak models, scored by an AI that sees the video, improve
         the policy. Extrapolating gains nothing; iterating gains no more than as many steps on the
         first pairs (docs/dpo_iter_w2s.md).

The algorithm, iteration k = 1, 2, ..:
  1. All models of the zoo answer the same questions. One of them is the policy as it is now,
     theta_{k-1}.
  2. An oracle that sees the video scores every answer, 0-5 on four aspects. Their mean is its
     score.
  3. The best and the worst answer to a question make a pair, if their scores differ enough.
  4. DPO on these pairs leads from theta_{k-1}, which is also its reference, to theta_k.
  5. Extrapolation: theta_k + alpha (theta_k - theta_{k-1}). The oracle's scores of greedy answers
     to held-out questions choose alpha.
  6. The result is the start and the reference of iteration k + 1.

Differs  D1  The zoo. [W] samples from well-aligned models of other makers. Ours is the policy and
             relatives of it that saw the same labels (plumbing/zoo.py says why).
         D2  Pairs. [W] takes the best and the worst answer. We do so only where their scores differ
             by --min_gap or more: if the oracle hardly tells two answers apart, the pair would
             teach its noise. No source may give more than --max_share of the chosen answers, or DPO
             would learn one model's style; the pairs with the smallest gaps go first. An empty
             answer scores 0: it can be rejected, never chosen.
         D3  alpha. [W] prints none, [E] tunes it on a development set. Here the oracle chooses
             among --alphas; 0 is always one of them, so by its measure extrapolating never hurts.
             alpha = -1 undoes the iteration: as it is a candidate too, iterating cannot lower the
             oracle's score on these questions.
         D4  [W] does not say what becomes the next reference. Here it is the extrapolated model,
             which is also the next start: every iteration starts with margin 0, and alpha = 0 gives
             plain iterative DPO.
         D5  LoRA: one adapter per iteration, merged at its end. The reference is the model with the
             adapter off. To extrapolate is to scale the adapter's delta by 1 + alpha, which is
             exact.
         D6  Unpublished in [W]: beta, learning rate, number of iterations, alpha. Ours were chosen
             in single runs on validation questions (a third of the rate, or twice of it, gains
             less). Public relatives use beta 0.1, 3-4 iterations with fresh pairs, alpha 0.3-0.5.

Oracle       `api` asks for the four aspects. The default, a local judge, has no such scale: each
             aspect is a stand-in (JudgeOracle.aspects). Of several oracles the mean counts, aspect
             by aspect.
Left out     before step 1: unreadable videos (broken_videos.json), clips whose labels SFT saw,
             requests for descriptions (plumbing/questions.py).
Missing      An answer that a source did not give, or the oracle could not score, has no score. A
             question with fewer than two scores makes no pair; in step 5 it counts for no alpha.
Resume       Answers and scores continue after the last whole part, DPO at its last checkpoint. What
             failed stays failed: delete answers.jsonl and scores.jsonl to ask again.
Cut          An answer that did not end within --max_new_tokens is trained without EOS.
Gradient     flows through log pi only. Reference and CLIP are frozen. With --lora_r only the
             adapters are trained.

symbol        name       shape   example                 meaning
y_1..y_G      answers    [G]     ["red", "a ball", ""]   of all sources to a question; None: missing
s_1..s_G      scores     [G][4]  [[4.1, 3.9, 5, 4], ..]  the oracle's points per aspect, or None
y_w, y_l      tokens     (B,2,T) [[[5, 2], [9, 2]], ..]  chosen and rejected answer, EOS if it ended
log pi        logps      (B,2)   [-3.2, -4.0]            log-probability of each answer as a whole
r             rewards    (B,2)   [.08, -.02]             beta (log pi - log pi_ref)
theta_k       theta      (..)    .0312                   a weight after the DPO of iteration k
theta_{k-1}   theta_ref  (..)    .0310                   the weight of start and reference (LoRA: B)
alpha         alpha      ()      .3                      how far to go beyond theta_k
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass

from plumbing.flags import SCORERS, WORLD, ModelArgs, OracleArgs, answer_help, flag, parse_args

SIDES = ("chosen", "rejected")
PAIR_METRICS = ("losses/dpo", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
                "rewards/margins", "logps/chosen", "logps/rejected")


@dataclass
class Args(OracleArgs, ModelArgs):  # memory, oracle, server: plumbing/flags.py
    # -- algorithm
    zoo: list[str] = flag(list, "who answers: policy, checkpoint folders, http://host/v1#model; "
                          "empty: policy and, in the embedded world, four relatives (D1)")
    samples: int = flag(2, "answers of each source to a question; servers give one", low=1)
    oracle: str = flag("context", "context | judge | api: AI feedback; reference: token F1 with "
                       "the label; several, comma-separated: the mean of their scores")
    min_gap: float = flag(0.5, "least difference of a pair's scores, of 5 (D2)", low=0)
    max_share: float = flag(0.5, "largest share of one source among the chosen (D2)", above=0)
    preferences: str = flag("", "files with the first iteration's pairs instead, comma-separated")
    iterations: int = flag(2, "rounds of DPO, extrapolation, new reference", low=1)
    fresh_pairs: bool = flag(True, "new questions and answers in each iteration")
    alphas: list[float] = flag(lambda: [-1.0, -0.5, 0.0, 0.3, 0.5], "extrapolations to choose from "
                               "(D3); 0 is always among them")
    beta: float = flag(0.1, "DPO's beta, scale of the implicit rewards", above=0)
    lora_r: int = flag(0, "LoRA rank on the decoder (D5); 0: all weights but CLIP's", low=0)
    lora_alpha: int = flag(16, "LoRA alpha", low=1)
    quantize: str = flag("none", "none, or nf4: QLoRA, needs --lora_r", choices=("none", "nf4"))
    # -- budget (D6)
    questions: int = flag(1600, "questions of an iteration", low=1)
    steps: int = flag(75, "optimizer steps of an iteration", low=1)
    prompts_per_step: int = flag(48, "pairs per step, over all processes", low=1)
    tokens_per_micro_batch: int = flag(2048, "tokens in a forward pass, padding included", low=1)
    lr: float = flag(3e-4, "peak learning rate; each iteration: 10 steps up, then to zero", above=0)
    max_prompt_tokens: int = flag(512, "of a longer question the end is cut, not the video", low=1)
    max_new_tokens: int = flag(16, "longest answer, EOS included; longer ones are cut", low=1)
    temperature: float = flag(1.0, "sampling temperature of the zoo's checkpoints", above=0)
    # -- data and models
    data: str = flag(f"{WORLD}/train.json", "videos and questions; answers: the data card and "
                     "--oracle reference only")
    video_root: str = flag("", "where the videos are; empty: beside the annotation file")
    eval_data: str = flag(f"{WORLD}/val.json", "held-out questions: choice of alpha, curve")
    eval_questions: int = flag(500, "how many of them", low=0)
    eval_steps: int = flag(25, "steps between evaluations", low=1)
    model: str = flag("", "the SFT start; empty: runs/sft/policy_s<seed>/final, built if missing")
    # -- plumbing
    stage: str = flag("all", "build: stop when the first iteration's pairs are written | all",
                      choices=("build", "all"))
    name: str = flag("", "run name: runs/dpo_iter_w2s/<name>_s<seed>; empty: --oracle")
    seed: int = flag(0, "choice and order of the questions, all sampled answers", low=0)
    cache: str = flag("cache", "folder of cached CLIP features, narratives and servers' replies")
    save_steps: int = flag(50, "steps between checkpoints", low=1)
    resume: bool = flag(False, "continue the run of this name where it stopped")

    @property
    def collects(self):
        """Does the zoo have to answer, or are all pairs given?"""
        return not self.preferences or self.fresh_pairs and self.iterations > 1

    def __post_init__(self):
        super().__post_init__()
        self.name = self.name or self.oracle.replace(",", "+")
        self.check_training("prompts_per_step")
        if not set(self.raters) <= set(SCORERS):
            raise ValueError(f"--oracle {self.oracle}: those that score four aspects are "
                             f"{', '.join(SCORERS)}")
        if self.stage == "build" and self.preferences:
            raise ValueError("--stage build makes the pairs of the first iteration, --preferences "
                             "gives them: drop one")
        self.model = self.model or sft_start(self.seed)
        self.check_start("model")
        self.zoo = self.zoo or zoo.default_zoo(self.model, self.seed)
        zoo.check_sources(self)
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

import video_llm
from inputs.features import FeatureCache
from inputs.preferences import read_preferences, write_preferences
from inputs.records import DataError, report_lines
from model.packing import batches
from oracle import ASPECTS, make_oracle
from plumbing import processes, zoo
from plumbing.api_client import ApiError
from plumbing.batches import micro_batches
from plumbing.embedded import build_embedded, sft_start
from plumbing.questions import (choose_questions, held_out_questions, question_indices,
                                read_questions)
from plumbing.run import Run, save_checkpoint
from plumbing.text import is_correct, normalize
from video_llm import Prefix, generate, has_adapter, token_logprobs, unwrap


# --------------------------------------------------------------------------------------------------
# Equations: tensors in, tensors out
# --------------------------------------------------------------------------------------------------
def dpo_loss(logps, ref_logps, beta):
    """[D Eq. 7] -log sigmoid(r_w - r_l) with r = beta (log pi - log pi_ref).

    logps, ref_logps (B,2): chosen, rejected -> loss (B,), rewards (B,2). The gradient in r_w - r_l
    is -sigmoid(r_l - r_w): largest where the order is wrong."""
    rewards = beta * (logps - ref_logps)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def extrapolated(theta, theta_ref, alpha):
    """[E Eq. 2] theta + alpha (theta - theta_ref), in float32 whatever the weights are stored in.

    Tensors of one shape. `lerp` is exact at both ends: alpha = 0 gives theta, alpha = -1 theta_ref,
    bit for bit.
    """
    return torch.lerp(theta_ref.float(), theta.float(), 1.0 + alpha).to(theta.dtype)


def best_and_worst(answers, scores, min_gap):
    """[W Sec. 3.1; D2] The places of the best and of the worst answers, copies and ties included.

    answers [G]; scores [G], None where there is none -> two lists, or the reason why there is no
    pair."""
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
    """[W Sec. 3.1; D2] Scored groups -> pairs, and a Counter of the groups without one by reason.

    Of several answers with the best score the one is taken whose source has given the fewest so
    far; the same for the worst."""
    pairs, dropped, uses = [], Counter(), {side: Counter() for side in SIDES}
    for g in groups:
        total = [None if s is None else sum(s) / len(s) for s in g["scores"]]
        found = best_and_worst(g["answers"], total, min_gap)
        if isinstance(found, str):
            dropped[found] += 1
            continue
        scored = [t for t in total if t is not None]
        pair = {key: g["record"][key] for key in ("id", "clip", "question")}
        pair |= dict(scores={}, sources={}, ended={}, margin=round(max(scored) - min(scored), 4))
        for side, places in zip(SIDES, found):
            i = min(places, key=lambda i: (uses[side][g["sources"][i]], i))
            uses[side][g["sources"][i]] += 1
            pair[side] = g["answers"][i]
            pair["sources"][side] = g["sources"][i]
            pair["ended"][side] = g["ended"][i]
            pair["scores"][side] = dict(zip(ASPECTS, g["scores"][i]))
        pairs.append(pair)
    return pairs, dropped


def cap_share(pairs, max_share):
    """[D2] The pairs in which no source gives more than `max_share` of the chosen answers.

    Of a source with too many the pairs with the smallest gaps go, until it fits. This makes the
    shares of the others larger, so it is repeated."""
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
    """[E Sec. 3; D3] The alpha of the highest score; of equals the one nearest to 0."""
    return min(zip(alphas, scores), key=lambda pair: (-pair[1], abs(pair[0])))[0]


def lr_at(step, steps, peak):
    """step: counted within its iteration."""
    return peak * min((step + 1) / 10, (steps - step) / steps)


# --------------------------------------------------------------------------------------------------
# The algorithm
# --------------------------------------------------------------------------------------------------
def main(args):
    run = Run(__file__, args)
    build_embedded(args, run.rank)
    if args.collects:
        zoo.build_zoo(args, run.rank)
    records, given, evals, oracle, cache = open_data(run)
    evals_here = evals[run.rank :: run.world]

    # Iteration k writes into its own folder; evaluate.py reads the seed from the folder's name. A
    # run that is resumed finds theta/ where DPO has ended, final/ where the iteration has.
    folder_of = lambda k: run.folder / f"iteration_{k}_s{args.seed}"
    start_of = lambda k: str(folder_of(k - 1) / "final") if k > 1 else args.model  # theta_{k-1}
    made = [[(folder_of(k) / part).exists() for part in ("theta", "final")]
            for k in range(1, args.iterations + 1)]
    processes.check_same(f"{run.folder}: its iterations", made)
    trained = sum(theta for theta, _ in made)
    run.first_step = trained * args.steps
    if run.checkpoint:
        run.first_step = max(run.first_step, int(run.checkpoint.name.split("-")[1]))
    resumed, log = run.checkpoint, run.start(args.iterations * args.steps)

    def evaluate(step, model, processor):
        """Every --eval_steps steps, before the step: greedy answers to held-out questions."""
        if evals and step % args.eval_steps == 0:
            sums = greedy(evals_here, model, processor, cache, args)[1]
            log.add("eval/accuracy", *sums["accuracy"])
            log.add("eval/len", *sums["len"])

    for k in range(1, args.iterations + 1):
        folder = folder_of(k)
        if (folder / "final").exists():
            continue

        pairs, pairs_of = given, k if args.fresh_pairs else 1  # the iteration whose pairs are used
        if pairs_of > 1 or not given:
            # 1. Sample   y_1..y_G ~ every model of the zoo, the policy among them [W Sec. 3.1; D1]
            sources = {zoo.name_of(s): start_of(pairs_of) if s == "policy" else s for s in args.zoo}
            chosen = questions_of(pairs_of, len(records), args)
            with processes.one_line_errors(ApiError, OSError):
                groups = zoo.collect_answers(run, folder_of(pairs_of), pairs_of, sources, records,
                                         chosen, sample)

                # 2. Score    every answer, by an oracle that sees the video         [W Sec. 3.1]
                cost = zoo.collect_scores(run, folder_of(pairs_of), groups, oracle, score)

            # 3. Pairs    (y_w, y_l): the best and the worst answer to a question [W Sec. 3.1; D2]
            found, dropped = make_pairs(groups, args.min_gap)
            pairs = cap_share(found, args.max_share) if len(sources) > 1 else found
            dropped["over --max_share"] = len(found) - len(pairs)
            if run.rank == 0 and pairs_of == k:
                lengths = {side: [len(ids_of(p, side, cache.processor)) for p in pairs]
                           for side in SIDES}
                write_preferences(folder / "preferences.json", pairs, "trl")
                zoo.write_card(folder, k, pairs, dropped, groups, lengths, cost)
        if len(pairs) < args.prompts_per_step:
            sys.exit(f"iteration {k}: {len(pairs)} pairs, fewer than --prompts_per_step "
                     f"{args.prompts_per_step}")
        if args.stage == "build":
            if run.rank == 0:
                print(f"pairs: {folder}/preferences.json; --stage all --resume makes the same and "
                      "trains on them; edited ones: --preferences, with a new --name")
            return

        # 4. DPO      from theta_{k-1}, against theta_{k-1}     [W Sec. 4.1; D Eq. 7; D4, D5]
        first_step = (k - 1) * args.steps
        last_step = first_step + args.steps
        resume_from = max(first_step, run.first_step)
        # where to continue: theta/ if it is trained, its checkpoint in its middle, else nowhere
        saved = folder / "theta" if k <= trained else resumed
        run.checkpoint = None if resume_from == first_step else saved
        torch.manual_seed(args.seed)  # LoRA's initialisation; every other draw has a key of its own
        with processes.one_line_errors(OSError):
            model, processor = run.load_policy(start_of(k))
            reference = run.reference_of(model, start_of(k))
        ddp = run.distribute(model)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
        if run.checkpoint and k > trained:
            run.resume(optimizer, model)
        logps_of = lambda m, batch: answer_logps(m, batch, processor, cache, args, run.device)
        tokens, most = row_tokens(pairs, processor, args), args.tokens_per_micro_batch

        for step in range(resume_from, last_step):
            evaluate(step, model, processor)
            log.mark()
            lr = lr_at(step - first_step, args.steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            asked = question_indices(len(pairs), step, args)[run.rank :: run.world]
            mine, micros = [pairs[i] for i in asked], micro_batches(tokens[asked], most)
            for i, rows in enumerate(micros):
                micro = [mine[j] for j in rows]  # of like length
                with torch.no_grad(), reference() as ref:
                    ref_logps, _ = logps_of(ref, micro)  # (B,2)
                with processes.no_sync(ddp, when=i < len(micros) - 1):
                    logps, lengths = logps_of(ddp, micro)  # (B,2), (B,2)
                    loss, rewards = dpo_loss(logps, ref_logps, args.beta)  # (B,), (B,2)
                    # DDP averages over processes; * world undoes it
                    (loss.sum() / args.prompts_per_step * run.world).backward()
                log_pairs(log, loss, rewards, logps, lengths)
            grad_norm = processes.clip_gradients(params)  # to norm 1; what it was before
            run.check_finite(step, grad_norm, [p["question"] for p in mine],
                             [[p[side] for side in SIDES] for p in mine])
            optimizer.step()
            optimizer.zero_grad()
            log.add("policy/grad_norm", grad_norm)
            log.add("charts/lr", lr)
            log.add("charts/iteration", k)
            log.mark("update")
            log.step(step, show=["losses/dpo", "rewards/accuracies", "rewards/margins",
                                 "eval/accuracy", "eval/len"])
            run.save(step + 1, model, processor, optimizer, steps=last_step)
        if run.rank == 0 and k > trained:
            save_checkpoint(folder, "theta", model, processor)

        # 5. Extrapolate   theta_k + alpha (theta_k - theta_{k-1}); [W Sec. 4.2; E; D3]
        line, curve, answers = line_of(model, reference), [], []
        for alpha in args.alphas:
            go_to(line, alpha)
            texts, sums = greedy(evals_here, model, processor, cache, args)
            some = range(min(192, len(pairs)))[run.rank :: run.world]
            micros = [[pairs[some[i]] for i in rows] for rows in batches(tokens[some], most)]
            sums |= rewards_on(micros, logps_of, model, reference, args)
            answers.append(texts)
            curve.append({"alpha": alpha} | processes.all_means(sums))
        with processes.one_line_errors(ApiError):
            scores = oracle_scores(oracle, evals_here, answers)
        for row, sums in zip(curve, scores):
            row |= processes.all_means({"score": sums})
        if len(args.alphas) > 1 and "score" not in curve[0]:
            sys.exit(f"iteration {k}: the oracle scored none of {len(evals)} held-out questions, "
                     f"which choose alpha; when it can again: {processes.resume_command()}")
        alpha = choose_alpha(args.alphas, [row.get("score", 0.0) for row in curve])
        go_to(line, alpha)

        # 6. The result is the next start and the next reference               [W Sec. 4.1; D4]
        if run.rank == 0:
            zoo.write_curve(folder, k, alpha, curve)
        if k == args.iterations:
            run.finish(model, processor)
        elif run.rank == 0:
            run.write_final(folder, model, processor)
        processes.barrier()


# --------------------------------------------------------------------------------------------------
# Steps 1 and 2: answers and scores
# --------------------------------------------------------------------------------------------------
def sample(model, processor, cache, records, keys, args):
    """y_1..y_G ~ pi(. | video, question), one prefill per question. -> [[(answer, ended), ..], ..]

    keys: one sequence of integers per record, which decides its draws.
    """
    device, eos = next(model.parameters()).device, processor.tokenizer.eos_token_id
    prefix = Prefix.build(processor, cache, [r["question"] for r in records],
                          [r["clip"] for r in records], device, args.max_prompt_tokens)
    shape = args.samples, args.max_new_tokens
    uniforms = np.stack([np.random.default_rng(key).random(shape) for key in keys])  # (B,G,T)
    tokens, lengths, _ = generate(model, prefix, torch.from_numpy(uniforms), eos, args.temperature)
    ended = (tokens.gather(-1, lengths.unsqueeze(-1) - 1) == eos).squeeze(-1).tolist()  # (B,G)
    return [list(zip(*group)) for group in zip(processor.decode_answers(tokens, lengths), ended)]


def score(oracle, clips, questions, answers):
    """[W Sec. 3.1; D2] Points 0-5 of every answer on the four aspects: [B][G] lists of 4 numbers.

    0 for an empty answer, so that it can lose and never win; None where an answer is missing or the
    oracle could not score the group.
    """
    # a copy costs the oracle nothing
    stand_in = [next((a for a in group if a), "") for group in answers]
    filled = [[a or s for a in group] for group, s in zip(answers, stand_in)]
    aspects, ok = oracle.aspects(clips, questions, filled)  # (B,G,4), (B,)

    def points(b, g, answer):
        if answer is None or not ok[b]:
            return None
        return [round(x, 4) for x in aspects[b, g].tolist()] if answer else [0.0] * len(ASPECTS)

    return [[points(b, g, a) for g, a in enumerate(group)] for b, group in enumerate(answers)]


def questions_of(k, count, args):
    """The questions of iteration k, indices: the next --questions of a permutation keyed by the
    seed, which starts again after its end."""
    order = np.random.default_rng([args.seed, 0]).permutation(count).tolist()
    n = min(args.questions, count)
    return [order[i % count] for i in range((k - 1) * n, k * n)]


# --------------------------------------------------------------------------------------------------
# Steps 4 and 5: log-probabilities of pairs, the line through two models
# --------------------------------------------------------------------------------------------------
def row_tokens(pairs, processor, args):
    """Tokens of each pair's packed row, (B,): prompt and both answers."""
    prompt = lambda p: processor.prompt_ids(p["question"], True, args.max_prompt_tokens)
    answer = lambda p, side: ids_of(p, side, processor, args.max_new_tokens)
    return torch.tensor([len(prompt(p)) + sum(len(answer(p, s)) for s in SIDES) for p in pairs])


def answer_logps(model, pairs, processor, cache, args, device):
    """log pi of both answers of B pairs, packed after one prefix -> logps (B,2), lengths (B,2)."""
    prefix = Prefix.build(processor, cache, [p["question"] for p in pairs],
                          [p["clip"] for p in pairs], device, args.max_prompt_tokens)
    ids = [ids_of(p, side, processor, args.max_new_tokens) for p in pairs for side in SIDES]
    tokens = processor.pad(ids, "right")[0].view(len(pairs), 2, -1).to(device)  # (B,2,T)
    lengths = torch.tensor([len(i) for i in ids]).view(-1, 2).to(device)
    return token_logprobs(model, prefix, tokens, lengths)[0].sum(-1).view(-1, 2), lengths


def ids_of(pair, side, processor, max_length=None):
    """An answer's ids, with EOS where it ended, as it did where a file does not say."""
    ids, ended = processor.answer_ids(pair[side], max_length), pair.get("ended", {}).get(side, True)
    return ids if ended or ids[-1] != processor.tokenizer.eos_token_id else ids[:-1]


def line_of(model, reference):
    """The line through theta_{k-1} and theta_k: [(parameter, its theta, its theta_ref)].

    [D5] With LoRA W = W_{k-1} + s B A. A is held and B goes from 0 to B_k, so the merged weights go
    exactly to W_k.
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
def rewards_on(micros, logps_of, model, reference, args):
    """What DPO logs, on fixed pairs, for the model as it is now -> {key: (sum, count)}."""
    out = Counter()
    for micro in micros:
        with reference() as ref:
            ref_logps, _ = logps_of(ref, micro)
        logps, _ = logps_of(model, micro)
        for key, value in pair_metrics(*dpo_loss(logps, ref_logps, args.beta), logps).items():
            out[key] += float(value.sum())
    return {key: (total, sum(map(len, micros))) for key, total in out.items()}


def greedy(records, model, processor, cache, args):
    """Greedy answers, and {"accuracy", "len"}: (sum, count). Without a label there is no
    accuracy."""
    texts = video_llm.answer(model, processor, cache, records, args.max_new_tokens)
    right = [is_correct(t, r["answer"]) for t, r in zip(texts, records) if r["answer"] is not None]
    return texts, {"accuracy": (sum(right), len(right)),
                   "len": (sum(len(processor.answer_ids(t)) for t in texts), len(texts))}


def oracle_scores(oracle, records, answers):
    """answers: the texts to `records`, per alpha -> (sum of scores 0-5, count) for each alpha."""
    if not records:
        return [(0.0, 0)] * len(answers)
    groups = score(oracle, [r["clip"] for r in records], [r["question"] for r in records],
                   [list(group) for group in zip(*answers)])
    scored = [g for g in groups if None not in g]  # else the question counts for no alpha
    return [(sum(sum(g[a]) / len(g[a]) for g in scored), len(scored)) for a in range(len(answers))]


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
def open_data(run):
    """-> records to ask about, given pairs, held-out records, oracle, cache of features."""
    args, given, records, report = run.args, [], [], {}
    with processes.one_line_errors(DataError, OSError):
        if args.preferences:
            given, read = read_preferences(args.preferences.split(","), args.video_root or None)
        if args.collects:
            records, report = read_questions(run, answers=True)  # zoo.write_card compares
        # the cache keeps only CLIP: decoder and Q-Former go
        model, processor = run.load(args.model)
        cache = FeatureCache(unwrap(model), processor, args.cache)
        del model
    if args.preferences:
        if run.rank == 0:
            print("\n".join(report_lines(read)))
        given = zoo.usable_pairs(run, given, cache, ids_of)
    if args.collects:
        records, evals = choose_questions(run, records, report, cache)
    else:
        evals = held_out_questions(run, cache)
    with processes.one_line_errors(DataError, OSError):
        oracle = make_oracle(args, records + evals, str(run.device))
    return records, given, evals, oracle, cache


# --------------------------------------------------------------------------------------------------
# What is logged
# --------------------------------------------------------------------------------------------------
def pair_metrics(loss, rewards, logps):
    """loss (B,), rewards (B,2), logps (B,2) -> {key: (B,)}, keys as TRL's users know them."""
    margins = rewards[:, 0] - rewards[:, 1]
    values = (loss, rewards[:, 0], rewards[:, 1], (margins > 0).float(), margins, logps[:, 0],
              logps[:, 1])
    return dict(zip(PAIR_METRICS, values))


@torch.no_grad()
def log_pairs(log, loss, rewards, logps, lengths):
    values = pair_metrics(loss, rewards, logps)
    for key in PAIR_METRICS:
        log.add(f"{key}", values[key].sum(), len(loss))
    log.add("length/chosen", lengths[:, 0].sum(), len(loss))
    log.add("length/rejected", lengths[:, 1].sum(), len(loss))


if __name__ == "__main__":
    main(parse_args(Args))
