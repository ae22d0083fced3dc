"""How long the judge takes for a step of grpo_rank.py, taking turns: 48 questions with 5 answers
each.

Run      python benchmarks/judge.py --out docs/results/judge    a minute, where `make demo` has run

  plain    every prompt with every reply is a row of its own, 24 rows in a forward pass
  packed   four comparisons, each with both replies, are packed after one video and narrative
  trees    oracle.py: what the comparisons of a group have in common is computed once (packing.Tree)

The narratives are there already. The answers are labels of other questions of the same kind, drawn
so that a group has as many different ones as the policy gives when training starts.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

from rollout import taking_turns

WORLD = "data/moving_shapes/train.json"


def step_of(seed, questions, G=5):
    """-> videos, questions, answers: half of the groups are sure of one answer, half draw each
    anew."""
    from inputs.records import read_records
    from plumbing.text import DESCRIBE

    draw, said = random.Random(seed), {}
    records = [r for r in read_records([WORLD])[0] if r["question"] != DESCRIBE]
    for r in records:
        said.setdefault(r["task_type"], []).append(r["answer"])
    rows = draw.sample(records, questions)
    answers = []
    for r in rows:
        labels, usual, sure = said[r["task_type"]], draw.choice(said[r["task_type"]]), draw.random()
        answers.append([usual if draw.random() < sure else draw.choice(labels) for _ in range(G)])
    return [r["clip"] for r in rows], [r["question"] for r in rows], answers


def in_rows(judge, texts_in_a_row, rows=24):
    """JudgeOracle.reply_logprobs without trees: every text stands whole after video and head."""
    import torch

    from video_llm import Prefix, token_logprobs

    def reply_logprobs(groups):
        parts = [(video, head, texts[n : n + texts_in_a_row]) for video, head, texts in groups
                 for n in range(0, len(texts), texts_in_a_row)]
        order = sorted(range(len(parts)), key=lambda k: max(len(a + b) for a, b in parts[k][2]))
        out = [None] * len(parts)
        for n in range(0, len(parts), rows):
            batch = [parts[k] for k in order[n : n + rows]]
            G = max(len(texts) for *_, texts in batch)
            filled = [texts + texts[:1] * (G - len(texts)) for *_, texts in batch]
            ids = [text + reply for texts in filled for text, reply in texts]
            prefix = Prefix(*judge.processor.pad([head for _, head, _ in batch], "left"),
                            *judge.cache([video for video, *_ in batch]))
            lengths = torch.tensor([len(row) for row in ids]).view(-1, G)
            tokens = judge.processor.pad(ids, "right")[0].view(*lengths.shape, -1)
            logprobs = token_logprobs(judge.model, prefix, tokens, lengths)[0].view(tokens.shape)
            for k, row, texts in zip(order[n : n + rows], logprobs, filled):
                ends = [len(text + reply) for text, reply in texts]
                sums = [x[end - len(reply) : end].sum()
                        for x, end, (_, reply) in zip(row, ends, texts)]
                out[k] = torch.stack(sums[: len(parts[k][2])])
        return torch.cat(out)
    return reply_logprobs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5,
                        help="measured turns, after one to warm up")
    parser.add_argument("--oracle_model", default="embedded_world/weights/judge")
    parser.add_argument("--cache", default="cache", help="folder of features and narratives")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="", help="write <out>.json and <out>.md")
    args = parser.parse_args()
    import torch

    import plumbing.run
    from oracle import JudgeOracle

    torch.set_num_threads(args.threads)
    args.device, found, lines = "cpu", [], ["| judge | replies as | ms a group | times faster than "
                                            "the first [min, max] |", "|---|---|---:|---:|"]
    judge, asked = JudgeOracle(args.oracle_model, args.cache, False), step_of(0, args.questions)
    for name in ("judge", "context"):
        judge.narrative = name == "context"
        whole = judge.reply_logprobs

        def side(way):
            def score():
                judge.reply_logprobs = way
                return judge.score(*asked)[0]
            return score
        sides = {"plain": side(in_rows(judge, 1)), "packed": side(in_rows(judge, 8)),
                 "trees": side(whole)}
        scores = {way: score() for way, score in sides.items()}
        apart = max(float((scores[way] - scores["trees"]).abs().max()) for way in sides)
        if apart > 1.5e-5:  # scores are rounded to 1e-5
            sys.exit(f"{name}: the scores are {apart:.1e} apart")
        rows = taking_turns(args, sides, args.rounds)
        judge.reply_logprobs = whole
        found.append(dict(judge=name, apart=apart, sides=rows))
        lines += [f"| {name} | {way} | {1e3 * r['seconds'] / args.questions:.1f} | "
                  f"{r['ratio']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}] |"
                  for way, r in rows.items()]
    about = dict(command=" ".join(["python", *sys.argv]), git_commit=plumbing.run.git_commit(),
                 threads=args.threads, rounds=args.rounds, when=time.strftime("%Y-%m-%d"),
                 different_answers=sum(len(set(group)) for group in asked[2]) / args.questions)
    text = "\n".join([f"cpu, {args.threads} threads, {args.rounds} rounds, commit "
                      f"{about['git_commit']}; {about['different_answers']:.1f} different answers "
                      "in a group", "", *lines, ""])
    print(text)
    if args.out:
        Path(f"{args.out}.json").write_text(json.dumps(dict(about, found=found), indent=1) + "\n")
        Path(f"{args.out}.md").write_text(text)


if __name__ == "__main__":
    main()
