"""transformers' Trainer with what LLaVA adds: the projector's learning rate, batches by modality, its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import Sampler
from transformers import Trainer

PROJECTOR_FILE = "mm_projector.bin"


class LlavaTrainer(Trainer):
    """Trains a ``LlavaLlamaForCausalLM``.

    Parameters
    ----------
    projector_only : bool
        Save ``mm_projector.bin`` instead of the whole model, as LLaVA's alignment stage does.
    """

    def __init__(self, *args, projector_only: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.projector_only = projector_only

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As the base class, but with ``mm_projector_lr`` for the projector if it is given."""
        optimizer = super().create_optimizer(model)
        if self.args.mm_projector_lr is None:
            return optimizer
        names = {id(parameter): name for name, parameter in (model or self.model).named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            projector = [parameter for parameter in group["params"] if "mm_projector" in names[id(parameter)]]
            others = [parameter for parameter in group["params"] if "mm_projector" not in names[id(parameter)]]
            settings = {key: value for key, value in group.items() if key != "params"}
            groups += [settings | {"params": others}, settings | {"params": projector, "lr": self.args.mm_projector_lr}]
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not self.args.group_by_modality_length or dataset is None:
            return super()._get_train_sampler(train_dataset)
        megabatch = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return ModalityLengthSampler(dataset.modality_lengths, megabatch, self.args.seed)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, or in the alignment stage the projector and the configuration."""
        if not self.projector_only:
            super().save_model(output_dir, _internal_call)
            return
        state = self.accelerator.get_state_dict(self.model_wrapped if self.is_deepspeed_enabled else self.model)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        projector = {key: value.cpu() for key, value in state.items() if "mm_projector" in key}
        torch.save(projector, folder / PROJECTOR_FILE)
        self.model.config.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Resume: in the alignment stage only the projector was saved."""
        if not self.projector_only:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        state = torch.load(Path(resume_from_checkpoint) / PROJECTOR_FILE, map_location="cpu", weights_only=True)
        (model or self.model).load_state_dict(state, strict=False)


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
