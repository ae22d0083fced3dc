"""Planted errors: each makes one place of the code wrong and names the tests that must notice it.

`make mutants` puts each into a copy of the repository and runs its tests (mutants.py). Where a
change of the code takes the place away (test_planted.py says so), plant it where the work is now.
"""

from functools import partial
from typing import NamedTuple


class Planted(NamedTuple):
    id: str
    file: str
    old: str  # occurs exactly once in the file
    new: str
    breaks: str
    tests: tuple  # pytest files or node ids, relative to tests/


PLANTED = []


def plant(file, id, old, new, breaks, *tests):
    PLANTED.append(Planted(id, file, old, new, breaks, tests))


# --- grpo_rank.py ---------------------------------------------------------------------------------
grpo = partial(plant, "grpo_rank.py")
EQUATIONS = "test_equations.py"
NDCG = "test_ndcg_advantages.py"
GRPO_GRADIENT = "test_scripts.py::test_the_gradient_of_a_step"
GRPO_STEP = "test_whole_steps.py::test_grpo_rank"
GRPO_RESUME = "test_resume.py::test_killed_and_resumed_equals_uninterrupted[grpo_rank]"
GRPO_RANKS = "test_ranks.py::test_two_processes_equal_one[grpo_rank]"
UNSCORED = "test_numbers.py::test_a_step_without_a_ranking_moves_no_weights_and_three_end_the_run"

grpo("grpo_min", "return torch.minimum(ratio * A", "return torch.maximum(ratio * A",
     "the surrogate takes the better of both terms", EQUATIONS)
grpo("grpo_clip_sides", "ratio.clamp(1 - clip_range, 1 + clip_range) * A)",
     "ratio.clamp(1 + clip_range, 1 - clip_range) * A)", "clip range upside down", EQUATIONS)
grpo("grpo_not_zero_sum",
     "delta = 1 - gain(ranks)\n        A = delta.mean(-1, keepdim=True) - delta",
     "delta = 1 - gain(ranks)\n        A = 0.3 - delta", "advantages of ranks do not sum to zero",
     NDCG)
grpo("grpo_signed_not_zero_sum", "A = s - s.mean(-1, keepdim=True)", "A = s",
     "signed advantages do not sum to zero", NDCG)
grpo("grpo_std", "std = A.square().mean(-1, keepdim=True).sqrt()", "std = A.std(-1, keepdim=True)",
     "deviation with n - 1", EQUATIONS)
grpo("grpo_all_tied", "return torch.where(all_tied, 0.0, A)", "return A",
     "an oracle without preference gives a direction", NDCG)
grpo("grpo_penalty", "/ (1 + torch.log1p(place))", "/ (1 + place)",
     "another penalty than the printed one", NDCG)
grpo("grpo_gain", "g = torch.log2(2 + r) / (1 + r)", "g = 1 / torch.log2(2 + r)",
     "another gain of ranks", NDCG)
grpo("grpo_k3", "return log_r.exp() - 1 - log_r", "return log_r.square() / 2", "k2 in place of k3",
     EQUATIONS)
grpo("grpo_kl_sign", "(-J + args.beta * kl", "(-J - args.beta * kl", "the KL is rewarded",
     GRPO_GRADIENT)
grpo("grpo_kl_swapped", "kl_k3(logprobs, ref_logprobs[k])", "kl_k3(ref_logprobs[k], logprobs)",
     "KL in the other direction", GRPO_GRADIENT)
grpo("grpo_entropy_sign", "- args.entropy_coef * entropy) * mask",
     "+ args.entropy_coef * entropy) * mask", "entropy is punished", GRPO_GRADIENT)
grpo("grpo_baseline", "scores.double() - scores.double().mean(-1, keepdim=True)",
     "scores.double() - scores.double().mean()", "the mean of the batch as every group's baseline",
     GRPO_STEP)
grpo("grpo_masked_loss", "mask *= used[i].repeat_interleave(args.G, 0)", "pass",
     "groups without an order have KL and entropy", GRPO_GRADIENT)
grpo("grpo_masked_mean", "(lengths * used).sum().double()", "lengths.sum().double()",
     "masked groups count in the token mean", GRPO_GRADIENT)
grpo("grpo_temperature_loss", "tokens[i, :, :T], lengths[i], args.temperature,",
     "tokens[i, :, :T], lengths[i], 1.0,", "no temperature in the log-probabilities of the loss",
     GRPO_GRADIENT)
grpo("grpo_temperature_sampling", "args.temperature, args.cuda_graphs)", "1.0, args.cuda_graphs)",
     "no temperature in the call that samples", GRPO_STEP)
plant("video_llm.py", "grpo_same_draws_steps", "np.random.default_rng([seed, step, i, n])",
      "np.random.default_rng([seed, i, n])", "the same random numbers in every step", GRPO_STEP)
plant("video_llm.py", "grpo_same_draws_questions", "np.random.default_rng([seed, step, i, n])",
      "np.random.default_rng([seed, step, n])", "the same random numbers for every question",
      GRPO_STEP)
plant("video_llm.py", "grpo_same_draws_again", "np.random.default_rng([seed, step, i, n])",
      "np.random.default_rng([seed, step, i])",
      "a question that comes twice in a step has the same random numbers", GRPO_STEP)
grpo("grpo_lr", 'group["lr"] = lr_at(step, args.steps, args.lr)', "pass",
     "the learning rate of the schedule never applied", GRPO_STEP)
grpo("grpo_zero_grad", "            optimizer.zero_grad()\n            log.add",
     "            if epoch + 1 == args.inner_epochs:\n                optimizer.zero_grad()\n    "
     "        log.add", "gradients not cleared between inner epochs", GRPO_STEP)
grpo("grpo_old_is_new", "J = clipped_surrogate(logprobs, old_logprobs[k], A",
     "J = clipped_surrogate(logprobs, logprobs.detach(), A", "the ratio is 1 in later inner epochs",
     GRPO_STEP)
grpo("grpo_scale_ignored", "return scale_by_std(A) if scale else A", "return scale_by_std(A)",
     "--scale_advantages False ignored", GRPO_STEP)
grpo("grpo_copies", "ranks_of(sampled_logprobs.gather(1, first_copy)).cpu()",
     "ranks_of(sampled_logprobs).cpu()", "rounding orders copies of an answer", GRPO_STEP)
grpo("grpo_unranked_step", "if scored:", "if args.lr:",
     "momentum moves weights where nothing was ranked", UNSCORED + "[grpo_rank]")
plant("plumbing/run.py", "grpo_resumed_reference",
      "start = model if self.args.lora_r or not self.checkpoint else self.load(path)[0]",
      "start = model", "a resumed run's reference is its checkpoint", GRPO_RESUME)
grpo("grpo_world", "(loss.sum() / n_tokens * run.world).backward()",
     "(loss.sum() / n_tokens).backward()", "loss not scaled for DDP's mean", GRPO_RANKS)
grpo("grpo_no_sync", "when=k < len(micros) - 1", "when=k < len(micros)",
     "gradients of processes never meet", GRPO_RANKS)
grpo("grpo_shared_out", "step_questions(len(records), step, args)[run.rank :: run.world]",
     "step_questions(len(records), step, args)[:: run.world]",
     "all processes ask the same questions", GRPO_RANKS)

# --- sft.py ---------------------------------------------------------------------------------------
sft = partial(plant, "sft.py")
SFT_STEP = "test_whole_steps.py::test_sft"
SFT_RUN = "test_scripts.py::test_sft"
SFT_RESUME = "test_resume.py::test_killed_and_resumed_equals_uninterrupted[sft]"
SFT_RANKS = "test_ranks.py::test_two_processes_equal_one[sft]"
SFT_PACKED = "test_sft.py::test_packed_answers_have_the_likelihood_that_each_has_alone"
SFT_OLD = "test_sft.py::test_a_run_without_the_seed_in_its_folder_is_not_overlooked"
SFT_PAIR = "test_sft.py::test_a_comparison_is_the_right_answer_and_another_to_the_same_question"

sft("sft_eos", "(place < lengths[:, None])", "(place < lengths[:, None] - 1)", "EOS is not learned",
    SFT_PACKED)
sft("sft_prompt", "(place >= (lengths - counts)[:, None])", "(place >= 0)",
    "the question is learned, too", SFT_PACKED)
sft("sft_pads", "/ mask.sum(-1).clamp(min=1)", "/ mask.shape[-1]",
    "pads count in an example's mean", "test_sft.py")
sft("sft_per_micro_batch", "(nll.sum() * run.world / n_examples)", "(nll.mean() * run.world)",
    "the mean is over a micro-batch", SFT_RANKS)
sft("sft_world", "(nll.sum() * run.world / n_examples)", "(nll.sum() / n_examples)",
    "loss not scaled for DDP's mean", SFT_RANKS)
sft("sft_no_sync", "when=i < len(micros) - 1", "when=i < len(micros)",
    "gradients of processes never meet", SFT_RANKS)
sft("sft_lr", 'group["lr"] = lr_at(step, args.steps, args.lr, args.warmup)', "pass",
    "the learning rate of the schedule never applied", SFT_STEP)
sft("sft_zero_grad", "        optimizer.zero_grad()\n", "", "gradients add up from step to step",
    SFT_STEP)
sft("sft_same_batch", 'random.Random(f"{args.seed} {step}")', 'random.Random(f"{args.seed}")',
    "the same examples in every step", SFT_STEP)
sft("sft_curriculum", "step < args.easy_steps * args.steps", "step >= args.easy_steps * args.steps",
    "the easy answers come last", SFT_STEP)
sft("sft_easy", "return lengths <= np.quantile", "return lengths >= np.quantile",
    "the long answers are the easy ones", "test_sft.py")
sft("sft_videos", "videos = [clip for *_, clip, _ in rows if clip is not None]",
    "videos = [clip for *_, clip, _ in rows[1:] + rows[:1] if clip is not None]",
    "each row sees the next row's video", SFT_STEP)
sft("sft_one_order", "rng.shuffle(pair)", "pass", "the right answer always stands first", SFT_PAIR)
sft("sft_learns_wrong", '"question": question, "answer": record["answer"]}',
    '"question": question, "answer": pair[0]}', "the first answer is learned, whichever it is",
    SFT_PAIR)

plant("plumbing/run.py", "sft_old_folder", '(unseeded / "args.json").exists() and',
      "(unseeded / \"args.jsn\").exists() and",
      "a run of an earlier version begins anew beside its work", SFT_OLD)
plant(
    "plumbing/run.py",
    "sft_old_name",
    '    "name",  # the folder says it',
    "    # the folder says it",
    "a run of an earlier version cannot be resumed",
    SFT_OLD,
)

# --- reward_model.py ------------------------------------------------------------------------------
rm = partial(plant, "reward_model.py")
RM_STEP = "test_whole_steps.py::test_reward_model"
RM_HAND = (
    "test_reward_model.py::test_bradley_terry_by_hand",
    "test_reward_model.py::test_only_the_difference_counts_but_for_the_centring",
    "test_reward_model.py::test_the_reward_stands_at_the_last_token",
)
RM_PAIRS = "test_reward_model.py::test_choose_pairs"
RM_PACKED = "test_reward_model.py::test_packed_pairs_are_rewarded_as_if_alone"
RM_TELL = "test_own_rows.py::test_what_the_judge_tells_belongs_to_its_pair"
RM_ASK = "test_own_rows.py::test_every_question_is_asked_with_numbers_of_its_own"
RM_TWO = "test_reward_model.py::test_two_processes_collect_and_train_as_one"

rm("rm_sign", "-F.logsigmoid(rewards[:, 0] - rewards[:, 1])",
   "-F.logsigmoid(rewards[:, 1] - rewards[:, 0])", "the rejected answer is learned", *RM_HAND)
rm("rm_centring", "return rewards.sum(-1).square()", "return rewards.square().sum(-1)",
   "centring pulls at the difference", *RM_HAND)
rm("rm_centring_sign", "((bt + centring).sum()", "((bt - centring).sum()",
   "the mean of the rewards is driven away", RM_STEP)
rm("rm_last_token", "lengths.reshape(-1, 1) - 1)", "lengths.reshape(-1, 1) - 2)",
   "the reward is read a token early", *RM_HAND)
rm("rm_normalise", "head.bias.sub_(mean).div_(std)", "head.bias.sub_(mean)",
   "the head's shift is not scaled", "test_reward_model.py::test_normalised_rewards")
rm("rm_choice", "(a, b) if p > 0.5 else (b, a)", "(a, b) if p < 0.5 else (b, a)",
   "the judge's choice turned round", RM_PAIRS)
rm("rm_near_tie", "abs(p - 0.5) >= max(min_margin, 1e-6)", "abs(p - 0.5) >= 1e-6",
   "--min_margin ignored", RM_PAIRS)
rm("rm_empty_chosen", "if not drop and not chosen:", "if not drop and chosen is None:",
   "silence can be preferred", RM_PAIRS)
plant("plumbing/pairs.py", "rm_split", 'random.Random(f"{seed} held out {name}")',
      "random.Random(f\"{seed} held out {pair['id']}\")",
      "held-out pairs share videos with training",
      "test_reward_model.py::test_held_out_pairs_share_no_video")
rm("rm_places", "r[batch.columns[b]]", "r[batch.columns[b].flip(-1)]",
   "chosen and rejected exchanged", RM_PACKED)
rm("rm_measure", "torch.where(truth > 0, won, 1 - won)", "torch.where(truth > 0, won, won)",
   "agreement with the oracle is called truth", "test_reward_model.py::test_measures_by_hand")
rm("rm_measured_on_training", "rewards_on(held_groups[run.rank", "rewards_on(groups[run.rank",
   "eval/* measured on training pairs", RM_STEP)
plant("plumbing/pairs.py", "rm_narratives_shifted", "dict(zip(clips, judge.narratives(clips)))",
      "dict(zip(clips, judge.narratives(clips[1:] + clips[:1])))",
      "narratives shifted by one video", RM_TELL)
plant("plumbing/pairs.py", "rm_owns_shifted", "processes.all_gather(dict(zip(mine, answers)))",
      "processes.all_gather(dict(zip(mine, answers[1:] + answers)))",
      "the judge's own answers shifted by one question", RM_TELL)
rm("rm_rates", "(args.lr, args.head_lr)", "(args.head_lr, args.lr)",
   "the two learning rates exchanged", RM_STEP)
plant("plumbing/processes.py", "rm_clip", "torch.nn.utils.clip_grad_norm_(params, 1.0)",
      "torch.nn.utils.clip_grad_norm_(params, 10.0)", "gradients clipped at norm 10", RM_STEP)
rm("rm_zero_grad", "        optimizer.zero_grad()\n", "", "gradients add up from step to step",
   RM_STEP)
rm("rm_same_draws", "np.random.default_rng([args.seed, i])", "np.random.default_rng([args.seed])",
   "the same random numbers for every question", RM_ASK)
rm("rm_temperature", "processor.tokenizer.eos_token_id, args.temperature)",
   "processor.tokenizer.eos_token_id)", "--temperature ignored in sampling", RM_ASK)
rm("rm_world", "* run.world / n_pairs).backward()", "/ n_pairs).backward()",
   "loss not scaled for DDP's mean", RM_TWO)

# --- ppo_rlaif.py ---------------------------------------------------------------------------------
ppo = partial(plant, "ppo_rlaif.py")
PPO_STEP = "test_whole_steps.py::test_ppo"
PPO_KL = "test_ppo.py::test_the_score_stands_at_the_last_real_token_and_the_kl_at_each"
PPO_GAE = ("test_ppo.py::test_gae_by_hand", "test_ppo.py::test_gae_equals_the_double_sum")
PPO_GRADIENT = "test_ppo.py::test_the_gradient_of_a_step"
PPO_RESUME = "test_ppo.py::test_killed_and_resumed_equals_uninterrupted[lora]"
PPO_TWO = "test_ppo.py::test_two_processes_equal_one"

ppo("ppo_kl_sign", "rewards = -kl_coef * (logprobs", "rewards = kl_coef * (logprobs",
    "the KL is rewarded", PPO_KL)
ppo("ppo_score_on_pad", "last = (lengths - 1).unsqueeze(1)",
    "last = torch.full_like(lengths, logprobs.shape[-1] - 1).unsqueeze(1)",
    "the score stands on a pad", PPO_KL)
ppo("ppo_shaped", "missing_eos_penalty * (~ended).float()", "missing_eos_penalty * ended.float()",
    "answers pay for ending", "test_ppo.py::test_shaped_scores_by_hand")
ppo("ppo_lambda", "(delta + gamma * lam * next_A)", "(delta + gamma * next_A)", "lambda ignored",
    *PPO_GAE)
ppo("ppo_values_behind_end", "next_value, next_A = values[:, t] * mask[:, t], A[:, t]",
    "next_value, next_A = values[:, t], A[:, t]", "values of pads enter the last advantage",
    *PPO_GAE)
ppo("ppo_returns", "return A, (A + values) * mask", "return A, A * mask",
    "returns without the values", *PPO_GAE)
ppo("ppo_whiten", "return (x - mean) / (std + 1e-8) * mask", "return x / (std + 1e-8) * mask",
    "advantages are not centred", "test_ppo.py::test_whitening_sees_real_tokens_only")
ppo("ppo_clip", "return torch.maximum(-advantages * ratio",
    "return torch.minimum(-advantages * ratio", "the optimistic one of both losses",
    "test_ppo.py::test_policy_loss_sign_table")
ppo("ppo_value_clip", "0.5 * torch.maximum((values", "0.5 * torch.minimum((values",
    "the smaller one of both value losses", "test_ppo.py::test_value_clipping")
ppo("ppo_controller", "max(kl / target_kl - 1, -0.2)", "max(1 - kl / target_kl, -0.2)",
    "KL above its target lowers the coefficient", "test_ppo.py::test_kl_controller")
plant("ppo_rlaif.py", "ppo_warmup", "peak * min((step + 1) / (warmup_steps + 1), decay)",
      "peak * max((step + 1) / (warmup_steps + 1), decay)", "no warm-up",
      "test_ppo.py::test_schedules")
ppo("ppo_centred", "return scores - scores.mean(-1, keepdim=True)", "return scores - scores.mean()",
    "scores centred over the batch, not in their group",
    "test_ppo.py::test_centred_scores_compare_the_answers_to_one_question")
ppo("ppo_centring_sign", "relative = centered(scores) if", "relative = -centered(scores) if",
    "the sign of centring in the loop", PPO_STEP)
ppo("ppo_masked", "answer_mask(lengths * ok.unsqueeze(-1), T)", "answer_mask(lengths, T)",
    "answers without a score are learned from", PPO_GRADIENT)
ppo("ppo_temperature_loss", "tokens[i, :, :T_i], lengths[i], args.temperature, entropy",
    "tokens[i, :, :T_i], lengths[i], 1.0, entropy", "no temperature in the log-probabilities",
    PPO_GRADIENT)
ppo("ppo_temperature_sampling", "eos, args.temperature, args.cuda_graphs)",
    "eos, 1.0, args.cuda_graphs)", "no temperature in the call that samples", PPO_STEP)
ppo("ppo_value_after", "lengths[i], before=True)", "lengths[i], before=False)",
    "a value has seen its token", PPO_GRADIENT)
plant("video_llm.py", "ppo_same_draws", "np.random.default_rng([seed, step, i, n])",
      "np.random.default_rng([seed, i, n])", "the same random numbers in every step", PPO_STEP)
ppo("ppo_same_shuffle", "np.random.default_rng([args.seed, step, epoch, 1])",
    "np.random.default_rng([args.seed, step, 1])", "the same mini-batches in every epoch", PPO_STEP)
plant("ppo_rlaif.py", "ppo_policy_range",
      "logprobs, of(old_logprobs), of(whitened), args.clip_range)",
      "logprobs, of(old_logprobs), of(whitened), args.value_clip_range)",
      "the policy is clipped in the value's range", PPO_STEP)
plant("ppo_rlaif.py", "ppo_value_range",
      "values, of(old_values), of(returns), args.value_clip_range)",
      "values, of(old_values), of(returns), args.clip_range)",
      "values are clipped in the policy's range", PPO_STEP)
plant("ppo_rlaif.py", "ppo_old_values",
      "values, of(old_values), of(returns), args.value_clip_range)",
      "values, values.detach(), of(returns), args.value_clip_range)", "a value is never clipped",
      PPO_STEP)
plant("ppo_rlaif.py", "ppo_old_logprobs",
      "logprobs, of(old_logprobs), of(whitened), args.clip_range)",
      "logprobs, logprobs.detach(), of(whitened), args.clip_range)", "the ratio is always 1",
      PPO_STEP)
ppo("ppo_rates", "(args.lr, args.value_lr)):", "(args.value_lr, args.lr)):",
    "the two learning rates exchanged", PPO_STEP)
plant("ppo_rlaif.py", "ppo_lr",
      'group["lr"] = lr_at(step, args.steps, peak, args.warmup_steps, args.schedule)', "pass",
      "the learning rates never applied", PPO_STEP)
plant("ppo_rlaif.py", "ppo_mini_batch_mean",
      "processes.all_sum(mask.view(B, G, T)[here].sum().double())",
      "processes.all_sum(mask.sum().double())", "a mini-batch's mean divides by the whole batch",
      PPO_STEP)
ppo("ppo_zero_grad", "                optimizer.zero_grad()\n", "", "gradients add up", PPO_STEP)
plant("plumbing/processes.py", "ppo_clip_norm", "torch.nn.utils.clip_grad_norm_(params, 1.0)",
      "torch.nn.utils.clip_grad_norm_(params, 10.0)", "gradients clipped at norm 10", PPO_STEP)
ppo("ppo_value_warmup", "if step < args.value_warmup else", "if step <= args.value_warmup else",
    "the policy starts a step late", PPO_STEP)
ppo("ppo_normal_each_batch", 'if state["normal"] is None and scored:', "if scored:",
    "scores normalised anew on every batch", PPO_STEP)
ppo("ppo_unscored_step", "if scored and n_tokens:", "if args.lr:",
    "momentum moves weights where nothing was scored", UNSCORED + "[ppo_rlaif]")
ppo("ppo_controller_off", "if args.target_kl and scored:", "if args.target_kl < 0:",
    "--target_kl ignored", PPO_STEP)
plant("ppo_rlaif.py", "ppo_state_lost",
      'state = json.loads((run.checkpoint / "ppo.json").read_text())', "pass",
      "a resumed run normalises and steers anew", PPO_RESUME)
plant("plumbing/validation.py", "ppo_margin_sign", "((scores[:, 0] - scores[:, 1]) * ok)",
      "((scores[:, 1] - scores[:, 0]) * ok)", "the worst policy is kept",
      "test_ppo.py::test_the_best_policy_is_kept_and_patience_ends")
plant("ppo_rlaif.py", "ppo_not_summed", "processes.sum_gradients(params)", "pass",
      "gradients of processes never meet", PPO_TWO)

# --- ppo_rlaif.py ---------------------------------------------------------------------------------
roles = partial(plant, "ppo_rlaif.py")
VALUE_STORY = "test_own_rows.py::test_the_value_model_reads_the_narrative_of_its_own_video"
roles("roles_value_without_narrative",
      "narrator.narratives(clips) if narrator else [None] * len(clips)", "[None] * len(clips)",
      "the value model does not read the narrative", VALUE_STORY)
roles("roles_narratives_shifted", "for q, narrative in zip(questions, narratives)]",
      "for q, narrative in zip(questions, narratives[1:] + narratives[:1])]",
      "the value model reads another video's narrative", VALUE_STORY)
roles("roles_head_not_scaled", ".mul_(gain)", ".mul_(1.0)",
      "the value's head is not scaled with the scores",
      "test_ppo.py::test_the_value_model_starts_from_the_reward_model")
roles("roles_one_adapter", "self.policy.set_adapter(self.adapters[name]",
      'self.policy.set_adapter("default"', "every role plays the policy",
      "test_ppo.py::test_roles_take_turns")
plant("plumbing/run.py", "roles_resumed_reference",
      "start = model if self.args.lora_r or not self.checkpoint else self.load(path)[0]",
      "start = model", "a resumed run's reference is its checkpoint",
      "test_ppo.py::test_killed_and_resumed_equals_uninterrupted[full]")

# --- dpo_iter_w2s.py, plumbing/zoo.py -----------------------------------------------------------
dpo = partial(plant, "dpo_iter_w2s.py")
DPO_STEP = "test_whole_steps.py::test_dpo"
DPO_HAND = "test_dpo.py::test_dpo_loss_and_gradient_by_hand"
DPO_GRADIENT = "test_dpo.py::test_the_gradient_of_a_step"
DPO_BEST = "test_dpo.py::test_best_and_worst"
DPO_LORA = "test_dpo.py::test_for_lora_scaling_the_delta_is_extrapolating_the_merged_weights"
DPO_SHARE = "test_dpo.py::test_no_source_gives_more_than_its_share"
DPO_LORA_RUN = "test_dpo.py::test_lora_is_merged_after_each_iteration[none]"

dpo("dpo_sign", "-F.logsigmoid(rewards[:, 0] - rewards[:, 1])",
    "-F.logsigmoid(rewards[:, 1] - rewards[:, 0])", "the rejected answer is learned", DPO_HAND)
dpo("dpo_reference", "rewards = beta * (logps - ref_logps)", "rewards = beta * logps",
    "no reference", DPO_HAND)
dpo("dpo_mean_logps", "[0].sum(-1).view(-1, 2), lengths",
    "[0].sum(-1).view(-1, 2) / lengths, lengths", "log-probabilities divided by length",
    DPO_GRADIENT)
dpo("dpo_per_micro_batch", "(loss.sum() / args.prompts_per_step * run.world)",
    "(loss.mean() * run.world)", "the mean is over a micro-batch", DPO_GRADIENT)
dpo("dpo_world", "(loss.sum() / args.prompts_per_step * run.world)",
    "(loss.sum() / args.prompts_per_step)", "loss not scaled for DDP's mean",
    "test_dpo.py::test_two_processes_equal_one")
dpo("dpo_extrapolation_sign", "theta.float(), 1.0 + alpha)", "theta.float(), 1.0 - alpha)",
    "extrapolated backwards", "test_dpo.py::test_extrapolation_by_hand")
dpo("dpo_lora_line", 'if "lora_B" in name if lora', 'if "lora_" in name if lora',
    "both factors of LoRA are scaled", DPO_LORA)
dpo("dpo_best", "for end in (max, min))", "for end in (min, max))", "best and worst exchanged",
    DPO_BEST)
dpo("dpo_gap", "if high - low < min_gap:", "if high - low <= min_gap:",
    "a gap of --min_gap is a near-tie", DPO_BEST)
dpo("dpo_share_order", 'key=lambda i: (-pairs[i]["margin"], i)',
    'key=lambda i: (pairs[i]["margin"], i)', "the surest pairs go first", DPO_SHARE)
dpo("dpo_share_off", "pairs = cap_share(found, args.max_share) if len(sources) > 1 else found",
    "pairs = found", "--max_share ignored",
    "test_own_rows.py::test_the_share_of_a_source_is_limited_in_the_pairs_that_are_written")
dpo("dpo_cut_eos", "return ids if ended or ids[-1]", "return ids if ids or ids[-1]",
    "cut answers learn to end", "test_dpo.py::test_a_cut_answer_is_trained_without_eos")
dpo("dpo_alpha_ties", "(-pair[1], abs(pair[0]))", "(-pair[1], -abs(pair[0]))",
    "of equal alphas the farthest", "test_dpo.py::test_choice_of_alpha")
dpo("dpo_alpha_by_labels", 'row.get("score", 0.0) for row in curve',
    'row.get("accuracy", 0.0) for row in curve', "alpha is chosen by labels", DPO_STEP)
dpo("dpo_not_extrapolated", "for row in curve])\n        go_to(line, alpha)",
    "for row in curve])\n        go_to(line, 0.0)", "the result is plain DPO", DPO_STEP)
dpo("dpo_next_start", 'start_of = lambda k: str(folder_of(k - 1) / "final")',
    'start_of = lambda k: str(folder_of(k - 1) / "theta")',
    "the next iteration starts from plain DPO", DPO_STEP)
dpo("dpo_lr", 'group["lr"] = lr', "pass", "the learning rate of the schedule never applied",
    DPO_STEP)
dpo("dpo_lr_iterations", "lr_at(step - first_step, args.steps, args.lr)",
    "lr_at(step, args.steps, args.lr)", "the second iteration's rate goes on falling", DPO_STEP)
dpo("dpo_same_questions", "for i in range((k - 1) * n, k * n)]", "for i in range(n)]",
    "every iteration asks the same questions",
    "test_dpo.py::test_questions_of_the_iterations_are_new_ones")
plant("plumbing/processes.py", "dpo_clip", "torch.nn.utils.clip_grad_norm_(params, 1.0)",
      "torch.nn.utils.clip_grad_norm_(params, 10.0)", "gradients clipped at norm 10", DPO_STEP)
dpo("dpo_zero_grad", "            optimizer.zero_grad()\n", "",
    "gradients add up from step to step", DPO_STEP)
dpo("dpo_optimizer_lost", "            run.resume(optimizer, model)", "            pass",
    "a resumed iteration has no momentum", DPO_LORA_RUN)
dpo("dpo_one_step_pairs", "question_indices(len(pairs), step, args)",
    "question_indices(len(pairs), 0, args)", "every step trains on the same pairs", DPO_STEP)

zoo = partial(plant, "plumbing/zoo.py")
ZOO_SAMPLE = "test_own_rows.py::test_a_checkpoint_samples_as_it_is_asked_to"
ZOO_COLLECT = "test_own_rows.py::test_answers_are_drawn_and_scored_for_their_own_question"
dpo("zoo_temperature", "torch.from_numpy(uniforms), eos, args.temperature)",
    "torch.from_numpy(uniforms), eos)", "--temperature ignored in sampling", ZOO_SAMPLE)
zoo("zoo_same_draws", "keys = [[args.seed, k, list(sources).index(name), i]",
    "keys = [[args.seed, k, i]", "all sources draw the same random numbers", ZOO_COLLECT)
dpo("zoo_ended", "== eos).squeeze(-1).tolist()  # (B,G)", "> -1).squeeze(-1).tolist()  # (B,G)",
    "cut answers count as ended", ZOO_SAMPLE)
dpo("zoo_empty_wins", "if answer else [0.0] * len(ASPECTS)",
    "if answer is not None else [0.0] * len(ASPECTS)", "silence can be chosen",
    "test_dpo.py::test_an_empty_answer_can_lose_and_never_win")
zoo("zoo_scores_shifted", "s in zip(part, scores)]", "s in zip(part, scores[1:] + scores[:1])]",
    "each question has the next one's scores", ZOO_COLLECT)
plant("plumbing/files.py", "zoo_half_part",
      'lines = [line for line in lines if line.endswith("\\n")]', "pass",
      "half a line counts as a row",
      "test_dpo.py::test_parts_are_continued_behind_the_last_whole_one")

# --- oracle.py, plumbing/text.py ------------------------------------------------------------------
judge = partial(plant, "oracle.py")
JUDGE_PAIRS = "test_oracle.py::test_preferences_are_those_of_single_comparisons_in_both_orders"
JUDGE_COPIES = "test_oracle.py::test_copies_of_an_answer_are_tied_and_inherit_its_comparisons"
JUDGE_ASPECTS = "test_oracle.py::test_aspects_are_what_they_are_said_to_be"
REWARDS = "test_oracle.py::test_rewards_are_read_at_the_end_of_the_text"

judge("oracle_one_order", "prefers[b, i, j] = (p[b, a, c] + 1 - p[b, c, a]) / 2",
      "prefers[b, i, j] = p[b, a, c]", "one order only", JUDGE_PAIRS)
judge("oracle_reply_sign", "torch.sigmoid(logprobs[0::2] - logprobs[1::2])",
      "torch.sigmoid(logprobs[1::2] - logprobs[0::2])", "the worse reply wins", JUDGE_PAIRS)
plant("video_llm.py", "oracle_reply_eos", "iter([part.sum().item() for part",
      "iter([part[:-1].sum().item() for part", "a reply's EOS does not count", JUDGE_PAIRS)
judge("oracle_videos_shifted", "groups.append((videos[b], head, texts))",
      "groups.append((videos[b - 1], head, texts))", "comparisons see another group's video",
      JUDGE_PAIRS)
judge("oracle_narratives_shifted",
      "narratives[b])\n                                 for i, j in pairs))",
      "narratives[b - 1])\n                                 for i, j in pairs))",
      "comparisons read another video's narrative",
      "test_own_rows.py::test_every_comparison_reads_the_narrative_of_its_own_video")
judge("oracle_narrative_of_first", "texts[k * self.clips : (k + 1) * self.clips]",
      "texts[: self.clips]", "all videos have the first one's narrative",
      "test_own_rows.py::test_every_narrative_tells_of_its_own_video")
judge("oracle_tie", "prefers = torch.full((B, G, G), 0.5)", "prefers = torch.full((B, G, G), 1.0)",
      "an answer beats itself and its copies", JUDGE_COPIES)
judge("oracle_ties_broken", "prefers.mean(-1).mul(1e5).round().div(1e5)", "prefers.mean(-1)",
      "rounding orders copies of an answer", JUDGE_COPIES)
judge("oracle_aspects_one_order", "(p[b, i, j] + 1 - p[b, j, i]) / 2", "p[b, i, j]",
      "one order only in what scores DPO's pairs", JUDGE_ASPECTS)
judge("oracle_relevance_sign", "torch.sigmoid(logprobs - elsewhere)",
      "torch.sigmoid(elsewhere - logprobs)", "answers to another question are relevant",
      JUDGE_ASPECTS)
judge("oracle_rm_narratives", "in zip(questions, narratives, owns, answers)]",
      "in zip(questions, narratives[1:] + narratives[:1], owns, answers)]",
      "the reward model reads another video's narrative", REWARDS)
judge("oracle_rm_owns", "in zip(questions, narratives, owns, answers)]",
      "in zip(questions, narratives, owns[1:] + owns[:1], answers)]",
      "the reward model reads the judge's answer to another question", REWARDS)
judge("oracle_rm_limits",
      "self.answer_first,\n                                                   *self.limits)",
      "self.answer_first)", "the reward model's limits of training are ignored",
      "test_own_rows.py::test_rewards_are_read_within_the_limits_of_training")
judge("oracle_rm_copies", "finite(rewards.gather(1, torch.tensor(one_of_equals(answers))))",
      "finite(rewards)", "equal answers have different rewards", REWARDS)
judge("oracle_nan", "scores.flatten(1).isfinite().all(-1)", "scores.flatten(1).isfinite().any(-1)",
      "a reward that is no number is ranked",
      "test_oracle.py::test_a_reward_that_is_no_number_is_not_ranked")
judge("ranks_sign", "(scores.unsqueeze(1) > scores.unsqueeze(2)).sum(-1)",
      "(scores.unsqueeze(1) < scores.unsqueeze(2)).sum(-1)", "rank 0 is the worst",
      "test_oracle.py::test_ranks_with_ties")
judge("ranks_ties", "(scores.unsqueeze(1) > scores.unsqueeze(2)).sum(-1)",
      "(scores.unsqueeze(1) >= scores.unsqueeze(2)).sum(-1) - 1",
      "tied answers share the worse place", "test_oracle.py::test_ranks_with_ties")

# --- video_llm.py, model/packing.py ---------------------------------------------------------------
model = partial(plant, "video_llm.py")
packing = partial(plant, "model/packing.py")
PACKED = "test_video_llm.py::test_packed_answers_score_as_if_alone[full]"
SAMPLED = "test_video_llm.py::test_generate_equals_plain_sampling"
REFERENCE = "test_video_llm.py::test_kl_is_exactly_zero_at_step_zero"
EDGE = "test_video_llm.py::test_a_token_of_probability_zero_is_not_hit_at_the_edge"

model("model_positions", "place = row(positions(mask), asked.unsqueeze(-1) + step, 0)",
      "place = row(positions(mask), asked.unsqueeze(-1) + column - column[:, :1, :1], 0)",
      "positions do not restart behind the prefix", PACKED)
model("model_before", "torch.where(step > 0, column, start.unsqueeze(-1)) - 1", "column - 1",
      "an answer's first token is read behind its neighbour", PACKED)
model("model_entropy_sign", "H = -(logprobs.exp() * logprobs)", "H = (logprobs.exp() * logprobs)",
      "negative entropy", PACKED)
model("model_eos_mask", "< lengths.reshape(-1, 1)).float()",
      "< lengths.reshape(-1, 1) - 1).float()", "EOS has no part in any mask",
      "test_video_llm.py::test_what_stands_behind_an_answer_does_not_matter")
model("model_videos",
      "videos = [c for c in clips if c is not None]\n        features = cache(videos, num_frames)",
      "videos = [c for c in clips if c is not None][::-1]\n        features = cache(videos, "
      "num_frames)", "prompts see each other's videos",
      "test_video_llm.py::test_another_video_changes_the_logprobs")
model("model_banned", "logits = out.logits.index_fill(-1, banned, BANNED_LOGIT)",
      "logits = out.logits", "the video token can be sampled",
      "test_video_llm.py::test_the_video_token_is_never_sampled_nor_takes_probability")
plant("inputs/features.py", "model_layer", "% (len(tower.encoder.layers) + 1)]",
      "% len(tower.encoder.layers)]", "another layer of CLIP",
      "test_video_llm.py::test_cached_features_are_those_of_the_vision_tower")
model("model_time", "self.time_embedding.weight[:F, None]", "self.time_embedding.weight[:1, None]",
      "all frames are the first one", "test_video_llm.py::test_the_order_of_frames_counts")
model("model_frame_mask",
      "(None if frame_mask.all()\n                                    else "
      "frame_mask.repeat_interleave(S, dim=1))", "None", "padded frames are seen",
      "test_video_llm.py::test_padded_frames_are_hidden")
model("model_temperature", "(logits.float() / (temperature or 1)).log_softmax",
      "logits.float().log_softmax", "sampled without temperature", SAMPLED)
model("model_float32_cdf", "cdf = all_logprobs.double().exp().cumsum(-1)",
      "cdf = all_logprobs.float().exp().cumsum(-1).double()", "probabilities added up in float32",
      "test_own_rows.py::test_the_edges_between_tokens_are_those_of_float64")
model("model_edge", "torch.searchsorted(cdf, u, right=True)", "torch.searchsorted(cdf, u)",
      "tokens of probability 0 can be hit", EDGE)
model("model_behind_eos", "token = torch.where(runs, token, eos_id)", "pass",
      "answers go on behind EOS", "test_video_llm.py::test_nothing_but_eos_behind_eos",
      "test_video_llm.py::test_with_room_from_the_start_answers_are_the_same")
model("model_sampled_logprobs", "[..., 0] * runs\n", "[..., 0]\n",
      "what stands behind an answer adds to its probability",
      "test_video_llm.py::test_sampled_answers_come_with_their_log_probability",
      "test_video_llm.py::test_with_room_from_the_start_answers_are_the_same")
plant("model/processor.py", "model_cut_eos", "self.tokenizer.eos_token_id][:max_length]",
      "self.tokenizer.eos_token_id][-(max_length or 0) :]", "cut answers learn to end",
      "test_sft.py::test_a_cut_answer_does_not_end")
model("model_reference_moves", "place(copy.deepcopy(model).requires_grad_(False).eval())",
      "place(model)", "the reference is the policy", REFERENCE)
model("model_adapter_on", "with nullcontext() if frozen else model.disable_adapter():",
      "with nullcontext():", "LoRA's reference keeps its adapter",
      "test_video_llm.py::test_the_adapter_is_on_again_behind_the_reference")
packing("packing_neighbours",
        "(owner[:, None] == -1) | (owner[:, None] == owner[:, columns, None])",
        "(owner[:, None] == -1) | (owner[:, None] >= 0)", "answers see their neighbours", PACKED)
packing("packing_prefix", "sees = (owner[:, None] == -1) | (owner[:, None]",
        "sees = (owner[:, None]", "answers do not see the video", PACKED)
packing("packing_left_pads", "return (mask.cumsum(-1) - 1).clamp(min=0)",
        "return torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)",
        "pads on the left count as positions", PACKED, SAMPLED)
packing("packing_next", "        self.next = self.next + 1\n",
        "        self.next = self.next + 2\n", "positions of sampled tokens skip", SAMPLED)

# --- plumbing/ ----------------------------------------------------------------------------------
harness = partial(plant, "plumbing/run.py")
TRAINER = "test_untrusted.py::test_the_optimizer_comes_back_bit_for_bit"
WRITTEN = (
    "test_killed.py::test_a_write_that_fails_leaves_the_last_checkpoint",
    "test_resume.py::test_the_last_checkpoint_is_there_until_the_run_is_finished",
)

plant("plumbing/processes.py", "harness_clip", "torch.nn.utils.clip_grad_norm_(params, 1.0)",
      "torch.nn.utils.clip_grad_norm_(params, 10.0)", "gradients clipped at norm 10", GRPO_STEP)
harness("harness_rng", 'torch.set_rng_state(tensors.pop("rng"))', 'tensors.pop("rng")',
        "RNG not restored", TRAINER)
harness("harness_optimizer", "        optimizer.load_state_dict(state)", "        pass",
        "optimizer state lost", TRAINER)
harness("harness_step", '    return about["step"]', '    return about["step"] - 1',
        "a step is done twice", TRAINER)
harness("harness_saved_step", "model, processor, optimizer, step,\n",
        "model, processor, optimizer, step - 1,\n", "a checkpoint names the step before",
        SFT_RESUME)
harness("harness_not_renamed", "    os.replace(aside, folder / name)",
        "    shutil.copytree(aside, folder / name)",
        "checkpoints copied, not renamed: a kill leaves half of one", SFT_RUN, *WRITTEN)
harness("harness_deleted_first", "    shutil.rmtree(aside, ignore_errors=True)\n    try:",
        "    for old in [aside, *folder.glob('checkpoint-*[0-9]')]:\n        shutil.rmtree(old, "
        "ignore_errors=True)\n    try:", "the old checkpoint goes before the new one is there",
        *WRITTEN)
harness("harness_rows_twice", 'json.loads(r)["step"] < first_step',
        'json.loads(r)["step"] <= first_step', "a resumed run logs a step twice",
        "test_killed.py::test_metrics_survive_a_kill_while_they_are_cut")
harness("harness_oldest", 'folder / f"checkpoint-{steps[-1]}"', 'folder / f"checkpoint-{steps[0]}"',
        "resumed from the oldest checkpoint",
        "test_resume.py::test_the_newest_whole_checkpoint_counts")
plant("plumbing/processes.py", "harness_all_done",
      "inside.all_done = lambda done: all_sum((~done).sum()) == 0", "inside.all_done = torch.all",
      "sharded sampling ends on each process by itself",
      "test_machines.py::test_shares_of_a_model_train_sample_save_and_load_as_the_whole")
harness("harness_not_finite", "if log.not_finite or not torch.isfinite(grad_norm):",
        "if not torch.isfinite(grad_norm):", "an infinite loss goes unseen",
        "test_numbers.py::test_a_loss_that_is_no_number_stops_before_the_weights_change[sft-inf]")
plant("plumbing/processes.py", "harness_not_summed",
      "flat = all_sum(torch.cat([g.flatten() for g in grads]))",
      "flat = torch.cat([g.flatten() for g in grads])",
      "PPO's gradients are not summed over processes", PPO_TWO)
plant("plumbing/questions.py", "questions_order", "np.random.default_rng([args.seed, epoch])",
      "np.random.default_rng([args.seed])", "every epoch has the same order", EQUATIONS)
plant("plumbing/questions.py", "questions_labels", ' and r["clip"] not in known', "",
      "RL learns from videos whose labels SFT saw",
      "test_scripts.py::test_grpo_rank_evaluates_and_leaves_the_labelled_clips_out")
packing("rollouts_longest", "(len(parts[-1]) + 1) * tokens[i] <= budget",
        "sum(tokens[j] for j in parts[-1]) + tokens[i] <= budget",
        "padding is not part of a micro-batch's size", "test_rollouts.py")

# --- inputs/preferences.py ------------------------------------------------------------------------
prefs = partial(plant, "inputs/preferences.py")
prefs("preferences_two", '(first, second) if row["preference"] == 1',
      '(first, second) if row["preference"] == 2', "the preferred output is the rejected one",
      "test_preferences.py")
prefs("preferences_written", "answers if place == 1 else answers[::-1]",
      "answers if place else answers[::-1]", "the place of the chosen answer is lost in writing",
      "test_preferences.py::test_what_is_written_is_read_back")
judge("preferences_own_first", "((1, answer), (2, own))", "((1, own), (2, answer))",
      "the judge's own answer stands in the answer's place",
      "test_reward_model.py::test_the_answer_stands_before_the_last_question")
judge("preferences_narrative",
      'return "\\n".join([*[narrative] * bool(narrative), *lines, question])',
      'return "\\n".join([*lines, question])', "the narrative is not read", RM_PACKED,
      "test_preferences.py::test_earlier_turns_belong_to_the_question")
judge("preferences_limit", "as_read(processor, text, answer_first, max_answer_tokens)",
      "as_read(processor, text, answer_first)", "--max_answer_tokens ignored",
      "test_reward_model.py::test_a_batch_of_texts_with_and_without_answers_cut")
