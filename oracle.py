"""The oracles: everything that ranks, judges or describes answers about a video.

    scores, ranks, ok = oracle.rank(videos, questions, answers)    # answers: B lists of G strings;
                                                                   # videos: B Clips
    points, ok = oracle.aspects(videos, questions, answers)        # (B,G,4) in [0,5], see ASPECTS

scores (B,G), higher is better; ranks (B,G) long, 0 = best, tied answers share the better place; ok
(B,) bool, False where a group could not be ranked: the caller *counts it and masks it out*.

  reference     token F1 with the labelled answer. An upper bound and a test double, not RLAIF.
  judge         a model compares two answers; its choice is read from the log-probabilities of the
                two replies (D1), both orders averaged.        [OR Fig. 1; VLM-RLAIF Sec. 3.1]
  context       a judge with a narrative: the video is cut into 3 clips of at most 20 frames, each
                is described, the texts stand before the question.        [VLM-RLAIF Sec. 3.1]
  reward_model  the reward of a checkpoint of reward_model.py.            [VLM-RLAIF Sec. 3.2]
  api           a server sees frames, question and answers, and ranks them.
  a,b,...       several oracles: the mean of their ranks (D3).

An oracle is a model of its own (--oracle_model), in life a stronger one than the policy. What each
sees and how far it agrees with the truth: `python evaluation/agreement.py --demo`.

Differs D1  The judge's two possible replies are the responses themselves, not the labels "1" and
            "2". A label is a pointer: at the size of `tiny` it stayed at chance, while naming the
            better response is question answering with two options.
        D2  Equal answers (after `normalize`) are compared once, as the shortest of them, and tied;
            nothing else is. A server gets them once.
        D3  Oracles are averaged by mean place; a group that one of them cannot rank is masked,
            because a mean over fewer is on another scale.
        D4  Iter-W2S asks GPT-4o for a score per aspect; its prompts are not public. A judge that
            chooses between two answers has no scale: `JudgeOracle.aspects` says what stands in.

Papers  [OR] Oracle-RLAIF arXiv:2510.02561    VLM-RLAIF arXiv:2402.03746
        Iter-W2S-RLAIF arXiv:2411.16201
"""

import copy
import functools
import hashlib
import json
import math
import os
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from inputs.features import FeatureCache
from inputs.frames import VideoError, clip_seconds
from inputs.records import Clip, DataError
from plumbing import files, flags
from plumbing.api_client import ApiClient, ApiError, flat, frames_as_urls
from plumbing.replies import ASPECTS, COUNTERS, aspects, listwise, pairwise  # noqa: F401
from plumbing.text import DESCRIBE, f1_parts, normalize, token_f1
from video_llm import Prefix, answer, load_model, reply_logprobs, token_scores

MAX_NARRATIVE_TOKENS = 64  # per clip


# --------------------------------------------------------------------------------------------------
# Scores and ranks of a group of answers
# --------------------------------------------------------------------------------------------------
def one_of_equals(answers):
    """For every answer, the place of the one that stands for it: of the answers in its group that
    are equal to it the shortest, whatever their order ("left" for "The left."). B lists of G
    strings -> B lists of G places."""
    out = []
    for group in answers:
        plain = {}
        for k in sorted(range(len(group)), key=lambda k: (len(group[k]), group[k])):
            plain.setdefault(normalize(group[k]), k)
        out.append([plain[normalize(a)] for a in group])
    return out


def differ(answers):
    """Which groups hold answers that differ, and so need an order? B lists of G strings -> (B,)."""
    return torch.tensor([len(set(places)) > 1 for places in one_of_equals(answers)])


def ranks_of(scores):
    """scores (B,G), higher is better -> ranks (B,G) long: the number of strictly better answers;
    ties share a rank."""
    return (scores.unsqueeze(1) > scores.unsqueeze(2)).sum(-1)


def places_of(ranks):
    """ranks (B,G) -> (B,G) float: the mean of the places 0..G-1 that an answer and those tied with
    it occupy."""
    tied = (ranks.unsqueeze(1) == ranks.unsqueeze(2)).sum(-1)
    return ranks + (tied - 1) / 2


def mean_rank(scores):
    """Scores of several raters, R x (B,G) -> (B,G): 1 - mean place / (G-1), 1 where all put an
    answer first."""
    places = torch.stack([places_of(ranks_of(s)) for s in scores]).mean(0)
    return 1 - places / max(scores[0].shape[1] - 1, 1)


def random_scores(answers, picks, step, seed):
    """Control: a random order of the distinct answers of each group, keyed like the rollouts."""
    rows = []
    for group, (i, n) in zip(answers, picks):
        draw = random.Random(f"{seed} {step} {i} {n} control" if n
                             else f"{seed} {step} {i} control")
        value = {a: draw.random() for a in dict.fromkeys(group)}
        rows.append([value[a] for a in group])
    return torch.tensor(rows)


# --------------------------------------------------------------------------------------------------
# What a judge and a reward model read
# --------------------------------------------------------------------------------------------------
def judge_prompt(question, first, second, narrative=None):
    """The comparison as (head, tail): all pairs of a group share the head, the narrative.

    Its parts are those of VLM-RLAIF's fig. 9 (narrative, instruction, two responses, which is
    preferred); the words are ours, theirs were not released. The judge replies with the *text* of
    the better response (D1). Answers stand on one line, or one could begin a "Response 2:".
    """
    head, first, second = narrative or "", flat(first), flat(second)
    return head, (f"\nResponse 1: {first}\nResponse 2: {second}\nWhich response is better?\n"
                  f"{as_text(question)}")


def as_text(question):
    """A question; one after earlier turns with all of them."""
    if isinstance(question, str):
        return question
    return "\n".join(turn["content"] for turn in question)


def reward_prompt(question, narrative=None, answer=None, own=None):
    """The judge's task, word for word: narrative, answer, the judge's `own` answer, question. What
    is None is left out."""
    responses = [(k, text) for k, text in ((1, answer), (2, own)) if text is not None]
    lines = [f"Response {k}: {flat(text)}" for k, text in responses]
    lines += ["Which response is better?"] * bool(lines)
    if isinstance(question, str):
        return "\n".join([*[narrative] * bool(narrative), *lines, question])
    *turns, last = question
    turns = [*turns, {**last, "content": "\n".join([*lines, last["content"]])}]
    if narrative:
        turns[0] = {**turns[0], "content": f"{narrative}\n{turns[0]['content']}"}
    return turns


def as_read(processor, answer, answer_first, max_tokens=None):
    """An answer as the reward model reads it, cut: its text on one line, or, where it stands last,
    its ids."""
    ids = processor.answer_ids(answer, max_tokens)
    if not answer_first:
        return ids
    whole = ids[-1] == processor.tokenizer.eos_token_id
    return flat(answer if whole else processor.tokenizer.decode(ids))


def cut_narrative(processor, question, narrative, own, video, answer_first, max_tokens=None):
    """The narrative as the reward model reads it: cut at its end, so that the prompt, whatever the
    answer, has at most `max_tokens` beside it. Question and judge's answer are never cut:
    ValueError where they alone have more."""
    beside = ("", own) if answer_first else ()
    prompt = lambda narrative: reward_prompt(question, narrative, *beside)
    length = lambda narrative: len(processor.prompt_ids(prompt(narrative), video))
    if max_tokens is None or (over := length(narrative) - max_tokens) <= 0:
        return narrative
    ids = processor.answer_ids(narrative or "")[:-1]
    for keep in range(len(ids) - over, 0, -1):  # text cut in two can take a token more
        narrative = processor.tokenizer.decode(ids[:keep]).strip()
        if length(narrative) <= max_tokens:
            return narrative
    if (least := length(None)) > max_tokens:
        raise ValueError(f"a prompt of {least} tokens without its narrative is longer than "
                         f"{max_tokens}")
    return None


def reward_batch(rows, clips, processor, cache, device, answer_first, max_prompt_tokens=None,
                 max_answer_tokens=None):
    """rows[b] = [(question, narrative, answer, judge's own answer or None), ...], about clips[b]
    (None: text only).

    -> Prefix of what the texts of a row have in common (video and narrative, at least), tokens
    (B,G,T) and lengths (B,G) of what differs; rows with fewer texts than the longest are filled up
    with an EOS each. The reward stands at a text's last token: of the prompt where the answer comes
    before the question, else of the answer (EOS). ValueError: see `cut_narrative`."""
    heads, tails = [], []
    for row, clip in zip(rows, clips):
        texts, narratives, video = [], {}, clip is not None
        for question, narrative, text, own in row:
            key = str(question), own  # the same narrative for all answers to a question
            if key not in narratives:
                narratives[key] = cut_narrative(processor, question, narrative, own, video,
                                                answer_first, max_prompt_tokens)
            read = as_read(processor, text, answer_first, max_answer_tokens)
            prompt = reward_prompt(question, narratives[key], *(read, own) if answer_first else ())
            texts.append(processor.prompt_ids(prompt, video) + ([] if answer_first else read))
        # equal texts keep a token each
        shared = len(os.path.commonprefix([ids[:-1] for ids in texts]))
        heads.append(texts[0][:shared])
        tails.append([ids[shared:] for ids in texts])
    G = max(map(len, tails))
    eos = [processor.tokenizer.eos_token_id]
    filled = [tail for row in tails for tail in row + [eos] * (G - len(row))]
    tokens = processor.pad(filled, "right")[0].view(len(rows), G, -1).to(device)
    lengths = torch.tensor([len(tail) for tail in filled], device=device).view(-1, G)
    videos = [clip for clip in clips if clip]
    features = cache(videos) if videos else (None, None)
    prefix = Prefix(*(x if x is None else x.to(device)
                      for x in (*processor.pad(heads, "left"), *features)))
    return prefix, tokens, lengths


# --------------------------------------------------------------------------------------------------
# Oracles
# --------------------------------------------------------------------------------------------------
class Oracle:
    """What all oracles have. A subclass scores: `score(videos, questions, answers)` -> scores
    (B,G), ok (B,)."""

    def rank(self, videos, questions, answers):
        """-> scores (B,G), higher is better; ranks (B,G) long, 0 = best, tied answers share the
        better place ("1224"); ok (B,) bool, False where the group could not be ranked: the caller
        counts it and masks it out."""
        scores, ok = self.score(videos, questions, answers)
        return scores, ranks_of(scores), ok


class ReferenceOracle(Oracle):
    """Token F1 against the labelled answer; a question without one cannot be ranked."""

    def __init__(self, records):
        self.answers = {(r["clip"], as_text(r["question"])): r["answer"] for r in records}

    def labels(self, videos, questions):
        return [self.answers.get((v, as_text(q))) for v, q in zip(videos, questions)]

    def score(self, videos, questions, answers):
        """-> F1 (B,G) float, ok (B,) bool."""
        refs = self.labels(videos, questions)
        rows = [[0.0 if ref is None else token_f1(a, ref) for a in group]
                for ref, group in zip(refs, answers)]
        return torch.tensor(rows), torch.tensor([ref is not None for ref in refs])

    def aspects(self, videos, questions, answers):
        """5 x precision, F1, recall, F1 against the label (B,G,4), which knows nothing of style. ok
        (B,)."""
        refs = self.labels(videos, questions)
        parts = lambda a, ref: (0.0, 0.0, 0.0) if ref is None else f1_parts(a, ref)
        # (B,G,3)
        rows = torch.tensor([[parts(a, ref) for a in group] for ref, group in zip(refs, answers)])
        return 5 * rows[..., [0, 1, 2, 1]], torch.tensor([ref is not None for ref in refs])


def readable_only(*width):
    """For methods that give a row of numbers (of `width` each) per answer: groups whose video
    cannot be read get zeros and ok False, and the run goes on."""
    def around(method):
        @functools.wraps(method)
        def scored(self, videos, questions, answers):
            bad = self.unreadable(videos)
            keep = [b for b, video in enumerate(videos) if video not in bad]
            out = torch.zeros(len(videos), len(answers[0]), *width)
            ok = torch.zeros(len(videos), dtype=torch.bool)
            if keep:
                out[keep], ok[keep] = method(self, *([x[b] for b in keep]
                                                     for x in (videos, questions, answers)))
            return out, ok
        return scored
    return around


def finite(scores):
    """Scores (B,..), zeros for a group in which one is no number; ok (B,), False for such
    groups."""
    ok = scores.flatten(1).isfinite().all(-1)
    return scores.masked_fill(~ok.view(-1, *[1] * (scores.ndim - 1)), 0), ok


class JudgeOracle(Oracle):
    """A video LLM compares answers two by two; `narrative=True` is the context-aware judge of
    VLM-RLAIF."""

    def __init__(self, model_dir, cache_dir, narrative, device="cpu", clips=3, max_frames=20,
                 tokens=16384, dtype="float32"):
        self.model, self.processor = load_model(model_dir, dtype=getattr(torch, dtype),
                                                device=device)
        self.model.requires_grad_(False).eval()
        self.cache = FeatureCache(self.model, self.processor, cache_dir)
        self.device, self.narrative, self.tokens = device, narrative, tokens
        self.clips, self.max_frames = clips, max_frames
        weights = hashlib.sha256(self.cache.setup.encode())
        for p in self.model.state_dict().values():
            weights.update(p.detach().cpu().float().numpy().tobytes())
        self.narrative_dir = Path(cache_dir) / "narratives" / weights.hexdigest()[:16]
        self.narrative_dir.mkdir(parents=True, exist_ok=True)
        self.known, self.checked = {}, {}

    def unreadable(self, videos):
        """Those of these videos that cannot be decoded, as a whole or in the parts that a narrative
        tells of: other frames than the policy's, which were checked before the run. Each is named
        once."""
        for video in dict.fromkeys(videos):
            if video in self.checked:
                continue
            reason = self.cache.prepare([video], progress=False).get(video)
            if self.narrative and not reason and not self.narrative_file(video).exists():
                try:
                    parts = self.cache.prepare(cut(video, self.clips), self.narrative_frames,
                                               progress=False)
                    reason = next(iter(parts.values()), None)
                except VideoError as e:  # its length is unknown
                    reason = str(e)
            if reason:
                print("the judge cannot see a video, what is asked about it is not scored: "
                      f"{reason}", file=sys.stderr)
            self.checked[video] = reason
        return {video for video in videos if self.checked[video]}

    @property
    def narrative_frames(self):
        return min(self.max_frames, self.processor.num_frames)

    # -- the narrative
    def narratives(self, videos):
        """One text per video: `clips` parts of equal length, each described greedily, joined; None
        for one that cannot be read. Kept in memory and on disk, so that a video is described once,
        also across resumed runs."""
        bad = self.unreadable(videos)
        for video in dict.fromkeys(videos):
            if video not in bad and video not in self.known and self.narrative_file(video).exists():
                self.known[video] = self.narrative_file(video).read_text(encoding="utf-8")
        new = [v for v in dict.fromkeys(videos) if v not in self.known and v not in bad]
        for i in range(0, len(new), 48):  # an interruption loses at most these
            some = new[i : i + 48]
            texts = self.describe([part for v in some for part in cut(v, self.clips)])
            for k, video in enumerate(some):
                self.known[video] = " ".join(texts[k * self.clips : (k + 1) * self.clips])
                files.write(self.narrative_file(video), self.known[video])
        return [self.known.get(v) for v in videos]

    def narrative_file(self, video):
        key = self.cache.key(video, self.max_frames)[:32]
        return self.narrative_dir / f"{key}-{self.clips}.txt"

    def describe(self, clips):
        return self.answer(clips, [DESCRIBE] * len(clips), self.narrative_frames)

    def answer(self, clips, questions, num_frames=None):
        """Greedy answers, one each."""
        prompt = max((len(self.processor.prompt_ids(q)) for q in questions), default=0)
        rows = max(1, self.tokens // (prompt + MAX_NARRATIVE_TOKENS))
        records = [dict(clip=clip, question=q) for clip, q in zip(clips, questions)]
        return answer(self.model, self.processor, self.cache, records, MAX_NARRATIVE_TOKENS, rows,
                      num_frames=num_frames)

    # -- comparisons
    @torch.no_grad()
    def preferences(self, videos, questions, answers):
        """P(answer i is better than answer j), (B,G,G), both orders averaged, so P_ij + P_ji = 1
        and P_ii = 1/2.

        All ordered pairs of *distinct* answers are compared."""
        B, G = len(answers), len(answers[0])
        first = one_of_equals(answers)
        comparisons = [(b, i, j) for b in range(B) for i in set(first[b]) for j in set(first[b])
                       if i != j]
        p = self.ask(comparisons, videos, questions, answers)
        prefers = torch.full((B, G, G), 0.5)
        for b in range(B):
            for i in range(G):
                for j in range(G):
                    a, c = first[b][i], first[b][j]
                    if a != c:
                        prefers[b, i, j] = (p[b, a, c] + 1 - p[b, c, a]) / 2
        return prefers

    def ask(self, comparisons, videos, questions, answers):
        """Comparisons [(b,i,j), ...] -> {(b,i,j): P(answer i | i shown first, j second)}. The two
        possible replies to a comparison are answer i and answer j."""
        narratives = self.narratives(videos) if self.narrative else [None] * len(videos)
        comparisons, groups = sorted(comparisons), []
        for b, pairs in groupby(comparisons, key=lambda comparison: comparison[0]):
            pairs = [(i, j) for _, i, j in pairs]
            heads, tails = zip(*(judge_prompt(questions[b], answers[b][i], answers[b][j],
                                              narratives[b])
                                 for i, j in pairs))
            head, *tails = self.processor.split_prompt_ids(heads[0], *tails)
            reply = {k: self.processor.answer_ids(answers[b][k]) for k in set(sum(pairs, ()))}
            texts = [(tail, reply[k]) for tail, pair in zip(tails, pairs) for k in pair]
            groups.append((videos[b], head, texts))
        logprobs = reply_logprobs(self.model, self.processor, self.cache, groups, self.tokens)
        return dict(zip(comparisons, torch.sigmoid(logprobs[0::2] - logprobs[1::2]).tolist()))

    @readable_only()
    def score(self, videos, questions, answers):
        """Mean probability of winning over the answers of the group, itself and its copies counted
        as 1/2 (B,G), ok (B,). Its mean over a group is 1/2: a score that is only comparable within
        one."""
        prefers = self.preferences(videos, questions, answers)
        # rounding: copies of one answer sum the same numbers in another order and must stay tied
        return finite(prefers.mean(-1).mul(1e5).round().div(1e5))

    # -- scores 0-5 per aspect
    @torch.no_grad()
    @readable_only(4)
    def aspects(self, videos, questions, answers):
        """[D4] Each answer on its own, whatever else is in its group, against the answer that the
        judge itself gives:

        relevance   5 x P(the answer was given to this question rather than to a request for a
                    description), both equally likely before.
        accuracy    5 x min(1, 2 P(the answer beats the judge's own)), both orders averaged.
        detail      5 x min(1, its words / those of the judge's own answer), each word once.
        clarity     5 x the geometric mean of the probabilities of its tokens, EOS included.
        -> (B,G,4) in [0,5], ok (B,)."""
        own = self.answer(videos, questions)
        groups = [[*group, mine] for group, mine in zip(answers, own)]
        one, G = one_of_equals(groups), len(answers[0])
        asked = [(b, i, f[G]) for b, f in enumerate(one) for i in set(f) - {f[G]}]
        p = self.ask(asked + [(b, j, i) for b, i, j in asked], videos, questions, groups)
        logprobs, lengths = self.logprobs(videos, questions, answers)
        elsewhere, _ = self.logprobs(videos, [DESCRIBE] * len(videos), answers)
        out = torch.empty(len(answers), G, 4)
        out[..., 0] = 5 * torch.sigmoid(logprobs - elsewhere)
        out[..., 3] = 5 * (logprobs / lengths).exp()
        for b, (group, f) in enumerate(zip(groups, one)):
            words = [len(set(normalize(a).split())) for a in group]
            for g in range(G):
                i, j = f[g], f[G]
                wins = 0.5 if i == j else (p[b, i, j] + 1 - p[b, j, i]) / 2
                out[b, g, 1] = 5 * min(1.0, 2 * float(wins))
                out[b, g, 2] = 5 * min(1.0, words[g] / max(words[G], 1))
        same = torch.tensor(one_of_equals(answers)).unsqueeze(-1).expand(-1, -1, 4)
        return finite(out.gather(1, same))

    def logprobs(self, videos, questions, answers):
        """log P(answer | video, question) summed over its tokens (B,G), and their number (B,G), EOS
        counted."""
        replies = [[self.processor.answer_ids(a) for a in group] for group in answers]
        groups = [(video, self.processor.prompt_ids(question), [([], reply) for reply in group])
                  for video, question, group in zip(videos, questions, replies)]
        totals = reply_logprobs(self.model, self.processor, self.cache, groups, self.tokens)
        counts = torch.tensor([[len(reply) for reply in group] for group in replies])
        return totals.view(counts.shape), counts


class RewardModelOracle(Oracle):
    """The reward of a model with a scalar head, trained on preferences by reward_model.py."""

    def __init__(self, model_dir, cache_dir, device="cpu", rows=24, loaded=None, dtype="float32",
                 tokens=16384):
        self.model, self.processor = loaded or load_model(model_dir, dtype=getattr(torch, dtype),
                                                          device=device)
        if not self.model.config.scalar_head:
            raise DataError(f"{model_dir}: no reward model (it has no scalar head)")
        if not loaded:  # a network that plays other roles, too, belongs to the caller
            self.model.requires_grad_(False).eval()
        self.cache = FeatureCache(self.model, self.processor, cache_dir)
        self.device, self.rows, self.narrator, self.crowded = device, rows, None, False
        try:
            about = json.loads(Path(model_dir, "reward_model.json").read_text())
            clips, model = int(about["narrative_clips"]), str(about["narrative_model"])
            self.narrative, self.guided = clips > 0, about["guided"]
            self.answer_first = about["answer_first"]
            # as in training
            self.limits = about.get("max_prompt_tokens"), about.get("max_answer_tokens")
        except (ValueError, LookupError, TypeError) as e:
            raise DataError(f"{model_dir}/reward_model.json: no narrative_clips, narrative_model, "
                            f"answer_first and guided ({e!r})") from None
        if self.narrative or self.guided:  # it reads this model's narratives and answers
            self.narrator = JudgeOracle(model, cache_dir, True, device, clips=max(clips, 1),
                                        tokens=tokens,
                                      dtype=dtype)
            self.narrated_by = model, self.narrator.clips

    def unreadable(self, videos):
        told = self.narrator.unreadable(videos) if self.narrator else set()
        return told | set(self.cache.prepare(videos, progress=False))

    @torch.no_grad()
    @readable_only()
    def score(self, videos, questions, answers):
        """-> rewards (B,G), ok (B,). [D2] Of equal answers one counts. ok False: a reward that is
        no number, a question for which its prompt has no room."""
        narratives = self.narrator.narratives(videos) if self.narrative else [None] * len(videos)
        owns = self.narrator.answer(videos, questions) if self.guided else [None] * len(videos)
        rows = [[(q, narrative, a, own) for a in group]
                for q, narrative, own, group in zip(questions, narratives, owns, answers)]
        fit = [b for b, row in enumerate(rows) if self.has_room(*row[0])]
        rewards = torch.full((len(rows), len(rows[0])), math.nan)
        for n in range(0, len(fit), self.rows):
            some = fit[n : n + self.rows]
            prefix, tokens, lengths = reward_batch([rows[b] for b in some],
                                                   [videos[b] for b in some], self.processor,
                                                   self.cache, self.device, self.answer_first,
                                                   *self.limits)
            values = token_scores(self.model, prefix, tokens, lengths).view(tokens.shape)  # (B,G,T)
            rewards[some] = values.gather(-1, lengths.unsqueeze(-1) - 1).squeeze(-1).cpu()
        return finite(rewards.gather(1, torch.tensor(one_of_equals(answers))))

    def has_room(self, question, narrative, _, own):
        try:
            cut_narrative(self.processor, question, narrative, own, True, self.answer_first,
                          self.limits[0])
        except ValueError as e:
            if not self.crowded:
                print(f"the reward model does not score a question: {e}; more of the kind are "
                      "masked unsaid",
                      file=sys.stderr)
            self.crowded = True
            return False
        return True


def cut(clip, parts):
    """A clip in `parts` clips of equal length. Raises VideoError."""
    start, end = clip_seconds(clip)
    edges = np.linspace(start, end, parts + 1).tolist()
    return [Clip(clip.path, a, b) for a, b in zip(edges, edges[1:])]


class ApiOracle(Oracle):
    """A server ranks, group by group, many groups at the same time. `counters`: what it cost and
    what was masked."""

    def __init__(self, client, mode="listwise", frames=8, size=336, max_tokens=512, seed=0):
        self.client, self.frames, self.size = client, frames, size
        self.max_tokens, self.seed = max_tokens, seed
        self.order = dict(listwise=listwise, pairwise=pairwise)[mode]
        self.masked = Counter()

    @property
    def counters(self):
        return {key: self.client.counts[key] + self.masked[key.removeprefix("masked_")]
                for key in COUNTERS}

    def each_group(self, ask, videos, questions, answers):
        """ask(images, question, answers) -> one value per answer, for the *distinct* answers of
        every group (D1). -> [{normalized answer: value}], None for a group that got no usable
        reply; ApiError where asking is futile."""

        def one(video, question, group):
            places = sorted(set(one_of_equals([group])[0]), key=lambda k: group[k])
            # in another order it is the same request
            distinct = {normalize(group[k]): group[k] for k in places}
            try:
                images = frames_as_urls(video, self.frames, self.size)
                return dict(zip(distinct, ask(images, question, list(distinct.values()))))
            except (ApiError, VideoError) as e:
                if getattr(e, "fatal", False):
                    raise
                return e

        with ThreadPoolExecutor(self.client.concurrency) as pool:
            try:
                out = list(pool.map(one, videos, questions, answers))
            finally:
                pool.shutdown(cancel_futures=True)  # of a futile call the rest is not asked
        for e in (e for e in out if isinstance(e, Exception)):
            reason = getattr(e, "reason", "no_video")
            if not self.masked[reason]:
                print(f"oracle: a group is masked ({reason}): {e}; more of the kind are only "
                      "counted", file=sys.stderr)
            self.masked[reason] += 1
        return [None if isinstance(e, Exception) else e for e in out]

    def table(self, groups, answers, blank):
        rows = [[blank if g is None else g[normalize(a)] for a in group]
                for g, group in zip(groups, answers)]
        return torch.tensor(rows), torch.tensor([g is not None for g in groups])

    def score(self, videos, questions, answers):
        """-> scores (B,G) in [0,1], ok (B,). A group of equal answers is tied without a request."""
        order = functools.partial(self.order, self.client, seed=self.seed,
                                  max_tokens=self.max_tokens)
        ask = lambda images, question, some: [0.5] if len(some) == 1 else order(images, question,
                                                                                some)
        return self.table(self.each_group(ask, videos, questions, answers), answers, 0.0)

    def aspects(self, videos, questions, answers):
        """-> (B,G,4) in [0,5], ok (B,): each distinct answer is scored by a request of its own."""
        ask = functools.partial(aspects, self.client, max_tokens=self.max_tokens)
        return self.table(self.each_group(ask, videos, questions, answers), answers, [0.0] * 4)


# --------------------------------------------------------------------------------------------------
# Several raters; which oracle
# --------------------------------------------------------------------------------------------------
class MeanRankOracle(Oracle):
    """[D3] Several raters: 1 for an answer that all of them put first, 0 for one that all put
    last."""

    def __init__(self, raters):
        self.raters = raters  # {name: oracle}

    @property
    def counters(self):
        counts = [rater.counters for rater in self.raters.values() if hasattr(rater, "counters")]
        return {key: sum(c[key] for c in counts) for key in COUNTERS} if counts else {}

    def score(self, videos, questions, answers):
        scores, oks = zip(*(rater.score(videos, questions, answers)
                            for rater in self.raters.values()))
        return mean_rank(scores), torch.stack(oks).all(0)

    def aspects(self, videos, questions, answers):
        points, oks = zip(*(rater.aspects(videos, questions, answers)
                            for rater in self.raters.values()))
        return torch.stack(points).mean(0), torch.stack(oks).all(0)


def make_oracle(args, records, device="cpu", names=None, loaded=None):
    """The oracle of `args.oracle`, or of the list `names`. args: OracleArgs with `cache` and
    `seed`; records: labelled records, read by `reference` alone; loaded: (model, processor) of the
    reward model, where the caller has it in memory already. OSError, DataError: a model is not
    there or not what it should be."""
    raters, judge = {}, None
    for name in names or args.raters:
        if name == "reference":
            raters[name] = ReferenceOracle(records)
        elif name == "reward_model":
            raters[name] = RewardModelOracle(args.reward_model, args.cache, device, loaded=loaded,
                                             dtype=args.oracle_dtype, tokens=args.oracle_tokens)
        elif name == "api":
            client = ApiClient(args.api_url, args.api_model, args.cache, args.api_concurrency,
                               args.api_timeout,
                               args.api_retries, extra=args.api_extra)
            raters[name] = ApiOracle(client, args.api_mode, args.api_frames, args.api_size,
                                     args.api_max_tokens,
                                     args.seed)
        else:
            judge = copy.copy(judge) or JudgeOracle(  # one model for both
                args.oracle_model, args.cache, False, device, dtype=args.oracle_dtype,
                tokens=args.oracle_tokens)
            judge.narrative = name == "context"
            raters[name] = judge
    return raters[name] if len(raters) == 1 else MeanRankOracle(raters)


def log_counts(log, oracle):
    """What a server cost since the last call and which groups were masked why: sums over all
    processes."""
    counters = getattr(oracle, "counters", None)
    if counters:  # only oracles that ask a server have some
        before = getattr(oracle, "logged", Counter())
        for key in COUNTERS:
            log.add(f"oracle/{key}", counters[key] - before[key], 1 / flags.world_size())
        oracle.logged = Counter(counters)
