#!/usr/bin/env bash
# MustDrop and rivals on videos, at 194 and 136 of 2,048 vision tokens, then the table, with published figures beside
# ours where there are some. See docs/video.md.
#
#   bash scripts/eval_video.sh                                       the embedded video model, on mini_video
#   VIDEO_QA=... MODEL=LanguageBind/Video-LLaVA-7B-hf bash scripts/eval_video.sh    on the benchmarks' own videos
#   LIMIT=20 PROCESSES=1 OUT=/tmp/try bash scripts/eval_video.sh     fewer questions, one job at a time, another folder
#   bash scripts/eval_video.sh --dry-run                             lists the cells, runs nothing
#
# From the environment: MODEL, LIMIT (questions per task), OUT, PROCESSES, VIDEO_QA (the benchmarks' folders). Arguments
# go to `mustdrop sweep`; the same command again goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

name=video
case "$(basename "${MODEL:-llava-mini-video}")" in llava-mini*) name=video_mini ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/sweep_and_table.sh"
