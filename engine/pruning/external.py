"""Any other model together with its data: calibrated on a folder of images or on batches of the user's."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from configs.pruning import ExternalPruneConfig
from datasets.calibration.any_model import FolderBatches, LoaderBatches
from engine.ranks import place_of
from sparsity.view import PrunableView


class External:
    """A subject (see engine.pruning.data_kinds) without an evaluation.

    module: models.external.model, with `build`, `prunable_view`, `preprocessing` and `resolve`.
    """

    metrics: dict[str, str] = {}

    def __init__(self, module: ModuleType, config: ExternalPruneConfig):
        self.module, self.config, self.sizes = module, config, config

    def load(self, fabric: Any) -> PrunableView:
        self.fabric, config = fabric, self.config
        loss = self.module.resolve(config.loss, "--loss") if config.loss else None
        self.model = self.module.build(config.model, config.weights).to(fabric.device)
        chosen = {"include": config.include, "exclude": config.exclude, "groups": config.groups}
        return self.module.prunable_view(self.model, loss=loss, **chosen)

    def calibration(self, folder: Path, num_batches: int, seed: int) -> FolderBatches | LoaderBatches:
        config, place = self.config, place_of(self.fabric)
        if not Path(config.calibration).is_dir():
            make = self.module.resolve(config.calibration, "--calibration")
            return LoaderBatches(make, config.calibration, num_batches, seed, place)
        return FolderBatches(config, self.module.preprocessing(self.model), folder, num_batches, seed, place)

    def evaluation(self, folder: Path) -> NoReturn:
        self.config.check_evaluation("")
        raise AssertionError("it is refused")
