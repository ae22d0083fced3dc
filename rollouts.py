"""A step's work cut to size: micro-batches out of a token budget, an NF4 base unpacked while answers are sampled."""

import math
from contextlib import contextmanager

import torch.nn.functional as F

import harness


def batches(tokens, budget, stretch=math.inf):
    """tokens (B,) of a packed row each -> lists of places, together each place once: rows of like
    length, as many as `budget` holds when padded to the longest, one at least. The longest has at
    most `stretch` times the tokens of the shortest."""
    parts = []
    for i in tokens.argsort(stable=True).tolist():  # the last one is the longest
        fits = parts and (len(parts[-1]) + 1) * int(tokens[i]) <= budget
        if fits and tokens[i] <= stretch * tokens[parts[-1][0]]:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def micro_batches(tokens, budget):
    """The same, and equally many on every process, so that none waits for another within a step."""
    parts = batches(tokens, budget)
    for _ in range(harness.all_max(len(parts)) - len(parts)):
        at = max(range(len(parts)), key=lambda k: len(parts[k]))
        parts[at : at + 1] = parts[at][::2], parts[at][1::2]
    return parts


@contextmanager
def unpacked(model):
    """A model with its NF4 weights unpacked, once for a whole rollout instead of at every token: the same numbers."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    for m in layers:
        weight = dequantize_4bit(m.weight.data, m.weight.quant_state).to(m.compute_dtype)
        m.forward = lambda x, w=weight, m=m: F.linear(x.to(w.dtype), w, m.bias).to(x.dtype)
    try:
        yield
    finally:
        for m in layers:
            del m.forward
