"""--recipe of scripts, end to end: what a recipe says is done, and what was done can be done again."""

import pytest
import torch
import transformers
import yaml

import prune
import retrieval
from engine.recipes.own import NAME
from sparsity.masks import Masks
from tests import tiny_models
from tests.test_finetuning import log_rows, options, trunk  # noqa: F401

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(**tiny_models.TEXT, num_key_value_heads=2)
    tiny_models.save(transformers.LlamaForCausalLM(config), folder / "llama", tiny_models.tokenizer())
    (folder / "texts.txt").write_text("".join(f"a photo : red cat w{i % 80}\n" for i in range(100)))
    return ["-m", f"hf:{folder / 'llama'}", "--calibration", str(folder / "texts.txt"), "--accelerator", "cpu"]


def masks_of(folder):
    (path,) = folder.glob("*_pruning_masks.safetensors")
    return Masks.load(path)


LLM_COMPRESSOR = """\
SparseGPTModifier:
  sparsity: 0.5
  targets: ["re:.*self_attn.*", "re:.*mlp.*weight"]
  ignore: ["re:.*down_proj", "lm_head"]
  dampening_frac: 0.02
"""


def test_a_recipe_of_llm_compressor_is_the_command_line(tmp_path, language_model):
    (tmp_path / "r.yaml").write_text(LLM_COMPRESSOR)
    quick = [*language_model, "--num_batches", "2", "--batch_size", "4"]
    prune.main([*quick, "--recipe", str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path / "read")])
    typed = ["-p", "sparsegpt", "--enable_update", "-s", "50", "--damp", "0.02", "--exclude", "*.down_proj"]
    prune.main([*quick, *typed, "--output_dir", str(tmp_path / "typed")])
    read, same = masks_of(tmp_path / "read" / "sparsegpt"), masks_of(tmp_path / "typed" / "sparsegpt")
    assert len(read) == 2 * 6 and not any("down_proj" in name for name in read)
    assert read.digest() == same.digest()

    prune.main(["--recipe", str(tmp_path / "read" / "sparsegpt" / NAME), "--output_dir", str(tmp_path / "again")])
    again = tmp_path / "again" / "sparsegpt"
    assert masks_of(again).digest() == read.digest()
    recipes = [yaml.safe_load((folder / NAME).read_text())["prune"] for folder in (again, tmp_path / "read/sparsegpt")]
    assert recipes[0] | {"output_dir": ""} == recipes[1] | {"output_dir": ""}


SPARSEML = """\
training_modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 2}
pruning_modifiers:
  - !MagnitudePruningModifier
    {params: __ALL_PRUNABLE__, init_sparsity: 0, final_sparsity: 0.6, start_epoch: 0, end_epoch: 1, update_frequency: 1}
"""


def test_a_gradual_recipe_of_sparseml_is_the_command_line(tmp_path, trunk):  # noqa: F811
    (tmp_path / "r.yaml").write_text(SPARSEML)
    retrieval.main(options(tmp_path / "read", trunk, "--recipe", str(tmp_path / "r.yaml"), dense=True))
    typed = [
        "--gradual",
        "60",
        "--gradual_score",
        "localmp",
        "--prune_from",
        "0",
        "--prune_until",
        "0.5",
        "--epochs",
        "2",
    ]
    retrieval.main(options(tmp_path / "typed", trunk, *typed, dense=True))
    assert log_rows(tmp_path / "read") == log_rows(tmp_path / "typed")
    read, same = (Masks.load(tmp_path / folder / "result" / "mask.safetensors") for folder in ("read", "typed"))
    assert read.digest() == same.digest()

    again = ["--recipe", str(tmp_path / "read" / "result" / NAME), "--output_dir", str(tmp_path / "again")]
    retrieval.main(again)
    assert log_rows(tmp_path / "again") == log_rows(tmp_path / "read")
