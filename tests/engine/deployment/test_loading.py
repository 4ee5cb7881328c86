"""Masks with the weights and biases that were updated with them, as prune.py leaves them beside each other."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pruners
from engine.deployment.loading import masks_of, zeros_of
from sparsity.errors import UserError
from sparsity.masks import Masks
from tests.toys import Attention, layers, view_of


def data() -> list[torch.Tensor]:
    return [torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_updated_weights_and_biases_lie_beside_the_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    view = view_of(Attention().eval())
    masks = pruners.prune(view, "wanda", sparsity=0.4, reconstruct="lsq", correct_bias=True, data=data())
    masks.save(tmp_path / "m_pruning_masks.safetensors")
    with pytest.raises(UserError, match="m_weights.safetensors: the mask was found with updated weights"):
        masks_of(view, tmp_path / "m_pruning_masks.safetensors")
    own = {**{name: masks.weights[name].contiguous() for name in masks.weights}, **masks.biases}
    save_file(own, tmp_path / "m_weights.safetensors")
    masks_of(view, tmp_path / "m_pruning_masks.safetensors").apply(view)
    assert masks.biases and all(torch.equal(view.parameters[key], bias) for key, bias in masks.biases.items())
    for name, weight in view.weights.items():
        assert torch.equal(weight.parameter, masks.weights[name] * masks[name])
    assert zeros_of(view).digest() == Masks(dict(masks), {}, view.aliases).digest()


def test_files_of_another_model_are_named(tmp_path: Path) -> None:
    pruners.prune(view_of(layers((4, 6))), "omp", sparsity=0.4).save(tmp_path / "m.safetensors")
    view = view_of(layers((4, 5)))
    with pytest.raises(UserError, match="--mask .*m.safetensors: the masks do not fit"):
        masks_of(view, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="the weights have no zeros"):
        zeros_of(view)
