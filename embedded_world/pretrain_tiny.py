"""What a download brings at 7B and nothing brings at `tiny`: a CLIP, a Q-Former and a tokenizer,
made in minutes.

Run      python embedded_world/pretrain_tiny.py      minutes on two cores
Makes    data/moving_shapes/hub/{clip,qformer,llm}

Nobody has to run it: what it makes is shipped in embedded_world/weights; `make world` makes it
again. `sft.py` composes its model from these folders exactly as it composes one from
`openai/clip-vit-large-patch14-336` and friends. Trained on the clips of the `pretrain` split alone:
no policy, RL run or benchmark sees one of them.

  stage 1   vision tower + Q-Former learn the attributes of every clip (per colour: form, action,
            place at the start and at the end, order of appearance) through a linear read-out that
            is thrown away. The labels are the embedded world's stand-in for the 400 million
            captions behind CLIP; RL never sees them. Why: without it question answering stalls, the
            gradient through an untrained decoder teaches vision nothing. The read-out is local,
            four query tokens a colour and the same four linear maps for every colour, because a
            decoder reads by attention: what lies spread over all tokens it learns to read only
            slowly.
  stage 2   the layers below are locked; the last vision layer, the projections and a text tower
            learn CLIP's contrastive loss between a clip's frames (mean of frame embeddings) and its
            narrative. The result is a real `CLIPModel`: retrieval in `evaluate.py` reads its text
            features.      [LiT, arXiv:2111.07991]
"""

import copy
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.flags import Flags, answer_help, flag, parse_args


@dataclass
class Args(Flags):
    data: str = flag("data/moving_shapes", "folder made by embedded_world/moving_shapes.py")
    steps: int = flag(1600, "optimizer steps of stage 1", low=1)
    text_steps: int = flag(300, "optimizer steps of stage 2", low=1)
    batch_size: int = flag(32, "clips per step of stage 1", low=1)
    lr: float = flag(1e-3, "peak learning rate; linear warm-up, linear to zero", above=0)
    seed: int = flag(0, "initialisation and order of the data", low=0)


if __name__ == "__main__":
    answer_help(Args)  # before the imports below, which take seconds

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

import plumbing.run
from embedded_world.moving_shapes import ACTIONS, COLORS, QUADRANTS, SHAPES
from inputs.frames import read_frames
from model.compose import init_from_nothing
from plumbing import embedded, processes
from video_llm import TINY_QFORMER, TINY_VISION, VIDEO_TOKEN, VideoQFormer, VideoQFormerConfig

TINY_TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=128)
# the judge's words
PROMPT_WORDS = ("\nResponse 1: 1\nResponse 2: 2\nWhich response is better, 1 or 2?",
                "\nResponse 1: 2\nResponse 2: 1\nWhich response is better, 1 or 2?")
TINY_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ "
                 "m['content'] | replace('\\n', ' ') }}{% else %}<assistant>{{ m['content'] }}{{ "
                 "eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% "
                 "endif %}")
# attributes per colour: form (0: not there), action, start, end, order of appearance (3: all
# together) ...
CLASSES = (1 + len(SHAPES), len(ACTIONS), len(QUADRANTS), len(QUADRANTS), 4)
TOKEN_OF = (0, 1, 2, 2, 3)  # ... and which of a colour's four query tokens each is read from


def make_tokenizer(texts):
    """Byte-level BPE on the world's own sentences: its words are one token each, any other text
    still encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", VIDEO_TOKEN]
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=2, special_tokens=special,
                                  show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>", additional_special_tokens=special[3:],
                                   chat_template=TINY_TEMPLATE)


def attributes(clip):
    """One clip's labels (4 colours, 5 attributes), -100 where a colour is not there."""
    out = np.full((len(COLORS), len(CLASSES)), -100)
    out[:, 0] = 0
    for s in clip["shapes"]:
        out[list(COLORS).index(s["color"])] = (
            1 + SHAPES.index(s["shape"]), ACTIONS.index(s["action"]), QUADRANTS.index(s["start"]),
            QUADRANTS.index(s["end"]), 3 if s["together"] else s["order"])
    return out


def mirror(pixels, labels, rng):
    """Mirror half of the batches left-right and half top-bottom, labels with them: four worlds for
    one."""
    for axis, swap in ((-1, ("left", "right")), (-2, ("top", "bottom"))):
        if rng.random() < 0.5:
            exchange = lambda t: " ".join(swap[1 - swap.index(w)] if w in swap else w
                                          for w in t.split())
            moves = {"left": "moves left", "right": "moves right", "top": "moves up",
                     "bottom": "moves down"}
            a, b = ACTIONS.index(moves[swap[0]]), ACTIONS.index(moves[swap[1]])
            action_map = torch.arange(len(ACTIONS))
            action_map[a], action_map[b] = b, a
            place_map = torch.tensor([QUADRANTS.index(exchange(q)) for q in QUADRANTS])
            pixels, labels = pixels.flip(axis), labels.clone()
            for column, table in ((1, action_map), (2, place_map), (3, place_map)):
                there = labels[..., column] >= 0
                labels[..., column][there] = table[labels[..., column][there]]
    return pixels, labels


def attribute_loss(logits, labels):
    """Sum over attributes of the cross-entropy over the colours that are there. 5 x (B,4,classes),
    (B,4,5) -> ()."""
    return sum(F.cross_entropy(p.flatten(0, 1), labels[..., k].flatten(), ignore_index=-100)
               for k, p in enumerate(logits))


def clip_loss(image, text, log_scale):
    """CLIP's symmetric contrastive loss of matched rows, (B,D) (B,D) -> ().   [CLIP
                                                                               arXiv:2103.00020,
                                                                               Fig. 3]"""
    logits = log_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def optimize(params, args, steps, loss_of, title):
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    bar = tqdm(range(steps), desc=title, mininterval=5)
    for step in bar:
        for g in optimizer.param_groups:
            g["lr"] = args.lr * min((step + 1) / 50, (steps - step) / steps)
        loss = loss_of(step)
        if not torch.isfinite(loss):
            sys.exit(f"{title}, step {step}: the loss is {loss.item()}; nothing is written")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def main(args):
    command = ["embedded_world/moving_shapes.py", "--out", args.data]
    embedded.build_if_missing(f"{args.data}/clips.json", command, "under a minute", 0)
    hub, aside, began = Path(args.data, "hub"), Path(args.data, "hub.tmp"), time.time()
    processes.own(Path(args.data, "hub.lock"))
    if hub.exists():
        print(f"{hub} is there already; delete it to make it again")
        return
    shutil.rmtree(aside, ignore_errors=True)
    clips = [c for c in json.loads(Path(args.data, "clips.json").read_text())
             if c["split"] == "pretrain"]
    records = json.loads(Path(args.data, "pretrain.json").read_text())

    texts = [t["value"].replace("<video>\n", "") for r in records for t in r["conversations"]]
    tokenizer = make_tokenizer(texts + list(PROMPT_WORDS) * 2)
    tokenizer.save_pretrained(aside / "llm")
    # CLIPModel pools at the end token, unless that is id 2 (like </s>):
    clip_tokenizer = copy.deepcopy(tokenizer)
    # then at the highest id, in the middle of a sentence
    clip_tokenizer.add_special_tokens({"eos_token": "<end>"})

    num_frames = 8
    paths = [f"{args.data}/{c['video']}" for c in clips]
    frames = [read_frames(path, num_frames)[0]
              for path in tqdm(paths, desc="decoding", mininterval=5)]
    frames = torch.from_numpy(np.stack(frames)).permute(0, 1, 4, 2, 3)  # (C,F,3,H,W) uint8
    labels = torch.from_numpy(np.stack([attributes(c) for c in clips]))  # (C,4,5)
    size = TINY_VISION["image_size"]
    processor = CLIPImageProcessorPil(size={"height": size, "width": size},
                                      crop_size={"height": size, "width": size},
                                      do_center_crop=False)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    # the clips have the tower's size already
    pixels_of = lambda index: (frames[index].float() / 255 - mean) / std

    # stage 1: attributes
    ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
               pad_token_id=tokenizer.pad_token_id, eos_token_id=clip_tokenizer.eos_token_id)
    model = CLIPModel(CLIPConfig(text_config={**TINY_TEXT, **ids}, vision_config=TINY_VISION,
                                 projection_dim=TINY_VISION["projection_dim"]))
    qformer = VideoQFormer(VideoQFormerConfig(encoder_hidden_size=TINY_VISION["hidden_size"],
                                              **TINY_QFORMER))
    init_from_nothing(model, args.seed)
    init_from_nothing(qformer, args.seed + 1)
    model.logit_scale.data.fill_(np.log(1 / 0.07))
    torch.manual_seed(args.seed)
    readout = nn.ModuleList(nn.Linear(TINY_QFORMER["hidden_size"], n) for n in CLASSES)
    rng = np.random.default_rng(args.seed)

    encoder = model.vision_model.encoder
    layers = encoder.layers
    # VideoLLM reads layer -2: the last layer has nothing to learn in this stage
    encoder.layers = layers[:-1]

    def predict(pixels):
        hidden = model.vision_model(pixels.flatten(0, 1),
                                    output_hidden_states=True).hidden_states[-1]
        features = hidden.view(*pixels.shape[:2], *hidden.shape[1:])
        queries = qformer(features, torch.ones(features.shape[:2], dtype=torch.bool))
        tokens = queries.unflatten(1, (len(COLORS), -1))  # (B,4,4,D)
        return [read(tokens[:, :, t]) for read, t in zip(readout, TOKEN_OF)]

    def attribute_step(step):
        index = torch.from_numpy(rng.choice(len(clips), args.batch_size, replace=False))
        pixels, target = mirror(pixels_of(index), labels[index], rng)
        return attribute_loss(predict(pixels), target)

    read = [p for m in (model.vision_model.embeddings, model.vision_model.pre_layrnorm, encoder,
                        qformer, readout) for p in m.parameters()]
    optimize(read, args, args.steps, attribute_step, "stage 1: attributes")

    # stage 2: CLIP's loss on locked features
    words = model.text_model.embeddings.token_embedding.weight.data  # <end> begins as what </s> is
    words = torch.cat([words, words[tokenizer.eos_token_id].unsqueeze(0)])
    model.text_model.embeddings.token_embedding = nn.Embedding.from_pretrained(words, freeze=False)
    model.config.text_config.vocab_size = len(words)
    with torch.no_grad():
        locked = torch.cat([model.vision_model(pixels_of(i).flatten(0, 1),
                                               output_hidden_states=True).hidden_states[-1]
                            for i in torch.arange(len(clips)).split(100)])
    encoder.layers = layers
    locked = locked.view(len(clips), num_frames, *locked.shape[1:])  # (C,F,S,D)
    longest = TINY_TEXT["max_position_embeddings"] - 1
    story = [clip_tokenizer(c["narrative"]).input_ids[:longest] + [clip_tokenizer.eos_token_id]
             for c in clips]
    story = clip_tokenizer.pad({"input_ids": story}, return_tensors="pt")

    def contrastive_step(step):
        index = torch.from_numpy(rng.choice(len(clips), min(64, len(clips)), replace=False))
        last = layers[-1](locked[index].flatten(0, 1), attention_mask=None)
        # (B*F,D)
        cls = model.vision_model.post_layernorm((last[0] if isinstance(last, tuple)
                                                 else last)[:, 0])
        image = F.normalize(model.visual_projection(cls), dim=-1).view(len(index), num_frames,
                                                                       -1).mean(1)
        words = {"input_ids": story.input_ids[index], "attention_mask": story.attention_mask[index]}
        text = model.text_model(**words).pooler_output
        return clip_loss(image, model.text_projection(text), model.logit_scale)

    rest = [p
            for m in (layers[-1], model.vision_model.post_layernorm, model.visual_projection,
                      model.text_model, model.text_projection)
            for p in m.parameters()] + [model.logit_scale]
    optimize(rest, args, args.text_steps, contrastive_step, "stage 2: text tower")

    model.save_pretrained(aside / "clip")
    clip_tokenizer.save_pretrained(aside / "clip")
    processor.save_pretrained(aside / "clip")
    qformer.save_pretrained(aside / "qformer")
    Path(aside,
         "args.json").write_text(json.dumps(dict(vars(args), git_commit=plumbing.run.git_commit()),
                                            indent=2))
    aside.rename(hub)
    print(f"{hub}: clip, qformer, llm (tokenizer) in {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main(parse_args(Args))
