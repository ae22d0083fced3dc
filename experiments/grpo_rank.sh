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
$SHOW --runs runs/sft/policy_s0 runs/grpo_rank/context_s0 runs/grpo_rank/judge_s0 runs/grpo_rank/self_s0 \
  --labels "SFT,context,judge,judges itself" --out docs/results/ai_feedback
