"""What lies in memory while a script trains, in GB for each process: a table from shapes and flags,
no model is made.

Run      python benchmarks/memory.py --shape 7b            every script with the papers' flags
         python benchmarks/memory.py --script sft --shape 7b --quantize none --lora_r 64
         python benchmarks/memory.py --script grpo_rank --shape small --measure

`--measure` runs `generate` and `token_logprobs`, one step each, and adds up every tensor that is
alive (on a GPU: the allocator's own peak). What no table sees: CUDA's context (half a GB), the
allocator's gaps, NCCL's buffers.
"""

import argparse
import importlib
import os
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import CLIPVisionConfig, LlamaConfig

import video_llm
from plumbing.flags import Parser  # noqa: E402
from video_llm import (Prefix, VideoLLM, VideoLLMConfig, VideoQFormerConfig, add_lora, generate,
                       token_logprobs)

# vision tower, Q-Former, decoder; frames
SHAPES = {"7b": (dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                      num_attention_heads=16, image_size=336, patch_size=14),
                 dict(num_query_tokens=32),
                 dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=32, vocab_size=32001,
                      max_position_embeddings=4096), 50),
          "small": (dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, image_size=64, patch_size=16),
                    dict(num_query_tokens=8, hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, cross_attention_frequency=1),
                    dict(hidden_size=192, intermediate_size=512, num_hidden_layers=6,
                         num_attention_heads=6, num_key_value_heads=3, vocab_size=3000,
                         max_position_embeddings=1024), 8),
          "tiny": (video_llm.TINY_VISION, video_llm.TINY_QFORMER,
                   dict(video_llm.TINY_LLAMA, vocab_size=463), 8)}
# script: answers behind one prefix, networks without LoRA, adapters with LoRA, what its flags of
# the batch are
SCRIPTS = {"sft": dict(G=lambda a: a.pack, networks=1, adapters=1, bridge=True, batch="batch_size"),
           "grpo_rank": dict(G=lambda a: a.G, networks=2, adapters=1, samples=True,
                             batch="prompts_per_step"),
           "ppo_rlaif": dict(G=lambda a: a.G, networks=3, adapters=2, samples=True,
                             batch="prompts_per_step"),
           "dpo_iter_w2s": dict(G=lambda a: 2, networks=2, adapters=1, batch="prompts_per_step"),
           "reward_model": dict(G=lambda a: 2 * a.pack, networks=1, adapters=1, scores=True,
                                batch="prompts_per_step")}
# bytes a weight: 4 bits, 8 bits for 64 of them, 32 bits for 256 of those
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


def configuration(shape):
    vision, qformer, llama, _ = SHAPES[shape]
    vision = CLIPVisionConfig(**vision)
    qformer = VideoQFormerConfig(**{"max_frames": 64, **qformer,
                                    "encoder_hidden_size": vision.hidden_size})
    return VideoLLMConfig(vision_config=vision, qformer_config=qformer,
                          text_config=LlamaConfig(**llama), video_token_id=0)


def counts(config):
    """Weights by part: clip, bridge (Q-Former, projection), matrices (what NF4 quantises), rest of
    the decoder."""
    with torch.device("meta"):
        model = VideoLLM(config)
    size = lambda module: sum(p.numel() for p in module.parameters())
    layers = model.language_model.model.layers
    matrices = sum(size(m) for m in layers.modules() if isinstance(m, nn.Linear))
    lora = sum(m.in_features + m.out_features for m in layers.modules() if isinstance(m, nn.Linear))
    return dict(clip=size(model.vision_tower), bridge=size(model.qformer) + size(model.projection),
                matrices=matrices, rest=size(model.language_model) - matrices, lora=lora)


def micro_batch(args, G, prompt, answer):
    """Rows of G answers that fill the budget of tokens, one at least."""
    return max(1, args.tokens_per_micro_batch // (prompt + G * answer))


def table(script, args, shape, processes, prompt, answer, rows=None):
    """{row: bytes} of one process. prompt: tokens of text before the answers; answer: tokens of an
    answer (of sft: of question and answer); rows: questions sampled at once, where it is not the
    whole share of the batch."""
    about, config, frames = SCRIPTS[script], configuration(shape), SHAPES[shape][3]
    t, q, v = config.text_config, config.qformer_config, config.vision_config
    n, G = counts(config), about["G"](args)
    b = micro_batch(args, G, prompt + q.num_query_tokens, answer)
    lora, nf4 = args.lora_r, args.quantize == "nf4"
    # bytes of what is not trained, and of what layers put out
    e = 2 if args.dtype == "bfloat16" else 4
    bridge = not lora or about.get("bridge")
    eq = 4 if bridge else e
    trained = (n["lora"] * lora * about["adapters"] + n["bridge"] * bool(about.get("bridge"))
               if lora else (n["matrices"] + n["rest"] + n["bridge"])
               * (about["networks"] - (script != "sft") or 1))
    if not lora and script in ("grpo_rank", "dpo_iter_w2s"):  # the frozen copy is not trained
        trained = n["matrices"] + n["rest"] + n["bridge"]
    out = {"weights": e * (n["clip"] + n["rest"]) + eq * n["bridge"] + n["matrices"]
           * (NF4 if nf4 else e)}
    if not lora:
        out["weights"] += (about["networks"]
                           - 1) * 4 * sum(n[k] for k in ("clip", "bridge", "matrices", "rest"))
    out["adapters"] = 4 * trained if lora else 0
    out["gradients"] = 4 * trained
    out["optimizer"] = 8 * trained
    out["DDP's buckets"] = 4 * trained * (processes > 1)

    # sampling
    S = (v.image_size // v.patch_size) ** 2 + 1
    P, T, L, D, V = (prompt + q.num_query_tokens, answer, t.num_hidden_layers, t.hidden_size,
                     t.vocab_size)
    head = D // t.num_attention_heads
    kv = t.num_key_value_heads * head
    per_process = getattr(args, about["batch"]) // processes
    B = (rows or per_process) if about.get("samples") else b
    features = 4 * frames * S * v.hidden_size
    loaded = B if about.get("samples") else per_process if script == "reward_model" else 0
    out["video features"] = features * (loaded + b)  # loaded: of a whole step, beside a micro-batch
    # of one video, in one layer of the Q-Former
    reading = frames * S * (v.hidden_size + 2 * q.hidden_size) * eq
    out["KV cache"] = out["sampled logits"] = 0
    if about.get("samples"):
        # a layer is copied when it grows
        out["KV cache"] = B * (P + G * T) * L * 2 * kv * e * (1 + 1 / L)
        out["sampled logits"] = B * G * V * (20 + e)

    # the update, of one micro-batch
    tokens = b * (P + G * T)
    r = 4 * lora
    if lora and e == 2:  # norms and every LoRA layer keep float32 copies
        layer = 32 * D + 4 * D + 4 * kv + 10 * t.intermediate_size + 7 * r
    else:
        layer = 4 * ((6 if lora else 8) * D + 2 * kv + 4 * t.intermediate_size) + 7 * r
    hidden = e * D
    mask = b * (P + G * T) ** 2 * (e + 1)
    recompute = args.gradient_checkpointing
    out["activations"] = mask + tokens * ((L * hidden + layer) if recompute else L * layer)
    crossing = len(range(0, q.num_hidden_layers, q.cross_attention_frequency))
    if bridge:
        out["activations"] += b * frames * S * eq * (v.hidden_size + 2 * q.hidden_size
                                                     * (1 if recompute else crossing))
    out["logits"] = 0 if about.get("scores") else 12 * b * (G * T) * V

    static = out["weights"] + out["adapters"] + out["optimizer"] + out["DDP's buckets"]
    prefill = B * reading if about.get("samples") else 0
    sampling = static + features * B + max(prefill, out["KV cache"] + out["sampled logits"])
    before = out["gradients"] if per_process > b else 0  # gradients of the micro-batches before
    passing = out["activations"] + out["logits"] + b * reading * (not bridge)
    update = static + out["video features"] + max(before + passing, out["gradients"])
    step = static + 2 * out["gradients"]  # AdamW on a GPU keeps one more copy while it steps
    out["peak while sampling"] = sampling if about.get("samples") else 0
    out["peak of the update"] = max(update,
                                    step if torch.cuda.is_available() or shape == "7b" else 0)
    out["peak"] = max(out["peak while sampling"], out["peak of the update"])
    return out


class Alive(TorchDispatchMode):
    """Bytes of all tensors that are alive, and their peak: every operation's outputs are counted
    until they die."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, out)
        return out


def measure(args, shape, prompt, answer, rows):
    """Peak bytes of (sampling, update) of a random model of this shape on this machine: one step of
    grpo_rank."""
    torch.manual_seed(0)
    config, frames = configuration(shape), SHAPES[shape][3]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model = VideoLLM(config).eval().to(device=device, dtype=dtype)
    model.vision_tower.requires_grad_(False)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    reference = None if args.lora_r else video_llm.reference_of(model)
    if args.lora_r:
        model = add_lora(model, args.lora_r, args.lora_alpha)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, foreach=device == "cuda")
    for p in params:  # as behind the first step: AdamW's moments are there
        optimizer.state[p] = dict(step=torch.tensor(1.0), exp_avg=torch.zeros_like(p),
                                  exp_avg_sq=torch.zeros_like(p))
    v, Q, G = config.vision_config, config.qformer_config.num_query_tokens, args.G
    b = micro_batch(args, G, prompt + Q, answer)
    S = (v.image_size // v.patch_size) ** 2 + 1
    ids = torch.randint(1, config.text_config.vocab_size, (rows, prompt + Q))
    ids[:, 1 : 1 + Q] = config.video_token_id
    prefix = Prefix(ids, torch.ones_like(ids), torch.randn(rows, frames, S, v.hidden_size),
                    torch.ones(rows, frames, dtype=torch.bool))
    prefix = Prefix(*(x.to(device) for x in prefix))
    uniforms = torch.rand(rows, G, answer)

    def sample():
        generate(model, prefix, uniforms, eos_id=-1)

    def update():
        tokens = torch.randint(1, 100, (rows, G, answer), device=device)
        lengths = torch.full((rows, G), answer, device=device)
        for i in torch.arange(rows, device=device).split(b):
            logprobs, _ = token_logprobs(model, prefix.rows(i), tokens[i], lengths[i], 1.0, "value")
            logprobs.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    held = [*model.parameters(), *model.buffers(), *prefix,
            *(x for s in optimizer.state.values() for x in s.values())]
    if reference:
        with reference() as frozen:
            held += [*frozen.parameters()]
    peaks = []
    for phase in (sample, update):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            phase()
            peaks.append(torch.cuda.max_memory_allocated())
        else:
            with Alive() as alive:
                for tensor in held:
                    alive.count(tensor)
                phase()
            peaks.append(alive.peak)
    return peaks


def flags_of(script, shape, flags):
    """The flags of a script; at 7B the paper's where it has such a preset, else QLoRA alone."""
    cls = importlib.import_module(script).Args
    parser = Parser(cls, allow_abbrev=False)
    if shape == "7b":
        qlora = dict(lora_r=64, lora_alpha=16, quantize="nf4", dtype="bfloat16",
                     gradient_checkpointing=True)
        parser.set_defaults(**getattr(cls, "PRESETS", {}).get("paper", qlora))
    return parser.parse_args_into_dataclasses(flags)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--script", default="all", choices=("all", *SCRIPTS))
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--processes", type=int, default=4, help="processes that share the batch")
    parser.add_argument("--prompt_tokens", type=int, default=64,
                        help="text before the answers, the video apart")
    parser.add_argument("--answer_tokens", type=int, default=128,
                        help="of every answer; sft: of question and answer")
    parser.add_argument("--measure", action="store_true",
                        help="against the measured peak; grpo_rank without NF4")
    about, flags = parser.parse_known_args()
    if about.measure and about.script != "grpo_rank":
        parser.error("--measure: of --script grpo_rank")
    os.environ["WORLD_SIZE"] = "1" if about.measure else str(about.processes)
    columns, lines = {}, {}
    for script in SCRIPTS if about.script == "all" else [about.script]:
        args = flags_of(script, about.shape, flags)
        if about.measure and args.quantize != "none":
            parser.error("--measure: with --quantize none")
        queries = configuration(about.shape).qformer_config.num_query_tokens
        b = micro_batch(args, SCRIPTS[script]["G"](args), about.prompt_tokens + queries,
                        about.answer_tokens)
        rows = 2 * b if about.measure else None
        columns[script] = table(script, args, about.shape, 1 if about.measure else about.processes,
                                about.prompt_tokens, about.answer_tokens, rows)
        lines[script] = f"LoRA {args.lora_r}, {args.quantize}, {args.dtype}, micro-batch {b}"
    print(f"GB of each of {about.processes} processes, {about.shape}, {about.prompt_tokens} + "
          f"{about.answer_tokens} tokens of text\n\n| | {' | '.join(columns)} |\n| --- "
          f"|{' ---: |' * len(columns)}")
    print(f"| | {' | '.join(lines.values())} |")
    for row in next(iter(columns.values())):
        print(f"| {row} | "
              f"{' | '.join(f'{column[row] / 2**30:.2f}' for column in columns.values())} |")
    if about.measure:
        found = columns["grpo_rank"]
        for phase, peak in zip(("peak while sampling", "peak of the update"),
                               measure(args, about.shape, about.prompt_tokens, about.answer_tokens,
                                       rows)):
            print(f"\n{phase}: measured {peak / 2**30:.4f} GB, table / measured "
                  f"{found[phase] / peak:.2f}")


if __name__ == "__main__":
    main()
