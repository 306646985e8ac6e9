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
    from mustdrop.config import read_settings
    from mustdrop.read import parse_yaml

    settings = {"method": VANILLA} if method is None else method
    if isinstance(method, str):
        path = Path(method)
        settings = read_settings(path) if path.suffix in (".yaml", ".yml") else {"method": method}
    overrides = {}
    for name, value in (fields or {}).items():
        overrides[name] = parse_yaml(value.strip("'\""), f"{name}: ") if isinstance(value, str) else value
    return {**settings, **overrides}


def own_file(model: str, name: str, configs: Path = CONFIGS) -> Path | None:
    """The file of a method, or of several composed, that has no budget on this model; None if there is none."""
    file = configs / Path(model).name / f"{name}.yaml"
    return file if file.is_file() else None


def has_files(name: str, configs: Path = CONFIGS) -> bool:
    """Whether a method, or a composition of several, has a file for some model and budget."""
    return any(configs.rglob(f"{name}_*.yaml"))


def method_at(model: str, method: str, retain: int | float, configs: Path = CONFIGS) -> tuple[dict, Path | None]:
    """The settings that make a model keep about ``retain`` vision tokens per layer, or a share of an image's.

    A file comes first: the model's own, which calibration writes, then the published one. Without a file, a method
    that can work its settings out for itself gets the field ``retain``.

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
    candidates = [configs / Path(model).name / f"{method}_{retain}.yaml", configs / f"{method}_{retain}.yaml"]
    from mustdrop import available_methods, load_reducer
    from mustdrop.calibrate import OutOfReach

    for candidate in candidates:
        if candidate.is_file():
            settings = read_method(str(candidate))
            try:
                load_reducer(settings)
            except ValueError as error:
                raise ValueError(f"{_shown(candidate)}: {error}") from None
            if method in available_methods() and settings["method"] not in (method, "compose"):
                raise ValueError(f"{_shown(candidate)}: method is {settings['method']!r}: it must be {method}")
            return settings, candidate
    if method not in available_methods() and has_files(method, configs):
        raise OutOfReach(f"RETAIN: {method} has no settings for {retain} tokens: there is no {_shown(candidates[0])}")
    settings, reducer = {"method": method, "retain": retain}, load_reducer({"method": method})
    if hasattr(reducer, "retain") and not reducer.thresholds:  # thresholds are what it is known by: they need finding
        load_reducer(settings)
        return settings, None
    if isinstance(retain, float):
        raise OutOfReach(f"RETAIN: got the share {retain}, but {method} is calibrated to numbers of tokens: give one")
    raise OutOfReach(
        f"RETAIN: no settings of {method} for {retain} tokens; make {_shown(candidates[0])} with "
        f"mustdrop calibrate --model {model} --method {method} --retain {retain}"
    )


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
