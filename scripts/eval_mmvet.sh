#!/usr/bin/env bash
# MustDrop against the untouched model on MM-Vet: lmms-eval's mmvet.
# For the embedded model the synthetic mini_gqa stands in. Settings as in eval_gqa.sh, or see --help.
# A language model scores the answers: set OPENAI_API_KEY.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command run --task mmvet "$@"
