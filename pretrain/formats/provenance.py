"""Where an exported model comes from: its run, checkpoint and code, the data it has seen, and how its loss went."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pretrain
from pretrain.checkpoints.saved_run import SavedRun
from pretrain.data.shards import Manifest
from pretrain.errors import LonghaulError

CURVE_POINTS = 12  # of the table in the model card


def source_of(saved: SavedRun) -> dict[str, Any]:
    """Return what identifies the trained model: run, checkpoint, step, tokens, code, hashes of what it depends on.

    `begun_from` names the run or published model that its weights began from, and `tuned_on` the sources of examples;
    each is None if there is none.
    """
    config = saved.config.model_dump_json()
    about = saved.manifest.get("about", {})
    return {
        "run": saved.run.resolve().name,
        "checkpoint": saved.checkpoint,
        "step": saved.step,
        "tokens": saved.num_tokens,
        "begun_from": _beginning_of(saved),
        "tuned_on": ", ".join(one.name for one in saved.config.data.sources if one.examples is not None) or None,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "checkpoint_sha256": _digest(saved.manifest),
        "tokenizer_sha256": saved.tokenizer.fingerprint,
        "git_commit": _git_commit(saved.run),
        "trained_by": {name: about[name] for name in ("longhaul", "torch") if name in about},
    }


def _beginning_of(saved: SavedRun) -> str | None:
    imported = saved.manifest.get("about", {}).get("imported")
    if imported is not None:
        name = str(imported["name"])
        return (
            name if not name.startswith(("/", "~", ".")) else str(imported["folder"])
        )  # a path says nothing elsewhere
    names = [one for one in saved.config.resume.from_.split("/") if one not in ("", "checkpoints")]
    return next((one for one in reversed(names) if not one.startswith("step-")), None)


def metadata_of(saved: SavedRun, libraries: Sequence[str]) -> dict[str, str]:
    """Return the same as texts by name, with the versions of what wrote the export, for a file's head."""
    source = source_of(saved)
    trained_by = source.pop("trained_by")
    texts = {key: str(value) for key, value in source.items() if value is not None}
    texts |= {f"trained_by_{name}": version for name, version in trained_by.items()}
    return texts | {f"{name}_version": version for name, version in versions(libraries).items()}


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Return the versions of this project and of installed libraries."""
    return {"longhaul": pretrain.__version__} | {name: importlib.metadata.version(name) for name in libraries}


def data_of(saved: SavedRun) -> list[dict[str, Any]]:
    """Return what the model has seen of each source, up to its checkpoint.

    Returns:
        For each source its `name`, `tokens` and `epochs` seen, and, where its shards are at hand, the `documents` and
        `bytes` of text that one epoch has; None where not.
    """
    state = saved.manifest.get("training", {}).get("data", {})
    epochs = state.get("epochs", {})
    found = []
    for name, tokens in state.get("tokens_per_corpus", {}).items():
        source = next((one for one in saved.config.data.sources if one.name == name), None)
        size = _size_of(Path(source.shards)) if source is not None else (None, None)
        found.append(
            {"name": name, "tokens": tokens, "epochs": epochs.get(name), "documents": size[0], "bytes": size[1]}
        )
    return found


def loss_curve(saved: SavedRun) -> dict[str, list[list[float]]]:
    """Return points of the run's loss up to the checkpoint: `training` and `held-out`, each [step, tokens, loss].

    There are at most `CURVE_POINTS` of each, at even distances, the last one among them; of training, means over the
    steps since the point before.
    """
    lines: dict[str, list[list[float]]] = {"training": [], "held-out": []}
    try:
        with open(saved.run / "metrics.jsonl", encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                for kind, key in (("training", "loss"), ("held-out", "eval/loss")):
                    if isinstance(line.get(key), float) and line["step"] <= saved.step:
                        lines[kind].append([line["step"], line["tokens"], line[key]])
    except (OSError, ValueError, KeyError):  # lost or damaged since: a model can be exported without its history
        pass
    return {"training": _means(lines["training"]), "held-out": _means(lines["held-out"], of_one=True)}


def _means(points: list[list[float]], of_one: bool = False) -> list[list[float]]:
    count = min(CURVE_POINTS, len(points))
    found = []
    for number in range(count):
        begin, end = number * len(points) // count, (number + 1) * len(points) // count
        step, tokens, loss = points[end - 1]
        losses = [point[2] for point in points[begin:end]]
        found.append([step, tokens, loss if of_one else sum(losses) / len(losses)])
    return found


def _size_of(shards: Path) -> tuple[int | None, int | None]:
    try:
        manifest = Manifest.load(shards)
    except (LonghaulError, OSError, KeyError, TypeError):  # elsewhere, moved, of another version: only told of
        return None, None
    return sum(shard.num_documents for shard in manifest.train), manifest.text_bytes.get("train")


def _digest(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _git_commit(run: Path) -> str | None:
    try:
        starts = json.loads((run / "environment.json").read_bytes())["starts"]
        return starts[-1].get("git_commit")
    except (OSError, ValueError, KeyError, IndexError, AttributeError):
        return None
