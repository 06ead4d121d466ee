"""What TensorBoard's HPARAMS tab compares runs by: some settings of each, and a few numbers that came of them.

In: a config and the ranks it runs on. Out: `compared_settings`, and summaries for the event files.
"""

from collections.abc import Mapping
from typing import Any

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import RunConfig
from ii_dist.metrics.tags import TAGS

Setting = str | float | bool

SHOWN_AT_FIRST = 5  # columns of settings that TensorBoard shows until one asks for more
RESULTS = ("eval/top1", "eval/top5", "train/loss", "throughput/images_per_s", "time/data_wait_share")


def compared_settings(cfg: RunConfig, ranks: int) -> dict[str, Setting]:
    """Dotted key -> value, for the keys of `metrics.compare`, and how many ranks. Raises ConfigError."""
    return {key: _value_at(cfg, key) for key in cfg.metrics.compare} | {"ranks": ranks}


def _value_at(cfg: RunConfig, key: str) -> Setting:
    node: Any = cfg
    for part in key.split("."):
        if part not in getattr(type(node), "model_fields", {}):
            raise ConfigError(f"metrics.compare: {key!r} is no key of a config; leave it out or see ii-dist show")
        node = getattr(node, part)
    if hasattr(type(node), "model_fields"):
        raise ConfigError(f"metrics.compare: {key!r} is a group of keys; name single ones")
    return node if isinstance(node, bool | int | float | str) else str(node)


def hparams_summaries(name: str, settings: Mapping[str, Setting]) -> list[Any]:
    """Summaries that make a run with these settings a row of the HPARAMS tab. name: shown for the row.

    All attempts of a run write into one folder, which is one session there.
    """
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    types = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    # No domain: of a text it would be this run's one value, and runs with other values would not be shown.
    infos = [
        api_pb2.HParamInfo(
            name=key,
            type=types.get(type(value), api_pb2.DATA_TYPE_FLOAT64),
            differs=number < SHOWN_AT_FIRST,  # those come first; which do differ, one run cannot know
        )
        for number, (key, value) in enumerate(settings.items())
    ]
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=tag, description=TAGS[tag].says)
        for tag in RESULTS
    ]
    start = plugin_data_pb2.SessionStartInfo(group_name=name)
    for key, value in settings.items():
        if isinstance(value, bool):
            start.hparams[key].bool_value = value
        elif isinstance(value, str):
            start.hparams[key].string_value = value
        else:
            start.hparams[key].number_value = value
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
    return [
        _summary("_hparams_/experiment", plugin_data_pb2.HParamsPluginData(experiment=experiment)),
        _summary("_hparams_/session_start_info", plugin_data_pb2.HParamsPluginData(session_start_info=start)),
    ]


def finished_summary() -> Any:
    """Says in the HPARAMS tab that a run is done."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    return _summary("_hparams_/session_end_info", plugin_data_pb2.HParamsPluginData(session_end_info=end))


def _summary(tag: str, content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    said = metadata.create_summary_metadata(content)
    return Summary(value=[Summary.Value(tag=tag, metadata=said, tensor=metadata.NULL_TENSOR)])
