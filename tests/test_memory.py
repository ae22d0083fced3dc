"""The memory table against what is alive while one step runs."""

import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

import memory  # noqa: E402

LORA = ["--lora_r", "8"]


@pytest.mark.parametrize("flags",
                         [[], LORA, [*LORA, "--dtype", "bfloat16", "--gradient_checkpointing"]],
                         ids=["all weights", "LoRA", "LoRA in bfloat16, layers computed again"])
def test_the_table_meets_the_measured_peak(flags):
    args = memory.flags_of("grpo_rank", "small",
                           ["--tokens_per_micro_batch", "400", "--G", "4", *flags])
    found = memory.table("grpo_rank", args, "small", 1, prompt=24, answer=40, rows=4)
    sampling, update = memory.measure(args, "small", prompt=24, answer=40, rows=4)
    ratios = found["peak while sampling"] / sampling, found["peak of the update"] / update
    print("table / measured: sampling %.3f, update %.3f" % ratios)
    assert all(0.85 < ratio < 1.2 for ratio in ratios), ratios


def test_the_parts_of_seven_billion_parameters(monkeypatch):
    """QLoRA at the published values: by hand."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = memory.flags_of("grpo_rank", "7b", [])
    found = memory.table("grpo_rank", args, "7b", 4, prompt=64, answer=128)
    lora = 64 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert found["adapters"] == found["gradients"] == 4 * lora == found["optimizer"] / 2
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    # and CLIP, Q-Former, words in bfloat16
    assert 0.51 * matrices < found["weights"] < 0.51 * matrices + 2 * 800e6
    assert found["KV cache"] == pytest.approx(
        16 * (64 + 32 + 5 * 128) * 32 * 2 * 4096 * 2 * 33 / 32
    )
    assert found["peak"] < 80 * 2**30  # the papers' GPUs
