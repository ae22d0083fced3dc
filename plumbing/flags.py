"""The command line: flags out of a dataclass, the help screen, and the flags that several scripts
share.

Nothing here imports torch. A script calls `answer_help(Args)` before its slow imports, so that
`--help` and a misspelt flag are answered at once, and `parse_args(Args)` when it starts."""

import argparse
import copy
import difflib
import inspect
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers.hf_argparser import HfArgumentParser

RESUMES = False  # has the script whose command line was read a --resume?


WORLD = "data/moving_shapes"  # the embedded world
WEIGHTS = "embedded_world/weights"  # its CLIP, Q-Former, tokenizer and judge, in place of downloads
JUDGE = f"{WEIGHTS}/judge"
REWARD_MODEL = "runs/reward_model/context_s0/final"
ORACLES = ("reference", "judge", "context", "reward_model", "api")
SCORERS = ("reference", "judge", "context", "api")  # those with `aspects`
MODES = ("listwise", "pairwise")
DTYPES = ("float32", "bfloat16")
KEY = "ORACLE_API_KEY"  # the environment variable that holds the key of a server


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def flag(default, help, **bounds):
    """A field of a dataclass of flags. bounds: low, high (both included), above, below, choices."""
    given = dict(default_factory=default) if callable(default) else dict(default=default)
    return field(**given, metadata={"help": help, "bounds": bounds})


@dataclass
class Flags:
    """What all dataclasses of flags inherit from."""

    def __post_init__(self):
        """ValueError with one line for a flag outside of its bounds. NaN and infinite are no
        value."""
        for f in fields(self):
            bounds, value = f.metadata.get("bounds", {}), getattr(self, f.name)
            if bounds and value is not None and (wrong := outside(value, **bounds)):
                raise ValueError(f"--{f.name} {value}: {wrong}")


def outside(value, low=None, high=None, above=None, below=None, choices=None):
    """What is wrong with a value, None where nothing is."""
    if choices is not None:
        named = ", ".join(choice or "nothing" for choice in choices)
        return None if value in choices else f"choose one of {named}"
    if low is not None and high is not None:
        return None if low <= value <= high else f"must lie between {low} and {high}"
    if low is not None and not low <= value < math.inf:
        return f"must be at least {low}"
    if above is not None and not above < value < math.inf:
        return f"must be above {above}"
    if below is not None and not value < below:
        return f"must be below {below}"
    return None


# --------------------------------------------------------------------------------------------------
# Flags that scripts inherit
# --------------------------------------------------------------------------------------------------
@dataclass
class ModelArgs(Flags):
    """How a model lies in memory: flags of the training scripts, read in plumbing/run.py."""

    # -- memory
    dtype: str = flag("float32", "float32, or bfloat16: of the weights that LoRA does not train",
                      choices=DTYPES)
    attn_implementation: str = flag("sdpa", "sdpa | eager; flash attention cannot take the "
                                    "mask of packed groups", choices=("sdpa", "eager"))
    gradient_checkpointing: bool = flag(False, "keep only each layer's input and recompute the "
                                               "rest: a third more time, a fraction of the "
                                               "activations")

    def check_training(self, batch=None):
        """What the training scripts refuse alike. batch: the flag of the global batch,
        which the processes share evenly."""
        if self.quantize == "nf4" and not self.lora_r:
            raise ValueError("--quantize nf4: only with --lora_r")
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(f"--name {self.name}: letters, digits and . _ + - make a name")
        if self.lora_alpha != type(self).lora_alpha and not self.lora_r:
            raise ValueError("--lora_alpha: does nothing without --lora_r")
        if self.dtype == "bfloat16" and not self.lora_r:
            raise ValueError("--dtype bfloat16: only with --lora_r (in bfloat16 the small steps of "
                             "trained weights are lost)")
        if getattr(self, "shard", False):
            if self.quantize != "none":
                raise ValueError("--shard: bitsandbytes' 4-bit weights cannot be sharded; "
                                 "--dtype bfloat16 --lora_r can")
            if world_size() == 1:
                raise ValueError("--shard: one process has nobody to share with; start several "
                                 "with torchrun")
        world, size = world_size(), batch and getattr(self, batch)
        if batch and size % world:
            raise ValueError(f"--{batch} {size} must be a multiple of the {world} processes")

    def check_start(self, name):
        """ValueError where the model of the flag is an adapter, which cannot be a reference: its
        base would be taken for the start."""
        path = Path(getattr(self, name))
        if (path / "adapter_config.json").exists():
            raise ValueError(f"--{name} {path}: an adapter; name the merged model, final/ beside "
                             "it")


@dataclass
class ShardArgs(ModelArgs):
    # -- memory
    shard: bool = flag(False, "FSDP2: each process keeps a share of every layer, for decoders that "
                              "do not fit one GPU")


@dataclass
class RolloutArgs(Flags):
    """How answers are sampled: flags of the scripts that do it in their loop, read there."""

    # -- memory
    unpack_nf4: bool = flag(True, "unpack an nf4 base once for a rollout, not at every token; "
                                  "takes the unquantised size meanwhile (7B: 13 GB)")
    cuda_graphs: bool = flag(False, "sample with a CUDA graph a token; takes the room of the "
                                    "longest answers at once (not yet measured on a GPU)")

    def __post_init__(self):
        super().__post_init__()
        if self.cuda_graphs and getattr(self, "shard", False):
            raise ValueError("--cuda_graphs: not with --shard, whose layers are gathered anew for "
                             "every token")
        if self.cuda_graphs:
            import torch

            if not torch.cuda.is_available():
                raise ValueError("--cuda_graphs: there is no GPU here")


@dataclass
class ApiArgs(Flags):
    """The flags of a server, inherited by every script that can ask one."""

    # -- server
    api_url: str = flag("", "OpenAI-compatible server, http(s)://host/v1; its key: environment "
                            f"variable {KEY}")
    api_model: str = flag("", "the model's name on that server")
    api_frames: int = flag(8, "frames of the video sent with a question; 0: none, a blind control",
                           low=0, high=64)
    api_size: int = flag(336, "longer side of a frame in pixels; larger frames are scaled down to "
                              "it", low=16, high=4096)
    api_max_tokens: int = flag(512, "longest reply; models that think before they reply need more",
                               low=1, high=10**6)
    api_concurrency: int = flag(8, "requests under way at the same time, per process", low=1,
                                high=64)
    api_timeout: float = flag(60.0, "seconds without a sign of the server before a request is "
                                    "given up", low=0.01, high=3600)
    api_retries: int = flag(4, "further attempts after a failed request", low=0, high=20)
    api_extra: str = flag("", "JSON object for every request; null drops a key: "
                           '\'{"reasoning_effort": "low", "temperature": null}\'')

    def check_api(self, needed):
        """ValueError with one line that names the flag. needed: a server will be asked."""
        if needed and not (self.api_url and self.api_model):
            raise ValueError("--api_url and --api_model are needed to ask a server")
        if self.api_url or self.api_extra:
            from plumbing.api_client import check_server

            check_server(self.api_url, self.api_extra)


@dataclass
class OracleArgs(ApiArgs):
    """The flags of `make_oracle`, inherited by every script that asks an oracle; it also reads
    --cache and --seed."""

    # -- oracle
    oracle: str = flag("context", "context | judge | reward_model | api: AI feedback; reference: "
                                  "token F1 with the label; several, comma-separated: the mean of "
                                  "their ranks")
    oracle_model: str = flag(JUDGE, "the judging model")
    reward_model: str = flag(REWARD_MODEL, "the checkpoint that --oracle reward_model ranks by")
    oracle_dtype: str = flag("float32", "float32, or bfloat16: of the oracles' weights",
                             choices=DTYPES)
    oracle_tokens: int = flag(16384, "tokens that a local judge holds at a time, prompts and "
                                     "padding included: fewer take less memory and more time",
                              low=1)
    api_mode: str = flag("listwise", "listwise: one request a group | pairwise: one a pair and "
                                     "order", choices=MODES)

    @property
    def raters(self):
        return self.oracle.split(",")

    def __post_init__(self):
        super().__post_init__()
        for name in self.raters:
            if name not in ORACLES or self.raters.count(name) > 1:
                raise ValueError(f"--oracle {self.oracle}: choose of {', '.join(ORACLES)}, each "
                                 "once")
        # moving shapes are all that the default ones know
        if not getattr(self, "data", WORLD).startswith(WORLD):
            for flag, default, names in (("oracle_model", JUDGE, ("judge", "context")),
                                         ("reward_model", REWARD_MODEL, ("reward_model",))):
                if set(names) & set(self.raters) and getattr(self, flag) == default:
                    raise ValueError(f"--{flag} {default} knows the embedded world only, not "
                                     f"--data {self.data}")
        self.check_api(needed="api" in self.raters)


# --------------------------------------------------------------------------------------------------
# Reading the command line
# --------------------------------------------------------------------------------------------------
def answer_help(cls):
    """Answer --help, and refuse what is no flag of the dataclass `cls`, before anything slow is
    imported. Letters that a terminal lacks are shown by number from now on."""
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(cls)) if os.environ.get("RANK", "0") == "0" else None
        sys.exit(0)
    read(cls)


def parse_args(cls):
    """The dataclass `cls` from the command line. Whatever is wrong with a flag: one line, exit code
    2."""
    answer_help(cls)
    parser = read(cls)
    try:
        return parser.parse_args_into_dataclasses()[0]
    except ValueError as e:  # raised by __post_init__
        parser.error(str(e))


class Parser(HfArgumentParser):
    @staticmethod
    def _parse_dataclass_field(parser, field):
        """argparse is told of the help alone: values are judged by `Flags`, presets included."""
        field = copy.copy(field)
        field.metadata = {"help": field.metadata["help"]}
        HfArgumentParser._parse_dataclass_field(parser, field)


def read(cls):
    """-> the parser, after it has read the command line once: no flag is unknown, no value of the
    wrong type."""
    global RESUMES
    RESUMES = any(f.name == "resume" for f in fields(cls))
    parser = Parser(cls, allow_abbrev=False, add_help=False)
    parser.error = end
    # --preset NAME: other defaults; what stands on the command line still wins
    if hasattr(cls, "PRESETS"):
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


def end(message):
    """One line from the first process, exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def help_text(cls):
    """What the script does and its first commands, out of its header; then the flags by group with
    their defaults.

    A comment `# -- budget` in a dataclass begins a group; inherited groups come last."""
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
            out += textwrap.wrap(f"{head}{gap}{field.metadata['help']}", width,
                                 subsequent_indent=" " * 34, break_long_words=False,
                                 break_on_hyphens=False)
    return "\n".join(out)
