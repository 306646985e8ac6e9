#!/usr/bin/env bash
# MustDrop against the untouched model on VizWiz (validation): lmms-eval's vizwiz_vqa_val.
# For the embedded model the synthetic mini_gqa stands in. Settings as in eval_gqa.sh, or see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command run --task vizwiz "$@"
