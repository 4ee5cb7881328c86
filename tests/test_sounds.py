"""Models that hear, pruned on a folder of sounds."""

import logging
from pathlib import Path

import pytest
import torch
import transformers

import prune
from datasets.labelled.sound_folder import resampled
from models.external.model import build, preprocessing
from sparsity.errors import UserError
from sparsity.masks import Masks
from tests import tiny_models
from tests.sounds import stand_in, tone, write

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]
RATE = 16000


def whisper(folder: Path) -> None:
    """Save a tiny Whisper that hears one second in 40 frames."""
    torch.manual_seed(0)
    heard = transformers.WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=400, chunk_length=1)
    tiny_models.save(tiny_models.TRANSFORMERS["whisper"](), folder, heard)
    tiny_models.tokenizer().save_pretrained(folder)


def wav2vec(folder: Path) -> None:
    """Save a tiny classifier of sounds of any length."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 16}
    names = {0: "low", 1: "high"}
    config = transformers.Wav2Vec2Config(
        **sizes, num_conv_pos_embedding_groups=4, id2label=names, label2id={v: k for k, v in names.items()}
    )
    heard = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    tiny_models.save(transformers.Wav2Vec2ForSequenceClassification(config), folder, heard)


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """Prune a model on sounds, and return its report and masks."""
    stand_in(monkeypatch)
    caplog.set_level(logging.INFO)

    def pruned(*options: str) -> tuple[str, Masks]:
        given = ["-m", f"hf:{tmp_path / 'model'}", "-s", "50", "--calibration", str(tmp_path / "sounds")]
        given += ["--num_batches", "2", "--batch_size", "2", "--accelerator", "cpu", "--evaluate", "--verbose"]
        prune.main([*given, "--output_dir", str(tmp_path / "out"), *options])
        (masks,) = (tmp_path / "out").glob("*/*_pruning_masks.safetensors")
        return next((tmp_path / "out").glob("*/report.md")).read_text(), Masks.load(masks)

    return pruned


def test_whisper_is_pruned_on_what_is_said(run, tmp_path, caplog):
    whisper(tmp_path / "model")
    for i in range(5):
        write(tmp_path / "sounds" / f"{i}.wav", tone(200 * (i + 1), 8000, 4000), 8000)
    with pytest.raises(UserError, match="WhisperForConditionalGeneration writes texts, and the folder has none"):
        run("-p", "wanda")
    for i in range(5):
        (tmp_path / "sounds" / f"{i}.txt").write_text("a photo of the cat\n")
    report, masks = run("-p", "wanda")
    assert "5 sounds (0.wav, 1.wav, 2.wav" in report and "5 sounds (0.wav, 1.wav, 2.wav" in caplog.text
    assert "audio" in report and "text" in report and "perplexity" in report
    assert all(mask.float().mean() == 0.5 for mask in masks.values())


def test_a_classifier_of_sounds_has_its_loss_from_folders(run, tmp_path):
    wav2vec(tmp_path / "model")
    for name, frequency in (("low", 200), ("high", 3000)):
        for i in range(3):
            write(tmp_path / "sounds" / name / f"{i}.wav", tone(frequency, RATE, 800 + 100 * i), RATE)
    report, masks = run("-p", "snip")
    assert "6 sounds" in report and "of 2 classes" in report and "audio" in report
    counts = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    assert counts[0] == counts[1] - round(counts[1] / 2)


def test_other_rates_change_little(tmp_path, monkeypatch):
    """The same sound at two rates gives nearly the same features."""
    stand_in(monkeypatch)
    whisper(tmp_path / "model")
    preprocess = preprocessing(build(f"hf:{tmp_path / 'model'}"))
    same = preprocess([tone(440, RATE, 8000)], ["a cat"], None)
    other = preprocess([resampled(tone(440, 8000, 4000), 8000, RATE)], ["a cat"], None)
    assert preprocess.rate == RATE and same["input_features"].shape == (1, 8, 40)
    assert float((same["input_features"] - other["input_features"]).abs().max()) < 0.05
