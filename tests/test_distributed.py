"""Two processes, one in trouble: the job ends with a non-zero code and with that process's own
words, and nobody waits.

The ranks are forked without torchrun, which would end the others of a dead one: here each of them
has to notice.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from forked import a_world, until
from test_killed import SCRIPTS, check_same, rows, steps_done

GRPO = [*SCRIPTS["grpo_rank"][0], "--tokens_per_micro_batch", "200"]
FOLDER = SCRIPTS["grpo_rank"][1]


def at_step_2(what):
    """Python that does `what` on rank 1 when the sampling of step 2 begins."""
    return ("import os, sys, signal\ncount, sample = [0], module.generate\ndef wrong(*args, "
            "**more):\n"
            f"    count[0] += 1\n    if rank == 1 and count[0] == 3:\n        {what}\n"
            "    return sample(*args, **more)\nmodule.generate = wrong")


@pytest.mark.parametrize("fault, words", [
    ("os.kill(os.getpid(), signal.SIGKILL)", None),
    ("raise RuntimeError('the device of rank 1 is gone')", "the device of rank 1 is gone"),
    ("sys.exit('rank 1 gives up')", "rank 1 gives up")], ids=["killed", "raises", "exits"])
def test_one_rank_dies(world, policy, forked, tmp_path, fault, words):
    place = a_world(world, tmp_path / "dies")
    codes = forked.run(place, *GRPO, world=2, plant=at_step_2(fault))
    assert codes[1] == (1 if words else -signal.SIGKILL)
    assert codes[0] == 1, forked.said()  # it does not wait: its next message fails
    assert words is None or words in forked.said(1)
    assert steps_done(place / FOLDER) == 2 and not (place / FOLDER / "final").exists()


def test_one_rank_hangs_in_a_video(world, policy, forked, tmp_path):
    place = a_world(world, tmp_path / "hangs")
    plant = ("import time\nfrom inputs import frames\nframes.STALL = 1.0\nscan = frames._scan\n"
             "frames._scan = lambda path: time.sleep(600) if rank == 1 else scan(path)")
    codes = forked.run(place, *GRPO, "--cache", "fresh", world=2, plant=plant)
    assert codes == [1, 1]
    line = [line for line in forked.said(1).splitlines() if line.startswith("rank 1: ")]
    assert len(line) == 1 and ".mp4: the decoder hangs" in line[0]


def test_one_rank_hangs_in_sampling(world, policy, forked, tmp_path):
    """It is given up after STEP; only what may take long on one process (videos, narratives) is
    waited for longer."""
    place = a_world(world, tmp_path / "hangs")
    plant = "from datetime import timedelta\nprocesses.STEP = timedelta(seconds=5)\n" + at_step_2(
        "import time; time.sleep(8)")
    codes = forked.run(place, *GRPO, world=2, plant=plant)
    assert codes == [1, 1] and steps_done(place / FOLDER) == 2


def test_ranks_that_see_different_checkpoints_do_not_begin(world, policy, forked, tmp_path):
    """As on two machines with disks of their own: rank 1 finds no checkpoint, and would begin anew
    with other data."""
    place = a_world(world, tmp_path / "apart")
    forked.run(place, *GRPO, world=2,
               plant="plumbing.run.Log.step = lambda log, step, show, old=plumbing.run.Log.step: "
               "os.kill(os.getpid(), 9) if step == 4 else old(log, step, show)\nimport os")
    plant = ("from pathlib import Path\nseen = Path.glob\n"
             "Path.glob = lambda path, what: [] if rank == 1 and what.startswith('checkpoint') "
             "else seen(path, what)")
    codes = forked.run(place, *GRPO, "--resume", world=2, plant=plant)
    assert codes == [1, 1]
    assert ("its last checkpoint: not the same on all processes (rank 1 differs from rank 0)"
            in forked.said())


def test_what_all_ranks_refuse_alike_is_said_once(world, policy, forked, tmp_path):
    place = a_world(world, tmp_path / "taken")
    (place / FOLDER).mkdir(parents=True)
    (place / FOLDER / "metrics.jsonl").write_text("")
    assert forked.run(place, *GRPO, world=2) == [1, 1]
    assert "is in use: continue it with --resume" in forked.line("in use")
    assert "in use" not in forked.said(1)


def test_ranks_that_read_different_records_do_not_begin(world, policy, forked, tmp_path):
    place = a_world(world, tmp_path / "records")
    plant = ("from plumbing import questions\nread = questions.read_records\ndef fewer(*args, "
             "**more):\n    records, "
             "report = read(*args, **more)\n"
             "    return records[:: 1 + rank], report\nquestions.read_records = fewer")
    codes = forked.run(place, *GRPO, world=2, plant=plant)
    assert codes == [1, 1] and "its records: not the same on all processes" in forked.said()


@pytest.mark.parametrize("number", ["float('nan')", "float('inf')"])
def test_one_rank_meets_a_number_that_is_none(world, policy, forked, tmp_path, number):
    """Its loss is not finite: the run stops before the weights change, and its batch is written
    out."""
    place = a_world(world, tmp_path / "nan")
    plant = ("count, kl = [0], module.kl_k3\ndef wrong(a, b):\n    count[0] += 1\n"
             f"    return kl(a, b) + ({number} if rank == 1 and count[0] == 3 else "
             "0)\nmodule.kl_k3 = wrong")
    codes = forked.run(place, *GRPO, world=2, plant=plant)
    assert codes == [1, 1], forked.said()
    said = [line for line in forked.said(1).splitlines() if "not_finite_step2_rank1.json" in line]
    assert len(said) == 1 and said[0].startswith("step 2, rank1: losses/")
    batch = json.loads((place / FOLDER / "not_finite_step2_rank1.json").read_text())
    assert len(batch) == 2 and all(len(b["answers"]) == 3 for b in batch)
    assert steps_done(place / FOLDER) == 2


@pytest.fixture(scope="module")
def whole(world, policy, forked, tmp_path_factory):
    """The folder of the uninterrupted run of two ranks."""
    place = a_world(world, tmp_path_factory.mktemp("two") / "whole")
    assert forked.run(place, *GRPO, world=2) == [0, 0], forked.said(1)
    return place / FOLDER


@pytest.mark.parametrize("who", ["both", "one"])
def test_a_signal_stops_all_ranks_at_the_same_step(world, policy, forked, whole, tmp_path, who):
    place = a_world(world, tmp_path / "stopped")
    pids = forked.start(place, *GRPO, world=2)
    assert until(lambda: steps_done(place / FOLDER) >= 3)
    for pid in pids if who == "both" else pids[1:]:
        os.kill(pid, signal.SIGTERM)
    assert forked.wait() == [143, 143], forked.said()
    (saved,) = (place / FOLDER).glob("checkpoint-*")
    assert saved.name == f"checkpoint-{steps_done(place / FOLDER)}"
    line = forked.line("continue with")
    again = f"torchrun --nproc_per_node=2 {' '.join(GRPO)} --resume"
    assert line.endswith(f"{saved.name} is written; continue with: {again}")
    assert forked.run(place, *GRPO, "--resume", world=2) == [0, 0], forked.said(1)
    check_same(whole, place / FOLDER)


def damaged_data(world, folder):
    """train.json where a tenth of the videos, unevenly spread, cannot be read. -> file, names of
    the broken ones."""
    records = json.loads((world / "data/moving_shapes/train.json").read_text())
    names = sorted({r["video"] for r in records})
    broken = names[: len(names) // 10 + 1]  # neighbours: more of them on one rank than on the other
    shutil.copytree(world / "data/moving_shapes/videos", folder / "videos")
    for k, name in enumerate(broken):
        data = (folder / name).read_bytes()
        damage = (b"", data[: len(data) // 2], np.random.default_rng(k).bytes(5000))[k % 3]
        (folder / name).write_bytes(damage)
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json", broken


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tenth_of_the_videos_broken_on_two_ranks(world, policy, forked, tmp_path, name):
    """The run completes on both, in step with each other, and lists them."""
    place = a_world(world, tmp_path / "tenth")
    (place / "mine").mkdir()
    file, broken = damaged_data(world, place / "mine")
    flags = [str(file) if last == "--data" else f
             for last, f in zip(["", *SCRIPTS[name][0]], SCRIPTS[name][0])]
    if "--data" not in flags:
        flags += ["--data", str(file)]
    flags += ["--tokens_per_micro_batch", "300"] if name != "grpo_rank" else []
    flags += ["--epochs", "2"] if name == "reward_model" else ["--steps", "4"]
    flags += ["--eval_questions", "3"] if name in ("grpo_rank", "ppo_rlaif") else []
    assert forked.run(place, *flags, world=2) == [0, 0], forked.said() + forked.said(1)
    folder = place / SCRIPTS[name][1]
    assert (folder / "final/model.safetensors").exists() and len(rows(folder)) > 3
    lists = [json.loads(f.read_text())
             for f in place.rglob("broken_videos.json") if "policy_s0" not in str(f)]
    listed = {Path(place).name and key.split(" [")[0] for part in lists for key in part}
    assert {Path(p).name for p in listed} == {Path(b).name for b in broken}
    assert all("\n" not in why for part in lists for why in part.values())


def test_torchrun_of_a_dead_rank_ends_with_an_error(world, policy, forked, tmp_path):
    place = a_world(world, tmp_path / "torchrun")
    (place / "fault.py").write_text(
        "import os, sys\nimport grpo_rank\nfrom plumbing.flags import parse_args\nsample = "
        "grpo_rank.generate\n"
        "def wrong(*args):\n    if os.environ['RANK'] == '1':\n        sys.exit('rank 1 gives "
        "up')\n"
        "    return sample(*args)\ngrpo_rank.generate = "
        "wrong\ngrpo_rank.main(parse_args(grpo_rank.Args))")
    command = ["torchrun", "--standalone", "--nproc_per_node=2", place / "fault.py", *GRPO[1:]]
    assert forked.run(place, *command) == [1] and "rank 1 gives up" in forked.said()
