"""Pretraining on several sources of batches at once, for any model whose forward returns a dict of losses."""

from torch import Tensor, nn


class Sources(nn.Module):
    """Sum of the losses over sources ("general", "region"): one forward for all of them, as DDP wants it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, sources: dict[str, dict], **options) -> dict[str, Tensor]:
        """`{source: batch}` -> "loss" and every part as "source/part"; options go to the model."""
        losses = {}
        for source, batch in sources.items():
            losses |= {f"{source}/{name}": value for name, value in self.model(batch, **options).items()}
        return {"loss": sum(losses[f"{source}/loss"] for source in sources), **losses}
