"""Killed in the middle and continued is the same as never interrupted, bit for bit."""

import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from inside import main_of
from safetensors.torch import load_file

import plumbing.run
from plumbing import files
from plumbing.questions import step_questions
from video_llm import load_model, uniforms_of

TRAIN = ["--data", "data/moving_shapes/train.json", "--steps", "10", "--save_steps", "3", "--lr",
         "3e-3"]
SFT = ["sft.py", *TRAIN, "--batch_size", "8", "--tokens_per_micro_batch", "600"]
GRPO = ["grpo_rank.py", *TRAIN, "--oracle", "reference", "--advantage", "random",
        "--prompts_per_step", "6", "--G", "3",
        "--tokens_per_micro_batch", "150", "--max_new_tokens", "6", "--eval_questions", "5",
        "--eval_steps", "4",
        "--inner_epochs", "2"]
LORA = ["--lora_r", "4"]


def run_and_kill(forked, cwd, folder, step, script, *flags):
    """SIGKILL as soon as the row of `step` is written."""
    plant = ("import os, signal\nplain = plumbing.run.Log.step\ndef wrong(log, now, *args, "
             "**more):\n"
             "    row = plain(log, now, *args, **more)\n"
             f"    return os.kill(os.getpid(), signal.SIGKILL) if now == {step} else "
             "row\nplumbing.run.Log.step = "
             "wrong")
    assert forked.run(cwd, script, *flags, plant=plant) == [-signal.SIGKILL], forked.said()
    assert (f'{{"step": {step},' in (folder / "metrics.jsonl").read_text()
            and not (folder / "final").exists())


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


@pytest.mark.parametrize("command, folder", [
    pytest.param(SFT, "runs/sft/{}_s0", id="sft"),
    pytest.param(GRPO, "runs/grpo_rank/{}_s0", id="grpo_rank"),
    pytest.param([*GRPO, *LORA], "runs/grpo_rank/{}_s0", id="grpo_rank with LoRA")])
def test_killed_and_resumed_equals_uninterrupted(
    world, policy, forked, monkeypatch, command, folder
):
    lora = "lora_" if LORA[0] in command else ""
    whole, broken = (world / folder.format(f"{lora}{name}") for name in ("whole", "broken"))
    run_and_kill(forked, world, broken, 4, *command, "--name", f"{lora}broken")
    saved = [p for p in broken.glob("checkpoint-*") if p.suffix != ".tmp"]
    assert len(saved) == 1 and saved[0].name in ("checkpoint-3", "checkpoint-6", "checkpoint-9")
    # and half of a checkpoint that a kill left behind
    shutil.copytree(saved[0], broken / "checkpoint-13.tmp")
    (broken / "checkpoint-13.tmp/trainer.safetensors").write_bytes(b"half")
    with open(broken / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "losses/sf')  # and half of a row
    main_of(monkeypatch, world, *command, "--name", f"{lora}broken", "--resume")
    main_of(monkeypatch, world, *command, "--name", f"{lora}whole")
    # it measures the end
    assert [r["step"] for r in rows(broken)] == list(range(10 + ("grpo_rank.py" in command)))
    assert rows(broken) == rows(whole)
    for weights in (["final/model"] + (["adapter/adapter_model"] if lora else [])):
        a, b = (load_file(f / f"{weights}.safetensors") for f in (whole, broken))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    if "grpo_rank.py" in command:
        assert (whole / "samples.jsonl").read_text() == (broken / "samples.jsonl").read_text()
        assert ([("eval/accuracy" in row) for row in rows(whole)]
                == [step % 4 == 0 for step in range(10)] + [True])
    assert not list(broken.glob("*.tmp"))


def open_run(folder, **changes):
    from grpo_rank import Args
    args = Args(**{"name": "x", "oracle": "reference", **changes})
    return plumbing.run.open_run(folder, args, 0)


def test_resume_with_a_changed_flag_is_refused(tmp_path, capfd):
    assert open_run(tmp_path / "run") is None
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n')
    before = (tmp_path / "run/args.json").read_text()
    for change in (dict(G=4), dict(lr=1e-4), dict(advantage="published"), dict(beta=0.1),
                   dict(scale_advantages=False)):
        with pytest.raises(SystemExit) as stop:
            open_run(tmp_path / "run", resume=True, **change)
        said = capfd.readouterr().err
        assert stop.value.code == 1 and said.count("\n") == 1
        assert f"--{next(iter(change))}" in said and "same flags" in said
    assert (tmp_path / "run/args.json").read_text() == before
    # the same flags, nothing saved yet: from the start
    assert open_run(tmp_path / "run", resume=True) is None


def test_files_written_aside_never_share_a_name(tmp_path, monkeypatch):
    """Containers share process numbers: two ranks that write the same file at once must not rename
    each other's."""
    names, replace = [], plumbing.run.os.replace
    monkeypatch.setattr(plumbing.run.os, "getpid", lambda: 42)
    monkeypatch.setattr(plumbing.run.os, "replace",
                        lambda a, b: (names.append(str(a)), replace(a, b)))
    for _ in range(20):
        files.write(tmp_path / "narrative.txt", "a red circle")
    assert len(set(names)) == 20 and [p.name for p in tmp_path.iterdir()] == ["narrative.txt"]


def test_a_question_that_comes_twice_in_a_step_is_drawn_anew():
    """Where an epoch ends within a step: equal keys would give equal answers."""
    picks = step_questions(3, 0, SimpleNamespace(prompts_per_step=7, seed=0))
    seen = []
    for i, n in picks:
        assert n == seen.count(i)
        seen.append(i)
    assert max(n for _, n in picks) == 2
    draw = lambda *pick: uniforms_of(0, 5, [pick], 1, 4).tolist()
    once = np.random.default_rng([0, 5, 3]).random((1, 1, 4)).tolist()
    assert draw(3, 0) == once != draw(3, 1)  # the first time as ever


def test_the_newest_whole_checkpoint_counts(tmp_path):
    run = tmp_path / "run"
    open_run(run)
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-120.tmp", "adapter.tmp"):
        (run / name).mkdir()
    assert open_run(run, resume=True) == run / "checkpoint-100"
    assert not (run / "checkpoint-120.tmp").exists() and (run / "checkpoint-9").exists()


def test_the_last_checkpoint_is_there_until_the_run_is_finished(policy, tmp_path):
    model, processor = load_model(policy)
    (tmp_path / "checkpoint-3").mkdir()
    plumbing.run.save_checkpoint(tmp_path, "adapter", model, processor)
    assert (tmp_path / "checkpoint-3").exists()
    plumbing.run.save_checkpoint(tmp_path, "final", model, processor)
    assert not (tmp_path / "checkpoint-3").exists()


def test_a_finished_run_is_not_begun_again(tmp_path, capfd):
    open_run(tmp_path / "run")
    (tmp_path / "run/final").mkdir()
    with pytest.raises(SystemExit) as stop:
        open_run(tmp_path / "run", resume=True)
    assert not stop.value.code
    with pytest.raises(SystemExit) as stop:
        open_run(tmp_path / "run")
    assert stop.value.code == 1 and "in use" in capfd.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_run_without_its_flags_is_refused_in_one_line(tmp_path, capfd, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    if content is not None:
        (tmp_path / "run/args.json").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        open_run(tmp_path / "run", resume=True)
    said = capfd.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and "args.json is missing" in said


def test_resume_without_a_run_is_a_new_run(tmp_path):
    assert open_run(tmp_path / "run", resume=True) is None and (tmp_path / "run/args.json").exists()
