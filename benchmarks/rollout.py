"""What LoRA and NF4 cost in a step, taking turns: sampling from an NF4 base as it is, unpacked for
the rollout, and from a base that was never packed, on a GPU with and without CUDA graphs; and the
reference's log-probabilities in a pass of their own or in the policy's.

Run      python benchmarks/rollout.py --out docs/results/rollout    5 minutes on two CPU cores
         python benchmarks/rollout.py --device cuda --shape 7b --out docs/results/rollout

  nf4         every layer unpacks its weights at every token
  unpacked    `rollouts.unpacked`: once a rollout, which needs the room of unpacked weights:
              grpo_rank.py --unpack_nf4
  bfloat16    the base was never quantised
  .. graphs   the two before with grpo_rank.py's --cuda_graphs, on a GPU alone
  two passes  adapter off and no gradient, then adapter on (what the scripts do)
  one pass    PEFT's mixed batch: every row twice, of which `adapter_names` gives one half to the
              base. All rows then carry gradients and activations, the reference's too, and its half
              goes backward for nothing
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import turns
from grpo_step import now, prefix_of


def rollouts(args, P, R, G, B):
    """{side: (what to do, tokens)}"""
    import torch

    from video_llm import generate, unpacked

    def sampler(base, unpack, graphs=False):
        model = turns.video_llm_around(turns.decoder(argparse.Namespace(**{**vars(args),
                                                                           "base": base})))
        for module in model.modules():
            # as in load_model: its gradients are wrong
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        prefix = prefix_of(turns.random_ids((B, P), 0), args.device)
        uniforms = torch.rand(B, G, R, dtype=torch.float64,
                              generator=torch.Generator().manual_seed(0))

        def work():
            with unpacked(model) if unpack else nullcontext():
                return generate(model, prefix, uniforms, -1, cuda_graphs=graphs)
        return work
    sides = {"nf4": sampler("nf4", False), "unpacked": sampler("nf4", True),
             "bfloat16": sampler("bfloat16", False)}
    if args.device == "cuda":
        sides |= {"unpacked, graphs": sampler("nf4", True, True),
                  "bfloat16, graphs": sampler("bfloat16", False, True)}
    return sides


def references(args, P, R, G, B):
    import torch
    from peft import get_peft_model

    model = get_peft_model(turns.decoder(argparse.Namespace(**{**vars(args), "base": "bfloat16"})),
                           turns.lora_config())
    rows = turns.random_ids((B * G, P + R), 0).to(args.device)

    def logprobs_of(rows, **names):
        logits = model(input_ids=rows, logits_to_keep=R + 1, use_cache=False,
                       **names).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, rows[:, -R:, None])[..., 0]

    def finish(logprobs, reference):
        (reference - logprobs).exp().mean().backward()
        model.zero_grad()

    def two():
        with torch.no_grad(), model.disable_adapter():
            reference = logprobs_of(rows)
        finish(logprobs_of(rows), reference)

    def one():
        model.eval()  # PEFT mixes adapters in evaluation only; there is no dropout
        names = ["default"] * len(rows) + ["__base__"] * len(rows)
        logprobs, reference = logprobs_of(torch.cat([rows, rows]), adapter_names=names).chunk(2)
        finish(logprobs, reference.detach())
    return {"two passes": two, "one pass": one}


def taking_turns(args, sides, rounds):
    seconds = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, work in sides.items():
            began = now(args)
            work()
            if turn:
                seconds[side].append(now(args) - began)
    first = seconds[next(iter(sides))]
    ratios = {side: sorted(a / b for a, b in zip(first, row)) for side, row in seconds.items()}
    return {side: dict(seconds=statistics.median(row), ratio=statistics.median(ratios[side]),
                       ratio_low=ratios[side][0], ratio_high=ratios[side][-1])
            for side, row in seconds.items()}


def main():
    parser = turns.parser_of(__doc__, ["64,32,5,4"], rounds=5)
    args = parser.parse_args()
    import torch

    import plumbing.run

    torch.set_num_threads(args.threads)
    lines = ["| P, R, G, B | what | seconds | times faster than the first [min, max] |",
             "|---|---|---:|---:|"]
    found = []
    for point in args.points:
        shape = tuple(map(int, point.split(",")))
        for kind in (rollouts, references):
            rows = taking_turns(args, kind(args, *shape), args.rounds)
            found.append(dict(point=point, kind=kind.__name__, sides=rows))
            lines += [f"| {point} | {kind.__name__}: {side} | {r['seconds']:.3f} | "
                      f"{r['ratio']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}] |"
                      for side, r in rows.items()]
    about = dict(command=" ".join(["python", *sys.argv]), git_commit=plumbing.run.git_commit(),
                 device=args.device, shape=args.shape, threads=args.threads,
                 when=time.strftime("%Y-%m-%d"))
    head = f"{args.device}, {args.shape}, {args.threads} threads, commit {about['git_commit']}"
    text = "\n".join([head, "", *lines, ""])
    print(text)
    if args.out:
        end = "_cuda" if args.device == "cuda" else ""
        Path(f"{args.out}{end}.json").write_text(json.dumps(dict(about, found=found), indent=1)
                                                 + "\n")
        Path(f"{args.out}{end}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
