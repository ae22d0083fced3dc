"""Any server that speaks OpenAI's chat protocol, as an oracle: asked once, paid once, never believed unread.

    client = ApiClient("http://127.0.0.1:8000/v1", "some-model", "cache")
    text = client.ask([{"role": "user", "content": "Hello"}], max_tokens=16)       # ApiError after bounded retries
    ranks, ok = ApiOracle(client).rank(videos, questions, answers)                 # as every oracle of oracle.py

The key comes from the environment variable ORACLE_API_KEY and goes nowhere but into the Authorization header: it is no
flag, no part of a cache key, and it is cut out of whatever a server says before that is shown or stored. Without it no
key is sent at all, not even the one that `hf auth login` left on this machine (D1).

cache       every reply on disk, keyed by all that was sent (server, model, messages with frames, limits): a resumed or
            repeated run asks for nothing twice, and a run with the cache of another needs no server.
retries     408, 429, 5xx, cut connections, time-outs and bodies that are no reply: up to `max_retries` more times,
            after 1, 2, 4, ... seconds or what Retry-After says. A server that says wait makes every thread wait.
strict      a reply is one JSON object (alone or in one code fence) with the keys that were asked for, or it is refused:
            asked once more with the reason (one repair), then ReplyError with a reason out of REASONS [D2].
position    answers are numbered in an order drawn per question, ranks are put back (listwise); or both orders of every
            pair are asked (pairwise).

D1      `huggingface_hub.InferenceClient` sends the stored Hub token to any server when it is given no key; the
        header is set here in every case, to nothing where there is no key.
D2      nothing is read out of prose: the first digits of "Answer 3 is wrong, 1 is best" are a ranking only by accident.
D3      identical answers are sent once and tied, as in oracle.py; a server cannot tie answers that differ.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled
from PIL import Image

import harness
from flags import KEY
from frames import VideoError, read_frames
from ranks import normalize, one_of_equals, ranks_of

LONGEST_WAIT = 120  # seconds; a server that asks for a longer pause is given up
ASPECTS = ("relevance", "accuracy", "detail", "clarity")
REASONS = ("no_reply", "no_json", "missing_answer", "no_permutation", "no_video")  # why a group was masked
COST = ("requests", "retries", "cached", "repairs", "prompt_tokens", "completion_tokens", "seconds")
COUNTERS = (*COST, *(f"masked_{reason}" for reason in REASONS))


def check_url(url):
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("--api_url: must be http://host or https://host, with port and path where needed")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"--api_url: no user, password, query or fragment; a key goes into the variable {KEY}")


def read_key():
    """The key out of the environment, or "". ValueError, which does not show it, where it cannot be one."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[!-~]*", key):  # a library's message about an illegal header would show it
        raise ValueError(f"{KEY} holds characters that no key has")
    return key


class ApiError(Exception):
    """No reply after bounded retries: one line, without the key. `status`: the last HTTP status, if there was one."""

    reason = "no_reply"

    def __init__(self, message, status=None):
        super().__init__(" ".join(str(message).split()))
        self.status = status

    @property
    def fatal(self):
        """The server does not know the key (401) or the address or model (404): asking on makes no sense."""
        return self.status in (401, 404)


class ReplyError(ApiError):
    """A reply came, and cannot be used."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------------
# The client
# ---------------------------------------------------------------------------------------------------------------
class ApiClient:
    """Thread-safe. `counts`: what it cost since it was made, keys COST."""

    def __init__(self, base_url, model, cache_dir, concurrency=8, timeout=60.0, max_retries=4, first_wait=1.0):
        check_url(base_url)
        self.base_url, self.model, self.max_retries, self.first_wait = base_url, model, max_retries, first_wait
        self.folder = Path(cache_dir) / "api"
        self.folder.mkdir(parents=True, exist_ok=True)
        key = read_key()
        # [D1] the header, not `api_key`: None there means "the token of this machine"
        headers = {"authorization": f"Bearer {key}" if key else None}
        self.http = InferenceClient(base_url=base_url, api_key="unused", headers=headers, timeout=timeout)
        self.without_key = lambda text: text.replace(key, "***") if len(key) >= 8 else text  # shorter: a placeholder
        # the debug log of the HTTP library prints the headers of responses, in which a server may repeat the key
        logging.getLogger("httpcore2").setLevel(logging.INFO)
        self.concurrency, self.slots = concurrency, threading.BoundedSemaphore(concurrency)
        self.lock, self.asking, self.not_before = threading.Lock(), {}, 0.0
        self.counts = Counter(dict.fromkeys(COST, 0))

    def count(self, **more):
        with self.lock:
            self.counts.update(more)

    def ask(self, messages, max_tokens, temperature=0.0):
        """The text of the reply, from disk where the same was asked before. Raises ApiError."""
        sent = dict(model=self.model, messages=messages, max_tokens=max_tokens, temperature=temperature)
        key = hashlib.sha256(json.dumps([self.base_url, sent], sort_keys=True).encode()).hexdigest()
        file = self.folder / key[:2] / f"{key}.json"
        with self.lock:
            turn = self.asking.setdefault(key, threading.Lock())
        with turn:  # two threads with the same question: the second finds the first one's reply
            if file.exists():
                with contextlib.suppress(ValueError, LookupError, TypeError):  # a damaged file: ask again
                    reply = json.loads(file.read_text(encoding="utf-8"))["reply"]
                    self.count(cached=1)
                    return reply
            reply = self.request(sent)
            harness.write(file, json.dumps(dict(model=self.model, reply=reply)))
            return reply

    def request(self, sent):
        """One reply, however many attempts it takes within the limits. Raises ApiError."""
        for attempt in range(self.max_retries + 1):
            while (wait := self.not_before - time.monotonic()) > 0:  # another thread was told to wait
                time.sleep(wait)
            began = time.monotonic()
            try:
                with self.slots:
                    began = time.monotonic()
                    out = self.http.chat_completion(**sent)
                reply, used = out.choices[0].message.content or "", out.usage
                if not isinstance(reply, str):
                    raise ValueError("content is no text")
                used = [getattr(used, k, None) or 0 for k in ("prompt_tokens", "completion_tokens")]
                self.count(requests=1, seconds=time.monotonic() - began, prompt_tokens=used[0],
                           completion_tokens=used[1])
                return self.without_key(reply)
            except OfflineModeIsEnabled:
                raise ApiError("the variable HF_HUB_OFFLINE forbids every request, also to --api_url") from None
            except HfHubHTTPError as e:
                status, wait = e.response.status_code, retry_after(e.response.headers)
                said = e.server_message or e.response.text or e.response.reason_phrase
                said = self.without_key(f"HTTP {status}: {said}")
                again = status in (408, 429) or status >= 500
            except InferenceTimeoutError:
                status, wait, said, again = None, None, "no answer in time", True
            except httpx2.HTTPError as e:  # refused, reset, closed half-way
                status, wait, said, again = None, None, f"{type(e).__name__}: {self.without_key(str(e))}", True
            except (ValueError, TypeError, AttributeError, LookupError) as e:  # a body that is no chat completion
                status, wait, said, again = 200, None, f"no chat completion ({type(e).__name__})", True
            self.count(requests=1, seconds=time.monotonic() - began)
            if not again or attempt == self.max_retries:
                break
            if (wait or 0) > LONGEST_WAIT:
                said += f"; it asks for a pause of {wait:.0f} s"
                break
            self.count(retries=1)
            if wait is None:
                time.sleep(self.first_wait * min(2**attempt, 32) * random.uniform(0.75, 1.25))
            else:
                with self.lock:
                    self.not_before = max(self.not_before, time.monotonic() + wait)
        raise ApiError(f"{self.base_url}: {said[:300]} (attempt {attempt + 1})", status)

    def ask_json(self, messages, check, max_tokens):
        """check(the reply's JSON object). A reply that `check` refuses with ReplyError is asked for once more."""
        text = self.ask(messages, max_tokens)
        try:
            return check(parse_json(text))
        except ReplyError as e:
            self.count(repairs=1)
            complaint = f"That reply cannot be used: {e}. Reply again, with the JSON object alone."
            turns = [{"role": "assistant", "content": text or "(nothing)"}, {"role": "user", "content": complaint}]
            return check(parse_json(self.ask(messages + turns, max_tokens)))


def retry_after(headers):
    """Seconds to wait, from a Retry-After header of seconds or of a date; None where there is none."""
    value = (headers.get("retry-after") or "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds())


def no_twins(pairs):
    """A JSON object that names a key twice means two things: refused, not the last one taken."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def parse_json(text):
    """[D2] The one JSON object that a reply consists of, alone or in one code fence. Raises ReplyError."""
    fence = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.S)
    try:
        value = json.loads(fence[1] if fence else text, object_pairs_hook=no_twins)
    except (ValueError, RecursionError):
        raise ReplyError("no_json", "it is not one JSON object") from None
    if not isinstance(value, dict):
        raise ReplyError("no_json", "it is not one JSON object")
    return value


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


def quoted(text):
    """Text as one JSON string: an answer that holds line breaks, quotes or 'Answer 2:' stays inside its quotes."""
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


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
        """ask(images, question, answers) -> one value per answer, for the *distinct* answers of every group (D3).
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
