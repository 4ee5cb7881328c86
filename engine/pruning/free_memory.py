"""How much memory there is for a run: on the model's device, and on the host, whose limits of a container count."""

import os
from pathlib import Path

import torch

from sparsity.run.memory import Memory
from sparsity.view import PrunableView

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(view: PrunableView, processes: int = 1) -> Memory:
    """Return what is free, in bytes; for a model on the CPU the device's are 0, as `preflight_bytes` has it.

    processes: of this run, which share the host.
    """
    on_device = sum(torch.cuda.mem_get_info(device)[0] for device in view.accelerators)
    return Memory(on_device, free_on_host() // processes)


def free_on_host() -> int:
    """Return how many bytes of the host's memory are free."""
    return int(min(_system(), _container()))


def _system() -> int:
    """Return what the system can give without swapping (Linux), else all of the memory."""
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container() -> float:
    """Return what the limit of the container leaves (cgroup v2), cached files freed; infinite where there is none."""
    limit, used, details = (_CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    try:
        most = int(limit.read_text())  # "max": no limit
        facts = dict(line.split() for line in details.read_text().splitlines())
        return most - int(used.read_text()) + int(facts.get("inactive_file", 0))
    except (OSError, ValueError):
        return float("inf")
