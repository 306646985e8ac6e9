"""Which reducer a user means: a name, a YAML file, fields given on the command line, or a number of tokens."""

from __future__ import annotations

from pathlib import Path

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
    import yaml

    from mustdrop.config import read_settings

    settings = method or {"method": VANILLA}
    if isinstance(method, str):
        path = Path(method)
        settings = read_settings(path) if path.suffix in (".yaml", ".yml") else {"method": method}
    overrides = {}
    for name, value in (fields or {}).items():
        overrides[name] = yaml.safe_load(value.strip("'\"")) if isinstance(value, str) else value
    return {**settings, **overrides}


def method_file(model: str, retain: int, method: str = "mustdrop", configs: Path = CONFIGS) -> Path:
    """The YAML file that makes a model keep about ``retain`` vision tokens.

    The model's own folder, which ``eval.calibrate`` fills, comes before the published thresholds.

    Raises
    ------
    ValueError
        If there is neither.
    """
    name = Path(model).name
    candidates = [configs / name / f"{method}_{retain}.yaml", configs / f"{method}_{retain}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"RETAIN: no settings for {retain} tokens; make {_shown(candidates[0])} with "
        f"python -m eval.calibrate --model {model} --retain {retain}"
    )


def _shown(path: Path) -> Path:
    """A path as the user would type it, where that is possible."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
