"""Each script that fine-tunes x each kind of model x each way of sparse training, on two-layer models: killed and
resumed to the same bits, and the same on two processes as on one. Some cells stand for all; `make test-all` has each.
"""

import importlib
from pathlib import Path

import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file

from engine.training.fit import Run
from models.external import model as external
from sparsity.masks import Masks
from tests import tiny_models
from tests.models.external.test_preprocessing import processor_of
from tests.models.foreign import test_writing
from tests.own_data import COLOURS, captioned, questioned
from tests.processes import held, on_two_ranks, only_bars
from tests.test_finetuning import log_rows
from tests.test_scripts import CONFIGS

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]

WAYS = {
    "gradual": ["--gradual", "75", "--prune_every", "1"],
    "distill": ["--gradual", "50", "--distill", "0.5"],  # else nothing would be pruned
    "lora": ["--gradual", "50", "--lora", "2"],
}
OWN = {"xvlm": "", "blip": "blip_", "dino": "dino_"}  # models of this project -> what their configurations begin with
WRITERS = ("hf_blip", "blip2", "llava", "paligemma")
KINDS = {
    "retrieval": ("xvlm", "blip", "clip", "siglip"),
    "captioning": ("xvlm", "blip", *WRITERS),
    "captioning_pretrain": ("xvlm",),
    "vqa": ("xvlm", "blip", *WRITERS),
    "image_classification": ("dino", "timm", "hf_vit"),
}
CELLS = [(script, kind, way) for script, kinds in KINDS.items() for kind in kinds for way in WAYS]
KILLED = [  # the cells that `make test` has
    ("retrieval", "siglip", "gradual"),
    ("captioning", "llava", "distill"),
    ("vqa", "hf_blip", "lora"),
    ("image_classification", "hf_vit", "gradual"),
]
SHARED = [
    ("retrieval", "clip", "lora"),
    ("captioning", "blip2", "gradual"),
    ("captioning", "paligemma", "distill"),
    ("captioning_pretrain", "xvlm", "gradual"),
    ("vqa", "xvlm", "distill"),
    ("vqa", "hf_blip", "gradual"),
    ("image_classification", "timm", "lora"),
]


class Killed(BaseException):
    pass


def cells(chosen):
    slow = pytest.mark.slow
    return [pytest.param(*cell, id="-".join(cell), marks=() if cell in chosen else slow) for cell in CELLS]


def own_settings(script, kind, folder):
    """Return the options of a model of this project as the tests configure it: nothing is dropped at random, and each
    step is saved.
    """
    config = yaml.safe_load((CONFIGS / f"{OWN[kind]}{script}.yaml").read_text())
    sizes = yaml.safe_load(Path(config["model_config"]).read_text())
    if "text" in sizes:
        sizes["text"]["dropout"] = 0.0
    if kind == "blip":
        sizes["vision"]["drop_path"] = 0.0
    (folder / "model.yaml").write_text(yaml.safe_dump(sizes))
    config |= {"model_config": str(folder / "model.yaml"), "save_every": 1, "log_every": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--model", kind, "-pre", "random", "--config", str(folder / "config.yaml"), "--debug"]


def without_dropout(model):
    for config in (model.config, *(getattr(model.config, f"{part}_config", None) for part in ("text", "qformer"))):
        for name in ("dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            if config is not None and name in config.to_dict():
                setattr(config, name, 0.0)
    return type(model)(model.config)


def of_transformers(script, kind, folder):
    """A model of transformers with random weights in a folder, as from the hub."""
    torch.manual_seed(0)
    if kind == "hf_vit":
        config = transformers.ViTConfig(**tiny_models.VISION, id2label=dict(enumerate(COLOURS[:3])))
        model, processor = transformers.ViTForImageClassification(config), tiny_models.image_processor()
    elif kind == "hf_blip" and script == "vqa":
        test_writing.blip_for_questions(folder)
        return f"hf:{folder}"
    elif kind == "hf_blip":
        test_writing.folder_of("blip", folder)
        return f"hf:{folder}"
    elif kind in ("clip", "siglip"):
        tokenizer = tiny_models.tokenizer()
        if kind == "siglip":  # it reads its last token, of texts that are all as long: as published
            tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids"]
        processor = transformers.CLIPProcessor(tiny_models.image_processor(), tokenizer)
        model = tiny_models.TRANSFORMERS[kind]()
    else:
        model = without_dropout(tiny_models.TRANSFORMERS[kind]())
        processor = processor_of(kind, chat=kind == "llava")
    return f"hf:{tiny_models.save(model, folder, processor)}"


def class_folders(folder):
    for part, count in {"train": 6, "val": 1}.items():
        for colour in COLOURS[:3]:
            (folder / part / colour).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 32), colour).save(folder / part / colour / f"{i}.png")
    return folder


def settings(script, kind, folder):
    """Return the arguments that all runs of a script with a kind of model share: model, data and recipe."""
    folder.mkdir(parents=True)
    if kind in OWN:
        given = own_settings(script, kind, folder)
    else:
        if kind == "timm":
            sizes = ",".join(f"{name}={value}" for name, value in tiny_models.VIT.items() if name != "num_classes")
            given = ["--model", "timm:vit_tiny_patch16_224", "--weights", "random", "--model_kwargs", sizes]
        else:
            given = ["--model", of_transformers(script, kind, folder / "model")]
        if script == "image_classification":
            given += ["--dataset", str(class_folders(folder / "own"))]
        else:
            write = questioned if script == "vqa" else captioned
            given += ["--data", str(write(folder / "own", 8)), "--val_fraction", "0"]
        config = yaml.safe_load(Path("configs/external", f"{script}.yaml").read_text()) | {"save_every": 1}
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"log_every": 1}))
        given += ["--config", str(folder / "config.yaml"), "--workers", "0", "--debug"]
    recipe = ["--epochs", "1", "--batch_size", "4", "--lr", "0.01", "--skip_eval", "--dense"]
    return [*given, *recipe, "--accelerator", "cpu", "--precision", "32-true"]


def options(script, kind, way, folder):
    """Return the arguments of a run. A classifier of timm gives logits alone, which its new head cannot teach: one that
    was trained before does.
    """
    given = [*settings(script, kind, folder), *WAYS[way]]
    if kind == "timm" and way == "distill":
        dense = given[: -len(WAYS[way])]
        given += ["--teacher", str(trained(script, dense, folder / "teacher") / "model.safetensors")]
    return given


def trained(script, given, out):
    importlib.import_module(script).main([*given, "--output_dir", str(out)])
    return out / "result"


def check_zeros(result, kind):
    """Weights that its mask prunes are zero in the result, as its library loads it."""
    if kind in OWN:
        weights = load_file(result / "model.safetensors")
    elif kind == "timm":
        weights = timm.create_model(f"local-dir:{result}", pretrained=True).state_dict()
    else:
        weights = external.build(f"hf:{result}").state_dict()
    masks = Masks.load(result / "mask.safetensors")
    assert masks and all(not weights[name][~kept].any() for name, kept in masks.items())


@pytest.mark.parametrize(("script", "kind", "way"), cells(KILLED))
def test_killed_and_resumed_it_ends_with_the_same_bits(script, kind, way, tmp_path, monkeypatch):
    given = options(script, kind, way, tmp_path / "given")
    whole = trained(script, given, tmp_path / "whole")
    check_zeros(whole, kind)
    save, saved = Run.save, []

    def save_and_die(self, *args, **more):
        save(self, *args, **more)
        saved.append(args[0])
        if len(saved) in (2, 3):
            raise Killed

    monkeypatch.setattr(Run, "save", save_and_die)
    for _ in range(2):
        with pytest.raises(Killed):
            trained(script, given, tmp_path / "cut")
    result = trained(script, given, tmp_path / "cut")
    assert saved == [1, 2, 3, 4]
    for name in ("model.safetensors", "mask.safetensors"):
        assert (result / name).read_bytes() == (whole / name).read_bytes()
    assert log_rows(tmp_path / "cut") == log_rows(tmp_path / "whole")


HELD = """
import importlib
from engine.training.fit import Run
save, saved = Run.save, []
def save_and_stay(self, *args, **more):
    save(self, *args, **more)
    saved.append(args)
    if len(saved) == 2:
        hold()
Run.save = save_and_stay
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("script", "kind"),
    [("captioning", "llava"), pytest.param("vqa", "hf_blip", marks=pytest.mark.slow)],
)
def test_a_process_that_is_killed_leaves_what_the_next_goes_on_from(script, kind, tmp_path):
    """kill -9 in the middle of a run that prunes, is taught and has adapters."""
    ways = ["--gradual", "75", "--prune_every", "1", "--distill", "0.5", "--lora", "2"]
    given = [*settings(script, kind, tmp_path / "given"), *ways]
    out = tmp_path / "cut"
    with held(HELD, script, *given, "--output_dir", out, log=tmp_path / "said") as process:
        process.kill()
        assert process.wait() == -9
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2
    result, whole = trained(script, given, out), trained(script, given, tmp_path / "whole")
    for name in ("model.safetensors", "mask.safetensors"):
        assert (result / name).read_bytes() == (whole / name).read_bytes()


def shared(script, kind, way, folder):
    """The options of a run on one process, and of the same on two. Two batches of a step are read in turn by one
    process, and side by side by two; contrasted pairs are always those of a whole step.
    """
    given = [*options(script, kind, way, folder / "given"), "--optimizer", "sgd", "--weight_decay", "0"]
    if script == "retrieval" and kind in OWN:  # whose loss draws negatives, other ones on each rank
        given += ["--distill", "1"]
    half = ["--batch_size_train", "2"]
    return [*given, *([] if script == "retrieval" and kind not in OWN else half)], [*given, *half]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "chosen",
    [
        SHARED,
        pytest.param([cell for cell in CELLS if cell not in SHARED], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_two_processes_train_as_one(chosen, tmp_path):
    """The same samples in each step: the same weights, but for the order of sums."""
    folders = {cell: tmp_path / "-".join(cell) for cell in chosen}
    given = {cell: shared(*cell, folder) for cell, folder in folders.items()}
    runs = [(cell[0], [*given[cell][1], "--output_dir", str(folders[cell] / "two")]) for cell in chosen]
    assert only_bars(on_two_ranks(runs))
    for cell, folder in folders.items():
        one, two = trained(cell[0], given[cell][0], folder / "one"), folder / "two/result"
        check_zeros(two, cell[1])
        weights = [load_file(result / "model.safetensors") for result in (one, two)]
        torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6, msg=lambda told, cell=cell: f"{cell}: {told}")
        rows = [[float(v) for _, name, v in log_rows(path.parent)[1:] if name == "loss"] for path in (one, two)]
        assert rows[1] == pytest.approx(rows[0], rel=1e-4), cell
        assert len(set(rows[0])) > 1, cell
