"""Does a long run leak? GRPO_rank on the embedded world, watched from outside: memory, open files,
threads.

Run      python benchmarks/soak.py                                 2,000 steps: an hour and more
         python benchmarks/soak.py --prompts_per_step 8 --lr 5e-5  as in docs/reliability.md
         python benchmarks/soak.py --steps 20 --out runs/short     a trial

Writes <out>.jsonl, a row a sample, <out>.json, and a table, <out>.md: memory (RSS) and open files
at the start, at the end, their slopes per 1,000 steps behind the first tenth, in which caches fill
and allocators settle; seconds a step in the first and in the last tenth; and whether all metrics
are numbers. Every other flag is one of grpo_rank.py and is passed on.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def sample(pid):
    """RSS in MiB, open files, threads of a process; None once it has ended."""
    try:
        status = dict(line.split(":", 1)
                      for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return dict(rss_mib=int(status["VmRSS"].split()[0]) / 1024,
                    files=len(os.listdir(f"/proc/{pid}/fd")), threads=int(status["Threads"]))
    except (OSError, KeyError):
        return None


def slope(x, y):
    """Of the least-squares line, and its standard error."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    x = x - x.mean()
    if len(x) < 3 or not x.any():
        return 0.0, math.inf
    b = (x * y).sum() / (x * x).sum()
    rest = y - y.mean() - b * x
    return b, math.sqrt((rest**2).sum() / (len(x) - 2) / (x * x).sum())


def table(result):
    """The result as Markdown."""
    lines = [f"`{result['command']}`: {result['steps']} steps in {60 * result['hours']:.0f} "
             f"minutes, {result['samples']} samples, {result['not_finite']} metrics that are not "
             "finite", "", "| | first | after a tenth | last | highest | per 1,000 steps |",
             "| --- |" + " ---: |" * 5]
    for key, name in (("rss_mib", "memory (RSS), MiB"), ("files", "open files"),
                      ("threads", "threads")):
        r = result[key]
        rise = f"{r['per_1000_steps']:+.1f} ± {r['standard_error']:.1f}"
        numbers = " | ".join(f"{r[k]:.0f}" for k in ("first", "settled", "last", "highest"))
        lines.append(f"| {name} | {numbers} | {rise} |")
    lines += ["", "| | first | last |", "| --- | ---: | ---: |"]
    tenths = result["step_s"]
    lines.append(f"| seconds a step, median of a tenth | {tenths['first_tenth']:.2f} | "
                 f"{tenths['last_tenth']:.2f} |")
    lines += [f"| `{key}` | {first:.3f} | {last:.3f} |"
              for key, (first, last) in result["metrics"].items()]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", default="runs/soak")
    args, rest = parser.parse_known_args()
    name = Path(args.out).name
    flags = ["--steps", str(args.steps), "--name", name, "--seed", "0", *rest]
    command = [sys.executable, str(ROOT / "grpo_rank.py"), *flags]
    metrics, out = Path(f"runs/grpo_rank/{name}_s0/metrics.jsonl"), Path(args.out)
    if metrics.exists():
        sys.exit(f"{metrics} is there already: choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    began, seen, size = time.time(), [], 0
    with subprocess.Popen(command) as process, open(out.with_suffix(".jsonl"), "w") as file:
        while process.poll() is None:
            time.sleep(1)
            now = sample(process.pid)
            # a step is done: one sample a step at most
            if now and metrics.exists() and metrics.stat().st_size > size:
                size = metrics.stat().st_size
                with open(metrics) as f:
                    now["step"] = sum(1 for _ in f)
                now["s"] = time.time() - began
                seen.append(now)
                print(json.dumps(now), file=file, flush=True)
    if process.returncode:
        sys.exit(f"grpo_rank.py ended with {process.returncode}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    settled = [s for s in seen if s["step"] > args.steps / 10]
    steps = [s["step"] for s in settled]
    result = dict(command=" ".join(sys.argv), steps=args.steps, hours=(time.time() - began) / 3600,
                  samples=len(seen))
    for key in ("rss_mib", "files", "threads"):
        b, error = slope(steps, [s[key] for s in settled])
        result[key] = dict(first=seen[0][key], settled=settled[0][key], last=settled[-1][key],
                           highest=max(s[key] for s in seen), per_1000_steps=1000 * b,
                           standard_error=1000 * error)
    tenth = max(1, len(rows) // 10)
    result["step_s"] = dict(first_tenth=float(np.median([r["time/step_s"] for r in rows[:tenth]])),
                            last_tenth=float(np.median([r["time/step_s"] for r in rows[-tenth:]])))
    result["not_finite"] = sum(not math.isfinite(v) for row in rows for v in row.values())
    show = [key for key in ("objective/score", "objective/kl", "rollout/len", "rollout/eos_rate",
                            "eval/accuracy") if key in rows[0]]
    result["metrics"] = {key: [rows[0][key], [r[key] for r in rows if key in r][-1]]
                         for key in show}
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
