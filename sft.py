"""Supervised fine-tuning of a video language model, in two stages: easy answers first, then all of them.

Run      python sft.py                                            the embedded world, labels in plenty, 2 CPU cores
         python sft.py --name policy --data data/moving_shapes/train.json --num_clips 40         few labels, as in life
         torchrun --nproc_per_node=4 sft.py --data my.json --video_root videos --clip openai/clip-vit-large-patch14-336
             --qformer 32 --llm meta-llama/Llama-2-7b-hf --quantize nf4 --lora_r 64 --lora_alpha 16          your own
Paper    [V] VLM-RLAIF, arXiv:2402.03746, Sec. 3.3 (curriculum), Sec. 4.1 and App. B (data, hyper-parameters)
Makes    runs/sft/<name>/final: the start of every RL script; with labels in plenty also the oracle that judges it

Differs  D1  stage two trains on easy *and* hard records, [V] on the hard ones alone: at this size the easy skills are
             forgotten otherwise.
         D2  every example counts the same (mean over its tokens, then over examples), not every token: with one-word
             answers beside 50-word descriptions, the words of the descriptions would be nearly all of the loss.
         D3  a share of the batches teaches the judge's task, choosing the better of two answers (--judge_share):
             [V] asks the SFT model to judge zero-shot, which a 7B model can and a model of a million weights cannot.
             Built from the labelled clips alone: the right answer against another answer to the same question.

symbol      name          shape     meaning
y_t         tokens        (B,1,T)   answer tokens with EOS: EOS is a target, so the model learns to stop
m_t         mask          (B,T)     1 on answer tokens, from lengths (never from token ids)
pi(y_t)     logprobs      (B,T)     log-probability of each answer token given video, question and y_<t
"""

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers.hf_argparser import HfArg

import harness
from data import DataError, VideoError, read_records, report_lines
from oracle import DESCRIBE, LABELS, judge_prompt
from video_llm import FeatureCache, Prefix, add_lora, answer_mask, compose, load_model, token_logprobs, unwrap

WORLD = "data/moving_shapes"


@dataclass
class Args:
    # -- the paper's hyper-parameters
    curriculum: str = HfArg(default="length", help="length: easy (short) answers first [V Sec. 3.3]; off: all from the start")
    easy_share: float = HfArg(default=0.65, help="share of the records that counts as easy [V: 214k of 327k]")
    easy_steps: float = HfArg(default=0.4, help="share of the steps spent in the easy stage")
    lora_r: int = HfArg(default=0, help="LoRA rank on the decoder [V: 32]; 0 trains all weights but CLIP's")
    lora_alpha: int = HfArg(default=32, help="LoRA alpha [V: 32]")
    quantize: str = HfArg(default="none", help="none, or nf4: QLoRA, needs --lora_r")
    # -- budget
    steps: int = HfArg(default=1500, help="optimizer steps")
    batch_size: int = HfArg(default=64, help="examples per optimizer step, over all processes")
    micro_batch_size: int = HfArg(default=16, help="examples per forward pass and process")
    lr: float = HfArg(default=1e-3, help="peak learning rate; linear warm-up, then linear to zero: an annealed end")
    warmup: float = HfArg(default=0.03, help="share of the steps that warm up")
    weight_decay: float = HfArg(default=0.05, help="AdamW weight decay")
    judge_share: float = HfArg(default=0.25, help="share of each batch that compares two answers (D3); 0: none")
    # -- data and model
    data: str = HfArg(default=f"{WORLD}/pretrain.json", help="annotation file(s), comma-separated; formats: docs/sft.md")
    video_root: str = HfArg(default="", help="where the videos are; empty: beside the annotation file")
    num_clips: int = HfArg(default=0, help="use the labels of so many clips, drawn by --seed; 0: all")
    model: str = HfArg(default="", help="continue from this VideoLLM checkpoint; empty: compose one from the next three")
    clip: str = HfArg(default=f"{WORLD}/hub/clip", help="CLIP checkpoint, folder or hub name")
    qformer: str = HfArg(default=f"{WORLD}/hub/qformer", help="VideoQFormer checkpoint, or a number of queries for a new one")
    llm: str = HfArg(default=f"{WORLD}/hub/llm", help="causal decoder; a folder with a tokenizer alone: tiny, from nothing")
    max_prompt_tokens: int = HfArg(default=512, help="longer questions are cut at their end, never the video")
    max_answer_tokens: int = HfArg(default=96, help="longer answers are cut and then carry no EOS")
    # -- plumbing
    name: str = HfArg(default="oracle", help="run name: runs/sft/<name>")
    seed: int = HfArg(default=0, help="initialisation, choice of labelled clips, order of the data")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features")
    save_steps: int = HfArg(default=200, help="steps between checkpoints")
    resume: bool = HfArg(default=False, help="continue the run of this name where it stopped")
    examples_per_rank: int = field(init=False)

    def __post_init__(self):
        world = harness.world_size()
        if self.batch_size % (world * self.micro_batch_size):
            raise ValueError(f"--batch_size {self.batch_size} must be a multiple of processes x --micro_batch_size "
                             f"({world} x {self.micro_batch_size})")
        if self.curriculum not in ("length", "off"):
            raise ValueError(f"--curriculum {self.curriculum}: choose length or off")
        if self.quantize not in ("none", "nf4") or self.quantize == "nf4" and (not self.lora_r or not self.model):
            raise ValueError(f"--quantize {self.quantize}: choose none, or nf4 with --lora_r and a --model to quantize")
        for flag in ("easy_share", "easy_steps", "warmup", "judge_share"):
            if not 0 <= getattr(self, flag) <= 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must lie between 0 and 1")
        for flag in ("steps", "batch_size", "micro_batch_size", "save_steps", "max_prompt_tokens", "max_answer_tokens"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        self.examples_per_rank = self.batch_size // world


# ---------------------------------------------------------------------------------------------------------------
# The curriculum, the loss, the schedule
# ---------------------------------------------------------------------------------------------------------------
def easy_and_hard(lengths, easy_share):
    """[V Sec. 3.3] Difficulty is answer length. lengths (R,) tokens -> bool (R,), True on the shortest `easy_share`."""
    return lengths <= np.quantile(lengths, easy_share)


def sft_loss(logprobs, mask):
    """- sum over examples of the mean log-likelihood of their answer tokens (D2). (B,T), (B,T) -> (); divide by the
    number of examples of the global batch."""
    return -((logprobs * mask).sum(-1) / mask.sum(-1)).sum()


def lr_at(step, args):
    """Linear warm-up, then linear to zero at the last step."""
    warm = max(1, int(args.warmup * args.steps))
    return args.lr * min((step + 1) / warm, (args.steps - step) / max(1, args.steps - warm))


def comparison(record, pools, stories, rng):
    """[D3] One judge example out of a labelled record -> {"clip", "question": (head, tail), "answer": "1" or "2"}.

    The wrong answer is another record's answer to the same question (else: to the same type of task); the order is
    random; half of the time the clip's narrative stands before the question, as the context-aware judge will see it.
    """
    for key in (record["question"], record["task_type"]):
        wrong = [a for a in pools.get(key, []) if a != record["answer"]]
        if wrong:
            break
    else:
        return None
    pair = [record["answer"], rng.choice(wrong)]
    right = rng.randrange(2)
    pair = pair if right == 0 else pair[::-1]
    story = stories.get(record["clip"].path) if rng.random() < 0.5 else None
    return dict(clip=record["clip"], question=judge_prompt(record["question"], *pair, narrative=story), answer=LABELS[right])


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
def main(args):
    rank, world, device = harness.setup_dist()
    if WORLD in args.data or WORLD in args.clip:
        harness.build_if_missing(f"{WORLD}/hub", ["pretrain_tiny.py"], "about 5 minutes", rank)
    folder = f"runs/sft/{args.name}"
    checkpoint = harness.open_run(folder, args, rank)

    # 1. Labels
    with harness.one_line_errors(DataError):
        records, report = read_records(args.data.split(","), args.video_root or None)
    if args.num_clips:
        records = choose_clips(records, args.num_clips, args.seed)
        if rank == 0:  # RL leaves these clips out: it learns from videos whose labels nobody saw
            Path(folder, "labelled_clips.json").write_text(json.dumps(sorted({str(r["clip"].path) for r in records})))

    # 2. Model: everything but CLIP is trained, or LoRA on the decoder with the bridge (Q-Former, projection)
    with harness.one_line_errors(OSError):
        if checkpoint or args.model:
            model, processor = load_model(checkpoint or args.model, args.quantize, device=str(device))
        else:
            qformer = int(args.qformer) if args.qformer.isdigit() else args.qformer
            model, processor = compose(args.clip, qformer, args.llm, seed=args.seed)
            model.vision_tower.requires_grad_(False)
            model.to(device)
    if args.lora_r and not hasattr(model, "peft_config"):
        model = add_lora(model, args.lora_r, args.lora_alpha, train_bridge=True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    start = harness.load_trainer(checkpoint, optimizer) if checkpoint else 0

    # 3. Videos: each is decoded and encoded once; what cannot be read is left out, counted and listed
    cache = FeatureCache(unwrap(model), processor, args.cache)
    clips = [r["clip"] for r in records if r["clip"]]
    broken = harness.prepare_videos(cache, clips, folder, rank, world)
    records = [r for r in records if r["clip"] not in broken]
    if rank == 0:
        print("\n".join(report_lines(report)) + f"\n{len(records)} records are used; {len(broken)} clips cannot be read")
    lengths = np.array([len(processor.answer_ids(r["answer"])) for r in records])
    easy = easy_and_hard(lengths, args.easy_share)
    pools, stories = judge_material(records)
    ddp = harness.wrap_ddp(model, device, find_unused=report["text_only"] > 0)
    log = harness.Log(folder, args.steps, start, rank)

    for step in range(start, args.steps):
        # 4. Curriculum: which records this step may draw from. Every draw is keyed by (seed, step), so it does not
        #    depend on the number of processes, nor on whether the run was interrupted.
        rng = random.Random(f"{args.seed} {step}")
        stage_easy = args.curriculum == "length" and step < args.easy_steps * args.steps
        pool = np.flatnonzero(easy) if stage_easy else np.arange(len(records))
        batch = [records[i] for i in rng.choices(pool.tolist(), k=args.batch_size)]
        for k in range(int(args.judge_share * args.batch_size)):
            made = isinstance(batch[k]["question"], str) and batch[k]["clip"] and comparison(batch[k], pools, stories, rng)
            batch[k] = made or batch[k]

        # 5. Likelihood of the answers. Sorted by length, so that a micro-batch holds little padding.
        rows = sorted((encode(r, processor, args) for r in batch), key=lambda row: len(row[0]) + len(row[1]))
        mine = rows[rank::world]
        for g in optimizer.param_groups:
            g["lr"] = lr_at(step, args)
        micros = [mine[i : i + args.micro_batch_size] for i in range(0, len(mine), args.micro_batch_size)]
        for i, micro in enumerate(micros):
            prefix, tokens, length = collate(micro, processor, cache, device)
            with harness.no_sync(ddp, when=i < len(micros) - 1):
                logprobs, _ = token_logprobs(ddp, prefix, tokens, length)  # (B,T)
                mask = answer_mask(length, tokens.shape[-1])
                loss = sft_loss(logprobs, mask)
                (loss * world / args.batch_size).backward()  # DDP averages over processes; * world undoes it
            log.add("losses/sft", loss.detach(), len(micro))
            log.add("losses/token_nll", -logprobs.detach().sum(), mask.sum())

        # 6. Update
        grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        harness.stop_if_not_finite(grad_norm, folder, step, [r["answer"] for r in batch])
        optimizer.step()
        optimizer.zero_grad()
        log.add("policy/grad_norm", grad_norm)
        log.add("charts/lr", lr_at(step, args))
        log.step(step, show=["losses/sft", "policy/grad_norm"])
        if rank == 0 and (step + 1) % args.save_steps == 0 and step + 1 < args.steps:
            harness.save_checkpoint(folder, f"checkpoint-{step + 1}", model, processor, optimizer, step + 1)
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
    """-> {question or task type: [answers]}, {video path: narrative}. A narrative is what the labels say to
    `DESCRIBE`: the parts of a clip in order where there are such, else the whole."""
    pools, parts = {}, {}
    for r in records:
        if r["question"] == DESCRIBE:
            parts.setdefault(r["clip"].path, []).append((r["clip"].start is None, r["clip"].start or 0, r["answer"]))
        elif isinstance(r["question"], str):
            for key in {r["question"], r["task_type"]}:
                pools.setdefault(key, []).append(r["answer"])
    stories = {}
    for path, told in parts.items():
        whole = all(w for w, _, _ in told)
        stories[path] = " ".join(text for w, _, text in sorted(told) if w == whole)
    return pools, stories


def encode(record, processor, args):
    """-> prompt ids, answer ids, clip."""
    video = record["clip"] is not None
    if isinstance(record["question"], tuple):
        prompt = sum(processor.split_prompt_ids(*record["question"]), [])
    else:
        prompt = processor.prompt_ids(record["question"], video, args.max_prompt_tokens)
    return prompt, processor.answer_ids(record["answer"], args.max_answer_tokens), record["clip"]


def collate(rows, processor, cache, device):
    """-> Prefix, tokens (B,1,T), lengths (B,1)."""
    ids, mask = processor.pad([p for p, _, _ in rows], "left")
    videos = [c for _, _, c in rows if c is not None]
    features, frame_mask = cache(videos) if videos else (None, None)
    tokens, _ = processor.pad([a for _, a, _ in rows], "right")
    lengths = torch.tensor([[len(a)] for _, a, _ in rows])
    prefix = Prefix(*(x if x is None else x.to(device) for x in (ids, mask, features, frame_mask)))
    return prefix, tokens.unsqueeze(1).to(device), lengths.to(device)


if __name__ == "__main__":
    main(harness.parse_args(Args))
