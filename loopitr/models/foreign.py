"""Safe reading of model files from elsewhere: no code from a hub, and one-line errors for unreadable files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from loopitr.reading import read_object

MOST_LAYERS, LARGEST = 1000, 2**31
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
SHOWN = 300  # letters of an error that is not of this package
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def check_no_kernel(config: Any, source: str) -> None:
    """Refuse a config that would make transformers download code.

    transformers takes the name of an attention implementation with a slash (`owner/name`) for a repository of the hub,
    and runs its code.

    Raises:
        ValueError: `config`, the content of a config.json, names such an attention.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name in ATTENTION and "/" in str(value):
                raise ValueError(f"{source}: its config.json asks for the attention {value!r}, which is code on a hub")
            check_no_kernel(value, source)


def refused_objects(error: Exception) -> str | None:
    """What to tell the user if `torch.load` refused a file that has more than weights; None: it failed otherwise."""
    if not re.search("unsupported (global|class)|not an allowed global", str(error), re.IGNORECASE):
        return None
    return "it holds Python objects besides tensors; reading those could run code: save only its weights"


def config_of(source: str, **hub_arguments: Any) -> dict[str, Any]:
    """The content of the config.json of a local folder or a hub id.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or holds something other than an object.
    """
    from transformers import PreTrainedConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    path = Path(source, hub_arguments.get("subfolder") or "", "config.json")
    if path.parent.is_dir():
        read_object(path)  # transformers raises errors of many kinds for a file that is not an object.
    with one_line_errors(source):
        config, _ = PreTrainedConfig.get_config_dict(source, **hub_arguments)
        adapter = find_adapter_config_file(source, **hub_arguments)
    if adapter is not None:  # transformers would load it, or even a model elsewhere that it names, without a word.
        raise ValueError(f"{source} holds an adapter of peft (adapter_config.json), which is not loaded: merge it")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{source}: its config.json asks for a quantisation, which is not supported")
    check_no_kernel(config, source)
    _check_numbers(config, source)
    return config


def _check_numbers(value: Any, source: str, name: str = "") -> None:
    """Refuse a config with numbers for which a model could not be built within hours, or in any memory."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_numbers(inner, source, str(key))
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, source, name)
    elif isinstance(value, int) and value > (MOST_LAYERS if re.search("layer|depth|block", name) else LARGEST):
        raise ValueError(f"{source}: {name} in its config.json is too large, {value}")


def check_shards(source: str, subfolder: str = "") -> None:
    """Check the list of files of weights in a local folder, if there is one: it names files of that folder.

    Raises:
        ValueError: it does not.
    """
    path = Path(source, subfolder, "model.safetensors.index.json")
    if not path.is_file():
        return
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} is damaged: it has no weight_map")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name or not (path.parent / name).is_file():
            raise ValueError(f"{path} names {name!r}, which is no file in that folder")


def check_types(model: nn.Module, source: str, *, subfolder: str = "", **hub_arguments: Any) -> None:
    """Check the types in which the weights of a model are saved: transformers casts any type without a word.

    Raises:
        ValueError: a weight is saved as integers, as quantised weights are, or in another type that is no number of at
            least 16 bits with a floating point.
    """
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    ends = {_end(name) for name in floats}  # The beginning differs where a part of a model is loaded.
    for file in weight_files(source, subfolder, **hub_arguments):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (`content` is not a dictionary)
                kind = content.get_slice(name).get_dtype()
                if kind not in FLOATS and (name in floats or _end(name) in ends):
                    raise ValueError(f"{source}: {name} is saved as {kind}, wanted one of {', '.join(FLOATS)}")


def _end(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-2:])


def weight_files(source: str, subfolder: str = "", **hub_arguments: Any) -> list[str]:
    """The safetensors files that transformers reads in a folder, or for a hub id whose files have been downloaded."""
    from transformers.utils import cached_file

    folder = Path(source, subfolder)

    def find(name: str) -> str | None:
        if folder.is_dir():
            return str(folder / name) if (folder / name).is_file() else None
        quiet = {"_raise_exceptions_for_missing_entries": False, "local_files_only": True}
        return cached_file(source, name, **{**hub_arguments, **quiet}, subfolder=subfolder)  # type: ignore[arg-type]

    names = ["model.safetensors"]
    if find(names[0]) is None and (index := find("model.safetensors.index.json")) is not None:
        names = sorted({*read_object(index)["weight_map"].values()})
    return [file for file in map(find, names) if file is not None]


def check_weights(model: nn.Module, source: str) -> None:
    """
    Raises:
        ValueError: a weight is NaN or infinite, as after a divergence.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and not all(bound.isfinite() for bound in parameter.detach().aminmax()):
            raise ValueError(f"{source}: its weights are damaged: {name} is not finite")


@contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """A context for reading weights, configs and tokenizers, whose libraries raise many kinds of errors.

    Raises:
        OSError: damaged weights; other OSErrors, and errors of memory or missing packages are unchanged.
        ValueError: any other error, as one line that names `source`.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{source}: its weights are damaged ({error})") from error
    except (OSError, MemoryError, ModuleNotFoundError):
        raise
    except ValueError as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if source in reason and len(reason) <= SHOWN:
            raise
        raise ValueError(_shortened(reason if source in reason else f"{source}: {reason}")) from error
    except Exception as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        first = f"{type(error).__name__} {first}" if isinstance(error, LookupError) else first
        raise ValueError(_shortened(f"{source} cannot be loaded: {refused_objects(error) or first}")) from error


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
