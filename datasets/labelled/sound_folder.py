"""A folder of sounds, with what is said in them where that is known, for models that hear."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from datasets.collate import Skipped
from datasets.labelled.image_folder import ItemFolder
from sparsity.errors import MissingFileError, UserError

SOUNDS = (".wav", ".flac", ".ogg")


class SoundFolder(ItemFolder):
    """Sounds of a folder, see `ItemFolder`: float32 (samples,), of one channel (the mean of those that there are), at
    `rate` samples a second; those that have another rate are resampled.

    Raises MissingFileError where the folder is missing, UserError where the package that reads sounds is.
    """

    kind, extensions = "sound", SOUNDS

    def __init__(self, root: str | Path, *, seed: int, rate: int):
        if importlib.util.find_spec("soundfile") is None:
            raise UserError(f"{root}: sounds are read by a package that is not installed: pip install soundfile")
        if not Path(root).is_dir():
            raise MissingFileError(f"{root}: folder of sounds not found")
        self.rate = rate
        super().__init__(root, Path(root), seed=seed)
        self.told += f", at {rate} samples a second"

    def read(self, path: str) -> Any:
        import soundfile

        try:
            samples, rate = soundfile.read(self.folder / path, dtype="float32", always_2d=True)  # (samples, channels)
        except (OSError, RuntimeError) as error:  # LibsndfileError is a RuntimeError
            return Skipped(path, str(error))
        if not len(samples):
            return Skipped(path, "there is no sound in it")
        return resampled(samples.mean(axis=1), rate, self.rate)


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return the samples (n,) of a sound at another rate, (n * wanted / rate,), from its Fourier series: exact for what
    is periodic and has no frequency at or above half of the lower rate; what is above that is left out.
    """
    if rate == wanted:
        return samples
    count = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples)
    kept = (min(len(samples), count) - 1) // 2 + 1  # frequencies below half of the lower rate
    return (np.fft.irfft(spectrum[:kept], count) * (count / len(samples))).astype(np.float32)
