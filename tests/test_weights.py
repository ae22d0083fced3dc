"""The weights that come with the code: whole, small, read as a hub's, and as good as their cards
say."""

import json
import re
import shutil

import pytest
import torch
from conftest import REPO, run
from inside import main_of
from safetensors.torch import load_file

import evaluate
from inputs.features import FeatureCache
from model.compose import compose
from plumbing import embedded
from plumbing.flags import WEIGHTS
from plumbing.questions import count_correct
from video_llm import load_model

SHIPPED = REPO / WEIGHTS
PARTS = ("clip", "qformer", "judge")
CARD = re.compile(r"\| made by \| `python .+` \|\n\| commit \| [0-9a-f]{7,40} \|\n\| data \| .*"
                  r"\| parameters \| ([\d,]+), stored in float16 \|\n\| measured \| .+ \|\n", re.S)


def size(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_they_are_small_and_nothing_but_text_and_safetensors():
    assert {f.name for f in SHIPPED.iterdir()} == {*PARTS, "llm"}
    assert size(SHIPPED) < 6e6 and all(size(SHIPPED / part) < 3e6 for part in PARTS)
    assert ({f.suffix for f in SHIPPED.rglob("*") if f.is_file()}
            <= {".json", ".md", ".safetensors", ".jinja"})


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_finite_half_weights_and_a_card(part):
    weights = load_file(SHIPPED / part / "model.safetensors")
    assert all(w.dtype == torch.float16 and w.isfinite().all() for w in weights.values())
    card = (SHIPPED / part / "README.md").read_text(encoding="utf-8")
    assert int(CARD.search(card)[1].replace(",", "")) == sum(w.numel() for w in weights.values())
    assert not re.search(r"/(home|root|work|tmp)/", card)


def accuracy(folder, world, cache, questions=None):
    """Share of questions of a world's test split that a model answers right."""
    model, processor = load_model(folder)
    records, _ = evaluate.open_questions([f"{world}/test.json"], None)
    records = records[:questions]
    right, asked = count_correct(records, model, processor, FeatureCache(model, processor, cache))
    return right / asked


def test_the_judge_answers_what_it_sees(world, tmp_path):
    """Another preprocessing, prompt or tokenizer than in its training and it would be near chance,
    22 %."""
    assert accuracy(SHIPPED / "judge", world / "data/moving_shapes", tmp_path / "cache", 60) > 0.5


def test_a_start_is_composed_of_the_shipped_parts(tmp_path):
    model, processor = compose(*(str(SHIPPED / part) for part in ("clip", "qformer", "llm")))
    judge, its_processor = load_model(SHIPPED / "judge")
    assert processor.tokenizer.get_vocab() == its_processor.tokenizer.get_vocab()
    assert all(p.dtype == torch.float32 for p in [*model.parameters(), *judge.parameters()])
    mine, its = model.vision_tower.state_dict(), judge.vision_tower.state_dict()
    # CLIP is frozen in sft.py
    assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)


def test_elsewhere_they_are_copied_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedded.ship_weights(["/my/clip", "my/judge"], 0)
    assert not list(tmp_path.iterdir())
    embedded.ship_weights([f"{WEIGHTS}/judge"], 0)
    assert size(tmp_path / WEIGHTS) == size(SHIPPED)
    (tmp_path / WEIGHTS / "mark").write_text("")
    embedded.ship_weights([f"{WEIGHTS}/clip"], 0)
    assert (tmp_path / WEIGHTS / "mark").exists()


@pytest.mark.slow
def test_they_are_made_again_from_nothing(tmp_path, monkeypatch):
    """`make world`: other bits, the same quality."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    hub = "data/moving_shapes/hub"
    run(tmp_path, "embedded_world/moving_shapes.py", timeout=3600)
    run(tmp_path, "embedded_world/pretrain_tiny.py", timeout=3600)
    run(tmp_path, "sft.py", "--name", "oracle", "--clip", f"{hub}/clip", "--qformer",
        f"{hub}/qformer",
        "--llm", f"{hub}/llm", timeout=3600)
    main_of(monkeypatch, tmp_path, "embedded_world/ship.py", "--out", "weights")
    world = tmp_path / "data/moving_shapes"
    ours, shipped = (accuracy(f, world, tmp_path / "cache")
                     for f in (tmp_path / "weights/judge", SHIPPED / "judge"))
    assert abs(ours - shipped) < 0.05 and ours > 0.65
    found = [float(re.search(r"nearest for ([\d.]+)%", (f / "clip/README.md").read_text())[1])
             for f in (tmp_path / "weights", SHIPPED)]
    assert abs(found[0] - found[1]) < 15
    assert json.loads((tmp_path / "weights/judge/config.json").read_text())["dtype"] == "float16"
    shutil.rmtree(tmp_path / "data")
