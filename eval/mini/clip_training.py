"""The embedded video model: llava-mini's language model and projector trained on clips; its tower stays as it is.

Most steps see one random patch of each block of 2x2 patches, the same in all frames of a clip, the next ones two and
the last ones all four. Each patch keeps the rotary position that it has in the whole clip, so what the model learns
from a few holds for all; the choice is blind to what the patches show, so that no pruning is practised. While it
learns, read-outs that are dropped afterwards tell what is to be known on the way: see ``clip_grounding``. The first
steps have no questions: only the first layers run, and learn where a patch is, to find an object again in earlier
moments, and what it has done since.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from eval.mini import language, scenes, vision
from eval.mini.clip_grounding import ClipBatch, ClipGrounding, OnClips
from eval.mini.clip_questions import WORDS, ask
from eval.mini.clip_scenes import (
    CLIP_GRID,
    CORNER,
    MOMENTS,
    Clip,
    draw_clip,
    generate_clip,
    owners,
    trails,
)
from eval.mini.data import PackedText, Packer, build_tokenizer
from eval.mini.endtoend import MiniLlava
from eval.mini.optim import MuonWithAdamW, grid_at, parse_phases, save_atomically

log = logging.getLogger(__name__)

#: Clips, and questions per clip, of one step, by the number of patches of each 2x2 block; 0 is one without questions.
BATCH = {0: (8, 0), 1: (6, 28), 2: (4, 28), 4: (2, 32)}
#: Clips that are drawn for training; each is seen several times, with other patches and other questions.
CLIPS = 640


@dataclass
class ClipText(PackedText):
    """Packed questions about clips; ``places`` ``[batch, moments * patches]`` are the rotary positions of patches."""

    places: torch.Tensor

    def positions(self, n_vision: int) -> torch.Tensor:
        start = torch.arange(len(self.prefix)).expand(len(self.ids), -1)
        end = len(self.prefix) + MOMENTS * CLIP_GRID**2
        return torch.cat((start, len(self.prefix) + self.places, end + self.offsets), 1)


def choose_patches(rng: np.random.Generator, per_block: int) -> torch.Tensor:
    """``per_block`` random patches of each block of 2x2, ``int64 [patches]``, ascending."""
    blocks = CLIP_GRID // 2
    chosen = rng.random((blocks, blocks, 4)).argsort(-1)[..., :per_block]
    row, col = np.mgrid[0:blocks, 0:blocks][..., None] * 2 + np.stack((chosen // 2, chosen % 2))
    return torch.from_numpy((row * CLIP_GRID + col).ravel()).sort()[0]


def collate(clips: list[Clip], features: torch.Tensor, patches: list[torch.Tensor]) -> ClipBatch:
    """The chosen patches of clips; ``features`` are ``[clips, moments * 256, width]``, one list of patches per clip."""
    frame = torch.arange(MOMENTS)[:, None] * CLIP_GRID**2
    places = torch.stack([(frame + own).flatten() for own in patches])
    told = [torch.from_numpy(trails(clip)).flatten(0, 1)[own] for clip, own in zip(clips, places, strict=True)]
    whose = [torch.from_numpy(owners(clip)).flatten()[own] for clip, own in zip(clips, places, strict=True)]
    shown = [feature[own] for feature, own in zip(features, places, strict=True)]
    return ClipBatch(clips, torch.stack(shown).float(), places, torch.stack(told), torch.stack(whose))


@torch.no_grad()
def clip_features(tower: CLIPVisionModel, clips: list[Clip]) -> torch.Tensor:
    """What a tower says of whole clips, ``bfloat16 [clips, moments * 256, width]``."""
    pixels = vision.normalize(np.concatenate([draw_clip(clip) for clip in clips]))
    corner = torch.full((len(pixels),), CORNER)
    positions = vision.window_positions(corner, corner, CLIP_GRID)
    with torch.autocast("cpu", torch.bfloat16):
        features = vision.hidden_states(tower, pixels, positions)[-2][:, 1:]
    return features.reshape(len(clips), MOMENTS * CLIP_GRID**2, -1).bfloat16()


def stored_features(path: Path, tower: CLIPVisionModel, clips: list[Clip]) -> torch.Tensor:
    """:func:`clip_features`, computed once and kept in a file."""
    if not path.exists():
        parts = [clips[start : start + 4] for start in range(0, len(clips), 4)]
        parts = [clip_features(tower, part) for part in tqdm(parts, desc="tower", mininterval=30)]
        save_atomically({"features": torch.cat(parts)}, path)
    features = torch.load(path, mmap=True, weights_only=True)["features"]
    if len(features) != len(clips):
        raise ValueError(f"{path}: holds features of {len(features)} clips, expected {len(clips)}; move it away")
    return features


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


def training_clips(seed: int, count: int) -> list[Clip]:
    """The clips that a model is trained on; every seed has its own."""
    first = 800_000_000 + seed * 10_000_000
    return [generate_clip(scenes.scene_seed("train", first + index)) for index in range(count)]


def training_batch(clips: list[Clip], features: torch.Tensor, step: int, per_block: int) -> tuple[ClipBatch, list]:
    """The clips of one step, by turns, and the questions about each of them."""
    if per_block not in BATCH:
        raise ValueError(f"phases: got {per_block} patches of a block, expected one of {sorted(BATCH)}")
    count, per_clip = BATCH[per_block]
    order = np.random.default_rng((step * count // len(clips), 11)).permutation(len(clips))
    numbers = [int(order[(step * count + index) % len(clips)]) for index in range(count)]
    own = [clips[number] for number in numbers]
    rngs = [np.random.default_rng((clip.seed, step, 9)) for clip in own]
    patches = [choose_patches(rng, max(1, per_block)) for rng in rngs]
    asked = [ask(rng, clip, per_clip) if per_clip else [] for rng, clip in zip(rngs, own, strict=True)]
    return collate(own, features[numbers], patches), asked


def clip_loss(
    mini: MiniLlava, heads: ClipGrounding, batch: ClipBatch, text: ClipText
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of a batch and which answer tokens were right; without questions the loss of the first layers alone."""
    tokens = mini.projector(batch.features)
    if (text.blocks > 0).any():
        return language.answer_loss(mini.model, tokens, text, OnClips(mini.model.model, heads, batch))
    decoder = mini.model.model
    prefix = decoder.embed_tokens(text.prefix).expand(len(tokens), -1, -1)
    hidden = torch.cat((prefix, tokens.to(prefix.dtype)), 1)
    mask = text.attention_mask(tokens.shape[1], torch.bfloat16)[..., : hidden.shape[1], : hidden.shape[1]]
    rotary = decoder.rotary_emb(hidden, text.positions(tokens.shape[1])[:, : hidden.shape[1]])
    states = [hidden]
    for layer in decoder.layers[: heads.trail_depth]:
        states.append(layer(states[-1], attention_mask=mask, position_embeddings=rotary))
    trail = heads.trail_loss(states, batch.trails, len(text.prefix))
    return trail + heads.matching_loss(decoder, states, batch) + heads.place_loss(states, batch), None


def tune_clips(
    init: Path,
    output: Path,
    phases: str,
    *,
    lr: float = 2e-3,
    seed: int = 0,
    n_clips: int = CLIPS,
    save_every: int = 50,
) -> Path:
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
    packer, clips = Packer(build_tokenizer(WORDS)), training_clips(seed, n_clips)
    features = stored_features(output.with_name("clip_features.pt"), mini.tower, clips)
    accuracy, average = language.RunningAccuracy(), 0.0
    steps = range(state["step"], total)
    for step in tqdm(steps, initial=state["step"], total=total, desc="clips", mininterval=30):
        batch, asked = training_batch(clips, features, step, grid_at(plan, step))
        text = ClipText(**vars(packer(asked)), places=batch.places)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = clip_loss(mini, heads, batch, text)
        loss.backward()
        optimizer.step(step)
        average = 0.9 * average + 0.1 * loss.item()
        if right is not None:
            types = [[question.type for question in row] for row in asked]
            accuracy.update(language.question_hits(right, text, types))
        if (step + 1) % 10 == 0:
            log.info("clips step %d loss %.3f %s", step + 1, average, accuracy)
        if (step + 1) % save_every == 0 or step + 1 == total:
            progress = {"optimizer": optimizer.state_dict(), "step": step + 1, "grounding": heads.state_dict()}
            save_atomically(mini.state_dict() | progress, output)
    return output
