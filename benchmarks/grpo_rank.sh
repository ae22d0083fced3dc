#!/usr/bin/env bash
# Every run behind docs/grpo_rank.md: seeds 0-2, all advantages, oracles and controls. Resumable; one process per core.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
PY=${PY:-.venv/bin/python}
SEEDS=${SEEDS:-0 1 2}
JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN)}  # (nproc would heed OMP_NUM_THREADS)
W=data/moving_shapes
LOGS=runs/logs
mkdir -p $LOGS

$PY moving_shapes.py
OMP_NUM_THREADS=$JOBS $PY pretrain_tiny.py
$PY -m torch.distributed.run --standalone --nproc_per_node="$JOBS" sft.py --name oracle --resume

# name | command; each line is one process, $JOBS of them at a time
side_by_side() { xargs -P "$JOBS" -d '\n' -I{} sh -c 'set -- {}; name=$1; shift; "$@" >'"$LOGS"'/$name.log 2>&1 || echo "$name failed: see '"$LOGS"'/$name.log"'; }

few="--data $W/train.json --batch_size 16"
for s in $SEEDS; do
  echo "policy_s$s $PY sft.py --name policy_s$s $few --num_clips 40 --steps 200 --lr 1e-3 --seed $s --resume"
  # the same recipe and number of epochs with the labels of a hundred clips more
  echo "more_labels_s$s $PY sft.py --name more_labels_s$s $few --num_clips 140 --steps 700 --lr 1e-3 --seed $s --resume"
done | side_by_side

{
  for s in $SEEDS; do
    g="$PY grpo_rank.py --seed $s --resume"
    echo "continued_s$s $PY sft.py --name continued_s$s $few --num_clips 40 --model runs/sft/policy_s$s/final --steps 150 --lr 3e-4 --seed $s --resume"
    echo "context_s$s $g --name context"
    echo "reference_s$s $g --name reference --oracle reference"
    echo "random_s$s $g --name random --oracle reference --advantage random"
  done
  for s in $SEEDS; do
    g="$PY grpo_rank.py --seed $s --resume --oracle reference"
    echo "published_s$s $g --name published --advantage published"
    echo "signed_s$s $g --name signed --advantage signed"
    echo "score_s$s $g --name score --advantage score"
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
$SHOW --runs runs/sft/policy_s0 runs/grpo_rank/context_s0 runs/grpo_rank/judge_s0 runs/grpo_rank/self_s0 \
  --labels "SFT,context,judge,judges itself" --out docs/results/ai_feedback
$SHOW --runs runs/sft/policy_s0 runs/sft/continued_s0 runs/grpo_rank/context_s0 \
  --labels "SFT,SFT continued,GRPO_rank" --out docs/results/demo
