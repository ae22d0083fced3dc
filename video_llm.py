"""The one model of this repository: a video language model small enough to read, real enough to run at 7B.

    MP4 --PyAV--> F frames --CLIP (frozen, layer -2)--> F x S patch features      computed once per video, cached
        --+ learned time embedding--> Q-Former (Q queries read all patches of all frames) --projection--> Q tokens
        --put where <video> stands in the prompt--> LLaMA --> answer

Everything here is *plumbing that the papers only name*: frames, processor, features, (Q)LoRA, sampling, log-probs.
Losses, advantages and training loops live in the scripts (`sft.py`, `grpo_rank.py`, ...), one algorithm each.

Three things are worth reading even if you only came for an algorithm:
  `packed`          the G answers trained after *one* prefix: the numbers of G passes at a fraction of the cost;
  `generate`        samples in the same way: one prefill of video + question, one copy of its keys and values;
  `load_model`      NF4 on a CPU, and the kernel that silently breaks its gradients.

Shapes: B prompts, G answers each, N = B*G; P prompt tokens (left padded, Q of them video), T answer tokens
(right padded); F frames of S tokens (patches and CLIP's class token), D width, V vocabulary. Masks come from lengths.

Papers  CLIP arXiv:2103.00020 | Q-Former BLIP-2 arXiv:2301.12597 | LLaMA arXiv:2302.13971 | QLoRA arXiv:2305.14314
"""

import copy
import functools
import json
import logging
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import transformers
from huggingface_hub.dataclasses import strict
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from packing import FixedRow, GrowingRow, block_mask, positions, whole_rows

transformers.logging.set_verbosity_error()  # no load report, no bar: a CLIP checkpoint has a text tower we do not need
transformers.logging.disable_progress_bar()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import of kernels that we do not use

VIDEO_TOKEN = "<video>"
CUT, MARK = "\x00", "\x01"  # where a prompt is split; what stands before a control token that is meant as one
BANNED_LOGIT = -1e4  # exp(-1e4) is exactly 0 in every dtype, and 0 * -1e4 is 0 where 0 * -inf would be NaN (entropy)

# `tiny`: the embedded default. The same classes as at 7B, about a million parameters, trained from nothing.
TINY_VISION = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                   image_size=64, patch_size=16, projection_dim=64)
TINY_QFORMER = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                    cross_attention_frequency=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                    num_query_tokens=16, max_frames=32)
TINY_LLAMA = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
                  max_position_embeddings=1024, tie_word_embeddings=False)


# ---------------------------------------------------------------------------------------------------------------
# 1. The model
# ---------------------------------------------------------------------------------------------------------------
@strict
class VideoQFormerConfig(Blip2QFormerConfig):
    model_type = "video_qformer"
    base_config_key = "qformer_config"
    num_query_tokens: int = 32
    max_frames: int = 64


@strict
class VideoLLMConfig(PreTrainedConfig):
    """CLIPVisionConfig + VideoQFormerConfig + any causal decoder's config (LlamaConfig by default)."""

    model_type = "video_llm"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=CLIPVisionConfig),
        "qformer_config": SubConfigSpec(config_class=VideoQFormerConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    video_token_id: int = 0
    vision_layer: int = -2
    scalar_head: bool = False  # a reward or value model: `token_scores`
    tie_word_embeddings: bool = False


class VideoQFormer(PreTrainedModel):
    """BLIP-2's Q-Former over the patches of *all* frames: one set of queries per video, not per frame."""

    config: VideoQFormerConfig
    main_input_name = "features"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.time_embedding = nn.Embedding(config.max_frames, config.encoder_hidden_size)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.hidden_size))
        self.transformer = Blip2QFormerModel._from_config(config)
        self.post_init()

    def _init_weights(self, module):
        std = self.config.initializer_range
        if module is self:
            nn.init.normal_(self.query_tokens, std=std)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)

    def forward(self, features, frame_mask):
        """features (B,F,S,D) float, frame_mask (B,F) bool, True on real frames -> queries (B,Q,hidden)."""
        B, F, S, D = features.shape
        if F > self.config.max_frames:
            raise ValueError(f"{F} frames, but this Q-Former has time embeddings for {self.config.max_frames}")
        patches = features.to(self.time_embedding.weight.dtype) + self.time_embedding.weight[:F, None]  # (B,F,S,D)
        out = self.transformer(
            query_embeds=self.query_tokens.expand(B, -1, -1),
            encoder_hidden_states=patches.flatten(1, 2),  # (B,F*S,D)
            encoder_attention_mask=None if frame_mask.all() else frame_mask.repeat_interleave(S, dim=1),
        )
        return out.last_hidden_state


class ScalarHead(nn.Linear):
    """One number a row, as a sum: a product with one column rounds by where its weights lie, which loading changes."""

    def forward(self, x):
        return (x * self.weight[0]).sum(-1, keepdim=True) + self.bias


class VideoLLM(PreTrainedModel, GenerationMixin):
    """CLIP vision tower + Q-Former + projection + causal decoder, as one `transformers` model."""

    config: VideoLLMConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = False  # the packed forward passes a 4-D mask, which flash attention cannot take
    supports_gradient_checkpointing = True
    gradient_checkpointing = False  # `load_model` switches it on
    all_done = staticmethod(torch.all)  # sampling ends when every answer has; sharded: those of all processes
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "Blip2QFormerLayer"]
    _keep_in_fp32_modules_strict = ["score_head"]  # bfloat16 has 3 digits: rewards of like answers would tie

    def __init__(self, config):
        super().__init__(config)
        config.qformer_config.encoder_hidden_size = config.vision_config.hidden_size
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.qformer = VideoQFormer._from_config(config.qformer_config)
        self.projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.get_output_embeddings().register_forward_pre_hook(whole_rows)
        if config.scalar_head:
            self.score_head = ScalarHead(config.text_config.hidden_size, 1)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):  # `projection`, `score_head`: every other one belongs to a model of its own
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    @torch.no_grad()
    def encode_frames(self, pixel_values):
        """pixel_values (F,3,H,W) -> features (F,S,D) of CLIP's layer `vision_layer`; those after are not computed."""
        tower = self.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(tower.dtype)))
        for layer in tower.encoder.layers[: self.config.vision_layer % (len(tower.encoder.layers) + 1)]:
            hidden = layer(hidden, None)
        return hidden

    def encode_video(self, video_features, frame_mask):
        """(B,F,S,D), (B,F) -> video tokens (B,Q,width of the decoder)."""
        return self.projection(self.qformer(video_features, frame_mask).to(self.projection.weight.dtype))

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, video_features=None, frame_mask=None, labels=None, use_cache=None,
                logits_to_keep=0, scores=False, **kwargs):
        """input_ids (B,L) with Q video tokens in each row that has a video; video_features (rows with a video,F,S,D).

        attention_mask (B,L), or (B,1,L,L) for packed groups. logits_to_keep: as in `transformers`, a number or an
        index tensor of positions. scores: the scalar head's values (B,kept,1) in place of logits. The video token's
        logit is banned here, in the one place every sampler, scorer and loss goes through: it can never be sampled,
        nor take probability from words.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if video_features is not None:
                video = self.encode_video(video_features, frame_mask).to(inputs_embeds.dtype)
                at = (input_ids == self.config.video_token_id).unsqueeze(-1)
                if at.sum() * video.shape[-1] != video.numel():
                    have = video.shape[:2].numel()
                    raise ValueError(f"prompts hold {int(at.sum())} video tokens, the videos give {have}")
                inputs_embeds = inputs_embeds.masked_scatter(at, video)
        if self.gradient_checkpointing:  # layers ask `training`; while sampling they would drop the cache
            for layer in self.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = torch.is_grad_enabled() and not use_cache
        kwargs |= dict(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
                       past_key_values=past_key_values, use_cache=use_cache)
        if scores:  # read after the decoder's last norm; no logits are computed
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = self.language_model.get_decoder()(**kwargs).last_hidden_state[:, keep]
            return CausalLMOutputWithPast(logits=self.score_head(hidden.float()))
        out = self.language_model(logits_to_keep=logits_to_keep, **kwargs)
        banned = torch.full((1,), self.config.video_token_id, device=out.logits.device)
        logits = out.logits.index_fill(-1, banned, BANNED_LOGIT)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, video_features=None, frame_mask=None, is_first_iteration=False,
                                      **kwargs):
        """`generate` of `transformers`: the video enters at the prefill only, later steps find it in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration:
            inputs |= dict(video_features=video_features, frame_mask=frame_mask)
        return inputs


AutoConfig.register("video_qformer", VideoQFormerConfig)
AutoConfig.register("video_llm", VideoLLMConfig)


# ---------------------------------------------------------------------------------------------------------------
# 2. The processor: prompts
# ---------------------------------------------------------------------------------------------------------------
VICUNA_TEMPLATE = (  # for decoders whose tokenizer brings no chat template (LLaMA-2-7b-hf)
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class VideoLLMProcessor(ProcessorMixin):
    """Image processor + tokenizer + how many frames a video is sampled at; saved and loaded with the model."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_frames=8, num_query_tokens=32,
                 sampling="linspace"):
        self.num_frames, self.num_query_tokens, self.sampling = num_frames, num_query_tokens, sampling
        if tokenizer and not tokenizer.is_fast:
            raise OSError(f"{tokenizer.name_or_path}: its tokenizer is none of the tokenizers library")
        chat_template = chat_template or (tokenizer and tokenizer.chat_template) or VICUNA_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        settings = json.loads(Path(find(path, "processor_config.json")).read_bytes())
        return cls(CLIPImageProcessorPil.from_pretrained(path), AutoTokenizer.from_pretrained(path),
                   chat_template=settings["chat_template"], num_frames=settings["num_frames"],
                   num_query_tokens=settings["num_query_tokens"], sampling=settings["sampling"])

    def save_pretrained(self, path, **kwargs):
        self.image_processor.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        settings = dict(chat_template=self.chat_template, num_frames=self.num_frames,
                        num_query_tokens=self.num_query_tokens, sampling=self.sampling)
        Path(path, "processor_config.json").write_text(json.dumps(settings, indent=2))

    @functools.cached_property
    def literal(self):
        """(tokenizer, pattern): the tokenizer with its added tokens (</s>, <assistant>, <video>, ..) under names that
        no text holds, MARK before each, and a pattern that finds their usual names. So what somebody typed is letters
        to it, whatever the tokenizer calls its tokens; all else is as in the original, ids included."""
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        plain = r"\s*|<0x[0-9A-F]{2}>"  # runs of blanks, and the bytes of which unknown letters are made
        names = {t["content"] for t in spec["added_tokens"] if not re.fullmatch(plain, t["content"])}
        model, vocab, pad = spec["model"], spec["model"]["vocab"], self.tokenizer.pad_token
        whole = lambda merge: "".join(merge if isinstance(merge, list) else merge.split(" "))
        if pad != self.tokenizer.eos_token and pad in map(whole, model.get("merges", ())):
            names.discard(pad)  # an ordinary word serves as padding
        named = lambda name: MARK + name if name in names else name
        for token in spec["added_tokens"]:
            token["content"] = named(token["content"])
        model["vocab"] = ({named(name): i for name, i in vocab.items()} if isinstance(vocab, dict)
                          else [[named(name), score] for name, score in vocab])
        if "merges" in model:  # none makes a control token out of letters
            model["merges"] = [merge for merge in model["merges"] if whole(merge) not in names]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = named(model["unk_token"])
        spec |= dict(post_processor=None, truncation=None, padding=None)
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        return Tokenizer.from_str(json.dumps(spec)), re.compile("|".join(map(re.escape, longest_first)))

    def clean(self, text):
        """A text of users or models, ready for a template: control tokens in it, pulled apart by MARKs, are letters."""
        text = text.replace(CUT, "").replace(MARK, "").strip()
        return self.literal[1].sub(lambda m: "".join(letter + MARK for letter in m[0]), text)

    def prompt_ids(self, question, video=True, max_length=None):
        """The prompt's token ids, ready for an answer: `<video>` expanded to Q tokens, an assistant turn opened.

        question: one string, or chat messages [{"role","content"}, ...] ending with a user turn. Overlong text is
        cut at the *end of the last question*, video tokens and template never. ValueError if that is not enough.
        """
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        *head, last = [{**m, "content": self.clean(m["content"])} for m in messages]

        def encode(text):
            turns = [*head, {**last, "content": text}]
            if video:
                turns[0] = {**turns[0], "content": f"{VIDEO_TOKEN}\n{turns[0]['content']}"}
            return self._ids(self._template(turns))

        ids = encode(last["content"])
        if max_length is not None and len(ids) > max_length:
            question_ids = self._ids(last["content"])
            keep = len(question_ids) - (len(ids) - max_length)
            while len(ids) > max_length:  # text cut in two can take a token more
                if keep < 1:
                    raise ValueError(f"a prompt of {len(ids)} tokens cannot be cut to {max_length} and keep its video")
                ids, keep = encode(self.clean(self.tokenizer.decode(question_ids[:keep]))), keep - 1
        return ids

    def split_prompt_ids(self, head, *tails):
        """The prompts `head + tail` as lists of ids, the head's first: many tails, one head (oracle.py)."""
        parts = [f"{VIDEO_TOKEN}\n{self.clean(head)}", *(f"\n{self.clean(tail)}" for tail in tails), ""]
        content = CUT.join(parts)  # `clean` leaves no other CUT
        head, *tails, end = self._template([{"role": "user", "content": content}]).split(CUT)
        return [self._ids(head), *(self._ids(tail + end) for tail in tails)]

    def _template(self, messages):
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template,
                                                  add_generation_prompt=True, tokenize=False)

    def _ids(self, text):
        """Ids of a text that went through `clean`, or of a template filled with such: its control tokens count."""
        tokenizer, names = self.literal
        text = re.sub(f"{MARK}|({names.pattern})(?!{MARK})", lambda m: MARK + m[1] if m[1] else "", text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        video_id = self.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        return [i for t in ids for i in ([t] * self.num_query_tokens if t == video_id else [t])]

    def answer_ids(self, answer, max_length=None):
        """An answer's token ids with EOS at the end; a cut answer has no EOS: cutting is never learned as ending."""
        return [*self._ids(self.clean(answer)), self.tokenizer.eos_token_id][:max_length]

    def pad(self, rows, side):
        """Lists of ids -> (ids (B,L), mask (B,L) from lengths), padded on `side`."""
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[i, where], mask[i, where] = torch.tensor(row), 1
        return ids, mask

    def decode_answers(self, tokens, lengths):
        """tokens (B,G,T), lengths (B,G) counted with EOS -> B lists of G strings."""
        text = lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return [[text(t[:n]) for t, n in zip(ts.tolist(), ns.tolist())] for ts, ns in zip(tokens, lengths)]


# ---------------------------------------------------------------------------------------------------------------
# 3. Loading, saving, (Q)LoRA
# ---------------------------------------------------------------------------------------------------------------
def find(name, file):
    """The path of a checkpoint's file, None where it has none. name: a folder, or a hub name (owner/model)."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        return str(Path(name, file)) if Path(name, file).exists() else None
    return cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)


def load_model(path, quantize="none", dtype=torch.float32, device="cpu", attn_implementation="sdpa",
               gradient_checkpointing=False):
    """A saved VideoLLM (or a PEFT adapter of one) + its processor, from a folder or hub name.

    quantize: "none" or "nf4" (QLoRA, double quant). dtype: of what is not trained; the trained weights of an adapter
    are float32 always. gradient_checkpointing: layers keep their input alone and compute again in the backward pass.

    NF4 on a CPU: with AVX512-BF16, bitsandbytes repacks the weights at the first forward without gradients (any
    rollout) and later backward passes run through a kernel without autograd: the loss still falls, the LoRA gradient
    is wrong. Switching that kernel off on every layer cures it; tests/test_quantize.py compares the gradient after a
    rollout with that of the dequantised weights.
    """
    if not (find(path, "config.json") or find(path, "adapter_config.json")) or (
            Path(path).is_dir() and not list(Path(path).glob("*.safetensors"))):
        raise FileNotFoundError(f"{path}: no model there (config.json or safetensors missing; pickles are not read)")
    if adapter := find(path, "adapter_config.json"):
        config = json.loads(Path(adapter).read_bytes())
        model, processor = load_model(config["base_model_name_or_path"], quantize, dtype, device, attn_implementation,
                                      gradient_checkpointing)
        whole = config["modules_to_save"] or []
        if "score_head" in whole:
            add_scalar_head(model)  # the base is an SFT model, its head comes with the adapter
        for name in whole:
            model.get_submodule(name).float()
        from peft import PeftModel  # here and below: seconds to import, and bitsandbytes with it; LoRA alone needs it

        return PeftModel.from_pretrained(model, path, is_trainable=True), processor
    load = dict(dtype=dtype, attn_implementation=attn_implementation)
    if quantize == "none":
        model = VideoLLM.from_pretrained(path, **load).to(device)
    else:
        load["dtype"] = dtype = torch.bfloat16 if str(device).startswith("cuda") else dtype
        whole = ["vision_tower", "qformer", "projection", "lm_head", "score_head"]
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                 bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=whole)
        model = VideoLLM.from_pretrained(path, quantization_config=nf4, device_map={"": device}, **load)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.vision_tower.requires_grad_(False)  # CLIP stays frozen in all three papers
    return model, VideoLLMProcessor.from_pretrained(path)


def add_lora(model, r, alpha, train_bridge=False):
    """LoRA on every linear layer of the decoder; train_bridge: Q-Former, projection too. A scalar head is trained as a
    whole. VLM-RLAIF: r=32, alpha=32 in SFT, r=64, alpha=16 in reward model and PPO."""
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    whole = ["qformer", "projection"] * train_bridge + ["score_head"] * model.config.scalar_head
    for name in whole:
        model.get_submodule(name).float()  # as the adapters: steps of 1e-5 are lost in bfloat16
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, bias="none", modules_to_save=whole or None)
    return get_peft_model(model, config)


def add_scalar_head(model):
    """Give a VideoLLM a scalar head, in place; one that is there stays. Zero: every answer scores 0 at the start."""
    if not model.config.scalar_head:
        model.score_head = ScalarHead(model.config.text_config.hidden_size, 1, device=model.device)
        nn.init.zeros_(model.score_head.weight)
        nn.init.zeros_(model.score_head.bias)
        model.config.scalar_head = True
    return model


def merged(adapter):
    """The whole model out of an adapter folder: unquantised base + adapter, merged in float32, in the base's dtype."""
    base = json.loads(Path(find(adapter, "adapter_config.json")).read_bytes())["base_model_name_or_path"]
    return load_model(adapter)[0].merge_and_unload().to(AutoConfig.from_pretrained(base).dtype)


def save_model(model, processor, path, state_dict=None):
    """Whole model as safetensors, or a plain PEFT adapter where there is one; the processor beside either."""
    if state_dict and unwrap(model).config.tie_word_embeddings:  # gathered from shares, the head is a copy
        state_dict = {name: w for name, w in state_dict.items() if not name.endswith("lm_head.weight")}
    model.save_pretrained(path, state_dict=state_dict)
    processor.save_pretrained(path)


def unwrap(model):
    """The VideoLLM inside DistributedDataParallel and PEFT wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if has_adapter(model) else model


def has_adapter(model):
    """Is this a PEFT model? Asked without importing PEFT."""
    return hasattr(model, "peft_config")


def reference_of(model, place=lambda frozen: frozen):
    """Makes context managers for the frozen start: `with ref() as ref_model`. LoRA: the same weights, adapter off;
    else a copy, which `place` may spread over processes."""
    frozen = None if has_adapter(model) else place(copy.deepcopy(model).requires_grad_(False).eval())

    @contextmanager
    def reference():
        with nullcontext() if frozen else model.disable_adapter():
            yield frozen or model
    return reference


# ---------------------------------------------------------------------------------------------------------------
# 4. One prefix, G answers: sampling and scoring
# ---------------------------------------------------------------------------------------------------------------
class Prefix(NamedTuple):
    """B prompts, left padded, and the features of their videos (in order of the rows that have one)."""

    input_ids: torch.Tensor  # (B,P)
    attention_mask: torch.Tensor  # (B,P)
    video_features: torch.Tensor | None  # (B,F,S,D)
    frame_mask: torch.Tensor | None  # (B,F)

    @classmethod
    def build(cls, processor, cache, questions, clips, device="cpu", max_length=None, num_frames=None):
        """questions: B strings or chats; clips: B Clips, or None where a row has no video."""
        rows = [processor.prompt_ids(q, c is not None, max_length) for q, c in zip(questions, clips)]
        videos = [c for c in clips if c is not None]
        features = cache(videos, num_frames) if videos else (None, None)
        return cls(*(x if x is None else x.to(device) for x in (*processor.pad(rows, "left"), *features)))

    def rows(self, which):
        """The same for a slice of rows; every row has a video here (text-only prompts are not sampled in groups)."""
        return Prefix(*(x[which] for x in self))

    def model_inputs(self):
        return dict(video_features=self.video_features, frame_mask=self.frame_mask)


def mask_kind(model):
    """-> dtype of masks, length of the decoder's sliding window or None."""
    model = unwrap(model)
    return model.dtype, getattr(model.config.text_config, "sliding_window", None)


@torch.no_grad()
def generate(model, prefix, uniforms, eos_id, temperature=1.0, cuda_graphs=False):
    """Sample G answers per prompt from *one* prefill; G tokens a step go after it in one row, under `packed`'s mask.

    So the keys and values of a prompt are held and read once for its G answers: P + G*T places and not G*(P + T).
    Finished answers leave the row, finished groups the batch: a step costs what still runs. cuda_graphs: they leave
    later, all room is taken at the start, and a GPU replays one CUDA graph a token (packing.py).

    uniforms (B,G,T) in [0,1): one number a token decides everything (inverse of the cumulated probabilities), so a
    caller who keys them by (seed, step, question) gets the same answers on any number of processes and after a resume.
    temperature 0 is greedy. -> tokens (B,G,T'), T' <= T, after EOS: EOS; lengths (B,G) with EOS; logprobs (B,G) of
    the whole answers.
    """
    B, G, T = uniforms.shape
    new = lambda fill, *shape, **kw: torch.full(shape, fill, device=prefix.input_ids.device, **kw)
    tokens, lengths, logprobs = new(eos_id, B, G, T), new(0, B, G), new(0.0, B, G)
    kind = mask_kind(model)
    if cuda_graphs and "dynamic" in str(getattr(unwrap(model).config.text_config, "rope_parameters", "")):
        raise ValueError("--cuda_graphs: dynamic RoPE asks the GPU how long a row is, which no graph can hold")
    row = FixedRow(model, prefix, kind, G, T) if cuda_graphs else GrowingRow(model, prefix, kind)
    logits = row.read(prefix).expand(B, G, -1)
    rows = torch.arange(B, device=tokens.device)  # the groups that still run, (b,)
    who = torch.arange(G, device=tokens.device).expand(B, G)  # and their answers that do, (b,A); some only fill up
    uniforms, runs = uniforms.to(tokens.device, torch.float64), new(True, B, G)
    for t in range(T):
        at = rows[:, None], who
        all_logprobs = (logits.float() / (temperature or 1)).log_softmax(-1)  # (b,A,V)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            cdf = all_logprobs.double().exp().cumsum(-1)
            # the first token whose cumulated probability exceeds u: tokens of probability 0 cannot be hit
            u = uniforms[(*at, t)].unsqueeze(-1) * cdf[..., -1:]
            token = torch.searchsorted(cdf, u, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)
        token = torch.where(runs, token, eos_id)
        tokens[(*at, t)] = token
        logprobs[at] += all_logprobs.gather(-1, token[..., None])[..., 0] * runs
        lengths[at] += runs
        runs = runs & (token != eos_id)
        if unwrap(model).all_done(~runs) or t == T - 1:
            break
        some = runs.any(-1) | ~runs.any()  # sharded: without a running answer of its own it keeps the others company
        if 1 - some.float().mean() > row.most_idle:
            row.select(some)
            rows, who, runs, token = (x[some] for x in (rows, who, runs, token))
        if not cuda_graphs:
            most = int(runs.sum(-1).max()) or 1
            order = runs.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]
            who, runs, token = (x.gather(1, order) for x in (who, runs, token))
        logits = row.append(token, who)
    return tokens[..., : t + 1], lengths, logprobs


def packed(model, prefix, tokens, lengths, before=True, **kwargs):
    """What `model` gives for tokens (B,G,T), a group's answers packed after one prefix: out (B,1+A,..), read at the
    last token of the prefix and after it, and at (B,G*T): where in `out` to look for an answer's token; before: one
    place earlier, where it is predicted.

        prefix  a1 a1 a1  a2  a3 a3 ...     one row of P + sum of lengths tokens instead of G rows of P + T
    Block mask: an answer's token sees the prefix and its own past, never another answer; positions restart after the
    prefix for every answer. So each answer gets exactly what a forward pass of its own would give (tests: 1e-5 in
    values and gradients), but video and question pass the Q-Former and the decoder once per group, not G times.
    Logits are computed where they are read, nowhere else: the last prefix token predicts every answer's first token,
    answer token t predicts token t+1.
    """
    (B, G, T), mask = tokens.shape, prefix.attention_mask
    new = dict(device=tokens.device)
    step, real = torch.arange(T, **new), torch.arange(T, **new) < lengths.unsqueeze(-1)  # (T,), (B,G,T)
    asked, answered = mask.sum(-1, keepdim=True), lengths.sum(-1, keepdim=True)  # (B,1)
    W, A = (asked + answered).max().item(), answered.max().item()  # width of a row, of its answers; padded on the left
    start = W - answered  # (B,1) column of the first answer
    column = start.unsqueeze(-1) + (lengths.cumsum(-1) - lengths).unsqueeze(-1) + step  # (B,G,T)
    columns = torch.cat([torch.where(mask.bool(), start - asked + positions(mask), W),
                         torch.where(real, column, W).flatten(1)], 1)  # (B,P+G*T) of every token; what is none: W

    def row(of_prefix, of_answers, fill):  # (B,P), (B,G,T) or smaller -> (B,W)
        both = torch.cat([of_prefix.expand(mask.shape), of_answers.expand(B, G, T).flatten(1)], 1)
        return torch.full((B, W + 1), fill, **new).scatter(1, columns, both)[:, :W]

    owner = row(torch.full((1, 1), -1, **new), torch.arange(G, **new)[:, None], -2)
    place = row(positions(mask), asked.unsqueeze(-1) + step, 0)
    kind = mask_kind(model)
    causal = not kind[1] and bool((owner[:, 0] == -1).all())  # nothing is padded
    out = model(input_ids=row(prefix.input_ids, tokens, int(tokens[0, 0, 0])), position_ids=place, use_cache=False,
                attention_mask=block_mask(owner, place, torch.arange(W, **new), *kind), logits_to_keep=1 + A,
                prefix=(W - A, causal), **prefix.model_inputs(), **kwargs).logits
    if before:
        column = torch.where(step > 0, column, start.unsqueeze(-1)) - 1
    return out, torch.where(real, column - (W - 1 - A), 0).flatten(1)


def token_logprobs(model, prefix, tokens, lengths, temperature=1.0):
    """log pi(token) and entropy of every answer token: (N,T), (N,T), row b*G + g; zero after an answer's end.

    The one place that knows the causal shift and the sampling temperature: behaviour, reference and new policy all
    come through here.
    """
    T = tokens.shape[-1]
    out, at = packed(model, prefix, tokens, lengths)
    logprobs = (out.float() / temperature).log_softmax(-1)  # (B,1+A,V)
    entropy = -(logprobs.exp() * logprobs).sum(-1).gather(1, at).view(-1, T)
    chosen = logprobs.flatten(1).gather(1, at * logprobs.shape[-1] + tokens.flatten(1)).view(-1, T)
    mask = answer_mask(lengths, T)
    return chosen * mask, entropy * mask


def token_scores(model, prefix, tokens, lengths, before=False):
    """The scalar head's value (N,T) at every answer token, row b*G + g; zero after an answer's end.

    A reward stands at an answer's last token (lengths - 1, its EOS). before=True: read where token t is predicted, that
    is V(s_t) of PPO, which has not seen the token.
    """
    out, at = packed(model, prefix, tokens, lengths, before, scores=True)
    return out[..., 0].gather(1, at).view(-1, tokens.shape[-1]) * answer_mask(lengths, tokens.shape[-1])


def answer_mask(lengths, T):
    """(B,G) lengths -> (N,T) float mask, 1 on answer tokens including EOS."""
    return (torch.arange(T, device=lengths.device) < lengths.reshape(-1, 1)).float()
