"""Preference files of every published shape read the same; broken rows are counted; what is written
is read back."""

import json
import os

import pytest

from inputs.preferences import read_preferences, write_preferences
from inputs.records import Clip, DataError
from oracle import reward_prompt


@pytest.fixture
def one(tmp_path):
    """Reads rows beside a video a.mp4 and a folder f of frames."""
    for name in ("a.mp4", *(f"f/{i:02}.jpg" for i in range(3))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")

    def read(*rows):
        (tmp_path / "x.json").write_text(json.dumps(rows))
        return read_preferences([str(tmp_path / "x.json")])
    return read


ASK, HUMAN = ({"role": "user", "content": "<video>\nwhat?"},
              {"from": "human", "value": "<image>\nwhat?"})
GPT, SAY = (lambda v: {"from": "gpt", "value": v}), (lambda v: {"role": "assistant", "content": v})
FRAMES = [f"f/{i:02}.jpg" for i in range(3)]


def rlaif(preference, **more):
    """A row as the VLM-RLAIF and LLaVA-RLHF files have it; the last turn is a place holder."""
    outputs = dict(output_1=GPT("a cat"), output_2=GPT("a dog"))
    asked = {"id": "7", "video": "a.mp4", "conversations": [HUMAN, GPT("\n")]}
    return asked | outputs | {"preference": preference} | more


@pytest.mark.parametrize(
    "row",
    [
        rlaif(1),
        rlaif(2, output_1=GPT("a dog"), output_2=GPT("a cat")),
        rlaif(1, output_1="a cat", output_2="a dog"),
        rlaif(1, conversations=[HUMAN]),
        rlaif(
            1,
            conversations=[HUMAN, GPT("a place holder that is read by nobody")],
            hallucination=True,
        ),
        {"prompt": "what?", "chosen": "a cat", "rejected": "a dog", "video": "a.mp4"},
        {
            "question": "what?",
            "chosen": "a cat",
            "rejected": "a dog",
            "video": "a.mp4",
            "ds_name": "RLAIF-V",
        },
        {
            "prompt": [ASK],
            "chosen": [SAY("a cat")],
            "rejected": [SAY("a dog")],
            "videos": ["a.mp4"],
        },
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": "a.mp4"},
                        {"type": "text", "text": "what?"},
                    ],
                }
            ],
            "chosen": [SAY([{"type": "text", "text": "a cat"}])],
            "rejected": [SAY("a dog")],
        },
        {"chosen": [ASK, SAY("a cat")], "rejected": [ASK, SAY("a dog")], "videos": ["a.mp4"]},
        {"messages": [ASK], "chosen": SAY("a cat"), "rejected": SAY("a dog"), "videos": ["a.mp4"]},
        {"messages": [ASK, SAY("a cat")], "rejected_response": "a dog", "videos": ["a.mp4"]},
        {
            "conversations": [HUMAN],
            "chosen": GPT("a cat"),
            "rejected": GPT("a dog"),
            "video": "a.mp4",
        },
    ],
)
def test_every_shape_gives_the_same_pair(one, tmp_path, row):
    (pair,), report = one(row)
    assert pair["clip"] == Clip(str(tmp_path / "a.mp4")) and not report["skipped"]
    assert ([pair[k] for k in ("question", "chosen", "rejected", "answer")]
            == ["what?", "a cat", "a dog", None])


def test_what_a_row_says_beside_its_pair_counts(one, tmp_path):
    tag = "The <video> tag, not <image>."
    beside = dict(video_start=1, video_end=2, system_prompt="Be brief.", rejected_videos=["a.mp4"],
                  fps=2)
    row = rlaif(1, output_1=tag, **beside)
    (pair,), report = one(row)
    assert (
        pair["clip"] == Clip(str(tmp_path / "a.mp4"), 1, 2)
        and pair["question"] == "Be brief.\nwhat?"
    )
    assert (pair["chosen"], pair["rejected"]) == (tag, "a dog")
    assert list(report["not_understood"]) == ["fps"]
    (pair,), report = one(rlaif(1, output_2={"from": "gpt", "value": "a dog", "video": "b.mp4"}))
    assert list(report["not_understood"]) == ["output_2: video"]


def test_the_preferred_output_is_the_chosen_one(one):
    (first, second), _ = one(rlaif(1), rlaif(2))
    assert ((first["chosen"], first["rejected"]) == ("a cat", "a dog")
            == (second["rejected"], second["chosen"]))
    assert first["id"] == "7" and second["id"] == "7#2"


def test_frames_images_parts_and_text_only(one, tmp_path):
    frames = tuple(str(tmp_path / f) for f in FRAMES)
    listed = {k: v for k, v in rlaif(1, images=FRAMES).items() if k != "video"}
    single = {k: v for k, v in rlaif(1, image=FRAMES[0]).items() if k != "video"}
    text = {"prompt": "what?", "chosen": "a cat", "rejected": "a dog"}
    pairs, report = one(listed, single, rlaif(1, start=1.0, end=2.5), text, rlaif(1, video="f"))
    assert [p["clip"] for p in pairs] == [
        Clip(frames),
        Clip(frames[:1]),
        Clip(str(tmp_path / "a.mp4"), 1.0, 2.5),
        None,
        Clip(str(tmp_path / "f")),
    ]
    assert report["text_only"] == 1


def test_earlier_turns_belong_to_the_question(one):
    turns = [HUMAN, GPT("it is old"), {"from": "human", "value": "why?"}]
    (pair,), _ = one(rlaif(1, conversations=[*turns, GPT("\n")]))
    assert [t["content"] for t in pair["question"]] == ["what?", "it is old", "why?"]
    assert reward_prompt(pair["question"], "A cat sits.")[0]["content"] == "A cat sits.\nwhat?"
    assert reward_prompt(pair["question"], "A cat sits.")[1:] == pair["question"][1:]
    assert (
        reward_prompt("why?", "A cat sits.") == "A cat sits.\nwhy?"
        and reward_prompt("why?") == "why?"
    )


@pytest.mark.parametrize("row, reason", [
    (rlaif(0), "no preference"),
    (rlaif(None), "no preference"),
    (rlaif("1"), "no preference"),
    (rlaif(True), "no preference"),
    (rlaif(1, rejected_videos=["b.mp4"]), "an answer has a video of its own"),
    (rlaif(1, rejected_images=FRAMES), "an answer has a video of its own"),
    (rlaif(1, chosen_video="b.mp4"), "an answer has a video of its own"),
    (rlaif(1, system=3), "system is no text"),
    (rlaif(1, output_2=GPT("a cat")), "no preference"),
    (rlaif(2, output_2=GPT(" ")), "empty text of assistant"),
    (rlaif(1, output_2=None), "answer is no text"),
    (rlaif(1, conversations=[]), "no question"),
    (rlaif(1, conversations=[GPT("\n")]), "user and assistant do not take turns"),
    (rlaif(1, video="b.mp4"), "video missing"),
    (rlaif(1, answer=3), "answer is no text"),
    (rlaif(1, ended=True), "ended does not say true or false of chosen and rejected"),
    (rlaif(1, ended=dict(chosen=1)), "ended does not say true or false of chosen and rejected"),
    ({"prompt": "what?", "chosen": "a cat", "video": "a.mp4"}, "no two answers"),
    ({"chosen": "a cat", "rejected": "a dog", "video": "a.mp4"}, "no question"),
    ("prose", "no JSON object"),
])
def test_broken_rows_are_skipped_and_counted(one, tmp_path, row, reason):
    pairs, report = one(rlaif(1), row)
    assert len(pairs) == 1
    ((why, found),) = report["skipped"].items()
    assert (why == reason and found["count"] == 1
            and f"{tmp_path}/x.json record 2" in found["examples"][0])
    with pytest.raises(DataError, match=reason) as error:
        one(row)
    assert "\n" not in str(error.value) and "x.json" in str(error.value)


@pytest.mark.parametrize("format", ["vlm_rlaif", "trl"])
def test_what_is_written_is_read_back(one, tmp_path, format):
    turns = [HUMAN, GPT("it is old"), {"from": "human", "value": "why?"}]
    rows = [rlaif(1, answer="cat", task_type="Object", narrative="A cat sits.", margin=0.25,
                  ended=dict(chosen=False, rejected=True)),
            rlaif(2, conversations=turns, source="zoo"), rlaif(1, start=0.5, end=1.0),
            {k: v for k, v in rlaif(1, images=FRAMES).items() if k != "video"},
            {"prompt": "text only?", "chosen": "yes", "rejected": "no"}]
    pairs, _ = one(*rows)
    places = [dict(p, place=1 + n % 2) for n, p in enumerate(pairs)]
    for file in (tmp_path / "out.json", tmp_path / "elsewhere" / "deep" / "out.json"):
        write_preferences(file, places, format)
        again, report = read_preferences([str(file)])
        strip = lambda p: {k: v for k, v in p.items() if k != "file"}
        assert [strip(p) for p in again] == [strip(p) for p in pairs] and not report["skipped"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written[0]["video"] == "a.mp4" and not list(tmp_path.rglob("*.tmp"))
    if format == "vlm_rlaif":  # what the released loader asserts: a last turn of gpt, and 1 or 2
        assert all(r["conversations"][-1]["from"] == "gpt" for r in written)
        assert [r["preference"] for r in written] == [1, 2, 1, 2, 1]
        assert [r["output_2"]["value"] for r in written[:2]] == ["a dog", pairs[1]["chosen"]]
    else:
        assert all(set(r) >= {"prompt", "chosen", "rejected"} for r in written)


@pytest.mark.parametrize("format", ["vlm_rlaif", "trl"])
def test_a_video_whose_name_is_no_text(tmp_path, format):
    name = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / name).touch()
    (tmp_path / "x.json").write_text(json.dumps([rlaif(1, video=name)]))
    pairs, _ = read_preferences([str(tmp_path / "x.json")])
    write_preferences(tmp_path / "y.json", pairs, format)
    (again,), _ = read_preferences([str(tmp_path / "y.json")])
    assert again["clip"].path == pairs[0]["clip"].path == str(tmp_path / name)


def test_saying_nothing_can_be_worse(one):
    (pair,), _ = one(rlaif(1, output_2=GPT(" ")))
    assert (pair["chosen"], pair["rejected"]) == ("a cat", "")


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vlm_rlaif or trl"):
        write_preferences(tmp_path / "x.json", [], "csv")
