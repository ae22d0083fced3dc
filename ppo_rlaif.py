"""PPO on a reward model: the policy optimisation of VLM-RLAIF, with every token behind a mask.

Run      python ppo_rlaif.py                                      the embedded world; builds what is missing
         torchrun --nproc_per_node=4 ppo_rlaif.py                 the same on four processes
         python ppo_rlaif.py --oracle reference --name upper      token F1 with the label as reward: an upper bound
         python ppo_rlaif.py --oracle reference --random_reward True --name random            the control
         torchrun --nproc_per_node=4 ppo_rlaif.py --preset paper --model DIR --reward_model DIR   their scripts' values
Papers   [V] VLM-RLAIF arXiv:2402.03746    [L] LLaVA-RLHF arXiv:2309.14525    [P] PPO arXiv:1707.06347
         [GAE] arXiv:1506.02438    [Z] Ziegler et al. arXiv:1909.08593    [S] Stiennon et al. arXiv:2009.01325
         [O] InstructGPT arXiv:2203.02155    [M] PPO-max arXiv:2307.04964    [T] TRL's PPOTrainer
         [N] The N Implementation Details of RLHF with PPO (2023)    [N+] its sequel, arXiv:2403.17031
Claim    with few labels, the score of a reward model on the policy's own answers to *unlabelled* videos improves the
         policy, if it is held back (KL, low rate, early stop); measured gains and controls: docs/ppo_rlaif.md.

Differs  D1  masks. In the released code of [V] the score stands at the last *tensor* position (usually a pad), GAE runs
             over pads, and losses are means over all positions, so that short answers learn slowly. Here every mask
             comes from lengths, and every mean is over the real tokens of all processes.
         D2  the KL is k1 = log pi - log pi_ref as it is. [V] clamps it at 0 per token, which makes a penalty whose
             expectation is not the KL: a token that became likelier pays, one that became less likely gets nothing.
         D3  scores are normalised once: mean 0, standard deviation 1 over the first batch, as [Z] does with answers of
             the start. [V] multiplies by 10 (--reward_scale 10). kl_coef and the value's clip range then mean the same
             for every oracle.
         D4  G answers to a question, so that video and question are encoded once for all (video_llm.packed). [V]: one.
         D5  a value model that starts from a reward model reads its narrative before the question: a critic may know
             more of the video than the policy, as long as nothing the policy does changes it. [V]: for the judge alone.
             Its prompt: narrative, question, then the answer token by token, also where the reward model reads the
             answer first.
         D6  `tiny` trains all weights, so policy, reference and value model (and reward model) are networks of their
             own. With --lora_r they are adapters of *one* base network: policy adapter, value adapter, reference =
             adapters off, and the reward model's adapter, where it has the same base: four roles, one set of weights.
         D7  early stop, off unless --stop_oracle is given: every --eval_steps steps *another* oracle than the one that
             gives the reward compares greedy answers with those of the start; final/ is then the best of these
             policies, the start among them. The gains in docs/ppo_rlaif.md are with it. Not in [V].
         D8  rates, KL and schedule are ours, tuned on the embedded world; --preset paper has those of [V]'s script.
         D9  scores are centred within the G answers to a question (--center_scores). Bradley-Terry fixes rewards only
             up to a constant for every question, so what a reward model says of one question beside another is noise
             that a value model can take out, but has to learn first. Of centred scores it expects 0, and so it starts
             (head zero, I12). What that is worth is not measured yet.

The implementation details of PPO for language models: what, from where, and where: a step or function here (grep for
the tag), or a function of video_llm.py.
 rollout I1  sample at temperature 1, all log-probabilities at the temperature of sampling [N]            step 1
         I2  prompts padded on the left, position ids start at the first real token [N, N+]               Prefix.build
         I3  an answer ends at EOS, which is learned; cut answers have none; pad = eos is harmless [N+]    answer_mask
         I4  other random numbers for every question, whatever the process [N]                            step 1
         I5  no dropout anywhere: pi/pi_old must be 1 before the first update [N, N+]                      step 3
 reward  I6  the score counts once, at the last real token [Z]                                            token_rewards
         I7  per-token KL penalty to the frozen start in the reward, k1, no gradient through it [Z, S]    token_rewards
         I8  scores normalised to mean 0 and standard deviation 1 before training [Z, S]                  normal_of
         I9  an answer without EOS pays a penalty [Z, N+, L]; a long one can [L]                          shaped_scores
         I10 KL coefficient: fixed [V], or with --target_kl a proportional controller [Z Sec. 2.2]         next_kl_coef
 value   I11 a network of its own, from the reward model [S, O, L]; head rescaled as I8, or zero (D9)     step 2
         I12 without a reward model: from the start, head zero [Z]                                       add_scalar_head
         I13 V(s_t) is read before token t; behind the end V = 0: the episode is over                     token_scores
         I14 gamma = 1 [Z]; lambda = 0.95 [Z] or 1 [V, L]                                                  gae
 update  I15 advantages whitened over the real tokens of the whole batch and all processes [Z, L]         whiten
         I16 clipped policy loss [P Eq. 7], mean over the tokens of a mini-batch                           policy_loss
         I17 clipped value loss [N, from baselines]                                                       value_loss
         I18 several epochs, mini-batches drawn anew in each, micro-batches for memory only [P, N]        step 4
         I19 gradients clipped at norm 1, policy and value apart [L]                                      step 4
         I20 Adam with eps 1e-5 [N, N+]: early second moments are near zero, and with 1e-8 steps are large  main
         I21 learning rate warmed up [L], then annealed to zero [N]                                        lr_at
         I22 the value model alone learns in the first steps (critic pre-training) [M]                     step 4
         I23 watched: KL, entropy, ratio, clip fractions, explained variance, length, EOS [N, T]          step 5
 not used    reward whitening per batch [Z]: I8 and I15 do its work [N+ has it off]; entropy bonus: KL keeps entropy;
         vf_coef: networks apart and Adam, which does not see a loss' scale; pre-training loss (PPO-ptx) [O]; reward
         clipping [M]; rejection of answers without a full stop [Z]: answers here are words.

symbol        name           shape   meaning                                                        made in
o_{i,t}       tokens         (B,G,T) sampled answers; N = B*G, row b*G + g                          step 1
m_{i,t}       mask           (N,T)   1 on answer tokens including EOS, 0 on questions not scored    step 3
r_{i,t}       rewards        (N,T)   -kl_coef * k1, and the score at the last token            I6-7 step 3
V(s_t)        values         (N,T)   the value model before the update                              step 3
A_t, R_t      advantages, returns    (N,T)  GAE, and A_t + V(s_t)                       [GAE Eq. 16] step 3
rho_t         ratio          (N,T)   pi / pi_old                                          [P Eq. 6] step 4
"""

import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from flags import (
    ORACLES,
    WORLD,
    ModelArgs,
    OracleArgs,
    RolloutArgs,
    above_zero,
    answer_help,
    at_least,
    check_start,
    check_training,
    parse_args,
    world_size,
)


@dataclass
class Args(OracleArgs, RolloutArgs, ModelArgs):  # the last groups: flags.py
    PRESETS = {"paper": dict(  # RLAIF/scripts/train_rl_model.sh of [V]; no annotation: this is not a flag
        prompts_per_step=256, G=1, mini_batches=2, ppo_epochs=2, lr=3e-5, value_lr=3e-5, schedule="cosine",
        warmup_steps=5, value_warmup=0, kl_coef=0.1, target_kl=0.0, center_scores=False, reward_scale=10.0,
        missing_eos_penalty=8.0, length_penalty=10.0, clip_range=0.2, value_clip_range=0.2, gamma=1.0, lam=1.0,
        temperature=1.0, adam_eps=1e-8, max_new_tokens=896, lora_r=64, lora_alpha=16, quantize="nf4",
        dtype="bfloat16", oracle_dtype="bfloat16", oracle_tokens=4096, gradient_checkpointing=True,
        micro_batch_size=8, stop_oracle="")}
    # -- algorithm
    preset: str = HfArg(default="", help="paper: defaults of VLM-RLAIF's script, QLoRA included; other flags still win")
    oracle: str = HfArg(default="reward_model", help="whose score is the reward: reward_model | judge | context | api: "
                        "AI feedback; reference: token F1 with the label; several: the mean of their ranks")
    random_reward: bool = HfArg(default=False, help="control: random numbers in place of the scores")
    kl_coef: float = HfArg(default=0.1, help="weight of the per-token KL to the start, in the reward (I7)")
    target_kl: float = HfArg(default=0.0, help="nats per answer that the adaptive controller aims at (I10); 0: fixed")
    kl_horizon: int = HfArg(default=10000, help="answers in which kl_coef changes by about 20 % at most (I10)")
    center_scores: bool = HfArg(default=True, help="score less the mean of the question's G answers (D9)")
    reward_scale: float = HfArg(default=0.0, help="factor on the scores; 0: normalised on the first batch (D3)")
    missing_eos_penalty: float = HfArg(default=1.0, help="taken off the score of an answer without EOS (I9)")
    length_penalty: float = HfArg(default=0.0, help="taken off the score times length / --max_new_tokens (I9)")
    gamma: float = HfArg(default=1.0, help="discount (I14)")
    lam: float = HfArg(default=0.95, help="GAE's lambda (I14)")
    clip_range: float = HfArg(default=0.2, help="epsilon of the clipped policy loss (I16)")
    value_clip_range: float = HfArg(default=0.2, help="how far a value may move per batch, in units of reward (I17)")
    ppo_epochs: int = HfArg(default=2, help="passes over a batch of answers (I18)")
    mini_batches: int = HfArg(default=2, help="optimizer steps per pass (I18)")
    value_warmup: int = HfArg(default=5, help="first steps in which only the value model learns (I22)")
    stop_oracle: str = HfArg(default="", help="oracle that chooses the best policy and stops the run (D7); empty: the "
                             "last policy is final")
    patience: int = HfArg(default=3, help="evaluations without progress after which --stop_oracle stops")
    # -- networks
    value_model: str = HfArg(default="", help="start of the value model: a reward model (with --lora_r: an adapter); "
                             "sft: the policy's start with a zero head; empty: --reward_model where it gives the "
                             "reward, else sft (I11, I12)")
    lora_r: int = HfArg(default=0, help="LoRA rank on the decoder [V: 64]: one base network, several adapters (D6); "
                        "0 trains all weights but CLIP's")
    lora_alpha: int = HfArg(default=16, help="LoRA alpha [V: 16]")
    quantize: str = HfArg(default="none", help="none, or nf4: QLoRA, needs --lora_r")
    # -- budget [D8]
    steps: int = HfArg(default=150, help="rollout steps")
    prompts_per_step: int = HfArg(default=48, help="questions per step, over all processes [V: 256]")
    G: int = HfArg(default=5, help="answers per question (D4) [V: 1]")
    micro_batch_size: int = HfArg(default=12, help="questions (times G answers) per forward pass; no effect but memory")
    lr: float = HfArg(default=3e-4, help="peak learning rate of the policy")
    value_lr: float = HfArg(default=3e-4, help="peak learning rate of the value model")
    schedule: str = HfArg(default="linear", help="linear | cosine, both to zero (I21)")
    warmup_steps: int = HfArg(default=10, help="steps of linear warm-up (I21)")
    adam_eps: float = HfArg(default=1e-5, help="Adam's epsilon (I20)")
    max_new_tokens: int = HfArg(default=16, help="longest answer, EOS included")
    temperature: float = HfArg(default=1.0, help="sampling temperature, the same in every log-probability (I1)")
    # -- data and models
    data: str = HfArg(default=f"{WORLD}/train.json", help="videos and questions; answers: --oracle reference only")
    video_root: str = HfArg(default="", help="where the videos are; empty: beside the annotation file")
    eval_data: str = HfArg(default=f"{WORLD}/val.json", help="held-out questions: learning curve, early stop; or empty")
    eval_questions: int = HfArg(default=500, help="how many of them")
    eval_steps: int = HfArg(default=25, help="steps between evaluations")
    model: str = HfArg(default="", help="the SFT start; empty: runs/sft/policy_s<seed>/final, built if missing")
    # -- plumbing
    name: str = HfArg(default="reward_model", help="run name: runs/ppo_rlaif/<name>_s<seed>")
    seed: int = HfArg(default=0, help="order of the questions and all sampled answers")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features and narratives")
    save_steps: int = HfArg(default=50, help="steps between checkpoints")
    resume: bool = HfArg(default=False, help="continue the run of this name where it stopped")

    def __post_init__(self):
        super().__post_init__()
        for flag, choices in (("preset", ("", "paper")), ("stop_oracle", ("", *ORACLES)),
                              ("schedule", ("linear", "cosine"))):
            if getattr(self, flag) not in choices:
                raise ValueError(f"--{flag} {getattr(self, flag)}: choose {', '.join(c or 'nothing' for c in choices)}")
        self.check_rollouts()
        check_training(self)
        at_least(self, G=1, steps=1, prompts_per_step=1, micro_batch_size=1, ppo_epochs=1, mini_batches=1,
                 max_new_tokens=1, eval_steps=1, save_steps=1, patience=1, kl_horizon=1, kl_coef=0, target_kl=0,
                 reward_scale=0, missing_eos_penalty=0, length_penalty=0, value_warmup=0, warmup_steps=0,
                 lora_r=0, eval_questions=0)
        above_zero(self, "temperature", "lr", "value_lr", "adam_eps", "clip_range", "value_clip_range")
        for flag in ("gamma", "lam"):
            if not 0 <= getattr(self, flag) <= 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must lie between 0 and 1")
        if self.center_scores and self.G < 2:
            raise ValueError(f"--G {self.G}: --center_scores needs two answers to a question (or False)")
        if self.G < 2 and self.raters not in (["reward_model"], ["reference"]):
            raise ValueError(f"--G {self.G}: --oracle {self.oracle} compares the answers to one "
                             "question: it needs two")
        if self.clip_range >= 1:
            raise ValueError(f"--clip_range {self.clip_range}: must be below 1")
        for divisor, what in ((world_size(), "processes"), (self.mini_batches, "--mini_batches")):
            if self.prompts_per_step % divisor:
                raise ValueError(f"--prompts_per_step {self.prompts_per_step} must be a multiple of {what} ({divisor})")
        if self.target_kl and not self.kl_coef:
            raise ValueError("--target_kl: the controller multiplies --kl_coef, which must be above 0")
        if self.stop_oracle and self.eval_questions < world_size():
            raise ValueError(f"--eval_questions {self.eval_questions}: --stop_oracle needs one for each process")
        if self.stop_oracle in self.raters and not self.random_reward:
            raise ValueError(f"--stop_oracle {self.stop_oracle}: another one than --oracle, or it shares its errors")
        if self.stop_oracle and not (self.eval_data and self.eval_questions):
            raise ValueError("--stop_oracle: needs --eval_data and --eval_questions")
        if self.stop_oracle == "api":
            self.check_api(needed=True)
        self.model = self.model or sft_start(self.seed)
        check_start(self, "model")
        self.value_model = self.value_model or (self.reward_model if "reward_model" in self.raters else "sft")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch

import evaluate
import harness
from api_oracle import ApiError
from data import DataError, FeatureCache, read_records
from oracle import build_oracle, log_counts, make_oracle
from questions import build_embedded, choose_questions, question_indices, sft_start, times_before
from ranks import differ, random_scores
from roles import Roles, value_prompts
from rollouts import unpacked
from video_llm import Prefix, answer_mask, generate, token_logprobs, token_scores, unwrap


# ---------------------------------------------------------------------------------------------------------------
# Equations: tensors in, tensors out. N answers, T tokens; mask (N,T) 1 on real tokens; everything is 0 behind them
# ---------------------------------------------------------------------------------------------------------------
def centered(scores):
    """[D9] Scores (B,G) less the mean of their group: what is left is how an answer compares with its neighbours."""
    return scores - scores.mean(-1, keepdim=True)


def shaped_scores(scores, ended, lengths, missing_eos_penalty, length_penalty, max_length):
    """[I9] The oracle's scores less what an answer pays for not ending and for its length. All (B,G) -> (B,G)."""
    return scores - missing_eos_penalty * (~ended).float() - length_penalty * lengths / max_length


def token_rewards(scores, logprobs, ref_logprobs, lengths, kl_coef):
    """[I6, I7; Z Eq. 2; D1, D2] r_t = -kl_coef (log pi - log pi_ref)_t, and the score at the last *real* token.

    scores (N,), logprobs and ref_logprobs (N,T), lengths (N,) counted with EOS -> rewards (N,T), 0 behind the end.
    """
    mask = answer_mask(lengths, logprobs.shape[-1])
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask  # (N,T)
    last = (lengths - 1).unsqueeze(1)  # (N,1)
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def gae(rewards, values, mask, gamma, lam):
    """[GAE Eq. 16; I13, I14] delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  R_t = A_t + V_t.

    V and A behind an answer's end are 0 (the episode is over). (N,T) (N,T) (N,T) () () -> A (N,T), R (N,T).
    """
    A, next_value, next_A = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        A[:, t] = (delta + gamma * lam * next_A) * mask[:, t]
        next_value, next_A = values[:, t] * mask[:, t], A[:, t]
    return A, (A + values) * mask


def whiten(x, mask, mean, std):
    """[I15] Mean 0, standard deviation 1 over the real tokens; mean and std are those of all processes."""
    return (x - mean) / (std + 1e-8) * mask


def policy_loss(logprobs, old_logprobs, advantages, clip_range):
    """[I16; P Eq. 7] max(-rho A, -clip(rho, 1-eps, 1+eps) A) per token: the pessimistic one. (N,T) x 3, () -> (N,T)."""
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def value_loss(values, old_values, returns, clip_range):
    """[I17] 1/2 max((V - R)^2, (V_clipped - R)^2), V_clipped within clip_range of the old value. (N,T) x 3 -> (N,T).

    No gradient where the value has left the range and moves on in the same direction towards its return.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def next_kl_coef(kl_coef, kl, target_kl, answers, horizon):
    """[I10; Z Sec. 2.2] Every `horizon` answers the coefficient grows by the relative error of the KL, which is clipped
    at 20 %: a proportional controller in log space. kl: nats per answer, the mean of the batch."""
    return kl_coef * (1 + min(max(kl / target_kl - 1, -0.2), 0.2) * answers / horizon)


def lr_at(step, args, peak):
    """[I21] Linear warm-up, then linear or cosine to zero."""
    left = (args.steps - step) / args.steps
    decay = left if args.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    return peak * min((step + 1) / (args.warmup_steps + 1), decay)


# ---------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------
def main(args):
    rank, world, device = harness.setup_dist()
    build_embedded(args, rank)
    if args.stop_oracle:
        build_oracle(args, rank, [args.stop_oracle])
    folder = f"runs/ppo_rlaif/{args.name}_s{args.seed}"
    checkpoint = harness.open_run(folder, args, rank)

    torch.manual_seed(args.seed)  # the initialisation of LoRA; every other draw has a key of its own
    with harness.one_line_errors(DataError, OSError):
        needed = "reference" in args.raters  # labels
        records, report = read_records(args.data.split(","), args.video_root or None, labelled=needed)
        roles = Roles(args, checkpoint, device)
    processor, eos = roles.processor, roles.processor.tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(  # I20
        [dict(params=list(roles.params[name].values())) for name in ("policy", "value")], betas=(0.9, 0.95),
        eps=args.adam_eps, weight_decay=0.0)
    start = harness.load_trainer(checkpoint, optimizer) if checkpoint else 0
    state = json.loads((checkpoint / "ppo.json").read_text()) if checkpoint else dict(
        kl_coef=args.kl_coef, normal=None, best=None, best_step=0)

    cache = FeatureCache(unwrap(roles.policy), processor, args.cache)
    # left out before step 0: broken videos (listed in broken_videos.json) and clips whose labels SFT saw
    records, evals = choose_questions(args, records, report, cache, folder, rank, world)
    with harness.one_line_errors(DataError, OSError):
        loaded = (roles.policy, processor) if "reward" in roles.adapters else None
        oracle = make_oracle(args, records, str(device), loaded=loaded)
        if args.stop_oracle and len(evals) < world:
            sys.exit(f"{args.eval_data}: {len(evals)} usable questions; --stop_oracle needs one for each process")
        validate = Validation(args, evals[rank::world], roles, cache, str(device))
        value_prompt = value_prompts(args, roles, oracle, str(device))
    if rank == 0:
        print("one base network: " + ", ".join([*roles.adapters, "reference"]) if roles.adapters else
              "networks of their own: policy, value, reference, and the oracle's")
    if "reference" not in args.raters:
        records = [{**r, "answer": None} for r in records]  # RL sees videos and questions only
    log, stop = harness.Log(folder, args.steps, start, rank), False

    for step in range(start, args.steps + 1):
        if evals and (step % args.eval_steps == 0 or step == args.steps):
            with harness.one_line_errors(ApiError):
                stop = validate(log, roles, step, state, folder, rank)
            if stop or step == args.steps:
                log.step(step, show=["eval/accuracy", "eval/margin"])
        if step == args.steps or stop:
            break
        clock = [time.time()]
        indices = question_indices(len(records), step, args)
        mine, again = indices[rank::world], times_before(indices)[rank::world]  # B of this process
        batch = [records[i] for i in mine]
        clips, questions = [r["clip"] for r in batch], [r["question"] for r in batch]

        # 1. Rollout: G answers per question, one prefill per group                              [I1, I2, I4; D4]
        #    A draw is keyed by (seed, step, question, how often it came in this step before): world size and
        #    interruptions do not change it.
        prefix = Prefix.build(processor, cache, questions, clips, device)
        draw = lambda i, n: np.random.default_rng([args.seed, step, i, n]).random((args.G, args.max_new_tokens))
        uniforms = torch.from_numpy(np.stack([draw(i, n) for i, n in zip(mine, again)]))  # (B,G,T)
        with roles.as_("policy") as policy:
            # The log-probabilities noted here are not used: step 3 computes them as the update will, so that rho is 1.
            with unpacked(policy) if args.quantize == "nf4" and args.unpack_nf4 else nullcontext():
                tokens, lengths, _ = generate(policy, prefix, uniforms, eos, args.temperature, args.cuda_graphs)
        answers = processor.decode_answers(tokens, lengths)
        clock.append(time.time())

        # 2. Feedback: one score per answer. Questions the oracle cannot score are counted and masked, not dropped.
        with harness.one_line_errors(ApiError), roles.as_("reward"):
            scores, ok = oracle.score(clips, questions, answers)  # (B,G), (B,)
        if args.random_reward:
            scores = random_scores(answers, [f"{i} {n}" if n else i for i, n in zip(mine, again)], step, args.seed)
        scores, ok = scores.masked_fill(~ok.unsqueeze(-1), 0).float().to(device), ok.to(device)
        # Has any process a question whose answers the oracle told apart? If not, no optimizer step:
        # Adam's momentum and the KL would move the weights. Three such steps in a row end the run.
        scored = harness.any_scored(log, ok, differ(answers).to(device), step)
        relative = centered(scores) if args.center_scores else scores  # D9
        if state["normal"] is None and scored:  # I8, D3: from the first batch, for good
            state["normal"] = normal_of(relative, ok, args.reward_scale)
            # I11: a head that predicts the raw reward is rescaled as it is. Of centred scores (D9), or those of another
            # oracle, it knows nothing: gain 0, a zero head
            if args.value_model != "sft":
                mean, gain = state["normal"]
                its_own = args.raters == ["reward_model"] and args.value_model == args.reward_model
                roles.rescale_head(mean, gain if its_own and not args.center_scores else 0.0)
        mean, gain = state["normal"] or (0.0, 1.0)
        ended = tokens.gather(-1, (lengths - 1).unsqueeze(-1)).squeeze(-1) == eos  # (B,G)
        shaped = shaped_scores((relative - mean) * gain, ended, lengths, args.missing_eos_penalty, args.length_penalty,
                               args.max_new_tokens)  # (B,G)
        clock.append(time.time())

        # 3. Log-probabilities, values, advantages of every real token, all before the first update, no dropout [I5]
        B, G, T = tokens.shape
        mask = answer_mask(lengths * ok.unsqueeze(-1), T)  # (N,T) D1, I3
        micros = by_length(torch.arange(B), lengths, args.micro_batch_size)

        value_prefix = value_prompt(questions, clips, prefix)  # D5

        def logprobs_of(model, i):  # -> (n,T_i) x 2: log-probability and entropy, as many tokens as answers i have
            T_i = lengths[i].max()
            return token_logprobs(model, prefix.rows(i), tokens[i, :, :T_i], lengths[i], args.temperature)

        def values_of(model, i):  # -> (n,T_i)                                                                [I13]
            T_i = lengths[i].max()
            return token_scores(model, value_prefix.rows(i), tokens[i, :, :T_i], lengths[i], before=True)

        def all_tokens(function):  # -> (B,G,T), 0 behind the answers
            out = torch.zeros(B, G, T, device=device)
            for i in micros:
                part = function(i)
                out[i, :, : part.shape[-1]] = part.view(len(i), G, -1).to(out.dtype)
            return out

        with torch.no_grad():
            with roles.as_("policy") as policy:
                old_logprobs = all_tokens(lambda i: logprobs_of(policy, i)[0])
            with roles.reference() as reference:
                ref_logprobs = all_tokens(lambda i: logprobs_of(reference, i)[0])
            with roles.as_("value") as value_model:
                old_values = all_tokens(lambda i: values_of(value_model, i))
        flat = lambda x: x.view(B * G, T)
        rewards = token_rewards(shaped.view(-1), flat(old_logprobs), flat(ref_logprobs), lengths.view(-1),
                                state["kl_coef"]) * mask  # (N,T)
        advantages, returns = gae(rewards, flat(old_values) * mask, mask, args.gamma, args.lam)  # (N,T) x 2
        A_mean, A_std = moments(advantages, mask)
        whitened = whiten(advantages, mask, A_mean, A_std).view(B, G, T)
        clock.append(time.time())

        # 4. Update: several passes, in mini-batches of questions that do not depend on the number of processes    [I18]
        for group, peak in zip(optimizer.param_groups, (args.lr, args.value_lr)):
            group["lr"] = lr_at(step, args, peak)
        learns = ["value"] if step < args.value_warmup else ["policy", "value"]  # I22
        for epoch in range(args.ppo_epochs):
            order = np.random.default_rng([args.seed, step, epoch, 1]).permutation(args.prompts_per_step)
            for chunk in np.split(order, args.mini_batches):
                ours = torch.tensor([k // world for k in chunk if k % world == rank], dtype=torch.long)
                n_tokens = harness.all_sum(mask.view(B, G, T)[ours].sum().double())  # D1: global
                for i in by_length(ours, lengths, args.micro_batch_size):
                    at = lambda x: x[i, :, : lengths[i].max()].flatten(0, 1)  # (B,G,T) -> (n,T_i)
                    m = at(mask.view(B, G, T))
                    if "policy" in learns:
                        with roles.as_("policy") as policy:
                            logprobs, entropy = logprobs_of(policy, i)
                            losses = policy_loss(logprobs, at(old_logprobs), at(whitened), args.clip_range)
                            ((losses * m).sum() / n_tokens.clamp(min=1)).backward()
                        log_policy(log, losses, logprobs - at(old_logprobs), entropy, at(whitened), m, args.clip_range)
                    with roles.as_("value") as value_model:
                        values = values_of(value_model, i)
                        losses = value_loss(values, at(old_values), at(returns.view(B, G, T)), args.value_clip_range)
                        ((losses * m).sum() / n_tokens.clamp(min=1)).backward()
                    log_value(log, losses, (values - at(old_values)).abs() > args.value_clip_range, m)
                for name in learns:
                    params = list(roles.params[name].values())
                    harness.sum_gradients(params)
                    grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)  # I19
                    asked = [{"question": str(q), "answers": a} for q, a in zip(questions, answers)]
                    harness.stop_if_not_finite(grad_norm, log, folder, step, asked)
                    if name == "policy":
                        log.add("policy/grad_norm", grad_norm)
                    else:
                        log.add("val/grad_norm", grad_norm)
                if scored and n_tokens:  # else Adam's momentum alone would move the weights
                    optimizer.step()
                optimizer.zero_grad()
        clock.append(time.time())

        # 5. Log                                                                                                [I23]
        kl = ((old_logprobs - ref_logprobs).view(B * G, T) * mask).sum(-1).view(B, G)  # nats per answer
        log_batch(log, scores, shaped, kl, rewards, lengths, ended, ok, answers)
        R_mean, R_std = moments(returns, mask)
        _, error_std = moments(returns - flat(old_values), mask)
        log.add("val/explained_variance", 1 - (error_std / R_std.clamp(min=1e-8)) ** 2)
        log.add("val/return", R_mean)
        log.add("val/value", (flat(old_values) * mask).sum(), mask.sum())
        log.add("objective/advantage_std", A_std)
        for key, a, b in zip(("rollout", "oracle", "score", "update"), clock, clock[1:]):
            log.add(f"time/{key}_s", b - a)
        log_counts(log, oracle)
        log.add("charts/lr", lr_at(step, args, args.lr))
        log.add("charts/kl_coef", state["kl_coef"])
        row = log.step(step, show=["eval/accuracy", "objective/score", "objective/kl", "policy/clipfrac_high",
                                   "val/explained_variance", "rollout/len"])

        # 6. The KL coefficient for the next batch; save
        if args.target_kl and scored:
            state["kl_coef"] = next_kl_coef(state["kl_coef"], row["objective/kl"], args.target_kl,
                                            args.prompts_per_step * args.G, args.kl_horizon)
        if rank == 0 and step % 25 == 0:
            write_samples(folder, step, batch, answers, scores, kl, advantages.view(B, G, T)[..., 0])
        # adapters are saved with the policy, a value network of its own beside it
        beside = {} if roles.adapters else {"value": (roles.value, roles.value_processor)}
        harness.checkpoint(log, folder, step + 1, args.steps, args.save_steps, roles.policy, processor, optimizer,
                           about={"ppo.json": state}, beside=beside)
    roles.only_policy(Path(folder, "best.safetensors") if args.stop_oracle else None)
    harness.finish(folder, roles.policy, processor, rank)


# ---------------------------------------------------------------------------------------------------------------
# Plumbing
# ---------------------------------------------------------------------------------------------------------------
class Validation:
    """Held-out questions, every --eval_steps steps: accuracy where there are labels, and what another oracle says of
    the greedy answers beside the start's (D7). It keeps the best policy by that oracle in best.safetensors."""

    def __init__(self, args, records, roles, cache, device):
        self.records, self.cache, self.every = records, cache, args.eval_steps
        self.patience, self.longest = args.patience * args.eval_steps, args.max_new_tokens
        self.oracle = None
        if args.stop_oracle:
            self.oracle = make_oracle(args, records, device, [args.stop_oracle])
            with roles.reference() as start:
                self.before = evaluate.answer(start, roles.processor, cache, records, self.longest)

    def __call__(self, log, roles, step, state, folder, rank):
        """-> True: time to stop."""
        with roles.as_("policy") as policy:
            asked = roles.processor, self.cache, self.records, self.longest
            answers = evaluate.answer(policy, *asked)
        right = [evaluate.is_correct(a, r["answer"]) for a, r in zip(answers, self.records) if r["answer"]]
        log.add("eval/accuracy", sum(right), len(right))
        if not self.oracle:
            return False
        clips, questions = [r["clip"] for r in self.records], [r["question"] for r in self.records]
        pairs = [list(pair) for pair in zip(answers, self.before)]
        scores, ok = self.oracle.score(clips, questions, pairs)
        if not harness.any_scored(log, ok, differ(pairs), step, "--stop_oracle"):
            state["unscored"] = state.get("unscored", 0) + self.every  # nothing is known: go on
            return False
        total, count = ((scores[:, 0] - scores[:, 1]) * ok).sum().double(), ok.sum().double()
        log.add("eval/margin", total, count)
        margin = (harness.all_sum(total) / harness.all_sum(count).clamp(min=1)).item()
        if state["best"] is None or margin > state["best"]:
            state["best"], state["best_step"], state["unscored"] = margin, step, 0
            if rank == 0:
                roles.save_policy(Path(folder, "best.safetensors"))
        return step - state["best_step"] - state.get("unscored", 0) >= self.patience


def by_length(rows, lengths, size):
    """Questions `rows` in micro-batches of `size`, answers of like length together."""
    return rows[lengths[rows].max(-1).values.cpu().argsort(stable=True)].split(size) if len(rows) else []


def moments(x, mask):
    """Mean and standard deviation over the real tokens of all processes (doubles), in two passes."""
    n = harness.all_sum(mask.sum().double()).clamp(min=1)
    x = x.masked_fill(mask == 0, 0)  # 0 times inf is NaN
    mean = harness.all_sum((x * mask).sum().double()) / n
    return mean, (harness.all_sum(((x - mean) ** 2 * mask).sum().double()) / n).sqrt()


def normal_of(scores, ok, reward_scale):
    """[I8, D3] (shift, factor) that normalise the scores (B,G) of the first batch; scores all alike keep their size."""
    if reward_scale:
        return 0.0, reward_scale
    mean, std = moments(scores, ok.float().unsqueeze(-1).expand_as(scores))
    return mean.item(), (1 / std).item() if std > 1e-6 else 1.0


@torch.no_grad()
def log_policy(log, losses, log_ratio, entropy, advantages, mask, clip_range):
    n, log_ratio = mask.sum(), log_ratio * mask
    ratio = log_ratio.exp()
    log.add("losses/policy_loss", (losses * mask).sum(), n)
    log.add("policy/entropy", (entropy * mask).sum(), n)
    log.add("policy/approx_kl", ((ratio - 1 - log_ratio) * mask).sum(), n)
    log.add("policy/ratio", (ratio * mask).sum(), n)
    log.add("policy/clipfrac_low", ((ratio < 1 - clip_range) & (advantages < 0)).float().mul(mask).sum(), n)
    log.add("policy/clipfrac_high", ((ratio > 1 + clip_range) & (advantages > 0)).float().mul(mask).sum(), n)


@torch.no_grad()
def log_value(log, losses, clipped, mask):
    log.add("losses/value_loss", (losses * mask).sum(), mask.sum())
    log.add("val/clipfrac", (clipped * mask).sum(), mask.sum())


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


def write_samples(folder, step, batch, answers, scores, kl, advantages):
    with open(Path(folder, "samples.jsonl"), "a") as f:
        rounded = [[[round(v, 4) for v in row] for row in x.tolist()] for x in (scores, kl, advantages)]
        for r, group, score, nats, A in list(zip(batch, answers, *rounded))[:3]:
            row = dict(step=step, video=str(r["clip"].path), question=r["question"], answers=group, scores=score,
                       kl=nats, advantages=A)  # advantages: of the first token, before whitening
            f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(parse_args(Args))
