"""Everything that ranks, judges or describes: the oracles of Oracle-RLAIF, and how far they agree with the truth.

    ranks, ok = oracle.rank(videos, questions, answers)      # B clips, B strings, B lists of G strings

ranks (B,G) long, 0 = best, tied answers share the better place ("1224"); ok (B,) bool, False where the oracle could
not rank a group: such a group is *counted and masked out* by the caller, never given a score.

  reference   token F1 against the labelled answer. An upper bound and a test double; not RLAIF.
  judge       a model compares two answers; the choice is read from the probabilities of the two labels, both orders
              averaged, so that a preference for the first place cancels.             [OR Fig. 1; VLM-RLAIF Sec. 3.1]
  context     the same with a narrative: the video cut into 3 clips of at most 20 frames, each described with 'Describe
              this video in detail', joined and put before the question.              [VLM-RLAIF Sec. 3.2]

The oracle is a model of its own (`--oracle_model`), in life a stronger one than the policy. Identical answers are
compared once and tied: their order would be noise.

    python oracle.py --checkpoint runs/sft/policy/final --oracles judge,context     agreement with the truth, printed

Papers  [OR] Oracle-RLAIF arXiv:2510.02561    VLM-RLAIF arXiv:2402.03746
"""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data import Clip, FeatureCache, clip_seconds
from video_llm import Prefix, generate, load_model, packed_logits

DESCRIBE = "Describe this video in detail"  # VLM-RLAIF Sec. 3.2
LABELS = ("1", "2")
MAX_NARRATIVE_TOKENS = 64  # per clip


def judge_prompt(question, first, second, narrative=None):
    """The comparison as (head, tail): the head is shared by every pair of a group, the tail differs from pair to pair.

    Its parts follow VLM-RLAIF's fig. 9 (narrative, instruction, two responses, which is preferred); the words are
    ours, their text was not released.
    """
    head = (f"{narrative}\n" if narrative else "") + question
    return head, f"\nResponse 1: {first}\nResponse 2: {second}\nWhich response is better, 1 or 2?"


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
    """scores (B,G), higher is better -> ranks (B,G) long: the number of strictly better answers, so ties share a rank."""
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

    def __init__(self, model_dir, cache_dir, narrative, device="cpu", clips=3, max_frames=20, rows=64):
        self.model, self.processor = load_model(model_dir, device=device)
        self.model.requires_grad_(False).eval()
        self.cache = FeatureCache(self.model, self.processor, cache_dir)
        self.device, self.narrative, self.clips, self.max_frames, self.rows = device, narrative, clips, max_frames, rows
        self.labels = [self.processor.answer_ids(label)[0] for label in LABELS]
        assert self.labels[0] != self.labels[1], "the tokenizer does not tell the two labels apart"
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
        uniforms = torch.zeros(len(clips), 1, MAX_NARRATIVE_TOKENS)  # unread: temperature 0
        tokens, lengths = generate(self.model, prefix, uniforms, self.processor.tokenizer.eos_token_id, temperature=0)
        return [group[0] for group in self.processor.decode_answers(tokens, lengths)]

    # -- comparisons --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def preferences(self, videos, questions, answers):
        """P(answer i is better than answer j), (B,G,G), both orders averaged, so P_ij + P_ji = 1 and P_ii = 1/2.

        All ordered pairs of *distinct* answers of a group are packed behind one prefix (video, narrative, question).
        """
        stories = self.narratives(videos) if self.narrative else [None] * len(videos)
        B, G = len(answers), len(answers[0])
        prefers = torch.full((B, G, G), 0.5)
        same = [[normalize(a) for a in group] for group in answers]
        jobs = []  # (b, pairs [(i,j)]) of first occurrences
        for b in range(B):
            first = [i for i in range(G) if same[b].index(same[b][i]) == i]
            jobs.append((b, [(i, j) for i in first for j in first if i != j]))
        jobs = sorted((job for job in jobs if job[1]), key=lambda job: len(job[1]))  # like sizes share a batch
        while jobs:
            count = max(1, self.rows * 4 // len(jobs[-1][1]))
            batch, jobs = jobs[-count:], jobs[:-count]
            self.compare(batch, videos, questions, answers, stories, prefers)
        for b in range(B):  # copies of an answer inherit its comparisons
            of = torch.tensor([same[b].index(s) for s in same[b]])
            prefers[b] = prefers[b][of][:, of]
        return prefers

    def compare(self, jobs, videos, questions, answers, stories, prefers):
        heads, tails = [], []
        for b, pairs in jobs:
            parts = [self.processor.split_prompt_ids(*judge_prompt(questions[b], answers[b][i], answers[b][j], stories[b]))
                     for i, j in pairs]
            heads.append(parts[0][0])
            tails.append([tail + [self.labels[0]] for _, tail in parts])  # the label's place is what gets predicted
        features, frame_mask = self.cache([videos[b] for b, _ in jobs])
        ids, mask = self.processor.pad(heads, "left")
        prefix = Prefix(*(x.to(self.device) for x in (ids, mask, features, frame_mask)))
        n = max(map(len, tails))
        flat, _ = self.processor.pad([t for row in tails for t in row + [row[0]] * (n - len(row))], "right")
        lengths = torch.tensor([[len(t) for t in row + [row[0]] * (n - len(row))] for row in tails])
        tokens = flat.view(len(jobs), n, -1).to(self.device)
        logits = packed_logits(self.model, prefix, tokens, lengths.to(self.device)).float().cpu()  # (b,n,T,V)
        at_label = logits.gather(2, (lengths - 1)[..., None, None].expand(-1, -1, 1, logits.shape[-1])).squeeze(2)
        p_first = at_label[..., self.labels].softmax(-1)[..., 0]  # (b,n) P(label "1")
        for row, (b, pairs) in enumerate(jobs):
            p = {pair: p_first[row, k] for k, pair in enumerate(pairs)}
            for i, j in pairs:
                prefers[b, i, j] = (p[i, j] + 1 - p[j, i]) / 2

    def rank(self, videos, questions, answers):
        """Order by the mean probability of winning against the other answers."""
        prefers = self.preferences(videos, questions, answers)
        # rounding: copies of one answer sum the same numbers in another order and must stay tied
        return ranks_of(prefers.mean(-1).mul(1e5).round()), torch.ones(len(videos), dtype=torch.bool)


def cut(clip, parts):
    """A clip in `parts` clips of equal length. Raises VideoError."""
    start, end = clip_seconds(clip)
    edges = np.linspace(start, end, parts + 1).tolist()
    return [Clip(clip.path, a, b) for a, b in zip(edges, edges[1:])]


def make_oracle(name, records, model_dir, cache_dir, device="cpu"):
    """The oracle called `name`. records: labelled records, read by `reference` alone."""
    if name == "reference":
        return ReferenceOracle(records)
    if name in ("judge", "context"):
        return JudgeOracle(model_dir, cache_dir, narrative=name == "context", device=device)
    raise ValueError(f"--oracle {name}: choose reference, judge or context")
