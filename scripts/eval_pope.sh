#!/usr/bin/env bash
# MustDrop against the untouched model on POPE: lmms-eval's pope.
# For the embedded model the synthetic mini_pope stands in. Settings as in eval_gqa.sh, or see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command run --task pope "$@"
