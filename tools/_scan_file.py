"""Looks at one image file as closely as training will: header, every pixel, hash.

In: the bytes and the name of a file. Out: `Facts`. A header that promises too many pixels is believed, never decoded.
"""

import hashlib
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ii_dist.data.content import decoding_errors, in_words, sniffed

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 90_000_000
TINY_SIDE = 16
_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_SAME = {"MPO": "JPEG", "DIB": "BMP"}  # several pictures in one JPEG; a BMP without its file header
_DECODED_BY_DALI = frozenset({*_FORMATS.values(), "JPEG2000"})
_ORIENTATION = 0x0112


@dataclass(slots=True)
class Facts:
    """What a file is. sha256: hex, None where it could not be read. width, height: 0 where there is no header.

    kinds: what was found (`KINDS`) and the detail of each.
    """

    sha256: str | None = None
    length: int = 0
    width: int = 0
    height: int = 0
    kinds: dict[str, str] = field(default_factory=dict)


def unreadable(reason: str) -> Facts:
    return Facts(kinds={"unreadable": reason})


def look_at(content: bytes, suffix: str) -> Facts:
    """suffix: that of the file's name, in small letters, with the dot."""
    facts = Facts(hashlib.sha256(content).hexdigest(), len(content))
    words = sniffed(np.frombuffer(content, np.uint8))
    if words:
        kind = "empty" if words == "empty" else "gif" if words.startswith("GIF") else "text"
        facts.kinds[kind] = ""
        return facts
    _look_at_image(content, suffix, facts)
    return facts


def _look_at_image(content: bytes, suffix: str, facts: Facts) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            facts.width, facts.height = image.size
            if facts.width * facts.height > MOST_PIXELS:
                facts.kinds["bomb"] = f"{facts.width} x {facts.height} pixels"
                return
            name = _SAME.get(image.format or "", image.format or "")
            if name not in _DECODED_BY_DALI:
                facts.kinds["other format"] = name
                return
            mode, turn = image.mode, _turn(image)
            image.load()
    except Image.DecompressionBombError as error:
        facts.kinds["bomb"] = in_words(error).partition(" exceeds ")[0].removeprefix("Image size ").strip("()")
    except Image.UnidentifiedImageError:
        facts.kinds["no image"] = f"begins with {content[:4].hex(' ')}"
    except decoding_errors() as error:
        facts.kinds["truncated" if "truncated" in str(error).lower() else "undecodable"] = in_words(error)
    else:
        _note_oddities(facts, name, suffix, mode, turn)


def _turn(image: "Image.Image") -> object:
    """EXIF orientation; 1 where there is none. Damaged EXIF data do no harm to the picture."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except decoding_errors():
        return 1


def _note_oddities(facts: Facts, name: str, suffix: str, mode: str, turn: object) -> None:
    if _FORMATS.get(suffix, name) != name:
        facts.kinds["format in disguise"] = f"{name} named {suffix}"
    if mode == "CMYK":
        facts.kinds["cmyk"] = ""
    if turn not in (0, 1):
        facts.kinds["exif turn"] = f"orientation {turn}"
    if (facts.width, facts.height) == (1, 1):
        facts.kinds["1x1"] = ""
    elif min(facts.width, facts.height) < TINY_SIDE:
        facts.kinds["tiny"] = f"{facts.width}x{facts.height}"
