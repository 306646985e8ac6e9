"""Alignment and end-to-end tuning of the embedded model on packed questions.

Alignment first regresses the projector onto the symbolic embeddings that the language model was raised on, then end to
end the language model and the projector learn from answers alone, with all vision tokens of a window or picture.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from eval.mini import language, vision
from eval.mini.data import CHOICE_MIX, TUNING_MIX, Packer, ask_scene, build_tokenizer
from eval.mini.grounding import Grounding
from eval.mini.optim import MuonWithAdamW, grid_at, parse_phases, save_atomically, training_device

log = logging.getLogger(__name__)


@dataclass
class MiniLlava:
    """The three parts of a LLaVA model, bare, for training on windows of any size."""

    tower: CLIPVisionModel
    projector: nn.Sequential
    model: LlamaForCausalLM

    def vision_tokens(self, batch: vision.VisionBatch, tune_tower: bool = False) -> torch.Tensor:
        """Projected second-to-last hidden states without CLS, ``[batch, patches, hidden]``."""
        with torch.set_grad_enabled(tune_tower):
            features = vision.hidden_states(self.tower, batch.pixels, batch.positions)[-2][:, 1:]
        return self.projector(features)

    def to(self, device: torch.device) -> MiniLlava:
        """Move all parts."""
        return MiniLlava(self.tower.to(device), self.projector.to(device), self.model.to(device))

    def state_dict(self) -> dict:
        parts = {"tower": self.tower, "projector": self.projector, "model": self.model}
        state = {name: part.state_dict() for name, part in parts.items()}
        return state | {"vision_config": self.tower.config.to_dict(), "text_config": self.model.config.to_dict()}

    @classmethod
    def from_state_dict(cls, state: dict) -> MiniLlava:
        tower = CLIPVisionModel(CLIPVisionConfig.from_dict(state["vision_config"]))
        model = LlamaForCausalLM(LlamaConfig.from_dict(state["text_config"]))
        projector = new_projector(tower.config.hidden_size, model.config.hidden_size)
        for part, name in ((tower, "tower"), (projector, "projector"), (model, "model")):
            part.load_state_dict(state[name])
        tower.set_attn_implementation("eager")
        model.set_attn_implementation("mini_packed")
        return cls(tower, projector, model)

    @classmethod
    def from_hugging_face(cls, folder: Path) -> MiniLlava:
        """The parts of a folder written by :func:`eval.mini.export.export`, in float32."""
        whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model = LlamaForCausalLM(whole.config.text_config)
        model.model, model.lm_head = whole.model.language_model, whole.lm_head
        first, second = whole.model.multi_modal_projector.linear_1, whole.model.multi_modal_projector.linear_2
        parts = cls(whole.model.vision_tower, nn.Sequential(first, nn.GELU(), second), model)
        for config in (parts.tower.config, model.config):
            config.dtype = None  # an export says its own
        return cls.from_state_dict(parts.state_dict())


def new_projector(vision_size: int, hidden_size: int) -> nn.Sequential:
    """LLaVA-1.5's ``mlp2x_gelu``."""
    return nn.Sequential(nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


def align_projector(
    tower_path: Path, language_path: Path, output: Path, *, steps: int = 400, lr: float = 4e-3, seed: int = 0
) -> Path:
    """Regress the projector of a frozen tower onto the symbolic embeddings of a frozen language model."""
    torch.manual_seed(seed)
    tower, _ = vision.load_tower(tower_path)
    model, patches, grounding = language.load_language(language_path)
    projector = new_projector(tower.config.hidden_size, model.config.hidden_size)
    device = training_device()
    mini = MiniLlava.from_state_dict(MiniLlava(tower, projector, model).state_dict()).to(device)
    patches = patches.to(device)
    optimizer = MuonWithAdamW((mini.projector,), lr, steps)
    average = None
    for step in tqdm(range(steps), desc="align", mininterval=5):
        grid = (8, 12, 24)[step % 3]
        batch = vision.collate(language.batch_scenes(step, grid, max(2, 2304 // grid**2), seed + 1)).to(device)
        with torch.no_grad():
            target = patches(language.symbols_of(batch.labels, batch.positions))
        with torch.autocast(device.type, torch.bfloat16):
            tokens = mini.vision_tokens(batch)
        weight = torch.where(batch.labels["kind"] > 0, 1.0, vision.NOTHING_WEIGHT)[..., None]
        spread = ((target - target.mean((0, 1))) ** 2 * weight).mean()
        loss = ((tokens.float() - target) ** 2 * weight).mean() / spread
        loss.backward()
        optimizer.step(step)
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            log.info("align step %d unexplained variance %.4f", step + 1, average)
    save_atomically(mini.state_dict() | {"grounding": grounding.state_dict(), "step": 0}, output)
    return output


def initial_state(path: Path) -> dict:
    """State to begin tuning with: a stage's file, or an exported folder, which has no grounding read-outs."""
    if path.is_dir():
        return MiniLlava.from_hugging_face(path).state_dict()
    return torch.load(path, map_location="cpu", weights_only=True)


def tune(
    begin: Path,
    output: Path,
    phases: str,
    *,
    lr: float = 2.5e-3,
    questions_per_step: int = 96,
    choices: float = 0.0,
    tune_tower: bool = False,
    seed: int = 0,
    save_every: int = 50,
) -> Path:
    """Train projector and language model (and the tower, if wished) on answers, all vision tokens in place.

    Goes on where ``output`` stands, else from ``begin`` (see :func:`initial_state`). A share of ``choices`` of the
    questions comes with options. Under torch.distributed every process takes ``questions_per_step``.
    """
    plan = parse_phases(phases)
    total = sum(steps for _, steps in plan)
    state = initial_state(output if output.exists() else begin)
    start = state["step"] if output.exists() else 0
    device = training_device()
    mini = MiniLlava.from_state_dict(state).to(device)
    packer = Packer(build_tokenizer())
    grounding = None
    if "grounding" in state:
        grounding = Grounding(mini.model.config).to(device)
        grounding.load_state_dict(state["grounding"])
    mini.tower.requires_grad_(tune_tower)
    parts = [mini.model, mini.projector, mini.tower] + ([grounding] if grounding is not None else [])
    optimizer = MuonWithAdamW(parts, lr, total)
    if output.exists():
        optimizer.load_state_dict(state["optimizer"])
    rank = dist.get_rank() if dist.is_initialized() else 0
    accuracy = language.RunningAccuracy()
    for step in tqdm(range(start, total), initial=start, total=total, desc="tune", mininterval=5, disable=rank > 0):
        grid = grid_at(plan, step)
        per_scene = language.QUESTIONS[min(language.QUESTIONS, key=lambda side: abs(side - grid))]
        scenes = language.batch_scenes(step, grid, max(1, questions_per_step // per_scene), seed + 2)
        mix = CHOICE_MIX if choices else TUNING_MIX
        asked = [ask_scene(scene, per_scene, mix=mix, choices=choices) for scene in scenes]
        text = packer(asked).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            tokens = mini.vision_tokens(vision.collate(scenes).to(device), tune_tower)
            loss, right = language.answer_loss(mini.model, tokens, text, grounding)
        loss.backward()
        optimizer.step(step)
        accuracy.update(language.question_hits(right, text, [[question.type for question in row] for row in asked]))
        if (step + 1) % 10 == 0 and rank == 0:
            log.info("tune step %d grid %d loss %.3f %s", step + 1, grid, loss.item(), accuracy)
        if ((step + 1) % save_every == 0 or step + 1 == total) and rank == 0:
            progress = {"optimizer": optimizer.state_dict(), "step": step + 1}
            if grounding is not None:
                progress["grounding"] = grounding.state_dict()
            save_atomically(mini.state_dict() | progress, output)
    return output
