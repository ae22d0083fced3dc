"""Micro-batches out of a token budget: each group once, none too long, as many on every process."""

import pytest
import torch

from plumbing import processes
from plumbing.batches import micro_batches

TOKENS = torch.randint(23, 140, (40,), generator=torch.Generator().manual_seed(0))


def padded(part):
    return len(part) * int(TOKENS[part].max())


@pytest.mark.parametrize("budget", [1, 139, 300, 1000, 10**6])
def test_micro_batches_fill_the_budget(budget):
    parts = micro_batches(TOKENS, budget)
    assert sorted(sum(parts, [])) == list(range(40))
    assert all(padded(part) <= budget or len(part) == 1 for part in parts)
    # the first group of the next would not have fitted
    assert all(padded([*a, b[0]]) > budget for a, b in zip(parts, parts[1:]))
    assert len(parts) == {1: 40, 10**6: 1}.get(budget, len(parts))
    longest = [int(TOKENS[part].max()) for part in parts]
    assert longest == sorted(longest)  # of like length
    if budget == 1000:  # what is padding is little
        assert sum(map(padded, parts)) < 1.2 * int(TOKENS.sum())


@pytest.mark.parametrize("most", [1, 7, 40])
def test_every_process_makes_as_many(monkeypatch, most):
    monkeypatch.setattr(processes, "all_max", lambda n: max(n, most, 2))
    parts = micro_batches(TOKENS, 1500)
    monkeypatch.undo()
    assert len(parts) == max(most, len(micro_batches(TOKENS, 1500)))
    assert sorted(sum(parts, [])) == list(range(40)) and all(map(len, parts))
    assert all(padded(part) <= 1500 for part in parts)
