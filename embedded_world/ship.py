"""Pack what `make world` trained as a hub would hold it: float16 safetensors and a model card for
each part.

Run      python embedded_world/ship.py
         python embedded_world/ship.py --out embedded_world/weights   replaces what is shipped
Makes    runs/weights/{clip,qformer,llm,judge}

The judge is measured after rounding to float16: its share of right answers on the test clips, which
it never saw. CLIP is measured by retrieval: for how many test clips is their own narrative the
nearest of all.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.flags import WORLD, Flags, answer_help, flag, parse_args


@dataclass
class Args(Flags):
    hub: str = flag(f"{WORLD}/hub", "what embedded_world/pretrain_tiny.py made")
    judge: str = flag("runs/sft/oracle_s0",
                      "the run of sft.py that trained the judge on all labels")
    data: str = flag(WORLD, "the embedded world; its test split is measured on")
    out: str = flag("runs/weights", "folder to make")
    cache: str = flag("cache", "folder of cached CLIP features")


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

import evaluate
from inputs.features import FeatureCache
from inputs.frames import read_frames
from plumbing.questions import count_correct
from video_llm import VideoQFormer, load_model

CARD = """---
license: mit
library_name: transformers
---
# {title}

{what}

| | |
|---|---|
| made by | `{command}` |
| commit | {commit} |
| data | `python embedded_world/moving_shapes.py`: seed 0, 4,000 clips; the 2,400 of the split \
`pretrain` |
| parameters | {parameters:,}, stored in float16 |
| measured | {measured} |

Part of the embedded world of moving shapes: it knows nothing else. MIT licence.
"""


@torch.no_grad()
def retrieval(folder, data, num_frames=8):
    """Share of the test clips (C,) whose own narrative is the nearest of all, by cosine of CLIP's
    features."""
    clips = [c for c in json.loads(Path(data, "clips.json").read_text(encoding="utf-8"))
             if c["split"] == "test"]
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor, tokenizer = (CLIPImageProcessorPil.from_pretrained(folder),
                            AutoTokenizer.from_pretrained(folder))
    videos, texts = [], []
    for clip in clips:
        frames, _ = read_frames(f"{data}/{clip['video']}", num_frames)
        pixels = processor(list(frames), return_tensors="pt")["pixel_values"]  # (F,3,H,W)
        image = model.visual_projection(model.vision_model(pixels).pooler_output)
        videos.append(F.normalize(image, dim=-1).mean(0))
        longest = model.config.text_config.max_position_embeddings - 1
        ids = tokenizer(clip["narrative"]).input_ids[:longest] + [tokenizer.eos_token_id]
        texts.append(model.text_projection(model.text_model(torch.tensor([ids])).pooler_output)[0])
    nearest = (F.normalize(torch.stack(videos), dim=-1)
               @ F.normalize(torch.stack(texts), dim=-1).T).argmax(-1)
    return (nearest == torch.arange(len(clips))).float().mean().item(), len(clips)


def judge_accuracy(folder, data, cache):
    """Right answers of the judge to the questions about the test clips. -> right, asked."""
    model, processor = load_model(folder)
    records, _ = evaluate.open_questions([f"{data}/test.json"], None)
    return count_correct(records, model, processor, FeatureCache(model, processor, cache))


def main(args):
    out, aside = Path(args.out), Path(f"{args.out}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(args.hub, aside, ignore=shutil.ignore_patterns("args.json"))
    shutil.copytree(Path(args.judge, "final"), aside / "judge")
    models = dict(clip=CLIPModel.from_pretrained(aside / "clip"),
                  judge=load_model(aside / "judge")[0],
                  qformer=VideoQFormer.from_pretrained(aside / "qformer"))
    for name, model in models.items():
        model.half().save_pretrained(aside / name)
    right, asked = judge_accuracy(aside / "judge", args.data, args.cache)
    found, clips = retrieval(aside / "clip", args.data)
    commit = json.loads(Path(args.hub, "args.json").read_text(encoding="utf-8"))["git_commit"]
    judge = json.loads(Path(args.judge, "args.json").read_text(encoding="utf-8"))
    cards = dict(clip=("The tiny CLIP of the embedded world",
                       "A `CLIPModel`: vision tower, text tower and projections. It stands where "
                       "`openai/clip-vit-large-patch14-336` stands at 7B.",
                       "python embedded_world/pretrain_tiny.py", commit,
                       f"the own narrative is the nearest for {found:.1%} of {clips} test clips"),
                 qformer=("The tiny Q-Former of the embedded world",
                          "A `VideoQFormer` of video_llm.py; it reads features of the CLIP beside "
                          "it, layer -2. It stands where a BLIP-2 checkpoint stands at 7B.",
                          "python embedded_world/pretrain_tiny.py", commit,
                          "with the judge beside it, which grew from it"),
                 judge=("The judge of the embedded world", "A `VideoLLM` trained on all labels of "
                                                           "2,400 clips that no policy sees. It "
                                                           "judges policies that had the labels of "
                                                           "40.", f"python {judge['command']}",
                        judge["git_commit"], f"{right / asked:.1%} of {asked} questions about the "
                                             "test clips answered right"))
    for name, (title, what, command, at, measured) in cards.items():
        parameters = sum(p.numel() for p in models[name].parameters())
        (aside / name
         / "README.md").write_text(CARD.format(title=title, what=what, command=command, commit=at,
                                               parameters=parameters, measured=measured))
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out}: {', '.join(cards)} and a tokenizer, {size / 1e6:.1f} MB; the judge answers "
          f"{right / asked:.1%} of the test questions, CLIP finds {found:.1%}")


if __name__ == "__main__":
    main(parse_args(Args))
