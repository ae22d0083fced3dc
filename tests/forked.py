"""Scripts as processes that import nothing: a server has imported everything once and forks for every run. So a script
can be killed twenty times in a minute. Ranks are forked too, without torchrun, which would end the others of a dead
one: here each has to end by itself."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import REPO

SERVER = """
import importlib, json, os, sys
import torch
torch.set_num_threads(1)
for name in ("sft", "grpo_rank", "reward_model", "ppo_rlaif", "dpo_iter_w2s", "torch.distributed.nn"):
    importlib.import_module(name)
import harness
from flags import parse_args

def one(job, rank):
    os.chdir(job["cwd"])
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2), os.close(0)
    os.environ.update(job["env"])
    if job["world"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]),
                          LOCAL_WORLD_SIZE=str(job["world"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    code, sys.argv = 0, job["argv"]
    try:
        module = importlib.import_module(sys.argv[0].removesuffix(".py"))
        exec(job["plant"], dict(harness=harness, module=module, rank=rank))
        module.main(parse_args(module.Args))
    except SystemExit as stop:  # as the interpreter does
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
while line := sys.stdin.readline():
    job, pids = json.loads(line), []
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            one(job, rank)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class Forked:
    def __init__(self):
        env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env=env)
        assert self.server.stdout.readline() == "ready\n"

    def start(self, cwd, *argv, world=1, plant="", **env):
        """-> process ids, one per rank. plant: Python run first, with `module`, `harness` and `rank`."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.log = Path(cwd, "said")
        job = dict(cwd=str(cwd), argv=list(map(str, argv)), log=str(self.log), world=world, port=port, plant=plant,
                   env=env)
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def wait(self):
        """-> exit codes of the ranks; a negative one is a signal's."""
        return json.loads(self.server.stdout.readline())

    def run(self, cwd, *argv, **more):
        self.start(cwd, *argv, **more)
        return self.wait()

    def said(self, rank=0):
        return Path(f"{self.log}.{rank}").read_text()

    def line(self, words, rank=0):
        """The one line of what it said that has these words."""
        (line,) = [line for line in self.said(rank).splitlines() if words in line]
        return line

    def close(self):
        self.server.stdin.close()
        self.server.wait()


def until(condition, limit=300):
    """Wait for it, looking often: what follows happens at that moment."""
    end = time.time() + limit
    while time.time() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


def a_world(world, folder):
    """Another folder with the data and the SFT start of `world`, in which the same command makes the same run."""
    folder.mkdir()
    (folder / "runs/sft").mkdir(parents=True)
    (folder / "data").symlink_to(world / "data")
    (folder / "runs/sft/policy_s0").symlink_to(world / "runs/sft/policy_s0")
    return folder
