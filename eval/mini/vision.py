"""The embedded model's vision tower and its pre-training on per-patch labels.

The tower is a CLIP-layout ViT. Its second-to-last hidden state is trained to tell, for every patch, each label of
``scenes.LABEL_GROUPS`` and the patch's own row and column; CLS in the last block lists what the scene holds, so that
its attention goes to what matters. Most steps see small windows, with the position embeddings of their true place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from eval.mini import scenes
from eval.mini.optim import MuonWithAdamW, grid_at, parse_phases, save_atomically, training_device

log = logging.getLogger(__name__)

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
#: Weight of "nothing here" patches, which are the majority, in the per-patch losses.
NOTHING_WEIGHT = 0.25


def vision_config(hidden_size: int = 192, layers: int = 6, heads: int = 3) -> CLIPVisionConfig:
    """Shape of the embedded tower: 336 px, patches of 14, 576 tokens and CLS."""
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=scenes.PATCH * scenes.FULL_GRID,
        patch_size=scenes.PATCH,
        projection_dim=hidden_size,
    )


def new_tower(config: CLIPVisionConfig) -> CLIPVisionModel:
    """A fresh tower whose position embeddings start smooth, so that neighbouring plain patches look alike."""
    tower = CLIPVisionModel(config)
    tower.set_attn_implementation("eager")  # on short sequences on a CPU, five times faster than SDPA's backward pass
    table = tower.embeddings.position_embedding.weight
    grid = config.image_size // config.patch_size
    axis = torch.arange(grid) / (grid - 1) * 2 - 1
    row, col = torch.meshgrid(axis, axis, indexing="ij")
    waves = torch.stack([row, col, row * col, (torch.pi * row).sin(), (torch.pi * col).sin()], -1).reshape(
        grid * grid, -1
    )
    with torch.no_grad():
        table[1:] = 0.3 * waves @ torch.randn(waves.shape[1], config.hidden_size) / waves.shape[1] ** 0.5
        tower.embeddings.patch_embedding.weight.mul_(0.5)
    return tower


def window_positions(top: torch.Tensor, left: torch.Tensor, grid: int) -> torch.Tensor:
    """Positions in the full grid of a window's patches, ``[batch, grid*grid]``, from its corner ``[batch]``."""
    row = top[:, None] + torch.arange(grid)
    col = left[:, None] + torch.arange(grid)
    return (row[:, :, None] * scenes.FULL_GRID + col[:, None, :]).flatten(1)


def hidden_states(tower: CLIPVisionModel, pixels: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states ``[batch, 1 + patches, hidden]`` after the embeddings and after each block, for a window.

    ``pixels`` is ``[batch, 3, side, side]``, ``positions`` ``[batch, patches]`` within the full grid. On a full picture
    this equals ``CLIPVisionModel(..., output_hidden_states=True)``.
    """
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    patches = patches + embeddings.position_embedding.weight[positions + 1]
    cls = (embeddings.class_embedding + embeddings.position_embedding.weight[0]).expand(len(pixels), 1, -1)
    states = [tower.pre_layrnorm(torch.cat((cls, patches), 1))]
    for block in tower.encoder.layers:
        states.append(block(states[-1], attention_mask=None))
    return states


def scene_attributes(scene: scenes.Scene) -> np.ndarray:
    """Multi-hot ``float32 [n]`` of what a scene shows: shape-colour pairs, patterns, sizes, letters, sign colours."""
    pairs = np.zeros((len(scenes.SHAPES), len(scenes.COLOR_NAMES)), np.float32)
    patterns, sizes = np.zeros(len(scenes.PATTERNS), np.float32), np.zeros(len(scenes.SIZES), np.float32)
    letters, signs = np.zeros(len(scenes.ALPHABET), np.float32), np.zeros(len(scenes.COLOR_NAMES), np.float32)
    for item in scene.objects:
        pairs[scenes.SHAPES.index(item.shape), scenes.COLOR_NAMES.index(item.color)] = 1
        patterns[scenes.PATTERNS.index(item.pattern)] = 1
        sizes[scenes.SIZES.index(item.size)] = 1
    for sign in scene.signs:
        signs[scenes.COLOR_NAMES.index(sign.color)] = 1
        for letter in sign.word:
            letters[scenes.ALPHABET.index(letter)] = 1
    return np.concatenate((pairs.ravel(), pairs.max(0), pairs.max(1), patterns, sizes, letters, signs))


@dataclass
class VisionBatch:
    """Pictures of one window size with what they show (see :func:`collate`)."""

    pixels: torch.Tensor
    positions: torch.Tensor
    labels: dict[str, torch.Tensor]
    attributes: torch.Tensor

    def to(self, device: torch.device) -> VisionBatch:
        """The batch on a device."""
        labels = {name: values.to(device) for name, values in self.labels.items()}
        return VisionBatch(self.pixels.to(device), self.positions.to(device), labels, self.attributes.to(device))


def normalize(images: np.ndarray) -> torch.Tensor:
    """``uint8 [batch, side, side, 3]`` -> CLIP-normalised ``float32 [batch, 3, side, side]``."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


def collate(batch: list[scenes.Scene]) -> VisionBatch:
    """Render scenes of one window size; labels are ``int64 [batch, patches]``, attributes ``float32 [batch, n]``."""
    drawn = [scenes.render_with_labels(scene) for scene in batch]
    labels = {
        name: torch.from_numpy(np.stack([maps[name].ravel() for _, maps in drawn])) for name in scenes.LABEL_GROUPS
    }
    top, left = torch.tensor([scene.top for scene in batch]), torch.tensor([scene.left for scene in batch])
    return VisionBatch(
        normalize(np.stack([image for image, _ in drawn])),
        window_positions(top, left, batch[0].grid),
        labels,
        torch.from_numpy(np.stack([scene_attributes(scene) for scene in batch])),
    )


def coordinates(positions: torch.Tensor) -> torch.Tensor:
    """Row and column of positions in the full grid, scaled to -1..1, ``[..., 2]``."""
    last = scenes.FULL_GRID - 1
    return torch.stack((positions // scenes.FULL_GRID, positions % scenes.FULL_GRID), -1) / last * 2 - 1


class VisionHeads(nn.Module):
    """Linear read-outs used only in pre-training: labels and coordinates of patches, attributes on CLS."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.patch_head = nn.Linear(hidden_size, sum(scenes.LABEL_GROUPS.values()) + 2)
        n_attributes = len(scene_attributes(scenes.Scene(0, scenes.FULL_GRID, 0, 0, ())))
        self.scene_head = nn.Linear(hidden_size, n_attributes)

    def patch_logits(self, features: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Logits per label group ``[batch, patches, classes]`` and coordinates ``[batch, patches, 2]``."""
        *groups, place = self.patch_head(features).split([*scenes.LABEL_GROUPS.values(), 2], -1)
        return dict(zip(scenes.LABEL_GROUPS, groups, strict=True)), place


def vision_loss(
    tower: CLIPVisionModel, heads: VisionHeads, batch: VisionBatch
) -> tuple[torch.Tensor, dict[str, float]]:
    """Summed pre-training loss and, per label group, the accuracy on patches that show something."""
    states = hidden_states(tower, batch.pixels, batch.positions)
    logits, place = heads.patch_logits(states[-2][:, 1:])
    loss = 4.0 * F.mse_loss(place.float(), coordinates(batch.positions))
    metrics = {}
    for name, target in batch.labels.items():
        score, target = logits[name].flatten(0, 1).float(), target.flatten()
        weight = torch.where(target > 0, 1.0, NOTHING_WEIGHT)
        loss = loss + (F.cross_entropy(score, target, reduction="none") * weight).sum() / weight.sum()
        shown = target > 0
        if shown.any():
            metrics[name] = (score[shown].argmax(-1) == target[shown]).float().mean().item()
    summary = heads.scene_head(tower.post_layernorm(states[-1][:, 0])).float()
    scene_loss = F.binary_cross_entropy_with_logits(summary, batch.attributes)
    metrics["scene_bce"] = scene_loss.item()
    return loss + 4.0 * scene_loss, metrics


def pretrain_vision(
    output: Path,
    phases: str,
    *,
    lr: float = 2e-3,
    patches_per_step: int = 3072,
    seed: int = 0,
    save_every: int = 200,
    config: CLIPVisionConfig | None = None,
) -> Path:
    """Train a tower from nothing, or go on where ``output`` stands; returns the checkpoint's path.

    ``phases`` is ``GRID:STEPS`` pairs (:func:`optim.parse_phases`). Step ``i`` always sees the same scenes.
    """
    plan = parse_phases(phases)
    total = sum(steps for _, steps in plan)
    torch.manual_seed(seed)
    device = training_device()
    tower = new_tower(config or vision_config()).to(device)
    heads = VisionHeads(tower.config.hidden_size).to(device)
    optimizer = MuonWithAdamW((tower, heads), lr, total)
    start = _restore(output, tower, heads, optimizer)
    running: dict[str, float] = {}
    for step in tqdm(range(start, total), initial=start, total=total, desc="vision", mininterval=5):
        batch = collate(_scenes_of_step(step, grid_at(plan, step), patches_per_step, seed)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss, metrics = vision_loss(tower, heads, batch)
        loss.backward()
        optimizer.step(step)
        for name, value in {"loss": loss.item(), **metrics}.items():
            running[name] = 0.98 * running.get(name, value) + 0.02 * value
        if (step + 1) % 50 == 0:
            log.info("vision step %d grid %d %s", step + 1, grid_at(plan, step), _format(running))
        if (step + 1) % save_every == 0 or step + 1 == total:
            _save(output, tower, heads, optimizer, step + 1)
    return output


def load_tower(path: Path) -> tuple[CLIPVisionModel, VisionHeads]:
    """Tower and read-outs of a checkpoint written by :func:`pretrain_vision`."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    tower = CLIPVisionModel(CLIPVisionConfig.from_dict(state["config"]))
    heads = VisionHeads(tower.config.hidden_size)
    tower.load_state_dict(state["tower"])
    heads.load_state_dict(state["heads"])
    return tower, heads


def _scenes_of_step(step: int, grid: int, patches: int, seed: int) -> list[scenes.Scene]:
    count = max(1, patches // grid**2)
    first = seed * 100_000_000 + step * 1000
    return [scenes.generate_scene(scenes.scene_seed("train", first + index), grid) for index in range(count)]


def _save(path: Path, tower, heads, optimizer, step: int) -> None:
    state = {
        "tower": tower.state_dict(),
        "heads": heads.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": tower.config.to_dict(),
        "step": step,
    }
    save_atomically(state, path)


def _restore(path: Path, tower, heads, optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    tower.load_state_dict(state["tower"])
    heads.load_state_dict(state["heads"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("vision: going on from step %d of %s", state["step"], path)
    return state["step"]


def _format(metrics: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in metrics.items())
