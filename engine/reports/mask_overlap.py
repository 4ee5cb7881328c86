"""How far mask files agree, computed on their packed bits: no mask is unpacked, and one layer of each is in memory."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from safetensors import safe_open

from sparsity.errors import MissingFileError, UserError
from sparsity.mask_file import BadFileError, begin_digest, check_digest, named, opened

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # set bits of a byte


def description(path: str | os.PathLike) -> dict[str, Any]:
    """Return what stands beside the masks in a file that `Masks.save` wrote: shapes, digest, provenance. UserError
    where it is none.
    """
    if not os.path.isfile(path):
        raise MissingFileError(f"there is no mask file {str(path)!r}")
    with named(path), opened(path, "np") as (_, found):
        if found is None:
            raise BadFileError("it has no description")
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
        for name, _ in shapes[0]:
            packed = [file.get_tensor(name).reshape(-1) for file in files]
            for one, sha in zip(packed, digests, strict=True):
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
