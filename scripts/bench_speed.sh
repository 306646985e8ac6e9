#!/usr/bin/env bash
# Time, memory and cache of a pruned LLaVA beside the untouched one and beside the replay floor; weights are random
# unless a checkpoint is given.
#
#   bash scripts/bench_speed.sh                                                    the embedded model's shape, seconds
#   bash scripts/bench_speed.sh --shape llava-1.5-7b --layers 8 --dtype bfloat16   7B's width on a CPU
#   bash scripts/bench_speed.sh --shape llava-1.5-7b --batch-size 1 8 32           a GPU
#
# All arguments go to `mustdrop bench`; see its --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command bench "$@"
