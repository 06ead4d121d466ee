"""Numbers, words and pictures in TensorBoard's event files: the folder `tb/` of a run.

In: values by tag, texts, PNG files. Out: scalars with unit and meaning, the layout of CUSTOM SCALARS, the settings that
the HPARAMS tab compares runs by. Each step is there once, however often the run was killed.
"""

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from ii_dist.config.errors import CheckpointError, ClusterError
from ii_dist.config.run_folder import RunFolder
from ii_dist.metrics.event_file import EventFile, cut_to_step, event_files, next_path, replace_settings
from ii_dist.metrics.hparams import Setting, finished_summary, hparams_summaries
from ii_dist.metrics.layout import GROUPS, Chart, Lines
from ii_dist.metrics.tags import TAGS, check_tags

_PNG = b"\x89PNG\r\n\x1a\n"
_RGB = 3


class TensorBoardBoard:
    """Writes one attempt of a run. Ahead of a tag's first value stand its unit and meaning (the card's info sign)."""

    def __init__(
        self, folder: RunFolder, *, resumed_step: int = 0, total_steps: int = 0, settings: Mapping[str, Setting]
    ) -> None:
        """settings: what the run is compared by; none = it is no row of the HPARAMS tab."""
        _check_installed()
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._value_of: Any = Summary.Value
        self._described: set[str] = set()
        self._resumed_step, self._total_steps, self._finished = resumed_step, total_steps, False
        where = folder.tensorboard
        try:
            for path in event_files(where):
                cut_to_step(path, resumed_step)
            if settings:
                replace_settings(where, hparams_summaries(folder.root.name, settings))
            self._file = EventFile(next_path(where))
            self._file.take_back_steps(resumed_step + 1)
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be written ({error.strerror}); free or change it") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        check_tags(values)
        new = [tag for tag in values if tag not in self._described]
        if new:
            # In values without a number: TensorBoard's fast reader drops what is said beside a plain number.
            self._file.add(step, _summary(_description(tag) for tag in new))
        # One event for all values: a third of the cost of one event each.
        value_of = self._value_of
        self._file.add(step, _summary(value_of(tag=tag, simple_value=value) for tag, value in values.items()))
        if new:
            self._described.update(new)
            self._file.add(step, layout_summary(self._described))
        if step == self._total_steps and not self._finished:
            self._file.add(step, finished_summary())
            self._finished = True

    def text(self, tag: str, markdown: str) -> None:
        self._file.add(self._resumed_step, _summary([_text(tag, markdown)]))

    def pictures(self, step: int, pngs: Mapping[str, bytes]) -> None:
        self._file.add(step, _summary(_image(tag, png) for tag, png in pngs.items()))

    def close(self) -> None:
        self._file.close()


def write_pictures(folder: RunFolder, group: str, step: int, pngs: Mapping[str, bytes]) -> None:
    """Add `pngs` (tag -> content) as the TensorBoard run `group`, in a folder of its own below `tb/`: a process that
    trains there is left alone. Raises CheckpointError, ClusterError."""
    _check_installed()
    where = folder.tensorboard / group
    try:
        file = EventFile(next_path(where))
        file.add(step, _summary(_image(tag, png) for tag, png in pngs.items()))
        file.close()
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be written ({error.strerror}); free or change it") from None


def layout_summary(tags: Iterable[str]) -> Any:
    """The charts of CUSTOM SCALARS that show something of `tags`; later ones take the place of earlier ones."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    there = set(tags)
    shown = {title: [chart for chart in charts if there.intersection(chart.tags)] for title, charts in GROUPS.items()}
    categories = [
        layout_pb2.Category(title=title, chart=[_chart(chart) for chart in charts]) for title, charts in shown.items()
    ]
    layout = layout_pb2.Layout(category=[category for category in categories if category.chart])
    content = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto())
    value = Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=content, metadata=metadata.create_summary_metadata())
    return Summary(value=[value])


def _chart(chart: Chart) -> Any:
    from tensorboard.plugins.custom_scalar import layout_pb2

    if isinstance(chart, Lines):
        patterns = [f"{tag}$" for tag in chart.tags]  # matched from the start of a tag on
        return layout_pb2.Chart(title=chart.title, multiline=layout_pb2.MultilineChartContent(tag=patterns))
    series = layout_pb2.MarginChartContent.Series(value=chart.middle, lower=chart.low, upper=chart.high)
    return layout_pb2.Chart(title=chart.title, margin=layout_pb2.MarginChartContent(series=[series]))


def _description(tag: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    unit = TAGS[tag].unit
    says = f"{TAGS[tag].says} Unit: {unit}." if unit else TAGS[tag].says
    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    metadata = SummaryMetadata(plugin_data=plugin, summary_description=says)
    return Summary.Value(tag=tag, metadata=metadata)


def _summary(values: Iterable[Any]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=values)


def _text(tag: str, markdown: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.text import metadata

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    content = TensorProto(dtype="DT_STRING", string_val=[markdown.encode()], tensor_shape=shape)
    said = metadata.create_summary_metadata(display_name="", description="")
    return Summary.Value(tag=tag, tensor=content, metadata=said)


def _image(tag: str, png: bytes) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    assert png.startswith(_PNG), tag
    width, height = struct.unpack(">II", png[16:24])
    return Summary.Value(
        tag=tag, image=Summary.Image(height=height, width=width, colorspace=_RGB, encoded_image_string=png)
    )


def _check_installed() -> None:
    try:
        import tensorboard.compat.proto.event_pb2  # noqa: F401
    except ImportError as error:
        raise ClusterError(
            f"metrics.boards tensorboard: {error}; install it (python -m pip install tensorboard==2.21.0) "
            "or leave it out of metrics.boards"
        ) from None
