"""The command line: flags out of a dataclass, the help screen, and the flags that several scripts share.

Nothing here imports torch. A script calls `answer_help(Args)` before its slow imports, so that `--help` and a
misspelt flag are answered at once, and `parse_args(Args)` when it starts.
"""

import argparse
import difflib
import inspect
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

from transformers.hf_argparser import HfArg, HfArgumentParser

RESUMES = False  # has the script whose command line was read a --resume?


WORLD = "data/moving_shapes"  # the embedded world
WEIGHTS = "embedded_world/weights"  # its CLIP, Q-Former, tokenizer and judge, in place of downloads
JUDGE = f"{WEIGHTS}/judge"
REWARD_MODEL = "runs/reward_model/context_s0/final"
ORACLES = ("reference", "judge", "context", "reward_model", "api")
SCORERS = ("reference", "judge", "context", "api")  # those with `aspects`
MODES = ("listwise", "pairwise")
KEY = "ORACLE_API_KEY"  # the environment variable that holds the key of a server


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


# ---------------------------------------------------------------------------------------------------------------
# Flags that scripts inherit
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class ModelArgs:
    """How a model lies in memory: flags of the training scripts, read in harness.py."""

    # -- memory
    dtype: str = HfArg(default="float32", help="float32, or bfloat16: of the weights that LoRA leaves alone")
    attn_implementation: str = HfArg(default="sdpa", help="sdpa | eager")
    gradient_checkpointing: bool = HfArg(default=False, help="keep the inputs of layers alone and compute them again: "
                                         "a third more time, a fraction of the activations")


@dataclass
class ShardArgs(ModelArgs):
    # -- memory
    shard: bool = HfArg(default=False, help="FSDP2: each process keeps a share of every layer, for decoders that do "
                        "not fit one GPU")


@dataclass
class RolloutArgs:
    """How answers are sampled: flags of the scripts that do it in their loop, read there."""

    # -- memory
    unpack_nf4: bool = HfArg(default=True, help="unpack an nf4 base once for a rollout, not at every token; takes the "
                             "unquantised size meanwhile (7B: 13 GB)")
    cuda_graphs: bool = HfArg(default=False, help="sample with a CUDA graph a token; takes the room of the longest "
                              "answers at once (not yet measured on a GPU)")

    def check_rollouts(self):
        if self.cuda_graphs and getattr(self, "shard", False):
            raise ValueError("--cuda_graphs: not with --shard, whose layers are gathered anew for every token")
        if self.cuda_graphs:
            import torch

            if not torch.cuda.is_available():
                raise ValueError("--cuda_graphs: there is no GPU here")


@dataclass
class ApiArgs:
    """The flags of a server, inherited by every script that can ask one."""

    # -- server
    api_url: str = HfArg(default="", help="OpenAI-compatible server, http(s)://host/v1; its key: environment variable "
                         f"{KEY}")
    api_model: str = HfArg(default="", help="the model's name on that server")
    api_frames: int = HfArg(default=8, help="frames of the video sent with a question; 0: none, a blind control")
    api_size: int = HfArg(default=336, help="longer side of a frame in pixels; larger frames are scaled down to it")
    api_max_tokens: int = HfArg(default=512, help="longest reply; models that think before they reply need more")
    api_concurrency: int = HfArg(default=8, help="requests under way at the same time, per process")
    api_timeout: float = HfArg(default=60.0, help="seconds without a sign of the server before a request is given up")
    api_retries: int = HfArg(default=4, help="further attempts after a failed request")
    api_extra: str = HfArg(default="", help="JSON object for every request; null drops a key: "
                           '\'{"reasoning_effort": "low", "temperature": null}\'')

    def check_api(self, needed):
        """ValueError with one line that names the flag. needed: a server will be asked."""
        if needed and not (self.api_url and self.api_model):
            raise ValueError("--api_url and --api_model are needed to ask a server")
        for flag, low, high in (("api_frames", 0, 64), ("api_size", 16, 4096), ("api_max_tokens", 1, 10**6),
                                ("api_concurrency", 1, 64), ("api_timeout", 0.01, 3600), ("api_retries", 0, 20)):
            if not low <= getattr(self, flag) <= high:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must lie between {low} and {high}")
        if self.api_url or self.api_extra:
            from api_client import check_server

            check_server(self.api_url, self.api_extra)


@dataclass
class OracleArgs(ApiArgs):
    """The flags of `make_oracle`, inherited by every script that asks an oracle; it also reads --cache and --seed."""

    # -- oracle
    oracle: str = HfArg(default="context", help="context | judge | reward_model | api: AI feedback; reference: token "
                        "F1 with the label; several, comma-separated: the mean of their ranks")
    oracle_model: str = HfArg(default=JUDGE, help="the judging model")
    reward_model: str = HfArg(default=REWARD_MODEL, help="the checkpoint that --oracle reward_model ranks by")
    oracle_dtype: str = HfArg(default="float32", help="float32, or bfloat16: of the oracles' weights")
    oracle_tokens: int = HfArg(default=16384, help="tokens that a local judge holds at a time, prompts and padding "
                               "included: fewer take less memory and more time")
    api_mode: str = HfArg(default="listwise", help="listwise: one request a group | pairwise: one a pair and order")

    @property
    def raters(self):
        return self.oracle.split(",")

    def __post_init__(self):
        for name in self.raters:
            if name not in ORACLES or self.raters.count(name) > 1:
                raise ValueError(f"--oracle {self.oracle}: choose of {', '.join(ORACLES)}, each once")
        if self.api_mode not in MODES:
            raise ValueError(f"--api_mode {self.api_mode}: choose one of {', '.join(MODES)}")
        if not getattr(self, "data", WORLD).startswith(WORLD):  # moving shapes are all that the default ones know
            for flag, default, names in (("oracle_model", JUDGE, ("judge", "context")),
                                         ("reward_model", REWARD_MODEL, ("reward_model",))):
                if set(names) & set(self.raters) and getattr(self, flag) == default:
                    raise ValueError(f"--{flag} {default} knows the embedded world only, not --data {self.data}")
        if self.oracle_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--oracle_dtype {self.oracle_dtype}: choose float32 or bfloat16")
        at_least(self, oracle_tokens=1)
        self.check_api(needed="api" in self.raters)


# ---------------------------------------------------------------------------------------------------------------
# Reading the command line
# ---------------------------------------------------------------------------------------------------------------
def answer_help(cls):
    """Answer --help, and refuse what is no flag of the dataclass `cls`, before anything slow is imported. Letters that
    a terminal lacks are shown by number from now on."""
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(cls)) if os.environ.get("RANK", "0") == "0" else None
        sys.exit(0)
    read(cls)


def parse_args(cls):
    """The dataclass `cls` from the command line. Whatever is wrong with a flag: one line, exit code 2."""
    answer_help(cls)
    parser = read(cls)
    try:
        return parser.parse_args_into_dataclasses()[0]
    except ValueError as e:  # raised by __post_init__
        parser.error(str(e))


def read(cls):
    """-> the parser, after it has read the command line once: no flag is unknown, no value of the wrong type."""
    global RESUMES
    RESUMES = any(f.name == "resume" for f in fields(cls))
    parser = HfArgumentParser(cls, allow_abbrev=False, add_help=False)
    parser.error = lambda message: (print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr), sys.exit(2))
    if hasattr(cls, "PRESETS"):  # --preset NAME: other defaults; what stands on the command line still wins
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.error = parser.error
        first.add_argument("--preset")
        parser.set_defaults(**cls.PRESETS.get(first.parse_known_args()[0].preset, {}))
    if unknown := parser.parse_known_args()[1]:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, [f"--{f.name}" for f in fields(cls) if f.init], 1)
        hint = f"; the nearest is {near[0]}" if near else ""
        parser.error(f"{flag}: no such flag{hint}; --help lists them" if flag.startswith("-") else
                     f"{flag}: stands behind no flag")
    return parser


def help_text(cls):
    """What the script does and its first commands, out of its header; then the flags by group with their defaults.

    A comment `# -- budget` in a dataclass begins a group; inherited groups come last.
    """
    doc = inspect.getdoc(sys.modules[cls.__module__])
    out = [f"{Path(sys.argv[0]).name}: {doc.split(chr(10) * 2)[0].split(chr(10) + 'Run')[0]}", ""]
    commands = re.findall(r"((?:python|torchrun) .*\w+\.py.*(?:\n +--.*)*)", doc)[:3]
    out += [f"  {line}" for command in commands for line in command.split("\n")]
    groups, known = {}, {f.name: f for f in fields(cls) if f.init}
    for owner in [c for c in cls.__mro__ if c is not object]:
        group = "flags"
        for line in inspect.getsource(owner).split("\n"):
            if begin := re.match(r"    # -- ([^(\[]+)", line):
                group = begin[1].strip()
            elif (name := re.match(r"    (\w+): ", line)) and (field := known.pop(name[1], None)):
                groups.setdefault(group, []).append(field)
    width = min(shutil.get_terminal_size().columns, 118)
    for group, members in groups.items():
        out += ["", f"{group}:"]
        for field in members:
            default = field.default_factory() if callable(field.default_factory) else field.default
            words = default if isinstance(default, list) else ["" if default is None else default]
            head = f"  --{field.name} {shlex.join(map(str, words))}"
            gap = " " * max(34 - len(head), 2)
            out += textwrap.wrap(f"{head}{gap}{field.metadata['help']}", width, subsequent_indent=" " * 34,
                                 break_long_words=False, break_on_hyphens=False)
    return "\n".join(out)


# ---------------------------------------------------------------------------------------------------------------
# What is no value of a flag
# ---------------------------------------------------------------------------------------------------------------
def at_least(args, **low):
    """ValueError with one line for a flag below its least value, or NaN or infinite, which is no value."""
    for flag, least in low.items():
        if not least <= getattr(args, flag) < math.inf:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be at least {least}")


def above_zero(args, *flags):
    for flag in flags:
        if not 0 < getattr(args, flag) < math.inf:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be above 0")


def check_training(args, batch=None):
    """What the training scripts refuse alike. batch: the flag of the global batch, where micro-batches must fill it."""
    if args.quantize not in ("none", "nf4") or args.quantize == "nf4" and not args.lora_r:
        raise ValueError(f"--quantize {args.quantize}: choose none, or nf4 with --lora_r")
    if not re.fullmatch(r"\w[\w.+-]*", args.name):
        raise ValueError(f"--name {args.name}: letters, digits and . _ + - make a name")
    at_least(args, seed=0, lora_alpha=1)
    if args.lora_alpha != type(args).lora_alpha and not args.lora_r:
        raise ValueError("--lora_alpha: does nothing without --lora_r")
    if isinstance(args, ModelArgs):
        if args.dtype not in ("float32", "bfloat16") or args.dtype == "bfloat16" and not args.lora_r:
            raise ValueError(f"--dtype {args.dtype}: choose float32, or bfloat16 with --lora_r (in bfloat16 the small "
                             "steps of trained weights are lost)")
        if args.attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"--attn_implementation {args.attn_implementation}: choose sdpa or eager; flash and flex "
                             "attention cannot take the mask of packed groups")
    if isinstance(args, ShardArgs) and args.shard:
        if args.quantize != "none":
            raise ValueError("--shard: bitsandbytes' 4-bit weights cannot be sharded; --dtype bfloat16 --lora_r can")
        if world_size() == 1:
            raise ValueError("--shard: one process has nobody to share with; start several with torchrun")
    world, size = world_size(), batch and getattr(args, batch)
    if hasattr(args, "tokens_per_micro_batch"):  # these are as long as they may be, not as many
        if size % world:
            raise ValueError(f"--{batch} {size} must be a multiple of the {world} processes")
    elif batch and size % (world * args.micro_batch_size):
        raise ValueError(f"--{batch} {size} must be a multiple of processes x --micro_batch_size "
                         f"({world} x {args.micro_batch_size})")


def check_start(args, flag):
    """ValueError where the model of `--flag` is an adapter: without it, it is no reference for what is trained next."""
    path = Path(getattr(args, flag))
    if (path / "adapter_config.json").exists():
        raise ValueError(f"--{flag} {path}: an adapter; name the merged model, final/ beside it")
