"""The nDCG penalty and the advantages of grpo_rank.py: both printed values, zero-sum, bounded,
top-heavy, permutation, ties, no gradient for ties. Against numbers worked out by hand; nothing here
restates a formula of the script.

g(0..4) = 1, log2(3)/2, 2/3, log2(5)/4, log2(6)/5 = 1, 0.7924813, 0.6666667, 0.5804820, 0.5169925
"""

import itertools

import pytest
import torch

from grpo_rank import clipped_surrogate, gain, penalty, rank_advantages, scale_by_std
from oracle import places_of, ranks_of

RANKED = ("oracle_rank", "published", "signed")
PERMUTATIONS = torch.tensor(list(itertools.permutations(range(5))))


def near(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def some_ranks(groups=200, G=5, levels=4, seed=0):
    """Two rankings each of random groups, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return [ranks_of(torch.randint(levels, (groups, G), generator=generator).float())
            for _ in range(2)]


# --- the penalty ----------------------------------------------------------------------------------
def test_penalty_has_the_two_printed_values():
    delta = penalty(torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[4, 0, 1, 2, 3]]))
    assert round(delta[0, 0].item(), 4) == 0.4830  # delta(0 -> 4)
    assert round(delta[0, 4].item(), 4) == 0.0243  # delta(4 -> 3)
    # the other three by hand: .2075187/1.6931472, .1258146/2.0986123, .0861847/2.3862944
    near(delta[0, 1:4], [0.1225639, 0.0599513, 0.0361165])


def test_penalty_is_zero_only_where_the_ranks_agree_and_below_one():
    true = torch.arange(5).expand(len(PERMUTATIONS), 5)
    delta = penalty(true, PERMUTATIONS)
    assert ((delta == 0) == (true == PERMUTATIONS)).all()
    assert (delta >= 0).all() and (delta < 1).all()
    many = torch.arange(64)
    assert (penalty(many[None], many.flip(0)[None]) < 1).all()  # also in a large group


def test_mistakes_at_the_top_cost_more():
    delta = {}
    for p in PERMUTATIONS.tolist():
        row = penalty(torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([p]))[0]
        delta |= {(t, s): d.item() for t, (s, d) in enumerate(zip(p, row))}
    for distance in (1, 2, 3):
        down = [delta[t, t + distance] for t in range(5 - distance)]
        up = [delta[t + distance, t] for t in range(5 - distance)]
        assert down == sorted(down, reverse=True) and up == sorted(up, reverse=True)
        assert len(set(down)) == len(down) and len(set(up)) == len(up)
    for t in range(4):  # farther off costs more, too
        away = [delta[t, s] for s in range(t, 5)]
        assert away == sorted(away)


# --- ties -----------------------------------------------------------------------------------------
def test_tied_ranks_share_the_mean_of_the_places_they_occupy():
    ranks = torch.tensor([[0, 1, 1, 3], [2, 0, 2, 0], [0, 0, 0, 3]])
    g, place = gain(ranks), places_of(ranks)
    near(g[0], [1, 0.7295740, 0.7295740, 0.5804820])  # (.7924813 + .6666667) / 2
    near(place[0], [0, 1.5, 1.5, 3])
    # (.6666667 + .5804820) / 2, (1 + .7924813) / 2
    near(g[1], [0.6235743, 0.8962406, 0.6235743, 0.8962406])
    near(place[1], [2.5, 0.5, 2.5, 0.5])
    near(g[2], [0.8197160, 0.8197160, 0.8197160, 0.5804820])  # (1 + .7924813 + .6666667) / 3
    near(place[2], [1, 1, 1, 3])


@pytest.mark.parametrize("kind", RANKED)
def test_equal_answers_get_equal_advantages(kind):
    A = rank_advantages(kind, torch.tensor([[3, 0, 3, 0, 2]]), torch.tensor([[0, 2, 0, 2, 4]]))[0]
    assert A[0] == A[2] and A[1] == A[3]
    assert len(set(A.tolist())) == 3


@pytest.mark.parametrize("kind", RANKED)
def test_a_group_of_ties_gives_no_advantage_and_exactly_no_gradient(kind):
    ranks = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
    A = rank_advantages(kind, ranks, torch.tensor([[3, 1, 0, 2, 4], [1, 0, 4, 3, 2]]))
    for A in (A, scale_by_std(A)):  # noqa: B020
        assert (A[0] == 0).all() and (A[1] != 0).any()
        logprobs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        clipped_surrogate(logprobs, logprobs.detach() - 0.05, A.float().flatten(),
                          0.2).sum().backward()
        assert (logprobs.grad[:5] == 0).all() and (logprobs.grad[5:] != 0).any()


# --- the advantages -------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", RANKED)
def test_advantages_sum_to_zero(kind):
    A = rank_advantages(kind, *some_ranks())
    near(A.sum(-1), torch.zeros(200), 1e-12)
    near(scale_by_std(A).sum(-1), torch.zeros(200), 1e-9)
    assert (A != 0).any(-1).sum() > 100 and A.abs().max() < 1


@pytest.mark.parametrize("kind", RANKED)
def test_permuting_a_group_permutes_its_advantages(kind):
    t, p = some_ranks()
    A = rank_advantages(kind, t, p)
    for order in ([4, 3, 2, 1, 0], [2, 0, 1, 4, 3]):
        near(rank_advantages(kind, t[:, order], p[:, order]), A[:, order], 1e-12)


def test_groups_do_not_see_each_other():
    t, p = some_ranks(groups=20)
    for kind in RANKED:
        alone = torch.cat([rank_advantages(kind, t[i : i + 1], p[i : i + 1]) for i in range(20)])
        near(rank_advantages(kind, t, p), alone, 0)


# One good answer that the policy finds unlikely, four equally bad ones that it finds likely. The
# bad ones share places 1..4: gain (.7924813 + .6666667 + .5804820 + .5169925) / 4 = .6391556, place
# 2.5, 1 + ln 3.5 = 2.2527630.
GOOD_BUT_UNLIKELY = torch.tensor([[0, 1, 1, 1, 1]]), torch.tensor([[4, 0, 1, 2, 3]])


def test_published_pushes_the_good_unlikely_answer_down():
    """Deltas .4830075, .1601785, .0680612, .0122122, .0260452; their mean .1499009."""
    A = rank_advantages("published", *GOOD_BUT_UNLIKELY)[0]
    near(A, [-0.3331066, -0.0102776, 0.0818397, 0.1376887, 0.1238557])
    # the only right answer is the one pushed down the most
    assert A[0] < 0 < A[3] and A[0] == A.min()


def test_signed_pushes_the_good_unlikely_answer_up():
    """+.4830075, -.1601785, -.0680612, -.0122122 (place 2 against 2.5), +.0260452; their mean
    .0537202."""
    A = rank_advantages("signed", *GOOD_BUT_UNLIKELY)[0]
    near(A, [0.4292873, -0.2138987, -0.1217814, -0.0659324, -0.0276750])
    assert A[0] > 0 and (A[1:] < 0).all()


def test_oracle_rank_pushes_the_good_answer_up_and_asks_no_policy():
    """Deltas 0 and four times .3608444; their mean .2886755."""
    A = rank_advantages("oracle_rank", *GOOD_BUT_UNLIKELY)[0]
    near(A, [0.2886755, -0.0721689, -0.0721689, -0.0721689, -0.0721689])
    near(rank_advantages("oracle_rank", GOOD_BUT_UNLIKELY[0], torch.tensor([[0, 1, 2, 3, 4]]))[0],
         A, 0)
    # five different ranks: 1 - g = 0, .2075187, .3333333, .4195180, .4830075; their mean .2886755
    A = rank_advantages("oracle_rank", torch.tensor([[4, 0, 2, 1, 3]]), GOOD_BUT_UNLIKELY[1])[0]
    near(A, [-0.1943320, 0.2886755, -0.0446578, 0.0811568, -0.1308425])
