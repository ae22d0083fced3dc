"""Moving shapes: a small, seeded world of real video files with exact ground truth. No download, no
GPU.

Run      python embedded_world/moving_shapes.py       # 4,000 clips, half a minute on two cores
         python embedded_world/moving_shapes.py --out data/tiny --clips 200 --seed 1
Picture  python embedded_world/moving_shapes.py --preview docs/moving_shapes.png    # six of them

Every clip is an H.264 file (64x64, 8 frames/s, 10-16 frames) of 1-3 coloured shapes on grey. A
shape has one action for as long as it is visible, and shapes may appear one after another. So a
question can need the order of events, the place, the colour, the number or the direction, and its
answer is known, not annotated.

OUT/videos/<split>/000123.mp4    the clips: pretrain 60 %, train 25 %, val 5 %, test 10 %; no clip
                                 is in two splits
OUT/clips.json                   what each clip shows: shapes, whole narrative, one description per
                                 third of the clip
OUT/<split>.json                 questions, answers and descriptions as LLaVA / Video-ChatGPT
                                 conversations
OUT/benchmarks/                  the test split again, in the files of the public video benchmarks
OUT/args.json                    what the set was made with

Same seed, same set: every clip draws from its own generator keyed by (seed, clip number), so
neither the number of processes nor a killed run changes anything. The set is written aside and
renamed when it is complete.
"""

import csv
import json
import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.flags import Flags, answer_help, flag, parse_args


@dataclass
class Args(Flags):
    out: str = flag("data/moving_shapes", "folder to make")
    clips: int = flag(4000, "number of clips, all splits together", low=1)
    seed: int = flag(0, "seed of the world", low=0)
    preview: str = flag(None,
                        "also draw six clips and some of their questions into this picture file")
    workers: int = flag(os.cpu_count(), "processes that render; the result does not depend on it",
                        low=1)


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import av
import numpy as np
from tqdm import tqdm

# Video-MME's task types, without "OCR Problems": there is no text to read in this world.
TASK_TYPES = ("Action Recognition", "Temporal Perception", "Attribute Perception",
              "Object Recognition", "Counting Problem", "Spatial Perception", "Object Reasoning",
              "Temporal Reasoning", "Action Reasoning", "Information Synopsis")
COLORS = {"red": (225, 45, 45), "green": (45, 190, 75), "blue": (60, 95, 240),
          "yellow": (240, 215, 45)}
SHAPES = ("circle", "square", "triangle")
ACTIONS = ("moves left", "moves right", "moves up", "moves down", "turns", "turns white",
           "stays still")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
SPLITS = {"pretrain": 0.60, "train": 0.25, "val": 0.05, "test": 0.10}
# y points down
DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1),
              "moves down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
NUMBERS = ("zero", "one", "two", "three")
DESCRIBE = "Describe this video in detail"
SIZE, FPS, WHITE = 64, 8, (250, 250, 250)


# --- the scene: what happens in one clip ----------------------------------------------------------


@dataclass
class Shape:
    color: str  # it is called by this colour also after it turned white
    form: str
    action: str
    radius: float  # of the circle around it, in pixels: a turning square stays inside it as well
    appear: int  # first frame in which it is visible; it stays until the end
    order: int  # rank of appearance; 0 for all if they appear together
    start: tuple  # centre (x, y) in its first frame ...
    end: tuple  # ... and in the last frame of the clip
    spin: float  # radians it turns by, until the last frame

    @property
    def name(self):
        return f"{self.color} {self.form}"

    def white_from(self, frames):
        """First white frame: half of the visible time is over."""
        return self.appear + (frames - self.appear) // 2 if self.action == "turns white" else frames

    def progress(self, frames):
        """(F,) 0 when it appears, 1 in the last frame, constant speed in between."""
        return np.clip((np.arange(frames) - self.appear) / (frames - 1 - self.appear), 0, 1)

    def track(self, frames):
        """(F,2) centre of the shape in every frame."""
        return (np.array(self.start) + self.progress(frames)[:, None]
                * (np.array(self.end) - np.array(self.start)))


@dataclass
class Scene:
    frames: int
    background: int  # grey level
    together: bool  # all shapes are there from the first frame on
    shapes: list  # in the order of COLORS


def place(rng, action, radius):
    """A start and an end inside the picture and >= 6 px off both centre lines, so that each has a
    clear quadrant."""
    while True:
        # from the centre of the picture
        offset = rng.uniform(6, SIZE / 2 - radius, 2) * rng.choice([-1, 1], 2)
        moved = offset + rng.uniform(12, 28) * np.array(DIRECTIONS.get(action, (0, 0)))
        if np.all((np.abs(moved) >= 6) & (np.abs(moved) <= SIZE / 2 - radius)):
            return tuple((SIZE / 2 + offset).tolist()), tuple((SIZE / 2 + moved).tolist())


def touch(a, b, frames):
    """Do the circles around two shapes meet in a frame in which both are visible?"""
    gap = np.linalg.norm(a.track(frames) - b.track(frames), axis=1)[max(a.appear, b.appear) :]
    return bool((gap < a.radius + b.radius + 1).any())


def make_scene(seed, index):
    """The scene of clip `index`: one generator per clip, so clips can be made in any order by any
    process."""
    rng = np.random.default_rng([seed, index])
    frames, count = int(rng.integers(10, 17)), int(rng.choice([1, 2, 3], p=[0.25, 0.45, 0.30]))
    colors = sorted(rng.permutation(list(COLORS))[:count].tolist(), key=list(COLORS).index)
    # drawn before the form, so that all actions are equally frequent
    actions = rng.choice(ACTIONS, count).tolist()
    # a turning circle looks still
    forms = [str(rng.choice(SHAPES[1:] if a == "turns" else SHAPES)) for a in actions]
    together = count == 1 or bool(rng.random() >= 0.6)
    slots = ([0.0] * count if together
             else rng.permutation([0.0, *rng.permutation([0.3, 0.6])[: count - 1]]).tolist())
    appear = [round(slot * frames) for slot in slots]
    order = [sorted(set(appear)).index(a) for a in appear]
    radius = rng.uniform(8, 11, count).tolist()
    # 90 to 180 degrees, at most 30 a frame: a square that turned by 45 more per frame would seem to
    # flicker
    spin = [rng.uniform(90, min(180, 30 * (frames - 1 - a))) * rng.choice([-1, 1]) * np.pi / 180
            for a in appear]
    # until no two shapes touch; only the places are drawn again, which keeps the actions balanced
    while True:
        shapes = [Shape(colors[i], forms[i], actions[i], radius[i], appear[i], order[i],
                        *place(rng, actions[i], radius[i]),
                        float(spin[i]) if actions[i] == "turns" else 0.0)
                  for i in range(count)]
        if not any(touch(a, b, frames) for k, a in enumerate(shapes) for b in shapes[:k]):
            return Scene(frames, int(rng.integers(0, 71)), together, shapes)


def render(scene):
    """(F,H,W,3) uint8 frames. Edges are smooth: a pixel is covered by 1/2 minus its distance to the
    outline."""
    video = np.full((scene.frames, SIZE, SIZE, 3), float(scene.background))
    yy, xx = np.mgrid[:SIZE, :SIZE] + 0.5
    for s in scene.shapes:
        x, y = s.track(scene.frames).T[:, :, None, None]  # (F,1,1) each
        angle = (s.spin * s.progress(scene.frames))[:, None, None]
        if s.form == "circle":
            distance = np.hypot(xx - x, yy - y) - s.radius  # (F,H,W), negative inside
        # a polygon is where all its sides say "inside"; side k has its normal at angle + 90 + k *
        # 360/n degrees
        else:
            n = 4 if s.form == "square" else 3
            normals = [angle + np.pi / 2 + 2 * np.pi * k / n for k in range(n)]
            sides = [(xx - x) * np.cos(t) + (yy - y) * np.sin(t) for t in normals]
            distance = np.max(sides, axis=0) - s.radius * np.cos(np.pi / n)
        frame = np.arange(scene.frames)[:, None]
        # (F,1,1,3)
        color = np.where(frame >= s.white_from(scene.frames), WHITE,
                         COLORS[s.color])[:, None, None, :]
        # (F,H,W,1)
        alpha = (np.clip(0.5 - distance, 0, 1) * (frame[:, :, None] >= s.appear))[..., None]
        video += alpha * (color - video)
    return video.round().astype(np.uint8)


def write_video(path, frames):
    """H.264 with one thread and no B-frames: small, and the same bytes on every run."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS,
                                 options={"crf": "18", "preset": "veryfast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


# --- the words: all lower case, punctuation set apart, about 60 different words -------------------


def quadrant(point):
    return (("top " if point[1] < SIZE / 2 else "bottom ")
            + ("left" if point[0] < SIZE / 2 else "right"))


def narrate(scene):
    """The whole clip, one sentence per shape in the order of appearance (shapes are stored in
    colour order)."""
    sentences = []
    for s in sorted(scene.shapes, key=lambda s: s.order):
        when = "" if scene.together else "then " if s.order else "first "
        where = f" to the {quadrant(s.end)}" if quadrant(s.end) != quadrant(s.start) else ""
        sentences.append(f"{when}a {s.name} at the {quadrant(s.start)} {s.action}{where} .")
    return " ".join(sentences)


def third(scene, k):
    """What can be seen in third k of the clip on its own: colour, place and action as they are
    there."""
    # frame f belongs to it if its time does
    low, high = -(-k * scene.frames // 3), -(-(k + 1) * scene.frames // 3)
    sentences = []
    for s in scene.shapes:
        first = max(low, s.appear)
        if high - first < 2:  # one frame is too short to see an action
            continue
        color, action, white = s.color, s.action, s.white_from(scene.frames)
        if action == "turns white" and not first < white < high:  # it does not happen in this third
            color = "white" if white <= first else color
            action = f"is {color}"
        place = quadrant(s.track(scene.frames)[(first + high - 1) // 2])
        sentences.append(f"a {color} {s.form} at the {place} {action} .")
    return " ".join(sentences) or "nothing ."


def ask(scene, rng):
    """About ten (task type, question, answer) of a clip; `rng` picks among the questions that have
    one right answer."""
    shapes, qa = scene.shapes, []
    by_order = sorted(shapes, key=lambda s: s.order)

    def pick(items, count=1):
        """Up to `count` different items, in random order."""
        return [items[i] for i in rng.permutation(len(items))[:count]]

    for s in pick(shapes, 2):
        qa.append(("Action Recognition", f"what does the {s.color} shape do?", s.action))
    if not scene.together:
        pairs = [(f"after the {a.name}", b) for a, b in zip(by_order, by_order[1:])]
        for when, s in pick([("first", by_order[0]), ("last", by_order[-1]), *pairs], 2):
            qa.append(("Temporal Perception", f"which shape appears {when}?", s.name))
        when, s = pick([("first", by_order[0]), ("last", by_order[-1])])[0]
        qa.append(("Temporal Reasoning", f"what does the shape that appears {when} do?", s.action))
    forms = [s.form for s in shapes]
    for s in pick([s for s in shapes if forms.count(s.form) == 1]):
        qa.append(("Attribute Perception", f"what colour is the {s.form}?", s.color))
    for s in pick(shapes):
        qa.append(("Object Recognition", f"what is the {s.color} shape?", s.form))
    form = str(rng.choice(SHAPES))
    movers = [s for s in shapes if s.action in DIRECTIONS]
    counts = {"shapes are there": len(shapes), "shapes move": len(movers),
              f"{form}s are there": forms.count(form)}
    for what, number in pick(list(counts.items()), 2 if len(shapes) == 1 else 1):
        qa.append(("Counting Problem", f"how many {what}?", NUMBERS[number]))
    for s, when in pick([(s, when) for s in shapes for when in ("start", "end")], 2):
        qa.append(("Spatial Perception", f"where is the {s.color} shape at the {when}?",
                   quadrant(getattr(s, when))))
    actions = [s.action for s in shapes]
    for s in pick([s for s in shapes if actions.count(s.action) == 1]):
        qa.append(("Object Reasoning", f"which shape {s.action}?", s.name))
    for s in pick(movers):
        qa.append(("Action Reasoning", f"how would the {s.color} shape get back to where it was?",
                   f"move {OPPOSITE[s.action.split()[1]]}"))
    for s in pick(shapes) if rng.random() < 0.5 or not movers else []:
        side = s.action.split()[1] if s in movers else "none"
        side = {"up": "top", "down": "bottom"}.get(side, side)
        qa.append(("Action Reasoning", f"which side does the {s.color} shape move towards?", side))
    synopsis = " and ".join(f"a {s.name} {s.action}" for s in shapes)
    qa.append(("Information Synopsis", "what happens in the video?", synopsis))
    return sorted(qa, key=lambda row: TASK_TYPES.index(row[0]))


# --- the data set ---------------------------------------------------------------------------------


def split_of(index, clips):
    """The split of a clip by its number: the first 60 % are for pretraining, and so on."""
    bounds = np.round(np.cumsum(list(SPLITS.values())) * clips)
    return list(SPLITS)[int(np.searchsorted(bounds, index, side="right"))]


def make_clip(job):
    """Write one video; return its entry of clips.json and its conversations."""
    out, seed, index, split = job
    scene, ident, video = make_scene(seed, index), f"{index:06d}", f"videos/{split}/{index:06d}.mp4"
    write_video(Path(out) / video, render(scene))
    duration = scene.frames / FPS
    segments = [{"start": round(k * duration / 3, 4), "end": round((k + 1) * duration / 3, 4),
                 "text": third(scene, k)} for k in range(3)]
    clip = {"id": ident, "split": split, "video": video, "frames": scene.frames,
            "duration": duration}
    clip["shapes"] = [{"color": s.color, "shape": s.form, "action": s.action, "order": s.order,
                       "together": scene.together, "start": quadrant(s.start),
                       "end": quadrant(s.end)} for s in scene.shapes]
    clip |= {"narrative": narrate(scene), "segments": segments}
    rows = [(*question, {}) for question in ask(scene, np.random.default_rng([seed, index, 1]))]
    rows += [("Description", DESCRIBE, clip["narrative"], {})]
    rows += [("Description", DESCRIBE, s["text"], {"start": s["start"], "end": s["end"]})
             for s in segments]
    records = [{"id": f"{ident}_{k}", "video": video, "task_type": task, **span,
                "conversations": [{"from": "human", "value": f"<video>\n{question}"},
                                  {"from": "gpt", "value": answer}]}
               for k, (task, question, answer, span) in enumerate(rows)]
    return clip, records


def write_json(path, rows):
    """A JSON list with one record per line: `head` shows records, `json.load` reads it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


# --- the test split once more, in the files of the public benchmarks ------------------------------
# Here a clip is its entry of clips.json, and qa[clip id] are its (task type, question, answer).


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def copy_videos(out, clips, folder, name):
    """Copy the video of each clip to folder/name(clip).mp4."""
    for clip in clips:
        target = folder / f"{name(clip)}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / clip["video"], target)


def write_zero_shot_qa(out, clips, qa, folder):
    """MSVD-QA, MSRVTT-QA and ActivityNet-QA: test_q.json and test_a.json as Video-LLaVA and
    ActivityNet-QA have them, and for the first two test_qa.json as their authors have it, where
    videos are numbers."""
    # ActivityNet-QA's types of answers; 3 is yes/no, which is not asked here
    types = {"Action Recognition": 0, "Action Reasoning": 1, "Temporal Perception": 2,
             "Temporal Reasoning": 2, "Attribute Perception": 4, "Object Recognition": 5,
             "Object Reasoning": 5, "Spatial Perception": 6, "Counting Problem": 7,
             "Information Synopsis": 8}
    names = {  # MSVD calls a clip <source>_<start>_<end>
        "msvd_qa": lambda clip: f"ms{clip['id']}_0_{-(-clip['frames'] // FPS)}",
        "msrvtt_qa": lambda clip: f"video{int(clip['id'])}",
        "activitynet_qa": lambda clip: f"ms{clip['id']}",
    }
    for bench, name in names.items():
        rows = [(c, f"v_{name(c)}_{k}", *row) for c in clips for k, row in enumerate(qa[c["id"]])]
        test_q = [{"video_name": name(c), "question": q, "question_id": key}
                  for c, key, _, q, _ in rows]
        test_a = [{"answer": a, "question_id": key} for _, key, _, _, a in rows]
        test_qa = [{"answer": a, "category_id": len(c["shapes"]), "id": k, "question": q,
                    "video_id": int(c["id"])} for k, (c, _, _, q, a) in enumerate(rows)]
        if bench == "msvd_qa":  # answers of one word, no categories
            keep = [" " not in row["answer"] for row in test_a]
            test_q, test_a, test_qa = ([r for r, k in zip(part, keep) if k]
                                       for part in (test_q, test_a, test_qa))
            test_qa = [{key: value for key, value in row.items() if key != "category_id"}
                       for row in test_qa]
            write_lines(folder / bench / "youtube_mapping.txt",
                        [f"{name(c)} vid{int(c['id'])}" for c in clips])
        # no question marks, types of answers, and files have a v_ that video_name lacks
        if bench == "activitynet_qa":
            test_q = [row | {"question": row["question"].rstrip("?")} for row in test_q]
            test_a = [{"answer": a, "type": types[task], "question_id": key}
                      for _, key, task, _, a in rows]
            copy_videos(out, clips, folder / bench / "videos", lambda clip: f"v_ms{clip['id']}")
        else:
            write_json(folder / bench / "test_qa.json", test_qa)
            copy_videos(out, clips, folder / bench / "videos", name)
        write_json(folder / bench / "test_q.json", test_q)
        write_json(folder / bench / "test_a.json", test_a)


def write_video_chatgpt(out, clips, qa, folder):
    """Video-ChatGPT's benchmark: general questions, questions on the order of events, and pairs of
    questions that one answer fits. The last two need shapes that appear one after another."""
    generic, temporal, consistency = [], [], []
    for clip in clips:
        video = {"video_name": f"v_ms{clip['id']}"}
        generic.append({"Q": DESCRIBE, "A": clip["narrative"], **video})
        for task, question, answer in qa[clip["id"]]:
            files = {"Information Synopsis": generic, "Temporal Perception": temporal,
                     "Temporal Reasoning": temporal}
            files.get(task, []).append({"Q": question, "A": answer, **video})
        if not clip["shapes"][0]["together"]:
            when, choose = ("first", min) if int(clip["id"]) % 2 else ("last", max)
            shape = choose(clip["shapes"], key=lambda s: s["order"])
            ask_color, ask_order = f"{shape['color']} shape", f"shape that appears {when}"
            pair = {"Q1": f"what does the {ask_color} do?", "Q2": f"what does the {ask_order} do?"}
            consistency.append({**pair, "A": shape["action"], **video})
    for name, rows in (("generic", generic), ("temporal", temporal), ("consistency", consistency)):
        write_json(folder / "video_chatgpt" / f"{name}_qa.json", rows)
    copy_videos(out, clips, folder / "video_chatgpt" / "Test_Videos",
                lambda clip: f"v_ms{clip['id']}")


def some_options(clip, answer, rng, count=4):
    """The answer and `count - 1` wrong ones of its kind, in random order; shapes of this clip are
    preferred as wrong ones, and where a kind has too few values, "cannot be seen" is the last."""
    pools = [ACTIONS, QUADRANTS, list(COLORS), NUMBERS, [f"move {way}" for way in OPPOSITE],
             ("left", "right", "top", "bottom", "none"), (*SHAPES, "none"),
             [f"{color} {form}" for color in COLORS for form in SHAPES]]
    pool = next((pool for pool in pools if answer in pool), None)
    if pool is None:  # a synopsis: in a wrong one, one shape does something else
        clauses = [clause.split()[:3] for clause in answer.split(" and ")]
        true = [s["action"] for s in clip["shapes"]]
        acted = [[*true[:k], action, *true[k + 1 :]] for k in range(len(true))
                 for action in ACTIONS]
        pool = [" and ".join(" ".join([*c, a]) for c, a in zip(clauses, actions))
                for actions in acted]
    here = {f"{s['color']} {s['shape']}" for s in clip["shapes"]}
    wrong = sorted((o for o in rng.permutation(pool).tolist() if o != answer),
                   key=lambda option: option not in here)
    return rng.permutation([answer, *[*wrong, "cannot be seen"][: count - 1]]).tolist()


def write_video_mme(out, clips, qa, folder, seed):
    """Video-MME: three multiple-choice questions a video; two videos of three have subtitles."""
    rows = []
    for number, clip in enumerate(clips, 1):
        rng, name = np.random.default_rng([seed, int(clip["id"]), 2]), f"ms{clip['id']}"
        tasks = rng.permutation(sorted({task for task, _, _ in qa[clip["id"]]}))[:3]
        for k, wanted in enumerate(tasks, 1):
            task, question, answer = next(row for row in qa[clip["id"]] if row[0] == wanted)
            options = some_options(clip, answer, rng)
            together = clip["shapes"][0]["together"]
            rows.append({
                "video_id": f"{number:03d}",
                "duration": ("short", "medium", "long")[(clip["frames"] - 9) // 3],
                "domain": ("One Shape", "Two Shapes", "Three Shapes")[len(clip["shapes"]) - 1],
                "sub_category": "Together" if together else "One After Another",
                "url": "", "videoID": name, "question_id": f"{number:03d}-{k}", "task_type": task,
                "question": question,
                "options": [f"{letter}. {option}" for letter, option in zip("ABCD", options)],
                "answer": "ABCD"[options.index(answer)]})
        lines = []
        for k, s in enumerate(clip["segments"], 1):
            start, end = (f"00:00:{int(t):02d},{round(t % 1 * 1000):03d}"
                          for t in (s["start"], s["end"]))
            lines += [str(k), f"{start} --> {end}",
                      f'<font color="white" size=".72c">{s["text"]}</font>', ""]
        if number % 3:
            write_lines(folder / "video_mme" / "subtitle" / f"{name}.srt", lines)
    write_json(folder / "video_mme" / "videomme.json", rows)
    copy_videos(out, clips, folder / "video_mme" / "data", lambda clip: f"ms{clip['id']}")


def write_action_classes(out, clips, folder):
    """UCF101 and HMDB51: the clips with one shape, whose action is the class. HMDB51's split file
    of a class says which clip is for training (1), for the test (2) or unused (0): here those of
    the splits train, test and val."""
    flags, tested = {"train": 1, "test": 2, "val": 0}, []
    for action in ACTIONS:
        # UCF101's and HMDB51's spelling
        camel, snake = action.title().replace(" ", ""), action.replace(" ", "_")
        mine = [c for c in clips if [s["action"] for s in c["shapes"]] == [action]
                and c["split"] in flags]
        test = [c["id"] for c in mine if c["split"] == "test"]
        ucf = {key: f"{camel}/v_{camel}_g{k // 4 + 1:02d}_c{k % 4 + 1:02d}"
               for k, key in enumerate(test)}
        tested += [f"{name}.mp4" for name in ucf.values()]
        copy_videos(out, [c for c in mine if c["id"] in ucf], folder / "ucf101" / "videos",
                    lambda c: ucf[c["id"]])
        lines = [f"ms{c['id']}_{snake}.mp4 {flags[c['split']]} " for c in mine]
        write_lines(folder / "hmdb51" / "testTrainMulti_7030_splits" / f"{snake}_test_split1.txt",
                    lines)
        copy_videos(out, mine, folder / "hmdb51" / "videos" / snake,
                    lambda c: f"ms{c['id']}_{snake}")
    classes = sorted(action.title().replace(" ", "") for action in ACTIONS)
    write_lines(folder / "ucf101" / "classInd.txt",
                [f"{k} {name}" for k, name in enumerate(classes, 1)])
    write_lines(folder / "ucf101" / "testlist01.txt", sorted(tested))


def write_retrieval(out, clips, qa, folder):
    """Text-to-video retrieval: MSRVTT's 1k-A test list (one sentence a video) and all captions of a
    video as VLM-Eval reads them. A clip whose sentence an earlier clip has is left out: nothing
    could tell the two apart."""
    unique = {row[2]: clip for clip in clips[::-1]
              for row in qa[clip["id"]] if row[0] == "Information Synopsis"}
    table, annotations = ["key,vid_key,video_id,sentence"], []
    for k, (synopsis, clip) in enumerate(sorted(unique.items(), key=lambda item: item[1]["id"])):
        number = int(clip["id"])
        table.append(f"ret{k},msr{number},video{number},{synopsis}")
        reverse = " and ".join(synopsis.split(" and ")[::-1])
        what = " and ".join(f"a {s['color']} {s['shape']} that {s['action']}"
                            for s in clip["shapes"])
        captions = list(dict.fromkeys([synopsis, reverse, f"there is {what}", clip["narrative"]]))
        annotations.append({"video_id": f"video{number}", "question": "what happens in the video?",
                            "answer": captions, "image": f"video{number}.mp4",
                            "question_id": f"ret{k}"})
    write_lines(folder / "msrvtt_retrieval" / "MSRVTT_JSFUSION_test.csv", table)
    write_lines(folder / "msrvtt_retrieval" / "captions.json",
                [json.dumps({"annotations": annotations}, indent=1)])
    copy_videos(out, unique.values(), folder / "msrvtt_retrieval" / "videos",
                lambda clip: f"video{int(clip['id'])}")
    # MSVD: a list of test clips and all captions by clip
    name = lambda clip: f"ms{clip['id']}_0_{-(-clip['frames'] // FPS)}"
    captions = {name(unique[a["answer"][0]]): a["answer"] for a in annotations}
    write_lines(folder / "msvd_retrieval" / "test_list.txt", list(captions))
    write_lines(folder / "msvd_retrieval" / "captions.json", [json.dumps(captions, indent=1)])
    copy_videos(out, unique.values(), folder / "msvd_retrieval" / "videos", name)


def write_next_qa(out, clips, qa, folder, seed):
    """NExT-QA: multiple choice with five options, and open-ended, as tables; videos lie in folders
    named by a map."""
    kinds = {"Action Reasoning": "CH", "Temporal Perception": "TN", "Temporal Reasoning": "TC",
             "Counting Problem": "DC", "Spatial Perception": "DL"}
    head, tables = ["video", "frame_count", "width", "height", "question", "answer", "qid",
                    "type"], {}
    video = lambda clip: str(10_000_000 + int(clip["id"]))
    for clip in clips:
        rng = np.random.default_rng([seed, int(clip["id"]), 3])
        for qid, (task, question, answer) in enumerate(qa[clip["id"]]):
            ask = [video(clip), clip["frames"], SIZE, SIZE, question.rstrip("?")]
            kind = kinds.get(task, "DO")
            options = some_options(clip, answer, rng, 5)
            if qid % 2:  # half of the questions each
                tables.setdefault("nextqa",
                                  []).append([*ask, options.index(answer), qid, kind, *options])
            else:
                tables.setdefault("nextoe", []).append([*ask, answer, qid, kind])
    for bench, rows in tables.items():
        (folder / bench).mkdir(parents=True, exist_ok=True)
        with open(folder / bench / "val.csv", "w", newline="") as file:
            csv.writer(file).writerows([head + [f"a{k}" for k in range(5)] * (bench == "nextqa"),
                                        *rows])
        places = {video(clip): f"{int(clip['id']) % 7:04d}/{video(clip)}" for clip in clips}
        write_lines(folder / bench / "map_vid_vidorID.json", [json.dumps(places, indent=1)])
        copy_videos(out, clips, folder / bench / "videos",
                    lambda clip, places=places: places[video(clip)])


def question_answer(record):
    """(task type, question, answer) of a conversation."""
    question, answer = (turn["value"] for turn in record["conversations"])
    return record["task_type"], question.removeprefix("<video>\n"), answer


def write_benchmarks(out, seed):
    """The test split in the files of all benchmarks, from the annotation files of `out`; aside,
    then renamed."""
    clips, aside = json.loads((out / "clips.json").read_text()), out / "benchmarks.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    test = [clip for clip in clips if clip["split"] == "test"]
    qa = {clip["id"]: [] for clip in test}
    for row in json.loads((out / "test.json").read_text()):
        if row["task_type"] in TASK_TYPES:
            qa[row["id"].rpartition("_")[0]].append(question_answer(row))
    write_zero_shot_qa(out, test, qa, aside)
    write_video_chatgpt(out, test, qa, aside)
    write_video_mme(out, test, qa, aside, seed)
    write_action_classes(out, clips, aside)
    write_retrieval(out, test, qa, aside)
    write_next_qa(out, test, qa, aside, seed)
    shutil.rmtree(out / "benchmarks", ignore_errors=True)
    aside.rename(out / "benchmarks")


def build(args):
    """Make the whole set aside, then rename it: `args.out` is complete or not there."""
    out, made_with = Path(args.out), {"clips": args.clips, "seed": args.seed}
    from plumbing import processes  # slow: torch comes with it

    processes.own(out.with_name(f"{out.name}.lock"))
    if out.exists() and any(out.iterdir()):
        found = (json.loads((out / "args.json").read_text()) if (out / "args.json").exists()
                 else "something else")
        if found != made_with:
            sys.exit(f"moving_shapes: {out} holds {found}, not {made_with}; choose another --out "
                     "or remove it")
        if (out / "benchmarks" / "nextqa").exists():
            print(f"moving_shapes: {out} is complete, nothing to do")
        else:
            write_benchmarks(out, args.seed)
            # it was made before there were some of them
            print(f"moving_shapes: {out} has all benchmark files now")
        return
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
    for split in SPLITS:
        (aside / "videos" / split).mkdir(parents=True)
    jobs = [(str(aside), args.seed, i, split_of(i, args.clips)) for i in range(args.clips)]
    with multiprocessing.Pool(args.workers) as pool:
        made = list(tqdm(pool.imap(make_clip, jobs, chunksize=16), "moving_shapes", len(jobs),
                         unit="clip"))
    write_json(aside / "clips.json", [clip for clip, _ in made])
    for split in SPLITS:
        write_json(aside / f"{split}.json",
                   [row for clip, rows in made if clip["split"] == split for row in rows])
    write_benchmarks(aside, args.seed)
    (aside / "args.json").write_text(json.dumps(made_with) + "\n")
    aside.rename(out)


def preview(out, path):
    """Draw six clips of the test split, five frames and three questions each, so that all task
    types are seen."""
    import matplotlib.pyplot as plt

    rows = [(row["id"].split("_")[0], *question_answer(row))
            for row in json.loads((out / "test.json").read_text())]
    clips = [clip
             for clip in json.loads((out / "clips.json").read_text()) if clip["split"] == "test"]
    actions, asked = {"stays still"}, dict.fromkeys(TASK_TYPES, 0)
    figure = plt.figure(figsize=(13, 6.65), dpi=120)
    for number, (count, together) in enumerate([(1, True), (2, False), (2, True), (3, False),
                                                (3, True), (2, False)]):
        # the clip of this kind with the most actions that were not shown yet, then the task types
        # that were shown least
        fits = [c for c in clips if len(c["shapes"]) == count
                and c["shapes"][0]["together"] == together]
        if not fits:  # a small set
            continue
        clip = max(fits,
                   key=lambda c: (len({s["action"] for s in c["shapes"]} - actions), c["frames"]))
        clips.remove(clip)
        actions |= {s["action"] for s in clip["shapes"]}
        axis = figure.add_axes((0.015 + 0.5 * (number % 2), 0.81 - 0.335 * (number // 2), 0.47,
                                0.18))
        with av.open(str(out / clip["video"])) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        times = np.linspace(0, len(frames) - 1, 5).round().astype(int)
        gap = np.full((SIZE, 2, 3), 255, np.uint8)
        strip = [part for t in times for part in (frames[t], gap)][:-1]
        axis.imshow(np.concatenate(strip, axis=1), interpolation="bicubic")
        for k, t in enumerate(times):
            axis.text(k * (SIZE + 2), SIZE + 1.5, f"{t / FPS:.1f} s", color="#8a8f98", fontsize=8,
                      va="top")
        axis.axis("off")
        short = [row for row in rows[::-1] if row[0] == clip["id"] and row[1] in asked
                 and len(row[2] + row[3]) < 68]
        for k in range(3):
            _, task, question, answer = min(short, key=lambda row: asked[row[1]])
            short = [row for row in short if row[1] != task]
            asked[task] += 1
            y, kind = -0.27 - 0.17 * k, {"transform": axis.transAxes, "va": "center"}
            axis.text(0, y, task, color="#8a8f98", fontsize=8.5, **kind)
            axis.text(0.23, y, question, color="#30343b", fontsize=10, **kind)
            axis.text(1, y, answer, color="#0b6e4f", fontsize=10, weight="bold", ha="right", **kind)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(args):
    build(args)
    if args.preview:
        preview(Path(args.out), args.preview)


if __name__ == "__main__":
    main(parse_args(Args))
