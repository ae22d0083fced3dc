"""What the speed comparisons share: sides that take turns, the machine's own rates, the models,
tables and plots.

Every side lives in a process of its own, with the same number of threads, and takes one step at a
time while the others wait: what disturbs the machine disturbs all of them. A ratio is the median
over the rounds of the other side's seconds over ours *within a round*.

floor      the seconds that the arithmetic alone would take at the machine's own rate for a matrix
           product of 1024^3 (8192^3 on a GPU): 2 FLOPs a weight and token forward, as many backward
           for what flows through, as many again for weights that are trained. Decoding: the larger
           of that and the time to read all weights once a token.
memory     peak of the process over the rounds above what it held when the model was loaded; on a
           GPU of its allocator.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIDES = ("ours", "plain", "trl")
VOCABULARY = 2048
# prompt, answer, answers a question, questions of grpo_rank.py's default; decoder: `tiny`
EMBEDDED = (32, 16, 5, 48)
COLOURS = dict(ours="#0072b2", plain="#999999", trl="#d55e00")


def parser_of(text, points, rounds):
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("--points", nargs="+", default=points,
                        help="what the header calls a point; or `embedded`")
    parser.add_argument("--rounds", type=int, default=rounds,
                        help="measured steps of every side, after one to warm up")
    parser.add_argument("--shape", default="small", help="small: 256 x 6 | tiny: the embedded one "
                                                         "| 7b: LLaMA-2-7B's")
    parser.add_argument("--base", default="float32", choices=("float32", "bfloat16", "nf4"),
                        help="float32 trains all weights; the others LoRA of rank 64 on a frozen "
                             "base")
    parser.add_argument("--device", default="cpu", help="cpu | cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="", help="write <out>.json, <out>.md and <out>.png; on a "
                                                  "GPU <out>_cuda.json")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)  # a child process
    return parser


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------
def config_of(shape):
    from transformers import LlamaConfig

    from video_llm import TINY_LLAMA

    small = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
                 num_key_value_heads=8)
    # 7b: the rest is LlamaConfig's default
    sizes = {"small": dict(vocab_size=VOCABULARY, **small), "7b": dict(vocab_size=32000),
             "tiny": dict(vocab_size=VOCABULARY, **TINY_LLAMA)}[shape]
    return LlamaConfig(**(dict(pad_token_id=0, bos_token_id=1, eos_token_id=2,
                               tie_word_embeddings=False) | sizes
                          | dict(max_position_embeddings=4096)))


def decoder(args):
    """A random LLaMA, the same on all sides: all weights trained, or LoRA on a base in bfloat16 or
    NF4."""
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.base == "float32":
        return LlamaForCausalLM(config_of(args.shape)).to(args.device)
    with torch.device(args.device):
        model = LlamaForCausalLM._from_config(config_of(args.shape), dtype=torch.bfloat16)
    if args.base == "nf4":
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                 bnb_4bit_use_double_quant=True,
                                 bnb_4bit_compute_dtype=torch.bfloat16)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = LlamaForCausalLM.from_pretrained(folder, quantization_config=nf4,
                                                     dtype=torch.bfloat16,
                                                     device_map={"": args.device})
    return model.requires_grad_(False)


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=64, lora_alpha=16, task_type="CAUSAL_LM", target_modules=r".*layers.*_proj")


def video_llm_around(llama):
    """A VideoLLM with this decoder. No video in these prompts: what is compared is the decoder's
    work."""
    from transformers import CLIPVisionConfig

    from video_llm import (
        TINY_QFORMER,
        TINY_VISION,
        VideoLLM,
        VideoLLMConfig,
        VideoQFormerConfig,
        add_lora,
    )

    text = config_of("tiny")
    model = VideoLLM(VideoLLMConfig(vision_config=CLIPVisionConfig(**TINY_VISION), text_config=text,
                                    qformer_config=VideoQFormerConfig(**TINY_QFORMER)))
    model.config.text_config = llama.config
    model.to(device=llama.device, dtype=llama.dtype).requires_grad_(False)
    trained = any(p.requires_grad for p in llama.parameters())
    model.language_model = llama
    return model if trained else add_lora(model, 64, 16)


def random_ids(shape, seed):
    import torch

    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def word_tokenizer():
    """One word, one token; and the text of ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>",
                                               *(f"w{i}" for i in range(3, VOCABULARY))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = lambda ids: " ".join(f"w{i}" for i in ids)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>"), text


def trainer_config(args, kind, **more):
    """TRL's configuration with what it turns on by itself off, as on the other sides."""
    return kind(output_dir=tempfile.mkdtemp(), use_cpu=args.device == "cpu",
                bf16=args.base != "float32", gradient_checkpointing=False, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
                max_steps=args.rounds + 2, **more)


def stepwise(make_trainer):
    """A trainer of transformers owns its loop: it runs in a thread and is let go one step per
    `next`."""
    from transformers import TrainerCallback

    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            done.release()
            go.acquire()

    trainer = make_trainer(Turns())
    yield
    threading.Thread(target=trainer.train, daemon=True).start()
    done.acquire()
    while True:
        go.release()
        done.acquire()
        yield


def saved(model):
    """TRL loads its reference from where the model's config says it came from."""
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    model.config._name_or_path = folder
    return model


def gradient_apart(args, ours, plain):
    """ours(model, reference), plain(model, reference): the loss of one batch. -> the largest
    difference of their gradients, over the gradient's largest entry."""
    import torch

    llama = decoder(args)
    frozen, params = copy.deepcopy(llama), list(llama.parameters())
    with torch.no_grad():
        for p in params:
            p += 0.01 * torch.randn(p.shape)  # off the reference
    # a VideoLLM never says the video token, here 0: a plain model must not either
    banned = torch.tensor([0])
    for model in (llama, frozen):
        model.lm_head.register_forward_hook(lambda _, inputs, out: out.index_fill(-1, banned, -1e4))
    losses = (ours(video_llm_around(llama), lambda: nullcontext(video_llm_around(frozen))),
              plain(llama, lambda: nullcontext(frozen)))
    mine, theirs = (torch.autograd.grad(loss, params) for loss in losses)
    return (max(float((a - b).abs().max()) for a, b in zip(mine, theirs))
            / max(float(g.abs().max()) for g in theirs))


def checked(args, point, ours, plain):
    """A note on the gradients; ends the run where they differ. In float32 on a CPU alone: there
    rounding is small."""
    if args.base != "float32" or args.device != "cpu":
        return ""
    apart = gradient_apart(args, ours, plain)
    if apart > 1e-5:
        sys.exit(f"{point}: the gradients of ours and plain are {apart:.1e} apart")
    return f"gradients of ours and plain apart: {apart:.0e} of the largest entry"


# --------------------------------------------------------------------------------------------------
# Taking turns
# --------------------------------------------------------------------------------------------------
def memory(args, peak=False):
    """MiB held now, or at most since the last question that was not for the peak."""
    if args.device == "cuda":
        import torch

        held = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return held / 2**20
    status = Path("/proc/self/status").read_text()
    held = int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    return held


def child(args, steps):
    """Speaks one JSON line per step; what libraries print goes to stderr. steps yields the seconds
    of its sampling."""
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    next(steps)
    loaded = memory(args)
    for _ in sys.stdin:
        began = time.perf_counter()
        sampling = next(steps) or 0.0
        if args.device == "cuda":
            import torch

            torch.cuda.synchronize()
        row = dict(seconds=time.perf_counter() - began, sampling=sampling,
                   peak_mib=memory(args, peak=True) - loaded)
        say.write(json.dumps(row) + "\n")
        say.flush()
    os._exit(0)  # TRL's loop still waits for its turn


def measure(args, script, point, sides=SIDES, env=()):
    """-> {side: [row of each round]}; the first round warms up and is thrown away. A side called
    x*2 is two processes of x with a rendezvous; its row is that of the slower one."""
    rows, processes = {side: [] for side in sides}, {}
    flags = ["--points", point, "--rounds", args.rounds, "--shape", args.shape, "--base", args.base,
             "--device", args.device, "--threads", args.threads]
    base = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false",
            **dict(env)}
    for side in sides:
        name, _, several = side.partition("*")
        command = [sys.executable, script, *map(str, flags), "--side", name]
        world = int(several or 1)
        about = [base] if world == 1 else [{**base, "RANK": str(r), "LOCAL_RANK": str(r),
                                            "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                                            "MASTER_PORT": str(20000 + os.getpid() % 20000)}
                                           for r in range(world)]
        processes[side] = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            env=e, text=True, stderr=tempfile.TemporaryFile("w+"))
                           for e in about]
    try:
        for turn in range(args.rounds + 1):
            for side, group in processes.items():
                for p in group:
                    p.stdin.write("step\n")
                    p.stdin.flush()
                lines = [p.stdout.readline() for p in group]
                if not all(lines):
                    sys.exit(f"{side} died; see: {' '.join(group[0].args)} < <(echo step)")
                slowest = max(map(json.loads, lines), key=lambda row: row["seconds"])
                rows[side] += [slowest] if turn else []
            print(f"{point}: round {turn}/{args.rounds}", end="\r", file=sys.stderr, flush=True)
    finally:
        for p in sum(processes.values(), []):
            p.kill()
    return rows


def machine(args):
    """-> FLOP/s of a matrix product, bytes/s of reading memory; medians of ten."""
    import torch

    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a = torch.randn(n, n, dtype=dtype, device=args.device)
    big = torch.zeros(2**29 if cuda else 2**27, device=args.device)  # 2 GiB, 512 MiB

    def seconds(work):
        times = []
        for _ in range(11):
            began = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    return 2 * n**3 / seconds(lambda: a @ a), big.numel() * 4 / seconds(big.sum)


def weights_of(shape):
    """Weights that a token is multiplied with: all but the embedding."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(shape))
    return sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)


def summary(rows, floor, arithmetic, tokens):
    """-> {side: medians; ratio: the side's seconds over ours, within rounds}. floor, arithmetic:
    seconds."""
    out = {}
    for side in rows:
        total = statistics.median(r["seconds"] for r in rows[side])
        ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(rows[side], rows["ours"]))
        out[side] = dict(seconds=total,
                         sampling=statistics.median(r["sampling"] for r in rows[side]),
                         tokens_per_second=tokens / total,
                         peak_mib=max(r["peak_mib"] for r in rows[side]), of_floor=floor / total,
                         mfu=arithmetic / total, ratio=statistics.median(ratios),
                         ratio_low=ratios[0], ratio_high=ratios[-1])
    return out


def about_machine(args, flops, bandwidth):
    import plumbing.run

    return dict(command=" ".join(["python", *sys.argv]), git_commit=plumbing.run.git_commit(),
                device=args.device, threads=args.threads, shape=args.shape, base=args.base,
                rounds=args.rounds, gflops=flops / 1e9, gbytes=bandwidth / 1e9)


HEAD = ("| point | side | s/step | sampling s | training s | tokens/s | peak MiB | of the floor | "
        "MFU | times ours |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n")


def table_rows(point, name):
    for side, r in point["sides"].items():
        cells = [name, side, f"{r['seconds']:.3g}", f"{r['sampling']:.3g}",
                 f"{r['seconds'] - r['sampling']:.3g}", f"{r['tokens_per_second']:.0f}",
                 f"{r['peak_mib']:.0f}", f"{r['of_floor']:.0%}", f"{r['mfu']:.0%}",
                 f"{r['ratio']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]"]
        yield f"| {' | '.join(cells)} |\n"


def write(args, about, points, name_of, commands):
    """Print the table; with --out write it beside the numbers and a plot. What was measured on a
    GPU, another time, stands in the same table; what was not says so, with the command that does
    it."""
    out = Path(args.out) if args.out else Path(tempfile.mkdtemp()) / "table"
    files = {"cpu": out.with_suffix(".json"), "cuda": out.with_name(out.name + "_cuda.json")}
    mine = files["cuda" if args.device == "cuda" else "cpu"]
    old = json.loads(mine.read_text())["points"] if args.device == "cuda" and mine.exists() else []
    # NF4 and bf16: two commands
    points = [p for p in old if p["name"] not in {name_of(q) for q in points}] + points
    for p in points:
        p.setdefault("name", name_of(p))
    mine.write_text(json.dumps(dict(about, points=points), indent=1) + "\n")
    text = ""
    for device, file in files.items():
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        text += (f"{device}, {found['threads']} threads: {found['gflops']:.0f} GFLOP/s, "
                 f"{found['gbytes']:.1f} GB/s; {found['rounds']} rounds, commit "
                 f"{found['git_commit']}\n\n{HEAD}")
        text += "".join(row for p in found["points"] for row in table_rows(p, p["name"])) + "\n"
        text += "".join(f"{p['name']}: {p['note']}\n"
                        for p in found["points"] if p.get("note")) + "\n"
    if not files["cuda"].exists():
        text += "| on a GPU | |\n|---|---|\n"
        text += "".join(f"| {name} | not measured yet: `{command}` |\n"
                        for name, command in commands)
    print(text)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    if args.out and args.device == "cpu":
        plot(points, out.with_suffix(".png"))


def plot(points, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = [p for p in points if "floor" in p]
    fig, axes = plt.subplots(1, len(points), figsize=(3.4 * len(points), 3.4), layout="constrained",
                             squeeze=False)
    for ax, p in zip(axes[0], points):
        sides = list(p["sides"])
        for k, side in enumerate(sides):
            r = p["sides"][side]
            ax.bar(k, r["sampling"], color=COLOURS[side], alpha=0.5)
            ax.bar(k, r["seconds"] - r["sampling"], bottom=r["sampling"], color=COLOURS[side])
            ax.annotate(f"{r['ratio']:.1f}x", (k, r["seconds"]), ha="center", va="bottom")
        ax.axhline(p["floor"], color="black", linestyle=(0, (3, 2)), linewidth=1)
        ax.set_xticks(range(len(sides)), sides)
        ax.set_title(p["name"], loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("seconds per step\n(pale: sampling; dashed: floor)")
    fig.savefig(file, dpi=150)
