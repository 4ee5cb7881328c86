"""Any other model together with its data: calibrated on a folder of images or on batches of the user's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from configs.pruning import ExternalPruneConfig
from datasets.calibration.any_model import FolderBatches, LoaderBatches
from datasets.calibration.own_data import SPLIT_SEED, OwnData, split
from datasets.calibration.texts import TextBatches
from datasets.place import ALONE, Place
from engine.evaluation.fidelity import Fidelity
from engine.ranks import place_of
from sparsity.errors import UserError
from sparsity.view import PrunableView

MOST_BATCHES = 4096  # that are asked for of a function, where it does not say how many it has
log = logging.getLogger(__name__)


class External:
    """A subject (see engine.pruning.data_kinds), whose evaluation is how faithful it is to the dense model, with the
    usual number of its task where the data has labels. metrics: known once the evaluation is there.

    module: models.external.model, with `load`, `prunable_view`, `own_loss`, `preprocessing`, `packing`, `probes` and
    `resolve`.
    """

    def __init__(self, module: ModuleType, config: ExternalPruneConfig):
        self.module, self.config, self.sizes = module, config, config
        self.unlabelled: UserError | None = None
        self.metrics: dict[str, str] = {}

    def load(self, fabric: Any) -> PrunableView:
        self.fabric, config = fabric, self.config
        loss = self.module.resolve(config.loss, "--loss") if config.loss else self._own_loss
        how = {"dtype": config.dtype, "image_size": config.img_size, "options": config.model_kwargs}
        model, halves = self.module.load(config.model, config.weights, config.weights_key, **how)
        self.model = model.to(fabric.device)
        chosen = {"include": config.include, "exclude": config.exclude, "groups": config.groups, "halves": halves}
        self.view = self.module.prunable_view(self.model, loss=loss, tokens=config.calibrate_on, **chosen)
        return self.view

    def calibration(self, folder: Path, num_batches: int, seed: int) -> OwnData | LoaderBatches:
        config = self.config
        held = config.evaluate and not config.evaluation
        choose = (lambda count: split(count).calibration) if held else None
        batches = self._batches(config.calibration, folder, num_batches, seed, choose, place_of(self.fabric))
        self.unlabelled = batches.unlabelled
        if self.unlabelled and config.loss:
            log.warning("%s: --loss gets batches without labels", self.unlabelled)
        log.info("calibration on %s", batches.told)
        return batches

    def _batches(
        self,
        path: str,
        folder: Path,
        num_batches: int,
        seed: int,
        choose: Callable[[int], Sequence[int]] | None,
        place: Place,
    ) -> OwnData | LoaderBatches:
        """The batches of a folder, a file or a function. choose: which of the items are read."""
        config, module = self.config, self.module
        if Path(path).is_dir():
            preprocess = module.preprocessing(self.model, config.class_map)
            chosen = {"path": path, "choose": choose, "rate": preprocess.rate}
            return FolderBatches(config, preprocess, folder, num_batches, seed, place, **chosen)
        if Path(path).is_file():
            packing = module.packing(self.model, config.max_tokens)
            return TextBatches(config, packing, folder, num_batches, seed, place, path=path, choose=choose)
        make = module.resolve(path, "--calibration")
        return LoaderBatches(make, path, min(num_batches, MOST_BATCHES), seed, place, choose=choose)

    def _own_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The model's own; UserError where the classes of the folder are not known to be the model's."""
        if self.unlabelled:
            raise self.unlabelled
        return self.module.own_loss(model, batch)

    def evaluation(self, folder: Path) -> Fidelity:
        """Made while the model is dense. Each rank looks at all of the data."""
        config = self.config
        choose = None if config.evaluation else lambda count: split(count).held
        data = self._batches(config.evaluation or config.calibration, folder, sys.maxsize, SPLIT_SEED, choose, ALONE)
        log.info("evaluation on %s%s", data.told, "" if config.evaluation else ", which are not calibrated on")
        reading = {"to_device": self.fabric.to_device, "arithmetic": self.fabric.autocast}
        fidelity = Fidelity(self.model, self.module.probes(self.model, self.view), data, **reading)
        self.metrics = {name: name for name in fidelity.measures}
        return fidelity
