"""From images to pixel tensors and from prompts with images in them to token ids."""

import os
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.anyres import (
    canvases,
    divide_to_patches,
    get_anyres_image_grid_shape,
    process_anyres_image,
    resize_and_pad_image,
    select_best_resolution,
)
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.images import MAX_PIXELS, load_image, load_image_from_base64

__all__ = [
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image",
    "load_image_from_base64",
    "load_image_processor",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]

CROPPED_ASPECT_RATIOS = (None, "square", "original")
"""Settings under which LLaVA leaves the shape to the image processor: shortest edge resized, centre cropped."""

LARGEST_SQUARE = 2048
"""Side in pixels of the largest square that is padded before it is shrunk; larger ones are never built."""

STRIP = 256
"""Rows of an image that are shrunk at a time."""

LONGEST_RATIO = 64
"""Of an image longer than so many times its short side, only the middle counts where the centre is cropped anyway."""


def load_image_processor(path: str | os.PathLike) -> CLIPImageProcessorPil:
    """Load a CLIP image processor that gives the same pixels on every machine.

    ``CLIPImageProcessor`` of transformers 5 interpolates with torchvision where that is installed, and its pixels can
    then differ from those LLaVA was trained with. This one always interpolates with Pillow, as transformers 4 did.

    Parameters
    ----------
    path : str or os.PathLike
        Folder or Hub name of the vision tower.

    Returns
    -------
    CLIPImageProcessorPil
        The processor described by the tower's ``preprocessor_config.json``.
    """
    return CLIPImageProcessorPil.from_pretrained(path)


def expand2square(image: Image.Image, background_color: Sequence[int]) -> Image.Image:
    """Pad an image to a square, itself in the middle.

    Parameters
    ----------
    image : PIL.Image.Image
        An image of any mode, size ``(width, height)`` in pixels.
    background_color : sequence of int
        Red, green and blue of the border, 0 to 255.

    Returns
    -------
    PIL.Image.Image
        An RGB image as wide and high as the longer side of ``image``. An odd border is one pixel wider at the right
        or bottom.

    Raises
    ------
    ValueError
        If the square would have more than ``llava.images.MAX_PIXELS``.
    """
    image = load_image(image)
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side * side > MAX_PIXELS:
        raise ValueError(
            f"image: a square around {width} x {height} pixels has more than {MAX_PIXELS}, shrink it first"
        )
    square = Image.new("RGB", (side, side), tuple(background_color))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def shrink_padded(
    image: Image.Image, background_color: Sequence[int], side: int, resample: Image.Resampling
) -> Image.Image:
    """Pad to a square and resize that, as ``expand2square`` and ``resize`` do to the bit, in little memory.

    Pillow resizes rows first and then columns, with 8-bit samples in between; so rows can be padded and shrunk a strip
    at a time, and the rows above and below the image need not be shrunk at all: they are of one colour.

    Parameters
    ----------
    image : PIL.Image.Image
        An RGB image of any size.
    background_color : sequence of int
        Red, green and blue of the border, 0 to 255.
    side : int
        Width and height of the result in pixels.
    resample : PIL.Image.Resampling
        The filter.
    """
    width, height = image.size
    longer, color = max(width, height), tuple(background_color)
    left, top = (longer - width) // 2, (longer - height) // 2
    narrow = Image.new("RGB", (side, longer), color)
    for start in range(0, height, STRIP):
        rows = min(STRIP, height - start)
        strip = Image.new("RGB", (longer, rows), color)
        strip.paste(image.crop((0, start, width, start + rows)), (left, 0))
        narrow.paste(strip.resize((side, rows), resample), (0, top + start))
    return narrow.resize((side, side), resample)


def process_images(
    images: Sequence[Image.Image], image_processor: CLIPImageProcessorPil, model_cfg: object
) -> torch.Tensor | list[torch.Tensor]:
    """Turn images into what the vision tower takes.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        Images of any mode and size; each is read as :func:`load_image` does. Whatever else that opens will do too.
    image_processor : CLIPImageProcessorPil
        The vision tower's image processor.
    model_cfg : object
        Has ``image_aspect_ratio``: ``"pad"`` pads to a square in the processor's mean color, ``"anyres"`` cuts tiles
        and also needs ``image_grid_pinpoints``, and may have ``protocol``, see :func:`llava.anyres.canvases`;
        ``"square"``, ``"original"``, None or no such attribute crop the centre.

    Returns
    -------
    torch.Tensor or list of torch.Tensor
        ``[images, 3, height, width]`` float32, normalised; for anyres ``[images, 1 + tiles, 3, height, width]``, or a
        list of ``[1 + tiles, 3, height, width]`` where the images have different numbers of tiles.

    Raises
    ------
    ValueError
        If there is no image, one cannot be opened, or ``image_aspect_ratio`` is unknown.
    """
    if len(images) == 0:
        raise ValueError("images: got none, expected at least one image")
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    images = [load_image(image) for image in images]
    if aspect_ratio == "anyres":
        sizes = canvases(model_cfg, image_processor.crop_size["height"])
        tiled = [process_anyres_image(image, image_processor, sizes) for image in images]
        return torch.stack(tiled) if len({len(tiles) for tiles in tiled}) == 1 else tiled
    if aspect_ratio == "pad":
        mean_color = [int(channel * 255) for channel in image_processor.image_mean]
        images = [_padded(image, mean_color, image_processor) for image in images]
    elif aspect_ratio in CROPPED_ASPECT_RATIOS:
        images = [_without_ends(image) for image in images]
    else:
        raise ValueError(f"image_aspect_ratio: got {aspect_ratio!r}, expected pad, anyres, square, original or None")
    return image_processor(images, return_tensors="pt")["pixel_values"]


def _padded(image: Image.Image, color: Sequence[int], processor: CLIPImageProcessorPil) -> Image.Image:
    """The image in a square, which is already as small as the processor would make it if it is large."""
    side = processor.size.get("shortest_edge") or processor.size["height"]
    if max(image.size) <= LARGEST_SQUARE or not processor.do_resize:
        return expand2square(image, color)
    return shrink_padded(image, color, side, Image.Resampling(processor.resample))


def _without_ends(image: Image.Image) -> Image.Image:
    """The middle of a very long image: the processor would first enlarge all of it, then crop the middle."""
    width, height = image.size
    short, long = sorted(image.size)
    if long <= LONGEST_RATIO * short:
        return image
    cut = (long - LONGEST_RATIO * short) // 2  # the same at both ends
    return image.crop((cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut))


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
    images: int | None = None,
) -> list[int] | torch.Tensor:
    """Tokenize a prompt, one id for each ``<image>`` in it that stands for an image.

    The text between images is tokenized piece by piece, as LLaVA was trained: every piece has its own leading space,
    only the first has a beginning-of-sequence token.

    Parameters
    ----------
    prompt : str
        The prompt; may be empty, may hold any number of images.
    tokenizer : PreTrainedTokenizerBase
        See :func:`llava.model.tokenizer.load_tokenizer`.
    image_token_index : int
        The id that stands for an image.
    return_tensors : str, optional
        ``"pt"`` for a tensor.
    images : int, optional
        How many ``<image>`` stand for images, the first ones; the others are text. By default all do.

    Returns
    -------
    list of int or torch.Tensor
        The ids; as a tensor, ``[tokens]`` int64.

    Raises
    ------
    ValueError
        If ``return_tensors`` is neither None nor ``"pt"``.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors: got {return_tensors!r}, expected 'pt' or None")
    ids = []
    for index, text in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN, -1 if images is None else images)):
        piece = tokenizer(text).input_ids
        if index > 0:
            ids.append(image_token_index)
            if piece and piece[0] == tokenizer.bos_token_id:
                piece = piece[1:]
        ids.extend(piece)
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """Name a model after its folder.

    Parameters
    ----------
    model_path : str
        Folder or Hub name.

    Returns
    -------
    str
        The last part of the path; for a training checkpoint ``run/checkpoint-100``, ``run_checkpoint-100``.
    """
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop a sample as soon as what was generated for it contains one of some texts.

    ``generate()`` passes the prompt along when it was given ids and leaves it out when it was given embeddings; both
    are recognised, and the prompt is never searched.

    Parameters
    ----------
    keywords : sequence of str
        The texts that end an answer.
    tokenizer : PreTrainedTokenizerBase
        Decodes what was generated.
    input_ids : torch.Tensor
        ``[batch, prompt]`` int64, the prompts.

    Raises
    ------
    ValueError
        If a keyword is empty.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor) -> None:
        self.keywords = [keywords] if isinstance(keywords, str) else list(keywords)
        if "" in self.keywords:
            raise ValueError(f"keywords: got {self.keywords}, expected texts that are not empty")
        self.tokenizer = tokenizer
        self.prompt_ids = input_ids
        # A token stands for at least one byte, and decoding may strip one leading space.
        self.window = 1 + max((len(keyword.encode()) for keyword in self.keywords), default=0)

    def __call__(self, output_ids: torch.Tensor, scores: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Say which samples are done.

        Parameters
        ----------
        output_ids : torch.Tensor
            ``[batch, tokens]`` int64, all ids so far, with or without the prompt; may be empty.
        scores : torch.Tensor, optional
            Not used.
        **kwargs
            Not used.

        Returns
        -------
        torch.Tensor
            ``[batch]`` bool.
        """
        generated = output_ids[:, self._generated_from(output_ids) :]
        done = [self._contains_keyword(ids) for ids in generated[:, -self.window :].tolist()]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)

    def _generated_from(self, output_ids: torch.Tensor) -> int:
        """Find the column where the answer begins: after the prompt, or after a lone beginning-of-sequence token."""
        prompt = self.prompt_ids.to(output_ids.device)
        length = prompt.shape[1]
        if output_ids.shape[1] >= length:
            same = (output_ids[:, None, :length] == prompt[None]).all(-1)  # [batch, prompts]: beams repeat prompts
            if same.any(-1).all():
                return length
        begins_with_bos = output_ids.shape[1] > 0 and bool((output_ids[:, 0] == self.tokenizer.bos_token_id).all())
        return int(begins_with_bos)

    def _contains_keyword(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids)
        return any(keyword in text for keyword in self.keywords)
