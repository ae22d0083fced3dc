"""Published checkpoints: every class that --clip, --qformer and --llm name, written small in the
hub's own layout."""

import copy
import json
import math
import re

import pytest
import torch
import transformers
from hub import (DECODERS, as_hub_cache, shards, write_blip2, write_clip, write_decoder,
                 write_qformer, write_tokenizer)
from inside import flags_of, main_of
from safetensors.torch import load_file
from test_video_llm import assert_capturable
from transformers import AutoModelForCausalLM, AutoTokenizer

from inputs.features import encode_frames
from model.compose import check_decoder, compose, load_qformer
from model.packing import Tree, tree_rows
from model.processor import VICUNA_TEMPLATE
from video_llm import (Prefix, VideoLLMProcessor, add_lora, generate, load_model, mask_kind, merged,
                       save_model, token_logprobs)

QUESTIONS = ["what happens in the video?", "where is the green star?"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "clip"
    write_clip(folder)
    return folder


@pytest.fixture(scope="module")
def qformer(tmp_path_factory):
    return write_qformer(tmp_path_factory.mktemp("hub") / "qformer")


@pytest.fixture(scope="module", params=DECODERS)
def start(request, clip, qformer, tmp_path_factory):
    """name, the hub's folder, the decoder as written, composed model and processor."""
    folder = tmp_path_factory.mktemp("hub") / request.param
    written = write_decoder(request.param, folder)
    model, processor = compose(str(clip), str(qformer), str(folder), num_frames=3)
    return request.param, folder, written, model.eval(), processor


def prefix_of(processor, width=48):
    generator = torch.Generator().manual_seed(0)
    ids, mask = processor.pad([processor.prompt_ids(q) for q in QUESTIONS], "left")
    features = torch.randn(2, 3, 5, width, generator=generator)
    return Prefix(ids, mask, features, torch.ones(2, 3, dtype=torch.bool))


def answers_of(processor, G=3, T=8):
    tokens = torch.randint(10, 60, (2, G, T), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[8, 1, 5], [3, 8, 2]])[:, :G]
    return tokens.scatter(-1, lengths.unsqueeze(-1) - 1, processor.tokenizer.eos_token_id), lengths


def embedded(model, prefix, b):
    """(P,D): one prompt without padding, its video in place, as the decoder's own class takes
    it."""
    ids = prefix.input_ids[b][prefix.attention_mask[b].bool()]
    words = model.get_input_embeddings()(ids)
    here = slice(b, b + 1)
    video = model.encode_video(prefix.video_features[here], prefix.frame_mask[here])[0]
    words[ids == model.config.video_token_id] = video.to(words.dtype)
    return words


def test_the_files_are_those_of_the_hub(start, clip):
    name, folder, *_ = start
    files = {p.name for p in folder.iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json",
                     "tokenizer_config.json"}
    assert len(shards(folder)) > 2 if DECODERS[name][7] == "60KB" else "model.safetensors" in files
    assert "<video>" not in (folder / "tokenizer.json").read_text()
    # its class brings one
    assert (AutoTokenizer.from_pretrained(folder).pad_token is None) == (name != "qwen2")


@torch.no_grad()
def test_packed_answers_score_as_the_decoders_own_class_scores_them(start):
    """The decoder as written, read by `transformers` alone, one answer at a time, no padding, no
    packing."""
    name, folder, _, model, processor = start
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prefix, (tokens, lengths) = prefix_of(processor), answers_of(processor)
    found = token_logprobs(model, prefix, tokens, lengths)[0].view(2, 3, 8)
    for b in range(2):
        prompt = embedded(model, prefix, b)
        for g in range(3):
            answer = tokens[b, g, : lengths[b, g]]
            words = torch.cat([prompt, plain.get_input_embeddings()(answer)])[None]
            logits = plain(inputs_embeds=words, use_cache=False).logits[0, len(prompt) - 1 : -1]
            allowed = torch.arange(logits.shape[-1]) != model.config.video_token_id
            logits = logits.masked_fill(~allowed, -torch.inf)
            expected = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
            torch.testing.assert_close(found[b, g, : len(answer)], expected, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.5
    # the window is shorter than prompt and answer: without it the numbers are others
    if name == "mistral":
        model.config.text_config.sliding_window = None
        wide = token_logprobs(model, prefix, tokens, lengths)[0].view(2, 3, 8)
        model.config.text_config.sliding_window = 9
        assert (wide - found).abs().max() > 1e-2


@torch.no_grad()
def test_texts_of_a_tree_score_as_the_decoders_own_class_scores_them(start):
    """What two texts share is computed once: the numbers of one pass a text, with any decoder
    (Mistral's window)."""
    _, folder, _, model, processor = start
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prefix, (tokens, _) = prefix_of(processor), answers_of(processor)
    heads = [ids[mask.bool()].tolist()
             for ids, mask in zip(prefix.input_ids, prefix.attention_mask)]
    one, two, three = tokens[0].tolist()
    texts = [(one[:4], two[:3]), (one[:4], three[:2]), (one[:2] + two[4:], three),
             ([], three[:2] + one)]
    inputs, read = tree_rows(heads, [Tree(texts), Tree(texts[1:])],
                             processor.tokenizer.pad_token_id,
                             *mask_kind(model), "cpu")
    logits = model(**inputs, **prefix.model_inputs()).logits.log_softmax(-1)
    found = iter(
        logits[read[0], read[1], read[2]].split([len(reply) for _, reply in texts + texts[1:]])
    )
    for b, group in enumerate((texts, texts[1:])):
        prompt = embedded(model, prefix, b)
        for text, reply in group:
            words = torch.cat([prompt,
                               plain.get_input_embeddings()(torch.tensor(text + reply))])[None]
            logits = plain(inputs_embeds=words, use_cache=False).logits[0, -len(reply) - 1 : -1]
            logits[:, model.config.video_token_id :][:, :1] = -torch.inf
            expected = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
            torch.testing.assert_close(next(found), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(start):
    _, folder, _, model, processor = start
    prefix, eos = prefix_of(processor), processor.tokenizer.eos_token_id
    ours, lengths, _ = generate(model, prefix, torch.zeros(2, 1, 12), eos, temperature=0)
    assert torch.equal(generate(model, prefix, torch.zeros(2, 1, 12), eos, temperature=0,
                                cuda_graphs=True)[0], ours)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for b in range(2):
        words = embedded(model, prefix, b)[None]
        theirs = plain.generate(inputs_embeds=words, attention_mask=torch.ones(words.shape[:2]),
                                do_sample=False,
                                max_new_tokens=12, eos_token_id=eos, pad_token_id=eos,
                                temperature=None, top_p=None,
                                suppress_tokens=[model.config.video_token_id]
                                if model.config.video_token_id
                                < plain.config.vocab_size else None)
        assert ours[b, 0, : lengths[b, 0]].tolist() == theirs[0].tolist()[: lengths[b, 0]]
    assert lengths.max() > 3 and len(set(ours.flatten().tolist())) > 3


def test_a_step_of_every_decoder_can_be_captured(start, monkeypatch):
    _, _, _, model, processor = start
    assert_capturable(model, prefix_of(processor), monkeypatch)


def test_prompts_follow_the_tokenizers_own_template(start):
    name, folder, _, model, processor = start
    own = AutoTokenizer.from_pretrained(folder).chat_template
    assert (processor.chat_template == (own or VICUNA_TEMPLATE)
            and (own is None) == (name in ("llama-2", "vicuna")))
    ids = processor.prompt_ids("what happens in the video?")
    assert ids.count(model.config.video_token_id) == 5
    text = processor.tokenizer.decode([i for i in ids if i != model.config.video_token_id])
    said = {"llama-2": "USER:", "vicuna": "USER:", "llama-3": "<|start_header_id|>user",
            "tinyllama": "<|user|>",
            "qwen2": "<|im_start|>user", "mistral": "[INST]"}[name]
    assert said in text and "what happens in the video?" in text
    bos = processor.tokenizer.bos_token_id
    assert (
        ids.count(bos) == (0 if name in ("qwen2", "tinyllama") else 1)
        if bos is not None
        else name == "qwen2"
    )
    answer = processor.answer_ids("a red circle moves left")
    assert answer[-1] == processor.tokenizer.eos_token_id
    tokens, lengths = torch.tensor([[answer]]), torch.tensor([[len(answer)]])
    assert processor.decode_answers(tokens, lengths) == [["a red circle moves left"]]


def test_rotary_frequencies_stay_in_float32(start, clip, qformer):
    """In bfloat16 they have three digits, and far positions would be other positions."""
    _, folder, _, model, _ = start
    half, _ = compose(str(clip), str(qformer), str(folder), num_frames=3, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    found = {name: b for name, b in half.named_buffers() if name.endswith("inv_freq")}
    expected = dict(model.named_buffers())
    assert found and all(torch.equal(b, expected[name]) for name, b in found.items())


def test_a_tied_head_is_written_once(start, tmp_path):
    """Gathered from shares it is a tensor of its own, equal to the embeddings."""
    _, _, written, model, processor = start
    save_model(model, processor, tmp_path, {k: v.clone() for k, v in model.state_dict().items()})
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("language_model.lm_head.weight" in names) == (not written.config.tie_word_embeddings)
    again, _ = load_model(tmp_path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_prompt_has_the_ids_that_the_tokenizer_gives_its_template(start):
    processor, Q = start[4], start[4].num_query_tokens
    chat = [{"role": "user", "content": "what happens in the video?"},
            {"role": "assistant", "content": "É, a cat 漢"},
            {"role": "user", "content": "where\nis  the green star?"}]
    video = start[3].config.video_token_id
    for said in (chat, chat[:1]):
        whole = [{**said[0], "content": f"<video>\n{said[0]['content']}"}, *said[1:]]
        ids = processor.tokenizer(processor._template(whole), add_special_tokens=False).input_ids
        assert processor.prompt_ids(said) == [
            i for t in ids for i in [t] * (Q if t == video else 1)
        ]
    for text in ("a red circle moves left", "É 漢", ""):
        assert (processor.answer_ids(text)[:-1]
                == processor.tokenizer(text, add_special_tokens=False).input_ids)


def test_control_tokens_that_are_typed_are_letters(start):
    """Each token the tokenizer has added, also one it does not call special; in questions, answers
    and comparisons."""
    own = start[4]
    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.add_tokens(["<tool_call>"])
    processor = VideoLLMProcessor(own.image_processor, tokenizer, own.chat_template, 3,
                                  own.num_query_tokens)
    control = {n: i for n, i in tokenizer.get_added_vocab().items() if not n.startswith("<0x")}
    assert {"<tool_call>", "<video>", tokenizer.eos_token} <= set(control)
    count = lambda ids: [ids.count(i) for i in control.values()]
    chat = lambda text: [{"role": role, "content": text} for role in ("user", "assistant", "user")]
    for name in control:
        text, same = f"a red{name} circle {name}", "a red circle"
        assert count(processor.prompt_ids(text)) == count(processor.prompt_ids(same)), name
        ids, ids_of_same = (processor.prompt_ids(chat(t)) for t in (text, same))
        assert count(ids) == count(ids_of_same), name
        assert count(processor.prompt_ids("x " + text * 9, max_length=60)) == count(
            processor.prompt_ids(same)
        ), name
        ids = processor.answer_ids(text)
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1 and sum(count(ids)) == 1, name
        assert tokenizer.decode(ids[:-1]).strip() == text
        parts = zip(processor.split_prompt_ids(text, f"Response 1: {text}"),
                    processor.split_prompt_ids(same, same))
        assert all(count(mine) == count(usual) for mine, usual in parts), name


def test_saved_and_loaded_is_the_same(start, tmp_path):
    name, folder, written, model, processor = start
    save_model(model, processor, tmp_path)
    again, same = load_model(tmp_path)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    V = written.get_input_embeddings().num_embeddings
    # and the decoder is the published one, but for the video token's row
    for k, v in written.state_dict().items():
        assert torch.equal(b[f"language_model.{k}"][:V].to(v.dtype), v), k
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert tied == (name == "qwen2") == written.config.tie_word_embeddings
    if name == "qwen2":
        assert again.get_input_embeddings().num_embeddings == V  # room for <video> was there
    prefix, answers = prefix_of(processor), answers_of(processor)
    for at in ("input_ids", "attention_mask"):
        assert torch.equal(getattr(prefix_of(same), at), getattr(prefix, at))
    with torch.no_grad():
        a, b = (token_logprobs(m.eval(), prefix, *answers)[0] for m in (again, model))
    assert torch.equal(a, b)
    assert again.generation_config.eos_token_id == written.generation_config.eos_token_id


@pytest.mark.parametrize(
    "quantize, dtype", [("none", torch.float32), ("none", torch.bfloat16), ("nf4", torch.float32)]
)
def test_lora_finds_its_layers_trains_and_merges(start, tmp_path, quantize, dtype):
    """Two steps, saved as a plain PEFT adapter, loaded, merged: the same scores."""
    name, _, _, model, processor = start
    save_model(model, processor, tmp_path / "base")
    base, _ = load_model(tmp_path / "base", quantize, dtype)
    tuned = add_lora(base, 4, 8, train_bridge=True)
    adapted = [n for n, _ in tuned.named_parameters() if "lora_A" in n]
    assert len(adapted) == 2 * 7 and not any("vision" in n or "qformer" in n for n in adapted)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    prefix, answers = prefix_of(processor), answers_of(processor)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        loss = -token_logprobs(tuned, prefix, *answers)[0].mean()
        loss.backward()
        assert all(p.grad is not None for p in trained if p.shape != (64, 48))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = token_logprobs(tuned, prefix, *answers)[0]
        assert found.mean() > -loss
        tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        save_model(tuned, processor, tmp_path / "adapter")
        files = {p.name for p in (tmp_path / "adapter").iterdir()}
        assert (
            files >= {"adapter_config.json", "adapter_model.safetensors"}
            and "model.safetensors" not in files
        )
        again, _ = load_model(tmp_path / "adapter", quantize, dtype)
        assert torch.equal(token_logprobs(again, prefix, *answers)[0], found)
        a, b = (({n: p for n, p in m.named_parameters() if p.requires_grad})
                for m in (tuned, again))
        assert a.keys() == b.keys() and all(
            a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
        )


# --- the Q-Former ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, shard",
                         [("blip-2", "120KB"), ("blip-2", "9GB"), ("instructblip", "120KB")])
def test_a_published_qformer_says_what_it_said(tmp_path, kind, shard):
    """The queries of one frame are those that transformers' own class gives; the language model is
    never opened."""
    whole = write_blip2(tmp_path, kind, shard=shard)
    holders = {"model.safetensors"}
    if shard != "9GB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        holders = {file for key, file in index["weight_map"].items()
                   if re.search("qformer|query_tokens", key)}
    for other in set(shards(tmp_path)) - holders:
        (tmp_path / other).unlink()
    assert shard == "9GB" or len(holders) < len(shards(tmp_path))
    parts = load_qformer(str(tmp_path), 48, 8, seed=0).eval()
    features = torch.randn(2, 1, 5, 48, generator=torch.Generator().manual_seed(0))
    inside = whole if hasattr(whole, "qformer") else whole.model
    with torch.no_grad():
        found = parts(features, torch.ones(2, 1, dtype=torch.bool))
        queries = inside.query_tokens.expand(2, -1, -1)
        if kind == "blip-2":
            expected = inside.qformer(query_embeds=queries,
                                      encoder_hidden_states=features[:, 0]).last_hidden_state
        else:  # it reads text as well, which queries do not see when there is none
            ids = torch.zeros(2, 1, dtype=torch.long)
            mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 1)], 1).long()
            expected = inside.qformer(input_ids=ids, attention_mask=mask, query_embeds=queries,
                                      encoder_hidden_states=features[:, 0]).last_hidden_state[:, :6]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (2, 6, 64) and found.std() > 0.1


def test_a_qformer_of_another_width_says_what_starts_from_nothing(tmp_path, capsys):
    whole = write_blip2(tmp_path, width=40)
    parts = load_qformer(str(tmp_path), 48, 80, seed=0)
    said = capsys.readouterr().out
    assert "width 40, this CLIP has 48" in said and "keys and values start from nothing" in said
    inside = whole if hasattr(whole, "qformer") else whole.model
    cross = parts.transformer.encoder.layer[0].crossattention
    assert (
        cross.attention.key.weight.shape == (64, 48) and parts.time_embedding.num_embeddings == 80
    )
    published = inside.qformer.encoder.layer[0].crossattention
    assert torch.equal(cross.attention.query.weight, published.attention.query.weight)
    assert torch.equal(parts.query_tokens, inside.query_tokens)


@pytest.mark.parametrize("break_it, told", [
    (lambda f: (f / "config.json").unlink(), "no Q-Former there"),
    (lambda f: [p.unlink() for p in f.glob("*.safetensors")], "is missing"),
    (lambda f: (f / "config.json").write_text("{}"), "no Q-Former there")])
def test_a_folder_without_a_qformer_is_refused(tmp_path, break_it, told):
    write_blip2(tmp_path)
    break_it(tmp_path)
    with pytest.raises(OSError) as error:
        load_qformer(str(tmp_path), 48, 8, seed=0)
    assert (told in str(error.value) and str(tmp_path) in str(error.value)
            and "\n" not in str(error.value))


def test_decoders_of_other_classes_are_refused(tmp_path):
    write_tokenizer(tmp_path, "bytes", "<s>", "</s>", [], None)
    transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2,
                            vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="a gpt2 has no .*q_proj.*LLaMA class"):
        check_decoder(str(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path))
    mixed = transformers.Qwen2Config(num_hidden_layers=4, use_sliding_window=True,
                                     max_window_layers=2)
    with pytest.raises(OSError, match="attend in 2 ways"):
        check_decoder("mixed", mixed)
    for name in DECODERS:
        check_decoder(name, DECODERS[name][0])


# --- vision towers --------------------------------------------------------------------------------
# B/32 has 50 tokens, L/14-336 577
@pytest.mark.parametrize("patch, image, binary", [(16, 32, False), (8, 32, True)])
def test_features_are_the_second_last_layer_of_the_published_tower(
    tmp_path, qformer, patch, image, binary
):
    whole = write_clip(tmp_path / "clip", patch, image, binary).eval()
    assert (tmp_path / "clip/pytorch_model.bin").exists() == binary
    write_decoder("vicuna", tmp_path / "llm")
    model, processor = compose(str(tmp_path / "clip"), str(qformer), str(tmp_path / "llm"))
    frames = (torch.rand(2, 40, 60, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    pixels = processor.image_processor(list(frames.numpy()), return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, image, image)
    with torch.no_grad():
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    found = encode_frames(model.vision_tower, pixels, model.config.vision_layer)
    assert found.shape == (2, (image // patch) ** 2 + 1, 48) and torch.equal(found, expected)


# --- how a model lies in memory -------------------------------------------------------------------
def gradients(model, prefix, answers):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        logprobs, _ = token_logprobs(model, prefix, *answers)
    model.zero_grad()
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad for n, p in model.named_parameters()
                               if p.grad is not None}, sum(sizes)


@pytest.fixture(scope="module")
def saved(clip, qformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    write_decoder("tinyllama", folder / "llm")
    model, processor = compose(str(clip), str(qformer), str(folder / "llm"), dtype=torch.bfloat16)
    save_model(model, processor, folder / "model")
    assert json.loads((folder / "model/config.json").read_text())["dtype"] == "bfloat16"
    return folder / "model", processor


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_gives_the_same_gradient_from_less(saved, lora):
    folder, processor = saved
    prefix, answers, found = prefix_of(processor), answers_of(processor), []
    for option in (False, True):
        model, _ = load_model(folder, gradient_checkpointing=option)
        torch.manual_seed(0)
        model = add_lora(model, 4, 8) if lora else model
        tokens = generate(model, prefix,
                          torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(0)), -1)[0]
        found.append((*gradients(model, prefix, answers), tokens))
    (plain, grads, size, tokens), (again, same, less, drawn) = found
    assert torch.equal(tokens, drawn)  # the cache is used while sampling
    torch.testing.assert_close(again, plain)
    assert grads.keys() == same.keys() and len(grads) > 10
    for name in grads:
        torch.testing.assert_close(same[name], grads[name], rtol=1e-4, atol=1e-5)
    assert less < 0.8 * size


def test_attention_as_written_out_scores_the_same(saved):
    folder, processor = saved
    scores = []
    for name in ("sdpa", "eager"):
        model, _ = load_model(folder, attn_implementation=name)
        parts = (model, model.vision_tower, model.qformer, model.qformer.transformer,
                 model.language_model)
        assert {m.config._attn_implementation for m in parts} == {name}
        with torch.no_grad():
            scores.append(token_logprobs(model, prefix_of(processor), *answers_of(processor))[0])
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_a_base_in_bfloat16_is_merged_in_float32_and_stays_bfloat16(saved, tmp_path):
    folder, processor = saved
    base, _ = load_model(folder, dtype=torch.bfloat16)
    tuned = add_lora(base, 4, 8, train_bridge=True)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    save_model(tuned, processor, tmp_path)
    whole, exact = merged(tmp_path), load_model(tmp_path)[0].merge_and_unload().state_dict()
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, exact[n].bfloat16()) for n, p in whole.state_dict().items())


# --- at full size ---------------------------------------------------------------------------------
def llama_2_7b():
    yield "model.embed_tokens.weight", (32000, 4096)
    for i in range(32):
        for name in "qkvo":
            yield f"model.layers.{i}.self_attn.{name}_proj.weight", (4096, 4096)
        for name, shape in (("gate", (11008, 4096)), ("up", (11008, 4096)),
                            ("down", (4096, 11008))):
            yield f"model.layers.{i}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (4096,)
    yield "model.norm.weight", (4096,)
    yield "lm_head.weight", (32000, 4096)


def clip_large_336():
    yield "vision_model.embeddings.class_embedding", (1024,)
    yield "vision_model.embeddings.patch_embedding.weight", (1024, 3, 14, 14)
    yield "vision_model.embeddings.position_embedding.weight", (577, 1024)
    both = lambda name, *shape: [(f"vision_model.{name}.weight", shape),
                                 (f"vision_model.{name}.bias", shape[:1])]
    yield from both("pre_layrnorm", 1024)
    for i in range(24):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from both(f"encoder.layers.{i}.self_attn.{name}", 1024, 1024)
        yield from both(f"encoder.layers.{i}.layer_norm1", 1024)
        yield from both(f"encoder.layers.{i}.layer_norm2", 1024)
        yield from both(f"encoder.layers.{i}.mlp.fc1", 4096, 1024)
        yield from both(f"encoder.layers.{i}.mlp.fc2", 1024, 4096)
    yield from both("post_layernorm", 1024)


def blip_2_qformer(width=1408):
    both = lambda name, *shape: [(f"qformer.{name}.weight", shape),
                                 (f"qformer.{name}.bias", shape[:1])]
    yield "query_tokens", (1, 32, 768)
    yield from both("layernorm", 768)
    for i in range(12):
        for kind, reads in (("attention", 768),
                            *([("crossattention", width)] if i % 2 == 0 else [])):
            yield from both(f"encoder.layer.{i}.{kind}.attention.query", 768, 768)
            yield from both(f"encoder.layer.{i}.{kind}.attention.key", 768, reads)
            yield from both(f"encoder.layer.{i}.{kind}.attention.value", 768, reads)
            yield from both(f"encoder.layer.{i}.{kind}.output.dense", 768, 768)
            yield from both(f"encoder.layer.{i}.{kind}.output.LayerNorm", 768)
        yield from both(f"encoder.layer.{i}.intermediate_query.dense", 3072, 768)
        yield from both(f"encoder.layer.{i}.output_query.dense", 768, 3072)
        yield from both(f"encoder.layer.{i}.output_query.LayerNorm", 768)


def write_empty(path, tensors):
    """A safetensors file with these names and shapes in float16 and a hole for its data: no disk,
    no memory."""
    header, end = {}, 0
    for name, shape in tensors:
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = dict(dtype="F16", shape=list(shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


def test_seven_billion_parameters_have_their_published_names_and_shapes(tmp_path, monkeypatch):
    """Files with the headers of LLaMA-2-7B, CLIP ViT-L/14-336 and BLIP-2's Q-Former, loaded without
    memory for them."""
    llama, clip, qformer = (list(f()) for f in (llama_2_7b, clip_large_336, blip_2_qformer))
    assert [len(x) for x in (llama, clip, qformer)] == [291, 391, 255]
    for name in ("llm", "clip", "qformer"):
        (tmp_path / name).mkdir()
    write_tokenizer(tmp_path / "llm", "sentencepiece", "<s>", "</s>", [], None)
    tokenizer = json.loads((tmp_path / "llm/tokenizer.json").read_bytes())
    words = tokenizer["model"]["vocab"]
    words |= {f"word{i}": i for i in range(len(words), 32000)}
    (tmp_path / "llm/tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    transformers.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                             num_hidden_layers=32,
                             num_attention_heads=32, max_position_embeddings=4096,
                             architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llm")
    cut = next(i for i, (name, _) in enumerate(llama) if ".24." in name)
    files = {f"model-0000{i + 1}-of-00002.safetensors": part
             for i, part in enumerate((llama[:cut], llama[cut:]))}
    for file, part in files.items():
        write_empty(tmp_path / "llm" / file, part)
    where = {name: file for file, part in files.items() for name, _ in part}
    (tmp_path / "llm/model.safetensors.index.json").write_text(
        json.dumps(dict(metadata={}, weight_map=where))
    )
    tower = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                 num_attention_heads=16,
                 image_size=336, patch_size=14)
    transformers.CLIPConfig(vision_config=tower,
                            projection_dim=768).save_pretrained(tmp_path / "clip")
    write_empty(tmp_path / "clip/model.safetensors", clip)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 336}).save_pretrained(
        tmp_path / "clip"
    )
    # its defaults are those of the hub's blip2
    transformers.Blip2Config().save_pretrained(tmp_path / "qformer")
    write_empty(tmp_path / "qformer/model.safetensors", qformer)

    reports, load = [], transformers.PreTrainedModel.from_pretrained.__func__

    def on_meta(cls, path, **kwargs):
        model, report = load(cls, path, device_map={"": "meta"}, output_loading_info=True, **kwargs)
        reports.append(report)
        return model

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(on_meta))
    model, _ = compose(*(str(tmp_path / name) for name in ("clip", "qformer", "llm")),
                       num_frames=50)
    assert len(reports) == 2 and not any(r["missing_keys"] or r["mismatched_keys"] for r in reports)
    shapes = {k: tuple(p.shape) for k, p in model.state_dict().items()}
    ours = {k: shapes.pop(k)
            for k in list(shapes) if k.startswith(("projection", "qformer.time_embedding"))}
    assert ours == {"projection.weight": (4096, 768), "projection.bias": (4096,),
                    "qformer.time_embedding.weight": (64, 1024)}
    # and the video token
    expected = {f"language_model.{k}": (32001, 4096) if s[0] == 32000 else s for k, s in llama}
    expected |= {f"vision_tower.{k.removeprefix('vision_model.')}": s for k, s in clip}
    for k, s in blip_2_qformer(1024):  # on features of this CLIP's width
        expected["qformer." + re.sub("^qformer", "transformer", k)] = s
    assert shapes == expected
    assert sum(math.prod(s) for k, s in llama) == 6_738_415_616  # as published


# --- from the command line ------------------------------------------------------------------------
def test_hub_names_and_the_papers_flags_from_parts_to_rl(world, tmp_path, monkeypatch):
    """sft.py and grpo_rank.py --preset paper: NF4 with double quantisation on a BLIP-2 Q-Former and
    a LLaMA-2 in shards, by hub name; plain PEFT adapters, merged, read again."""
    names = dict(clip="openai/clip", qformer="Salesforce/blip2", llm="meta-llama/llama-2")
    for write, name in ((write_clip, "clip"), (write_blip2, "qformer"),
                        (lambda f: write_decoder("llama-2", f), "llm")):
        write(tmp_path / name)
        as_hub_cache(tmp_path / "cache", names[name], tmp_path / name)
    # read at import
    for name, value in dict(HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE=True).items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    parts = [word for name, hub in names.items() for word in (f"--{name}", hub)]
    few = ["--data", "data/moving_shapes/train.json", "--preset", "paper", "--steps", "3"]
    main_of(monkeypatch, world, "sft.py", *few, *parts, "--batch_size", "4",
            "--tokens_per_micro_batch",
            "300", "--name",
            "published", "--lr", "1e-2")
    start = world / "runs/sft/published_s0"
    settings = json.loads((start / "final/processor_config.json").read_text())
    # the small Q-Former has six
    assert (settings["num_frames"], settings["num_query_tokens"]) == (50, 6)
    as_hub_cache(tmp_path / "cache", "lab/start", start / "final")
    main_of(monkeypatch, world, "grpo_rank.py", *few, "--epochs", "0", "--model", "lab/start",
            "--oracle", "reference",
            "--advantage", "random", "--prompts_per_step", "4", "--max_new_tokens", "6",
            "--eval_data", "", "--name",
            "published", "--lr", "1e-2")
    tuned = world / "runs/grpo_rank/published_s0"
    saved = json.loads((tuned / "args.json").read_text())["args"]
    assert ((saved["G"], saved["lora_r"], saved["lora_alpha"], saved["quantize"])
            == (5, 64, 16, "nf4"))
    assert ({p.name for p in (tuned / "adapter").iterdir()}
            >= {"adapter_config.json", "adapter_model.safetensors"})
    for folder in (start / "adapter", tuned / "adapter"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["lora_alpha"] in (16, 32)
    whole, _ = load_model(tuned / "final")
    assert load_model(tuned / "final",
                      "nf4")[0].language_model.model.layers[0].mlp.up_proj.weight.quant_state.nested
    assert whole.config.text_config.model_type == "llama" and json.loads(
        (tuned / "final/config.json").read_text())["dtype"] == "bfloat16"


def test_the_papers_flags(monkeypatch):
    args = flags_of(monkeypatch, "grpo_rank.py", "--preset", "paper")
    assert (args.quantize, args.lora_r, args.lora_alpha, args.G) == ("nf4", 64, 16, 5)
    assert (args.prompts_per_step, args.epochs, args.dtype) == (64, 4, "bfloat16")
    args = flags_of(monkeypatch, "sft.py", "--preset", "paper", "--num_frames", "8")
    assert (args.clip, args.llm) == ("openai/clip-vit-large-patch14-336",
                                     "meta-llama/Llama-2-7b-hf")
    assert (args.qformer, args.num_frames, args.quantize) == ("32", 8, "nf4")  # what is typed wins
    assert flags_of(monkeypatch, "sft.py", "--preset", "paper").num_frames == 50
