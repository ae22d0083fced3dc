"""What a server that ranks is asked, and how its replies are read: one JSON object each, never
believed unread."""

import functools
import random

from plumbing.api_client import COST, ReplyError, message, quoted

ASPECTS = ("relevance", "accuracy", "detail", "clarity")
# why a group was masked
REASONS = ("no_reply", "no_json", "missing_answer", "no_permutation", "no_video")
COUNTERS = (*COST, *(f"masked_{reason}" for reason in REASONS))

LISTWISE = """Question about the video: {question}

{n} answers were given:
{answers}

Rank the answers by how well they answer the question, given what the video shows. Judge what \
they say, not how long
they are or where they stand in the list. Reply with one JSON object and nothing else: \
{{"ranking": [...]}}, the numbers
of all {n} answers, each once, the best answer first."""

PAIRWISE = """Question about the video: {question}

Two answers were given:
{answers}

Which answers the question better, given what the video shows? Judge what they say, not how long \
they are or which
stands first. Reply with one JSON object and nothing else: {{"better": 1}} or {{"better": 2}}."""

SCORES = """Question about the video: {question}
Answer: {answer}

Score the answer from 0 (worst) to 5 (best), given what the video shows, on four aspects:
relevance: it answers the question that was asked.
accuracy: what it says is what the video shows.
detail: it says as much as the question asks for.
clarity: it is well put and easy to understand.
Reply with one JSON object and nothing else: {{"relevance": n, "accuracy": n, "detail": n, \
"clarity": n}}."""


def listing(answers):
    return "\n".join(f"{k}. {quoted(a)}" for k, a in enumerate(answers, 1))


def shuffled(question, answers, seed):
    """An order of the n answers, drawn for this question and these answers: independent of batch
    and process."""
    order = list(range(len(answers)))
    random.Random(f"{seed}|{quoted(question)}|{quoted(answers)}").shuffle(order)
    return order


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
    """{"relevance": 4, ...} -> the scores in the order of ASPECTS. Raises ReplyError unless each
    lies in 0..5."""
    scores = [reply.get(aspect) for aspect in ASPECTS]
    if not all(type(s) in (int, float) and 0 <= s <= 5 for s in scores):
        raise ReplyError("no_json", f"{', '.join(ASPECTS)} are not four numbers from 0 to 5")
    return [float(s) for s in scores]


def listwise(client, images, question, answers, seed, max_tokens):
    """All n answers ranked by one request. -> scores [n], 1 for the best, 0 for the last, in equal
    steps."""
    order, n = shuffled(question, answers, seed), len(answers)
    text = LISTWISE.format(question=quoted(question), n=n,
                           answers=listing([answers[i] for i in order]))
    ranking = client.ask_json(message(images, text), functools.partial(read_ranking, n=n),
                              max_tokens)
    scores = [0.0] * n
    for place, k in enumerate(ranking):
        scores[order[k - 1]] = (n - 1 - place) / (n - 1)
    return scores


def pairwise(client, images, question, answers, seed, max_tokens):
    """Every ordered pair by a request of its own: n(n-1) requests. -> scores [n], the share of its
    comparisons that an answer won. The order of asking follows `seed`; a preference for the first
    place cancels."""
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
