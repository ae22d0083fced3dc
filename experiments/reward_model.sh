#!/usr/bin/env bash
# Every run behind docs/reward_model.md: the paper's ablation (context, size of the preference set) and ours. Resumable;
# one process per core. The table is made of what the runs wrote: docs/results/reward_model.md.
source "$(dirname "$0")/common.sh"

# First the runs that collect (and build the SFT start of their seed), then those that share their files.
for s in $SEEDS; do
  echo "rm_context_s$s $PY reward_model.py --seed $s --resume --name context"
done | side_by_side
for s in $SEEDS; do
  r="$PY reward_model.py --seed $s --resume --name"
  echo "rm_clips1_s$s $r clips1 --clips 1"
  echo "rm_nocontext_s$s $r nocontext --oracle judge --narrative False --guided False"
  echo "rm_videoonly_s$s $r videoonly --narrative False --guided False"
  echo "rm_unguided_s$s $r unguided --guided False"
  echo "rm_answerlast_s$s $r answerlast --guided False --answer_first False"
  echo "rm_weakbase_s$s $r weakbase --base runs/sft/policy_s$s/final"
  echo "rm_weakvideo_s$s $r weakvideo --base runs/sft/policy_s$s/final --narrative False --guided False"
  echo "rm_share50_s$s $r share50 --share 0.5"
  echo "rm_share25_s$s $r share25 --share 0.25"
  echo "rm_truth_s$s $r truth --oracle reference"
done | side_by_side

$PY experiments/reward_model.py --seeds $SEEDS --out docs/results/reward_model.md
