"""More than one machine: two torchrun agents that meet on loopback; decoders of which each process
keeps a share."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import REPO
from hub import write_clip, write_decoder, write_qformer
from inside import apart, main_of
from safetensors.torch import load_file
from test_ranks import rows

from model.compose import compose
from video_llm import load_model, save_model

TRAIN = ["--data", "data/moving_shapes/train.json", "--steps", "3"]
GRPO = ["grpo_rank.py", *TRAIN, "--oracle", "reference", "--prompts_per_step", "8", "--G", "3",
        "--max_new_tokens", "6",
        "--eval_questions", "6", "--eval_steps", "1", "--beta", "0.1", "--inner_epochs", "2",
        "--tokens_per_micro_batch", "150"]
SFT = ["sft.py", *TRAIN, "--batch_size", "8", "--tokens_per_micro_batch", "300"]


def assert_equal_runs(one, two, start, within):
    """Every logged number, and the weights."""
    assert len(rows(one)) == len(rows(two)) in (3, 4)  # the fourth is a last evaluation
    for a, b in zip(rows(one), rows(two)):
        assert a.keys() == b.keys() and (len(a) > 5 or a["step"] == 3)
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=within, abs=within), (
                f"step {a['step']}: {key}"
            )
    part, name = apart(one / "final", two / "final", start)
    assert part < 0.01, name


def test_two_agents_on_loopback_equal_one_agent_of_two_processes(world, policy, forked):
    """`torchrun --nnodes=2` as on two machines: each agent starts one process, a rendezvous brings
    them together."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=meet",
               f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", str(REPO / GRPO[0]),
               *GRPO[1:],
               "--name", "agents"]
    agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *command], cwd=world,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env=dict(os.environ))
    codes = forked.run(world, "torchrun", *command)
    said = [agent.communicate(timeout=300)[0], forked.said()]
    assert [agent.returncode, *codes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    # rank 0 writes, nobody else
    assert sum("done: runs/grpo_rank/agents_s0/final" in text for text in said) == 1
    assert forked.run(world, *GRPO, "--name", "agent", world=2) == [0, 0], forked.said()
    two, one = (world / f"runs/grpo_rank/{name}_s0" for name in ("agents", "agent"))
    assert json.loads((two / "args.json").read_text())["world_size"] == 2
    assert rows(one) == rows(two)
    a, b = (load_file(f / "final/model.safetensors") for f in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("command, folder", [
    pytest.param([*GRPO, "--lora_r", "4", "--gradient_checkpointing"], "runs/grpo_rank/{}_s0",
                 id="grpo_rank, LoRA"),
    pytest.param(GRPO, "runs/grpo_rank/{}_s0", id="grpo_rank"),
    pytest.param(SFT, "runs/sft/{}_s0", id="sft")])
def test_sharded_equals_whole(world, policy, forked, monkeypatch, command, folder):
    """Losses, sampled answers, evaluations, weights; the checkpoints are those of an unsharded
    run."""
    kind = "lora" if "--lora_r" in command else "full"
    whole, sharded = (world / folder.format(f"{kind}_{name}") for name in ("unsharded", "sharded"))
    main_of(monkeypatch, world, *command, "--name", f"{kind}_unsharded")
    assert forked.run(world, *command, "--name", f"{kind}_sharded", "--shard", world=2) == [0, 0], (
        forked.said()
    )
    assert_equal_runs(whole, sharded, policy if "grpo_rank.py" in command else whole / "base", 1e-5)
    model, _ = load_model(sharded / ("adapter" if kind == "lora" else "final"))
    assert not any(type(p).__name__ == "DTensor" for p in model.parameters())
    files = lambda run_folder: sorted(str(p.relative_to(run_folder)) for p in run_folder.rglob("*")
                                      if p.is_file() and "tfevents" not in p.name)
    assert files(whole) == files(sharded)


def test_shares_of_a_model_train_sample_save_and_load_as_the_whole(forked, tmp_path):
    """Part by part, in two processes: see sharded.py."""
    parts = {"clip": write_clip, "qformer": write_qformer,
             "llm": lambda folder: write_decoder("vicuna", folder)}
    for name, write in parts.items():
        write(tmp_path / name)
    save_model(*compose(*(str(tmp_path / name) for name in parts)), tmp_path / "model")
    codes = forked.run(tmp_path, REPO / "tests/sharded.py", tmp_path / "model", tmp_path, world=2)
    assert codes == [0, 0] and forked.said().count("equal") == 2, forked.said() + forked.said(1)


@pytest.mark.parametrize("flags, told", [
    (["--shard"], "--shard: one process"),
    (["--shard", "--quantize", "nf4", "--lora_r", "4"],
     "--shard: bitsandbytes' 4-bit weights cannot be sharded"),
    (["--dtype", "bfloat16"], "--dtype bfloat16: only with --lora_r"),
    (["--dtype", "half", "--lora_r", "4"], "--dtype half: choose"),
    (["--attn_implementation", "flash_attention_2"],
     "flash_attention_2: choose one of sdpa, eager"),
    (["--preset", "best"], "--preset best: choose one of nothing, paper")])
@pytest.mark.parametrize("script", ["sft.py", "grpo_rank.py"])
def test_what_cannot_be_combined_is_refused_in_one_line(
    monkeypatch, tmp_path, capsys, script, flags, told
):
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, tmp_path, script, *flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and told in said and said.count("\n") == 1


@pytest.mark.parametrize("script, flags, told", [
    ("grpo_rank.py", ["--cuda_graphs"], "--cuda_graphs: there is no GPU here"),
    ("ppo_rlaif.py", ["--cuda_graphs"], "--cuda_graphs: there is no GPU here"),
    ("grpo_rank.py", ["--cuda_graphs", "--shard"], "--cuda_graphs: not with --shard")])
def test_graphs_are_refused_where_there_are_none(
    monkeypatch, tmp_path, capsys, script, flags, told
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main_of(monkeypatch, tmp_path, script, *flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and told in said and said.count("\n") == 1
