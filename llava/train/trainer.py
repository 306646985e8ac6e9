"""transformers' Trainer with what LLaVA adds: the projector's learning rate, batches by modality, its files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from llava.constants import IGNORE_INDEX
from llava.train.lora import load_lora, save_lora, trained_weights

log = logging.getLogger(__name__)

PROJECTOR_FILE = "mm_projector.bin"


class LlavaTrainer(Trainer):
    """Trains a ``LlavaLlamaForCausalLM``, or one that PEFT has wrapped.

    Parameters
    ----------
    projector_only : bool
        Save ``mm_projector.bin`` instead of the whole model, as LLaVA's alignment stage does.

    Attributes
    ----------
    unlearned : int
        Examples so far, on this process, of which nothing could be learned: no answer within the length limit.
    """

    def __init__(self, *args, projector_only: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.projector_only = projector_only
        self.unlearned = 0

    @property
    def is_lora(self) -> bool:
        """Whether adapters are trained."""
        return hasattr(self.model, "peft_config")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the base class, but with ``mm_projector_lr`` for the projector if it is given."""
        ready = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.args.mm_projector_lr is None:
            return optimizer
        if not ready:
            optimizer.param_groups[:] = self._split_projector(optimizer.param_groups)
        elif hasattr(optimizer, "params") and isinstance(optimizer.params[0], nn.Parameter):
            # DeepSpeed's own optimizer, which it makes later from these parameters
            optimizer.params = self._split_projector([{"params": optimizer.params}])
        return optimizer

    def _split_projector(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups in which the projector is apart and has its own learning rate."""
        projector = {id(value) for name, value in self.model.named_parameters() if "mm_projector" in name}
        split = []
        for group in groups:
            own = [value for value in group["params"] if id(value) in projector]
            others = [value for value in group["params"] if id(value) not in projector]
            split += [group | {"params": others}, group | {"params": own, "lr": self.args.mm_projector_lr}]
        return [group for group in split if group["params"]]

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not self.args.group_by_modality_length or dataset is None:
            return super()._get_train_sampler(train_dataset)
        megabatch = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ModalityLengthSampler(dataset.modality_lengths, megabatch, seed)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """As the base class, but never zero: a step without anything to learn has no loss instead of NaN."""
        rows = [(batch["labels"] == IGNORE_INDEX).all(1).sum() for batch in batch_samples]
        self.unlearned += int(sum(rows))
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count.clamp(min=1) if isinstance(count, Tensor) else count

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; of LoRA what was trained; in the alignment stage the projector. With the configuration."""
        if not self.projector_only and not self.is_lora:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        if self.is_lora:
            save_lora(self.model, folder, self.args.should_save)
        else:
            weights = trained_weights(self.model)
            if self.args.should_save:
                torch.save(weights, folder / PROJECTOR_FILE)
                self.model.config.save_pretrained(folder)
        if self.args.should_save:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Resume: of LoRA and in the alignment stage only what was trained was saved."""
        model = model or self.model
        if self.is_lora:
            load_lora(model, resume_from_checkpoint)
        elif self.projector_only:
            state = torch.load(Path(resume_from_checkpoint) / PROJECTOR_FILE, map_location="cpu", weights_only=True)
            model.load_state_dict(state, strict=False)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class ModalityLengthSampler(Sampler[int]):
    """Random order in which a batch holds examples of similar length, all with or all without an image.

    Parameters
    ----------
    lengths : list of int
        Length of each example, negative for text-only ones.
    batch : int
        Examples of one optimiser step, over all processes.
    seed : int
        With the epoch, decides the order.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Another order for every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        full, rest = [], []
        for sign in (1, -1):
            own = [index for index, length in enumerate(self.lengths) if (length > 0) == (sign > 0)]
            own = [own[place] for place in torch.randperm(len(own), generator=generator)]
            for start in range(0, len(own), 50 * self.batch):
                window = sorted(own[start : start + 50 * self.batch], key=lambda index: abs(self.lengths[index]))
                batches = [window[first : first + self.batch] for first in range(0, len(window), self.batch)]
                full += [batch for batch in batches if len(batch) == self.batch]
                rest += [index for batch in batches if len(batch) < self.batch for index in batch]
        order = torch.randperm(len(full), generator=generator).tolist()
        return iter([index for place in order for index in full[place]] + rest)
