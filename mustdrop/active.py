"""Which reducer is on, for which model, and for whom: blocks, threads and asynchronous tasks.

What is on is known to a context (`contextvars`): other threads, and tasks that interleave, do not see it. A thread that
is started inside a block belongs to it, although new threads inherit no context before Python 3.14: while a block is
open, `threading.Thread.start` hands on what is on. A worker of a thread pool runs what anybody gives it. A bound method
that was taken inside a block knows it there, too (`pool.submit(model.generate, ...)`, see `carrying`); a worker that
was started inside the only block that is open for the model belongs to that; the rest cannot be told and is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import thread as futures
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from mustdrop.reach import Fitting
    from mustdrop.recording import TraceRecorder


@dataclass(eq=False)
class Activation:
    """A reducer that is on for the model that has this key, from the beginning of its block to the end."""

    key: object
    reducer: Fitting
    run: TraceRecorder
    open: bool = True


_here: ContextVar[tuple[Activation, ...] | None] = ContextVar("mustdrop_reducers", default=None)
_everywhere: list[Activation] = []
_BORN_IN: WeakKeyDictionary[threading.Thread, tuple[Activation, ...]] = WeakKeyDictionary()
_lock = threading.Lock()
_plain_start = threading.Thread.start
_handing_on = False


@contextmanager
def activated(key: object, reducer: Fitting, run: TraceRecorder) -> Iterator[None]:
    """Let a reducer be on inside the `with` block; blocks may end in any order, and in another context."""
    activation = Activation(key, reducer, run)
    with _lock:
        _everywhere.append(activation)
        _hand_on(True)
    _here.set((*(_here.get() or ()), activation))
    try:
        yield
    finally:
        activation.open = False
        with _lock:
            _everywhere.remove(activation)
            _hand_on(bool(_everywhere))
        _here.set(tuple(one for one in _here.get() or () if one.open))


def active(key: object) -> Activation | None:
    """The innermost reducer that is on for a model here, None if there is none.

    Raises
    ------
    RuntimeError
        If that cannot be told: in a worker of a thread pool, while a reducer is on for the model somewhere.
    """
    found = _here.get()
    for activation in reversed(found or ()):
        if activation.open and activation.key is key:
            return activation
    opened = [one for one in list(_everywhere) if one.key is key] if found is None and _is_worker() else []
    if opened and opened != [one for one in _BORN_IN.get(threading.current_thread(), ()) if one in opened]:
        raise RuntimeError(
            "reducer: one is on for this model, but a worker of a thread pool cannot tell whether its task belongs to "
            "that block: submit model.generate itself, or contextvars.copy_context().run with your function"
        )
    return opened[-1] if len(opened) == 1 else None


class carrying:
    """Decorator of a method that, once bound inside a block, belongs to it wherever it is called.

    Where it is called inside a block of its own, that one counts.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.__doc__, self.__name__ = function.__doc__, function.__name__

    def __get__(self, model: object, patch_to_token: type | None = None) -> Callable:
        if model is None:
            return self.function
        bound, taken = self.function.__get__(model, patch_to_token), _here.get()
        if taken is None and _is_worker():
            return bound  # whose task this is cannot be told here either
        taken = taken or ()

        @wraps(bound)
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(one.open for one in _here.get() or ()):
                return bound(*args, **kwargs)
            token = _here.set(taken)
            try:
                return bound(*args, **kwargs)
            finally:
                _here.reset(token)

        return call


def _hand_on(wanted: bool) -> None:
    """Put our `start` in the place of threading's, or take it away; where somebody else's is around it, it stays."""
    global _handing_on, _plain_start
    if wanted and not _handing_on:
        _plain_start, threading.Thread.start, _handing_on = threading.Thread.start, _start, True
    elif not wanted and threading.Thread.start is _start:
        threading.Thread.start, _handing_on = _plain_start, False


def _start(self: threading.Thread) -> None:
    """`threading.Thread.start` that hands on what is on; of a pool's worker it only notes where it was started."""
    taken, run = _here.get(), self.run
    if taken and _is_worker(self):
        _BORN_IN[self] = taken
    elif taken:

        def run_there() -> None:
            _here.set(taken)
            run()

        self.run = run_there
    _plain_start(self)


def _is_worker(thread: threading.Thread | None = None) -> bool:
    """Whether a thread, by default this one, serves a pool, or is none that Python has started."""
    thread = thread or threading.current_thread()
    target = getattr(thread, "_target", None)
    pools = "concurrent.futures.thread", "multiprocessing.pool"
    of_pool = getattr(target, "__module__", None) in pools or thread in futures._threads_queues
    return of_pool or isinstance(thread, threading._DummyThread)
