"""Any model: `timm:NAME`, `hf:NAME_OR_FOLDER` (transformers), `package.module:function` (returns an nn.Module).

Prunable is every nn.Linear and every Conv1D of transformers but the output head; nothing else is asked of a model. What
is known of the libraries stands in models/external/libraries.py, what names of layers say in
models/external/layer_names.py.
"""

import difflib
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from models.checkpoint import HALF, TIMM, WRAPPERS, load_weights, read_weights
from models.external.dtypes import compute_in, dtypes_of, file_dtypes, published_dtypes, wanted
from models.external.layer_names import TEXT, as_globs, blocks_of, match_group
from models.external.libraries import library_of, seeded
from models.external.outputs import outputs_of
from models.external.preprocessing import preprocessing as preprocessing
from models.external.probes import probes as probes
from models.external.texts import packing as packing
from models.hub import first_line, hub_answers, local_only
from sparsity.errors import MissingFileError, UserError, listed
from sparsity.files import weights_files
from sparsity.view import Outputs, PrunableView, bare, module_name

log = logging.getLogger(__name__)

PUBLISHED, RANDOM = "published", "random"  # values of `weights` that are no file
FOLDER = "local-dir:"  # of timm: begins the name of a folder with a model's configuration and weights
OTHER_WEIGHTS = "give --weights FILE or --weights random"
Loss = Callable[[nn.Module, Any], Tensor]


def build(name: str, weights: str | Path = PUBLISHED, weights_key: str = "", **how: Any) -> nn.Module:
    """The model of a name, in evaluation mode. how: `dtype`, `image_size` and `options` of `load`."""
    return load(name, weights, weights_key, **how)[0]


def load(
    name: str,
    weights: str | Path = PUBLISHED,
    weights_key: str = "",
    *,
    dtype: str = "float32",
    image_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """`build`, and the dtypes of its source where the model has others or they are half precision: what is written goes
    back to them.

    weights: "published" (those that the library downloads, or that lie in the folder; a function gives its own),
    "random", or a file with a state dict, a folder or an index of shards. weights_key: where that stands in the file;
    by default as the model's library reads it, which is averaged weights before raw ones for timm. dtype: what the
    model computes in: "auto", that of its source (the widest where it has several); "float32", or float64 where the
    source has that; "bfloat16"; "float16". image_size: side of the images in pixels. options: of timm.create_model,
    both for timm alone. Raises UserError, one line, for a name that is none and weights that are not to be had.
    """
    published = str(weights) == PUBLISHED
    file = None if published or str(weights) == RANDOM else Path(weights)
    if file and not weights_files(file):
        raise MissingFileError(f"--weights {file}: there is no such file, nor a folder with weights")
    source, _, rest = name.partition(":")
    if weights_key and not file:
        raise UserError(f"--weights_key {weights_key}: is a key of a file: give --weights FILE with it")
    if source != "timm" and (image_size or options):
        raise UserError(f"--img_size and --model_kwargs are for models of timm: leave them out with {name}")
    if source == "timm":
        model = timm_model(rest, published, image_size=image_size, **(options or {}))
        came = dtypes_of(model.state_dict())
    elif source == "hf":
        folder = str(file) if file and file.is_dir() and not weights_key else None
        model, came = _transformers(rest, published, dtype, folder)
        published, file = published or folder is not None, None if folder else file
    else:
        model = _made_by(name)
        came = dtypes_of(model.state_dict())
    content = read_weights(file, TIMM if source == "timm" else WRAPPERS, weights_key) if file else None
    came = dtypes_of(content) if content is not None else came
    loaded = source == "hf" and published  # as it is asked for
    made = source not in ("timm", "hf") and not file and dtype == "auto"  # as the user's function has it
    if not loaded and not made:
        compute_in(model, wanted(dtype, came))
    if content is not None:
        load_weights(model, file, weights=content)
    own = dtypes_of(model.state_dict())
    return model.eval(), {key: kind for key, kind in came.items() if kind in HALF or kind != own.get(key, kind)}


def timm_model(
    name: str,
    published: bool,
    *,
    image_size: int | None = None,
    option: str = "-m timm:",
    way_out: str = OTHER_WEIGHTS,
    **options: Any,
) -> nn.Module:
    """A model of timm, the bundled `vit_mini`, or local-dir:FOLDER; options are those of timm.create_model.

    image_size: side of the images in pixels, given to the model where it is made for one size, and in any case to its
    data configuration, which otherwise says what the model was built for. UserError, which begins with `option` and
    the name, where there is no such model, or, with a way out, where its weights are not to be had.
    """
    import timm

    importlib.import_module("models.dino.timm_mini")  # makes itself known to timm
    folder = name.removeprefix(FOLDER) if name.startswith(FOLDER) else None
    if folder is not None and not Path(folder, "config.json").is_file():
        raise MissingFileError(f"{option}{name}: no config.json of timm in this folder, as fine-tuning writes it")
    if folder is None and not name.startswith("hf-hub:") and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)
        prefix = "timm:" if option.endswith("timm:") else ""
        raise UserError(f"{option}{name}: timm has no such model, did you mean {prefix}{near[0]}?")
    options["pretrained"] = published
    try:
        if published and folder is None and not hub_answers():
            options["pretrained_cfg_overlay"] = {"file": _cached(timm, name)}
        return as_built(_sized(timm.create_model, name, image_size, options), image_size)
    except Exception as error:  # of the network, of the hub, of tags and names: each library its own kind
        raise UserError(f"{option}{name}: {first_line(error)}; {way_out}") from error


def _sized(
    create: Callable[..., nn.Module], name: str, image_size: int | None, options: Mapping[str, Any]
) -> nn.Module:
    """A model for images of this size; models that take any size have no argument for it."""
    if image_size is None:
        return create(name, **options)
    try:
        return create(name, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create(name, **options)


def as_built(model: nn.Module, image_size: int | None = None) -> nn.Module:
    """A model of timm whose data configuration says the size of images that it was built for, or the given one."""
    patches = model._modules.get("patch_embed")
    built = vars(patches).get("img_size") if patches is not None and image_size is None else image_size
    if built is not None:
        height, width = built if isinstance(built, tuple | list) else (built, built)
        channels = model.pretrained_cfg.get("input_size", (3, 0, 0))[0]
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, height, width)}
    return model


def _cached(timm: Any, name: str) -> str:
    """The weights of a timm model that were downloaded before."""
    from huggingface_hub import hf_hub_download

    config = timm.models.get_pretrained_cfg(name)
    if config and config.file:
        return config.file
    for file in ("model.safetensors", "pytorch_model.bin") if config and config.hf_hub_id else ():
        try:
            return hf_hub_download(config.hf_hub_id, file, local_files_only=True)
        except OSError:
            continue
    raise UserError("the hub cannot be reached, and these weights have not been downloaded before")


def _transformers(
    name: str, published: bool, dtype: str, folder: str | None
) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """The model and the dtypes of its files, in the type that is asked for. folder: has the weights in place of the
    published ones.
    """
    import transformers

    local = {"local_files_only": local_only(name)}
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **local)
    except Exception as error:  # of the network, of the hub, of files: each its own kind
        where = "cannot be read" if Path(name).is_dir() else "no such folder, and not found on the hub or in its cache"
        way_out = "give a folder that save_pretrained wrote, or the name of a model on the hub"
        raise UserError(f"-m hf:{name}: {where}: {first_line(error)}; {way_out}") from error
    kind = _class_of(transformers, config, name)
    if not published and folder is None:
        model = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
        return model, dtypes_of(model.state_dict())
    where = folder or name
    how = {"config": config, **local}
    try:
        first = wanted(dtype, file_dtypes(where)) or "auto"  # not known before the files are there
        model, found = kind.from_pretrained(where, dtype=first, output_loading_info=True, **how)
        came = published_dtypes(where, model)
        own = wanted(dtype, came) or model.dtype
        if own != model.dtype:
            model = kind.from_pretrained(where, dtype=own, **how)
    except Exception as error:
        raise UserError(f"-m hf:{name}: no weights: {first_line(error)}; {OTHER_WEIGHTS}") from error
    model.name_or_path = name  # where its processor is
    if found["missing_keys"]:
        log.warning("hf:%s has no weights for %s: they are random", name, listed(sorted(found["missing_keys"])))
    return model, came


def _class_of(transformers: Any, config: Any, name: str) -> Any:
    """The class that the configuration names; code that comes with a checkpoint is never run."""
    if not config.architectures:
        return transformers.AutoModel
    kind = getattr(transformers, config.architectures[0], None)
    if kind is None:
        raise UserError(
            f"-m hf:{name}: transformers has no {config.architectures[0]}, and code that comes with a checkpoint"
            " (trust_remote_code) is not run: give -m package.module:function, a function of yours that returns it"
        )
    return kind


def _made_by(name: str) -> nn.Module:
    model = resolve(name, "-m")()
    if not isinstance(model, nn.Module):
        raise UserError(f"-m {name}: expected a function that returns an nn.Module, got {type(model).__name__}")
    return model


def resolve(name: str, option: str) -> Callable:
    """The function `package.module:function`; UserError, naming the option, where there is none."""
    module, _, function = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of what the module itself imports
        raise UserError(f"{option} {name}: there is no module {error.name!r} here or in PYTHONPATH") from None
    chosen = vars(found).get(function)
    if not callable(chosen):
        near = difflib.get_close_matches(function, [n for n, value in vars(found).items() if callable(value)], n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{option} {name}: {module} has no function {function!r}{hint}")
    return chosen


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch that the model has itself; UserError where it has none."""
    return library_of(bare(model)).loss(batch)


def prunable_view(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    loss: Loss | None = None,
    halves: Mapping[str, torch.dtype] | None = None,
    tokens: str = "all",
    read: Callable[[Any], Any] = lambda batch: batch,
) -> PrunableView:
    """The linear layers of any model, but for its output head.

    include, exclude: globs over names of layers, or regular expressions behind "re:"; only those that match `include`
    (all without any), and none that matches `exclude`, with all that is in them. groups: name -> globs, the first that
    matches takes a layer and "other" takes the rest; by default as `models.external.layer_names.tower` has it. loss:
    (model, batch) -> scalar; by default the model's own (see models/external/libraries.py). Batches are keyword
    arguments (a dict), positional ones (a tuple or list), or the one argument. halves: of `load`.

    Padding: what a layer in the group "text" reads is real where the batch's `attention_mask` (a text decoder's:
    `decoder_attention_mask`) is not 0; without such a field, and in all other groups, everything is.

    tokens: of a language model, those that are counted: "all", "text", or "vision", in whose place it reads images.

    read: makes a batch as the model takes it of those that the view is given.

    Raises UserError for a glob that matches nothing and, naming the layer, for what cannot be pruned.
    """
    model = bare(model)
    library = library_of(model)
    if tokens != "all" and not library.image_ids:
        raise UserError(f"--calibrate_on {tokens}: {type(model).__name__} has no language model that reads images")
    names = [module_name(name) for name, _ in model.named_modules()]
    include, exclude = as_globs("--include", include, names), as_globs("--exclude", exclude, names)
    grouped = [glob for globs in (groups or {}).values() for glob in globs]
    for option, globs in {"--include": include, "--exclude": exclude, "--groups": grouped}.items():
        _check_globs(option, globs, names)
    heads = library.heads()
    dense = (*heads, *exclude, *_not_included(names, include))

    def group_of(key: str) -> str:
        layer = key.removesuffix(".weight")
        return (match_group(layer, groups) or "other") if groups else library.group_of(layer)

    def valid_tokens(key: str, given: Any) -> Tensor | None:
        batch = read(given)
        field = library.text_field(key) if group_of(key) == TEXT and isinstance(batch, Mapping) else None
        mask = batch.get(field) if field else None
        real = None if mask is None else mask != 0
        if tokens == "all" or field != "attention_mask" or "input_ids" not in batch:
            return real
        ids = batch["input_ids"]
        images = torch.isin(ids, torch.tensor(library.image_ids, device=ids.device))  # (B, T)
        counted = images if tokens == "vision" else ~images
        return counted if real is None else counted & real

    def reproducible_loss(batch: Any, generator: torch.Generator | None = None) -> Tensor:
        with seeded(generator.initial_seed() if generator else 0, next(model.parameters())):
            own = library.fitted(read(batch))
            return loss(model, own) if loss else library.loss(own)

    def reproducible_forward(batch: Any) -> Any:
        with seeded(0, next(model.parameters())):
            return library.forward(library.fitted(read(batch)))

    def outputs(own: nn.Module, given: Any) -> Outputs:
        batch = read(given)
        with seeded(0, next(own.parameters())):
            run = library_of(own)
            return outputs_of(run.output(run.fitted(batch)), batch, classifies=run.classifies)

    run = {"forward": reproducible_forward, "loss": reproducible_loss, "valid_tokens": valid_tokens, "outputs": outputs}
    view = PrunableView(model, group_of=group_of, keep_dense=dense, blocks=blocks_of(model), halves=halves, **run)
    if not heads & set(names):
        log.warning("no layer is known as the model's output head: none is kept dense (--exclude keeps layers dense)")
    log.info("kept dense: %s", listed(view.dense) or "none")
    convolutions = [module_name(name) for name, module in model.named_modules() if isinstance(module, _ConvNd)]
    if convolutions:
        log.info("kept dense, since they are convolutions (patch embeddings): %s", listed(convolutions))
    return view


def _check_globs(option: str, globs: Sequence[str], names: Sequence[str]) -> None:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            tops = listed(sorted({name.partition(".")[0] for name in names} - {""}))
            raise UserError(f"{option}: no layer of the model matches {glob!r}; its names begin with {tops}")


def _not_included(names: Sequence[str], include: Sequence[str]) -> list[str]:
    """The modules outside of what `include` matches that hold nothing of it."""
    if not include:
        return []
    chosen = {name for name in names if any(fnmatchcase(name, glob) for glob in include)}
    around = {".".join(name.split(".")[:i]) for name in chosen for i in range(name.count(".") + 1)}
    inside = tuple(f"{name}." for name in chosen)
    return [name for name in names if name not in chosen | around and not name.startswith(inside)]
