"""GRPO_rank: learn from an oracle's *ranking* of G answers to one (video, question).

Run      torchrun --nproc_per_node=4 grpo_rank.py --G 5            the embedded world; builds what is missing
         python grpo_rank.py --G 5                                 the same on one process
         python grpo_rank.py --oracle reference --name upper       a perfect oracle: the upper bound, not RLAIF
         python grpo_rank.py --oracle api --api_url URL --api_model NAME --name served        a server is the oracle
         python grpo_rank.py --advantage published --name printed  as [OR]'s public summaries give it (D1)
Papers   [OR] Oracle-RLAIF, arXiv:2510.02561      [G] GRPO: DeepSeekMath, arXiv:2402.03300
Claim    with few labels, an oracle's order of the policy's own answers to *unlabelled* videos improves the policy; the
         measured gains, controls and seeds stand in docs/grpo_rank.md.

Differs  D1  the advantage. [OR] ranks the answers twice, by the oracle (t) and by the policy's own log-probability (p),
             and rewards the answers on which both agree. That is agreement, not quality: a bad answer that the policy
             already ranks last has penalty 0 and is pushed *up*; the best answer, if the policy finds it unlikely, has
             the largest penalty and is pushed *down*. `--advantage published` does what [OR]'s public summaries
             give (divided by the deviation it loses accuracy; undivided: not measured over seeds). The default,
             `oracle_rank`, does not use p: delta_i = delta(0 -> t_i) = 1 - g(t_i), what it would cost to show the best
             answer at place t_i, where answer i belongs. `signed` keeps [OR]'s penalty and takes the direction from
             p - t. All three are zero-sum, with the same penalty function.
         D2  the penalty's closed form. [OR] as available to us prints no formula, only two values, delta(0->4) = 0.4830
             and delta(4->3) = 0.0243, and three properties (zero-sum, bounded, top-heavy). `penalty` is the simplest
             form found that meets both values and all three; the form in second-hand notes, 1 - DCG(p)/DCG(t), gives
             0.9226 and -0.3916 and is unbounded below.
         D3  the advantage is divided by the group's standard deviation (--scale_advantages), as in [G]. [OR] does not,
             and `published` and `signed` are not either unless the flag says so.
         D4  ties: equal answers get equal ranks, tied ranks share the mean of the gains of the places they occupy. A
             group whose answers are all tied has advantage 0; it is counted (rank/tied_groups), its KL still acts.
         D5  the mean is over the tokens of the *global* batch; [G] means over each answer first, which lets the
             length of an answer change the weight of its tokens.
         D6  the KL to the SFT start is in the loss (as in [G]), estimated by k3 = r - 1 - log r with r = pi_ref/pi:
             never negative, low variance; on-policy its gradient is that of KL(pi_ref || pi). k1 as a *loss* would
             have zero expected gradient.
         D7  unpublished in [OR]: learning rate, beta, clip range, entropy coefficient, temperature. Ours are tuned on
             the embedded world; the published ones are G = 5, batch 64, 4 epochs (we read: passes over the
             questions), QLoRA r = 64, alpha = 16: --preset paper; 50 frames, 32 queries: a start made that way.
         D8  an answer cut at --max_new_tokens is ranked as it stands; no EOS enters its loss.

Oracle       --oracle (oracle.py) scores answers, comparable within a group alone; the default is a local judge that
             compares two by two and has read a narrative of the video. Ranks are made of the scores.
Masked       a group the oracle could not rank (no usable reply of a server after all retries, a video that it cannot
             read, no label for `reference`): no advantage, no KL, no entropy, no tokens in the mean. Nothing ranked in
             a step: no update; in three in a row: the run ends, as it does where a server refuses key or address.
Left out     before step 0: videos that cannot be decoded (broken_videos.json), clips whose labels SFT saw, requests for
             descriptions (questions.py).
Gradient     flows through the log-probabilities and the entropy of step 4 alone; tokens, ranks, A, pi_old, pi_ref are
             constants.

symbol        name          shape    meaning                                                       made in
B             len(mine)     ()       questions of this process in a step                           step 1
G             args.G        ()       answers per question                                          --G
o_{i,t}       tokens        (B,G,T)  sampled answers; n = G * questions of a micro-batch           step 1
m_{i,t}       mask          (n,T)    1 on answer tokens *including EOS*, 0 in masked groups        step 4
t_i           oracle_ranks  (B,G)    the oracle's rank, 0 = best, ties share the better place      step 2
p_i           policy_ranks  (B,G)    rank by the policy's summed log-probability of the answer     step 3
g(r)          gain          (B,G)    log2(2+r)/(1+r): 1, .7925, .6667, .5805, .5170                step 3
delta_i       delta         (B,G)    rank penalty in [0,1): delta(0 -> t_i), or delta(t_i -> p_i)  step 3
A_i           advantages    (B,G)    mean_j delta_j - delta_i (D1), over the group's deviation (D3)  step 3
rho_{i,t}     ratio         (n,T)    pi / pi_old                                                   step 4
"""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from flags import (
    WORLD,
    OracleArgs,
    RolloutArgs,
    ShardArgs,
    above_zero,
    answer_help,
    at_least,
    check_start,
    check_training,
    parse_args,
)

ADVANTAGES = ("oracle_rank", "published", "signed", "score", "random")


@dataclass
class Args(OracleArgs, RolloutArgs, ShardArgs):  # the last groups: flags.py
    PRESETS = {"paper": dict(  # [OR]; lr, answer length and memory are ours (D7); no annotation: this is not a flag
        G=5, prompts_per_step=64, epochs=4, lora_r=64, lora_alpha=16, quantize="nf4", dtype="bfloat16",
        oracle_dtype="bfloat16", oracle_tokens=4096, gradient_checkpointing=True,
        tokens_per_micro_batch=1500, lr=3e-5, max_new_tokens=128)}
    # -- algorithm
    preset: str = HfArg(default="", help="paper: the published G, batch, epochs and QLoRA, with rates, lengths and "
                        "precision of ours (D7); other flags still win")
    G: int = HfArg(default=5, help="answers per question [OR: 5]")
    advantage: str = HfArg(default="oracle_rank", help="oracle_rank | published | signed (D1) | score: GRPO on the "
                           "oracle's scores [G] | random: control, a random order of all groups that are not masked")
    scale_advantages: bool | None = HfArg(default=None, help="divide by the group's standard deviation (D3); not "
                                          "given: yes, but not for published and signed, as [OR] does not")
    clip_range: float = HfArg(default=0.2, help="epsilon of the clipped surrogate [G Eq. 3]; acts from the second of "
                              "--inner_epochs on, as pi is pi_old in the first")
    beta: float = HfArg(default=0.03, help="weight of the KL to the SFT start, k3 in the loss (D6)")
    entropy_coef: float = HfArg(default=0.0, help="weight of the entropy bonus")
    inner_epochs: int = HfArg(default=1, help="optimizer steps per batch of answers; the second and later ones clip")
    lora_r: int = HfArg(default=0, help="LoRA rank on the decoder [OR: 64]; 0 trains all weights but CLIP's")
    lora_alpha: int = HfArg(default=16, help="LoRA alpha [OR: 16]")
    quantize: str = HfArg(default="none", help="none, or nf4: QLoRA, needs --lora_r")
    # -- budget [D7]
    steps: int = HfArg(default=150, help="rollout steps")
    epochs: int = HfArg(default=0, help="passes over the questions in place of --steps [OR: 4]; 0: --steps")
    prompts_per_step: int = HfArg(default=48, help="questions per step, over all processes [OR: 64]")
    tokens_per_micro_batch: int = HfArg(default=2048, help="tokens per forward pass and process, prompts and padding "
                                        "included; a group is never split")
    lr: float = HfArg(default=3e-4, help="learning rate: up in 10 steps, down to zero in all, the smaller of the two")
    max_new_tokens: int = HfArg(default=16, help="longest answer, EOS included (D8)")
    temperature: float = HfArg(default=1.0, help="sampling temperature, the same in every log-probability")
    # -- data and models
    data: str = HfArg(default=f"{WORLD}/train.json", help="videos and questions; answers: --oracle reference only")
    video_root: str = HfArg(default="", help="where the videos are; empty: beside the annotation file")
    eval_data: str = HfArg(default=f"{WORLD}/val.json", help="held-out questions for the learning curve; empty: none")
    eval_questions: int = HfArg(default=500, help="how many of them")
    eval_steps: int = HfArg(default=25, help="steps between evaluations")
    model: str = HfArg(default="", help="the SFT start; empty: runs/sft/policy_s<seed>/final, built if missing")
    # -- plumbing
    name: str = HfArg(default="context", help="run name: runs/grpo_rank/<name>_s<seed>")
    seed: int = HfArg(default=0, help="order of the questions and all sampled answers")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features and narratives")
    save_steps: int = HfArg(default=50, help="steps between checkpoints")
    resume: bool = HfArg(default=False, help="continue the run of this name where it stopped")

    def __post_init__(self):
        super().__post_init__()
        if self.preset not in ("", "paper"):
            raise ValueError(f"--preset {self.preset}: choose paper or nothing")
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"--advantage {self.advantage}: choose one of {', '.join(ADVANTAGES)}")
        at_least(self, G=2, steps=1, prompts_per_step=1, tokens_per_micro_batch=1, inner_epochs=1,
                 max_new_tokens=1, eval_steps=1, save_steps=1, beta=0, entropy_coef=0, lora_r=0,
                 eval_questions=0, epochs=0)
        self.check_rollouts()
        check_training(self, batch="prompts_per_step")
        above_zero(self, "clip_range", "temperature", "lr")
        if self.clip_range >= 1:
            raise ValueError(f"--clip_range {self.clip_range}: must be below 1")
        if self.epochs and self.steps != type(self).steps:
            raise ValueError("--steps and --epochs: give one of them (--preset paper sets 4 epochs: add --epochs 0)")
        if self.scale_advantages is None:
            self.scale_advantages = self.advantage not in ("published", "signed")
        self.model = self.model or sft_start(self.seed)
        check_start(self, "model")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch

import harness
from api_oracle import ApiError
from data import DataError, FeatureCache, read_records
from oracle import log_counts, make_oracle, ranks_of
from questions import build_embedded, choose_questions, count_correct, question_indices, sft_start, times_before
from ranks import differ, random_scores
from rollouts import micro_batches, unpacked
from video_llm import Prefix, add_lora, answer_mask, generate, load_model, reference_of, token_logprobs, unwrap


# ---------------------------------------------------------------------------------------------------------------
# Equations: tensors in, tensors out
# ---------------------------------------------------------------------------------------------------------------
def gain(ranks):
    """[D2, D4] g(r) = log2(2+r)/(1+r), and the place r itself, both averaged over the places that tied answers occupy.

    ranks (B,G) long, 0 = best, tied answers share the better place -> gain (B,G), place (B,G).
    """
    G = ranks.shape[-1]
    r = torch.arange(G, dtype=torch.float64)
    g = torch.log2(2 + r) / (1 + r)  # (G,)
    tied = ranks.unsqueeze(-1) == ranks.unsqueeze(-2)  # (B,G,G)
    occupied = torch.arange(G) - ranks.unsqueeze(-1)  # (B,G,G) >= 0 from the first place of the tie on
    occupied = (occupied >= 0) & (occupied < tied.sum(-1, keepdim=True))
    mean = lambda x: (occupied * x).sum(-1) / occupied.sum(-1)
    return mean(g), mean(r)


def penalty(true_ranks, shown_ranks):
    """[D2] delta = |g(t) - g(p)| / (1 + ln(1 + t)): what it costs to show at place p what belongs at place t.

    delta(0->4) = 0.4830, delta(4->3) = 0.0243 as printed in [OR]; 0 only where the ranks agree; below 1; errors at the
    top cost most. (B,G), (B,G) -> (B,G).
    """
    g_true, place = gain(true_ranks)
    g_shown, _ = gain(shown_ranks)
    return (g_true - g_shown).abs() / (1 + torch.log1p(place))


def rank_advantages(kind, oracle_ranks, policy_ranks):
    """[OR; D1] Zero-sum advantages (B,G) of a group's answers from two rankings of them, (B,G) each."""
    if kind == "oracle_rank":  # delta(0 -> t) = 1 - g(t): the best answer shown at place t, where this one belongs
        delta = 1 - gain(oracle_ranks)[0]
        A = delta.mean(-1, keepdim=True) - delta
    elif kind == "published":  # what policy and oracle agree on is pushed up, good or bad
        delta = penalty(oracle_ranks, policy_ranks)
        A = delta.mean(-1, keepdim=True) - delta
    elif kind == "signed":  # underrated answers (p > t) up, overrated ones down
        s = torch.sign(gain(policy_ranks)[1] - gain(oracle_ranks)[1]) * penalty(oracle_ranks, policy_ranks)
        A = s - s.mean(-1, keepdim=True)
    all_tied = (oracle_ranks == oracle_ranks[:, :1]).all(-1, keepdim=True)
    return torch.where(all_tied, 0.0, A)  # [D4] an oracle without preference gives no direction


def scale_by_std(A):
    """[D3; G Sec. 4.1.2] Zero-mean advantages (B,G) over the group's standard deviation; all-zero groups stay so."""
    std = A.square().mean(-1, keepdim=True).sqrt()
    return torch.where(std > 1e-8, A / std.clamp(min=1e-8), 0.0)


def clipped_surrogate(logprobs, old_logprobs, advantages, clip_range):
    """[G Eq. 3] J = min(rho A, clip(rho, 1-eps, 1+eps) A) per token, to be maximised. (n,T) (n,T) (n,) () -> (n,T)."""
    ratio = (logprobs - old_logprobs).exp()
    A = advantages.unsqueeze(1)  # (n,1) constant over an answer's tokens
    return torch.minimum(ratio * A, ratio.clamp(1 - clip_range, 1 + clip_range) * A)  # min for both signs of A


def kl_k3(logprobs, ref_logprobs):
    """[D6; G Eq. 4] KL estimate per token, k3 = r - 1 - log r with r = pi_ref/pi >= 0. (n,T), (n,T) -> (n,T)."""
    log_r = ref_logprobs - logprobs
    return log_r.exp() - 1 - log_r


def lr_at(step, args):
    return args.lr * min((step + 1) / 10, (args.steps - step) / args.steps)


# ---------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------
def main(args):
    rank, world, device = harness.setup_dist()
    build_embedded(args, rank)
    folder = f"runs/grpo_rank/{args.name}_s{args.seed}"
    checkpoint = harness.open_run(folder, args, rank)

    torch.manual_seed(args.seed)  # the initialisation of LoRA; every other draw has a key of its own
    with harness.one_line_errors(DataError, OSError):
        needed = "reference" in args.raters  # labels
        records, report = read_records(args.data.split(","), args.video_root or None, labelled=needed)
        load = lambda path: load_model(path, **harness.load_options(args, device))
        model, processor = load(checkpoint or args.model)
        if args.lora_r and not checkpoint:
            model = add_lora(model, args.lora_r, args.lora_alpha)
        # the reference: LoRA: the same weights with the adapter off; else a frozen copy of the SFT start
        same = args.lora_r or not checkpoint
        place = lambda frozen: harness.shard(frozen, device) if args.shard else frozen
        reference = reference_of(model if same else load(args.model)[0], place)
    ddp = harness.distribute(model, device, args.shard)
    eos = processor.tokenizer.eos_token_id
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    start = harness.load_trainer(checkpoint, optimizer, model) if checkpoint else 0

    cache = FeatureCache(unwrap(model), processor, args.cache)
    records, evals = choose_questions(args, records, report, cache, folder, rank, world)
    with harness.one_line_errors(DataError, OSError):
        oracle = make_oracle(args, records, str(device))
    if "reference" not in args.raters:
        records = [{**r, "answer": None} for r in records]  # RL sees videos and questions only
    if args.epochs:
        args.steps = math.ceil(args.epochs * len(records) / args.prompts_per_step)
    if args.shard:  # the same number of forward passes everywhere
        evals = evals[: len(evals) // world * world]
    if args.preset and rank == 0 and (processor.num_frames, processor.num_query_tokens) != (50, 32):
        print(f"--preset paper: {args.model} reads {processor.num_frames} frames with {processor.num_query_tokens} "
              "queries, [OR] 50 with 32; sft.py --preset paper makes such a start")
    log = harness.Log(folder, args.steps, start, rank)

    for step in range(start, args.steps + 1):
        if evals and (step % args.eval_steps == 0 or step == args.steps):
            log.add("eval/accuracy", *count_correct(evals[rank::world], model, processor, cache))
            if step == args.steps:
                log.step(step, show=["eval/accuracy"])
        if step == args.steps:
            break
        clock = [time.time()]
        indices = question_indices(len(records), step, args)
        mine, again = indices[rank::world], times_before(indices)[rank::world]  # B of this process
        batch = [records[i] for i in mine]
        clips, questions = [r["clip"] for r in batch], [r["question"] for r in batch]

        # 1. Rollout: o_1..o_G ~ pi_old(. | video, question), one prefill per group              [G Alg. 1, line 7]
        #    A draw is keyed by (seed, step, question, how often it came in this step before): world size and
        #    interruptions do not change it.
        prefix = Prefix.build(processor, cache, questions, clips, device)
        draw = lambda i, n: np.random.default_rng([args.seed, step, i, n]).random((args.G, args.max_new_tokens))
        uniforms = np.stack([draw(i, n) for i, n in zip(mine, again)])  # (B,G,T)
        with unpacked(model) if args.quantize == "nf4" and args.unpack_nf4 else nullcontext():
            tokens, lengths, sampled_logprobs = generate(model, prefix, torch.from_numpy(uniforms), eos,
                                                         args.temperature, args.cuda_graphs)
        answers = processor.decode_answers(tokens, lengths)
        clock.append(time.time())

        # 2. Feedback: the oracle orders each group; groups it cannot rank are counted and masked, not dropped,
        #    so that every process runs the same number of micro-batches                            [OR Fig. 1]
        with harness.one_line_errors(ApiError):
            scores, ok = oracle.score(clips, questions, answers)  # (B,G), (B,)
        if args.advantage == "random":
            scores = random_scores(answers, [f"{i} {n}" if n else i for i, n in zip(mine, again)], step, args.seed)
        oracle_ranks = ranks_of(scores)
        clock.append(time.time())

        # 3. Advantage                                                                                 [OR; D1-D4]
        #    In micro-batches of groups of like length. The log-probabilities of the loss come from `token_logprobs`;
        #    those noted while sampling, summed over an answer, serve the policy's ranks alone.
        micros = micro_batches(prefix.attention_mask.sum(-1) + lengths.sum(-1), args.tokens_per_micro_batch)

        def logprobs_of(m, i):  # -> (n,T), (n,T): log-probability and entropy of every answer token, n = len(i)*G
            T = lengths[i].max()
            return token_logprobs(m, prefix.rows(i), tokens[i, :, :T], lengths[i], args.temperature)

        with torch.no_grad(), reference() as ref:
            ref_logprobs = [logprobs_of(ref, i)[0] for i in micros]
        copy_of = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).all(-1).int().argmax(-1)  # (B,G) behind EOS: EOS
        policy_ranks = ranks_of(sampled_logprobs.gather(1, copy_of)).cpu()  # D4: rounding must not order copies
        if args.advantage == "score":
            advantages = scores.double() - scores.double().mean(-1, keepdim=True)
        else:
            kind = "oracle_rank" if args.advantage == "random" else args.advantage
            advantages = rank_advantages(kind, oracle_ranks, policy_ranks)
        if args.scale_advantages:
            advantages = scale_by_std(advantages)
        # (B,G), 0 where the oracle gave no order
        advantages = advantages.masked_fill(~ok.unsqueeze(-1), 0).float().to(device)
        n_tokens = harness.all_sum((lengths * ok.to(device).unsqueeze(-1)).sum().double()).clamp(min=1)  # D5: global
        learns = harness.any_scored(log, ok, differ(answers), step)

        # 4. Update: `inner_epochs` steps on J - beta KL + c H                                     [G Eq. 3; D5, D6]
        for g in optimizer.param_groups:
            g["lr"] = lr_at(step, args)
        old_logprobs = []
        for epoch in range(args.inner_epochs):
            for k, i in enumerate(micros):
                with harness.no_sync(ddp, when=k < len(micros) - 1):
                    logprobs, entropy = logprobs_of(ddp, i)  # (n,T)
                    if epoch == 0:  # the first epoch is on-policy: pi_old is pi, no pass of its own is needed
                        old_logprobs.append(logprobs.detach())
                    mask = answer_mask(lengths[i], logprobs.shape[-1])  # (n,T)
                    mask *= ok.to(device)[i].repeat_interleave(args.G)[:, None]
                    A = advantages[i].view(-1)  # (n,)
                    J = clipped_surrogate(logprobs, old_logprobs[k], A, args.clip_range)
                    kl = kl_k3(logprobs, ref_logprobs[k])
                    loss = (-J + args.beta * kl - args.entropy_coef * entropy) * mask
                    (loss.sum() / n_tokens * world).backward()  # DDP averages over processes; * world undoes it
                log_update(log, logprobs, old_logprobs[k], J, kl, entropy, A, mask, args)
            grad_norm = harness.clip_gradients(params)  # to norm 1; what it was before
            asked = [{"question": str(q), "answers": a} for q, a in zip(questions, answers)]
            harness.stop_if_not_finite(grad_norm, log, folder, step, asked)
            if learns:
                optimizer.step()
            optimizer.zero_grad()
            log.add("policy/grad_norm", grad_norm)
        clock.append(time.time())

        # 5. Log, save
        log_groups(log, answers, lengths, oracle_ranks, policy_ranks, scores, ok, tokens, eos)
        for key, a, b in zip(("rollout", "oracle", "update"), clock, clock[1:]):
            log.add(f"time/{key}_s", b - a)
        log_counts(log, oracle)
        log.add("charts/lr", lr_at(step, args))
        log.step(step, show=["eval/accuracy", "objective/kl", "policy/entropy", "rank/tied_groups", "rollout/len"])
        if rank == 0 and step % 25 == 0:
            write_samples(folder, step, batch, answers, oracle_ranks, advantages)
        harness.checkpoint(log, folder, step + 1, args.steps, args.save_steps, model, processor, optimizer)
    harness.finish(folder, model, processor, rank)


# ---------------------------------------------------------------------------------------------------------------
# Plumbing
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def log_update(log, logprobs, old_logprobs, J, kl, entropy, advantages, mask, args):
    n, log_ratio, A = mask.sum(), (logprobs - old_logprobs) * mask, advantages.unsqueeze(1)
    ratio = log_ratio.exp()
    log.add("losses/policy_loss", -(J * mask).sum(), n)
    log.add("losses/kl_loss", args.beta * (kl * mask).sum(), n)
    log.add("objective/kl", (kl * mask).sum(), n)
    log.add("policy/entropy", (entropy * mask).sum(), n)
    log.add("policy/approx_kl", ((ratio - 1 - log_ratio) * mask).sum(), n)
    log.add("policy/ratio", (ratio * mask).sum(), n)
    log.add("policy/clipfrac_low", ((ratio < 1 - args.clip_range) & (A < 0)).float().mul(mask).sum(), n)
    log.add("policy/clipfrac_high", ((ratio > 1 + args.clip_range) & (A > 0)).float().mul(mask).sum(), n)


def log_groups(log, answers, lengths, oracle_ranks, policy_ranks, scores, ok, tokens, eos):
    B, G = oracle_ranks.shape
    ended = tokens.cpu().gather(-1, (lengths.cpu() - 1).unsqueeze(-1)).squeeze(-1) == eos
    tied = (oracle_ranks == oracle_ranks[:, :1]).all(-1)
    before = lambda ranks: ranks.unsqueeze(-1) < ranks.unsqueeze(-2)  # (B,G,G)
    concordant = before(oracle_ranks) & before(policy_ranks)
    discordant = before(oracle_ranks) & before(policy_ranks).transpose(1, 2)
    log.add("objective/score", (scores * ok.unsqueeze(-1)).sum(), ok.sum() * G)
    log.add("rollout/len", lengths.sum(), B * G)
    log.add("rollout/eos_rate", ended.sum(), B * G)
    log.add("rank/distinct_answers", sum(len(set(g)) for g in answers), B)
    log.add("rank/tied_groups", (tied & ok).sum(), B)
    log.add("rank/masked_groups", (~ok).sum(), B)
    log.add("rank/policy_agrees", concordant.sum(), concordant.sum() + discordant.sum())


def write_samples(folder, step, batch, answers, ranks, advantages):
    with open(Path(folder, "samples.jsonl"), "a") as f:
        for r, group, order, A in list(zip(batch, answers, ranks.tolist(), advantages.tolist()))[:3]:
            row = dict(step=step, video=str(r["clip"].path), question=r["question"], answers=group, ranks=order,
                       advantages=[round(a, 3) for a in A])
            f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(parse_args(Args))
