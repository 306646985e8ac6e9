"""The command line of the trainer: LLaVA's argument names, and one line for whatever is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from transformers import HfArgumentParser

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments


class Parser(HfArgumentParser):
    """Reads the three groups of arguments; ends the program with one line and status 2 if it cannot."""

    def __init__(self):
        super().__init__((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)

    def error(self, message: str) -> None:
        """Instead of the usage, which fills a screen."""
        plain = re.sub(r"^argument --([^/:]*)[^:]*: ", r"\1: ", message)
        self.exit(2, f"error: {plain}\n")

    def read(self, argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
        """The arguments; those of transformers are checked as they are made."""
        _, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._name_unknown(unknown))
        try:
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            self.error(one_line(error))

    def _name_unknown(self, unknown: Sequence[str]) -> str:
        option = next((word for word in unknown if word.startswith("--")), None)
        if option is None:
            return f"arguments: got {unknown[0]!r}, which belongs to no option"
        name = option.split("=")[0].replace("-", "_").replace("__", "--", 1)
        options = [word for word in self._option_string_actions if word.startswith("--") and "-" not in word[2:]]
        close = difflib.get_close_matches(name, options)
        return f"{option}: no such argument" + (f", did you mean {' or '.join(close)}?" if close else "; see --help")


def one_line(error: BaseException) -> str:
    """An error's message as one line; of one in a data worker, what the worker said last."""
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())
