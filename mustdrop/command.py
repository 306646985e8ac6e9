"""What every command line here shares: whatever a user can get wrong is one line on standard error and status 2."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from mustdrop.checks import shown

WRONG, INTERRUPTED, NOBODY_READS = 2, 130, 141
LARGEST = 10**6  # whole numbers that a command line takes, unless it says otherwise


class Parser(argparse.ArgumentParser):
    """The argument parser of ``mustdrop NAME``; its errors are ValueErrors, for `command` to say in one line."""

    def __init__(self, name: str, description: str | None = None, epilog: str | None = None):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(f"mustdrop {name}", description=description, epilog=epilog, formatter_class=layout)

    def error(self, message: str):
        raise ValueError(message)


def command(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Turn what a `main(argv)` raises into one line and an exit status.

    ValueError and OSError, a user's or the machine's fault, are 2; Ctrl-C is 130; a closed pipe is 141, without a word.
    Anything else is a fault of this program and keeps its traceback.
    """

    @wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            _forget_output()
            return NOBODY_READS
        except (ValueError, OSError) as error:
            _forget_output()
            print(f"error: {one_line(error)}", file=sys.stderr)
            return WRONG
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED

    return run


def path(text: str) -> Path:
    """A path from the command line, for argparse's `type`; nothing is no path, and neither is what no file can have."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a path")
    return Path(text)


def text(value: str) -> str:
    """Some text from the command line, for argparse's `type`; nothing, left out by a slip of the shell, is refused."""
    if not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError(f"got {shown(value)}, expected a value")
    return value


def whole_number(name: str, value: str | int | None, least: int = 1, most: int = LARGEST) -> int | None:
    """A whole number from `least` to `most`, or None for nothing; ValueError with one line otherwise."""
    if value is None or not str(value).strip():
        return None
    digits = re.fullmatch(r"0*([0-9]+)", str(value).strip())
    number = int(digits[1][:20]) if digits else -1
    if not least <= number <= most:
        right = "above 0" if least == 1 else f"of {least} or more"
        right += f", {most} at most" if number > most else ""
        raise ValueError(f"{name}: got {shown(value)}, expected a whole number {right}")
    return number


def needed_number(name: str, value: str | int | None, least: int = 1, most: int = LARGEST) -> int:
    """As `whole_number`, where nothing will not do."""
    number = whole_number(name, value, least, most)
    if number is None:
        raise ValueError(f"{name}: got {shown(value)}, expected a whole number")
    return number


def share_of(text: str) -> float | None:
    """The share that a text such as 0.111 or 1.0 names, above 0 and up to 1; None if it names none."""
    fits = re.fullmatch(r"0?\.[0-9]{1,18}|1\.0{1,18}", text.strip())
    return float(text) or None if fits else None


def decimal_number(name: str, value: str | float, most: float = LARGEST, above: bool = False) -> float:
    """A number from 0 (with `above`: above 0) to `most`; ValueError with one line otherwise."""
    fits = re.fullmatch(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", str(value).strip(), re.IGNORECASE | re.ASCII)
    number = float(value) if fits else -1.0
    if not 0 <= number <= most or (above and number == 0):
        right = f"{'above' if above else 'from'} 0{'' if most == LARGEST else f' to {most:g}'}"
        raise ValueError(f"{name}: got {shown(value)}, expected a number {right}")
    return number


def one_line(error: Exception) -> str:
    """An error's text without line breaks and control characters; of the machine's errors, the file and the reason."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(text.split()))


def _forget_output() -> None:
    """What is still to be written to a full disk or to nobody must not be tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
