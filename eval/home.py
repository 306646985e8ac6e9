"""Our packages have names that other people's folders have, too: those beside this one are to be imported."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("eval", "llava", "mustdrop")


def ours_first() -> None:
    """Put this checkout in front of ``sys.path``, of child processes too, if another folder's packages came first.

    That happens where Python is started with ``-m`` or ``-c`` in the root of another LLaVA.

    Raises
    ------
    ImportError
        If another folder's package has already been imported.
    """
    for name in PACKAGES:
        found = _folder(sys.modules[name].__spec__) if name in sys.modules else ROOT / name
        if found != ROOT / name:
            raise ImportError(f"{name}: got {found}, expected {ROOT / name}; another package of this name came first")
    if any(_folder(_find(name)) != ROOT / name for name in PACKAGES):
        sys.path.insert(0, str(ROOT))
        os.environ["PYTHONSAFEPATH"] = "1"
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def _find(name: str) -> ModuleSpec | None:
    """What an import would find if nothing had been imported yet."""
    return next(filter(None, (finder.find_spec(name, None) for finder in sys.meta_path)), None)


def _folder(spec: ModuleSpec | None) -> Path | None:
    """A package's folder; None for a folder without ``__init__.py``."""
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin is not None else None
