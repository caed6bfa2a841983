"""Saving and loading Programs: round trips, and what cannot be saved."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxgraft import weight_files
from fxgraft.argument_json import decode_argument, encode_argument
from fxgraft.errors import SerializationError
from fxgraft.frontends.exporting import export
from fxgraft.history import Record, Size
from fxgraft.kernels.spec import dims
from fxgraft.program import Input, Program
from fxgraft.serialize import load, save
from fxgraft.state import insert_state
from tests.core.saved_programs import attending, kill_at, paired, pooled, run_in_child, same, tied


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    return tied()


@pytest.fixture
def saved(program: Program, tmp_path: Path) -> Path:
    return save(program, tmp_path / "saved")


# Round trips


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (tied, {"batch": 4, "sequence": 9}),
        (pooled, {"batch": 1, "height": 31, "width": 52}),
        (attending, {"batch": 1, "sequence": 4}),
    ],
)
def test_a_loaded_program_computes_the_same_bits(
    build: Callable[[], Program], sizes: dict[str, int], tmp_path: Path
) -> None:
    program = build()
    loaded = load(save(program, tmp_path / "p"))
    for inputs in (program.example(1, **sizes), program.example(2, height=40, width=40)
                   if build is pooled else program.example(2)):  # fmt: skip
        assert same(program(**inputs), loaded(**inputs))


def test_a_step_graph_comes_back_with_its_state_inputs(tmp_path: Path) -> None:
    step = insert_state(attending())
    loaded = load(save(step.program, tmp_path / "p"))
    inputs = (torch.tensor([[3, 4, 5]]), *step.empty_state(1))
    assert same(step.program.graph_module(*inputs), loaded.graph_module(*inputs))
    key = loaded.placeholders[1]
    assert dims(key)[2] == loaded.symbols["past"]
    assert loaded.dimensions["past"].minimum == 0


def test_shapes_are_symbolic_again(program: Program, saved: Path) -> None:
    loaded = load(saved)
    batch, sequence = loaded.symbols["batch"], loaded.symbols["sequence"]
    assert batch != sequence
    assert dims(loaded.output_nodes["logits"]) == (batch, sequence, 11)
    for before, after in zip(program.graph.nodes, loaded.graph.nodes, strict=True):
        if isinstance(before.meta.get("val"), Tensor):
            assert len(dims(before)) == len(dims(after)), before
            assert before.meta["val"].dtype == after.meta["val"].dtype, before


def test_a_dimension_that_follows_from_another_stays_so(tmp_path: Path) -> None:
    program = paired()
    loaded = load(save(program, tmp_path / "p"))
    short, long = loaded.placeholders
    assert dims(long)[1] == 2 * dims(short)[1]
    inputs = {"short": torch.randn(3, 4), "long": torch.randn(3, 8)}
    assert same(program(**inputs), loaded(**inputs))


def test_two_names_of_one_size_stay_equal(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    specs = (Input("x", torch.float32, ("rows",)), Input("y", torch.float32, ("lines",)))
    program = export(Sum(), specs, {"x": torch.randn(4), "y": torch.randn(4)})
    first, second = load(save(program, tmp_path / "p")).placeholders
    assert dims(first) == dims(second)


def test_graph_text_metadata_and_history_are_kept(tmp_path: Path) -> None:
    program = tied()
    program.origin.update(source="here", context_length=None, bound=math.inf, eos=[1, 2])
    program.history.append(
        Record(
            "seal", {"layer": 3}, "behaviour", 0.1, 0.2, Size(1, 2, 3, 4), Size(5, 6, 7, 8),
            math.nan, "outputs", ["one line"], {"added": []},
        )
    )  # fmt: skip
    program.history.append(
        Record("fold", {}, "exact", 1, 0.0, Size(1, 1, 1, 1), Size(1, 1, 1, 1), None, "none")
    )
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    first.meta["made_by"] = "seal"
    loaded = load(save(program, tmp_path / "p"))
    assert str(loaded.graph) == str(program.graph)
    for before, after in zip(program.graph.nodes, loaded.graph.nodes, strict=True):
        assert before.name == after.name
        for key in ("module", "source", "made_by"):
            assert before.meta.get(key) == after.meta.get(key)
    assert repr(loaded.history) == repr(program.history)
    assert loaded.origin == program.origin
    assert loaded.inputs == program.inputs
    assert loaded.outputs == program.outputs
    assert loaded.dimensions == program.dimensions


def test_tied_weights_stay_tied_and_are_stored_once(program: Program, tmp_path: Path) -> None:
    shared = program.copy()
    shared.set_weight("embed.weight", shared.weight("head.weight"))
    loaded = load(save(shared, tmp_path / "p"))
    assert loaded.weight("head.weight") is loaded.weight("embed.weight")
    assert loaded.count_bytes() == shared.count_bytes() == program.count_bytes()
    assert (tmp_path / "p" / "weights.safetensors").stat().st_size < 2 * 4 * 11 * 8 + 400
    names = [name for name, _ in loaded.weights()]
    assert sorted(names) == sorted(name for name, _ in shared.weights())


def test_parameters_and_buffers_keep_their_kind(program: Program, tmp_path: Path) -> None:
    frozen = program.copy()
    weight = nn.Parameter(program.weight("norm.weight").detach(), requires_grad=False)
    frozen.set_weight("norm.weight", weight)
    loaded = load(save(frozen, tmp_path / "p"))
    kinds = {name: (type(w), w.requires_grad) for name, w in loaded.weights()}
    assert kinds == {name: (type(w), w.requires_grad) for name, w in frozen.weights()}
    assert kinds["norm.weight"] == (nn.Parameter, False)
    assert kinds["norm.bias"] == (nn.Parameter, True)
    assert kinds["scale"][0] is Tensor


def test_weights_are_memory_mapped_and_not_written_through(saved: Path, program: Program) -> None:
    loaded = load(saved)
    weight = loaded.weight("head.weight")
    assert mapped_file(weight.data_ptr()) == str(saved / "weights.safetensors")
    with torch.no_grad():
        weight.zero_()
    ids = torch.ones(1, 2, dtype=torch.int64)
    assert same(load(saved)(ids=ids), program(ids=ids))


def mapped_file(address: int) -> str:
    """The file that is mapped into memory at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[-1]
    return ""


def test_memory_order_of_weights_is_kept(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    changed.set_weight("norm.weight", torch.arange(16.0)[::2])
    changed.set_weight("head.weight", nn.Parameter(torch.randn(8, 11).T))
    loaded = load(save(changed, tmp_path / "p"))
    assert loaded.weight("head.weight").stride() == (1, 11)
    assert torch.equal(loaded.weight("head.weight"), changed.weight("head.weight"))
    assert torch.equal(loaded.weight("norm.weight"), torch.arange(16.0)[::2])


def test_overlapping_weights_are_stored_apart(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    base = torch.randn(20)
    changed.set_weight("norm.weight", base[:8])
    changed.set_weight("norm.bias", base[4:12])
    loaded = load(save(changed, tmp_path / "p"))
    assert torch.equal(loaded.weight("norm.weight"), base[:8])
    assert torch.equal(loaded.weight("norm.bias"), base[4:12])


def test_weights_of_every_dtype_survive(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    ones = torch.ones(3, 5)
    dtypes = [
        torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
        torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
    ]  # fmt: skip
    for place, dtype in enumerate(dtypes):
        changed.set_weight(f"kinds.{place}", ones.to(dtype))
        changed.set_weight(f"scalars.{place}", torch.tensor(1).to(dtype))
    changed.set_weight("empty", torch.empty(0, 4))
    loaded = load(save(changed, tmp_path / "p"))
    for name, weight in changed.weights():
        found = loaded.weight(name)
        assert found.dtype == weight.dtype
        assert torch.equal(found.to(torch.complex128), weight.to(torch.complex128)), name


def test_mapped_weights_are_aligned_like_allocated_ones(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Parameter(torch.randn(3))
            self.large = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.large(x) * self.small.sum()

    spec = Input("x", torch.float32, ("rows", 16))
    program = export(Odd(), (spec,), {"x": torch.randn(4, 16)})
    loaded = load(save(program, tmp_path / "p"))
    assert loaded.weight("large.weight").data_ptr() % 64 == 0


def test_large_weights_are_sharded(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 50)
    folder = save(program, tmp_path / "p")
    files = sorted(path.name for path in folder.iterdir())
    assert files[1:-1] == [f"weights-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert files[-1] == "weights.safetensors.index.json"
    inputs = program.example()
    assert same(program(**inputs), load(folder)(**inputs))
    monkeypatch.undo()
    save(program, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["program.json", "weights.safetensors"]


def test_a_program_can_be_saved_over_the_folder_it_was_loaded_from(saved: Path) -> None:
    loaded = load(saved)
    inputs = loaded.example()
    before = loaded(**inputs)
    for _ in range(2):
        save(loaded, saved)
    assert same(before, loaded(**inputs))
    assert same(before, load(saved)(**inputs))


def test_saved_files_are_readable_by_everyone_the_umask_allows(saved: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in saved.iterdir()}
    (saved.parent / "other").write_text("")
    assert modes == {(saved.parent / "other").stat().st_mode & 0o777}


def test_arguments_of_every_kind_survive(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    node = next(n for n in changed.graph.nodes if n.op == "call_function")
    values: list[Any] = [
        None, True, 7, -1.5, math.inf, -math.inf, "text", 2 + 3j, torch.bfloat16, torch.strided,
        torch.channels_last, torch.device("cuda:1"), slice(None, 3, None), [1, [2]], (1, (2, node)),
    ]  # fmt: skip
    for value in values:
        record = json.loads(json.dumps(encode_argument(value, torch.device("cpu"), "here")))
        assert decode_argument(record, {node.name: node}, "here") == value
    nan = decode_argument(encode_argument(math.nan, torch.device("cpu"), "here"), {}, "here")
    assert math.isnan(nan)


def test_the_programs_own_device_becomes_the_cpu() -> None:
    record = encode_argument(torch.device("cuda:0"), torch.device("cuda", 0), "here")
    assert decode_argument(record, {}, "here") == torch.device("cpu")


# What cannot be saved


def test_weights_without_data_are_refused(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    changed.set_weight("norm.bias", torch.empty(8, device="meta"))
    with pytest.raises(SerializationError, match=r"'norm\.bias' has no data"):
        save(changed, tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_node_that_calls_python_is_refused_by_name(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    node = next(n for n in changed.graph.nodes if n.op == "call_function")
    node.target = print
    with pytest.raises(SerializationError, match=f"{node.name!r} calls .*print"):
        save(changed, tmp_path / "p")


@pytest.mark.parametrize("value", [{1, 2}, torch.dtype, {3: "three"}])
def test_origin_must_be_json(program: Program, tmp_path: Path, value: object) -> None:
    changed = program.copy()
    changed.origin = {"odd": value}
    with pytest.raises(SerializationError, match=r"origin\.odd"):
        save(changed, tmp_path / "p")


def test_another_kind_of_folder_is_not_replaced(program: Program, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SerializationError, match=r"holds no program\.json"):
        save(program, tmp_path)


def test_other_files_in_the_folder_are_kept(program: Program, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "weights-00001-of-00002.safetensors").write_text("from an older save")
    save(program, saved)
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["notes.txt", "program.json", "weights.safetensors"]


# Interrupted saves


def shifted(program: Program) -> Program:
    """The Program with another weight, so that old and new can be told apart."""
    changed = program.copy()
    changed.set_weight("norm.bias", nn.Parameter(torch.ones(8)))
    return changed


def is_old(folder: Path, program: Program) -> bool:
    """Whether the folder holds the Program and not the shifted one."""
    bias = load(folder).weight("norm.bias")
    assert torch.equal(bias, torch.ones(8)) or torch.equal(bias, program.weight("norm.bias"))
    return torch.equal(bias, program.weight("norm.bias"))


@pytest.mark.parametrize("event", [0, 3, 6, 9])
def test_a_killed_save_leaves_the_old_program(program: Program, saved: Path, event: int) -> None:
    code = run_in_child(kill_at(event, lambda: save(shifted(program), saved)))
    assert code == -signal.SIGKILL
    assert is_old(saved, program)
    save(shifted(program), saved)
    assert not is_old(saved, program)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_old_program(
    program: Program, saved: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    left = iter(range(calls))

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SerializationError, match="disk is full") as caught:
        save(shifted(program), saved)
    assert "free some space" in caught.value.remedy
    assert is_old(saved, program)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_weights_that_do_not_fit_the_disk_leave_the_old_program(
    program: Program, saved: Path
) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        save(shifted(program), saved)

    assert run_in_child(limited) == 3
    assert is_old(saved, program)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
