"""Nothing is lost: each training script killed at any moment, stopped by a signal, out of disk,
started twice.

The long mode, `make test-slow`, kills every script at least twenty times, at random (seeded)
moments of set-up, steps and checkpoint writing, and compares metrics and weights with the
uninterrupted run, bit for bit.
"""

import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import torch
from forked import a_world, until
from safetensors.torch import load_file
from test_dpo import SELF

import plumbing.run
from plumbing import embedded, flags, processes

TRAIN = ["--data", "data/moving_shapes/train.json"]
RL = [*TRAIN, "--oracle", "reference", "--G", "3", "--max_new_tokens", "6", "--eval_questions", "4",
      "--eval_steps", "5"]
START = "runs/sft/policy_s0/final"
SCRIPTS = {  # flags, run folder
    "sft": (["sft.py", *TRAIN, "--steps", "11", "--save_steps", "3", "--batch_size", "4",
             "--tokens_per_micro_batch", "600",
             "--name", "x"], "runs/sft/x_s0"),
    "grpo_rank": (["grpo_rank.py", *RL, "--advantage", "random", "--steps", "11", "--save_steps",
                   "3", "--name", "x",
                   "--prompts_per_step", "4"], "runs/grpo_rank/x_s0"),
    "ppo_rlaif": (["ppo_rlaif.py", *RL, "--random_reward", "--steps", "11", "--save_steps", "3",
                   "--name", "x",
                   "--prompts_per_step", "4", "--tokens_per_micro_batch", "600",
                   "--value_warmup", "0"],
                  "runs/ppo_rlaif/x_s0"),
    "reward_model": (["reward_model.py", *TRAIN, "--oracle", "judge", "--oracle_model", START,
                      "--base", START,
                      "--narrative", "false", "--prompts", "24", "--samples", "3",
                      "--max_new_tokens", "6",
                      "--min_margin", "0", "--eval_share", "0.3", "--epochs", "3",
                      "--prompts_per_step", "4",
                      "--tokens_per_micro_batch", "600", "--pack", "3", "--save_steps", "3",
                      "--eval_steps",
                      "5",
                      "--name", "x"],
                     "runs/reward_model/x_s0"),
    "dpo_iter_w2s": (["dpo_iter_w2s.py", *SELF, "--steps", "6", "--questions", "8", "--name", "x"],
                     "runs/dpo_iter_w2s/x_s0"),
}
LONG = {"reward_model": ["--prompts", "60", "--samples", "4"]}  # answers are collected in two parts


@pytest.fixture(scope="module")
def whole(world, policy, forked, tmp_path_factory):
    """whole(name) -> the folder of the uninterrupted run of a script, made once. more: flags."""
    made = {}

    def of(name, *more):
        if (name, *more) not in made:
            place = a_world(world, tmp_path_factory.mktemp(name) / "whole", cold=True)
            assert forked.run(place, *SCRIPTS[name][0], *more) == [0], forked.said()
            made[name, *more] = place / SCRIPTS[name][1]
        return made[name, *more]

    return of


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def steps_done(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def check_same(whole, folder):
    assert rows(folder) == rows(whole) and len(rows(whole)) > 10
    a, b = (load_file(f / "final/model.safetensors") for f in (whole, folder))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not [f for f in folder.rglob("*.tmp")]
    # nothing is a pickle
    assert not [f for f in folder.rglob("*") if f.suffix in (".pt", ".bin", ".pkl")]


# --- SIGKILL --------------------------------------------------------------------------------------
def moment(rng, folder, alive):
    """Wait for a random moment of a random part of the run."""
    part, before = rng.choice(("set-up", "step", "write", "write")), steps_done(folder)
    if part == "set-up":
        until(lambda: not alive(), rng.uniform(0, 0.8))
    elif part == "step":
        until(lambda: steps_done(folder) > before + rng.randrange(4) or not alive())
        until(lambda: not alive(), rng.uniform(0, 0.1))
    else:  # the first signs of a checkpoint, theta or final that is being written
        until(lambda: any(folder.rglob("*.tmp")) or not alive())
        until(lambda: not alive(), rng.choice((0, 0, 0.003, 0.01, 0.03)))
    return part


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_twenty_times(world, policy, forked, whole, tmp_path, name):
    kills, seed = 0, 0
    while kills < 20:  # a run that comes to its end is checked, and another one begun
        place = a_world(world, tmp_path / f"run{seed}", cold=True)
        folder, rng = place / SCRIPTS[name][1], random.Random(seed)
        codes = [None]
        while codes != [0]:
            (pid,) = forked.start(place, *SCRIPTS[name][0], *LONG.get(name, []), "--resume")
            alive = (lambda: os.path.exists(f"/proc/{pid}")
                     and " Z " not in open(f"/proc/{pid}/stat").read())
            if rng.random() < 0.9:
                moment(rng, folder, alive)
                os.kill(pid, signal.SIGKILL)
            codes = forked.wait()
            assert codes[0] in (0, -signal.SIGKILL), forked.said()
            kills += codes[0] != 0
        check_same(whole(name, *LONG.get(name, [])), folder)
        seed += 1


# --- SIGTERM and Ctrl-C ---------------------------------------------------------------------------
@pytest.mark.parametrize("name, number", zip(SCRIPTS, [signal.SIGTERM, signal.SIGINT] * 3))
def test_a_signal_writes_a_checkpoint_and_says_how_to_continue(
    world, policy, forked, whole, tmp_path, name, number
):
    reference = whole(name)
    place = a_world(world, tmp_path / "stopped", cold=True)
    folder = place / SCRIPTS[name][1]
    (pid,) = forked.start(place, *SCRIPTS[name][0])
    assert until(lambda: steps_done(folder) >= 4)
    os.kill(pid, number)
    assert forked.wait() == [128 + number], forked.said()
    line = forked.line("continue with")
    (saved,) = [p.name for p in folder.glob("checkpoint-*")]
    assert (int(saved.split("-")[1]) == steps_done(folder)
            and f"{saved} is written; continue with: python " in line)
    command = shlex.split(line.split("continue with: python ")[1])
    assert command == [*SCRIPTS[name][0], "--resume"]
    assert forked.run(place, *command) == [0], forked.said()
    check_same(reference, folder)


def test_a_signal_during_set_up_ends_at_once(world, policy, forked, tmp_path):
    place = a_world(world, tmp_path / "early")
    wait = ("import time\nfrom inputs import features\n"
            "features.FeatureCache.prepare = lambda *_, **__: time.sleep(600)")
    (pid,) = forked.start(place, *SCRIPTS["grpo_rank"][0], plant=wait)
    assert until(lambda: (place / "runs/grpo_rank/x_s0/args.json").exists())
    os.kill(pid, signal.SIGTERM)
    assert forked.wait() == [143] and "Traceback" not in forked.said()
    assert forked.line("ended at once").endswith("--resume")


def test_a_process_forked_in_training_still_ends_by_a_signal(monkeypatch):
    processes.Stop.watch()
    monkeypatch.setattr(processes.Stop, "training", True)
    fork, runs = multiprocessing.get_context("fork"), multiprocessing.Event()
    child = fork.Process(target=lambda: (runs.set(), time.sleep(600)), daemon=True)
    child.start()
    assert runs.wait(60)  # a signal amid the fork itself is lost
    child.terminate()  # what the end of a multiprocessing.Pool does
    child.join(120)
    ended = child.exitcode
    child.kill()
    assert ended in (143, -signal.SIGTERM) and not processes.Stop.asked


def test_the_command_that_continues(monkeypatch):
    monkeypatch.setattr(flags, "RESUMES", True)
    for given, said in ((["x.py", "--name", "a b"], "python x.py --name 'a b' --resume"),
                        (["x.py", "--resume", "--G", "3"], "python x.py --G 3 --resume"),
                        (["x.py", "--resume", "false", "--G", "3"], "python x.py --G 3 --resume"),
                        (["x.py", "--resume=no"], "python x.py --resume")):
        monkeypatch.setattr("sys.argv", given)
        assert processes.resume_command() == said
    monkeypatch.setattr(flags, "RESUMES", False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes.resume_command() == "torchrun --nproc_per_node=2 x.py"


# --- a full disk ----------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(disk)]
    if (os.geteuid() or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode):
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("name", ["grpo_rank", "ppo_rlaif"])
def test_a_full_disk_leaves_the_last_checkpoint(
    world, policy, forked, whole, small_disk, tmp_path, name
):
    reference = whole(name)
    place = a_world(world, tmp_path / "full")
    folder = place / SCRIPTS[name][1]
    folder.parent.symlink_to(small_disk)
    # behind the first checkpoint somebody else takes the room that is left
    fill = ("import os, shutil\nsave = plumbing.run.save_checkpoint\ndef full(folder, name, *rest, "
            "**more):\n"
            "    if name != 'checkpoint-3':\n"
            f"        with open('{small_disk}/filler', 'wb') as f:\n"
            f"            os.posix_fallocate(f.fileno(), 0, shutil.disk_usage('{small_disk}').free "
            "- 200_000)\n"
            "    save(folder, name, *rest, **more)\nplumbing.run.save_checkpoint = full")
    assert forked.run(place, *SCRIPTS[name][0], plant=fill) == [1]
    assert (forked.line("no room on the disk").endswith("--resume")
            and "Traceback" not in forked.said())
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    (small_disk / "filler").unlink()
    assert forked.run(place, *SCRIPTS[name][0], "--resume") == [0], forked.said()
    check_same(reference, folder)


def test_a_write_that_fails_leaves_the_last_checkpoint(policy, tmp_path, monkeypatch):
    """Wherever in a checkpoint it happens; any user can run this one."""
    from video_llm import load_model

    model, processor = load_model(policy)
    optimizer = torch.optim.AdamW(model.parameters())
    plumbing.run.save_checkpoint(tmp_path, "checkpoint-3", model, processor, optimizer, 3)
    before = {f: f.read_bytes() for f in (tmp_path / "checkpoint-3").iterdir()}
    for place in ("save_model", "save_trainer"):
        with monkeypatch.context() as patched:
            patched.setattr(
                plumbing.run,
                place,
                lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
            )
            with pytest.raises(OSError):
                plumbing.run.save_checkpoint(
                    tmp_path, "checkpoint-6", model, processor, optimizer, 6
                )
        assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_errors_of_a_full_disk_are_one_line(capfd, monkeypatch):
    from safetensors import SafetensorError

    for error in (OSError(28, "No space left on device"),
                  SafetensorError("I/O error: No space left (os error 28)"),
                  Exception("Disk quota exceeded (os error 122)")):
        processes.one_line_if_full(type(error), error, None)
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and "no room on the disk" in said
    processes.one_line_if_full(ValueError, ValueError("x"), None)
    assert "no room" not in capfd.readouterr().err


# --- two runs into one folder ---------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_second_run_into_the_folder_is_refused(world, policy, forked, tmp_path, name):
    place, command = a_world(world, tmp_path / "twice"), SCRIPTS[name][0]
    again = ("import os, sys\nfirst = plumbing.run.open_run\ndef twice(*args):\n    first(*args)\n "
             "   pid = os.fork()\n"
             "    if pid == 0:\n        processes.HELD.clear()\n        first(*args)\n        "
             "os._exit(0)\n"
             "    print('code', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)\n    "
             "sys.exit(0)\n"
             "plumbing.run.open_run = twice")
    assert forked.run(place, *command, "--resume", plant=again) == [0], forked.said()
    said = forked.said().splitlines()
    assert (
        said.count("code 1") == 1
        and sum("another run is writing there now" in line for line in said) == 1
    )


def test_a_lock_ends_with_its_process(forked, tmp_path):
    hold = "import time\nprint(processes.lock('lock'), flush=True)\ntime.sleep(600)"
    (holder,) = forked.start(tmp_path, "sft.py", plant=hold)
    assert until(lambda: (tmp_path / "said.0").exists() and forked.said() == "True\n")
    assert not processes.lock(tmp_path / "lock")
    with pytest.raises(SystemExit):
        processes.own(tmp_path / "lock")
    os.kill(holder, signal.SIGKILL)
    assert forked.wait() == [-signal.SIGKILL]
    # once ours, ours
    assert processes.lock(tmp_path / "lock") and processes.lock(tmp_path / "lock")
    processes.unlock()


def test_a_missing_piece_is_built_once_by_two_runs(tmp_path, monkeypatch):
    """The second one waits, and finds it."""
    monkeypatch.chdir(tmp_path)
    built = []
    monkeypatch.setattr(embedded, "run_script",
                        lambda path, command: built.append(path) or open(path, "w").close())
    first = processes.lock

    def slow(path, wait=False):  # the other run holds the lock, and makes the piece while we wait
        if wait:
            open("piece", "w").close()
        return first(path) if wait else False

    monkeypatch.setattr(processes, "lock", slow)
    embedded.build_if_missing("piece", ["x.py"], "a while", 0)
    assert not built
    monkeypatch.setattr(processes, "lock", first)
    os.remove("piece")
    embedded.build_if_missing("piece", ["x.py"], "a while", 0)
    assert built == ["piece"] and not processes.HELD


# --- what a kill must not lose --------------------------------------------------------------------
def test_metrics_survive_a_kill_while_they_are_cut(tmp_path, monkeypatch):
    """A resumed run takes the rows behind its checkpoint off: aside, then renamed."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(9)))
    before = file.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plumbing.run.Log(tmp_path, 20, 6, 0)
    assert file.read_text() == before
    monkeypatch.undo()
    plumbing.run.Log(tmp_path, 20, 6, 0)
    assert file.read_text().count("\n") == 6


