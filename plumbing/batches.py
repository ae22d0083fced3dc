"""Micro-batches out of a token budget."""

from model.packing import batches
from plumbing import processes


def micro_batches(tokens, budget):
    """The same, and equally many on every process, so that none waits for another within a step."""
    parts = batches(tokens, budget)
    for _ in range(processes.all_max(len(parts)) - len(parts)):
        at = max(range(len(parts)), key=lambda k: len(parts[k]))
        parts[at : at + 1] = parts[at][::2], parts[at][1::2]
    return parts


def by_length(rows, lengths, size):
    """Questions `rows` in micro-batches of `size`, like lengths together. lengths (B,G)."""
    if not len(rows):
        return []
    return rows[lengths[rows].max(-1).values.cpu().argsort(stable=True)].split(size)
