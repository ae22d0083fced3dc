"""The embedded world's default models and data: what is missing is built by its own script, what is
shipped is copied.

Paths of the user's own are never built.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from plumbing import processes
from plumbing.flags import REWARD_MODEL, WEIGHTS, WORLD

ROOT = Path(__file__).resolve().parent.parent


def build_if_missing(path, command, duration, rank):
    """If `path` is missing, rank 0 runs the script that makes it; all other processes wait."""
    if rank == 0 and not Path(path).exists():
        building = Path("runs/.building", str(path).replace("/", "_"))
        if not processes.lock(building):
            print(f"{path} is missing; another process makes it: waiting", flush=True)
            processes.lock(building, wait=True)
        if not Path(path).exists():
            print(f"{path} is missing: `python {' '.join(command)}` makes it ({duration} on two "
                  "CPU cores)", flush=True)
            run_script(path, command)
        processes.HELD.pop(building.resolve()).close()
    processes.barrier()


def ship_weights(paths, rank):
    """The embedded world's weights come with the code. If a script runs in another folder, copy
    them there."""
    if any(path.startswith(WEIGHTS) for path in paths) and rank == 0 and not Path(WEIGHTS).exists():
        processes.lock(building := Path("runs/.building/weights"), wait=True)
        if not Path(WEIGHTS).exists():
            shutil.copytree(ROOT / WEIGHTS, f"{WEIGHTS}.tmp", dirs_exist_ok=True)
            os.replace(f"{WEIGHTS}.tmp", WEIGHTS)
        processes.HELD.pop(building.resolve()).close()
    processes.barrier()


def run_script(path, command):
    # the child is one process of its own, not a member of this torchrun job
    ours = ("TORCHELASTIC", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "OMP_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    with subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], env=env) as child:
        try:
            child.wait()
        except SystemExit:  # a signal: the child writes its checkpoint
            child.terminate()
            raise
    if child.returncode:
        sys.exit(f"building {path} failed; its own message stands above")


# annealed and long enough: more steps gain nothing more
POLICY_SFT = "--steps 200 --batch_size 16 --lr 1e-3"


def build_world(rank):
    """The clips and annotation files of the embedded world."""
    command = ["embedded_world/moving_shapes.py"]
    build_if_missing(f"{WORLD}/clips.json", command, "under a minute", rank)


def sft_start(seed):
    """The label-scarce start of every embedded run: SFT on the labels of 40 clips, other clips for
    every seed."""
    return f"runs/sft/policy_s{seed}/final"


def build_embedded(args, rank):
    """Build data, SFT start and oracle of the embedded default, if they are used and missing."""
    if args.data.startswith(WORLD):
        build_world(rank)
    if args.model == sft_start(args.seed):
        build_if_missing(args.model, policy_sft_command(args.seed), "about a minute", rank)
    build_oracle(args, rank)


def policy_sft_command(seed):
    data = f"--data {WORLD}/train.json --num_clips 40 --seed {seed}"
    return f"sft.py --name policy {data} {POLICY_SFT} --resume".split()


def build_oracle(args, rank, names=None):
    """Build the judge and the reward model of the embedded default, if `args.oracle`, or `names`,
    needs them."""
    if {"judge", "context"} & set(names or args.raters):
        ship_weights([args.oracle_model], rank)
    if "reward_model" in (names or args.raters) and args.reward_model == REWARD_MODEL:
        build_if_missing(REWARD_MODEL, ["reward_model.py", "--resume"], "several minutes", rank)
