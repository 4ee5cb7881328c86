"""Where weights lie, how large they are, and the pictures of it."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.reports.plots import plot_heat, plot_magnitudes, plot_overlap, plot_sparsity
from engine.reports.weight_places import BINS, EXPONENTS, magnitudes, place
from tests.toys import layers, view_of

LAYERS = {"63": {"v.0.q": 60.0, "v.1.q": 70.0, "t.q": 100.0}, "2:4": {"v.0.q": 50.0, "v.1.q": 50.0, "t.q": 0.0}}
GROUPS = {"63": {"v": 65.0, "t": 50.0}, "2:4": {"v": 50.0, "t": 0.0}}
GROUP_OF = {"v.0.q": "v", "v.1.q": "v", "t.q": "t"}
COUNTS = {
    "dense": {"v": torch.arange(BINS), "t": torch.ones(BINS)},
    "63": {"v": torch.zeros(BINS), "t": torch.ones(BINS)},
}


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("vision.layers.3.self_attn.q_proj.weight", "vision.layers.3", "self_attn.q_proj"),
        ("a.layer.11.crossattention.output.dense.weight", "a.layer.11", "crossattention.output.dense"),
        ("layers.0.blocks.1.mlp.fc1.weight", "layers.0", "blocks.1.mlp.fc1"),
        ("0.weight", "", "0"),
        ("0.fc.weight", "0", "fc"),
        ("fc1.weight", "", "fc1"),
        ("h.2x.fc.weight", "", "h.2x.fc"),
    ],
)
def test_block_and_kind_of_a_weight(name, block, kind):
    assert place(name) == (block, kind)


def test_magnitudes_are_counted_by_group():
    view = view_of(layers((40, 30), (20, 10)))
    view.weights["a.weight"].parameter.data[0] = 0
    view.weights["b.weight"].parameter.data[0, 0] = 1e9  # beyond the last bin
    counts = magnitudes(view)
    edges = np.logspace(*EXPONENTS, BINS + 1)
    expected = np.histogram(view.weights["a.weight"].matrix().abs().numpy(), edges)[0]
    assert counts["a"].sum() == 39 * 30 and counts["b"].sum() == 200
    assert np.abs(np.cumsum(counts["a"].numpy()) - np.cumsum(expected)).max() <= 1  # a weight on an edge
    assert counts["b"][-1] == 1
    masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in view.weights.items()}
    left = magnitudes(view, masks)
    assert left["a"].sum() == masks["a.weight"][1:].sum() and (left["a"] <= counts["a"]).all()


def test_large_layers_are_sampled_evenly():
    view = view_of(layers((1024, 512)))
    counts = magnitudes(view)["a"]
    exact = torch.histc(view.weights["a.weight"].matrix().abs().log10(), BINS, *EXPONENTS)
    assert counts.sum() == pytest.approx(1024 * 512, rel=1e-6)
    assert (counts.cumsum(0) - exact.cumsum(0)).abs().max() < 0.01 * 1024 * 512
    half = {"a.weight": (torch.arange(512) % 4 < 2).expand(1024, 512)}  # 2:4
    assert magnitudes(view, half)["a"].sum() == pytest.approx(1024 * 512 / 2, rel=0.01)


@pytest.mark.parametrize(
    ("draw", "arguments"),
    [
        (plot_sparsity, (LAYERS, GROUPS, GROUP_OF)),
        (plot_heat, (LAYERS, GROUP_OF)),
        (plot_heat, ({"63": {"fc.weight": 63.0}}, {"fc.weight": "all"})),
        (plot_magnitudes, (COUNTS,)),
        (plot_magnitudes, ({"dense": {"v": torch.zeros(BINS)}, "63": {"v": torch.zeros(BINS)}},)),
        (plot_overlap, ({"63": (["omp", "lamp"], np.eye(2), np.eye(2), 0.37)},)),
    ],
)
# Of what is drawn, not of the garbage that other tests left, which may be collected meanwhile.
@pytest.mark.filterwarnings(
    "error::UserWarning", "error::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_plot_is_a_picture(tmp_path, draw, arguments):
    draw(tmp_path / "p.png", *arguments, "title")
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and image.width > 300 and len(image.getcolors(1 << 20)) > 2
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
