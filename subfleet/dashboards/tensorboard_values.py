"""What TensorBoard's event files hold, one function for each kind of value.

All of them return `Summary.Value`s. TensorBoard is imported when they are called: its
generated modules take a while, and type checkers cannot look into them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

# Chart by chart, the tags it shows, as regular expressions that must match from the tag's
# start: entries of dicts, such as tiers, are known only as rounds come.
LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "accuracy": {
        "super-network (global)": ("accuracy/global$",),
        "clients: before merging (local), after (own)": ("accuracy/(local|own)$",),
        "super-network, by tier": ("accuracy/tier/",),
        "clients, by tier": ("accuracy/(local|own)_tier/",),
        "loss": ("loss/",),
    },
    "cost": {
        "bytes of a round": ("cost/bytes_",),
        "FLOPs of a round": ("cost/flops$",),
    },
    "simulated": {
        "time, s": ("cost/sim_",),
        "energy of a round, J": ("cost/energy_j$",),
        "late and dropped clients": ("fleet/(late|dropped)$",),
    },
    "platform": {
        "clients per second": ("platform/clients_per_s$",),
        "seconds, by phase of a round": ("platform/seconds/",),
        "memory of the coordinator, bytes": ("platform/memory$",),
        "retries and memory that ran out": ("platform/retries$", "platform/out_of_memory$"),
    },
    "fairness": {
        "worst tenth of clients": ("accuracy/(local|own)_worst10$",),
        "worst tenth, by tier": ("accuracy/local_worst10_tier/",),
        "spread over clients (sd)": ("accuracy/(local|own)_sd$",),
        "spread, by tier": ("accuracy/local_sd_tier/",),
    },
}


def scalar(tag: str, value: float) -> Any:
    """One point of a curve."""
    return _summary().Value(tag=tag, simple_value=value)


def histogram(tag: str, edges: np.ndarray, heights: np.ndarray) -> Any:
    """Bars between `edges`, [bars + 1] and increasing, of given `heights`, [bars]."""
    from tensorboard.plugins.histogram.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    bars = np.stack([edges[:-1], edges[1:], heights], axis=1).astype(np.float32)
    metadata = create_summary_metadata(display_name=None, description=None)
    return _summary().Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(bars))


def picture(tag: str, png: bytes) -> Any:
    """A PNG file as a picture."""
    summary = _summary()
    width, height = struct.unpack(">II", png[16:24])  # of its header, IHDR
    image = summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    return summary.Value(tag=tag, image=image)


def text(tag: str, markdown: str) -> Any:
    """A text; its tag in TensorBoard is `tag/text_summary`."""
    from torch.utils.tensorboard.summary import text

    return text(tag, markdown).value[0]


def layout(*, simulated: bool) -> Any:
    """The charts of the tab "Custom Scalars"; `simulated` adds those of devices' time."""
    from torch.utils.tensorboard.summary import custom_scalars

    charts = {
        category: {title: ["Multiline", list(tags)] for title, tags in charts.items()}
        for category, charts in LAYOUT.items()
        if simulated or category != "simulated"
    }
    return custom_scalars(charts).value[0]


def session_start(settings: Mapping[str, bool | float | str], time_s: float) -> Any:
    """A run's settings, for the tab "HParams".

    No experiment is described beside them. TensorBoard then compares the settings of all runs
    itself, puts those that differ first, and offers every curve's last point as a metric.
    """
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    proto: Any = plugin_data_pb2
    start = proto.SessionStartInfo(start_time_secs=time_s)
    for name, value in settings.items():
        kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[name], kind, value)
    return _session(metadata.SESSION_START_INFO_TAG, session_start_info=start)


def session_end(time_s: float) -> Any:
    """The run reached its end."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    api: Any = api_pb2
    proto: Any = plugin_data_pb2
    end = proto.SessionEndInfo(status=api.STATUS_SUCCESS, end_time_secs=time_s)
    return _session(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def _session(tag: str, **info: Any) -> Any:
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    proto: Any = plugin_data_pb2
    about = metadata.create_summary_metadata(proto.HParamsPluginData(**info))
    return _summary().Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)


def _summary() -> Any:
    from tensorboard.compat.proto import summary_pb2

    proto: Any = summary_pb2
    return proto.Summary
