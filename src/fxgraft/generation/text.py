"""From tokens to text, token by token and byte by byte."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, cast

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Any text will do: it keeps decoders from treating the token after it as the first of a text.
_ANCHOR = "abcdef"


class Vocabulary:
    """The bytes that each token of a tokenizer contributes to a text.

    Texts are concatenations of these bytes, up to what a tokenizer does at the start of a text
    (dropping a space) and in cleaning up. Tokens that hold part of a UTF-8 character are exact.
    Special tokens contribute their own names.

    Args:
        tokenizer: of transformers: byte-level, with byte fallback, or any other.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = cast(dict[int, Any], getattr(tokenizer, "added_tokens_decoder", {}))
        self._known = {index: str(token.content).encode() for index, token in added.items()}
        self.special = frozenset(cast(list[int], getattr(tokenizer, "all_special_ids", [])))
        decoders = _decoder_types(tokenizer)
        self._has_byte_tokens = "ByteFallback" in decoders
        self._byte_of = _byte_alphabet() if "ByteLevel" in decoders else {}
        ids = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
        self._anchor = cast(list[str], tokenizer.convert_ids_to_tokens(ids))
        self._anchor_text = str(tokenizer.convert_tokens_to_string(self._anchor))

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes of a token; none for ids that the tokenizer does not know."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> bytes:
        name = cast("str | None", self._tokenizer.convert_ids_to_tokens(token))
        if not name:
            return b""
        byte = _BYTE_TOKEN.fullmatch(name) if self._has_byte_tokens else None
        if byte:
            return bytes([int(byte[1], 16)])
        if self._byte_of and all(char in self._byte_of for char in name):
            return bytes(self._byte_of[char] for char in name)
        text = str(self._tokenizer.convert_tokens_to_string([*self._anchor, name]))
        return text.removeprefix(self._anchor_text).encode()


class TextStream:
    """Text of one row's tokens as they come, holding back incomplete characters.

    Args:
        vocabulary: of the tokenizer.
        skip_special_tokens: leave out tokens such as end-of-text.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool = True) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes, often some characters, sometimes none."""
        if self._skip and token in self._vocabulary.special:
            return ""
        return self._decoder.decode(self._vocabulary.bytes_of(token))

    def finish(self) -> str:
        """What is left at the end: replacement characters for an incomplete one."""
        return self._decoder.decode(b"", final=True)


def _decoder_types(tokenizer: Any) -> set[str]:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    try:
        state = json.loads(decoder.__getstate__())
    except (AttributeError, TypeError, ValueError):
        # Decoders written in Python have no JSON state; tokens then go through the tokenizer.
        return set()
    return {state["type"], *(inner["type"] for inner in state.get("decoders", []))}


def _byte_alphabet() -> dict[str, int]:
    """Byte of each character in byte-level vocabularies (GPT-2's ``bytes_to_unicode``).

    Printable bytes stand for themselves, the others for the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + order): byte for order, byte in enumerate(others)})
    return alphabet
