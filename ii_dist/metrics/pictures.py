"""Pictures in TensorBoard beside a run's curves.

In: PNG files as bytes, the step they belong to. Out: an event file in a folder of its own below ``tb/``, so that a
training process that still writes its events there is left alone.
"""

import struct
from collections.abc import Mapping

from ii_dist.config.errors import CheckpointError, ClusterError
from ii_dist.config.run_folder import RunFolder

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGBA = 4


def write_pictures(folder: RunFolder, group: str, step: int, pngs: Mapping[str, bytes]) -> None:
    """Add `pngs` (tag -> content) to the TensorBoard run `group`. Raises CheckpointError, ClusterError."""
    try:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter
    except ImportError as error:
        raise ClusterError(f"{error}; install it: python -m pip install tensorboard==2.21.0") from None
    values = []
    for tag, png in pngs.items():
        assert png.startswith(_SIGNATURE), tag
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(height=height, width=width, colorspace=_RGBA, encoded_image_string=png)
        values.append(Summary.Value(tag=tag, image=image))
    where = folder.tensorboard / group
    try:
        writer = FileWriter(str(where))
        writer.add_summary(Summary(value=values), global_step=step)
        writer.close()
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be written ({error.strerror}); free or change it") from None
