"""Any server that speaks OpenAI's chat protocol, as an oracle: asked once, paid once, never believed unread.

    client = ApiClient("http://127.0.0.1:8000/v1", "some-model", "cache")
    text = client.ask([{"role": "user", "content": "Hello"}], max_tokens=16)       # ApiError after bounded retries
    ranks, ok = ApiOracle(client).rank(videos, questions, answers)                 # as every oracle of oracle.py

How a server is asked, what is kept and what a failure is: api_client.py.

position    answers are numbered in an order drawn per question, ranks are put back (listwise); or both orders of every
            pair are asked (pairwise).

D1      identical answers are sent once and tied, as in oracle.py; a server cannot tie answers that
        differ.
"""

import base64
import functools
import io
import json
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from api_client import COST, ApiError, ReplyError
from frames import VideoError, read_frames
from ranks import normalize, one_of_equals, ranks_of

ASPECTS = ("relevance", "accuracy", "detail", "clarity")
REASONS = ("no_reply", "no_json", "missing_answer", "no_permutation", "no_video")  # why a group was masked
COUNTERS = (*COST, *(f"masked_{reason}" for reason in REASONS))


# ---------------------------------------------------------------------------------------------------------------
# What is sent
# ---------------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=256)
def frames_as_urls(clip, count, size):
    """`count` frames spread over a Clip, as JPEG data URLs, no side longer than `size`. Raises VideoError."""
    urls = []
    for frame in read_frames(clip.path, count, clip.start, clip.end)[0] if count else []:
        image, file = Image.fromarray(frame), io.BytesIO()
        image.thumbnail((size, size))  # scales down only
        image.save(file, format="JPEG", quality=90)
        urls.append(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")
    return urls


def flat(text):
    """Text on one line, whatever it breaks lines with."""
    return " ".join(text.split())


def quoted(text):
    """A text as one JSON string on one line, `<` as its escape: an answer that holds line breaks,
    quotes, 'Answer 2:' or a chat template's <|im_end|> stays inside its quotes. Also a list."""
    text = json.dumps(flat(text) if isinstance(text, str) else text, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode().replace("<", "\\u003c")


def message(images, text):
    """One user turn: the frames of the video in order, then the text."""
    if not images:
        return [{"role": "user", "content": text}]
    parts = [{"type": "text", "text": f"These are {len(images)} frames of one video, in order."}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


LISTWISE = """Question about the video: {question}

{n} answers were given:
{answers}

Rank the answers by how well they answer the question, given what the video shows. Judge what they say, not how long
they are or where they stand in the list. Reply with one JSON object and nothing else: {{"ranking": [...]}}, the numbers
of all {n} answers, each once, the best answer first."""

PAIRWISE = """Question about the video: {question}

Two answers were given:
{answers}

Which answers the question better, given what the video shows? Judge what they say, not how long they are or which
stands first. Reply with one JSON object and nothing else: {{"better": 1}} or {{"better": 2}}."""

SCORES = """Question about the video: {question}
Answer: {answer}

Score the answer from 0 (worst) to 5 (best), given what the video shows, on four aspects:
relevance: it answers the question that was asked.
accuracy: what it says is what the video shows.
detail: it says as much as the question asks for.
clarity: it is well put and easy to understand.
Reply with one JSON object and nothing else: {{"relevance": n, "accuracy": n, "detail": n, "clarity": n}}."""


def listing(answers):
    return "\n".join(f"{k}. {quoted(a)}" for k, a in enumerate(answers, 1))


def shuffled(question, answers, seed):
    """An order of the n answers, drawn for this question and these answers: independent of batch and process."""
    order = list(range(len(answers)))
    random.Random(f"{seed}|{quoted(question)}|{quoted(answers)}").shuffle(order)
    return order


# ---------------------------------------------------------------------------------------------------------------
# One question: n *distinct* answers in, n numbers out
# ---------------------------------------------------------------------------------------------------------------
def read_ranking(reply, n):
    """{"ranking": [3, 1, 2]} -> [3, 1, 2]. Raises ReplyError if it is no permutation of 1..n."""
    ranking = reply.get("ranking")
    if not isinstance(ranking, list) or not all(type(k) is int for k in ranking):
        raise ReplyError("no_json", '"ranking" is not a list of whole numbers')
    if not all(1 <= k <= n for k in ranking):
        raise ReplyError("missing_answer", f"it names an answer that is not there; there are {n}")
    if sorted(ranking) != list(range(1, n + 1)):
        raise ReplyError("no_permutation", f"it does not name each of the {n} answers once")
    return ranking


def read_choice(reply):
    """{"better": 1} -> 1. Raises ReplyError unless it is 1 or 2."""
    choice = reply.get("better")
    if type(choice) is not int:
        raise ReplyError("no_json", '"better" is not a whole number')
    if choice not in (1, 2):
        raise ReplyError("missing_answer", "it names an answer that is not there; there are 2")
    return choice


def read_scores(reply):
    """{"relevance": 4, ...} -> the scores in the order of ASPECTS. Raises ReplyError unless each lies in 0..5."""
    scores = [reply.get(aspect) for aspect in ASPECTS]
    if not all(type(s) in (int, float) and 0 <= s <= 5 for s in scores):
        raise ReplyError("no_json", f"{', '.join(ASPECTS)} are not four numbers from 0 to 5")
    return [float(s) for s in scores]


def listwise(client, images, question, answers, seed, max_tokens):
    """All n answers ranked by one request. -> scores [n], 1 for the best, 0 for the last, in equal steps."""
    order, n = shuffled(question, answers, seed), len(answers)
    text = LISTWISE.format(question=quoted(question), n=n, answers=listing([answers[i] for i in order]))
    ranking = client.ask_json(message(images, text), functools.partial(read_ranking, n=n), max_tokens)
    scores = [0.0] * n
    for place, k in enumerate(ranking):
        scores[order[k - 1]] = (n - 1 - place) / (n - 1)
    return scores


def pairwise(client, images, question, answers, seed, max_tokens):
    """Every ordered pair by a request of its own: n(n-1) requests. -> scores [n], the share of its comparisons that an
    answer won. The order of asking follows `seed`; a preference for the first place cancels."""
    n = len(answers)
    won = [0] * n
    pairs = [(i, j) for i in shuffled(question, answers, seed) for j in range(n) if i != j]
    for i, j in pairs:
        text = PAIRWISE.format(question=quoted(question), answers=listing([answers[i], answers[j]]))
        won[(i, j)[client.ask_json(message(images, text), read_choice, max_tokens) - 1]] += 1
    return [w / (2 * (n - 1)) for w in won]


def aspects(client, images, question, answers, max_tokens):
    """Scores 0-5 on the four ASPECTS for each answer on its own, one request each. -> [n][4]."""
    ask = lambda a: SCORES.format(question=quoted(question), answer=quoted(a))
    return [client.ask_json(message(images, ask(a)), read_scores, max_tokens) for a in answers]


# ---------------------------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------------------------
class ApiOracle:
    """A server ranks, group by group, many groups at the same time. `counters`: what it cost and what was masked."""

    def __init__(self, client, mode="listwise", frames=8, size=336, max_tokens=512, seed=0):
        self.client, self.frames, self.size, self.max_tokens, self.seed = client, frames, size, max_tokens, seed
        self.order = dict(listwise=listwise, pairwise=pairwise)[mode]
        self.masked = Counter()

    @property
    def counters(self):
        return {key: self.client.counts[key] + self.masked[key.removeprefix("masked_")] for key in COUNTERS}

    def each_group(self, ask, videos, questions, answers):
        """ask(images, question, answers) -> one value per answer, for the *distinct* answers of every group (D1).
        -> [{normalized answer: value}], None for a group that got no usable reply; ApiError where asking is futile."""

        def one(video, question, group):
            places = sorted(set(one_of_equals([group])[0]), key=lambda k: group[k])
            distinct = {normalize(group[k]): group[k] for k in places}  # in another order it is the same request
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
                print(f"oracle: a group is masked ({reason}): {e}; more of the kind are only counted", file=sys.stderr)
            self.masked[reason] += 1
        return [None if isinstance(e, Exception) else e for e in out]

    def table(self, groups, answers, blank):
        rows = [[blank if g is None else g[normalize(a)] for a in group] for g, group in zip(groups, answers)]
        return torch.tensor(rows), torch.tensor([g is not None for g in groups])

    def score(self, videos, questions, answers):
        """-> scores (B,G) in [0,1], ok (B,). A group of equal answers is tied without a request."""
        order = functools.partial(self.order, self.client, seed=self.seed, max_tokens=self.max_tokens)
        ask = lambda images, question, some: [0.5] if len(some) == 1 else order(images, question, some)
        return self.table(self.each_group(ask, videos, questions, answers), answers, 0.0)

    def rank(self, videos, questions, answers):
        scores, ok = self.score(videos, questions, answers)
        return ranks_of(scores), ok

    def aspects(self, videos, questions, answers):
        """-> (B,G,4) in [0,5], ok (B,): each distinct answer is scored by a request of its own."""
        ask = functools.partial(aspects, self.client, max_tokens=self.max_tokens)
        return self.table(self.each_group(ask, videos, questions, answers), answers, [0.0] * 4)
