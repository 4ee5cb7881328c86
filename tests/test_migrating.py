"""docs/migrating.md: the right-hand side of every line is run, in order, in a folder of its own for each tool."""

import re
import shlex
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune as torch_prune

import image_classification
import pack
import prune
import pruners
from models.external import prunable_view
from models.external.torch_prune import from_torch, to_torch
from sparsity import Masks, PrunableView
from sparsity.kernels.accelerate import accelerate
from sparsity.run.generic import generic_view
from tests import tiny_models

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migrating.md"
ROOT = PAGE.parent.parent
SCRIPTS = {"prune.py": prune.main, "pack.py": pack.main, "image_classification.py": image_classification.main}
QUICK = {  # what makes them small, by script, and for the bundled DINO
    "prune.py": ["--accelerator", "cpu", "--num_batches", "2"],
    "image_classification.py": ["--accelerator", "cpu", "--precision", "32-true"],
    "prune.py dino": ["--config", str(ROOT / "tests/data/configs/dino_prune.yaml")],
    "image_classification.py dino": ["--config", str(ROOT / "tests/data/configs/dino_image_classification.yaml")],
}


def sections() -> dict[str, list[str]]:
    """Title -> the codes of the second column of its tables of three columns; each row has one."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)]
        rows = [row for table in tables if table[0].count("|") == 4 for row in table[2:]]
        found[title] = [re.fullmatch(r"\|.*\| `([^`]*)` \|[^|]*\|", row)[1] for row in rows]
    return {title: codes for title, codes in found.items() if codes}


SECTIONS = sections()


def recipes() -> dict[str, str]:
    """Name of a file -> its content, of each block of YAML that begins with one."""
    return {text.split()[1]: text for text in re.findall(r"```yaml\n(# .*?)```", PAGE.read_text(), flags=re.DOTALL)}


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def names() -> dict:
    """Return the names that the lines of Python may use, as the page introduces them."""
    model = small()
    known = {"pruners": pruners, "prunable_view": prunable_view, "from_torch": from_torch, "to_torch": to_torch}
    known |= {"Masks": Masks, "PrunableView": PrunableView, "accelerate": accelerate, "torch": torch}
    return known | {"model": model, "view": generic_view(model), "batches": [torch.randn(32, 8)]}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A folder with a language model and a file of texts, from which commands are run."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny_models.TEXT, num_key_value_heads=2)
    folder = tmp_path_factory.mktemp("tool")
    tiny_models.save(transformers.LlamaForCausalLM(config), folder / "MODEL", tiny_models.tokenizer())
    (folder / "texts.txt").write_text("".join(f"a photo : red cat w{i % 80}\n" for i in range(400)))
    return folder


def times() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*.safetensors")}


def command(text: str) -> None:
    """Run a command line in this process, and check the files, and the masks, that it writes."""
    python, script, *arguments = shlex.split(text)
    assert python == "python"
    before = times()
    small = [f"{script} dino"] if "dino" in arguments else []
    SCRIPTS[script]([*arguments, *(option for name in (script, *small) for option in QUICK.get(name, []))])
    written = [path for path, time in times().items() if before.get(path) != time]
    assert written
    masks = [Masks.load(path) for path in written if re.search(r"^mask|_pruning_masks", path.name)]
    assert masks or script == "pack.py"
    for each in masks:
        check(each, prune.parse(arguments).pattern if script == "prune.py" else None)


def check(masks: Masks, pattern: str | None) -> None:
    lost = 1 - masks.kept / masks.total
    if pattern == "2:4":
        assert all((mask.unflatten(1, (-1, 4)).sum(2) == 2).all() for mask in masks.values())
    else:
        asked = float(Fraction(str(masks.provenance["sparsity"])))
        rounding = sum(mask.shape[0] for mask in masks.values()) / masks.total  # at most one weight in each row
        assert asked - rounding <= lost <= asked


@pytest.mark.script
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("tool", SECTIONS)
def test_every_line_runs(tool, language_model, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])
    for name in ("MODEL", "texts.txt"):
        (tmp_path / name).symlink_to(language_model / name)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for name, text in recipes().items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    known = names()
    for code in SECTIONS[tool]:
        try:
            if code.startswith("python "):
                command(code)
            else:
                known["masks"] = known.get("masks")
                exec(code, known)
                assert known["masks"] is None or isinstance(known["masks"], Masks)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{tool}: {code}") from error


def test_the_page_has_the_tools():
    assert list(SECTIONS) == [
        "torchao.sparsity", "torch.ao.pruning", "torch.nn.utils.prune", "NNCF", "NVIDIA Model Optimizer",
        "llm-compressor", "SparseML", "Recipes",
    ]  # fmt: skip


# Where the other tool is installed with torch, both sides of a line are run, on counts that need no rounding.


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"sparsity_level": 0.5, "sparse_block_shape": (1, 1), "zeros_per_block": 1}, {"sparsity": 0.5}),
        ({"sparsity_level": 1.0, "sparse_block_shape": (1, 4), "zeros_per_block": 2}, {"pattern": "2:4"}),
        (
            {"sparsity_level": 0.5, "sparse_block_shape": (1, 4), "zeros_per_block": 4, "norm": 1},
            {"sparsity": 0.5, "pattern": "block1x4"},
        ),
    ],
)
def test_masks_are_those_of_torch_ao_pruning(theirs, ours):
    model, same = small(), small()
    sparsifier = WeightNormSparsifier(**theirs)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    pruners.prune(same, "magnitude", **ours).apply(generic_view(same))
    assert same.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(same.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_masks_are_those_of_torch_nn_utils_prune():
    model, same = small(), small()
    layers = [model[0], model[2]]
    for layer in layers:
        torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    local = pruners.prune(same, "magnitude", sparsity=0.5)
    assert all(torch.equal(from_torch(model)[name], mask) for name, mask in local.items())

    model = small()
    parameters = [(model[0], "weight"), (model[2], "weight")]
    torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=0.5)
    overall = pruners.prune(same, "omp", sparsity=0.5)
    assert all(torch.equal(from_torch(model)[name], mask) for name, mask in overall.items())
