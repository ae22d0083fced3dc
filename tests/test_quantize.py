"""NF4 on a CPU: the gradient after a rollout, which one of bitsandbytes' kernels gets wrong without
an error.

On a processor without AVX512-BF16 that kernel does not exist and the first test cannot fail; so the
second one claims that the processor has it and looks at the switch itself.
"""

import bitsandbytes.nn.modules as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from inputs.features import FeatureCache
from inputs.records import read_records
from video_llm import Prefix, add_lora, generate, load_model, token_logprobs, unpacked


def quantized(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.Linear4bit)}


@pytest.fixture(scope="module")
def prefix(world, policy, tmp_path_factory):
    records = [r for r in read_records([str(world / "data/moving_shapes/test.json")])[0]
               if len(r["answer"]) < 12][:4]
    cache = FeatureCache(*load_model(policy), tmp_path_factory.mktemp("cache"))
    return Prefix.build(cache.processor, cache, [r["question"] for r in records],
                        [r["clip"] for r in records])


def with_lora(model):
    """LoRA with adapters that are not zero, the same for every model."""
    model, generator = add_lora(model, 8, 16), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    return model


def gradient_after_rollout(model, prefix, eos):
    uniforms = torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(1))
    # without gradients: here the weights get repacked
    tokens, lengths, _ = generate(model, prefix, uniforms, eos)
    logprobs, _ = token_logprobs(model, prefix, tokens, lengths)
    weights = torch.randn(12, 6, generator=torch.Generator().manual_seed(2))[:, : logprobs.shape[1]]
    (logprobs * weights).sum().backward()
    return tokens, {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


def test_the_gradient_after_a_rollout_is_that_of_the_dequantised_weights(policy, prefix):
    model, processor = load_model(policy, "nf4")
    plain, _ = load_model(policy)
    for name, layer in quantized(model).items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.get_submodule(
            name).weight.data = weight.reshape(plain.get_submodule(name).weight.shape).float()
    eos = processor.tokenizer.eos_token_id
    tokens, grads = gradient_after_rollout(with_lora(model), prefix, eos)
    same_tokens, expected = gradient_after_rollout(with_lora(plain), prefix, eos)
    assert torch.equal(tokens, same_tokens)
    # A and B, 7 linear layers, 3 blocks
    assert grads.keys() == expected.keys() and len(grads) == 42
    for name, grad in grads.items():
        cosine = torch.nn.functional.cosine_similarity(
            grad.flatten(), expected[name].flatten(), dim=0
        )
        assert cosine > 0.999, f"{name}: {cosine}"
        assert 0.99 < grad.norm() / expected[name].norm() < 1.01, name


def test_the_kernel_without_gradients_is_switched_off_everywhere(policy, monkeypatch):
    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: True)
    # else bitsandbytes has changed: look again
    assert bnb.Linear4bit(64, 64).support_avx512bf16_for_cpu
    layers = quantized(load_model(policy, "nf4")[0])
    assert len(layers) == 21 and not any(m.support_avx512bf16_for_cpu for m in layers.values())


def test_unpacked_for_a_rollout_the_weights_are_the_same(policy, prefix, monkeypatch):
    """And behind it NF4 again, adapter and gradient included."""
    model, processor = load_model(policy, "nf4")
    model = with_lora(model)
    eos, uniforms = (processor.tokenizer.eos_token_id,
                     torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(1)))
    tokens, _, logprobs = generate(model, prefix, uniforms, eos)
    with unpacked(model):
        monkeypatch.setattr(bnb.bnb, "matmul_4bit",
                            lambda *_, **__: pytest.fail("unpacked once more"))
        again, _, same = generate(model, prefix, uniforms, eos)
        monkeypatch.undo()
    assert torch.equal(again, tokens)
    torch.testing.assert_close(same, logprobs, rtol=0, atol=1e-5)
    assert not any("forward" in vars(m) for m in quantized(model).values())
    calls = []
    hooked = bnb.bnb.matmul_4bit
    monkeypatch.setattr(bnb.bnb, "matmul_4bit", lambda *a, **k: calls.append(1) or hooked(*a, **k))
    gradient_after_rollout(model, prefix, eos)
    assert len(calls) > 21


def test_only_the_decoder_is_quantised(policy):
    model, _ = load_model(policy, "nf4")
    assert all(n.startswith("language_model.model.layers") for n in quantized(model))
    assert all(m.quant_state.quant_type == "nf4" and m.quant_state.nested for m in
               (m.weight for m in quantized(model).values()))
    plain, _ = load_model(policy)
    ours, theirs = model.state_dict(), plain.state_dict()
    for part in ("vision_tower", "qformer", "projection", "language_model.lm_head",
                 "language_model.model.embed"):
        names = [n for n in theirs if n.startswith(part)]
        assert names and all(torch.equal(ours[n], theirs[n]) for n in names)
    assert not any(p.requires_grad
                   for n, p in with_lora(model).named_parameters() if "lora_" not in n)
