"""Any other model together with its data: calibrated on a folder of images or on batches of the user's."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor, nn

from configs.pruning import ExternalPruneConfig
from datasets.calibration.any_model import FolderBatches, LoaderBatches
from engine.ranks import place_of
from sparsity.errors import UserError
from sparsity.view import PrunableView

log = logging.getLogger(__name__)


class External:
    """A subject (see engine.pruning.data_kinds) without an evaluation.

    module: models.external.model, with `load`, `prunable_view`, `own_loss`, `preprocessing` and `resolve`.
    """

    metrics: dict[str, str] = {}

    def __init__(self, module: ModuleType, config: ExternalPruneConfig):
        self.module, self.config, self.sizes = module, config, config
        self.unlabelled: UserError | None = None

    def load(self, fabric: Any) -> PrunableView:
        self.fabric, config = fabric, self.config
        loss = self.module.resolve(config.loss, "--loss") if config.loss else self._own_loss
        how = {"dtype": config.dtype, "image_size": config.img_size, "options": config.model_kwargs}
        model, halves = self.module.load(config.model, config.weights, config.weights_key, **how)
        self.model = model.to(fabric.device)
        chosen = {"include": config.include, "exclude": config.exclude, "groups": config.groups, "halves": halves}
        return self.module.prunable_view(self.model, loss=loss, **chosen)

    def calibration(self, folder: Path, num_batches: int, seed: int) -> FolderBatches | LoaderBatches:
        config, place = self.config, place_of(self.fabric)
        if not Path(config.calibration).is_dir():
            make = self.module.resolve(config.calibration, "--calibration")
            return LoaderBatches(make, config.calibration, num_batches, seed, place)
        preprocess = self.module.preprocessing(self.model, config.class_map)
        batches = FolderBatches(config, preprocess, folder, num_batches, seed, place)
        self.unlabelled = batches.unlabelled
        if self.unlabelled and config.loss:
            log.warning("%s: --loss gets batches without labels", self.unlabelled)
        return batches

    def _own_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The model's own; UserError where the classes of the folder are not known to be the model's."""
        if self.unlabelled:
            raise self.unlabelled
        return self.module.own_loss(model, batch)

    def evaluation(self, folder: Path) -> NoReturn:
        self.config.check_evaluation("")
        raise AssertionError("it is refused")
