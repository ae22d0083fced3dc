"""Seconds and memory of one GRPO step: this repository, a plain version, and TRL's GRPOTrainer, taking turns.

Run      pip install -r benchmarks/requirements.txt
         python benchmarks/grpo_step.py --out docs/results/grpo_step          10 minutes on two CPU cores
         python benchmarks/grpo_step.py --points 64,32,5,8 --rounds 2         one point

One point is (P, R, G, B): B prompts of P tokens, G answers of exactly R tokens each. All sides get the same decoder (a
LLaMA of 256 x 6 in float32, all weights trained; width and depth are flags), the same AdamW, one micro-batch, a KL to a
frozen reference, no gradient checkpointing. Every side lives in a process of its own, with the same number of threads,
and takes one step at a time while the others wait: what disturbs the machine disturbs all of them. Ratios are medians
over the rounds of TRL's seconds / ours *within a round*.

  ours     `generate` (one prefill per group), `token_logprobs` (G answers behind one prefix), as in grpo_rank.py
  plain    `model.generate` on B*G rows, forward passes over B*G rows of P + R tokens: 40 lines without TRL
  trl      GRPOTrainer as it comes; its checkpointing and bfloat16 are off, as on the other sides

floor      the seconds that the arithmetic alone would take: 2 FLOPs a weight and token forward, 6 forward and backward,
           at the machine's own rate for a 1024^3 float32 matrix product; shared prefix counted once, the R - 1 decoding
           passes at the larger of that and the time to read all weights once at the machine's own copying rate.
memory     peak resident memory of the process over the rounds, above what it held when the model was loaded.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIDES = ("ours", "plain", "trl")
POINTS = "64,32,5,8 256,64,5,4 1024,64,8,2"
VOCABULARY, LR, BETA, CLIP = 2048, 3e-4, 0.03, 0.2


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", nargs="+", default=POINTS.split(), help="P,R,G,B")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of every side, after one to warm up")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="", help="write <out>.json, <out>.md and <out>.png")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a child process
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------
# The three sides. Each is a generator that takes a step per `next` and yields the seconds of its sampling.
# ---------------------------------------------------------------------------------------------------------------
def decoder(args):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    heads = args.width // 32
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=args.width, intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False))


def random_prompts(P, B, step):
    import torch

    return torch.randint(3, VOCABULARY, (B, P), generator=torch.Generator().manual_seed(step))


def ours(args, P, R, G, B):
    import torch
    from transformers import CLIPVisionConfig

    import grpo_rank
    from oracle import ranks_of
    from video_llm import (
        TINY_QFORMER,
        TINY_VISION,
        Prefix,
        VideoLLM,
        VideoLLMConfig,
        VideoQFormerConfig,
        generate,
        reference_of,
        token_logprobs,
    )

    llama = decoder(args)
    model = VideoLLM(VideoLLMConfig(vision_config=CLIPVisionConfig(**TINY_VISION), text_config=llama.config,
                                    qformer_config=VideoQFormerConfig(**TINY_QFORMER)))
    model.language_model = llama
    params = list(llama.parameters())  # no video in these prompts: what is compared is the decoder's work
    reference, optimizer = reference_of(model), torch.optim.AdamW(params, lr=LR)
    yield
    for step in range(10**9):
        began = time.perf_counter()
        ids = random_prompts(P, B, step)
        prefix = Prefix(ids, torch.ones_like(ids), None, None)
        uniforms = torch.rand(B, G, R, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        tokens, lengths, _ = generate(model, prefix, uniforms, eos_id=-1)  # no token ends an answer
        sampling = time.perf_counter() - began
        ranks = ranks_of(torch.rand(B, G, generator=torch.Generator().manual_seed(step)))
        A = grpo_rank.scale_by_std(grpo_rank.rank_advantages("oracle_rank", ranks, ranks)).float().view(-1)
        with torch.no_grad(), reference() as ref:
            ref_logprobs = token_logprobs(ref, prefix, tokens, lengths)[0]
        logprobs = token_logprobs(model, prefix, tokens, lengths)[0]  # (B*G,R)
        J = grpo_rank.clipped_surrogate(logprobs, logprobs.detach(), A, CLIP)
        (BETA * grpo_rank.kl_k3(logprobs, ref_logprobs) - J).mean().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield sampling


def plain(args, P, R, G, B):
    import copy

    import torch

    model = decoder(args)
    reference, optimizer = copy.deepcopy(model).requires_grad_(False), torch.optim.AdamW(model.parameters(), lr=LR)

    def logprobs_of(m, rows):
        logits = m(rows, logits_to_keep=R + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, rows[:, -R:, None])[..., 0]

    yield
    for step in range(10**9):
        began = time.perf_counter()
        prompts = random_prompts(P, B, step).repeat_interleave(G, 0)
        with torch.no_grad():
            rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=R,
                                  min_new_tokens=R, top_k=0)
            sampling = time.perf_counter() - began
            ref_logprobs = logprobs_of(reference, rows)
        rewards = torch.rand(B, G)
        A = ((rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True)).view(-1, 1)
        logprobs = logprobs_of(model, rows)
        ratio, log_r = (logprobs - logprobs.detach()).exp(), ref_logprobs - logprobs
        J = torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)
        (BETA * (log_r.exp() - 1 - log_r) - J).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield sampling


def trl(args, P, R, G, B):
    """GRPOTrainer owns the loop, so it runs in a thread and is let go one step at a time."""
    import random
    import threading

    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    text = lambda ids: " ".join(f"w{i}" for i in ids)
    prompts = [text(row) for step in range(args.rounds + 2) for row in random_prompts(P, B, step).tolist()]
    go, done, sampled = threading.Semaphore(0), threading.Semaphore(0), []

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            done.release()
            go.acquire()

    class Timed(GRPOTrainer):
        def _generate(self, *a, **k):
            began = time.perf_counter()
            out = super()._generate(*a, **k)
            sampled.append(time.perf_counter() - began)
            return out

    folder = tempfile.mkdtemp()
    config = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=LR,
        per_device_train_batch_size=B * G, num_generations=G, max_completion_length=R, beta=BETA, epsilon=CLIP,
        max_steps=args.rounds + 2, generation_kwargs=dict(min_new_tokens=R), temperature=1.0, shuffle_dataset=False)
    model = decoder(args)
    model.save_pretrained(folder)  # TRL loads its reference from where the model's config says it came from
    model.config._name_or_path = folder
    trainer = Timed(model=model, reward_funcs=lambda completions, **_: [random.random() for _ in completions],
                    args=config, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
                    callbacks=[Turns()])
    yield
    threading.Thread(target=trainer.train, daemon=True).start()
    done.acquire()
    while True:
        go.release()
        done.acquire()
        yield sampled[-1]


def child(args):
    """Speaks one JSON line per step; what libraries print goes to stderr."""
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    P, R, G, B = map(int, args.points[0].split(","))
    steps = globals()[args.side](args, P, R, G, B)
    next(steps)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in sys.stdin:
        began = time.perf_counter()
        sampling = next(steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded
        say.write(json.dumps(dict(seconds=time.perf_counter() - began, sampling=sampling, peak_mib=peak / 1024)) + "\n")
        say.flush()
    os._exit(0)  # TRL's loop still waits for its turn


# ---------------------------------------------------------------------------------------------------------------
# Taking turns, and what comes out
# ---------------------------------------------------------------------------------------------------------------
def measure(args, point):
    """-> {side: [row of each round]}; the first round warms up and is thrown away."""
    command = [sys.executable, __file__, "--points", point, "--rounds", str(args.rounds), "--width", str(args.width),
               "--layers", str(args.layers), "--threads", str(args.threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    sides = {side: subprocess.Popen([*command, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
                                    text=True, stderr=subprocess.DEVNULL) for side in SIDES}
    rows = {side: [] for side in SIDES}
    try:
        for turn in range(args.rounds + 1):
            for side, process in sides.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    sys.exit(f"{side} died; see: {' '.join([*command, '--side', side])} < <(echo step)")
                rows[side] += [json.loads(line)] if turn else []
            print(f"{point}: round {turn}/{args.rounds}", end="\r", flush=True)
    finally:
        for process in sides.values():
            process.kill()
    return rows


def machine(args):
    """-> FLOP/s of a float32 matrix product, bytes/s of reading memory; medians of ten."""
    import torch

    torch.set_num_threads(args.threads)
    a, big = torch.randn(1024, 1024), torch.zeros(2**27)  # 512 MiB

    def seconds(work):
        work()
        times = []
        for _ in range(10):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    return 2 * 1024**3 / seconds(lambda: a @ a), big.numel() * 4 / seconds(big.sum)


def floor_seconds(weights, P, R, G, B, flops, bandwidth):
    """Sampling: one prefill, R - 1 decoding passes. Training: reference forward, policy forward and backward."""
    packed = B * (P + G * R)
    decode = (R - 1) * max(2 * weights * B * G / flops, 4 * weights / bandwidth)
    return 2 * weights * B * P / flops + decode + 8 * weights * packed / flops


def summary(rows, args, P, R, G, B, flops, bandwidth):
    weights = sum(p.numel() for n, p in decoder(args).named_parameters() if "embed_tokens" not in n)
    median = lambda side, key: statistics.median(r[key] for r in rows[side])
    out = dict(P=P, R=R, G=G, B=B, rounds=rows, floor=floor_seconds(weights, P, R, G, B, flops, bandwidth))
    for side in SIDES:
        total = median(side, "seconds")
        ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(rows[side], rows["ours"]))
        out[side] = dict(seconds=total, sampling=median(side, "sampling"), tokens_per_second=B * G * R / total,
                         peak_mib=max(r["peak_mib"] for r in rows[side]), of_floor=out["floor"] / total,
                         ratio=statistics.median(ratios), ratio_low=ratios[0], ratio_high=ratios[-1])
    return out


def markdown(points, about):
    lines = [f"{about['threads']} threads, LLaMA {about['width']} x {about['layers']} in float32, "
             f"{about['gflops']:.0f} GFLOP/s, {about['gbytes']:.1f} GB/s, {about['rounds']} rounds, commit "
             f"{about['git_commit']}", "",
             "| P, R, G, B | side | s/step | sampling s | training s | answer tokens/s | peak MiB | of the floor | "
             "times ours [min, max] |", "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for p in points:
        for side in SIDES:
            r = p[side]
            cells = [f"{p['P']}, {p['R']}, {p['G']}, {p['B']}", side, f"{r['seconds']:.2f}", f"{r['sampling']:.2f}",
                     f"{r['seconds'] - r['sampling']:.2f}", f"{r['tokens_per_second']:.0f}", f"{r['peak_mib']:.0f}",
                     f"{r['of_floor']:.0%}", f"{r['ratio']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(points, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(points), figsize=(4 * len(points), 3.6), layout="constrained", squeeze=False)
    for ax, p in zip(axes[0], points):
        sampling, total = ([p[side][key] for side in SIDES] for key in ("sampling", "seconds"))
        ax.bar(SIDES, sampling, color="#56b4e9", label="sampling")
        ax.bar(SIDES, [t - s for t, s in zip(total, sampling)], bottom=sampling, color="#0072b2", label="training")
        ax.axhline(p["floor"], color="#d55e00", linestyle=(0, (3, 2)), label="floor")
        for k, side in enumerate(SIDES):
            ax.annotate(f"{p[side]['ratio']:.1f}x", (k, total[k]), ha="center", va="bottom")
        ax.set_title(f"P={p['P']} R={p['R']} G={p['G']} B={p['B']}", loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("seconds per step")
    axes[0, 0].legend(frameon=False)
    fig.savefig(file, dpi=150)


def main(args):
    if args.side:
        return child(args)
    import harness

    flops, bandwidth = machine(args)
    points = []
    for point in args.points:
        P, R, G, B = map(int, point.split(","))
        points.append(summary(measure(args, point), args, P, R, G, B, flops, bandwidth))
    about = dict(command=" ".join(sys.argv), git_commit=harness.git_commit(), threads=args.threads, width=args.width,
                 layers=args.layers, rounds=args.rounds, gflops=flops / 1e9, gbytes=bandwidth / 1e9)
    print(markdown(points, about))
    if args.out:
        Path(f"{args.out}.json").write_text(json.dumps(dict(about, points=points), indent=1) + "\n")
        Path(f"{args.out}.md").write_text(markdown(points, about))
        plot(points, f"{args.out}.png")


if __name__ == "__main__":
    main(parse())
