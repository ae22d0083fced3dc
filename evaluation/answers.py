"""How a checkpoint answers: greedily, in batches, each answer kept, shared out over processes.

    texts = answer(model, processor, cache, records)                   # greedy answers, in order
    Answering(run, "generate", 48, 100, "cache")("video_mme", rows, folder)   # answers of a
                                                                              benchmark, into its
                                                                              rows

Nothing here knows a score. Rows are those of evaluation/benchmark_files.py.

D1      In the embedded world multiple-choice questions are answered by the option with the highest
        mean log-probability per token (--choose likelihood): a model of a million parameters never
        saw letters. With --data the model writes its answer, which is read by the official rules
        (--choose generate).
"""

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from evaluation import benchmark_files
from inputs.features import FeatureCache
from inputs.frames import video_files
from plumbing import processes
from plumbing.files import read_lines
from video_llm import Prefix, answer, load_model, token_logprobs, unwrap


class Run(NamedTuple):
    folder: Path  # predictions are written here
    checkpoint: Path
    name: str  # the folder's without _s<seed>
    seed: int | None


def fingerprint(checkpoint, records):
    """Hash of the checkpoint (an adapter's base included), the questions with their labels, and the
    videos; not of the code, so after a change there the kept predictions are to be deleted by
    hand."""
    digest = hashlib.sha256()
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja",
                           ".model") and not file.name.startswith("predictions_"):
            with open(file, "rb") as f:
                content = hashlib.file_digest(f, "sha256").hexdigest()
            digest.update(f"{file.name} {content}\n".encode())
        if file.name == "adapter_config.json":
            base = json.loads(file.read_bytes())["base_model_name_or_path"]
            digest.update((fingerprint(Path(base), []) if os.path.isdir(base) else base).encode())
    for path in dict.fromkeys(r["clip"].path for r in records):
        stats = [(os.stat(f).st_size, os.stat(f).st_mtime_ns)
                 for f in video_files(path) if os.path.exists(f)]
        digest.update(f"{path} {stats}\n".encode())
    digest.update(json.dumps([(r["clip"], r["question"], r["answer"], r["task_type"])
                              for r in records]).encode())
    return digest.hexdigest()


class Answering:
    """Answers of one run, kept as lines of <run>/benchmarks/answers.<rank>.jsonl. What is there for
    the same checkpoint, prompt and video is never asked again: not after a kill, whatever the
    number of processes was, nor for another benchmark that asks the same (in the embedded world
    several do)."""

    def __init__(self, run, choose, max_new_tokens, batch_size, cache_dir, rank=0, world=1,
                 device="cpu"):
        self.run, self.rank, self.world, self.device = run, rank, world, device
        self.choose, self.max_new_tokens, self.size, self.cache_dir = (choose, max_new_tokens,
                                                                       batch_size, cache_dir)
        self.folder, self.mark = run.folder / "benchmarks", fingerprint(run.checkpoint, [])
        self.loaded, self.content, self.kept = None, {}, None

    def model(self):
        if self.loaded is None:
            model, processor = load_model(self.run.checkpoint, device=self.device)
            self.loaded = (model.eval(), processor,
                           FeatureCache(unwrap(model), processor, self.cache_dir))
        return self.loaded

    def key(self, row, ask):
        clip = row["clip"]
        if clip.path not in self.content:
            self.content[clip.path] = [content_mark(f) for f in video_files(clip.path)]
        choice = [self.choose,
                  row["options"]] if row["options"] and self.choose == "likelihood" else []
        parts = [self.mark, ask, self.content[clip.path], clip.start, clip.end, choice,
                 self.max_new_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def read(self):
        self.kept = {line["key"]: line for f in sorted(self.folder.glob("answers.*.jsonl"))
                     for line in read_lines(f)}

    def __call__(self, name, rows, folder):
        """Put `said` into every row whose video is there. All processes must call it. -> why others
        have none."""
        if name == "video_mme_subtitles":
            self.add_subtitles(rows, folder)
        if self.kept is None:
            self.read()
        todo = {self.key(row, ask): (row, ask) for row in rows if row["clip"]
                for ask in row["asks"]}
        mine = [(key, *pair) for key, pair in todo.items() if key not in self.kept]
        # a question after earlier turns is a list
        order = lambda job: (str(job[1]["clip"]), json.dumps(job[2]))
        mine = sorted(mine, key=order)[self.rank :: self.world]
        processes.barrier()  # everyone has looked before anyone writes
        if mine:
            self.ask(name, mine)
        processes.barrier()
        self.read()
        why = {}
        for row in rows:
            lines = [self.kept[self.key(row, ask)] for ask in row["asks"]] if row["clip"] else []
            if lines and all(line["said"] is not None for line in lines):
                row["said"] = [line["said"] for line in lines]
            elif lines:
                why[row["video"]] = next(line["why"] for line in lines if line["said"] is None)
        return [f"left out: {reason}" for reason in why.values()]

    def ask(self, name, jobs):
        model, processor, cache = self.model()
        self.folder.mkdir(parents=True, exist_ok=True)
        began, size, choose = time.time(), self.size, self.choose == "likelihood"
        with open(self.folder / f"answers.{self.rank}.jsonl", "a") as file:
            file.write("\n")  # after half a line of a killed run
            write = lambda **line: file.write(json.dumps(line) + "\n")
            broken = cache.prepare([row["clip"] for _, row, _ in jobs], progress=False)
            for key, row, _ in jobs:
                if row["clip"] in broken:
                    write(key=key, said=None, why=broken[row["clip"]])
            jobs = [job for job in jobs if job[1]["clip"] not in broken]
            alike = {}  # batches with equally many options
            for job in jobs:
                alike.setdefault(len(job[1]["options"]) * choose, []).append(job)
            parts = [some[k : k + size] for some in alike.values()
                     for k in range(0, len(some), size)]
            for part in tqdm(parts, f"{self.run.folder.name}, {name}", leave=False, mininterval=2,
                             disable=self.rank > 0 or not sys.stderr.isatty()):
                if part[0][1]["options"] and choose:
                    texts = best_options(model, processor, cache, [row for _, row, _ in part])
                else:
                    records = [dict(question=fitting(processor, model, ask), clip=row["clip"])
                               for _, row, ask in part]
                    texts = answer(model, processor, cache, records, self.max_new_tokens, size)
                for (key, row, _), text in zip(part, texts):
                    write(key=key, id=row["id"], said=text)
                file.flush()
        if self.rank == 0:
            print(f"{self.run.folder}, {name}: {len(jobs)} answers in {time.time() - began:.0f} s",
                  flush=True)

    def add_subtitles(self, rows, folder):
        frames = self.model()[1].num_frames
        for row in rows:
            text = benchmark_files.subtitles(row["clip"], folder, frames) if row["clip"] else None
            row["asks"] = [benchmark_files.choice_prompt(row["question"], row["options"], text)]
            row["subtitles"] = text


def content_mark(file, small=2**21):
    """What says that a video file is still the same: the content of a small one, size and time of a
    large one."""
    stat = os.stat(file)
    if stat.st_size > small:
        return [stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def fitting(processor, model, ask, room=64):
    """The prompt, its longest line cut until the decoder has positions for it: subtitles, never
    question or options."""
    most = unwrap(model).config.text_config.max_position_embeddings - room
    while isinstance(ask, str) and (over := len(processor.prompt_ids(ask)) - most) > 0:
        lines = ask.split("\n")
        longest = max(range(len(lines)), key=lambda k: len(lines[k]))
        if not lines[longest]:  # the video alone is more
            break
        lines[longest] = lines[longest][: -max(4, over)].rstrip()
        ask = "\n".join(lines)
    return ask


@torch.no_grad()
def best_options(model, processor, cache, rows):
    """[D1] Per row the letter of the option with the highest mean log-probability per token, EOS
    included. All rows have the same number of options; they are packed after one prefix
    (video_llm.packed)."""
    device = next(model.parameters()).device
    asks = [f"{row['subtitles']}\n{row['question']}" if row.get("subtitles") else row["question"]
            for row in rows]
    prefix = Prefix.build(processor, cache, asks, [row["clip"] for row in rows], device)
    ids = [processor.answer_ids(re.sub(r"^[A-E]\. ", "", option)) for row in rows
           for option in row["options"]]
    tokens = processor.pad(ids, "right")[0].view(len(rows), -1, max(map(len, ids))).to(device)
    lengths = torch.tensor([len(i) for i in ids], device=device).view(len(rows), -1)
    logprobs = token_logprobs(model, prefix, tokens,
                              lengths)[0].sum(-1).view(lengths.shape) / lengths
    return ["ABCDE"[k] for k in logprobs.argmax(-1).tolist()]
