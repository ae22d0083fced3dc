"""Every row gets what is its own: its video's narrative, its question's random numbers and scores,
the limits of its training. A shift by one row changes no shape and raises nothing.
"""

# ruff: noqa: F811 - fixtures of other files

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from inside import main_of
from test_oracle import ANSWERS, QUESTIONS, clips, judge, rewarding  # noqa: F401
from test_whole_steps import assert_new_numbers, assert_sampled, listen, start  # noqa: F401

import dpo_iter_w2s
import reward_model
from inputs.features import FeatureCache
from inputs.preferences import read_preferences
from inputs.records import Clip
from oracle import JudgeOracle, ReferenceOracle, RewardModelOracle, reward_prompt
from plumbing import zoo
from plumbing.pairs import Reading, key_of
from ppo_rlaif import value_prompts
from video_llm import Prefix, generate, load_model


# --- the judge ------------------------------------------------------------------------------------
def test_every_comparison_reads_the_narrative_of_its_own_video(judge, clips, monkeypatch):
    stories = ["a red circle moves left .", "a blue square stays .", "two shapes turn and turn ."]
    monkeypatch.setattr(judge, "narrative", True)
    monkeypatch.setattr(judge, "known", dict(zip(clips, stories)))
    together = judge.preferences(clips, QUESTIONS, ANSWERS)
    alone = [judge.preferences(*([x[b]] for x in (clips, QUESTIONS, ANSWERS))) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    monkeypatch.setattr(judge, "known", dict(zip(clips, stories[1:] + stories[:1])))
    assert (judge.preferences(clips, QUESTIONS, ANSWERS) - together).abs().max() > 1e-3


def test_every_narrative_tells_of_its_own_video(policy, clips, tmp_path, monkeypatch):
    context = JudgeOracle(policy, tmp_path, narrative=True)
    monkeypatch.setattr(context, "describe", lambda parts: [str(part.path) for part in parts])
    assert context.narratives(clips) == [" ".join([c.path] * 3) for c in clips]


# --- the reward model -----------------------------------------------------------------------------
def test_rewards_are_read_within_the_limits_of_training(rewarding, policy, clips, tmp_path):
    about = dict(narrative_clips=0, narrative_model=str(policy), answer_first=False, guided=False,
                 max_prompt_tokens=200, max_answer_tokens=3)
    (rewarding / "reward_model.json").write_text(json.dumps(about))
    rater = RewardModelOracle(rewarding, tmp_path)
    long = ["a red circle moves left and then up", "blue"]
    (scores,), ok = rater.score(clips[:1], QUESTIONS[:1], [long])
    features, frame_mask = rater.cache(clips[:1])
    for answer, found in zip(long, scores.tolist()):
        asked = rater.processor.prompt_ids(reward_prompt(QUESTIONS[0]))
        ids = torch.tensor([asked + rater.processor.answer_ids(answer)[:3]])
        with torch.no_grad():
            expected = rater.model(input_ids=ids, attention_mask=torch.ones_like(ids), scores=True,
                                   video_features=features, frame_mask=frame_mask).logits[0, -1, 0]
        assert found == pytest.approx(expected.item(), abs=1e-4)
    assert ok.all() and len(rater.processor.answer_ids(long[0])) > 5


def test_what_the_judge_tells_belongs_to_its_pair():
    pairs = [dict(clip=Clip(f"{n}.mp4"), question=f"why {n}?") for n in "bacd"]
    fake = SimpleNamespace(narratives=lambda some: [f"of {c.path}" for c in some],
                           answer=lambda *asked: [f"{c.path} {q}" for c, q in zip(*asked)])
    args = SimpleNamespace(narrative=True, guided=True)
    reading = Reading(args, None, None, None)
    reading.tell(SimpleNamespace(rank=0, world=1), fake, pairs)
    stories, owns = reading.narratives, reading.own_answers
    assert stories == {p["clip"]: f"of {p['clip'].path}" for p in pairs}
    assert owns == {key_of(p): f"{p['clip'].path} {p['question']}" for p in pairs}


def test_every_question_is_asked_with_numbers_of_its_own(start, clips, tmp_path, monkeypatch):
    model, processor = load_model(start)
    seen = listen(monkeypatch, reward_model)
    batch = [dict(id=str(n), clip=clips[n], question=QUESTIONS[n], answer="red") for n in range(3)]
    args = SimpleNamespace(seed=0, samples=3, max_new_tokens=5, temperature=0.7,
                           max_prompt_tokens=200)
    cache = FeatureCache(model, processor, tmp_path)
    oracle = ReferenceOracle(batch)
    job = SimpleNamespace(args=args, device="cpu")
    records = [None] * 4 + batch
    rows = reward_model.ask([4, 5, 6], records, model, processor, cache, oracle, job)
    rows = [row for (row,) in rows]
    assert_new_numbers(seen)
    assert_sampled(model, seen[0], processor, 0.7)
    said = processor.decode_answers(seen[0]["tokens"], seen[0]["lengths"])
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert all(set(row["answers"]) <= set(group) for row, group in zip(rows, said))


# --- PPO's value model ----------------------------------------------------------------------------
def test_the_value_model_reads_the_narrative_of_its_own_video(start, clips, tmp_path):
    model, processor = load_model(start)
    about = dict(narrative_clips=2, narrative_model="m")
    (tmp_path / "reward_model.json").write_text(json.dumps(about))
    story = {clip: f"a story of {n} ." for n, clip in enumerate(clips)}
    teller = SimpleNamespace(narratives=lambda some: [story[clip] for clip in some])
    args = SimpleNamespace(value_model=str(tmp_path), cache=str(tmp_path / "cache"),
                           oracle_dtype="float32")
    build = value_prompts(args, SimpleNamespace(value=model, value_processor=processor),
                          SimpleNamespace(narrated_by=("m", 2), narrator=teller), "cpu")
    prefix = build(QUESTIONS, clips, None)
    for ids, mask, clip, question in zip(prefix.input_ids, prefix.attention_mask, clips, QUESTIONS):
        assert ids[mask.bool()].tolist() == processor.prompt_ids(f"{story[clip]}\n{question}")


# --- the zoo --------------------------------------------------------------------------------------
def test_a_checkpoint_samples_as_it_is_asked_to(start, clips, tmp_path, monkeypatch):
    args = dpo_iter_w2s.Args(model=str(start), temperature=0.7, samples=6, max_new_tokens=2,
                             cache=str(tmp_path))
    run = SimpleNamespace(args=args, load=load_model, device="cpu")
    source = zoo.Checkpoint(run, start, dpo_iter_w2s.sample)
    seen = listen(monkeypatch, dpo_iter_w2s)
    records = [dict(clip=clip, question=q) for clip, q in zip(clips, QUESTIONS)]
    keys = [[0, 1, 0, n] for n in range(3)]
    said = source(records, keys)
    assert_new_numbers(seen)
    assert_sampled(source.model, seen[0], source.processor, 0.7)
    eos = source.processor.tokenizer.eos_token_id
    last = seen[0]["tokens"].gather(-1, seen[0]["lengths"].unsqueeze(-1) - 1).squeeze(-1)
    ends = [[ended for _, ended in group] for group in said]
    assert ends == (last == eos).tolist() and {True, False} == set(sum(ends, []))  # some are cut
    assert source(records, keys) == said != source(records, [[0, 2, 0, n] for n in range(3)])


def test_answers_are_drawn_and_scored_for_their_own_question(tmp_path, monkeypatch):
    class Source:
        def __init__(self, run, name, sample):
            self.name = name

        def __call__(self, records, keys):
            drawn.extend(map(tuple, keys))
            return [[(f"{self.name} on {r['id']}", True)] * 2 for r in records]

    class Oracle:
        def aspects(self, videos, questions, answers):
            points = torch.tensor([[[float(q)] * 4] * len(answers[0]) for q in questions])
            return points, torch.ones(len(videos), dtype=torch.bool)

    drawn, which = [], [5, 0, 3, 2, 6]
    records = [dict(id=str(n), clip=Clip(f"{n}.mp4"), question=str(n / 4)) for n in range(7)]
    monkeypatch.setattr(zoo, "Checkpoint", Source)
    monkeypatch.setattr(zoo, "PART", 3)
    for k in (1, 2):
        run = SimpleNamespace(rank=0, world=1, args=SimpleNamespace(seed=0, samples=2))
        groups = zoo.collect_answers(run, tmp_path / str(k), k, dict(a="x", b="y"), records, which,
                                     None)
        zoo.collect_scores(run, tmp_path / str(k), groups, Oracle(), dpo_iter_w2s.score)
        assert [g["record"]["id"] for g in groups] == [str(n) for n in which]
        for g in groups:
            number = g["record"]["id"]
            assert g["answers"] == [f"{source} on {number}" for source in "xxyy"]
            assert g["scores"] == [[float(g["record"]["question"])] * 4] * 4
    assert len(set(drawn)) == len(drawn) == 20  # others for each iteration, source and question


def test_the_share_of_a_source_is_limited_in_the_pairs_that_are_written(world, start, monkeypatch):
    def answered(run, folder, k, sources, records, which, sample):
        folder.mkdir(parents=True)
        return [dict(record=records[i], answers=["red", "blue"], ended=[True] * 2,
                     sources=list(sources))
                for i in which]

    def scored(run, folder, groups, oracle, score):
        for n, group in enumerate(groups):
            group["scores"] = [[4.0 - n / 10] * 4, [1.0 if n else 5.0] * 4]
        return {}

    monkeypatch.setattr(zoo, "collect_answers", answered)
    monkeypatch.setattr(zoo, "collect_scores", scored)
    flags = (f"--model '{start}' --zoo policy runs/sft/other/final --oracle reference --stage "
             "build "
             "--questions 6 --prompts_per_step 2 --tokens_per_micro_batch 300 "
             "--max_share 0.5 --eval_data= "
             "--alphas 0 --name share")
    main_of(monkeypatch, world, "dpo_iter_w2s.py", *shlex.split(flags))
    made = world / "runs/dpo_iter_w2s/share_s0/iteration_1_s0/preferences.json"
    pairs, _ = read_preferences([str(made)])
    assert [p["sources"]["chosen"] for p in pairs] == ["other", "policy"]


# --- sampling -------------------------------------------------------------------------------------
def test_the_edges_between_tokens_are_those_of_float64(start):
    """Just below and just above what the probabilities of the first tokens add up to."""
    model, processor = load_model(start)
    V, eos = model.config.text_config.vocab_size, processor.tokenizer.eos_token_id
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    say = lambda module, inputs, out: logits.expand_as(out)
    model.language_model.lm_head.register_forward_hook(say)
    logits[model.config.video_token_id] = -1e4  # it is never sampled
    total = logits.log_softmax(-1).double().exp().cumsum(-1)
    edges = total[total.diff(prepend=torch.zeros(1)) > 1e-9][:-1] / total[-1]
    uniforms = torch.stack([edges - 1e-12, edges + 1e-12]).flatten()
    expected = [int((total / total[-1] > u).int().argmax()) for u in uniforms]
    ids = torch.tensor([processor.prompt_ids("what?", video=False)])
    prefix = Prefix(ids, torch.ones_like(ids), None, None)
    tokens, *_ = generate(model, prefix, uniforms.view(1, -1, 1), eos)
    assert tokens[0, :, 0].tolist() == expected and len(edges) > 100
