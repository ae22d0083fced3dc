#!/usr/bin/env bash
# Every run behind docs/grpo_rank.md: seeds 0-2, all advantages, oracles and controls. Resumable; one process per core.
source "$(dirname "$0")/common.sh"

for s in $SEEDS; do
  sft_start $s
  # the same recipe and number of epochs with the labels of a hundred clips more
  echo "more_labels_s$s $PY sft.py --name more_labels --data $W/train.json --num_clips 140 --batch_size 16 --steps 700 --lr 1e-3 --seed $s --resume"
done | side_by_side

{
  for s in $SEEDS; do
    g="$PY grpo_rank.py --seed $s --resume"
    sft_continued $s
    echo "context_s$s $g --name context"
    echo "reference_s$s $g --name reference --oracle reference"
    echo "random_s$s $g --name random --oracle reference --advantage random"
  done
  for s in $SEEDS; do
    g="$PY grpo_rank.py --seed $s --resume --oracle reference"
    # divided by the group's deviation, as the tables so far; and as the summaries of the paper have it, undivided
    echo "published_s$s $g --name published --advantage published --scale_advantages True"
    echo "signed_s$s $g --name signed --advantage signed --scale_advantages True"
    echo "published_undivided_s$s $g --name published_undivided --advantage published"
    echo "signed_undivided_s$s $g --name signed_undivided --advantage signed"
    # undivided, the same KL weighs more: a KL weight of a twentieth, and other rates
    for k in published signed; do
      echo "${k}_undivided_beta_s$s $g --name ${k}_undivided_beta --advantage $k --beta 0.0015"
      echo "${k}_undivided_lr1e-3_s$s $g --name ${k}_undivided_lr1e-3 --advantage $k --lr 1e-3"
      echo "${k}_undivided_lr1e-4_s$s $g --name ${k}_undivided_lr1e-4 --advantage $k --lr 1e-4"
      echo "context_${k}_undivided_s$s $PY grpo_rank.py --seed $s --resume --name context_${k}_undivided --advantage $k"
      echo "flip20_${k}_undivided_s$s $PY experiments/distorted_rewards.py --distortion flip20 --advantage $k --name flip20_${k}_undivided --seed $s --resume"
    done
    echo "score_s$s $g --name score --advantage score"
    # the published advantage with a noisy oracle, the labels' order with 20 % flips, and with an AI
    echo "flip20_published_s$s $PY experiments/distorted_rewards.py --distortion flip20 --advantage published --scale_advantages True --name flip20_published --seed $s --resume"
    echo "published_context_s$s $PY grpo_rank.py --seed $s --resume --name published_context --advantage published --scale_advantages True"
  done
  echo "judge_s0 $PY grpo_rank.py --resume --name judge --oracle judge"
  echo "self_s0 $PY grpo_rank.py --resume --name self --oracle_model runs/sft/policy_s0/final"
} | side_by_side

SHOW="$PY evaluate.py"
$SHOW --runs "runs/sft/policy_s*" "runs/sft/continued_s*" "runs/grpo_rank/random_s*" "runs/grpo_rank/context_s*" \
  "runs/grpo_rank/reference_s*" "runs/sft/more_labels_s*" \
  --labels "SFT,SFT continued,random,GRPO_rank,reference,100 more labels" --out docs/results/grpo_rank
$SHOW --runs "runs/sft/policy_s*" "runs/grpo_rank/reference_s*" "runs/grpo_rank/score_s*" "runs/grpo_rank/signed_s*" \
  "runs/grpo_rank/published_s*" --labels SFT,oracle_rank,score,signed,published --out docs/results/advantages
$SHOW --runs "runs/sft/policy_s*" "runs/grpo_rank/reference_s*" "runs/grpo_rank/context_s*" "runs/grpo_rank/published_s*" \
  "runs/grpo_rank/flip20_published_s*" "runs/grpo_rank/published_context_s*" \
  --labels "SFT,oracle_rank labels,oracle_rank AI,published labels,published 20 % flipped,published AI" --out docs/results/published
$SHOW --runs "runs/sft/policy_s*" "runs/grpo_rank/published_s*" "runs/grpo_rank/published_undivided_s*" \
  "runs/grpo_rank/signed_s*" "runs/grpo_rank/signed_undivided_s*" \
  --labels "SFT,published divided,published undivided,signed divided,signed undivided" --out docs/results/undivided
G=runs/grpo_rank
$SHOW --runs "runs/sft/policy_s*" "$G/published_undivided_lr1e-4_s*" "$G/published_undivided_lr1e-3_s*" "$G/published_undivided_beta_s*" \
  "$G/signed_undivided_lr1e-4_s*" "$G/signed_undivided_lr1e-3_s*" "$G/signed_undivided_beta_s*" \
  --labels "SFT,published rate 1e-4,published rate 1e-3,published beta 0.0015,signed rate 1e-4,signed rate 1e-3,signed beta 0.0015" \
  --out docs/results/undivided_rates
$SHOW --runs "runs/sft/policy_s*" "$G/flip20_published_undivided_s*" "$G/context_published_undivided_s*" \
  "$G/flip20_signed_undivided_s*" "$G/context_signed_undivided_s*" \
  --labels "SFT,published 20 % flipped,published AI,signed 20 % flipped,signed AI" --out docs/results/undivided_oracles
$SHOW --runs runs/sft/policy_s0 runs/grpo_rank/context_s0 runs/grpo_rank/judge_s0 runs/grpo_rank/self_s0 \
  --labels "SFT,context,judge,judges itself" --out docs/results/ai_feedback
