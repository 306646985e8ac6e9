#!/usr/bin/env bash
# MustDrop against the untouched model on MME: lmms-eval's mme.
# For the embedded model the synthetic mini_mme stands in. Settings as in eval_gqa.sh, or see --help.
# Questions are scored in pairs, so LIMIT has to be even.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command run --task mme "$@"
