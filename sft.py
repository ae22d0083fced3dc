"""Supervised fine-tuning of a video language model, in two stages: easy answers first, then all of them.

Run      python sft.py                                            the embedded world, labels in plenty, 2 CPU cores
         python sft.py --name policy --data data/moving_shapes/train.json --num_clips 40 --steps 200         few labels
         torchrun --nproc_per_node=4 sft.py --data my.json --video_root videos --clip openai/clip-vit-large-patch14-336
             --qformer 32 --llm meta-llama/Llama-2-7b-hf --quantize nf4 --lora_r 64 --lora_alpha 16          your own
Paper    [V] VLM-RLAIF, arXiv:2402.03746, Sec. 3.2 (curriculum), Sec. 4.1 (hyper-parameters)
Makes    runs/sft/<name>/final: the start of every RL script; with labels in plenty also the oracle that judges it

Differs  D1  stage two trains on easy *and* hard records, [V] on the hard ones alone: we expect a model this small
             to forget the easy skills otherwise; not measured.
         D2  every example counts the same (mean over its tokens, then over examples), not every token: with one-word
             answers beside 50-word descriptions, the words of the descriptions would be nearly all of the loss.
         D3  a share of the groups drawn teaches the judge's task, choosing the better of two answers (--judge_share):
             [V]'s 7B SFT model judges without such training; whether a model of a million weights can: not measured.
             Built from the labelled clips alone: the right answer against another answer to the same question, or,
             where there is none, to the same type of task.
             The judge replies with the *text* of the better answer, not its number. Its prompt (oracle.judge_prompt):
             "[narrative of the clip] / Response 1: .. / Response 2: .. / Which response is better? / the question".

One thing makes it fast: the questions about one clip are packed after one video. Video and Q-Former are computed once
for up to `--pack` examples, and a block mask keeps them from seeing each other (`packed` in video_llm.py).

symbol      name          shape     meaning
            prefix        (B,P)     what the prompts about a clip have in common, the video first; B clips
            tokens        (B,G,T)   what follows, for G examples a clip: rest of the question, answer, EOS
m_t         mask          (N,T)     1 on answer tokens and EOS (the model learns to stop), N = B*G, from lengths
pi(y_t)     logprobs      (N,T)     log-probability of each token given the video and what stands before it
"""

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from flags import WEIGHTS, WORLD, ShardArgs, above_zero, answer_help, at_least, check_training, parse_args

KINDS = ("answer", "describe", "judge")  # what an example asks for; logged apart


@dataclass
class Args(ShardArgs):  # --dtype, --shard, ...: flags.py
    PRESETS = {"paper": dict(  # parts, frames, queries, LoRA: published; the rest is ours; no annotation: not a flag
        clip="openai/clip-vit-large-patch14-336", qformer="32", llm="meta-llama/Llama-2-7b-hf", num_frames=50,
        judge_share=0.0, lora_r=32, lora_alpha=32, quantize="nf4", dtype="bfloat16",
        gradient_checkpointing=True, batch_size=128, micro_batch_size=2, lr=1e-4, weight_decay=0.0)}
    # -- algorithm
    preset: str = HfArg(default="", help="paper: 7B with QLoRA, 50 frames, 32 queries; other flags still win")
    curriculum: str = HfArg(default="length", help="length: short answers first [V Sec. 3.2]; off: all at once")
    easy_share: float = HfArg(default=0.65, help="share of the records that counts as easy [V: 214k of 327k]")
    easy_steps: float = HfArg(default=0.4, help="share of the steps spent in the easy stage")
    lora_r: int = HfArg(default=0, help="LoRA rank on the decoder [V: 32]; 0 trains all weights but CLIP's")
    lora_alpha: int = HfArg(default=32, help="LoRA alpha [V: 32]")
    quantize: str = HfArg(default="none", help="none, or nf4: QLoRA, needs --lora_r")
    # -- budget
    steps: int = HfArg(default=700, help="optimizer steps")
    batch_size: int = HfArg(default=32, help="groups (up to --pack examples about one clip) per optimizer step, "
                            "over all processes")
    pack: int = HfArg(default=6, help="examples about one clip that share its video, at most")
    micro_batch_size: int = HfArg(default=4, help="groups per forward pass and process")
    lr: float = HfArg(default=1.5e-3, help="peak learning rate; linear warm-up, then linear to zero: an annealed end")
    warmup: float = HfArg(default=0.03, help="share of the steps that warm up")
    weight_decay: float = HfArg(default=0.05, help="AdamW weight decay")
    judge_share: float = HfArg(default=0.25, help="chance of a group drawn to become comparisons (D3)")
    # -- data and models
    data: str = HfArg(default=f"{WORLD}/pretrain.json", help="annotation files, comma-separated; formats: docs/sft.md")
    video_root: str = HfArg(default="", help="where the videos are; empty: beside the annotation file")
    num_clips: int = HfArg(default=0, help="use the labels of so many clips, drawn by --seed; 0: all")
    model: str = HfArg(default="", help="continue from this VideoLLM; empty: compose one of the next three")
    clip: str = HfArg(default=f"{WEIGHTS}/clip", help="CLIP checkpoint, folder or hub name")
    qformer: str = HfArg(default=f"{WEIGHTS}/qformer", help="of a VideoQFormer, BLIP-2 or InstructBLIP checkpoint; a "
                         "number of queries: a new one")
    llm: str = HfArg(default=f"{WEIGHTS}/llm", help="LLaMA-class decoder, folder or hub name; a tokenizer alone: "
                     "tiny, from nothing")
    num_frames: int = HfArg(default=8, help="frames a video is sampled at, for a composed model [V: 50]")
    max_prompt_tokens: int = HfArg(default=512, help="longer questions are cut at their end, never the video; where "
                                   "earlier turns or a comparison leave no room, they are left out")
    max_answer_tokens: int = HfArg(default=96, help="longer answers are cut and then carry no EOS; in comparisons too")
    # -- plumbing
    name: str = HfArg(default="oracle", help="run name: runs/sft/<name>")
    seed: int = HfArg(default=0, help="initialisation, choice of labelled clips, order of the data")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features")
    save_steps: int = HfArg(default=200, help="steps between checkpoints")
    resume: bool = HfArg(default=False, help="continue the run of this name where it stopped")

    def __post_init__(self):
        if self.preset not in ("", "paper"):
            raise ValueError(f"--preset {self.preset}: choose paper or nothing")
        if self.curriculum not in ("length", "off"):
            raise ValueError(f"--curriculum {self.curriculum}: choose length or off")
        for flag in ("easy_share", "easy_steps", "warmup", "judge_share"):
            if not 0 <= getattr(self, flag) <= 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must lie between 0 and 1")
        at_least(self, steps=1, batch_size=1, pack=1, micro_batch_size=1, save_steps=1, num_frames=1,
                 max_prompt_tokens=1, max_answer_tokens=1, num_clips=0, lora_r=0, weight_decay=0)
        composed = [f for f in ("clip", "qformer", "llm", "num_frames") if getattr(self, f) != getattr(Args, f)]
        if self.model and composed:
            raise ValueError(f"--{composed[0]}: does nothing with --model, which is a whole model already")
        check_training(self, batch="batch_size")
        above_zero(self, "lr")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch

import harness
from answers import fits
from compose import compose
from data import DataError, FeatureCache, read_records, report_lines
from oracle import DESCRIBE, judge_prompt
from ranks import normalize
from video_llm import Prefix, add_lora, load_model, save_model, token_logprobs, unwrap


# ---------------------------------------------------------------------------------------------------------------
# The curriculum, the loss, the schedule
# ---------------------------------------------------------------------------------------------------------------
def easy_and_hard(lengths, easy_share):
    """[V Sec. 3.2] Difficulty is answer length. lengths (R,) tokens -> bool (R,), True on the shortest `easy_share`."""
    return lengths <= np.quantile(lengths, easy_share)


def sft_loss(logprobs, mask):
    """Negative log-likelihood per example, mean over its answer tokens (D2). (N,T), (N,T) -> (N,), 0 on padding."""
    return -(logprobs * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def lr_at(step, args):
    """Linear warm-up, then linear to zero at the last step."""
    warm = max(1, int(args.warmup * args.steps))
    return args.lr * min((step + 1) / warm, (args.steps - step) / max(1, args.steps - warm))


def comparison(record, pools, stories, rng, processor, args):
    """[D3] One judge example out of a labelled record -> {"clip", "question": (head, tail), "answer": the better one}.

    The wrong answer is another record's answer to the same question (else: to the same type of task); the order is
    random; half of the time the clip's narrative stands before the question, where the context-aware judge has one:
    here made of labels, there told by the judge itself.
    None where no other answer is there, where the two are the same once cut, or where the prompt is too long: to cut a
    narrative or a question here would ask for a verdict on something else.
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
    pair = [shorten(text, processor, args.max_answer_tokens) for text in (record["answer"], rng.choice(wrong))]
    rng.shuffle(pair)
    question = judge_prompt(record["question"], *pair, narrative=stories.get(record["clip"].path))
    length = sum(map(len, processor.split_prompt_ids(*question)))
    if normalize(pair[0]) == normalize(pair[1]) or length > args.max_prompt_tokens:
        return None
    return {"clip": record["clip"], "question": question, "answer": record["answer"]}


def shorten(text, processor, max_tokens):
    """The text, of one that is longer the first `max_tokens` tokens: what `encode` leaves of an answer."""
    ids = processor.answer_ids(text)
    return text if len(ids) <= max_tokens else processor.tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
def main(args):
    rank, world, device = harness.setup_dist()
    if any(path.startswith(WORLD) for path in args.data.split(",")):  # the user's own files are never built
        harness.build_if_missing(f"{WORLD}/clips.json", ["moving_shapes.py"], "under a minute", rank)
    if not args.model:
        harness.ship_weights([args.clip, args.qformer, args.llm], rank)
    folder = f"runs/sft/{args.name}"
    checkpoint = harness.open_run(folder, args, rank)

    # 1. Labels
    with harness.one_line_errors(DataError):
        records, report = read_records(args.data.split(","), args.video_root or None)
    if args.num_clips:
        records = choose_clips(records, args.num_clips, args.seed)
        if rank == 0:  # RL leaves these clips out: it learns from videos whose labels nobody saw
            Path(folder, "labelled_clips.json").write_text(json.dumps(sorted({str(r["clip"].path) for r in records})))

    torch.manual_seed(args.seed)  # the initialisation of LoRA; every other draw has a key of its own

    # 2. Model: everything but CLIP is trained, or LoRA on the decoder with the bridge (Q-Former, projection)
    base = args.model or f"{folder}/base"
    with harness.one_line_errors(OSError):
        if not args.model and rank == 0 and not checkpoint:
            qformer = int(args.qformer) if args.qformer.isdigit() else args.qformer
            parts = compose(args.clip, qformer, args.llm, args.num_frames, args.seed, getattr(torch, args.dtype))
            save_model(*parts, base)
        harness.barrier()
        model, processor = load_model(checkpoint or base, **harness.load_options(args, device))
    if args.lora_r and not checkpoint:
        model = add_lora(model, args.lora_r, args.lora_alpha, train_bridge=True)
    if args.shard and report["text_only"]:
        sys.exit(f"--shard: {args.data} has records without a video; on all processes the same layers must run")
    ddp = harness.distribute(model, device, args.shard, find_unused=report["text_only"] > 0)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    start = harness.load_trainer(checkpoint, optimizer, model) if checkpoint else 0

    # 3. Videos: each is decoded and encoded once; what cannot be read is left out, counted and listed. So are records
    #    whose prompt cannot be cut to fit: met within a step they would end the run, and again at every --resume.
    cache = FeatureCache(unwrap(model), processor, args.cache)
    clips = [r["clip"] for r in records if r["clip"]]
    broken = harness.prepare_videos(cache, clips, folder, rank, world)
    readable = [r for r in records if r["clip"] not in broken]
    records = [r for r in readable if fits(processor, r, args.max_prompt_tokens)]
    count = (f"{len(records)} records are used; {len(broken)} clips cannot be read, {len(readable) - len(records)} "
             f"prompts cannot be cut to --max_prompt_tokens {args.max_prompt_tokens}")
    harness.check_same(f"{args.data}: its records", [[r["id"], r["question"], r["answer"]] for r in records])
    if not records:
        sys.exit(f"{args.data}: {count}")
    if rank == 0:
        print(*report_lines(report), count, sep="\n")
    lengths = np.array([len(processor.answer_ids(r["answer"])) for r in records])
    easy = easy_and_hard(lengths, args.easy_share)
    easy_groups = by_clip([r for r, e in zip(records, easy) if e], args.pack)
    all_groups = by_clip(records, args.pack)
    pools, stories = judge_material(records)
    log = harness.Log(folder, args.steps, start, rank)

    for step in range(start, args.steps):
        # 4. Curriculum [D1]: what this step may draw from. Every draw is keyed by (seed, step), so it does not
        #    depend on the number of processes, nor on whether the run was interrupted.
        rng = random.Random(f"{args.seed} {step}")
        stage_easy = args.curriculum == "length" and step < args.easy_steps * args.steps
        groups = [list(g) for g in rng.choices(easy_groups if stage_easy else all_groups, k=args.batch_size)]
        for k, group in enumerate(groups):
            if group[0]["clip"] and rng.random() < args.judge_share:
                told = stories if rng.random() < 0.5 else {}
                groups[k] = [c for r in group if (c := comparison(r, pools, told, rng, processor, args))] or group
        n_examples = sum(map(len, groups))

        # 5. Likelihood of the answers. Sorted by length, so that a micro-batch holds little padding.
        rows = sorted((encode(g, processor, args) for g in groups), key=row_length)
        mine = rows[rank::world]
        for g in optimizer.param_groups:
            g["lr"] = lr_at(step, args)
        micros = [mine[i : i + args.micro_batch_size] for i in range(0, len(mine), args.micro_batch_size)]
        for i, micro in enumerate(micros):
            prefix, tokens, lengths, mask, kinds = collate(micro, processor, cache, device)
            with harness.no_sync(ddp, when=i < len(micros) - 1):
                logprobs, _ = token_logprobs(ddp, prefix, tokens, lengths)  # (N,T)
                nll = sft_loss(logprobs, mask)  # (N,)
                (nll.sum() * world / n_examples).backward()  # DDP averages over processes; * world undoes it
            log.add("losses/sft", nll.detach().sum(), (mask.sum(-1) > 0).sum())
            for kind in KINDS:
                which = torch.tensor([k == kind for k in kinds], device=device)
                log.add(f"losses/{kind}", nll.detach()[which].sum(), which.sum())

        # 6. Update
        grad_norm = harness.clip_gradients(params)
        asked = [[str(r["question"]), r["answer"]] for g in groups for r in g]
        harness.stop_if_not_finite(grad_norm, log, folder, step, asked)
        optimizer.step()
        optimizer.zero_grad()
        log.add("policy/grad_norm", grad_norm)
        log.add("charts/lr", lr_at(step, args))
        log.step(step, show=["losses/sft", *(f"losses/{k}" for k in KINDS), "policy/grad_norm"])
        harness.checkpoint(log, folder, step + 1, args.steps, args.save_steps, model, processor, optimizer)
    harness.finish(folder, model, processor, rank)


# ---------------------------------------------------------------------------------------------------------------
# Records -> tensors
# ---------------------------------------------------------------------------------------------------------------
def choose_clips(records, num_clips, seed):
    """The records of `num_clips` clips drawn by seed: all labels the run will ever see."""
    paths = sorted({str(r["clip"].path) for r in records if r["clip"]})
    if num_clips > len(paths):
        sys.exit(f"--num_clips {num_clips}: the data holds {len(paths)} clips")
    chosen = set(random.Random(seed).sample(paths, num_clips))
    return [r for r in records if r["clip"] and str(r["clip"].path) in chosen]


def judge_material(records):
    """-> {question or task type: [(answer, the same normalised)]}, {video path: narrative}. A narrative is what the
    labels say to `DESCRIBE`: the parts of a clip in order where there are such, else the whole."""
    pools, parts = {}, {}
    for r in records:
        if r["question"] == DESCRIBE:
            parts.setdefault(r["clip"].path, []).append((r["clip"].start is None, r["clip"].start or 0, r["answer"]))
        elif isinstance(r["question"], str):
            for key in {r["question"], r["task_type"]}:
                pools.setdefault(key, []).append((r["answer"], normalize(r["answer"])))
    stories = {}
    for path, told in parts.items():
        whole = all(w for w, _, _ in told)
        stories[path] = " ".join(text for w, _, text in sorted(told) if w == whole)
    return pools, stories


def by_clip(records, pack):
    """Groups of up to `pack` records about the same (part of a) clip, like lengths together. Text-only rows: alone."""
    clips = {}
    for k, r in enumerate(records):
        clips.setdefault(r["clip"] or k, []).append(r)
    groups = []
    for members in clips.values():
        members.sort(key=lambda r: len(str(r["question"])) + len(r["answer"]))
        groups += [members[i : i + pack] for i in range(0, len(members), pack)]
    return groups


def row_length(row):
    """Tokens of a packed row: prefix + G times the longest tail."""
    return len(row[0]) + len(row[1]) * max(map(len, row[1]))


def encode(group, processor, args):
    """Examples about one clip -> shared prefix ids, [question + answer ids], [answer tokens], clip, [kind]."""
    clip, prompts = group[0]["clip"], []
    for r in group:
        if isinstance(r["question"], tuple):
            prompts.append(sum(processor.split_prompt_ids(*r["question"]), []))
        else:
            prompts.append(processor.prompt_ids(r["question"], clip is not None, args.max_prompt_tokens))
    shared = os.path.commonprefix(prompts)  # the video, and whatever else the prompts begin with (a narrative)
    answers = [processor.answer_ids(r["answer"], args.max_answer_tokens) for r in group]
    tails = [prompt[len(shared) :] + answer for prompt, answer in zip(prompts, answers)]
    kinds = ["judge" if isinstance(r["question"], tuple) else "describe" if r["question"] == DESCRIBE else "answer"
             for r in group]
    return shared, tails, [len(a) for a in answers], clip, kinds


def collate(rows, processor, cache, device):
    """-> Prefix, tokens (B,G,T), lengths (B,G), mask (N,T) of answer tokens, N kinds. Padding rows: an empty mask."""
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
    prefix = Prefix(*(x if x is None else x.to(device) for x in (ids, attention_mask, features, frame_mask)))
    return (prefix, tokens.view(B, G, -1).to(device), lengths.view(B, G).to(device), mask.to(device),
            fill([r[4] for r in rows], "padding"))


if __name__ == "__main__":
    main(parse_args(Args))
