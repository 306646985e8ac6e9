#!/usr/bin/env bash
# MustDrop against the untouched model on ScienceQA, questions with a picture: lmms-eval's scienceqa_img.
# For the embedded model the synthetic mini_mmbench stands in. Settings as in eval_gqa.sh, or see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command run --task sqa "$@"
