"""Linear layers that store and multiply only what is not zero, on the CPU in float32: torch's CSR and BSR matrices."""

import warnings

import torch
from torch import Tensor, nn

from sparsity.pattern import Block
from sparsity.solvers.threads import side_by_side

# Inputs that are multiplied together, tokens x in, by single weights and by blocks: they stay in the processor's cache
# while a sparse matrix is gone through. All of a batch of eight images at once take two to three times as long. Threads
# take such pieces in turns: a second one that shares out the matrix' rows instead gains 1.5, not 2.
_OF_WEIGHTS, _OF_BLOCKS = 9 << 12, 3 << 16
_TOKENS = 32  # at least


class SparseLinear(nn.Module):
    """A linear layer without its zeros, for inference. weight: (out, in). block: square; whole blocks of weights, of
    which any is not zero, are stored; None: single weights.
    """

    column: Tensor | None  # the bias, (out, 1)

    def __init__(self, weight: Tensor, bias: Tensor | None, block: Block | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR|Sparse BSR")  # that the layouts are in beta state
            self.matrix = _short(weight.to_sparse_bsr((block.rows, block.columns)) if block else weight.to_sparse_csr())
        self.register_buffer("column", None if bias is None else bias[:, None])

    @property
    def weight(self) -> Tensor:
        """Return the weight with its zeros, (out, in), for models that read it themselves."""
        return self.matrix.to_dense()

    @property
    def bias(self) -> Tensor | None:
        """Return the bias, (out,)."""
        return None if self.column is None else self.column[:, 0]

    @property
    def stored(self) -> int:
        """Return how many weights are stored, and multiplied for each token."""
        return self.matrix.values().numel()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's output (..., out) for inputs (..., in)."""
        flat = inputs.reshape(-1, self.in_features)  # (tokens, in)
        found = flat.new_empty(flat.shape[0], self.out_features)  # (tokens, out)
        together = _OF_BLOCKS if self.matrix.layout == torch.sparse_bsr else _OF_WEIGHTS
        count = max(_TOKENS, together // self.in_features)
        pieces = list(zip(flat.split(count), found.split(count), strict=True))
        if len(pieces) > 1:
            side_by_side(self._multiply, pieces)
        else:
            self._multiply(pieces[0])
        return found.view(*inputs.shape[:-1], self.out_features)

    @torch.inference_mode()  # there are kernels of the product alone
    def _multiply(self, piece: tuple[Tensor, Tensor]) -> None:
        """Write the output of the inputs (tokens, in) to (tokens, out)."""
        inputs, output = piece
        # The sparse matrix must stand first: W x^T; F.linear with one takes ten times as long.
        right = inputs.t()
        product = self.matrix @ right if self.column is None else torch.addmm(self.column, self.matrix, right)
        output.copy_(product.t())


def _short(matrix: Tensor) -> Tensor:
    """The matrix with indices of 32 bits, where these are enough: half as much to read."""
    if matrix.values().numel() > torch.iinfo(torch.int32).max:
        return matrix
    return torch.sparse_compressed_tensor(
        matrix.crow_indices().int(),
        matrix.col_indices().int(),
        matrix.values(),
        matrix.shape,
        layout=matrix.layout,
        check_invariants=False,
    )
