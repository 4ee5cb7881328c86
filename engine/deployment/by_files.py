"""A model whose parts are computed by its ONNX files, so that an evaluation measures what is timed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from engine.deployment.onnx_files import OnnxModel

Methods = Mapping[str, Callable[..., Any]]


def methods_of(files: Mapping[str, OnnxModel]) -> Methods:
    """Return the methods by which evaluations run a model of this project, computed by the files of its parts; none of
    a model of other parts. files: name of a part -> its file.
    """
    if set(files) == {"classifier"}:
        return {"classify": _call(files["classifier"], "image")}
    if set(files) == {"vision", "text", "match"}:
        return {
            "encode_image": _call(files["vision"], "image"),
            "encode_text": _call(files["text"], "ids", "atts"),
            "project_image": lambda tokens: tokens,
            "match": _matching(_call(files["match"], "states", "atts", "tokens")),
        }
    return {}


def _call(file: OnnxModel, *names: str) -> Callable[..., Any]:
    """Return a function of tensors that gives the file's output, a tuple where there are several."""

    def run(*tensors: Tensor) -> Any:
        found = file({name: tensor.cpu() for name, tensor in zip(names, tensors, strict=True)})
        found = tuple(each.to(tensors[0].device) for each in found)
        return found if len(found) > 1 else found[0]

    return run


def _matching(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `run` for texts that share an image: its tokens (1, L, V) are repeated for each."""
    return lambda states, atts, tokens: run(states, atts, tokens.expand(len(states), -1, -1))


@contextmanager
def computed_by(model: nn.Module, methods: Methods) -> Iterator[None]:
    """Put these methods in the place of a model's own inside the block."""
    vars(model).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(model)[name]
