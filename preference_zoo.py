"""The zoo of Iter-W2S-RLAIF: who answers, what they answer, what an oracle gives for it. The algorithm that learns from
it is dpo_iter_w2s.py; here is the collecting, which no equation describes.

    sources --sample--> answers.jsonl, a row an answer --score--> scores.jsonl, a row a question --> groups

A source is one of
    policy                   the policy of the moment, so that its own mistakes are among the answers
    a folder                 a checkpoint that `load_model` reads; it may see another number of frames
    http(s)://host/v1#name   model `name` of an OpenAI-compatible server; one greedy reply a question, frames as JPEG
and gives `--samples` answers to a question. Every draw is keyed by (seed, iteration, source, question), the files are
written in parts of PART questions: whatever is killed goes on behind the last whole part, with the same answers.

Beside an answer stands whether it `ended`, with EOS: an answer that was cut at --max_new_tokens is not trained as one
that ends there. A server's reply did not end if its finish_reason says `length`. An answer is null, that is missing,
where a server sent no reply, none but thinking, or a withheld one (refusal, content_filter), or where a video cannot be
read: it was checked at the policy's number of frames, and a source with another number may need a damaged part of it.
A source, or an oracle, that answers nothing ends the run (`in_parts`).

The embedded zoo holds four relatives of the policy that saw *the same labels*: another initialisation, no curriculum,
an early stage, half the frames. In [W] they are well-aligned models from elsewhere. A relative with labels of its own
would pass these labels on to the policy, and a comparison with SFT on the policy's labels would not be fair.

Paper  [W] Iter-W2S-RLAIF / MMAIP-V, arXiv:2411.16201, Sec. 3.1
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

import harness
from answers import fits
from api_client import ApiClient, ApiError, ReplyError, check_server
from api_oracle import ASPECTS, frames_as_urls, message
from data import FeatureCache
from flags import WORLD
from frames import VideoError
from questions import POLICY_SFT, sft_start
from video_llm import Prefix, generate, load_model, unwrap

PART = 48  # questions
MISSING = (None, None)  # in place of (answer, ended)
RELATIVES = {"init": "", "flat": "--curriculum off", "early": "--steps 50", "frames4": "--num_frames 4"}


# ---------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------
def default_zoo(model, seed):
    """The policy and four relatives where the start is the embedded one, else the policy alone."""
    return ["policy"] + [f"runs/sft/zoo_{r}_s{seed}/final" for r in RELATIVES if model == sft_start(seed)]


def build_zoo(args, rank):
    """Train the missing relatives. They see the labels of the clips that the SFT start saw, and no others."""
    labels = Path(f"runs/sft/zoo_labels_s{args.seed}.json")
    for number, (name, flags) in enumerate(RELATIVES.items(), 1):
        path = f"runs/sft/zoo_{name}_s{args.seed}/final"
        if path not in args.zoo:
            continue
        seen = set(json.loads(Path(args.model).parent.joinpath("labelled_clips.json").read_text()))
        if rank == 0 and not labels.exists():
            rows = json.loads(Path(WORLD, "train.json").read_text())
            harness.write(labels, json.dumps([r for r in rows if str(Path(WORLD, r["video"])) in seen]))
        # --num_clips, as many as there are: all of them; it makes SFT list the clips it saw
        command = f"sft.py --name zoo_{name}_s{args.seed} --data {labels} --video_root {WORLD} "
        command += f"--num_clips {len(seen)} --seed {1000 * number + args.seed} {POLICY_SFT} {flags} --resume"
        harness.build_if_missing(path, command.split(), "about a minute", rank)


def name_of(source):
    """How a source is called in files and cards: policy, zoo_flat_s0, or model@host."""
    if is_server(source):
        return f"{urlsplit(source).fragment}@{urlsplit(source).hostname}"
    path = Path(source)
    return path.parent.name if path.name == "final" else path.name


def is_server(source):
    return "://" in source


def check_source(source):
    """ValueError with one line for a server's address that is none."""
    if is_server(source):
        url, _, model = source.partition("#")
        try:
            check_server(url, "")
        except ValueError as e:
            shown = url.partition("?")[0].rpartition("@")[2]  # no password, no key
            raise ValueError(f"--zoo {shown}: {str(e).removeprefix('--api_url: ')}") from None
        if not model:
            raise ValueError(f"--zoo {url}: name the model behind the address: http://host/v1#model")


def tell_once(source, reason):
    """Why a source gave no answer, the first time; the data card counts all of them."""
    if not source.told:
        source.told = True
        print(f"a question is left without answer: {reason}; more of the kind are only counted", file=sys.stderr)


class Checkpoint:
    """Answers of a VideoLLM, sampled at --temperature, `--samples` to a question behind one prefill."""

    def __init__(self, path, args, device):
        self.model, self.processor = load_model(path, **harness.load_options(args, device))
        self.cache = FeatureCache(unwrap(self.model), self.processor, args.cache)
        self.args, self.device, self.told = args, device, False

    def __call__(self, records, keys):
        """keys: one sequence of integers a record, which decides its draws. -> [[(answer, ended), ..], ..]."""
        broken = self.cache.prepare([r["clip"] for r in records], progress=False)
        for reason in broken.values():
            tell_once(self, reason)
        most = self.args.max_prompt_tokens
        room = [fits(self.processor, r, most) for r in records]  # its video may take more tokens than the policy's
        if not all(room):
            tell_once(self, f"a prompt cannot be cut to --max_prompt_tokens {most}")
        whole = [i for i, r in enumerate(records) if r["clip"] not in broken and room[i]]
        said = iter(self.sample([records[i] for i in whole], [keys[i] for i in whole]) if whole else [])
        return [next(said) if i in whole else [MISSING] * self.args.samples for i in range(len(records))]

    def sample(self, records, keys):
        args, processor, eos = self.args, self.processor, self.processor.tokenizer.eos_token_id
        prefix = Prefix.build(processor, self.cache, [r["question"] for r in records], [r["clip"] for r in records],
                              self.device, args.max_prompt_tokens)
        uniforms = np.stack([np.random.default_rng(key).random((args.samples, args.max_new_tokens)) for key in keys])
        tokens, lengths, _ = generate(self.model, prefix, torch.from_numpy(uniforms), eos, args.temperature)
        ended = (tokens.gather(-1, lengths.unsqueeze(-1) - 1) == eos).squeeze(-1).tolist()  # (B,G)
        return [list(zip(*group)) for group in zip(processor.decode_answers(tokens, lengths), ended)]


class Server:
    """One greedy reply to a question, MISSING where there is none. Its key: see api_client.py."""

    def __init__(self, source, args, device):
        url, _, model = source.partition("#")
        self.client = ApiClient(url, model, args.cache, args.api_concurrency, args.api_timeout,
                                args.api_retries, extra=args.api_extra)
        self.args, self.told = args, False

    def __call__(self, records, keys):
        def ask(record):
            q, args = record["question"], self.args
            turns = [{"role": "user", "content": q}] if isinstance(q, str) else q
            try:
                images = frames_as_urls(record["clip"], args.api_frames, args.api_size)
                messages = message(images, turns[0]["content"]) + turns[1:]
                reply = self.client.ask(messages, args.max_new_tokens, check=not_withheld)
                return [(" ".join(reply.split()), not reply.cut)]
            except (ApiError, VideoError) as e:
                if getattr(e, "fatal", False):
                    raise
                tell_once(self, e)
                return [MISSING]

        with ThreadPoolExecutor(self.client.concurrency) as pool:
            try:
                return list(pool.map(ask, records))
            finally:
                pool.shutdown(cancel_futures=True)  # where asking is futile the rest is not asked


def not_withheld(reply):
    """ReplyError for a reply that a filter took away: what is left of it is nobody's answer."""
    if reply.withheld:
        raise ReplyError("no_reply", "it was withheld")


# ---------------------------------------------------------------------------------------------------------------
# Sampling and scoring, in parts
# ---------------------------------------------------------------------------------------------------------------
def in_parts(file, parts, rows_of, rank, world, answered=lambda row: True):
    """All rows of `file`, made part after part; what an earlier run wrote is kept up to its last whole part.

    parts: [(what, items, rows an item), ..]. rows_of(what, some items) -> a list of rows for each of the items; the
    items of a part are shared out over the processes, whose number therefore changes nothing.
    answered(row): True, False, or None if nobody was asked. No answer in three parts of one `what`
    in a row, or in all if they are fewer, ends the run; these parts are not kept.
    """
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    done = whole = 0
    while done < len(parts) and (more := whole + len(parts[done][1]) * parts[done][2]) <= len(lines):
        if not lines[more - 1].endswith("\n"):
            break
        done, whole = done + 1, more
    rows = [json.loads(line) for line in lines[:whole]]
    harness.all_gather(None)  # every process has read before the first one writes
    if rank == 0 and done < len(parts):
        harness.write(file, "".join(lines[:whole]))
    silent = 0
    for n, (what, items, _) in enumerate(parts[done:], done):
        mine = items[rank::world]
        shares = harness.all_gather(rows_of(what, mine) if mine else [])
        new = [row for i in range(len(items)) for row in shares[i % world][i // world]]
        if rank == 0:
            with open(file, "a") as f:
                f.write("".join(json.dumps(row) + "\n" for row in new))
        rows += new
        seen = {answered(row) for row in new}
        if True in seen or what != parts[n - 1][0]:
            silent = 0
        if silent == 0:
            first = n
        silent += False in seen and True not in seen
        if silent == min(3, sum(part[0] == what for part in parts)):
            lost = sum(len(part[1]) * part[2] for part in parts[first : n + 1])
            if rank == 0:
                harness.write(file, "".join(json.dumps(row) + "\n" for row in rows[:-lost]))
            sys.exit(f"{file}: {what or 'the oracle'} has answered nothing in {lost} rows; when it "
                     f"can again: {harness.resume_command()}")
    return rows


def collect(folder, k, sources, records, which, oracle, args, device, rank, world):
    """Iteration k: answers of all sources to the questions `which` (indices of `records`), scored by the oracle.

    sources {name: checkpoint folder or server}. -> groups, one a question: dict(record, answers [G], ended [G],
    sources [G], scores [G][4] 0-5 in the order of ASPECTS, or None where the answer is missing or the oracle gave no
    score); {counter: what the scoring cost}, empty for an oracle that asks no server.
    """
    chunks, began, loaded = [which[i : i + PART] for i in range(0, len(which), PART)], time.time(), {}
    before = dict(getattr(oracle, "counters", {}))
    folder.mkdir(parents=True, exist_ok=True)

    def answers_of(name, items):
        if name not in loaded:
            loaded.clear()  # one model of the zoo in memory at a time
            loaded[name] = (Server if is_server(sources[name]) else Checkpoint)(sources[name], args, device)
        keys = [[args.seed, k, list(sources).index(name), i] for i in items]
        said = loaded[name]([records[i] for i in items], keys)
        about = [dict(record=i, id=records[i]["id"], video=str(records[i]["clip"].path),
                      question=records[i]["question"], source=name) for i in items]
        return [[row | dict(answer=text, ended=ended) for text, ended in group] for row, group in zip(about, said)]

    per_item = {name: 1 if is_server(source) else args.samples for name, source in sources.items()}
    parts = [(name, chunk, per_item[name]) for name in sources for chunk in chunks]
    said = lambda row: row["answer"] is not None
    rows = in_parts(folder / "answers.jsonl", parts, answers_of, rank, world, said)
    groups = {i: dict(record=records[i], answers=[], ended=[], sources=[]) for i in which}
    for row in rows:
        groups[row["record"]]["answers"].append(row["answer"])
        groups[row["record"]]["ended"].append(row.get("ended", True))  # files of earlier versions do not say
        groups[row["record"]]["sources"].append(row["source"])
    sampled = time.time()

    def scores_of(_, items):
        some = [groups[i] for i in items]
        scores = score(oracle, [g["record"]["clip"] for g in some], [g["record"]["question"] for g in some],
                       [g["answers"] for g in some])
        return [[dict(record=i, id=records[i]["id"], scores=s)] for i, s in zip(items, scores)]

    def scored(row):
        asked = any(groups[row["record"]]["answers"])
        return row["scores"] != [None] * len(row["scores"]) if asked else None

    parts = [(None, chunk, 1) for chunk in chunks]
    for row in in_parts(folder / "scores.jsonl", parts, scores_of, rank, world, scored):
        groups[row["record"]]["scores"] = row["scores"]
    cost = cost_since(before, oracle, folder / "cost.json", rank)
    if rank == 0:
        print(f"iteration {k}: {len(rows)} answers to {len(which)} questions by {', '.join(sources)}: sampled in "
              f"{sampled - began:.0f} s, scored in {time.time() - sampled:.0f} s", flush=True)
    return list(groups.values()), cost


def cost_since(before, oracle, file, rank):
    """The oracle's counters since `before`, sums over all processes. Kept in `file` when scoring has ended, because a
    resumed run finds the scores and asks for nothing. Of scoring that was killed half-way it is the rest's cost alone.
    """
    if file.exists():  # no process has written yet: below, all wait for each other first
        return json.loads(file.read_text())
    now = getattr(oracle, "counters", {})
    if not now:
        return {}
    spent = harness.all_sum(torch.tensor([float(now[key] - before[key]) for key in now], dtype=torch.float64))
    cost = dict(zip(now, spent.tolist()))
    if rank == 0:
        harness.write(file, json.dumps(cost) + "\n")
    return cost


def score(oracle, clips, questions, answers):
    """Aspects 0-5 of every answer: [B][G] lists of 4 numbers; 0 for an empty answer, so that it can lose and never win;
    None where an answer is missing or the oracle could not score the group."""
    stand_in = [next((a for a in group if a), "") for group in answers]  # a copy costs the oracle nothing
    filled = [[a or s for a in group] for group, s in zip(answers, stand_in)]
    aspects, ok = oracle.aspects(clips, questions, filled)  # (B,G,4), (B,)
    points = lambda b, g, a: [round(x, 4) for x in aspects[b, g].tolist()] if a else [0.0] * len(ASPECTS)
    return [[None if a is None or not ok[b] else points(b, g, a) for g, a in enumerate(group)]
            for b, group in enumerate(answers)]
