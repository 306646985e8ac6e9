#!/usr/bin/env bash
# Sourced by lock.sh and test_range.sh: sets $uv to an uv, the one on PATH, .venv's, or one that is put into folder $1 at
# the version and with the hashes of requirements/lock.txt.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
uv="$(command -v uv || command -v "$root/.venv/bin/uv" || true)"
if [ -z "$uv" ]; then
    awk '/^[a-z]/ { on = /^uv==/ } on' "$root/requirements/lock.txt" >"$1/uv.txt"
    python3 -m venv "$1/uv" && "$1/uv/bin/python" -m pip install --quiet --require-hashes --no-deps -r "$1/uv.txt"
    uv="$1/uv/bin/uv"
fi
