"""The embedded video model: llava-mini's language model and projector trained on clips; its tower stays as it is.

Most steps see one random patch of each block of 2x2 patches, the same in all frames of a clip, the next ones two and
the last ones all four. Each patch keeps the rotary position that it has in the whole clip, so what the model learns
from a few holds for all; the choice is blind to what the patches show, so that no pruning is practised. While it
learns, read-outs that are dropped afterwards tell what is to be known on the way: see :class:`ClipGrounding`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from llava.train.mini import language, scenes, vision
from llava.train.mini.clip_questions import WORDS, ask
from llava.train.mini.clip_scenes import BEHAVIOURS, CLIP_GRID, CORNER, MOMENTS, Clip, draw_clip, generate_clip, trails
from llava.train.mini.data import PackedText, Packer, PlacedMention, build_tokenizer
from llava.train.mini.endtoend import MiniLlava
from llava.train.mini.grounding import Grounding
from llava.train.mini.optim import MuonWithAdamW, grid_at, parse_phases, save_atomically

log = logging.getLogger(__name__)

#: Clips, and questions per clip, of one step, by the number of patches of each 2x2 block.
BATCH = {1: (6, 28), 2: (4, 28), 4: (3, 28)}


@dataclass
class ClipText(PackedText):
    """Packed questions about clips; ``places`` ``[batch, moments * patches]`` are the rotary positions of patches."""

    places: torch.Tensor

    def positions(self, n_vision: int) -> torch.Tensor:
        start = torch.arange(len(self.prefix)).expand(len(self.ids), -1)
        end = len(self.prefix) + MOMENTS * CLIP_GRID**2
        return torch.cat((start, len(self.prefix) + self.places, end + self.offsets), 1)


@dataclass
class ClipBatch:
    """Clips and some of their patches.

    ``pixels`` is ``[batch * moments, 3, side, side]``; ``patches`` ``[batch, patches]`` says which patches of every
    frame are shown, in ascending order; ``trails`` is ``[batch, moments * patches, 5]``.
    """

    clips: list[Clip]
    pixels: torch.Tensor
    patches: torch.Tensor
    trails: torch.Tensor

    @property
    def places(self) -> torch.Tensor:
        """Numbers of the patches in the whole clip, ``[batch, moments * patches]``."""
        return (torch.arange(MOMENTS)[None, :, None] * CLIP_GRID**2 + self.patches[:, None]).flatten(1)


def choose_patches(seed: int, per_block: int) -> torch.Tensor:
    """``per_block`` random patches of each block of 2x2, ``int64 [patches]``, ascending."""
    blocks = CLIP_GRID // 2
    chosen = np.random.default_rng((seed, 10)).random((blocks, blocks, 4)).argsort(-1)[..., :per_block]
    row, col = np.mgrid[0:blocks, 0:blocks][..., None] * 2 + np.stack((chosen // 2, chosen % 2))
    return torch.from_numpy((row * CLIP_GRID + col).ravel()).sort()[0]


def collate(clips: list[Clip], per_block: int) -> ClipBatch:
    """Draw full-size clips; ``per_block`` patches of each block of 2x2 are shown."""
    patches = torch.stack([choose_patches(clip.seed, per_block) for clip in clips])
    told = torch.from_numpy(np.stack([trails(clip) for clip in clips]))
    shown = told.gather(2, patches[:, None, :, None].expand(-1, MOMENTS, -1, told.shape[-1]))
    pixels = vision.normalize(np.concatenate([draw_clip(clip) for clip in clips]))
    return ClipBatch(clips, pixels, patches, shown.flatten(1, 2))


def _at(hidden: torch.Tensor, mentions: list[PlacedMention]) -> torch.Tensor:
    """Hidden states at the ends of noun phrases, ``[mentions, hidden]``."""
    return hidden[[item.row for item in mentions], [item.token for item in mentions]]


class ClipGrounding(nn.Module):
    """Read-outs of hidden states, dropped after training.

    At five sixteenths of the depth a vision token that shows an object knows what that object has done so far; at five
    eighths the end of a phrase knows what is meant, and what it does in the whole clip; three layers later the end of
    the second of two phrases knows which of the two appears first.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.meaning = Grounding(config)
        self.trail_depth = config.num_hidden_layers * 5 // 16
        self.norm = nn.LayerNorm(config.hidden_size)
        self.trail_head = nn.Linear(config.hidden_size, 5)
        self.doing_norm = nn.LayerNorm(config.hidden_size)
        self.doing_head = nn.Linear(config.hidden_size, len(BEHAVIOURS) + 4)
        self.order_head = nn.Linear(config.hidden_size, 1)

    def trail_loss(self, states: Sequence[torch.Tensor], told: torch.Tensor, start: int) -> torch.Tensor:
        """Error at patches with an object; ``told`` as :func:`clip_scenes.trails`, the first token at ``start``."""
        hidden = states[self.trail_depth][:, start : start + told.shape[1]]
        there = ~told[..., 0].isnan()
        return 8.0 * (self.trail_head(self.norm(hidden[there])).float() - told[there]).square().mean()

    def doing_loss(self, hidden: torch.Tensor, mentions: list[PlacedMention], clips: list[Clip]) -> torch.Tensor:
        """What one object does: behaviour, way in rows and columns, when it is first seen, how often it blinks."""
        actors = [clips[item.row].actor(item.meaning.entities[0]) for item in mentions]
        told = self.doing_head(self.doing_norm(_at(hidden, mentions))).float()
        behaviour = torch.tensor([BEHAVIOURS.index(actor.behaviour) for actor in actors])
        ways = [np.subtract(actor.place(MOMENTS - 1), actor.place(0)) / MOMENTS for actor in actors]
        facts = [(*way, actor.first_seen / MOMENTS, actor.blinks / 3) for way, actor in zip(ways, actors, strict=True)]
        error = told[:, len(BEHAVIOURS) :] - torch.tensor(np.array(facts, np.float32))
        return F.cross_entropy(told[:, : len(BEHAVIOURS)], behaviour) + 4.0 * error.square().mean()

    def order_loss(self, hidden: torch.Tensor, mentions: list[PlacedMention], clips: list[Clip]) -> torch.Tensor:
        """Whether the object named first appears first."""
        pairs = [
            [clips[item.row].actor(meant.entities[0]).first_seen for meant in (item.earlier, item.meaning)]
            for item in mentions
        ]
        target = torch.tensor([float(first < second) for first, second in pairs])
        logits = self.order_head(self.doing_norm(_at(hidden, mentions)))[:, 0].float()
        return F.binary_cross_entropy_with_logits(logits, target)


@dataclass
class OnClips:
    """The read-outs' losses for one batch, as ``language.answer_loss`` asks for them."""

    heads: ClipGrounding
    batch: ClipBatch

    def loss(self, states: Sequence[torch.Tensor], mentions: list[PlacedMention], length: int) -> torch.Tensor:
        told, meaning, clips = self.batch.trails, self.heads.meaning, self.batch.clips
        loss = self.heads.trail_loss(states, told, states[0].shape[1] - length - told.shape[1])
        hidden = states[meaning.depth][:, -length:]
        if mentions:
            loss = loss + meaning.meaning_loss(hidden, mentions)
        if single := [item for item in mentions if len(item.meaning.entities) == 1]:
            loss = loss + self.heads.doing_loss(hidden, single, clips)
        if compared := [item for item in mentions if item.earlier is not None]:
            loss = loss + self.heads.order_loss(states[meaning.compare_depth][:, -length:], compared, clips)
        return loss


def widen(model: LlamaForCausalLM, words: int) -> LlamaForCausalLM:
    """The model with ``words`` more entries at the end of its vocabulary, each near the mean of the others."""
    config = LlamaConfig.from_dict(model.config.to_dict() | {"vocab_size": model.config.vocab_size + words})
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = state[name]
        new = table.mean(0) + 0.5 * table.std(0) * torch.randn(words, table.shape[1])
        state[name] = torch.cat((table, new))
    wide = LlamaForCausalLM(config)
    wide.load_state_dict(state)
    wide.set_attn_implementation("mini_packed")
    return wide


def _begin(init: Path) -> dict:
    """The state before the first step, from the folder of an exported image model."""
    mini = MiniLlava.from_hugging_face(init)
    mini.model = widen(mini.model, len(WORDS))
    return mini.state_dict() | {"step": 0}


def tune_clips(init: Path, output: Path, phases: str, *, lr: float = 2e-3, seed: int = 0, save_every: int = 50) -> Path:
    """Train on clips, or go on where ``output`` stands; ``init`` is llava-mini's folder. On the CPU, in one process."""
    plan = parse_phases(phases)
    total = sum(steps for _, steps in plan)
    torch.manual_seed(seed)
    state = torch.load(output, map_location="cpu", weights_only=True) if output.exists() else _begin(init)
    mini = MiniLlava.from_state_dict(state)
    mini.tower.requires_grad_(False)
    heads = ClipGrounding(mini.model.config)
    optimizer = MuonWithAdamW((mini.model, mini.projector, heads), lr, total)
    if state["step"]:
        heads.load_state_dict(state["grounding"])
        optimizer.load_state_dict(state["optimizer"])
    packer = Packer(build_tokenizer(WORDS))
    accuracy = language.RunningAccuracy()
    steps = range(state["step"], total)
    for step in tqdm(steps, initial=state["step"], total=total, desc="clips", mininterval=30):
        batch, asked, text = training_batch(packer, step, grid_at(plan, step), seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = language.answer_loss(mini.model, clip_tokens(mini, batch), text, OnClips(heads, batch))
        loss.backward()
        optimizer.step(step)
        accuracy.update(language.question_hits(right, text, [[question.type for question in row] for row in asked]))
        if (step + 1) % 20 == 0:
            log.info("clips step %d loss %.3f %s", step + 1, loss.item(), accuracy)
        if (step + 1) % save_every == 0 or step + 1 == total:
            progress = {"optimizer": optimizer.state_dict(), "step": step + 1, "grounding": heads.state_dict()}
            save_atomically(mini.state_dict() | progress, output)
    return output


def clip_tokens(mini: MiniLlava, batch: ClipBatch) -> torch.Tensor:
    """Projected features of the chosen patches, frame by frame, ``[batch, moments * patches, hidden]``."""
    corner = torch.full((len(batch.pixels),), CORNER)
    with torch.no_grad():
        positions = vision.window_positions(corner, corner, CLIP_GRID)
        features = vision.hidden_states(mini.tower, batch.pixels, positions)[-2][:, 1:]
    chosen = batch.patches.repeat_interleave(MOMENTS, 0)[..., None].expand(-1, -1, features.shape[-1])
    return mini.projector(features.gather(1, chosen)).reshape(len(batch.clips), -1, mini.model.config.hidden_size)


def training_batch(packer: Packer, step: int, per_block: int, seed: int) -> tuple[ClipBatch, list, ClipText]:
    """The clips of one step with their questions; every step and seed has its own."""
    if per_block not in BATCH:
        raise ValueError(f"phases: got {per_block} patches of a block, expected one of {sorted(BATCH)}")
    count, per_clip = BATCH[per_block]
    first = 800_000_000 + seed * 10_000_000 + step * 16
    clips = [generate_clip(scenes.scene_seed("train", first + index)) for index in range(count)]
    asked = [ask(np.random.default_rng((clip.seed, 9)), clip, per_clip) for clip in clips]
    batch = collate(clips, per_block)
    return batch, asked, ClipText(**vars(packer(asked)), places=batch.places)
