"""A script run inside this process, as from the command line: that saves importing torch each
time."""

import importlib
import sys

import torch
from safetensors.torch import load_file

from plumbing import processes
from plumbing.flags import parse_args


def main_of(monkeypatch, cwd, script, *flags):
    """`python script flags` in the folder `cwd`. Raises SystemExit where the script does."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        module.main(parse_args(module.Args))
    finally:  # conftest.py undoes the rest
        processes.unlock()


def flags_of(monkeypatch, script, *flags):
    """The flags of a script as it would read them."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    return parse_args(importlib.import_module(script.removesuffix(".py")).Args)


def apart(a, b, start):
    """How far the weights of two runs lie from each other, in parts of their way from the start.
    -> (part, name) of the tensor of which it is the largest.

    By length: Adam's first steps are as long as the learning rate whatever the gradient, so an
    entry whose gradient is rounding goes either way, and a few such entries are no fault. Left out
    is what moves by rounding alone, the bias of an attention's keys: it adds the same to all logits
    of a query, softmax takes that out again, the gradient is zero (where positions are not rotated
    in)."""
    a, b, start = (load_file(folder / "model.safetensors") for folder in (a, b, start))
    assert a.keys() == b.keys() == start.keys()
    names = [n for n in a if not n.endswith(("key.bias", "k_proj.bias"))]
    assert any(not torch.equal(a[n], start[n]) for n in names), "nothing was trained"
    length = lambda x, y, n: (x[n].double() - y[n].double()).norm().item()
    parts = [(length(a, b, n) / (length(a, start, n) or 1e-9), n) for n in names]
    return max(parts)
