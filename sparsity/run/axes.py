"""The values on the axes of a plan, as the command line has them; needs no torch. Scores are the files of `pruners`."""

from sparsity.errors import UserError
from sparsity.pattern import SCOPES as SCOPES
from sparsity.run.registry import Registry

ALLOCATIONS = Registry(
    "allocation",
    "sparsity.allocation",
    "sparsity.allocation.base:Allocation",
    ("base", "budget", "ratios", "given"),
)
RECONSTRUCTIONS = Registry(
    "reconstruction",
    "sparsity.reconstruction",
    "sparsity.reconstruction.base:Reconstruction",
    ("base", "bias", "damping", "equations", "errors", "projection", "block_steps"),
)
CALIBRATIONS = ("dense", "sequential")
# Options of every plan; a score and a reconstruction add their own.
AXES = ("pool", "allocation", "scope", "reconstruct", "calibration_mode", "offload", "epochs", "schedule")
BOUNDS = ("allocation_within", "min_keep", "max_keep")
AXES += (*BOUNDS, "calibrate_within", "target", "correct_bias", "swaps", "layer_errors", "block_steps", "block_window")
CALIBRATED_WITHIN = ("block", "stage")  # what is measured at a time in sequential calibration
WINDOWS = ("attention", "mlp", "block")  # which layers of a block its steps train
WITHIN = ("model", "group")  # what competes for the budget: all layers, or those of each modality
# One word for allocation and scope.
POOLS = {
    "global": ("global", "layer"),
    "group": ("group", "layer"),
    "magnitude": ("magnitude", "layer"),
    "layer": ("layer", "layer"),
    "row": ("layer", "row"),
    "block": ("layer", "block"),
}


def dense_share(target: str) -> float:
    """Return a of a target "dense:a" (a = 1 when left out), and 0 of "same". UserError for anything else."""
    name, _, share = target.partition(":")
    if name == "dense":
        try:
            found = float(share) if ":" in target else 1.0
        except ValueError:
            found = 0.0
        if 0 < found <= 1:
            return found
    elif target == "same":
        return 0.0
    raise UserError(f"target must be same, dense, or dense:A with A above 0 and at most 1, got {target!r:.40}")
