"""compare.py on models that are not the project's own."""

import csv

import pytest
import torch
import transformers

import compare
import prune
from tests import tiny_models
from tests.tiny_models import tokenizer

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A language model, and texts."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny_models.TEXT, num_key_value_heads=2)
    tiny_models.save(transformers.LlamaForCausalLM(config), folder / "llama", tokenizer())
    (folder / "a.txt").write_text("\n".join(f"a photo : red cat w{i % 70}" for i in range(60)))
    return folder


def options(data, folder, *more):
    texts = ["--calibration", str(data / "a.txt"), "--max_tokens", "12", "--batch_size", "4", "--num_batches", "3"]
    return [
        "-m",
        f"hf:{data / 'llama'}",
        "-s",
        "50",
        "--accelerator",
        "cpu",
        "--output_dir",
        str(folder),
        *texts,
        *more,
    ]


def test_fidelity_and_perplexity_stand_in_the_table(data, tmp_path, caplog):
    given = options(data, tmp_path, "-p", "omp,wanda", "--seeds", "1,2")
    compare.main(given)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["pruner"], row["seed"]) for row in rows] == [
        ("dense", "-"),
        ("omp", "-"),
        ("wanda", "1"),
        ("wanda", "2"),
    ]
    assert float(rows[0]["cos %"]) == pytest.approx(100, abs=1e-3) and float(rows[0]["KL mnat"]) == pytest.approx(
        0, abs=1e-3
    )
    assert all(0 < float(row["cos %"]) < 100 and float(row["KL mnat"]) > 0 for row in rows[1:])
    table = (tmp_path / "table.md").read_text()
    assert "perplexity" in table and "a.txt that are not calibrated on" in table
    compare.main(given)
    assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 4, "what is done is not done again"


def test_the_numbers_are_those_of_prune(data, tmp_path):
    compare.main(options(data, tmp_path / "ours", "-p", "wanda", "--seeds", "3"))
    row = list(csv.DictReader((tmp_path / "ours/results.csv").open()))[-1]
    prune.main(options(data, tmp_path / "theirs", "-p", "wanda", "--seed", "3", "--evaluate"))
    lines = (tmp_path / "theirs/wanda/report.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| sparsity"))
    line = next(line for line in lines if line.startswith("| 50 "))
    told = dict(zip(*([cell.strip() for cell in text.strip("| ").split("|")] for text in (head, line)), strict=True))
    for measure in ("cos %", "pooled %", "agree %", "KL mnat", "perplexity"):
        assert float(row[measure]) == pytest.approx(float(told[measure]), abs=0.051)
