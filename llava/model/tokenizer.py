"""Tokenizers that give the ids LLaVA was trained with.

LLaVA uses the sentencepiece ("slow") LLaMA tokenizer. Transformers 5 builds every ``LlamaTokenizer`` on the
``tokenizers`` library instead, whatever ``use_fast`` says, and that one adds no leading space to a text that already
begins with one: `` and`` becomes ``[▁and]`` where LLaVA has seen ``[▁, ▁and]``. A prompt is cut at its images and the
piece after an image often begins with a space, so the difference is common. :class:`LlamaTokenizer` here keeps the
sentencepiece ids.
"""

import os
from pathlib import Path
from typing import ClassVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_sentencepiece import SPIECE_UNDERLINE, SentencePieceBackend
from transformers.utils import cached_file

VOCABULARY_FILE = "tokenizer.model"
SPECIAL_TOKENS_PATTERNS = {(True, False): "bos", (False, True): "eos", (True, True): "bos_eos", (False, False): "none"}


class LlamaTokenizer(SentencePieceBackend):
    """The sentencepiece LLaMA tokenizer, id for id as in transformers 4.37.2 with ``use_fast=False``.

    It bears the name of the class it stands in for because that name is written to ``tokenizer_config.json`` on saving,
    and a saved checkpoint must stay loadable without this package.

    Parameters
    ----------
    vocab_file : str
        Path of the sentencepiece model, ``tokenizer.model``.
    unk_token, bos_token, eos_token, pad_token : str or None
        Special tokens. Without a padding token, padding uses ``unk_token`` as LLaVA does.
    add_bos_token, add_eos_token : bool
        Whether an encoded text begins with ``bos_token`` or ends with ``eos_token``.
    legacy : bool
        With True, every stretch of text after a special token gets a leading space of its own; with False (LLaVA-1.5),
        only the beginning of the whole text does.
    **kwargs
        Passed on to the base class (``model_max_length``, ``padding_side``, ``sp_model_kwargs``, ...).
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool = True,
        **kwargs,
    ) -> None:
        kwargs["special_tokens_pattern"] = SPECIAL_TOKENS_PATTERNS[bool(add_bos_token), bool(add_eos_token)]
        kwargs["sp_model_kwargs"] = kwargs.get("sp_model_kwargs") or {}
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=unk_token if pad_token is None else pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            legacy=legacy,
            **kwargs,
        )

    def tokenize(self, text: str, **kwargs) -> list[str]:
        """Split a text into pieces.

        Parameters
        ----------
        text : str
            Any text; special tokens spelled out in it are recognised.
        **kwargs
            Passed on to the base class.

        Returns
        -------
        list of str
            The pieces, ``▁`` for a space. The empty text has none.
        """
        if self.legacy or not text:
            return super().tokenize(text, **kwargs)
        pieces = super().tokenize(SPIECE_UNDERLINE + text.replace(SPIECE_UNDERLINE, " "), **kwargs)
        only_the_prefix_before_a_special_token = (
            len(pieces) > 1 and pieces[0] == SPIECE_UNDERLINE and pieces[1] in self.all_special_tokens
        )
        return pieces[1:] if only_the_prefix_before_a_special_token else pieces

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to a text, byte pieces to characters.

        Parameters
        ----------
        tokens : list of str
            Pieces as :meth:`tokenize` returns them.

        Returns
        -------
        str
            The text without the space that tokenising put in front.
        """
        if not tokens:
            return ""
        tokens = [tokens[0].removeprefix(SPIECE_UNDERLINE), *tokens[1:]]
        special = set(self._added_tokens_encoder)
        text, stretch = "", []
        for index, token in enumerate(tokens):
            if token not in special:
                stretch.append(token)
                continue
            swallowed_space = self.legacy and index > 0 and tokens[index - 1] not in special
            text += (" " if swallowed_space else "") + self.sp_model.decode(stretch) + token
            stretch = []
        return text + self.sp_model.decode(stretch)


def tokenizer_folder(folders: list[Path]) -> Path:
    """The first folder that has a tokenizer, else the last, which is the language model's."""
    files = (VOCABULARY_FILE, "tokenizer.json")
    return next((folder for folder in folders if any((folder / name).exists() for name in files)), folders[-1])


def load_tokenizer(path: str | os.PathLike, **kwargs) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint so that its ids are those LLaVA was trained with.

    Parameters
    ----------
    path : str or os.PathLike
        A checkpoint folder or a name on the Hugging Face Hub.
    **kwargs
        Override what the checkpoint says (``model_max_length``, ``padding_side``, ...).

    Returns
    -------
    transformers.PreTrainedTokenizerBase
        :class:`LlamaTokenizer` for a LLaMA checkpoint that holds ``tokenizer.model``, otherwise what ``AutoTokenizer``
        gives.

    Raises
    ------
    ValueError
        If ``path`` holds no tokenizer.
    """
    path = os.fspath(path)
    where = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        config = get_tokenizer_config(path)
        kind = config.get("tokenizer_class", "LlamaTokenizer").removesuffix("Fast")
        is_llama = kind in ("LlamaTokenizer", "InternLM2Tokenizer")
        if is_llama and cached_file(path, VOCABULARY_FILE, **where) is not None:
            # A configuration that leaves `legacy` out meant True in transformers 4.37.2. Of a bare tokenizer.model,
            # without any configuration, nothing is known: take the setting of LLaVA-1.5.
            # InternLM2's own class, which comes with its checkpoints, computes what LLaMA's legacy one does.
            legacy = True if kind == "InternLM2Tokenizer" else config.get("legacy")
            kwargs.setdefault("legacy", bool(config) if legacy is None else legacy)
            if kind == "InternLM2Tokenizer":
                kwargs.setdefault("pad_token", config.get("pad_token", "</s>"))
            return LlamaTokenizer.from_pretrained(path, **kwargs)
        return AutoTokenizer.from_pretrained(path, use_fast=False, **kwargs)
    except Exception as error:  # the tokenizers library raises bare ones for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"tokenizer: none can be loaded from {path!r}; expected a folder or Hub name with {VOCABULARY_FILE} "
            f"or tokenizer.json ({reason})"
        ) from error
