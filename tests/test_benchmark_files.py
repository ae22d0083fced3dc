"""Every public shape is read as its makers publish it, and gives the official number; what is
broken is named."""

import json
import re
import sys

import pytest

from evaluation import benchmark_files as bf
from evaluation import prediction_files as pf
from evaluation.judges import ExactJudge, score_rows
from evaluation.report import group_tables, summarise
from inputs.records import DataError
from plumbing.flags import parse_args


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def mean(benchmark, rows, metric, group=None):
    """The number of the report for `metric`, in all rows or in one group (kind, name)."""
    values, _ = score_rows(benchmark, rows, ExactJudge())
    out = summarise(values, rows)
    part = out["metrics"] if group is None else out["groups"][group[0]][group[1]]
    return part[metric]["mean"]


# --- questions ------------------------------------------------------------------------------------
def test_activitynet_files_are_joined_by_id_and_videos_found_with_v(tmp_path):
    put(tmp_path, "activitynet_qa/test_q.json", [
        {"video_name": "abc", "question": "is it red", "question_id": "v_abc_1"},
        {"video_name": "gone", "question": "where", "question_id": "v_gone_1"},
        {"video_name": "abc", "question": "no answer", "question_id": "v_abc_9"}])
    put(tmp_path, "activitynet_qa/test_a.json", [
        {"answer": "home", "type": 6, "question_id": "v_gone_1"},
        {"answer": "yes", "type": 3, "question_id": "v_abc_1"}])
    put(tmp_path, "activitynet_qa/videos/v_abc.mkv", "-")
    rows, report = bf.questions("activitynet_qa", str(tmp_path))
    assert [(r["id"], r["answer"], r["groups"]["type"]) for r in rows] == [
        ("v_abc_1", "yes", "yes/no"), ("v_gone_1", "home", "location")]
    assert rows[0]["clip"].path.endswith("videos/v_abc.mkv") and rows[1]["clip"] is None
    assert report["missing"] == {"gone": 1} and sum(report["skipped"].values()) == 1
    assert "1 questions, video missing: gone" in "\n".join(bf.coverage_lines(report))


def test_msvd_originals_use_the_mapping_file_in_both_directions(tmp_path):
    put(tmp_path, "test_qa.json",
        [{"answer": "someone", "id": 5, "question": "who is it?", "video_id": 2},
                                   {"answer": "cat", "id": 6, "question": "what is it?",
                                    "video_id": 1}])
    put(tmp_path, "youtube_mapping.txt", "-x_1_5 vid1\nyt_0_9 vid2\n")
    put(tmp_path, "videos/yt_0_9.avi", "-")
    (tmp_path / "vid1").mkdir()
    put(tmp_path, "vid1/0001.jpg", "-")
    rows, _ = bf.questions("msvd_qa", str(tmp_path))
    assert [r["id"] for r in rows] == ["5", "6"] and rows[0]["groups"] == {"first word": "who"}
    # a folder of frames
    assert rows[0]["clip"].path.endswith("yt_0_9.avi") and rows[1]["clip"].path.endswith("vid1")


def test_video_mme_flat_nested_and_subtitles(tmp_path):
    flat = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law",
            "videoID": "yT-x",
            "question_id": "001-1", "task_type": "Counting Problem", "question": "How many?",
            "options": ["A. 1", "B. 2", "C. 3", "D. 4"], "answer": "B"}
    put(tmp_path, "videomme.json", [flat])
    put(tmp_path, "data/yT-x.MP4", "-")
    (row,), _ = bf.questions("video_mme", str(tmp_path))
    assert (row["clip"].path.endswith("yT-x.MP4") and row["answer"] == "B"
            and row["groups"]["duration"] == "short")
    assert row["asks"][0].splitlines()[-6:] == [
        "How many?",
        *flat["options"],
        "The best answer is:",
    ]
    assert "(A, B, C, or D)" in row["asks"][0]
    nested = pf.in_own_format("video_mme", [row | {"said": ["B. 2"]}])["video_mme"]
    assert nested[0]["questions"][0]["response"] == "B. 2" and nested[0]["video_id"] == "001"
    columns, _ = pf.predictions("video_mme", [put(tmp_path, "mine.json", nested)])
    assert columns[""][0]["said"] == ["B. 2"] and mean("video_mme", columns[""], "acc_all") == 1


def test_subtitles_are_those_at_the_sampled_frames(tmp_path, monkeypatch):
    put(tmp_path, "subtitle/x.srt",
        '\ufeff1\r\n00:00:00,000 --> 00:00:01,000\r\n<font color="white">Hello</font>\r\n\r\n'
        "2\n00:00:04,000 --> 00:00:04,500\nnever seen\n\n3\n00:00:09,500 --> 00:01:00,000\nthe "
        "end\n")
    monkeypatch.setattr(bf, "clip_seconds", lambda clip: (0.0, 10.0))
    # at 0, 5 and 10 s
    assert bf.subtitles(bf.Clip("a/x.mp4"), str(tmp_path), 3) == "Hello\nthe end"
    assert bf.subtitles(bf.Clip("a/y.mp4"), str(tmp_path), 3) is None
    prompt = bf.choice_prompt("Q", ["A. 1", "B. 2"], "Hello")
    assert prompt.startswith("This video's subtitles are listed below:\nHello\n")


def test_next_qa_tables_and_their_map(tmp_path):
    head = "video,frame_count,width,height,question,answer,qid,type"
    put(tmp_path, "nextqa/val.csv",
        head + ',a0,a1,a2,a3,a4\n40,9,6,4,"how, then",1,6,TP,a,b,c,d,e\n')
    put(tmp_path, "nextqa/map_vid_vidorID.json", {"40": "0101/40"})
    put(tmp_path, "nextqa/videos/0101/40.mp4", "-")
    (row,), _ = bf.questions("nextqa", str(tmp_path))
    assert ((row["id"], row["answer"], row["groups"]["type"], row["options"][1])
            == ("40_6", "B", "TN", "B. b"))
    assert row["clip"].path.endswith("0101/40.mp4") and row["question"] == "how, then"
    put(tmp_path, "nextoe/val.csv", head + "\n40,9,6,4,how,by hand,6,CH\n")
    (row,), _ = bf.questions("nextoe", str(tmp_path))
    assert (row["id"], row["answer"]) == ("40_6", "by hand")
    columns, report = pf.predictions("nextoe", [put(tmp_path, "oe.json", {"40": {"6": "by hand"}})])
    assert mean("nextoe", pf.join([row], columns[""], report), "exact") == 1


def test_retrieval_tables_lists_and_captions(tmp_path):
    put(tmp_path, "msrvtt_retrieval/MSRVTT_JSFUSION_test.csv",
        "key,vid_key,video_id,sentence\nret0,msr9,video9,a man sits\n")
    put(tmp_path, "msvd_ret/captions.json", {"x_1_2": ["one", "two"], "train_0_1": ["no"]})
    put(tmp_path, "msvd_ret/test_list.txt", "x_1_2\nnever_3_4\n")
    read = lambda name: [(r["id"], r["answer"]) for r in bf.questions(name, str(tmp_path))[0]]
    assert read("msrvtt_retrieval") == [("video9", ["a man sits"])]
    assert read("msvd_retrieval") == [("x_1_2", ["one", "two"])]
    data = {"videos": [{"video_id": "v1", "split": "test"}, {"video_id": "v2", "split": "train"}],
            "sentences": [{"video_id": "v1", "caption": "a"}, {"video_id": "v1", "caption": "b"},
                          {"video_id": "v2", "caption": "c"}]}
    rows, _ = bf.questions("msrvtt_retrieval", put(tmp_path, "MSRVTT_data.json", data))
    assert [(r["id"], r["answer"]) for r in rows] == [("v1", ["a", "b"])]


def test_action_lists_and_their_classes(tmp_path):
    put(tmp_path, "ucf101/testlist01.txt", "ApplyLipstick/v_ApplyLipstick_g01_c01.avi\n")
    put(tmp_path, "ucf101/classInd.txt", "1 ApplyLipstick\n2 Diving\n")
    put(tmp_path, "ucf101/v_ApplyLipstick_g01_c01.avi", "-")  # flat, without the class folder
    rows, report = bf.questions("ucf101", str(tmp_path))
    assert rows[0]["answer"] == "Apply Lipstick" and rows[0]["clip"]
    assert bf.class_names("ucf101", str(tmp_path / "ucf101"), rows) == ["Apply Lipstick", "Diving"]
    put(tmp_path, "hmdb51/splits/brush_hair_test_split1.txt",
        "a b.avi 1 \nc_brush.avi 2 \nd.avi 0 \n")
    put(tmp_path, "hmdb51/splits/sit_test_split1.txt", "e.avi 1 \n")
    rows, _ = bf.questions("hmdb51", str(tmp_path))
    assert [(r["id"], r["answer"]) for r in rows] == [("c_brush", "brush hair")]
    assert bf.class_names("hmdb51", str(tmp_path / "hmdb51"), rows) == ["brush hair", "sit"]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_split_of_the_action_lists(tmp_path, k):
    put(tmp_path, f"ucf101/testlist0{k}.txt", "ApplyLipstick/v_ApplyLipstick_g01_c01.avi\n")
    put(tmp_path, "ucf101/classInd.txt", "1 ApplyLipstick\n2 Diving\n")
    put(tmp_path, f"hmdb51/brush_hair_test_split{k}.txt", "a.avi 1 \nb.avi 2 \n")
    put(tmp_path, f"hmdb51/sit_test_split{k}.txt", "c.avi 2 \n")
    rows, _ = bf.questions("ucf101", str(tmp_path))
    assert bf.class_names("ucf101", str(tmp_path / "ucf101"), rows) == ["Apply Lipstick", "Diving"]
    for data in (tmp_path, tmp_path / f"hmdb51/*_test_split{k}.txt"):
        rows, _ = bf.questions("hmdb51", str(data))
        assert [(r["id"], r["answer"]) for r in rows] == [("b", "brush hair"), ("c", "sit")]
        assert bf.class_names("hmdb51", str(tmp_path / "hmdb51"), rows) == ["brush hair", "sit"]


def test_a_split_is_chosen_by_a_pattern(tmp_path):
    """All splits lie in one folder, as HMDB51's are published; without a pattern the first is
    meant."""
    for k in (1, 2, 3):
        put(tmp_path, f"sit_test_split{k}.txt",
            "\n".join(f"{n}.avi {2 if n == k else 1} " for n in (1, 2, 3)))
    for data, ids in ((tmp_path, ["1"]), (tmp_path / "*_split2.txt", ["2"]),
                      (tmp_path / "sit_test_split3.txt", ["3"])):
        rows, _ = bf.questions("hmdb51", str(data))
        assert [r["id"] for r in rows] == ids and {r["answer"] for r in rows} == {"sit"}
        assert bf.class_names("hmdb51", str(tmp_path), rows) == ["sit"]


def test_video_chatgpt_parts_and_the_two_rows_of_a_pair(tmp_path):
    put(tmp_path, "generic_qa.json", [{"Q": "what?", "A": "this", "video_name": "v_1"}])
    put(tmp_path, "temporal_qa.json", [{"Q": "when?", "A": "then", "video_name": "v_1"}])
    halves = [("a?", "None"), ("None", "b?")]
    put(tmp_path, "consistency_qa.json", [
        {"video_name": "v_2", "question_1": one, "question_2": two, "answer": "x"}
        for one, two in halves])
    put(tmp_path, "Test_Videos/v_1.mp4", "-")
    rows, _ = bf.questions("video_chatgpt", str(tmp_path))
    by = {r["groups"]["part"]: r for r in rows}
    assert by["consistency"]["asks"] == ["a?", "b?"]
    assert by["generic"]["criteria"] == ("correctness", "detail", "context")
    said = [r | {"said": [r["answer"]] * len(r["asks"])} for r in rows]
    said[0]["said"] = ["x", "y"] if len(said[0]["asks"]) == 2 else said[0]["said"]
    values, _ = score_rows("video_chatgpt", said, ExactJudge())
    # one of two is wrong: the worse one counts
    assert summarise(values, said)["metrics"]["consistency"]["mean"] == 0
    assert summarise(values, said)["metrics"]["temporal"]["mean"] == 5
    for name, content in pf.in_own_format("video_chatgpt", said).items():
        put(tmp_path, f"mine/{name}.json", content)
    columns, report = pf.predictions("video_chatgpt", [str(tmp_path / "mine")])
    assert (sorted(len(r["said"]) for r in pf.join(rows, columns[""], report)) == [1, 1, 2]
            and not report["without"])


# --- predictions ----------------------------------------------------------------------------------
QA = [{"id": "q1", "question": "what?", "answer": "cat", "pred": "a cat"},
      {"id": "q2", "question": "who?", "answer": "man", "pred": ""},
      {"id": "q1", "question": "what?", "answer": "cat", "pred": "dog"}]


@pytest.mark.parametrize("write", [
    lambda rows: ("p.json", "\ufeff" + json.dumps(rows)),
    lambda rows: ("p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"),
    lambda rows: ("p.json", "\n".join(map(json.dumps, rows)) + "\n"),  # as Video-LLaVA writes them
    lambda rows: ("p.tsv", "\n".join(["\t".join(rows[0]), *("\t".join(r.values()) for r in rows)])),
    lambda rows: ("p.json", json.dumps(rows)[:-1] + ",]"),
    lambda rows: ("p.json", json.dumps(rows).replace("}", ",}")),
])
def test_predictions_with_marks_commas_blanks_and_doubles(tmp_path, write):
    columns, report = pf.predictions("msvd_qa", [put(tmp_path, *write(QA))])
    # the last counts, once
    assert [(r["id"], r["said"]) for r in columns[""]] == [("q1", ["dog"]), ("q2", [""])]
    assert report["duplicates"] == ["q1"] and report["blank"] == 1
    assert mean("msvd_qa", columns[""], "accuracy") == 0


def test_activitynets_own_predictions_and_a_split_alone(tmp_path):
    """{question_id, answer} beside val_q.json and val_a.json, as in its repository: the answer is
    the prediction."""
    asked = [{"video_name": v, "question": f"is it {k}", "question_id": f"v_{v}_{k}"} for v in "ab"
             for k in (1, 2)]
    put(tmp_path, "val_q.json", asked)
    put(tmp_path, "val_a.json",
        [{"answer": "yes", "type": 3, "question_id": q["question_id"]} for q in asked])
    rows, _ = bf.questions("activitynet_qa", str(tmp_path))
    assert [r["answer"] for r in rows] == ["yes"] * 4
    said = [{"question_id": q["question_id"], "answer": a}
            for q, a in zip(asked, ("yes", "no", "Yes.", ""))]
    columns, report = pf.predictions("activitynet_qa", [put(tmp_path, "p/mine.json", said)])
    assert [r["video"] for r in columns[""]] == ["a", "a", "b", "b"] and not any(
        r["unnamed"] for r in columns[""]
    )
    rows = pf.join(rows, columns[""], report)
    assert [r["said"] for r in rows] == [["yes"], ["no"], ["Yes."], [""]] and not report["without"]
    assert (mean("activitynet_qa", rows, "exact") == 0.5
            == mean("activitynet_qa", rows, "accuracy_all"))
    columns, _ = pf.predictions(
        "video_mme", [put(tmp_path, "mme.json", [{"question_id": "001-1", "answer": "B"}])]
    )
    assert columns[""][0]["said"] == ["B"] and columns[""][0]["answer"] is None


@pytest.mark.parametrize("benchmark, name, content", [
    ("activitynet_qa", "test_q.json",
     [{"question_id": "v_a_1", "video_name": "a", "question": "what"}]),
    ("msvd_qa", "qa.json", [{"id": 1, "question": "what?", "answer": "cat", "video_id": 1}]),
    ("msvd_qa", "blank.json", [{"id": k, "question": "what?", "answer": "cat", "pred": blank}
                               for k, blank in enumerate(["", " ", None])]),
    ("video_mme", "template.json", [{"video_id": "1", "questions": [
        {"question_id": "1-1", "question": "x", "options": [], "answer": "A", "response": ""}]}]),
    ("nextqa", "val.csv", "video,question,answer,qid,type,a0,a1\n40,how,1,6,TP,a,b\n"),
    ("tempcompass", "yes_no.json", {"1": {"action": [{"question": "q", "answer": "yes"}]}}),
    ("video_mme", "wide.csv", "sample_id,16f,32f\n1-1,A,\n1-2,B,\n"),
    ("hmdb51", "captions.json", [{"video_id": "v", "gt": ["sit"]}])])
def test_a_file_without_a_prediction_is_refused(tmp_path, benchmark, name, content):
    with pytest.raises(DataError,
                       match=f"{name}: no predictions.*read under pred, prediction") as e:
        pf.predictions(benchmark, [put(tmp_path, name, content)])
    assert "\n" not in str(e.value)


def test_files_of_other_kinds_are_refused_with_what_is_read(tmp_path):
    (tmp_path / "p.xlsx").write_bytes(b"PK\x03\x04\x14\x00\xff\xfe")
    put(tmp_path, "p.log", "Q: what? A: a cat")
    put(tmp_path, "rows.json", '{"id": 1, "pred": "a"}\n{half\n')
    put(tmp_path, "p.txt", '{"id": 1, "pred": "a"}')
    for name, said in (("p.xlsx", "no text in UTF-8; read are .json"), ("p.log", "read are .json"),
                       ("p.txt", "no prediction file; read are .json"),
                       ("rows.json", "rows.json line 2: no JSON")):
        with pytest.raises(DataError, match=said) as e:
            pf.predictions("msvd_qa", [str(tmp_path / name)])
        assert "\n" not in str(e.value)
    (tmp_path / "empty").mkdir()
    put(tmp_path, "empty/notes.md", "none")
    with pytest.raises(DataError, match="no prediction file in that folder; read are .json"):
        pf.predictions("msvd_qa", [str(tmp_path / "empty")])


def test_a_folder_of_one_judged_file_a_question(tmp_path):
    """As Video-ChatGPT's scripts write them: <id>.json with [verdict, record]; the folder's name
    has the criterion."""
    said = [("v_a_0", "yes", 4), ("v_a_1", "no", 1), ("v_b_0", "yes", 5)]
    for id, pred, score in said:
        put(tmp_path, f"qa/{id}.json",
            [{"pred": pred, "score": score}, {"q": "is it", "a": "yes", "pred": "it is"}])
    columns, _ = pf.predictions("activitynet_qa", [str(tmp_path / "qa")])
    assert [(r["id"], r["video"], r["said"]) for r in columns[""]] == [
        ("v_a_0", "a", ["it is"]), ("v_a_1", "a", ["it is"]), ("v_b_0", "b", ["it is"])]
    assert mean("activitynet_qa", columns[""], "accuracy") == pytest.approx(2 / 3)
    assert mean("activitynet_qa", columns[""], "score") == pytest.approx(10 / 3)
    record = {"q": "what?", "a": "this", "pred": "that"}
    for k, score in enumerate((2, 4)):
        put(tmp_path, f"gpt_temporal/v_x_{k}.json", [{"score": score}, record])
        put(tmp_path, f"gpt_detail/v_x_{k}.json", [f"{{'score': {score + 1}}}", record])
        pair = {"q1": "a?", "q2": "b?", "a": "x", "pred1": "c", "pred2": "d"}
        put(tmp_path, f"gpt_consistency/v_x_{k}.json", [{"score": 5 * k}, pair])
    for name, number in (("temporal", 3), ("detail", 4), ("consistency", 2.5)):
        columns, _ = pf.predictions("video_chatgpt", [str(tmp_path / f"gpt_{name}")])
        assert len(columns[""]) == 2 and mean("video_chatgpt", columns[""], name) == number


def test_one_record_alone(tmp_path):
    """JSON lines of one line are a record, no dict by id; so is one judged file."""
    record = {"id": "q7", "video_name": "a", "question": "what?", "answer": "cat", "pred": "cat"}
    (row,) = pf.predictions("msvd_qa", [put(tmp_path, "p.json", record)])[0][""]
    assert (row["id"], row["video"], row["said"]) == ("q7", "a", ["cat"])
    (row,) = pf.predictions("msvd_qa", [put(tmp_path, "p.json", {"id": "cat"})])[0][""]
    assert (row["id"], row["said"]) == ("id", ["cat"])  # a question of that name
    judged = [{"pred": "no", "score": 1}, {"q": "what?", "a": "cat", "pred": "dog"}]
    (row,) = pf.predictions("msvd_qa", [put(tmp_path, "v_a_3.json", judged)])[0][""]
    assert (row["id"], row["said"], row["reply"]) == ("v_a_3", ["dog"], judged[0])


def test_a_file_without_videos_says_so_and_ours_name_them(tmp_path, monkeypatch, capsys):
    """Ten questions about two videos, all right about one of them: only over videos the interval is
    from 0 to 1."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"q{k}", "question": "what?", "answer": "cat", "pred": "cat" if k < 5 else "dog"}
            for k in range(10)]
    put(tmp_path, "bare.json", rows)
    put(tmp_path, "named.json", [r | {"video": "ab"[k // 5]} for k, r in enumerate(rows)])
    width, told = {}, "10 predictions name no video: intervals are over questions"
    for name in ("bare", "named"):
        script(monkeypatch, "--predictions", f"{name}.json", "--benchmark", "msvd_qa", "--out",
               name)
        result = json.loads((tmp_path / f"{name}.json").read_text())["results"][0]
        cell = result["benchmarks"]["msvd_qa"]["metrics"]
        width[name] = cell["exact"]["high"] - cell["exact"]["low"]
        assert ((told in capsys.readouterr().out) == (name == "bare")
                == (told in (tmp_path / f"{name}.md").read_text()))
    assert width["named"] == 1 and width["bare"] < 0.8
    row = bf.row_of("q", "a", "what?", "cat", {}, said=["cat"])
    (saved,) = pf.in_own_format("msvd_qa", [row])["msvd_qa"]
    columns, _ = pf.predictions("msvd_qa", [put(tmp_path, "ours.json", [saved])])
    assert columns[""][0]["video"] == "a" and not columns[""][0]["unnamed"]


@pytest.mark.parametrize("benchmark, record", [
    ("video_chatgpt", {"Q": "what?", "A": "cat", "pred": "cat"}),
    ("nextqa", {"qid": 0, "answer": 1, "prediction": 1}),
    ("video_mme", {"question_id": "q0", "answer": "A", "response": "A"}),
])
def test_predictions_that_name_no_video_are_not_about_one_video(tmp_path, benchmark, record):
    """Else the interval is a point: every resample of one video is that video."""
    key = next((key for key in ("qid", "question_id") if key in record), None)
    second = record | ({key: str(record[key]).replace("0", "1")} if key else {})
    columns, _ = pf.predictions(benchmark, [put(tmp_path, "generic.json", [record, second])])
    assert [row["unnamed"] for row in columns[""]] == [True, True]
    assert len({row["video"] for row in columns[""]}) == 2


def test_an_id_without_a_prediction_is_dropped_in_one_convention_and_wrong_in_the_other(tmp_path):
    put(tmp_path, "test_qa.json",
        [{"answer": "cat", "id": k, "question": "what?", "video_id": k} for k in (1, 2)])
    rows, _ = bf.questions("msvd_qa", str(tmp_path))
    columns, report = pf.predictions("msvd_qa",
                                     [put(tmp_path, "p.json", {"1": "cat", "77": "dog"})])
    rows = pf.join(rows, columns[""], report)
    assert report["without"] == ["2"] and report["unknown"] == ["77"]
    assert mean("msvd_qa", rows, "accuracy") == 1 and mean("msvd_qa", rows, "accuracy_all") == 0.5
    with pytest.raises(DataError, match="none of its 1 ids"):
        pf.join(rows, columns[""][1:], report)


def test_judged_files_give_the_official_numbers(tmp_path):
    """CVRR-ES's parser by hand: lists in lists, another key, a fraction, a verdict that is
    neither."""
    record = {"q": "x", "a": "y", "pred": "z"}
    rows = [[{"pred": "correct", "score": 4.5}, record],
            [[{"pred": "incorrect", "score": 1}], record],
            [{"type": "correct", "score": 5}, record],
            [{"pred": "partially correct", "score": 3}, record]]
    put(tmp_path, "part.json", rows)
    columns, _ = pf.predictions("cvrr_es", [str(tmp_path)])
    group = ("dimension", "part")
    assert mean("cvrr_es", columns[""], "accuracy", group) == pytest.approx(2 / 3)
    assert mean("cvrr_es", columns[""], "score", group) == (4 + 1 + 5 + 3) / 4
    combined = {"q1": [{"pred": "yes", "score": 4}, {"q": "a", "a": "b", "pred": "c"}],
                "q2": [{"pred": "no", "score": 1}, {"q": "a", "a": "b", "pred": "c"}],
                "q3": ["??", {"q": "a", "a": "b"}]}
    columns, _ = pf.predictions("msvd_qa", [put(tmp_path, "all.json", combined)])
    assert mean("msvd_qa", columns[""], "accuracy") == 0.5
    assert mean("msvd_qa", columns[""], "accuracy_all") == pytest.approx(1 / 3)


MATCH = "Which caption matches the video better?\nCaption A: a man runs.\nCaption B: a man sits."


def test_tempcompass_caption_matching_and_captions(tmp_path):
    said = [(" Caption A: a man runs. </s>", 1), ("a man runs.", 1), ("A", 1), ("B.", 0),
            ("Caption A.", 1),
            ("A) a man sits.", 0), ("Caption A: a man sits.", None), ("It is caption A.", None)]
    items = [{"question": MATCH, "answer": "Caption A: a man runs.", "prediction": text}
             for text, _ in said]
    put(tmp_path, "caption_matching.json", {"7": {"action": items}})
    put(tmp_path, "yes_no.json",
        {"7": {"action": [{"question": "q", "answer": "yes", "prediction": " Yes."}] * 2}})
    caption = {"question": "..\nGenerated Caption:", "answer": "x", "prediction": "y"}
    put(tmp_path, "captioning.json", {"7": {"order": [caption]}})
    columns, report = pf.predictions("tempcompass", [str(tmp_path)])
    values, problems = score_rows("tempcompass", columns[""], ExactJudge())
    of = lambda task: [v["accuracy"]
                       for v, r in zip(values, columns[""]) if r["groups"]["task"] == task]
    assert (of("caption_matching") == [right for _, right in said] and of("yes_no") == [1, 1]
            and not of("captioning"))
    assert (report["left_out"] == {"captions without a judge's rating": 1}
            and problems == {"no match": 2})
    tables = group_tables({"benchmarks": {"tempcompass": summarise(values, columns[""])}})
    table = next(t for t in tables if ", task" in t)
    line = next(line for line in table.splitlines() if line.startswith("| caption_matching"))
    # counted by accuracy and by accuracy_all
    assert line.endswith("| 6, 8 |") and "| 66.67 [" in line


def test_tempcompass_ratings_need_no_question(tmp_path):
    rated = [{"rating": 1, "gt-answer": "A. x", "video-llm-prediction": "x"},
             {"rating": 0, "video-llm-prediction": "y"},
             {"rating": -1, "video-llm-prediction": "z"},
             {"rating": 1, "question": "q", "video-llm-prediction": None}]
    columns, report = pf.predictions("tempcompass",
                                     [put(tmp_path, "captioning.json", {"7": {"order": rated}})])
    assert mean("tempcompass", columns[""], "accuracy") == pytest.approx(2 / 3)
    assert report["left_out"] == {"captions without a judge's rating": 1}  # -1: the judge failed
    # a caption is no reply to a choice: it has no letter
    assert all("acc_strict" not in v for v in score_rows("tempcompass", columns[""], None)[0])
    none_left = put(tmp_path, "captioning.json", {"7": {"order": rated[2:3]}})
    with pytest.raises(DataError, match="no prediction can be scored; left out: 1 captions"):
        pf.predictions("tempcompass", [none_left])


def test_other_prediction_shapes(tmp_path):
    put(
        tmp_path,
        "multi-choice.json",
        {
            "7": {
                "action": [
                    {"question": "q", "answer": "A. x", "prediction": "A"},
                    {"question": "q", "answer": "B. y", "prediction": "yes"},
                ]
            }
        },
    )
    columns, _ = pf.predictions("tempcompass", [str(tmp_path / "multi-choice.json")])
    assert mean("tempcompass", columns[""], "accuracy", ("aspect", "multi-choice action")) == 1
    assert mean("tempcompass", columns[""], "accuracy_all") == 0.5
    results = {"40_6": {"prediction": 1, "answer": 1}, "40_7": {"prediction": 0, "answer": 4}}
    columns, _ = pf.predictions("nextqa", [put(tmp_path, "mc.json", results)])
    assert mean("nextqa", columns[""], "acc_answered") == 0.5
    said = ("<think>(A)?</think>B", "Option B", "which?", "B. x")
    rows = [columns[""][0] | {"said": [text]} for text in said]
    own = [pf.in_own_format("nextqa", [row])["nextqa"]["40_6"] for row in rows]
    assert own == [dict(prediction=n, answer=1) for n in (1, 1, -1, 1)]
    columns, _ = pf.predictions(
        "video_mme", [put(tmp_path, "wide.csv", "sample_id,16f,32f\n001-1,A,B\n001-2,C,C\n")]
    )
    assert ({k: [r["said"][0] for r in v] for k, v in columns.items()}
            == {"16f": ["A", "C"], "32f": ["B", "C"]})
    line = {"doc_id": 0, "target": "C", "filtered_resps": ["C."], "videomme_perception_score": {
        "question_id": "001-1", "duration": "short", "category": "Knowledge", "sub_category": "Law",
        "answer": "C",
        "task_category": "Counting Problem", "pred_answer": "C"}}
    columns, _ = pf.predictions("video_mme", [put(tmp_path, "samples.jsonl", json.dumps(line))])
    assert mean("video_mme", columns[""], "acc_answered", ("domain", "Knowledge")) == 1
    hound = {"id": "x_1", "modal_path": "x", "query": "<video>\nwhat?", "answer": "cat",
             "model_prediction": {"status": "success", "message": "cat"}}
    columns, _ = pf.predictions("mmaip_v", [put(tmp_path, "hound.jsonl", json.dumps(hound))])
    assert (columns[""][0]["said"], columns[""][0]["video"],
            columns[""][0]["question"]) == (["cat"], "x", "what?")


# --- what is broken -------------------------------------------------------------------------------
@pytest.mark.parametrize("benchmark, name, content, message", [
    ("msvd_qa", "p.json", "[{]", "p.json: no JSON"),
    ("msvd_qa", "p.json", "3", "p.json: neither a list"),
    ("msvd_qa", "p.json", [QA[0], 5], "p.json record 2: no record"),
    ("msvd_qa", "p.json", [], "no predictions"),
    ("msvd_qa", "p.jsonl", '{"id": 1, "pred": "a"}\n{half', "p.jsonl line 2: no JSON"),
    ("msvd_qa", "p.json", [{"id": 1, "pred": {"a": 1}}], "record 1: the prediction is no text"),
    ("video_mme", "p.json", [{"question_id": "1", "answer": "E"}],
     "record 1: the answer is no letter"),
    ("video_mme", "p.json", [{"response": "A"}], "record 1: no question_id or sample_id"),
    ("video_mme", "p.json", [{"video_id": "1", "questions": ["x"]}],
     "record 1 question 1: no record"),
    ("video_chatgpt", "p.json", [{"Q": "a", "A": "b", "video_name": "v", "pred": "c"}],
     "the file's name must say so"),
    ("nextqa", "p.json", {"1_2": {"prediction": 1, "answer": 9}},
     "the answer is no number of an option"),
    ("tempcompass", "p.json", {"1": ["x"]}, "record '1': no {aspect"),
    ("msrvtt_retrieval", "p.json", [{"video_id": "v", "answer": "x", "gt": []}],
     "record 1: no caption"),
    ("nextqa", "p.csv", "video,qid,answer\n1,2\n", "p.csv record 1: not as many fields"),
])
def test_broken_files_are_named_with_the_record(tmp_path, benchmark, name, content, message):
    with pytest.raises(DataError) as e:
        pf.predictions(benchmark, [put(tmp_path, name, content)])
    assert message in str(e.value) and "\n" not in str(e.value)


def test_missing_files_are_named(tmp_path):
    for call in (lambda: bf.questions("video_mme", str(tmp_path)),
                 lambda: pf.predictions("msvd_qa", [str(tmp_path / "x.json")]),
                 lambda: pf.predictions("msvd_qa", [str(tmp_path)])):
        with pytest.raises(DataError, match=re.escape(str(tmp_path))):
            call()
    put(tmp_path, "test_q.json", [{"video_name": "a", "question": "b", "question_id": "c"}])
    with pytest.raises(DataError, match="test_a.json: cannot be read"):
        bf.questions("msvd_qa", str(tmp_path))


# --- the script -----------------------------------------------------------------------------------
def script(monkeypatch, *flags):
    import evaluate

    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main(parse_args(evaluate.Args))


def test_prediction_files_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = [{"id": f"v_{k}_1", "question": "what?", "answer": "cat",
             "pred": "dog" if k > 3 else "cat"}
            for k in range(8)]
    put(tmp_path, "a.json", base)
    put(tmp_path, "b.json", [r | {"pred": "cat"} for r in base])
    script(monkeypatch, "--compare", "a.json", "b.json", "--benchmark", "msvd_qa", "--out", "out/r")
    saved = json.loads((tmp_path / "out/r.json").read_text())
    d = saved["differences"]["b"]["msvd_qa"]["exact"]
    assert d["mean"] == 0.5 and 0 < d["low"] < 0.5 < d["high"] < 1 and d["n"] == 8
    assert saved["results"][0]["benchmarks"]["msvd_qa"]["judge"].startswith("exact")
    assert ((tmp_path / "out/r.png").stat().st_size > 5000
            and "+50.00 [" in (tmp_path / "out/r.md").read_text())
    items = [json.loads(line) for line in (tmp_path / "out/r_items.jsonl").read_text().splitlines()]
    assert len(items) == 16 and items[0]["values"]["exact"] == 1
    assert "difference to a" in capsys.readouterr().out


def test_columns_that_count_other_items_are_warned_about(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"v_{k}_1", "question": "what?", "answer": "cat", "pred": "cat"}
            for k in range(8)]
    put(tmp_path, "a.json", rows)
    put(tmp_path, "b.json", rows[:6])
    script(monkeypatch, "--compare", "a.json", "b.json", "--benchmark", "msvd_qa", "--out", "r")
    warning = [line
               for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")]
    assert (len(warning) == 1 and "msvd_qa exact 8, 6" in warning[0]
            and warning[0] in (tmp_path / "r.md").read_text())
    script(monkeypatch, "--compare", "a.json", "./a.json", "--benchmark", "msvd_qa")
    assert "Warning" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, code, message", [
    ([], 2, "give one of --runs"), (["--predictions", "a.json"], 2, "name it with --benchmark"),
    (["--predictions", "a.json", "--benchmark", "nope"], 2, "--benchmark nope"),
    (["--checkpoint", "nowhere"], 2, "--checkpoint: nowhere is no folder"),
    (["--predictions", "a.json", "--benchmark", "msvd_qa", "--judge", "api"], 2, "--api_url"),
    (["--predictions", "a.json", "--benchmark", "msvd_qa", "--limit", "-1"], 2, "--limit"),
    (["--predictions", "a.json", "--benchmark", "msvd_qa"], 1, "a.json: cannot be read"),
    (["--predictions", "b.json", "--benchmark", "msvd_qa"], 1,
     "give the benchmark's files with --data"),
    (["--compare", "a.xlsx", "A.JSON", "--benchmark", "msvd_qa"], 1,
     "a.xlsx: cannot be read, it is no text in UTF-8; read are .json"),
    (["--predictions", "b.json", "--benchmark", "cvrr_es", "--data", "."], 1,
     "--data is not for cvrr_es"),
])
def test_wrong_flags_and_files_are_one_line(tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "b.json", {"1": "x"})
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(SystemExit) as e:
        script(monkeypatch, *flags)
    err = capsys.readouterr().err if e.value.code == 2 else str(e.value.code)
    assert (
        (e.value.code if e.value.code == 2 else 1) == code
        and message in err
        and len(err.strip().splitlines()) == 1
    )
