"""A training run: its folder, its log, its checkpoints. Nothing here knows an algorithm.

    run = Run(__file__, args)     # runs/<file name>/<name>_s<seed>, and where to resume
    model, processor = run.load_policy(args.model)
    ddp = run.distribute(model)
    run.resume(optimizer, model)  # sets run.first_step
    log = run.start(steps)
    for step in range(run.first_step, steps):
        ...
        log.step(step, show=["eval/accuracy"])
        run.save(step + 1, model, processor, optimizer)
    run.finish(model, processor)
"""

import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from plumbing import files, processes
from plumbing.embedded import ROOT
from plumbing.flags import world_size
from video_llm import add_lora, has_adapter, load_model, merged, reference_of, save_model

# nats, of a token in grpo_rank.py and of an answer in ppo_rlaif.py: so far from its start a policy
# says something else altogether
KL_WARNING = 10.0
NEUTRAL = (  # may differ when resumed
    "tokens_per_micro_batch",
    "gradient_checkpointing",
    "unpack_nf4",
    "cuda_graphs",
    "save_steps",
    "api_url",
    "api_concurrency",
    "api_timeout",
    "api_retries",
    "api_extra",
    "name",  # the folder says it; a run of sft.py named policy_s0 is policy with --seed 0 now
)


class Job:
    """Processes, flags and a folder: what collecting has, and every run.

    rank, world, device   this process, how many there are, where its model lies
    """

    sharded = False

    def __init__(self, args, folder):
        self.args, self.folder = args, Path(folder)
        self.rank, self.world, self.device = processes.setup_dist()


class Run(Job):
    """One run of a training script.

    folder                runs/<file name>/<name>_s<seed>: a copied script has runs of its own
    checkpoint            where --resume continues (a folder), None at the start
    first_step            the step to begin with, known after `start`
    log                   see `Log`, there after `start`
    """

    def __init__(self, script, args):
        super().__init__(args, Path("runs", Path(script).stem, f"{args.name}_s{args.seed}"))
        unseeded = self.folder.with_name(args.name)  # where sft.py wrote in earlier versions
        if args.resume and (unseeded / "args.json").exists() and not self.folder.exists():
            sys.exit(f"{unseeded}: runs lie in <name>_s<seed> now; rename it to {self.folder}, or "
                     "choose another --name")
        self.first_step, self.checkpoint = 0, open_run(self.folder, args, self.rank)

    @property
    def sharded(self):
        return getattr(self.args, "shard", False)

    def load(self, path):
        """What is trained, as the memory flags have it. -> model, processor. A model that will be
        sharded is loaded on the CPU: it may not fit one GPU."""
        args = self.args
        return load_model(path, quantize=args.quantize, dtype=getattr(torch, args.dtype),
                          device="cpu" if self.sharded else str(self.device),
                          attn_implementation=args.attn_implementation,
                          gradient_checkpointing=args.gradient_checkpointing)

    def load_policy(self, path, prepare=None, **lora):
        """What is trained: the checkpoint, or at the start the model in `path`, prepared, and with
        --lora_r under new adapters (`lora`: see add_lora). -> model, processor."""
        model, processor = self.load(self.checkpoint or path)
        if prepare and not self.checkpoint:
            model = prepare(model)
        if self.args.lora_r and not self.checkpoint:
            model = add_lora(model, self.args.lora_r, self.args.lora_alpha, **lora)
        return model, processor

    def reference_of(self, model, path):
        """`with reference() as ref`: the frozen start. LoRA: `model` with its adapter off. Else a
        copy, of `model` at the start and later of the model in `path`."""
        start = model if self.args.lora_r or not self.checkpoint else self.load(path)[0]
        return reference_of(start, self.place)

    def place(self, frozen):
        """A frozen copy, spread over the processes where the trained model is."""
        return processes.shard(frozen, self.device) if self.sharded else frozen

    def distribute(self, model, find_unused=False):
        return processes.distribute(model, self.device, self.sharded, find_unused)

    def resume(self, optimizer, model):
        """Optimizer and random numbers of the checkpoint, if there is one. Sets `first_step`."""
        self.first_step = load_trainer(self.checkpoint, optimizer, model) if self.checkpoint else 0

    def start(self, steps):
        """-> the log of a run of so many steps, which begins at `first_step`."""
        self.log = Log(self.folder, steps, self.first_step, self.rank)
        return self.log

    def scored_or_stop(self, step, ok, needed, what="oracle"):
        """Has the oracle ranked a group that needs an order? ok (B,): it gave one; needed (B,): the
        answers differ. Equal answers are tied without asking, even by an oracle that is down, so
        they do not count.

        If not, momentum and KL must not move the weights. Three such steps in a row, all steps of
        a shorter run, or the evaluation at the end of a run end the script."""
        log = self.log
        sums = torch.stack([(ok & needed).sum(), needed.sum(), ok.sum(), (~ok).sum()]).double()
        ordered, asked, ranked, masked = processes.all_sum(sums).tolist()
        if what == "oracle":
            log.masked += masked
        if ordered:
            log.unscored[what] = 0
        elif asked or not ranked:
            log.unscored[what] += 1
        silent = log.unscored[what]
        if silent >= (min(3, log.steps) if step < log.steps else 1):
            sys.exit(f"step {step}: in {silent} steps the {what} has ranked nothing; when it can "
                     "again: " + processes.resume_command())
        return not silent

    def check_finite(self, step, grad_norm, questions, answers):
        """A NaN or infinite loss or gradient ends the run before it reaches the weights; the batch
        is written out."""
        log = self.log
        if log.not_finite or not torch.isfinite(grad_norm):
            batch = [{"question": str(q), "answers": a} for q, a in zip(questions, answers)]
            what = (f"{log.not_finite} is not finite" if log.not_finite
                    else f"the gradient is {float(grad_norm)}")
            which = f"_rank{self.rank}" if world_size() > 1 else ""
            bad = Path(self.folder, f"not_finite_step{step}{which}.json")
            bad.write_text(json.dumps(batch, indent=2))
            sys.exit(f"step {step}{which.replace('_', ', ')}: {what}; weights untouched, the batch "
                     f"is in {bad}")

    def write_samples(self, step, batch, answers, every=25, first=3, **numbers):
        """Every so many steps the first groups of a batch go to samples.jsonl, each with its share
        of `numbers`: tensors of B rows."""
        if self.rank == 0 and step % every == 0:
            with open(self.folder / "samples.jsonl", "a") as f:
                for b, (r, group) in enumerate(list(zip(batch, answers))[:first]):
                    about = {name: rounded(x[b].tolist()) for name, x in numbers.items()}
                    row = dict(step=step, video=str(r["clip"].path), question=r["question"],
                               answers=group)
                    f.write(json.dumps(row | about) + "\n")

    def save(self, step, model, processor, optimizer, steps=None, **more):
        """The end of a training step: write checkpoint-<step> every --save_steps, but not after the
        last of `steps` (default: those of the log). After a signal write it now and end the script,
        on all processes together."""
        steps, stop = steps or self.log.steps, self.log.stop and step < self.log.steps
        if stop or step < steps and step % self.args.save_steps == 0:
            save_checkpoint(self.folder, f"checkpoint-{step}", model, processor, optimizer, step,
                            **more)
        if stop:
            processes.barrier()  # the first process has written it
            processes.say(f"{signal.Signals(self.log.stop).name}: {self.folder}/checkpoint-{step} "
                          f"is written; continue with: {processes.resume_command()}")
            sys.exit(128 + self.log.stop)
        # not so where answers are collected between the iterations of DPO
        processes.Stop.training = step < steps or step == self.log.steps

    def finish(self, model, processor, about=()):
        """`final/` is a whole model that loads with from_pretrained; with LoRA it is the adapter
        merged into the unquantised base, and `adapter/` beside it is the plain PEFT adapter.
        `cost.json` has the peak memory of all processes: of the GPUs where there are some, else of
        the machine."""
        model, folder = getattr(model, "module", model), self.folder
        cuda = torch.cuda.is_available()
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = sum(processes.all_gather(torch.cuda.max_memory_allocated() / 2**30 if cuda
                                        else kilobytes / 2**20))
        if self.rank == 0:
            device = torch.cuda.get_device_name() if cuda else "cpu"
            cost = dict(peak_gb=peak, device=device, processes=world_size())
            Path(folder, "cost.json").write_text(json.dumps(cost, indent=2))
        self.write_final(folder, model, processor, about)
        if self.rank == 0:
            print(f"done: {folder}/final")
        if dist.is_initialized():
            processes.barrier()
            dist.destroy_process_group()

    def write_final(self, folder, model, processor, about=()):
        """folder/final, a whole model; with LoRA the adapter beside it, too."""
        adapter = has_adapter(model)
        save_checkpoint(folder, "adapter" if adapter else "final", model, processor, about=about)
        if adapter and self.rank == 0:
            save_checkpoint(folder, "final", merged(Path(folder, "adapter")), processor,
                            about=about)


def rounded(x):
    """Numbers of nested lists with four places."""
    return [rounded(y) for y in x] if isinstance(x, list) else round(x, 4)


# --------------------------------------------------------------------------------------------------
# The run folder: args.json, metrics.jsonl, TensorBoard, checkpoint-<step>/, final/
# --------------------------------------------------------------------------------------------------
def git_commit():
    command = f"git -C {shlex.quote(str(ROOT))} describe --always --dirty --abbrev=12"
    return subprocess.getoutput(f"{command} 2>/dev/null") or "unknown"  # where there is no git, too


def open_run(folder, args, rank):
    """Create the run folder, or find where to continue. -> checkpoint to resume from (Path) or
    None.

    Without --resume a folder in use is refused. With it, changed flags are refused (but those of
    NEUTRAL), a finished run ends the script, and a folder that does not exist yet is simply a new
    run; so is one of a run that ended before it did anything, a mistyped --data for example. A
    folder that another run is writing to is refused always."""
    folder = Path(folder)
    processes.own(folder / "lock", rank)
    flags = {f.name: getattr(args, f.name)
             for f in fields(args) if f.init and f.name not in ("resume", "stage")}
    used = {p.name for p in folder.glob("*")} - {"args.json", "lock", "broken_videos.json"}
    processes.end_if(refusal(folder, args, flags) if used else None)
    # no *.tmp
    steps = sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*[0-9]"))
    last = folder / f"checkpoint-{steps[-1]}" if steps else None
    last = folder / "final" if (folder / "final").exists() else last
    # every rank has looked before rank 0 writes
    processes.check_same(f"{folder}: its last checkpoint", last and last.name)
    if last and last.name == "final":
        print(f"{folder} is finished") if rank == 0 else None
        sys.exit(0)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "broken_videos.json").unlink(missing_ok=True)
        for half in list(folder.rglob("*.tmp")):  # what a killed run left behind
            shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)
        about = dict(args=flags, git_commit=git_commit(), torch=torch.__version__,
                     command=" ".join(sys.argv), world_size=world_size())
        files.write(folder / "args.json", json.dumps(about, indent=2))
    return last


def refusal(folder, args, flags):
    """Why a run with these flags cannot go on in a folder in use, None if it can."""
    if not args.resume:
        return f"{folder} is in use: continue it with --resume, or choose another --name"
    try:
        saved = json.loads((folder / "args.json").read_text(encoding="utf-8"))["args"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder}: its args.json is missing or damaged; choose another --name"
    for flag, value in json.loads(json.dumps(flags)).items():
        if saved.get(flag) != value and flag not in NEUTRAL:
            return f"{folder} was started with another --{flag}: resume it with the same flags"
    return None


def save_checkpoint(folder, name, model, processor, optimizer=None, step=None, about=(), beside=()):
    """Write `folder/name` aside and rename it: a kill or a full disk leaves the old checkpoint,
    never half of one. Of a sharded model every process calls this and rank 0 writes it as a whole;
    else rank 0 alone need call it. about: {file name: what to write there as JSON}, where a model
    needs to say how it is to be used; beside: {folder name: (model, processor)}, further networks
    without which one cannot continue."""
    folder, weights, moments = Path(folder), None, optimizer and optimizer.state_dict()
    if processes.is_sharded(model):
        from torch.distributed.checkpoint import state_dict as whole

        options = dict(full_state_dict=True, cpu_offload=True)  # on rank 0; the others get nothing
        trained = whole.StateDictOptions(**options, ignore_frozen_params=has_adapter(model))
        weights = whole.get_model_state_dict(model, options=trained)
        moments = (optimizer
                   and whole.get_optimizer_state_dict(model, optimizer,
                                                      options=whole.StateDictOptions(**options)))
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
        # on the disk, before the old one goes
        for file in [f for f in aside.rglob("*") if f.is_file()]:
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


def save_trainer(file, state, step):
    """State of an optimizer, RNG and step as safetensors: nothing in a checkpoint is a pickle."""
    tensors = {f"{i}.{k}": v.contiguous() for i, of in state["state"].items()
               for k, v in of.items()}
    about = dict(step=step, param_groups=state["param_groups"])
    save_file({**tensors, "rng": torch.get_rng_state()}, file,
              metadata={"trainer": json.dumps(about)})


def load_trainer(checkpoint, optimizer, model=None):
    """Optimizer and RNG of a checkpoint -> the step to continue with. model: where it may be
    sharded."""
    file = Path(checkpoint, "trainer.safetensors")
    try:
        with safe_open(file, "pt") as f:
            about, tensors = (json.loads(f.metadata()["trainer"]),
                              {k: f.get_tensor(k) for k in f.keys()})
    except Exception as e:  # no such file, another format, damaged
        sys.exit(f"{file} cannot be read ({' '.join(str(e).split())}); remove {checkpoint} to "
                 "begin anew")
    torch.set_rng_state(tensors.pop("rng"))
    state = {}
    for name, value in tensors.items():
        # of a sharded model the parameter's name, else its number
        which, _, key = name.rpartition(".")
        state.setdefault(int(which) if which.isdigit() else which, {})[key] = value
    state = dict(state=state, param_groups=about["param_groups"])
    if processes.is_sharded(model):
        from torch.distributed.checkpoint import state_dict as whole

        options = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole.set_optimizer_state_dict(model, optimizer, state, options=options)
    else:
        optimizer.load_state_dict(state)
    return about["step"]


class Log:
    """One row a step in metrics.jsonl and TensorBoard, one progress line with ETA on the screen.

    `add(key, total, count)` gathers sums over micro-batches; `step` adds them up over all processes
    and divides once, so a logged mean is the true mean over the global batch, whatever the
    micro-batch size and the number of processes. Every process must add the same keys."""

    def __init__(self, folder, steps, first_step, rank):
        self.steps, self.first, self.rank, self.sums = steps, first_step, rank, {}
        self.stop, self.not_finite, self.warned = 0, None, False
        self.unscored, self.masked = Counter(), 0  # see `any_scored`
        self.latest = {}  # the last values of eval/..., which not every step has
        self.began = self.last = self.marked = time.time()
        if rank == 0:
            self.file = Path(folder, "metrics.jsonl")
            # the steps behind the checkpoint are done again
            for file in Path(folder).glob("*.jsonl"):
                # half a row, which a kill leaves, has no line feed
                rows = file.read_text().split("\n")[:-1]
                kept = [r for r in rows if json.loads(r)["step"] < first_step]
                files.write(file, "".join(r + "\n" for r in kept))
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(folder, purge_step=first_step)

    def mark(self, key=None):
        """The seconds since the last mark of this step are those of `key`; without one they are
        nobody's."""
        now = time.time()
        if key:
            self.add(f"time/{key}_s", now - self.marked)
        self.marked = now

    def add(self, key, total, count=1):
        processes.Stop.training, old = True, self.sums.get(key, (0.0, 0.0))
        self.sums[key] = (old[0] + float(total), old[1] + float(count))
        if key.startswith("losses/") and not math.isfinite(self.sums[key][0]):
            self.not_finite = self.not_finite or key

    def step(self, step, show):
        """Reduce, write, print the keys of `show`, and start the next step. -> the row."""
        keys = sorted(self.sums)
        # in the same message
        stop = [(float(processes.Stop.asked == s), 0.0) for s in (signal.SIGTERM, signal.SIGINT)]
        sums = processes.all_sum(
            torch.tensor([self.sums[k] for k in keys] + stop, dtype=torch.float64)
        ).tolist()
        self.stop = signal.SIGTERM if sums[-2][0] else signal.SIGINT if sums[-1][0] else 0
        # nothing counted: no row
        row = {k: total / count for k, (total, count) in zip(keys, sums) if count}
        self.sums, self.marked = {}, time.time()
        if self.rank == 0:
            now = time.time()
            with open(self.file, "a") as f:
                f.write(json.dumps(dict(step=step, **row, **{"time/step_s": now - self.last}))
                        + "\n")
            self.latest |= {k: v for k, v in row.items() if k.startswith("eval/")}
            shown = self.latest | row
            for k, v in row.items():
                self.board.add_scalar(k, v, step)
            done = min(step + 1, self.steps)  # a row behind the last step: a last evaluation
            eta = int((now - self.began) / max(1, done - self.first) * (self.steps - done))
            line = (
                f"step {done:0{len(str(self.steps))}d}/{self.steps} {100 * done // self.steps:3d}% "
                "| "
                + " ".join(f"{k.split('/')[-1]} {shown[k]:.3f}" for k in show if k in shown)
                + f" masked {self.masked:.0f}" * (self.masked > 0)  # groups since the last line
                + f" | {now - self.last:.2f}s | eta {eta // 60}m{eta % 60:02d}s"
            )
            tty, due = (sys.stdout.isatty(),
                        done == self.steps or done % max(1, self.steps // 20) == 0)
            if tty or due:  # a terminal sees every step on one line, a log file twenty lines
                print(("\r" if tty else "") + line, end="" if tty and done < self.steps else "\n",
                      flush=True)
                self.masked = 0
            self.last = now
            if row.get("objective/kl", 0) > KL_WARNING and not self.warned:
                self.warned = True
                print(f"\nwarning: step {done}: the KL to the start is {row['objective/kl']:.3g} "
                      "nats: lower --lr, or raise the weight of the KL; said once", file=sys.stderr,
                      flush=True)
        return row


def adapter_of(folder, base):
    """The adapter in `folder`, or in `adapter/` beside it (a run's final/ is merged), if it belongs
    to the network `base`; else None."""
    for path in (Path(folder), Path(folder).parent / "adapter"):
        file = path / "adapter_config.json"
        if file.exists():
            found = json.loads(file.read_bytes())["base_model_name_or_path"]
            return path if Path(found).resolve() == Path(base).resolve() else None
    return None
