"""How far do oracles agree with the truth, and what do they see?

Run      python evaluation/agreement.py --demo
             five answers to one clip, ranked by every oracle
         python evaluation/agreement.py --checkpoint runs/sft/policy_s0/final
             agreement on a policy's own answers
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.flags import ORACLES, SCORERS, WORLD, OracleArgs, answer_help, flag, parse_args


@dataclass
class Args(OracleArgs):
    oracle: str = flag("judge,context",
                       f"of {', '.join(ORACLES)}; several: each and their mean rank")
    demo: bool = flag(False, "rank five answers to one clip of the embedded world by every oracle")
    checkpoint: str = flag("runs/sft/policy_s0/final",
                           "the policy whose sampled answers are ranked")
    data: str = flag(f"{WORLD}/test.json", "labelled questions")
    questions: int = flag(500, "how many of them, drawn by --seed", low=1)
    G: int = flag(5, "answers per question, sampled at temperature 1", low=2)
    seed: int = flag(0, "choice of questions, sampled answers, order in which a server sees them",
                     low=0)
    cache: str = flag("cache", "folder of cached CLIP features, narratives and replies of servers")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch

from inputs.features import FeatureCache
from inputs.records import DataError, read_records
from oracle import ASPECTS, ReferenceOracle, differ, judge_prompt, make_oracle, mean_rank, ranks_of
from plumbing import embedded, processes
from plumbing.api_client import ApiError
from plumbing.text import DESCRIBE, final_answer, normalize
from video_llm import Prefix, generate, load_model


def pairwise_accuracy(scores, correct):
    """Share of (right, wrong) answer pairs of one group in which the right one scores higher; ties
    count one half.

    scores (B,G) float, correct (B,G) bool -> accuracy, number of pairs.
    """
    mixed = correct.unsqueeze(2) & ~correct.unsqueeze(1)  # (B,G,G) i right, j wrong
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)  # (B,G,G)
    better = (difference > 0).float() + (difference == 0).float() / 2
    pairs = mixed.sum().item()
    return (better * mixed).sum().item() / max(pairs, 1), pairs


def kendall_tau(scores, truth):
    """Kendall's tau-b of every group, averaged over the groups in which the truth prefers anything.

    scores, truth (B,G) float -> tau in [-1,1], number of groups. tau-b = (agreeing - disagreeing
    pairs) / sqrt(pairs not tied in scores x pairs not tied in truth); a group that the scores leave
    tied counts 0.
    """
    order = lambda x: torch.sign(x.unsqueeze(2) - x.unsqueeze(1)).double()  # (B,G,G)
    a, b = order(scores), order(truth)
    untied, known = a.abs().sum((1, 2)), b.abs().sum((1, 2))  # (B,)
    tau = (a * b).sum((1, 2)) / (untied * known).sqrt().clamp(min=1)
    groups = (known > 0).sum().item()
    return tau[known > 0].sum().item() / max(groups, 1), groups


def demo(args):
    """Five answers to one clip: the label, the label with a full stop, half of it, none of it, and
    one that is beside the point; ranked, and scored by aspect, by every oracle that can be asked
    here."""
    embedded.build_world(0)
    with processes.one_line_errors(DataError, OSError):
        records = [r for r in read_records([f"{WORLD}/test.json"])[0]
                   if str(r["question"]).startswith("where is")]
        record, others = records[0], {r["answer"] for r in records}
        names = ["reference", "judge", "context"]
        names += ["reward_model"] if Path(args.reward_model).exists() else []
        names += ["api"] if args.api_url else []
        embedded.build_oracle(args, rank=0, names=names)
        oracle = make_oracle(args, [record], names=names)
    share = lambda a: len(set(a.split()) & set(record["answer"].split()))
    half, none = (min(a for a in others if share(a) == n) for n in (1, 0))
    answers = ["a circle", none, half, f"The {record['answer']}.", record["answer"]]
    question, asked = record["question"], ([record["clip"]], [record["question"]], [answers])
    print(f"{record['clip'].path}   {question}   label: {record['answer']}")
    print("\nthe narrative, which `context` sees:\n    "
          f"{oracle.raters['context'].narratives(asked[0])[0]}")
    prompt = "".join(judge_prompt(question, answers[3], answers[2])).replace("\n", "\n    ")
    print(f"a comparison, as `judge` sees it behind the video:{prompt}\n")
    table, points = {}, {}
    with processes.one_line_errors(ApiError):
        for name, rater in [*oracle.raters.items(), ("mean rank", oracle)]:
            (scores,), (ok,) = rater.score(*asked)
            rows = zip(scores.tolist(), ranks_of(scores[None])[0].tolist())
            table[name] = [f"{s:.2f} ({r})" for s, r in rows] if ok else ["masked"] * len(answers)
            if name in SCORERS:
                (rows,), (ok,) = rater.aspects(*asked)
                points[name] = [" ".join(f"{x:4.1f}" for x in row) if ok else "masked"
                                for row in rows.tolist()]
    width = max(map(len, answers)) + 2
    for head, rows, wide in (("score (rank)", table, 14),
                             (f"0-5: {', '.join(ASPECTS)}", points, 22)):
        print(f"{head}\n{'':{width}}" + "".join(f"{name:>{wide}}" for name in rows))
        for k, a in enumerate(answers):
            print(f"{a:{width}}" + "".join(f"{cells[k]:>{wide}}" for cells in rows.values()))


def agreement(args):
    """Sampled answers of a policy, ranked by each oracle and by all together, against the
    labels."""
    with processes.one_line_errors(DataError, OSError):
        records = [r
                   for r in read_records([args.data])[0] if r["clip"] and r["question"] != DESCRIBE]
        model, processor = load_model(args.checkpoint)
        embedded.build_oracle(args, rank=0)
        oracle = make_oracle(args, records)
    records = random.Random(args.seed).sample(records, min(args.questions, len(records)))
    clips, questions = [r["clip"] for r in records], [r["question"] for r in records]
    cache, answers = FeatureCache(model, processor, args.cache), []
    for i in range(0, len(records), 50):
        prefix = Prefix.build(processor, cache, questions[i : i + 50], clips[i : i + 50])
        uniforms = np.random.default_rng([args.seed, i]).random((len(prefix.input_ids), args.G, 16))
        tokens, lengths, _ = generate(model, prefix, torch.from_numpy(uniforms),
                                      processor.tokenizer.eos_token_id)
        answers += processor.decode_answers(tokens, lengths)
    said = lambda text: normalize(final_answer(text))
    labels = [said(r["answer"]) for r in records]
    correct = torch.tensor([[said(a) == x for a in g] for x, g in zip(labels, answers)])
    truth, _ = ReferenceOracle(records).score(clips, questions, answers)  # token F1 with the label
    print(f"{len(records)} questions x {args.G} answers of {args.checkpoint}: "
          f"{correct.float().mean():.1%} right; "
          f"{(correct.all(1) | ~correct.any(1)).float().mean():.1%} of the groups all right or all "
          "wrong")
    seen = {}
    for name, rater in getattr(oracle, "raters", {args.oracle: oracle}).items():
        began = time.time()
        with processes.one_line_errors(ApiError):
            seen[name] = (*rater.score(clips, questions, answers), time.time() - began,
                          getattr(rater, "counters", {}))
        if not (seen[name][1] & differ(answers)).any():  # equal answers are tied unasked
            sys.exit(f"agreement.py: {name} has ordered none of the groups whose answers differ")
    if len(seen) > 1:
        scores, oks, times, _ = zip(*seen.values())
        seen["mean rank"] = mean_rank(scores), torch.stack(oks).all(0), sum(times), {}
    for name, (scores, ok, seconds, counters) in seen.items():
        accuracy, pairs = pairwise_accuracy(scores[ok], correct[ok])
        tau, groups = kendall_tau(scores[ok], truth[ok])
        tied = (scores == scores[:, :1]).all(1)[ok].float().mean()
        first = correct.gather(1, scores.argmax(1, keepdim=True))[ok].float().mean()
        print(f"{name:12s} right before wrong in {accuracy:.1%} of {pairs} pairs; tau {tau:.3f} "
              f"with the token F1 of {groups} groups; no order in {tied:.1%} of the groups; a "
              f"right answer first in {first:.1%}; {(~ok).sum()} groups masked; "
              f"{1e3 * seconds / len(records):.0f} ms a group")
        if counters:
            print(" " * 13 + ", ".join(f"{key} {round(n, 1)}" for key, n in counters.items() if n))


def main(args):
    demo(args) if args.demo else agreement(args)


if __name__ == "__main__":
    main(parse_args(Args))
