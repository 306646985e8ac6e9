"""The embedded model's language model and its pre-training on symbolic pictures.

Before the language model sees features of a vision tower, it learns the task from labels: each patch is the sum of
embeddings of what it shows and of its row and column. Windows grow from 8x8 patches to the whole picture; labels are
blurred more and more, so that features of a real tower are no surprise.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.mini import scenes
from eval.mini.data import PackedText, Packer, ask_scene, build_tokenizer
from eval.mini.grounding import Grounding
from eval.mini.optim import MuonWithAdamW, grid_at, parse_phases, save_atomically, training_device
from eval.mini.option_loss import choosing_loss
from eval.mini.vision import coordinates, window_positions
from llava.constants import IGNORE_INDEX

log = logging.getLogger(__name__)

#: Strongest blur of symbolic labels, reached at the end of pre-training.
MAX_BLUR = 0.5
#: Questions per picture, by window side.
QUESTIONS = {8: 10, 12: 14, 16: 18, 24: 24}


def packed_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Causal attention in the inputs' dtype, ``[batch, heads, tokens, dim]`` -> ``[batch, tokens, heads, dim]``.

    Rows are taken in four parts, each against the keys up to its end. On a CPU this trains several times faster than
    SDPA's backward pass with an arbitrary mask.
    """
    tokens = query.shape[2]
    parts = []
    for rows in torch.arange(tokens).chunk(4):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        scores = (query[:, :, start:stop] * scaling) @ key[:, :, :stop].transpose(-1, -2)
        scores = scores + attention_mask[:, :, start:stop, :stop]
        parts.append(scores.softmax(-1) @ value[:, :, :stop])
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("mini_packed", packed_attention)


def language_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, layers: int = 16) -> LlamaConfig:
    """Shape of the embedded language model: many narrow layers, heads of 32."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class SymbolicPatches(nn.Module):
    """Embeds label distributions and coordinates of patches as a linear sum."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.label_embed = nn.Linear(sum(scenes.LABEL_GROUPS.values()) + 2, hidden_size)
        nn.init.normal_(self.label_embed.weight, std=0.1)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """``[..., classes + 2]`` (see :func:`symbols_of`) -> ``[..., hidden]``."""
        return self.label_embed(symbols)


def symbols_of(labels: dict[str, torch.Tensor], positions: torch.Tensor, blur: float = 0.0) -> torch.Tensor:
    """Label distributions of all groups and the coordinates, ``[batch, patches, classes + 2]``.

    With ``blur`` a random share of each label, up to that size, goes to random other classes.
    """
    parts = []
    for name, classes in scenes.LABEL_GROUPS.items():
        share = F.one_hot(labels[name], classes).float()
        if blur:
            amount = blur * torch.rand(share.shape[:-1])[..., None] ** 2
            share = (1 - amount) * share + amount * (3 * torch.randn_like(share)).softmax(-1)
        parts.append(share)
    place = coordinates(positions)
    return torch.cat((*parts, place + 0.02 * blur * torch.randn_like(place)), -1)


def answer_loss(
    model: LlamaForCausalLM, vision: torch.Tensor, text: PackedText, grounding: Grounding | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss on the answers, and on the way to them; and which answer tokens were right (bool, flat).

    ``vision`` is ``[batch, patches, hidden]`` in the language model's embedding space.
    """
    embed = model.get_input_embeddings()
    prefix = embed(text.prefix).expand(len(vision), -1, -1)
    embeds = torch.cat((prefix, vision.to(prefix.dtype), embed(text.ids)), 1)
    dtype = torch.bfloat16 if torch.is_autocast_enabled(embeds.device.type) else embeds.dtype
    mask, positions = text.attention_mask(vision.shape[1], dtype), text.positions(vision.shape[1])
    output = model.model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=grounding is not None or bool(text.choices),
    )
    length = text.ids.shape[1]
    before_answers = output.last_hidden_state[:, -length - 1 : -1][text.labels != IGNORE_INDEX]
    target = text.labels[text.labels != IGNORE_INDEX]
    logits = model.lm_head(before_answers).float()
    loss = F.cross_entropy(logits, target)
    if text.choices:
        loss = loss + choosing_loss(model, output.hidden_states, text, mask, positions)
    if grounding is not None:
        loss = loss + grounding.loss(output.hidden_states, text.mentions, length)
    return loss, logits.argmax(-1) == target


def question_hits(right: torch.Tensor, text: PackedText, types: list[list[str]]) -> dict[str, list[int]]:
    """``{type: [right answers, questions]}``; an answer is right if all its tokens are (teacher forcing)."""
    hits: dict[str, list[int]] = {}
    rows, columns = (text.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    keys = torch.stack((rows, text.blocks[rows, columns]), 1).tolist()
    answers: dict[tuple[int, int], bool] = {}
    for (row, block), is_right in zip(keys, right.tolist(), strict=True):
        answers[row, block] = answers.get((row, block), True) and is_right
    for (row, block), is_right in answers.items():
        count = hits.setdefault(types[row][block - 1], [0, 0])
        count[0] += is_right
        count[1] += 1
    return hits


class RunningAccuracy:
    """Exponential average of the accuracy per question type."""

    def __init__(self, keep: float = 0.95):
        self.keep = keep
        self.counts: dict[str, np.ndarray] = {}

    def update(self, hits: dict[str, list[int]]) -> None:
        for name, value in hits.items():
            self.counts[name] = self.keep * self.counts.get(name, np.zeros(2)) + np.array(value)

    def __str__(self) -> str:
        return " ".join(f"{name} {right / total:.3f}" for name, (right, total) in sorted(self.counts.items()))


def batch_scenes(step: int, grid: int, count: int, seed: int) -> list[scenes.Scene]:
    """The training scenes of one step; every step, rank and seed has its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    first = 500_000_000 + seed * 50_000_000 + step * 1000 + rank * 100
    return [scenes.generate_scene(scenes.scene_seed("train", first + index), grid) for index in range(count)]


def pretrain_language(
    output: Path,
    phases: str,
    *,
    lr: float = 3e-3,
    questions_per_step: int = 96,
    seed: int = 0,
    save_every: int = 100,
    config: LlamaConfig | None = None,
) -> Path:
    """Train a language model on symbolic pictures, or go on where ``output`` stands; returns the checkpoint's path.

    ``questions_per_step`` counts one process; under torch.distributed gradients are averaged over processes.
    """
    plan = parse_phases(phases)
    total = sum(steps for _, steps in plan)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    packer = Packer(tokenizer)
    device = training_device()
    model = LlamaForCausalLM(config or language_config(tokenizer)).to(device)
    model.set_attn_implementation("mini_packed")
    patches = SymbolicPatches(model.config.hidden_size).to(device)
    grounding = Grounding(model.config).to(device)
    optimizer = MuonWithAdamW((model, patches, grounding), lr, total)
    parts = {"model": model, "patches": patches, "grounding": grounding}
    start = _restore(output, parts, optimizer)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(seed + 1000 * rank + start)
    accuracy = RunningAccuracy()
    for step in tqdm(range(start, total), initial=start, total=total, desc="language", mininterval=5, disable=rank > 0):
        grid = grid_at(plan, step)
        per_scene = QUESTIONS[min(QUESTIONS, key=lambda side: abs(side - grid))]
        batch = batch_scenes(step, grid, max(1, questions_per_step // per_scene), seed)
        asked = [ask_scene(scene, per_scene) for scene in batch]
        text = packer(asked).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            vision = patches(symbolic_batch(batch, blur=MAX_BLUR * step / total).to(device))
            loss, right = answer_loss(model, vision, text, grounding)
        loss.backward()
        optimizer.step(step)
        accuracy.update(question_hits(right, text, [[question.type for question in row] for row in asked]))
        if (step + 1) % 25 == 0 and rank == 0:
            log.info("language step %d grid %d loss %.3f %s", step + 1, grid, loss.item(), accuracy)
        if ((step + 1) % save_every == 0 or step + 1 == total) and rank == 0:
            _save(output, parts, optimizer, step + 1)
    return output


def symbolic_batch(batch: list[scenes.Scene], blur: float = 0.0) -> torch.Tensor:
    """Symbols of scenes of one window size, ``[batch, patches, classes + 2]``."""
    maps = [scenes.patch_labels(scene) for scene in batch]
    labels = {name: torch.from_numpy(np.stack([item[name].ravel() for item in maps])) for name in scenes.LABEL_GROUPS}
    top, left = torch.tensor([scene.top for scene in batch]), torch.tensor([scene.left for scene in batch])
    return symbols_of(labels, window_positions(top, left, batch[0].grid), blur)


def load_language(path: Path) -> tuple[LlamaForCausalLM, SymbolicPatches, Grounding]:
    """Language model, symbolic embeddings and read-outs of a checkpoint written by :func:`pretrain_language`."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = LlamaForCausalLM(LlamaConfig.from_dict(state["config"]))
    patches, grounding = SymbolicPatches(model.config.hidden_size), Grounding(model.config)
    for part, name in ((model, "model"), (patches, "patches"), (grounding, "grounding")):
        part.load_state_dict(state[name])
    return model, patches, grounding


def _save(path: Path, parts: dict[str, nn.Module], optimizer: MuonWithAdamW, step: int) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    config = parts["model"].config.to_dict()
    save_atomically(state | {"optimizer": optimizer.state_dict(), "config": config, "step": step}, path)


def _restore(path: Path, parts: dict[str, nn.Module], optimizer: MuonWithAdamW) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])
    log.info("language: going on from step %d of %s", state["step"], path)
    return state["step"]
