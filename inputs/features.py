"""CLIP features of videos: every clip is decoded and encoded once, whatever asks for it."""

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from inputs.frames import VideoError, one_line, read_frames, video_files


@torch.no_grad()
def encode_frames(tower, pixel_values, layer):
    """pixel_values (F,3,H,W) -> features (F,S,D) of this layer of a CLIP tower; those after it are
    not computed."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(tower.dtype)))
    for block in tower.encoder.layers[: layer % (len(tower.encoder.layers) + 1)]:
        hidden = block(hidden, None)
    return hidden


class FeatureCache:
    """Frozen CLIP features of clips, computed once: `cache(clips)` -> features (B,F,S,D),
    frame_mask (B,F).

    One safetensors file per clip under `folder`, keyed by everything that the features depend on:
    file content, part, frame sampling, vision tower. Written aside and renamed, so a killed run or
    a second process leaves no half file. Up to `memory_gib` is also held in memory. Of `model`,
    `vision_tower` and `config.vision_layer` are read."""

    def __init__(self, model, processor, folder, memory_gib=4.0):
        self.tower, self.layer = model.vision_tower, model.config.vision_layer
        self.processor, self.folder = processor, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.memory, self.room, self.keys = {}, memory_gib * 2**30, {}
        weights = hashlib.sha256(json.dumps(model.config.vision_config.to_dict(), sort_keys=True,
                                            default=str).encode())
        for p in self.tower.state_dict().values():
            weights.update(p.detach().cpu().float().numpy().tobytes())
        image = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
        self.setup = f"{weights.hexdigest()}|{self.layer}|{image}|{self.tower.dtype}"

    def key(self, clip, num_frames):
        if (clip, num_frames) not in self.keys:
            if clip.path not in self.keys:
                content = hashlib.sha256()
                for part in video_files(clip.path):
                    with open(part, "rb") as f:
                        while block := f.read(1 << 20):
                            content.update(block)
                self.keys[clip.path] = content.hexdigest()
            what = (f"{self.setup}|{self.keys[clip.path]}|{clip.start}|{clip.end}|{num_frames}|"
                    f"{self.processor.sampling}")
            self.keys[clip, num_frames] = hashlib.sha256(what.encode()).hexdigest()
        return self.keys[clip, num_frames]

    def one(self, clip, num_frames=None):
        """Features (F,S,D) of one clip. Raises VideoError."""
        num_frames = num_frames or self.processor.num_frames
        try:
            key = self.key(clip, num_frames)
        except OSError as e:
            raise VideoError(one_line(f"{e.filename or clip.path}: {e.strerror or e}")) from None
        if key in self.memory:
            return self.memory[key]
        file = self.folder / key[:2] / f"{key}.safetensors"
        features = None
        if file.exists():
            with contextlib.suppress(SafetensorError, KeyError):  # damaged on the disk: made again
                features = load_file(file)["features"]
        if features is None:
            frames, _ = read_frames(clip.path, num_frames, clip.start, clip.end,
                                    self.processor.sampling)
            pixels = self.processor.image_processor(images=list(frames),
                                                    return_tensors="pt")["pixel_values"]
            features = encode_frames(self.tower, pixels.to(self.tower.device),
                                     self.layer).cpu().contiguous()
            file.parent.mkdir(exist_ok=True)
            aside = file.with_suffix(f".{secrets.token_hex(8)}.tmp")
            save_file({"features": features}, aside)
            os.replace(aside, file)
        size = features.numel() * features.element_size()
        if size <= self.room:
            self.memory[key], self.room = features, self.room - size
        return features

    def __call__(self, clips, num_frames=None):
        rows = [self.one(c, num_frames) for c in clips]
        features = torch.zeros(len(rows), max(map(len, rows)), *rows[0].shape[1:],
                               dtype=rows[0].dtype)
        mask = torch.zeros(features.shape[:2], dtype=torch.bool)
        for i, row in enumerate(rows):
            features[i, : len(row)], mask[i, : len(row)] = row, True
        return features, mask

    def prepare(self, clips, num_frames=None, progress=True):
        """Check and encode all clips before training starts -> {clip: one-line reason} of the
        broken ones."""
        broken, threads = {}, torch.get_num_threads()
        torch.set_num_threads(1)  # frames of one clip are too little work to share between cores
        for clip in tqdm(list(dict.fromkeys(clips)), desc="video features", mininterval=5,
                         disable=not progress):
            try:
                self.one(clip, num_frames)
            except VideoError as e:
                broken[clip] = str(e)
        torch.set_num_threads(threads)
        return broken
