"""Any server that speaks OpenAI's chat protocol: asked once, paid once, its failures told.

    client = ApiClient("http://127.0.0.1:8000/v1", "some-model", "cache")
    text = client.ask([{"role": "user", "content": "Hello"}], max_tokens=16)  # or ApiError

The key comes from the environment variable ORACLE_API_KEY and goes nowhere but into the headers of
requests. It is no flag and no part of a cache key, and it is cut out of whatever a server says
before that is shown or stored. Without it no key is sent, not even the one that `hf auth login`
left on this machine (D1).

cache       every accepted reply lies on disk, keyed by all that was sent (server, model, messages
            with frames, limits). A resumed or repeated run pays for none twice, and a run with the
            cache of another needs no server. A reply that could not be used is not kept.
retries     408, 425, 429, 5xx, cut connections, time-outs, errors in a 200 and bodies that are no
            reply are tried up to `max_retries` more times, after 1, 2, 4, ... seconds, or longer
            where Retry-After says so. A server that says wait makes every thread wait.
final       where the server refuses key, account, address, model or a parameter, asking on makes
            no sense: ApiError.fatal. Models that want `max_completion_tokens`, or their own
            temperature, get that; it is remembered.
strict      where JSON is asked for, a reply is one JSON object (alone or in one code fence) with
            the keys that were asked for. Else it is asked for once more, with the reason (one
            repair), then refused: ReplyError [D2].
thinking    what stands in <think>...</think> is no part of a reply.

D1      `huggingface_hub.InferenceClient` sends the stored Hub token to any server when it is given
        no key; the header is set here in every case, to nothing where there is no key. It has one
        session for the whole process; here each client has its own, as this machine is asked
        without a proxy.
D2      nothing is read out of prose: the first digits of "Answer 3 is wrong, 1 is best" are a
        ranking by accident only.
"""

import base64
import codecs
import contextlib
import functools
import hashlib
import io
import ipaddress
import json
import logging
import os
import random
import re
import threading
import time
from collections import Counter
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import httpx2
from huggingface_hub import InferenceClient
from PIL import Image

from inputs.frames import read_frames
from plumbing import files
from plumbing.flags import KEY
from plumbing.text import END_MARKS, strip_thinking

LONGEST_WAIT = 120  # seconds; a server that asks for a longer pause is given up
COST = ("requests", "retries", "cached", "repairs", "prompt_tokens", "completion_tokens", "seconds")
# HTTP status: the key, the account, the address or the model is refused
FINAL = (401, 402, 403, 404, 405, 410)
# what models that refuse a key of the request get in its place; None: nothing
INSTEAD = {"max_tokens": "max_completion_tokens", "temperature": None}
# a 429 that no waiting cures
QUOTA = re.compile(r"insufficient.(quota|balance|credit|funds)|billing_hard_limit", re.I)
# how servers refuse a key of the request, and how a request that is too long
REFUSED = re.compile(r"support|deprecated|default|unknown|recogni[sz]ed|unexpected|forbidden|valid|"
                     r"permitted|allowed|(must|should|cannot) be|(less|greater) than", re.I)
TOO_LONG = re.compile(r"context|too (large|long)|exceed|reduce|(prompt|sequence) length", re.I)
NO_MODEL = re.compile(r"not (found|exist)|unknown|pinned", re.I)
CREDENTIAL = re.compile(r"(key|token|secret|password|pwd|auth|authorization|credentials?|cookies?|"
                        r"bearer|headers?)$")


# --- The address, what is added to a request, the key ---------------------------------------------
def check_server(url, extra):
    """ValueError with one line for an address, a proxy, --api_extra or a key that cannot work."""
    read_extra(extra)
    if url:
        open_session(check_url(url), 1.0).close()
        read_key()


def check_url(url):
    """--api_url -> the address that is asked. It is what stands before /chat/completions, as
    OpenAI's client takes it; a bare host gets /v1. ValueError with one line if it is none."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname and httpx2.URL(url).host) and not re.search(r"\s", url)
        named = named and parts.port != 0  # a port that is no number: ValueError
    except (ValueError, httpx2.InvalidURL):
        named = False
    if not named or parts.scheme not in ("http", "https"):
        raise ValueError("--api_url: must be http://host or https://host, with port and path where "
                         "needed")
    query = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    if parts.username or parts.password or query - {"api-version"} or parts.fragment:
        raise ValueError("--api_url: no user, password, fragment or query but ?api-version=; a key "
                         f"goes into the variable {KEY}")
    path = parts.path.rstrip("/")
    if "/openai/deployments/" in path and not query:
        raise ValueError("--api_url: a deployment of Azure needs ?api-version=... at its end")
    if not path.endswith("/chat/completions"):
        last = path.rpartition("/")[2].lower()
        others = ("completions", "chat", "responses", "messages", "models")
        if last in others or "generate" in last:
            raise ValueError(f"--api_url: leave out /{last}; it is what stands before "
                             "/chat/completions, as in http://host/v1")
        path = f"{path or '/v1'}/chat/completions"
    return urlunsplit(parts._replace(path=path))


def open_session(url, timeout, **more):
    """An HTTP client; this machine is asked without a proxy. ValueError: a proxy is unusable."""
    host = urlsplit(url).hostname
    try:
        address = ipaddress.ip_address(host)
        here = address.is_loopback or address.is_unspecified
    except ValueError:
        here = host == "localhost" or host.endswith(".localhost")
    more |= dict(verify=httpx2.create_ssl_context(), trust_env=not here, timeout=timeout)
    proxies = "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"
    try:
        return httpx2.Client(**more)
    except ImportError:
        raise ValueError(f"{proxies} is a SOCKS proxy: that needs the package socksio") from None
    except (ValueError, httpx2.InvalidURL):
        raise ValueError(f"{proxies} is no address of a proxy") from None


def read_extra(text):
    """--api_extra -> dict. ValueError, which does not show it: it is none or holds a credential."""
    try:
        extra = json.loads(text or "{}")
    except (ValueError, RecursionError):
        extra = None
    if not isinstance(extra, dict):
        raise ValueError("--api_extra: must be a JSON object, as in "
                         '\'{"reasoning_effort": "low"}\'')
    for name in ("model", "messages", "stream", "n"):
        if name in extra:
            raise ValueError(f"--api_extra: {name} cannot be set there")
    key, found, values = read_key(), False, [extra]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            names = (re.sub(r"\W", "_", name).lower() for name in value)
            found |= any(map(CREDENTIAL.search, names))
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str):
            found |= bool(re.match(r"(sk-|hf_|gsk_|AIza|Bearer )\S{8}", value))
    if found or len(key) >= 8 and key in text:
        raise ValueError("--api_extra: holds what looks like a credential; a key goes into the "
                         f"variable {KEY}")
    return extra


def read_key():
    """The key out of the environment, or "". ValueError, which does not show it, if it is none."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[!-~]*", key):  # a library's message about a bad header would show it
        raise ValueError(f"{KEY} holds characters that no key has")
    return key


# --- What comes back ------------------------------------------------------------------------------
class ApiError(Exception):
    """No reply after bounded retries: one line, without the key. `status`: the last HTTP status.
    `fatal`: asking on makes no sense. `again`: it may pass, after `wait` seconds if given."""

    reason = "no_reply"

    def __init__(self, message, status=None, again=False, wait=None, fatal=False):
        super().__init__(" ".join(str(message).split()))
        self.status, self.again, self.wait = status, again, wait
        self.fatal = fatal or status in FINAL


class ParameterError(ApiError):
    """The server refuses `name`, a key of the request."""

    def __init__(self, name, message, status):
        super().__init__(message, status, fatal=True)
        self.name = name


class ReplyError(ApiError):
    """A reply came, and cannot be used. `reply`: its text, where it has some."""

    def __init__(self, reason, message, reply=""):
        super().__init__(message)
        self.reason, self.reply = reason, reply


class Reply(str):
    """The text of a reply, without thinking and end marks. `raw`: all that was written. `finish`:
    why it ended, in the server's word, None if it does not say. `tokens`: of prompt and reply."""

    finish, raw, tokens = None, "", (0, 0)

    @classmethod
    def of(cls, raw, finish=None):
        reply = cls(END_MARKS.sub("", strip_thinking(raw.replace("\ufeff", ""))).strip())
        reply.finish, reply.raw = finish, raw.strip()
        return reply

    @property
    def cut(self):
        return str(self.finish).lower() in ("length", "max_tokens", "model_length")

    @property
    def withheld(self):
        return str(self.finish).lower() in ("content_filter", "refusal", "safety")

    def about(self):
        """What says why it cannot be used."""
        said = json.dumps((self or self.raw)[:100], ensure_ascii=False)
        why = f"finish_reason {self.finish}; " if self.finish else ""
        return why + (f"it begins {said}" if self.raw else "no text")


# --- The client -----------------------------------------------------------------------------------
class Chat(InferenceClient):
    """The library's client with a session of its own [D1]; `extra` goes into every request."""

    def __init__(self, url, key, timeout, extra):
        # the header, not `api_key`: None there means "the token of this machine"
        headers = {"authorization": f"Bearer {key}" if key else None}
        if key and "api-version=" in url:  # Azure's name for it
            headers["api-key"] = key
        super().__init__(base_url=url, api_key="unused", headers=headers, timeout=timeout)
        # to another host a redirect takes no `authorization`, but it would take `api-key`
        self.session = open_session(url, timeout, follow_redirects="api-key" not in headers)
        self.extra, self.last = extra, threading.local()  # last.body: what came back to this thread

    def _inner_post(self, request_parameters, *, stream=False):
        body = {k: v for k, v in (request_parameters.json | self.extra).items() if v is not None}
        self.last.body = ""
        response = self.session.post(request_parameters.url, content=json.dumps(body),
                                     headers=request_parameters.headers)
        response.raise_for_status()
        content = response.content.removeprefix(codecs.BOM_UTF8)
        self.last.body = content.decode("utf-8", "replace").strip()
        return content


class ApiClient:
    """Thread-safe. `counts`: what it cost since it was made, keys COST. extra: --api_extra."""

    def __init__(self, base_url, model, cache_dir, concurrency=8, timeout=60.0, max_retries=4,
                 first_wait=1.0, extra=""):
        self.url, self.extra, key = check_url(base_url), read_extra(extra), read_key()
        self.base_url, self.model = base_url, model
        self.max_retries, self.first_wait = max_retries, first_wait
        self.folder = Path(cache_dir) / "api"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.http = Chat(self.url, key, timeout, self.extra)
        # a shorter key is a placeholder, and may be a word
        self.without_key = lambda text: text.replace(key, "***") if len(key) >= 8 else text
        # the debug log of the HTTP library prints headers of responses, which may repeat the key
        logging.getLogger("httpcore2").setLevel(logging.INFO)
        self.concurrency, self.slots = concurrency, threading.BoundedSemaphore(concurrency)
        self.lock, self.asking, self.not_before = threading.Lock(), {}, 0.0
        self.instead = {}  # what of INSTEAD this server wants
        self.counts = Counter(dict.fromkeys(COST, 0))

    def count(self, **more):
        with self.lock:
            self.counts.update(more)

    def ask(self, messages, max_tokens, temperature=0.0, check=None, attempts=1, plea=""):
        """The Reply that `check` accepts, from disk where the same was asked before, or ApiError.

        check(reply) raises ReplyError if it does not; the server is then told why and asked again,
        `attempts` times in all. A reply without text is never accepted. Only what was accepted is
        kept."""
        options = dict(max_tokens=max_tokens, temperature=temperature)
        sent = dict(model=self.model, messages=messages, **options) | self.extra
        key = hashlib.sha256(json.dumps([self.base_url, sent], sort_keys=True).encode()).hexdigest()
        file = self.folder / key[:2] / f"{key}.json"
        unusable = (ValueError, LookupError, TypeError, AttributeError, ReplyError)
        with self.lock:
            turn = self.asking.setdefault(key, threading.Lock())
        with turn:  # two threads with the same question: the second finds the first one's reply
            if file.exists():
                with contextlib.suppress(*unusable):  # damaged, or not accepted any more: ask again
                    kept = json.loads(file.read_text(encoding="utf-8"))
                    reply = accepted(Reply.of(kept["reply"], kept.get("finish")), check)
                    self.count(cached=1)
                    return reply
            turns = messages
            for attempt in range(1, attempts + 1):
                reply = self.request(turns, options)
                try:
                    accepted(reply, check)
                    break
                except ReplyError as e:
                    if attempt == attempts or not reply and (reply.cut or reply.withheld):
                        raise ReplyError(e.reason, f"{e} ({reply.about()})", reply) from None
                    self.count(repairs=1)
                    # it may repeat an answer: no turn opens there either
                    said = str(reply).replace("<", "&lt;") or "(nothing)"
                    complaint = f"That reply cannot be used: {e}."
                    turns = [*turns, {"role": "assistant", "content": said},
                             {"role": "user", "content": f"{complaint} {plea}"}]
            kept = dict(model=self.model, reply=reply, finish=reply.finish)
            files.write(file, json.dumps(kept))
            return reply

    def ask_json(self, messages, check, max_tokens):
        """check(the reply's JSON object). What `check` refuses is asked for once more."""
        read = lambda text: check(parse_json(text))
        plea = "Reply again, with the JSON object alone."
        return read(self.ask(messages, max_tokens, check=read, attempts=2, plea=plea))

    def request(self, messages, options):
        """One Reply, however many attempts it takes within the limits. Raises ApiError."""
        attempt = 1
        while True:
            while (wait := self.not_before - time.monotonic()) > 0:  # another thread was told so
                time.sleep(wait)
            instead, began = dict(self.instead), time.monotonic()
            wanted = {instead.get(k, k): v for k, v in options.items() if instead.get(k, k)}
            try:
                with self.slots:
                    began = time.monotonic()
                    reply = self.once(messages, wanted)
                tokens = dict(zip(("prompt_tokens", "completion_tokens"), reply.tokens))
                self.count(requests=1, seconds=time.monotonic() - began, **tokens)
                return reply
            except ApiError as e:
                error = e
            self.count(requests=1, seconds=time.monotonic() - began)
            name = getattr(error, "name", None)
            if name in INSTEAD and name not in instead and name not in self.extra:
                self.instead[name] = INSTEAD[name]  # once, and for good
                continue
            said, again = str(error), error.again and attempt <= self.max_retries
            if again and (error.wait or 0) > LONGEST_WAIT:
                said, again = f"{said}; it asks for a pause of {error.wait:.0f} s", False
            if not again:
                said = f"{self.url if error.fatal else self.base_url}: {said} (attempt {attempt})"
                raise ApiError(said, error.status, fatal=error.fatal)
            self.count(retries=1)
            pause = self.first_wait * min(2 ** (attempt - 1), 32) * random.uniform(0.75, 1.25)
            attempt += 1
            if error.wait:
                until = time.monotonic() + max(error.wait, pause)
                with self.lock:
                    self.not_before = max(self.not_before, until)
            else:  # also where the server says 0, which would spend all attempts at once
                time.sleep(pause)

    def once(self, messages, options):
        """One attempt. Raises ApiError."""
        try:
            out = self.http.chat_completion(messages, model=self.model, extra_body=options)
            choice = out.choices[0] if out.choices else {}
            error = dict.get(out, "error") or dict.get(choice, "error")
            error = error or not choice and message_of(dict(out))
            if error:  # that came as a success
                code = str(error.get("code") if isinstance(error, dict) else "")
                code = int(code) if re.fullmatch("[45]..", code) else 200
                raise self.refusal(code, error, options)
            text, finish, used = choice.message.content, choice.finish_reason, out.usage
            if isinstance(text, (list, dict)):  # parts; those that hold thinking are left out
                parts = [p if isinstance(p, dict) else dict(text=p)
                         for p in (text if isinstance(text, list) else [text])]
                text = "".join(p.get("text") or "" for p in parts
                               if p.get("type") in (None, "text", "output_text"))
            if not isinstance(text or "", str):
                raise ValueError("content is no text")
            reply = Reply.of(self.without_key(text or ""), finish)
            if not text and (refused := dict.get(choice.message, "refusal")):
                reply.finish, reply.raw = "refusal", self.without_key(refused)
            names = ("prompt_tokens", "completion_tokens")
            reply.tokens = [getattr(used, name, None) or 0 for name in names]
            return reply
        except httpx2.HTTPStatusError as e:
            response, wait = e.response, retry_after(e.response.headers)
            try:
                body = response.json()
            except (ValueError, RecursionError):
                body = response.text
            body = body or response.reason_phrase
            raise self.refusal(response.status_code, body, options, wait) from None
        except httpx2.TimeoutException:
            raise ApiError("no answer in time", again=True) from None
        except httpx2.HTTPError as e:  # refused, reset, closed half-way
            raise ApiError(f"{type(e).__name__}: {self.without_key(str(e))}", again=True) from None
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as e:
            body = self.without_key(self.http.last.body)[:100]
            said = f"it begins {json.dumps(body, ensure_ascii=False)}" if body else "no text"
            said = f"no chat completion ({type(e).__name__}; {said})"
            raise ApiError(said, 200, again=True) from None

    def refusal(self, status, error, options, wait=None):
        """What a server says instead of a reply, a JSON value or text -> ApiError."""
        words, said = "\n".join(words_of(error)), message_of(error) or json.dumps(error)
        said = self.without_key(f"HTTP {status}: {said}")[:300]
        named = lambda name: re.search(rf"(?<!\w){re.escape(name)}(?!\w)", words)
        about_request = status in (400, 422) and not TOO_LONG.search(words)
        if about_request and REFUSED.search(words):
            for name in [*options, *self.extra]:
                if named(name):
                    return ParameterError(name, said, status)
        no_model = about_request and named(self.model) and NO_MODEL.search(words)
        if no_model or QUOTA.search(words):
            return ApiError(said, status, fatal=True)
        return ApiError(said, status, status in (200, 408, 425, 429) or status >= 500, wait)


def retry_after(headers):
    """Seconds to wait, from a Retry-After header of seconds or of a date; None if there is none."""
    value = (headers.get("retry-after") or "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    left = when.replace(tzinfo=when.tzinfo or timezone.utc) - datetime.now(timezone.utc)
    return max(0.0, left.total_seconds())


def message_of(error):
    """The message in a server's error, wherever it puts it; "" if there is none."""
    if isinstance(error, dict):
        inner = (error.get(key) for key in ("error", "message", "detail", "msg", "errors"))
        return next(filter(None, map(message_of, inner)), "")
    if isinstance(error, list):
        return message_of(error[0]) if error else ""
    return error if isinstance(error, str) else ""


def words_of(error):
    """All texts of a server's error, but not those that repeat the request."""
    if isinstance(error, str):
        yield error
    elif isinstance(error, (dict, list)):
        for key, value in error.items() if isinstance(error, dict) else enumerate(error):
            if key != "input":
                yield from words_of(value)


def accepted(reply, check):
    """The reply, if it has text and passes `check`. Raises ReplyError."""
    if not reply:
        raise ReplyError("no_json", "it has no text")
    if check:
        check(reply)
    return reply


def no_twins(pairs):
    """A JSON object that names a key twice means two things: refused, not the last one taken."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def parse_json(text):
    """[D2] The one JSON object that a reply is, alone or in one code fence. Raises ReplyError."""
    fence = re.fullmatch(r"\s*```[^\S\n]*\w*\s*(.*?)\s*```\s*", text, re.S)
    try:
        value = json.loads(fence[1] if fence else text, object_pairs_hook=no_twins)
    except (ValueError, RecursionError):
        raise ReplyError("no_json", "it is not one JSON object") from None
    if not isinstance(value, dict):
        raise ReplyError("no_json", "it is not one JSON object")
    return value


@functools.lru_cache(maxsize=256)
def frames_as_urls(clip, count, size):
    """`count` frames spread over a Clip, as JPEG data URLs, no side longer than `size`. Raises
    VideoError."""
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
