"""Two processes are the same run as one: same questions, same answers, same means, same weights to
rounding."""

import json
import shutil

import pytest
from inside import apart, main_of

TRAIN = ["--data", "data/moving_shapes/train.json", "--steps", "3"]
GRPO = ["grpo_rank.py", *TRAIN, "--oracle", "reference", "--prompts_per_step", "8", "--G", "3",
        "--max_new_tokens", "6",
        "--eval_questions", "7", "--eval_steps", "1", "--beta", "0.1", "--inner_epochs", "2",
        "--entropy_coef", "0.01",
        "--tokens_per_micro_batch", "100"]
SFT = ["sft.py", *TRAIN, "--batch_size", "8", "--judge_share", "0.5", "--tokens_per_micro_batch",
       "300"]


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


@pytest.mark.parametrize("command, folder", [
    pytest.param([*GRPO, "--advantage", "random"], "runs/grpo_rank/{}_s0", id="grpo_rank"),
    pytest.param(SFT, "runs/sft/{}_s0", id="sft")])
def test_two_processes_equal_one(world, policy, forked, monkeypatch, command, folder):
    main_of(monkeypatch, world, *command, "--name", "one")
    # other micro-batches as well: neither may show
    other = {"--tokens_per_micro_batch": "170"}
    flags = [other.get(last, f) for last, f in zip(["", *command], command)]
    assert forked.run(world, *flags, "--name", "two", world=2) == [0, 0], (
        forked.said() + forked.said(1)
    )
    one, two = (world / folder.format(name) for name in ("one", "two"))
    about = [json.loads((f / "args.json").read_text()) for f in (one, two)]
    assert [a["world_size"] for a in about] == [1, 2]
    size = "prompts_per_step" if "grpo_rank.py" in command else "batch_size"
    # the global batch is what the flag says
    assert about[0]["args"][size] == about[1]["args"][size] == 8
    assert len(rows(one)) == len(rows(two)) in (3, 4)  # the fourth is a last evaluation
    for a, b in zip(rows(one), rows(two)):
        assert a.keys() == b.keys() and (len(a) > 5 or a["step"] == 3)
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5), f"step {a['step']}: {key}"
    start = policy if "grpo_rank.py" in command else one / "base"
    part, name = apart(one / "final", two / "final", start)
    assert part < 0.01, name


def test_benchmarks_of_two_processes_and_of_a_killed_run_equal_one(
    world, policy, forked, monkeypatch
):
    """The same predictions and numbers; what was answered before a kill is not asked again."""
    runs = [world / f"runs/benchmarked/{name}" for name in ("one", "two")]
    for folder in runs:
        shutil.copytree(policy, folder / "final")
    flags = ["--benchmark", "msvd_qa,video_mme", "--limit", "14", "--batch_size", "3"]
    main_of(monkeypatch, world, "evaluate.py", "--checkpoint", runs[0].relative_to(world), *flags)
    two = ["evaluate.py", "--checkpoint", runs[1].relative_to(world), *flags]
    assert forked.run(world, *two, world=2) == [0, 0], forked.said() + forked.said(1)

    def told(folder):
        """Predictions and numbers; the reports name the run and the command."""
        files = [f for f in (folder / "benchmarks").iterdir()
                 if not f.name.startswith(("answers.", "report"))]
        report = json.loads((folder / "benchmarks/report.json").read_text())
        return {f.name: f.read_text() for f in files}, [
            result["benchmarks"] for result in report["results"]
        ]

    one, two = map(told, runs)
    assert len(one[0]) >= 2 and one == two
    # a kill: the second half of the answers is gone, of the last line a part is left
    file = runs[0] / "benchmarks/answers.0.jsonl"
    lines = [line for line in file.read_text().splitlines() if line]
    kept = lines[: len(lines) // 2]
    file.write_text("\n".join(kept) + "\n" + lines[len(kept)][:20])
    main_of(monkeypatch, world, "evaluate.py", "--checkpoint", runs[0].relative_to(world), *flags)
    after = [line for line in file.read_text().splitlines() if line.endswith("}")]
    assert after[: len(kept)] == kept and sorted(after) == sorted(lines) and told(runs[0]) == one
