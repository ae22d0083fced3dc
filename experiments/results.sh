#!/usr/bin/env bash
# `make results`: every run behind every page, seeds 0-2, then the three systems side by side (docs/results/systems.*) and
# one table over all runs (docs/results/results.*). Resumable: what is there is not run again. Hours on two cores.
for part in grpo_rank reward_model ppo_rlaif dpo_iter_w2s distorted_rewards forks; do
  bash "$(dirname "$0")/$part.sh"
done
source "$(dirname "$0")/common.sh"

for s in $SEEDS; do
  echo "flat_s$s $PY sft.py --name flat $FEW $SFT --curriculum off --seed $s --resume"
done | side_by_side

D=runs/dpo_iter_w2s P=runs/ppo_rlaif G=runs/grpo_rank
$PY evaluate.py --runs "runs/sft/policy_s*" "runs/sft/continued_s*" "$P/reward_model_s*" "$D/context_s*" "$G/context_s*" \
  --labels "SFT,SFT continued,PPO,iterative DPO + ExPO,GRPO_rank" --out docs/results/systems
RUNS=("runs/sft/policy_s*" "runs/sft/flat_s*" "runs/sft/continued_s*" "$P/reward_model_s*" "$D/iterative_s*/iteration_1_s*"
  "$D/iterative_s*" "$D/context_s*/iteration_1_s*" "$D/context_s*" "$G/context_s*" $G/judge_s0 "$G/reward_model_s*"
  "$G/reference_s*" "$G/score_s*" "$G/signed_s*" "$G/published_s*")
LABELS="SFT,SFT without curriculum,SFT continued,PPO,DPO 1,DPO 2,DPO 1 + ExPO,DPO 2 + ExPO"
LABELS="$LABELS,GRPO_rank,no narrative (seed 0),on the reward model,on the labels,score on the labels"
LABELS="$LABELS,signed on the labels,published on the labels"
$PY evaluate.py --runs "${RUNS[@]}" --labels "$LABELS" --out docs/results/results
$PY experiments/costs.py --runs "${RUNS[@]}" --labels "$LABELS" --accuracy docs/results/results.json --out docs/results/results
# what a run of each script costs: README
$PY experiments/costs.py --runs "runs/sft/policy_s*" "runs/reward_model/context_s*" "$P/reward_model_s*" \
  "$D/context_s*" "$G/context_s*" \
  --labels "sft.py: the oracle,sft.py: a policy,reward_model.py,ppo_rlaif.py,dpo_iter_w2s.py,grpo_rank.py" --out docs/results/scripts
$PY docs/fill.py
