#!/usr/bin/env bash
# Every run behind docs/dpo_iter_w2s.md: seeds 0-2, the ablation and its controls. Resumable; one process per core.
# What experiments/grpo_rank.sh has made (data, oracle, SFT start, SFT continued) is used again.
source "$(dirname "$0")/common.sh"

# the SFT starts as plumbing/embedded.py has them, with other numbers of frames too; continued: as many steps as DPO has
for s in $SEEDS; do
  sft_start $s
  echo "frames4_s$s $PY sft.py --name frames4 $FEW $SFT --num_frames 4 --seed $s --resume"
  echo "frames12_s$s $PY sft.py --name frames12 $FEW $SFT --num_frames 12 --seed $s --resume"
done | side_by_side

# the pairs of the first iteration, which several runs share; the first one of a seed also trains its zoo
for s in $SEEDS; do
  echo "dpo_pairs_s$s $PY dpo_iter_w2s.py --stage build --name pairs --seed $s --resume"
done | side_by_side

{
  for s in $SEEDS; do
    d="$PY dpo_iter_w2s.py --seed $s --resume"
    pairs="--preferences runs/dpo_iter_w2s/pairs_s$s/iteration_1_s$s/preferences.json"
    echo "dpo_once_s$s $d --name once $pairs --iterations 1 --steps 150 --alphas 0"  # as many steps as two iterations
    echo "dpo_iterative_s$s $d --name iterative $pairs --alphas 0"
    echo "dpo_context_s$s $d --name context $pairs"
    echo "dpo_self_s$s $d --name self --zoo policy --samples 10"
    echo "dpo_reference_s$s $d --name reference --oracle reference"
    for f in 4 12; do
      echo "dpo_frames${f}_s$s $d --name frames$f --model runs/sft/frames${f}_s$s/final --zoo policy --samples 10"
    done
    sft_continued $s
  done
} | side_by_side

R=runs/dpo_iter_w2s
SHOW="$PY evaluate.py"
$SHOW --runs "runs/sft/policy_s*" "runs/sft/continued_s*" "$R/once_s*" "$R/iterative_s*" "$R/context_s*" "$R/reference_s*" \
  --labels "SFT,SFT continued,DPO once,iterative,iterative + ExPO,reference" --out docs/results/dpo_iter_w2s
$SHOW --runs "runs/sft/policy_s*" "$R/iterative_s*/iteration_1_s*" "$R/iterative_s*" "$R/context_s*/iteration_1_s*" \
  "$R/context_s*" "$R/self_s*" \
  --labels "SFT,iteration 1,iteration 2,iteration 1 + ExPO,iteration 2 + ExPO,own answers only" \
  --out docs/results/dpo_iterations
$SHOW --runs "runs/sft/frames4_s*" "$R/frames4_s*" "runs/sft/policy_s*" "$R/self_s*" "runs/sft/frames12_s*" "$R/frames12_s*" \
  --labels "SFT 4 frames,DPO 4 frames,SFT 8 frames,DPO 8 frames,SFT 12 frames,DPO 12 frames" --out docs/results/dpo_frames
$PY experiments/alphas.py --runs "$R/context_s*" "$R/reference_s*" --labels "AI oracle,reference" --out docs/results/dpo_alphas
# beside the exact match: Iter-W2S's own scheme, a judge that sees the video and not the label (relevance, accuracy, detail, clarity)
for s in $SEEDS; do
  set -- runs/sft/policy_s$s $R/context_s$s/iteration_1_s$s $R/context_s$s
  for run in "$@"; do $SHOW --checkpoint "$run" --benchmark held_out,mmaip_v --judge local; done
  $SHOW --compare "$@" --benchmark held_out,mmaip_v --judge local --out runs/dpo_vision_s$s
done
$PY experiments/vision.py runs/dpo_vision_s*.json --labels "SFT,iteration 1,iteration 2" --out docs/results/dpo_vision.md
