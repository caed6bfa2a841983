"""Where models come from: aliases, hub ids, local folders, GGUF files, saved Programs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.placement import retarget
from fxgraft.program import Program
from fxgraft.sources import gguf_read_once, resolve

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
    if isinstance(found, Path) and found.exists():
        return _load_gguf(found, source) if found.is_file() else _load_folder(found, model_class)
    is_path = isinstance(source, Path) or source.endswith(".gguf") or source[:1] in (".", "/", "~")
    if is_path:
        raise InputError(f"argument 'model': {str(source)!r} does not exist", "check the path")
    return _load_hub(str(source), model_class)


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

        with gguf_read_once():
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
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(cast(Any, huggingface_hub).snapshot_download(name, allow_patterns=patterns))
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
    try:
        with _parameters_on_meta():
            model = loader.from_config(config, dtype=dtype)
    except Exception as error:  # whatever a model class raises on values that it does not expect
        raise InputError(
            f"{folder}/config.json describes no model that can be built: {error}",
            "repair it, or name another class with `model_class`",
        ) from error
    made = dict(model.named_buffers(remove_duplicate=False))
    model.to("meta").eval()
    return Loaded(model, lambda program: _fill(program, files, made, folder, loader), str(name))


@contextlib.contextmanager
def _parameters_on_meta() -> Generator[None]:
    """Build modules without storage for their parameters; buffers are computed as usual.

    A parameter that two modules share stays one.
    """
    kind = cast(Any, nn.Module)
    register = kind.register_parameter

    def on_meta(module: Any, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            meta = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            module._parameters[name] = meta

    kind.register_parameter = on_meta
    try:
        yield
    finally:
        kind.register_parameter = register


def _loader(config: Any, model_class: str | None) -> Any:
    import transformers

    if model_class is not None:
        if not hasattr(transformers, model_class):
            raise InputError(
                f"argument 'model_class': transformers has no {model_class!r}",
                "give a class such as 'AutoModelForCausalLM'",
            )
        return getattr(transformers, model_class)
    for architecture in cast("list[str]", getattr(config, "architectures", None) or []):
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

    def from_pretrained(self, folder: Path, **options: Any) -> Any:
        return self.architecture.from_pretrained(folder, **options)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be complete.

    Raises:
        InputError: there are none, one named by the index is missing, one is truncated, or the
            index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is damaged: {error}", "download it again") from error
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
    stored: dict[str, Any] = {}
    for file in files:
        reader = open_safetensors(file)
        stored |= dict.fromkeys(reader.keys(), reader)
    groups = [names for names in _shared_names(program) if program.weight(names[0]).is_meta]
    lost = [names[0] for names in groups if not (set(names) & (stored.keys() | made.keys()))]
    loaded = _load_whole(folder, loader, lost) if lost else {}
    for names in groups:
        meta = program.weight(names[0])
        value = _find(names, loaded, stored, made)
        if value is None:
            raise InputError(
                f"the model computes with a constant {names[0]!r} that {folder} does not hold",
                "load the model with transformers' from_pretrained, and capture that",
            )
        if value.shape != meta.shape:
            raise InputError(
                f"weight {names[0]!r} in {folder} has shape {tuple(value.shape)}, "
                f"the model needs {tuple(meta.shape)}",
                "use the checkpoint that belongs to this config.json",
            )
        value = value.to(meta.dtype)
        keep = isinstance(meta, nn.Parameter)
        weight = nn.Parameter(value, requires_grad=False) if keep else value
        for name in names:
            graphs.set_weight(program.graph_module, name, weight)
    retarget(program, torch.device("cpu"))


def _shared_names(program: Program) -> list[list[str]]:
    """The names of each weight: more than one where weights are tied."""
    groups: dict[int, list[str]] = {}
    for name, weight in program.weights():
        groups.setdefault(id(weight), []).append(name)
    return list(groups.values())


def _find(
    names: list[str],
    loaded: dict[str, torch.Tensor],
    stored: dict[str, Any],
    made: dict[str, torch.Tensor],
) -> torch.Tensor | None:
    """A weight's value under any of its names; None for a constant made while capturing."""
    for name in names:
        if name in loaded:
            return loaded[name]
        if name in stored:
            return stored[name].get_tensor(name)
    return next((made[name] for name in names if name in made), None)


def _load_whole(folder: Path, loader: Any, lost: list[str]) -> dict[str, torch.Tensor]:
    """All weights as transformers loads them, which converts those spelled or laid out otherwise.

    Raises:
        InputError: it finds no values for some of ``lost`` either, or shapes do not fit.
    """
    try:
        model, report = loader.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"the weights in {folder} do not fit its config.json: {error}",
            "use the checkpoint that belongs to this config.json",
        ) from error
    missing = report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}
    for name in lost:
        if name in missing:
            raise InputError(f"{folder} has no weight {name!r}", "use a complete checkpoint")
    model.eval()
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
