"""CHITA's block-wise solver, arXiv 2302.14623: chooses the kept weights and their values.

With the gradient rows A (n, p), the weights w0 that enter the step, y = A w0 and the first-order term a = (1/b) sum of
A's rows, it minimises over w with at most k non-zeros

    Q(w) = 1/2 ||y - A w||^2 + a^T w + (n lambda / 2) ||w - w0||^2.

Since a = A^T c with c = 1/b in all n entries, that is, but for a constant, a ridge regression in delta = w0 - w, where
delta_j = w0_j for a weight that goes:

    1/2 ||A delta - c||^2 + (mu / 2) ||delta||^2,    mu = n lambda.

So nothing is needed but products with A, and the p x p matrix A^T A + mu never: memory is O(n x block). A step over the
whole problem chooses how many weights each block keeps, a step in each block which ones, and those are then solved for
in closed form. Sums over n are kept in float64.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsity.pattern import NM
from sparsity.selection import keep, keep_rows, lowest_of_rows, thresholds
from sparsity.solvers.threads import side_by_side
from sparsity.statistics.gradient_rows import Rows

BLOCK = 10_000  # weights of a block, at most
_TRIALS = 10  # lengths of the step in a line search, each twice the one before
_HALVINGS = 100
_SLACK = 1e-10
_PIECE = {"cpu": 1 << 16}  # columns looked at together, where no rows are
_LARGE_PIECE = 1 << 24
_GONE = -1.0  # score of weights that were pruned before: below that of all others


def solve(
    rows: Rows,
    weights: Mapping[str, Tensor],
    count: int | None,
    *,
    ridge: float,
    pattern: NM | None = None,
    alive: Mapping[str, Tensor] | None = None,
    blocks: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, which weights are kept, bool, what they become), in the order and shapes of the weights.

    weights: w0, name -> (out, in), in the order of the rows' columns. count: how many are kept of all; or, where that
    is None, a pattern says it for each group of M, and weights that it does not fit stay as they are. ridge: lambda.
    alive: name -> bool (out, in); where it is False the weight was pruned before, and stays so; not with a pattern.
    blocks: name -> where its blocks begin and the last one ends; by default each weight is cut into even ones of at
    most BLOCK. A block whose line search finds nothing better keeps the weights with which it began.
    """
    problem = _Problem(rows, weights, ridge, alive)
    step, kept = 0.0, {}
    if pattern is None:
        assert count is not None, "without a pattern, it is said how many are kept"
        step, kept = _choose(problem, count)
    for name, weight in weights.items():
        if pattern and not pattern.fits(weight.shape[1]):
            yield name, torch.ones_like(weight, dtype=torch.bool), weight.clone()
            continue
        bounds = blocks[name] if blocks else cut(weight.numel(), unit=pattern.m if pattern else 1)
        chosen = pattern.keep(weight.abs()) if pattern else kept.pop(name)
        chosen, solved = _solve_weight(problem, name, step, chosen.view(-1), bounds, pattern)
        yield name, chosen.view(weight.shape), solved.view(weight.shape)


def objective(rows: Rows, before: Mapping[str, Tensor], after: Mapping[str, Tensor], ridge: float) -> float:
    """Q(w) of the weights `after` a step that `before` entered: name -> (out, in), in the order of the columns."""
    problem = _Problem(rows, before, ridge, None)
    flat = {name: weight.reshape(-1) for name, weight in after.items()}
    error, squares = problem.along((p, problem.weight(p) - p.of(flat).float()) for p in problem.pieces())
    forward, _ = problem.along((p, p.of(flat).float()) for p in problem.pieces())
    return float(error.square().sum() / 2 + forward.sum() * problem.shift + problem.mu / 2 * squares)


def cut(numel: int, size: int = BLOCK, unit: int = 1) -> list[int]:
    """Return where the blocks of a weight begin, and its end: as few as possible, of even sizes, none above `size`.

    unit: so many neighbours stay together; it divides `numel`.
    """
    units = numel // unit
    count = -(-units // max(1, size // unit))
    return [units * i // count * unit for i in range(count + 1)]


@dataclass(frozen=True, repr=False)
class _Piece:
    """Columns that are looked at together: `begin` to `end` of a weight, the first of which is column `first`."""

    name: str
    begin: int
    end: int
    first: int

    def __repr__(self) -> str:
        return repr(self.name)

    @property
    def last(self) -> int:
        """The column after those."""
        return self.first + self.end - self.begin

    def of(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return vectors[self.name][self.begin : self.end]


class _Problem:
    """The whole problem, in pieces that stay in the processor's cache. Vectors are flat."""

    def __init__(self, rows: Rows, weights: Mapping[str, Tensor], ridge: float, alive: Mapping[str, Tensor] | None):
        self.rows, self.mu, self.shift = rows, rows.n * ridge, 1 / rows.batch_size
        self.weights = {name: weight.reshape(-1) for name, weight in weights.items()}
        self.alive = alive and {name: mask.reshape(-1) for name, mask in alive.items()}
        self.first, self.numel = {}, 0  # column where each weight begins, and how many there are
        for name, weight in weights.items():
            self.first[name] = self.numel
            self.numel += weight.numel()

    def pieces(self) -> Iterator[_Piece]:
        size = _PIECE.get(self.rows.device.type, _LARGE_PIECE)
        for name, weight in self.weights.items():
            for begin in range(0, len(weight), size):
                yield _Piece(name, begin, min(begin + size, len(weight)), self.first[name] + begin)

    def weight(self, piece: _Piece) -> Tensor:
        return piece.of(self.weights).float()

    def slope(self, piece: _Piece) -> Tensor:
        """The gradient of Q at w0, which is the first-order term, also where weights were pruned before."""
        return self.rows.sum(piece.first, piece.last) * self.shift

    def moved(self, piece: _Piece, step: float) -> Tensor:
        """The weights after a gradient step, also where they were pruned before."""
        if not step:
            return self.weight(piece).clone()
        return torch.sub(self.weight(piece), self.rows.sum(piece.first, piece.last), alpha=step * self.shift)

    def scores(self, step: float) -> Iterator[tuple[_Piece, Tensor]]:
        """Return the magnitudes after a gradient step."""
        for piece in self.pieces():
            score = self.moved(piece, step).abs_()
            if self.alive:
                score.masked_fill_(~piece.of(self.alive), _GONE)
            yield piece, score

    def largest(self, step: float, count: int) -> dict[str, Tensor]:
        """Return where the `count` largest magnitudes after a gradient step are."""
        masks = {name: torch.empty_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        scores = partial(self.scores, step)
        for piece, kept in keep(scores, *thresholds(scores, [self.numel - count])):
            piece.of(masks).copy_(kept)
        return masks

    def stays(self, step: float, kept: Mapping[str, Tensor]) -> bool:
        """Whether the largest magnitude after a gradient step is among the kept weights."""
        inside = outside = torch.zeros((), device=self.rows.device)
        for piece, score in self.scores(step):
            chosen = score * piece.of(kept).to(score.dtype)
            inside = torch.maximum(inside, chosen.amax())
            outside = torch.maximum(outside, score.sub_(chosen).amax())
        return bool(inside >= outside - _SLACK)

    def best_step(self, kept: Mapping[str, Tensor]) -> float:
        """The length of the step along the gradient on the kept weights that minimises Q over all lengths."""
        along, squares = self.along((piece, self.slope(piece).mul_(piece.of(kept).float())) for piece in self.pieces())
        return float(_ratio(squares, along.square().sum() + self.mu * squares))

    def value(self, step: float, kept: Mapping[str, Tensor]) -> float:
        """Q, but for a constant, after a gradient step that is cut to the kept weights."""
        error, squares = self.along(
            (piece, torch.where(piece.of(kept), self.slope(piece).mul_(step), self.weight(piece)))
            for piece in self.pieces()
        )
        return float((error - self.shift).square().sum() / 2 + self.mu / 2 * squares)

    def along(self, vector: Iterable[tuple[_Piece, Tensor]]) -> tuple[Tensor, Tensor]:
        """The rows times a vector, (n,), and the sum of its squares; it comes as (piece, values)."""
        squares = torch.zeros((), dtype=torch.float64, device=self.rows.device)

        def pieces() -> Iterator[tuple[int, Tensor]]:
            for piece, values in vector:
                squares.add_(torch.linalg.vector_norm(values).double().square())
                yield piece.first, values

        return self.rows.product(pieces()), squares


def _choose(problem: _Problem, count: int) -> tuple[float, dict[str, Tensor]]:
    """A projected-gradient step over the whole problem: its length, and the weights that it keeps."""
    kept = problem.largest(0.0, count)
    step = problem.best_step(kept)
    if problem.stays(step, kept):
        return step, kept
    step /= 2
    for _ in range(_HALVINGS):
        if problem.stays(step, kept):
            break
        step /= 2
    best, lowest = (0.0, kept), problem.value(0.0, kept)
    for _ in range(_TRIALS):
        trial = problem.largest(step, count)
        value = problem.value(step, trial)
        if value >= lowest:
            break
        best, lowest = (step, trial), value
        step *= 2
    return best


def _solve_weight(
    problem: _Problem, name: str, step: float, kept: Tensor, bounds: Sequence[int], pattern: NM | None
) -> tuple[Tensor, Tensor]:
    """The blocks of a weight, several at once: which of it is kept (numel,), and what it becomes (numel,)."""
    rows, solved = problem.rows, torch.empty_like(problem.weights[name])

    def solve_batch(batch: tuple[int, int, int]) -> None:
        begin, end, count = batch
        piece = _Piece(name, begin, end, problem.first[name] + begin)
        # Copied: rows of a file lie so far apart that the same few lines of the cache would serve all of them.
        A = rows.read(piece.first, piece.last).unflatten(1, (count, -1)).transpose(0, 1).contiguous()
        mask = kept[begin:end].float()
        w, start, mask = (
            vector.view(count, 1, -1) for vector in (problem.weight(piece), problem.moved(piece, step).mul_(mask), mask)
        )
        alive = piece.of(problem.alive).view(count, 1, -1) if problem.alive else None
        blocks = _Blocks(A, w, start, mask, alive, pattern, problem.shift, problem.mu)
        if blocks.search():
            kept[begin:end] = blocks.mask.view(-1)
        solved[begin:end] = blocks.refit().view(-1)

    batches = list(_batches(bounds, rows.piece()))
    if rows.independent:
        side_by_side(solve_batch, batches)
    else:
        for batch in batches:
            solve_batch(batch)
    return kept, solved


def _batches(bounds: Sequence[int], width: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, how many blocks) of neighbouring blocks of one size, about `width` columns together."""
    spans = [(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False) if end > begin]
    while spans:
        (begin, end), count = spans[0], 1
        size = end - begin
        while count < min(len(spans), max(1, width // size)) and spans[count][1] - spans[count][0] == size:
            count += 1
        yield begin, spans[count - 1][1], count
        spans = spans[count:]


@dataclass
class _Blocks:
    """Blocks of one size that are solved together. There are thousands of them: few, fused operations count."""

    A: Tensor  # (blocks, n, size)
    w: Tensor  # the weights that entered, (blocks, 1, size), as all that follow
    start: Tensor  # where the step in the block begins: zero but for the kept weights
    mask: Tensor  # 1 where a weight is kept, else 0
    alive: Tensor | None
    pattern: NM | None
    shift: float
    mu: float

    def search(self) -> bool:
        """A projected-gradient step with line search: afterwards `mask` has the weights of its best iterate, as many
        as before. Whether they are others.
        """
        start, delta = self.start, self.w - self.start
        error = self.error(delta)
        slope = torch.baddbmm(delta, error, self.A, beta=-self.mu, alpha=-1)
        if self.alive is not None:
            slope *= self.alive.to(slope.dtype)
        inside = slope * self.mask
        outside = _largest(slope - inside)  # (blocks, 1, 1), as all that is one number for each block
        squares = _squares(inside)
        step = _ratio(squares, _squares(torch.bmm(inside, self.A.mT)).add_(squares, alpha=self.mu))

        def leaves(step: Tensor) -> Tensor:
            """Blocks in which the largest magnitude after a step is not among the kept weights."""
            highest = _largest(torch.addcmul(start, inside, step, value=-1))
            return (step * outside).sub_(highest) > _SLACK

        searched = leaves(step)
        if not searched.any():  # only the lengths of the weights change, and those are solved for anyway
            return False
        step = step / 2
        for _ in range(_HALVINGS):
            far = leaves(step)
            if not far.any():
                break
            step = torch.where(far, step / 2, step)
        lowest, changed = self.value(error, delta), False
        for _ in range(_TRIALS):
            trial = torch.addcmul(start, slope, step, value=-1)
            mask = self.project(trial)
            delta = torch.addcmul(self.w, trial, mask, value=-1)
            value = self.value(self.error(delta), delta)
            searched = searched.logical_and(value < lowest)
            if not searched.any():
                break
            self.mask, lowest = torch.where(searched, mask, self.mask), torch.where(searched, value, lowest)
            changed, step = True, step * 2
        return changed

    def project(self, vectors: Tensor) -> Tensor:
        """1 where the largest magnitudes of each block are, as many as it keeps, or as the pattern says; else 0."""
        scores = vectors.abs()
        if self.alive is not None:
            scores.masked_fill_(~self.alive, _GONE)
        if self.pattern:
            return self.pattern.keep(scores).to(scores.dtype)
        return _largest_of(scores[:, 0], scores.shape[2] - self.mask.sum(dim=2)[:, 0].long())[:, None]

    def refit(self) -> Tensor:
        """The kept weights in closed form, zero elsewhere.

        With e = A_rest w_rest - c, the kept weights change by A_S^T (A_S A_S^T + mu I)^-1 e, which is the Woodbury
        identity, or by (A_S^T A_S + mu I)^-1 A_S^T e where a block keeps no more weights than there are rows.
        """
        n, solved = self.A.shape[1], self.w * self.mask
        error = self.error(self.w - solved).double()
        eye = torch.eye(n, dtype=solved.dtype, device=solved.device)
        gram = torch.baddbmm(eye, self.A * self.mask, self.A.mT, beta=self.mu).double()
        small = torch.linalg.solve_ex(gram, error.mT).result.mT.to(solved.dtype)  # (blocks, 1, n)
        solved.addcmul_(torch.bmm(small, self.A), self.mask)
        counts = self.mask.sum(dim=(1, 2))
        for i in (counts <= n).nonzero().squeeze(1).tolist() if counts.amin() <= n else ():
            kept = self.mask[i, 0].bool()
            part = self.A[i][:, kept].double()
            gram = part.T @ part
            gram.diagonal().add_(self.mu)
            solved[i, 0, kept] = self.w[i, 0, kept] + torch.linalg.solve(gram, part.T @ error[i, 0]).to(solved.dtype)
        return solved

    def error(self, delta: Tensor) -> Tensor:
        """A delta - c, (blocks, 1, n)."""
        return torch.bmm(delta, self.A.mT).sub_(self.shift)

    def value(self, error: Tensor, delta: Tensor) -> Tensor:
        """Q of each block, but for a constant and a factor, (blocks, 1, 1)."""
        return _squares(error).double().add_(_squares(delta), alpha=self.mu)


def _largest_of(scores: Tensor, pruned: Tensor) -> Tensor:
    """1 where the scores (blocks, size) are but for the `pruned` (blocks,) lowest of each block, else 0."""
    mask = (scores - lowest_of_rows(scores, pruned)).sign_().clamp_(0)  # comparing is slower
    if (mask.sum(dim=1) != scores.shape[1] - pruned).any():  # ties
        mask = keep_rows("of a block", scores, pruned).to(scores.dtype)
    return mask


def _squares(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=2, keepdim=True).square_()


def _largest(vectors: Tensor) -> Tensor:
    return vectors.abs().amax(dim=2, keepdim=True)  # several times as fast as the norm


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where the gradient is: nothing moves."""
    return torch.where(above > 0, above / below, torch.zeros_like(above))
