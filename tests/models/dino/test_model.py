"""DINO against the published names and against transformers' own ViT."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.export import save_weights
from models.checkpoint import find_weights, load_weights
from models.dino import model as dino
from models.parts.pretraining import FineLabels
from sparsity.masks import Masks

CHECKPOINTS = Path("tests/data/checkpoints")
KEYS = json.loads((CHECKPOINTS / "DINO_ViTForImageClassification.json").read_text())
PRUNABLE = json.loads((CHECKPOINTS / "prunable_dino.json").read_text())
MASK_KEYS = json.loads((CHECKPOINTS / "mask_file_keys_dino.json").read_text())
SIZES = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "mlp_width": 40, "classes": 3}


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return dino.ViTForImageClassification(dino.Config())


@pytest.fixture
def small():
    torch.manual_seed(0)
    return dino.build(dino.Config(**SIZES)).eval()


@pytest.fixture(scope="module")
def vit():
    return pytest.importorskip("transformers.models.vit.modeling_vit")


def theirs(kind, **changes):
    """A random ViT of transformers of the sizes of `small`."""
    from transformers import ViTConfig

    torch.manual_seed(1)
    names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    names |= {"mlp_width": "intermediate_size", "classes": "num_labels"}
    return kind(ViTConfig(**{names.get(name, name): value for name, value in (SIZES | changes).items()})).eval()


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))


def test_full_size_keys_and_shapes_are_the_published_ones(full_size):
    state = full_size.state_dict()
    assert {name: list(t.shape) for name, t in state.items()} == KEYS
    assert list(state) == list(KEYS)


def test_full_size_prunable_weights_order_and_groups(full_size):
    view = dino.prunable_view(full_size)
    assert list(view.weights) == list(PRUNABLE["weights"])
    for name, weight in view.weights.items():
        expected = PRUNABLE["weights"][name]
        assert (weight.group, list(weight.shape)) == (expected["group"], expected["shape"])
    assert view.numel == PRUNABLE["total"] == 84_934_656
    assert view.dense == ("classifier.weight",)


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_a_full_size_file_fits_the_full_size_model(full_size, tmp_path, prefix):
    """On the meta device, where copying costs nothing; a sparse file of zeros takes no room on the disk. Without the
    prefix, as in `facebook/dino-vitb16`, there is no classifier.
    """
    header, offset = {}, 0
    names = [name for name in KEYS if prefix or name.startswith("vit.")]
    for name in names:
        end = offset + 4 * torch.Size(KEYS[name]).numel()
        place = {"dtype": "F32", "shape": KEYS[name], "data_offsets": [offset, end]}
        header[name if prefix else name.removeprefix("vit.")], offset = place, end
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    options = {"positions": dino.POSITIONS, "ignored": dino.HARMLESS, "optional": dino.OPTIONAL}
    lacking = load_weights(full_size, find_weights(tmp_path), rename=dino.published_name, **options)
    assert lacking == ([] if prefix else ["classifier.weight", "classifier.bias"])


def test_public_mask_files_load(small, tmp_path):
    view = dino.prunable_view(small)
    generator = torch.Generator().manual_seed(3)
    public = {}
    for key in MASK_KEYS:
        name = key.removesuffix("_pruning_mask")
        if name in small.state_dict():
            shape = small.state_dict()[name].shape
            pruned = name in view.weights  # the classifier and the biases have masks of ones
            public[key] = torch.rand(shape, generator=generator) < 0.5 if pruned else torch.ones(shape)
    assert {key.removesuffix("_pruning_mask") for key in public} >= set(view.weights)
    torch.save(public, tmp_path / "masks.pth")
    masks = Masks.load(tmp_path / "masks.pth")
    masks.check(view)
    for name in view.weights:
        assert torch.equal(masks[name], public[f"{name}_pruning_mask"])


def test_every_name_of_the_public_mask_files_is_a_weight(full_size):
    view, names = dino.prunable_view(full_size), {key.removesuffix("_pruning_mask") for key in MASK_KEYS}
    assert {name for name in names if name.endswith("weight")} == {*view.weights, *view.dense}
    assert names <= set(full_size.state_dict())


def test_it_computes_what_transformers_does(vit, tmp_path):
    model = theirs(vit.ViTForImageClassification)
    model.save_pretrained(tmp_path)
    ours = dino.build(dino.Config(**SIZES), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.classify(images()), model(images()).logits)
        hidden = model.vit(images()).last_hidden_state
        torch.testing.assert_close(ours.vit(images()), hidden)


def test_what_is_saved_loads_in_transformers(vit, small, tmp_path):
    view = dino.prunable_view(small)
    Masks({name: torch.rand(weight.shape) < 0.5 for name, weight in view.weights.items()}).apply(view)
    theirs(vit.ViTForImageClassification).save_pretrained(tmp_path)
    save_weights(small, tmp_path / "model.safetensors")
    model, told = vit.ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()).logits, small.classify(images()))


def test_a_checkpoint_without_classifier_gets_a_random_one(vit, tmp_path, caplog):
    model = theirs(vit.ViTModel)  # with a pooler, without the prefix "vit."
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        ours = dino.build(dino.Config(**SIZES), tmp_path).eval()
    assert "has no classifier" in caplog.text and ours.classifier.weight.std() > 0
    with torch.no_grad():
        torch.testing.assert_close(ours.vit(images()), model(images()).last_hidden_state)


def test_a_classifier_that_is_there_is_loaded_without_a_warning(small, tmp_path, caplog):
    torch.save({"model": small.state_dict()}, tmp_path / "vit.pth")
    torch.manual_seed(9)
    with caplog.at_level(logging.WARNING):
        again = dino.build(dino.Config(**SIZES), tmp_path / "vit.pth")
    assert not caplog.text
    for name, tensor in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_another_number_of_classes_is_refused(small, tmp_path):
    save_file(small.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"classifier.weight \(3, 16\) \(expected \(5, 16\)\)"):
        dino.build(dino.Config(**SIZES | {"classes": 5}), tmp_path / "vit.safetensors")


def test_a_missing_layer_is_refused(small, tmp_path):
    state = small.state_dict()
    del state["vit.encoder.layer.1.output.dense.weight"]
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="1 missing: vit.encoder.layer.1.output.dense.weight"):
        dino.build(dino.Config(**SIZES), tmp_path / "vit.safetensors")


def test_positions_are_interpolated_as_transformers_does(vit, tmp_path):
    model = theirs(vit.ViTForImageClassification)
    model.save_pretrained(tmp_path)
    larger = dino.build(dino.Config(**SIZES | {"image_size": 48}), tmp_path).eval()
    with torch.no_grad():
        expected = model(images(48), interpolate_pos_encoding=True).logits
        torch.testing.assert_close(larger.classify(images(48)), expected)


def test_a_folder_without_weights_and_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in this folder"):
        find_weights(tmp_path)
    assert find_weights("nowhere/vit.pth") == Path("nowhere/vit.pth")  # not looked for on the hub


def test_a_repository_is_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr("models.checkpoint.hub_answers", lambda: False)
    with pytest.raises(OSError, match="nobody/nothing-vit: is neither a folder nor in the cache"):
        find_weights("nobody/nothing-vit")


def test_the_loss_is_the_cross_entropy(small):
    view, batch = dino.prunable_view(small), {"image": images(), "label": torch.tensor([2, 0])}
    with torch.no_grad():
        expected = -small.classify(images()).log_softmax(1)[[0, 1], [2, 0]].mean()
        torch.testing.assert_close(view.loss(batch), expected)
        torch.testing.assert_close(view.forward(batch), small.classify(images()))


def test_the_blocks_run_one_after_the_other(small):
    view, x = dino.prunable_view(small), small.vit.embeddings(images())
    for block in view.blocks:
        x = block(x)
    torch.testing.assert_close(small.vit.layernorm(x), small.vit(images()))
    inside = {id(p) for block in view.blocks for p in block.parameters()}
    assert all(id(weight.parameter) in inside for weight in view.weights.values())


@pytest.mark.parametrize("change", [{"heads": 3}, {"patch_size": 5}, {"classes": 1}])
def test_sizes_that_cannot_be(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dino.Config(**SIZES | change)


def test_fine_labels_add_their_loss_and_leave_no_trace(small):
    torch.manual_seed(4)
    names = list(small.state_dict())
    around = FineLabels(small, 7, 0.1)
    batch = {"image": images(), "label": torch.tensor([2, 0]), "fine_label": torch.tensor([6, 1])}
    losses = around(**batch)

    def smoothed(logits, labels):
        return -(0.9 * logits.log_softmax(1)[[0, 1], labels] + 0.1 * logits.log_softmax(1).mean(1)).mean()

    features = small.vit(images())[:, 0]
    torch.testing.assert_close(losses["coarse"], smoothed(small.classifier(features), [2, 0]))
    torch.testing.assert_close(losses["fine"], smoothed(around.head(features), [6, 1]))
    torch.testing.assert_close(losses["loss"], losses["coarse"] + losses["fine"])
    losses["loss"].backward()
    assert all(p.grad is not None for p in around.parameters()), "DDP waits for each of them"
    assert list(small.state_dict()) == names


def test_the_bundled_weights_are_those_of_the_mini_configuration():
    from configs.loading import load_config

    sizes = load_config("configs/dino/model_mini.yaml", dino.Config)
    state = load_file("data/vit_mini.safetensors")
    model = dino.ViTForImageClassification(sizes)
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in model.state_dict().items()}
    assert 3_000_000 < sum(t.numel() for t in state.values()) < 4_000_000
