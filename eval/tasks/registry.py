"""Every task that can be run, and the benchmarks under the names that the scripts use."""

from __future__ import annotations

from dataclasses import dataclass

from llava.constants import FRAMES


@dataclass(frozen=True)
class Task:
    """A task of lmms-eval, stock or ours, and how to read its results.

    Attributes
    ----------
    metrics : tuple of str
        lmms-eval's aggregated metrics; their sum is the headline score. The first is also what is read per sample.
    scale : float
        Turns that sum into the units papers print: 100 for a share, 1 for points and for what is in percent already.
    scoring : str
        How answers become the headline score: ``mean`` over questions, ``f1`` of the answer yes, ``pairs`` of
        questions (MME's points), or ``options``, MMBench's: the mean over questions, each right only if every rotation
        of its options was answered right.
    synthetic : bool
        Whether it is ours.
    gated : bool
        Whether lmms-eval downloads its data only with a Hugging Face token.
    judge : bool
        Whether lmms-eval asks a language model on the internet to score every answer.
    videos : bool
        Whether its questions are about videos.
    note : str
        What else a reader of its scores has to know.
    generator : tuple of str
        The files of `eval.mini` that make a synthetic task's scenes and questions.
    """

    metrics: tuple[str, ...]
    scale: float = 100
    scoring: str = "mean"
    synthetic: bool = False
    gated: bool = False
    judge: bool = False
    videos: bool = False
    note: str = ""
    generator: tuple[str, ...] = ("scenes.py", "questions.py")

    @property
    def views(self) -> int:
        """Views of what a question shows: a video's frames."""
        return FRAMES if self.videos else 1

    @property
    def group(self) -> int:
        """How many neighbouring questions are scored together; a limit has to be a multiple of it."""
        return 2 if self.scoring == "pairs" else 1


MATCH = ("exact_match",)
MADE_HERE = "synthetic pictures of this project's own generator"
CONTAINED = ("containment",)
MATCHED = "whether the answer contains the expected words; papers have a judge score it, mustdrop judge does that"
TASKS = {
    "gqa": Task(MATCH, gated=True, note="balanced test-dev split"),
    "mmbench_en_dev_static": Task(
        ("gpt_eval_score",), scale=1, scoring="options", gated=True,
        note="dev split; options are found in answers by lmms-eval's rules, without a judge",
    ),
    "mmbench_cn_dev": Task(
        ("gpt_eval_score",), scale=1, scoring="options", gated=True,
        note="dev split; an answer that names no option goes to a judge, or to chance without OPENAI_API_KEY",
    ),
    "mme": Task(
        ("mme_perception_score", "mme_cognition_score"), scale=1, scoring="pairs", gated=True,
        note="perception and cognition, 2800 points at most",
    ),
    "pope": Task(
        ("pope_f1_score",), scoring="f1", gated=True, note="F1 over random, popular and adversarial questions together"
    ),
    "scienceqa_img": Task(MATCH, gated=True, note="test questions that have a picture"),
    "vqav2_val": Task(MATCH, gated=True, note="validation split, where papers print test-dev"),
    "textvqa_val": Task(MATCH, note="validation split; no OCR tokens in the prompt"),
    "vizwiz_vqa_val": Task(MATCH, note="validation split, where papers print test-dev"),
    "seedbench": Task(("seed_all",), gated=True, note="questions about pictures and about videos' frames"),
    "mmvet": Task(("gpt_eval_score",), scale=1, gated=True, judge=True, note="scored by a judge, OPENAI_API_KEY"),
    "mini_gqa": Task(MATCH, synthetic=True, note=MADE_HERE),
    "mini_mmbench": Task(("gpt_eval_score",), scale=1, scoring="options", synthetic=True, note=MADE_HERE),
    "mini_mme": Task(
        ("mme_perception_score",), scale=1, scoring="pairs", synthetic=True,
        note=f"{MADE_HERE}; existence, color and position, 600 points at most",
    ),
    "mini_pope": Task(("pope_f1_score",), scoring="f1", synthetic=True, note=MADE_HERE),
    "mini_textvqa": Task(MATCH, synthetic=True, note=f"{MADE_HERE}; no OCR tokens in the prompt"),
    "mini_highres": Task(
        MATCH, synthetic=True, note=f"{MADE_HERE}, too fine for one view: for models with tiles",
        generator=("scenes.py", "questions.py", "highres.py"),
    ),
    "tgif_qa": Task(CONTAINED, videos=True, note=MATCHED),
    "msvd_qa": Task(CONTAINED, videos=True, note=MATCHED),
    "msrvtt_qa": Task(CONTAINED, videos=True, note=MATCHED),
    "activitynet_qa": Task(CONTAINED, videos=True, note=MATCHED),
    "mini_video": Task(MATCH, synthetic=True, videos=True, note="synthetic clips of this project's own generator"),
}  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """A benchmark under the name its script uses.

    Attributes
    ----------
    title : str
        As papers' tables print it.
    stock : str
        lmms-eval's task, for real checkpoints.
    mini : str
        The synthetic task that stands in for it when the model is the embedded one.
    """

    title: str
    stock: str
    mini: str

    @property
    def gated(self) -> bool:
        """Whether lmms-eval downloads its data only with a Hugging Face token."""
        return TASKS[self.stock].gated


BENCHMARKS = {
    "gqa": Benchmark("GQA", "gqa", "mini_gqa"),
    "mmbench": Benchmark("MMBench", "mmbench_en_dev_static", "mini_mmbench"),
    "mmbench_cn": Benchmark("MMBench-CN", "mmbench_cn_dev", "mini_mmbench"),
    "mme": Benchmark("MME", "mme", "mini_mme"),
    "pope": Benchmark("POPE", "pope", "mini_pope"),
    "sqa": Benchmark("SQA-IMG", "scienceqa_img", "mini_mmbench"),
    "vqav2": Benchmark("VQAv2", "vqav2_val", "mini_gqa"),
    "textvqa": Benchmark("TextVQA", "textvqa_val", "mini_textvqa"),
    "vizwiz": Benchmark("VizWiz", "vizwiz_vqa_val", "mini_gqa"),
    "seed": Benchmark("SEED-Bench", "seedbench", "mini_mmbench"),
    "mmvet": Benchmark("MM-Vet", "mmvet", "mini_gqa"),
    "tgif": Benchmark("TGIF-QA", "tgif_qa", "mini_video"),
    "msvd": Benchmark("MSVD-QA", "msvd_qa", "mini_video"),
    "msrvtt": Benchmark("MSRVTT-QA", "msrvtt_qa", "mini_video"),
    "activitynet": Benchmark("ActivityNet-QA", "activitynet_qa", "mini_video"),
}


def mirrored(task: str) -> str:
    """The benchmark that a task is, or that it stands in for if it is synthetic: ``mini_pope`` -> ``pope``.

    A synthetic task that stands in for none is its own.

    Raises
    ------
    ValueError
        If there is none.
    """
    for name, benchmark in BENCHMARKS.items():
        if task in (benchmark.stock, benchmark.mini):
            return name
    if task in TASKS and TASKS[task].synthetic:
        return task
    raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")
