"""Optimiser, schedule and checkpoint files shared by the mini pre-training stages."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


class MuonWithAdamW:
    """Muon on the hidden matrices, AdamW on everything else, both on one trapezoidal schedule.

    The learning rate rises over the first 2 % of the steps, stays, and falls linearly to a twentieth over the
    last ``decay`` share. Muon's update is scaled to AdamW's root mean square, so one rate serves both.
    """

    def __init__(
        self, modules: Iterable[nn.Module], lr: float, total_steps: int, decay: float = 0.4, warmup: float = 0.02
    ):
        self.lr, self.total_steps, self.decay, self.warmup = lr, total_steps, decay, warmup
        matrices, rest = [], []
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    hidden = parameter.ndim == 2 and "embed" not in name and "head" not in name
                    (matrices if hidden else rest).append(parameter)
        self.parameters = matrices + rest
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rise = (step + 1) / max(1.0, self.warmup * self.total_steps)
        fall = (self.total_steps - step) / max(1.0, self.decay * self.total_steps)
        return self.lr * min(1.0, rise, max(0.05, fall))

    def step(self, step: int) -> None:
        """Average gradients over processes, clip to norm 1, update, clear the gradients."""
        if dist.is_initialized():
            self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _average_gradients(self) -> None:
        """Mean over processes; a parameter that some process's batch did not use counts as zero there."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, mean in zip(
            self.parameters, flat.split([item.numel() for item in self.parameters]), strict=True
        ):
            parameter.grad.copy_(mean.view_as(parameter))

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def training_device() -> torch.device:
    """This process's accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def save_atomically(state: dict, path: Path) -> None:
    """``torch.save`` that never leaves a half-written file under the final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def parse_phases(text: str) -> list[tuple[int, int]]:
    """``"8:400,24:100"`` -> ``[(8, 400), (24, 100)]``: window side in patches and number of steps."""
    phases = []
    for part in text.split(","):
        grid, _, steps = part.partition(":")
        if not (grid.isdigit() and steps.isdigit()):
            raise ValueError(f"phases: {part!r} should look like GRID:STEPS, for example 8:400")
        phases.append((int(grid), int(steps)))
    return phases


def grid_at(phases: list[tuple[int, int]], step: int) -> int:
    """Window side that a step trains on."""
    for grid, steps in phases:
        if step < steps:
            return grid
        step -= steps
    return phases[-1][0]
