#!/usr/bin/env bash
# MustDrop and rivals on images in tiles (LLaVA-NeXT), at 640, 320 and 160 of 2,880 vision tokens, then the table, with
# published figures beside ours where there are some.
#
#   bash scripts/eval_next.sh                                          the embedded model with tiles, on mini_highres
#   MODEL=liuhaotian/llava-v1.6-vicuna-7b bash scripts/eval_next.sh    a hub id or a folder, on the paper's benchmarks
#   LIMIT=50 PROCESSES=1 OUT=/tmp/try bash scripts/eval_next.sh        fewer questions, one job at a time, another folder
#   bash scripts/eval_next.sh --dry-run                                lists the cells, runs nothing
#
# From the environment: MODEL, LIMIT (questions per task), OUT, PROCESSES. Arguments go to `mustdrop sweep`; the
# same command again goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

name=next
case "$(basename "${MODEL:-llava-mini-next}")" in llava-mini*) name=next_mini ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/sweep_and_table.sh"
