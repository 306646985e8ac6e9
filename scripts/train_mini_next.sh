#!/usr/bin/env bash
# Trains the embedded model with tiles (checkpoints/llava-mini-next) from the embedded model, whose vision tower it
# shares: projector, newline and language model learn high-resolution scenes, then export and evaluation.
# Give the same command again after an interruption and it goes on where it stopped.
#
#   INIT=checkpoints/llava-mini          what to begin with; OUTPUT names it, by a relative path, as its vision tower
#   WORK=runs/mini-next                  folder for the stage's checkpoint
#   OUTPUT=runs/mini-next/llava-mini-next   the finished folder
#   PHASES                               lengths, as NAME:STEPS,...
#   SCENES=150                           held-out images of the evaluation, ten questions each
#   SEED=0
#   QUICK=1                              a minute through everything, to see that it works
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

INIT=${INIT:-checkpoints/llava-mini}
WORK=${WORK:-runs/mini-next}
OUTPUT=${OUTPUT:-$WORK/llava-mini-next}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ${QUICK:-0} == 1 ]]; then
    PHASES=${PHASES:-strips:2,squares:1} SCENES=${SCENES:-2}
else
    PHASES=${PHASES:-strips:900,mixed:400,squares:500} SCENES=${SCENES:-150}
fi

python -m mustdrop_command mini-tiles --init "$INIT" --work "$WORK" --output "$OUTPUT" --phases "$PHASES" --seed "${SEED:-0}"
python -m mustdrop_command mini-tiles-evaluate --model_path "$OUTPUT" --n_scenes "$SCENES" --output "$OUTPUT/accuracy.json"
