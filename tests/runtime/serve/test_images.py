"""Images in chats: OpenAI's own client against the real engine, and everything that is refused."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import struct
import threading
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI
from PIL import Image

import fxgraft
from fxgraft.generation import SamplingOptions
from fxgraft.passes.seal import Seal, SteeringVector
from fxgraft.runtime.engine import Engine, EngineOptions
from fxgraft.runtime.serve.image_chats import find_processor
from tests.runtime.serve import _vision
from tests.runtime.serve._app import app_of, chat, saying, service_of
from tests.runtime.serve._client import in_loop, running
from tests.runtime.serve._process import server
from tests.runtime.serve._real import real_app
from tests.runtime.serve._threaded import served
from tests.runtime.serve._vision import address, data, expected, part, picture, text_part

CHAT = "/v1/chat/completions"
PLACE = "messages.0.content.1.image_url.url"
COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _vision.write_model(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def app(folder: Path) -> FastAPI:
    return _vision.vision_app(folder, max_queue=32, chunk_tokens=8)


@pytest.fixture(scope="module")
def site(app: FastAPI) -> Generator[str]:
    with served(app) as found:
        yield found


@pytest.fixture
def client(site: str) -> Generator[OpenAI]:
    with OpenAI(base_url=f"{site}/v1", api_key="none", max_retries=0) as made:
        yield made


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    """A chat of one message with these parts."""
    messages = [{"role": "user", "content": list(parts)}]
    options = {"max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    return {"model": "tiny", "messages": messages, **options, **fields}


def message(contents: Sequence[Any]) -> Any:
    """A user's message: texts, and images as addresses."""
    parts = [text_part(item) if isinstance(item, str) else part(address(item)) for item in contents]
    return {"role": "user", "content": parts}


def ask(client: OpenAI, contents: Sequence[Any], **options: Any) -> Any:
    """The client's answer to one message."""
    return client.chat.completions.create(
        model="tiny", messages=[message(contents)], max_tokens=COUNT, temperature=0,
        extra_body={"ignore_eos": True}, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "contents",
    [
        [picture(1), "what is it?"],
        ["before ", picture(2, 90, 33), " and after"],
        ["a", picture(3), "b", picture(4, 33, 70), picture(5)],
        [picture(6, 1, 1)],
        ["only text"],
        ["text ", "in two parts"],
    ],
)
def test_answers_are_those_of_generate(client: OpenAI, folder: Path, contents: list[Any]) -> None:
    tokens, text = expected(folder, contents, COUNT)
    whole = ask(client, contents)
    assert whole.choices[0].message.content == text
    assert whole.usage.prompt_tokens == len(tokens)
    chunks = list(ask(client, contents, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text


def test_the_images_count(client: OpenAI) -> None:
    texts = {ask(client, [picture(seed), "?"]).choices[0].message.content for seed in range(5)}
    assert len(texts) > 2


def test_plain_text_goes_through_the_processors_template(client: OpenAI, folder: Path) -> None:
    """A content that is a string, and messages of others, have the same form as parts."""
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "only text"}], max_tokens=COUNT,
        temperature=0, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.choices[0].message.content == expected(folder, ["only text"], COUNT)[1]
    longer = client.chat.completions.create(
        model="tiny", max_tokens=2, temperature=0,
        messages=[
            {"role": "developer", "content": "be brief"},
            message([picture(1), "?"]),
            {"role": "assistant", "content": "a cat"},
            message(["sure?"]),
        ],
    )  # fmt: skip
    assert longer.usage is not None
    text = "[system] be brief[user] ?[assistant] a cat[user] sure?[assistant]"
    assert longer.usage.prompt_tokens == len(text) + _vision.TOKENS


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats(client: OpenAI, folder: Path, kind: str) -> None:
    """The same pixels, whatever carries them; a wrong name of the type does not matter."""
    buffer = io.BytesIO()
    picture(7).save(buffer, kind)
    decoded = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    sent = body(part(data(buffer.getvalue(), "jpeg")), text_part("?"))
    answer = client.chat.completions.create(
        model="tiny", messages=sent["messages"], max_tokens=COUNT, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.choices[0].message.content == expected(folder, [decoded, "?"], COUNT)[1]


def test_a_photo_that_lies_on_its_side_is_turned(client: OpenAI, folder: Path) -> None:
    image, buffer = picture(8, 64, 32), io.BytesIO()
    notes = Image.Exif()
    notes[0x0112] = 6  # turned by a quarter
    image.save(buffer, "PNG", exif=notes)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    answer = client.chat.completions.create(
        model="tiny", messages=body(part(data(buffer.getvalue())))["messages"],
        max_tokens=COUNT, temperature=0, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.choices[0].message.content == expected(folder, [turned], COUNT)[1]
    assert answer.choices[0].message.content != expected(folder, [image], COUNT)[1]


def test_several_choices_share_the_images(client: OpenAI, folder: Path) -> None:
    answer = ask(client, [picture(1), "what?"], n=3)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [expected(folder, [picture(1), "what?"], COUNT)[1]] * 3


def test_many_at_once(site: str, folder: Path) -> None:
    asked = [[picture(n % 3), "?"] if n % 4 else [f"text {n}"] for n in range(12)]

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{site}/v1", api_key="none") as client:
            answers = await asyncio.gather(*(
                client.chat.completions.create(
                    model="tiny", messages=[message(contents)], max_tokens=COUNT, temperature=0,
                    extra_body={"ignore_eos": True},
                )
                for contents in asked
            ))  # fmt: skip
        return [answer.choices[0].message.content or "" for answer in answers]

    assert asyncio.run(ask_all()) == [expected(folder, one, COUNT)[1] for one in asked]


def test_a_conversation_reuses_its_prefix(client: OpenAI, app: FastAPI) -> None:
    """The image of the first turn is known in the second one; another image is not."""
    first = ask(client, ["a long beginning of a prompt ", picture(11), " of text"])
    again = ask(client, ["a long beginning of a prompt ", picture(11), " of other text"])
    other = ask(client, ["a long beginning of a prompt ", picture(12), " of text"])
    known = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, again, other)]
    assert known == [0, 48, 32]
    assert service_of(app).worker.stats.blocks_used == 0


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A grey PNG that says this size, whatever it holds."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip


HEAD = "data:image/png;base64,"
WHOLE = address(picture(1))
REFUSED: list[tuple[str, str, str]] = [
    ("https://example.com/cat.png", "invalid_image_url", "'https://example.com/cat.png': send"),
    ("http://127.0.0.1:1/x", "invalid_image_url", "fetches nothing"),
    ("file:///etc/passwd", "invalid_image_url", "fetches nothing"),
    ("/etc/passwd", "invalid_image_url", "fetches nothing"),
    ("", "invalid_image_url", "fetches nothing"),
    ("data:text/html;base64,aGk=", "invalid_image_url", "fetches nothing"),
    ("data:image/png,abc", "invalid_image_url", "fetches nothing"),
    ("data:image/png;base64,@@@@", "invalid_image", "no valid base64"),
    ("data:image/png;base64,abc", "invalid_image", "no valid base64"),
    ("data:image/png;base64,é===", "invalid_image", "no valid base64"),
    ("data:image/png;base64,", "invalid_image", "send PNG, JPEG, WEBP, GIF"),
    (data(b"this is no image"), "invalid_image", "send PNG, JPEG, WEBP, GIF"),
    (data(b"%PDF-1.4 and more"), "invalid_image", "send PNG, JPEG, WEBP, GIF"),
    (data(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), "invalid_image", "send PNG"),
    (WHOLE[: len(HEAD) + 400], "invalid_image", "send PNG, JPEG, WEBP, GIF"),
    (data(png(100, 100, b"short")), "invalid_image", "send PNG, JPEG, WEBP, GIF"),
    (data(png(0, 10)), "invalid_image", "send PNG, JPEG, WEBP, GIF"),
    (data(png(5000, 5000)), "image_too_large", "5000 x 5000 pixels, the limit is 16777216"),
    (data(png(100_000, 100_000)), "image_too_large", "the limit is 16777216"),
    (data(png(10_000, 1)), "invalid_image", "one side may be 50 times the other"),
]


@in_loop
async def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    """Status 400 for each, naming the part; the server goes on."""
    folder = _vision.write_model(tmp_path)
    app = _vision.vision_app(folder, max_image_bytes=2**15)
    async with running(app) as client:
        for url, code, words in REFUSED:
            for stream in (False, True):
                sent = body(text_part("what?"), part(url), stream=stream)
                answer = await client.post(CHAT, sent)
                assert answer.status == 400, url
                assert (answer.error["param"], answer.error["code"]) == (PLACE, code), url
                assert words in answer.error["message"], answer.error
                assert f"'{PLACE}'" in answer.error["message"]
        big = await client.post(CHAT, body(text_part("?"), part(data(bytes(2**15 + 1)))))
        assert (big.status, big.error["code"]) == (400, "image_too_large")
        assert "limit is 32768" in big.error["message"]
        fine = await client.post(CHAT, body(part(WHOLE), text_part("what?")))
        assert fine.status == 200
        assert service_of(app).is_idle
        assert service_of(app).worker.stats.failed == 0


@in_loop
async def test_numbers_of_images(tmp_path: Path) -> None:
    app = _vision.vision_app(_vision.write_model(tmp_path), max_images=2)
    async with running(app) as client:
        three = await client.post(CHAT, body(*[part(WHOLE)] * 3))
        assert (three.status, three.error["code"]) == (400, "too_many_images")
        assert three.error["param"] == "messages.0.content.2.image_url.url"
        long = await client.post(CHAT, body(*[part(WHOLE)] * 2, text_part("x" * 300)))
        assert (long.status, long.error["code"]) == (400, "context_length_exceeded")
        written = await client.post(CHAT, body(text_part("an <image> in a text")))
        assert (written.status, written.error["param"]) == (400, "messages")
        assert (await client.post(CHAT, body(*[part(WHOLE)] * 2))).status == 200


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_text_model_takes_no_images(stream: bool) -> None:
    """Content in parts of text is answered as ever."""
    sent = body(text_part("what?"), part(WHOLE), stream=stream)
    for app in (app_of(saying("x")), real_app()):
        async with running(app) as client:
            answer = await client.post(CHAT, sent)
            assert (answer.status, answer.error["code"]) == (400, "images_not_supported")
            assert answer.error["param"] == PLACE
            assert "this model takes no images" in answer.error["message"]
            assert (await client.post(CHAT, body(text_part("a"), text_part("b")))).status == 200


WRONG_PARTS: list[tuple[Any, str, str]] = [
    (5, "messages.0.content", "a text or a list of parts"),
    ({"type": "text", "text": "a"}, "messages.0.content", "a text or a list of parts"),
    (["a"], "messages.0.content.0", "whose type is 'text' or 'image_url'"),
    ([None], "messages.0.content.0", "whose type is 'text' or 'image_url'"),
    ([{"text": "a"}], "messages.0.content.0", "whose type is 'text' or 'image_url'"),
    ([{"type": "input_audio"}], "messages.0.content.0", "whose type is 'text' or 'image_url'"),
    ([{"type": ["text"]}], "messages.0.content.0", "whose type is 'text' or 'image_url'"),
    ([{"type": "text"}], "messages.0.content.0.text", "required"),
    ([{"type": "text", "text": 3}], "messages.0.content.0.text", "string"),
    ([{"type": "image_url"}], "messages.0.content.0.image_url", "required"),
    ([part(cast(Any, 3))], "messages.0.content.0.image_url.url", "string"),
    ([{"type": "image_url", "image_url": WHOLE}], "messages.0.content.0.image_url", "object"),
    (
        [{"type": "image_url", "image_url": {"url": WHOLE, "detail": "high"}}],
        "messages.0.content.0.image_url.detail",
        "should be 'auto'",
    ),
]


@in_loop
async def test_parts_of_the_wrong_form_are_named() -> None:
    async with running(app_of(saying("x"))) as client:
        for content, param, words in WRONG_PARTS:
            sent = chat() | {"messages": [{"role": "user", "content": content}]}
            answer = await client.post(CHAT, sent)
            assert (answer.status, answer.error["param"]) == (400, param), content
            assert words in answer.error["message"], answer.error


def test_the_command_serves_a_saved_model(folder: Path, tmp_path: Path) -> None:
    """Captured with images, saved, and named in a pipeline file; the processor is found."""
    _vision.capture(folder).save(tmp_path / "tiny")
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        "model: tiny\npasses: [optimize]\nbackend: torch\noptions: {mode: eager}\n"
        "serve:\n  port: 0\n  memory_bytes: 4194304\n"
    )
    contents = [picture(1), "what?"]
    with (
        contextlib.chdir(tmp_path),
        server(file) as process,
        OpenAI(base_url=f"{process.address}/v1", api_key="none") as client,
    ):
        answer = ask(client, contents)
    assert answer.choices[0].message.content == expected(folder, contents, COUNT)[1]


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    sent = body(text_part("?"), part("https://example.com/cat.png"))["messages"]
    with pytest.raises(openai.BadRequestError, match="fetches nothing") as refused:
        client.chat.completions.create(model="tiny", messages=sent)
    assert (refused.value.code, refused.value.param) == ("invalid_image_url", PLACE)


def test_nothing_is_fetched(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by this server nor by the processor behind it."""
    connect, opened = socket.socket.connect, list[Any]()
    own = threading.get_ident()

    def watched(self: socket.socket, target: Any) -> None:
        if threading.get_ident() != own:
            opened.append(target)
        connect(self, target)

    monkeypatch.setattr(socket.socket, "connect", watched)
    sent = body(part("http://127.0.0.1:9/cat.png"))["messages"]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=sent)
    assert opened == []


@in_loop
async def test_a_model_without_a_processor_answers_texts(tmp_path: Path) -> None:
    """The reason is in each refusal; the tokenizer's template does for texts."""
    folder = _vision.write_model(tmp_path)
    (folder / "processor_config.json").unlink()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    app = _vision.vision_app(folder)
    async with running(app) as client:
        refused = await client.post(CHAT, body(text_part("?"), part(WHOLE)))
        assert (refused.status, refused.error["code"]) == (400, "images_not_supported")
        assert "no image processor" in refused.error["message"]
        assert (await client.post(CHAT, body(text_part("hello")))).status == 200


@in_loop
async def test_no_template_at_all(tmp_path: Path) -> None:
    app = _vision.vision_app(_vision.write_model(tmp_path, template=None))
    async with running(app) as client:
        for sent in (body(text_part("?")), body(text_part("?"), part(WHOLE))):
            answer = await client.post(CHAT, sent)
            assert (answer.status, answer.error["code"]) == (400, "no_chat_template")


def test_processors_are_found_or_the_reason_is(folder: Path, tmp_path: Path) -> None:
    assert find_processor(str(folder)).image_processor is not None
    assert "not known where the model came from" in find_processor("")
    assert "no image processor" in find_processor(str(tmp_path / "missing"))


@pytest.mark.parametrize("chunk", [5, 64])
def test_an_image_and_inputs_of_the_request(folder: Path, tmp_path: Path, chunk: int) -> None:
    """SEAL's vector by name and strength, each with images: as alone with that vector only."""
    vector = SteeringVector(
        vector=4 * torch.randn(32, generator=torch.Generator().manual_seed(3)),
        convention="E-RT", layer=1, model="",
    ).save(tmp_path / "vector")  # fmt: skip
    common: dict[str, Any] = {
        "layer": 1, "within": "everywhere", "tokenizer": str(folder), "any_model": True, "most": 99,
    }  # fmt: skip
    program = _vision.capture(folder)
    options: dict[str, Any] = {"backend": "torch", "options": {"mode": "eager"}}
    choosing = fxgraft.compile(program, [Seal(vectors={"one": vector}, **common)], **options)
    steered = fxgraft.compile(program, [Seal(vector=vector, **common)], **options)
    plain = fxgraft.compile(program, **options)
    tokens, _ = expected(folder, ["a\n\nb", picture(1), "c\n\nd\n\n"], 1)
    images = pixels_of(folder, picture(1))
    engine = Engine(choosing, EngineOptions(max_batch=4, memory_bytes=2**22, chunk_tokens=chunk))
    sampling = SamplingOptions(max_new_tokens=COUNT, eos_token_id=())
    requests = [
        engine.submit(tokens, sampling, inputs={"seal_vector": name}, images=images)
        for name in ("none", "one")
    ]
    while engine.step():
        pass
    answers = [
        one.generate([tokens], images=images, max_new_tokens=COUNT, eos_token_id=[])
        for one in (plain, steered)
    ]
    wanted = [answer[0, len(tokens) :].tolist() for answer in answers]
    assert [request.tokens for request in requests] == wanted
    assert wanted[0] != wanted[1]


def pixels_of(folder: Path, image: Image.Image) -> dict[str, torch.Tensor]:
    """What the processor makes of an image."""
    pixels = find_processor(str(folder)).image_processor(image, return_tensors="pt")
    return {"pixel_values": pixels["pixel_values"]}
