"""Sounds in tests, and a stand-in for the optional package that reads them, where it is not installed."""

import sys
import wave
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

INSTALLED = find_spec("soundfile") is not None


def tone(frequency: float, rate: int, count: int) -> np.ndarray:
    """Return a sine of so many samples, float32."""
    return (0.4 * np.sin(2 * np.pi * frequency * np.arange(count) / rate)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write a sound (samples,) or (samples, channels) with 16 bits a sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if INSTALLED and path.suffix == ".flac":
        import soundfile

        soundfile.write(path, samples, rate)
        return
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())


def _read(path: Path, dtype: str, always_2d: bool) -> tuple[np.ndarray, int]:
    try:
        with wave.open(str(path), "rb") as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
            return (samples / 32767).astype(dtype), file.getframerate()
    except (wave.Error, EOFError) as error:
        raise RuntimeError(str(error)) from error


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module that reads the sounds of `write` in the place of soundfile, unless that is installed."""
    if not INSTALLED:
        module = ModuleType("soundfile")
        module.__spec__ = ModuleSpec("soundfile", None)
        module.read = _read  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "soundfile", module)
