"""lmms-eval's model ``llava_mustdrop``: LLaVA with a token reducer.

    python -m lmms_eval eval --model llava_mustdrop --tasks gqa --batch_size 8 \\
        --model_args pretrained=liuhaotian/llava-v1.5-7b,method=configs/methods/mustdrop.yaml,retain=64

Settings of the method may also be given inline, alone or on top of a file:
``method=mustdrop,global_threshold=0.011,individual_threshold=0.01``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from transformers import LogitsProcessorList

from eval.checkpoints import flag
from eval.methods import read_method
from eval.progress import progress
from eval.run.answer_file import AnswerFile, rank_files
from eval.run.generation import Teacher, cut, for_transformers
from eval.run.inference import LoadedModel, UnfitQuestion, ahead
from eval.run.questions import Question, naming, place
from eval.run.rows import flops, shape_of
from eval.run.samples import names, pack_stages
from eval.run.tiled import tiling
from eval.run.visuals import Visual, open_visual
from mustdrop import Trace, load_reducer
from mustdrop.command import needed_number

COUNTS = (
    "images", "tower", "before_mlp", "plans", "text_tokens", "full_text_tokens", "vision_tokens",
    "vision_tokens_after", "cache_lengths", "cache_bytes", "mean_tokens", "mean_tokens_official", "times_ms",
)  # fmt: skip
LENGTH_STEP = 128
"""Contexts whose lengths in characters fall into the same step keep their order, and so share their pictures."""

PICTURES = 24


class LlavaMustDrop(lmms):
    """LLaVA with a token reducer, as lmms-eval wants a model.

    Parameters
    ----------
    pretrained : str
        Folder or hub id of a LLaVA checkpoint.
    method : str, optional
        YAML file or name of a method; by default nothing is reduced.
    device, device_map, dtype, attn_implementation, conv_template, model_base, load_4bit, load_8bit, protocol
        As for ``eval.run.inference.LoadedModel.load``.
    batch_size : int
        Prompts per batch.
    samples : str, optional
        JSONL file that gets one line per answer: document, answer, and what happened to the vision tokens; several
        processes write one each, ``.rank0.jsonl`` and so on.
    kept_patches : bool
        Also write which patches every stage kept; ``eval.run.samples.patches`` reads them.
    pictures : str, optional
        Folder that gets the pictures of two dozen of the documents, as the vision tower sees them.
    resume : bool
        Answers that ``samples`` already holds are not generated again. The caller vouches that they come from the same
        settings.
    skip_unfit : bool
        A question that cannot be asked, because an image of it cannot be read, gets an empty answer, and its line says
        why (``skipped``). By default it ends the run.
    loaded : LoadedModel, optional
        A model to use instead of loading one; it outlives this object.
    description : str
        Stands in front of the progress bar.
    **fields
        Settings of the method.

    Attributes
    ----------
    records : list of dict
        What ``samples`` holds, in the order of the answers.

    Raises
    ------
    ValueError
        With one line, before anything is loaded, if a setting is wrong.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "liuhaotian/llava-v1.5-7b",
        method: str | dict | None = None,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        conv_template: str = "vicuna_v1",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        samples: str | None = None,
        kept_patches: bool = True,
        pictures: str | None = None,
        resume: bool = False,
        skip_unfit: bool = False,
        loaded: LoadedModel | None = None,
        description: str = "answering",
        model_base: str | None = None,
        load_4bit: bool = False,
        load_8bit: bool = False,
        protocol: str | None = None,
        **fields,
    ) -> None:
        super().__init__()
        self.method = read_method(method, fields)
        self.reducer = load_reducer(self.method)
        self.batch_size = needed_number("batch_size", batch_size)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._borrowed = loaded is not None
        whole = loaded or LoadedModel.load(
            pretrained,
            device=device,
            device_map=device_map,
            dtype=dtype,
            attn_implementation=attn_implementation,
            conv_template=conv_template,
            model_base=model_base,
            load_4bit=flag("load_4bit", load_4bit),
            load_8bit=flag("load_8bit", load_8bit),
            protocol=protocol,
        )
        self.loaded = whole.for_method(self.reducer)
        self.shape = shape_of(
            self.loaded.model.config.to_dict(), "model", str(self.loaded.dtype).removeprefix("torch.")
        )
        self.description = description
        self.kept_patches = kept_patches
        self.skip_unfit = skip_unfit
        self.pictures = None if pictures is None else Path(pictures)
        self.answers = AnswerFile(None if samples is None else rank_files(Path(samples))[self._rank], resume)
        self._selector = self.answers.noted("selector_macs", "selector_prompt")

    @property
    def records(self) -> list[dict]:
        """One line per answer so far."""
        return self.answers.records

    @property
    def device(self) -> torch.device:
        """Device of the inputs; lmms-eval gathers counts there."""
        return self.loaded.device

    def clean(self) -> None:
        """Free what a language-model judge may need: called by lmms-eval between answering and scoring."""
        if not self._borrowed:
            self.loaded = None
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer one question per request; ``args``: context, generation settings, visuals, document, task, split."""
        answers: list[str | None] = [None] * len(requests)
        waiting = []
        for index, request in enumerate(requests):
            known = self.answers.take_up(request.args[3:6])
            if known is None:
                waiting.append(index)
            else:
                answers[index] = known["answer"]
        shown = {int(number * len(requests) / PICTURES) for number in range(PICTURES)}
        with progress(
            description=self.description, total=len(requests), unit="question", disable=self._rank > 0
        ) as bar:
            bar.update(len(requests) - len(waiting))

            def prepare(batch: list[int]) -> tuple[list[Question], list[tuple[int, dict]], dict | None]:
                asked, skipped = self._ask(requests, batch)
                ready = self._prepare([one.context for one in asked], [one.images for one in asked]) if asked else None
                return asked, skipped, ready

            batches = self._batches(waiting, lambda i: requests[i].args[:2])
            for asked, skipped, prepared in ahead(prepare, batches):
                for index, record in skipped:
                    answers[index] = ""
                    self.answers.write(record)
                if asked:
                    texts = self._answer(asked, prepared, requests[asked[0].index].args[1], shown)
                    for one, text in zip(asked, texts, strict=True):
                        answers[one.index] = text
                bar.update(len(asked) + len(skipped))
        return answers

    def _answer(self, asked: Sequence[Question], prepared: dict, settings: dict, shown: Container[int]) -> list[str]:
        """Answers to a prepared batch, recorded; the images of the questions in `shown` are kept."""
        with naming([one.where for one in asked]):
            self._count_selector([one.context for one in asked], [one.images for one in asked])
            texts, traces = self._generate(prepared, settings)
        for one, text, trace in zip(asked, texts, traces, strict=True):
            self._record(one.where, one.document, one.context, text, trace, **self._tiles(one.images))
            if one.index in shown:
                self._show(one.where[:2], one.images)
        return texts

    def _ask(self, requests: Sequence[Instance], batch: Sequence[int]) -> tuple[list[Question], list[tuple[int, dict]]]:
        """The questions of a batch, and by their numbers the lines of those that are left out."""
        asked, skipped = [], []
        for index in batch:
            context, _, doc_to_visual, *where = requests[index].args
            try:
                document = self._document(*where)
                asked.append(
                    Question(index, tuple(where), context, document, self._visuals(doc_to_visual, document, where))
                )
            except UnfitQuestion as error:
                if not self.skip_unfit:
                    raise
                facts = {"question_id": str(where[0]), "question": context, "answer": "", "skipped": str(error)}
                skipped.append((index, {**place(where), **facts}))
        return asked, skipped

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer until the task's ``doc_to_text`` says it is enough; returns every request's answers, round by round.

        After a round, ``doc_to_text(document, previous_output, round_idx, previous_round_info)`` gives the next
        visuals, the next context, whether to stop, the outputs to keep, and what it wants to be told next time.
        """
        outputs: list[list[str]] = [[] for _ in requests]
        information: list[object] = [None] * len(requests)
        contexts = [request.args[0] for request in requests]
        documents = [self._document(*request.args[4:7]) for request in requests]
        visuals = [
            self._visuals(request.args[2], document, request.args[4:7])
            for request, document in zip(requests, documents, strict=True)
        ]
        active, number = list(range(len(requests))), 0
        while active:
            number += 1
            rounds = progress(
                description=f"{self.description}, round {number}",
                total=len(active),
                unit="question",
                disable=self._rank > 0,
            )
            with rounds as bar:
                for batch in self._batches(active, lambda i: (contexts[i], requests[i].args[1])):
                    own = [contexts[i] for i in batch], [visuals[i] for i in batch]
                    prepared = self._prepare(*own)
                    self._count_selector(*own)
                    texts, traces = self._generate(prepared, requests[batch[0]].args[1])
                    for index, text, trace in zip(batch, texts, traces, strict=True):
                        outputs[index].append(text)
                        self._record(
                            requests[index].args[4:7], documents[index], contexts[index], text, trace, round=number
                        )
                    bar.update(len(batch))
            going_on = []
            for index in active:
                new_visuals, contexts[index], stop, kept, information[index] = requests[index].args[3](
                    documents[index],
                    previous_output=outputs[index],
                    round_idx=number,
                    previous_round_info=information[index],
                )
                outputs[index] = outputs[index] if kept is None else list(kept)
                if not stop:
                    visuals[index] = new_visuals or []
                    going_on.append(index)
            active = going_on
        return outputs

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Mean negative log-likelihood of a continuation, and whether greedy decoding would give it.

        lmms-eval takes the smallest first value as the model's choice, so it is the loss and not its negative. The
        continuation, which ends with the template's end of turn, is fed token by token after the prompt's prefill:
        methods that look at the text must not see the answer they are scored on.
        """
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        with progress(description=self.description, total=len(requests), unit="choice", disable=self._rank > 0) as bar:
            for batch in self._batches(range(len(requests)), lambda i: (requests[i].args[0], {})):
                prompts, forced, visuals = [], [], []
                for index in batch:
                    context, continuation, doc_to_visual, *where = requests[index].args
                    document = self._document(*where)
                    if callable(continuation):
                        continuation = continuation(document)
                    pictures = self._visuals(doc_to_visual, document, where)
                    prompt = self.loaded.prompt_about(context, pictures)
                    answered = self.loaded.prompt_about(context, pictures, str(continuation).strip())
                    whole, asked = (self.loaded.encode(text, len(pictures)) for text in (answered, prompt))
                    prompts.append(prompt)
                    forced.append(whole[len(asked) :].tolist())
                    visuals.append(pictures)
                for index, result in zip(batch, self._score(prompts, visuals, forced), strict=True):
                    results[index] = result
                bar.update(len(batch))
        return results

    def _prepare(self, contexts: Sequence[str], visuals: Sequence[Sequence[Visual]]) -> dict:
        """The host's part of a batch of contexts with their pictures."""
        prompts = [self.loaded.prompt_about(*pair) for pair in zip(contexts, visuals, strict=True)]
        return self.loaded.prepare(prompts, visuals)

    def _count_selector(self, contexts: Sequence[str], visuals: Sequence[Sequence[Visual]]) -> None:
        """Count what choosing costs on the first prompt with an image; that figure is taken for all prompts."""
        asked = [one for one in zip(contexts, visuals, strict=True) if one[1]]
        if self.shape is None or self._selector or not asked:
            return
        context, images = asked[0]
        self._selector = self.loaded.selector_cost(self.reducer, self.loaded.prompt_about(context, images), images)

    def _generate(self, prepared: dict, settings: dict) -> tuple[list[str], list[Trace]]:
        """Answers to a prepared batch, each cut where ``until`` says, and their traces."""
        with self.reducer.on(self.loaded.model, timing=True) as run:
            texts = self.loaded.answer_prepared(prepared, **for_transformers(settings))
        return [cut(text, settings.get("until")) for text in texts], run.traces

    @torch.inference_mode()
    def _score(self, prompts, visuals, forced: list[list[int]]) -> list[tuple[float, bool]]:
        """Mean loss and greedy agreement of forced continuations (lists of ids) after a batch of prompts."""
        teacher = Teacher(forced, self.loaded.pad_token_id)
        with self.reducer.on(self.loaded.model):
            self.loaded.model.generate(
                **self.loaded.inputs(prompts, visuals),
                logits_processor=LogitsProcessorList([teacher]),
                max_new_tokens=max(map(len, forced)),
                do_sample=False,
            )
        means = [loss / max(len(ids), 1) for ids, loss in zip(forced, teacher.losses, strict=True)]
        return list(zip(means, teacher.greedy, strict=True))

    def _batches(self, indices: Iterable[int], describe: Callable[[int], tuple[str, dict]]) -> Iterator[list[int]]:
        """Indices of requests that share generation settings, ``batch_size`` at a time.

        The longest contexts come first, so that a batch has little padding and memory runs out at once or never; among
        contexts of about one length the order stays, because neighbours often share a picture.
        """
        groups: dict[str, list[int]] = {}
        for index in indices:
            groups.setdefault(json.dumps(describe(index)[1], sort_keys=True, default=str), []).append(index)
        for group in groups.values():
            group.sort(key=lambda index: -(len(describe(index)[0]) // LENGTH_STEP))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _document(self, doc_id: int, task: str, split: str) -> dict:
        """A document of a task; its images are decoded here, so that it is asked for once."""
        with naming([(doc_id, task, split)]):
            return self.task_dict[task][split][doc_id]

    def _visuals(self, doc_to_visual: Callable, document: dict, where: Sequence) -> list[Visual]:
        """The images of a document, RGB and upright, and the frames of its videos."""
        with naming([where]):
            return [open_visual(visual) for visual in doc_to_visual(document) or [] if visual is not None]

    def _record(self, where: Sequence, document: dict, context: str, answer: str, trace: Trace, **more) -> None:
        record = {
            **place(where),
            **names(document, where[0]),
            **more,
            "question": context,
            "answer": answer,
            **{count: getattr(trace, count) for count in COUNTS},
        }
        if self.shape is not None:
            record |= self._selector if trace.images else {}
            record["flops"] = flops(record, self.shape)
        if self.kept_patches:
            record["kept"] = pack_stages(trace.kept, sum(image["patches"] for image in trace.images))
        self.answers.write(record)

    def _tiles(self, pictures: Sequence[Visual]) -> dict:
        """How a question's one image was cut up, where it was and what was kept is recorded."""
        if not self.kept_patches or len(pictures) != 1 or not isinstance(pictures[0], Image.Image):
            return {}
        tiles = tiling(self.loaded.model.config, pictures[0].size, self.reducer.tile_order)
        return {} if tiles is None else {"tiles": tiles}

    def _show(self, where: Sequence, pictures: Sequence[Visual]) -> None:
        """Keep a document's picture; several have no one grid to draw on."""
        if self.pictures is None or len(pictures) != 1 or (seen := self.loaded.seen(pictures[0])) is None:
            return
        doc_id, task = where
        folder = self.pictures / task
        folder.mkdir(parents=True, exist_ok=True)
        seen.save(folder / f"{doc_id}.jpg", quality=88)
