"""Conjugate gradients for all rows of a layer at once, each in the space of the weights that it keeps."""

from dataclasses import dataclass

import torch
from torch import Tensor

_FINISHED = 0.75  # finished rows are set aside once at most this share of the computed rows is unfinished


def least_squares(
    weight: Tensor,
    H: Tensor,
    kept: Tensor,
    target: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    steps: int = 100,
) -> Tensor:
    """Return B with b_S = H_SS^-1 C_S in each row and exactly 0 where the mask is, by conjugate gradients.

    weight, kept, target, start: (out, in). H: (in, in), positive definite on what is kept. target: C; W H by default.
    start: B to begin with, by default W; it is cut to the mask. A row stops at ||residual|| <= tolerance ||C M||, or
    after so many steps. In float32, or the weight's dtype if that is better.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    W, H, M = weight.to(dtype), H.to(dtype), kept.to(dtype)
    B = (W if start is None else start.to(dtype)) * M
    C = W @ H if target is None else target.to(dtype)
    limits = torch.linalg.vector_norm(C * M, dim=1).mul_(tolerance)  # (out,)
    # W H - B H cancels more digits than (W - B) H, which is exactly 0 in a row without a pruned weight.
    R = ((W - B) @ H if target is None else C - B @ H).mul_(M)
    del C
    going = (torch.linalg.vector_norm(R, dim=1) > limits).nonzero().squeeze(1)  # rows that have not converged
    preconditioner = torch.where(H.diagonal() > 0, 1 / H.diagonal(), 0)
    state = _Rows.begin(B[going], R[going], M[going], preconditioner)
    for _ in range(steps if len(going) else 0):
        state.step(H, preconditioner)
        active = torch.linalg.vector_norm(state.R, dim=1) > limits[going]
        count = int(active.count_nonzero())
        if count == 0:
            break
        if count < len(going):
            state.freeze(active)
        if count <= _FINISHED * len(going):
            done, still = (~active).nonzero().squeeze(1), active.nonzero().squeeze(1)
            B[going[done]] = state.B[done]
            going, state = going[still], state.only(still)
    B[going] = state.B
    return B


@dataclass
class _Rows:
    """Rows that are solved together, all (rows, in): their weights B, residuals R and masks M, and the direction P.

    Residual and direction are 0 wherever the mask is, so that each row lives in the space of the weights that it keeps.
    product: R' D R with the Jacobi preconditioner D = 1 / diag(H), (rows, 1).
    """

    B: Tensor
    R: Tensor
    M: Tensor
    P: Tensor
    product: Tensor

    @classmethod
    def begin(cls, B: Tensor, R: Tensor, M: Tensor, preconditioner: Tensor) -> "_Rows":
        """Return rows whose first direction is that of steepest descent. preconditioner: D, (in,)."""
        P = R * preconditioner
        return cls(B, R, M, P, (R * P).sum(dim=1, keepdim=True))

    def step(self, H: Tensor, preconditioner: Tensor) -> None:
        """Move along P to where the error is smallest on that line; the next P is H-conjugate to it."""
        HP = (self.P @ H).mul_(self.M)
        length = _quotient(self.product, (self.P * HP).sum(dim=1, keepdim=True))
        self.B.addcmul_(self.P, length)
        self.R.addcmul_(HP, length, value=-1)
        Z = torch.mul(self.R, preconditioner, out=HP)
        product = (self.R * Z).sum(dim=1, keepdim=True)
        self.P.mul_(_quotient(product, self.product)).add_(Z)
        self.product = product

    def freeze(self, active: Tensor) -> None:
        """Let the next step move only the rows that are active, (rows,) bool."""
        self.P.mul_(active[:, None])
        self.product = self.product * active[:, None]

    def only(self, rows: Tensor) -> "_Rows":
        """Return these rows alone, by their indices."""
        return _Rows(self.B[rows], self.R[rows], self.M[rows], self.P[rows], self.product[rows])


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, and 0 where nothing is left to divide by."""
    return torch.where(below > 0, above / below, 0)
