"""Whom a reducer reaches: blocks, threads, pools and asynchronous tasks on one model."""

import asyncio
import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import pytest
import torch
from tiny import ours, pictures, prompt

from mustdrop import Reducer, load_reducer

IDS, IMAGES = prompt(3, 4), pictures(1)
FEW, MORE = (load_reducer({"method": "divprune", "retain": number}) for number in (20, 50))
SETTINGS = {"images": IMAGES, "max_new_tokens": 2, "do_sample": False}


def entered(run) -> list[int]:
    return [trace.vision_tokens[0] for trace in run.traces]


def generate(model=None):
    return (model or ours()).generate(IDS, **SETTINGS)


def in_thread(target, *args, **kwargs):
    thread = threading.Thread(target=target, args=args, kwargs=kwargs)
    thread.start()
    thread.join()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    start = threading.Thread.start
    yield
    assert threading.Thread.start is start
    assert type(ours().reducer) is Reducer and ours().run is None


def test_the_innermost_block_counts_and_blocks_end_in_any_order():
    first, second = FEW.on(ours()), MORE.on(ours())
    one, two = first.__enter__(), second.__enter__()
    generate()
    first.__exit__(None, None, None)
    generate()
    second.__exit__(None, None, None)
    generate()
    assert (entered(one), entered(two)) == ([], [50, 50])
    with FEW.on(ours()) as one:
        with MORE.on(ours()) as two:
            generate()
        generate()
    assert (entered(one), entered(two)) == ([20], [50])


def test_two_threads_with_two_reducers_do_not_mix():
    barrier, found = threading.Barrier(2), {}

    def work(name, reducer):
        with reducer.on(ours()) as run:
            for _ in range(4):
                barrier.wait()
                generate()
            found[name] = entered(run)

    threads = [threading.Thread(target=work, args=pair) for pair in (("few", FEW), ("more", MORE))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"few": [20] * 4, "more": [50] * 4}


def test_tasks_that_interleave_do_not_mix():
    async def work(reducer):
        with reducer.on(ours()) as run:
            for _ in range(3):
                await asyncio.sleep(0)
                generate()
                await asyncio.to_thread(generate)
                await asyncio.to_thread(ours().generate, IDS, **SETTINGS)
            return entered(run)

    async def plain():
        await asyncio.sleep(0)
        return type(ours().reducer)

    async def both():
        return await asyncio.gather(work(FEW), work(MORE), plain())

    assert asyncio.run(both()) == [[20] * 9, [50] * 9, Reducer]


@pytest.mark.parametrize("target", ["the method", "the model", "a function", "a subclass", "a thread of a thread"])
def test_a_thread_that_is_started_inside_a_block_belongs_to_it(target):
    model = ours()

    class Own(threading.Thread):
        def run(self):
            generate()

    with FEW.on(model) as run:
        if target == "the method":
            in_thread(model.generate, IDS, **SETTINGS)
        elif target == "the model":
            in_thread(model, IDS, images=IMAGES)
        elif target == "a function":
            in_thread(generate)
        elif target == "a thread of a thread":
            in_thread(in_thread, generate)
        else:
            thread = Own()
            thread.start()
            thread.join()
    assert entered(run) == [20]


def test_a_thread_that_has_nothing_to_do_with_the_block_is_not_reduced():
    opened, done, logits = threading.Event(), threading.Event(), []

    def other():
        opened.wait()
        logits.append(ours()(IDS, images=IMAGES).logits)
        in_thread(lambda: logits.append(ours()(IDS, images=IMAGES).logits))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with FEW.on(ours()) as run:
        opened.set()
        done.wait()
    thread.join()
    plain = ours()(IDS, images=IMAGES).logits
    assert run.traces == [] and all(torch.equal(found, plain) for found in logits) and len(logits) == 2


def test_a_thread_pool_is_told_or_refused():
    model = ours()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(generate).result()
        with FEW.on(model) as run:
            pool.submit(model.generate, IDS, **SETTINGS).result()
            pool.submit(contextvars.copy_context().run, generate).result()
            with pytest.raises(RuntimeError, match="^reducer: one is on for this model, but a worker of a thread"):
                pool.submit(generate).result()
        pool.submit(generate).result()
    assert entered(run) == [20, 20]


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ThreadPool])
def test_a_pool_that_is_started_inside_the_only_block_belongs_to_it(pool):
    with FEW.on(ours()) as run, pool(2) as workers:
        list(workers.map(lambda _: generate(), range(3)))
        with MORE.on(ours()), pytest.raises(RuntimeError, match="^reducer: one is on"):
            list(workers.map(lambda _: generate(), range(1)))
    assert entered(run) == [20] * 3


def test_a_method_taken_outside_is_plain_in_a_pool_and_reduced_inside_a_block():
    model = ours()
    taken = model.generate
    with ThreadPoolExecutor(1) as pool, FEW.on(model) as run:
        pool.submit(taken, IDS, **SETTINGS).result()
        assert run.traces == []
        taken(IDS, **SETTINGS)
    assert entered(run) == [20]


def test_a_call_under_way_ends_as_it_began():
    model, block = ours(), FEW.on(ours())
    run = block.__enter__()

    class Leaving:
        def put(self, tokens):
            block.__exit__(None, None, None) if threading.Thread.start.__module__ == "mustdrop.active" else None

        def end(self):
            pass

    model.generate(IDS, **{**SETTINGS, "max_new_tokens": 4}, streamer=Leaving())
    assert entered(run) == [20]
    first = run.traces[0]
    assert max(first.cache_lengths) == 20 + 1 + 3 + 4


def test_a_copy_of_a_model_is_a_model_of_its_own():
    with FEW.on(ours()) as run:
        generate(copy.deepcopy(ours()))
    assert run.traces == []


def test_whoever_patches_threads_meanwhile_keeps_his_patch(monkeypatch):
    plain = threading.Thread.start
    block = FEW.on(ours())
    block.__enter__()
    ours_then = threading.Thread.start
    threading.Thread.start = lambda self: ours_then(self)
    theirs = threading.Thread.start
    block.__exit__(None, None, None)
    try:
        assert threading.Thread.start is theirs
        with FEW.on(ours()) as run:
            in_thread(generate)
        assert entered(run) == [20]
    finally:
        threading.Thread.start = ours_then
        with FEW.on(ours()):
            pass
    assert threading.Thread.start is plain


def test_traces_of_a_long_block_are_bounded():
    with FEW.on(ours(), keep=2) as run:
        for _ in range(3):
            generate()
    assert entered(run) == [20, 20]
