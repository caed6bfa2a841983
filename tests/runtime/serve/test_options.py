"""Options from the pipeline file and the command line; the address; the layer map."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, cast

import pytest

import fxgraft
from fxgraft.errors import InputError
from fxgraft.pipeline import PipelineFile
from fxgraft.runtime.engine import EngineOptions
from fxgraft.runtime.serve.model import layer_facts
from fxgraft.runtime.serve.options import ServeOptions, read_options
from fxgraft.runtime.serve.server import listen
from tests import models


def read(folder: Path, section: str, **changes: Any) -> ServeOptions:
    """Options of a pipeline file with this section."""
    file = folder / "p.yaml"
    file.write_text("model: x\n" + section)
    found = PipelineFile.read(file)
    return read_options(found.serve, changes, found.where)


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    section = "serve:\n  port: 9000\n  max_batch: 4\n  request_timeout: 30\n"
    options = read(tmp_path, section, port=9001, host=None, max_queue=0)
    assert (options.host, options.port, options.max_batch) == ("127.0.0.1", 9001, 4)
    assert (options.request_timeout, options.max_queue, options.capacity) == (30, 0, 4)
    assert options.engine == EngineOptions(max_batch=4)
    assert type(options.engine) is EngineOptions
    assert read(tmp_path, "") == ServeOptions()


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("serve:\n  prt: 1\n", {}, r"p\.yaml, line 3: .*'prt'; did you mean 'port'"),
        ("serve:\n  port: 70000\n", {}, r"p\.yaml, line 3: key 'port' .* 65535"),
        ("serve:\n  port: '80'\n", {}, r"p\.yaml, line 3: .*integer"),
        ("serve:\n  max_batch: 0\n", {}, r"p\.yaml, line 3: .*greater than"),
        ("serve: []\n", {}, r"p\.yaml, line 2: key 'serve'"),
        ("serve:\n  request_timeout: .inf\n", {}, r"p\.yaml, line 3: .*finite"),
        ("", {"port": -1}, r"option --port is -1: it should be greater than or equal to 0"),
        ("", {"grace_period": -1.0}, r"option --grace-period is -1\.0"),
    ],
)
def test_wrong_options_name_their_place(
    tmp_path: Path, section: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read(tmp_path, section, **changes)


def test_every_option_says_what_it_is() -> None:
    own = set(ServeOptions.model_fields) - set(EngineOptions.model_fields)
    assert [name for name in own if not ServeOptions.model_fields[name].description] == []


def test_an_address_in_use() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1"),
    ):
        listen("127.0.0.1", taken.getsockname()[1])


def test_an_address_that_does_not_exist() -> None:
    with pytest.raises(InputError, match="choose another --host"):
        listen("nowhere.invalid", 0)


def test_ops_of_a_mixed_model_lie_in_their_layers() -> None:
    program = fxgraft.capture(cast(Any, models.jamba()))
    layers, op_layers = layer_facts(program)
    assert [kind.split("+")[0] for kind in layers] == [
        "selective_scan", "attention", "selective_scan", "attention",
    ]  # fmt: skip
    # A Mamba layer keeps the state of its convolution and of its scan.
    assert op_layers == (0, 0, 1, 2, 2, 3)
