#!/usr/bin/env bash
# Trains the embedded model from nothing: vision tower, language model, alignment, end to end, end to end with options to
# choose from, export, evaluation.
# Give the same command again after an interruption and it goes on where it stopped.
#
#   WORK=runs/mini       folder for the stages' checkpoints
#   OUTPUT=runs/mini/llava-mini   the finished Hugging Face folder
#   PROCESSES=2          processes for the language and end-to-end stages (one thread each)
#   SEED=0
#   VISION, LANGUAGE, TUNE, CHOICES   lengths, as WINDOW:STEPS,...   ALIGN   steps
#   SCENES=150           held-out pictures of the evaluation, ten plain and five multiple-choice questions each
#   QUICK=1              a minute through all stages, to see that everything works
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

WORK=${WORK:-runs/mini}
OUTPUT=${OUTPUT:-$WORK/llava-mini}
SEED=${SEED:-0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ${QUICK:-0} == 1 ]]; then
    PROCESSES=${PROCESSES:-1} VISION=${VISION:-8:4,24:1} LANGUAGE=${LANGUAGE:-8:4,24:1}
    ALIGN=${ALIGN:-3} TUNE=${TUNE:-12:2,24:1} CHOICES=${CHOICES:-12:2,24:1} SCENES=${SCENES:-2} QUESTIONS=${QUESTIONS:-24}
else
    PROCESSES=${PROCESSES:-2} VISION=${VISION:-8:1200,16:200,24:400}
    LANGUAGE=${LANGUAGE:-8:600,12:400}
    ALIGN=${ALIGN:-300} TUNE=${TUNE:-12:100,16:150,24:1130} CHOICES=${CHOICES:-12:160,24:650}
    SCENES=${SCENES:-150} QUESTIONS=${QUESTIONS:-96}
fi

stage() {
    local name=$1 processes=$2
    shift 2
    local launcher=(python)
    if ((processes > 1)); then
        launcher=(python -m torch.distributed.run --standalone --nproc_per_node "$processes")
    fi
    "${launcher[@]}" -m mustdrop_command mini-train "$name" --work "$WORK" --seed "$SEED" "$@"
}

stage vision 1 --phases "$VISION"
stage language "$PROCESSES" --phases "$LANGUAGE" --questions "$QUESTIONS"
stage align 1 --phases "$ALIGN"
stage tune "$PROCESSES" --phases "$TUNE" --questions "$QUESTIONS"
stage choices "$PROCESSES" --phases "$CHOICES" --questions "$QUESTIONS" --lr 1.5e-3
stage export 1 --output "$OUTPUT"
python -m mustdrop_command mini-evaluate --model_path "$OUTPUT" --n_scenes "$SCENES" --per_scene 10 \
    --output "$OUTPUT/accuracy.json"
