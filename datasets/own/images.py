"""The images of a user's own data: in a folder, or in WebDataset shards, which are never unpacked."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image
from webdataset.tariterators import base_plus_ext

from configs.decoding import Decoding
from datasets.annotations import check_text
from datasets.collate import Skipped
from datasets.images import decode_image
from datasets.own.records import Fault
from datasets.pairs.tars import IMAGES, caption_of, check_shard
from sparsity.errors import UserError

_PLACE = re.compile(r"(.+)#(\d+)\+(\d+) (.+)", re.DOTALL)


class Source(Protocol):
    """Gives the image of a record, as the record names it, or why it cannot be read."""

    def load(self, image: str) -> Image.Image | Skipped: ...


class Packed(NamedTuple):
    """A sample of a shard. image: `SHARD#OFFSET+BYTES KEY.jpg`, which `ShardImages` finds again."""

    image: str
    caption: str


class ShardImages:
    """Images in shards, each read from its place in the file."""

    def __init__(self, decoding: Decoding):
        self.decoding = decoding

    @staticmethod
    def name(image: str) -> str:
        """Return `SHARD/KEY.jpg`."""
        shard, _, _, key = _place(image)
        return f"{shard}/{key}"

    def load(self, image: str) -> Image.Image | Skipped:
        """Return the image as RGB, or why it cannot be read."""
        shard, offset, size, key = _place(image)
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            return Skipped(f"{shard}/{key}", str(error))
        return decode_image(io.BytesIO(content), f"{shard}/{key}", self.decoding)


def _place(image: str) -> tuple[str, int, int, str]:
    """Return shard, first byte, bytes and key of a packed image."""
    found = _PLACE.fullmatch(image)
    assert found, f"{image} was made by `packed`"
    return found[1], int(found[2]), int(found[3]), found[4]


def packed(shard: Path) -> Iterator[Packed | Fault]:
    """Yield the samples of a shard, without their pixels; UserError where the file as a whole is damaged."""
    check_shard(shard)
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, members in _samples(tar):
                yield _packed(shard, tar, key, members)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shard}: damaged tar file ({error}); get it again") from None


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield the key of each sample and its files by what their names end with: neighbours of one name."""
    last, members = "", {}
    for member in tar:
        key, kind = base_plus_ext(member.name) if member.isreg() else (None, None)
        if key is None:
            continue
        if key != last and members:
            yield last, members
            members = {}
        last, members[kind.lower()] = key, member
    if members:
        yield last, members


def _packed(shard: Path, tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> Packed | Fault:
    kind = next((kind for kind in IMAGES if kind in members), None)
    if kind is None:
        return Fault(f"{shard}: {key}", f"no image (.{', .'.join(IMAGES)}) for this key")
    texts = {name: tar.extractfile(members[name]).read() for name in ("txt", "json") if name in members}
    try:
        caption = check_text(caption_of(texts), "caption").strip()
    except UserError as error:
        return Fault(f"{shard}: {key}", str(error))
    place = members[kind]
    return Packed(f"{shard}#{place.offset_data}+{place.size} {key}.{kind}", caption)
