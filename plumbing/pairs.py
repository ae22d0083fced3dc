"""Preference pairs for a reward model: which can be read, which are held out, what stands beside
the answers."""

import functools
import math
import random
from collections import Counter

from inputs.records import video_name
from plumbing import processes


class Reading:
    """How the reward model reads a pair: what stands beside the answers, what is cut or left out.

    narratives {clip: text} and own_answers {clip and question: the judge's answer} are empty where
    they are not read. lost: pairs left out (equal, long); cut: answers and narratives cut.
    as_read, cut_narrative: how oracle.py cuts an answer and a narrative."""

    def __init__(self, args, processor, as_read, cut_narrative):
        self.args, self.processor = args, processor
        self.as_read, self.cut_narrative = as_read, cut_narrative
        self.narratives, self.own_answers = {}, {}
        self.lost, self.cut = Counter(), Counter()

    def split(self, run, judge, pairs):
        """-> the pairs to train on, the held-out pairs. What the model cannot read, or not tell
        apart, is left out: it would end the run in the middle, or teach nothing."""
        args = self.args
        train, held = split_by_video(self.readable(pairs), args.eval_share, args.seed)
        rng = random.Random(f"{args.seed} share")
        train = rng.sample(train, math.ceil(args.share * len(train)))
        self.tell(run, judge, train + held)
        self.cut.clear()  # counted again, now with what stands beside the answers
        return self.readable(train), self.readable(held)

    def tell(self, run, judge, pairs):
        """Narratives and the judge's own answers, shared out over the processes."""
        if self.args.narrative:
            clips = sorted({p["clip"] for p in pairs if p["clip"]}, key=str)
            judge.narratives(clips[run.rank :: run.world])  # cached on disk
            processes.barrier()
            self.narratives = dict(zip(clips, judge.narratives(clips)))
        if self.args.guided:
            questions = {key_of(p): p for p in pairs if p["clip"]}
            mine = sorted(questions)[run.rank :: run.world]
            answers = judge.answer([questions[k]["clip"] for k in mine],
                                   [questions[k]["question"] for k in mine])
            for part in processes.all_gather(dict(zip(mine, answers))):
                self.own_answers |= part

    def beside(self, pair):
        return self.narratives.get(pair["clip"]), self.own_answers.get(key_of(pair))

    def readable(self, pairs):
        """The pairs that the reward model can read and tell apart; the others are counted."""
        args, processor, out, fitted = self.args, self.processor, [], {}
        longest = args.max_answer_tokens
        read = functools.cache(lambda text: self.as_read(processor, text, args.answer_first,
                                                         longest))
        is_cut = functools.cache(lambda text: len(processor.answer_ids(text)) > longest)
        for p in pairs:
            key, (narrative, own) = key_of(p), self.beside(p)
            if key not in fitted:
                try:
                    text = self.cut_narrative(
                        processor, p["question"], narrative, own, p["clip"] is not None,
                        args.answer_first, args.max_prompt_tokens)
                    fitted[key] = True
                    self.cut["narratives"] += text != narrative
                except ValueError:  # no room for the question
                    fitted[key] = False
            if not fitted[key]:
                self.lost["long"] += 1
            elif read(p["chosen"]) == read(p["rejected"]):
                self.lost["equal"] += 1
            else:
                out.append(p)
                self.cut["answers"] += is_cut(p["chosen"]) + is_cut(p["rejected"])
        return out

    def summary(self, train, held, broken):
        return (f"{len(train)} pairs to train on, {len(held)} on other videos to measure; "
                f"{len(broken)} broken videos\n"
                f"pairs left out: {self.lost['equal']} equal once cut, {self.lost['long']} whose "
                f"question alone exceeds --max_prompt_tokens {self.args.max_prompt_tokens}; cut: "
                f"{self.cut['answers']} answers at --max_answer_tokens "
                f"{self.args.max_answer_tokens}, {self.cut['narratives']} narratives")


def key_of(pair):
    """The key of a judge's own answer: the clip and the question."""
    return f"{pair['clip']} {pair['question']}"


def unseen_by(job, judge, clips):
    """The clips that the judge cannot read, whole or in parts; the same set on every process."""
    mine = sorted(set(clips), key=str)[job.rank :: job.world]
    return set().union(*processes.all_gather(judge.unreadable(mine)))


def split_by_video(pairs, share, seed):
    """-> training pairs, held-out pairs. No video is in both, not even another part of its file or
    other frames of it. Each video draws for itself, so it is on the same side in every file of
    pairs, whatever happens to the others."""

    def held_out(pair):
        name = video_name(pair["clip"].path) if pair["clip"] else pair["question"]
        return random.Random(f"{seed} held out {name}").random() < share

    return [p for p in pairs if not held_out(p)], [p for p in pairs if held_out(p)]


def by_video(pairs, pack):
    """Groups of up to `pack` pairs about the same (part of a) video. A pair of text has its own."""
    clips = {}
    for k, p in enumerate(pairs):
        clips.setdefault(p["clip"] or k, []).append(p)
    return [members[i : i + pack] for members in clips.values()
            for i in range(0, len(members), pack)]


def group_size(group):
    """Number of pairs, then the longest of them."""
    return len(group), max(len(f"{p['question']} {p['chosen']} {p['rejected']}") for p in group)
