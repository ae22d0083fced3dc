"""What every training script needs and no paper mentions: processes, logs, checkpoints, prerequisites, flags.

Nothing here knows an algorithm. One process or many is the same code: `python x.py` and `torchrun --nproc_per_node=4
x.py` differ only in what `setup_dist` returns.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import flags
from flags import WEIGHTS, world_size
from video_llm import has_adapter, merged, save_model, unwrap

ROOT = Path(__file__).resolve().parent
PATIENCE = timedelta(days=2)  # for what may take long on one process while the others wait: a prerequisite, videos
STEP = timedelta(minutes=30)  # for what all processes do at about the same time
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KL_WARNING = 10.0  # nats: so far from its start a policy says something else altogether
NEUTRAL = ("tokens_per_micro_batch", "micro_batch_size", "gradient_checkpointing", "unpack_nf4", "cuda_graphs",
           "save_steps", "api_url", "api_concurrency", "api_timeout", "api_retries",
           "api_extra")  # may differ when resumed


def load_options(args, device):
    """What `load_model` needs to know to load what is trained. A model that will be sharded never lies on one GPU."""
    device = "cpu" if getattr(args, "shard", False) else str(device)
    return dict(quantize=args.quantize, dtype=getattr(torch, args.dtype), device=device,
                attn_implementation=args.attn_implementation, gradient_checkpointing=args.gradient_checkpointing)


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Errors of the user's own files and flags end the script with one line instead of a traceback."""
    try:
        yield
    except kinds as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(e).split())}")


# ---------------------------------------------------------------------------------------------------------------
# Being stopped: SIGTERM and Ctrl-C
# ---------------------------------------------------------------------------------------------------------------
class Stop:
    """In the middle of training a signal is noted, and `checkpoint` acts on it at the end of the step, on all processes
    together. Else there is nothing to save and it ends the script at once, as in any process forked from here, or when
    it comes again, three seconds later or more: torchrun repeats a terminal's Ctrl-C within milliseconds."""

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
    """One line on stderr, of the first process; in one piece, also out of a signal handler."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))  # a file's name may be no text


def resume_command():
    """What continues this run: the command line as it was given, with --resume."""
    words = re.sub(r" --resume(?:[= ](?!-)\S+)?(?= |$)", "", shlex.join(sys.argv)) + " --resume" * flags.RESUMES
    launcher = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')}" if world_size() > 1 else "python"
    return f"{launcher} {words}"


def one_line_if_full(kind, error, trace):
    """sys.excepthook: a full disk is no fault of the program. Also the libraries' errors that are no OSError."""
    if getattr(error, "errno", None) in FULL or any(f"(os error {n})" in str(error) for n in FULL):
        say(f"no room on the disk ({' '.join(str(error).split())}); the last checkpoint is whole: make room, then "
                f"continue with: {resume_command()}")
    else:
        sys.__excepthook__(kind, error, trace)


# ---------------------------------------------------------------------------------------------------------------
# One at a time: locks that end with the process that holds them, however it ends
# ---------------------------------------------------------------------------------------------------------------
HELD = {}  # lock file -> open file


def lock(path, wait=False):
    """Take the lock `path`. -> False where another process has it; with `wait` it is waited for."""
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
        say(f"{path}: this file system has no locks ({e.strerror}); see to it that no second run writes there")
    HELD[path] = file
    return True


def own(path, rank=0):
    """The lock `path` for this run, held by its first process; where another run holds it, all of this one's end."""
    if not all_gather(lock(path) if rank == 0 else None)[0]:
        say(f"{Path(path).parent} is in use: another run is writing there now ({path} is locked)")
        sys.exit(1)


def unlock():
    HELD.clear()  # which closes the files


# ---------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------
PATIENT = None  # the group of all processes that waits longer


def setup_dist():
    """-> rank, world size, device, from torchrun's environment; one process without it initialises nothing.

    A process that dies takes the others with it: their next message to it fails. One that hangs in a video ends itself
    (frames.py), one that hangs elsewhere is given up after STEP, or where waiting is usual after PATIENCE."""
    Stop.watch()
    sys.excepthook = one_line_if_full
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if world > 1:
        torch.set_num_threads(1)  # several processes with several threads each would fight for the cores
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
    """The largest of a whole number over all processes. Given up after STEP: for use within a training step, where a
    process that hangs in sampling or in its oracle would hold up the others."""
    out = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(out, dist.ReduceOp.MAX)
    return int(out)


def barrier():
    """Wait for all processes, however long one of them takes."""
    if dist.is_initialized():
        dist.barrier(group=PATIENT)


def all_gather(thing):
    """[thing of rank 0, thing of rank 1, ...] for any picklable thing of our own processes, once all have it."""
    if not dist.is_initialized():
        return [thing]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, thing, group=PATIENT)
    return out


def check_same(what, thing):
    """End the run where processes would go on from different things: machines with disks of their own, or a network
    file system that shows one of them an older listing. thing: what json can write."""
    digests = all_gather(hashlib.sha256(json.dumps(thing).encode()).hexdigest())
    if len(set(digests)) > 1:
        odd = ", ".join(str(rank) for rank, d in enumerate(digests) if d != digests[0])
        say(f"{Path(sys.argv[0]).name}: {what}: not the same on all processes (rank {odd} differs from rank 0); they "
            "must see the same files")
        sys.exit(1)


def shard(model, device):
    """FSDP2, in place: every decoder layer is gathered when it is needed and given back behind it. The CLIP tower
    stays whole: it is frozen, small, and called outside the forward pass. Like DDP it averages gradients.

    All processes must run the same forward passes: sampling ends when the answers of all of them have ended."""
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
    """What trains on several processes, DistributedDataParallel or `shard`; the model itself on one. Both average
    gradients: losses are scaled for that. Parameters are listed, and optimizers made of them, right behind it: between
    a forward pass without gradients and the next backward pass `parameters()` of a sharded model are others."""
    if sharded:
        return shard(model, device)
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, find_unused_parameters=find_unused)


def no_sync(model, when):
    """Gradients stay local while micro-batches accumulate; only the last backward pass of a step communicates."""
    return model.no_sync() if when and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def sum_gradients(params):
    """Sum the gradients of all processes in one message, for losses that are shares of a global sum. Unlike under DDP
    the processes may run different numbers of micro-batches, and one network may play several roles in a step."""
    if dist.is_initialized():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = all_sum(torch.cat([g.flatten() for g in grads]))
        for p, g in zip(params, flat.split([g.numel() for g in grads])):
            p.grad = g.view_as(p)


def clip_gradients(params):
    """Scale the whole gradient down to norm 1 where it is longer. -> the norm it had."""
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model: the share of one process


def build_if_missing(path, command, duration, rank):
    """What is missing of the *embedded* default is made by its script, on rank 0; all others wait."""
    if rank == 0 and not Path(path).exists():
        building = Path("runs/.building", str(path).replace("/", "_"))
        if not lock(building):
            print(f"{path} is missing; another process makes it: waiting", flush=True)
            lock(building, wait=True)
        if not Path(path).exists():
            print(f"{path} is missing: `python {' '.join(command)}` makes it ({duration} on two CPU cores)", flush=True)
            run_script(path, command)
        HELD.pop(building.resolve()).close()
    barrier()


def ship_weights(paths, rank):
    """Weights of the embedded world come with the code: where scripts run in another folder, they are copied there."""
    if any(path.startswith(WEIGHTS) for path in paths) and rank == 0 and not Path(WEIGHTS).exists():
        lock(building := Path("runs/.building/weights"), wait=True)
        if not Path(WEIGHTS).exists():
            shutil.copytree(ROOT / WEIGHTS, f"{WEIGHTS}.tmp", dirs_exist_ok=True)
            os.replace(f"{WEIGHTS}.tmp", WEIGHTS)
        HELD.pop(building.resolve()).close()
    barrier()


def run_script(path, command):
    # the child is one process of its own, not a member of this torchrun job
    ours = ("TORCHELASTIC", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "OMP_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    with subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], env=env) as child:
        try:
            child.wait()
        except SystemExit:  # a signal: the child writes its checkpoint
            child.terminate()
            raise
    if child.returncode:
        sys.exit(f"building {path} failed; its own message stands above")


# ---------------------------------------------------------------------------------------------------------------
# The run folder: args.json, metrics.jsonl, TensorBoard, checkpoint-<step>/, final/
# ---------------------------------------------------------------------------------------------------------------
def git_commit():
    command = f"git -C {shlex.quote(str(ROOT))} describe --always --dirty --abbrev=12"
    return subprocess.getoutput(f"{command} 2>/dev/null") or "unknown"  # where there is no git, too


def open_run(folder, args, rank):
    """Create the run folder, or find where to continue. -> checkpoint to resume from (Path) or None.

    Without --resume a folder in use is refused. With it, changed flags are refused (but those of NEUTRAL), a finished
    run ends the script, and a folder that does not exist yet is simply a new run; so is one of a run that ended before
    it did anything, a mistyped --data for example. A folder that another run is writing to is refused always.
    """
    folder = Path(folder)
    own(folder / "lock", rank)
    flags = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name not in ("resume", "stage")}
    last = None
    if {p.name for p in folder.glob("*")} - {"args.json", "lock", "broken_videos.json"}:
        if not args.resume:
            sys.exit(f"{folder} is in use: continue it with --resume, or choose another --name")
        saved = json.loads((folder / "args.json").read_text())
        now = json.loads(json.dumps(flags)).items()
        changed = [k for k, v in now if saved["args"].get(k) != v and k not in NEUTRAL]
        if changed:
            sys.exit(f"{folder} was started with another --{changed[0]}: resume it with the same flags")
        if (folder / "final").exists():
            print(f"{folder} is finished") if rank == 0 else None
            sys.exit(0)
        steps = sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*[0-9]"))  # no *.tmp
        last = folder / f"checkpoint-{steps[-1]}" if steps else None
    check_same(f"{folder}: its last checkpoint", last and last.name)  # every rank has looked before rank 0 writes
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "broken_videos.json").unlink(missing_ok=True)
        for half in list(folder.rglob("*.tmp")):  # what a killed run left behind
            shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)
        about = dict(args=flags, git_commit=git_commit(), torch=torch.__version__, command=" ".join(sys.argv),
                     world_size=world_size())
        write(folder / "args.json", json.dumps(about, indent=2))
    return last


def write(file, text):
    """A text file that is there as a whole or, after a kill, as it was."""
    aside = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")  # process numbers repeat in containers
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # bytes in a file name that are no text
    os.replace(aside, file)


def save_checkpoint(folder, name, model, processor, optimizer=None, step=None, about=(), beside=()):
    """Write `folder/name` aside and rename it: a kill or a full disk leaves the old checkpoint, never half of one.
    Of a sharded model every process calls this and rank 0 writes it as a whole; else rank 0 alone need call it.
    about: {file name: what to write there as JSON}, where a model needs to say how it is to be used;
    beside: {folder name: (model, processor)}, further networks without which one cannot continue."""
    folder, weights, moments = Path(folder), None, optimizer and optimizer.state_dict()
    if is_sharded(model):
        from torch.distributed.checkpoint import state_dict as whole

        options = dict(full_state_dict=True, cpu_offload=True)  # on rank 0; the others get nothing
        trained = whole.StateDictOptions(**options, ignore_frozen_params=has_adapter(model))
        weights = whole.get_model_state_dict(model, options=trained)
        moments = optimizer and whole.get_optimizer_state_dict(model, optimizer,
                                                               options=whole.StateDictOptions(**options))
    if dist.is_initialized() and dist.get_rank():
        return
    aside = folder / f"{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_model(getattr(model, "module", model), processor, aside, weights)
        if optimizer is not None:
            save_trainer(aside / "trainer.safetensors", moments, step)
        for file, content in dict(about).items():
            (aside / file).write_text(json.dumps(content, indent=2))
        for name_beside, (other, its_processor) in dict(beside).items():
            save_model(other, its_processor, aside / name_beside)
        for file in [f for f in aside.rglob("*") if f.is_file()]:  # on the disk, before the old one goes
            with open(file, "rb") as f:
                os.fsync(f.fileno())
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)  # room again for what comes after a full disk
        raise
    shutil.rmtree(folder / name, ignore_errors=True)  # half of a finish that was killed
    os.replace(aside, folder / name)
    for old in folder.glob("checkpoint-*[0-9]"):
        if old.name != name and name != "adapter":  # one cannot continue from an adapter's copy
            shutil.rmtree(old)


def checkpoint(log, folder, step, steps, every, model, processor, optimizer, **more):
    """The end of a training step: write checkpoint-<step> where it is due, `every` so many, but not behind the last of
    `steps`. After a signal write it now and end the script, all processes together; a run at its end is finished."""
    stop = log.stop and step < log.steps
    if stop or step < steps and step % every == 0:
        save_checkpoint(folder, f"checkpoint-{step}", model, processor, optimizer, step, **more)
    if stop:
        barrier()  # the first process has written it
        say(f"{signal.Signals(log.stop).name}: {folder}/checkpoint-{step} is written; continue with: "
            f"{resume_command()}")
        sys.exit(128 + log.stop)
    Stop.training = step < steps or step == log.steps  # not so where answers are collected between the iterations


def save_trainer(file, state, step):
    """State of an optimizer, RNG and step as safetensors: nothing in a checkpoint is a pickle."""
    tensors = {f"{i}.{k}": v.contiguous() for i, of in state["state"].items() for k, v in of.items()}
    about = dict(step=step, param_groups=state["param_groups"])
    save_file({**tensors, "rng": torch.get_rng_state()}, file, metadata={"trainer": json.dumps(about)})


def load_trainer(checkpoint, optimizer, model=None):
    """Optimizer and RNG of a checkpoint -> the step to continue with. model: where it may be sharded."""
    file = Path(checkpoint, "trainer.safetensors")
    try:
        with safe_open(file, "pt") as f:
            about, tensors = json.loads(f.metadata()["trainer"]), {k: f.get_tensor(k) for k in f.keys()}
    except Exception as e:  # no such file, another format, damaged
        sys.exit(f"{file} cannot be read ({' '.join(str(e).split())}); remove {checkpoint} to begin anew")
    torch.set_rng_state(tensors.pop("rng"))
    state = {}
    for name, value in tensors.items():
        which, _, key = name.rpartition(".")  # of a sharded model the parameter's name, else its number
        state.setdefault(int(which) if which.isdigit() else which, {})[key] = value
    state = dict(state=state, param_groups=about["param_groups"])
    if is_sharded(model):
        from torch.distributed.checkpoint import state_dict as whole

        options = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole.set_optimizer_state_dict(model, optimizer, state, options=options)
    else:
        optimizer.load_state_dict(state)
    return about["step"]


class Log:
    """One row a step in metrics.jsonl and TensorBoard, one progress line with ETA on the screen.

    `add(key, total, count)` gathers sums over micro-batches; `step` adds them up over all processes and divides once,
    so a logged mean is the true mean over the global batch, whatever the micro-batch size and the number of processes.
    Every process must add the same keys."""

    def __init__(self, folder, steps, first_step, rank):
        self.steps, self.first, self.rank, self.sums = steps, first_step, rank, {}
        self.stop, self.not_finite, self.warned = 0, None, False
        self.unscored, self.masked = Counter(), 0  # see `any_scored`
        self.latest = {}  # the last values of eval/..., which not every step has
        self.began = self.last = time.time()
        if rank == 0:
            self.file = Path(folder, "metrics.jsonl")
            for file in Path(folder).glob("*.jsonl"):  # the steps behind the checkpoint are done again
                rows = file.read_text().split("\n")[:-1]  # half a row, which a kill leaves, has no line feed
                kept = [r for r in rows if json.loads(r)["step"] < first_step]
                write(file, "".join(r + "\n" for r in kept))
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(folder, purge_step=first_step)

    def add(self, key, total, count=1):
        Stop.training, old = True, self.sums.get(key, (0.0, 0.0))
        self.sums[key] = (old[0] + float(total), old[1] + float(count))
        if key.startswith("losses/") and not math.isfinite(self.sums[key][0]):
            self.not_finite = self.not_finite or key

    def step(self, step, show):
        """Reduce, write, print the keys of `show`, and start the next step. -> the row."""
        keys = sorted(self.sums)
        stop = [(float(Stop.asked == s), 0.0) for s in (signal.SIGTERM, signal.SIGINT)]  # in the same message
        sums = all_sum(torch.tensor([self.sums[k] for k in keys] + stop, dtype=torch.float64)).tolist()
        self.stop = signal.SIGTERM if sums[-2][0] else signal.SIGINT if sums[-1][0] else 0
        row = {k: total / count for k, (total, count) in zip(keys, sums) if count}  # nothing counted: no row
        self.sums = {}
        if self.rank == 0:
            now = time.time()
            with open(self.file, "a") as f:
                f.write(json.dumps(dict(step=step, **row, **{"time/step_s": now - self.last})) + "\n")
            self.latest |= {k: v for k, v in row.items() if k.startswith("eval/")}
            shown = self.latest | row
            for k, v in row.items():
                self.board.add_scalar(k, v, step)
            done = min(step + 1, self.steps)  # a row behind the last step: a last evaluation
            eta = int((now - self.began) / max(1, done - self.first) * (self.steps - done))
            line = (f"step {done:0{len(str(self.steps))}d}/{self.steps} {100 * done // self.steps:3d}% | "
                    + " ".join(f"{k.split('/')[-1]} {shown[k]:.3f}" for k in show if k in shown)
                    + f" masked {self.masked:.0f}" * (self.masked > 0)  # groups since the last line
                    + f" | {now - self.last:.2f}s | eta {eta // 60}m{eta % 60:02d}s")
            tty, due = sys.stdout.isatty(), done == self.steps or done % max(1, self.steps // 20) == 0
            if tty or due:  # a terminal sees every step on one line, a log file twenty lines
                print(("\r" if tty else "") + line, end="" if tty and done < self.steps else "\n", flush=True)
                self.masked = 0
            self.last = now
            if row.get("objective/kl", 0) > KL_WARNING and not self.warned:
                self.warned = True
                print(f"\nwarning: step {done}: the KL to the start is {row['objective/kl']:.3g} nats: lower --lr, or "
                      "raise the weight of the KL; said once", file=sys.stderr, flush=True)
        return row


def prepare_videos(cache, clips, folder, rank, world):
    """Decode and encode every clip before training, shared out over the processes. -> {clip: reason} of the broken
    ones, the same on every process; listed in `broken_videos.json` of the run folder."""
    mine = sorted(set(clips), key=str)[rank::world]
    broken = {}
    for part in all_gather(cache.prepare(mine, progress=rank == 0)):
        broken |= part
    if rank == 0 and broken:
        file = Path(folder, "broken_videos.json")  # of training and of held-out questions
        listed = json.loads(file.read_text()) if file.exists() else {}
        listed |= {f"{c.path} [{c.start}, {c.end}]": reason for c, reason in broken.items()}
        write(file, json.dumps(listed, indent=2))
        for reason in list(broken.values())[:5]:
            print(f"left out: {reason}")
    return broken


def any_scored(log, ok, needed, step, what="oracle"):
    """Has the oracle ranked a group that needs an order? ok (B,): it gave one; needed (B,): the
    answers differ. Equal answers are tied unasked, by a dead oracle too, and say nothing.

    If not, momentum and KL alone must not move the weights. Three such steps in a row, all steps of
    a shorter run, or the evaluation at the end of a run end the script."""
    sums = torch.stack([(ok & needed).sum(), needed.sum(), ok.sum(), (~ok).sum()]).double()
    ordered, asked, ranked, masked = all_sum(sums).tolist()
    if what == "oracle":
        log.masked += masked
    if ordered:
        log.unscored[what] = 0
    elif asked or not ranked:
        log.unscored[what] += 1
    silent = log.unscored[what]
    if silent >= (min(3, log.steps) if step < log.steps else 1):
        sys.exit(f"step {step}: in {silent} steps the {what} has ranked nothing; when it can again: "
                 + resume_command())
    return not silent


def stop_if_not_finite(grad_norm, log, folder, step, batch):
    """A NaN or infinite loss or gradient ends the run *before* it reaches the weights; the batch is written out."""
    if log.not_finite or not torch.isfinite(grad_norm):
        what = f"{log.not_finite} is not finite" if log.not_finite else f"the gradient is {float(grad_norm)}"
        which = f"_rank{log.rank}" if world_size() > 1 else ""
        bad = Path(folder, f"not_finite_step{step}{which}.json")
        bad.write_text(json.dumps(batch, indent=2))
        sys.exit(f"step {step}{which.replace('_', ', ')}: {what}; weights untouched, the batch is in {bad}")


def finish(folder, model, processor, rank, about=()):
    """`final/` is a whole model that loads with from_pretrained; with LoRA it is the adapter merged into the
    unquantised base, and `adapter/` beside it is the plain PEFT adapter. `cost.json` has the peak memory of all
    processes: of the GPUs where there are some, else of the machine."""
    model = getattr(model, "module", model)
    cuda, kilobytes = torch.cuda.is_available(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = sum(all_gather(torch.cuda.max_memory_allocated() / 2**30 if cuda else kilobytes / 2**20))
    if rank == 0:
        about_run = dict(peak_gb=peak, device=torch.cuda.get_device_name() if cuda else "cpu", processes=world_size())
        Path(folder, "cost.json").write_text(json.dumps(about_run, indent=2))
    adapter = has_adapter(model)
    save_checkpoint(folder, "adapter" if adapter else "final", model, processor, about=about)
    if rank == 0:
        if adapter:
            save_checkpoint(folder, "final", merged(Path(folder, "adapter")), processor, about=about)
        print(f"done: {folder}/final")
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
