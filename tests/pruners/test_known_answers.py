"""Masks of the published implementations at 63 %, and MULTIFLOW's statistics, on the small XVLM."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pruners
from models.xvlm import model as xvlm
from sparsity.statistics.reading import CalibrationPass
from tests.conftest import SMALL

SPARSITY = "0.63"


def masks_of(name, view, batches=None, **options):
    ((_, masks),) = pruners.build(name, **options).prune(view, batches, [SPARSITY])
    return masks


def norms_of(view, batches):
    return pruners.build("multiflow").measure(view, CalibrationPass(batches)).statistics["input_norms"]


def differing(masks, expected):
    assert set(masks) == set(expected)
    return sum(int((masks[name] != expected[name].bool()).sum()) for name in expected)


@pytest.mark.parametrize(
    ("pruner", "options", "file", "allowed"),
    [
        ("omp", {}, "omp_global", 0.0),
        ("omp", {"pool": "layer"}, "omp_local", 0.0),
        ("localmp", {}, "omp_local", 0.0),
        ("l2", {}, "l2", 0.0),
        ("lamp", {}, "lamp", 0.001),
    ],
)
def test_data_free_masks(small_xvlm, pruner, options, file, allowed):
    masks = masks_of(pruner, xvlm.prunable_view(small_xvlm), **options)
    expected = load_file(SMALL / "masks_63" / f"{file}.safetensors")
    assert differing(masks, expected) <= allowed * masks.total


@pytest.fixture
def silent_view(small_xvlm, small_batches):
    """View and calibration batches in which region captions do not count, as the published code has it."""
    view = xvlm.prunable_view(small_xvlm)
    real = view.valid_tokens

    def valid_tokens(name, batch):
        tokens = real(name, batch)
        return tokens if tokens is None or "idx_to_group_img" not in batch else torch.zeros_like(tokens)

    view.valid_tokens = valid_tokens
    return view, small_batches["general"] + small_batches["region"]


def test_multiflow_statistics(silent_view):
    view, batches = silent_view
    norms = norms_of(view, batches)
    expected = load_file(SMALL / "masks_63" / "multiflow_input_norms.safetensors")
    assert set(norms) == set(expected)
    for name, norm in norms.items():
        ours, theirs = norm / norm.sum(), expected[name].double() / expected[name].double().sum()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_multiflow_masks(silent_view):
    view, batches = silent_view
    masks = masks_of("multiflow", view, batches)
    expected = load_file(SMALL / "masks_63" / "multiflow.safetensors")
    assert differing(masks, expected) <= 2 * len(expected)  # the published code loses up to one weight per layer


def test_multiflow_counts_region_captions(small_xvlm, small_batches, silent_view):
    """The published code leaves them out: with region captions text layers see more, vision layers the same."""
    view, (_, batches) = xvlm.prunable_view(small_xvlm), silent_view
    counted, silent = norms_of(view, batches), norms_of(silent_view[0], batches)
    for name in counted:
        more = "vision" not in name and not name.endswith(xvlm.IMAGE_FED)
        assert (counted[name] > silent[name]).all() if more else torch.equal(counted[name], silent[name])


def test_multiflow_allocation_is_the_group_magnitude(small_xvlm, small_batches):
    view = xvlm.prunable_view(small_xvlm)
    masks = masks_of("multiflow", view, small_batches["general"])
    magnitude = masks_of("omp", view, pool="group")
    assert {n: int(m.sum()) for n, m in masks.items()} == {n: int(m.sum()) for n, m in magnitude.items()}


def test_sample_counts(small_xvlm, silent_view):
    from sparsity.statistics.inputs import Statistics

    recorded = json.loads(Path(SMALL / "masks_63" / "multiflow.json").read_text())["nsamples"]
    view, batches = silent_view
    with Statistics(view, "input_norms") as statistics:
        for batch in batches:
            statistics.add(batch)
    assert {n: c for n, c in statistics.samples.items() if n.startswith("vision")} == {
        n: c for n, c in recorded.items() if n.startswith("vision")
    }
