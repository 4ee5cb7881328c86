"""The values on the axes of a plan, as the command line has them; needs no torch. Scores are the files of `pruners`."""

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
    ("base", "bias", "damping", "equations", "projection"),
)
CALIBRATIONS = ("dense", "sequential")
# Options of every plan; a score and a reconstruction add their own.
AXES = ("pool", "allocation", "scope", "reconstruct", "calibration_mode", "offload", "epochs", "schedule")
BOUNDS = ("allocation_within", "min_keep", "max_keep")
AXES += BOUNDS
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
