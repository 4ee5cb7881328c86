"""Work side by side: each piece once, on one thread of torch each, whatever becomes of it."""

import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch

from sparsity.solvers.threads import side_by_side
from tests.processes import PATIENCE


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_each_piece_is_done_once(count: int) -> None:
    done: list[int] = []
    side_by_side(done.append, range(count))
    assert sorted(done) == list(range(count))
    assert torch.get_num_threads() == 3


def test_pieces_are_done_at_the_same_time_each_on_one_thread() -> None:
    every = threading.Barrier(3, timeout=PATIENCE)
    inside: list[int] = []

    def piece(_: int) -> None:
        every.wait()  # raises where fewer than three are at work
        inside.append(torch.get_num_threads())

    for _ in range(2):  # the second time by threads that were there before
        side_by_side(piece, range(3))
    assert inside == [1] * 6
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("bad", range(3))
def test_an_error_of_any_piece_is_raised_and_the_threads_are_given_back(bad: int) -> None:
    every = threading.Barrier(3, timeout=PATIENCE)

    def piece(number: int) -> None:
        every.wait()
        if number == bad:
            raise ValueError("bad piece")

    with pytest.raises(ValueError, match="bad piece"):
        side_by_side(piece, range(3))
    assert torch.get_num_threads() == 3
    side_by_side(lambda _: None, range(9))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    side_by_side(lambda _: None, range(9))
    child = multiprocessing.get_context("fork").Process(target=side_by_side, args=(_nothing, range(9)))
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0


def _nothing(_: int) -> None:
    pass
