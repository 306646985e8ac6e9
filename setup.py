"""Packaging of the reducers (``mustdrop``), LLaVA-1.5 with hook points (``llava``) and the evaluation (``eval``)."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.6",
    "transformers>=5.10,<6",
    "accelerate>=1.0",
    "safetensors",
    "sentencepiece",
    "protobuf",
    "pillow",
    "numpy",
    "einops",
    "pyyaml",
    "tabulate",
    "tqdm",
]

# lmms-eval asks for some forty packages, most of them for tasks and models that are not used here. `eval-light` holds
# what its evaluator needs; lmms-eval itself is then installed with --no-deps, scripts/setup.sh does both. `eval` is the
# whole of it.
TABLES = ["scipy", "matplotlib", "jinja2"]
SWEEPS = ["submitit", "rich"]
EVAL_LIGHT = [
    "datasets",
    "evaluate",
    "loguru",
    "sacrebleu",
    "pytablewriter",
    "pytz",
    "tenacity",
    "openpyxl",
    "requests",
    "av>=12,<16",
    *TABLES,
    *SWEEPS,
]
EXTRAS = {
    "eval": ["lmms-eval==0.7.3", *TABLES, *SWEEPS],
    "eval-light": EVAL_LIGHT,
    "train": ["deepspeed>=0.16", "datasets", "peft"],
    "flash": ["flash-attn"],
    "cluster": SWEEPS,
    "demo": ["gradio"],
    "test": ["pytest", "ruff"],
}
EXTRAS["dev"] = sorted({need for name in ("eval-light", "train", "cluster", "demo", "test") for need in EXTRAS[name]})

setup(
    name="mustdrop",
    version="0.1.0",
    description="Multi-stage vision token dropping for LLaVA: reproduce, measure and extend",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["llava", "llava.*", "mustdrop", "mustdrop.*", "eval", "eval.*"]),
    package_data={"eval": ["**/*.yaml", "**/*.j2"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["mustdrop = eval.cli:main"],
        "lmms_eval.models": ["llava_mustdrop = eval:manifest"],
    },
)
