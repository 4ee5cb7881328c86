"""How the sampling of learnable masks changes in the course of a run. Needs no torch: options are parsed before."""

from dataclasses import dataclass

from sparsity.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Each range goes linearly from its first to its last value.

    tau and scaling: of the Gumbel softmax. gate_std: of the first gates. fading: the regulariser weakens to 0.
    """

    tau: tuple[float, float] = (4.0, 0.05)
    scaling: tuple[float, float] = (10.0, 100.0)
    gate_std: float = 0.2
    fading: bool = False

    def __post_init__(self):
        if min(self.tau) <= 0:
            raise UserError(f"tau must be above 0, got {self.tau[0]} to {self.tau[1]}")

    def at(self, progress: float) -> tuple[float, float, float]:
        """(scaling, tau, factor of the regulariser) when this share of the run, 0 to 1, is done."""
        scaling, tau = ((1 - progress) * first + progress * last for first, last in (self.scaling, self.tau))
        return scaling, tau, 1 - progress if self.fading else 1.0


RECIPES = {
    "vit": Recipe(),  # 20 epochs
    "vit-1epoch": Recipe(tau=(1.0, 1.0), scaling=(100.0, 100.0)),
    "llm": Recipe(scaling=(100.0, 500.0), gate_std=0.01, fading=True),  # of the paper's authors, by step
}


def progress(unit: int, units: int) -> float:
    """Share of a run at its epoch or step number `unit`: 0 in the first, 1 in the last of them."""
    return unit / (units - 1) if units > 1 else 0.0
