#!/usr/bin/env bash
# Prepares the Python environment; every other script begins by sourcing this one. Does nothing when all is in place.
#
#   bash scripts/setup.sh              install what is missing
#   source scripts/setup.sh            the same, and leave the environment active in this shell
#
# An active environment that has everything, at versions inside setup.py's ranges, is used as it is. Otherwise ./.venv is
# made, exactly as requirements/ locks it, and mended when it is something else. See docs/installation.md.
#
#   PYTHON=python3.12                  the interpreter that creates .venv (3.11 to 3.13)
#   INSTALLER=pip                      plain pip instead of uv, which is faster

mustdrop_setup() {
    local root
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    # This checkout's code, whichever one is installed, and whatever modules the working directory holds.
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

    if ! mustdrop_active "$root"; then
        if ! mustdrop_asks "$root" finished 2>/dev/null; then
            (
                mustdrop_wait
                mustdrop_asks "$root" finished 2>/dev/null || mustdrop_build "$root"
            ) 9>"$root/.venv.lock" || return 1
        fi
        # shellcheck disable=SC1091
        source "$root/.venv/bin/activate"
    fi
    [ -z "${PYTHON:-}" ] || [ "$(mustdrop_names "$PYTHON")" = "$(mustdrop_names python)" ] ||
        echo "setup: PYTHON: got '$PYTHON', but the environment at hand, of $(mustdrop_names python), is used" >&2
}

# Two scripts at once: the second waits for the first.
mustdrop_wait() {
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "setup: waiting for another set-up of .venv ..." >&2
        flock 9
    fi
}

# Whether the active environment has everything; the package's entry points are added to it where they are missing.
mustdrop_active() {
    [ "${VIRTUAL_ENV:-}" != "$1/.venv" ] || return 1
    python "$1/scripts/environment.py" complete >/dev/null 2>&1 || return 1
    # Without PYTHONPATH: an egg-info in this folder is no installation.
    PYTHONPATH='' python -c 'import importlib.metadata as m; m.distribution("mustdrop")' 2>/dev/null ||
        mustdrop_link "$1" python
}

# A question about .venv, see environment.py.
mustdrop_asks() {
    "$1/.venv/bin/python" "$1/scripts/environment.py" "$2"
}

mustdrop_build() {
    local root="$1" venv="$1/.venv" stamp="$1/.venv/.mustdrop" reasons
    if [ -e "$venv" ] && [ ! -e "$stamp" ] && ! mustdrop_suits "$venv/bin/python"; then
        echo "setup: $venv: got $(mustdrop_names "$venv/bin/python"), expected Python 3.11 to 3.13; move it away" >&2
        return 1
    fi
    # Ours, and interrupted before it was whole, or of a Python that no longer fits.
    if [ -e "$stamp" ] && { [ "$(cat "$stamp")" = unfinished ] || ! mustdrop_suits "$venv/bin/python"; }; then
        rm -rf "$venv"
    fi
    if [ ! -e "$venv" ]; then
        mustdrop_create "$root" || return 1
    elif ! reasons="$(mustdrop_asks "$root" locked 2>&1)"; then
        echo "setup: .venv is not what requirements/ says: $reasons" >&2
    fi
    mustdrop_install "$root" || return 1
    if ! reasons="$(mustdrop_asks "$root" finish 2>&1)"; then
        if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" = unfinished ]; then
            echo "setup: .venv is still not what requirements/ says: $reasons" >&2
            return 1
        fi
        echo unfinished >"$stamp" # an update that could not mend it: once more from nothing
        mustdrop_build "$root"
        return
    fi
    echo "setup: done" >&2
}

mustdrop_create() {
    local python
    python="$(mustdrop_python)" || return 1
    mkdir "$1/.venv" && echo unfinished >"$1/.venv/.mustdrop" || return 1
    "$python" -m venv "$1/.venv" || { echo "setup: '$python' cannot make an environment, see above" >&2; return 1; }
}

# The interpreter that makes .venv: $PYTHON, else the first that suits.
mustdrop_python() {
    local python
    if [ -n "${PYTHON:-}" ]; then
        mustdrop_suits "$PYTHON" && echo "$PYTHON" && return
        echo "setup: PYTHON: got '$PYTHON' ($(mustdrop_names "$PYTHON")), expected Python 3.11 to 3.13" >&2
        return 1
    fi
    for python in python3 python python3.13 python3.12 python3.11; do
        mustdrop_suits "$python" && echo "$python" && return
    done
    echo "setup: PYTHON: got python3 ($(mustdrop_names python3)), expected Python 3.11 to 3.13, and none is on PATH" >&2
    return 1
}

mustdrop_suits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

mustdrop_names() {
    "$1" -c 'import platform; print("Python", platform.python_version())' 2>/dev/null || echo "no Python that runs"
}

mustdrop_install() {
    local root="$1" python="$1/.venv/bin/python" first
    echo "setup: installing into $root/.venv (1 to 3 minutes, about 2 GB) ..." >&2
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || return 1
    # What builds the few packages that come as source, and uv; they come first, from the lock like everything.
    first="$(mktemp)"
    awk '/^[a-z]/ { on = /^(setuptools|uv)==/ } on' "$root/requirements/lock.txt" >"$first"
    mustdrop_pip "$python" --require-hashes --no-deps -r "$first" && rm "$first" || return 1
    mustdrop_locked "$root" lock || return 1
    # torch's build is the choice of whoever set pip's index. torchvision is never installed: it is not needed, and its
    # wheels do not match every CPU build of torch.
    mustdrop_pip "$python" --no-deps -r "$root/requirements/torch.txt" || return 1
    if mustdrop_asks "$root" cuda 2>/dev/null; then
        mustdrop_locked "$root" cuda || return 1
    fi
    mustdrop_pip "$python" -r "$root/requirements/torch.txt" || return 1 # what another build of torch asks for
    mustdrop_link "$root" "$python"
}

# One file of requirements/, its hashes checked.
mustdrop_locked() {
    local python="$1/.venv/bin/python" arguments=(--require-hashes --no-deps --no-build-isolation)
    arguments+=(-r "$1/requirements/$2.txt")
    export DS_BUILD_OPS=0 # deepspeed compiles its kernels when they are first used
    if [ "${INSTALLER:-uv}" = uv ] && "$python" -m uv --version >/dev/null 2>&1; then
        "$python" -m uv pip install --quiet --python "$python" "${arguments[@]}" && return
        echo "setup: uv failed, see above; going on with pip" >&2
    fi
    mustdrop_pip "$python" "${arguments[@]}"
}

mustdrop_pip() {
    local python="$1"
    shift
    "$python" -m pip install --quiet --disable-pip-version-check "$@" ||
        { echo "setup: pip failed, see above; the same command again goes on from here" >&2; return 1; }
}

# Our packages' entry points, and the code itself as it is in this folder.
mustdrop_link() {
    rm -rf "$1/mustdrop.egg-info" # an old one would hide what the new one says
    PYTHONWARNINGS=ignore mustdrop_pip "$2" --no-deps --no-build-isolation --editable "$1"
}

mustdrop_setup
