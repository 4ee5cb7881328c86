"""oneshot_pruning_timm.py and timm_validate.py: the commands of the seed at small sizes, what they write, bad input."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import oneshot_pruning_timm
import pack
import timm_validate
from datasets.calibration.image_batches import Samples
from datasets.place import Place
from models.dino import timm_mini as registered  # noqa: F401 (makes vit_mini known to timm)
from sparsity.masks import Masks
from tests.test_scripts import refused, script

CPU = ["--accelerator", "cpu"]
KEYS = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]


pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An ImageFolder of 76 classes, with images in six of them: 24 to train on, 12 to validate."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, images in (("train", 4), ("val", 2)):
        for label in range(76):
            folder = root / part / f"n{label:04}"
            folder.mkdir(parents=True)
            for i in range(images if label < 6 else 0):
                pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    return root


def prune(photos, *options, model="vit_mini"):
    given = ["--model", model, "--data-path", str(photos), "--nsamples", "16", "--batch-size", "8", *CPU]
    oneshot_pruning_timm.main([*given, *options])


def validate(capsys, photos, *options, model="vit_mini"):
    capsys.readouterr()
    timm_validate.main(["--model", model, "--data-path", str(photos), "--batch-size", "8", *CPU, *options])
    return json.loads(capsys.readouterr().out)


def linear(state):
    return {n: t for n, t in state.items() if t.ndim == 2 and n.endswith("weight") and not n.startswith("head")}


@pytest.mark.parametrize(
    ("pruner", "suffix"),
    [("magnitude", ".pth.tar"), ("random", ".pth"), ("wanda", ".safetensors"), ("sparsegpt", ".pt")],
)
def test_what_is_saved_loads_in_timm_with_its_zeros(photos, tmp_path, capsys, pruner, suffix):
    path = tmp_path / "deep" / f"vit_mini.{pruner}24{suffix}"
    prune(photos, "--pruner", pruner, "--save-model", str(path))
    printed = capsys.readouterr().out
    assert "top-1" in printed and "1,769,472 of 3,538,944 prunable weights are zero (50.00 %)" in printed
    state = timm.create_model("vit_mini", checkpoint_path=str(path)).state_dict()
    dense = timm.create_model("vit_mini", pretrained=True).state_dict()
    masks = Masks.load(path.with_name(f"vit_mini.{pruner}24_pruning_masks.safetensors"))
    assert set(masks) == set(linear(state))
    for name, weight in state.items():
        if name in masks:
            assert (weight.unflatten(1, (-1, 4)).count_nonzero(-1) == 2).all()
            assert torch.equal(weight, dense[name] * masks[name]), "without update the others stay as they are"
        else:
            assert torch.equal(weight, dense[name])
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        [path.name, f"vit_mini.{pruner}24_pruning_masks.safetensors"]
    )


def test_the_update_and_other_patterns(photos, tmp_path, capsys):
    path = tmp_path / "updated.pt"
    prune(photos, "--pruner", "sparsegpt", "--enable-update", "--N", "1", "--M", "4", "--save-model", str(path))
    assert "sparsegpt 1:4" in capsys.readouterr().out
    state, dense = torch.load(path, weights_only=True), timm.create_model("vit_mini", pretrained=True).state_dict()
    for name, weight in linear(state).items():
        assert (weight.unflatten(1, (-1, 4)).count_nonzero(-1) == 1).all()
        assert not torch.equal(weight, dense[name] * (weight != 0))
    told = validate(capsys, photos, "--checkpoint", str(path), "--sparsity-mode", "sparse")
    assert list(told) == KEYS
    assert told["param_count"] == 3.66 and told["img_size"] == 72 and told["interpolation"] == "bicubic"
    assert told["top1"] + told["top1_err"] == pytest.approx(100)


def test_validation_images_never_reach_the_calibration(photos, tmp_path):
    (alone := tmp_path / "images").mkdir()
    (alone / "train").symlink_to(photos / "train")
    for i, root in enumerate((photos, alone)):
        prune(root, "--pruner", "wanda", "--save-model", str(tmp_path / f"{i}.pt"))
    one, other = (Masks.load(tmp_path / f"{i}_pruning_masks.safetensors") for i in range(2))
    assert one.digest() == other.digest()


def test_validation_of_the_dense_model_and_of_masks(photos, tmp_path, capsys, caplog):
    dense = validate(capsys, photos, "--pretrained")
    assert list(dense) == KEYS and dense["model"] == "vit_mini"
    prune(photos, "--pruner", "magnitude", "--save-model", str(tmp_path / "m.pt"))
    prune(photos, "--pruner", "dense", "--save-model", str(tmp_path / "d.pt"))
    assert validate(capsys, photos, "--checkpoint", str(tmp_path / "d.pt")) == dense
    sparse = validate(capsys, photos, "--checkpoint", str(tmp_path / "m.pt"), "--sparsity-mode", "sparse")
    mask = ["--mask", str(tmp_path / "m_pruning_masks.safetensors")]
    with caplog.at_level("INFO"):
        assert validate(capsys, photos, "--pretrained", *mask) == sparse
    assert "50.00 % of 3,538,944 prunable weights are zero" in caplog.text
    assert "32 of 32 layers are sparse; pattern: 2:4, 4:8" in caplog.text
    validate(capsys, photos, "--checkpoint", str(tmp_path / "d.pt"), "--sparsity-mode", "sparse")
    assert "next to no zeros" in caplog.text


@pytest.mark.parametrize("options", [("magnitude",), ("wanda",), ("sparsegpt", "--enable-update")], ids=" ".join)
def test_any_other_sparsity(photos, tmp_path, capsys, options):
    prune(photos, "--pruner", *options, "--sparsity", "60", "--save-model", str(tmp_path / "m.pt"))
    masks = Masks.load(tmp_path / "m_pruning_masks.safetensors")
    assert masks.provenance["sparsity"] == "0.6" and f"{options[0]} 60 %" in capsys.readouterr().out
    for name, mask in masks.items():
        each = mask.shape[1] if options[0] == "wanda" else mask.numel()
        gone = mask.numel() // each * (6 * each // 10)
        slack = 4 if options[0] == "sparsegpt" else 0  # its blocks of 128 columns are rounded one by one
        assert gone - slack <= int((~mask).sum()) <= gone, name


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_validation_of_packed_weights(photos, tmp_path, capsys, suffix):
    pruned, packed, plain = (tmp_path / name for name in (f"w{suffix}", "packed.safetensors", "plain.safetensors"))
    prune(photos, "--pruner", "wanda", "--save-model", str(pruned))
    pack.main([str(pruned), str(packed)])
    pack.main([str(packed), str(plain), "--unpack"])
    assert packed.stat().st_size < 0.56 * plain.stat().st_size
    state, again = (timm.models.load_state_dict(str(path)) for path in (pruned, plain))
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)
    sparse = ["--sparsity-mode", "sparse", "--checkpoint"]
    assert validate(capsys, photos, *sparse, str(packed)) == validate(capsys, photos, *sparse, str(pruned))
    pack.main([str(packed), str(tmp_path / "half.safetensors"), "--dtype", "float16"])
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * plain.stat().st_size / 2


def test_bad_input_to_packing(tmp_path, capsys):
    here = tmp_path / "a.safetensors"
    here.write_bytes(b"no weights")
    for given, told in (
        ([tmp_path / "b.pt", here], "b.pt: there is no such file"),
        ([here, tmp_path / "b.pt"], "b.pt: the file to write must be a .safetensors file"),
        ([here, here], "a.safetensors: is the checkpoint itself"),
        ([here, tmp_path / "b.safetensors"], "a.safetensors: not a readable weights file"),
    ):
        assert told in refused(capsys, pack.main, list(map(str, given)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    save_file({"w.values": torch.ones(2)}, here, metadata={"packed": '{"w": {"shape": [4, 4], "pattern": null}}'})
    told = refused(capsys, pack.main, [str(here), str(tmp_path / "b.safetensors")])
    assert "a.safetensors: the packed weight 'w' is damaged" in told


def test_pruning_without_a_look_at_the_accuracy(photos, capsys):
    prune(photos, "--pruner", "magnitude", "--skip-eval")
    told = capsys.readouterr().out
    assert "(50.00 %)" in told and "top-1" not in told


@pytest.mark.multiprocess
def test_two_processes_prune_as_one_does(photos, tmp_path):
    """Each adds up the Hessians of its half of the samples."""
    given = ["--model", "test_vit", "--img-size", "32", "--num-classes", "76", "--data-path", str(photos), *CPU]
    given += ["--ckpt", str(tmp_path / "tiny.pt"), "--nsamples", "16", "--batch-size", "4"]
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=76, img_size=32).state_dict(), tmp_path / "tiny.pt")
    given += ["--pruner", "sparsegpt", "--enable-update", "--skip-eval", "--save-model"]
    oneshot_pruning_timm.main([*given, str(tmp_path / "one.pt")])
    script("oneshot_pruning_timm.py", *given, str(tmp_path / "two.pt"), "--devices", "2")
    one, two = (linear(torch.load(tmp_path / f"{ranks}.pt", weights_only=True)) for ranks in ("one", "two"))
    for name, weight in one.items():
        assert ((weight != 0) == (two[name] != 0)).double().mean() > 0.999, "sums of other order"
        torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=1e-3 * float(weight.abs().max()))


def test_validation_of_learned_masks(photos, tmp_path, capsys):
    """As timm's training writes checkpoints, with gates of two layers: candidate 2 keeps 0 and 3, 0 keeps 0 and 1."""
    state = timm.create_model("vit_mini", pretrained=True).state_dict()
    gates = {"blocks.0.mlp.fc1": 2, "blocks.1.attn.proj": 0}
    expected = dict(state)
    for layer, best in gates.items():
        weight = state[f"{layer}.weight"]
        gate = torch.randn(weight.numel() // 4, 6, generator=torch.Generator().manual_seed(0))
        gate[:, best] = 10
        kept = torch.tensor([True, False, False, True] if best == 2 else [True, True, False, False])
        state = state | {f"{layer}.gate": gate}
        expected[f"{layer}.weight"] = weight * kept.repeat(weight.shape[1] // 4)
    arguments = argparse.Namespace(model="vit_mini", lr=1e-3)
    torch.save({"epoch": 3, "arch": "vit_mini", "state_dict": state, "args": arguments}, tmp_path / "best.pth.tar")
    torch.save(expected, tmp_path / "folded.pt")
    learned = ["--checkpoint", str(tmp_path / "best.pth.tar"), "--sparsity-mode"]
    told = validate(capsys, photos, *learned, "maskllm")
    plain = validate(capsys, photos, "--checkpoint", str(tmp_path / "folded.pt"), "--sparsity-mode", "sparse")
    gates = 6 * (768 * 192 + 192 * 192) // 4
    assert told.pop("param_count") == round((3_661_900 + gates) / 1e6, 2)
    plain.pop("param_count")
    assert told == plain
    with pytest.raises(ValueError, match="give --sparsity-mode maskllm"):
        validate(capsys, photos, *learned, "dense")


def test_a_tiny_timm_model_whose_layers_do_not_all_divide(photos, tmp_path, capsys, caplog):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=76)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    given = ["--ckpt", str(tmp_path / "w.pth"), "--num-classes", "76", "--pruner", "sparsegpt"]
    prune(photos, *given, "--N", "64", "--M", "192", model="test_vit")
    assert "layers stay dense, as 192 does not divide their inputs" in caplog.text
    with pytest.raises(ValueError, match="7 divides the inputs of no layer, which are 64"):
        prune(photos, *given, "--M", "7", model="test_vit")
    with pytest.raises(ValueError, match="has 76 classes, and the model 1000: give --num-classes 76"):
        prune(photos, "--ckpt", str(tmp_path / "w.pth"), model="test_vit")
    torch.save(timm.create_model("test_vit2", num_classes=76).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: weights of another model"):
        prune(photos, "--ckpt", str(tmp_path / "other.pth"), "--num-classes", "76", model="test_vit")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--N", "4", "--M", "4"], "--N 4 --M 4: N weights are kept of every M, so N must be below M"),
        (["--sparsity", "50", "--N", "1"], "--sparsity is for zeros anywhere, --N and --M"),
        (["--sparsity", "50,60"], "--sparsity 50,60: give one"),
        (["--sparsity", "120"], "120"),
        (["--nsamples", "25", "--pruner", "wanda"], "--nsamples 25: there are only 24 images to calibrate on"),
        (["--enable-update", "--pruner", "wanda"], "--enable-update is for sparsegpt"),
        (["--model", "vit_minni"], "did you mean vit_mini?"),
        (["--model", "vit_base_patch16_224"], "give --ckpt FILE, a checkpoint of this model"),
        (["--num-classes", "5"], "the data has 76 classes and the model 5"),
        (["--data-path", "absent"], "absent"),
        (["--ckpt", "absent.pt"], "--ckpt absent.pt: there is no such file"),
        (["--save-model", "model.onnx"], "its name must end with .pth.tar"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_to_pruning(photos, options, told):
    with pytest.raises((ValueError, OSError), match=told):
        prune(photos, *options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give --checkpoint FILE, or --pretrained"),
        (["--pretrained", "--sparsity-mode", "sparse"], "needs --checkpoint"),
        (["--checkpoint", "absent.pt"], "--checkpoint absent.pt: there is no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_to_validation(photos, capsys, options, told):
    with pytest.raises((ValueError, OSError), match=told):
        validate(capsys, photos, *options)


def test_samples_do_not_depend_on_the_batch_size_or_the_ranks(tmp_path):
    data = [{"image": torch.full((3, 2, 2), float(i)), "label": i} for i in range(20)]

    def seen(size, **place):
        samples = Samples(data, 10, size, tmp_path, seed=1, **place)
        first, again = ([image[:, 0, 0, 0].tolist() for image, _ in samples] for _ in range(2))
        assert first == again and len(first) == len(samples) == len(samples.numbers)
        return [value for batch in first for value in batch]

    whole = seen(3)
    assert len(set(whole)) == 10 and seen(7) == seen(1) == whole
    assert sorted(seen(3, place=Place(0, 2)) + seen(3, place=Place(1, 2))) == sorted(whole)
