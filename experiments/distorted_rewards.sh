#!/usr/bin/env bash
# Scalar GRPO against oracle_rank, both divided by the group's deviation, on rewards distorted question by question.
# Seeds 0-2, resumable, one process per core; docs/results/distortions.*.
source "$(dirname "$0")/common.sh"

for s in $SEEDS; do sft_start $s; done | side_by_side
for s in $SEEDS; do
  g="$PY grpo_rank.py --seed $s --resume --oracle reference"  # what is not distorted, as in grpo_rank.sh
  echo "reference_s$s $g --name reference"
  echo "score_s$s $g --name score --advantage score"
  for d in saturation tail flip10 flip20 flip30; do
    for a in oracle_rank score; do
      echo "${d}_${a}_s$s $PY experiments/distorted_rewards.py --distortion $d --advantage $a --name ${d}_$a --seed $s --resume"
    done
  done
done | side_by_side

G=runs/grpo_rank
$PY evaluate.py --runs "runs/sft/policy_s*" "$G/reference_s*" "$G/score_s*" "$G/saturation_oracle_rank_s*" \
  "$G/saturation_score_s*" "$G/tail_oracle_rank_s*" "$G/tail_score_s*" "$G/flip10_oracle_rank_s*" "$G/flip10_score_s*" \
  "$G/flip20_oracle_rank_s*" "$G/flip20_score_s*" "$G/flip30_oracle_rank_s*" "$G/flip30_score_s*" --out runs/distorted_rewards
$PY experiments/distortions.py --out docs/results/distortions
