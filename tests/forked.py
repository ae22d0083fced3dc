"""Scripts as processes that import nothing: a server has imported everything once and forks for
every run. So a script can be killed twenty times in a minute. Ranks are forked too, without
torchrun, which would end the others of a dead one: here each has to end by itself.

There are two servers, a copy of this process and a fresh interpreter, because the processes of a
run do not hash strings alike: neighbouring ranks come of different ones, and so do a run, its
resumption and a run inside this process.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MODULES = ("sft", "grpo_rank", "reward_model", "ppo_rlaif", "dpo_iter_w2s", "evaluate", "peft",
           "torch.distributed.nn",
           "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict",
           "torch.utils.tensorboard")


def prepare():
    import importlib

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for name in MODULES:
        importlib.import_module(name)


def listen(file):
    """Import everything, then serve whoever asks at the port in `file`, until standard input
    ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        Path(f"{file}.tmp").write_text(str(server.getsockname()[1]))
        os.replace(f"{file}.tmp", file)
        prepare()
        while server in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if os.fork() == 0:
                serve(client.makefile("r"), client.makefile("w"))
                os._exit(0)
            client.close()


def as_main(script, *flags):
    """`python script flags`"""
    main, sys.argv = types.ModuleType("__main__"), [script, *flags]
    sys.modules["__main__"], main.__file__ = main, str(REPO / script)
    exec(compile(Path(main.__file__).read_bytes(), main.__file__, "exec"), vars(main))


def torchrun(words):
    """`torchrun words`, whose workers are forks of this process too, not interpreters."""
    from torch.distributed import run

    def forking(args, plain=run.config_from_args):
        config, _, words = plain(args)
        config.start_method = "fork"
        return config, as_main, words[words.index(args.training_script):]

    run.config_from_args = forking
    run.main(words)


def serve(jobs, told):
    """In a process of its own: a line of JSON for every rank to start, a number for every process
    to wait for."""
    import importlib
    import random

    import numpy

    import plumbing.run
    from plumbing import embedded, files, processes
    from plumbing.flags import parse_args

    PLANTS = dict(plumbing=plumbing, embedded=embedded, files=files, processes=processes)

    def one(job, rank):
        os.chdir(job["cwd"])
        log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 1024)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False, encoding="utf-8")
                                  for fd in (1, 2))
        (
            signal.signal(signal.SIGINT, signal.default_int_handler),
            signal.signal(signal.SIGTERM, signal.SIG_DFL),
        )
        random.seed(), numpy.random.seed()
        os.environ.update(job["env"])
        if job["world"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]),
                              LOCAL_WORLD_SIZE=str(job["world"]), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(job["port"]))
        code, sys.argv = 0, job["argv"]
        try:
            if sys.argv[0] == "torchrun":
                torchrun(sys.argv[1:])
            elif job["plant"] and "/" not in sys.argv[0]:
                module = importlib.import_module(sys.argv[0].removesuffix(".py"))
                exec(job["plant"], dict(PLANTS, module=module, rank=rank))
                module.main(parse_args(module.Args))
            else:
                exec(job["plant"], dict(PLANTS, rank=rank))
                as_main(*sys.argv)
        except SystemExit as stop:  # as the interpreter does
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

    for line in jobs:
        job = json.loads(line)
        if isinstance(job, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
        elif (answer := os.fork()) == 0:
            one(job, job["rank"])
        print(answer, file=told, flush=True)


class Forked:
    def __init__(self, folder):
        """folder: of all processes that run tests; they share the fresh interpreter."""
        self.fresh = None
        self.servers = [self.copy(), self.connect(folder / "port")]

    def copy(self):
        """-> where to write jobs, where to read answers: of a copy of this process."""
        (jobs, ours), (theirs, told) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                import faulthandler

                faulthandler.disable()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                # nothing else: who waits for the end of a pipe must see it
                keep = sorted((jobs, told))
                for low, high in zip((2, *keep), (*keep, 4096)):
                    os.closerange(low + 1, high)
                prepare()
                serve(open(jobs), open(told, "w"))
            finally:
                os._exit(0)
        os.close(jobs), os.close(told)
        return open(ours, "w"), open(theirs)

    def connect(self, file):
        """The same of the fresh interpreter, started where there is none."""
        with open(f"{file}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):
                return self.pipes(file)
            file.unlink(missing_ok=True)
            env = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}
            code = f"import forked; forked.listen({str(file)!r})"
            command = [sys.executable, "-c", code]
            self.fresh = subprocess.Popen(command, stdin=subprocess.PIPE, env=env)
            assert until(file.exists, 60)
            return self.pipes(file)

    @staticmethod
    def pipes(file):
        connection = socket.create_connection(("127.0.0.1", int(file.read_text())))
        return connection.makefile("w"), connection.makefile("r"), connection

    def ask(self, server, what):
        jobs, told, *_ = self.servers[server]
        print(json.dumps(what), file=jobs, flush=True)
        return int(told.readline())

    def start(self, cwd, *argv, world=1, plant="", **env):
        """-> process ids, one per rank. plant: Python run first, with `plumbing`, `processes`,
        `rank`, and the script as `module`, unless it is named by its path; it then runs as
        `__main__`, as it does where nothing is planted."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.log = Path(cwd, "said")
        job = dict(cwd=str(cwd), argv=list(map(str, argv)), log=str(self.log), world=world,
                   port=port, plant=plant,
                   env=env)
        which = [(rank + ("--resume" not in argv)) % 2 for rank in range(world)]
        self.running = [(server, self.ask(server, dict(job, rank=rank)))
                        for rank, server in enumerate(which)]
        return [pid for _, pid in self.running]

    def wait(self):
        """-> exit codes of the ranks; a negative one is a signal's."""
        return [self.ask(server, pid) for server, pid in self.running]

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
        for server in self.servers:
            for end in server:
                end.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        if self.fresh:
            # it ends by itself, once it has taken up those who have asked meanwhile
            self.fresh.stdin.close()
            self.fresh.wait()


def until(condition, limit=300):
    """Wait for it, looking often: what follows happens at that moment."""
    end = time.time() + limit
    while time.time() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


def a_world(world, folder, cold=False):
    """Another folder with the data and the SFT start of `world`, in which the same command makes
    the same run. cold: and with a cache of its own, so that videos are read anew."""
    folder.mkdir()
    if not cold:
        (world / "cache").mkdir(exist_ok=True)
        (folder / "cache").symlink_to(world / "cache")
    (folder / "runs/sft").mkdir(parents=True)
    (folder / "data").symlink_to(world / "data")
    (folder / "runs/sft/policy_s0").symlink_to(world / "runs/sft/policy_s0")
    return folder
