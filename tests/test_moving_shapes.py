"""The world must be what its annotations say: they are checked against the pixels of the decoded
videos, and every answer against a second, plain reading of the shapes. Nothing here uses the
module's own way to the answers."""

import csv
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from embedded_world import moving_shapes as ms  # noqa: E402

CLIPS = 60


def load(path):
    return json.loads(Path(path).read_text())


def decode(path):
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "shapes"
    ms.build(ms.Args(out=str(folder), clips=CLIPS, seed=3, workers=2))
    return folder


@pytest.fixture(scope="module")
def clips(out):
    return load(out / "clips.json")


@pytest.fixture(scope="module")
def seen(out, clips):
    """What the pixels of each clip show: {clip id: (F, {color: (F,H,W) mask})}; white is a colour
    too."""
    colors = {**ms.COLORS, "white": ms.WHITE}
    result = {}
    for clip in clips:
        frames = decode(out / clip["video"]).astype(float)
        masks = {c: np.abs(frames - np.array(rgb)).max(-1) < 60 for c, rgb in colors.items()}
        result[clip["id"]] = len(frames), masks
    return result


def centre(mask):
    ys, xs = np.nonzero(mask)
    return np.array([xs.mean() + 0.5, ys.mean() + 0.5])


def place(point):
    return f"{'top' if point[1] < 32 else 'bottom'} {'left' if point[0] < 32 else 'right'}"


def first_frame(mask):
    """First frame in which a colour covers more than compression noise."""
    return int(np.argmax(mask.sum((1, 2)) > 40))


# --- the same set again, whatever happens ---------------------------------------------------------


def test_same_seed_same_set_for_any_number_of_workers(out, tmp_path):
    again = tmp_path / "shapes"
    ms.build(ms.Args(out=str(again), clips=CLIPS, seed=3, workers=1))
    files = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for file in files:
        if file.suffix != ".mp4":
            assert (out / file).read_bytes() == (again / file).read_bytes(), file
        elif file.parts[0] == "videos":
            assert np.array_equal(decode(out / file), decode(again / file)), file


def test_another_seed_is_another_set():
    assert ms.make_scene(0, 5) != ms.make_scene(1, 5)
    assert ms.make_scene(0, 5) != ms.make_scene(0, 6)


def test_killed_run_is_recovered_and_complete_set_is_kept(tmp_path, capsys):
    left = tmp_path / "shapes.tmp" / "videos" / "train"
    left.mkdir(parents=True)
    (left / "999999.mp4").write_bytes(b"half a video")
    args = ms.Args(out=str(tmp_path / "shapes"), clips=8, seed=0, workers=1)
    ms.build(args)
    assert not (tmp_path / "shapes.tmp").exists()
    assert not list((tmp_path / "shapes").rglob("999999.mp4"))
    before = (tmp_path / "shapes" / "clips.json").stat().st_mtime_ns
    ms.build(args)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "shapes" / "clips.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit) as error:
        ms.build(ms.Args(out=str(tmp_path / "shapes"), clips=9, seed=0, workers=1))
    assert "\n" not in str(error.value) and "choose another --out" in str(error.value)


def test_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(SystemExit):
        ms.build(ms.Args(out=str(tmp_path), clips=8, workers=1))
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_splits_share_no_clip(out, clips):
    counts = Counter(clip["split"] for clip in clips)
    assert counts == {"pretrain": 36, "train": 15, "val": 3, "test": 6}
    owner = {clip["video"]: clip["split"] for clip in clips}
    assert len(owner) == CLIPS == len({clip["id"] for clip in clips})
    for split in ms.SPLITS:
        rows = load(out / f"{split}.json")
        assert {owner[row["video"]] for row in rows} == {split}
        assert {row["video"] for row in rows} == {v for v, s in owner.items() if s == split}
        assert len({row["id"] for row in rows}) == len(rows)
        assert all(row["id"].split("_")[0] == Path(row["video"]).stem for row in rows)


# --- annotations against pixels -------------------------------------------------------------------


def test_files_are_h264_with_the_frames_they_should_have(out, clips):
    for clip in clips:
        with av.open(str(out / clip["video"])) as file:
            stream = file.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (64, 64, 8)
            times = [frame.time for frame in file.decode(stream)]
        assert len(times) == clip["frames"] and 10 <= len(times) <= 16
        assert np.allclose(times, np.arange(len(times)) / 8) and clip["duration"] == len(times) / 8


def test_pixels_show_the_annotated_shapes(clips, seen):
    for clip in clips:
        frames, masks = seen[clip["id"]]
        shapes = clip["shapes"]
        present = [c for c in ms.COLORS if (masks[c].sum((1, 2)) > 40).any()]
        # and in the fixed order of colours
        assert present == [s["color"] for s in shapes], clip["id"]
        begins = {s["color"]: first_frame(masks[s["color"]]) for s in shapes}
        assert ([s["order"] for s in shapes]
                == [sorted(set(begins.values())).index(begins[s["color"]]) for s in shapes])
        assert {s["together"] for s in shapes} == {len(set(begins.values())) == 1}
        assert min(begins.values()) == 0 and frames - max(begins.values()) >= 4
        for s in shapes:
            mask, begin = masks[s["color"]], begins[s["color"]]
            visible = [f for f in range(begin, frames) if mask[f].sum() > 40]
            # the colour is there first, then the same place is white
            if s["action"] == "turns white":
                assert visible == list(range(begin, begin + (frames - begin) // 2))
                assert (masks["white"][-1] & mask[begin]).sum() > 0.8 * mask[begin].sum()
            else:
                assert visible == list(range(begin, frames))
            start, end = centre(mask[begin]), centre(mask[visible[-1]])
            assert place(start) == s["start"] and place(end) == s["end"]
            assert (np.abs(np.array([start, end]) - 32) > 4).all()  # no doubt about the quadrant
            dx, dy = end - start
            if s["action"].startswith("moves"):
                way = (("left" if dx < 0 else "right") if abs(dx) > abs(dy)
                       else ("up" if dy < 0 else "down"))
                assert (s["action"] == f"moves {way}" and 11 < max(abs(dx), abs(dy)) < 29
                        and min(abs(dx), abs(dy)) < 1.5)
            else:
                assert np.hypot(dx, dy) < 3
            changes = [(mask[f] ^ mask[begin]).sum() / mask[begin].sum() for f in visible]
            if s["action"] == "turns":
                assert s["shape"] != "circle" and max(changes) > 0.15
            elif s["action"] == "stays still":
                assert max(changes) < 0.15
            ys, xs = np.nonzero(mask[begin])  # how much of its box a shape fills
            fill = len(xs) / ((np.ptp(xs) + 1) * (np.ptp(ys) + 1))
            assert s["shape"] == ("triangle" if fill < 0.66 else "circle" if fill < 0.88
                                  else "square"), clip["id"]


def test_centre_has_its_colour_and_shapes_stay_inside_and_apart(out, clips):
    for clip in clips[::3]:
        scene, frames = ms.make_scene(3, int(clip["id"])), decode(out / clip["video"])
        for s in scene.shapes:
            x, y = s.track(scene.frames)[s.appear]
            assert np.abs(frames[s.appear, int(y), int(x)].astype(int)
                          - ms.COLORS[s.color]).max() < 40
            assert ((s.track(scene.frames) >= s.radius)
                    & (s.track(scene.frames) <= 64 - s.radius)).all()
            for other in scene.shapes:
                gap = np.hypot(*(s.track(scene.frames)
                                 - other.track(scene.frames)).T)[max(s.appear, other.appear) :]
                assert other is s or (gap > s.radius + other.radius).all()


def test_descriptions_say_what_is_seen(out, clips, seen):
    for clip in clips:
        parts, ordered = [], sorted(clip["shapes"], key=lambda s: s["order"])
        for s in ordered:
            when = "" if s["together"] else "then " if s["order"] else "first "
            to = "" if s["start"] == s["end"] else f" to the {s['end']}"
            parts.append(f"{when}a {s['color']} {s['shape']} at the {s['start']} {s['action']}{to} "
                         ".")
        assert clip["narrative"] == " ".join(parts)
        frames, masks = seen[clip["id"]]
        for k, segment in enumerate(clip["segments"]):
            assert segment["start"] == round(k * clip["duration"] / 3, 4)
            assert segment["end"] == round((k + 1) * clip["duration"] / 3, 4)
            inside = [f for f in range(frames) if k * frames <= 3 * f < (k + 1) * frames]
            expected = []
            for s in clip["shapes"]:
                visible = [f for f in inside if f >= first_frame(masks[s["color"]])]
                if len(visible) < 2:
                    continue
                colored = [masks[s["color"]][f].sum() > 40 for f in visible]
                color = s["color"] if any(colored) else "white"
                action = s["action"]
                if action == "turns white":
                    action = "turns white" if any(colored) and not all(colored) else f"is {color}"
                where, near = s["start"], False
                # two white shapes could not be told apart, but they do not move
                if s["action"] != "turns white":
                    middle = centre(masks[color][visible[(len(visible) - 1) // 2]])
                    # on a centre line both sides are right
                    where, near = place(middle), np.abs(middle - 32).min() < 1
                expected.append((f"a {color} {s['shape']} at the ", where, f" {action} .", near))
            text = segment["text"]
            for head, where, tail, near in expected:
                fits = (head in text and tail in text) if near else head + where + tail in text
                assert fits, (clip["id"], k, text)
            assert text.count(" .") == len(expected) > (-1 if k else 0)
    for row in (row for split in ms.SPLITS
                for row in load(out / f"{split}.json") if row["task_type"] == "Description"):
        clip = clips[int(row["id"].split("_")[0])]
        assert row["conversations"][0] == {
            "from": "human",
            "value": "<video>\nDescribe this video in detail",
        }
        texts = {(s["start"], s["end"]): s["text"]
                 for s in clip["segments"]} | {(None, None): clip["narrative"]}
        assert row["conversations"][1]["value"] == texts[row.get("start"), row.get("end")]


# --- answers against a plain reading of the shapes ------------------------------------------------


def read(question, shapes):
    """The answer to a question by reading the list of shapes; None if the question has not exactly
    one answer."""
    numbers = ["zero", "one", "two", "three"]
    apart = not shapes[0]["together"]
    line = sorted(shapes, key=lambda s: s["order"])

    def named(s):
        return s["color"] + " " + s["shape"]

    def of(color):
        (found,) = [s for s in shapes if s["color"] == color]
        return found

    if m := re.fullmatch(r"what does the (\w+) shape do\?", question):
        return of(m[1])["action"]
    if m := re.fullmatch(r"which shape appears (first|last)\?", question):
        return named(line[0 if m[1] == "first" else -1]) if apart else None
    if m := re.fullmatch(r"which shape appears after the (\w+ \w+)\?", question):
        return named(line[[named(s) for s in line].index(m[1]) + 1]) if apart else None
    if m := re.fullmatch(r"what does the shape that appears (first|last) do\?", question):
        return line[0 if m[1] == "first" else -1]["action"] if apart else None
    if m := re.fullmatch(r"what colour is the (\w+)\?", question):
        found = [s for s in shapes if s["shape"] == m[1]]
        return found[0]["color"] if len(found) == 1 else None
    if m := re.fullmatch(r"what is the (\w+) shape\?", question):
        return of(m[1])["shape"]
    if question == "how many shapes are there?":
        return numbers[len(shapes)]
    if question == "how many shapes move?":
        return numbers[len([s for s in shapes if s["action"].startswith("moves ")])]
    if m := re.fullmatch(r"how many (\w+)s are there\?", question):
        return numbers[len([s for s in shapes if s["shape"] == m[1]])]
    if m := re.fullmatch(r"where is the (\w+) shape at the (start|end)\?", question):
        return of(m[1])[m[2]]
    if m := re.fullmatch(r"how would the (\w+) shape get back to where it was\?", question):
        back = {"moves left": "right", "moves right": "left", "moves up": "down",
                "moves down": "up"}
        return "move " + back[of(m[1])["action"]]
    if m := re.fullmatch(r"which side does the (\w+) shape move towards\?", question):
        side = {"moves left": "left", "moves right": "right", "moves up": "top",
                "moves down": "bottom"}
        return side.get(of(m[1])["action"], "none")
    if question == "what happens in the video?":
        return " and ".join("a " + named(s) + " " + s["action"] for s in shapes)
    if m := re.fullmatch(r"which shape (.+)\?", question):
        found = [s for s in shapes if s["action"] == m[1]]
        return named(found[0]) if len(found) == 1 else None
    raise AssertionError(f"a question that this test does not know: {question}")


def test_every_answer_follows_from_the_shapes(out, clips):
    asked = Counter()
    for split in ms.SPLITS:
        for row in load(out / f"{split}.json"):
            if row["task_type"] != "Description":
                human, gpt = row["conversations"]
                assert (human["from"],
                        gpt["from"]) == ("human", "gpt") and human["value"].startswith("<video>\n")
                shapes = clips[int(row["id"].split("_")[0])]["shapes"]
                assert gpt["value"] == read(human["value"].removeprefix("<video>\n"), shapes), row
                asked[row["id"].split("_")[0], row["task_type"]] += 1
    assert {task for _, task in asked} == set(ms.TASK_TYPES)
    assert max(asked.values()) <= 2
    per_clip = Counter(key for key, _ in asked.elements())
    assert (len(per_clip) == CLIPS and min(per_clip.values()) >= 7
            and 8 <= np.mean(list(per_clip.values())) <= 12)


def test_answers_are_balanced():
    """No blind guess does well: over 700 scenes no answer has much more than 45 % of its task
    type."""
    answers, actions, places, forms = defaultdict(Counter), Counter(), Counter(), Counter()
    for index in range(700):
        scene = ms.make_scene(0, index)
        for task, _, answer in ms.ask(scene, np.random.default_rng([0, index, 1])):
            answers[task][answer] += 1
        actions.update(s.action for s in scene.shapes)
        places.update(ms.quadrant(s.start) for s in scene.shapes)
        forms.update(s.form for s in scene.shapes)
    for task, counts in answers.items():
        assert max(counts.values()) / counts.total() < 0.47, (task, counts)
    assert list(answers) and set(actions) == set(ms.ACTIONS) and set(places) == set(ms.QUADRANTS)
    for counts in (actions, places, forms):
        assert max(counts.values()) < 1.5 * min(counts.values()), counts


# --- the files of the public benchmarks -----------------------------------------------------------


def test_zero_shot_qa_files(out, clips):
    for bench, pattern in (("msvd_qa", "{}.mp4"), ("msrvtt_qa", "{}.mp4"),
                           ("activitynet_qa", "v_{}.mp4")):
        folder = out / "benchmarks" / bench
        questions, answers = load(folder / "test_q.json"), load(folder / "test_a.json")
        assert [q["question_id"] for q in questions] == [a["question_id"] for a in answers]
        assert len({q["question_id"] for q in questions}) == len(questions) > 0
        for q, a in zip(questions, answers, strict=True):
            assert set(q) == {"video_name", "question", "question_id"}
            assert (q["question_id"].startswith(f"v_{q['video_name']}_")
                    and not q["video_name"].startswith("v_"))
            video = folder / "videos" / pattern.format(q["video_name"])
            clip = clips[int(re.search(r"\d+", q["video_name"])[0])]
            assert (clip["split"] == "test"
                    and video.read_bytes() == (out / clip["video"]).read_bytes())
            assert a["answer"] == read(q["question"].rstrip("?") + "?", clip["shapes"])
            assert set(a) - {"answer", "question_id"} == (
                {"type"} if bench == "activitynet_qa" else set()
            )
            assert a.get("type", 0) in range(9) and ("?" in q["question"]) == (
                bench != "activitynet_qa"
            )
        if bench != "activitynet_qa":
            rows = load(folder / "test_qa.json")
            extra = {"category_id"} if bench == "msrvtt_qa" else set()
            assert all(set(row) == {"answer", "id", "question", "video_id"} | extra for row in rows)
            pairs = [(row["question"], row["answer"]) for row in rows]
            assert pairs == [(q["question"], a["answer"])
                             for q, a in zip(questions, answers, strict=True)]
            assert all(clips[row["video_id"]]["split"] == "test" for row in rows)
    assert all(" " not in a["answer"] for a in load(out / "benchmarks/msvd_qa/test_a.json"))
    for line in (out / "benchmarks/msvd_qa/youtube_mapping.txt").read_text().splitlines():
        assert re.fullmatch(r"ms(\d{6})_0_2 vid\d+", line)
        assert (out / f"benchmarks/msvd_qa/videos/{line.split()[0]}.mp4").exists()


def test_video_chatgpt_files(out, clips):
    folder = out / "benchmarks" / "video_chatgpt"
    for name in ("generic", "temporal", "consistency"):
        rows = load(folder / f"{name}_qa.json")
        assert rows
        for row in rows:
            questions = ["Q1", "Q2"] if name == "consistency" else ["Q"]
            assert set(row) == {*questions, "A", "video_name"}
            assert (folder / "Test_Videos"
                    / f"{row['video_name']}.mp4").exists() and row["video_name"].startswith("v_")
            clip = clips[int(row["video_name"][4:])]
            for key in questions:
                if row[key] == ms.DESCRIBE:
                    assert row["A"] == clip["narrative"]
                else:
                    assert row["A"] == read(row[key], clip["shapes"])


def test_video_mme_files(out, clips):
    folder = out / "benchmarks" / "video_mme"
    rows = load(folder / "videomme.json")
    keys = ("video_id duration domain sub_category url videoID question_id task_type question "
            "options answer")
    assert all(" ".join(row) == keys for row in rows)
    assert set(Counter(row["videoID"] for row in rows).values()) == {3}  # three questions a video
    letters = Counter()
    for row in rows:
        clip = clips[int(row["videoID"][2:])]
        assert (folder / "data" / f"{row['videoID']}.mp4").exists() and clip["split"] == "test"
        assert row["duration"] in ("short", "medium", "long") and row["task_type"] in ms.TASK_TYPES
        assert row["question_id"] in {f"{row['video_id']}-{k}" for k in (1, 2, 3)}
        assert [o[:3] for o in row["options"]] == ["A. ", "B. ", "C. ", "D. "]
        options = [o[3:] for o in row["options"]]
        assert (len(set(options)) == 4
                and options["ABCD".index(row["answer"])] == read(row["question"], clip["shapes"]))
        letters[row["answer"]] += 1
    assert len(letters) >= 3
    subtitles = list((folder / "subtitle").glob("*.srt"))
    assert len(subtitles) == 4  # two thirds of six
    time = r"\d\d:\d\d:\d\d,\d\d\d"
    for path in subtitles:
        blocks = path.read_text().strip().split("\n\n")
        assert len(blocks) == 3
        for k, block in enumerate(blocks):
            text = re.escape(clips[int(path.stem[2:])]["segments"][k]["text"])
            assert re.fullmatch(rf"{k + 1}\n{time} --> {time}\n<font [^>]*>{text}</font>", block)


def test_wrong_options_are_wrong_and_of_the_same_kind():
    rng = np.random.default_rng(0)
    for index in range(100):
        scene = ms.make_scene(9, index)
        clip = {"shapes": [{"color": s.color, "shape": s.form, "action": s.action}
                           for s in scene.shapes]}
        for _, _, answer in ms.ask(scene, rng):
            options = ms.some_options(clip, answer, rng)
            assert len(set(options)) == 4 and answer in options
            assert len({option.count(" ") == 0 for option in options}) == 1 or answer in ms.ACTIONS


def test_action_class_files(out, clips):
    single = {c["id"]: c for c in clips if len(c["shapes"]) == 1}
    folder = out / "benchmarks" / "ucf101"
    classes = [line.split() for line in (folder / "classInd.txt").read_text().splitlines()]
    assert ([int(k) for k, _ in classes] == list(range(1, 8))
            and "TurnsWhite" in {name for _, name in classes})
    for line in (folder / "testlist01.txt").read_text().splitlines():
        match = re.fullmatch(r"(\w+)/v_(\w+)_g\d\d_c\d\d\.mp4", line)
        assert match[1] == match[2] and match[1] in {name for _, name in classes}
        assert (folder / "videos" / line).exists()
    tested = {c["id"] for c in single.values() if c["split"] == "test"}
    assert len(list((folder / "videos").rglob("*.mp4"))) == len(tested)
    folder = out / "benchmarks" / "hmdb51"
    lists = sorted((folder / "testTrainMulti_7030_splits").iterdir())
    assert len(lists) == 7
    found = {}
    for path in lists:
        name = path.name.removesuffix("_test_split1.txt")
        for line in path.read_text().splitlines():
            file, flag = line.split()
            assert line == f"{file} {flag} " and (folder / "videos" / name / file).exists()
            clip = single[file[2:8]]
            assert clip["shapes"][0]["action"] == name.replace("_", " ")
            assert clip["split"] == {"0": "val", "1": "train", "2": "test"}[flag]
            found[clip["id"]] = flag
    assert {key for key, flag in found.items() if flag == "2"} == tested


def test_retrieval_files(out, clips):
    folder = out / "benchmarks" / "msrvtt_retrieval"
    with open(folder / "MSRVTT_JSFUSION_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["key", "vid_key", "video_id", "sentence"]
    assert len({row["sentence"] for row in rows}) == len(rows)
    annotations = load(folder / "captions.json")["annotations"]
    for row, note in zip(rows, annotations, strict=True):
        clip = clips[int(row["video_id"].removeprefix("video"))]
        assert (
            row["sentence"]
            == note["answer"][0]
            == read("what happens in the video?", clip["shapes"])
        )
        assert set(note) == {"video_id", "question", "answer", "image", "question_id"}
        assert note["video_id"] == row["video_id"] and (folder / "videos" / note["image"]).exists()
        assert len(note["answer"]) == len(set(note["answer"])) >= 3 and clip["split"] == "test"


def test_preview_is_drawn(out, tmp_path):
    ms.preview(out, tmp_path / "docs" / "picture.png")
    assert (tmp_path / "docs" / "picture.png").stat().st_size > 20_000
