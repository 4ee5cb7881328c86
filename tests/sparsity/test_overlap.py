import numpy as np
import pytest
import torch

from sparsity.masks import Masks
from sparsity.overlap import description, overlap


def naive(a, b):
    both, either = int((a & b).sum()), int((a | b).sum())
    return both / either if either else 1.0


def test_overlap_is_intersection_over_union(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (7, 5), "b.weight": (3, 11), "c.weight": (1, 1)}  # bits that pad the last byte
    kept = [{n: torch.rand(s, generator=generator) < p for n, s in shapes.items()} for p in (0.2, 0.5, 0.9, 0.0, 1.1)]
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(kept))]
    for path, masks in zip(paths, kept, strict=True):
        Masks(masks, {"pruner": "p"}).save(path)
    ours = overlap(paths)
    flat = [torch.cat([mask.flatten() for mask in masks.values()]) for masks in kept]
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            assert ours[0][i, j] == pytest.approx(naive(a, b)) and ours[1][i, j] == pytest.approx(naive(~a, ~b))
    assert np.all(ours[0].diagonal() == 1) and np.all(ours[1].diagonal() == 1)
    assert description(paths[0])["provenance"] == {"pruner": "p"}


def test_a_flipped_bit_is_noticed(tmp_path):
    Masks({"x.weight": torch.ones(3, 5, dtype=torch.bool)}).save(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "y").write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(ValueError, match="y' is not a usable mask file: its masks do not match the digest"):
        overlap([tmp_path / "x", tmp_path / "y"])


def test_masks_of_different_models_do_not_overlap(tmp_path):
    for name, shape in (("a", (2, 3)), ("b", (3, 2))):
        Masks({"x.weight": torch.ones(shape, dtype=torch.bool)}).save(tmp_path / name)
    with pytest.raises(ValueError, match="different models"):
        overlap([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("content", [b"", b"junk" * 9])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="not a usable mask file"):
        description(tmp_path / "x")
