"""The model's short cuts against the slow way: a forward pass per answer, a token at a time, no
cache, no packing."""

import functools
import gc
import os
import shutil
import weakref
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode

from inputs import features as features_file
from inputs.features import FeatureCache, encode_frames
from inputs.frames import VideoError, read_frames
from inputs.records import Clip, read_records
from model import packing
from video_llm import (VIDEO_TOKEN, Prefix, ScalarHead, VideoLLM, add_lora, add_scalar_head,
                       answer_mask, generate, load_model, merged, reference_of, save_model,
                       token_logprobs, token_scores, unwrap)

QUESTIONS = ["what moves?", "what does the red shape do at the end of the video?",
             "where is the blue circle?"]
LENGTHS = torch.tensor([[5, 1, 3, 7], [2, 7, 7, 4], [1, 1, 6, 2]])  # B = 3, G = 4, T = 7; with EOS


@pytest.fixture(scope="module")
def records(world):
    return read_records([str(world / "data/moving_shapes/test.json")])[0]


@pytest.fixture(scope="module")
def clips(records):
    return list(dict.fromkeys(r["clip"] for r in records if r["clip"].start is None))[:3]


def lively(model, seed=0):
    """Trained for four steps the model says the same to everything: shake its weights, adapters
    included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point() and p.dim() == 2 and "vision_tower" not in name:
                p += 0.7 * torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5
    return model.eval()


@pytest.fixture(scope="module")
def start(policy):
    model, processor = load_model(policy)
    return lively(model), processor


@pytest.fixture(scope="module")
def cache(start, tmp_path_factory):
    return FeatureCache(*start, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def prefix(start, cache, clips):
    return Prefix.build(start[1], cache, QUESTIONS, clips)


@pytest.fixture(scope="module")
def tokens(start):
    """Random words, EOS at the end of each answer, rubbish behind it."""
    tokens = torch.randint(6, len(start[1].tokenizer), (3, 4, 7),
                           generator=torch.Generator().manual_seed(1))
    return tokens.scatter(-1, LENGTHS.unsqueeze(-1) - 1, start[1].tokenizer.eos_token_id)


def logits_alone(model, prefix, b, answer):
    """(T,V) float logits that predict each token of `answer` (T,), by one unpadded forward pass
    without a cache."""
    prompt = prefix.input_ids[b][prefix.attention_mask[b].bool()]
    ids = torch.cat([prompt, answer])[None]
    video = dict(video_features=prefix.video_features[b : b + 1],
                 frame_mask=prefix.frame_mask[b : b + 1])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False,
                   **video).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def plain_logprobs(model, prefix, tokens, lengths, temperature=1.0):
    out, entropy = torch.zeros(tokens.shape), torch.zeros(tokens.shape)
    for b in range(tokens.shape[0]):
        for g in range(tokens.shape[1]):
            answer = tokens[b, g, : lengths[b, g]]
            logits = logits_alone(model, prefix, b, answer)
            # all but the video token
            words = torch.arange(logits.shape[-1]) != prefix.input_ids[0].mode().values
            logp = (logits / temperature)[:, words].log_softmax(-1)
            place = words.cumsum(0)[answer] - 1
            out[b, g, : len(answer)] = logp[torch.arange(len(answer)), place]
            entropy[b, g, : len(answer)] = -(logp.exp() * logp).sum(-1)
    return out.flatten(0, 1), entropy.flatten(0, 1)


# --- packed scoring -------------------------------------------------------------------------------


@pytest.fixture(params=["full", "lora", "nf4"])
def trained(request, policy):
    model, _ = load_model(policy, "nf4" if request.param == "nf4" else "none")
    if request.param != "full":
        model = add_lora(model, 4, 8, train_bridge=request.param == "lora")
    # Where it can be, in float64: in float32 the sums of a busy machine were once 1.1e-5 apart.
    return lively(model if request.param == "nf4" else model.double())


def test_packed_answers_score_as_if_alone(trained, prefix, tokens):
    """Values and gradients of all trained parameters, ragged prompts and answers."""
    params = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    weights = torch.randn(12, 7, generator=torch.Generator().manual_seed(2))
    found = []
    for score in (functools.partial(token_logprobs, entropy="grad"), plain_logprobs):
        logprobs, entropy = score(trained, prefix, tokens, LENGTHS, 0.8)
        grads = torch.autograd.grad(((logprobs + 0.3 * entropy) * weights).sum(),
                                    list(params.values()))
        found.append((logprobs.detach(), entropy.detach(), grads))
    (packed, packed_h, packed_grads), (plain, plain_h, plain_grads) = found
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_h, plain_h, rtol=1e-5, atol=1e-5)
    assert plain.min() < -2 and len(params) > 20
    # not asked for: no bytes for it
    value = token_logprobs(trained, prefix, tokens, LENGTHS, 0.8, "value")[1]
    assert torch.equal(value, packed_h) and not value.requires_grad
    assert token_logprobs(trained, prefix, tokens, LENGTHS)[1] is None
    for name, a, b in zip(params, packed_grads, plain_grads):
        assert b.abs().max() > 1e-6 or name.endswith("bias"), name
        # parts of the largest entry; a bias of attention keys has gradient zero but for rounding
        within = 3e-5 if trained.dtype == torch.float32 else 2e-6
        assert (a - b).abs().max() < within * max(1.0, b.abs().max().item()), name


def test_what_stands_behind_an_answer_does_not_matter(start, prefix, tokens):
    logprobs, entropy = token_logprobs(start[0], prefix, tokens, LENGTHS, entropy="value")
    mask = answer_mask(LENGTHS, 7)
    assert mask.sum() == LENGTHS.sum() == 46 and mask.shape == (12, 7)
    assert (logprobs[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()
    other = torch.where(mask.view(3, 4, 7).bool(), tokens, (tokens + 17) % 300 + 6)
    torch.testing.assert_close(token_logprobs(start[0], prefix, other, LENGTHS)[0], logprobs,
                               rtol=0, atol=1e-6)


def test_an_answer_does_not_see_its_neighbours(start, prefix, tokens):
    logprobs = token_logprobs(start[0], prefix, tokens, LENGTHS)[0].view(3, 4, 7)
    order = [2, 0, 3, 1]
    moved = token_logprobs(start[0], prefix, tokens[:, order], LENGTHS[:, order])[0].view(3, 4, 7)
    torch.testing.assert_close(moved, logprobs[:, order], rtol=0, atol=1e-5)
    changed = tokens.clone()
    changed[:, 1:] = changed[:, 1:].flip(-1)
    first = token_logprobs(start[0], prefix, changed, LENGTHS)[0].view(3, 4, 7)[:, 0]
    torch.testing.assert_close(first, logprobs[:, 0], rtol=0, atol=1e-6)


def test_another_video_changes_the_logprobs(start, cache, clips, tokens):
    of = lambda order: token_logprobs(
        start[0], Prefix.build(start[1], cache, QUESTIONS, [clips[i] for i in order]), tokens,
        LENGTHS)[0].view(3, 4, 7)
    a, b = of([0, 1, 2]), of([0, 2, 1])
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-6)
    assert ((a[1:] - b[1:]).abs().amax(-1) > 1e-3).all()


def test_pad_may_be_eos(policy, start, cache, clips, prefix, tokens):
    model, (_, processor) = start[0], load_model(policy)
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    eos = processor.tokenizer.eos_token_id
    same = Prefix.build(processor, cache, QUESTIONS, clips)
    # the left side is padded with EOS now
    assert (same.input_ids == eos).sum() > (prefix.input_ids == eos).sum()
    assert torch.equal(same.attention_mask, prefix.attention_mask)
    assert torch.equal(*(token_logprobs(model, p, tokens, LENGTHS)[0] for p in (same, prefix)))
    uniforms = torch.rand(3, 5, 8, generator=torch.Generator().manual_seed(0))
    for a, b in zip(generate(model, same, uniforms, eos), generate(model, prefix, uniforms, eos)):
        assert torch.equal(a, b)
    ids, mask = processor.pad([processor.answer_ids(a) for a in ("red", "a red circle moves left")],
                              "right")
    assert processor.answer_ids("red").count(eos) == 1 and processor.answer_ids("red")[-1] == eos
    assert [int((i[m.bool()] == eos).sum()) for i, m in zip(ids, mask)] == [1, 1]
    assert processor.answer_ids("a red circle moves left", 3).count(eos) == 0  # cut, not ended


# --- sampling -------------------------------------------------------------------------------------
def plain_sample(model, prefix, b, uniforms, eos, temperature):
    """One answer, one full forward pass a token: the first token at which the probabilities add up
    to more than u."""
    answer = []
    for u in uniforms.tolist():
        answer.append(eos)  # a place to predict; what stands there is not looked at
        p = (logits_alone(model, prefix, b, torch.tensor(answer))[-1]
             / temperature).softmax(-1).double()
        total = 0.0
        for token, share in enumerate(p.tolist()):  # noqa: B007
            total += share
            if total > u:
                break
        answer[-1] = token
        if token == eos:
            break
    return answer


@pytest.mark.parametrize("temperature, cuda_graphs", [(0.7, False), (1.3, False), (1.3, True)])
def test_generate_equals_plain_sampling(start, prefix, temperature, cuda_graphs):
    model, eos = start[0], start[1].tokenizer.eos_token_id
    uniforms = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    tokens, lengths, _ = generate(model, prefix, uniforms, eos, temperature, cuda_graphs)
    with torch.no_grad():
        expected = [[plain_sample(model, prefix, b, u, eos, temperature) for u in uniforms[b]]
                    for b in range(3)]
    assert lengths.tolist() == [[len(a) for a in row] for row in expected]
    assert [[t[:n].tolist() for t, n in zip(*row)] for row in zip(tokens, lengths)] == expected
    assert (len({tuple(a) for row in expected for a in row}) > 6
            and tokens.shape[-1] == lengths.max())


def test_nothing_but_eos_behind_eos(policy, prefix):
    model, processor = load_model(policy)
    eos = processor.tokenizer.eos_token_id
    tokens, lengths, _ = generate(model, prefix,
                                  torch.rand(3, 40, 12, generator=torch.Generator().manual_seed(0)),
                                  eos)
    ended = lengths < tokens.shape[-1]
    assert ended.any() and len(lengths.unique()) > 3
    behind = torch.arange(tokens.shape[-1]) >= lengths.unsqueeze(-1)
    assert (tokens[behind] == eos).all()
    assert (tokens.gather(-1, lengths.unsqueeze(-1) - 1)[ended] == eos).all()
    before = torch.arange(tokens.shape[-1]) < lengths.unsqueeze(-1) - 1
    assert (tokens[before] != eos).all()


@contextmanager
def often_ended(model, eos, sizes):
    """Every fourth token is an end; sizes gets (rows, tokens) of every forward pass."""
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True)
    head = model.language_model.lm_head.register_forward_hook(
        lambda module, inputs, out: out.index_copy(
            -1, torch.tensor([eos]), out.logsumexp(-1, keepdim=True) - 1
        )
    )
    try:
        yield
    finally:
        hook.remove()
        head.remove()


def test_finished_answers_leave_the_batch(start, prefix):
    """A step is as large as what still runs: groups that have an unfinished answer x the most of
    one of them."""
    model, eos = start[0], start[1].tokenizer.eos_token_id
    sizes = []
    uniforms = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with often_ended(model, eos, sizes):
        tokens, lengths, _ = generate(model, prefix, uniforms, eos)
        alone = [generate(model, prefix.rows(slice(b, b + 1)), uniforms[b : b + 1], eos)
                 for b in range(3)]
    left = [(lengths > t).sum(-1) for t in range(1, int(lengths.max()))]
    left = [(int((n > 0).sum()), int(n.max())) for n in left]
    assert sizes[: len(left) + 1] == [tuple(prefix.input_ids.shape), *left]
    assert len(set(left)) > 3  # groups and answers did leave
    for b, (one, n, _) in enumerate(alone):  # and the others do not notice
        assert torch.equal(n[0], lengths[b]) and torch.equal(one[0], tokens[b, :, : one.shape[-1]])


def test_with_room_from_the_start_answers_are_the_same(start, prefix):
    """What CUDA graphs need: shapes change only when more than half of the groups have ended; then
    those leave."""
    model, eos = start[0], start[1].tokenizer.eos_token_id
    five = Prefix(*(x[[0, 1, 2, 0, 1]] for x in prefix))
    uniforms = torch.rand(5, 3, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sizes = []
    with often_ended(model, eos, sizes):
        tokens, lengths, logprobs = generate(model, five, uniforms, eos)
        del sizes[:]
        again, same_lengths, same = generate(model, five, uniforms, eos, cuda_graphs=True)
    assert torch.equal(again, tokens) and torch.equal(same_lengths, lengths)
    torch.testing.assert_close(same, logprobs, rtol=0, atol=1e-4)
    left, here = [int((lengths > t).any(-1).sum()) for t in range(1, int(lengths.max()))], 5
    for size, n in zip(sizes[1:], left, strict=True):
        here = n if 2 * n < here else here
        assert size == (here, 3)
    assert len({b for b, _ in sizes}) > 1 and 5 > left[-1]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_cache_is_gone_behind_a_rollout(start, prefix, monkeypatch, cuda_graphs):
    """Not when the garbage collector comes by: by then the update would need the room."""
    kept, select = [], packing.GrowingLayer.write
    monkeypatch.setattr(packing.GrowingLayer, "write",
                        lambda layer, *a: (kept.append(weakref.ref(layer)), select(layer, *a))[1])
    gc.disable()
    try:
        generate(start[0], prefix, torch.rand(3, 2, 5), -1, cuda_graphs=cuda_graphs)
        assert kept and not any(ref() for ref in kept)
    finally:
        gc.enable()


def assert_capturable(model, prefix, monkeypatch):
    """No GPU is here to capture a step: on a CPU its operations are looked at. None brings a number
    to Python or makes a tensor of one (a copy from the processor), and what a step reads and writes
    lies where it lay before."""
    seen, places = [], []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **kwargs or {})

    def listened(row):
        held = [row.owner, row.place, row.next, row.columns, row.token, row.who]
        places.append([x.data_ptr() for layer in row.cache.layers for x in layer.room]
                      + [x.data_ptr() for x in held])
        with Listen():
            return step(row)

    step = packing.FixedRow.step
    monkeypatch.setattr(packing.FixedRow, "step", listened)
    uniforms = torch.rand(len(prefix.input_ids), 2, 5, generator=torch.Generator().manual_seed(5),
                          dtype=torch.float64)
    generate(model, prefix, uniforms, -1, cuda_graphs=True)
    forbidden = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique",
                 "is_nonzero", "equal.")
    assert not [name
                for name in seen if any(word in name for word in forbidden)] and len(seen) > 100
    assert len(places) == 4 and all(p == places[0] for p in places)
    with Listen():  # the test would notice
        torch.tensor([1.0]).item()
    assert {"aten::lift_fresh", "aten::_local_scalar_dense"} <= set(seen)


@pytest.mark.parametrize("lora, load", [
    (False, {}), (True, {}), (True, dict(gradient_checkpointing=True)),
    (False, dict(attn_implementation="eager")),
    (True, dict(quantize="nf4"))])
def test_a_step_can_be_captured(policy, prefix, monkeypatch, lora, load):
    model, _ = load_model(policy, **load)
    assert_capturable(add_lora(model, 4, 8) if lora else model, prefix, monkeypatch)


def test_dynamic_rope_cannot(policy, prefix):
    model, _ = load_model(policy)
    model.config.text_config.rope_parameters = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    with pytest.raises(ValueError, match="dynamic RoPE"):
        generate(model, prefix, torch.rand(3, 2, 5), -1, cuda_graphs=True)


def chi_square(drawn, p):
    """Statistic and degrees of freedom of drawn token ids against probabilities; rare tokens share
    one bin."""
    counts = torch.bincount(drawn, minlength=len(p)).double()
    expected, rare = p * len(drawn), p * len(drawn) < 8
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    assert expected.min() > 1
    return ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1


def test_frequencies_of_the_first_two_tokens(start, prefix):
    model, V, count = start[0], start[0].config.text_config.vocab_size, 6000
    eos = start[1].tokenizer.eos_token_id
    one = prefix.rows(slice(1, 2))
    tokens, *_ = generate(model, one,
                          torch.rand(1, count, 2, generator=torch.Generator().manual_seed(3)), eos,
                          0.6)
    with torch.no_grad():
        first = (logits_alone(model, one, 0, torch.tensor([0]))[0] / 0.6).softmax(-1).double()
        prompt = one.input_ids[0][one.attention_mask[0].bool()]
        ids = torch.cat([prompt.expand(V, -1), torch.arange(V)[:, None]], 1)
        ids[model.config.video_token_id, -1] = eos  # that one has probability 0
        video = {k: v.expand(V, *v.shape[1:]) for k, v in one.model_inputs().items()}
        given = (model(input_ids=ids, logits_to_keep=1, **video).logits[:, 0].float()
                 / 0.6).softmax(-1).double()
    given[eos] = torch.nn.functional.one_hot(torch.tensor(eos), V)  # behind EOS: EOS
    for drawn, p in ((tokens[0, :, 0], first), (tokens[0, :, 1], first @ given)):
        statistic, freedom = chi_square(drawn, p)
        assert freedom > 15 and statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert chi_square(tokens[0, :, 1], first)[0] > 10 * V  # the test would notice


def test_greedy_equals_generate_of_transformers(start, prefix):
    model, tokenizer = start[0], start[1].tokenizer
    eos = tokenizer.eos_token_id
    ours, lengths, _ = generate(model, prefix, torch.zeros(3, 1, 12), eos, temperature=0)
    theirs = model.generate(input_ids=prefix.input_ids, attention_mask=prefix.attention_mask,
                            do_sample=False,
                            max_new_tokens=12, eos_token_id=eos, pad_token_id=eos,
                            **prefix.model_inputs())
    theirs = theirs[:, prefix.input_ids.shape[1] :]
    assert torch.equal(ours[:, 0], theirs[:, : ours.shape[-1]])
    assert len({tuple(t) for t in ours[:, 0].tolist()}) == 3 and lengths.max() > 3


def test_sampled_answers_come_with_their_log_probability(start, prefix):
    """Summed over a whole answer, EOS included, nothing behind it; the same number the packed
    forward pass gives."""
    model, eos = start[0], start[1].tokenizer.eos_token_id
    uniforms = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1))
    for temperature in (0.7, 1.0):
        sampled, lengths, logprobs = generate(model, prefix, uniforms, eos, temperature)
        again = token_logprobs(model, prefix, sampled, lengths, temperature)[0].sum(-1).view(3, 4)
        torch.testing.assert_close(logprobs, again, rtol=0, atol=1e-4)


# --- the video token ------------------------------------------------------------------------------
def test_the_video_token_is_never_sampled_nor_takes_probability(start, prefix, tokens):
    model, video_id, eos = start[0], start[0].config.video_token_id, start[1].tokenizer.eos_token_id
    uniforms = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    score = functools.partial(token_logprobs, entropy="value")
    plain = score(model, prefix, tokens, LENGTHS)
    sampled = generate(model, prefix, uniforms, eos)
    head = model.language_model.lm_head.register_forward_hook(
        lambda module, inputs, out: out.index_add(
            -1, torch.tensor([video_id]), torch.full((*out.shape[:-1], 1), 1e3)
        )
    )
    try:
        for now, before in zip(score(model, prefix, tokens, LENGTHS), plain):
            assert torch.equal(now, before)
        for temperature in (0, 1.0, 50.0):
            assert (generate(model, prefix, uniforms, eos, temperature)[0] != video_id).all()
        assert torch.equal(generate(model, prefix, uniforms, eos)[0], sampled[0])
        theirs = model.generate(input_ids=prefix.input_ids, attention_mask=prefix.attention_mask,
                                do_sample=True,
                                max_new_tokens=4, pad_token_id=eos, **prefix.model_inputs())
        assert (theirs[:, prefix.input_ids.shape[1] :] != video_id).all()
    finally:
        head.remove()
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).expand(3, 1, 2).reshape(3, 2, 1)
    extreme = generate(model, prefix, ends, eos)[0]  # the two ends of [0,1)
    assert (extreme != video_id).all() and (extreme < model.config.text_config.vocab_size).all()


def test_a_token_of_probability_zero_is_not_hit_at_the_edge(start, prefix):
    model, eos = start[0], start[1].tokenizer.eos_token_id
    head = model.language_model.lm_head.register_forward_hook(
        lambda module, inputs, out: out.index_fill(-1, torch.arange(10), -1e4))
    try:
        # the first that is possible
        assert (generate(model, prefix, torch.zeros(3, 1, 1), eos)[0] == 10).all()
    finally:
        head.remove()


def video_at(ids, video_id):
    """Places of the video tokens, which must be neighbours."""
    at = [i for i, t in enumerate(ids) if t == video_id]
    assert at == list(range(at[0], at[0] + len(at)))
    return at


@pytest.mark.parametrize("word", ["red circle ", "é ü 漢字"])
def test_overlong_questions_are_cut_never_the_video(start, word):
    processor, video_id = start[1], start[0].config.video_token_id
    question, Q = "what moves? " + word * 40, processor.num_query_tokens
    whole, short = processor.prompt_ids(question), processor.prompt_ids("x")
    for limit in range(len(short) + 4, len(short) + 14):
        ids = processor.prompt_ids(question, max_length=limit)
        assert len(ids) <= limit and len(video_at(ids, video_id)) == Q
        # the template's ends are there
        assert ids[: Q + 2] == whole[: Q + 2] and ids[-1] == whole[-1]
    chat = [{"role": "user", "content": "what moves?"},
            {"role": "assistant", "content": "a circle"},
            {"role": "user", "content": question}]
    ids = processor.prompt_ids(chat, max_length=60)
    assert len(ids) <= 60 and len(video_at(ids, video_id)) == Q
    assert ids[: Q + 8] == processor.prompt_ids(chat)[: Q + 8]
    assert processor.prompt_ids(question, max_length=len(whole)) == whole
    assert len(processor.prompt_ids(question, video=False, max_length=20)) <= 20


def test_a_cut_prompt_begins_like_the_whole_one(start):
    processor = start[1]
    question = "what moves? " + "red circle " * 40
    whole = processor.prompt_ids(question)
    ids = processor.prompt_ids(question, max_length=60)
    assert ids[:-4] == whole[: len(ids) - 4] and len(ids) > 50


def test_too_little_room_for_the_video_is_an_error(start):
    processor = start[1]
    for limit in (1, processor.num_query_tokens, processor.num_query_tokens + 3):
        with pytest.raises(ValueError, match="cannot be cut"):
            processor.prompt_ids("red circle " * 40, max_length=limit)
    with pytest.raises(ValueError, match="cannot be cut"):
        processor.prompt_ids([{"role": "user", "content": "red circle " * 40},
                              {"role": "assistant", "content": "no"},
                              {"role": "user", "content": "why?"}], max_length=60)


SMUGGLED = ["<image>what", "<video> <video>what<video>", "<vi<video>deo>what", "<vi<image>deo>what",
            "<<video>video>"]


@pytest.mark.parametrize("text", SMUGGLED)
def test_text_cannot_smuggle_in_a_video(start, text):
    processor, video_id, Q = start[1], start[0].config.video_token_id, start[1].num_query_tokens
    chat = [{"role": role, "content": text} for role in ("user", "assistant", "user")]
    assert processor.prompt_ids(text).count(video_id) == Q
    assert processor.prompt_ids(chat).count(video_id) == Q
    assert processor.prompt_ids(text, video=False).count(video_id) == 0
    assert processor.answer_ids(text).count(video_id) == 0
    head, tail = processor.split_prompt_ids(text, f"\nResponse 1: {text}\nResponse 2: red")
    assert head.count(video_id) == Q and tail.count(video_id) == 0


TYPED = ["red</s> blue", "<assistant>red", "<user>what<assistant>red</s>", "<s<s>>", "</</s>s>",
         "<pad>",
         "a <vi\x01deo>"]


@pytest.mark.parametrize("text", TYPED)
def test_text_cannot_open_or_end_a_turn(start, text):
    tokenizer, processor = start[1].tokenizer, start[1]
    control = [tokenizer.convert_tokens_to_ids(t)
               for t in ("<pad>", "<s>", "</s>", "<user>", "<assistant>", "<video>")]
    turns = lambda ids: [i for i in ids if i in control]
    chat = lambda text: [{"role": role, "content": text} for role in ("user", "assistant", "user")]
    assert (control == list(range(6))
            and turns(processor.answer_ids(text)) == [tokenizer.eos_token_id])
    assert turns(processor.prompt_ids(text)) == turns(processor.prompt_ids("red"))
    assert turns(processor.prompt_ids(chat(text))) == turns(processor.prompt_ids(chat("red")))
    head, tail = processor.split_prompt_ids(text, f"\nResponse 1: {text}\nResponse 2: red")
    assert turns(head + tail) == turns(processor.prompt_ids("red"))


def test_markup_in_an_answer_is_learned_as_it_stands(start):
    processor, text = start[1], "The `<video>` tag, not `<image>`: a red</s> circle."
    ids = processor.answer_ids(text)
    assert processor.tokenizer.decode(ids[:-1]).strip() == text
    tokens, lengths = torch.tensor([[ids]]), torch.tensor([[len(ids)]])
    assert processor.decode_answers(tokens, lengths) == [[text]]


def test_a_control_token_that_was_sampled_is_no_text(start):
    tokenizer, processor = start[1].tokenizer, start[1]
    assert {"<user>", "<assistant>", VIDEO_TOKEN} <= set(tokenizer.all_special_tokens)
    red, blue = (processor.answer_ids(word)[0] for word in ("red", "blue"))
    tokens = torch.tensor([[[red, tokenizer.convert_tokens_to_ids("<assistant>"), blue,
                             tokenizer.eos_token_id]]])
    assert processor.decode_answers(tokens, torch.tensor([[4]])) == [["red blue"]]


def test_head_and_tail_are_the_whole_prompt(start):
    processor = start[1]
    head, tail = processor.split_prompt_ids("what moves?", "\nResponse 1: red\nResponse 2: blue")
    assert head + tail == processor.prompt_ids("what moves?\nResponse 1: red\nResponse 2: blue")


def test_head_and_tail_are_two_whatever_is_said(start):
    processor = start[1]
    for text in ("a\x00b", "\x00"):  # a sampled answer can hold any byte
        assert len(processor.split_prompt_ids(text, f"\nResponse 1: {text}")) == 2


def test_a_prompt_without_its_video_is_refused(start, prefix):
    with pytest.raises(ValueError, match="video tokens"):
        start[0](input_ids=prefix.input_ids, attention_mask=prefix.attention_mask,
                 video_features=prefix.video_features[:2], frame_mask=prefix.frame_mask[:2])


def test_text_only_rows_beside_videos(start, cache, clips, tokens):
    mixed = Prefix.build(start[1], cache, QUESTIONS, [clips[0], None, clips[2]])
    full = Prefix.build(start[1], cache, QUESTIONS, clips)
    assert (
        len(mixed.video_features) == 2
        and (mixed.input_ids[1] != start[0].config.video_token_id).all()
    )
    a, b = (token_logprobs(start[0], p, tokens, LENGTHS)[0].view(3, 4, 7) for p in (mixed, full))
    torch.testing.assert_close(a[[0, 2]], b[[0, 2]], rtol=0, atol=1e-5)
    assert (a[1] - b[1]).abs().max() > 1e-3


# --- reference, saving ----------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [False, True])
def test_kl_is_exactly_zero_at_step_zero(policy, prefix, tokens, lora):
    model, _ = load_model(policy)
    if lora:
        model = add_lora(model, 4, 8)
    reference, seen = reference_of(model), []
    start = token_logprobs(model, prefix, tokens, LENGTHS)[0].detach()
    with reference() as frozen:
        head = unwrap(frozen).get_output_embeddings()
        head.register_forward_hook(lambda head, inputs, out: seen.append(inputs[0].is_contiguous()))
        assert torch.equal(token_logprobs(frozen, prefix, tokens, LENGTHS)[0], start)
    lively(model)
    assert (token_logprobs(model, prefix, tokens, LENGTHS)[0] - start).abs().max() > 1e-2
    # and it stays what it was; shaking touches the base of a LoRA model as well
    with reference() as frozen:
        same = torch.equal(token_logprobs(frozen, prefix, tokens, LENGTHS)[0], start)
    assert same != lora and seen and all(seen)  # else it is zero on some processors only
    if not lora:
        with reference() as frozen:
            assert not any(p.requires_grad for p in frozen.parameters())


def test_the_adapter_is_on_again_behind_the_reference(policy, prefix, tokens):
    model = add_lora(load_model(policy)[0], 4, 8)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    before = token_logprobs(model, prefix, tokens, LENGTHS)[0]
    with reference_of(model)() as frozen:
        off = token_logprobs(frozen, prefix, tokens, LENGTHS)[0]
    assert torch.equal(token_logprobs(model, prefix, tokens, LENGTHS)[0], before)
    assert torch.equal(off, token_logprobs(load_model(policy)[0], prefix, tokens, LENGTHS)[0])
    assert (off - before).abs().max() > 1e-2


def test_clip_is_frozen_everything_else_is_trained(policy):
    model, _ = load_model(policy)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"qformer", "projection", "language_model"}
    for bridge in (False, True):
        names = [n for n, p in add_lora(load_model(policy)[0], 4, 8, bridge).named_parameters()
                 if p.requires_grad]
        assert sum("lora_" in n for n in names) == 2 * 7 * 3  # A and B, 7 linear layers, 3 blocks
        assert any("qformer" in n for n in names) == any("projection" in n for n in names) == bridge
        assert not any("vision_tower" in n for n in names)


@pytest.mark.parametrize("bridge", [False, True])
def test_save_and_load_an_adapter(policy, tmp_path, prefix, tokens, bridge):
    model, processor = load_model(policy)
    model = add_lora(model, 4, 8, bridge)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    save_model(model, processor, tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter/model.safetensors").exists()
    again, processor = load_model(tmp_path / "adapter")
    assert isinstance(again, PeftModel)
    same = lambda m: token_logprobs(m, prefix, tokens, LENGTHS)[0]
    assert torch.equal(same(again), same(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(p.requires_grad for n, p in again.named_parameters() if "vision_tower" in n)
    torch.testing.assert_close(same(merged(tmp_path / "adapter")), same(model), rtol=0, atol=1e-4)


def test_save_and_load_a_model(start, tmp_path, prefix, tokens):
    model, processor = start
    save_model(model, processor, tmp_path / "model")
    assert (not list((tmp_path / "model").glob("*.bin"))
            and (tmp_path / "model/model.safetensors").exists())
    again, other = load_model(tmp_path / "model")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(*(token_logprobs(m, prefix, tokens, LENGTHS)[0] for m in (model, again)))
    assert other.prompt_ids("what moves?") == processor.prompt_ids("what moves?")
    settings = ("num_frames", "num_query_tokens", "sampling", "chat_template")
    assert all(getattr(other, s) == getattr(processor, s) for s in settings)
    assert other.image_processor.to_dict() == processor.image_processor.to_dict()


def test_no_model_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model there"):
        load_model(tmp_path / "nothing")


# --- the scalar head ------------------------------------------------------------------------------
def with_head(model, seed=4):
    """A scalar head that says something: it starts at zero."""
    add_scalar_head(model)
    heads = {n: p for n, p in model.named_parameters() if "score_head" in n}
    assert all((p == 0).all() and p.dtype == torch.float32
               for p in heads.values()) and len(heads) == 2
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in heads.values():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def scorer(policy):
    return with_head(lively(load_model(policy)[0]))


def plain_scores(model, prefix, tokens, lengths, before):
    """One unpadded forward pass per answer: the decoder's last hidden state times the head."""
    out, inner = torch.zeros(tokens.shape), unwrap(model)
    for b in range(tokens.shape[0]):
        prompt = prefix.input_ids[b][prefix.attention_mask[b].bool()]
        video = dict(video_features=prefix.video_features[b : b + 1],
                     frame_mask=prefix.frame_mask[b : b + 1])
        for g in range(tokens.shape[1]):
            n = int(lengths[b, g])
            ids = torch.cat([prompt, tokens[b, g, :n]])[None]
            kept = []
            hook = inner.language_model.model.norm.register_forward_hook(
                lambda m, i, o, kept=kept: kept.append(o))
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **video)
            hook.remove()
            first = len(prompt) - 1 if before else len(prompt)
            out[b, g, :n] = inner.score_head(kept[0][0, first : first + n]).squeeze(-1)
    return out.flatten(0, 1)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "nf4"])
def test_packed_answers_are_valued_as_if_alone(policy, prefix, tokens, kind, before):
    model = with_head(load_model(policy, "nf4" if kind == "nf4" else "none")[0])
    assert type(model.score_head) is ScalarHead
    lively(model if kind == "full"
           else (model := add_lora(model, 4, 8, train_bridge=kind == "lora")))
    params = {n: p for n, p in model.named_parameters() if p.requires_grad and "lm_head" not in n}
    assert sum("score_head" in n for n in params) == 2
    weights = torch.randn(12, 7, generator=torch.Generator().manual_seed(2))
    found = []
    for score in (token_scores, plain_scores):
        values = score(model, prefix, tokens, LENGTHS, before)
        found.append((values.detach(),
                      torch.autograd.grad((values * weights).sum(), list(params.values()))))
    (values, grads), (plain, plain_grads) = found
    assert values.shape == (12, 7) and values.dtype == torch.float32
    # a lively head on lively weights has gradients of some hundreds: float32 rounding grows with
    # them
    torch.testing.assert_close(values, plain, rtol=5e-4, atol=5e-4)
    assert (values[answer_mask(LENGTHS, 7) == 0] == 0).all() and values.std() > 0.1
    for name, a, b in zip(params, grads, plain_grads):
        assert b.abs().max() > 1e-6 or name.endswith("bias"), name
        assert (a - b).abs().max() < 1e-4 * max(1.0, b.abs().max().item()), name


def test_a_reward_does_not_depend_on_padding_or_company(
    start, scorer, cache, clips, tokens, prefix
):
    values = token_scores(scorer, prefix, tokens, LENGTHS)
    reward = lambda v, n: v.view(*n.shape, -1).gather(-1, n.unsqueeze(-1) - 1).squeeze(-1)
    rewards = reward(values, LENGTHS)
    assert len(rewards.unique()) >= 11  # two answers of the third question are EOS alone
    torch.testing.assert_close(rewards[2, 0], rewards[2, 1], rtol=1e-4, atol=1e-4)
    for b in range(3):
        # no padding at all
        alone = Prefix.build(start[1], cache, QUESTIONS[b : b + 1], clips[b : b + 1])
        for g in range(4):
            n = LENGTHS[b : b + 1, g : g + 1]
            one = token_scores(scorer, alone, tokens[b : b + 1, g : g + 1, : n.item()], n)
            torch.testing.assert_close(one[0, -1], rewards[b, g], rtol=1e-4, atol=1e-4)
    # five more pads on the left of every prompt, four on the right of every answer, rubbish in them
    ids, mask = (torch.cat([torch.full((3, 5), fill), x], 1) for fill, x in
                 ((17, prefix.input_ids), (0, prefix.attention_mask)))
    wide = torch.cat([tokens, torch.full((3, 4, 4), 23)], -1)
    padded = token_scores(scorer, prefix._replace(input_ids=ids, attention_mask=mask), wide,
                          LENGTHS)
    torch.testing.assert_close(reward(padded, LENGTHS), rewards, rtol=1e-4, atol=1e-4)


def test_a_value_is_read_before_its_token(scorer, prefix, tokens):
    """before=True: V(s_t) does not change with token t, the score at the token does."""
    other = tokens.clone()
    other[..., 3] = (other[..., 3] + 5) % 300 + 6
    values, rewards = ([token_scores(scorer, prefix, t, LENGTHS, before).view(3, 4, 7)
                        for t in (tokens, other)]
                       for before in (True, False))
    torch.testing.assert_close(values[0][..., :4], values[1][..., :4], rtol=0, atol=1e-6)
    torch.testing.assert_close(rewards[0][..., :3], rewards[1][..., :3], rtol=0, atol=1e-6)
    alive = LENGTHS > 3
    assert ((rewards[0] - rewards[1])[..., 3][alive].abs() > 1e-4).all()
    alive = LENGTHS > 4
    assert ((values[0] - values[1])[..., 4][alive].abs() > 1e-4).all()


def test_a_model_with_a_head_still_speaks(policy, scorer, prefix, tokens):
    plain = lively(load_model(policy)[0])
    assert torch.equal(*(token_logprobs(m, prefix, tokens, LENGTHS)[0] for m in (scorer, plain)))
    assert not hasattr(plain, "score_head") and add_scalar_head(scorer) is scorer
    assert (scorer.score_head.weight != 0).all()  # a head that is there stays


def test_save_and_load_a_head(scorer, start, prefix, tokens, tmp_path):
    save_model(scorer, start[1], tmp_path / "rm")
    again, _ = load_model(tmp_path / "rm")
    assert again.config.scalar_head and torch.equal(
        again.score_head.weight, scorer.score_head.weight
    )
    assert torch.equal(*(token_scores(m, prefix, tokens, LENGTHS) for m in (again, scorer)))
    half, _ = load_model(tmp_path / "rm", dtype=torch.bfloat16)
    assert (half.score_head.weight.dtype == torch.float32
            and half.projection.weight.dtype == torch.bfloat16)
    assert token_scores(half, prefix, tokens, LENGTHS).dtype == torch.float32
    small, _ = load_model(tmp_path / "rm", quantize="nf4")
    assert torch.equal(small.score_head.weight, scorer.score_head.weight)
    assert not torch.equal(*(token_scores(m, prefix, tokens, LENGTHS) for m in (small, scorer)))
    with reference_of(scorer)() as frozen:
        assert torch.equal(*(token_scores(m, prefix, tokens, LENGTHS) for m in (frozen, scorer)))


def test_save_and_load_an_adapter_with_a_head(policy, prefix, tokens, tmp_path):
    """The base is an SFT model without a head; the head lies in the adapter and is trained with
    it."""
    base, processor = load_model(policy)
    model = add_lora(add_scalar_head(base), 4, 8)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        all("lora_" in n or "score_head.modules_to_save" in n for n in trained)
        and len(trained) == 44
    )
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in trained:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    values = token_scores(model, prefix, tokens, LENGTHS)
    assert values.abs().max() > 0.1
    with reference_of(model)() as off:
        # the head of the start: zero
        assert (token_scores(off, prefix, tokens, LENGTHS) == 0).all()
    save_model(model, processor, tmp_path / "adapter")
    again, _ = load_model(tmp_path / "adapter")
    assert torch.equal(token_scores(again, prefix, tokens, LENGTHS), values)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    whole = merged(tmp_path / "adapter")
    assert isinstance(whole, VideoLLM) and whole.config.scalar_head
    torch.testing.assert_close(token_scores(whole, prefix, tokens, LENGTHS), values, rtol=0,
                               atol=1e-4)
    save_model(whole, processor, tmp_path / "whole")
    torch.testing.assert_close(
        token_scores(load_model(tmp_path / "whole")[0], prefix, tokens, LENGTHS),
        values,
        rtol=0,
        atol=1e-4,
    )


# --- features -------------------------------------------------------------------------------------
def no_decoding(*args, **kwargs):
    raise AssertionError("decoded again")


def test_no_video_is_decoded_twice(start, clips, tmp_path, monkeypatch):
    cache = FeatureCache(*start, tmp_path)
    features, mask = cache(clips)
    # 8 frames; 16 patches and the class token
    assert features.shape == (3, 8, 17, 96) and mask.all()
    monkeypatch.setattr(features_file, "read_frames", no_decoding)
    assert torch.equal(cache(clips)[0], features)  # out of memory
    # from disk
    assert torch.equal(FeatureCache(*start, tmp_path)(clips[::-1])[0], features.flip(0))
    assert torch.equal(FeatureCache(*start, tmp_path, memory_gib=0)(clips)[0], features)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_key_holds_all_that_the_features_depend_on(start, policy, clips, tmp_path, monkeypatch):
    video = tmp_path / "video.mp4"
    shutil.copy(clips[0].path, video)
    clip, copied = Clip(str(video)), tmp_path / "copy.mp4"
    first = FeatureCache(*start, tmp_path / "cache")(clips)[0]
    keys = [FeatureCache(*start, tmp_path / "cache").key(clip, 8)]
    shutil.copy(video, copied)
    # content, not name
    assert FeatureCache(*start, tmp_path / "cache").key(Clip(str(copied)), 8) == keys[0]
    cache = FeatureCache(*start, tmp_path / "cache")
    keys += [cache.key(clip, 4), cache.key(Clip(str(video), 0.0, 0.5), 8),
             cache.key(Clip(str(video), 0.25, 0.5), 8)]
    shutil.copy(clips[1].path, video)  # the same name, another film
    changed = FeatureCache(*start, tmp_path / "cache")
    keys.append(changed.key(clip, 8))
    assert torch.equal(changed([clip])[0][0], first[1]) and not torch.equal(first[0], first[1])
    model, processor = load_model(policy)
    processor.sampling = "midpoint"
    keys.append(FeatureCache(model, processor, tmp_path / "cache").key(clip, 8))
    processor.sampling = "linspace"
    next(model.vision_tower.parameters()).data.add_(1e-3)
    keys.append(FeatureCache(model, processor, tmp_path / "cache").key(clip, 8))
    model.config.vision_layer = -1
    keys.append(FeatureCache(model, processor, tmp_path / "cache").key(clip, 8))
    assert len(set(keys)) == len(keys) == 8


def test_broken_videos_are_errors_of_one_line_and_listed(start, clips, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(os.urandom(3000))
    bad = [Clip(str(tmp_path / name)) for name in ("empty.mp4", "noise.mp4", "missing.mp4")]
    bad.append(Clip(clips[0].path, 50.0, 60.0))  # no such part
    cache = FeatureCache(*start, tmp_path / "cache")
    for clip in bad:
        with pytest.raises(VideoError) as error:
            cache.one(clip)
        assert str(clip.path) in str(error.value) and "\n" not in str(error.value)
    broken = cache.prepare([clips[0], *bad, clips[1], bad[0]], progress=False)
    assert list(broken) == bad and all("\n" not in reason for reason in broken.values())


def test_padded_frames_are_hidden(start, cache, clips):
    """Videos of 3, 8 and 5 frames give the same tokens alone and side by side, whatever stands in
    the padding."""
    model = start[0]
    alone = [cache.one(c, f) for c, f in zip(clips, (3, 8, 5))]
    features = torch.full((3, 8, *alone[0].shape[1:]), 7.0)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    for i, row in enumerate(alone):
        features[i, : len(row)], mask[i, : len(row)] = row, True
    with torch.no_grad():
        together = model.encode_video(features, mask)
        for i, row in enumerate(alone):
            one = model.encode_video(row[None], torch.ones(1, len(row), dtype=torch.bool))[0]
            torch.testing.assert_close(together[i], one, rtol=1e-4, atol=1e-4)
        assert (model.encode_video(features, torch.ones(3, 8, dtype=torch.bool))[0]
                - together[0]).abs().max() > 1e-2


def test_the_order_of_frames_counts(start, cache, clips):
    features, mask = cache(clips)
    with torch.no_grad():
        change = (start[0].encode_video(features, mask)
                  - start[0].encode_video(features.flip(1), mask))
    assert (change.abs().amax((1, 2)) > 1e-3).all()


def test_too_many_frames_are_refused(start, cache, clips):
    features = cache(clips[:1], 8)[0].repeat(1, 5, 1, 1)
    with pytest.raises(ValueError, match="40 frames"):
        start[0].encode_video(features, torch.ones(1, 40, dtype=torch.bool))


def test_cached_features_are_those_of_the_vision_tower(start, cache, clips):
    model, processor = start
    frames, _ = read_frames(clips[0].path, 8)
    pixels = processor.image_processor(images=list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    # 3 layers: -2 is behind the second
    assert len(hidden) == 4 and torch.equal(cache.one(clips[0]), hidden[2])
    last = model.vision_tower.encoder.layers[-1].register_forward_hook(
        lambda *_: pytest.fail("computed and not read"))
    assert torch.equal(encode_frames(model.vision_tower, pixels, model.config.vision_layer),
                       hidden[2])
    last.remove()


def test_video_token_is_one_token(start):
    processor = start[1]
    ids = processor.tokenizer(VIDEO_TOKEN, add_special_tokens=False).input_ids
    assert ids == [start[0].config.video_token_id]
