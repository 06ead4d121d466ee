"""Makes images smaller: the shorter side to a given length, as RGB JPEG.

In: an encoded image. Out: another encoded image, or none where it had better stay as it is.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]


class Undecodable(ValueError):
    """The file is no image, or a damaged one; says why."""


@dataclass(frozen=True, slots=True)
class Shrunk:
    """An image made smaller; width and height in pixels."""

    content: U8
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Shrink:
    """Shorter side in pixels and JPEG quality."""

    shorter_side: int
    quality: int

    def __call__(self, content: U8) -> Shrunk | None:
        """None for a JPEG that is small enough and not CMYK: decoding it again would only cost quality.

        The longer side follows in proportion, nothing is enlarged. Colours become those that training sees: no alpha,
        no profile, no palette; EXIF, which training does not turn by, is dropped. Raises Undecodable.
        """
        from PIL import Image

        try:
            with Image.open(io.BytesIO(content.data)) as image:
                small = min(image.size) <= self.shorter_side
                if small and image.format == "JPEG" and image.mode in ("RGB", "L"):
                    return None
                rgb = image.convert("RGB")
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).splitlines()[0]
            raise Undecodable(reason) from None
        rgb = rgb.resize(self.size(*rgb.size), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        # A comment would otherwise be carried over from the source.
        rgb.save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0", comment=b"")
        return Shrunk(np.frombuffer(buffer.getbuffer(), dtype=np.uint8), *rgb.size)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after shrinking, the longer side rounded to the nearest pixel."""
        shorter = min(width, height)
        if shorter <= self.shorter_side:
            return width, height
        return (
            (width * self.shorter_side + shorter // 2) // shorter,
            (height * self.shorter_side + shorter // 2) // shorter,
        )
