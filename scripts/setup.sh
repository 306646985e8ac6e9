#!/usr/bin/env bash
# Prepares the Python environment; every other script begins by sourcing this one. Does nothing when all is in place.
#
#   bash scripts/setup.sh              install what is missing
#   source scripts/setup.sh            the same, and leave the environment active in this shell
#
# An environment whose `python` can already run the evaluation is used as it is. Otherwise ./.venv is
# created. Without an NVIDIA GPU, torch is pinned to a release whose CPU build is known to work.
#
#   PYTHON=python3.12                  the interpreter that creates .venv (3.10 or newer)

mustdrop_setup() {
    local root stamp wanted python
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # this checkout's code, whichever one is installed

    # 1. Our own environment, finished earlier from this very setup.py.
    stamp="$root/.venv/.mustdrop"
    if [ -x "$root/.venv/bin/python" ]; then
        wanted="$(mustdrop_fingerprint "$root/.venv/bin/python" "$root")"
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
            mustdrop_activate "$root"
            return
        fi
    fi

    # 2. An active environment that has everything; the package's entry point must be known there too.
    if [ "${VIRTUAL_ENV:-}" != "$root/.venv" ] && mustdrop_complete python; then
        if python -c 'import importlib.metadata as m; m.distribution("mustdrop")' 2>/dev/null \
            || PYTHONWARNINGS=ignore python -m pip install --quiet --no-deps --no-build-isolation --editable "$root"; then
            return
        fi
    fi

    # 3. Build, or bring up to date, ./.venv.
    python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "setup: '$python' is not Python 3.10 or newer; set PYTHON to one that is" >&2
        return 1
    fi
    echo "setup: installing into $root/.venv (a few minutes, about 2 GB) ..." >&2
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" || return 1
    mustdrop_activate "$root"
    mustdrop_install "$root" || { echo "setup: pip failed, see above" >&2; return 1; }
    mustdrop_complete python || { echo "setup: the environment is incomplete after installation" >&2; return 1; }
    mustdrop_fingerprint python "$root" >"$stamp"
    echo "setup: done" >&2
}

# What decides which packages are needed: setup.py, this script, and whether there is a GPU.
mustdrop_fingerprint() {
    "$1" - "$2/setup.py" "$2/scripts/setup.sh" "$(mustdrop_hardware)" <<'PY'
import hashlib, sys
*files, hardware = sys.argv[1:]
print(hashlib.sha256(b"".join(open(name, "rb").read() for name in files) + hardware.encode()).hexdigest())
PY
}

mustdrop_hardware() {
    if nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo cpu; fi
}

mustdrop_complete() {
    "$1" - <<'PY' 2>/dev/null
import importlib.metadata as metadata, importlib.util as util, sys
needed = (
    "torch transformers accelerate sentencepiece safetensors einops tabulate tqdm datasets evaluate lmms_eval loguru "
    "sacrebleu pytablewriter tenacity scipy matplotlib jinja2 submitit rich pytest ruff"
).split()
missing = [name for name in needed if util.find_spec(name) is None]
sys.exit(bool(missing) or int(metadata.version("transformers").split(".")[0]) != 5)
PY
}

mustdrop_activate() {
    # shellcheck disable=SC1091
    source "$1/.venv/bin/activate"
}

mustdrop_install() {
    local constraints
    constraints="$1/.venv/constraints.txt"
    : >"$constraints"
    python -m pip install --quiet --upgrade pip setuptools wheel || return 1
    # torch comes first and alone, so that nothing else chooses its build. torchvision is never installed: it is not
    # needed, and its wheels do not match every CPU build of torch.
    if [ "$(mustdrop_hardware)" = cpu ]; then
        echo "torch==2.13.0" >"$constraints"
    fi
    python -m pip install --quiet --constraint "$constraints" torch || return 1
    rm -rf "$1/mustdrop.egg-info" # an old one would hide what the new one says
    PYTHONWARNINGS=ignore python -m pip install --quiet --constraint "$constraints" --editable "$1[eval-light,test]" || return 1
    # Without its dependencies: they are forty packages for other models, torchvision among them.
    python -m pip install --quiet --no-deps lmms-eval==0.7.3
}

mustdrop_setup
