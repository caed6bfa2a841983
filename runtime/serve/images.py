"""Images in messages: from a ``data:`` address to pixels, within limits."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import TYPE_CHECKING

from fastapi import HTTPException

from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.refusals import wrong_field

if TYPE_CHECKING:
    from PIL.Image import Image

_DATA = re.compile(r"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
# Processors scale the shorter side: of a thin strip that would make a huge image.
_MOST_RATIO = 50
_SHOWN = 40


def read_image(address: str, place: str, options: ServeOptions) -> Image:
    """Decode an image that is written in its address.

    Args:
        address: ``data:image/...;base64,...``; no other address is followed.
        place: of the address in the request, for messages.
        options: limits on bytes and pixels.

    Returns:
        The image in RGB, the first one of an animation, turned as it says itself.

    Raises:
        HTTPException: status 400, naming the place and what is wrong with it.
    """
    raw = _bytes_of(address, place, options.max_image_bytes)
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(raw), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(place, "too many pixels", options) from error
    except Exception as error:  # whatever a decoder raises on bytes that it does not expect
        raise _undecodable(place) from error
    _check_size(*image.size, place, options)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        raise _undecodable(place) from error


def _bytes_of(address: str, place: str, limit: int) -> bytes:
    found = _DATA.match(address)
    if found is None:
        shown = address if len(address) <= _SHOWN else f"{address[:_SHOWN]}..."
        raise wrong_field(
            place,
            f"is {shown!r}: send the image itself as 'data:image/png;base64,...', this server "
            "fetches nothing",
            code="invalid_image_url",
        )
    size = (len(address) - found.end()) * 3 // 4
    if size > limit:
        raise wrong_field(
            place, f"has {size} bytes, the limit is {limit}: send a smaller image",
            code="image_too_large",
        )  # fmt: skip
    try:
        return base64.b64decode(address[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise wrong_field(place, f"is no valid base64: {error}", code="invalid_image") from error


def _check_size(width: int, height: int, place: str, options: ServeOptions) -> None:
    if width * height > options.max_image_pixels:
        raise _too_large(place, f"{width} x {height} pixels", options)
    if max(width, height) > _MOST_RATIO * min(width, height):
        raise wrong_field(
            place,
            f"has {width} x {height} pixels: one side may be {_MOST_RATIO} times the other at most",
            code="invalid_image",
        )


def _too_large(place: str, size: str, options: ServeOptions) -> HTTPException:
    return wrong_field(
        place, f"has {size}, the limit is {options.max_image_pixels}: send a smaller image",
        code="image_too_large",
    )  # fmt: skip


def _undecodable(place: str) -> HTTPException:
    known = ", ".join(_FORMATS)
    return wrong_field(place, f"is no image that can be read: send {known}", code="invalid_image")
