"""A script run inside this process, as from the command line: that saves importing torch each time."""

import importlib
import sys

import harness
from flags import parse_args


def main_of(monkeypatch, cwd, script, *flags):
    """`python script flags` in the folder `cwd`. Raises SystemExit where the script does."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        module.main(parse_args(module.Args))
    finally:  # conftest.py undoes the rest
        harness.unlock()


def flags_of(monkeypatch, script, *flags):
    """The flags of a script as it would read them."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    return parse_args(importlib.import_module(script.removesuffix(".py")).Args)
