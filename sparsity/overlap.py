"""How far mask files agree, computed on their packed bits: no mask is unpacked, and one layer of each is in memory."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from safetensors import safe_open

from sparsity.errors import MissingFileError, UserError
from sparsity.mask_file import (
    METADATA,
    BadFileError,
    begin_digest,
    check_digest,
    check_tensors,
    named,
    packed_size,
    read_description,
)

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # set bits of a byte


def description(path: str | os.PathLike) -> dict[str, Any]:
    """What stands beside the masks in a file that `Masks.save` wrote: shapes, digest, provenance. UserError where it
    is none.
    """
    if not os.path.isfile(path):
        raise MissingFileError(f"there is no mask file {str(path)!r}")
    with named(path):
        try:
            with safe_open(path, framework="np") as file:
                text, tensors = (file.metadata() or {}).get(METADATA), list(file.keys())
        except Exception as error:  # safetensors raises several kinds
            raise BadFileError("it is truncated or damaged, or no safetensors file") from error
        if text is None:
            raise BadFileError("it has no description")
        found = read_description(text)
        check_tensors(found, tensors)
        return found


def overlap(paths: Sequence[str | os.PathLike]) -> tuple[np.ndarray, np.ndarray]:
    """Intersection over union of the kept weights and of the pruned weights, (n, n) each, for every two of n files.

    Two masks that keep nothing, or prune nothing, overlap wholly there. Raises UserError unless all the files have
    masks of the same names and shapes, which match their digests.
    """
    common = np.zeros((len(paths), len(paths)), dtype=np.int64)  # weights that both keep
    descriptions = [description(path) for path in paths]
    shapes = [one["shapes"] for one in descriptions]
    if any(other != shapes[0] for other in shapes):
        raise UserError(f"masks of different models do not overlap: {', '.join(map(str, paths))}")
    total = sum(int(np.prod(shape)) for _, shape in shapes[0])
    digests = [begin_digest(own) for own in shapes]
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="np")) for path in paths]
        for name, shape in shapes[0]:
            packed = [file.get_tensor(name) for file in files]
            for path, one, sha in zip(paths, packed, digests, strict=True):
                with named(path):
                    if one.dtype != np.uint8 or one.size != packed_size(shape):
                        raise BadFileError(f"the mask of {name!r} has more or fewer bits than its shape says")
                sha.update(one)
            for i, one in enumerate(packed):
                for j, other in enumerate(packed[: i + 1]):
                    common[i, j] += int(_BITS[one & other].sum(dtype=np.int64))
    for path, sha, own in zip(paths, digests, descriptions, strict=True):
        with named(path):
            check_digest(sha, own)
    common = np.maximum(common, common.T)
    kept = common.diagonal()
    either = kept[:, None] + kept - common
    return _share(common, either), _share(total - either, total - common)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)
