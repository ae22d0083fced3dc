"""A run with a server that fails three times in ten, in every way there is: it completes, masks,
reports, pays once, and the key appears nowhere."""

import json
import random
import traceback
from collections import Counter
from functools import partial

import pytest
from inside import main_of
from test_api_oracle import SECRET, server  # noqa: F401 - a fixture
from test_scripts import GRPO, rows

import oracle
from plumbing import api_client, replies

FAILURES = [dict(status=500, says=f"cannot serve {SECRET}"), dict(status=503), dict(status=408),
            dict(status=429, headers={"retry-after": "0"}),
            dict(status=400, says=f"Bearer {SECRET}?"),
            dict(status=422, says=f"{SECRET}, no"), dict(status=413), "CUT", "HALF", "HALF JSON",
            "LIST", "EMPTY",
            "the first answer is the best", '{"ranking": [1, 1, 1]}', '{"ranking": [7]}',
            '{"ranking": "1 2 3"}', "{}",
            '```json\n{"ranking": [', f"your key is {SECRET}", ""]
random.Random(1).shuffle(FAILURES)
FLAGS = [*GRPO, "--steps", "12", "--oracle", "api", "--api_model", "judge-1", "--api_frames", "1",
         "--api_size", "16",
         "--api_retries", "2", "--api_timeout", "20", "--api_concurrency", "4"]


def usable(body):
    """A proper ranking of as many answers as were listed: by length."""
    text = body["messages"][0]["content"]
    text = text if isinstance(text, str) else text[-1]["text"]
    lines = [line.split(". ", 1)
             for line in text.splitlines() if line[:1].isdigit() and ". " in line]
    return json.dumps({"ranking": [int(k)
                                   for k, _ in sorted(lines, key=lambda pair: -len(pair[1]))]})


@pytest.fixture
def failing(server, monkeypatch):  # noqa: F811
    """The server, `paid`: how often each request got a usable reply, `failed`: what else it did."""
    rng, server.paid, server.failed = random.Random(0), Counter(), Counter()

    def act(body):
        with server.lock:
            if rng.random() < 0.3:
                failure = FAILURES[sum(server.failed.values()) % len(FAILURES)]  # each in turn
                server.failed[str(failure)] += 1
                return failure
            server.paid[json.dumps(body, sort_keys=True)] += 1
        return usable(body)

    server.act = act
    monkeypatch.setenv("ORACLE_API_KEY", SECRET)
    monkeypatch.setattr(oracle, "ApiClient", partial(api_client.ApiClient, first_wait=0.001))
    return server


def search(folder, capfd):
    """The key, in no file under the folder and in nothing that was printed."""
    said = "".join(capfd.readouterr())
    assert SECRET not in said and SECRET[3:-2] not in said
    for file in folder.rglob("*"):
        if file.is_file() and (".json" in file.name or "events" in file.name
                               or file.suffix in ("", ".txt", ".tmp")):
            assert SECRET.encode() not in file.read_bytes(), file
    return said


def test_a_run_with_a_failing_server(world, policy, failing, monkeypatch, capfd):
    flags = [*FLAGS, "--api_url", failing.url, "--cache", "paid"]
    main_of(monkeypatch, world, "grpo_rank.py", *flags, "--name", "failing")
    folder = world / "runs/grpo_rank/failing_s0"
    metrics = rows(folder)
    assert len(metrics) == 12 and (folder / "final/model.safetensors").exists()
    assert len(failing.failed) > 8, failing.failed  # most ways to fail were met
    total = lambda key: round(sum(row.get(f"oracle/{key}", 0) for row in metrics))
    masked = {reason: total(f"masked_{reason}") for reason in replies.REASONS}
    groups = round(sum(row["oracle/masked_groups"] for row in metrics) * 4)
    # masked, reported by reason; most groups are not
    assert groups == sum(masked.values()) > 0 and groups < 24, masked
    assert total("retries") > 0 and total("repairs") > 0
    assert (total("requests") == sum(failing.paid.values()) + sum(failing.failed.values())
            == len(failing.seen))
    assert max(failing.paid.values()) == 1  # a usable reply is never asked for again
    search(world / "runs/grpo_rank/failing_s0", capfd)
    search(world / "paid", capfd)

    # the same again: what was paid is on the disk
    before = Counter(failing.paid)
    main_of(monkeypatch, world, "grpo_rank.py", *flags, "--name", "failing_again")
    first = rows(world / "runs/grpo_rank/failing_again_s0")[0]
    assert first["oracle/cached"] > 0
    assert not [body for body, n in before.items() if failing.paid[body] > n]


def test_the_key_is_in_no_traceback(world, policy, failing, monkeypatch, capfd):
    """The server refuses the key and repeats it; and an error of our own in the middle of a
    request."""
    flags = [*FLAGS, "--api_url", failing.url, "--cache", "refused", "--steps", "2"]
    failing.act = lambda body: dict(status=401, says=f"invalid key: Bearer {SECRET}")
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, world, "grpo_rank.py", *flags, "--name", "refused")
    assert "401" in str(stop.value) and "\n" not in str(stop.value)
    assert SECRET not in "".join(traceback.format_exception(stop.value))
    failing.act = usable
    monkeypatch.setattr(replies, "read_ranking", lambda reply, n: 1 / 0)
    with pytest.raises(ZeroDivisionError) as stop:
        main_of(monkeypatch, world, "grpo_rank.py", *flags, "--name", "broken_in_the_middle")
    shown = "".join(
        traceback.TracebackException.from_exception(stop.value, capture_locals=False).format()
    )
    assert SECRET not in shown
    for name in ("refused_s0", "broken_in_the_middle_s0"):
        search(world / "runs/grpo_rank" / name, capfd)
