"""A user's own images with captions and questions, as tests write them."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def pictures(folder: Path, count: int = 6) -> list[str]:
    """Write so many images of one colour each; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        Image.new("RGB", (40 + i, 32), COLOURS[i % len(COLOURS)]).save(folder / name)
    return names


def captions_of(number: int) -> list[str]:
    """Return two captions of an image."""
    colour = COLOURS[number % len(COLOURS)]
    return [f"a photo of {colour} w{number}", f"the image w{number} {colour}"]


def captioned(folder: Path, count: int = 6) -> Path:
    """Write images and their captions.json; returns its path."""
    names = pictures(folder, count)
    content = [{"image": name, "caption": captions_of(i)} for i, name in enumerate(names)]
    (folder / "captions.json").write_text(json.dumps(content))
    return folder / "captions.json"


def questioned(folder: Path, count: int = 6) -> Path:
    """Write images and questions.json about them, some with several answers; returns its path."""
    names, content = pictures(folder, count), []
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        content.append({"image": name, "question": "which colour ?", "answers": [colour, colour, "dog"]})
        content.append({"image": name, "question": "the photo ?", "answers": f"w{i}"})
    (folder / "questions.json").write_text(json.dumps(content))
    return folder / "questions.json"


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """Write a tar file with `KEY.KIND` of each sample, as img2dataset does."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for kind, content in files.items():
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def png(colour: str = "red") -> bytes:
    """Return the bytes of a small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()
