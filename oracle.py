"""Everything that ranks, judges or describes: the oracles of Oracle-RLAIF, and how far they agree with the truth.

    ranks, ok = oracle.rank(videos, questions, answers)      # B clips, B strings, B lists of G strings

ranks (B,G) long, 0 = best, tied answers share the better place ("1224"); ok (B,) bool, False where the oracle could
not rank a group: such a group is *counted and masked out* by the caller, never given a score.

  reference   token F1 against the labelled answer. An upper bound and a test double; not RLAIF.
  judge       a model compares two answers; its choice is read from the log-probabilities of the two replies (D1), both
              orders averaged, so that a preference for the first place cancels.      [OR Fig. 1; VLM-RLAIF Sec. 3.1]
  context     the same with a narrative: the video cut into 3 clips of at most 20 frames, each described with 'Describe
              this video in detail', joined and put before the question.              [VLM-RLAIF Sec. 3.1]

The oracle is a model of its own (`--oracle_model`), in life a stronger one than the policy.

    python oracle.py --checkpoint runs/sft/policy_s0/final --oracles judge,context     agreement with the truth, printed

D1      the judge's two possible replies are the responses themselves, not the labels "1" and "2". A label is a pointer:
        at the size of `tiny` it stayed at chance for as long as it takes to learn to answer, while naming the better
        response is question answering with two options and is learned along with it.
D2      identical answers (after `normalize`) are compared once and tied; nothing else is ever tied.

Papers  [OR] Oracle-RLAIF arXiv:2510.02561    VLM-RLAIF arXiv:2402.03746
"""

import hashlib
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.hf_argparser import HfArg

import harness
from data import Clip, DataError, FeatureCache, clip_seconds, read_records
from video_llm import Prefix, generate, load_model, token_logprobs

DESCRIBE = "Describe this video in detail"  # VLM-RLAIF Sec. 3.1
MAX_NARRATIVE_TOKENS = 64  # per clip
ORACLES = ("reference", "judge", "context")
PACK = 4  # comparisons in one packed row


def judge_prompt(question, first, second, narrative=None):
    """The comparison as (head, tail): the head is shared by every pair of a group, the tail differs from pair to pair.

    Its parts are those of VLM-RLAIF's fig. 9 (narrative, instruction, two responses, which is preferred); the words are
    ours, their text was not released. The judge replies with the *text* of the better response, not with its number:
    see D1.
    """
    head = narrative or ""
    return head, f"\nResponse 1: {first}\nResponse 2: {second}\nWhich response is better?\n{question}"


# ---------------------------------------------------------------------------------------------------------------
# Scores of text against text
# ---------------------------------------------------------------------------------------------------------------
def normalize(text):
    """Lower case, no punctuation or articles, single spaces: what two answers must share to count as the same."""
    return re.sub(r"\s+", " ", re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]", " ", text.lower()))).strip()


def token_f1(prediction, reference):
    """Harmonic mean of token precision and recall in [0,1] (SQuAD's F1); two empty texts agree."""
    p, r = normalize(prediction).split(), normalize(reference).split()
    if not p or not r:
        return float(p == r)
    common = sum((Counter(p) & Counter(r)).values())
    return 2 * common / (len(p) + len(r))


def ranks_of(scores):
    """scores (B,G), higher is better -> ranks (B,G) long: the number of strictly better answers; ties share a rank."""
    return (scores.unsqueeze(1) > scores.unsqueeze(2)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------
# Oracles
# ---------------------------------------------------------------------------------------------------------------
class ReferenceOracle:
    """Token F1 against the labelled answer; a question without one cannot be ranked."""

    def __init__(self, records):
        self.answers = {(r["clip"], r["question"]): r["answer"] for r in records}

    def score(self, videos, questions, answers):
        """-> F1 (B,G) float, ok (B,) bool."""
        refs = [self.answers.get(key) for key in zip(videos, questions)]
        rows = [[0.0 if ref is None else token_f1(a, ref) for a in group] for ref, group in zip(refs, answers)]
        return torch.tensor(rows), torch.tensor([ref is not None for ref in refs])

    def rank(self, videos, questions, answers):
        scores, ok = self.score(videos, questions, answers)
        return ranks_of(scores), ok


class JudgeOracle:
    """A video LLM compares answers two by two; `narrative=True` is the context-aware judge of VLM-RLAIF."""

    def __init__(self, model_dir, cache_dir, narrative, device="cpu", clips=3, max_frames=20, rows=24):
        self.model, self.processor = load_model(model_dir, device=device)
        self.model.requires_grad_(False).eval()
        self.cache = FeatureCache(self.model, self.processor, cache_dir)
        self.device, self.narrative, self.clips, self.max_frames, self.rows = device, narrative, clips, max_frames, rows
        weights = hashlib.sha256(self.cache.setup.encode())
        for p in self.model.state_dict().values():
            weights.update(p.detach().cpu().float().numpy().tobytes())
        self.story_dir = Path(cache_dir) / "narratives" / weights.hexdigest()[:16]
        self.story_dir.mkdir(parents=True, exist_ok=True)
        self.told = {}

    # -- the narrative ------------------------------------------------------------------------------------------
    def narratives(self, videos):
        """One text per video: `clips` parts of equal length, each described greedily, joined. Kept in memory and on
        disk, so that a video is described once, also across resumed runs."""
        for video in dict.fromkeys(videos):
            file = self.story_file(video)
            if video not in self.told and file.exists():
                self.told[video] = file.read_text()
        new = [v for v in dict.fromkeys(videos) if v not in self.told]
        for i in range(0, len(new), self.rows // self.clips or 1):
            some = new[i : i + (self.rows // self.clips or 1)]
            texts = self.describe([part for v in some for part in cut(v, self.clips)])
            for k, video in enumerate(some):
                self.told[video] = " ".join(texts[k * self.clips : (k + 1) * self.clips])
                file = self.story_file(video)
                aside = file.with_suffix(f".{os.getpid()}.tmp")
                aside.write_text(self.told[video])
                os.replace(aside, file)
        return [self.told[v] for v in videos]

    def story_file(self, video):
        return self.story_dir / f"{self.cache.key(video, self.max_frames)[:32]}-{self.clips}.txt"

    def describe(self, clips):
        prefix = Prefix.build(self.processor, self.cache, [DESCRIBE] * len(clips), clips, self.device,
                              num_frames=min(self.max_frames, self.processor.num_frames))
        eos, uniforms = self.processor.tokenizer.eos_token_id, torch.zeros(len(clips), 1, MAX_NARRATIVE_TOKENS)
        tokens, lengths, _ = generate(self.model, prefix, uniforms, eos, temperature=0)  # greedy: uniforms unread
        return [group[0] for group in self.processor.decode_answers(tokens, lengths)]

    # -- comparisons --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def preferences(self, videos, questions, answers):
        """P(answer i is better than answer j), (B,G,G), both orders averaged, so P_ij + P_ji = 1 and P_ii = 1/2.

        All ordered pairs of *distinct* answers are compared, PACK of them behind one prefix (video, narrative).
        """
        stories = self.narratives(videos) if self.narrative else [None] * len(videos)
        B, G = len(answers), len(answers[0])
        same = [[normalize(a) for a in group] for group in answers]
        first = [[group.index(s) for s in group] for group in same]  # [D2] of equal answers only the first is compared
        asked = [(b, i, j) for b in range(B) for i in set(first[b]) for j in set(first[b]) if i != j]
        # Rows of at most PACK comparisons of one group: attention costs the square of a row's length.
        rows = [[(b, i, j) for b, i, j in asked if b == k] for k in range(B)]
        rows = [row[n : n + PACK] for row in rows for n in range(0, len(row), PACK)]
        rows.sort(key=lambda row: (len(row), max(len(answers[b][i] + answers[b][j]) for b, i, j in row)))
        p = {}  # P(answer i | asked i or j, in this order)
        for n in range(0, len(rows), self.rows):
            p |= self.compare(rows[n : n + self.rows], videos, questions, answers, stories)
        prefers = torch.full((B, G, G), 0.5)
        for b in range(B):
            for i in range(G):
                for j in range(G):
                    f, g = first[b][i], first[b][j]
                    if f != g:
                        prefers[b, i, j] = (p[b, f, g] + 1 - p[b, g, f]) / 2
        return prefers

    def compare(self, rows, videos, questions, answers, stories):
        """Each row: comparisons [(b,i,j), ...] of one group b. Both replies to a comparison, answer i and answer j, are
        scored behind the shared head. -> {(b,i,j): P(answer i)}."""
        heads, tails, counts = [], [], []
        for row in rows:
            ask = lambda b, i, j: judge_prompt(questions[b], answers[b][i], answers[b][j], stories[b])
            parts = [self.processor.split_prompt_ids(*ask(*one)) for one in row]
            replies = [[self.processor.answer_ids(answers[b][k]) for k in (i, j)] for b, i, j in row]
            heads.append(parts[0][0])
            tails.append([tail + reply for (_, tail), pair in zip(parts, replies) for reply in pair])
            counts.append([len(reply) for pair in replies for reply in pair])
        ids, mask = self.processor.pad(heads, "left")
        prefix = Prefix(*(x.to(self.device) for x in (ids, mask, *self.cache([videos[row[0][0]] for row in rows]))))
        n = max(map(len, tails))
        flat = [t for row in tails for t in row + [row[0]] * (n - len(row))]
        tokens = self.processor.pad(flat, "right")[0].view(len(rows), n, -1).to(self.device)
        lengths = torch.tensor([len(t) for t in flat]).view(len(rows), n)
        logprobs = token_logprobs(self.model, prefix, tokens, lengths.to(self.device))[0].cpu().view(len(rows), n, -1)
        p = {}
        for r, row in enumerate(rows):
            reply = [logprobs[r, k, lengths[r, k] - c : lengths[r, k]].sum() for k, c in enumerate(counts[r])]
            p |= {one: torch.sigmoid(reply[2 * k] - reply[2 * k + 1]) for k, one in enumerate(row)}
        return p

    def score(self, videos, questions, answers):
        """Mean probability of winning against the other answers of the group (B,G), ok (B,)."""
        prefers = self.preferences(videos, questions, answers)
        # rounding: copies of one answer sum the same numbers in another order and must stay tied
        return prefers.mean(-1).mul(1e5).round().div(1e5), torch.ones(len(videos), dtype=torch.bool)

    def rank(self, videos, questions, answers):
        scores, ok = self.score(videos, questions, answers)
        return ranks_of(scores), ok


def cut(clip, parts):
    """A clip in `parts` clips of equal length. Raises VideoError."""
    start, end = clip_seconds(clip)
    edges = np.linspace(start, end, parts + 1).tolist()
    return [Clip(clip.path, a, b) for a, b in zip(edges, edges[1:])]


def make_oracle(name, records, model_dir, cache_dir, device="cpu"):
    """The oracle called `name`, one of ORACLES. records: labelled records, read by `reference` alone."""
    if name == "reference":
        return ReferenceOracle(records)
    return JudgeOracle(model_dir, cache_dir, narrative=name == "context", device=device)


# ---------------------------------------------------------------------------------------------------------------
# How far does an oracle agree with the truth?
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    checkpoint: str = HfArg(default="runs/sft/policy_s0/final", help="the policy whose sampled answers are ranked")
    oracles: str = HfArg(default="judge,context", help="oracles to compare, comma-separated")
    oracle_model: str = HfArg(default="runs/sft/oracle/final", help="the judging model")
    data: str = HfArg(default="data/moving_shapes/test.json", help="labelled questions")
    questions: int = HfArg(default=500, help="how many of them, drawn by --seed")
    G: int = HfArg(default=5, help="answers per question, sampled at temperature 1")
    seed: int = HfArg(default=0, help="choice of questions and all sampled answers")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features and narratives")

    def __post_init__(self):
        if self.G < 2 or self.questions < 1:
            raise ValueError("--G must be at least 2, --questions at least 1")
        for name in self.oracles.split(","):
            if name not in ORACLES:
                raise ValueError(f"--oracles {name}: choose of {', '.join(ORACLES)}")


def pairwise_accuracy(scores, correct):
    """Share of (right, wrong) answer pairs of one group in which the right one scores higher; ties count one half.

    scores (B,G) float, correct (B,G) bool -> accuracy, number of pairs.
    """
    mixed = correct.unsqueeze(2) & ~correct.unsqueeze(1)  # (B,G,G) i right, j wrong
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)  # (B,G,G)
    better = (difference > 0).float() + (difference == 0).float() / 2
    pairs = mixed.sum().item()
    return (better * mixed).sum().item() / max(pairs, 1), pairs


def main(args):
    with harness.one_line_errors(DataError, OSError):
        records = [r for r in read_records([args.data])[0] if r["clip"] and r["question"] != DESCRIBE]
        model, processor = load_model(args.checkpoint)
    records = random.Random(args.seed).sample(records, min(args.questions, len(records)))
    clips, questions = [r["clip"] for r in records], [r["question"] for r in records]
    cache, answers = FeatureCache(model, processor, args.cache), []
    for i in range(0, len(records), 50):
        prefix = Prefix.build(processor, cache, questions[i : i + 50], clips[i : i + 50])
        uniforms = np.random.default_rng([args.seed, i]).random((len(prefix.input_ids), args.G, 16))
        tokens, lengths, _ = generate(model, prefix, torch.from_numpy(uniforms), processor.tokenizer.eos_token_id)
        answers += processor.decode_answers(tokens, lengths)
    correct = torch.tensor([[normalize(a) == normalize(r["answer"]) for a in g] for r, g in zip(records, answers)])
    print(f"{len(records)} questions x {args.G} answers of {args.checkpoint}: {correct.float().mean():.1%} right; "
          f"{(correct.all(1) | ~correct.any(1)).float().mean():.1%} of the groups all right or all wrong")
    for name in args.oracles.split(","):
        oracle = make_oracle(name, records, args.oracle_model, args.cache)
        scores, _ = oracle.score(clips, questions, answers)
        accuracy, pairs = pairwise_accuracy(scores, correct)
        tied = (scores == scores[:, :1]).all(1).float().mean()
        first = correct.gather(1, scores.argmax(1, keepdim=True)).float().mean()
        print(f"{name:10s} right before wrong in {accuracy:.1%} of {pairs} pairs; no order in {tied:.1%} of the "
              f"groups; a right answer first in {first:.1%}")


if __name__ == "__main__":
    main(harness.parse_args(Args))
