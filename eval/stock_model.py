"""Questions about pictures to transformers' own multimodal classes: their processor, their chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval.asking import AskedModel, UnfitQuestion
from llava.constants import DEFAULT_IMAGE_TOKEN

_VICUNA = "USER: {} ASSISTANT:"


@dataclass
class StockModel(AskedModel):
    """A stock model; its ``image_processor`` is transformers' whole processor, of text too."""

    def prompt(self, question: str, images: int, answer: str | None = None) -> str:
        """A one-turn conversation in the chat template of the checkpoint; images as ``LoadedModel.prompt`` has them.

        A checkpoint without a template gets Vicuna's turns.
        """
        token = self.image_processor.image_token
        parts = question.split(DEFAULT_IMAGE_TOKEN) if question.count(DEFAULT_IMAGE_TOKEN) == images else None
        if parts is None:
            parts = [""] * images + [question.replace(DEFAULT_IMAGE_TOKEN, "").strip()]
        content: list[dict] = []
        for place, text in enumerate(parts):
            content += [{"type": "image"}] * (place > 0) + ([{"type": "text", "text": text}] if text else [])
        if self.image_processor.chat_template or self.tokenizer.chat_template:
            start = self.image_processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            start = _VICUNA.format("".join(part.get("text", token + "\n") for part in content))
        if answer is None:
            return start
        return start + ("" if start[-1:].isspace() else " ") + answer + (self.tokenizer.eos_token or "")

    def encode(self, prompt: str, images: int | None = None) -> Tensor:
        """Ids of a prompt, int64 ``[length]``, with one placeholder for each image."""
        return torch.tensor(self.tokenizer(prompt).input_ids)

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict:
        """What the stock model's ``generate`` takes, padded on the left; arguments as ``LoadedModel.prepare``."""
        token = self.image_processor.image_token
        for prompt, own in zip(prompts, images, strict=True):
            if prompt.count(token) != len(own):
                raise UnfitQuestion(
                    f"question: got {prompt.count(token)} image tokens for {len(own)} images, expected as many"
                )
        pictures = [self._read(picture) for own in images for picture in own]
        pad, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        given: dict[str, Any] = {"text": list(prompts), "padding": True, "return_tensors": "pt"}
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        try:
            inputs = self.image_processor(images=pictures or None, **given)
        finally:
            self.tokenizer.padding_side = pad
        return {name: self._staged(self._cast(value)) for name, value in inputs.items()}

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def _on_device(self, prepared: Mapping[str, Tensor]) -> dict:
        moved = {name: value.to(self.device, non_blocking=True) for name, value in prepared.items()}
        return {**moved, "pad_token_id": self.pad_token_id}

    def seen(self, picture: Image.Image) -> None:
        """None: a picture is cut into tiles of a grid of its own, or several patches are one token."""
        return None

    @torch.inference_mode()
    def answer_prepared(self, prepared: dict, **generation) -> list[str]:
        """Generate for what ``prepare`` returned; stock models give the prompts' ids back before the new ones."""
        ids = self.model.generate(**self._on_device(prepared), **generation)
        new = ids[:, prepared["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
