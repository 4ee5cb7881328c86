"""The peak of memory between two points of a run."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """The most bytes since this was made or `reset`: on a CUDA device those that tensors took, else the resident size
    of the process, which, where the system cannot reset it, is that of the whole run so far.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")  # Linux: the peak becomes the size of now

    def read(self) -> int:
        """Return the peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            lines = (_PROCESS / "status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
