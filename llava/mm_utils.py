"""From pictures to pixel tensors and from prompts with images in them to token ids."""

import base64
import binascii
import os
from collections.abc import Sequence
from http.client import HTTPException
from io import BytesIO
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.anyres import (
    divide_to_patches,
    get_anyres_image_grid_shape,
    process_anyres_image,
    resize_and_pad_image,
    select_best_resolution,
)
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

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

DOWNLOAD_TIMEOUT_SECONDS = 30


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


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """Open a picture.

    Parameters
    ----------
    source : str, os.PathLike or PIL.Image.Image
        A file, an ``http(s)://`` address, or a picture that is open already.

    Returns
    -------
    PIL.Image.Image
        The picture as RGB. Transparency is dropped, as LLaVA does.

    Raises
    ------
    ValueError
        If the picture is missing, cannot be fetched, or is no picture.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"image: got {type(source).__name__}, expected a path, an http(s) address or a PIL image")
    try:
        return _decode_image(_fetch(source) if str(source).startswith(("http://", "https://")) else source)
    except FileNotFoundError:
        reason = "there is no such file"
    except IsADirectoryError:
        reason = "it is a folder"
    except URLError as error:
        reason = f"it cannot be fetched: {error.reason}"
    except HTTPException as error:
        reason = f"it cannot be fetched: {type(error).__name__} {error}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = f"it cannot be read as a picture: {error}"
    raise ValueError(f"image {str(source)!r}: {reason}; expected a readable picture file such as PNG or JPEG")


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Open a picture that arrives as base64 text.

    Parameters
    ----------
    image : str or bytes
        An encoded picture file, with or without a ``data:image/...;base64,`` prefix.

    Returns
    -------
    PIL.Image.Image
        The picture, in the mode it was saved in.

    Raises
    ------
    ValueError
        If the text is not base64 or what it encodes is no picture.
    """
    text = image.decode("ascii", errors="replace") if isinstance(image, bytes) else image
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return Image.open(BytesIO(base64.b64decode(text)))
    except (OSError, binascii.Error, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: base64 text of {len(text)} characters is no readable picture ({error})") from error


def expand2square(image: Image.Image, background_color: Sequence[int]) -> Image.Image:
    """Pad a picture to a square, itself in the middle.

    Parameters
    ----------
    image : PIL.Image.Image
        A picture of any mode, size ``(width, height)`` in pixels.
    background_color : sequence of int
        Red, green and blue of the border, 0 to 255.

    Returns
    -------
    PIL.Image.Image
        An RGB picture as wide and high as the longer side of ``image``. An odd border is one pixel wider at the right
        or bottom.
    """
    image = image.convert("RGB")
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(background_color))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def process_images(
    images: Sequence[Image.Image], image_processor: CLIPImageProcessorPil, model_cfg: object
) -> torch.Tensor | list[torch.Tensor]:
    """Turn pictures into what the vision tower takes.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        Pictures of any mode and size; each is read as RGB. Whatever else :func:`load_image` opens will do too.
    image_processor : CLIPImageProcessorPil
        The vision tower's image processor.
    model_cfg : object
        Has ``image_aspect_ratio``: ``"pad"`` pads to a square in the processor's mean colour, ``"anyres"`` cuts tiles
        and also needs ``image_grid_pinpoints``; ``"square"``, ``"original"``, None or no such attribute crop the
        centre.

    Returns
    -------
    torch.Tensor or list of torch.Tensor
        ``[images, 3, height, width]`` float32, normalised; for anyres ``[images, 1 + tiles, 3, height, width]``, or a
        list of ``[1 + tiles, 3, height, width]`` where the pictures have different numbers of tiles.

    Raises
    ------
    ValueError
        If there is no picture, one cannot be opened, or ``image_aspect_ratio`` is unknown.
    """
    if len(images) == 0:
        raise ValueError("images: got none, expected at least one picture")
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    images = [load_image(image) for image in images]
    if aspect_ratio == "anyres":
        tiled = [process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in images]
        return torch.stack(tiled) if len({len(tiles) for tiles in tiled}) == 1 else tiled
    if aspect_ratio == "pad":
        mean_color = [int(channel * 255) for channel in image_processor.image_mean]
        images = [expand2square(image, mean_color) for image in images]
    elif aspect_ratio not in CROPPED_ASPECT_RATIOS:
        raise ValueError(f"image_aspect_ratio: got {aspect_ratio!r}, expected pad, anyres, square, original or None")
    return image_processor(images, return_tensors="pt")["pixel_values"]


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Tokenize a prompt, one id for each ``<image>`` in it.

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
    for index, text in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
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


def _fetch(address: str) -> BytesIO:
    request = Request(address, headers={"User-Agent": "Mozilla/5.0 (llava)"})
    with urlopen(request, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
        return BytesIO(response.read())


def _decode_image(file: str | os.PathLike | BytesIO) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
