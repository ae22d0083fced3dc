"""A miniature of the embedded world, made once per run of the tests: 60 clips, and the weights that
come with the code.

Accuracy means nothing in it; files, shapes and equations do. Scripts run inside `world` with the
repository's code.
"""

import contextlib
import fcntl
import locale
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
if "UTF" not in locale.nl_langinfo(locale.CODESET):  # tests read pages and sources
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
THREADS = os.environ.get("TEST_THREADS", "1")  # one each: several small processes on two cores
os.environ["OMP_NUM_THREADS"] = THREADS
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a CPU, also where there is a GPU
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "ORACLE_API_KEY", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "all_proxy",
             "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
    os.environ.pop(name, None)  # of a job, a shell, a company's network

# Nothing here imports torch: the process of pytest-xdist that hands the tests out need not wait for
# it. Seconds on one core. The slowest files begin, so that at the end no core waits long for
# another.
SECONDS = dict(killed=60, distributed=55, machines=50, dpo=45, reward_model=42, ppo=42,
               checkpoints=28,
               command_line=28, numbers=26, scripts=26, malformed=24, video_llm=22, evaluate=21,
               whole_steps=20,
               resume=20, frames=18, api_oracle=15, ranks=13, moving_shapes=10, memory=10,
               worked_example=9,
               oracle=9, weights=8, paid_oracle=6, untrusted=4, videos=4, forks=3)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: -SECONDS.get(item.path.stem.removeprefix("test_"), 0))


def pytest_collection_finish(session):
    """Everything is imported and nothing has run: the moment to fork what forks the scripts."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(THREADS))
    if any("forked" in getattr(item, "fixturenames", ()) for item in session.items):
        from forked import Forked

        folder = session.config._tmp_path_factory.getbasetemp()
        session.config.stash[FORKED] = Forked(of_all(folder))


FORKED = pytest.StashKey()


def pytest_unconfigure(config):
    if FORKED in config.stash:
        config.stash[FORKED].close()


@pytest.fixture(scope="session")
def forked(pytestconfig):
    """Scripts as processes that need not import anything: see forked.py."""
    return pytestconfig.stash[FORKED]


@pytest.fixture(autouse=True)
def as_after_the_end():
    """What the end of a process undoes, for the scripts that a test runs inside this one: a handler
    of signals that stayed would be that of every process forked by a later test."""
    with a_process():
        yield


@contextlib.contextmanager
def a_process():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.excepthook = sys.__excepthook__
    if "plumbing.processes" in sys.modules:
        sys.modules["plumbing.processes"].unlock()


def run(cwd, *command, check=True, env=None, timeout=600):
    """Run one of the repository's scripts (or `torchrun ...`) in `cwd` -> CompletedProcess with
    text output."""
    head = [sys.executable]
    if command[0] == "torchrun":
        head, command = [sys.executable, "-m", "torch.distributed.run", "--standalone"], command[1:]
    command = [str(REPO / c) if (REPO / c).suffix == ".py" and (REPO / c).exists() else c
               for c in map(str, command)]
    env = {**os.environ, **(env or {})}
    done = subprocess.run(head + command, cwd=cwd, capture_output=True, text=True, env=env,
                          timeout=timeout)
    if check and done.returncode:
        printed = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{printed}")
    return done


def of_all(folder):
    """The folder that the processes of pytest-xdist share."""
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def made_once(tmp_path_factory, name, make):
    """A copy of our own of the folder `name`, which one of the processes of pytest-xdist makes for
    all of them."""
    ours = tmp_path_factory.getbasetemp()
    shared = of_all(ours)
    with open(shared / f"{name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / f"{name}.made").exists():
            make(shared / f"{name}.tmp")
            (shared / f"{name}.tmp").rename(shared / f"{name}.made")
    return shutil.copytree(shared / f"{name}.made", ours / name, symlinks=True)


def make_in(folder, script, *flags):
    from inside import main_of

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch, a_process():
        main_of(monkeypatch, folder, script, *flags)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with data/moving_shapes (videos, annotations), in which every script's defaults
    work."""
    def make(folder):
        make_in(folder, "embedded_world/moving_shapes.py", "--clips", "60", "--workers", "1")

    return made_once(tmp_path_factory, "world", make)


@pytest.fixture(scope="session")
def policy(world, tmp_path_factory):
    """runs/sft/policy_s0/final in the miniature world: an SFT start of a few steps."""
    def make(folder):
        folder.mkdir()
        (folder / "data").symlink_to(world / "data")
        make_in(folder, "sft.py", "--name", "policy", "--data", "data/moving_shapes/train.json",
                "--num_clips", "6",
                "--steps", "4", "--batch_size", "8", "--tokens_per_micro_batch", "1200")

    made = made_once(tmp_path_factory, "policy", make)
    shutil.copytree(made / "runs/sft/policy_s0", world / "runs/sft/policy_s0")
    return world / "runs/sft/policy_s0/final"
