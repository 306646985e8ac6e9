#!/usr/bin/env bash
# Requests per second, time to first token and cache use of the server, nothing reduced and reduced in turn.
#
#   bash scripts/bench_serve.sh                            the embedded model: seconds per line, a few minutes to start
#   SETTINGS='{"method": "mustdrop_plus", "retain": 64}' MODEL=llava-hf/llava-1.5-7b-hf bash scripts/bench_serve.sh
#
#   CONCURRENCY="1 4 16"               clients at once
#   REQUESTS=48                        per line
#   OUT=serving.json                   all that was measured, with machine and versions
# See serve.sh for SETTINGS, MODEL and the environment.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/serve.sh" --install
export SETTINGS="${SETTINGS-{\"method\": \"divprune\", \"retain\": 64\}}" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${VLLM_ENV:-$root/.venv-vllm}/bin/python" "$root/scripts/bench_serve.py" --settings "$SETTINGS" \
    --model "${MODEL:-$root/checkpoints/llava-mini}" --concurrency ${CONCURRENCY:-1 4 16} \
    --requests "${REQUESTS:-48}" --out "${OUT:-serving.json}" "$@"
