"""Micro-batches out of a token budget."""

from model.packing import batches
from plumbing import processes


def micro_batches(tokens, budget):
    """tokens (B,) of a packed row each -> lists of places: rows of like length, as many as `budget`
    holds. Equally many lists on every process, so that none waits for another within a step."""
    parts = batches(tokens, budget)
    for _ in range(processes.all_max(len(parts)) - len(parts)):
        at = max(range(len(parts)), key=lambda k: len(parts[k]))
        parts[at : at + 1] = parts[at][::2], parts[at][1::2]
    return parts


def by_length(rows, tokens, budget):
    """The same for some rows of all: rows (n,), places in tokens (B,) -> tensors of places. Each
    process has as many as it needs."""
    return [rows[part] for part in batches(tokens[rows], budget)]
