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
  echo "rm_share50_s$s $r share50 --share 0.5"
  echo "rm_share25_s$s $r share25 --share 0.25"
  echo "rm_truth_s$s $r truth --oracle reference"
done | side_by_side

$PY - $SEEDS >docs/results/reward_model.md <<'PY'
import json, statistics, sys
from pathlib import Path

ROWS = {"context": "3 clips (default)", "clips1": "1 clip", "nocontext": "no context, in judge and reward model",
        "videoonly": "3 clips for the judge, none for the reward model", "weakbase": "3 clips, from the policy's SFT",
        "share50": "3 clips, 50 % of the pairs", "share25": "3 clips, 25 % of the pairs",
        "truth": "ground-truth preferences, 3 clips"}
print("| in % | pairs | judge, truth | reward model, judge | reward model, truth | seeds |")
print("| --- | ---: | ---: | ---: | ---: | --- |")
for name, label in ROWS.items():
    found = []
    for seed in sys.argv[1:]:
        run = Path(f"runs/reward_model/{name}_s{seed}")
        if not (run / "final").exists():
            continue
        about = json.loads((run / "final/reward_model.json").read_text())
        file = Path(json.loads((run / "args.json").read_text())["args"]["preferences"])
        counts = json.loads(file.with_suffix(".report.json").read_text())["counts"]
        found.append((seed, about["pairs"], counts["oracle_accuracy_all"], about["eval/accuracy"],
                      about["eval/truth_accuracy"]))
    if found:
        show = lambda k: (f"{100 * statistics.mean(f[k] for f in found):.1f}"
                          + (f" ± {100 * statistics.stdev(f[k] for f in found):.1f}" if len(found) > 1 else ""))
        print(f"| {label} | {statistics.mean(f[1] for f in found):.0f} | {show(2)} | {show(3)} | {show(4)} | "
              f"{' '.join(f[0] for f in found)} |")
PY
cat docs/results/reward_model.md
