"""sft.py: curriculum, loss and schedule by hand; what is trained on is the answer, EOS included,
and nothing else."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sft
from inputs.records import Clip
from plumbing import processes
from plumbing.run import Run
from plumbing.text import DESCRIBE
from sft import collate, comparison, easy_and_hard, encode, judge_material, lr_at, sft_loss
from video_llm import load_model, token_logprobs

ARGS = SimpleNamespace(max_prompt_tokens=200, max_answer_tokens=60)


@pytest.fixture(scope="module")
def start(policy):
    return load_model(str(policy))


# --- equations ------------------------------------------------------------------------------------
def test_easy_are_the_short_answers_and_ties_are_easy():
    # the quantile: 2.4
    assert easy_and_hard([1, 10, 2, 1, 3], 0.6).tolist() == [True, False, True, True, False]
    assert easy_and_hard([9, 2, 2, 2], 0.5).tolist() == [False, True, True, True]
    assert easy_and_hard([3, 1, 2], 1.0).all()


def test_every_example_counts_the_same_whatever_its_length():
    """Two tokens of -1 and -2 give 1.5, one of -4 gives 4; behind the mask and on padding rows
    nothing counts (D2)."""
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-7.0, -4.0, -9.0], [-5.0, -5.0, -5.0]],
                            requires_grad=True)
    mask = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 0]])
    loss = sft_loss(logprobs, mask)
    assert loss.tolist() == [1.5, 4.0, 0.0]
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[-0.5, -0.5, 0], [0, -1, 0], [0, 0, 0]]


def test_learning_rate():
    rates = [round(lr_at(s, 100, 2.0, warmup=0.1), 6) for s in (0, 4, 9, 10, 55, 99)]
    assert rates == [0.2, 1.0, 2.0, 2.0, 1.0, 0.022222]
    assert all(0 < lr_at(s, n, 1.0, warmup=0.03) <= 1 for n in (1, 2, 10) for s in range(n))


# --- what is trained on ---------------------------------------------------------------------------
def text_only(question, answer):
    return dict(clip=None, question=question, answer=answer, task_type="colour")


def test_packed_answers_have_the_likelihood_that_each_has_alone(start):
    model, processor = start
    group = [text_only("what colour is the circle ?", "red"),
             text_only("what does the square do ?", "moves left")]
    row = encode(group, processor, ARGS)
    assert row[0] and row[4] == ["answer", "answer"]  # a common beginning
    prefix, tokens, lengths, mask, _ = collate([row], processor, None, "cpu")
    with torch.no_grad():
        found = sft_loss(token_logprobs(model, prefix, tokens, lengths)[0], mask)
        for example, nll, token, m in zip(group, found, tokens[0], mask):
            answer = processor.answer_ids(example["answer"])
            assert (token[m.bool()].tolist() == answer
                    and answer[-1] == processor.tokenizer.eos_token_id)
            ids = torch.tensor([processor.prompt_ids(example["question"], video=False) + answer])
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            alone = -logprobs[-len(answer) :].gather(1, ids[0, -len(answer) :, None]).mean()
            torch.testing.assert_close(nll, alone, rtol=0, atol=1e-5)


def test_a_cut_answer_does_not_end(start):
    processor = start[1]
    row = encode([text_only("what colour ?", "red green blue")], processor,
                 SimpleNamespace(**vars(ARGS) | dict(
        max_answer_tokens=2)))
    _, tokens, _, mask, _ = collate([row], processor, None, "cpu")
    assert tokens[0, 0][mask[0].bool()].tolist() == processor.answer_ids("red green blue")[:2]


# --- the judge's task (D3) ------------------------------------------------------------------------
def records():
    one, two = Clip("a.mp4"), Clip("b.mp4")
    row = lambda clip, question, answer, kind: dict(
        clip=clip, question=question, answer=answer, task_type=kind
    )
    return [row(one, "which way ?", "left", "motion"), row(two, "which way ?", "right", "motion"),
            row(one, "which colour ?", "red", "colour"),
            row(two, "what tint ?", "The red.", "colour"),
            row(two, "what shade ?", "blue", "colour"),
            row(one, DESCRIBE, "a red circle .", "describe")]


def test_a_comparison_is_the_right_answer_and_another_to_the_same_question(start):
    rows = records()
    pools, stories = judge_material(rows)
    made = [comparison(rows[0], pools, {}, random.Random(seed), start[1], ARGS)
            for seed in range(20)]
    tails = {m["question"][1] for m in made}
    lines = lambda a, b: (f"\nResponse 1: {a}\nResponse 2: {b}\n"
                          "Which response is better?\nwhich way ?")
    assert tails == {lines("left", "right"), lines("right", "left")}  # both orders, never a colour
    assert {m["answer"] for m in made} == {"left"} and {m["question"][0] for m in made} == {""}
    told = comparison(rows[0], pools, stories, random.Random(0), start[1], ARGS)
    assert told["question"][0] == "a red circle ."


def test_without_another_answer_to_the_question_one_of_its_type_stands_in_and_never_the_same_answer(
    start):
    rows = records()
    pools = judge_material(rows)[0]
    for seed in range(20):  # "The red." is the same answer as "red"
        tail = comparison(rows[2], pools, {}, random.Random(seed), start[1], ARGS)["question"][1]
        assert ": blue\n" in tail and ": red\n" in tail and "The red" not in tail


def test_where_no_comparison_can_be_made(start):
    rows = records()
    pools = judge_material(rows)[0]
    make = lambda record, **args: comparison(record, pools, {}, random.Random(0), start[1],
                                             SimpleNamespace(**vars(ARGS) | args))
    assert make(rows[5]) is None  # a description
    assert make(dict(rows[0], question="who ?", task_type="none")) is None  # no other answer
    assert make(rows[0], max_prompt_tokens=5) is None  # it would have to be cut
    long = dict(rows[0], answer="left left left", question="how ?", task_type="long")
    pools["how ?"] = [("left left right", "left left right")]
    assert make(long) is not None and make(long, max_answer_tokens=2) is None  # the same once cut


# --- runs of earlier versions ---------------------------------------------------------------------
def test_a_run_without_the_seed_in_its_folder_is_not_overlooked(tmp_path, monkeypatch):
    """Earlier versions wrote to runs/sft/<name>. Begun anew beside it, a run would seem to have
    lost its work."""
    monkeypatch.chdir(tmp_path)
    make = lambda name, **flags: Run(sft.__file__, sft.Args(name=name, seed=1, **flags))
    for name in ("mine", "yours_s1"):
        Path("runs/sft", name, "checkpoint-3").mkdir(parents=True)
        saved = dict(vars(sft.Args(name=name, seed=1)))
        Path("runs/sft", name, "args.json").write_text(json.dumps(dict(args=saved)))
    with pytest.raises(SystemExit, match="runs/sft/mine: .* rename it to runs/sft/mine_s1"):
        make("mine", resume=True)
    assert not Path("runs/sft/mine_s1").exists()
    run = make("yours", resume=True)  # the flag was --name yours_s1 then
    assert run.folder == Path("runs/sft/yours_s1") and run.checkpoint.name == "checkpoint-3"
    processes.unlock()
    assert make("mine").checkpoint is None  # without --resume: a new run, as asked for
    processes.unlock()
