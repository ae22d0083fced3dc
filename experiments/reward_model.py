"""The table of reward models: what the runs of reward_model.sh wrote into their reward_model.json.

    python experiments/reward_model.py --seeds 0 1 2 --out docs/results/reward_model.md
"""

import argparse
import json
import statistics
from pathlib import Path

ROWS = {"context": "3 clips (default)", "clips1": "1 clip",
        "nocontext": "no context: judge and reward model see the video alone",
        "videoonly": "3 clips for the judge, the video alone for the reward model",
        "unguided": "3 clips, without the judge's own answer (D10)",
        "answerlast": "3 clips, the answer behind the question, read at EOS (D3)",
        "weakbase": "3 clips, from the policy's SFT (D5)",
        "weakvideo": "from the policy's SFT, the video alone for the reward model",
        "share50": "3 clips, 50 % of the pairs", "share25": "3 clips, 25 % of the pairs",
        "truth": "ground-truth preferences, 3 clips"}
COLUMNS = ("eval/oracle_accuracy", "eval/accuracy", "eval/truth_accuracy")


def cell(values):
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    lines = ["| held-out pairs, % | trained on | judge, truth | reward model, judge | reward "
             "model, truth | seeds |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    commits = set()
    rows = [(name, label, args.seeds) for name, label in ROWS.items()]
    # beside rows of one seed
    rows.insert(1, ("context", f"the same, seed {args.seeds[0]} alone", args.seeds[:1]))
    for name, label, seeds in rows:
        runs = {s: Path(f"runs/reward_model/{name}_s{s}") for s in seeds}
        runs = {s: run for s, run in runs.items() if (run / "final/reward_model.json").exists()}
        if not runs:
            lines.append(f"| {label} | not measured yet | | | | |")
            continue
        found = [json.loads((run / "final/reward_model.json").read_text()) for run in runs.values()]
        commits |= {json.loads((run / "args.json").read_text())["git_commit"]
                    for run in runs.values()}
        cells = [f"{statistics.mean(f['pairs'] for f in found):.0f}",
                 *(cell([f[c] for f in found]) for c in COLUMNS)]
        lines.append(f"| {label} | {' | '.join(cells)} | {' '.join(runs)} |")
    made = ", ".join(sorted(commits))
    lines += ["", f"a ± b: mean and standard deviation over seeds; commit {made}"]
    Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
