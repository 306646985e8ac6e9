#!/usr/bin/env bash
# MustDrop and rivals on images in tiles (LLaVA-NeXT), at 640, 320 and 160 of 2,880 vision tokens, then the table, with
# published figures beside ours where there are some.
#
#   bash scripts/eval_next.sh                                          the embedded model with tiles, on mini_highres
#   MODEL=liuhaotian/llava-v1.6-vicuna-7b bash scripts/eval_next.sh    a hub id or a folder, on the paper's benchmarks
#   LIMIT=50 PROCESSES=1 OUT=/tmp/try bash scripts/eval_next.sh        fewer questions, one job at a time, another folder
#   bash scripts/eval_next.sh --dry-run                                lists the cells, runs nothing
#
# From the environment: MODEL, LIMIT (questions per task), OUT, PROCESSES. Arguments go to `python -m eval.sweep`; the
# same command again goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
configs="$(cd "$(dirname "${BASH_SOURCE[0]}")/../configs" && pwd)"

name=next
case "$(basename "${MODEL:-llava-mini-next}")" in llava-mini*) name=next_mini ;; esac
OUT="${OUT:-results/$name}"
python -m eval.sweep "$configs/sweeps/$name.yaml" --out "$OUT" ${PROCESSES:+--parallel "$PROCESSES"} "$@" &&
    failed=0 || failed=$?
case " $* " in *" --dry-run "* | *" --detach "*) exit "$failed" ;; esac
[ "$failed" -le 1 ] || exit "$failed" # 1: some cells failed, the others make a table all the same

python -m eval.table "$configs/tables/$name.yaml" --results "$OUT"
exit "$failed"
