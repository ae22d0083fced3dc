"""The one model of this repository: a video language model, small enough to read, real at 7B.

    MP4 --PyAV--> F frames --CLIP (frozen, layer -2)--> F x S patch features, cached per video
        --+ time embedding--> Q-Former: Q queries read all patches --projection--> Q video tokens
        --in place of <video> in the prompt--> LLaMA --> answer

Everything here is *plumbing that the papers only name*: frames, processor, features, (Q)LoRA,
sampling, log-probs. Losses, advantages and training loops live in the scripts (`sft.py`,
`grpo_rank.py`, ...), one algorithm each.

Three things are worth reading even if you only came for an algorithm:
  `packed`      G answers trained after *one* prefix: the numbers of G passes, far cheaper;
  `generate`    G answers sampled after one prefill of video and question;
  `load_model`  NF4 on a CPU, and the kernel that silently breaks its gradients.

Shapes: B prompts, G answers each, N = B*G; P prompt tokens (left padded, Q of them video), T answer
tokens (right padded); F frames of S tokens (patches and CLIP's class token), D width, V vocabulary.
Masks come from lengths.

Prompts: model/processor.py. Packed rows: model/packing.py.

Papers  CLIP arXiv:2103.00020   Q-Former: BLIP-2 arXiv:2301.12597   LLaMA arXiv:2302.13971
        QLoRA arXiv:2305.14314
"""

import copy
import functools
import json
import logging
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import transformers
from huggingface_hub.dataclasses import strict
from transformers import (AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Blip2QFormerConfig,
                          Blip2QFormerModel, CLIPVisionConfig, CLIPVisionModel, GenerationMixin,
                          PreTrainedConfig, PreTrainedModel)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.packing import batches, block_mask, positions, row_of, tree_rows, trees, whole_rows
from model.processor import VIDEO_TOKEN, VideoLLMProcessor, find, fits  # noqa: F401

# no load report, no bar: a CLIP checkpoint has a text tower we do not need
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# it warns at import of kernels that we do not use
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# exp(-1e4) is exactly 0 in every dtype, and 0 * -1e4 is 0 where 0 * -inf would be NaN (entropy)
BANNED_LOGIT = -1e4

# `tiny`: the embedded default. The same classes as at 7B, about a million parameters, trained from
# nothing.
TINY_VISION = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3,
                   num_attention_heads=4, image_size=64, patch_size=16, projection_dim=64)
TINY_QFORMER = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                    num_attention_heads=4, cross_attention_frequency=1, hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    num_query_tokens=16, max_frames=32)
TINY_LLAMA = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=3,
                  num_attention_heads=4, max_position_embeddings=1024, tie_word_embeddings=False)


# --------------------------------------------------------------------------------------------------
# 1. The model
# --------------------------------------------------------------------------------------------------
@strict
class VideoQFormerConfig(Blip2QFormerConfig):
    model_type = "video_qformer"
    base_config_key = "qformer_config"
    num_query_tokens: int = 32
    max_frames: int = 64


@strict
class VideoLLMConfig(PreTrainedConfig):
    """CLIPVisionConfig + VideoQFormerConfig + any causal decoder's config (LlamaConfig by
    default)."""

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
    """BLIP-2's Q-Former over the patches of *all* frames: one set of queries per video, not per
    frame."""

    config: VideoQFormerConfig
    main_input_name = "features"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.time_embedding = nn.Embedding(config.max_frames, config.encoder_hidden_size)
        queries = torch.empty(1, config.num_query_tokens, config.hidden_size)
        self.query_tokens = nn.Parameter(queries)
        self.transformer = Blip2QFormerModel._from_config(config)
        self.post_init()

    def _init_weights(self, module):
        std = self.config.initializer_range
        if module is self:
            nn.init.normal_(self.query_tokens, std=std)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)

    def forward(self, features, frame_mask):
        """features (B,F,S,D) float, frame_mask (B,F) bool, True on real frames -> queries
        (B,Q,hidden)."""
        B, F, S, D = features.shape
        if F > self.config.max_frames:
            have = self.config.max_frames
            raise ValueError(f"{F} frames, but this Q-Former has time embeddings for {have}")
        times = self.time_embedding.weight[:F, None]
        patches = features.to(times.dtype) + times  # (B,F,S,D)
        out = self.transformer(
            query_embeds=self.query_tokens.expand(B, -1, -1),
            encoder_hidden_states=patches.flatten(1, 2),  # (B,F*S,D)
            encoder_attention_mask=(None if frame_mask.all()
                                    else frame_mask.repeat_interleave(S, dim=1)),
        )
        return out.last_hidden_state


class ScalarHead(nn.Linear):
    """One number per row. A one-column matmul may round differently after reloading, because
    alignment changes; an explicit sum does not."""

    def forward(self, x):
        return (x * self.weight[0]).sum(-1, keepdim=True) + self.bias


class VideoLLM(PreTrainedModel, GenerationMixin):
    """CLIP vision tower + Q-Former + projection + causal decoder, as one `transformers` model."""

    config: VideoLLMConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    # the packed forward passes a 4-D mask, which flash attention cannot take
    _supports_flash_attn = False
    supports_gradient_checkpointing = True
    gradient_checkpointing = False  # `load_model` switches it on
    # sampling ends when every answer has; sharded: those of all processes
    all_done = staticmethod(torch.all)
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "Blip2QFormerLayer"]
    # bfloat16 has 3 digits: rewards of like answers would tie
    _keep_in_fp32_modules_strict = ["score_head"]

    def __init__(self, config):
        super().__init__(config)
        config.qformer_config.encoder_hidden_size = config.vision_config.hidden_size
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.qformer = VideoQFormer._from_config(config.qformer_config)
        self.projection = nn.Linear(config.qformer_config.hidden_size,
                                    config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.get_output_embeddings().register_forward_pre_hook(whole_rows)
        if config.scalar_head:
            self.score_head = ScalarHead(config.text_config.hidden_size, 1)
        self.post_init()

    def _init_weights(self, module):
        # `projection`, `score_head`: every other one belongs to a model of its own
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def encode_video(self, video_features, frame_mask):
        """(B,F,S,D), (B,F) -> video tokens (B,Q,width of the decoder)."""
        queries = self.qformer(video_features, frame_mask)
        return self.projection(queries.to(self.projection.weight.dtype))

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, video_features=None, frame_mask=None, labels=None,
                use_cache=None, logits_to_keep=0, scores=False, **kwargs):
        """input_ids (B,L) with Q video tokens in each row that has a video; video_features (rows
        with a video,F,S,D).

        attention_mask (B,L), or (B,1,L,L) for packed groups. logits_to_keep: as in `transformers`,
        a number or an index tensor of positions. scores: the scalar head's values (B,kept,1) in
        place of logits. The video token's logit is banned here, in the one place every sampler,
        scorer and loss goes through: it can never be sampled, nor take probability from words."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if video_features is not None:
                video = self.encode_video(video_features, frame_mask).to(inputs_embeds.dtype)
                at = (input_ids == self.config.video_token_id).unsqueeze(-1)
                if at.sum() * video.shape[-1] != video.numel():
                    have = video.shape[:2].numel()
                    raise ValueError(f"prompts hold {int(at.sum())} video tokens, the videos give "
                                     f"{have}")
                inputs_embeds = inputs_embeds.masked_scatter(at, video)
        # layers ask `training`; while sampling they would drop the cache
        if self.gradient_checkpointing:
            for layer in self.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = torch.is_grad_enabled() and not use_cache
        kwargs |= dict(inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                       position_ids=position_ids, past_key_values=past_key_values,
                       use_cache=use_cache)
        if scores:  # read after the decoder's last norm; no logits are computed
            number = isinstance(logits_to_keep, int)
            keep = slice(-logits_to_keep, None) if number else logits_to_keep
            hidden = self.language_model.get_decoder()(**kwargs).last_hidden_state[:, keep]
            return CausalLMOutputWithPast(logits=self.score_head(hidden.float()))
        out = self.language_model(logits_to_keep=logits_to_keep, **kwargs)
        banned = torch.full((1,), self.config.video_token_id, device=out.logits.device)
        logits = out.logits.index_fill(-1, banned, BANNED_LOGIT)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(),
                                               labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, video_features=None, frame_mask=None,
                                      is_first_iteration=False, **kwargs):
        """`generate` of `transformers`: the video enters at the prefill only, later steps find it
        in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration:
            inputs |= dict(video_features=video_features, frame_mask=frame_mask)
        return inputs


AutoConfig.register("video_qformer", VideoQFormerConfig)
AutoConfig.register("video_llm", VideoLLMConfig)


# --------------------------------------------------------------------------------------------------
# 2. Loading, saving, (Q)LoRA
# --------------------------------------------------------------------------------------------------
def load_model(path, quantize="none", dtype=torch.float32, device="cpu", attn_implementation="sdpa",
               gradient_checkpointing=False):
    """A saved VideoLLM (or a PEFT adapter of one) + its processor, from a folder or hub name.

    quantize: "none" or "nf4" (QLoRA, double quant). dtype: of what is not trained; the trained
    weights of an adapter are float32 always. gradient_checkpointing: layers keep only their input
    and compute again in the backward pass.

    NF4 on a CPU: with AVX512-BF16, bitsandbytes repacks the weights at the first forward without
    gradients (any rollout) and later backward passes run through a kernel without autograd: the
    loss still falls, the LoRA gradient is wrong. Switching that kernel off on every layer cures it;
    tests/test_quantize.py compares the gradient after a rollout with that of the dequantised
    weights."""
    if not (find(path, "config.json") or find(path, "adapter_config.json")) or (
            Path(path).is_dir() and not list(Path(path).glob("*.safetensors"))):
        raise FileNotFoundError(f"{path}: no model there (config.json or safetensors missing; "
                                "pickles are not read)")
    if adapter := find(path, "adapter_config.json"):
        config = json.loads(Path(adapter).read_bytes())
        model, processor = load_model(config["base_model_name_or_path"], quantize, dtype, device,
                                      attn_implementation, gradient_checkpointing)
        whole = config["modules_to_save"] or []
        if "score_head" in whole:
            add_scalar_head(model)  # the base is an SFT model, its head comes with the adapter
        for name in whole:
            model.get_submodule(name).float()
        # imported here and below: it takes seconds and loads bitsandbytes; only LoRA needs it
        from peft import PeftModel

        return PeftModel.from_pretrained(model, path, is_trainable=True), processor
    load = dict(dtype=dtype, attn_implementation=attn_implementation)
    if quantize == "none":
        model = VideoLLM.from_pretrained(path, **load).to(device)
    else:
        load["dtype"] = dtype = torch.bfloat16 if str(device).startswith("cuda") else dtype
        whole = ["vision_tower", "qformer", "projection", "lm_head", "score_head"]
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                 bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
                                 llm_int8_skip_modules=whole)
        model = VideoLLM.from_pretrained(path, quantization_config=nf4, device_map={"": device},
                                         **load)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.vision_tower.requires_grad_(False)  # CLIP stays frozen in all three papers
    return model, VideoLLMProcessor.from_pretrained(path)


def add_lora(model, r, alpha, train_bridge=False):
    """LoRA on every linear layer of the decoder; train_bridge: Q-Former, projection too. A scalar
    head is trained as a whole. VLM-RLAIF: r=32, alpha=32 in SFT, r=64, alpha=16 in reward model and
    PPO."""
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    whole = ["qformer", "projection"] * train_bridge + ["score_head"] * model.config.scalar_head
    for name in whole:
        model.get_submodule(name).float()  # as the adapters: steps of 1e-5 are lost in bfloat16
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, bias="none",
                        modules_to_save=whole or None)
    return get_peft_model(model, config)


@contextmanager
def unpacked(model, when=True):
    """Unpack the NF4 weights once for a whole rollout instead of at every token: the same numbers.
    Where a GPU has no room for them they stay packed."""
    layers = []
    if when:
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit

        layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    if layers and layers[0].weight.is_cuda:
        size = sum(m.in_features * m.out_features * m.compute_dtype.itemsize for m in layers)
        if size > 0.8 * torch.cuda.mem_get_info()[0]:  # the keys and values need room, too
            layers = []
    for m in layers:
        weight = dequantize_4bit(m.weight.data, m.weight.quant_state).to(m.compute_dtype)
        linear = lambda x, w, m: nn.functional.linear(x.to(w.dtype), w, m.bias).to(x.dtype)
        m.forward = functools.partial(linear, w=weight, m=m)
    try:
        yield
    finally:
        for m in layers:
            del m.forward


def add_scalar_head(model):
    """Give a VideoLLM a scalar head, in place; one that is there stays. Zero: every answer scores 0
    at the start."""
    if not model.config.scalar_head:
        model.score_head = ScalarHead(model.config.text_config.hidden_size, 1, device=model.device)
        nn.init.zeros_(model.score_head.weight)
        nn.init.zeros_(model.score_head.bias)
        model.config.scalar_head = True
    return model


def merged(adapter):
    """The whole model out of an adapter folder: unquantised base + adapter, merged in float32, in
    the base's dtype."""
    about = json.loads(Path(find(adapter, "adapter_config.json")).read_bytes())
    dtype = AutoConfig.from_pretrained(about["base_model_name_or_path"]).dtype
    return load_model(adapter)[0].merge_and_unload().to(dtype)


def save_model(model, processor, path, state_dict=None):
    """Whole model as safetensors, or a plain PEFT adapter where there is one; the processor beside
    either."""
    # gathered from shares, the head is a copy
    if state_dict and unwrap(model).config.tie_word_embeddings:
        state_dict = {n: w for n, w in state_dict.items() if not n.endswith("lm_head.weight")}
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
    """Makes context managers for the frozen start: `with ref() as ref_model`. LoRA: the same
    weights, adapter off; else a copy, which `place` may spread over processes."""
    frozen = None
    if not has_adapter(model):
        frozen = place(copy.deepcopy(model).requires_grad_(False).eval())

    @contextmanager
    def reference():
        with nullcontext() if frozen else model.disable_adapter():
            yield frozen or model
    return reference


# --------------------------------------------------------------------------------------------------
# 3. One prefix, G answers: sampling and scoring
# --------------------------------------------------------------------------------------------------
class Prefix(NamedTuple):
    """B prompts, left padded, and the features of their videos (in order of the rows that have
    one)."""

    input_ids: torch.Tensor  # (B,P)
    attention_mask: torch.Tensor  # (B,P)
    video_features: torch.Tensor | None  # (B,F,S,D)
    frame_mask: torch.Tensor | None  # (B,F)

    @classmethod
    def build(cls, processor, cache, questions, clips, device="cpu", max_length=None,
              num_frames=None):
        """questions: B strings or chats; clips: B Clips, or None where a row has no video."""
        rows = [processor.prompt_ids(q, c is not None, max_length)
                for q, c in zip(questions, clips)]
        videos = [c for c in clips if c is not None]
        features = cache(videos, num_frames) if videos else (None, None)
        return cls(*(x if x is None else x.to(device)
                     for x in (*processor.pad(rows, "left"), *features)))

    def rows(self, which, has_video=None):
        """The same for some rows. has_video (B,): the rows that have one; None: all do."""
        text = self.input_ids[which], self.attention_mask[which]
        if has_video is None:
            return Prefix(*text, self.video_features[which], self.frame_mask[which])
        videos = (has_video.cumsum(0) - 1)[which][has_video[which]]
        if not len(videos):
            return Prefix(*text, None, None)
        return Prefix(*text, self.video_features[videos], self.frame_mask[videos])

    def model_inputs(self):
        return dict(video_features=self.video_features, frame_mask=self.frame_mask)


def mask_kind(model):
    """-> dtype of masks, length of the decoder's sliding window or None."""
    model = unwrap(model)
    return model.dtype, getattr(model.config.text_config, "sliding_window", None)


def uniforms_of(seed, step, picks, G, T):
    """(B,G,T) numbers in [0,1), by which `generate` samples, keyed by seed, step and question:
    neither the number of processes nor an interruption changes an answer."""
    draw = lambda i, n: np.random.default_rng([seed, step, i, n]).random((G, T))
    return torch.from_numpy(np.stack([draw(i, n) for i, n in picks]))


@torch.no_grad()
def generate(model, prefix, uniforms, eos_id, temperature=1.0, cuda_graphs=False):
    """Sample G answers per prompt after *one* prefill. A step appends G tokens to the prompt's row,
    under the mask of `packed`: P + G*T keys and values, not G*(P + T).

    uniforms (B,G,T) in [0,1): one number decides a token (inverse of the cumulated probabilities).
    If they are keyed by (seed, step, question), answers depend neither on the number of processes
    nor on interruptions (`uniforms_of`). temperature 0 is greedy. cuda_graphs: model/packing.py.

    -> tokens (B,G,T'), T' <= T, after EOS: EOS; lengths (B,G) with EOS; logprobs (B,G) of whole
    answers. Finished answers leave the row and finished groups the batch.
    """
    B, G, T = uniforms.shape
    new = lambda fill, *shape, **kw: torch.full(shape, fill, device=prefix.input_ids.device, **kw)
    tokens, lengths, logprobs = new(eos_id, B, G, T), new(0, B, G), new(0.0, B, G)
    row = row_of(model, prefix, mask_kind(model), G, T, cuda_graphs)
    logits = row.read(prefix).expand(B, G, -1)
    rows = torch.arange(B, device=tokens.device)  # (b,) the groups that still run
    who = torch.arange(G, device=tokens.device).expand(B, G)  # (b,A) their answers, some finished
    uniforms, runs = uniforms.to(tokens.device, torch.float64), new(True, B, G)
    for t in range(T):
        at = rows[:, None], who
        all_logprobs = (logits.float() / (temperature or 1)).log_softmax(-1)  # (b,A,V)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            cdf = all_logprobs.double().exp().cumsum(-1)
            # the first token whose cumulated probability exceeds u: never one of probability 0
            u = uniforms[(*at, t)].unsqueeze(-1) * cdf[..., -1:]
            token = torch.searchsorted(cdf, u, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)
        token = torch.where(runs, token, eos_id)
        tokens[(*at, t)] = token
        logprobs[at] += all_logprobs.gather(-1, token[..., None])[..., 0] * runs
        lengths[at] += runs
        runs = runs & (token != eos_id)
        if unwrap(model).all_done(~runs) or t == T - 1:
            break
        # Under FSDP a process that has finished keeps running its last rows until all have.
        stay = runs.any(-1) | ~runs.any()
        if 1 - stay.float().mean() > row.most_idle:
            row.select(stay)
            rows, who, runs, token = (x[stay] for x in (rows, who, runs, token))
        if not cuda_graphs:
            most = int(runs.sum(-1).max()) or 1
            order = runs.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]
            who, runs, token = (x.gather(1, order) for x in (who, runs, token))
        logits = row.append(token, who)
    return tokens[..., : t + 1], lengths, logprobs


def answer(model, processor, cache, records, max_new_tokens=48, batch_size=100, return_ended=False,
           num_frames=None, budget=2**17):
    """Greedy answers to the questions of `records`, in order: list of strings. return_ended: also a
    list of bools, False where an answer was cut at `max_new_tokens` instead of ending with EOS.
    budget: patches of videos that a batch may hold, 4 videos of 50 frames at 577 patches."""
    device, eos = next(model.parameters()).device, processor.tokenizer.eos_token_id
    out, ended = [], []
    if records:
        frames, patches, _ = cache.one(records[0]["clip"], num_frames).shape
        batch_size = max(1, min(batch_size, budget // (frames * patches)))
    for i in range(0, len(records), batch_size):
        some = records[i : i + batch_size]
        prefix = Prefix.build(processor, cache, [r["question"] for r in some],
                              [r["clip"] for r in some], device, num_frames=num_frames)
        tokens, lengths, _ = generate(model, prefix, torch.zeros(len(some), 1, max_new_tokens), eos,
                                      temperature=0)
        out += [group[0] for group in processor.decode_answers(tokens, lengths)]
        ended += (tokens.gather(-1, lengths.unsqueeze(-1) - 1) == eos).flatten().tolist()
    return (out, ended) if return_ended else out


def packed(model, prefix, tokens, lengths, before=True, **kwargs):
    """Forward pass of tokens (B,G,T): the answers of a group packed after one prefix.

        prefix  a1 a1 a1  a2  a3 a3 ...     one row of P + sum of lengths, not G rows of P + T

    An answer's token sees the prefix and its own past, never another answer; its positions follow
    the prefix. So each answer gets what a forward pass of its own would give (tests: 1e-5 in values
    and gradients), but video and question pass the Q-Former and the decoder once per group.

    -> out (B,1+A,..) at the last prefix token and all answer tokens (logits are computed nowhere
    else), and index (B,G*T): the column of `out` for each answer token. before=True: the column
    that predicts it; the last prefix token predicts every answer's first one.
    """
    (B, G, T), mask = tokens.shape, prefix.attention_mask
    new = dict(device=tokens.device)
    step = torch.arange(T, **new)  # (T,)
    real = step < lengths.unsqueeze(-1)  # (B,G,T)
    asked, answered = mask.sum(-1, keepdim=True), lengths.sum(-1, keepdim=True)  # (B,1) tokens
    W, A = (asked + answered).max().item(), answered.max().item()  # of a row, of its answers
    start = W - answered  # (B,1) column of the first answer: rows are padded on the left
    column = start.unsqueeze(-1) + (lengths.cumsum(-1) - lengths).unsqueeze(-1) + step  # (B,G,T)
    # (B,P+G*T) the column of every token, W for padding
    columns = torch.cat([torch.where(mask.bool(), start - asked + positions(mask), W),
                         torch.where(real, column, W).flatten(1)], 1)

    def row(of_prefix, of_answers, fill):  # (B,P), (B,G,T) or smaller -> (B,W)
        both = torch.cat([of_prefix.expand(mask.shape), of_answers.expand(B, G, T).flatten(1)], 1)
        return torch.full((B, W + 1), fill, **new).scatter(1, columns, both)[:, :W]

    owner = row(torch.full((1, 1), -1, **new), torch.arange(G, **new)[:, None], -2)
    place = row(positions(mask), asked.unsqueeze(-1) + step, 0)
    kind = mask_kind(model)
    causal = not kind[1] and bool((owner[:, 0] == -1).all())  # nothing is padded
    out = model(input_ids=row(prefix.input_ids, tokens, int(tokens[0, 0, 0])), position_ids=place,
                attention_mask=block_mask(owner, place, torch.arange(W, **new), *kind),
                use_cache=False, logits_to_keep=1 + A, prefix=(W - A, causal),
                **prefix.model_inputs(), **kwargs).logits
    if before:
        column = torch.where(step > 0, column, start.unsqueeze(-1)) - 1
    return out, torch.where(real, column - (W - 1 - A), 0).flatten(1)


def token_logprobs(model, prefix, tokens, lengths, temperature=1.0, entropy="none"):
    """log pi(token) and entropy of every answer token: (N,T), (N,T), row b*G + g; zero after an
    answer's end. entropy: "none" (-> None), "value", or "grad" where it is in a loss: its gradient
    doubles the bytes per logit.

    The one place that knows the causal shift and the sampling temperature: behaviour, reference and
    new policy all come through here."""
    T = tokens.shape[-1]
    out, index = packed(model, prefix, tokens, lengths)
    logprobs = (out.float() / temperature).log_softmax(-1)  # (B,1+A,V)
    of_token = index * logprobs.shape[-1] + tokens.flatten(1)  # (B,G*T)
    chosen = logprobs.flatten(1).gather(1, of_token).view(-1, T)
    mask = answer_mask(lengths, T)
    if entropy == "none":
        return chosen * mask, None
    with torch.set_grad_enabled(entropy == "grad" and torch.is_grad_enabled()):
        H = -(logprobs.exp() * logprobs).sum(-1).gather(1, index).view(-1, T)
    return chosen * mask, H * mask


def token_scores(model, prefix, tokens, lengths, before=False):
    """The scalar head's value (N,T) at every answer token, row b*G + g; zero after an answer's end.

    A reward stands at an answer's last token (lengths - 1, its EOS). before=True: read where token
    t is predicted, that is V(s_t) of PPO, which has not seen the token."""
    T = tokens.shape[-1]
    out, index = packed(model, prefix, tokens, lengths, before, scores=True)
    return out[..., 0].gather(1, index).view(-1, T) * answer_mask(lengths, T)


@torch.no_grad()
def reply_logprobs(model, processor, cache, groups, budget):
    """log P(reply | video, head, text), summed over the reply's tokens, for all replies of all
    groups. A group is (video, head, [(text, reply), ...]), everything but the video in ids.

    A group is one row: its video, its head and what its texts begin with are computed once
    (model/packing.py, Tree). A batch has at most `budget` tokens; a longer group is cut in two.
    """
    device, pad_id = next(model.parameters()).device, processor.tokenizer.pad_token_id
    rows = [(video, head, tree) for video, head, texts in groups
            for tree in trees(texts, budget - len(head))]
    lengths, out = torch.tensor([len(head) + len(tree.ids) for _, head, tree in rows]), {}
    for batch in batches(lengths, budget, stretch=1.25):
        videos, heads, batch_trees = zip(*(rows[i] for i in batch))
        features, frame_mask = (x.to(device) for x in cache(videos))
        inputs, (row, column, token) = tree_rows(heads, batch_trees, pad_id, *mask_kind(model),
                                                 device)
        logits = model(**inputs, video_features=features, frame_mask=frame_mask).logits
        logprobs = logits[row, column, token].float()
        logprobs -= logits.float().logsumexp(-1)[row, column]
        counts = [len(reply) for tree in batch_trees for _, reply in tree.texts]
        sums = iter([part.sum().item() for part in logprobs.cpu().split(counts)])
        for i, tree in zip(batch, batch_trees):
            out[i] = [next(sums) for _ in tree.texts]
    return torch.tensor([x for i in range(len(rows)) for x in out[i]])


def answer_mask(lengths, T):
    """(B,G) lengths -> (N,T) float mask, 1 on answer tokens including EOS."""
    return (torch.arange(T, device=lengths.device) < lengths.reshape(-1, 1)).float()
