"""Who says whether an answer is right: `exact`, `local`, `api`; and CLIP's text tower, for
retrieval and classes.

    values, problems = score_rows("msvd_qa", rows, judge, clip_text)   # a dict of values per row:
                                                                       metrics.py

  exact   no model: right is equal after `normalize`; the score is 5 times the token F1 with the
          reference, cut to an integer. A lower bound: a paraphrase is wrong. For the aspects of
          MMAIP-V there is nothing it could say.
  local   a VideoLLM checkpoint that sees the frames. Against a reference it is asked which is the
          better response, the prediction or the reference, in both orders; P is its mean
          probability for the prediction. Score: 10 P cut to an integer, at most 5; right: 3 or more
          (D1). Aspects: `JudgeOracle.aspects`.
  api     an OpenAI-compatible server. With a reference: the text protocol of Video-ChatGPT (its
          structure, our words), a dictionary with 'pred' and 'score'. Aspects: frames, question and
          answer, never the reference.

A reply that cannot be read is asked for again, ATTEMPTS times in all, each time with the reason;
then it is counted under its reason and both conventions are reported. What was read is not asked
again: replies of a server are kept by `ApiClient`, those of a local judge in <cache>/verdicts. A
blank answer is wrong with score 0 and is not asked about. A judge that gives no verdict at all ends
the script: its zeros would be no accuracy. Where it gives none on one of several benchmarks, the
report is written and the script ends with an error. Of a reasoning model's reply `exact` and
`local` read what it says after its thinking; the official rules and a server get all of it, and how
many replies hold thinking is counted.

D1      A small video LLM cannot write a dictionary; comparing two responses is what the judge of
        this repository was trained to do (oracle.py). As good as the reference is P = 1/2, hence 10
        P. Its numbers compare with its own only, as with every judge.
D2      MMAIP-V's prompt and its definition of the ratio are not public. Ours: the four aspects of
        LLaVA-Hound, 0 to 5; the score of an answer is their mean, and counts for the ratio from
        RATIO_FROM on.
"""

import hashlib
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPModel

import oracle
from evaluation.metrics import (choice_values, class_hits, qa_values, retrieval_hits, score_values,
                                tempcompass, tempcompass_strict, unanswered)
from inputs.frames import VideoError
from inputs.records import DataError
from oracle import JudgeOracle
from plumbing import files
from plumbing.api_client import ApiClient, ApiError, ReplyError, flat, frames_as_urls
from plumbing.text import THINKING, final_answer, normalize, token_f1

ATTEMPTS = 3  # per verdict: the first reply and two repairs
ENOUGH = 24  # questions in a row without any reply, after which a server is given up
RATIO_FROM = 3  # [D2]
NEITHER = "verdict neither way"  # read, and counted
ASPECTS = oracle.ASPECTS
VISION = tuple(f"{aspect}_points" for aspect in ASPECTS)  # metrics of MMAIP-V

QA_TASK = """You evaluate answers to questions about videos. Compare the predicted answer with the \
correct answer and
decide whether they mean the same. Synonyms and paraphrases count as a match; judge what is said, \
not how it is put."""
CRITERIA = {
    "correctness": "Is the prediction factually consistent with the correct answer, without "
                   "misinterpretation?",
    "detail": "Is the prediction complete, covering all major points of the correct answer, and "
              "specific, not generic?",
    "context": "Does the prediction fit the overall context and the main themes of the video's "
               "content?",
    "temporal": "Does the prediction give the events in the order in which the correct answer has "
                "them?",
    "consistency": "Do the two predictions, to two phrasings of one question, agree with each "
                   "other and with the correct answer, without contradiction?",
}


def plain(text):
    """A text that stays on its line of a prompt, and opens no turn there."""
    return (flat(text) if isinstance(text, str) else str(text)).replace("<", "&lt;")


def qa_messages(row):
    """The question of Video-ChatGPT's judge: yes or no, and 0 to 5."""
    question, answer, said = map(plain, (row["question"], row["answer"], row["said"][0]))
    user = (f"Question: {question}\nCorrect Answer: {answer}\nPredicted Answer: {said}\n\nReply "
            "with one Python dictionary and nothing else, with the keys 'pred', the string 'yes' "
            "or 'no', and 'score', an INTEGER from 0 to 5, 5 for the best match. Example: {'pred': "
            "'yes', 'score': 4}")
    return [{"role": "system", "content": QA_TASK}, {"role": "user", "content": user}]


def criterion_messages(row, criterion):
    """One of the five criteria of Video-ChatGPT's benchmark: 0 to 5."""
    asks, said = [plain(ask) for ask in row["asks"]], [plain(text) for text in row["said"]]
    parts = [f"Question: {asks[0]}", f"Correct Answer: {plain(row['answer'])}",
             f"Predicted Answer: {said[0]}"]
    if len(asks) == 2:
        parts = [f"Question 1: {asks[0]}", f"Question 2: {asks[1]}", parts[1],
                 f"Predicted Answer to Question 1: {said[0]}",
                 f"Predicted Answer to Question 2: {said[1]}"]
    user = ("\n".join(parts) + "\n\nReply with one Python dictionary and nothing else, with the "
                               "key 'score', an INTEGER from 0 to 5, 5 for the best. Example: "
                               "{'score': 4}")
    task = ("You evaluate answers to questions about videos by one criterion. "
            f"{CRITERIA[criterion]} Paraphrases count.")
    return [{"role": "system", "content": task}, {"role": "user", "content": user}]


# --------------------------------------------------------------------------------------------------
# Judges: replies to (kind, row) jobs, in order; kind is "qa", one of CRITERIA, or "aspects". None:
# no reply.
# --------------------------------------------------------------------------------------------------
class ExactJudge:
    name = "exact (equal after normalisation; score: 5 x token F1; no model)"

    def replies(self, jobs):
        return [self.reply(kind, row) for kind, row in jobs]

    def reply(self, kind, row):
        if kind == "aspects":
            return None
        f1 = min(token_f1(said, row["answer"]) for said in row["said"])
        right = all(normalize(final_answer(s)) == normalize(row["answer"]) for s in row["said"])
        return {"pred": "yes" if right else "no", "score": int(5 * f1 + 1e-9)}


class LocalJudge:
    """A VideoLLM checkpoint. Rows whose video is not there get no reply."""

    def __init__(self, checkpoint, cache_dir, device="cpu"):
        self.oracle = JudgeOracle(checkpoint, cache_dir, narrative=False, device=device)
        self.mark = self.oracle.narrative_dir.name  # hash of the weights
        self.name = f"local {checkpoint} (weights {self.mark})"
        self.file = Path(cache_dir) / "verdicts" / f"{self.mark}.jsonl"

    def replies(self, jobs, batch=16):
        kept, out = dict(files.read_lines(self.file)), [None] * len(jobs)
        keys = [self.key(kind, row) for kind, row in jobs]
        ask = [i for i, key in enumerate(keys) if key is not None and key not in kept]
        ask = list({keys[i]: i for i in ask}.values())
        broken = self.oracle.cache.prepare([jobs[i][1]["clip"] for i in ask])
        ask = [i for i in ask if jobs[i][1]["clip"] not in broken]
        ask.sort(key=lambda i: (jobs[i][0] == "aspects", str(jobs[i][1]["clip"])))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as file:
            for n in tqdm(range(0, len(ask), batch), desc="local judge", leave=False,
                          disable=len(ask) < 500):
                for aspects in (False, True):
                    some = [i for i in ask[n : n + batch] if (jobs[i][0] == "aspects") is aspects]
                    for i, reply in zip(some, self.judge([jobs[i][1] for i in some], aspects)
                                        if some else []):
                        kept[keys[i]] = reply
                        if reply is not None:
                            file.write(json.dumps([keys[i], reply]) + "\n")
                file.flush()
        for i, key in enumerate(keys):
            out[i] = kept.get(key)
        return out

    def key(self, kind, row):
        if row["clip"] is None:
            return None
        # [D1] the criteria are all one to it
        kind = "aspects" if kind == "aspects" else "against the reference"
        try:
            # its content
            video = self.oracle.cache.key(row["clip"], self.oracle.processor.num_frames)
        except OSError:
            return None
        said = [final_answer(text) for text in row["said"]]
        parts = [kind, video, row["asks"], row["question"], row["answer"], said]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def judge(self, rows, aspects):
        """One reply per row; of two predictions the worse one counts."""
        flat = [(row, k) for row in rows for k in range(len(row["asks"]))]
        texts = [final_answer(row["said"][k]) for row, k in flat]
        clips = [row["clip"] for row, _ in flat]
        asks = [row["question"] if aspects else row["asks"][k] for row, k in flat]
        if aspects:
            points, ok = self.oracle.aspects(clips, asks, [[text] for text in texts])
            points = [dict(zip(ASPECTS, p[0].tolist())) for p in points]
            return [p if good else None for p, good in zip(points, ok)]
        pairs = [[row["answer"], text] for (row, _), text in zip(flat, texts)]
        prefers = self.oracle.preferences(clips, asks, pairs)
        scores = {}
        for (row, _), p in zip(flat, prefers[:, 1, 0].tolist()):
            score = min(5, int(10 * p + 1e-6)) if p == p else -1  # [D1]; -1: P is no number
            scores.setdefault(id(row), []).append(score)
        worst = [min(scores[id(row)]) for row in rows]
        verdict = lambda s: {"pred": "yes" if s >= RATIO_FROM else "no", "score": s}
        return [verdict(s) if s >= 0 else None for s in worst]


class ApiJudge:
    """An OpenAI-compatible server. DataError where asking on makes no sense."""

    def __init__(self, args):
        self.client = ApiClient(args.api_url, args.api_model, args.cache, args.api_concurrency,
                                args.api_timeout, args.api_retries, extra=args.api_extra)
        self.args, self.name = args, f"api {args.api_model} at {args.api_url}"
        # questions in a row without reply; reasons that were told
        self.silent, self.told = 0, set()

    def replies(self, jobs):
        with ThreadPoolExecutor(self.args.api_concurrency) as pool:
            try:
                done = pool.map(lambda job: self.reply(*job), jobs)
                return list(tqdm(done, "judge", len(jobs), leave=False, disable=len(jobs) < 100))
            finally:
                pool.shutdown(cancel_futures=True)  # after an error the rest is not asked

    def reply(self, kind, row):
        """The reply's text, asked for again while it cannot be read, or None where none comes."""
        def read(reply):
            if problem := (qa_values(reply) if kind == "qa" else score_values(reply, kind))[1]:
                raise ReplyError("no_json", problem)

        try:
            if kind == "aspects":
                images = frames_as_urls(row["clip"], self.args.api_frames,
                                        self.args.api_size) if row["clip"] else []
                if not images and self.args.api_frames:
                    return None  # it must see the video
                points = oracle.aspects(self.client, images, row["question"], row["said"],
                                        self.args.api_max_tokens)
            else:
                points = None
                messages = qa_messages(row) if kind == "qa" else criterion_messages(row, kind)
                reply = self.client.ask(messages, self.args.api_max_tokens, check=read,
                                        attempts=ATTEMPTS, plea="Reply with the dictionary alone.")
            self.silent = 0
            return dict(zip(ASPECTS, points[0])) if points else str(reply)
        except VideoError:
            return None
        except ApiError as e:
            unread = isinstance(e, ReplyError)
            self.silent = 0 if unread else self.silent + 1
            if e.fatal or self.silent >= ENOUGH:
                what = "" if e.fatal else f"{ENOUGH} questions in a row got no reply: "
                raise DataError(f"{what}{e}") from None
            if e.reason not in self.told:
                self.told.add(e.reason)
                print(f"judge: a question is left without verdict: {e}; more of the kind are only "
                      "counted", file=sys.stderr)
            return str(e.reply) or None if unread and kind != "aspects" else None


def make_judge(args, device):
    if args.judge == "exact":
        return ExactJudge()
    return LocalJudge(args.judge_model, args.cache,
                      device) if args.judge == "local" else ApiJudge(args)


# --------------------------------------------------------------------------------------------------
# CLIP's text tower
# --------------------------------------------------------------------------------------------------
class ClipText:
    """Unit text features of a CLIP checkpoint, a folder or a hub name."""

    def __init__(self, name, device="cpu"):
        self.name, self.device = str(name), device
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = CLIPModel.from_pretrained(name, dtype=torch.float32).eval().to(device)

    @torch.no_grad()
    def __call__(self, texts, batch=256):
        """list of texts -> (n,D) float64. A text too long for the tower is cut, and keeps its end
        token."""
        out, end = [], self.tokenizer.eos_token_id
        longest = self.model.config.text_config.max_position_embeddings
        for n in range(0, len(texts), batch):
            ids = [self.tokenizer(t).input_ids for t in texts[n : n + batch]]
            ids = [[i for i in row if i != end][: longest - 1] + [end] for row in ids]
            length = max(map(len, ids))
            tokens = torch.tensor([row + [end] * (length - len(row)) for row in ids],
                                  device=self.device)
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids],
                                device=self.device)
            pooled = self.model.text_model(input_ids=tokens, attention_mask=mask).pooler_output
            features = self.model.text_projection(pooled).double().cpu().numpy()
            out.append(features / np.linalg.norm(features, axis=1, keepdims=True))
        return np.concatenate(out)


# --------------------------------------------------------------------------------------------------
# Rows with predictions -> values
# --------------------------------------------------------------------------------------------------
QA_NAMES = ("accuracy", "score")
QA = ("msvd_qa", "msrvtt_qa", "activitynet_qa", "nextoe", "cvrr_es", "held_out")


def says(row):
    """Does the row hold a prediction that is more than blank, or than thinking?"""
    return bool(row["said"]) and all(final_answer(text).strip() for text in row["said"])


def score_rows(benchmark, rows, judge, clip_text=None, classes=None):
    """-> [{metric: value or None} per row], Counter of what could not be read and why."""
    problems = Counter()
    for row in rows:
        row["said"] = row["said"] and [text or "" for text in row["said"]]
    problems["no prediction"] = sum(row["said"] is None and row["reply"] is None for row in rows)
    problems["blank"] = sum(row["said"] is not None and not says(row) for row in rows)
    thought = [any(map(THINKING.search, row["said"] or [])) for row in rows]
    problems["replies hold thinking"] = sum(thought)
    if benchmark in QA:
        values = judged(rows, "qa", judge, problems, "correct" if benchmark == "cvrr_es" else "yes")
        for row, v in zip(rows, values):
            said = final_answer(row["said"][0]) if row["said"] else ""
            v["exact"] = float(normalize(said) == normalize(row["answer"] or "") != "")
    elif benchmark == "video_chatgpt":
        values = [{} for _ in rows]
        for criterion in CRITERIA:
            mine = [i for i, row in enumerate(rows) if criterion in row["criteria"]]
            for i, v in zip(mine, judged([rows[i] for i in mine], criterion, judge, problems)):
                values[i] |= v
    elif benchmark == "mmaip_v":
        values = aspects(rows, judge, problems)
    elif benchmark == "tempcompass":
        matched = lambda row: row["said"] and tempcompass(row["said"][0], row["answer"],
                                                          row["question"])
        right = [row["reply"] if isinstance(row["reply"], int) else matched(row) for row in rows]
        problems["no match"] = sum(r is None and row["said"] is not None
                                   for r, row in zip(right, rows))
        values = [dict(accuracy=None if r is None else float(r), accuracy_all=float(r or 0))
                  for r in right]
        for row, v in zip(rows, values):
            if not row.get("is_caption") and (row["said"] or row["reply"] is None):
                said = row["said"][0] if row["said"] else ""
                v["acc_strict"] = tempcompass_strict(said, row["answer"], row["question"])
    elif benchmark in ("video_mme", "video_mme_subtitles", "nextqa"):
        values = []
        for row in rows:
            letters, said = "ABCD", row["said"][0] if row["said"] else ""
            if benchmark == "nextqa":  # its official files hold numbers: there is no rule for texts
                letters, said = "ABCDE", final_answer(said)
            v, problem = choice_values(said, row["answer"], row["options"], letters)
            problems[problem] += problem is not None and row["said"] is not None
            values.append(v)
    else:
        values = [{} for _ in rows]
        there = [i for i, row in enumerate(rows) if row["said"] is not None]
        texts = [rows[i]["said"][0] for i in there]
        truth = [rows[i]["answer"] for i in there]
        hits = (retrieval_hits([captions[0] for captions in truth], texts, clip_text)
                if classes is None else class_hits(truth, texts, classes, clip_text))
        for i, row_values in zip(there, zip(*hits.values())):
            values[i] = dict(zip(hits, map(float, row_values)))
        values = [v or dict.fromkeys(hits, 0.0) for v in values]  # no prediction: wrong
    return values, +problems


def note(judge, asked, read):
    """How many verdicts it was asked for in all, and how many could be read: for `verdicts`."""
    before = verdicts(judge)
    judge.asked, judge.read = before[0] + asked, before[1] + read


def verdicts(judge):
    """-> how many it was asked for so far, how many could be read."""
    return getattr(judge, "asked", 0), getattr(judge, "read", 0)


def judged(rows, kind, judge, problems, words="yes"):
    """Values of one kind of verdict: those that the file brings, else the judge's."""
    read = ((lambda reply: qa_values(reply, words)) if kind == "qa"
            else (lambda reply: score_values(reply, kind)))
    names = QA_NAMES if kind == "qa" else (kind,)
    ask = [i for i, row in enumerate(rows) if row["reply"] is None and says(row)]
    replies = dict(zip(ask, judge.replies([(kind, rows[i]) for i in ask]))) if ask else {}
    told = [read(reply)[1] for reply in replies.values() if reply is not None]
    note(judge, len(ask), sum(problem in (None, NEITHER) for problem in told))
    out = []
    for i, row in enumerate(rows):
        reply = row["reply"] if row["reply"] is not None else replies.get(i)
        if reply is None:
            blank = row["said"] is not None and i not in replies
            problems["no reply"] += i in replies
            out.append(dict.fromkeys([k + e for k in names for e in ("", "_all")], 0.0) if blank
                       else unanswered(names))
            continue
        values, problem = read(reply)
        problems[problem] += problem is not None
        row["verdict"] = reply
        out.append(values)
    del problems[None]
    return out


def aspects(rows, judge, problems):
    """[D2] The vision-based evaluation: four aspects, their mean, and the share of answers at
    RATIO_FROM or more."""
    names = (*VISION, "score", "ratio")
    ask = [i for i, row in enumerate(rows) if says(row)]
    replies = dict(zip(ask, judge.replies([("aspects", rows[i]) for i in ask])))
    note(judge, len(ask), sum(reply is not None for reply in replies.values()))
    out = []
    for i, row in enumerate(rows):
        if i not in replies:
            out.append(unanswered(names) if row["said"] is None
                       else dict.fromkeys(unanswered(names), 0.0))
        elif (reply := replies[i]) is None:
            problems["no reply"] += 1
            out.append(unanswered(names))
        else:
            points = dict(zip(VISION, (reply[a] for a in ASPECTS)),
                          score=float(np.mean([reply[a] for a in ASPECTS])))
            points["ratio"] = float(points["score"] >= RATIO_FROM)
            out.append(points | {f"{name}_all": value for name, value in points.items()})
            row["verdict"] = reply
    return out
