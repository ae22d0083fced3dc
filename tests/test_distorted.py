"""The distortions of experiments/distorted_rewards.py do to an order what their page says, and no
more."""

import sys

import numpy as np
import pytest
import torch
from conftest import REPO

from grpo_rank import scale_by_std
from oracle import ranks_of

sys.path.insert(0, str(REPO / "experiments"))
from distorted_rewards import distort  # noqa: E402

ONE = [0, 1, 2, 2, 4]  # the fourth answer is a copy of the third


def groups(seed, n=400):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        r = rng.integers(0, 5, 5) / 4
        yield r[ONE].tolist(), rng


@pytest.mark.parametrize("kind", ["saturation", "tail"])
def test_monotone_distortions_keep_the_ranks_and_change_the_distances(kind):
    changed = 0
    for rewards, rng in groups(0):
        seen = distort(kind, rewards, ONE, rng)
        changed += not np.allclose(rewards, seen, atol=0.01)
        both = torch.tensor([rewards, seen])
        assert torch.equal(*ranks_of(both)) and seen[2] == seen[3]
    assert changed > 350


@pytest.mark.parametrize("percent", [10, 20, 30])
def test_flips_exchange_scores_and_leave_copies_alike(percent):
    moved = 0
    for rewards, rng in groups(1):
        seen = distort(f"flip{percent}", rewards, ONE, rng)
        distinct = [0, 1, 2, 4]
        assert (
            sorted(seen[i] for i in distinct) == sorted(rewards[i] for i in distinct)
            and seen[2] == seen[3]
        )
        moved += seen != rewards
    assert 0.7 * percent / 100 < moved / 400 < 4 * percent / 100  # one of four, most exchanges show


def test_an_offset_or_a_factor_for_a_question_changes_nothing():
    """Why they are not among the distortions: mean and deviation of the group take both out."""
    scores = torch.rand(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = lambda s: scale_by_std(s - s.mean(-1, keepdim=True))
    offset, factor = torch.linspace(-9, 9, 50).unsqueeze(1), torch.logspace(-3, 3, 50).unsqueeze(1)
    torch.testing.assert_close(advantages(scores * factor + offset), advantages(scores), rtol=0,
                               atol=1e-9)
