"""What an encoded image is and why it is none. PIL looks; it is imported here only when it is asked.

In: the bytes of a file. Out: pixels or a reason in a few words.
"""

import io
import zlib

import numpy as np
from numpy.typing import NDArray

from ii_dist.data.facts import NO_IMAGE

Box = tuple[int, int, int, int]  # left, top, right, bottom


class NotAnImage(Exception):
    """These bytes cannot be decoded; the message says why, without a file's name."""


def decode(content: NDArray[np.uint8], box: Box | None = None) -> NDArray[np.uint8]:
    """Pixels of an image, or of what lies in `box`: height x width x 3. Raises NotAnImage."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content.data)) as file:
            # Cut first: the conversion works pixel by pixel, and copies even what is RGB already.
            return np.array((file.crop(box) if box else file).convert("RGB"))
    except decoding_errors() as error:
        raise NotAnImage(sniffed(content) or in_words(error)) from None


def why_undecodable(content: NDArray[np.uint8]) -> str:
    """In a few words, also where only the run's own decoder refuses the file."""
    try:
        decode(content)
    except NotAnImage as error:
        return str(error)
    return sniffed(content) or "the decoder refuses it"


def sniffed(content: NDArray[np.uint8]) -> str:
    """What the first bytes give away of a file that is no image for training; "" where they look like one."""
    start = bytes(content[:512])
    if not start.strip(b"\0"):
        return "empty" if not len(content) or not content.any() else ""
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "GIF, which not every decoder reads"
    lower = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lower.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"{", b"[")):
        return "text or HTML"
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n\0" for byte in start)
    return "text or HTML" if printable == len(start) and start[:1] not in (b"P",) else ""


def in_words(error: BaseException) -> str:
    """One line of what a decoder said."""
    from PIL import Image

    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return (str(error) or type(error).__name__).splitlines()[0]


def decoding_errors() -> tuple[type[Exception], ...]:
    """All that PIL's decoders raise for damaged files."""
    from PIL import Image

    return (*NO_IMAGE, zlib.error, Image.DecompressionBombError)
