"""One progress bar for everything here that takes long, and silence around it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from types import ModuleType

from tqdm import tqdm


def progress(items: Iterable | None = None, description: str = "", **options) -> tqdm:
    """A tqdm bar that moves smoothly in a terminal and writes a line every half minute into a log.

    Parameters
    ----------
    items : iterable, optional
        What to iterate over; without it, call ``update`` on the result.
    description : str
        Stands in front of the bar.
    **options
        Passed on to ``tqdm.tqdm``.
    """
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=description, mininterval=interval, maxinterval=interval, dynamic_ncols=True, **options)


class _Hidden(tqdm):
    """A bar that is never shown, whatever it is told."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{**options, "disable": True})


def hide_bars(*modules: ModuleType) -> None:
    """Hide the tqdm bars of other people's modules: ours says how far things are."""
    for module in modules:
        module.tqdm = _Hidden


def quiet() -> None:
    """Leave the terminal to our own bar and to warnings; lmms-eval, datasets and transformers are talkative."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from datasets.utils.logging import disable_progress_bar
    from loguru import logger
    from transformers.utils import logging

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
    disable_progress_bar()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
