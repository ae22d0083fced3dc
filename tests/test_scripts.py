"""Every script end to end in the miniature world, for a few steps, and what it says when something
is wrong."""

import importlib
import json
import os
import random
import shutil
import sys
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import REPO, run
from inside import main_of
from safetensors.torch import load_file
from test_video_llm import lively, plain_logprobs
from transformers import AutoTokenizer, CLIPModel

import grpo_rank
import plumbing.run
import sft
from inputs.records import Clip
from model.compose import compose
from plumbing import embedded, processes
from video_llm import VideoLLM, load_model

Done = namedtuple("Done", "code out err")
TINY = ["--steps", "2", "--data", "data/moving_shapes/train.json"]
SFT = [*TINY, "--batch_size", "4", "--tokens_per_micro_batch", "300"]
GRPO = [*TINY, "--prompts_per_step", "4", "--tokens_per_micro_batch", "90", "--G", "3",
        "--max_new_tokens", "5",
        "--eval_data", ""]
REFERENCE = [*GRPO, "--oracle", "reference"]


FOLDERS = dict(moving_shapes="embedded_world/moving_shapes",
               pretrain_tiny="embedded_world/pretrain_tiny",
               oracle="evaluation/agreement")  # where commands are that stand in no root file


@pytest.fixture
def script(world, policy, monkeypatch, capfd):
    """script("sft", "--steps", "2") -> exit code, standard output, standard error; the folder is
    `world`."""
    # minutes of work that no test needs
    monkeypatch.setattr(embedded, "build_if_missing", lambda path, *rest: (
        Path(path).exists() or pytest.fail(f"would build {path}")))

    def call(name, *flags, cwd=world):
        code = 0
        capfd.readouterr()
        try:
            main_of(monkeypatch, cwd, f"{FOLDERS.get(name, name)}.py", *flags)
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
        return Done(code, *capfd.readouterr())

    return call


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in Path(folder, name).read_text().splitlines()]


def check_run(folder, steps=2, samples=False):
    """The files of a run folder."""
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["steps"] == steps and about["git_commit"] and about["command"]
    assert [row["step"] for row in rows(folder)] == list(range(steps))
    assert all(isinstance(v, int | float) and np.isfinite(v) for row in rows(folder)
               for v in row.values())
    assert list(folder.glob("events.out.tfevents*")) and not list(folder.glob("*.tmp"))
    assert isinstance(load_model(folder / "final")[0], VideoLLM)
    assert not list(folder.rglob("*.bin")) and (folder / "final/model.safetensors").exists()
    if samples:
        for sample in rows(folder, "samples.jsonl"):
            assert (len(sample["answers"]) == len(sample["ranks"]) == len(sample["advantages"])
                    and sample["question"])
    return rows(folder)


def changed(a, b):
    """Names of the weights that differ between two checkpoints."""
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return {name for name in a if not torch.equal(a[name], b[name])}


# --- the embedded world ---------------------------------------------------------------------------
def test_moving_shapes(script, tmp_path):
    assert script("moving_shapes", "--out", "data/ten", "--clips", "20", "--workers", "1",
                  cwd=tmp_path).code == 0
    assert len(json.loads((tmp_path / "data/ten/clips.json").read_text())) == 20
    assert len(list((tmp_path / "data/ten/videos").rglob("*.mp4"))) == 20


def test_pretrain_tiny(script, world, tmp_path):
    hub, flags = (
        tmp_path / "small/hub",
        ["--data", "small", "--steps", "2", "--text_steps", "2", "--batch_size", "8"],
    )
    hub.parent.mkdir()
    for name in ("clips.json", "pretrain.json", "videos"):
        (hub.parent / name).symlink_to(world / "data/moving_shapes" / name)
    assert script("pretrain_tiny", *flags, cwd=tmp_path).code == 0
    assert {p.name for p in hub.iterdir()} == {"args.json", "clip", "llm", "qformer"}
    assert json.loads((hub / "args.json").read_text())["steps"] == 2
    compose(hub / "clip", str(hub / "qformer"), hub / "llm")
    made = (hub / "clip/model.safetensors").stat().st_mtime_ns
    done = script("pretrain_tiny", *flags, cwd=tmp_path)  # what is finished is not done again
    assert (done.out + done.err).count("\n") == 1 and "is there already" in done.out + done.err
    assert (hub / "clip/model.safetensors").stat().st_mtime_ns == made


def test_the_text_tower_is_read_at_the_end_of_a_text():
    """With an end token of id 2 `CLIPModel` would pool at the highest token id, in the middle of
    the sentence."""
    clip = REPO / "embedded_world/weights/clip"
    model = CLIPModel.from_pretrained(clip, dtype=torch.float32).text_model
    tokenizer = AutoTokenizer.from_pretrained(clip)
    ids = tokenizer("a red circle moves left").input_ids + [tokenizer.eos_token_id]
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * 3])
    out = model(input_ids=padded, attention_mask=(padded != tokenizer.pad_token_id).long())
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, len(ids) - 1])


# --- sft ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("curriculum", ["length", "off"])
def test_sft(script, world, curriculum):
    done = script("sft", *SFT, "--name", f"sft_{curriculum}", "--curriculum", curriculum,
                  "--save_steps", "1")
    assert done.code == 0, done.err
    folder = world / f"runs/sft/sft_{curriculum}_s0"
    metrics = check_run(folder)
    assert metrics[0]["losses/sft"] > 1 and metrics[0]["policy/grad_norm"] > 0
    moved = changed(folder / "base", folder / "final")
    assert moved and not any(name.startswith("vision_tower") for name in moved)
    assert {name.split(".")[0] for name in moved} == {"qformer", "projection", "language_model"}


def test_sft_sees_the_labels_of_the_chosen_clips_only(world, policy):
    labelled = json.loads((policy.parent / "labelled_clips.json").read_text())
    assert len(set(labelled)) == 6 and all((world / clip).exists() for clip in labelled)
    metrics = rows(policy.parent)
    assert len(metrics) == 4 and metrics[-1]["losses/sft"] < metrics[0]["losses/sft"]


def test_sft_continued(script, world, policy):
    done = script("sft", *SFT, "--name", "continued", "--model", policy, "--num_clips", "6", "--lr",
                  "1e-4")
    assert done.code == 0, done.err
    metrics = check_run(world / "runs/sft/continued_s0")
    # it starts where the other ended
    assert metrics[0]["losses/sft"] < rows(policy.parent)[0]["losses/sft"] - 1
    ours, theirs = ((p / "labelled_clips.json").read_text()
                    for p in (world / "runs/sft/continued_s0", policy.parent))
    assert ours == theirs  # the same seed labels the same clips


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_sft_with_lora(script, world, policy, quantize):
    name = f"lora_{quantize}"
    done = script("sft", *SFT, "--name", name, "--model", policy, "--lora_r", "4", "--quantize",
                  quantize,
                  "--save_steps", "1")
    assert done.code == 0, done.err
    folder = world / f"runs/sft/{name}_s0"
    check_run(folder)
    assert (folder / "adapter/adapter_model.safetensors").exists()
    assert not (folder / "adapter/model.safetensors").exists()
    moved = changed(policy, folder / "final")  # merged into the unquantised base
    assert {n.split(".")[0] for n in moved} == {"qformer", "projection", "language_model"}
    assert all(n.endswith("proj.weight") for n in moved if n.startswith("language_model"))
    model, _ = load_model(folder / "adapter", quantize)
    assert sum("lora_" in n for n, _ in model.named_parameters()) == 42


def annotate(file, *talks):
    """An annotation file; a talk is (video, question, answer, question, answer, ...)."""
    rows = [dict(video=str(video), conversations=[{"from": who, "value": text} for who, text in zip(
        ["human", "gpt"] * len(turns), (f"<video>\n{turns[0]}", *turns[1:]))])
            for video, *turns in talks]
    file.write_text(json.dumps(rows))
    return file


def test_sft_leaves_out_what_cannot_be_cut_to_fit(script, world, policy):
    """Earlier turns are never cut: the prompt of the second answer is too long, and would end the
    training midway."""
    video = next((world / "data/moving_shapes/videos/train").glob("*.mp4")).relative_to(world)
    file = annotate(world / "long.json",
                    (video, "what moves? " * 50, "one", "which colour?", "red"))
    flags = ["--steps", "1", "--batch_size", "4", "--model", policy, "--max_prompt_tokens", "60"]
    done = script("sft", *flags, "--data", file, "--name", "long")
    assert done.code == 0, done.err
    assert (
        "1 records are used; 0 clips cannot be read, 1 prompts cannot be cut to "
        "--max_prompt_tokens 60"
    ) in done.out
    (world / "nothing.mp4").write_bytes(b"")
    annotate(file, ("nothing.mp4", "what moves?", "one"))
    done = script("sft", *flags, "--data", file, "--name", "nothing")
    said = [line for line in done.err.splitlines() if line.strip()
            and not line.startswith("video features")]
    assert done.code == 1 and len(said) == 1
    assert "long.json: 0 records are used; 1 clips cannot be read" in said[0]


def test_the_world_is_built_for_what_reads_it_alone(monkeypatch, tmp_path):
    def built(**flags):
        """What a run builds or copies before it reads a file, which is missing here."""
        made = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(embedded, "build_if_missing", lambda path, *rest: made.append(path))
        monkeypatch.setattr(sft, "ship_weights", lambda paths, rank: made.extend(
            p for p in paths if p.startswith(sft.WEIGHTS)))
        with pytest.raises(SystemExit):
            sft.main(sft.Args(**flags))
        return made

    clips, parts = (
        f"{sft.WORLD}/clips.json",
        [f"{sft.WEIGHTS}/{part}" for part in ("clip", "qformer", "llm")],
    )
    assert built() == [clips, *parts] and built(model="my_start") == [clips]
    assert built(data="my.json") == parts and built(data="my.json", model="my_start") == []
    assert built(data=f"my.json,{sft.WORLD}/train.json", model="my_start") == [clips]
    # another checkout's
    assert built(data=f"/elsewhere/{sft.WORLD}/train.json", model="my_start") == []
    assert built(data="my.json", clip="c", qformer="32", llm="l") == []
    assert built(data="my.json", clip="c", qformer="32") == parts[2:]


class Words:
    """A processor whose tokens are words."""

    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(ids))

    def answer_ids(self, text):
        return [*text.split(), "EOS"]

    def split_prompt_ids(self, *parts):
        return [part.split() for part in parts]


def test_comparisons_are_of_two_answers_and_within_the_limits():
    long = "blue " * 50
    records = [dict(clip=Clip("a.mp4"), question="which colour?", answer=answer,
                    task_type="Attribute Perception")
               for answer in ("red", "The red.", "red!", long)]
    pools, _ = sft.judge_material(records)
    args = SimpleNamespace(max_prompt_tokens=17, max_answer_tokens=5)
    for seed in range(10):
        make = lambda record, told=(): sft.comparison(
            record, pools, dict(told), random.Random(seed), Words(), args
        )
        head, tail = make(records[0])["question"]
        assert (tail.count("blue") == 5 and "The" not in tail and "red!" not in tail
                and len(tail.split()) == 16)
        assert make(records[0], [("a.mp4", "a narrative")]) is None  # too long together
        assert make(records[3])["answer"] == long  # `encode` cuts what is learned
    same = [records[3], records[3] | {"answer": long + "and green"}]
    assert sft.comparison(records[3], sft.judge_material(same)[0], {}, random.Random(0), Words(),
                          args) is None


# --- grpo_rank ------------------------------------------------------------------------------------
def check_samples(folder, kind):
    """What the samples say about the advantages, whatever the answers were."""
    seen = 0
    for sample in rows(folder, "samples.jsonl"):
        ranks, A, answers = (np.array(sample["ranks"]), np.array(sample["advantages"]),
                             sample["answers"])
        assert len(answers) == 3 and abs(A.sum()) < 2e-3
        if len(set(ranks)) == 1:
            assert (A == 0).all()
        # a better rank is a higher advantage; scaled to standard 1
        elif kind in ("oracle_rank", "score", "random"):
            assert all((A[i] > A[j]) == (ranks[i] < ranks[j]) for i in range(3) for j in range(3))
            assert A.std() == pytest.approx(1, abs=2e-3)
            seen += 1
    return seen


@pytest.mark.parametrize("kind", ["oracle_rank", "published", "signed", "score", "random"])
def test_grpo_rank(script, world, policy, kind):
    before = {p: p.stat().st_mtime_ns for p in policy.iterdir()}
    done = script("grpo_rank", *REFERENCE, "--advantage", kind, "--name", f"grpo_{kind}",
                  "--save_steps", "1",
                  "--beta", "0.1", "--entropy_coef", "0.01")
    assert done.code == 0, done.err
    folder = world / f"runs/grpo_rank/grpo_{kind}_s0"
    metrics = check_run(folder, samples=True)
    assert metrics[0]["objective/kl"] == 0 and metrics[0]["losses/kl_loss"] == 0  # exactly
    assert metrics[1]["objective/kl"] > 0
    assert (metrics[0]["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
            == metrics[0]["policy/clipfrac_high"])
    assert metrics[0]["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert 1 <= metrics[0]["rollout/len"] <= 5 and 0 <= metrics[0]["rollout/eos_rate"] <= 1
    assert metrics[0]["oracle/masked_groups"] == 0 and metrics[0]["policy/entropy"] > 1
    check_samples(folder, kind)
    moved = changed(policy, folder / "final")
    assert {n.split(".")[0] for n in moved} == {"qformer", "projection", "language_model"}
    assert before == {p: p.stat().st_mtime_ns for p in policy.iterdir()}


def test_samples_of_the_control_follow_its_own_ranks(world, script):
    """--advantage random has an order even where the oracle has none: the check of the samples
    bites."""
    folder = world / "runs/grpo_rank/grpo_random_s0"
    if not folder.exists():
        assert script("grpo_rank", *REFERENCE, "--advantage", "random", "--name",
                      "grpo_random").code == 0
    assert check_samples(folder, "random") > 0


def test_grpo_rank_clips_from_the_second_inner_epoch_on(script, world):
    flags = [*REFERENCE, "--advantage", "random", "--inner_epochs", "2", "--lr", "1e-2"]
    done = script("grpo_rank", *flags, "--name", "inner")
    assert done.code == 0, done.err
    first = rows(world / "runs/grpo_rank/inner_s0")[0]
    assert first["policy/approx_kl"] > 1e-4 and first["objective/kl"] > 1e-4


@pytest.mark.parametrize("kind, A", [
    # deltas 0, .3333333, .2075187; minus from their mean .1802840; over their standard deviation
    # .1374386
    ("oracle_rank", [1.311742, -1.113583, -0.198159]),
    ("score", [1.224745, -1.224745, 0.0])])  # 1, -1, 0 over their standard deviation .8164966
def test_the_gradient_of_a_step(world, policy, monkeypatch, kind, A):
    """Against the slow way: scores 3, 1, 2 for three answers, the middle one of three groups not
    ranked, a reference that is not the start. On-policy the gradient is that of the token mean of
    -A log pi + beta (1 - r) log pi - c H.
    """
    seen = {}

    def remember(name):
        function = getattr(grpo_rank, name)

        def call(*args, **kwargs):
            seen[name] = args, function(*args, **kwargs)
            return seen[name][1]
        monkeypatch.setattr(grpo_rank, name, call)

    def stop_there(params, limit):
        seen["grads"] = [p.grad.clone() for p in params]
        sys.exit("enough")

    other = lively(load_model(policy)[0], seed=4).requires_grad_(False)
    remember("generate")
    remember("rank_advantages")
    monkeypatch.setattr("oracle.ReferenceOracle.score", lambda *_: (
        torch.tensor([[3.0, 1, 2]] * 3), torch.tensor([True, False, True])))
    monkeypatch.setattr(plumbing.run, "reference_of",
                        lambda model, place: lambda: nullcontext(other))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop_there)
    flags = ["--prompts_per_step", "3", "--tokens_per_micro_batch", "1", "--temperature", "1.3",
             "--beta", "0.5",
             "--entropy_coef", "0.2", "--max_new_tokens", "6", "--advantage", kind,
             "--name", f"gradient_{kind}"]
    with pytest.raises(SystemExit, match="enough"):
        main_of(monkeypatch, world, "grpo_rank.py", *REFERENCE, *flags)

    (_, prefix, *_), (tokens, lengths, _) = seen["generate"]
    model, _ = load_model(policy)
    logprobs, entropy = plain_logprobs(model, prefix, tokens, lengths, 1.3)
    with torch.no_grad():
        reference, _ = plain_logprobs(other, prefix, tokens, lengths, 1.3)
    if kind == "oracle_rank":
        (_, oracle_ranks, policy_ranks), _ = seen["rank_advantages"]
        assert oracle_ranks.tolist() == [[0, 2, 1]] * 3
        likely = logprobs.sum(-1).view(3, 3).argsort(descending=True)  # most likely first
        assert policy_ranks.gather(1, likely).tolist() == [[0, 1, 2]] * 3
    A = torch.tensor(A).repeat(3)[:, None]
    ratio = (reference - logprobs).exp().detach()
    ranked = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 1])[:, None]
    used = (torch.arange(tokens.shape[-1]) < lengths.view(-1, 1)) * ranked
    loss = ((-A * logprobs + 0.5 * (1 - ratio) * logprobs - 0.2 * entropy)
            * used).sum() / used.sum()
    expected = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert len(expected) == len(seen["grads"])
    ours, theirs = (torch.cat([g.flatten() for g in grads]).double()
                    for grads in (seen["grads"], expected))
    assert theirs.norm() > 0.1 and (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("oracle", ["judge", "context"])
def test_grpo_rank_with_ai_feedback(script, world, policy, oracle):
    done = script("grpo_rank", *GRPO, "--oracle", oracle, "--oracle_model", policy, "--name",
                  oracle)
    assert done.code == 0, done.err
    metrics = check_run(world / f"runs/grpo_rank/{oracle}_s0", samples=True)
    assert 0 < metrics[0]["objective/score"] < 1
    assert bool(list(world.glob("cache/narratives/*/*.txt"))) or oracle == "judge"


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_grpo_rank_with_lora(script, world, policy, quantize):
    name = f"lora_{quantize}"
    done = script("grpo_rank", *REFERENCE, "--advantage", "random", "--name", name, "--lora_r", "4",
                  "--quantize", quantize, "--save_steps", "1")
    assert done.code == 0, done.err
    folder = world / f"runs/grpo_rank/{name}_s0"
    metrics = check_run(folder, samples=True)
    assert metrics[0]["objective/kl"] == 0 < metrics[1]["objective/kl"]
    moved = changed(policy, folder / "final")
    assert moved and all(n.startswith("language_model.") and n.endswith("proj.weight")
                         for n in moved)
    assert (folder / "adapter/adapter_model.safetensors").exists()
    assert not (folder / "adapter/model.safetensors").exists()


def test_grpo_rank_evaluates_and_leaves_the_labelled_clips_out(script, world, policy):
    flags = [*REFERENCE, "--eval_data", "data/moving_shapes/val.json", "--eval_steps", "1",
             "--eval_questions", "5"]
    # SFT found them without it: their paths are spelt differently
    flags += ["--video_root", "./data/moving_shapes"]
    done = script("grpo_rank", *flags, "--name", "with_eval")
    assert done.code == 0, done.err
    folder = world / "runs/grpo_rank/with_eval_s0"
    assert all(0 <= row["eval/accuracy"] <= 1 for row in rows(folder))
    last = rows(folder)[-1]  # the final model is measured behind the last step
    assert last["step"] == len(rows(folder)) - 1 and "losses/kl_loss" not in last
    labelled = set(json.loads((policy.parent / "labelled_clips.json").read_text()))
    asked = {os.path.normpath(sample["video"]) for sample in rows(folder, "samples.jsonl")}
    assert (asked and not asked & labelled
            and "6 of 6 clips labelled in SFT are there and left out" in done.out)


def test_oracle_agreement(script, world, policy):
    done = script("oracle", "--checkpoint", policy, "--oracle_model", policy, "--questions", "4",
                  "--G", "2")
    assert done.code == 0, done.err
    assert "judge" in done.out and "context" in done.out and "4 questions x 2 answers" in done.out


def test_oracle_demo(script, world, policy):
    done = script("oracle", "--demo", "--oracle_model", policy)
    assert done.code == 0, done.err
    table = done.out.split("score (rank)")[1].split("0-5:")
    rows = [[line.split() for line in part.splitlines()[2:7]] for part in table]
    assert (done.out.count("mean rank") == 1
            and table[0].split()[:3] == ["reference", "judge", "context"])
    label = done.out.split("label: ")[1].splitlines()[0]
    # tied with "The <label>."
    assert " ".join(rows[0][4][:2]) == label and rows[0][4][2:] == rows[0][3][-8:]
    assert rows[0][4][2:4] == ["1.00", "(0)"] and len(rows[1][4]) == 2 + 3 * 4
    assert "reward_model" not in done.out and " api" not in done.out


# --- what is wrong is said in one line ------------------------------------------------------------
BAD_FLAGS = {
    "moving_shapes": ["--clips none", "--clip 5", "--clips -5", "--workers 0", "--seed -1"],
    "pretrain_tiny": ["--steps two", "--step 2", "--steps -1", "--batch_size 0", "--lr -1",
                      "--seed x", "--seed -1",
                      "--lr nan", "--lr inf", "--text_steps 0"],
    "sft": ["--steps 0", "--steps", "--stepz 2", "--step 2", "--lr 0",
            "--curriculum easy", "--easy_share 1.5", "--judge_share -1", "--quantize nf4",
            "--lora_r -1", "--pack 0",
            "--quantize int8 --lora_r 4", "--lr zero", "--resume maybe", "--num_clips -1", "stray",
            "--seed 1.5",
            "--max_answer_tokens 0", "--tokens_per_micro_batch 0", "--batch_size 0",
            "--tokens_per_micro_batch -2",
            "--model m --clip c", "--model m --num_frames 4", "--lora_alpha 4",
            "--lora_r 4 --lora_alpha 0",
            "--seed -1", "--name ../x", "--name a/b", "--weight_decay -1", "--lr inf", "--lr nan",
            "--warmup nan"],
    "grpo_rank": ["--G 1", "--G five", "--g 5", "--steps 0", "--advantage best", "--oracle god",
                  "--clip_range 0",
                  "--clip_range 1", "--temperature 0", "--lr -1", "--beta -0.1", "--beta nan",
                  "--quantize nf4",
                  "--lora_r -1", "--prompts_per_step 0", "--prompts_per_rank 8",
                  "--tokens_per_micro_batch 0", "--inner_epochs 0", "--eval_questions -1",
                  "--resume --unknown",
                  "--scale_advantages perhaps", "--beta inf", "--seed -1", "--name ..",
                  "--lora_alpha 4",
                  "--eval_steps 0"],
    "oracle": ["--G 0", "--G one", "--oracle god", "--questions -1", "--checkpoints x",
               "--oracle api",
               "--oracle api --api_url host:1/v1 --api_model m", "--oracle judge,judge",
               "--api_mode best",
               "--api_frames -1", "--api_size 0", "--api_concurrency 0", "--api_timeout 0",
               "--api_retries -1",
               "--api_max_tokens 0", "--demo perhaps",
               "--oracle api --api_url https://me:pw@host --api_model m",
               "--seed -1", "--questions 0"],
    "evaluate": ["--runs", "--runs nowhere", "--run x", "", "--checkpoint nowhere",
                 "--runs a --checkpoint b",
                 "--compare nowhere", "--batch_size 0",
                 "--judge api --runs a"],
    "reward_model": ["--stage both", "--epochs 0", "--epochs nan", "--seed -1", "--lora_alpha 4",
                     "--name a/b"],
    "ppo_rlaif": ["--gamma nan", "--lr inf", "--seed -1", "--lora_alpha 4", "--name .hidden"],
    "dpo_iter_w2s": ["--beta 0", "--beta inf", "--seed -1", "--lora_alpha 4", "--name a/b",
                     "--stage some"],
}

@pytest.mark.parametrize("name, flags", [
    (name, flags) for name, table in BAD_FLAGS.items() for flags in table])
def test_bad_flags_are_one_line_and_exit_code_2(script, tmp_path, name, flags):
    done = script(name, *flags.split(), cwd=tmp_path)
    assert done.code == 2, done
    file = f"{Path(FOLDERS.get(name, name)).name}.py"
    assert done.err.count("\n") == 1 and done.err.startswith(f"{file}: ") and not done.out, done.err
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_processes_share_the_questions_out_evenly(script, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = script("grpo_rank", "--prompts_per_step", "7", cwd=tmp_path)
    assert (done.code, done.err) == (
        2,
        "grpo_rank.py: --prompts_per_step 7 must be a multiple of the 2 processes\n",
    )


def test_a_bad_flag_on_the_command_line(world):
    done = run(world, "grpo_rank.py", "--stepz", "5", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "--stepz" in done.stderr


def test_help_says_what_the_script_is(script, tmp_path):
    for name in ("sft", "grpo_rank", "pretrain_tiny"):
        done = script(name, "--help", cwd=tmp_path)
        module = importlib.import_module(FOLDERS.get(name, name).replace("/", "."))
        assert done.code == 0 and "--steps" in done.out and module.__doc__.split()[0] in done.out


MISSING = [
    ("sft", [*SFT, "--data", "nowhere.json"]), ("sft", [*SFT, "--video_root", "nowhere"]),
    ("sft", [*SFT, "--model", "nowhere"]), ("sft", [*SFT, "--num_clips", "1000"]),
    ("grpo_rank", [*REFERENCE, "--data", "nowhere.json"]),
    ("grpo_rank", [*REFERENCE, "--model", "nowhere"]),
    ("grpo_rank", [*REFERENCE, "--video_root", "nowhere"]),
    ("grpo_rank", [*REFERENCE, "--eval_data", "nowhere.json"]),
    ("grpo_rank", [*REFERENCE, "--prompts_per_step", "4000"]),
]
MISSING += [
    ("sft", [*SFT, "--clip", "nowhere"]), ("sft", [*SFT, "--qformer", "nowhere"]),
    ("sft", [*SFT, "--llm", "nowhere"]),
    ("grpo_rank", [*GRPO, "--oracle", "judge", "--oracle_model", "nowhere"]),
    ("oracle", ["--oracle", "reward_model", "--reward_model", "nowhere"]),
    ("oracle", ["--checkpoint", "nowhere"]), ("oracle", ["--data", "nowhere.json"]),
]


@pytest.mark.parametrize("name, flags", MISSING)
def test_missing_files_are_one_line(script, monkeypatch, name, flags):
    # a name that is no folder: no waiting
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = script(name, *flags,
                  *(["--name", f"missing{random.random()}"] if name != "oracle" else []))
    assert done.code not in (0, None)
    said = [line for line in done.err.splitlines() if not line.startswith("video features")
            and line.strip()]
    assert len(said) == 1, done.err
    assert any(word in said[0] for word in ("nowhere", "1000", "4000"))


@pytest.mark.parametrize("name, flags, folder", [
    ("sft", SFT, "runs/sft/{}_s0"), ("grpo_rank", REFERENCE, "runs/grpo_rank/{}_s0")])
def test_two_runs_into_one_folder_are_refused(script, world, name, flags, folder):
    folder = world / folder.format("busy")
    folder.mkdir(parents=True)
    (folder / "args.json").write_text('{"args": {}}')
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    done = script(name, *flags, "--name", "busy")
    assert (done.code == 1 and done.err.count("\n") == 1 and "in use" in done.err
            and "--resume" in done.err)
    assert (folder / "args.json").read_text() == '{"args": {}}'
    assert {file.name for file in folder.iterdir()} == {"args.json", "lock", "metrics.jsonl"}
    done = script(name, *flags, "--name", "busy", "--resume")  # started with other flags
    assert done.code == 1 and done.err.count("\n") == 1 and "same flags" in done.err


def test_a_mistyped_file_leaves_the_name_free(world, tmp_path, monkeypatch, capfd):
    """Before anything was done there is nothing to lose; and what changes no number may change on
    the way."""
    monkeypatch.chdir(tmp_path)
    args = lambda **flags: sft.Args(name="mine", **flags)
    assert plumbing.run.open_run("runs/sft/mine", args(data="my.jsn"), 0) is None
    processes.unlock()
    assert plumbing.run.open_run("runs/sft/mine", args(data="my.json", tokens_per_micro_batch=8),
                                 0) is None
    saved = json.loads(Path("runs/sft/mine/args.json").read_text())["args"]
    assert saved["data"] == "my.json"
    Path("runs/sft/mine/checkpoint-3").mkdir()
    for flags, said in ((dict(data="other.json", resume=True), "another --data"),
                        (dict(data="my.json"), "in use")):
        processes.unlock()
        with pytest.raises(SystemExit):
            plumbing.run.open_run("runs/sft/mine", args(**flags), 0)
        assert said in capfd.readouterr().err
    processes.unlock()
    resumed = plumbing.run.open_run("runs/sft/mine",
                                    args(data="my.json", tokens_per_micro_batch=4, resume=True), 0)
    assert resumed.name == "checkpoint-3"
    processes.unlock()


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def damaged(world):
    """train.json again, and four videos in it that cannot be read, two questions each."""
    folder, records = (world / "damaged",
                       json.loads((world / "data/moving_shapes/train.json").read_text()))
    folder.mkdir()
    good = next((world / "data/moving_shapes/videos/train").glob("*.mp4"))
    (folder / "broken.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "truncated.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    write_sound(folder / "sound.mp4")
    for video in ("broken", "empty", "truncated", "sound"):
        for question in ("what moves?", "how many shapes are there?"):
            records.append({"id": f"{video} {question}", "video": f"{video}.mp4", "conversations": [
                {"from": "human", "value": f"<video>\n{question}"},
                {"from": "gpt", "value": "one"}]})
    shutil.copytree(world / "data/moving_shapes/videos", folder / "videos")
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("name, flags, folder", [
    ("sft", SFT, "runs/sft/damaged_s0"), ("grpo_rank", REFERENCE, "runs/grpo_rank/damaged_s0")])
def test_unreadable_videos_are_left_out_and_counted(script, world, damaged, name, flags, folder):
    done = script(name, *flags, "--name", "damaged", "--data", damaged / "train.json")
    assert done.code == 0, done.err
    check_run(world / folder)
    said = [line for line in done.out.splitlines() if line.startswith("left out: ")]
    assert len(said) == 4
    assert all(sum(f"{v}.mp4" in line for line in said) == 1
               for v in ("broken", "empty", "truncated", "sound"))
    assert "4 clips cannot be read" in done.out or "4 broken" in done.out
    assert len(json.loads((world / folder / "broken_videos.json").read_text())) == 4
    assert "Traceback" not in done.err and "moov" not in done.err  # nor ffmpeg's own words
    if name == "grpo_rank":
        asked = {sample["video"] for sample in rows(world / folder, "samples.jsonl")}
        assert asked and not any(Path(v).stem in ("broken", "empty", "truncated", "sound")
                                 for v in asked)
