#!/usr/bin/env bash
# Every run behind docs/ppo_rlaif.md: seeds 0-2, reward models, controls, the fair table, reward hacking on purpose.
# Resumable; one process per core.
source "$(dirname "$0")/common.sh"

for s in $SEEDS; do sft_start $s; done | side_by_side

# the same start, trained on the same labels for as many steps as RL; and the reward models: the judge's preferences,
# the truth's, and a weak one (no narrative, a tenth of the pairs) to be hacked
for s in $SEEDS; do
  r="$PY reward_model.py --seed $s --resume"
  echo "rm_context_s$s $r --name context"
  echo "rm_truth_s$s $r --name truth --oracle reference"
  sft_continued $s
done | side_by_side
echo "rm_weak_s0 $PY reward_model.py --resume --name weak --narrative False --guided False --share 0.1" | side_by_side

# 150 steps x 48 questions x 5 answers = 36,000 sampled answers each
{
  echo "ppo_hacked_s0 $PY ppo_rlaif.py --resume --name hacked --reward_model runs/reward_model/weak_s0/final --kl_coef 0 --lr 1e-3"
  for s in $SEEDS; do
    p="$PY ppo_rlaif.py --seed $s --resume" g="$PY grpo_rank.py --seed $s --resume" rm=runs/reward_model
    echo "ppo_rm_s$s $p --name reward_model --reward_model $rm/context_s$s/final --stop_oracle context"
    echo "ppo_truth_s$s $p --name truth --reward_model $rm/truth_s$s/final --stop_oracle context"
    echo "ppo_random_s$s $p --name random --oracle reference --random_reward True"
    echo "grpo_rm_s$s $g --name reward_model --oracle reward_model --reward_model $rm/context_s$s/final"
    echo "context_s$s $g --name context"
    echo "grpo_score_s$s $g --name reward_score --oracle reward_model --reward_model $rm/context_s$s/final --advantage score"
  done
} | side_by_side

$PY evaluate.py --runs "runs/sft/policy_s*" "runs/sft/continued_s*" "runs/ppo_rlaif/random_s*" \
  "runs/ppo_rlaif/reward_model_s*" "runs/ppo_rlaif/truth_s*" \
  --labels "SFT,SFT continued,random reward,PPO,PPO on the truth's pairs" --out docs/results/ppo_rlaif
# one reward model, three ways to learn from it, and the judge that it learned from, asked directly
G=runs/grpo_rank
RUNS=("runs/sft/policy_s*" "runs/ppo_rlaif/reward_model_s*" "$G/reward_model_s*" "$G/reward_score_s*" "$G/context_s*")
LABELS="SFT,PPO,GRPO_rank,GRPO on scores,GRPO_rank asks the judge"
$PY evaluate.py --runs "${RUNS[@]}" --labels "$LABELS" --out docs/results/ppo_fair
$PY experiments/costs.py --runs "${RUNS[@]}" --labels "$LABELS" \
  --curves "runs/ppo_rlaif/reward_model_s*" "runs/ppo_rlaif/truth_s*" "runs/ppo_rlaif/hacked_s*" \
  --titles "PPO,PPO on the truth's pairs,weak reward model and no KL" --out docs/results/ppo_rlaif
$PY docs/papers.py
