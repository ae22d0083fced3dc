#!/usr/bin/env bash
# The three forks of docs/ablations.md, each in a copy of the code with its diff, beside the run that it changes. Seed 0,
# or SEEDS="0 1 2".
SEEDS=${SEEDS:-0}
source "$(dirname "$0")/common.sh"

for s in $SEEDS; do sft_start $s; done | side_by_side
for f in no_kl borda majority; do
  rm -rf runs/forks/$f
  mkdir -p runs/forks/$f
  cp ./*.py runs/forks/$f
  git apply --directory=runs/forks/$f docs/forks/$f.diff
done
for s in $SEEDS; do
  echo "context_s$s $PY grpo_rank.py --name context --seed $s --resume"
  echo "no_kl_s$s $PY runs/forks/no_kl/grpo_rank.py --name no_kl --seed $s --resume"
  echo "borda_s$s $PY runs/forks/borda/grpo_rank.py --name borda --advantage borda --seed $s --resume"
  echo "majority_s$s $PY runs/forks/majority/grpo_rank.py --name majority --oracle majority --seed $s --resume"
done | side_by_side
G=runs/grpo_rank S="s[${SEEDS// /}]"
$PY evaluate.py --runs "runs/sft/policy_$S" "$G/context_$S" "$G/no_kl_$S" "$G/borda_$S" "$G/majority_$S" \
  --labels "SFT,GRPO_rank,no KL,Borda,majority" --out docs/results/forks
