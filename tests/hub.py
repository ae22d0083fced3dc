"""Checkpoints in the hub's own file layout, small: what openai/clip-vit-..., meta-llama/...,
Salesforce/... hold."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, Blip2Config, Blip2ForConditionalGeneration,
                          CLIPConfig, CLIPImageProcessorPil, CLIPModel, GenerationConfig,
                          InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig,
                          MistralConfig, OPTConfig, PreTrainedTokenizerFast, Qwen2Config)

from video_llm import VideoQFormer, VideoQFormerConfig

TEXT = ["a red circle moves left", "the blue square turns", "what happens in the video?",
        "where is the green star?",
        "USER: ASSISTANT: user assistant system You are a helpful assistant."] * 3
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] "
    "}}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt "
    "%}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ZEPHYR_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}")
SHAPE = dict(hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=512, initializer_range=0.2)
GROUPED = dict(SHAPE, num_key_value_heads=2)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                   high_freq_factor=4.0,
                   original_max_position_embeddings=64)
# name: configuration, how words are split, special tokens (bos, eos, others), chat template, tokens
# added to the vocabulary by padding it, shard size, dtype on disk; no tokenizer file has a pad
# token
DECODERS = {
    "llama-2": (LlamaConfig(**SHAPE), "sentencepiece", "<s>", "</s>", [], None, 0, "60KB",
                torch.float16),
    "vicuna": (LlamaConfig(**SHAPE, tie_word_embeddings=False), "sentencepiece", "<s>", "</s>", [],
               None, 0, "9GB",
               torch.float32),
    "llama-3": (LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE), "bytes", "<|begin_of_text|>",
                "<|eot_id|>",
                ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"], LLAMA3_TEMPLATE, 0,
                "60KB",
                torch.bfloat16),
    "tinyllama": (LlamaConfig(**GROUPED), "sentencepiece", "<s>", "</s>", [], ZEPHYR_TEMPLATE, 0,
                  "9GB",
                  torch.bfloat16),
    "qwen2": (Qwen2Config(**GROUPED, tie_word_embeddings=True), "bytes", None, "<|im_end|>",
              ["<|endoftext|>", "<|im_start|>"], CHATML_TEMPLATE, 24, "60KB", torch.bfloat16),
    "mistral": (MistralConfig(**GROUPED, sliding_window=9), "sentencepiece", "<s>", "</s>", [],
                MISTRAL_TEMPLATE, 0,
                "60KB", torch.bfloat16),
}


def write_tokenizer(folder, split, bos, eos, others, template, name="PreTrainedTokenizerFast"):
    special = [t for t in ("<unk>" if split == "sentencepiece" else None, bos, eos, *others) if t]
    # as LLaMA-2: spaces become a letter, bytes where a letter is unknown
    if split == "sentencepiece":
        core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        core.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special += [f"<0x{i:02X}>" for i in range(256)]
        alphabet = list("abcdefghijklmnopqrstuvwxyz▁?.:")
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                  initial_alphabet=alphabet)
    core.train_from_iterator(TEXT, trainer)
    unknown = {"unk_token": "<unk>"} if split == "sentencepiece" else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        chat_template=template,
        additional_special_tokens=others,
        **unknown,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_decoder(name, folder, **changes):
    """A decoder of DECODERS with its tokenizer and generation config. -> the model as it was
    saved."""
    config, split, bos, eos, others, template, padded, shard, dtype = DECODERS[name]
    tokenizer = write_tokenizer(folder, split, bos, eos, others, template)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = type(config).from_dict({**config.to_dict(), **ids,
                                     "vocab_size": len(tokenizer) + padded, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if name == "qwen2":  # a fresh bias is zero, a trained one is not
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(p, std=0.3)
    many = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(others[:1])]
    ids["eos_token_id"] = many
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, **ids)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def write_clip(folder, patch=8, image=16, binary=False, width=48):
    """A whole CLIP, text tower and all. binary: pytorch_model.bin, as
    openai/clip-vit-large-patch14-336 has it."""
    torch.manual_seed(1)
    tower = dict(hidden_size=width, intermediate_size=96, num_hidden_layers=3,
                 num_attention_heads=4)
    model = CLIPModel(
        CLIPConfig(
            vision_config=dict(tower, patch_size=patch, image_size=image, initializer_range=0.3),
            text_config=dict(tower, vocab_size=99),
            projection_dim=32,
        )
    )
    if binary:
        folder.mkdir(parents=True)
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder)
    size = dict(height=image, width=image)
    CLIPImageProcessorPil(size={"shortest_edge": image}, crop_size=size).save_pretrained(folder)
    return model


def write_blip2(folder, kind="blip-2", width=48, shard="120KB"):
    """A whole BLIP-2 or InstructBLIP: vision tower, query tokens, Q-Former, projection, language
    model."""
    torch.manual_seed(2)
    qformer = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                   vocab_size=99,
                   cross_attention_frequency=2, encoder_hidden_size=width,
                   max_position_embeddings=32)
    vision = dict(hidden_size=width, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, image_size=16,
                  patch_size=8)
    text = OPTConfig(vocab_size=99, hidden_size=64, word_embed_proj_dim=64, ffn_dim=64,
                     num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=64)
    config, model = {"blip-2": (Blip2Config, Blip2ForConditionalGeneration),
                     "instructblip": (InstructBlipConfig,
                                      InstructBlipForConditionalGeneration)}[kind]
    model = model(config(vision_config=vision, qformer_config=qformer, text_config=text.to_dict(),
                         num_query_tokens=6))
    torch.nn.init.normal_(model.query_tokens if hasattr(model, "query_tokens")
                          else model.model.query_tokens, std=0.5)
    for name, p in model.named_parameters():
        if "qformer" in name:
            torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.eval()


def write_qformer(folder, queries=5, width=48):
    """A VideoQFormer as this repository saves it."""
    config = VideoQFormerConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                num_attention_heads=4,
                                cross_attention_frequency=1, num_query_tokens=queries,
                                encoder_hidden_size=width)
    torch.manual_seed(3)
    VideoQFormer(config).save_pretrained(folder)
    return folder


def as_hub_cache(cache, name, folder):
    """Put a checkpoint where a download would have put it, so that its hub name works offline."""
    repo = Path(cache) / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / commit)


def shards(folder):
    index = folder / "model.safetensors.index.json"
    return (sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists()
            else [])
