"""Work that one process does for all of them, what they add up and agree on, and what they do when one of them fails.

Loads torch only where there are several.
"""

import _thread
import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from engine.exit_codes import RESOURCES, exit_code

if TYPE_CHECKING:
    from torch import Tensor

from datasets.place import Place

T = TypeVar("T")
PAUSE = 0.25  # seconds between two checks of the other ranks
GRACE = 10.0  # seconds in which a rank ends by itself, once another has failed


def on_leader(fabric: Any, call: Callable[[], T]) -> T | None:
    """Return what `call` gives on rank 0; None on the others, which wait for it.

    An error is raised on rank 0; the others get OtherRankError: none waits for one that is gone.
    """
    result, failed = None, None
    if fabric.is_global_zero:
        try:
            result = call()
        except Exception as error:
            failed = error
    code = fabric.broadcast(None if failed is None else exit_code(failed))
    if failed is not None:
        raise failed
    if code is not None and not fabric.is_global_zero:
        raise OtherRankError(code)
    return result


def summed(fabric: Any, tensor: "Tensor") -> "Tensor":
    """Return the sum of the ranks' tensors, on the device of each."""
    if fabric.world_size == 1:
        return tensor
    return fabric.all_reduce(tensor.to(fabric.device), reduce_op="sum").to(tensor.device)


def place_of(fabric: Any) -> Place:
    """Return where this process stands among the ranks."""
    return Place(fabric.global_rank, fabric.world_size)


class Agreement:
    """Whether any rank says yes, asked of all at the same time; through the CPU, so that no accelerator waits."""

    def __init__(self, fabric: Any):
        self._group = None
        if fabric.world_size > 1:
            from torch import distributed

            self._group = distributed.new_group(backend="gloo")

    def any(self, mine: bool) -> bool:
        if self._group is None:
            return mine
        import torch
        from torch import distributed

        said = torch.tensor([int(mine)])
        distributed.all_reduce(said, distributed.ReduceOp.MAX, self._group)
        return bool(said)


class OtherRankError(Exception):
    """Another rank has ended the run, and has said why; `code` is the exit code of all."""

    def __init__(self, code: int):
        super().__init__(f"another rank has ended the run with exit code {code}")
        self.code = code


class Peers:
    """Tells the other ranks when this one fails, and ends this one when another does.

    What is said goes through the store of the process group, since collectives wait for the rank that is gone. Without
    a process group there is nobody to tell.
    """

    def __init__(self) -> None:
        self.code: int | None = None  # of the rank that failed first, where it is another
        self.alone = False  # rank 0 has ended without an exit code
        self._store: Any = None
        self._left = threading.Event()
        self._distributed: Any = None

    def watch(self) -> None:
        """Begin, in the process group that there is."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return
        self._distributed, self.code, self._left = distributed, None, threading.Event()
        if distributed.get_world_size() == 1:
            return
        self._rank, self._ranks = distributed.get_rank(), distributed.get_world_size()
        store = distributed.distributed_c10d._get_default_store()
        self._store = distributed.PrefixStore("peers", store)
        threading.Thread(target=self._listen, daemon=True, name="peers").start()

    def _listen(self) -> None:
        while not self._left.wait(PAUSE):
            code = self._said()
            if code is not None:
                self._end(code)
                return

    def _said(self) -> int | None:
        """The exit code that another rank has left, or that of a lost process where rank 0 and its store are gone."""
        try:
            if not self._store.check(["failed"]):
                return None
            rank, code = self._store.get("failed").decode().split()
            if int(rank) == self._rank:
                return None
            self._store.set(f"seen {self._rank}", "")
            return int(code)
        except Exception:  # of the connection; each version of torch has its own
            self.alone = True
            return RESOURCES

    def _end(self, code: int) -> None:
        self.code = code
        if not self._left.wait(GRACE):  # not in a collective that has broken: a long computation
            _thread.interrupt_main()
            if not self._left.wait(GRACE):
                os._exit(code)

    def first(self, code: int) -> bool:
        """Say that this rank fails; whether it is the first to do so, and so the one that tells the user."""
        if self._store is None:
            return True
        mine = f"{self._rank} {code}"
        try:
            said = self._store.compare_set("failed", "", mine).decode()
        except Exception:  # of the connection: rank 0 is gone
            return self.code is None
        if said != mine:
            self.code = int(said.split()[1])
        return said == mine

    def lost(self) -> bool:
        """Whether another rank has failed: then an error of this one, as of a broken connection, only follows.

        What a rank leaves behind is read within seconds of its end.
        """
        if self._store is None:
            return False
        deadline = time.monotonic() + GRACE / 4
        while self.code is None and time.monotonic() < deadline:
            self.code = self._said()
            time.sleep(PAUSE)
        return self.code is not None

    def leave(self, code: int) -> None:
        """Stop watching, and end the process group. With an exit code other than 0: only after the others have seen
        what this rank has said, and rank 0 goes first, since the process that started the others kills them all where
        one goes before it.

        Lightning ends the group for NCCL alone. Threads of gloo that are there when the interpreter ends are stopped as
        they ask for its lock, and C++ may answer with "terminate called without an active exception".
        """
        self._left.set()
        store, self._store = self._store, None
        if store is None or not code:
            self._end_group()
            return
        with contextlib.suppress(Exception):  # of the connection
            store.set(f"seen {self._rank}", "")
        others = [f"seen {rank}" for rank in range(self._ranks) if rank != self._rank]
        if self.code is None:
            _until(lambda: store.check(others))
        self._end_group()  # breaks the collectives in which the others wait
        if self._rank:
            _until(lambda: store.check(["never"]))

    def _end_group(self) -> None:
        if self._distributed is not None and self._distributed.is_initialized():
            with contextlib.suppress(Exception):  # of broken connections
                self._distributed.destroy_process_group()


def _until(done: Callable[[], bool]) -> None:
    """Wait until it is so, the connection is gone, or it is too late."""
    deadline = time.monotonic() + GRACE
    try:
        while time.monotonic() < deadline and not done():
            time.sleep(PAUSE)
    except Exception:  # of the connection; each version of torch has its own
        return


peers = Peers()
