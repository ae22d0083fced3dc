"""Judges: a server on loopback that replies well, in prose, never, or with a fraction; the local
judge; aspects."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from evaluation import judges
from evaluation.benchmark_files import row_of
from inputs.records import Clip, DataError


@pytest.fixture
def server(monkeypatch):
    """Replies by what the prediction says; counts requests."""
    state = SimpleNamespace(seen=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            messages = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"]
            state.seen.append(messages)
            said = messages[1]["content"].split("Predicted Answer: ")[1].split("\n")[0]
            reply = {
                "good": "{'pred': 'yes', 'score': 4.8}",
                "bad": '{"pred": "no", "score": 1}',
                "never": "I would say yes.",
                "half": "{'pred': 'partially correct', 'score': 2}",
                "echo": "Said: {'pred': 'yes', 'score': 5}. Mine: " * (len(messages) == 2)
                + "{'pred': 'no', 'score': 0}",
                "repaired": "yes" if len(messages) == 2 else "{'pred': 'yes', 'score': 5}",
            }.get(said)
            status = 400 if said == "refused" else 404 if said == "unknown" else 200
            body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                               "choices": [
                {"index": 0, "finish_reason": "stop",
                 "message": {"role": "assistant", "content": reply}}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()


def judge_of(server, folder):
    return judges.ApiJudge(SimpleNamespace(
        api_url=server.url, api_model="m", cache=str(folder), api_concurrency=4, api_timeout=60.0,
        api_retries=0,
        api_max_tokens=64, api_frames=0, api_size=64, api_extra=""))


def rows_of(*said):
    return [row_of(str(k), f"v{k}", "what?", "cat", {}, said=[text]) for k, text in enumerate(said)]


def test_a_servers_verdicts_are_read_repaired_counted_and_asked_once(server, tmp_path):
    rows = rows_of("good", "bad", "never", "half", "repaired", "refused", "")
    values, problems = judges.score_rows("msvd_qa", rows, judge_of(server, tmp_path))
    assert [v["accuracy"] for v in values] == [1, 0, None, None, 1, None, 0]
    assert [v["accuracy_all"] for v in values] == [1, 0, 0, 0, 1, 0, 0]
    assert [v["score"] for v in values] == [4, 1, None, 2, 5, None, 0]
    assert problems == {"no dictionary": 1, "verdict neither way": 1, "no reply": 1, "blank": 1}
    asked = [messages for messages in server.seen if "never" in messages[1]["content"]]
    assert sorted(map(len, asked)) == [2, 4, 6]  # three attempts, each with the reason
    before = len(server.seen)
    again, _ = judges.score_rows(
        "msvd_qa", rows_of("good", "bad", "repaired"), judge_of(server, tmp_path)
    )
    assert again == [values[0], values[1], values[4]] and len(server.seen) == before  # kept on disk
    judges.score_rows("msvd_qa", rows_of("never"), judge_of(server, tmp_path))
    assert len(server.seen) == before + 3  # what could not be read is not kept


def test_an_answer_that_brings_its_own_verdict_is_asked_about_again(server, tmp_path):
    values, problems = judges.score_rows("msvd_qa", rows_of("echo"), judge_of(server, tmp_path))
    assert values[0]["accuracy"] == values[0]["score"] == 0 and not problems
    assert "several verdicts" in server.seen[1][-1]["content"]


def test_the_exact_judge_reads_what_is_said_after_the_thinking():
    rows = rows_of("<think>a dog? no</think>\nA cat.", "<answer>Cat</answer>", "\\boxed{cat}",
                   "<think>it is a cat", "<think>it is a cat</think>", "<think>cat</think>dog",
                   "cat")
    values, problems = judges.score_rows("msvd_qa", rows, judges.ExactJudge())
    assert [v["accuracy"] for v in values] == [v["exact"] for v in values] == [1, 1, 1, 0, 0, 0, 1]
    assert [v["score"] for v in values] == [5, 5, 5, 0, 0, 0, 5]
    assert problems == {"blank": 2, "replies hold thinking": 4}


def test_a_blank_prediction_is_never_right():
    for label in ("A", "The", "an", "...", "", None, "C++", "-5"):
        row = row_of("0", "v", "what?", label, {}, said=[" "])
        assert judges.score_rows("msvd_qa", [row], judges.ExactJudge())[0][0]["exact"] == 0
    pairs = ("A", "the"), ("A", "..."), ("-5", "5"), ("C++", "C"), ("\u0915\u093e", "\u0915\u0940")
    for label, said in pairs:
        rows = [row_of("0", "v", "what?", label, {}, said=[text]) for text in (said, label)]
        values, _ = judges.score_rows("msvd_qa", rows, judges.ExactJudge())
        assert [v["exact"] for v in values] == [v["accuracy"] for v in values] == [0, 1]
        assert values[0]["score"] < values[1]["score"] == 5


def test_official_letters_keep_their_rule_beside_the_number_of_replies_that_hold_thinking():
    said = ["<think>Apples, near (A)</think>\n<answer>C</answer>", "C", "(B)? No.</think>C"]
    options = ["A. Apples.", "B. Candles.", "C. Berries."]
    rows = [row_of(text, "v", "what?", "C", {}, options=options, said=[text]) for text in said]
    values, problems = judges.score_rows("video_mme", rows, None)
    assert [v["acc_all"] for v in values] == [0, 1, 0] and problems == {"replies hold thinking": 2}
    assert [v["acc_strict"] for v in values] == [1, 1, 1]
    values, problems = judges.score_rows("nextqa", rows, None)  # its official files hold numbers
    assert [v["acc_all"] for v in values] == [1, 1, 1] and problems == {"replies hold thinking": 2}
    for row in rows:
        row |= dict(question="what?\n" + "\n".join(options), answer=options[2])
    values, problems = judges.score_rows("tempcompass", rows, None)
    assert [v["accuracy"] for v in values] == [None, 1, None]
    assert problems == {"no match": 2, "replies hold thinking": 2}
    assert [v["acc_strict"] for v in values] == [1, 1, 1]
    rows[0] |= dict(said=None, reply=1)  # a rating and no text
    assert "acc_strict" not in judges.score_rows("tempcompass", rows, None)[0][0]


def test_a_server_that_knows_no_model_ends_the_script(server, tmp_path):
    with pytest.raises(DataError, match="404"):
        judges.score_rows("msvd_qa", rows_of("unknown"), judge_of(server, tmp_path))


def test_a_server_that_stays_silent_is_given_up(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(judges, "ENOUGH", 5)
    judge = judge_of(server, tmp_path)
    judge.args.api_concurrency = 1
    rows = rows_of(*["refused"] * 4, "good", *["refused"] * 40)
    for k, row in enumerate(rows):
        row["question"] = f"what {k}?"
    with pytest.raises(DataError, match="5 questions in a row got no reply.*HTTP 400"):
        judges.score_rows("msvd_qa", rows, judge)
    assert 10 <= len(server.seen) < 20  # four do not make a row of five; the rest is not asked
    assert capfd.readouterr().err.count("more of the kind") == 1


@pytest.mark.parametrize(
    "said, words",
    [
        ("refused", "HTTP 400"),
        ("never", 'it begins "I would say yes."'),
        ("nothing", "finish_reason stop; no text"),
    ],
)
def test_a_judge_that_never_gives_a_verdict_ends_the_script(
    server, tmp_path, monkeypatch, capfd, said, words
):
    from inside import main_of

    rows = [dict(id=str(k), question=f"what {k}?", answer="cat", pred=said) for k in range(3)]
    (tmp_path / "said.json").write_text(json.dumps(rows))
    flags = [
        "--predictions",
        "said.json",
        "--benchmark",
        "msvd_qa",
        "--judge",
        "api",
        "--api_url",
        server.url,
        "--api_model",
        "m",
        "--api_retries",
        "0",
    ]
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, tmp_path, "evaluate.py", *flags)
    shown = capfd.readouterr()
    assert "not one verdict on 3 predictions" in str(stop.value) and "accuracy" not in shown.out
    assert words in shown.err and shown.err.count("more of the kind") == 1
    (tmp_path / "said.json").write_text(json.dumps([*rows, dict(rows[0], id="3", pred="good")]))
    main_of(monkeypatch, tmp_path, "evaluate.py", *flags)
    assert "accuracy" in capfd.readouterr().out


def test_a_judge_silent_on_one_of_two_columns_ends_with_an_error_after_the_report(
    server, tmp_path, monkeypatch, capfd
):
    """Zeros of predictions on which no verdict came are no accuracy, whatever it said of others."""
    from inside import main_of

    for name in ("good", "never"):
        rows = [dict(id=str(k), question=f"what {k}?", answer="cat", pred=name) for k in range(2)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    flags = ["--benchmark", "msvd_qa", "--judge", "api", "--api_url", server.url, "--api_model",
             "m", "--api_retries", "0"]
    with pytest.raises(SystemExit, match="not one verdict could be read on never, msvd_qa:"):
        main_of(monkeypatch, tmp_path, "evaluate.py", "--compare", "good.json", "never.json",
                *flags)
    assert "accuracy" in capfd.readouterr().out
    main_of(monkeypatch, tmp_path, "evaluate.py", "--compare", "good.json", *flags)


def test_the_local_judge_scores_by_its_preference():
    """[D1] P = 1/2 is as good as the reference: 5 and yes; of two predictions the worse one
    counts."""
    import torch

    p = {"same": 0.5, "close": 0.31, "far": 0.29, "better": 0.9}
    judge = judges.LocalJudge.__new__(judges.LocalJudge)
    judge.oracle = SimpleNamespace(preferences=lambda videos, asks, groups: torch.tensor(
        [[[0.5, 1 - p[b]], [p[b], 0.5]] for _, b in groups]))
    thought = "<think>same?</think>"
    rows = rows_of(thought + "same", "<answer>close</answer>", *list(p)[2:])
    rows += [row_of("z", "v", "a?", "cat", {}, asks=["a?", "b?"], said=["better", thought + "far"])]
    replies = judge.judge(rows, False)
    assert [(r["pred"], r["score"]) for r in replies] == [
        ("yes", 5),
        ("yes", 3),
        ("no", 2),
        ("yes", 5),
        ("no", 2),
    ]
    judge.oracle.aspects = lambda videos, asks, groups: (
        torch.tensor([[[len(b), 0, 0, 0]] for (b,) in groups]),
        torch.tensor([True, False])[: len(groups)])
    assert judge.judge(rows[:1], True)[0]["relevance"] == len("same")
    assert judge.judge(rows[:2], True)[1] is None  # not scored: no zeros
    judge.oracle.preferences = lambda videos, asks, groups: torch.full(
        (len(groups), 2, 2), torch.nan
    )
    assert judge.judge(rows, False) == [None] * 5


def test_a_local_judge_is_made_of_a_checkpoint_and_keeps_its_verdicts(world, policy, tmp_path):
    rows = rows_of("red", "")
    for row in rows:
        row["clip"] = Clip(sorted((world / "data/moving_shapes").rglob("*.mp4"))[0])
    judge = judges.LocalJudge(str(policy), tmp_path)
    values, problems = judges.score_rows("msvd_qa", rows, judge)
    assert values[0]["score"] in range(6) and problems == {"blank": 1}
    again = judges.LocalJudge(str(policy), tmp_path)
    again.judge = None  # nothing is asked twice
    assert judges.score_rows("msvd_qa", rows, again)[0] == values
    assert judge.mark in judge.name and len(judge.file.read_text().splitlines()) == 1


def test_aspects_and_their_ratio():
    points = {"good": dict(relevance=5, accuracy=4, detail=3, clarity=2),
              "bad": dict.fromkeys(judges.ASPECTS, 1)}
    judge = SimpleNamespace(replies=lambda jobs: [points.get(row["said"][0]) for _, row in jobs])
    values, problems = judges.score_rows("mmaip_v", rows_of("good", "bad", "unseen", ""), judge)
    assert [v["score"] for v in values] == [3.5, 1, None, 0] and [v["ratio"] for v in values] == [
        1,
        0,
        None,
        0,
    ]
    assert (values[0]["relevance_points"] == 5 and values[2]["ratio_all"] == 0
            and problems["no reply"] == 1)
