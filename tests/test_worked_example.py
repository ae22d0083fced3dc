"""The worked example of the README, line by line: a folder of MP4 files and three JSON files become
a tuned model."""

import json
import re
import shlex
import shutil

import pytest
from conftest import REPO
from inside import main_of
from test_api_oracle import server  # noqa: F401 - a fixture
from test_paid_oracle import usable

from plumbing.flags import WEIGHTS

SECTION = (REPO
           / "README.md").read_text().split("## Your own videos and model")[1].split("\n## ")[0]
# in place of the preset's
PARTS = f"--clip {WEIGHTS}/clip --qformer {WEIGHTS}/qformer --llm {WEIGHTS}/llm"
SHORT = {"sft.py": [*PARTS.split(), *"--steps 3 --batch_size 4".split(),
                    *"--tokens_per_micro_batch 600".split(),
                    *"--num_frames 4 --lr 1e-3".split()],
         "grpo_rank.py": "--steps 2 --epochs 0 --prompts_per_step 2 --G 3 --max_new_tokens 16 "
                         "--api_frames 1 "
                         "--api_size 32 --eval_questions 4".split()}


@pytest.fixture
def example(world, tmp_path):
    """The README's files, with as many records as there are videos of the names that stand
    there."""
    labelled, unlabelled = (json.loads(block)
                            for block in re.findall(r"^```json\n(.*?)^```", SECTION, re.M | re.S))
    videos = sorted((world / "data/moving_shapes").rglob("*.mp4"))[:12]
    (tmp_path / "videos").mkdir()
    files = {"labelled": labelled, "questions": unlabelled, "val": labelled}
    for k, (name, (row,)) in enumerate(files.items()):
        rows = []
        for i, video in enumerate(videos[4 * k : 4 * k + 4]):
            rows.append(row | dict(id=f"{name}{i}", video=f"{name}{i}_{row['video']}"))
            shutil.copy(video, tmp_path / "videos" / rows[-1]["video"])
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


# the fixture `server` is imported
def test_from_a_folder_of_videos_to_a_tuned_model(
        example, world, server, monkeypatch):  # noqa: F811
    server.act = usable
    (block,) = re.findall(r"^```bash\n(.*?)^```", SECTION, re.M | re.S)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    lines = [words if words[1] != "-m"
             else [words[0], f"{words[2].replace('.', '/')}.py", *words[3:]]
             for words in lines]
    assert [words[1] for words in lines] == [
        "inputs/check_videos.py",
        "sft.py",
        "grpo_rank.py",
        "evaluate.py",
    ]
    for _, script, *flags in lines:
        flags = [server.url if flag.startswith("http") else flag for flag in flags]
        short = [str(REPO / flag) if flag.startswith(WEIGHTS) else flag
                 for flag in SHORT.get(script, [])]
        try:
            main_of(monkeypatch, example, script, *flags, *short)
        except SystemExit as stop:
            assert not stop.code, f"{script}: {stop.code}"
    final = example / "runs/grpo_rank/mine_s0"
    samples = [json.loads(line) for line in (final / "samples.jsonl").read_text().splitlines()]
    assert {s["question"] for s in samples} == {"Where does the tram go?"} and len(server.seen) > 0
    assert ((final / "final/model.safetensors").exists()
            and (final / "adapter/adapter_model.safetensors").exists())
    assert ("GRPO_rank" in (example / "runs/mine.md").read_text()
            and (example / "runs/mine.png").exists())
