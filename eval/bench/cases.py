"""The rows of the speed benchmark: which models and methods run, at which numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from eval.methods import check_shape, file_budgets, is_file, read_method
from mustdrop import load_reducer

VANILLA, HUGGING_FACE, EAGER = "vanilla", "huggingface", "mustdrop-eager"
EAGER_SCHEDULE = {
    "method": "mustdrop",
    "compat": "official",
    "merge_to": 376 / 576,
    "budget": [92 / 576, 50 / 576, 34 / 576, 31 / 576],
    "filter_layers": [2 / 32, 6 / 32, 10 / 32, 14 / 32],
}
"""What the published thresholds leave of LLaVA-1.5's images, about, as shares of the patches."""


@dataclass
class BenchCase:
    """What one row is about.

    `settings` are a reducer's, None for Hugging Face's LLaVA; `compiled` says whether the decoder goes through
    torch.compile; `passes` and `floors` hold what every round measured, `selector_macs` what choosing costs a prompt,
    counted apart.
    """

    method: str
    retain: int | float | None
    batch_size: int
    settings: dict | None
    compiled: bool = False
    passes: list = field(default_factory=list)
    floors: list = field(default_factory=list)
    selector_macs: int = 0

    @property
    def label(self) -> str:
        retain = "" if self.retain is None else f" {self.retain}"
        return self.method + retain + (" compiled" if self.compiled else "")


def bench_cases(
    methods: list[str], retains: list[int | float], batch_sizes: list[int], compiled: bool = False
) -> list[BenchCase]:
    """The rows that are asked for, Hugging Face's and the untouched model first for every batch size.

    A YAML file is taken as it is; a method's name gets every number of tokens, unless it has no such setting. With
    `compiled`, all but Hugging Face's come twice: as they are, and compiled.

    Raises
    ------
    ValueError
        If a method or a setting of it is wrong.
    """
    plans: list[tuple[str, int | None, dict | None]] = [
        (HUGGING_FACE, None, None),
        (VANILLA, None, {"method": VANILLA}),
    ]
    if EAGER in methods and set(batch_sizes) != {1}:
        raise ValueError(f"batch_size: got {max(batch_sizes)}, {EAGER} runs one prompt at a time, as the authors' code")
    for method in dict.fromkeys(methods):
        if method == EAGER:
            plans += [(name, None, EAGER_SCHEDULE) for name in (EAGER, "mustdrop")]
            continue
        if is_file(method) and file_budgets(Path(method)):
            plans += [(Path(method).stem, retain, read_method(method, {"retain": retain})) for retain in retains]
            continue
        settings = read_method(method)
        reducer = load_reducer(settings)
        if is_file(method):
            plans.append((Path(method).stem, settings.get("retain"), settings))
        elif not hasattr(reducer, "retain"):
            plans += [(method, None, settings)] if method != VANILLA else []
        else:
            plans += [(method, retain, {**settings, "retain": retain}) for retain in retains]
    return [
        BenchCase(name, retain, batch, settings, twice)
        for batch in dict.fromkeys(batch_sizes)
        for name, retain, settings in plans
        for twice in ((False, True) if compiled and settings is not None and name != EAGER else (False,))
    ]


def check_reach(rows: list[BenchCase], shape) -> None:
    """Ask every reducer whether it can do what is wanted on a model of this shape."""
    for settings in (one.settings for one in rows if one.settings is not None):
        retain = settings.get("retain")
        most = shape.vision_tokens
        if isinstance(retain, int) and retain > most:
            raise ValueError(f"RETAIN: got {retain}, but {shape.name} has only {most} vision tokens per picture")
        try:
            check_shape(load_reducer(settings), shape)
        except ValueError as error:
            raise ValueError(f"{settings['method']} on {shape.name}: {error}") from None
