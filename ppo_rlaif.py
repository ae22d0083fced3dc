"""PPO on a reward model: the policy optimisation of VLM-RLAIF, every mean over real tokens only.

Run      python ppo_rlaif.py                            the embedded world; builds what is missing
         torchrun --nproc_per_node=4 ppo_rlaif.py       the same on four processes
         python ppo_rlaif.py --oracle reference --name upper      F1 with the label: an upper bound
         python ppo_rlaif.py --oracle reference --random_reward True --name random      the control
         torchrun --nproc_per_node=4 ppo_rlaif.py --preset paper --model DIR --reward_model DIR
Papers   [V] VLM-RLAIF arXiv:2402.03746   [L] LLaVA-RLHF arXiv:2309.14525   [P] PPO arXiv:1707.06347
         [GAE] arXiv:1506.02438   [Z] Ziegler arXiv:1909.08593   [S] Stiennon arXiv:2009.01325
         [O] InstructGPT arXiv:2203.02155   [M] PPO-max arXiv:2307.04964   [T] TRL's PPOTrainer
         [N] The N Implementation Details of RLHF with PPO   [N+] its sequel, arXiv:2403.17031
Claim    With few labels, a reward model's score of the policy's own answers to *unlabelled* videos
         improves the policy if something holds it back. Gains, controls: docs/ppo_rlaif.md.

The algorithm, one step:
  1. The policy samples G answers to each of B questions about unlabelled videos.
  2. The reward model scores each answer. One that does not end, or is long, pays for it.
  3. Each token is rewarded: a KL penalty at every token, the score at the last. The value model
     predicts the reward to come; GAE makes advantages and returns of the two.
  4. Policy and value model take clipped steps, several epochs of mini-batches.
  5. The step is logged; the KL coefficient follows its target; sometimes a checkpoint is written.
  6. Every --eval_steps steps held-out questions are answered; another oracle may end the run.

Differs  D1  Masks. In [V]'s code the score stands at the last *tensor* position, usually a pad; GAE
             and the means of the losses run over pads, so that short answers learn slowly. Here
             masks come from lengths; means are over the real tokens of all processes.
         D2  The KL is k1 = log pi - log pi_ref. [V] clamps it at 0 per token: a token that became
             likelier pays, one that became less likely gets nothing back. That is no KL.
         D3  Scores are normalised once, to mean 0 and deviation 1 over the first batch [Z]. kl_coef
             and the value's clip range then mean the same for every oracle. [V] multiplies the
             *whole* reward by 10: score, penalties and KL (--reward_scale 10).
         D4  G answers to a question; video and question are encoded once for all. [V]: one answer.
         D5  A value model that starts from a reward model reads the reward model's narrative before
             the question. A critic may know more of the video than the policy. [V]: only the judge
             does. The answer follows token by token, also where the reward model reads it first.
         D6  `tiny` trains all weights: policy, reference, value and reward model are networks of
             their own. With --lora_r they share *one* base network: policy adapter, value adapter,
             reference = adapters off, and the reward model's adapter, if it has the same base.
         D7  Early stop, with --stop_oracle: *another* oracle than that of the reward compares the
             greedy answers with those of the start. final/ is the best of these policies, the start
             among them. Not in [V]. The gains in docs/ppo_rlaif.md are with it.
         D8  Rates, KL and schedule are tuned on the embedded world. --preset paper: [V]'s trainer,
             value head, Adam and 387 steps (one epoch of 99k prompts); D1, D2, D5 still differ.
         D9  Scores are centred within the G answers to a question (--center_scores). Bradley-Terry
             leaves a constant per question open, which a value model would have to learn first. It
             expects 0 of centred scores, so its head starts from zero (I12). Not measured yet.

Implementation details of PPO for language models; where: a step or function here, or of video_llm
 rollout I1  temperature 1; every log-probability at that of sampling [N]        step 1
         I2  prompts padded left, positions from the first real token [N, N+]        Prefix.build
         I3  an answer ends at EOS, which is learned; a cut answer has none [N+]     answer_mask
         I4  other random numbers for every question, whatever the process [N]       step 1
         I5  no dropout: pi/pi_old must be 1 before the first update [N, N+]         step 3
 reward  I6  the score counts once, at the last real token [Z]                       token_rewards
         I7  KL penalty per token, k1, in the reward, without gradient [Z, S]        token_rewards
         I8  scores normalised before training [Z, S]                                normal_of
         I9  an answer without EOS pays a penalty [Z, N+, L], a long one can [L]     shaped_scores
         I10 KL coefficient: fixed [V], or a proportional controller [Z Sec. 2.2]    next_kl_coef
 value   I11 from the reward model [S, O, L]; head rescaled as I8, or zero [V]      step 2
         I12 without a reward model: from the start, head zero [Z]                   add_scalar_head
         I13 V(s_t) is read before token t; after the end V = 0                      token_scores
         I14 gamma = 1 [Z]; lambda = 0.95 [Z] or 1 [V, L]                            gae
 update  I15 advantages whitened over the real tokens of all processes [Z, L]        whiten
         I16 clipped policy loss [P Eq. 7], mean over a mini-batch's tokens          policy_loss
         I17 clipped value loss [N, from baselines]                                  value_loss
         I18 epochs of new mini-batches; micro-batches for memory only [P, N]        step 4
         I19 gradients clipped at norm 1, policy and value apart [L]                 step 4
         I20 Adam with eps 1e-5 [N, N+]: with 1e-8 the first steps are large         main
         I21 learning rate warmed up [L], then annealed to zero [N]                  lr_at
         I22 in the first steps only the value model learns [M]                      step 4
         I23 watched: KL, entropy, ratio, clip fractions, explained variance [N, T]  step 5
 not used    reward whitening per batch [Z]: I8 and I15 do it; entropy bonus: KL keeps entropy;
         vf_coef: two networks and Adam do not see a loss' scale; PPO-ptx [O]; reward clipping [M].

Masked   A question that the oracle could not score: no tokens in any mean. No scored token in a
         mini-batch: no update. Three steps in which nothing is scored end the run.

symbol    name         shape    example           meaning                                    made in
o_{i,t}   tokens       (B,G,T)  [[5, 9, 2], ..]   sampled answers; N = B*G, row b*G + g       step 1
m_{i,t}   mask         (N,T)    [1, 1, 0]         1 on answer tokens and EOS, if scored       step 3
r_{i,t}   rewards      (N,T)    [-.01, .9, 0]     -kl_coef * k1, score at the last token      step 3
V(s_t)    old_values   (N,T)    [.2, .7, 0]       the value model before the update           step 3
A_t, R_t  advantages, returns   [.7, .2, 0]       GAE [GAE Eq. 16], and A_t + V(s_t)          step 3
rho_t     ratio        (n,T)    1.03              pi / pi_old [P Eq. 6]                       step 4
"""

import copy
import json
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plumbing.flags import (ORACLES, WORLD, ModelArgs, OracleArgs, RolloutArgs, answer_help, flag,
                            parse_args, world_size)


@dataclass
class Args(OracleArgs, RolloutArgs, ModelArgs):  # memory, oracle, server: plumbing/flags.py
    PRESETS = {"paper": dict(  # RLAIF/scripts/train_rl_model.sh of [V]; no annotation: not a flag
        prompts_per_step=256, G=1, mini_batches=2, ppo_epochs=2, lr=3e-5, value_lr=3e-5,
        steps=387, schedule="cosine", warmup_steps=5, value_warmup=0, kl_coef=0.1, target_kl=0.0,
        center_scores=False, reward_scale=10.0, missing_eos_penalty=8.0, length_penalty=10.0,
        clip_range=0.2, value_clip_range=0.2, gamma=1.0, lam=1.0, temperature=1.0, adam_eps=1e-8,
        adam_beta2=0.999, zero_value_head=True, max_new_tokens=896, lora_r=64, lora_alpha=16,
        quantize="nf4", dtype="bfloat16", oracle_dtype="bfloat16", oracle_tokens=4096,
        gradient_checkpointing=True, tokens_per_micro_batch=2048, stop_oracle="")}
    # -- algorithm
    preset: str = flag("", "paper: the values of VLM-RLAIF's script, QLoRA included; other flags "
                       "still win", choices=("", "paper"))
    oracle: str = flag("reward_model", "its score is the reward: reward_model | judge | context | "
                       "api: AI feedback; reference: token F1 with the label; several: mean rank")
    random_reward: bool = flag(False, "control: random numbers in place of the scores")
    kl_coef: float = flag(0.1, "weight of the KL to the start, in the reward (I7)", low=0)
    target_kl: float = flag(0.0, "nats per answer to steer the KL to (I10); 0: off", low=0)
    kl_horizon: int = flag(10000, "answers in which kl_coef changes by 20 % at most (I10)", low=1)
    center_scores: bool = flag(True, "score less the mean of the question's G answers (D9)")
    reward_scale: float = flag(0.0, "factor on the whole reward, KL and penalties too [V: 10]; 0: "
                               "scores normalised on the first batch (D3)", low=0)
    missing_eos_penalty: float = flag(1.0, "price of an answer without EOS (I9)", low=0)
    length_penalty: float = flag(0.0, "price of an answer of --max_new_tokens (I9)", low=0)
    gamma: float = flag(1.0, "discount (I14)", low=0, high=1)
    lam: float = flag(0.95, "GAE's lambda (I14)", low=0, high=1)
    clip_range: float = flag(0.2, "epsilon of the clipped policy loss (I16)", above=0, below=1)
    value_clip_range: float = flag(0.2, "how far a value may move per batch (I17)", above=0)
    ppo_epochs: int = flag(2, "passes over a batch of answers (I18)", low=1)
    mini_batches: int = flag(2, "optimizer steps per pass (I18)", low=1)
    value_warmup: int = flag(5, "first steps in which only the value model learns (I22)", low=0)
    stop_oracle: str = flag("", "oracle that chooses the best policy (D7); empty: the last one",
                            choices=("", *ORACLES))
    patience: int = flag(3, "evaluations without progress after which --stop_oracle stops", low=1)
    # -- networks
    value_model: str = flag("", "start of the value model: a reward model (--lora_r: an adapter), "
                            "or sft; empty: --reward_model if it rewards, else sft (I11, I12)")
    zero_value_head: bool = flag(False, "start a reward model's head from zero, as [V] (I11)")
    lora_r: int = flag(0, "LoRA rank on the decoder (D6) [V: 64]; 0: all weights but CLIP's", low=0)
    lora_alpha: int = flag(16, "LoRA alpha [V: 16]", low=1)
    quantize: str = flag("none", "none, or nf4: QLoRA, needs --lora_r", choices=("none", "nf4"))
    # -- budget [D8]
    steps: int = flag(150, "rollout steps", low=1)
    prompts_per_step: int = flag(48, "questions per step, over all processes [V: 256]", low=1)
    G: int = flag(5, "answers per question (D4) [V: 1]", low=1)
    tokens_per_micro_batch: int = flag(2048, "tokens in a forward pass, padding included", low=1)
    lr: float = flag(3e-4, "peak learning rate of the policy", above=0)
    value_lr: float = flag(3e-4, "peak learning rate of the value model", above=0)
    schedule: str = flag("linear", "decay to zero (I21)", choices=("linear", "cosine"))
    warmup_steps: int = flag(10, "steps of linear warm-up (I21)", low=0)
    adam_eps: float = flag(1e-5, "Adam's epsilon (I20)", above=0)
    adam_beta2: float = flag(0.95, "Adam's second beta [V: 0.999]", above=0, below=1)
    max_new_tokens: int = flag(16, "longest answer, EOS included", low=1)
    max_prompt_tokens: int = flag(512, "of a longer question the end is cut, not the video", low=1)
    temperature: float = flag(1.0, "of sampling and of every log-probability (I1)", above=0)
    # -- data and models
    data: str = flag(f"{WORLD}/train.json", "videos and questions; labels: --oracle reference only")
    video_root: str = flag("", "where the videos are; empty: beside the annotation file")
    eval_data: str = flag(f"{WORLD}/val.json", "held-out questions (curve, D7); empty: none")
    eval_questions: int = flag(500, "how many of them", low=0)
    eval_steps: int = flag(25, "steps between evaluations", low=1)
    model: str = flag("", "the SFT start; empty: runs/sft/policy_s<seed>/final, built if missing")
    # -- plumbing
    name: str = flag("", "run name: runs/ppo_rlaif/<name>_s<seed>; empty: --oracle, or random")
    seed: int = flag(0, "order of the questions and all sampled answers", low=0)
    cache: str = flag("cache", "folder of cached CLIP features and narratives")
    save_steps: int = flag(50, "steps between checkpoints", low=1)
    resume: bool = flag(False, "continue the run of this name where it stopped")

    def __post_init__(self):
        super().__post_init__()
        self.name = self.name or ("random" if self.random_reward else self.oracle.replace(",", "+"))
        self.check_training()
        if self.center_scores and self.G < 2:
            raise ValueError(f"--G {self.G}: --center_scores needs two answers to a question")
        if self.G < 2 and self.raters not in (["reward_model"], ["reference"]):
            raise ValueError(f"--G {self.G}: --oracle {self.oracle} compares answers: two at least")
        for divisor, what in ((world_size(), "processes"), (self.mini_batches, "--mini_batches")):
            if self.prompts_per_step % divisor:
                raise ValueError(f"--prompts_per_step: no multiple of {what} ({divisor})")
        if self.target_kl and not self.kl_coef:
            raise ValueError("--target_kl: the controller multiplies --kl_coef: not 0")
        if self.stop_oracle and (not self.eval_data or self.eval_questions < world_size()):
            raise ValueError("--stop_oracle: needs --eval_data, and a question for each process")
        if self.stop_oracle in self.raters and not self.random_reward:
            raise ValueError(f"--stop_oracle {self.stop_oracle}: --oracle has the same errors")
        self.check_api(needed="api" in [*self.raters, self.stop_oracle])
        self.model = self.model or sft_start(self.seed)
        self.check_start("model")
        rewarded = "reward_model" in self.raters
        self.value_model = self.value_model or (self.reward_model if rewarded else "sft")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from inputs.features import FeatureCache
from inputs.records import DataError
from oracle import JudgeOracle, differ, log_counts, make_oracle, random_scores, reward_prompt
from plumbing import processes
from plumbing.api_client import ApiError
from plumbing.batches import by_length
from plumbing.embedded import build_embedded, build_oracle, sft_start
from plumbing.questions import choose_questions, read_questions, step_questions
from plumbing.run import Run, adapter_of
from plumbing.validation import Validation
from video_llm import (Prefix, add_scalar_head, answer_mask, generate, token_logprobs, token_scores,
                       uniforms_of, unpacked, unwrap)


# --------------------------------------------------------------------------------------------------
# Equations: tensors in, tensors out. N answers, T tokens; everything is 0 after an answer's end
# --------------------------------------------------------------------------------------------------
def moments(x, mask):
    """Mean and standard deviation over the real tokens of all processes (doubles)."""
    n = processes.all_sum(mask.sum().double()).clamp(min=1)
    x = x.masked_fill(mask == 0, 0)  # 0 times inf is NaN
    mean = processes.all_sum((x * mask).sum().double()) / n
    return mean, (processes.all_sum(((x - mean) ** 2 * mask).sum().double()) / n).sqrt()


def centered(scores):
    """[D9] Scores (B,G) less the mean of their group: how an answer compares with the others."""
    return scores - scores.mean(-1, keepdim=True)


def normal_of(scores, ok):
    """[I8, D3] (mean, gain) of the first batch: (score - mean) * gain has mean 0, deviation 1.
    scores (B,G), ok (B,): False where a group is masked. Equal scores keep their size."""
    mean, std = moments(scores, ok.float().unsqueeze(-1).expand_as(scores))
    return mean.item(), (1 / std).item() if std > 1e-6 else 1.0


def shaped_scores(scores, ended, lengths, missing_eos_penalty, length_penalty, max_length):
    """[I9] Scores less the prices of an answer's missing end and its length. (B,G) x 3 -> (B,G)."""
    return scores - missing_eos_penalty * (~ended).float() - length_penalty * lengths / max_length


def token_rewards(scores, logprobs, ref_logprobs, lengths, kl_coef, scale=1.0):
    """[I6, I7; Z Eq. 2; D1, D2] r_t = -kl_coef (log pi - log pi_ref)_t, plus the score at the last
    *real* token; all of it times `scale` (D3).

    scores (N,), logprobs and ref_logprobs (N,T), lengths (N,) with EOS -> rewards (N,T)."""
    mask = answer_mask(lengths, logprobs.shape[-1])
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask  # (N,T)
    last = (lengths - 1).unsqueeze(1)  # (N,1)
    return scale * rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def gae(rewards, values, mask, gamma, lam):
    """[GAE Eq. 16; I13, I14] delta_t = r_t + gamma V_{t+1} - V_t,
    A_t = delta_t + gamma lam A_{t+1}, R_t = A_t + V_t; V and A after an answer's end are 0.
    (N,T) (N,T) (N,T) () () -> A (N,T), R (N,T)."""
    A, next_value, next_A = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        A[:, t] = (delta + gamma * lam * next_A) * mask[:, t]
        next_value, next_A = values[:, t] * mask[:, t], A[:, t]
    return A, (A + values) * mask


def whiten(x, mask, mean, std):
    """[I15] Mean 0, deviation 1 over the real tokens; mean and std are those of all processes."""
    return (x - mean) / (std + 1e-8) * mask


def policy_loss(logprobs, old_logprobs, advantages, clip_range):
    """[I16; P Eq. 7] max(-rho A, -clip(rho, 1-eps, 1+eps) A) per token. (N,T) x 3, () -> (N,T)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)  # the pessimistic one


def value_loss(values, old_values, returns, clip_range):
    """[I17] 1/2 max((V - R)^2, (V_clipped - R)^2), V_clipped within clip_range of the old value.

    No gradient where V has left the range and moves on towards R. (N,T) x 3, () -> (N,T)."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def next_kl_coef(kl_coef, kl, target_kl, answers, horizon):
    """[I10; Z Sec. 2.2] A proportional controller in log space: every `horizon` answers the
    coefficient grows by the KL's relative error, at most 20 %. kl: nats per answer, batch mean."""
    return kl_coef * (1 + min(max(kl / target_kl - 1, -0.2), 0.2) * answers / horizon)


def lr_at(step, steps, peak, warmup_steps, schedule):
    """[I21] Linear warm-up, then linear or cosine to zero."""
    left = (steps - step) / steps
    decay = left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    return peak * min((step + 1) / (warmup_steps + 1), decay)


# --------------------------------------------------------------------------------------------------
# The algorithm
# --------------------------------------------------------------------------------------------------
def main(args):
    run = Run(__file__, args)
    build_embedded(args, run.rank)
    if args.stop_oracle:
        build_oracle(args, run.rank, [args.stop_oracle])
    torch.manual_seed(args.seed)  # LoRA's initialisation; every other draw has a key of its own

    # Four roles, one optimizer for both that learn
    records, report = read_questions(run)
    with processes.one_line_errors(DataError, OSError):
        roles = Roles(run)
    processor, eos = roles.processor, roles.processor.tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(  # I20
        [dict(params=list(roles.params[name].values())) for name in ("policy", "value")],
        betas=(0.9, args.adam_beta2), eps=args.adam_eps, weight_decay=0.0)
    run.resume(optimizer, roles.policy)
    state = dict(kl_coef=args.kl_coef, normal=None, best=None, best_step=0)
    if run.checkpoint:
        state = json.loads((run.checkpoint / "ppo.json").read_text())

    # Questions and oracles
    cache = FeatureCache(roles.policy, processor, args.cache)
    records, evals = choose_questions(run, records, report, cache)
    with processes.one_line_errors(DataError, OSError):
        loaded = (roles.policy, processor) if "reward" in roles.adapters else None
        oracle = make_oracle(args, records, str(run.device), loaded=loaded)
        judge = args.stop_oracle and make_oracle(args, evals, str(run.device), [args.stop_oracle])
        validate = Validation(run, roles, evals, cache, judge, differ, state)  # D7
        value_prompt = value_prompts(args, roles, oracle, str(run.device))
    if run.rank == 0:
        how = "one base network" if roles.adapters else "networks of their own"
        print(f"{how}: {', '.join([*(roles.adapters or roles.params), 'reference'])}")
    log = run.start(args.steps)

    step, stop = run.first_step, validate(run.first_step)
    while step < args.steps and not stop:
        # 1. Rollout: G answers per question, one prefill per group                [I1, I2, I4; D4]
        log.mark()
        picks = step_questions(len(records), step, args)[run.rank :: run.world]  # B of this process
        batch = [records[i] for i, _ in picks]
        clips, questions = [r["clip"] for r in batch], [r["question"] for r in batch]
        longest = args.max_prompt_tokens
        prefix = Prefix.build(processor, cache, questions, clips, run.device, longest)
        uniforms = uniforms_of(args.seed, step, picks, args.G, args.max_new_tokens)  # (B,G,T)
        unpack = args.quantize == "nf4" and args.unpack_nf4
        with roles.as_("policy") as policy, unpacked(policy, unpack):
            # step 3 computes the log-probabilities again, as the update will, so that rho is 1
            tokens, lengths, _ = generate(
                policy, prefix, uniforms, eos, args.temperature, args.cuda_graphs)
        answers = processor.decode_answers(tokens, lengths)
        log.mark("rollout")

        # 2. Feedback: one score per answer. Questions that the oracle cannot score are counted and
        #    masked, not dropped.
        with processes.one_line_errors(ApiError), roles.as_("reward"):
            scores, ok = oracle.score(clips, questions, answers)  # (B,G), (B,)
        if args.random_reward:
            scores = random_scores(answers, picks, step, args.seed)
        ok = ok.to(run.device)
        scores = scores.float().to(run.device).masked_fill(~ok.unsqueeze(-1), 0)
        scored = run.scored_or_stop(step, ok, differ(answers).to(run.device))
        relative = centered(scores) if args.center_scores else scores  # D9
        scale = args.reward_scale or 1.0
        if state["normal"] is None and scored:  # I8, D3: from the first batch, for good
            state["normal"] = (0.0, 1.0) if args.reward_scale else normal_of(relative, ok)
            if args.value_model != "sft":  # I11: a head that predicts these scores still does
                mean, gain = state["normal"]
                same = args.raters == ["reward_model"] and args.value_model == args.reward_model
                zero = args.center_scores or args.zero_value_head
                roles.rescale_head(mean, gain * scale if same and not zero else 0.0)
        mean, gain = state["normal"] or (0.0, 1.0)
        ended = tokens.gather(-1, (lengths - 1).unsqueeze(-1)).squeeze(-1) == eos  # (B,G)
        shaped = shaped_scores((relative - mean) * gain, ended, lengths, args.missing_eos_penalty,
                               args.length_penalty, args.max_new_tokens)  # (B,G)
        log.mark("oracle")

        # 3. Log-probabilities, values and advantages, before the first update, no dropout      [I5]
        B, G, T = tokens.shape
        mask = answer_mask(lengths * ok.unsqueeze(-1), T)  # (N,T) D1, I3
        value_prefix = value_prompt(questions, clips, prefix)  # D5
        prompt_tokens = torch.maximum(*(p.attention_mask.sum(-1) for p in (prefix, value_prefix)))
        row_tokens = prompt_tokens + lengths.sum(-1)  # (B,)
        micros = by_length(torch.arange(B), row_tokens, args.tokens_per_micro_batch)

        def logprobs_of(model, i, entropy="none"):  # -> (n,T_i) x 2: log-probability, entropy
            T_i = lengths[i].max()
            return token_logprobs(
                model, prefix.rows(i), tokens[i, :, :T_i], lengths[i], args.temperature, entropy)

        def values_of(model, i):  # -> (n,T_i)                                                 [I13]
            T_i = lengths[i].max()
            return token_scores(
                model, value_prefix.rows(i), tokens[i, :, :T_i], lengths[i], before=True)

        def of_all(function):  # -> (N,T), 0 after the answers
            out = torch.zeros(B, G, T, device=run.device)
            for i in micros:
                part = function(i)
                out[i, :, : part.shape[-1]] = part.view(len(i), G, -1).to(out.dtype)
            return out.view(B * G, T)

        with torch.no_grad():
            with roles.as_("policy") as policy:
                old_logprobs = of_all(lambda i: logprobs_of(policy, i)[0])
            with roles.reference() as reference:
                ref_logprobs = of_all(lambda i: logprobs_of(reference, i)[0])
            with roles.as_("value") as value_model:
                old_values = of_all(lambda i: values_of(value_model, i))
        rewards = mask * token_rewards(
            shaped.view(-1), old_logprobs, ref_logprobs, lengths.view(-1), state["kl_coef"], scale)
        advantages, returns = gae(rewards, old_values * mask, mask, args.gamma, args.lam)  # (N,T)
        A_mean, A_std = moments(advantages, mask)
        whitened = whiten(advantages, mask, A_mean, A_std)
        log.mark("score")

        # 4. Update: epochs of mini-batches of questions, the same for any number of processes [I18]
        for group, peak in zip(optimizer.param_groups, (args.lr, args.value_lr)):
            group["lr"] = lr_at(step, args.steps, peak, args.warmup_steps, args.schedule)
        networks = ["value"] if step < args.value_warmup else ["policy", "value"]  # I22
        for epoch in range(args.ppo_epochs):
            draw = np.random.default_rng([args.seed, step, epoch, 1])
            for chunk in np.split(draw.permutation(args.prompts_per_step), args.mini_batches):
                here = torch.from_numpy(chunk[chunk % run.world == run.rank] // run.world)
                n_tokens = processes.all_sum(mask.view(B, G, T)[here].sum().double())  # D1: global
                for i in by_length(here, row_tokens, args.tokens_per_micro_batch):
                    of = lambda x: x.view(B, G, T)[i, :, : lengths[i].max()].flatten(0, 1)
                    m = of(mask)
                    if "policy" in networks:
                        with roles.as_("policy") as policy:
                            logprobs, entropy = logprobs_of(policy, i, "value")
                            losses = policy_loss(
                                logprobs, of(old_logprobs), of(whitened), args.clip_range)
                            ((losses * m).sum() / n_tokens.clamp(min=1)).backward()
                        log_policy(log, losses, logprobs - of(old_logprobs), entropy, of(whitened),
                                   m, args.clip_range)
                    with roles.as_("value") as value_model:
                        values = values_of(value_model, i)
                        losses = value_loss(
                            values, of(old_values), of(returns), args.value_clip_range)
                        ((losses * m).sum() / n_tokens.clamp(min=1)).backward()
                    log_value(log, losses, values - of(old_values), m, args.value_clip_range)
                for name in ("policy", "value"):
                    if name in networks:
                        params = list(roles.params[name].values())
                        processes.sum_gradients(params)
                        grad_norm = processes.clip_gradients(params)  # I19: to norm 1
                        run.check_finite(step, grad_norm, questions, answers)
                        log.add(f"{name}/grad_norm", grad_norm)
                if scored and n_tokens:  # else Adam's momentum would move the weights
                    optimizer.step()
                optimizer.zero_grad()
        log.mark("update")

        # 5. Log, save                                                                         [I23]
        kl = ((old_logprobs - ref_logprobs) * mask).sum(-1).view(B, G)  # nats per answer
        log_batch(log, scores, shaped * scale, kl, rewards, lengths, ended, ok, answers)
        log_returns(log, old_values, returns, mask)
        log_counts(log, oracle)
        log.add("objective/advantage_std", A_std)
        log.add("charts/lr", optimizer.param_groups[0]["lr"])
        log.add("charts/kl_coef", state["kl_coef"])
        row = log.step(step, show=[
            "eval/accuracy", "objective/score", "objective/kl", "policy/clipfrac_high",
            "value/explained_variance", "rollout/len"])
        if args.target_kl and scored:
            state["kl_coef"] = next_kl_coef(state["kl_coef"], row["objective/kl"], args.target_kl,
                                            args.prompts_per_step * args.G, args.kl_horizon)
        run.write_samples(step, batch, answers, scores=scores, kl=kl,
                          advantages=advantages[:, 0].view(B, G))  # first token, not whitened
        # adapters are saved with the policy, a value network of its own beside it
        beside = {} if roles.adapters else {"value": (roles.value, roles.value_processor)}
        run.save(step + 1, roles.policy, processor, optimizer, about={"ppo.json": state},
                 beside=beside)

        # 6. Evaluate; time to stop?                                                            [D7]
        step += 1
        stop = validate(step)
    if evals:
        log.step(step, show=["eval/accuracy", "eval/margin"])
    roles.only_policy(run.folder / "best.safetensors" if args.stop_oracle else None)
    run.finish(roles.policy, processor)


# --------------------------------------------------------------------------------------------------
# Four roles [V; D6]
# --------------------------------------------------------------------------------------------------
class Roles:
    """with roles.as_("policy") as model, as_("value"), as_("reward"), and roles.reference().

    adapters   {role: adapter} of the one base network; empty where networks are their own
    params     {"policy" or "value": {name: parameter that learns}}
    """

    def __init__(self, run):
        args, checkpoint = run.args, run.checkpoint
        self.adapters = dict(policy="default", value="value") if args.lora_r else {}
        self.policy, self.processor = run.load_policy(args.model)
        self.value, self.value_processor = self.policy, self.processor
        self.reference = run.reference_of(self.policy, args.model)
        from_reward_model = args.value_model != "sft"
        if args.lora_r:
            add_scalar_head(unwrap(self.policy))
            if from_reward_model or checkpoint:
                found = adapter_of(args.value_model, args.model)
                source = checkpoint / "value" if checkpoint else found
                if not source:
                    sys.exit(f"--value_model {args.value_model}: with --lora_r an adapter of "
                             f"{args.model}, or sft")
                self.policy.load_adapter(source, "value", is_trainable=True)
            else:
                config = copy.deepcopy(self.policy.peft_config["default"])
                config.modules_to_save = ["score_head"]
                self.policy.add_adapter("value", config)
            reward = adapter_of(args.reward_model, args.model)
            if reward and "reward_model" in args.raters:
                self.adapters["reward"] = "reward"
                self.policy.load_adapter(reward, "reward")
        else:
            start = args.value_model if from_reward_model else args.model
            start = checkpoint / "value" if checkpoint else start
            self.value, self.value_processor = run.load(start)
            add_scalar_head(self.value)
        if self.value_processor.tokenizer.get_vocab() != self.processor.tokenizer.get_vocab():
            sys.exit(f"--value_model {args.value_model}: other tokens than those of {args.model}")
        self.params = {name: self.trained(name) for name in ("policy", "value")}

    @contextmanager
    def as_(self, name):
        """The network in this role. PEFT makes only the parameters of its adapter trainable."""
        if name in self.adapters:
            self.policy.set_adapter(self.adapters[name], inference_mode=name == "reward")
        yield self.value if name == "value" else self.policy

    def trained(self, name):
        """{name: parameter} of a role. A value model does not need the language model's head."""
        with self.as_(name) as model:
            unused = "lm_head" if name == "value" else "score_head"
            # PEFT leaves the heads of other adapters trainable
            adapter = f".{self.adapters[name]}." if self.adapters else ""
            return {n: p for n, p in model.named_parameters()
                    if p.requires_grad and unused not in n and adapter in n}

    @torch.no_grad()
    def rescale_head(self, mean, gain):
        """A head that predicts a score predicts (score - mean) * gain."""
        for name, p in self.params["value"].items():
            if "score_head" in name:
                p.sub_(mean if name.endswith("bias") else 0).mul_(gain)

    def save_policy(self, file):
        """The trained weights of the policy, written aside and renamed."""
        aside = Path(file).with_suffix(".tmp.safetensors")
        params = self.params["policy"].items()
        save_file({name: p.detach().cpu().contiguous() for name, p in params}, aside)
        aside.replace(file)

    def only_policy(self, best):
        """The end: the weights in the file `best`, if any; no adapter but the policy's."""
        if best:
            for name, p in load_file(best).items():
                self.params["policy"][name].data.copy_(p)
        if self.adapters:
            self.policy.set_adapter("default")
            for role in sorted(self.adapters.keys() - {"policy"}):
                self.policy.delete_adapter(self.adapters[role])


def value_prompts(args, roles, oracle, device):
    """[D5] -> function(questions, clips, the policy's prefix) that makes the value model's prompts:
    the policy's, after a narrative if the value model is from a reward model that reads one."""
    file = Path(args.value_model, "reward_model.json")
    about = json.loads(file.read_text()) if file.exists() else dict(narrative_clips=0)
    cache = FeatureCache(roles.value, roles.value_processor, args.cache)
    narrator, num_clips = None, about["narrative_clips"]
    if num_clips:
        same = getattr(oracle, "narrated_by", None) == (about["narrative_model"], num_clips)
        narrator = oracle.narrator if same else JudgeOracle(
            about["narrative_model"], args.cache, True, device, clips=num_clips,
            dtype=args.oracle_dtype, tokens=args.oracle_tokens)

    def prefix_of(questions, clips, prefix):
        if args.value_model == "sft":
            return prefix
        narratives = narrator.narratives(clips) if narrator else [None] * len(clips)
        prompts = [reward_prompt(q, narrative) for q, narrative in zip(questions, narratives)]
        return Prefix.build(roles.value_processor, cache, prompts, clips, device)

    return prefix_of


# --------------------------------------------------------------------------------------------------
# What is logged
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def log_policy(log, losses, log_ratio, entropy, advantages, mask, clip_range):
    n, log_ratio = mask.sum(), log_ratio * mask
    ratio = log_ratio.exp()
    low = (ratio < 1 - clip_range) & (advantages < 0)
    high = (ratio > 1 + clip_range) & (advantages > 0)
    log.add("losses/policy_loss", (losses * mask).sum(), n)
    log.add("policy/entropy", (entropy * mask).sum(), n)
    log.add("policy/approx_kl", ((ratio - 1 - log_ratio) * mask).sum(), n)
    log.add("policy/ratio", (ratio * mask).sum(), n)
    log.add("policy/clipfrac_low", (low * mask).sum(), n)
    log.add("policy/clipfrac_high", (high * mask).sum(), n)


@torch.no_grad()
def log_value(log, losses, change, mask, clip_range):
    log.add("losses/value_loss", (losses * mask).sum(), mask.sum())
    log.add("value/clipfrac", ((change.abs() > clip_range) * mask).sum(), mask.sum())


def log_returns(log, old_values, returns, mask):
    R_mean, R_std = moments(returns, mask)
    _, error_std = moments(returns - old_values, mask)
    log.add("value/explained_variance", 1 - (error_std / R_std.clamp(min=1e-8)) ** 2)
    log.add("value/return", R_mean)
    log.add("value/value", (old_values * mask).sum(), mask.sum())


def log_batch(log, scores, shaped, kl, rewards, lengths, ended, ok, answers):
    B, G = scores.shape
    used, n = ok.unsqueeze(-1), ok.sum() * G
    log.add("objective/score", (scores * used).sum(), n)
    log.add("objective/kl", (kl * used).sum(), n)
    log.add("objective/kl_penalty", (rewards.sum() - (shaped * used).sum()), n)
    log.add("objective/reward_total", rewards.sum(), n)
    log.add("rollout/len", lengths.sum(), B * G)
    log.add("rollout/eos_rate", ended.sum(), B * G)
    log.add("rollout/distinct_answers", sum(len(set(g)) for g in answers), B)
    log.add("oracle/masked_groups", (~ok).sum(), B)


if __name__ == "__main__":
    main(parse_args(Args))
