"""The equations of grpo_rank.py that are GRPO's: surrogate, KL, schedule, control; by hand, none
restates a formula.

Ranks and their advantages: test_ndcg_advantages.py.
"""

from types import SimpleNamespace

import pytest
import torch

from grpo_rank import clipped_surrogate, kl_k3, lr_at, scale_by_std
from oracle import random_scores
from plumbing.questions import question_indices, step_questions
from video_llm import uniforms_of


def near(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --- advantages of scores ---
def test_scores_of_the_good_unlikely_answer():
    """GRPO: scores 1, 0, 0, 0, 0 have mean .2 and standard deviation .4."""
    near(scale_by_std(torch.tensor([[0.8, -0.2, -0.2, -0.2, -0.2]])),
         [[2.0, -0.5, -0.5, -0.5, -0.5]])


def test_scale_by_std():
    A = torch.tensor([[3.0, -1, -1, -1], [0, 0, 0, 0], [1e-12, -1e-12, 0, 0],
                      [0.01, -0.01, 0.01, -0.01]])
    near(scale_by_std(A),
         [[1.7320508, -0.5773503, -0.5773503, -0.5773503], [0] * 4, [0] * 4, [1.0, -1, 1, -1]])


# --- the surrogate --------------------------------------------------------------------------------
@pytest.mark.parametrize("A, ratio, J, moves", [
    (+1, 1.5, +1.2, False),  # good and already likelier: enough
    (+1, 0.5, +0.5, True),  # good but less likely: pull it back
    (-1, 1.5, -1.5, True),  # bad but likelier: push it back, without limit
    (-1, 0.5, -0.8, False),  # bad and already less likely: enough
    # inside the range
    (+1, 1.1, +1.1, True), (-1, 1.1, -1.1, True), (+1, 0.9, +0.9, True), (-1, 0.9, -0.9, True),
])
def test_clipped_surrogate_sign_table(A, ratio, J, moves):
    old = torch.tensor([[-2.0, -0.5]])
    logprobs = (old + torch.tensor([[ratio, 1.0]]).log()).requires_grad_()
    out = clipped_surrogate(logprobs, old, torch.tensor([float(A)]), 0.2)
    near(out, [[J, A]])
    out.sum().backward()
    # d J / d log pi = ratio A where it is not clipped: of the sign of A
    near(logprobs.grad, [[A * ratio if moves else 0.0, A]])


def test_every_answer_has_its_own_advantage_on_all_of_its_tokens():
    logprobs = torch.zeros(3, 2)
    near(clipped_surrogate(logprobs, logprobs, torch.tensor([1.0, -2.0, 0.0]), 0.2),
         [[1, 1], [-2, -2], [0, 0]])


# --- KL -------------------------------------------------------------------------------------------
def test_kl_by_hand():
    ln2 = 0.6931472
    # the reference half as likely: 1/2 - 1 + ln 2; twice as likely: 2 - 1 - ln 2; equal: 0
    kl = kl_k3(torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-1 - ln2, -1 + ln2, -1.0]]))
    near(kl, [[0.1931472, 0.3068528, 0]])


def test_kl_is_never_negative_and_zero_only_for_equal_probabilities():
    step = (torch.arange(801, dtype=torch.float64)[None] - 400) / 100
    k = kl_k3(torch.full_like(step, -5.0), step - 5)
    assert ((k > 0) == (step != 0)).all() and k[0, 400] == 0


def test_kl_gradient_on_policy_is_that_of_kl_of_ref_and_pi():
    """pi = (.5, .3, .2), ref = (.2, .5, .3). The gradient of KL(ref || pi) in the logits is pi -
    ref; the other direction would give another vector: (.3462, -.2204, -.1259)."""
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logits = pi.log().requires_grad_()
    # the exact mean over pi
    (pi * kl_k3(logits.log_softmax(-1)[None], ref.log()[None])[0]).sum().backward()
    near(logits.grad, [0.3, -0.2, -0.1], 1e-12)


# --- schedule, order of the questions, control ----------------------------------------------------
def test_learning_rate():
    near([lr_at(s, 100, 2.0) for s in (0, 4, 9, 50, 99)], [0.2, 1.0, 1.82, 1.0, 0.02], 1e-12)
    assert max(lr_at(s, 100, 2.0) for s in range(100)) <= 2.0
    assert all(lr_at(s, n, 1.0) > 0 for n in (1, 2, 10) for s in range(n))


@pytest.mark.parametrize("count, per_step", [(10, 4), (7, 3), (5, 5), (12, 1)])
def test_every_question_comes_once_per_epoch(count, per_step):
    args = SimpleNamespace(prompts_per_step=per_step, seed=0)
    steps = [question_indices(count, s, args) for s in range(3 * count)]
    assert all(len(s) == per_step for s in steps)
    asked = sum(steps, [])
    epochs = [tuple(asked[i : i + count]) for i in range(0, len(asked) - count + 1, count)]
    assert all(sorted(e) == list(range(count)) for e in epochs)
    assert len(set(epochs)) > 1  # another order each time
    assert asked != sum(
        (
            question_indices(count, s, SimpleNamespace(prompts_per_step=per_step, seed=1))
            for s in range(3 * count)
        ),
        [],
    )


PICKS = [(11, 0), (5, 0), (8, 0), (2, 0)]


def test_random_scores_tie_equal_answers_and_ignore_the_number_of_processes():
    answers = [["red", "blue", "red", "green"], ["a", "a", "a", "a"], ["x", "y", "z", "x"],
               ["red", "blue", "w", "v"]]
    whole = random_scores(answers, PICKS, step=3, seed=0)
    assert (whole[0, 0] == whole[0, 2] and whole[2, 0] == whole[2, 3]
            and (whole[1] == whole[1, 0]).all())
    assert [len(set(row)) for row in whole.tolist()] == [3, 1, 3, 4]
    for rank in (0, 1):
        near(random_scores(answers[rank::2], PICKS[rank::2], step=3, seed=0), whole[rank::2], 0)
    assert whole[0, 0] != whole[3, 0]  # drawn for each question, not for each answer
    assert (random_scores(answers, PICKS, step=4, seed=0) != whole).any()
    assert (random_scores(answers, PICKS, step=3, seed=1) != whole).any()


def test_the_same_question_twice_in_a_step_is_drawn_twice():
    """Four questions, six a step: two come twice, and their second group is another."""
    args = SimpleNamespace(prompts_per_step=6, seed=0)
    picks = step_questions(4, 0, args)
    assert sorted(n for _, n in picks) == [0, 0, 0, 0, 1, 1] and len(set(picks)) == 6
    draws = uniforms_of(0, 3, picks, 2, 5)
    assert draws.shape == (6, 2, 5) and len({tuple(row.flatten().tolist()) for row in draws}) == 6
    near(uniforms_of(0, 3, picks[1::2], 2, 5), draws[1::2], 0)  # whatever the number of processes
    assert (uniforms_of(0, 4, picks, 2, 5) != draws).all()
