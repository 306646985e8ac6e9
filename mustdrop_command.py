"""What is installed under a name of its own: the command ``mustdrop`` and lmms-eval's entry point.

A package called ``eval`` or ``llava`` may lie in anybody's folder, so neither can be where we are started.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent / "eval"


def main() -> int:
    """Run ``mustdrop COMMAND ...``, here and in child processes with the packages beside this file."""
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        command = _ours("eval.cli")
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return command.main()


def manifest():
    """See ``eval.manifest``."""
    return _ours("eval").manifest()


def _ours(name: str) -> ModuleType:
    """A module of the package ``eval`` beside this file; ImportError if another folder's was imported before."""
    if "eval" not in sys.modules:
        spec = importlib.util.spec_from_file_location("eval", PACKAGE / "__init__.py")
        sys.modules["eval"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["eval"])
    found = [Path(folder).resolve() for folder in sys.modules["eval"].__path__]
    if PACKAGE not in found:
        raise ImportError(f"eval: got {found[0]}, expected {PACKAGE}; another package of this name came first")
    return importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
