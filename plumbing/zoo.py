"""The zoo of Iter-W2S-RLAIF: who answers, and the files of answers, scores and pairs.
dpo_iter_w2s.py is the algorithm.

    sources --collect_answers--> answers.jsonl --collect_scores--> scores.jsonl

A source is one of
    policy                   the policy of the moment, so that its own mistakes are among the
                             answers
    a folder                 a checkpoint that `load_model` reads; it may see another number of
                             frames
    http(s)://host/v1#name   model `name` of an OpenAI-compatible server; one greedy reply a
                             question, frames as JPEG
and gives `--samples` answers to a question. Every draw is keyed by (seed, iteration, source,
question). The files are
written in parts of PART questions: a killed run continues after the last whole part, with the same
answers.

`ended` says of an answer whether EOS came before --max_new_tokens. A server's reply did not end if
its finish_reason is `length`. An answer is null, that is missing, where a server sent no reply,
only thinking, or a withheld one (refusal, content_filter), or where a video cannot be read. Videos
are checked before step 1 with the policy's number of frames; a source with another number may need
a damaged part. A source, or an oracle, that answers nothing ends the run (`files.collect_rows`).

The embedded zoo holds four relatives of the policy that saw *the same labels*: another
initialisation, no curriculum, an early stage, half the frames. In [W] they are well-aligned models
from elsewhere. A relative with labels of its own would pass these labels on to the policy, and a
comparison with SFT on the policy's labels would not be fair.

Paper  [W] Iter-W2S-RLAIF / MMAIP-V, arXiv:2411.16201, Sec. 3.1
"""

import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import torch

from inputs.features import FeatureCache
from inputs.frames import VideoError
from plumbing import embedded, files, processes
from plumbing.api_client import (ApiClient, ApiError, ReplyError, check_server, frames_as_urls,
                                 message)
from plumbing.embedded import POLICY_SFT, sft_start
from plumbing.flags import WORLD
from plumbing.questions import prepare_videos
from plumbing.text import is_correct, token_f1
from video_llm import fits, unwrap

PART = 48  # questions
MISSING = (None, None)  # in place of (answer, ended)
RELATIVES = {"init": "", "flat": "--curriculum off", "early": "--steps 50",
             "frames4": "--num_frames 4"}
SIDES = ("chosen", "rejected")


# --------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------
def relatives(seed):
    """{relative: (seed of its SFT, final model)}, in the order of RELATIVES."""
    seeds = {name: 1000 * number + seed for number, name in enumerate(RELATIVES, 1)}
    return {name: (s, f"runs/sft/zoo_{name}_s{s}/final") for name, s in seeds.items()}


def default_zoo(model, seed):
    """The policy and four relatives where the start is the embedded one, else only the policy."""
    return ["policy"] + [path for _, path in relatives(seed).values() if model == sft_start(seed)]


def build_zoo(args, rank):
    """Train the missing relatives. They see the labels of the clips that the SFT start saw, and no
    others."""
    labels = Path(f"runs/sft/zoo_labels_s{args.seed}.json")
    for name, (seed, path) in relatives(args.seed).items():
        if path not in args.zoo:
            continue
        seen = set(json.loads(Path(args.model).parent.joinpath("labelled_clips.json").read_text()))
        if rank == 0 and not labels.exists():
            rows = json.loads(Path(WORLD, "train.json").read_text())
            files.write(labels,
                        json.dumps([r for r in rows if str(Path(WORLD, r["video"])) in seen]))
        # --num_clips, as many as there are: all of them; it makes SFT list the clips it saw
        command = f"sft.py --name zoo_{name} --data {labels} --video_root {WORLD} "
        command += f"--num_clips {len(seen)} --seed {seed} {POLICY_SFT} {RELATIVES[name]} --resume"
        embedded.build_if_missing(path, command.split(), "about a minute", rank)


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
            raise ValueError(f"--zoo {url}: name the model after the address: http://host/v1#model")


def check_sources(args):
    """ValueError with one line for sources that are none, that share a name, or that make no
    pairs."""
    for source in args.zoo:
        check_source(source)
    names = [name_of(source) for source in args.zoo]
    if len(set(names)) < len(names):
        raise ValueError(f"--zoo: two sources are called {Counter(names).most_common(1)[0][0]}")
    if len(names) > 1 and not 1 / len(names) <= args.max_share <= 1:
        raise ValueError(f"--max_share {args.max_share}: must lie between 1/{len(names)} (sources) "
                         "and 1")
    if args.samples * len(names) < 2:
        raise ValueError("--samples 1 of one source makes no pair")


def say_once(source, reason):
    """Why a source gave no answer, the first time; the data card counts all of them."""
    if not source.warned:
        source.warned = True
        print(f"a question is left without answer: {reason}; more of the kind are only counted",
              file=sys.stderr)


class Checkpoint:
    """Answers of a VideoLLM, MISSING where it cannot read the video or its prompt has no room.

    sample(model, processor, cache, records, keys, args): what draws the answers, the first step of
    the algorithm."""

    def __init__(self, run, path, sample):
        self.model, self.processor = run.load(path)
        self.cache = FeatureCache(unwrap(self.model), self.processor, run.args.cache)
        self.args, self.sample, self.warned = run.args, sample, False

    def __call__(self, records, keys):
        """keys: one sequence of integers a record, which decides its draws. -> [[(answer, ended),
        ..], ..]."""
        broken = self.cache.prepare([r["clip"] for r in records], progress=False)
        for reason in broken.values():
            say_once(self, reason)
        most = self.args.max_prompt_tokens
        # its video may take more tokens than the policy's
        room = [fits(self.processor, r, most) for r in records]
        if not all(room):
            say_once(self, f"a prompt cannot be cut to --max_prompt_tokens {most}")
        out = [[MISSING] * self.args.samples for _ in records]
        able = [i for i, r in enumerate(records) if r["clip"] not in broken and room[i]]
        if able:
            drawn = self.sample(self.model, self.processor, self.cache, [records[i] for i in able],
                                [keys[i] for i in able], self.args)
            for i, group in zip(able, drawn):
                out[i] = group
        return out


class Server:
    """One greedy reply to a question, MISSING where there is none. Its key: see
    plumbing/api_client.py."""

    def __init__(self, source, args):
        url, _, model = source.partition("#")
        self.client = ApiClient(url, model, args.cache, args.api_concurrency, args.api_timeout,
                                args.api_retries, extra=args.api_extra)
        self.args, self.warned = args, False

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
                say_once(self, e)
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


# --------------------------------------------------------------------------------------------------
# Answers and scores, in parts
# --------------------------------------------------------------------------------------------------
def collect_answers(run, folder, k, sources, records, chosen, sample):
    """Iteration k: answers of all sources to the questions `chosen` (indices of `records`).

    sources {name: checkpoint folder or server}. -> groups, one a question: dict(number, record,
    answers [G], ended [G], sources [G]), number: its index."""
    args, began, loaded = run.args, time.time(), {}

    def answers_of(name, numbers):
        if name not in loaded:
            loaded.clear()  # one model of the zoo in memory at a time
            path = sources[name]
            loaded[name] = Server(path, args) if is_server(path) else Checkpoint(run, path, sample)
        keys = [[args.seed, k, list(sources).index(name), i] for i in numbers]
        answered = loaded[name]([records[i] for i in numbers], keys)
        about = [dict(record=i, id=records[i]["id"], video=str(records[i]["clip"].path),
                      question=records[i]["question"], source=name) for i in numbers]
        return [[row | dict(answer=text, ended=ended) for text, ended in group]
                for row, group in zip(about, answered)]

    per_item = {name: 1 if is_server(path) else args.samples for name, path in sources.items()}
    parts = [(name, part, per_item[name]) for name in sources
             for part in files.in_chunks(chosen, PART)]
    rows = files.collect_rows(run, folder / "answers.jsonl", parts, answers_of,
                              lambda row: row["answer"] is not None)
    groups = {i: dict(number=i, record=records[i], answers=[], ended=[], sources=[])
              for i in chosen}
    for row in rows:
        groups[row["record"]]["answers"].append(row["answer"])
        # files of earlier versions do not say
        groups[row["record"]]["ended"].append(row.get("ended", True))
        groups[row["record"]]["sources"].append(row["source"])
    if run.rank == 0:
        print(f"iteration {k}: {len(rows)} answers to {len(chosen)} questions by "
              f"{', '.join(sources)}: sampled in {time.time() - began:.0f} s", flush=True)
    return list(groups.values())


def collect_scores(run, folder, groups, oracle, score):
    """Put `scores` into every group: [G][4], None where an answer is missing or the oracle gave no
    score.

    score(oracle, clips, questions, answers) -> [B][G][4]. -> {counter: what the scoring cost},
    empty for an oracle that asks no server."""
    before, began = dict(getattr(oracle, "counters", {})), time.time()
    answers = {g["number"]: g["answers"] for g in groups}

    def scores_of(_, part):
        scores = score(oracle, [g["record"]["clip"] for g in part],
                       [g["record"]["question"] for g in part],
                       [g["answers"] for g in part])
        return [[dict(record=g["number"], id=g["record"]["id"], scores=s)]
                for g, s in zip(part, scores)]

    def scored(row):
        asked = any(answers[row["record"]])
        return row["scores"] != [None] * len(row["scores"]) if asked else None

    parts = [(None, part, 1) for part in files.in_chunks(groups, PART)]
    for group, row in zip(groups, files.collect_rows(run, folder / "scores.jsonl", parts, scores_of,
                                                     scored)):
        group["scores"] = row["scores"]
    if run.rank == 0:
        print(f"{folder}: {len(groups)} questions scored in {time.time() - began:.0f} s",
              flush=True)
    return cost_since(before, oracle, folder / "cost.json", run.rank)


def cost_since(before, oracle, file, rank):
    """The oracle's counters since `before`, sums over all processes. Kept in `file` when scoring
    has ended, because a resumed run finds the scores and asks for nothing. Of scoring that was
    killed half-way it is only the cost of the rest."""
    if file.exists():  # no process has written yet: below, all wait for each other first
        return json.loads(file.read_text())
    now = getattr(oracle, "counters", {})
    if not now:
        return {}
    spent = processes.all_sum(torch.tensor([float(now[key] - before[key]) for key in now],
                                           dtype=torch.float64))
    cost = dict(zip(now, spent.tolist()))
    if rank == 0:
        files.write(file, json.dumps(cost) + "\n")
    return cost


# --------------------------------------------------------------------------------------------------
# Pairs of files; what is written about pairs and alphas
# --------------------------------------------------------------------------------------------------
def usable_pairs(run, read, cache, ids_of):
    """Of the pairs of --preferences those that can be trained on: the video can be read, the prompt
    can be cut to --max_prompt_tokens, and the two answers still differ where --max_new_tokens cuts
    them. None at all ends the run: it would continue with pairs of its own. ids_of(pair, side,
    processor, max_length): an answer's tokens."""
    args = run.args
    with_video = [p for p in read if p["clip"]]
    broken = prepare_videos(run, cache, [p["clip"] for p in with_video])
    readable = [p for p in with_video if p["clip"] not in broken]
    fitting = [p for p in readable if fits(cache.processor, p, args.max_prompt_tokens)]
    ids = lambda p, length=None: [ids_of(p, side, cache.processor, length) for side in SIDES]
    usable = [p for p in fitting if len({*map(tuple, ids(p, args.max_new_tokens))}) == 2]
    processes.check_same(f"{args.preferences}: its pairs",
                         [[str(p[k]) for k in ("question", *SIDES)] for p in usable])
    cut = sum(len(answer) > args.max_new_tokens for p in usable for answer in ids(p))
    if run.rank == 0:
        print(f"{len(usable)} pairs; {len(broken)} broken videos; {cut} answers are cut at "
              f"--max_new_tokens {args.max_new_tokens}; {len(fitting) - len(usable)} pairs left "
              f"out, equal once cut; {len(readable) - len(fitting)} whose prompts cannot be cut to "
              f"--max_prompt_tokens {args.max_prompt_tokens}")
    if not usable:
        sys.exit(f"{args.preferences}: none of {len(read)} pairs can be used "
                 f"({len(read) - len(with_video)} without video, {len(with_video) - len(readable)} "
                 f"with a broken one, {len(readable) - len(fitting)} whose prompts cannot be cut "
                 f"to --max_prompt_tokens {args.max_prompt_tokens}, {len(fitting)} equal at "
                 f"--max_new_tokens {args.max_new_tokens})")
    return usable


def write_curve(folder, k, chosen, curve):
    files.write(folder / "extrapolation.json",
                json.dumps(dict(chosen=chosen, curve=curve), indent=1) + "\n")
    for row in curve:
        keys = [key for key in ("score", "accuracy", "len", "rewards/margins", "logps/chosen")
                if key in row]
        print(f"iteration {k}, alpha {row['alpha']:g}: "
              + " ".join(f"{key} {row[key]:.3f}" for key in keys)
              + (" <- chosen" if row["alpha"] == chosen else ""), flush=True)


def write_card(folder, k, pairs, dropped, groups, lengths, cost):
    """data_card.json and .md: what is in the pairs. Where the questions have labels, only this
    reads them. lengths {side: [tokens of each answer]}; cost: of the scoring, from
    `collect_scores`."""
    truth = {g["record"]["id"]: g["record"]["answer"] for g in groups
             if g["record"]["answer"] is not None}
    labelled = [p for p in pairs if p["id"] in truth]
    mean = lambda values: round(sum(values) / max(len(values), 1), 4)
    missing = Counter(source for g in groups
                      for source, a in zip(g["sources"], g["answers"]) if a is None)
    card = dict(iteration=k, questions=len(groups), labelled=len(truth),
                answers=sum(len(g["answers"]) for g in groups),
                no_answer=sum(not a for g in groups for a in g["answers"]), missing=dict(missing),
                pairs=len(pairs),
                dropped=dict(dropped))
    for side in SIDES:
        card[side] = dict(
            sources=dict(Counter(p["sources"][side] for p in pairs).most_common()),
            tokens=mean(lengths[side]),
            cut=sum(not p["ended"][side] for p in pairs),
            score=mean([sum(p["scores"][side].values()) / len(p["scores"][side]) for p in pairs]))
    # requests, tokens and refusals of a server
    card["oracle"] = {key: round(n, 1) for key, n in cost.items()}
    listed = lambda counts: ", ".join(f"{name} {n}" for name, n in counts.items() if n) or "none"
    rows = [("questions", f"{card['questions']} ({len(truth)} with a label)"),
            ("answers", f"{card['answers']} ({card['no_answer']} empty or missing)"),
            ("missing", listed(missing)),
            ("pairs", card["pairs"]), ("questions without a pair", listed(dropped))]
    for side in SIDES:
        c = card[side]
        rows += [(f"{side}: sources", listed(c["sources"])),
                 (f"{side}: mean length in tokens", c["tokens"]),
                 (f"{side}: answers that were cut", c["cut"]),
                 (f"{side}: mean score, 0-5", c["score"])]
    if labelled:
        right = {side: [is_correct(p[side], truth[p["id"]]) for p in labelled] for side in SIDES}
        for side in SIDES:
            c = card[side]
            c |= dict(right=mean(right[side]),
                      token_f1=mean([token_f1(p[side], truth[p["id"]]) for p in labelled]))
            rows += [(f"{side}: share that equals the label", c["right"]),
                     (f"{side}: token F1 with the label", c["token_f1"])]
        decided = [c for c, r in zip(right["chosen"], right["rejected"]) if c != r]
        share = card["right_before_wrong"] = dict(share=mean(decided), pairs=len(decided))
        rows.append(("chosen right, of the pairs with one right answer",
                     f"{share['share']} of {share['pairs']}"))
    rows += [("oracle", listed(card["oracle"]))] if cost else []
    lines = [f"# Preference pairs of iteration {k}", "", "| | |", "|---|---|",
             *(f"| {a} | {b} |" for a, b in rows)]
    files.write(folder / "data_card.json", json.dumps(card, indent=1) + "\n")
    files.write(folder / "data_card.md", "\n".join(lines) + "\n")
    print(f"iteration {k}: {len(pairs)} pairs; no pair: {listed(dropped)}; {folder}/data_card.md",
          flush=True)
