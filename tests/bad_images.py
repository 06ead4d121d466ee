"""One file of each kind that a data set goes wrong by."""

import io

from PIL import Image

from tests.images import picture


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_header(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header promises another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[at + 4 :]


def bad_files() -> dict[str, bytes]:
    """Kind -> content that training cannot use."""
    jpeg = encoded(picture(1, 90, 70))
    return {
        "empty": b"",
        "text": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "gif": encoded(picture(2, 40, 30), "GIF"),
        "other format": encoded(picture(3, 32, 32), "ICO"),
        "no image": bytes(range(128, 256)) * 20,
        "truncated": jpeg[: len(jpeg) // 2],
        "undecodable": jpeg[: jpeg.index(b"\xff\xc4") + 6] + b"\xff" * 300,
        "bomb": with_header(jpeg, 20000, 20000),
    }


def odd_files() -> dict[str, bytes]:
    """Kind -> content that is read as it is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "format in disguise": encoded(picture(4, 60, 50), "PNG"),
        "cmyk": encoded(picture(5, 60, 50).convert("CMYK")),
        "exif turn": encoded(picture(6, 60, 50), exif=exif),
        "1x1": encoded(picture(7, 1, 1)),
        "tiny": encoded(picture(8, 40, 9)),
    }
