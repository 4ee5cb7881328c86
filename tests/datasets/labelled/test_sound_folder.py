"""Folders of sounds: what is in them, their rate, and what cannot be read."""

import math

import numpy as np
import pytest

from datasets.collate import Skipped
from datasets.labelled import sound_folder
from datasets.labelled.sound_folder import SoundFolder, resampled
from sparsity.errors import MissingFileError, UserError
from tests.sounds import stand_in, tone, write


@pytest.fixture
def soundfile(monkeypatch):
    stand_in(monkeypatch)


def test_sounds_in_the_order_of_their_paths_with_what_is_said(tmp_path, soundfile):
    for name in ("b.wav", "a.flac", "low/c.wav", "._a.wav"):
        write(tmp_path / name, tone(440, 8000, 800), 8000)
        (tmp_path / name).with_suffix(".txt").write_text(f"said in {name}\n")
    data = SoundFolder(tmp_path, seed=0, rate=8000)
    assert data.paths == ["a.flac", "b.wav", "low/c.wav"] and data.captioned and not data.classes
    assert "3 sounds (a.flac, b.wav, low/c.wav), with captions, at 8000 samples a second" in data.told
    assert data[1]["caption"] == "said in b.wav" and data[4]["caption"] == "said in b.wav"
    assert data[0]["sound"].dtype == np.float32 and np.abs(data[0]["sound"] - tone(440, 8000, 800)).max() < 1e-4


def test_channels_are_averaged_and_rates_fitted(tmp_path, soundfile):
    both = np.stack([tone(440, 16000, 1600), tone(1000, 16000, 1600)], axis=1)
    write(tmp_path / "a.wav", both, 16000)
    heard = SoundFolder(tmp_path, seed=0, rate=8000)[0]["sound"]
    expected = (tone(440, 8000, 800) + tone(1000, 8000, 800)) / 2
    assert heard.shape == (800,) and np.abs(heard - expected).max() < 1e-3


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (16000, 8000), (44100, 16000), (8000, 8000)])
def test_tones_below_half_of_the_lower_rate_are_exact_and_others_gone(rate, wanted):
    count = rate // 10  # whole periods of both tones
    low, high = tone(300, rate, count), tone(rate // 2 - 500, rate, count)
    found = resampled(low + (high if rate > 2 * wanted else 0), rate, wanted)
    assert found.shape == (wanted // 10,) and np.abs(found - tone(300, wanted, wanted // 10)).max() < 1e-5
    power = math.sqrt(float((found**2).mean()))
    assert power == pytest.approx(math.sqrt(float((low**2).mean())), rel=1e-5)


def test_what_cannot_be_read_is_skipped_or_named(tmp_path, soundfile, monkeypatch):
    with pytest.raises(MissingFileError, match="none: folder of sounds not found"):
        SoundFolder(tmp_path / "none", seed=0, rate=8000)
    with pytest.raises(UserError, match=r"no sound in this folder; expected .wav, .flac, .ogg"):
        SoundFolder(tmp_path, seed=0, rate=8000)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    write(tmp_path / "empty.wav", np.zeros(0, np.float32), 8000)
    data = SoundFolder(tmp_path, seed=0, rate=8000)
    assert [type(data[i]) for i in range(2)] == [Skipped, Skipped]
    assert data[0].path == "bad.wav" and "no sound" in data[1].reason
    monkeypatch.setattr(sound_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install soundfile"):
        SoundFolder(tmp_path, seed=0, rate=8000)
