"""pretrain.py, prune.py, sample.py and oneshot_pruning_dit.py on a two-layer DiT."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import oneshot_pruning_dit
import pretrain
import prune
import sample
from configs.loading import load_config
from configs.pretraining import PRETRAIN_CONFIGS
from configs.pruning import PRUNE_CONFIGS
from datasets.bundled.generation import BundledGlyphs, Noised, labels_of, read_latents
from datasets.bundled.glyphs import load_glyphs
from datasets.collate import collate
from engine.generation.sampling import GAP, grid
from engine.launch import run
from engine.options import diffusion as generator
from models.dit import model as dit
from models.dit import sizes as dit_sizes
from sparsity.errors import UserError
from sparsity.masks import Masks
from tests.processes import error_line

pytestmark = pytest.mark.script

CONFIGS = Path("tests/data/configs")
MODEL = CONFIGS / "dit_model.yaml"
CPU = ["--accelerator", "cpu"]
QUICK = ["--num-sampling-steps", "3", "--num-samples", "4"]
LATENTS = {"channels": 4, "image_size": 8, "patch_size": 2, "classes": 5, "width": 16, "layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def glyphs():
    return load_glyphs()


@pytest.fixture
def few_glyphs(monkeypatch):
    """The judge looks at all of them, which takes most of the time of a small run."""
    monkeypatch.setattr(BundledGlyphs, "__len__", lambda self: 40)


def randomised(sizes, seed=0):
    """A model whose modulations are not zero."""
    torch.manual_seed(seed)
    model = dit.build(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the two-layer DiT."""
    path = tmp_path_factory.mktemp("dit") / "weights.safetensors"
    save_file(randomised(load_config(MODEL, dit.Config)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    """A two-layer DiT of latents: sizes, and a checkpoint of training with a moving average."""
    folder = tmp_path_factory.mktemp("latents")
    (folder / "model.yaml").write_text("".join(f"{key}: {value}\n" for key, value in LATENTS.items()))
    ema, last = (randomised(dit.Config(**LATENTS), seed).state_dict() for seed in (1, 2))
    torch.save({"ema": ema, "model": last}, folder / "0001.pt")
    return ["--model", str(folder / "model.yaml"), "--ckpt", str(folder / "0001.pt"), *CPU]


def drawn(folder, weights, *options):
    """sample.py in this process; the picture."""
    path = folder / "grid.png"
    sample.main(["--model", str(MODEL), "--ckpt", str(weights), *CPU, *QUICK, "--output", str(path), *options])
    return np.asarray(Image.open(path))


def pruned(folder, weights, pruner, *options):
    """oneshot_pruning_dit.py in this process: its row of results."""
    model = ["--model", str(MODEL), "--ckpt", str(weights), *CPU, *QUICK, "--frechet-samples", "6", "--nsamples", "12"]
    oneshot_pruning_dit.main([*model, "--pruner", pruner, "--output-dir", str(folder), *options])
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def refused(capsys, main, options):
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main(list(map(str, options))))
    assert stopped.value.code == 2
    return error_line(capsys.readouterr().err)


def test_a_picture_is_a_function_of_the_seed(tmp_path, weights, capsys):
    first = drawn(tmp_path, weights)
    assert first.shape == (2 * (16 + GAP) + GAP, 2 * (16 + GAP) + GAP, 3)
    assert "4 samples of 4 classes by ddpm in 3 steps, guidance 2, seed 0" in capsys.readouterr().out
    assert np.array_equal(first, drawn(tmp_path, weights))
    for options in (["--seed", "1"], ["--sampler", "ddim"], ["--cfg-scale", "1"], ["--class-labels", "food-fruit"]):
        assert not np.array_equal(first, drawn(tmp_path, weights, *options))


def test_latents_are_saved_and_calibrate(tmp_path, latent_model, capsys):
    options = [*latent_model, *QUICK, "--output", str(tmp_path / "grid.png"), "--class-labels", "4,0"]
    sample.main(options)
    told, path = capsys.readouterr().out, tmp_path / "grid.safetensors"
    assert f"{path} (latents: without --vae there are no images)" in told and not (tmp_path / "grid.png").exists()
    content = load_file(path)
    assert content["latents"].shape == (4, 4, 8, 8) and content["labels"].tolist() == [4, 0, 4, 0]
    sample.main([*options, "--no-ema"])
    assert not torch.equal(load_file(path)["latents"], content["latents"]), "the last weights are others"
    calibrated = ["--pruner", "wanda", *QUICK, "--nsamples", "6", "--output-dir"]
    for source in ([], ["--data-path", str(path)]):
        oneshot_pruning_dit.main([*latent_model, *calibrated, str(tmp_path / str(len(source))), *source])
    masks = [Masks.load(tmp_path / str(i) / "model_wanda_2of4_pruning_masks.safetensors") for i in (0, 2)]
    assert masks[0].digest() != masks[1].digest(), "calibrated on other samples"


def test_a_vae_makes_images_of_latents(tmp_path, latent_model, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(**stages, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    options = [*latent_model, *QUICK, "--class-labels", "4,0", "--output", str(tmp_path / "grid.png")]
    sample.main(options)
    sample.main([*options, "--vae", str(tmp_path / "vae")])
    latents = load_file(tmp_path / "grid.safetensors")["latents"]
    with torch.no_grad():
        expected = grid(vae.eval().decode(latents / 0.18215).sample)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), expected)
    capsys.readouterr()
    assert "cannot be loaded" in refused(capsys, sample.main, [*options, "--vae", tmp_path])


@pytest.mark.parametrize(
    ("pruner", "options"),
    [("magnitude", ()), ("random", ()), ("wanda", ()), ("sparsegpt", ()), ("sparsegpt", ("--enable-update",))],
)
def test_oneshot(tmp_path, few_glyphs, weights, pruner, options):
    row = pruned(tmp_path, weights, pruner, *options)
    label = pruner + "_update" * bool(options)
    assert row["pruner"] == label and row["pattern"] == "2:4" and row["sparsity %"] == "50.00"
    assert float(row["Frechet"]) > 0 and 0 <= float(row["as asked %"]) <= 100
    state = load_file(tmp_path / f"dit_model_{label}_2of4.safetensors")
    masks = Masks.load(tmp_path / f"dit_model_{label}_2of4_pruning_masks.safetensors")
    dense, view = load_file(weights), dit.prunable_view(dit.build(load_config(MODEL, dit.Config)))
    masks.check(view)
    for name in view.weights:
        assert (masks[name].unflatten(1, (-1, 4)).sum(-1) == 2).all()
        kept = dense[name] * masks[name]
        assert torch.equal(state[name], kept) != bool(options), "only an update moves what is kept"
        assert not state[name][~masks[name]].any()
    others = set(state) - set(view.weights)
    assert all(torch.equal(state[name], dense[name]) for name in others)
    assert (tmp_path / f"dit_model_{label}_2of4_samples.png").is_file()


def test_calibration_reads_what_was_asked_for_in_any_batches(tmp_path, weights):
    assert [oneshot_pruning_dit.whole_batches(*pair) for pair in ((1024, 16), (10, 16), (12, 5), (7, 4))] == [
        16,
        10,
        4,
        1,
    ]
    found = set()
    for size in ("2", "12"):
        pruned(tmp_path / size, weights, "wanda", "--batch-size", size, "--frechet-samples", "0")
        found.add(Masks.load(tmp_path / size / "dit_model_wanda_2of4_pruning_masks.safetensors").digest())
    pruned(tmp_path / "other", weights, "wanda", "--nsamples", "11", "--frechet-samples", "0")
    other = Masks.load(tmp_path / "other" / "dit_model_wanda_2of4_pruning_masks.safetensors").digest()
    assert len(found) == 1 and other not in found


def test_a_mask_draws_as_the_pruned_weights_do(tmp_path, weights):
    pruned(tmp_path, weights, "magnitude", "--N", "1", "--M", "4", "--frechet-samples", "0")
    mask, state = (tmp_path / f"dit_model_magnitude_1of4{end}.safetensors" for end in ("_pruning_masks", ""))
    masked = drawn(tmp_path, weights, "--mask", str(mask))
    assert np.array_equal(masked, drawn(tmp_path, state)) and not np.array_equal(masked, drawn(tmp_path, weights))


def test_dense(tmp_path, few_glyphs, weights):
    row = pruned(tmp_path, weights, "dense", "--save-model", str(tmp_path / "same.pt"))
    assert row["sparsity %"] == "0.00" and row["pattern"] == "-"
    state = torch.load(tmp_path / "same.pt", weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(weights).items())


@pytest.mark.parametrize("pruner", ["multiflow", "snip"])
def test_prune_py(tmp_path, monkeypatch, few_glyphs, pruner):
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])
    options = ["-m", "dit", "--config", str(CONFIGS / "dit_prune.yaml"), "--output_dir", str(tmp_path), *CPU]
    prune.main([*options, "-p", pruner, "-s", "50", "--num_batches", "2", "--evaluate"])
    report = (tmp_path / pruner / "report.md").read_text()
    assert "Frechet" in report and "transformer %" in report


def test_pretraining_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    options = ["-m", "dit", "--config", str(CONFIGS / "dit_pretrain.yaml"), *CPU]
    pretrain.main([*options, "--output_dir", str(tmp_path / "whole")])

    class StoppedError(Exception):
        pass

    forward, calls = dit.DiT.losses, []  # stopped in step 6, after the checkpoint of step 3

    def interrupted(self, batch):
        calls.append(1)
        if self.training and len(calls) > 5:
            raise StoppedError
        return forward(self, batch)

    monkeypatch.setattr(dit.DiT, "losses", interrupted)
    with pytest.raises(StoppedError):
        pretrain.main([*options, "--output_dir", str(tmp_path / "parts")])
    monkeypatch.setattr(dit.DiT, "losses", forward)
    pretrain.main([*options, "--output_dir", str(tmp_path / "parts")])
    whole, parts = (load_file(tmp_path / name / "dit.safetensors") for name in ("whole", "parts"))
    assert "pos_embed" not in whole and all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    average = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["model"]
    name = "final_layer.linear.weight"
    assert torch.equal(whole[name].float(), average[f"average.{name}"].half().float())
    assert not torch.equal(average[f"average.{name}"], average[f"model.{name}"])
    assert len(list((tmp_path / "whole").glob("samples_*.png"))) == 2


def test_what_is_read_is_listed(tmp_path, capsys):
    for config, told in ((CONFIGS / "dit_prune.yaml", "bundled images"), (tmp_path / "c.yaml", "latents.safetensors")):
        (tmp_path / "c.yaml").write_text(f"model_config: {MODEL}\nweights: random\nlatents: latents.safetensors\n")
        with pytest.raises(SystemExit) as stopped:
            prune.main(["-m", "dit", "--check_data", "--config", str(config)])
        assert told in capsys.readouterr().out and stopped.value.code == (told != "bundled images")


def test_the_configurations():
    assert load_config("configs/dit/model_base.yaml", dit.Config) == dit_sizes.published("DiT-XL/2")
    for kind, schema in (
        ("prune_base", PRUNE_CONFIGS),
        ("prune_mini", PRUNE_CONFIGS),
        ("pretrain_mini", PRETRAIN_CONFIGS),
    ):
        load_config(f"configs/dit/{kind}.yaml", schema["noise"])


def test_the_bundled_model_predicts(glyphs):
    sizes = load_config("configs/dit/model_mini.yaml", dit.Config)
    model = dit.build(sizes, "data/dit_mini.safetensors").eval()
    data = Noised(BundledGlyphs(glyphs, sizes.image_size), null_class=76, dropout=0.0, seed=0)
    with torch.no_grad():
        loss = model.losses(collate([data[n] for n in range(0, len(data), 40)]))["loss"]
    assert loss < 0.15, "a model that predicts nothing is at 1"
    assert Path("data/dit_mini.safetensors").stat().st_size < 15e6


def test_glyphs_to_be_generated(glyphs):
    data = BundledGlyphs(glyphs, 32)
    assert len(data) == 3 * len(glyphs)
    item = data[7]
    assert item["image"].shape == (3, 32, 32) and item["image"].abs().max() <= 1
    assert (item["image"][:, 0, 0] == 1).all(), "on white"
    assert data.class_names[item["label"]] == glyphs.subcategories[2]


def test_noise_is_a_function_of_seed_and_number(glyphs):
    data = [Noised(BundledGlyphs(glyphs, 16), null_class=76, dropout=0.5, seed=seed, length=2000) for seed in (0, 0, 1)]
    again, other = ([d[n] for d in data[1:]] for n in (1999, 3999))
    assert all(torch.equal(value, data[0][1999][name]) for name, value in again[0].items())
    assert not torch.equal(again[1]["noise"], again[0]["noise"]) and not torch.equal(
        other[0]["noise"], again[0]["noise"]
    )
    items = [data[0][n] for n in range(200)]
    assert 60 < sum(item["label"] == 76 for item in items) < 140
    assert {0, 9} <= {int(item["time"]) // 100 for item in items}
    assert sum(float(item["noise"].square().mean()) for item in items) / 200 == pytest.approx(1, abs=0.02)


def test_a_grid():
    images = torch.stack([torch.full((3, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    picture = grid(images)
    side = 2 + GAP
    assert picture.shape == (2 * side + GAP, 2 * side + GAP, 3)
    assert picture[GAP, GAP].tolist() == [0] * 3 and picture[GAP, GAP + side].tolist() == [128] * 3
    assert (picture[side:] == 255).all()


def test_labels():
    sizes = load_config(MODEL, dit.Config)
    assert labels_of(None, None, sizes) == [i * 76 // 64 for i in range(64)]
    assert labels_of("animal-amphibian, 3", 3, sizes) == [0, 3, 0]
    assert labels_of(None, 3, dit.Config(), usual=(207, 360)) == [207, 360, 207]
    for text, told in (("76", "numbers from 0 to 75, got '76'"), ("food-fruits", "did you mean food-fruit?")):
        with pytest.raises(ValueError, match=told):
            labels_of(text, None, sizes)


def test_files_of_latents(tmp_path):
    sizes, path = dit.Config(**LATENTS), tmp_path / "latents.safetensors"
    content = {"latents": torch.zeros(2, 4, 8, 8), "labels": torch.tensor([0, 5])}
    save_file(content, path)
    assert len(read_latents(path, sizes)) == 2
    for change, told in (
        ({"latents": torch.zeros(2, 4, 4, 4)}, r"expected \(N, 4, 8, 8\) and \(N,\), got \(2, 4, 4, 4\)"),
        ({"labels": torch.tensor([0, 6])}, "labels must be from 0 to 4"),
        ({"labels": torch.tensor([0])}, "expected"),
    ):
        save_file(content | change, path)
        with pytest.raises(ValueError, match=told):
            read_latents(path, sizes)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        read_latents(path, sizes)


def test_official_weights_are_downloaded_once(tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    (site / "DiT-XL-2-512x512.pt").write_bytes(bytes(range(256)) * 9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.options.diffusion.SITE", f"{site.as_uri()}/")
    for _ in range(2):
        path = generator.official("DiT-XL/2", 512)
        assert Path(path).read_bytes() == bytes(range(256)) * 9
        (site / "DiT-XL-2-512x512.pt").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"--ckpt: .*DiT-XL-2-256x256.pt cannot be downloaded .* give the weights of"):
        generator.official("DiT-XL/2", 256)
    assert [entry.name for entry in Path("pretrained_models").iterdir()] == ["DiT-XL-2-512x512.pt"]


def test_what_a_user_may_do_wrong(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.setattr("engine.options.diffusion.SITE", f"{tmp_path.as_uri()}/")
    usual = ["--model", MODEL, "--ckpt", weights, *CPU]
    published = ["--model", "DiT-XL/2"]
    for main, options, told in (
        (sample.main, ["--model", "DiT-M/2"], "there is no model 'DiT-M/2'; there are DiT-S/2"),
        (sample.main, ["--model", "DiT-S/8"], "--ckpt: give the weights of DiT-S/8 for 256 pixels, a file, or"),
        (sample.main, published, "cannot be downloaded"),
        (sample.main, [*published, "--ckpt", "none.pt"], "--ckpt none.pt: there is no such file"),
        (sample.main, [*usual, "--image-size", "64"], "--image-size is for the published models"),
        (sample.main, [*usual, "--vae", "x"], "--vae: tests/data/configs/dit_model.yaml draws images, no latents"),
        (sample.main, [*usual, "--num-sampling-steps", "1"], "--num-sampling-steps must be from 2 to 1000, got 1"),
        (sample.main, [*usual, "--class-labels", "76"], "--class-labels: expected numbers from 0 to 75, got '76'"),
        (sample.main, [*usual, "--mask", "none"], "--mask none: there is no such file"),
        (sample.main, [*usual, "--mask", weights], "is not a usable mask file"),
        (sample.main, ["--model", "DiT-S/8", "--ckpt", weights], "weights of another model"),
        (oneshot_pruning_dit.main, [*usual, "--N", "4"], "--N 4 --M 4: N weights are kept"),
        (oneshot_pruning_dit.main, [*usual, "--enable-update", "--pruner", "wanda"], "--enable-update is for"),
        (oneshot_pruning_dit.main, [*usual, "--calibration-mode", "dense", "--pruner", "random"], "--calibration-mode"),
        (oneshot_pruning_dit.main, [*usual, "--M", "7", "--output-dir", tmp_path], "7 divides the inputs of no layer"),
        (oneshot_pruning_dit.main, [*usual, "--data-path", "none"], "none: there is no such file of latents"),
        (oneshot_pruning_dit.main, [*usual, "--output-dir", weights], "is not a folder"),
    ):
        assert told in refused(capsys, main, options)
