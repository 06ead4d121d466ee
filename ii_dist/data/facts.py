"""Says what a file is: length, hash, format, size in pixels, or why it is no image.

In: a file or its bytes. Out: `FileFacts`; the pixels are not decoded.
"""

import hashlib
import io
import struct
from dataclasses import dataclass
from pathlib import Path

# What Pillow's format readers raise for bytes that are not what they claim to be.
NO_IMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What an encoded image is, from its bytes and its header; no pixel was decoded.

    problem: "" for an image, else why it is none, in a few words; the image's fields are then "" and 0. A file that
    could not be read has length -1.
    """

    length: int
    sha256: bytes
    format: str
    mode: str
    width: int
    height: int
    problem: str = ""


def examine_bytes(content: bytes) -> FileFacts:
    """Facts of one encoded image. Width and height are those of the stored pixels (no EXIF turn)."""
    from PIL import Image

    length, sha256 = len(content), hashlib.sha256(content).digest()
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            return FileFacts(length, sha256, image.format or "", image.mode, width, height)
    except Image.UnidentifiedImageError:
        problem = "not an image" if content else "empty file, not an image"
    except (*NO_IMAGE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problem = (str(error) or type(error).__name__).splitlines()[0]
    return FileFacts(length, sha256, "", "", 0, 0, problem)


def examine_file(path: str | Path) -> FileFacts:
    """Facts of one file; one that cannot be read has a problem, too."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return FileFacts(-1, b"", "", "", 0, 0, f"cannot be read: {error.strerror}")
    return examine_bytes(content)
