"""2:4 on a GPU: cuSPARSELt's product reads half of the weights, in 16 bits on compute capability 8.0 and above."""

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)
_WEIGHT, _TOKENS = 16, 8  # rows and columns of a weight, and tokens, come in multiples of these in 16 bits


def why_not(weight: Tensor) -> str | None:
    """Return why a weight (out, in) cannot be multiplied as 2:4 where it lies; None where it can."""
    if not weight.is_cuda:
        return "2:4 needs a GPU"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "2:4 needs a GPU of compute capability 8.0"
    if not torch.backends.cusparselt.is_available():
        return "this torch comes without cuSPARSELt"
    if weight.dtype not in HALVES:
        return "2:4 needs float16 or bfloat16"
    return None if is_two_of_four(weight) else "its zeros are not 2:4"


def is_two_of_four(weight: Tensor) -> bool:
    """Return whether at most two of each four consecutive inputs of a weight (out, in) are not zero."""
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % 4))
    return bool((padded.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all())


class SemiStructuredLinear(nn.Module):
    """A linear layer whose weight is 2:4. It is padded with zeros to what the kernel takes, and so are the inputs.

    weight: (out, in), 2:4 along its inputs, on a GPU. tokens: how many rows its inputs have, for which the fastest
    algorithm of the library is looked for; None: the library's first.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: int | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rows, columns = -self.out_features % _WEIGHT, -self.in_features % _WEIGHT
        padded = nn.functional.pad(weight, (0, columns, 0, rows)).contiguous()
        self.register_buffer("packed", torch.ops.aten._cslt_compress(padded))
        self.register_buffer("bias", None if bias is None else nn.functional.pad(bias, (0, rows)))
        self.columns, self.algorithm = columns, 0
        if tokens:
            inputs = weight.new_zeros(tokens + -tokens % _TOKENS, padded.shape[1])
            self.algorithm = int(
                torch.ops.aten._cslt_sparse_mm_search(self.packed, inputs.t(), bias=self.bias, transpose_result=True)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's output (..., out) for inputs (..., in)."""
        flat = inputs.reshape(-1, self.in_features)  # (tokens, in)
        tokens = flat.shape[0]
        if self.columns or tokens % _TOKENS:
            flat = nn.functional.pad(flat, (0, self.columns, 0, -tokens % _TOKENS))
        found = torch.ops.aten._cslt_sparse_mm(
            self.packed, flat.t(), bias=self.bias, transpose_result=True, alg_id=self.algorithm
        )  # (tokens, out), each padded
        return found[:tokens, : self.out_features].reshape(*inputs.shape[:-1], self.out_features)
