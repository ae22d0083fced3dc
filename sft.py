"""Supervised fine-tuning of a video language model: easy answers first, then all of them.

Run     python sft.py                                       the embedded world, labels in plenty
        python sft.py --name policy --data data/moving_shapes/train.json --num_clips 40 --steps 200
        torchrun --nproc_per_node=4 sft.py --data my.json --video_root videos
            --clip openai/clip-vit-large-patch14-336 --qformer 32 --llm meta-llama/Llama-2-7b-hf
            --quantize nf4 --lora_r 64 --lora_alpha 16      your own, at 7B
Paper   [V] VLM-RLAIF, arXiv:2402.03746, Sec. 3.2 (curriculum), Sec. 4.1 (hyper-parameters)
Makes   runs/sft/<name>_s<seed>/final: the start of RL; with labels in plenty also the judge

The algorithm:
  1. Read labelled questions about videos; with --num_clips, those of a few clips only.
  2. Compose a model of a CLIP, a Q-Former and a decoder, or continue one.
  3. Encode every video once; leave out what cannot be read or does not fit.
  4. Curriculum: the first --easy_steps of the steps draw from the shortest answers.
  5. Maximise the likelihood of the answers. Some groups become comparisons: the judge's task.
  6. Update, log, save.

Differs D1  Stage two trains on easy *and* hard records, [V] only on the hard ones: we expect a
            model this small to forget the easy skills otherwise. Not measured.
        D2  Every example counts the same: mean over its tokens, then over examples. With one-word
            answers beside 50-word descriptions the descriptions would be nearly all of the loss.
        D3  A share of the groups teaches the judge's task, to choose the better of two answers
            (--judge_share). [V]'s 7B model judges without such training; whether a model of a
            million weights can is not measured. Comparisons come from the labelled clips: the right
            answer against another one to the same question, else to the same type of task. The
            judge replies with the *text* of the better answer (oracle.judge_prompt).

The questions about one clip are packed after one video: video and Q-Former are computed once for up
to --pack examples, and a block mask keeps these from seeing each other (video_llm.packed).

symbol   name      shape    example           meaning
         prefix    (B,P)    [7, 7, 7, 31]     what the prompts about a clip share, the video first
         tokens    (B,G,T)  [[12, 5, 2], ..]  what follows in G examples: question, answer, EOS
m_t      mask      (N,T)    [0, 1, 1]         1 on answer tokens and EOS; N = B*G rows
pi(y_t)  logprobs  (N,T)    [0, -.3, -.1]     log-probability of each token, given all before it
"""

import os
import random
import sys
from dataclasses import dataclass

from plumbing.flags import WEIGHTS, WORLD, ShardArgs, answer_help, flag, parse_args

KINDS = ("answer", "describe", "judge")  # what an example asks for; logged apart


@dataclass
class Args(ShardArgs):  # --dtype, --shard, ...: plumbing/flags.py
    # parts, frames, queries, LoRA: published; the rest is ours; not a flag
    PRESETS = {"paper": dict(
        clip="openai/clip-vit-large-patch14-336", qformer="32", llm="meta-llama/Llama-2-7b-hf",
        num_frames=50, judge_share=0.0, lora_r=32, lora_alpha=32, quantize="nf4", lr=1e-4,
        dtype="bfloat16", gradient_checkpointing=True, batch_size=128, tokens_per_micro_batch=1750,
        weight_decay=0.0)}
    # -- algorithm
    preset: str = flag("", "paper: 7B with QLoRA, 50 frames, 32 queries; other flags still win",
                       choices=("", "paper"))
    curriculum: str = flag("length", "length: short answers first [V Sec. 3.2]; off: all at once",
                           choices=("length", "off"))
    easy_share: float = flag(0.65, "share of records that counts as easy [V: 214k of 327k]", low=0,
                             high=1)
    easy_steps: float = flag(0.4, "share of the steps spent in the easy stage", low=0, high=1)
    judge_share: float = flag(0.25, "chance of a group to become comparisons (D3)", low=0, high=1)
    lora_r: int = flag(0, "LoRA rank on the decoder [V: 32]; 0: all weights but CLIP's", low=0)
    lora_alpha: int = flag(32, "LoRA alpha [V: 32]", low=1)
    quantize: str = flag("none", "none, or nf4: QLoRA, needs --lora_r", choices=("none", "nf4"))
    # -- budget
    steps: int = flag(700, "optimizer steps", low=1)
    batch_size: int = flag(32, "groups (up to --pack examples about one clip) per optimizer step, "
                           "over all processes", low=1)
    pack: int = flag(6, "examples about one clip that share its video, at most", low=1)
    tokens_per_micro_batch: int = flag(2048, "tokens in a forward pass, padding included", low=1)
    lr: float = flag(1.5e-3, "peak learning rate; linear warm-up, then linear to zero", above=0)
    warmup: float = flag(0.03, "share of the steps that warm up", low=0, high=1)
    weight_decay: float = flag(0.05, "AdamW weight decay", low=0)
    # -- data and models
    data: str = flag(f"{WORLD}/pretrain.json", "annotation files, comma-separated: docs/sft.md")
    video_root: str = flag("", "where the videos are; empty: beside the annotation file")
    num_clips: int = flag(0, "use the labels of so many clips, drawn by --seed; 0: all", low=0)
    model: str = flag("", "continue from this VideoLLM; empty: compose one of the next three")
    clip: str = flag(f"{WEIGHTS}/clip", "CLIP checkpoint, folder or hub name")
    qformer: str = flag(f"{WEIGHTS}/qformer", "VideoQFormer, BLIP-2, InstructBLIP; a number: new")
    llm: str = flag(f"{WEIGHTS}/llm", "decoder of LLaMA's class; only a tokenizer: tiny, new")
    num_frames: int = flag(8, "frames of a video, for a composed model [V: 50]", low=1)
    max_prompt_tokens: int = flag(512, "of a longer question the end is cut, not the video", low=1)
    max_answer_tokens: int = flag(96, "longer answers are cut and carry no EOS", low=1)
    # -- plumbing
    name: str = flag("oracle", "run name: runs/sft/<name>_s<seed>")
    seed: int = flag(0, "initialisation, choice of labelled clips, order of the data", low=0)
    cache: str = flag("cache", "folder of cached CLIP features")
    save_steps: int = flag(200, "steps between checkpoints", low=1)
    resume: bool = flag(False, "continue the run of this name where it stopped")

    def __post_init__(self):
        super().__post_init__()
        parts = ("clip", "qformer", "llm", "num_frames")
        composed = [f for f in parts if getattr(self, f) != getattr(Args, f)]
        if self.model and composed:
            raise ValueError(f"--{composed[0]}: does nothing with --model, a whole model already")
        self.check_training("batch_size")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch

from inputs.features import FeatureCache
from inputs.records import DataError, read_records
from model.compose import compose
from oracle import judge_prompt
from plumbing import processes
from plumbing.batches import micro_batches
from plumbing.embedded import build_world, ship_weights
from plumbing.questions import choose_labels, fitting_records
from plumbing.run import Run
from plumbing.text import DESCRIBE, normalize
from video_llm import Prefix, save_model, token_logprobs, unwrap


# --------------------------------------------------------------------------------------------------
# Equations: the curriculum, the loss, the schedule
# --------------------------------------------------------------------------------------------------
def easy_and_hard(lengths, easy_share):
    """[V Sec. 3.2] Difficulty is answer length. lengths (R,) tokens -> bool (R,), True on the
    shortest `easy_share`."""
    return lengths <= np.quantile(lengths, easy_share)


def sft_loss(logprobs, mask):
    """Negative log-likelihood per example, mean over its answer tokens (D2). (N,T), (N,T) -> (N,),
    0 on padding."""
    return -(logprobs * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def lr_at(step, steps, peak, warmup=0.0):
    """Linear warm-up over this share of the steps, then linear to zero just after the end."""
    warm = max(1, int(warmup * steps))
    return peak * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def comparison(record, pools, narratives, rng, processor, args):
    """[D3] A judge example: {"clip", "question": (head, tail), "answer": the better one}.

    The wrong answer is another record's answer to the same question, else to the same type of
    task. The order is random. With `narratives` the clip's narrative stands before the question,
    made of labels; the context-aware judge tells its own. None if there is no other answer, if the
    two are the same once cut, or if the prompt is too long: a cut narrative or question would ask
    for a verdict on something else.
    """
    if not isinstance(record["question"], str) or record["question"] == DESCRIBE:
        return None
    right = normalize(record["answer"])
    for key in (record["question"], record["task_type"]):
        wrong = [answer for answer, plain in pools.get(key, []) if plain != right]
        if wrong:
            break
    else:
        return None
    pair = [shorten(text, processor, args.max_answer_tokens)
            for text in (record["answer"], rng.choice(wrong))]
    rng.shuffle(pair)
    question = judge_prompt(record["question"], *pair,
                            narrative=narratives.get(record["clip"].path))
    length = sum(map(len, processor.split_prompt_ids(*question)))
    if normalize(pair[0]) == normalize(pair[1]) or length > args.max_prompt_tokens:
        return None
    return {"clip": record["clip"], "question": question, "answer": record["answer"]}


def shorten(text, processor, max_tokens):
    """The text, cut to `max_tokens` tokens: what `encode` leaves of an answer."""
    ids = processor.answer_ids(text)
    if len(ids) <= max_tokens:
        return text
    return processor.tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)


# --------------------------------------------------------------------------------------------------
# The algorithm
# --------------------------------------------------------------------------------------------------
def main(args):
    run = Run(__file__, args)
    if any(path.startswith(WORLD) for path in args.data.split(",")):  # only ours are ever built
        build_world(run.rank)
    if not args.model:
        ship_weights([args.clip, args.qformer, args.llm], run.rank)

    # 1. Labels
    with processes.one_line_errors(DataError):
        records, report = read_records(args.data.split(","), args.video_root or None)
    records = choose_labels(run, records)
    torch.manual_seed(args.seed)  # LoRA's initialisation; other draws have keys of their own

    # 2. Model: everything but CLIP is trained, or LoRA on the decoder with Q-Former and projection
    base = args.model or f"{run.folder}/base"
    with processes.one_line_errors(OSError):
        if not args.model and run.rank == 0 and not run.checkpoint:
            qformer = int(args.qformer) if args.qformer.isdigit() else args.qformer
            dtype = getattr(torch, args.dtype)
            parts = compose(args.clip, qformer, args.llm, args.num_frames, args.seed, dtype)
            save_model(*parts, base)
        processes.barrier()
        model, processor = run.load_policy(base, train_bridge=True)
    if args.shard and report["text_only"]:
        sys.exit(f"--shard: {args.data} has records without a video; on all processes the same "
                 "layers must run")
    ddp = run.distribute(model, find_unused=report["text_only"] > 0)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98),
                                  weight_decay=args.weight_decay)
    run.resume(optimizer, model)

    # 3. Videos and prompts. What does not fit would end the run in the middle, at every --resume.
    cache = FeatureCache(unwrap(model), processor, args.cache)
    records = fitting_records(run, cache, records, report)
    answer_lengths = np.array([len(processor.answer_ids(r["answer"])) for r in records])
    easy = easy_and_hard(answer_lengths, args.easy_share)
    easy_groups = by_clip([r for r, e in zip(records, easy) if e], args.pack)
    all_groups = by_clip(records, args.pack)
    pools, narratives = judge_material(records)
    log = run.start(args.steps)

    for step in range(run.first_step, args.steps):
        # 4. Curriculum [D1]. Every draw is keyed by (seed, step): neither the number of processes
        #    nor an interruption changes it.
        rng = random.Random(f"{args.seed} {step}")
        is_easy = args.curriculum == "length" and step < args.easy_steps * args.steps
        groups = rng.choices(easy_groups if is_easy else all_groups, k=args.batch_size)
        groups = [list(group) for group in groups]
        for k, group in enumerate(groups):
            if group[0]["clip"] and rng.random() < args.judge_share:  # D3
                known = narratives if rng.random() < 0.5 else {}
                pairs = [comparison(r, pools, known, rng, processor, args) for r in group]
                groups[k] = [pair for pair in pairs if pair] or group
        n_examples = sum(map(len, groups))

        # 5. Likelihood of the answers. Rows of like length: a micro-batch holds little padding.
        rows = sorted((encode(g, processor, args) for g in groups), key=row_length)
        mine = rows[run.rank :: run.world]
        row_tokens = torch.tensor([*map(row_length, mine)])
        micros = micro_batches(row_tokens, args.tokens_per_micro_batch)
        for i, micro in enumerate(micros):
            some = [mine[k] for k in micro]
            prefix, tokens, lengths, mask, kinds = collate(some, processor, cache, run.device)
            with processes.no_sync(ddp, when=i < len(micros) - 1):
                logprobs, _ = token_logprobs(ddp, prefix, tokens, lengths)  # (N,T)
                nll = sft_loss(logprobs, mask)  # (N,)
                # DDP averages over processes; * world undoes it
                (nll.sum() * run.world / n_examples).backward()
            nll = nll.detach()
            log.add("losses/sft", nll.sum(), (mask.sum(-1) > 0).sum())
            for kind in KINDS:
                which = torch.tensor([k == kind for k in kinds], device=run.device)
                log.add(f"losses/{kind}", nll[which].sum(), which.sum())

        # 6. Update, log, save
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.steps, args.lr, args.warmup)
        grad_norm = processes.clip_gradients(params)
        examples = [r for group in groups for r in group]
        run.check_finite(step, grad_norm, [r["question"] for r in examples],
                         [r["answer"] for r in examples])
        optimizer.step()
        optimizer.zero_grad()
        log.add("policy/grad_norm", grad_norm)
        log.add("charts/lr", lr_at(step, args.steps, args.lr, args.warmup))
        log.step(step, show=["losses/sft", *(f"losses/{k}" for k in KINDS), "policy/grad_norm"])
        run.save(step + 1, model, processor, optimizer)
    run.finish(model, processor)


# --------------------------------------------------------------------------------------------------
# Records -> tensors
# --------------------------------------------------------------------------------------------------
def judge_material(records):
    """-> {question or task type: [(answer, the same normalised)]}, {video path: narrative}. A
    narrative is what the labels say to `DESCRIBE`: the parts of a clip in order where there are
    such, else the whole."""
    pools, parts = {}, {}
    for r in records:
        if r["question"] == DESCRIBE:
            parts.setdefault(r["clip"].path, []).append((r["clip"].start is None,
                                                         r["clip"].start or 0, r["answer"]))
        elif isinstance(r["question"], str):
            for key in {r["question"], r["task_type"]}:
                pools.setdefault(key, []).append((r["answer"], normalize(r["answer"])))
    narratives = {}
    for path, texts in parts.items():
        only_whole = all(whole for whole, _, _ in texts)
        used = [text for whole, _, text in sorted(texts) if whole == only_whole]
        narratives[path] = " ".join(used)
    return pools, narratives


def by_clip(records, pack):
    """Groups of up to `pack` records about the same (part of a) clip, like lengths together.
    Text-only rows: alone."""
    clips = {}
    for k, r in enumerate(records):
        clips.setdefault(r["clip"] or k, []).append(r)
    groups = []
    for members in clips.values():
        members.sort(key=lambda r: len(str(r["question"])) + len(r["answer"]))
        groups += [members[i : i + pack] for i in range(0, len(members), pack)]
    return groups


def row_length(row):
    """Tokens of a packed row (video_llm.packed): prefix and all tails."""
    return len(row[0]) + sum(map(len, row[1]))


def encode(group, processor, args):
    """Examples about one clip -> shared prefix ids, [question + answer ids], [answer tokens], clip,
    [kind]."""
    clip, prompts = group[0]["clip"], []
    for r in group:
        if isinstance(r["question"], tuple):
            prompts.append(sum(processor.split_prompt_ids(*r["question"]), []))
        else:
            prompts.append(processor.prompt_ids(r["question"], clip is not None,
                                                args.max_prompt_tokens))
    # the video, and whatever else the prompts begin with (a narrative)
    shared = os.path.commonprefix(prompts)
    answers = [processor.answer_ids(r["answer"], args.max_answer_tokens) for r in group]
    tails = [prompt[len(shared) :] + answer for prompt, answer in zip(prompts, answers)]
    kinds = [kind_of(r["question"]) for r in group]
    return shared, tails, [len(a) for a in answers], clip, kinds


def kind_of(question):
    if isinstance(question, tuple):
        return "judge"
    return "describe" if question == DESCRIBE else "answer"


def collate(rows, processor, cache, device):
    """-> Prefix, tokens (B,G,T), lengths (B,G), mask (N,T) of answer tokens, N kinds. Padding rows:
    an empty mask."""
    B, G = len(rows), max(len(tails) for _, tails, *_ in rows)
    ids, attention_mask = processor.pad([prefix for prefix, *_ in rows], "left")
    videos = [clip for *_, clip, _ in rows if clip is not None]
    features, frame_mask = cache(videos) if videos else (None, None)
    fill = lambda values, empty: [v for row in values for v in list(row) + [empty] * (G - len(row))]
    tails = fill([r[1] for r in rows], [processor.tokenizer.eos_token_id])
    tokens, _ = processor.pad(tails, "right")
    lengths = torch.tensor([len(t) for t in tails])
    counts = torch.tensor(fill([r[2] for r in rows], 0))
    place = torch.arange(tokens.shape[1])
    mask = ((place < lengths[:, None]) & (place >= (lengths - counts)[:, None])).float()
    prefix = Prefix(*(x if x is None else x.to(device)
                      for x in (ids, attention_mask, features, frame_mask)))
    kinds = fill([r[4] for r in rows], "padding")
    return (prefix, tokens.view(B, G, -1).to(device), lengths.view(B, G).to(device),
            mask.to(device), kinds)


if __name__ == "__main__":
    main(parse_args(Args))
