#!/usr/bin/env bash
# Whether setup.py's ranges are right: a throw-away environment without the lock at one of their ends, the main job on a
# few questions, some of the tests. One line says how it went; exit status 1 where an end fails.
#
#   bash scripts/test_range.sh                 newest: all packages and the Python as new as setup.py allows
#   bash scripts/test_range.sh oldest          all packages that setup.py names, and the Python, as old as it allows
#   bash scripts/test_range.sh all             both ends, each with the newest and with the oldest Python that is here
#
#   PYTHON=python3.12                          another Python
#   TRANSFORMERS=5.24.0                        this one release instead of the end
#   LIMIT=10                                   questions of the main job
#   KEEP=folder                                keep environment and logs there
set -euo pipefail
work="${KEEP:-$(mktemp -d)}"
mkdir -p "$work"
work="$(cd "$work" && pwd)"
[ -n "${KEEP:-}" ] || trap 'rm -rf "$work"' EXIT
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/uv.sh" "$work"
export PYTHONPATH="$root" PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SMOKE=(tests/test_{llava,mustdrop,images,lmms_stock,checkpoints,wrappers,train,train_lora}.py)

# The newest or oldest interpreter that suits: from PATH, uv or pyenv.
interpreter() {
    local versions=(3.13 3.12 3.11) version found
    [ "$1" = newest ] || versions=(3.11 3.12 3.13)
    [ -z "${PYTHON:-}" ] || { command -v "$PYTHON" && return; }
    for version in "${versions[@]}"; do
        for found in "python$version" "$("$uv" python find --no-python-downloads "$version" 2>/dev/null)" \
            "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
            "$found" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null || continue
            command -v "$found"
            return
        done
    done
    echo "range: no Python 3.11 to 3.13 is here" >&2
    return 1
}

# try END PYTHON: one environment, one line.
try() {
    local end="$1" python="$2" resolution=highest venv="$work/$1" log="$work/$1.log" needs=() names
    [ "$end" = newest ] || resolution=lowest-direct
    [ -z "${TRANSFORMERS:-}" ] || needs=("transformers==$TRANSFORMERS")
    rm -rf "$venv"
    if ! { "$uv" venv --quiet --python "$python" "$venv" && install "$venv/bin/python" --resolution "$resolution" \
        --editable "$root[eval-light,test]" "${needs[@]}"; } >"$log" 2>&1; then
        fails "Python $("$python" -c 'import platform; print(platform.python_version())')" "installation" "$log"
        return
    fi
    names="$("$venv/bin/python" -c 'import importlib.metadata as m, platform
print(f"Python {platform.python_version()}", *(f"{name} {m.version(name)}" for name in ("torch", "transformers")), sep=", ")')"
    if ! (cd "$work" && LIMIT="${LIMIT:-10}" RETAIN=64 OUT="$work/results-$end" MODEL="$root/checkpoints/llava-mini" \
        "$venv/bin/python" -m mustdrop_command run --task gqa --force) >"$log" 2>&1; then
        fails "$names" "main job" "$log"
    elif ! (cd "$root" && "$venv/bin/python" -m pytest --maxfail=5 -p no:cacheprovider "${SMOKE[@]}") >"$log" 2>&1; then
        fails "$names" "tests" "$log"
    else
        echo "range: $end end ($names) works"
    fi
}

install() {
    local python="$1"
    shift
    "$uv" pip install --quiet --python "$python" "$@" &&
        "$uv" pip install --quiet --python "$python" --no-deps "$(sed -n 's/^LMMS_EVAL = "\(.*\)"/\1/p' "$root/setup.py")"
}

# fails NAMES WHAT LOG: the first test that failed, the error, or the last line that was printed.
fails() {
    local reason
    reason="$(grep -m1 -E '^(FAILED|ERROR) |^[A-Za-z_.]*(Error|Exception): ' "$3" || grep -v '^[[:space:]]*$' "$3" | tail -n 1)"
    [ -z "${KEEP:-}" ] || reason="$reason (${3})"
    echo "range: $end end ($1) fails: $2: $reason; narrow setup.py, or mend the code" >&2
    return 1
}

failed=0
case "${1:-newest}" in
newest | oldest) try "${1:-newest}" "$(interpreter "${1:-newest}")" || failed=1 ;;
all)
    for end in newest oldest; do
        for age in newest oldest; do try "$end" "$(interpreter "$age")" || failed=1; done
    done
    ;;
*) echo "range: got '$1', expected newest, oldest or all" >&2 && exit 2 ;;
esac
exit "$failed"
