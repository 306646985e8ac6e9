#!/usr/bin/env bash
# Lint and unit tests, without network. Arguments go to pytest: bash scripts/test.sh tests/test_eval.py -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff check .
# The whole suite runs in several processes, at most eight; a few chosen tests start sooner in one.
[ $# -gt 0 ] || set -- --numprocesses auto --maxprocesses 8 --dist worksteal
exec python -m pytest "$@"
