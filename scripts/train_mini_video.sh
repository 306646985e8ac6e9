#!/usr/bin/env bash
# Trains the embedded model of clips from the embedded model of images, whose vision tower it keeps: training, export,
# evaluation. Give the same command again after an interruption and it goes on where it stopped.
#
#   WORK=runs/mini-video   folder for the training's state and the features of its clips (500 MB)
#   INIT=checkpoints/llava-mini           the image model
#   OUTPUT=$WORK/llava-mini-video         the finished folder; its config.json names INIT by a relative path
#   SEED=0
#   PHASES   lengths, as PATCHES:STEPS,... (see BATCH in eval/mini/clip_training.py)
#   CLIPS=150              held-out clips of the evaluation, up to ten questions each
#   QUICK=1                a few steps, to see that everything works
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

WORK=${WORK:-runs/mini-video}
INIT=${INIT:-checkpoints/llava-mini}
OUTPUT=${OUTPUT:-$WORK/llava-mini-video}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ${QUICK:-0} == 1 ]]; then
    PHASES=${PHASES:-0:2,1:2,4:1} CLIPS=${CLIPS:-2}
fi

run() {
    python -m mustdrop_command mini-train "$1" --work "$WORK" --init "$INIT" --seed "${SEED:-0}" "${@:2}"
}

run clips --phases "${PHASES:-0:1000,1:500,2:80,4:80}"
run export_clips --output "$OUTPUT"
python -m mustdrop_command mini-clips-evaluate --model_path "$OUTPUT" --n_clips "${CLIPS:-150}" --output "$OUTPUT/accuracy.json"
