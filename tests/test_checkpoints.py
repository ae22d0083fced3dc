"""Published checkpoints: every class that --clip, --qformer and --llm name, written small in the hub's own layout."""

import json

import pytest
import torch
from conftest import run
from hub import DECODERS, as_hub_cache, shards, write_blip2, write_clip, write_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from compose import compose
from video_llm import (
    VICUNA_TEMPLATE,
    Prefix,
    VideoQFormer,
    VideoQFormerConfig,
    add_lora,
    generate,
    load_model,
    save_model,
    token_logprobs,
)

QUESTIONS = ["what happens in the video?", "where is the green star?"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "clip"
    write_clip(folder)
    return folder


@pytest.fixture(scope="module")
def qformer(tmp_path_factory):
    config = VideoQFormerConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                cross_attention_frequency=1, num_query_tokens=5, encoder_hidden_size=48)
    folder = tmp_path_factory.mktemp("hub") / "qformer"
    VideoQFormer(config).save_pretrained(folder)
    return folder


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
    """(P,D): one prompt without padding, its video in place, as the decoder's own class takes it."""
    ids = prefix.input_ids[b][prefix.attention_mask[b].bool()]
    words = model.get_input_embeddings()(ids)
    words[ids == model.config.video_token_id] = model.encode_video(prefix.video_features[b : b + 1],
                                                                   prefix.frame_mask[b : b + 1])[0].to(words.dtype)
    return words


def test_the_files_are_those_of_the_hub(start, clip):
    name, folder, *_ = start
    files = {p.name for p in folder.iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert len(shards(folder)) > 2 if DECODERS[name][7] == "60KB" else "model.safetensors" in files
    assert "<video>" not in (folder / "tokenizer.json").read_text()
    assert (AutoTokenizer.from_pretrained(folder).pad_token is None) == (name != "qwen2")  # its class brings one


@torch.no_grad()
def test_packed_answers_score_as_the_decoders_own_class_scores_them(start):
    """The decoder as written, read by `transformers` alone, one answer at a time, no padding, no packing."""
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
    if name == "mistral":  # the window is shorter than prompt and answer: without it the numbers are others
        model.config.text_config.sliding_window = None
        wide = token_logprobs(model, prefix, tokens, lengths)[0].view(2, 3, 8)
        model.config.text_config.sliding_window = 9
        assert (wide - found).abs().max() > 1e-2


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(start):
    _, folder, _, model, processor = start
    prefix, eos = prefix_of(processor), processor.tokenizer.eos_token_id
    ours, lengths, _ = generate(model, prefix, torch.zeros(2, 1, 12), eos, temperature=0)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for b in range(2):
        words = embedded(model, prefix, b)[None]
        theirs = plain.generate(inputs_embeds=words, attention_mask=torch.ones(words.shape[:2]), do_sample=False,
                                max_new_tokens=12, eos_token_id=eos, pad_token_id=eos, temperature=None, top_p=None,
                                suppress_tokens=[model.config.video_token_id] if model.config.video_token_id
                                < plain.config.vocab_size else None)
        assert ours[b, 0, : lengths[b, 0]].tolist() == theirs[0].tolist()[: lengths[b, 0]]
    assert lengths.max() > 3 and len(set(ours.flatten().tolist())) > 3


def test_prompts_follow_the_tokenizers_own_template(start):
    name, folder, _, model, processor = start
    own = AutoTokenizer.from_pretrained(folder).chat_template
    assert processor.chat_template == (own or VICUNA_TEMPLATE) and (own is None) == (name in ("llama-2", "vicuna"))
    ids = processor.prompt_ids("what happens in the video?")
    assert ids.count(model.config.video_token_id) == 5
    text = processor.tokenizer.decode([i for i in ids if i != model.config.video_token_id])
    said = {"llama-2": "USER:", "vicuna": "USER:", "llama-3": "<|start_header_id|>user", "tinyllama": "<|user|>",
            "qwen2": "<|im_start|>user", "mistral": "[INST]"}[name]
    assert said in text and "what happens in the video?" in text
    bos = processor.tokenizer.bos_token_id
    assert ids.count(bos) == (0 if name in ("qwen2", "tinyllama") else 1) if bos is not None else name == "qwen2"
    answer = processor.answer_ids("a red circle moves left")
    assert answer[-1] == processor.tokenizer.eos_token_id
    tokens, lengths = torch.tensor([[answer]]), torch.tensor([[len(answer)]])
    assert processor.decode_answers(tokens, lengths) == [["a red circle moves left"]]


def test_saved_and_loaded_is_the_same(start, tmp_path):
    name, folder, written, model, processor = start
    save_model(model, processor, tmp_path)
    again, same = load_model(tmp_path)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    V = written.get_input_embeddings().num_embeddings
    for k, v in written.state_dict().items():  # and the decoder is the published one, but for the video token's row
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


@pytest.mark.parametrize("quantize, dtype", [("none", torch.float32), ("none", torch.bfloat16), ("nf4", torch.float32)])
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
        assert files >= {"adapter_config.json", "adapter_model.safetensors"} and "model.safetensors" not in files
        again, _ = load_model(tmp_path / "adapter", quantize, dtype)
        assert torch.equal(token_logprobs(again, prefix, *answers)[0], found)
        a, b = (({n: p for n, p in m.named_parameters() if p.requires_grad}) for m in (tuned, again))
        assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
