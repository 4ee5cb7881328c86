"""Linear layers that store and multiply only what is not zero, on the CPU in float32: torch's CSR and BSR matrices."""

import warnings

from torch import Tensor, nn

from sparsity.pattern import Block

# Tokens that are multiplied together: inputs and outputs of so many stay in the processor's cache while a sparse
# matrix is gone through. All tokens of a batch of eight images at once take three times as long.
_TOGETHER = 256


class SparseLinear(nn.Module):
    """A linear layer without its zeros, for inference. weight: (out, in). block: square; whole blocks of weights, of
    which any is not zero, are stored; None: single weights.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, block: Block | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR|Sparse BSR")  # that the layouts are in beta state
            self.matrix = weight.to_sparse_bsr((block.rows, block.columns)) if block else weight.to_sparse_csr()
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """Return the weight with its zeros, (out, in), for models that read it themselves."""
        return self.matrix.to_dense()

    @property
    def stored(self) -> int:
        """Return how many weights are stored, and multiplied for each token."""
        return self.matrix.values().numel()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's output (..., out) for inputs (..., in)."""
        flat = inputs.reshape(-1, self.in_features)  # (tokens, in)
        found = flat.new_empty(flat.shape[0], self.out_features)  # (tokens, out)
        for tokens, output in zip(flat.split(_TOGETHER), found.split(_TOGETHER), strict=True):
            # The sparse matrix must stand first: W x^T; F.linear with one takes ten times as long.
            output.copy_((self.matrix @ tokens.t()).t())
        if self.bias is not None:
            found += self.bias
        return found.view(*inputs.shape[:-1], self.out_features)
