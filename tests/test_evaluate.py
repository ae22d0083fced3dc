"""A comparison must be what it says: hand-computed differences, intervals that respect clips and
seeds, and predictions that are used again exactly as long as nothing they depend on has changed."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import evaluate as ev  # noqa: E402
import evaluation.runs  # noqa: E402
from embedded_world.moving_shapes import TASK_TYPES, write_video  # noqa: E402
from embedded_world.pretrain_tiny import make_tokenizer  # noqa: E402
from evaluation import metrics  # noqa: E402
from inputs.records import Clip  # noqa: E402
from model.compose import compose  # noqa: E402
from plumbing.flags import parse_args  # noqa: E402
from video_llm import (  # noqa: E402
    TINY_VISION,
    Prefix,
    fits,  # noqa: E402
    save_model,
)


# --- numbers --------------------------------------------------------------------------------------
def test_identical_predictions_differ_by_nothing():
    a = np.random.default_rng(0).integers(0, 2, (3, 60))
    assert metrics.paired_bootstrap(a, a, np.arange(60) // 6) == (0, 0, 0)


def test_a_constant_improvement_has_no_uncertainty():
    a = np.zeros((1, 40))
    assert metrics.paired_bootstrap(a, a + 1, np.arange(40) // 4) == (1, 1, 1)
    assert metrics.paired_bootstrap(a + 1, a, np.arange(40) // 4) == (-1, -1, -1)


def test_seeds_are_averaged_before_clips_are_drawn():
    """Two seeds that err on opposite questions: the mean over seeds is better by 1/2 on every
    question, exactly."""
    a, b = np.zeros((2, 10)), np.stack([np.arange(10) % 2, 1 - np.arange(10) % 2])
    assert metrics.paired_bootstrap(a, b, np.arange(10)) == (0.5, 0.5, 0.5)
    # a column of one seed against one of two
    assert metrics.paired_bootstrap(a[:1], b, np.arange(10)) == (0.5, 0.5, 0.5)


def test_the_interval_is_the_binomial_one_where_it_is_known():
    """100 clips of one question, better on 30: the share of a resample is Binomial(100, 0.3) /
    100."""
    b = (np.arange(100) < 30)[None]
    mean, low, high = metrics.paired_bootstrap(np.zeros((1, 100)), b, np.arange(100))
    exact = np.quantile(np.random.default_rng(1).binomial(100, 0.3, 200_000) / 100, [0.025, 0.975])
    # a step of the grid is 0.01
    assert mean == pytest.approx(0.3) and np.allclose([low, high], exact, atol=0.011)


def test_questions_of_one_clip_are_not_independent():
    """The same answers in 20 clips of 20 equal questions: the interval is about sqrt(20) times as
    wide."""
    b = np.repeat(np.arange(20) % 2, 20)[None]
    width = [
        high - low
        for _, low, high in (metrics.paired_bootstrap(0 * b, b, c)
                             for c in (np.arange(400), np.arange(400) // 20))
    ]
    assert 3.5 < width[1] / width[0] < 5.5


def test_the_mean_is_over_questions_when_clips_differ_in_size():
    b, clips = np.array([[1, 0, 0, 0]]), ["x", "y", "y", "y"]
    mean, low, high = metrics.paired_bootstrap(np.zeros((1, 4)), b, clips)
    # resamples: x x (1), x y (1/4), y y (0), a quarter of them at each end
    assert (mean, low, high) == (0.25, 0, 1)


def test_bootstrap_is_seeded():
    rng = np.random.default_rng(0)
    a, b, clips = (rng.integers(0, 2, (2, 500)), rng.integers(0, 2, (2, 500)),
                   rng.integers(0, 300, 500))
    assert metrics.paired_bootstrap(a, b, clips) == metrics.paired_bootstrap(a, b, clips)
    assert metrics.paired_bootstrap(a, b, clips) != metrics.paired_bootstrap(a, b, clips, seed=1)


def test_by_task_type_keeps_the_usual_order_and_averages_over_questions():
    types = ["own type", TASK_TYPES[3], TASK_TYPES[0], TASK_TYPES[3], TASK_TYPES[3]]
    got = evaluation.runs.by_task_type([1, 1, 0, 0, 1], types)
    assert list(got) == [TASK_TYPES[0], TASK_TYPES[3], "own type", "all"]
    assert got == {TASK_TYPES[0]: 0, TASK_TYPES[3]: pytest.approx(2 / 3), "own type": 1,
                   "all": pytest.approx(3 / 5)}


def test_spread_is_the_sample_standard_deviation():
    assert metrics.spread([0.5, 0.7]) == pytest.approx(0.2 / 2**0.5)
    assert metrics.spread([0.5]) is None


def test_chance_knows_the_question_then_the_type_then_nothing():
    rec = lambda q, a, t: dict(question=q, answer=a, task_type=t)
    train = [
        rec("how many?", "two", "count"),
        rec("How many", "Two.", "count"),
        rec("how many?", "one", "count"),
        rec("which?", "one", "count"),
        rec("which?", "one", "count"),
    ]
    test = [
        rec("how many?", "two", "count"),
        rec("how many?", "one", "count"),  # its most frequent answer: two
        rec("never asked?", "one", "count"),
        rec("never asked?", "two", "count"),  # that of the type: one
        rec("never asked?", "one", "new type"),
        rec([dict(role="user", content="hi"), dict(role="user", content="which?")], "one", "count"),
    ]
    assert ev.chance(train, test) == [True, False, True, False, False, True]
    for label, other in (("A, C", "C"), ("$5", "5"), ("plan A", "plan"), ("A", "The"), ("...", "")):
        test = [rec("how many?", label, "count"), rec("how many?", other, "count")]
        assert ev.chance([rec("how many?", label, "count")], test) == [True, False]


def test_questions_are_labelled_and_about_videos(tmp_path):
    turns = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    rows = [
        dict(id="x", video="v.mp4", conversations=turns("<video>\nwhat ?", "it")),
        dict(id="y", video="v.mp4", task_type="own", conversations=turns("<video>\nwhat ?", "it")),
        dict(id="z", video="v.mp4", conversations=turns(f"<video>\n{ev.DESCRIBE}", "it")),
        dict(id="t", conversations=turns("text alone ?", "it")),
    ]
    (tmp_path / "v.mp4").write_bytes(b"-")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    records, _ = ev.open_questions([str(tmp_path / "d.json")], None)
    assert [(r["id"], r["task_type"]) for r in records] == [("x", "no task type"), ("y", "own")]


def test_is_correct_ignores_case_punctuation_and_articles_only():
    assert ev.is_correct("The red circle.", "a Red circle") and not ev.is_correct(
        "red circle moves", "red circle"
    )
    for label in ("A", "The", "-5", "C++", "plan A", "\u0915\u093e", "..."):
        thought = f"<think>{label}</think>"
        assert ev.is_correct(f" {label}\n", label) and ev.is_correct(f"{thought}{label}", label)
        for other in ("", "an", "5", "C", "plan", "\u0915\u0940", "?", thought, f"<think>{label}"):
            assert not ev.is_correct(other, label)
    assert ev.is_correct("\\boxed{Red}", "<answer>red</answer>") and ev.is_correct(" ", "")


# --- runs -----------------------------------------------------------------------------------------
def fake_run(folder, at="final"):
    (folder / at).mkdir(parents=True)
    (folder / at / "config.json").write_text("{}")
    return folder


def test_columns_of_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/sft_s0", "a/sft_s1", "a/sft_s10", "a/other_s1", "a/no_seed"):
        fake_run(Path(name))
    groups = ev.group_runs(["a/sft_s*", "a/other_s1/final", "a/no_seed/"])
    assert {k: [r.seed for r in runs] for k, runs in groups.items()} == {
        "sft": [0, 1, 10],
        "other": [1],
        "no_seed": [None],
    }
    assert groups["other"][0] == (Path("a/other_s1"), Path("a/other_s1/final"), "other", 1)
    assert groups == ev.group_runs(["a/sft_s0", "a/sft_s1", "a/sft_s10", "a/other_s1",
                                    "a/no_seed"]) | {
        "other": groups["other"]
    }  # what an unquoted glob gives
    assert list(ev.group_runs(["a/sft_s0", "a/sft_s1"], ["x", "y"])) == ["x", "y"]
    # folders that differ by the seed alone are one place; what --labels names is the user's choice
    for seed in "01":
        fake_run(Path(f"dpo/run_s{seed}/iteration_2_s{seed}"))
    assert [r.seed for r in ev.group_runs(["dpo/run_s*/iteration_2_s*"])["iteration_2"]] == [0, 1]
    assert [
        r.seed for r in ev.group_runs(["a/sft_s0", "dpo/run_s1/iteration_2_s1"], ["x", "x"])["x"]
    ] == [0, 1]
    bare = fake_run(Path("b/checkpoint"), ".")
    assert ev.find_run("b/checkpoint")[:2] == (bare, bare)


@pytest.mark.parametrize(
    "runs, labels, message",
    [
        (["nowhere"], None, "nowhere is no folder"),
        (["nowhere*"], None, r"nowhere\* is no folder"),
        (["empty"], None, "holds no final/"),
        (["a/x_s0", "a/x_s0"], None, "'x' needs folders of different _s<seed>"),
        (["a/x_s0", "b/x_s1"], None, "'x' would mix runs of a and b; name the columns by --labels"),
        (["*/x_s*"], None, "'x' would mix runs of a and b"),
        (["a/x_s0", "b/x_s0"], ["one"], "--labels has 1 names, --runs 2"),
    ],
)
def test_wrong_runs_are_named(tmp_path, monkeypatch, runs, labels, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x_s0", "b/x_s0", "b/x_s1"):
        fake_run(Path(name))
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=message):
        ev.group_runs(runs, labels)


def test_learning_curve_survives_a_killed_run_and_a_run_without_one(tmp_path):
    assert ev.learning_curve(tmp_path) == {}
    (tmp_path
     / "metrics.jsonl").write_text(
         '{"step": 0, "eval/accuracy": 0.5}\n{"step": 1, "a": 1}\n{"step": 2, "eval')
    assert ev.learning_curve(tmp_path) == {0: 0.5}


# --- the comparison -------------------------------------------------------------------------------
def rows_of(correct, types="kkjj", videos="xxyy"):
    """Prediction rows from 1 (right), 0 (wrong), None (broken video)."""
    return [
        dict(
            video=v,
            task_type=t,
            answer="red circle",
            prediction=None if c is None else "red circle" if c else "no",
            correct=None if c is None else bool(c),
            ended=None if c is None else True,
        )
        for c, t, v in zip(correct, types, videos)
    ]


def runs_of(name, seeds):
    return [ev.Run(Path(f"runs/{name}_s{s}"), Path("-"), name, s) for s in seeds]


def test_compare_by_hand():
    groups = dict(A=runs_of("a", [0, 1]), B=runs_of("b", [1, 0]))
    got = ev.compare(
        groups,
        dict(A=[rows_of([1, 0, 0, 0]), rows_of([1, 1, 0, 0])],
             B=[rows_of([1, 1, 1, 1]), rows_of([0, 0, 1, 1])]),
        [True, False, True, True],
    )
    a, b = got["columns"]
    assert (got["counts"] == {"k": 2, "j": 2, "all": 4}
            and got["chance"] == {"k": 0.5, "j": 1, "all": 0.75})
    assert a["accuracy"]["all"] == dict(
        mean=0.375, spread=pytest.approx(0.25 / 2**0.5), runs=[0.25, 0.5]
    )
    assert (a["token_f1"]["runs"] == [0.25, 0.5] and a["words"]["runs"] == [1.25, 1.5]
            and a["ended"]["mean"] == 1)
    d = b["difference"]
    assert (d["to"], d["mean"], d["task_types"]) == ("A", 0.375, {"k": -0.25, "j": 1, "all": 0.375})
    assert d["worst"] == ("k", -0.25)
    # paired by seed, not by position
    assert d["spread"] == pytest.approx(np.std([0.5 - 0.25, 1 - 0.5], ddof=1))
    assert (d["low"], d["high"]) == (-0.25, 1) and "difference" not in a


def test_only_shared_seeds_are_compared():
    groups = dict(A=runs_of("a", [0, 1]), B=runs_of("b", [1]), C=runs_of("c", [7]))
    got = ev.compare(
        groups,
        dict(A=[rows_of([0, 0, 0, 0]), rows_of([1, 1, 1, 1])], B=[rows_of([1, 1, 1, 1])],
             C=[rows_of([1, 1, 1, 1])]),
    )
    assert (got["columns"][1]["difference"]["mean"] == 0
            and got["columns"][1]["difference"]["seeds"] == [1])
    assert (got["columns"][2]["difference"]["mean"] == 0.5
            and got["columns"][2]["difference"]["spread"] is None)


def test_a_broken_video_is_left_out_of_every_column():
    groups = dict(A=runs_of("a", [0]), B=runs_of("b", [0]))
    got = ev.compare(groups, dict(A=[rows_of([None, None, 1, 0])], B=[rows_of([1, 1, 1, 1])]))
    assert (got["left_out"], got["videos"], got["counts"]) == (2, 1, {"j": 2, "all": 2})
    assert [c["accuracy"]["all"]["mean"] for c in got["columns"]] == [0.5, 1]
    with pytest.raises(ev.DataError):
        ev.compare(dict(A=groups["A"]), dict(A=[rows_of([None] * 4)]))


def test_table_text_and_markdown():
    groups = {"A|B": runs_of("a", [0, 1]), "new": runs_of("b", [0, 1])}
    made = {
        "A|B": [rows_of([1, 0, 0, 0]), rows_of([1, 1, 0, 0])],
        "new": [rows_of([1, 0, 1, 1]), rows_of([0, 1, 1, 1])],
    }
    rows = ev.table(ev.compare(groups, made, [True, False, True, True]))
    cells = {row[0].strip(): row[1:] for row in rows}
    assert len({len(row) for row in rows}) == 1
    assert rows[0] == ["accuracy in %", "A|B", "new", "chance", "questions"]
    assert cells["k"] == ["75.0 ± 35.4", "50.0 ± 0.0", "50.0", "2"] and cells["all"][-1] == "4"
    assert cells["difference to A|B"] == ["", "+37.5 [-25.0, +100.0]", "", ""]
    assert cells["largest loss"][1] == "-25.0 k" and cells["seeds"][:2] == ["0 1", "0 1"]
    lines = ev.as_text(rows).splitlines()
    columns = {line.find("75.0 ± 35.4") for line in lines} - {-1}
    assert lines[0].startswith("accuracy in %") and len(columns) == 1
    assert max(map(len, lines)) == len(lines[1]) == len(lines[0])  # right-aligned below the rule
    markdown = ev.as_markdown(rows).splitlines()
    assert (markdown[0] == "| accuracy in % | A\\|B | new | chance | questions |"
            and markdown[1].count("---:") == 4)
    single = ev.table(ev.compare(dict(A=groups["A|B"][:1]), dict(A=made["A|B"][:1])))
    assert single[0] == ["accuracy in %", "A", "questions"] and single[1] == ["k", "50.0", "2"]


# --- the script, on a model and videos made here --------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs of a tiny untrained model, three videos of which one is broken, eight questions."""
    folder = tmp_path_factory.mktemp("place")
    CLIPVisionModel(CLIPVisionConfig(**TINY_VISION)).save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 64},
                          crop_size={"height": 64, "width": 64}).save_pretrained(
        folder / "clip"
    )
    make_tokenizer(["what is it ?", "a red circle"] * 3).save_pretrained(folder / "llm")
    for seed in (0, 1):
        save_model(
            *compose(str(folder / "clip"), 4, str(folder / "llm"), seed=seed),
            folder / f"runs/tiny_s{seed}/final"
        )
    rng, rows = np.random.default_rng(0), []
    for k in range(3):
        write_video(folder / f"{k}.mp4", rng.integers(0, 255, (6, 64, 64, 3), dtype=np.uint8))
        for question in ("what is it ?", "is it red ?"):
            rows.append(
                (
                    f"{k}_{len(rows)}",
                    f"{k}.mp4",
                    "Object Recognition" if question[0] == "w" else "Counting Problem",
                    question,
                    "a red circle",
                )
            )
    (folder / "2.mp4").write_bytes(b"no video")
    rows.append(("d", "0.mp4", "Description", ev.DESCRIBE, "a red circle"))
    made = [
        dict(
            id=i,
            video=v,
            task_type=t,
            conversations=[{"from": "human", "value": f"<video>\n{q}"},
                           {"from": "gpt", "value": a}],
        )
        for i, v, t, q, a in rows
    ]
    (folder / "test.json").write_text(json.dumps(made))
    (folder / "runs/tiny_s1/metrics.jsonl").write_text(
        '{"step": 0, "eval/accuracy": 0.1}\n{"step": 5, "eval/accuracy": 0.3}\n'
    )
    return folder


def script(folder, monkeypatch, *flags):
    """The script as the command line runs it, in this process: importing torch anew costs more than
    all tests."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    ev.main(parse_args(ev.Args))


def test_two_processes_share_the_questions_out(place, forked, tmp_path):
    """One row per question in the order of the file, the same answers as one process gives, one
    table."""
    both, flags = {}, ["--runs", "runs/tiny_s0", "--data", "test.json", "--out", "out/x"]
    for world in (1, 2):
        folder = shutil.copytree(place, tmp_path / str(world))
        assert forked.run(folder, "evaluate.py", *flags, world=world) == [0] * world, forked.said()
        assert forked.said().count("Accuracy on test.json") == 1
        assert world == 1 or "Accuracy" not in forked.said(1)
        said = json.loads((folder / "runs/tiny_s0/predictions_test.json").read_text())
        both[world] = said["predictions"]
    assert both[1] == both[2] and sum(row["prediction"] is not None for row in both[1]) == 4


def test_a_run_in_progress_is_drawn_at_every_evaluation(tmp_path, monkeypatch):
    row = lambda step, value: (
        json.dumps({"step": step, **({"eval/accuracy": value} if value else {})}) + "\n"
    )
    drawn, file = [], tmp_path / "run/metrics.jsonl"

    def next_rows(pause):  # in place of time.sleep: what the run has done meanwhile
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(rows[: len(drawn) + 2]))
        if len(drawn) == 2:
            (tmp_path / "run/final").mkdir(exist_ok=True)

    rows = [row(0, 0.3), row(1, None), row(25, 0.5), row(50, 0.6)]
    monkeypatch.setattr(ev.time, "sleep", next_rows)
    monkeypatch.setattr(ev, "plot_curve", lambda curves, out: drawn.append((curves, out)))
    ev.watch(tmp_path / "run", tmp_path / "out/demo")
    assert [curves["run"] for curves, _ in drawn] == [
        [{0: 0.3}],
        [{0: 0.3, 25: 0.5}],
        [{0: 0.3, 25: 0.5, 50: 0.6}],
    ]
    assert {out for _, out in drawn} == {f"{tmp_path}/out/demo.png"}
    monkeypatch.undo()
    ev.watch(tmp_path / "run", tmp_path / "out/demo")
    assert ((tmp_path / "out/demo.png").stat().st_size > 10_000
            and len(list((tmp_path / "out").iterdir())) == 1)


def test_script_answers_once_draws_again_and_notices_changes(place, monkeypatch, capsys):
    shutil.copy(place / "test.json", place / "train.json")  # chance: every answer known
    flags = [
        "--runs",
        "runs/tiny_s*",
        "runs/tiny_s1/final",
        "--labels",
        "both,one",
        "--data",
        "test.json",
        "--out",
        "out/demo",
    ]
    script(place, monkeypatch, *flags)
    out = capsys.readouterr().out
    assert (
        "Accuracy on test.json: 4 questions about 2 videos" in out
        and "1 videos with 2 questions are left out" in out
    )
    file = place / "runs/tiny_s0/predictions_test.json"
    saved = json.loads(file.read_text())
    assert [row["id"] for row in saved["predictions"]] == ["0_0", "0_1", "1_2", "1_3", "2_4", "2_5"]
    assert [row["prediction"] is None for row in saved["predictions"]] == [False] * 4 + [True] * 2
    summary = json.loads((place / "out/demo.json").read_text())
    # seed 1 with itself
    assert summary["chance"]["all"] == 1 and summary["columns"][1]["difference"]["mean"] == 0
    assert (place / "out/demo.png").stat().st_size > 10_000
    assert (
        "| accuracy in % | both | one | chance | questions |" in (place / "out/demo.md").read_text()
    )

    # A mark put into the predictions by hand comes back as long as nothing has changed ...
    mark = "put there by hand"
    saved["predictions"][0]["prediction"] = mark
    file.write_text(json.dumps(saved))
    script(place, monkeypatch, *flags)
    assert "used again" in capsys.readouterr().out and mark in file.read_text()
    # ... and is gone when the weights have.
    run, records = ev.find_run("runs/tiny_s0"), ev.open_questions(["test.json"], None)[0]
    before = ev.fingerprint(run.checkpoint, records)
    shutil.copy(place / "runs/tiny_s1/final/model.safetensors", run.checkpoint)
    script(place, monkeypatch, *flags)
    assert mark not in file.read_text()
    after = ev.fingerprint(run.checkpoint, records)
    assert json.loads(file.read_text())["fingerprint"] == after != before
    assert ev.fingerprint(run.checkpoint, [{**r, "question": "else ?"} for r in records]) != after
    os.utime("0.mp4", ns=(1, 1))
    assert ev.fingerprint(run.checkpoint, records) != after


def test_missing_training_videos_cost_the_chance_column_alone(place, monkeypatch, capsys):
    rows = json.loads((place / "test.json").read_text())
    (place
     / "labels.json").write_text(json.dumps([row | {"video": "elsewhere.mp4"} for row in rows]))
    script(place, monkeypatch, "--runs", "runs/tiny_s1", "--data", "test.json", "--chance_data",
           "labels.json")
    out = capsys.readouterr().out
    assert ("no chance column: labels.json: none of 7 rows can be used" in out
            and "accuracy in %" in out)
    assert not any("chance" in line for line in out[out.index("accuracy in %"):].splitlines())


def test_questions_after_earlier_turns_are_asked(place, monkeypatch):
    turns = [("human", "<video>\nwhat is it ?"), ("gpt", "a red circle"), ("human", "is it red ?"),
             ("gpt", "red"),
             ("human", "is it a circle ?"), ("gpt", "a circle")]
    rows = [dict(id="t", video="0.mp4",
                 conversations=[{"from": who, "value": text} for who, text in turns])]
    (place / "multi_turn.json").write_text(json.dumps(rows))
    script(place, monkeypatch, "--checkpoint", "runs/tiny_s1", "--benchmark", "held_out", "--data",
           "multi_turn.json")
    items = (place / "runs/tiny_s1/benchmarks/report_items.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in items] == ["t", "t#2", "t#3"]


def test_a_record_fits_if_its_last_question_alone_need_be_cut(place):
    _, processor = ev.load_model(place / "runs/tiny_s1/final")
    ask = lambda text: {"role": "user", "content": text}
    talk = [ask("what is it ? " * 30), {"role": "assistant", "content": "a red circle"},
            ask("is it red ? " * 30)]
    earlier = len(processor.prompt_ids([*talk[:2], ask("is")]))
    record = lambda question: dict(question=question, clip=Clip("0.mp4"))
    assert fits(processor, record(talk), earlier) and not fits(processor, record(talk), earlier - 1)
    assert (fits(processor, record("what is it ? " * 30), 20)
            and not fits(processor, record("what is it ?"), 5))


def test_answer_tells_which_answers_ended(place, monkeypatch):
    """Greedy answers through the library's own `generate`, one at a time, are the reference for
    text and EOS."""
    model, processor = ev.load_model(place / "runs/tiny_s1/final")
    cache = ev.FeatureCache(model, processor, place / "cache")
    records = [
        dict(clip=Clip(str(place / f"{k % 2}.mp4")), question=q)
        for k, q in enumerate(["what is it ?", "red ?", "it ?"])
    ]
    eos = processor.tokenizer.eos_token_id
    want, want_ended = [], []
    for r in records:
        prefix = Prefix.build(processor, cache, [r["question"]], [r["clip"]])
        out = model.generate(
            input_ids=prefix.input_ids,
            attention_mask=prefix.attention_mask,
            max_new_tokens=5,
            do_sample=False,
            **prefix.model_inputs(),
        )[0, prefix.input_ids.shape[1] :]
        want.append(processor.tokenizer.decode(out, skip_special_tokens=True).strip())
        want_ended.append(eos in out.tolist())
    assert ev.answer(model, processor, cache, records, max_new_tokens=5) == want
    assert ev.answer(
        model, processor, cache, records, max_new_tokens=5, batch_size=2, return_ended=True
    ) == (want, want_ended)
    monkeypatch.setattr(
        model.language_model.lm_head,
        "forward",
        lambda x: torch.nn.functional.one_hot(
            torch.full(x.shape[:-1], eos), model.config.text_config.vocab_size
        ).float(),
    )
    assert ev.answer(model, processor, cache, records, return_ended=True) == ([""] * 3, [True] * 3)


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--runs", "nowhere"], 2, "evaluate.py: --runs: nowhere is no folder"),
        (["--runs", "runs/tiny_s0", "--data", "none.json"], 1, "none.json"),
        (["--runs", "runs/tiny_s0", "--data", "empty.json"], 1, "empty.json"),
        (["--runs", "torn_s0", "--data", "test.json"], 1, "torn_s0/final"),
    ],
)
def test_bad_input_is_one_line(place, monkeypatch, capsys, flags, code, message):
    (place / "empty.json").write_text("[]")
    if not (place / "torn_s0").exists():
        shutil.copytree(place / "runs/tiny_s1/final", place / "torn_s0/final")
        weights = place / "torn_s0/final/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        script(place, monkeypatch, *flags)
    err = capsys.readouterr().err + (
        "" if stop.value.code == 2 else stop.value.code
    )  # sys.exit prints its text, code 1
    assert (
        (stop.value.code == 2) == (code == 2)
        and message in err
        and len(err.strip().splitlines()) == 1
    ), err
