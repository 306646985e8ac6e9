#!/usr/bin/env bash
# MustDrop against the untouched model on MMBench-CN (dev): lmms-eval's mmbench_cn_dev.
# For the embedded model the synthetic mini_mmbench stands in. Settings as in eval_gqa.sh, or see --help.
# Answers that name no option go to a language model: set OPENAI_API_KEY.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command run --task mmbench_cn "$@"
