"""What scripts/setup.sh asks about a Python environment; that environment's own interpreter runs it.

    python scripts/environment.py complete   has what the scripts need, at versions inside setup.py's ranges
    python scripts/environment.py cuda       holds a torch whose own packages are those of requirements/cuda.txt
    python scripts/environment.py locked     is what requirements/ says
    python scripts/environment.py finish     the same; if so, is marked as finished
    python scripts/environment.py finished   was finished by the present setup, and still is what requirements/ says

Exit status 0: yes. Otherwise 1, with the reasons in one line.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import platform
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
        from pip._vendor.packaging.utils import canonicalize_name
    except ImportError:
        sys.exit("packaging is missing")

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "requirements"
SOURCES = (*(LOCKS / f"{name}.txt" for name in ("lock", "torch", "cuda")), ROOT / "setup.py", ROOT / "scripts/setup.sh")


def declared() -> list[Requirement]:
    """What setup.py asks for on behalf of the scripts, the Python itself first."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    needs = [*setup["CORE"], *setup["EXTRAS"]["eval-light"], *setup["EXTRAS"]["test"], setup["LMMS_EVAL"]]
    return [Requirement(f"python{setup['PYTHON']}"), *map(Requirement, needs)]


def locked(name: str) -> list[Requirement]:
    """Entries of a file of requirements/, without their hashes."""
    lines = (LOCKS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line.removesuffix("\\")) for line in lines if re.match(r"[A-Za-z0-9]", line)]


def version(name: str) -> str | None:
    """Version of an installed package, None where it is missing or was unpacked in part."""
    if name == "python":
        return platform.python_version()
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    whole = found.read_text("RECORD") is not None or found.read_text("installed-files.txt") is not None
    return found.version if whole else None


def unmet(requirements: list[Requirement]) -> Iterator[str]:
    """One phrase per requirement that holds here and is not fulfilled."""
    for need in requirements:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = version(need.name)
        if found is None:
            yield f"{need.name} is missing"
        elif not need.specifier.contains(found, prereleases=True):
            yield f"{need.name} is {found}, expected {need.specifier}"


def needs_of_torch() -> list[Requirement]:
    """What the installed build of torch asks for beyond requirements/lock.txt: nothing, or packages of its CUDA."""
    known = {canonicalize_name(entry.name) for entry in locked("lock")}
    needs = [Requirement(text) for text in metadata.requires("torch") or ()]
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return [need for need in needs if canonicalize_name(need.name) not in known]


def complete() -> list[str]:
    return list(unmet(declared()))


def cuda() -> list[str]:
    offered = {canonicalize_name(entry.name): str(entry.specifier)[2:] for entry in locked("cuda")}
    needs = needs_of_torch()
    other = [str(need) for need in needs if not need.specifier.contains(offered.get(canonicalize_name(need.name), "0"))]
    return other if needs else ["torch asks for no CUDA packages"]


def verified() -> list[str]:
    wrong = list(unmet([*locked("lock"), *locked("torch")]))
    return wrong or list(unmet(needs_of_torch()))


def fingerprint() -> str:
    """What decides which packages are wanted: the lock, setup.py, the setup itself, and the Python."""
    content = b"".join(path.read_bytes() for path in SOURCES) + Path(__file__).read_bytes()
    return hashlib.sha256(content + platform.python_version().encode()).hexdigest()


def finish() -> list[str]:
    wrong = verified()
    if not wrong:
        stamp().write_text(fingerprint(), encoding="utf-8")
    return wrong


def finished() -> list[str]:
    there = stamp().is_file() and stamp().read_text(encoding="utf-8") == fingerprint()
    return verified() if there else ["it was not finished by the present setup"]


def stamp() -> Path:
    return Path(sys.prefix) / ".mustdrop"


COMMANDS = {"complete": complete, "cuda": cuda, "locked": verified, "finish": finish, "finished": finished}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in COMMANDS:
        sys.exit(f"environment: got {sys.argv[1:]}, expected one of {', '.join(COMMANDS)}")
    reasons = COMMANDS[sys.argv[1]]()
    if reasons:
        sys.exit("; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""))
