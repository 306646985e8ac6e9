#!/usr/bin/env bash
# MustDrop against the untouched model on TextVQA (validation, no OCR tokens in the prompt): lmms-eval's textvqa_val.
# For the embedded model the synthetic mini_textvqa stands in. Settings as in eval_gqa.sh, or see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command run --task textvqa "$@"
