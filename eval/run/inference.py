"""Questions about images and videos, in batches, to a loaded LLaVA: what plugin and calibration share."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from eval.run.asking import AskedModel, UnfitQuestion
from eval.run.stock_model import StockModel
from eval.run.visuals import Visual, placed, read
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, load_image, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.video import Video, process_video

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


Item, Prepared = TypeVar("Item"), TypeVar("Prepared")


def ahead(prepare: Callable[[Item], Prepared], items: Iterable[Item]) -> Iterator[Prepared]:
    """``prepare(item)`` of every item in order, the next one's in a thread while the caller works on this one's.

    What `prepare` raises is raised here, where its result was due.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as worker:
        waiting: deque = deque()
        for item in items:
            waiting.append(worker.submit(prepare, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def resolve_device(device: str | None = None) -> str:
    """A usable device; ValueError if it cannot be used.

    By default ``cuda`` where there is one, else ``cpu``; every process of a distributed run takes the GPU of its own.
    """
    if not device:
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{os.environ['LOCAL_RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "cuda"
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected cpu, cuda, cuda:1, ...") from None
    if kind == "cuda" and (index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype of a name in ``DTYPES``; ``auto`` is float16 on a GPU (as LLaVA was released) and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.float16
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _digest(visual: Visual) -> bytes:
    """Of an image's RGB pixels, or of all frames of a video."""
    digest = hashlib.sha256()
    for frame in visual.frames if isinstance(visual, Video) else [load_image(visual)]:
        digest.update(frame.tobytes())
    if isinstance(visual, Video):
        digest.update(b"video")
    return digest.digest()


@dataclass
class LoadedModel(AskedModel):
    """Our own LLaVA, asked in LLaVA's conversation templates; `load` also gives transformers' own classes."""

    @classmethod
    def load(
        cls,
        pretrained: str,
        *,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        conv_template: str = "vicuna_v1",
        model_base: str | None = None,
        load_4bit: bool = False,
        load_8bit: bool = False,
        protocol: str | None = None,
    ) -> AskedModel:
        """Load a checkpoint in evaluation mode.

        Parameters
        ----------
        pretrained : str
            Folder or hub id of any form of checkpoint, see docs/checkpoints.md.
        device : str, optional
            By default ``cuda`` where there is one.
        device_map : str, optional
            ``auto`` spreads a model over several GPUs; by default it goes to ``device`` whole.
        dtype, attn_implementation, conv_template : str
            See ``resolve_dtype``, transformers and ``llava.conversation``.
        model_base : str, optional
            The model under a checkpoint that holds only a projector or an adapter; an adapter may name it itself.
        load_4bit, load_8bit : bool
            Quantise the language model with bitsandbytes.
        protocol : {"model", "flat"}, optional
            How a LLaVA-NeXT lays out images, see ``load_pretrained_model``.

        Raises
        ------
        ValueError
            If a name is unknown, or the checkpoint cannot be loaded; nothing has been loaded then.
        """
        if conv_template not in conv_templates:
            raise ValueError(
                f"conv_template: got {conv_template!r}, expected one of {', '.join(sorted(conv_templates))}"
            )
        if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
            raise ValueError(
                "attn_implementation: flash_attention_2 is not installed here; pip install '.[flash]', or sdpa"
            )
        device = resolve_device(device)
        torch_dtype = resolve_dtype(dtype, device)
        tokenizer, model, image_processor, context_len = load_pretrained_model(
            pretrained,
            model_base,
            get_model_name_from_path(pretrained),
            device_map=device_map,
            device=None if device_map else device,
            torch_dtype=torch_dtype,
            attn_implementation=attn_implementation,
            load_4bit=load_4bit,
            load_8bit=load_8bit,
            protocol=protocol,
        )
        kind = cls if isinstance(model, LlavaMetaForCausalLM) else StockModel
        return kind(tokenizer, model.eval(), image_processor, context_len, conv_template)

    def prompt(self, question: str, images: int, answer: str | None = None, videos: Collection[int] = ()) -> str:
        """A one-turn conversation.

        Image tokens in the question say where the images go if there are as many as images. Otherwise the images come
        first, and what the question says of ``<image>`` is text, as it is where there is no image at all. A model that
        was trained with ``mm_use_im_start_end`` gets its marks around every image. A video is an image of several views
        and has one ``<image>``; in the question it may be a ``<video>``.

        Parameters
        ----------
        question : str
            The user's turn.
        images : int
            How many images belong to it.
        answer : str, optional
            The model's turn; None ends the prompt where the model is to speak.
        videos : collection of int
            Numbers of those images that are videos.
        """
        marked = DEFAULT_IMAGE_TOKEN
        if self.model.config.mm_use_im_start_end:
            marked = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        parts = placed(question, ["video" if number in videos else "image" for number in range(images)])
        if parts is not None:
            question = marked.join(parts)
        elif images:
            question = " ".join([marked] * images) + "\n" + question
        conversation = conv_templates[self.conv_template].copy()
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], answer)
        return conversation.get_prompt()

    def encode(self, prompt: str, images: int | None = None) -> Tensor:
        """Ids of a prompt, int64 ``[length]``, ``IMAGE_TOKEN_INDEX`` for each of the first ``images`` image tokens."""
        return tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt", images=images)

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[Visual]]) -> dict:
        """The host's part of a batch, padded on the left; it may be done in another thread.

        Parameters
        ----------
        prompts : sequence of str
            What ``prompt`` returns.
        images : sequence of sequences of PIL.Image.Image or Video
            The images and videos of every prompt, in the order of its image tokens; empty for text alone. Image tokens
            beyond them are text.

        Returns
        -------
        dict
            ``input_ids`` and ``attention_mask`` ``[batch, length]``, ``images`` (list of tensors or None),
            ``image_sizes``, ``pad_token_id``.

        Raises
        ------
        UnfitQuestion
            If a prompt has fewer image tokens than images, or an image cannot be read.
        """
        ids = [self._encode(prompt, len(own)) for prompt, own in zip(prompts, images, strict=True)]
        length = max(map(len, ids))
        input_ids = torch.full((len(ids), length), self.pad_token_id)
        attention_mask = torch.zeros((len(ids), length), dtype=torch.bool)
        for row, prompt_ids in enumerate(ids):
            input_ids[row, length - len(prompt_ids) :] = prompt_ids
            attention_mask[row, length - len(prompt_ids) :] = True
        pictures = [self._read(picture) for own in images for picture in own]
        return {
            "input_ids": self._staged(input_ids),
            "attention_mask": self._staged(attention_mask),
            "images": self._pixels(pictures),
            "image_sizes": [picture.size for picture in pictures] or None,
            "pad_token_id": self.pad_token_id,
        }

    def _encode(self, prompt: str, images: int) -> Tensor:
        if (tokens := prompt.count(DEFAULT_IMAGE_TOKEN)) < images:
            raise UnfitQuestion(f"question: got {tokens} image tokens for {images} images, expected as many")
        return self.encode(prompt, images)

    def _pixels(self, visuals: list[Visual]) -> list[Tensor] | None:
        """One tensor per visual; those that look the same are prepared once and are one tensor, encoded once."""
        if not visuals:
            return None
        visuals = [read(visual) for visual in visuals]
        keys = [(visual.size, _digest(visual)) for visual in visuals]  # what they look like is their RGB pixels alone
        different = dict(zip(keys, visuals, strict=True))
        videos = {key: visual for key, visual in different.items() if isinstance(visual, Video)}
        pictures = [visual for key, visual in different.items() if key not in videos]
        pixels = iter(process_images(pictures, self.image_processor, self.model.config) if pictures else ())
        ready = {
            key: self._staged((self._frames(videos[key]) if key in videos else next(pixels)).to(self.dtype))
            for key in different
        }
        return [ready[key] for key in keys]

    def _frames(self, video: Video) -> Tensor:
        """A video's views `[frames, 3, side, side]`."""
        try:
            return process_video(video, self.image_processor, self.model.config)
        except ValueError as error:
            raise UnfitQuestion(str(error)) from None

    def _on_device(self, prepared: dict) -> dict:
        """A prepared batch where the model is; one tensor for several prompts stays one."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(self.device, non_blocking=True)
            return moved[id(tensor)]

        images = prepared["images"]
        return {
            **prepared,
            "input_ids": move(prepared["input_ids"]),
            "attention_mask": move(prepared["attention_mask"]),
            "images": None if images is None else [move(tiles) for tiles in images],
        }

    def seen(self, picture: Visual) -> Image.Image | None:
        """An image as the vision tower sees it, padded or cropped and resized; whole for tiles; None for videos."""
        if isinstance(picture, Video):
            return None
        pixels = process_images([picture], self.image_processor, self.model.config)[0]
        if pixels.dim() != 3:
            return picture.convert("RGB")
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return Image.fromarray(((pixels * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())

    @torch.inference_mode()
    def answer_prepared(self, prepared: dict, **generation) -> list[str]:
        """Generate for what ``prepare`` returned."""
        ids = self.model.generate(**self._on_device(prepared), **generation)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
