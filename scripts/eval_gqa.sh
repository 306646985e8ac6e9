#!/usr/bin/env bash
# Accuracy, tokens, FLOPs, cache and time of MustDrop against the untouched model on GQA; eval_pope.sh, eval_mme.sh and
# the others beside this script do the same on other benchmarks.
#
#   bash scripts/eval_gqa.sh                                        the embedded model on the synthetic mini_gqa
#   MODEL=liuhaotian/llava-v1.5-7b bash scripts/eval_gqa.sh         a hub id or a folder, on the real GQA
#   LIMIT=50 RETAIN="128 64" OUT=/tmp/try bash scripts/eval_gqa.sh  fewer questions, other budgets, another folder
#
# From the environment: MODEL, LIMIT, RETAIN, OUT, BATCH_SIZE. Arguments are passed on: see `mustdrop run --help`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command run --task gqa "$@"
