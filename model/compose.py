"""A VideoLLM out of published parts: a CLIP, a Q-Former, a decoder with its tokenizer, each a hub
name or a folder.

    openai/clip-vit-large-patch14-336 --+
    Salesforce/instructblip-vicuna-7b --+--> VideoLLM + processor, trained by sft.py
    meta-llama/Llama-2-7b-hf -----------+

Nothing is converted by hand: the parts stay the classes of `transformers` that read them. Only the
Q-Former needs a word: BLIP-2 and InstructBLIP keep it inside a whole model, of which its own shards
alone are read."""

import copy
import json
import re
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil,
                          CLIPVisionModel, LlamaConfig)

from model.packing import whole_rows
from video_llm import (TINY_LLAMA, VIDEO_TOKEN, VideoLLM, VideoLLMConfig, VideoLLMProcessor,
                       VideoQFormer, VideoQFormerConfig, find)


def init_from_nothing(module, seed):
    """Initialise in place for training from nothing: std 1/sqrt(fan_in), embeddings near 0.5; norms
    stay at one.

    The library's 0.02 is meant for wide, pre-trained models: at width 128 it is the difference
    between learning in a minute and not at all. Deterministic in `seed`."""
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

    clip: a CLIP checkpoint. qformer: a VideoQFormer, BLIP-2 or InstructBLIP checkpoint, or a number
    of query tokens for one from nothing. llm: a LLaMA-class decoder with its tokenizer, or a folder
    with a tokenizer alone for `tiny`'s LLaMA from nothing."""
    for name, file in ((clip, "config.json"), (llm, "tokenizer_config.json")):
        if not find(name, file):
            raise OSError(f"{name}: {file} is missing there")
    vision = CLIPVisionModel.from_pretrained(clip, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]},
                                 replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        # harmless: no mask in this repository looks at token ids
        tokenizer.pad_token = tokenizer.eos_token
    parts = load_qformer(qformer, vision.config.hidden_size, num_frames, seed).to(dtype)
    if find(llm, "config.json"):
        check_decoder(llm, AutoConfig.from_pretrained(llm))
        decoder = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype)
        # the video token's row is never read
        if len(tokenizer) > decoder.get_input_embeddings().num_embeddings:
            decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    else:
        ids = {name: getattr(tokenizer, name)
               for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        decoder = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **ids,
                                                               **TINY_LLAMA))
        init_from_nothing(decoder, seed)
    config = VideoLLMConfig(vision_config=vision.config, qformer_config=parts.config,
                            text_config=decoder.config,
                            video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
                            tie_word_embeddings=decoder.config.tie_word_embeddings)
    with torch.device("meta"):  # no memory for weights that the parts replace
        model = VideoLLM(config)
    model.vision_tower, model.qformer, model.language_model = vision, parts, decoder
    model.get_output_embeddings().register_forward_pre_hook(whole_rows)
    model.projection = nn.Linear(parts.config.hidden_size, decoder.config.hidden_size)
    init_from_nothing(model.projection, seed)
    model.generation_config = copy.deepcopy(decoder.generation_config)
    image_processor = CLIPImageProcessorPil.from_pretrained(clip)
    processor = VideoLLMProcessor(image_processor, tokenizer, num_frames=num_frames,
                                  num_query_tokens=parts.config.num_query_tokens)
    # `model.to` would cast the rotary frequencies as well, which stay in float32
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model, processor


def check_decoder(name, config):
    """One line for a decoder that LoRA or the packed groups cannot serve. sliding_window: `packed`
    knows it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise OSError(f"{name}: its layers attend in {len(kinds)} ways "
                      f"({', '.join(sorted(kinds))}); a packed group "
                      "has one mask")
    try:
        with torch.device("meta"):
            names = {n.rpartition(".")[2]
                     for n, _ in AutoModelForCausalLM.from_config(config).named_modules()}
    except ValueError:  # no causal decoder is made of this configuration
        names = set()
    missing = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} - names
    if missing:
        raise OSError(f"{name}: a {config.model_type} has no {', '.join(sorted(missing))}; "
                      "decoders of the LLaMA class are LLaMA, Vicuna, TinyLlama, Qwen2 and Mistral")


# --------------------------------------------------------------------------------------------------
# The Q-Former
# --------------------------------------------------------------------------------------------------
QFORMER_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "layer_norm_eps",
                 "cross_attention_frequency", "hidden_act")


def load_qformer(qformer, width, num_frames, seed):
    """A VideoQFormer in float32 that reads features of `width`. qformer: see `compose`."""
    frames = max(64, num_frames)  # time embeddings
    if isinstance(qformer, int):
        parts = VideoQFormer(VideoQFormerConfig(num_query_tokens=qformer, encoder_hidden_size=width,
                                                max_frames=frames))
        init_from_nothing(parts, seed)
        return parts
    file = find(qformer, "config.json")
    config = json.loads(Path(file).read_bytes()) if file else {}
    if config.get("model_type") == "video_qformer":
        if config["encoder_hidden_size"] != width:
            raise OSError(f"{qformer}: reads features of width {config['encoder_hidden_size']}, "
                          f"this CLIP has {width}")
        return VideoQFormer.from_pretrained(qformer, dtype=torch.float32)
    if "qformer_config" not in config:
        raise OSError(f"{qformer}: no Q-Former there (config.json of a VideoQFormer, a BLIP-2 or "
                      "an InstructBLIP)")
    weights = published_qformer(qformer)
    shape = {k: v for k, v in config["qformer_config"].items() if k in QFORMER_SHAPE}
    parts = VideoQFormer(VideoQFormerConfig(num_query_tokens=weights["query_tokens"].shape[1],
                                            max_frames=frames,
                                            encoder_hidden_size=width, **shape))
    init_from_nothing(parts, seed)
    # begins as the published model, to which every frame is the same time
    parts.time_embedding.weight.data.zero_()
    trained_on = weights["transformer.encoder.layer.0.crossattention.attention.key.weight"].shape[1]
    if trained_on != width:  # BLIP-2's ViT-g has 1408, CLIP ViT-L 1024: these matrices do not fit
        print(f"{qformer}: its cross-attention was trained on features of width {trained_on}, this "
              f"CLIP has {width}: keys and values start from nothing")
        weights = {k: v for k, v in weights.items()
                   if not re.search(r"crossattention\.attention\.(key|value)", k)}
    missing, unknown = parts.load_state_dict(weights, strict=False)
    new = "time_embedding"
    if trained_on != width:
        new += r"|crossattention\.attention\.(key|value)"
    lost = [k for k in missing if not re.match(rf".*({new})", k)]
    if lost or unknown:
        raise OSError(f"{qformer}: not the tensors of a Q-Former: "
                      f"{', '.join([*lost, *unknown][:3])}")
    return parts


def published_qformer(name):
    """{name in a VideoQFormer: tensor} out of a BLIP-2 or InstructBLIP checkpoint; only shards that
    hold some of them are opened (and, from the hub, downloaded). The branch that reads text is left
    out: queries never pass it."""
    index, file = find(name, "model.safetensors.index.json"), "model.safetensors"
    where = json.loads(Path(index).read_bytes())["weight_map"] if index else None
    ours = lambda key: re.match(r"(model\.)?(qformer\.|query_tokens$)", key)
    shards = sorted({shard for key, shard in where.items() if ours(key)}) if where else [file]
    out = {}
    for shard in shards:
        path = find(name, shard)
        if not path:
            raise OSError(f"{name}: {shard} is missing")
        with safe_open(path, "pt") as f:
            for key in filter(ours, f.keys()):
                new = key.removeprefix("model.").replace("qformer.", "transformer.")
                # InstructBLIP's place
                new = new.replace("transformer.embeddings.layernorm", "transformer.layernorm")
                of_text = r"embeddings\.|encoder\.layer\.\d+\.(intermediate|output)\.|position_ids"
                text = re.search(of_text, new)
                if not text:
                    out[new] = f.get_tensor(key).float()
    if "query_tokens" not in out:
        raise OSError(f"{name}: no query_tokens there; name the whole BLIP-2 or InstructBLIP "
                      "checkpoint")
    return out
