#!/usr/bin/env bash
# Makes or renews the lock that scripts/setup.sh installs: the newest releases inside setup.py's ranges, for every Python
# and platform, with the hashes of all their files. Needs a package index.
#
#   bash scripts/lock.sh                       everything but torch at its newest
#   TORCH=2.13.0 bash scripts/lock.sh          another torch as well
#
# Writes requirements/: torch.txt names torch's version, without a hash, because a CPU build and a CUDA build are different
# files under one number; cuda.txt locks the CUDA packages that the public index's build of it wants; lock.txt all else.
# Afterwards: bash scripts/test.sh, and commit the three files together.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/uv.sh" "$work"
cd "$root"
export DS_BUILD_OPS=0 UV_CUSTOM_COMPILE_COMMAND="bash scripts/lock.sh"

echo "torch==${TORCH:-$(sed -n 's/^torch==//p' requirements/torch.txt)}" >"$work/torch.txt"
python3 -c 'import runpy; print(runpy.run_path("setup.py")["LMMS_EVAL"])' >"$work/lmms-eval.txt"
compile() {
    "$uv" pip compile --quiet --universal --generate-hashes --python-version 3.11 --fork-strategy fewest --no-annotate "$@"
}
# lmms-eval comes without its dependencies: they are forty packages for other models, torchvision among them.
compile --no-deps --no-header "$work/lmms-eval.txt" -o "$work/lmms-eval.lock"
compile setup.py --extra eval-light --extra test --extra lock --constraint "$work/torch.txt" -o "$work/all.lock"

# An entry is a line that names a release, and the lines with its hashes.
entries() {
    awk -v wanted="$1" '
        /^[a-z0-9]/ { kind = /^torch==/ ? "torch" : /^(nvidia-|cuda-|triton==)/ ? "cuda" : "lock" }
        /^#/ || kind == wanted' "$work/all.lock"
}
entries lock | cat - "$work/lmms-eval.lock" >"$work/lock.txt"
entries cuda >"$work/cuda.txt"
mv "$work/lock.txt" "$work/cuda.txt" "$work/torch.txt" requirements/
