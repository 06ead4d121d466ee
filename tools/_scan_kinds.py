"""What a scan of a data set can find: each kind, how grave it is, and what it means for training.

In: nothing. Out: the table `KINDS`; everything else that scans or reports takes its words from here.
"""

from dataclasses import dataclass
from typing import Literal

Grade = Literal["bad", "wrong", "look", "harmless"]
GRADES: dict[Grade, str] = {
    "bad": "bad files, quarantined: training would put other images in their place",
    "wrong": "wrong, to be mended by hand",
    "look": "worth a look",
    "harmless": "harmless: read as they are",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table."""

    name: str
    grade: Grade
    says: str


_ROWS = (
    Kind("unreadable", "bad", "the system does not give the file's bytes"),
    Kind("empty", "bad", "no bytes, or only zeros"),
    Kind("text", "bad", "text or HTML, such as an error page of the server that it came from"),
    Kind("gif", "bad", "a GIF, whatever its name: DALI does not decode it"),
    Kind("other format", "bad", "an image of a format that DALI does not decode"),
    Kind("no image", "bad", "bytes of no known format"),
    Kind("truncated", "bad", "the file ends before the picture does"),
    Kind("undecodable", "bad", "the decoder gives up"),
    Kind("bomb", "bad", "the header promises more than 90 million pixels; not decoded"),
    Kind("listed", "bad", "decoded here, but in the list of bad files already, with the same bytes"),
    Kind("changed", "wrong", "not the bytes that the index says: index the data set again"),
    Kind("missing", "wrong", "named by the index, not there"),
    Kind("bad index", "wrong", "an index that cannot be used, such as for a label out of range"),
    Kind("empty class", "wrong", "a class folder without images"),
    Kind("unknown class", "wrong", "a class that the training images do not have"),
    Kind("same in two classes", "look", "the same bytes with two labels: one of them is wrong"),
    Kind("same in train and val", "look", "the same bytes in both splits: accuracy comes out too high"),
    Kind("same in one class", "look", "the same bytes more than once"),
    Kind("not indexed", "look", "in the folder, not in its index"),
    Kind("other name", "look", "not taken for an image, by the file's name"),
    Kind("format in disguise", "harmless", "an image of another format than its name says"),
    Kind("cmyk", "harmless", "CMYK colours; converted"),
    Kind("exif turn", "harmless", "marked as turned; used as stored, as other trainings on ImageNet do"),
    Kind("1x1", "harmless", "one pixel; enlarged"),
    Kind("tiny", "harmless", "a shorter side below 16 pixels; enlarged"),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ROWS}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. path: below the split's folder, or a class, or an index. detail: in a few words."""

    kind: str
    split: str
    path: str
    detail: str = ""
    sha256: str | None = None

    @property
    def grade(self) -> Grade:
        return KINDS[self.kind].grade
