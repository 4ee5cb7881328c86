"""Which configuration a task script takes, and what it makes of the command line."""

from pathlib import Path

import pytest

import retrieval
from configs.finetuning import RetrievalConfig
from engine.options.finetuning import prepare


def prepared(folder, *given):
    arguments = ["--model", "xvlm", "--dense", "--output_dir", str(folder), *given]
    args = retrieval.parse(arguments)
    return args, prepare(args, "retrieval", RetrievalConfig, arguments)


def test_the_bundled_model_where_the_full_size_one_is_not_here(tmp_path, caplog):
    with caplog.at_level("INFO", "configs"):
        args, config = prepared(tmp_path)
    assert args.config == Path("configs/xvlm/retrieval_mini.yaml") and config.bundled
    assert "using the bundled xvlm-mini" in caplog.text


def test_the_full_size_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrained/4m-xvlm-vit-bert.pth: weights file not found"):
        prepared(tmp_path, "--variant", "base")
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="data/finetune/itr/coco_train.json: annotation file not found"):
        prepared(tmp_path, "-pre", str(tmp_path / "w.pth"))  # weights of one's own are the full-size model's


def test_the_command_line_is_kept(tmp_path):
    args, config = prepared(tmp_path, "--variant", "mini", "-pre", "random", "--max_skipped", "0.5")
    told = "python retrieval.py --model xvlm --dense --output_dir"
    assert args.command == f"{told} {tmp_path} --variant mini -pre random --max_skipped 0.5"
    assert (config.weights, config.checkpoint, config.max_skipped) == ("random", None, 0.5)
    assert args.snapshot == tmp_path / "last.pt" and args.mask is None
