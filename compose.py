"""A VideoLLM out of published parts: a CLIP, a Q-Former, a decoder with its tokenizer, each a hub name or a folder."""

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaConfig,
)

from video_llm import (
    TINY_LLAMA,
    VIDEO_TOKEN,
    VideoLLM,
    VideoLLMConfig,
    VideoLLMProcessor,
    VideoQFormer,
    VideoQFormerConfig,
)


def init_from_nothing(module, seed):
    """Initialise in place for training from nothing: std 1/sqrt(fan_in), embeddings near 0.5; norms stay at one.

    The library's 0.02 is meant for wide, pre-trained models: at width 128 it is the difference between learning in
    a minute and not at all. Deterministic in `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if "norm" in name.lower():
            continue
        if name.endswith("bias"):
            p.data.zero_()
        elif "embed" in name and "patch" not in name or "query_tokens" in name:
            p.data.normal_(std=0.5, generator=generator)
        elif p.dim() > 1:
            p.data.normal_(std=p[0].numel() ** -0.5, generator=generator)


def compose(clip, qformer, llm, num_frames=8, seed=0, dtype=torch.float32):
    """A new VideoLLM + processor out of three parts, each a local folder or hub name.

    clip: a CLIP checkpoint. qformer: a VideoQFormer checkpoint, or a number of query tokens for one from nothing.
    llm: a causal decoder with its tokenizer, or a folder with a tokenizer alone for `tiny`'s LLaMA from nothing.
    """
    vision = CLIPVisionModel.from_pretrained(clip, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: no mask in this repository looks at token ids
    if isinstance(qformer, int):
        width = vision.config.hidden_size
        parts = VideoQFormer(VideoQFormerConfig(num_query_tokens=qformer, encoder_hidden_size=width))
        init_from_nothing(parts, seed)
    else:
        parts = VideoQFormer.from_pretrained(qformer, dtype=dtype)
    if Path(llm, "config.json").exists() or not Path(llm).is_dir():
        decoder = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype)
        if len(tokenizer) > decoder.get_input_embeddings().num_embeddings:
            decoder.resize_token_embeddings(len(tokenizer))
    else:
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        decoder = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **ids, **TINY_LLAMA))
        init_from_nothing(decoder, seed)
    config = VideoLLMConfig(vision_config=vision.config, qformer_config=parts.config, text_config=decoder.config,
                            video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
                            tie_word_embeddings=decoder.config.tie_word_embeddings)
    torch.manual_seed(seed)  # the projection
    model = VideoLLM(config)
    model.vision_tower, model.qformer, model.language_model = vision, parts, decoder
    model.generation_config = copy.deepcopy(decoder.generation_config)
    image_processor = CLIPImageProcessorPil.from_pretrained(clip)
    processor = VideoLLMProcessor(image_processor, tokenizer, num_frames=num_frames,
                                  num_query_tokens=parts.config.num_query_tokens)
    return model.to(dtype), processor
