"""What a script prints before it does anything: help, one line for a wrong flag, and nothing of
other people's."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, run
from inside import flags_of

FOLDERS = (".", "inputs", "embedded_world", "evaluation")
SCRIPTS = sorted(str(p.relative_to(REPO)) for folder in FOLDERS for p in REPO.glob(f"{folder}/*.py")
                 if re.search(r"^class Args", p.read_text(encoding="utf-8"), re.M))
LATE = ("peft", "bitsandbytes", "tensorboard", "torch.utils.tensorboard", "matplotlib")
PLANTED = """
import logging, sys
class Plant:  # what bitsandbytes logs at import on a processor with AVX512-BF16, on every processor
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("bitsandbytes", "peft"):
            logging.getLogger("bitsandbytes.backends.cpu.ops").warning("planted: no kernels")
sys.meta_path.insert(0, Plant())
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """The environment of a processor for which bitsandbytes has something to say."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_one_screen_of_what_then_every_flag(name, planted, tmp_path):
    done = run(tmp_path, name, "--help")
    header, *groups = done.stdout.split("\n\n")
    about, commands = header, groups[0]
    assert done.stderr == "" and about.startswith(f"{Path(name).name}: ")
    assert len(about + commands) < 1500
    assert 1 <= len(re.findall(rf"^  (?:python|torchrun) .*{name}", commands, re.M)) <= 3
    script = importlib.import_module(name[:-3].replace("/", "."))
    flags = {f.name for f in script.Args.__dataclass_fields__.values() if f.init}
    assert set(re.findall(r"^  --(\w+) ", done.stdout, re.M)) == flags  # each once, no --no_...
    assert not list(Path(tmp_path).glob("[!s]*"))  # nothing was begun


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_misspelt_flag_is_one_line(name, planted, tmp_path):
    done = run(tmp_path, name, "--outt", "x", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{Path(name).name}: --outt: no such flag")


def test_the_nearest_flag_is_named(tmp_path):
    done = run(tmp_path, "grpo_rank.py", "--prompt_per_step", "5", check=False)
    assert "the nearest is --prompts_per_step" in done.stderr


def test_help_names_defaults_and_groups(tmp_path):
    out = run(tmp_path, "grpo_rank.py", "--help", env={"COLUMNS": "100"}).stdout
    assert ("\n  --G 5 " in out and "\n  --video_root '' " in out
            and max(map(len, out.split("\n"))) <= 120)
    groups = re.findall(r"^(\w[\w ]+):$", out, re.M)
    assert groups[:4] == ["algorithm", "budget", "data and models", "plumbing"]
    assert set(groups[4:]) == {"oracle", "server", "memory"}


@pytest.mark.parametrize("flags, divided", [
    ([], True), (["--advantage", "score"], True), (["--advantage", "published"], False),
    (["--advantage", "signed"], False),
    (["--advantage", "published", "--scale_advantages", "True"], True),
    (["--scale_advantages", "False"], False)])
def test_published_is_what_was_published(monkeypatch, flags, divided):
    assert flags_of(monkeypatch, "grpo_rank.py", *flags).scale_advantages is divided


def test_slow_libraries_wait_until_they_are_needed_and_say_nothing(planted):
    """PEFT imports bitsandbytes; scripts import neither before there is an adapter. Whatever that
    import logs, a user does not see it."""
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r}); import "
            f"{', '.join(s[:-3].replace('/', '.') for s in SCRIPTS)}; "
            f"print(sorted(set({LATE}) & set(sys.modules))); import peft")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[]\n")
