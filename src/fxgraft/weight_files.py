"""A Program's weights in safetensors files: written without a second copy, read memory-mapped."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensor

from fxgraft.atomic import write_file
from fxgraft.errors import SerializationError
from fxgraft.graph_json import check_weight_name
from fxgraft.program import Program
from fxgraft.strict_json import fields, parse, typed

SINGLE_FILE = "weights.safetensors"
INDEX_FILE = "weights.safetensors.index.json"
_FILE_NAME = re.compile(r"weights(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
SHARD_BYTES = 4 * 2**30
_ALIGNMENT = 64
_LENGTH = struct.Struct("<Q")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """How one weight of a Program is stored.

    Attributes:
        tensor: name in the files; names of one shared tensor have the same.
        parameter: whether it is a parameter; else a buffer.
        requires_grad: of the parameter.
        order: the stored dimensions, slowest first, where the weight is not stored row by row.
    """

    tensor: str
    parameter: bool
    requires_grad: bool
    order: list[int]


def is_weight_file(name: str) -> bool:
    """Whether a file name is one of those that ``write`` uses."""
    return _FILE_NAME.fullmatch(name) is not None


def describe(program: Program) -> tuple[dict[str, Entry], dict[str, torch.Tensor]]:
    """What to store: an entry per name, and every distinct tensor once.

    Raises:
        SerializationError: a weight has no data, or is of a kind that safetensors cannot hold.
    """
    entries: dict[str, Entry] = {}
    tensors: dict[str, torch.Tensor] = {}
    names: dict[object, str] = {}
    for name, weight in program.weights():
        _check_storable(check_weight_name(name), weight)
        order = _order(weight)
        key = names.setdefault(_identity(weight), name)
        if key == name:
            tensors[name] = weight.detach().permute(order)
        plain = order == sorted(order)
        entries[name] = Entry(
            key,
            isinstance(weight, torch.nn.Parameter),
            weight.requires_grad,
            [] if plain else order,
        )
    return entries, tensors


def _check_storable(name: str, weight: torch.Tensor) -> None:
    if weight.is_meta or isinstance(weight, FakeTensor):
        raise SerializationError(
            f"weight {name!r} has no data, it is on the meta device",
            "load the weights before saving",
        )
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.layout != torch.strided:
        raise SerializationError(
            f"weight {name!r} is a {type(weight).__name__} with layout {weight.layout}",
            "replace it by plain dense tensors before saving",
        )
    if weight.dtype not in _DTYPES:
        raise SerializationError(
            f"weight {name!r} has the dtype {weight.dtype}, which safetensors cannot hold",
            "convert it before saving",
        )


def _identity(weight: torch.Tensor) -> object:
    """Equal for two names of the same tensor."""
    if weight.numel() == 0:
        return id(weight)
    return (weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride(), weight.device)


def _order(weight: torch.Tensor) -> list[int]:
    """Dimensions from slowest to fastest in memory, if the weight fills its memory densely."""
    order = sorted(range(weight.dim()), key=lambda axis: (-weight.stride(axis), axis))
    dense = weight.permute(order).is_contiguous()
    return order if dense and not weight.is_contiguous() else list(range(weight.dim()))


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to one file, or to several with an index where they are large.

    Raises:
        OSError: the files cannot be written.
    """
    shards = list(_shards(tensors))
    files = [SINGLE_FILE]
    if len(shards) > 1:
        count = len(shards)
        files = [
            f"weights-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
        ]
        weight_map = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
        write_file(folder / INDEX_FILE, json.dumps({"weight_map": weight_map}, indent=1))
    for file, shard in zip(files, shards, strict=True):
        _write_shard(folder / file, shard)


def _shards(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_shard(path: Path, shard: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file, tensor by tensor.

    Its data starts at a multiple of 64 bytes, as memory from torch's allocator does: some
    kernels sum in another order, or are slower, on other addresses.
    """
    ordered = dict(sorted(shard.items(), key=lambda item: item[1].nbytes % _ALIGNMENT != 0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH.size) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(_LENGTH.pack(len(text)))
        file.write(text)
        for tensor in ordered.values():
            file.write(_raw(tensor))


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is in order and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


def read(folder: Path, entries: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """The weights by name, memory-mapped; shared tensors are one object.

    Raises:
        SerializationError: a file or weight is missing, or a file is truncated.
    """
    files = _locate(folder)
    readers: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    parameters: dict[str, torch.nn.Parameter] = {}
    for name, entry in entries.items():
        file = files.get(entry.tensor)
        if file is None:
            raise SerializationError(
                f"weight {name!r} is missing from {folder}", "restore the weight files"
            )
        if file not in readers:
            readers[file] = _open(folder / file)
        if entry.tensor not in tensors:
            tensors[entry.tensor] = _tensor(readers[file], entry, folder / file)
        weights[name] = tensors[entry.tensor]
        if entry.parameter:
            weights[name] = parameters.setdefault(
                entry.tensor,
                torch.nn.Parameter(tensors[entry.tensor], requires_grad=entry.requires_grad),
            )
    return weights


def _locate(folder: Path) -> dict[str, str]:
    """File of each stored tensor."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return dict.fromkeys(_open(folder / SINGLE_FILE).keys(), SINGLE_FILE)
    raw = fields(parse(index.read_bytes(), str(index)), str(index), {"weight_map": dict})
    weight_map = cast("dict[str, object]", raw["weight_map"])
    return {key: _file_name(file, str(index)) for key, file in weight_map.items()}


def _file_name(name: object, where: str) -> str:
    if not is_weight_file(typed(name, f"a file in {where}", str)):
        raise SerializationError(f"{where} names the file {name!r}", "restore the file")
    return cast(str, name)


def _open(file: Path) -> Any:
    try:
        return cast(Any, safe_open)(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SerializationError(
            f"{file} is missing, damaged or truncated: {error}", "restore the file"
        ) from error


def _tensor(reader: Any, entry: Entry, file: Path) -> torch.Tensor:
    try:
        tensor = cast(torch.Tensor, reader.get_tensor(entry.tensor))
    except SafetensorError as error:
        raise SerializationError(
            f"{file} has no tensor {entry.tensor!r}: {error}", "restore the file"
        ) from error
    if not entry.order:
        return tensor
    if sorted(entry.order) != list(range(tensor.dim())):
        raise SerializationError(
            f"weight {entry.tensor!r} has the order {entry.order} for {tensor.dim()} dimensions",
            "restore program.json",
        )
    inverse = [entry.order.index(axis) for axis in range(tensor.dim())]
    return tensor.permute(inverse)
