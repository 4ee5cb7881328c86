"""Work that rank 0 does for all, on two processes."""

import pytest
import torch
from lightning.fabric import Fabric
from torch import multiprocessing

from engine.ranks import OtherRankError, on_leader
from sparsity.errors import ResourceError


def fail():
    raise ResourceError("the disk is full")


def one_rank(rank, address, results):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)

    class Two:
        is_global_zero = rank == 0

        @staticmethod
        def broadcast(value):
            given = [value]
            torch.distributed.broadcast_object_list(given)
            return given[0]

    found = [on_leader(Two, lambda: "written")]
    try:
        on_leader(Two, fail)
    except ResourceError as error:
        found.append(str(error))
    except OtherRankError as error:
        found.append(error.code)
    torch.save(found, f"{results}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_an_error_of_the_leader_ends_all(tmp_path):
    multiprocessing.spawn(one_rank, (f"file://{tmp_path}/store", str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    assert found == [["written", "the disk is full"], [None, 4]]


def test_alone():
    fabric = Fabric(accelerator="cpu", devices=1)
    assert on_leader(fabric, lambda: 3) == 3
    with pytest.raises(ResourceError, match="the disk is full"):
        on_leader(fabric, fail)
