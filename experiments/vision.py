"""Exact match beside Iter-W2S's evaluation by a judge that sees the video: what `evaluate.py
--compare` wrote, a table.

    python experiments/vision.py runs/dpo_vision_s*.json --labels "SFT,iteration 1"
        --out docs/results/dpo_vision.md
"""

import argparse
import json
import statistics
from pathlib import Path

COLUMNS = {"exact match, %": ("held_out", "exact", 100),
           "judge: right, %": ("held_out", "accuracy", 100),
           **{f"{aspect}, 0-5": ("mmaip_v", f"{aspect}_points", 1)
              for aspect in ("relevance", "accuracy", "detail", "clarity")},
           "their mean": ("mmaip_v", "score", 1), "ratio, %": ("mmaip_v", "ratio", 100)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="one file a seed, the same order of runs in each")
    parser.add_argument("--labels", required=True, help="of the compared runs, comma-separated")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    files = [json.loads(Path(file).read_text()) for file in args.files]
    seeds = [file["results"] for file in files]
    lines = [f"| | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for label, *runs in zip(args.labels.split(","), *seeds, strict=True):
        cells = []
        for benchmark, metric, scale in COLUMNS.values():
            values = [scale * run["benchmarks"][benchmark]["metrics"][metric]["mean"]
                      for run in runs]
            digits = 1 if scale > 1 else 2
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", f"seeds: {len(seeds)}; judge: {seeds[0][0]['benchmarks']['mmaip_v']['judge']}; "
                  f"commit {', '.join(sorted({file['git_commit'] for file in files}))}"]
    Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
