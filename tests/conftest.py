"""A miniature of the embedded world, made once per test session: 60 clips, and the weights that come with the code.

Accuracy means nothing in it; files, shapes and equations do. Scripts run inside `world` with the repository's code.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ["OMP_NUM_THREADS"] = "1"  # several small processes on two cores

import torch  # noqa: E402

import harness  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_after_the_end():
    """What the end of a process undoes, for the scripts that a test runs inside this one: a handler of signals that
    stayed would be that of every process forked by a later test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.excepthook = sys.__excepthook__
    harness.unlock()


def run(cwd, *command, check=True, env=None):
    """Run one of the repository's scripts (or `torchrun ...`) in `cwd` -> CompletedProcess with text output."""
    head = [sys.executable]
    if command[0] == "torchrun":
        head, command = [sys.executable, "-m", "torch.distributed.run", "--standalone"], command[1:]
    command = [str(REPO / c) if c.endswith(".py") and "/" not in c else c for c in map(str, command)]
    env = {**os.environ, **(env or {})}
    done = subprocess.run(head + command, cwd=cwd, capture_output=True, text=True, env=env, timeout=300)
    if check and done.returncode:
        printed = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{printed}")
    return done


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with data/moving_shapes (videos, annotations), in which every script's defaults work."""
    folder = tmp_path_factory.mktemp("world")
    run(folder, "moving_shapes.py", "--clips", "60")
    return folder


@pytest.fixture(scope="session")
def policy(world):
    """runs/sft/policy_s0/final in the miniature world: an SFT start of a few steps."""
    run(world, "sft.py", "--name", "policy_s0", "--data", "data/moving_shapes/train.json", "--num_clips", "6",
        "--steps", "4", "--batch_size", "8", "--micro_batch_size", "8")
    return world / "runs/sft/policy_s0/final"
