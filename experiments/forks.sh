#!/usr/bin/env bash
# The five forks of docs/ablations.md, each a copy of grpo_rank.py with its diff, beside the run that it changes. Seed 0,
# or SEEDS="0 1 2".
SEEDS=${SEEDS:-0}
source "$(dirname "$0")/common.sh"

FORKS="no_kl borda majority linear k3_corrected"
for s in $SEEDS; do sft_start $s; done | side_by_side
for f in $FORKS; do
  cp grpo_rank.py grpo_rank_$f.py
  git apply docs/forks/$f.diff
done
trap 'for f in $FORKS; do rm -f grpo_rank_$f.py; done' EXIT
for s in $SEEDS; do
  echo "context_s$s $PY grpo_rank.py --seed $s --resume"
  for f in $FORKS; do echo "${f}_s$s $PY grpo_rank_$f.py --seed $s --resume"; done
done | side_by_side
runs="runs/grpo_rank/context_s[${SEEDS// /}]"
for f in $FORKS; do runs="$runs runs/grpo_rank_$f/context_s[${SEEDS// /}]"; done
$PY evaluate.py --runs "runs/sft/policy_s[${SEEDS// /}]" $runs \
  --labels "SFT,GRPO_rank,no KL,Borda,majority,linear,k3 corrected" --out docs/results/forks
