"""Which reducer a user means: a name, a YAML file, fields given on the command line, or a number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mustdrop.hooks import Reducer
    from mustdrop.shape import ModelShape

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "methods"
VANILLA = "vanilla"


def read_method(method: str | dict | None = None, fields: dict | None = None) -> dict:
    """The settings of a reducer as one dictionary, ready for ``mustdrop.load_reducer``.

    Parameters
    ----------
    method : str, dict or None
        The path of a YAML file, the name of a method, or settings; None is the untouched model.
    fields : dict, optional
        Settings that override, or add to, those of ``method``. Text is read as YAML: ``'[2, 6, 10]'``, in
        quotes or not, is a list.

    Raises
    ------
    ValueError
        If the file is missing or is no mapping.
    """
    from mustdrop.config import at_budget, read_settings
    from mustdrop.read import parse_yaml

    settings = {"method": VANILLA} if method is None else method
    if isinstance(method, str):
        settings = read_settings(Path(method)) if is_file(method) else {"method": method}
    overrides = {}
    for name, value in (fields or {}).items():
        overrides[name] = parse_yaml(value.strip("'\""), f"{name}: ") if isinstance(value, str) else value
    try:
        return at_budget({**settings, **overrides})
    except ValueError as error:
        raise ValueError(f"{method}: {error}" if isinstance(method, str) else str(error)) from None


def is_file(method: str) -> bool:
    """Whether a text names a method's YAML file and not a method."""
    return Path(method).suffix in (".yaml", ".yml")


def own_file(model: str, name: str, configs: Path = CONFIGS) -> Path | None:
    """The file of a method, or of several composed, that has no budget on this model; None if there is none."""
    file = configs / Path(model).name / f"{name}.yaml"
    return file if file.is_file() and not file_budgets(file) else None


def file_budgets(file: Path) -> list[str]:
    """The budgets that a method's file has settings for; none if it has one setting, or is not there."""
    from mustdrop.config import budgets_of, read_settings

    if not file.is_file():
        return []
    try:
        return list(budgets_of(read_settings(file)))
    except ValueError as error:
        raise ValueError(f"{_shown(file)}: {str(error).removeprefix(f'{file}: ')}") from None


def has_files(name: str, configs: Path = CONFIGS) -> bool:
    """Whether a method, or a composition of several, has a file for some model and budget."""
    return any(configs.rglob(f"{name}_*.yaml")) or any(map(file_budgets, configs.rglob(f"{name}.yaml")))


def share_at(retain: int | float, of: int | None) -> int | float:
    """A budget as it is, or as the share that it is `of` so many tokens."""
    return retain if of is None or isinstance(retain, float) else round(retain / of, 4)


def method_at(
    model: str, method: str, retain: int | float, configs: Path = CONFIGS, of: int | None = None
) -> tuple[dict, Path | None]:
    """The settings that make a model keep about ``retain`` vision tokens per layer, or a share of an image's.

    A file comes first: the model's own, which calibration writes, then the published one. Without a file, a method
    that can work its settings out for itself gets the field ``retain``: with ``of``, as a share of so many tokens.

    Returns
    -------
    settings : dict
        Ready for ``mustdrop.load_reducer``.
    file : pathlib.Path or None
        Where they were read.

    Raises
    ------
    ValueError
        If the method is unknown; `mustdrop.calibrate.OutOfReach` if there is neither file nor field.
    """
    from mustdrop import available_methods, load_reducer
    from mustdrop.calibrate import OutOfReach

    own = configs / Path(model).name
    for file in (file_at(folder, method, retain) for folder in (own, configs)):
        if file is None:
            continue
        try:
            settings = read_method(str(file), {"retain": retain} if file_budgets(file) else None)
            load_reducer(settings)
        except ValueError as error:
            raise ValueError(f"{_shown(file)}: {str(error).removeprefix(f'{file}: ')}") from None
        if method in available_methods() and settings["method"] not in (method, "compose"):
            raise ValueError(f"{_shown(file)}: method is {settings['method']!r}: it must be {method}")
        return settings, file
    place = _shown(own / f"{method}.yaml")
    if method not in available_methods() and has_files(method, configs):
        known = ", ".join(file_budgets(own / f"{method}.yaml")) or "none"
        raise OutOfReach(f"RETAIN: {method} has no settings for {retain} tokens: {place} has {known}")
    settings, reducer = {"method": method, "retain": share_at(retain, of)}, load_reducer({"method": method})
    if hasattr(reducer, "retain") and not reducer.thresholds:  # thresholds are what it is known by: they need finding
        load_reducer(settings)
        return settings, None
    if isinstance(retain, float):
        raise OutOfReach(f"RETAIN: got the share {retain}, but {method} is calibrated to numbers of tokens: give one")
    raise OutOfReach(
        f"RETAIN: no settings of {method} for {retain} tokens; mustdrop calibrate --model {model} --method {method} "
        f"--retain {retain} adds them to {place}"
    )


def file_at(folder: Path, method: str, retain: int | float) -> Path | None:
    """The file in a folder that has a method's settings for a budget: one for all budgets, or for this one alone."""
    whole, single = folder / f"{method}.yaml", folder / f"{method}_{retain}.yaml"
    if str(retain) in file_budgets(whole):
        return whole
    return single if single.is_file() else None


def check_shape(reducer: Reducer, shape: ModelShape, views: int = 1) -> None:
    """Raise ValueError if a reducer's settings do not fit a model of this shape, for images of so many views.

    Of the tower, the blocks that are run are known; features are taken before the last one, as a rule.
    """
    sizes = shape.layers, shape.vision_layers + 1, shape.vision_layers, shape.patches, shape.heads
    reducer.check_sizes(*sizes, one_view=shape.tiles is None, views=views)


def _shown(path: Path) -> Path:
    """A path as the user would type it, where that is possible."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
