"""GRPO_rank: learn from an oracle's *ranking* of G answers to one (video, question).

Run     torchrun --nproc_per_node=4 grpo_rank.py --G 5    the embedded world; builds what is missing
        python grpo_rank.py --G 5                         the same on one process
        python grpo_rank.py --oracle reference            a perfect oracle: upper bound, not RLAIF
        python grpo_rank.py --oracle api --api_url URL --api_model NAME      a server as the oracle
        python grpo_rank.py --advantage published --name pub     as [OR]'s summaries give it (D1)
Papers  [OR] Oracle-RLAIF, arXiv:2510.02561      [G] GRPO: DeepSeekMath, arXiv:2402.03300
Claim   With few labels, an oracle's order of the policy's own answers to *unlabelled* videos
        improves the policy (docs/grpo_rank.md).

The algorithm, one step:
  1. The policy samples G answers to each of B questions about unlabelled videos.
  2. The oracle ranks each group. A group that it cannot rank is masked.
  3. Ranks become advantages. An answer pays an nDCG penalty: 0 for the oracle's best, more for each
     place below, most near the top. Its advantage is the group's mean penalty minus its own.
  4. The policy takes a clipped policy-gradient step, held to its start by a KL term.
  5. The step is logged; every --save_steps steps a checkpoint is written.
  6. Every --eval_steps steps held-out questions are answered greedily.

Differs D1  The advantage. [OR], by its summaries, ranks the answers twice, by the oracle (t) and by
            the policy's log-probability (p): it rewards agreement (docs/published_advantage.md).
            `published` does what these public summaries give. The default, `oracle_rank`, uses t
            only: delta_i = delta(0 -> t_i) = 1 - g(t_i). `signed`: [OR]'s penalty, direction p - t.
        D2  The penalty's closed form. Our sources print delta(0->4) = 0.4830, delta(4->3) = 0.0243
            and three properties (zero-sum, bounded, top-heavy), no formula. `penalty` is the
            simplest form we found that has them all (others: docs/published_advantage.md).
        D3  The advantage is divided by the group's standard deviation (--scale_advantages), as in
            [G]. [OR] does not divide; neither do `published` and `signed` unless the flag says so.
        D4  Ties. Equal answers get equal ranks; tied answers share the mean gain of their places. A
            group that is tied as a whole has advantage 0; its KL still acts.
        D5  The mean is over the tokens of the *global* batch. [G] means over each answer first.
        D6  The KL to the start is in the loss, as in [G], estimated by k3 = r - 1 - log r with r =
            pi_ref/pi: never negative, low variance. On-policy its gradient is KL(pi_ref || pi)'s.
        D7  Ours, tuned on the embedded world: learning rate, beta, clip range, entropy coefficient,
            temperature. Published: G = 5, batch 64, 4 epochs (we read: passes over the questions),
            QLoRA r = 64, alpha = 16 (--preset paper); 50 frames, 32 queries (of the SFT start).
        D8  An answer cut at --max_new_tokens is ranked as it stands; no EOS enters its loss.

Masked    A group without a ranking (no reply, unreadable video, no label) counts nowhere. A step
          without any ranking: no update. Three such steps in a row end the run.
Left out  Unreadable videos, clips whose labels SFT saw, requests for descriptions.

symbol     name          shape    example             meaning
o_{i,t}    tokens        (B,G,T)  [[5, 9, 2], ...]    sampled answers; after EOS: EOS
m_{i,t}    mask          (n,T)    [1, 1, 0]           1 up to EOS, 0 in masked groups; n rows
t_i        ranks         (B,G)    [0, 2, 1, 2, 4]     the oracle's, 0 = best, ties: the better place
p_i        policy_ranks  (B,G)    [3, 0, 1, 2, 4]     by the policy's log-probability of the answer
g(r)       gain          (B,G)    1, .79, .67, ...    log2(2+r)/(1+r)
delta_i    delta         (B,G)    [0, .38, .21, ..]   nDCG penalty in [0,1)
A_i        advantages    (B,G)    [1.4, -.5, ..]      mean_j delta_j - delta_i (D1), divided (D3)
rho_{i,t}  ratio         (n,T)    1.03                pi / pi_old
"""

import math
from dataclasses import dataclass

from plumbing.flags import WORLD, OracleArgs, RolloutArgs, ShardArgs, answer_help, flag, parse_args

ADVANTAGES = ("oracle_rank", "published", "signed", "score", "random")


@dataclass
class Args(OracleArgs, RolloutArgs, ShardArgs):  # memory, oracle, server: plumbing/flags.py
    PRESETS = {"paper": dict(  # [OR]; lr, lengths, precision: ours (D7); no annotation: not a flag
        G=5, prompts_per_step=64, epochs=4, lora_r=64, lora_alpha=16, quantize="nf4", lr=3e-5,
        dtype="bfloat16", oracle_dtype="bfloat16", oracle_tokens=4096, max_new_tokens=128,
        tokens_per_micro_batch=1500, gradient_checkpointing=True)}
    # -- algorithm
    preset: str = flag("", "paper: the published G, batch, epochs and QLoRA; rates, lengths "
                       "and precision are ours (D7); other flags still win", choices=("", "paper"))
    G: int = flag(5, "answers per question [OR: 5]", low=2)
    oracle: str = flag("context", "context | judge | reward_model | api: AI feedback; reference: "
                       "token F1 with the label; several, comma-separated: their mean rank")
    advantage: str = flag("oracle_rank", "oracle_rank | published | signed (D1) | score: GRPO on "
                          "the oracle's scores [G] | random: a control", choices=ADVANTAGES)
    scale_advantages: bool | None = flag(None, "divide by the group's standard deviation (D3); not "
                                         "given: yes, but not for published and signed")
    clip_range: float = flag(0.2, "epsilon of the clipped surrogate [G Eq. 3]", above=0, below=1)
    beta: float = flag(0.03, "weight of the KL to the SFT start, k3 in the loss (D6)", low=0)
    entropy_coef: float = flag(0.0, "weight of the entropy bonus", low=0)
    inner_epochs: int = flag(1, "optimizer steps per batch of answers; later ones clip", low=1)
    lora_r: int = flag(0, "LoRA rank on the decoder [OR: 64]; 0: all weights but CLIP's", low=0)
    lora_alpha: int = flag(16, "LoRA alpha [OR: 16]", low=1)
    quantize: str = flag("none", "none, or nf4: QLoRA, needs --lora_r", choices=("none", "nf4"))
    # -- budget [D7]
    steps: int = flag(150, "rollout steps", low=1)
    epochs: int = flag(0, "passes over the questions [OR: 4]; 0: --steps", low=0)
    prompts_per_step: int = flag(48, "questions per step, over all processes [OR: 64]", low=1)
    tokens_per_micro_batch: int = flag(2048, "tokens in a forward pass, padding included", low=1)
    lr: float = flag(3e-4, "peak learning rate: up in 10 steps, down to zero in all", above=0)
    max_prompt_tokens: int = flag(512, "of a longer question the end is cut, not the video", low=1)
    max_new_tokens: int = flag(16, "longest answer, EOS included (D8)", low=1)
    temperature: float = flag(1.0, "of sampling, the same in every log-probability", above=0)
    # -- data and models
    data: str = flag(f"{WORLD}/train.json", "videos, questions; answers: --oracle reference only")
    video_root: str = flag("", "where the videos are; empty: beside the annotation file")
    eval_data: str = flag(f"{WORLD}/val.json", "held-out questions for the curve; empty: none")
    eval_questions: int = flag(500, "how many of them", low=0)
    eval_steps: int = flag(25, "steps between evaluations", low=1)
    model: str = flag("", "the SFT start; empty: runs/sft/policy_s<seed>/final, built if missing")
    # -- plumbing
    name: str = flag("", "run name: runs/grpo_rank/<name>_s<seed>; empty: --oracle, or the control")
    seed: int = flag(0, "order of the questions and all sampled answers", low=0)
    cache: str = flag("cache", "folder of cached CLIP features and narratives")
    save_steps: int = flag(50, "steps between checkpoints", low=1)
    resume: bool = flag(False, "continue the run of this name where it stopped")

    def __post_init__(self):
        super().__post_init__()
        control = "random" if self.advantage == "random" else ""
        self.name = self.name or control or self.oracle.replace(",", "+")
        self.check_training("prompts_per_step")
        if self.epochs and self.steps != type(self).steps:
            raise ValueError("--steps and --epochs: give one of them (--preset paper sets 4 "
                             "epochs: add --epochs 0)")
        if self.scale_advantages is None:
            self.scale_advantages = self.advantage not in ("published", "signed")
        self.model = self.model or sft_start(self.seed)
        self.check_start("model")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import torch

from inputs.features import FeatureCache
from inputs.records import DataError
from oracle import differ, log_counts, make_oracle, places_of, random_scores, ranks_of
from plumbing import processes
from plumbing.api_client import ApiError
from plumbing.batches import micro_batches
from plumbing.embedded import build_embedded, sft_start
from plumbing.questions import choose_questions, count_correct, read_questions, step_questions
from plumbing.run import Run
from video_llm import Prefix, answer_mask, generate, token_logprobs, uniforms_of, unpacked


# --------------------------------------------------------------------------------------------------
# Equations: tensors in, tensors out
# --------------------------------------------------------------------------------------------------
def gain(ranks):
    """[D2, D4] nDCG gain g(r) = log2(2+r)/(1+r), averaged over a tie's places. (B,G) -> (B,G)."""
    G = ranks.shape[-1]
    r = torch.arange(G, dtype=torch.float64)
    g = torch.log2(2 + r) / (1 + r)  # (G,)
    tied = ranks.unsqueeze(-1) == ranks.unsqueeze(-2)  # (B,G,G)
    places = torch.arange(G) - ranks.unsqueeze(-1)  # (B,G,G): 0, 1, .. from the tie's first place
    occupied = (places >= 0) & (places < tied.sum(-1, keepdim=True))
    return (occupied * g).sum(-1) / occupied.sum(-1)


def penalty(true_ranks, shown_ranks):
    """[D2] nDCG penalty delta(t -> p) = |g(t) - g(p)| / (1 + ln(1 + t)). (B,G), (B,G) -> (B,G).

    delta(0->4) = 0.4830, delta(4->3) = 0.0243 as [OR]'s summaries print; in [0,1)."""
    place = places_of(true_ranks).double()
    return (gain(true_ranks) - gain(shown_ranks)).abs() / (1 + torch.log1p(place))


def rank_advantages(kind, ranks, policy_ranks):
    """[OR; D1] Zero-sum advantages (B,G) of a group's answers from two rankings, (B,G) each."""
    if kind == "oracle_rank":  # delta(0 -> t) = 1 - g(t): the best answer, shown at place t
        delta = 1 - gain(ranks)
        A = delta.mean(-1, keepdim=True) - delta
    elif kind == "published":  # what policy and oracle agree on is pushed up, good or bad
        delta = penalty(ranks, policy_ranks)
        A = delta.mean(-1, keepdim=True) - delta
    elif kind == "signed":  # underrated answers (p > t) up, overrated ones down
        direction = torch.sign(places_of(policy_ranks) - places_of(ranks))
        s = direction * penalty(ranks, policy_ranks)
        A = s - s.mean(-1, keepdim=True)
    all_tied = (ranks == ranks[:, :1]).all(-1, keepdim=True)
    return torch.where(all_tied, 0.0, A)  # [D4] an oracle without preference gives no direction


def scale_by_std(A):
    """[D3; G Sec. 4.1.2] Zero-mean advantages (B,G) over the group's deviation; zeros stay."""
    std = A.square().mean(-1, keepdim=True).sqrt()
    return torch.where(std > 1e-8, A / std.clamp(min=1e-8), 0.0)


def advantages_of(kind, scores, ranks, policy_ranks, scale):
    """The advantages of --advantage `kind`, divided by the group's deviation if `scale` (B,G)."""
    if kind == "score":  # [G] GRPO on the scores
        A = scores.double() - scores.double().mean(-1, keepdim=True)
    else:
        A = rank_advantages("oracle_rank" if kind == "random" else kind, ranks, policy_ranks)
    return scale_by_std(A) if scale else A


def clipped_surrogate(logprobs, old_logprobs, advantages, clip_range):
    """[G Eq. 3] J = min(rho A, clip(rho, 1-eps, 1+eps) A). (n,T), (n,T), (n,), () -> (n,T)."""
    ratio = (logprobs - old_logprobs).exp()
    A = advantages.unsqueeze(1)  # (n,1) constant over an answer's tokens
    return torch.minimum(ratio * A, ratio.clamp(1 - clip_range, 1 + clip_range) * A)


def kl_k3(logprobs, ref_logprobs):
    """[D6; G Eq. 4] KL per token: k3 = r - 1 - log r with r = pi_ref/pi. (n,T), (n,T) -> (n,T)."""
    log_r = ref_logprobs - logprobs
    return log_r.exp() - 1 - log_r


def lr_at(step, steps, peak):
    return peak * min((step + 1) / 10, (steps - step) / steps)


# --------------------------------------------------------------------------------------------------
# The algorithm
# --------------------------------------------------------------------------------------------------
def main(args):
    run = Run(__file__, args)
    build_embedded(args, run.rank)
    torch.manual_seed(args.seed)  # LoRA's initialisation; other draws have keys of their own

    records, report = read_questions(run)
    with processes.one_line_errors(OSError):
        model, processor = run.load_policy(args.model)
        reference = run.reference_of(model, args.model)
    ddp = run.distribute(model)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    run.resume(optimizer, model)

    # Questions and oracle
    cache = FeatureCache(model, processor, args.cache)
    records, evals = choose_questions(run, records, report, cache)
    with processes.one_line_errors(DataError, OSError):
        oracle = make_oracle(args, records, str(run.device))
    if args.epochs:
        args.steps = math.ceil(args.epochs * len(records) / args.prompts_per_step)
    eos, log = processor.tokenizer.eos_token_id, run.start(args.steps)

    def evaluate(step):
        if evals and (step % args.eval_steps == 0 or step == args.steps):
            mine = evals[run.rank :: run.world]
            log.add("eval/accuracy", *count_correct(mine, model, processor, cache))

    evaluate(run.first_step)
    for step in range(run.first_step, args.steps):
        log.mark()
        # 1. Rollout: o_1..o_G ~ pi_old(. | video, question), one prefill a group [G Alg. 1, line 7]
        picks = step_questions(len(records), step, args)[run.rank :: run.world]  # B of this process
        batch = [records[i] for i, _ in picks]
        clips, questions = [r["clip"] for r in batch], [r["question"] for r in batch]
        longest = args.max_prompt_tokens
        prefix = Prefix.build(processor, cache, questions, clips, run.device, longest)
        uniforms = uniforms_of(args.seed, step, picks, args.G, args.max_new_tokens)  # (B,G,T)
        with unpacked(model, args.quantize == "nf4" and args.unpack_nf4):
            tokens, lengths, sampled_logprobs = generate(
                model, prefix, uniforms, eos, args.temperature, args.cuda_graphs)
        answers = processor.decode_answers(tokens, lengths)
        log.mark("rollout")

        # 2. Rank: groups without a ranking are masked, not dropped                     [OR Fig. 1]
        with processes.one_line_errors(ApiError):
            scores, ranks, ok = oracle.rank(clips, questions, answers)  # (B,G), (B,G), (B,)
        if args.advantage == "random":
            scores = random_scores(answers, picks, step, args.seed)
            ranks = ranks_of(scores)
        log.mark("oracle")

        # 3. Advantage, after the reference's log-probabilities                         [OR; D1-D4]
        row_tokens = prefix.attention_mask.sum(-1) + lengths.sum(-1)  # (B,)
        micros = micro_batches(row_tokens, args.tokens_per_micro_batch)  # groups of like length

        def logprobs_of(m, i, entropy):  # log-probability, entropy of the tokens of groups i: (n,T)
            T = lengths[i].max()
            return token_logprobs(m, prefix.rows(i), tokens[i, :, :T], lengths[i], args.temperature,
                                  entropy)

        with torch.no_grad(), reference() as ref:
            ref_logprobs = [logprobs_of(ref, i, "none")[0] for i in micros]
        # (B,G) equal answers are equal tokens; rounding must not order them (D4)
        first_copy = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).all(-1).int().argmax(-1)
        policy_ranks = ranks_of(sampled_logprobs.gather(1, first_copy)).cpu()
        A = advantages_of(args.advantage, scores, ranks, policy_ranks, args.scale_advantages)
        advantages = A.masked_fill(~ok.unsqueeze(-1), 0).float().to(run.device)  # (B,G)
        used = ok.to(run.device).unsqueeze(-1).float()  # (B,1)
        scored = run.scored_or_stop(step, ok, differ(answers))
        n_tokens = processes.all_sum((lengths * used).sum().double()).clamp(min=1)  # D5: global

        # 4. Update: `inner_epochs` steps on J - beta KL + c H                     [G Eq. 3; D5, D6]
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.steps, args.lr)
        old_logprobs, in_loss = [], "grad" if args.entropy_coef else "value"
        for epoch in range(args.inner_epochs):
            for k, i in enumerate(micros):
                with processes.no_sync(ddp, when=k < len(micros) - 1):
                    logprobs, entropy = logprobs_of(ddp, i, in_loss)  # (n,T)
                    if epoch == 0:  # on-policy: pi_old is pi and needs no pass of its own
                        old_logprobs.append(logprobs.detach())
                    mask = answer_mask(lengths[i], logprobs.shape[-1])  # (n,T)
                    mask *= used[i].repeat_interleave(args.G, 0)
                    A = advantages[i].view(-1)  # (n,)
                    J = clipped_surrogate(logprobs, old_logprobs[k], A, args.clip_range)
                    kl = kl_k3(logprobs, ref_logprobs[k])
                    loss = (-J + args.beta * kl - args.entropy_coef * entropy) * mask
                    # DDP averages over processes; * world undoes it
                    (loss.sum() / n_tokens * run.world).backward()
                log_update(log, logprobs, old_logprobs[k], J, kl, entropy, A, mask, args)
            grad_norm = processes.clip_gradients(params)  # to norm 1; what it was before
            run.check_finite(step, grad_norm, questions, answers)
            if scored:
                optimizer.step()
            optimizer.zero_grad()
            log.add("policy/grad_norm", grad_norm)
        log.mark("update")

        # 5. Log, save
        log_groups(log, answers, lengths, ranks, policy_ranks, scores, ok, tokens, eos)
        log_counts(log, oracle)
        log.add("charts/lr", lr_at(step, args.steps, args.lr))
        log.step(step, show=["eval/accuracy", "objective/kl", "policy/entropy", "rank/tied_groups",
                             "rollout/len"])
        run.write_samples(step, batch, answers, ranks=ranks, advantages=advantages)
        run.save(step + 1, model, processor, optimizer)

        # 6. Evaluate
        evaluate(step + 1)
    if evals:
        log.step(args.steps, show=["eval/accuracy"])
    run.finish(model, processor)


# --------------------------------------------------------------------------------------------------
# What is logged
# --------------------------------------------------------------------------------------------------
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
    low, high = (ratio < 1 - args.clip_range) & (A < 0), (ratio > 1 + args.clip_range) & (A > 0)
    log.add("policy/clipfrac_low", (low * mask).sum(), n)
    log.add("policy/clipfrac_high", (high * mask).sum(), n)


def log_groups(log, answers, lengths, ranks, policy_ranks, scores, ok, tokens, eos):
    B, G = ranks.shape
    ended = tokens.cpu().gather(-1, (lengths.cpu() - 1).unsqueeze(-1)).squeeze(-1) == eos
    tied = (ranks == ranks[:, :1]).all(-1)
    before = lambda x: x.unsqueeze(-1) < x.unsqueeze(-2)  # (B,G,G)
    concordant = before(ranks) & before(policy_ranks)
    discordant = before(ranks) & before(policy_ranks).transpose(1, 2)
    log.add("objective/score", (scores * ok.unsqueeze(-1)).sum(), ok.sum() * G)
    log.add("rollout/len", lengths.sum(), B * G)
    log.add("rollout/eos_rate", ended.sum(), B * G)
    log.add("rollout/distinct_answers", sum(len(set(g)) for g in answers), B)
    log.add("rank/tied_groups", (tied & ok).sum(), B)
    log.add("oracle/masked_groups", (~ok).sum(), B)
    log.add("rank/policy_agrees", concordant.sum(), concordant.sum() + discordant.sum())


if __name__ == "__main__":
    main(parse_args(Args))
