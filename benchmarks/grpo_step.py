"""Seconds and memory of one GRPO step: this repository, a plain version, and TRL's GRPOTrainer,
taking turns.

Run      pip install -r benchmarks/requirements.txt
         python benchmarks/grpo_step.py --out docs/results/grpo_step   20 minutes on two CPU cores
         python benchmarks/grpo_step.py --points 64,32,5,8 --rounds 2  one point
         python benchmarks/grpo_step.py --device cuda --shape 7b --base nf4 --points 64,128,5,8

One point is P,R,G,B: B prompts of P tokens, G answers of exactly R tokens each; `embedded` is the
default of grpo_rank.py. All sides get the same decoder, the same AdamW, one micro-batch, a KL to a
frozen reference, no gradient checkpointing. How they take turns, the floor and the memory:
turns.py.

  ours     `generate` and `token_logprobs` (G answers behind one prefix), equations and losses of
           grpo_rank.py; on a GPU with --cuda_graphs
  plain    `model.generate` on B*G rows, forward passes over B*G rows of P + R tokens: 40 lines
           without TRL
  trl      GRPOTrainer as it comes; its checkpointing and bfloat16 are off, as on the other sides

Before a point is measured, `ours` and `plain` give the gradient of one batch: they must agree to
1e-5. The last row is two processes of `ours` with one thread each against one: how many times as
many answers a second.
"""

import math
import os
import statistics
import time

import turns

POINTS = ["64,32,5,8", "64,32,5,16", "256,64,5,4", "256,64,5,12", "1024,64,8,4", "embedded"]
LR, BETA, CLIP = 3e-4, 0.03, 0.2


def shape_of(point):
    return turns.EMBEDDED if point == "embedded" else tuple(map(int, point.split(",")))


def name_of(p):
    base = "" if p["base"] == "float32" else f" {p['shape']} {p['base']}"
    return (f"P={p['P']} R={p['R']} G={p['G']} B={p['B']}" + base
            + (" (embedded)" if p["shape"] == "tiny" else ""))


# --------------------------------------------------------------------------------------------------
# The three sides. Each is a generator that takes a step per `next` and yields the seconds of its
# sampling.
# --------------------------------------------------------------------------------------------------
def now(args):
    if args.device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def our_loss(model, reference, prefix, tokens, lengths, A):
    import torch

    import grpo_rank
    from video_llm import token_logprobs

    with torch.no_grad(), reference() as ref:
        ref_logprobs = token_logprobs(ref, prefix, tokens, lengths)[0]
    logprobs = token_logprobs(model, prefix, tokens, lengths)[0]  # (B*G,R)
    J = grpo_rank.clipped_surrogate(logprobs, logprobs.detach(), A, CLIP)
    return (BETA * grpo_rank.kl_k3(logprobs, ref_logprobs) - J).mean()


def prefix_of(ids, device):
    import torch

    from video_llm import Prefix

    ids = ids.to(device)
    return Prefix(ids, torch.ones_like(ids), None, None)


def ours(args, P, R, G, B):
    import torch

    import grpo_rank
    from oracle import ranks_of
    from plumbing import processes
    from video_llm import generate, reference_of, unpacked

    rank, world, _ = processes.setup_dist() if "RANK" in os.environ else (0, 1, None)
    torch.set_num_threads(args.threads)
    model = turns.video_llm_around(turns.decoder(args))
    params = [p for p in model.parameters() if p.requires_grad]
    reference, optimizer = reference_of(model), torch.optim.AdamW(params, lr=LR)
    ddp = processes.distribute(model, torch.device(args.device))
    yield
    for step in range(10**9):
        began, seed = now(args), step * world + rank
        prefix = prefix_of(turns.random_ids((B, P), seed), args.device)
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(B, G, R, generator=generator, dtype=torch.float64)
        with unpacked(model):
            never, graphs = -1, args.device == "cuda"  # no token ends an answer
            tokens, lengths, _ = generate(model, prefix, uniforms, never, cuda_graphs=graphs)
        sampling = now(args) - began
        ranks = ranks_of(torch.rand(B, G, generator=generator))
        A = grpo_rank.scale_by_std(grpo_rank.rank_advantages("oracle_rank", ranks,
                                                             ranks)).float().view(-1)
        our_loss(ddp, reference, prefix, tokens, lengths, A.to(args.device)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield sampling


def plain_loss(model, reference, rows, R, A):
    import torch

    def logprobs_of(m):
        logits = m(rows, logits_to_keep=R + 1).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, rows[:, -R:, None])[..., 0]

    with torch.no_grad(), reference() as ref:
        ref_logprobs = logprobs_of(ref)
    logprobs = logprobs_of(model)
    ratio, log_r = (logprobs - logprobs.detach()).exp(), ref_logprobs - logprobs
    J = torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)
    return (BETA * (log_r.exp() - 1 - log_r) - J).mean()


def plain(args, P, R, G, B):
    import torch
    from peft import get_peft_model

    from video_llm import reference_of

    model = turns.decoder(args)
    if args.base != "float32":
        model = get_peft_model(model, turns.lora_config())
    params = [p for p in model.parameters() if p.requires_grad]
    reference, optimizer = reference_of(model), torch.optim.AdamW(params, lr=LR)
    yield
    for step in range(10**9):
        began = now(args)
        prompts = turns.random_ids((B, P), step).repeat_interleave(G, 0).to(args.device)
        with torch.no_grad():
            rows = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts),
                                  do_sample=True, max_new_tokens=R, min_new_tokens=R, top_k=0)
        sampling = now(args) - began
        rewards = torch.rand(B, G, device=args.device)
        A = ((rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True)).view(-1, 1)
        plain_loss(model, reference, rows, R, A).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield sampling


def trl(args, P, R, G, B):
    import random

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, text = turns.word_tokenizer()
    prompts = [text(row) for step in range(args.rounds + 2)
               for row in turns.random_ids((B, P), step).tolist()]
    sampled = []

    class Timed(GRPOTrainer):
        def _generate(self, *a, **k):
            began = now(args)
            out = super()._generate(*a, **k)
            sampled.append(now(args) - began)
            return out

    config = turns.trainer_config(args, GRPOConfig, learning_rate=LR,
                                  per_device_train_batch_size=B * G, num_generations=G,
                                  max_completion_length=R, beta=BETA, epsilon=CLIP,
                                  generation_kwargs=dict(min_new_tokens=R), temperature=1.0,
                                  shuffle_dataset=False)
    model = turns.decoder(args)
    lora = None if args.base == "float32" else turns.lora_config()
    trainer = lambda callback: Timed(model=turns.saved(model) if lora is None else model,
                                     peft_config=lora, args=config, callbacks=[callback],
                                     reward_funcs=lambda completions, **_: [random.random()
                                                                            for _ in completions],
                                     processing_class=tokenizer,
                                     train_dataset=Dataset.from_dict({"prompt": prompts}))
    for _ in turns.stepwise(trainer):
        yield sampled[-1] if sampled else 0.0


# --------------------------------------------------------------------------------------------------
# Before, and what comes out
# --------------------------------------------------------------------------------------------------
def check(args, point, P, R, G, B):
    import torch

    prompts, tokens, A = (turns.random_ids((B, P), 0), turns.random_ids((B, G, R), 1),
                          torch.randn(B * G))
    rows = torch.cat([prompts.repeat_interleave(G, 0), tokens.view(B * G, R)], 1)
    return turns.checked(args, point,
                         lambda m, ref: our_loss(m, ref, prefix_of(prompts, "cpu"), tokens,
                                                 torch.full((B, G), R), A),
                         lambda m, ref: plain_loss(m, ref, rows, R, A[:, None]))


def floor_seconds(weights, P, R, G, B, flops, bandwidth, base):
    """Sampling: one prefill, R - 1 decoding passes. Training: reference forward, policy forward and
    backward; the gradient of frozen weights is not computed."""
    size = dict(float32=4, bfloat16=2, nf4=2)[base]
    decode = (R - 1) * max(2 * weights * B * G / flops, size * weights / bandwidth)
    training = (8 if base == "float32" else 6) * weights * B * (P + G * R) / flops
    return 2 * weights * B * P / flops + decode + training


def measured(args, point, flops, bandwidth):
    P, R, G, B = shape_of(point)
    args.shape = "tiny" if point == "embedded" else args.shape
    note = check(args, point, P, R, G, min(B, 2))
    rows = turns.measure(args, __file__, point)
    weights = turns.weights_of(args.shape)
    floor_of = lambda G, B, bandwidth=bandwidth: floor_seconds(weights, P, R, G, B, flops,
                                                               bandwidth, args.base)
    floor = floor_of(G, B)
    saved = floor_of(1, B * G) / floor
    note += f"; prompts read once save {saved:.2f} times the floor's arithmetic"
    return dict(P=P, R=R, G=G, B=B, shape=args.shape, base=args.base, rounds=rows, floor=floor,
                note=note, sides=turns.summary(rows, floor, floor_of(G, B, math.inf), B * G * R))


def scaling(args, point):
    """-> a note: answers a second of two processes over those of one, one thread each."""
    args.threads, args.shape = 1, "small"
    rows = turns.measure(args, __file__, point, sides=("ours", "ours*2"))
    ratios = sorted(2 * a["seconds"] / b["seconds"] for a, b in zip(rows["ours"], rows["ours*2"]))
    return (f"Two processes on two cores against one, one thread each, {point}: "
            f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] times the "
            "answers a second")


def main(args):
    if args.side:
        return turns.child(args, globals()[args.side](args, *shape_of(args.points[0])))
    flops, bandwidth = turns.machine(args)
    about, shape = turns.about_machine(args, flops, bandwidth), args.shape
    points = []
    for point in args.points:
        args.shape = shape
        points.append(measured(args, point, flops, bandwidth))
    if args.device == "cpu":
        last = scaling(args, args.points[0])
        points[-1]["note"] += f"\n\n{last}"
    command = ("python benchmarks/grpo_step.py --device cuda --shape 7b --points 64,128,5,8 "
               f"--out {args.out} --base")
    turns.write(args, about, points, name_of,
                [(f"7b-shaped, {base}, LoRA r = 64", f"{command} {base}")
                 for base in ("nf4", "bfloat16")])


if __name__ == "__main__":
    main(turns.parser_of(__doc__, POINTS, rounds=5).parse_args())
