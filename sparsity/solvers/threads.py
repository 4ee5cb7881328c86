"""Pieces of work side by side: each in a thread of its own, where one piece is too small to be shared out by torch."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

_Piece = TypeVar("_Piece")


def side_by_side(function: Callable[[_Piece], None], pieces: Sequence[_Piece]) -> None:
    """Call a function with each piece, in as many threads as torch has, the calling one among them.

    What the function computes runs on one thread meanwhile. Modes of torch, such as `no_grad`, are those of the calling
    thread alone: the function sets its own.
    """
    threads = torch.get_num_threads()
    queue = iter(pieces)  # an iterator over a list or a tuple gives each piece to one thread only

    def work() -> None:
        if threads > 1:
            torch.set_num_threads(1)  # in this thread, and in those that begin from now on
        for piece in queue:
            function(piece)

    others: list[Future] = []
    try:
        others = [_pool(threads - 1).submit(work) for _ in range(min(threads, len(pieces)) - 1)]
        work()
    finally:
        wait(others)
        torch.set_num_threads(threads)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """The threads, which stay: to begin them takes as long as a small layer. Those without work sleep."""
    return ThreadPoolExecutor(threads, "side by side")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a child process
