"""The peak of memory between two points."""

import sys

import pytest
import torch

from engine.pruning.peak_memory import PeakMemory

SIZE = 256 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_a_peak_is_seen_after_it_is_over_and_forgotten_by_reset():
    peak = PeakMemory(torch.device("cpu"))
    before = peak.read()
    torch.ones(SIZE // 4)  # freed at once
    assert peak.read() - before > 0.9 * SIZE
    peak.reset()
    if peak.read() - before > 0.5 * SIZE:
        pytest.skip("this system does not let a process reset its peak")
    torch.ones(SIZE // 4)
    assert peak.read() - before > 0.9 * SIZE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_the_device_count():
    peak = PeakMemory(torch.device("cuda", 0))
    before = peak.read()
    torch.ones(SIZE // 4, device="cuda")
    assert peak.read() - before >= SIZE
