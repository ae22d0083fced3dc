"""What the papers print beside what was measured here: the table of docs/papers.md.

Run      python docs/papers.py        then python docs/fill.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
# Video-MME accuracy in %, [arXiv:2510.02561] as far as its text could be read: VLM-RLAIF,
# Oracle-RLAIF, difference
PRINTED = {"Action Recognition": (27.3, 39.0, 11.7), "Temporal Perception": (49.8, 71.0, 21.2),
           "Object Reasoning": (38.3, 49.5, 11.2), "Spatial Perception": (None, None, -2.6),
           "Information Synopsis": (None, None, -0.9), "all": (36.2, 42.4, 6.2)}

fair = json.loads((RESULTS / "ppo_fair.json").read_bytes())
columns = {column["label"]: column for column in fair["columns"]}
ppo, rank = columns["PPO"], columns["GRPO_rank asks the judge"]
seeds = " ".join(map(str, rank["seeds"]))
assert rank["seeds"] == ppo["seeds"]
heads = ("accuracy in %", "VLM-RLAIF, paper", "Oracle-RLAIF, paper", "difference", "PPO, here",
         "GRPO_rank, here", "difference")
lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * 6]
for kind in fair["counts"]:
    printed = PRINTED.get(kind, (None, None, None))
    ours = [100 * column["accuracy"][kind]["mean"] for column in (ppo, rank)]
    numbers = zip((*printed, *ours, ours[1] - ours[0]), (".1f", ".1f", "+.1f") * 2)
    lines.append(f"| {kind} | "
                 f"{' | '.join('' if x is None else format(x, how) for x, how in numbers)} |")
lines += ["",
          f"here: seeds {seeds}, the same judge, as many sampled answers; empty: not known to us"]
(RESULTS / "papers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
