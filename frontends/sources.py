"""Where models come from: aliases, hub ids, local folders, GGUF files, saved Programs."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fxgraft.errors import InputError
from fxgraft.program import Program
from fxgraft.sources import resolve

_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Loaded:
    """A model ready to be captured.

    Attributes:
        model: with real weights, or on the meta device.
        fill: called with the captured Program to put real weights into it.
        name: the source, as the user would write it again.
    """

    model: nn.Module
    fill: Callable[[Program], None]
    name: str


def is_program(source: str | Path) -> bool:
    """Whether ``source`` is the folder of a saved Program."""
    return (Path(source) / "program.json").is_file()


def load(source: str | Path, model_class: str | None = None) -> Loaded:
    """Load a model by alias, path or hub id.

    Raises:
        InputError: it does not exist, is damaged, or is no model.
    """
    found = resolve(source)
    if isinstance(found, Path):
        return _load_gguf(found, source) if found.is_file() else _load_folder(found, model_class)
    if str(source).endswith(".gguf") or str(source).startswith((".", "/", "~")):
        raise InputError(f"argument 'model': {str(source)!r} does not exist", "check the path")
    return _load_hub(str(found), model_class)


def _keep(program: Program) -> None:
    """Weights are in the captured module already."""


def _load_gguf(file: Path, name: str | Path) -> Loaded:
    from transformers import AutoModelForCausalLM

    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != _GGUF_MAGIC:
        raise InputError(f"{file} is not a GGUF file", "give a .gguf file of a language model")
    try:
        import gguf

        with _gguf_read_once(gguf):
            _check_gguf_length(cast(Any, gguf).GGUFReader(str(file)), file)
            model = cast(Any, AutoModelForCausalLM).from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
    except ImportError as error:
        raise InputError(
            "reading GGUF needs the packages gguf and accelerate",
            "run: pip install 'fxgraft[gguf]'",
        ) from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{file} cannot be read, it is damaged or truncated: {error}",
            "download the file again and compare its size",
        ) from error
    return Loaded(model, _keep, str(name))


@contextlib.contextmanager
def _gguf_read_once(gguf: Any) -> Iterator[None]:
    """Let transformers parse the file and build its table of names once instead of many times."""
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.cache(lambda path, mode="r": reader(path, mode))
    gguf.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def _check_gguf_length(reader: Any, file: Path) -> None:
    end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    size = file.stat().st_size
    if size < end:
        raise InputError(
            f"{file} is truncated: {size} bytes, its tensors need {end}", "download it again"
        )


def _load_folder(folder: Path, model_class: str | None) -> Loaded:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds neither config.json (a transformers model) nor program.json "
            "(a saved Program)",
            "give the folder that holds one of them",
        )
    return _load_transformers(folder, model_class, folder)


def _load_hub(name: str, model_class: str | None) -> Loaded:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"argument 'model': {name!r} is no local path and cannot be fetched from the hub: "
            f"{str(error).splitlines()[0]}",
            "check the spelling and the network, or give a local folder",
        ) from error
    return _load_transformers(folder, model_class, name)


def _load_transformers(folder: Path, model_class: str | None, name: str | Path) -> Loaded:
    from transformers import AutoConfig

    try:
        config = cast(Any, AutoConfig).from_pretrained(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}/config.json cannot be used: {error}", "repair it") from error
    files = weight_files(folder)
    loader = _loader(config, model_class)
    dtype = getattr(config, "dtype", None) or torch.float32
    with _parameters_on_meta():
        model = cast(Any, loader).from_config(config, dtype=dtype)
    made = dict(model.named_buffers(remove_duplicate=False))
    model.to("meta").eval()
    return Loaded(model, lambda program: _fill(program, files, made, folder, loader), str(name))


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules without storage for their parameters; buffers are computed as usual."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None:
            meta = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            module._parameters[name] = meta

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _loader(config: Any, model_class: str | None) -> Any:
    import transformers

    if model_class is not None:
        if not hasattr(transformers, model_class):
            raise InputError(
                f"argument 'model_class': transformers has no {model_class!r}",
                "give a class such as 'AutoModelForCausalLM'",
            )
        return getattr(transformers, model_class)
    for architecture in getattr(config, "architectures", None) or []:
        found = getattr(transformers, architecture, None)
        if found is not None and hasattr(found, "_from_config"):
            return _ByArchitecture(found)
    return transformers.AutoModelForCausalLM


@dataclass(frozen=True)
class _ByArchitecture:
    """Gives a concrete transformers class the interface of the auto classes."""

    architecture: Any

    def from_config(self, config: Any, dtype: torch.dtype) -> nn.Module:
        return self.architecture._from_config(config, dtype=dtype)

    def from_pretrained(self, folder: Path, dtype: torch.dtype | str) -> nn.Module:
        return self.architecture.from_pretrained(folder, dtype=dtype, low_cpu_mem_usage=True)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be complete.

    Raises:
        InputError: there are none, one named by the index is missing, or one is truncated.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{folder} has no .safetensors weights", "convert the weights to safetensors first"
        )
    for file in files:
        open_safetensors(file)
    return files


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file memory-mapped.

    Raises:
        InputError: it is missing or truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} cannot be read, it is missing, damaged or truncated: {error}",
            "download the file again",
        ) from error


def _fill(
    program: Program,
    files: list[Path],
    made: dict[str, torch.Tensor],
    folder: Path,
    loader: Any,
) -> None:
    """Replace meta weights by memory-mapped ones, and by buffers made at construction.

    Names that the checkpoint spells differently (fused experts, renamed prefixes, tied weights)
    come from transformers' own loading.
    """
    stored: dict[str, tuple[Any, str]] = {}
    for file in files:
        reader = open_safetensors(file)
        for key in reader.keys():  # noqa: SIM118
            stored[key] = (reader, key)
    wanted = dict(program.weights())
    missing = [name for name in wanted if name not in stored and name not in made]
    loaded = _load_whole(folder, loader) if missing else {}
    for name, meta in wanted.items():
        if name in loaded:
            value = loaded[name]
        elif name in stored:
            reader, key = stored[name]
            value = reader.get_tensor(key)
        elif name in made:
            value = made[name]
        else:
            raise InputError(f"{folder} has no weight {name!r}", "use a complete checkpoint")
        if value.shape != meta.shape:
            raise InputError(
                f"weight {name!r} in {folder} has shape {tuple(value.shape)}, "
                f"the model needs {tuple(meta.shape)}",
                "use the checkpoint that belongs to this config.json",
            )
        keep = isinstance(meta, nn.Parameter)
        value = value.to(meta.dtype)
        program.set_weight(name, nn.Parameter(value, requires_grad=False) if keep else value)


def _load_whole(folder: Path, loader: Any) -> dict[str, torch.Tensor]:
    model = loader.from_pretrained(folder, dtype="auto").eval()
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
