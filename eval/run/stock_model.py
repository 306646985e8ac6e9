"""Questions about images and videos to transformers' own multimodal classes: their processor and chat template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.run.asking import AskedModel, UnfitQuestion
from eval.run.visuals import TOKENS, Visual, kinds_of, placed
from llava.model.hosted.pixels import limited
from llava.video import Video
from mustdrop import Reducer

_VICUNA = "USER: {} ASSISTANT:"


@dataclass
class StockModel(AskedModel):
    """A stock model; its ``image_processor`` is transformers' whole processor, of text too."""

    @property
    def _tokens(self) -> dict[str, str]:
        """The placeholder of each kind of visual that the model takes."""
        found = {kind: getattr(self.image_processor, f"{kind}_token", None) for kind in TOKENS}
        if getattr(self.image_processor, "video_processor", None) is None:
            del found["video"]
        return found

    def for_method(self, reducer: Reducer) -> StockModel:
        return replace(self, image_processor=limited(self.image_processor, reducer))

    def prompt(self, question: str, images: int, answer: str | None = None, videos: Collection[int] = ()) -> str:
        """A one-turn conversation in the chat template of the checkpoint; images as ``LoadedModel.prompt`` has them.

        A checkpoint without a template gets Vicuna's turns.
        """
        tokens, kinds = self._tokens, ["video" if number in videos else "image" for number in range(images)]
        parts = placed(question, kinds)
        if parts is None:
            for kind in tokens:
                question = question.replace(TOKENS[kind], "")
            parts = [""] * images + [question.strip()]
        content: list[dict] = []
        for kind, text in zip([None, *kinds], parts, strict=True):
            content += ([{"type": kind}] if kind else []) + ([{"type": "text", "text": text}] if text else [])
        if self.image_processor.chat_template or self.tokenizer.chat_template:
            start = self.image_processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            start = _VICUNA.format("".join(part.get("text") or f"{tokens.get(part['type'])}\n" for part in content))
        if answer is None:
            return start
        return start + ("" if start[-1:].isspace() else " ") + answer + (self.tokenizer.eos_token or "")

    def encode(self, prompt: str, images: int | None = None) -> Tensor:
        """Ids of a prompt, int64 ``[length]``, with one placeholder for each image."""
        return torch.tensor(self.tokenizer(prompt).input_ids)

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[Visual]]) -> dict:
        """What the stock model's ``generate`` takes, padded on the left; arguments as ``LoadedModel.prepare``."""
        for prompt, own in zip(prompts, images, strict=True):
            self._check_tokens(prompt, kinds_of(own))
        shown = [self._read(visual) for own in images for visual in own]
        pictures = [visual for visual in shown if not isinstance(visual, Video)]
        videos = [list(visual.frames) for visual in shown if isinstance(visual, Video)]
        pad, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        given: dict[str, Any] = {"text": list(prompts), "padding": True, "return_tensors": "pt"}
        if videos:
            given["videos"] = videos
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        try:
            inputs = self.image_processor(images=pictures or None, **given)
        finally:
            self.tokenizer.padding_side = pad
        return {name: self._staged(self._cast(value)) for name, value in inputs.items()}

    def _check_tokens(self, prompt: str, kinds: Sequence[str]) -> None:
        """Raise UnfitQuestion if a prompt has not as many placeholders of each kind as visuals."""
        tokens = self._tokens
        if "video" in kinds and "video" not in tokens:
            needs = hasattr(self.image_processor, "video_processor")  # but transformers could not make it
            why = "needs torchvision for videos" if needs else "takes images only"
            raise UnfitQuestion(f"question: it shows a video, but {self.model.config.model_type} {why}")
        for kind, token in tokens.items():
            wanted = kinds.count(kind)
            if (found := prompt.count(token)) != wanted:
                raise UnfitQuestion(f"question: got {found} {kind} tokens for {wanted} {kind}s, expected as many")

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def _on_device(self, prepared: Mapping[str, Tensor]) -> dict:
        moved = {name: value.to(self.device, non_blocking=True) for name, value in prepared.items()}
        return {**moved, "pad_token_id": self.pad_token_id}

    def seen(self, picture: Visual) -> None:
        """None: an image is cut into tiles of a grid of its own, or several patches are one token."""
        return None

    @torch.inference_mode()
    def answer_prepared(self, prepared: dict, **generation) -> list[str]:
        """Generate for what ``prepare`` returned; stock models give the prompts' ids back before the new ones."""
        ids = self.model.generate(**self._on_device(prepared), **generation)
        new = ids[:, prepared["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
