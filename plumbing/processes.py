"""Processes: being stopped, locks, and what several of them do together.

One process or many is the same code: `python x.py` and `torchrun --nproc_per_node=4 x.py` differ
only in what `setup_dist` returns."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plumbing import flags
from plumbing.flags import world_size
from video_llm import unwrap

# for what may take long on one process while the others wait: a prerequisite, videos
PATIENCE = timedelta(days=2)


STEP = timedelta(minutes=30)  # for what all processes do at about the same time


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Errors of the user's own files and flags end the script with one line instead of a
    traceback."""
    try:
        yield
    except kinds as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(e).split())}")


class Stop:
    """SIGTERM and Ctrl-C. During training a signal is noted, and `Run.save` saves and exits after
    the step, on all processes. Otherwise, or on a second signal more than 3 s later, exit at once:
    torchrun repeats a terminal's Ctrl-C within milliseconds. A forked process exits at once,
    too."""

    asked, training, since = 0, False, 0.0  # asked: number of the signal

    @classmethod
    def watch(cls):
        cls.asked, cls.training, cls.process = 0, False, os.getpid()
        signal.signal(signal.SIGTERM, cls.note), signal.signal(signal.SIGINT, cls.note)

    @classmethod
    def note(cls, number, frame):
        if os.getpid() != cls.process:
            os._exit(128 + number)
        if not cls.training or cls.asked and time.monotonic() - cls.since > 3:
            say(f"{signal.Signals(number).name}: ended at once; continue with: {resume_command()}")
            sys.exit(128 + number)
        if not cls.asked:
            cls.asked, cls.since = number, time.monotonic()
            say(f"{signal.Signals(number).name}: a checkpoint is written at the end of this step")


def say(line):
    """One line on stderr from the first process. Safe in a signal handler."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))  # a file's name may be no text


def resume_command():
    """The command that continues this run: the command line as it was given, with --resume."""
    words = (re.sub(r" --resume(?:[= ](?!-)\S+)?(?= |$)", "", shlex.join(sys.argv)) + " --resume"
             * flags.RESUMES)
    launcher = (f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')}"
                if world_size() > 1 else "python")
    return f"{launcher} {words}"


def one_line_if_full(kind, error, trace):
    """sys.excepthook: a full disk is reported in one line, also where a library raises something
    else than OSError."""
    if getattr(error, "errno", None) in FULL or any(f"(os error {n})" in str(error) for n in FULL):
        say(f"no room on the disk ({' '.join(str(error).split())}); the last checkpoint is whole: "
            f"make room, then continue with: {resume_command()}")
    else:
        sys.__excepthook__(kind, error, trace)


HELD = {}  # lock file -> open file


def lock(path, wait=False):
    """Take the lock `path`, which ends with this process. -> False if another process holds it;
    `wait`: wait for it."""
    path = Path(path).resolve()
    if path in HELD:
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        say(f"{path}: this file system has no locks ({e.strerror}); see to it that no second run "
            "writes there")
    HELD[path] = file
    return True


def own(path, rank=0):
    """Take the lock `path` for this run, on its first process. If another run holds it, this one
    ends."""
    held = rank == 0 and not lock(path)
    end_if(held and f"{Path(path).parent} is in use: another run is writing there now ({path} is "
                    "locked)")


def end_if(refusal):
    """End all processes if one of them refuses to go on. Each says why; what several say alike is
    printed once. refusal: a line, or nothing."""
    if refusals := dict.fromkeys(filter(None, all_gather(refusal))):
        say("\n".join(refusals))
        sys.exit(1)


def unlock():
    HELD.clear()  # which closes the files


PATIENT = None  # the group of all processes that waits longer


def setup_dist():
    """-> rank, world size, device, from torchrun's environment. A single process initialises
    nothing.

    If a process dies, the next message of the others to it fails, and they end. A process that
    hangs in a video ends itself (inputs/frames.py); one that hangs elsewhere is given up after
    STEP, or after PATIENCE where all may wait."""
    Stop.watch()
    sys.excepthook = one_line_if_full
    rank, world, local = (int(os.environ.get(k, d))
                          for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if world > 1 and not dist.is_initialized():
        # several processes with several threads each would fight for the cores
        torch.set_num_threads(1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=STEP)
        global PATIENT
        PATIENT = dist.new_group(backend="gloo", timeout=PATIENCE)
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")


def all_sum(x):
    """Sum of a tensor over all processes; the tensor itself on one."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_max(number):
    """The largest value of an integer over all processes. Given up after STEP, so that a process
    that hangs in sampling or in its oracle does not hold up the others for days."""
    out = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(out, dist.ReduceOp.MAX)
    return int(out)


def all_means(sums):
    """{key: (sum, count) of this process} -> {key: mean over all processes}; nothing counted: no
    key."""
    keys = sorted(sums)
    both = all_sum(torch.tensor([[float(x) for x in sums[key]] for key in keys],
                                dtype=torch.float64))
    return {key: total / count for key, (total, count) in zip(keys, both.tolist()) if count}


def barrier():
    """Wait for all processes, however long one of them takes."""
    if dist.is_initialized():
        dist.barrier(group=PATIENT)


def all_gather(thing):
    """[thing of rank 0, thing of rank 1, ...] for any picklable thing. Waits as long as
    PATIENCE."""
    if not dist.is_initialized():
        return [thing]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, thing, group=PATIENT)
    return out


def check_same(what, thing):
    """End the run if processes would continue from different things, for example because machines
    have disks of their own, or a network file system shows one of them an old listing. thing:
    anything json can write."""
    digests = all_gather(hashlib.sha256(json.dumps(thing).encode()).hexdigest())
    if len(set(digests)) > 1:
        odd = ", ".join(str(rank) for rank, d in enumerate(digests) if d != digests[0])
        end_if(f"{Path(sys.argv[0]).name}: {what}: not the same on all processes (rank {odd} "
               "differs from rank 0); they must see the same files")


def shard(model, device):
    """FSDP2, in place: every decoder layer is gathered before its forward pass and released after
    it. The CLIP tower stays whole: it is frozen, small, and called outside the forward pass. Like
    DDP, FSDP2 averages gradients.

    All processes must run the same forward passes, so sampling goes on until the answers of all of
    them have ended."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    inside = unwrap(model)
    inside.vision_tower.to(device)
    for layer in inside.language_model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    inside.all_done = lambda done: all_sum((~done).sum()) == 0
    return fully_shard(model, mesh=mesh, ignored_params=set(inside.vision_tower.parameters()))


def is_sharded(model):
    """Did `shard` change this model? Asked without importing FSDP2."""
    return hasattr(model, "set_requires_gradient_sync")


def distribute(model, device, sharded=False, find_unused=False):
    """DistributedDataParallel or `shard` on several processes, the model itself on one. Both
    average gradients.

    Build the optimizer immediately after this call: FSDP2 returns different parameter objects
    between a no-grad forward and the next backward."""
    if sharded:
        return shard(model, device)
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, find_unused_parameters=find_unused)


def no_sync(model, when):
    """Keep gradients local while micro-batches accumulate: only the last backward pass of a step
    communicates."""
    return (model.no_sync() if when and isinstance(model, DistributedDataParallel)
            else contextlib.nullcontext())


def sum_gradients(params):
    """Sum the gradients of all processes in one message, for losses that are shares of a global
    sum. Unlike with DDP, processes may run different numbers of micro-batches, and one network may
    play several roles in a step."""
    if dist.is_initialized():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = all_sum(torch.cat([g.flatten() for g in grads]))
        for p, g in zip(params, flat.split([g.numel() for g in grads])):
            p.grad = g.view_as(p)


def clip_gradients(params):
    """Clip the gradient at norm 1. -> its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    # of a sharded model: the share of one process
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
