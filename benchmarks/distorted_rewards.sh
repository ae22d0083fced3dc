#!/usr/bin/env bash
# Scalar GRPO against oracle_rank, both divided by the group's deviation, on rewards distorted question by question; and
# the published advantage on flipped orders. Seeds 0-2, resumable, one process per core; docs/results/distorted_rewards*.
source "$(dirname "$0")/common.sh"

for s in $SEEDS; do sft_start $s; done | side_by_side
for s in $SEEDS; do
  for d in none saturation tail flip10 flip20 flip30; do
    for a in oracle_rank score; do
      echo "${d}_${a}_s$s $PY benchmarks/distorted_rewards.py --distortion $d --advantage $a --name ${d}_$a --seed $s --resume"
    done
  done
  echo "flip20_published_s$s $PY benchmarks/distorted_rewards.py --distortion flip20 --advantage published --name flip20_published --seed $s --resume"
done | side_by_side

G=runs/grpo_rank
$PY evaluate.py --runs "runs/sft/policy_s*" "$G/none_oracle_rank_s*" "$G/none_score_s*" "$G/saturation_oracle_rank_s*" \
  "$G/saturation_score_s*" "$G/tail_oracle_rank_s*" "$G/tail_score_s*" \
  --labels "SFT,ranks,scores,ranks saturated,scores saturated,ranks tail,scores tail" \
  --out docs/results/distorted_rewards
$PY evaluate.py --runs "runs/sft/policy_s*" "$G/flip10_oracle_rank_s*" "$G/flip10_score_s*" "$G/flip20_oracle_rank_s*" \
  "$G/flip20_score_s*" "$G/flip30_oracle_rank_s*" "$G/flip30_score_s*" "$G/flip20_published_s*" \
  --labels "SFT,ranks 10 %,scores 10 %,ranks 20 %,scores 20 %,ranks 30 %,scores 30 %,published 20 %" \
  --out docs/results/flipped_orders
