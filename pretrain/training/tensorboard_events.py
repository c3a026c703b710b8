"""A run's files for TensorBoard: curves, texts, and hyper-parameters with final figures. The only file on tensorboard.

Written here, event by event: torch's `SummaryWriter` does it on a thread that ends, and all later calls fail, when a
disk is full.
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pretrain.storage.patient_file import PatientFile

# Where the keys of `metrics.jsonl` are shown: their own beginning (`eval/`, `layer/`) is a group, or one of these.
_GROUPS = {
    "perf": "tokens_per_second tokens_per_second_per_gpu step_seconds mfu mfu_causal memory_bytes data_wait_seconds",
    "data": "damaged_documents damaged_tokens",
}
_GROUP_OF_KEY = {key: group for group, keys in _GROUPS.items() for key in keys.split()}
_GROUP_OF_BEGINNING = {"seconds": "perf/", "epoch": "data/", "tokens": "data/", "eval": "", "layer": ""}
_NOT_CURVES = ("step", "timestamp", "attempt")

WRITE_SECONDS = 1.0  # that a step's values wait at most for those of more steps
HPARAMS_FILE = "events.out.tfevents.0000000000.hparams"  # the first by name, so the first to be read
# What the tab HPARAMS compares, of what a model and its training depend on, and the figures that it shows beside them:
# the last value of each curve.
HPARAMS_OPTIONS = ("run.seed", "data.seq_len", "model", "optim", "schedule", "train", "parallel")
HPARAMS_FIGURES = ("eval/loss", "eval/bits_per_byte", "train/loss", "train/tokens", "perf/tokens_per_second")


@cache
def tag_of(key: str) -> str:
    """Name of the curve, here and on Weights & Biases, of a key of `metrics.jsonl`."""
    beginning, slash, _ = key.partition("/")
    if slash:
        return _GROUP_OF_BEGINNING.get(beginning, "train/") + key
    return f"{_GROUP_OF_KEY.get(key, 'train')}/{key}"


def curves_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Values by tag of a line of `metrics.jsonl`, without those that are not there.

    The tokens of a step are those of its training line: an evaluation's line repeats them.
    """
    left_out = _NOT_CURVES if "loss" in line else (*_NOT_CURVES, "tokens")
    return {tag_of(key): value for key, value in line.items() if key not in left_out and value is not None}


def hyper_parameters(config: Mapping[str, Any], world_size: int) -> dict[str, bool | float | str]:
    """Options that runs are compared by, by dotted name: numbers, words and switches that are set.

    Args:
        config: as it is stored, section by section.
        world_size: number of ranks.
    """
    found: dict[str, bool | float | str] = {}
    for name in HPARAMS_OPTIONS:
        section, _, option = name.partition(".")
        found |= _flat(name, config[section][option] if option else config[section])
    return found | {"ranks": world_size}


def _flat(name: str, value: Any) -> Iterator[tuple[str, bool | float | str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list) and value and all(isinstance(one, (int, float, str)) for one in value):
        yield name, ", ".join(map(str, value))
    elif isinstance(value, (bool, int, float, str)) and value != "":
        yield name, value


class Events:
    """The file of one start, or since a run went back; values of a step and later ones, of before, can be withdrawn."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        """Begin a file.

        Args:
            folder: for TensorBoard.
            purge_step: values of this step and later ones, of earlier starts, are not to be shown.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from torch.utils.tensorboard import summary  # imports tensorboard

        self._protocol, self._text_summary = event_pb2, summary.text
        self._summary, self._tags, self._scalars = summary_pb2.Summary, [""], summary_pb2.Summary()
        self._waiting: list[tuple[Mapping[str, float], int, float]] = []
        self._written_at = time.monotonic()
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{platform.node()}.{os.getpid()}"
        self._file = PatientFile(folder / name)
        self._add(time.time(), file_version="brain.Event:2")
        if purge_step is not None:
            self._add(time.time(), step=purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of a step, by tag; several short steps are written together, which takes half the time."""
        self._waiting.append((values, step, time.time()))
        if time.monotonic() - self._written_at >= WRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        for values, step, wall_time in self._waiting:
            if list(values) != self._tags:  # else the message of the step before is filled anew
                self._tags, self._scalars = list(values), self._summary(value=[{"tag": tag} for tag in values])
            for entry, value in zip(self._scalars.value, values.values(), strict=True):
                entry.simple_value = value
            self._add(wall_time, step=step, summary=self._scalars)
        self._waiting.clear()
        self._written_at = time.monotonic()

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Add a text of a step."""
        self.flush()
        self._add(time.time(), step=step, summary=self._text_summary(tag, text))

    def _add(self, wall_time: float, **content: Any) -> None:
        self._file.append(_record(self._protocol.Event(wall_time=wall_time, **content)))

    def close(self) -> None:
        """Write what waits, and close the file."""
        self.flush()
        self._file.close()


class HyperParameters:
    """What the tab HPARAMS knows of a run, in a file of its own, which every start writes anew.

    TensorBoard believes the first that it reads of a run's session: in the files of each start, what the first one was
    told, and how it ended, would stay.
    """

    def __init__(self, folder: Path, values: Mapping[str, bool | float | str]) -> None:
        """Say what is trained with, and that it has begun."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        self._protocol, self._api, self._plugin, self._metadata = event_pb2, api_pb2, plugin_data_pb2, metadata
        path = folder / HPARAMS_FILE
        path.unlink(missing_ok=True)
        self._file = PatientFile(path)
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        infos = []
        for name, value in values.items():
            kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
            setattr(start.hparams[name], f"{kind}_value", value)
            data_type = "FLOAT64" if kind == "number" else kind.upper()
            infos.append(api_pb2.HParamInfo(name=name, type=f"DATA_TYPE_{data_type}"))
        figures = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in HPARAMS_FIGURES]
        experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=figures)
        self._file.append(_record(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")))
        self._add(metadata.EXPERIMENT_TAG, experiment=experiment)
        self._add(metadata.SESSION_START_INFO_TAG, session_start_info=start)

    def end(self, failed: bool) -> None:
        """Say how the run ended."""
        status = self._api.STATUS_FAILURE if failed else self._api.STATUS_SUCCESS
        end = self._plugin.SessionEndInfo(status=status, end_time_secs=time.time())
        self._add(self._metadata.SESSION_END_INFO_TAG, session_end_info=end)

    def _add(self, tag: str, **content: Any) -> None:
        data = self._plugin.HParamsPluginData(version=self._metadata.PLUGIN_DATA_VERSION, **content)
        event = self._protocol.Event(wall_time=time.time())
        value = event.summary.value.add(tag=tag)
        value.metadata.plugin_data.plugin_name = self._metadata.PLUGIN_NAME
        value.metadata.plugin_data.content = data.SerializeToString()
        value.tensor.CopyFrom(self._metadata.NULL_TENSOR)
        self._file.append(_record(event))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _record(event: Any) -> bytes:
    """One event as it is in a file: framed with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()
