"""Everything that ranks, judges or describes: the oracles of Oracle-RLAIF, and how far they agree with the truth.

    ranks, ok = oracle.rank(videos, questions, answers)      # B clips, B strings, B lists of G strings
    scores, ok = oracle.score(videos, questions, answers)    # (B,G), higher is better: what `rank` sorts
    points, ok = oracle.aspects(videos, questions, answers)  # (B,G,4) in [0,5]: relevance, accuracy, detail, clarity

ranks (B,G) long, 0 = best, tied answers share the better place ("1224"); ok (B,) bool, False where the oracle could
not rank a group (no label, no reply, a video that cannot be read): the caller *counts it and masks it out*.

  reference   token F1 against the labelled answer. An upper bound and a test double; not RLAIF.
  judge       a model compares two answers; its choice is read from the log-probabilities of the two replies (D1), both
              orders averaged, so that a preference for the first place cancels.      [OR Fig. 1; VLM-RLAIF Sec. 3.1]
  context     the same with a narrative: the video cut into 3 clips of at most 20 frames, each described with 'Describe
              this video in detail', joined and put before the question.              [VLM-RLAIF Sec. 3.1]
  reward_     a checkpoint of reward_model.py: its reward, read where it was trained to be read, with the narrative and
    model     the judge's own answer if it was trained with them.                     [VLM-RLAIF Sec. 3.2]
  api         a server (api_oracle.py) sees frames, question and answers, and ranks them all at once or two by two.
  a,b,...     several raters: the mean of their ranks (D3).

The oracle is a model of its own (`--oracle_model`), in life a stronger one than the policy.

    python oracle.py --demo                                     five answers to one clip, ranked by every oracle
    python oracle.py --checkpoint runs/sft/policy_s0/final      agreement with the truth on a policy's own answers

D1      the judge's two possible replies are the responses themselves, not the labels "1" and "2". A label is a pointer:
        at the size of `tiny` it stayed at chance for as long as it takes to learn to answer, while naming the better
        response is question answering with two options and is learned along with it.
D2      identical answers (after `normalize`) are compared once, as the shortest of them, and tied; nothing else is.
D3      raters are averaged by mean place; a group that one of them cannot rank is masked, because a mean over fewer
        raters is on another scale.
D4      Iter-W2S asks GPT-4o for a score per aspect; its prompts are not public, and a judge that can only choose
        between two answers has no scale of 0 to 5. `JudgeOracle.aspects` says what stands in for each; `api` asks.

Papers  [OR] Oracle-RLAIF arXiv:2510.02561    VLM-RLAIF arXiv:2402.03746    Iter-W2S-RLAIF arXiv:2411.16201
"""

import copy
import functools
import hashlib
import json
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from transformers.hf_argparser import HfArg

from flags import ORACLES, REWARD_MODEL, SCORERS, WORLD, OracleArgs, answer_help, at_least, parse_args


@dataclass
class Args(OracleArgs):
    oracle: str = HfArg(default="judge,context", help=f"of {', '.join(ORACLES)}; several: each and their mean rank")
    demo: bool = HfArg(default=False, help="rank five answers to one clip of the embedded world by every oracle")
    checkpoint: str = HfArg(default="runs/sft/policy_s0/final", help="the policy whose sampled answers are ranked")
    data: str = HfArg(default=f"{WORLD}/test.json", help="labelled questions")
    questions: int = HfArg(default=500, help="how many of them, drawn by --seed")
    G: int = HfArg(default=5, help="answers per question, sampled at temperature 1")
    seed: int = HfArg(default=0, help="choice of questions, sampled answers, order in which a server sees them")
    cache: str = HfArg(default="cache", help="folder of cached CLIP features, narratives and replies of servers")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, G=2, questions=1, seed=0)


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch

import harness
from api_client import ApiClient, ApiError
from api_oracle import ASPECTS, COUNTERS, ApiOracle
from data import Clip, DataError, FeatureCache, read_records
from frames import VideoError, clip_seconds
from packing import tree_rows, trees
from preferences import one_line, reward_batch, told
from ranks import (
    differ,
    f1_parts,
    final_answer,
    kendall_tau,
    mean_rank,
    normalize,
    one_of_equals,
    pairwise_accuracy,
    ranks_of,
    token_f1,
)
from rollouts import batches
from video_llm import Prefix, generate, load_model, mask_kind, token_scores

DESCRIBE = "Describe this video in detail"  # VLM-RLAIF Sec. 3.1
MAX_NARRATIVE_TOKENS = 64  # per clip


def judge_prompt(question, first, second, narrative=None):
    """The comparison as (head, tail): the head is shared by every pair of a group, the tail differs from pair to pair.

    Its parts are those of VLM-RLAIF's fig. 9 (narrative, instruction, two responses, which is preferred); the words are
    ours, their text was not released. The judge replies with the *text* of the better response, not with its number:
    see D1.
    """
    head, first, second = narrative or "", one_line(first), one_line(second)
    return head, f"\nResponse 1: {first}\nResponse 2: {second}\nWhich response is better?\n{as_text(question)}"


def as_text(question):
    """A question; one after earlier turns with all of them."""
    return question if isinstance(question, str) else "\n".join(turn["content"] for turn in question)


# ---------------------------------------------------------------------------------------------------------------
# Oracles
# ---------------------------------------------------------------------------------------------------------------
class ReferenceOracle:
    """Token F1 against the labelled answer; a question without one cannot be ranked."""

    def __init__(self, records):
        self.answers = {(r["clip"], as_text(r["question"])): r["answer"] for r in records}

    def labels(self, videos, questions):
        return [self.answers.get((v, as_text(q))) for v, q in zip(videos, questions)]

    def score(self, videos, questions, answers):
        """-> F1 (B,G) float, ok (B,) bool."""
        refs = self.labels(videos, questions)
        rows = [[0.0 if ref is None else token_f1(a, ref) for a in group] for ref, group in zip(refs, answers)]
        return torch.tensor(rows), torch.tensor([ref is not None for ref in refs])

    def rank(self, videos, questions, answers):
        scores, ok = self.score(videos, questions, answers)
        return ranks_of(scores), ok

    def aspects(self, videos, questions, answers):
        """5 x precision, F1, recall, F1 against the label (B,G,4), which knows nothing of style. ok (B,)."""
        refs = self.labels(videos, questions)
        parts = lambda a, ref: (0.0, 0.0, 0.0) if ref is None else f1_parts(a, ref)
        rows = torch.tensor([[parts(a, ref) for a in group] for ref, group in zip(refs, answers)])  # (B,G,3)
        return 5 * rows[..., [0, 1, 2, 1]], torch.tensor([ref is not None for ref in refs])


def readable_only(*width):
    """For methods that give a row of numbers (of `width` each) per answer: groups whose video cannot be read get zeros
    and ok False, and the run goes on."""
    def around(method):
        @functools.wraps(method)
        def scored(self, videos, questions, answers):
            bad = self.unreadable(videos)
            keep = [b for b, video in enumerate(videos) if video not in bad]
            out, ok = torch.zeros(len(videos), len(answers[0]), *width), torch.zeros(len(videos), dtype=torch.bool)
            if keep:
                out[keep], ok[keep] = method(self, *([x[b] for b in keep] for x in (videos, questions, answers)))
            return out, ok
        return scored
    return around


def finite(scores):
    """Scores (B,..), zeros for a group in which one is no number; ok (B,), False for such groups."""
    ok = scores.flatten(1).isfinite().all(-1)
    return scores.masked_fill(~ok.view(-1, *[1] * (scores.ndim - 1)), 0), ok


class JudgeOracle:
    """A video LLM compares answers two by two; `narrative=True` is the context-aware judge of VLM-RLAIF."""

    def __init__(self, model_dir, cache_dir, narrative, device="cpu", clips=3, max_frames=20,
                 tokens=16384, dtype="float32"):
        self.model, self.processor = load_model(model_dir, dtype=getattr(torch, dtype), device=device)
        self.model.requires_grad_(False).eval()
        self.cache = FeatureCache(self.model, self.processor, cache_dir)
        self.device, self.narrative, self.tokens = device, narrative, tokens
        self.clips, self.max_frames = clips, max_frames
        weights = hashlib.sha256(self.cache.setup.encode())
        for p in self.model.state_dict().values():
            weights.update(p.detach().cpu().float().numpy().tobytes())
        self.story_dir = Path(cache_dir) / "narratives" / weights.hexdigest()[:16]
        self.story_dir.mkdir(parents=True, exist_ok=True)
        self.told, self.checked = {}, {}

    def unreadable(self, videos):
        """Those of these videos that cannot be decoded, as a whole or in the parts that a narrative tells of: other
        frames than the policy's, which were checked before the run. Each is named once."""
        for video in dict.fromkeys(videos):
            if video in self.checked:
                continue
            reason = self.cache.prepare([video], progress=False).get(video)
            if self.narrative and not reason and not self.story_file(video).exists():
                try:
                    parts = self.cache.prepare(cut(video, self.clips), self.told_frames, progress=False)
                    reason = next(iter(parts.values()), None)
                except VideoError as e:  # its length is unknown
                    reason = str(e)
            if reason:
                print(f"the judge cannot see a video, what is asked about it is not scored: {reason}", file=sys.stderr)
            self.checked[video] = reason
        return {video for video in videos if self.checked[video]}

    @property
    def told_frames(self):
        return min(self.max_frames, self.processor.num_frames)

    # -- the narrative ------------------------------------------------------------------------------------------
    def narratives(self, videos):
        """One text per video: `clips` parts of equal length, each described greedily, joined; None for one that cannot
        be read. Kept in memory and on disk, so that a video is described once, also across resumed runs."""
        bad = self.unreadable(videos)
        for video in dict.fromkeys(videos):
            if video not in bad and video not in self.told and self.story_file(video).exists():
                self.told[video] = self.story_file(video).read_text(encoding="utf-8")
        new = [v for v in dict.fromkeys(videos) if v not in self.told and v not in bad]
        for i in range(0, len(new), 48):  # an interruption loses at most these
            some = new[i : i + 48]
            texts = self.describe([part for v in some for part in cut(v, self.clips)])
            for k, video in enumerate(some):
                self.told[video] = " ".join(texts[k * self.clips : (k + 1) * self.clips])
                harness.write(self.story_file(video), self.told[video])
        return [self.told.get(v) for v in videos]

    def story_file(self, video):
        return self.story_dir / f"{self.cache.key(video, self.max_frames)[:32]}-{self.clips}.txt"

    def describe(self, clips):
        return self.answer(clips, [DESCRIBE] * len(clips), self.told_frames)

    def answer(self, clips, questions, num_frames=None):
        """Greedy answers, one each."""
        prompt = max((len(self.processor.prompt_ids(q)) for q in questions), default=0)
        out, rows = [], max(1, self.tokens // (prompt + MAX_NARRATIVE_TOKENS))
        for n in range(0, len(clips), rows):
            some = slice(n, n + rows)
            prefix = Prefix.build(self.processor, self.cache, questions[some], clips[some], self.device,
                                  num_frames=num_frames)
            uniforms = torch.zeros(len(clips[some]), 1, MAX_NARRATIVE_TOKENS)  # unread: temperature 0
            eos = self.processor.tokenizer.eos_token_id
            tokens, lengths, _ = generate(self.model, prefix, uniforms, eos, temperature=0)
            out += [group[0] for group in self.processor.decode_answers(tokens, lengths)]
        return out

    # -- comparisons --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def preferences(self, videos, questions, answers):
        """P(answer i is better than answer j), (B,G,G), both orders averaged, so P_ij + P_ji = 1 and P_ii = 1/2.

        All ordered pairs of *distinct* answers are compared.
        """
        B, G = len(answers), len(answers[0])
        one = one_of_equals(answers)
        asked = [(b, i, j) for b in range(B) for i in set(one[b]) for j in set(one[b]) if i != j]
        p = self.ask(asked, videos, questions, answers)
        prefers = torch.full((B, G, G), 0.5)
        for b in range(B):
            for i in range(G):
                for j in range(G):
                    f, g = one[b][i], one[b][j]
                    if f != g:
                        prefers[b, i, j] = (p[b, f, g] + 1 - p[b, g, f]) / 2
        return prefers

    def ask(self, asked, videos, questions, answers):
        """Comparisons [(b,i,j), ...] -> {(b,i,j): P(answer i | i shown first, j second)}. The two
        possible replies to a comparison are answer i and answer j."""
        stories = self.narratives(videos) if self.narrative else [None] * len(videos)
        asked, groups = sorted(asked), []
        for b, pairs in groupby(asked, key=lambda comparison: comparison[0]):
            pairs = [(i, j) for _, i, j in pairs]
            heads, tails = zip(*(judge_prompt(questions[b], answers[b][i], answers[b][j], stories[b])
                                 for i, j in pairs))
            head, *tails = self.processor.split_prompt_ids(heads[0], *tails)
            reply = {k: self.processor.answer_ids(answers[b][k]) for k in set(sum(pairs, ()))}
            texts = [(tail, reply[k]) for tail, pair in zip(tails, pairs) for k in pair]
            groups.append((videos[b], head, texts))
        logprobs = self.reply_logprobs(groups)
        return dict(zip(asked, torch.sigmoid(logprobs[0::2] - logprobs[1::2]).tolist()))

    def reply_logprobs(self, groups):
        """log P(reply | video, head, text), summed over the reply's tokens, for all replies of all
        groups. A group is (video, head, [(text, reply), ...]), everything but the video in ids.

        A group is one row of a batch: its video, its head and what its texts begin with are
        computed once. A batch has at most `tokens` tokens, padding included. A longer group is cut.
        """
        rows = [(video, head, tree) for video, head, texts in groups
                for tree in trees(texts, self.tokens - len(head))]
        lengths = torch.tensor([len(head) + len(tree.ids) for _, head, tree in rows])
        out, pad_id = [None] * len(rows), self.processor.tokenizer.pad_token_id
        for batch in batches(lengths, self.tokens, stretch=1.25):
            videos, heads, batch_trees = zip(*(rows[i] for i in batch))
            features, frame_mask = (x.to(self.device) for x in self.cache(videos))
            inputs, (row, column, token) = tree_rows(heads, batch_trees, pad_id,
                                                     *mask_kind(self.model), self.device)
            logits = self.model(**inputs, video_features=features, frame_mask=frame_mask).logits
            logprobs = logits[row, column, token].float()
            logprobs -= logits.float().logsumexp(-1)[row, column]
            lengths_of = [len(reply) for tree in batch_trees for _, reply in tree.texts]
            sums = iter([part.sum().item() for part in logprobs.cpu().split(lengths_of)])
            for i, tree in zip(batch, batch_trees):
                out[i] = [next(sums) for _ in tree.texts]
        return torch.tensor(sum(out, []))

    @readable_only()
    def score(self, videos, questions, answers):
        """Mean probability of winning over the answers of the group, itself and its copies counted as 1/2 (B,G), ok
        (B,). Its mean over a group is 1/2: a score that is only comparable within one."""
        prefers = self.preferences(videos, questions, answers)
        # rounding: copies of one answer sum the same numbers in another order and must stay tied
        return finite(prefers.mean(-1).mul(1e5).round().div(1e5))

    def rank(self, videos, questions, answers):
        scores, ok = self.score(videos, questions, answers)
        return ranks_of(scores), ok

    # -- scores 0-5 per aspect ----------------------------------------------------------------------------------
    @torch.no_grad()
    @readable_only(4)
    def aspects(self, videos, questions, answers):
        """[D4] Each answer on its own, whatever else is in its group, against the answer that the judge itself gives:

        relevance   5 x P(the answer was given to this question rather than to 'Describe this video in detail'), both
                    equally likely before: an answer of the wrong kind is no likelier here than there.
        accuracy    5 x min(1, 2 P(the answer beats the judge's own)): 5 where it holds its own, both orders averaged.
        detail      5 x min(1, its words / those of the judge's own answer), each word once: more words bring nothing.
        clarity     5 x the geometric mean of the probabilities of its tokens, EOS included: is it put, and ended, as
                    the judge would.
        -> (B,G,4) in [0,5], ok (B,).
        """
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
        """log P(answer | video, question) summed over its tokens (B,G), and their number (B,G), EOS counted."""
        replies = [[self.processor.answer_ids(a) for a in group] for group in answers]
        totals = self.reply_logprobs([
            (video, self.processor.prompt_ids(question), [([], reply) for reply in group])
            for video, question, group in zip(videos, questions, replies)])
        counts = torch.tensor([[len(reply) for reply in group] for group in replies])
        return totals.view(counts.shape), counts


class RewardModelOracle:
    """The reward of a model with a scalar head, trained on preferences by reward_model.py."""

    def __init__(self, model_dir, cache_dir, device="cpu", rows=24, loaded=None, dtype="float32",
                 tokens=16384):
        self.model, self.processor = loaded or load_model(model_dir, dtype=getattr(torch, dtype), device=device)
        if not self.model.config.scalar_head:
            raise DataError(f"{model_dir}: no reward model (it has no scalar head)")
        if not loaded:  # a network that plays other roles, too, belongs to the caller
            self.model.requires_grad_(False).eval()
        self.cache = FeatureCache(self.model, self.processor, cache_dir)
        self.device, self.rows, self.teller, self.crowded = device, rows, None, False
        try:
            about = json.loads(Path(model_dir, "reward_model.json").read_text())
            clips, model = int(about["narrative_clips"]), str(about["narrative_model"])
            self.narrative, self.answer_first, self.guided = clips > 0, about["answer_first"], about["guided"]
            self.limits = about.get("max_prompt_tokens"), about.get("max_answer_tokens")  # as in training
        except (ValueError, LookupError, TypeError) as e:
            raise DataError(f"{model_dir}/reward_model.json: no narrative_clips, narrative_model, answer_first and "
                            f"guided ({e!r})") from None
        if self.narrative or self.guided:  # it reads this model's narratives and answers
            self.teller = JudgeOracle(model, cache_dir, True, device, clips=max(clips, 1), tokens=tokens,
                                      dtype=dtype)
            self.told_by = model, self.teller.clips

    def unreadable(self, videos):
        told = self.teller.unreadable(videos) if self.teller else set()
        return told | set(self.cache.prepare(videos, progress=False))

    @torch.no_grad()
    @readable_only()
    def score(self, videos, questions, answers):
        """-> rewards (B,G), ok (B,). [D2] Of equal answers one counts. ok False: a reward that is no number, a question
        for which its prompt has no room."""
        stories = self.teller.narratives(videos) if self.narrative else [None] * len(videos)
        owns = self.teller.answer(videos, questions) if self.guided else [None] * len(videos)
        rows = [[(q, story, a, own) for a in group]
                for q, story, own, group in zip(questions, stories, owns, answers)]
        fit = [b for b, row in enumerate(rows) if self.has_room(*row[0])]
        rewards = torch.full((len(rows), len(rows[0])), math.nan)
        for n in range(0, len(fit), self.rows):
            some = fit[n : n + self.rows]
            prefix, tokens, lengths = reward_batch([rows[b] for b in some], [videos[b] for b in some], self.processor,
                                                   self.cache, self.device, self.answer_first, *self.limits)
            values = token_scores(self.model, prefix, tokens, lengths).view(tokens.shape)  # (B,G,T)
            rewards[some] = values.gather(-1, lengths.unsqueeze(-1) - 1).squeeze(-1).cpu()
        return finite(rewards.gather(1, torch.tensor(one_of_equals(answers))))

    def has_room(self, question, narrative, _, own):
        try:
            told(self.processor, question, narrative, own, True, self.answer_first, self.limits[0])
        except ValueError as e:
            if not self.crowded:
                print(f"the reward model does not score a question: {e}; more of the kind are masked unsaid",
                      file=sys.stderr)
            self.crowded = True
            return False
        return True

    def rank(self, videos, questions, answers):
        scores, ok = self.score(videos, questions, answers)
        return ranks_of(scores), ok


class MeanRankOracle:
    """[D3] Several raters: 1 for an answer that all of them put first, 0 for one that all put last."""

    def __init__(self, raters):
        self.raters = raters  # {name: oracle}

    @property
    def counters(self):
        counts = [rater.counters for rater in self.raters.values() if hasattr(rater, "counters")]
        return {key: sum(c[key] for c in counts) for key in COUNTERS} if counts else {}

    def score(self, videos, questions, answers):
        scores, oks = zip(*(rater.score(videos, questions, answers) for rater in self.raters.values()))
        return mean_rank(scores), torch.stack(oks).all(0)

    def rank(self, videos, questions, answers):
        scores, ok = self.score(videos, questions, answers)
        return ranks_of(scores), ok

    def aspects(self, videos, questions, answers):
        points, oks = zip(*(rater.aspects(videos, questions, answers) for rater in self.raters.values()))
        return torch.stack(points).mean(0), torch.stack(oks).all(0)


def cut(clip, parts):
    """A clip in `parts` clips of equal length. Raises VideoError."""
    start, end = clip_seconds(clip)
    edges = np.linspace(start, end, parts + 1).tolist()
    return [Clip(clip.path, a, b) for a, b in zip(edges, edges[1:])]


def make_oracle(args, records, device="cpu", names=None, loaded=None):
    """The oracle of `args.oracle`, or of the list `names`. args: OracleArgs with `cache` and `seed`; records: labelled
    records, read by `reference` alone; loaded: (model, processor) of the reward model, where the caller has it in
    memory already. OSError, DataError: a model is not there or not what it should be."""
    raters, judge = {}, None
    for name in names or args.raters:
        if name == "reference":
            raters[name] = ReferenceOracle(records)
        elif name == "reward_model":
            raters[name] = RewardModelOracle(args.reward_model, args.cache, device, loaded=loaded,
                                             dtype=args.oracle_dtype, tokens=args.oracle_tokens)
        elif name == "api":
            client = ApiClient(args.api_url, args.api_model, args.cache, args.api_concurrency, args.api_timeout,
                               args.api_retries, extra=args.api_extra)
            raters[name] = ApiOracle(client, args.api_mode, args.api_frames, args.api_size, args.api_max_tokens,
                                     args.seed)
        else:
            judge = copy.copy(judge) or JudgeOracle(  # one model for both
                args.oracle_model, args.cache, False, device, dtype=args.oracle_dtype,
                tokens=args.oracle_tokens)
            judge.narrative = name == "context"
            raters[name] = judge
    return raters[name] if len(raters) == 1 else MeanRankOracle(raters)


def build_oracle(args, rank, names=None):
    """Build the models of the embedded default, judge and reward model, where `args.oracle`, or `names`, needs them."""
    if {"judge", "context"} & set(names or args.raters):
        harness.ship_weights([args.oracle_model], rank)
    if "reward_model" in (names or args.raters) and args.reward_model == REWARD_MODEL:
        harness.build_if_missing(REWARD_MODEL, ["reward_model.py", "--resume"], "several minutes", rank)


def log_counts(log, oracle):
    """What a server cost since the last call and which groups were masked why: sums over all processes."""
    counters = getattr(oracle, "counters", None)
    if counters:  # only oracles that ask a server have some
        before = getattr(oracle, "logged", Counter())
        for key in COUNTERS:
            log.add(f"oracle/{key}", counters[key] - before[key], 1 / harness.world_size())
        oracle.logged = Counter(counters)


# ---------------------------------------------------------------------------------------------------------------
# See for yourself
# ---------------------------------------------------------------------------------------------------------------
def demo(args):
    """Five answers to one clip: the label, the label with a full stop, half of it, none of it, and one that is beside
    the point; ranked, and scored by aspect, by every oracle that can be asked here."""
    harness.build_if_missing(f"{WORLD}/clips.json", ["moving_shapes.py"], "under a minute", 0)
    with harness.one_line_errors(DataError, OSError):
        records = [r for r in read_records([f"{WORLD}/test.json"])[0] if str(r["question"]).startswith("where is")]
        record, others = records[0], {r["answer"] for r in records}
        names = ["reference", "judge", "context"]
        names += ["reward_model"] if Path(args.reward_model).exists() else []
        names += ["api"] if args.api_url else []
        build_oracle(args, rank=0, names=names)
        oracle = make_oracle(args, [record], names=names)
    share = lambda a: len(set(a.split()) & set(record["answer"].split()))
    half, none = (min(a for a in others if share(a) == n) for n in (1, 0))
    answers = ["a circle", none, half, f"The {record['answer']}.", record["answer"]]
    question, asked = record["question"], ([record["clip"]], [record["question"]], [answers])
    print(f"{record['clip'].path}   {question}   label: {record['answer']}")
    print(f"\nthe narrative, which `context` sees:\n    {oracle.raters['context'].narratives(asked[0])[0]}")
    prompt = "".join(judge_prompt(question, answers[3], answers[2])).replace("\n", "\n    ")
    print(f"a comparison, as `judge` sees it behind the video:{prompt}\n")
    table, points = {}, {}
    with harness.one_line_errors(ApiError):
        for name, rater in [*oracle.raters.items(), ("mean rank", oracle)]:
            (scores,), (ok,) = rater.score(*asked)
            rows = zip(scores.tolist(), ranks_of(scores[None])[0].tolist())
            table[name] = [f"{s:.2f} ({r})" for s, r in rows] if ok else ["masked"] * len(answers)
            if name in SCORERS:
                (rows,), (ok,) = rater.aspects(*asked)
                points[name] = [" ".join(f"{x:4.1f}" for x in row) if ok else "masked" for row in rows.tolist()]
    width = max(map(len, answers)) + 2
    for head, rows, wide in (("score (rank)", table, 14), (f"0-5: {', '.join(ASPECTS)}", points, 22)):
        print(f"{head}\n{'':{width}}" + "".join(f"{name:>{wide}}" for name in rows))
        for k, a in enumerate(answers):
            print(f"{a:{width}}" + "".join(f"{cells[k]:>{wide}}" for cells in rows.values()))


# ---------------------------------------------------------------------------------------------------------------
# How far does an oracle agree with the truth?
# ---------------------------------------------------------------------------------------------------------------
def agreement(args):
    """Sampled answers of a policy, ranked by each oracle and by all together, against the labels."""
    with harness.one_line_errors(DataError, OSError):
        records = [r for r in read_records([args.data])[0] if r["clip"] and r["question"] != DESCRIBE]
        model, processor = load_model(args.checkpoint)
        build_oracle(args, rank=0)
        oracle = make_oracle(args, records)
    records = random.Random(args.seed).sample(records, min(args.questions, len(records)))
    clips, questions = [r["clip"] for r in records], [r["question"] for r in records]
    cache, answers = FeatureCache(model, processor, args.cache), []
    for i in range(0, len(records), 50):
        prefix = Prefix.build(processor, cache, questions[i : i + 50], clips[i : i + 50])
        uniforms = np.random.default_rng([args.seed, i]).random((len(prefix.input_ids), args.G, 16))
        tokens, lengths, _ = generate(model, prefix, torch.from_numpy(uniforms), processor.tokenizer.eos_token_id)
        answers += processor.decode_answers(tokens, lengths)
    said = lambda text: normalize(final_answer(text))
    labels = [said(r["answer"]) for r in records]
    correct = torch.tensor([[said(a) == x for a in g] for x, g in zip(labels, answers)])
    truth, _ = ReferenceOracle(records).score(clips, questions, answers)  # token F1 with the label
    print(f"{len(records)} questions x {args.G} answers of {args.checkpoint}: {correct.float().mean():.1%} right; "
          f"{(correct.all(1) | ~correct.any(1)).float().mean():.1%} of the groups all right or all wrong")
    seen = {}
    for name, rater in getattr(oracle, "raters", {args.oracle: oracle}).items():
        began = time.time()
        with harness.one_line_errors(ApiError):
            seen[name] = (*rater.score(clips, questions, answers), time.time() - began, getattr(rater, "counters", {}))
        if not (seen[name][1] & differ(answers)).any():  # equal answers are tied unasked
            sys.exit(f"oracle.py: {name} has ordered none of the groups whose answers differ")
    if len(seen) > 1:
        scores, oks, times, _ = zip(*seen.values())
        seen["mean rank"] = mean_rank(scores), torch.stack(oks).all(0), sum(times), {}
    for name, (scores, ok, seconds, counters) in seen.items():
        accuracy, pairs = pairwise_accuracy(scores[ok], correct[ok])
        tau, groups = kendall_tau(scores[ok], truth[ok])
        tied = (scores == scores[:, :1]).all(1)[ok].float().mean()
        first = correct.gather(1, scores.argmax(1, keepdim=True))[ok].float().mean()
        print(f"{name:12s} right before wrong in {accuracy:.1%} of {pairs} pairs; tau {tau:.3f} with the token F1 of "
              f"{groups} groups; no order in {tied:.1%} of the groups; a right answer first in {first:.1%}; "
              f"{(~ok).sum()} groups masked; {1e3 * seconds / len(records):.0f} ms a group")
        if counters:
            print(" " * 13 + ", ".join(f"{key} {round(n, 1)}" for key, n in counters.items() if n))


def main(args):
    demo(args) if args.demo else agreement(args)


if __name__ == "__main__":
    main(parse_args(Args))
