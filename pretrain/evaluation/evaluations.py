"""Evaluations of checkpoints: computed on all ranks, or read from where the run folder keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pretrain import __version__
from pretrain.checkpoints.checkpoint_files import manifest_digest
from pretrain.checkpoints.run_folder import LoadedRun, load_run, place_of_run
from pretrain.console import warn
from pretrain.data.damage import Damage
from pretrain.data.stream import ValRows
from pretrain.errors import ConfigError
from pretrain.evaluation.answers import judge_answers
from pretrain.evaluation.comparison import Row, Score, ratio_stderr
from pretrain.evaluation.evaluate import LN_2, evaluate
from pretrain.evaluation.evaluate_options import EvaluateOptions
from pretrain.evaluation.scoring import Scorer
from pretrain.evaluation.task_evals import import_harness
from pretrain.generation.generate import end_ids
from pretrain.options.settings import parse_config
from pretrain.ranks.distributed import Ranks
from pretrain.storage.whole_file import write_text
from pretrain.tasks.task_metrics import check_metric
from pretrain.tokenizers.chat import chat_template, stop_ids
from pretrain.tokenizers.tokenizer_files import open_tokenizer

FOLDER = "evaluations"
_ANSWERS = "eval.metric"  # a name that no task of lm-eval has
_OWN = ("held-out", _ANSWERS)


@dataclass(frozen=True)
class Judged:
    """A checkpoint and what is known of it now: entries as they are kept, by `held-out` or the name of a task.

    `is_kept` says that all of it was known before, and that the checkpoint itself was not read.
    """

    run: str
    step: int
    entries: dict[str, dict[str, Any]]
    is_kept: bool = False

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.run}@{self.step}"

    def numbers(self) -> dict[str, Any]:
        """All of it for JSON, without the values of single samples."""
        found: dict[str, Any] = {"run": self.run, "step": self.step}
        if "held-out" in self.entries:
            found |= self.entries["held-out"]["result"]
        if _ANSWERS in self.entries:
            found["answers"] = self.entries[_ANSWERS]["result"]
        if tasks := self.task_results():
            found["tasks"] = {
                name: {key: value for key, value in result.items() if key != "values"}
                for name, result in tasks.items()
            }  # fmt: skip
        return found

    def task_results(self) -> dict[str, dict[str, Any]]:
        """Results of tasks by name, those within groups too."""
        tasks = [entry["result"] for name, entry in self.entries.items() if name not in _OWN]
        return {name: result for found in tasks for name, result in found.items()}

    def row(self) -> Row:
        """Its scores, as they are compared."""
        scores: dict[str, Score] = {}
        if entry := self.entries.get("held-out"):
            scores |= _held_out_scores(entry)
        if entry := self.entries.get(_ANSWERS):
            asked = f"{entry['result']['metric']} {entry['settings']['rows']}"
            scores |= {name: Score(value, samples_are=asked) for name, value in entry["result"]["values"].items()}
        for task, result in self.task_results().items():
            same = (
                f"{task} {result['version']} {result['num_fewshot']} {len(next(iter(result['values'].values()), []))}"
            )
            for metric, number in result["metrics"].items():
                samples = result["values"].get(metric, [])
                scores[f"{task}/{metric}"] = Score(number["value"], number["stderr"], samples, samples_are=same)
        return Row(self.label, scores)


def _held_out_scores(entry: Mapping[str, Any]) -> dict[str, Score]:
    result, identity = entry["result"], entry["settings"]["rows"]
    losses, tokens, num_bytes = (list(column) for column in zip(*entry["rows"], strict=True))
    bits = [loss / LN_2 for loss in losses]
    scores = {
        "loss": Score(result["loss"], ratio_stderr(losses, tokens), losses, tokens, identity),
        "bits_per_byte": Score(result["bits_per_byte"], ratio_stderr(bits, num_bytes), bits, num_bytes, identity),
    }
    if len(result["sources"]) > 1:
        for name, part in result["sources"].items():
            own = slice(*entry["ranges"][name])
            error = ratio_stderr(losses[own], tokens[own])
            scores[f"{name}/loss"] = Score(part["loss"], error, losses[own], tokens[own], identity)
    return scores


class Judge:
    """Evaluates checkpoints one after the other; all ranks do the same."""

    def __init__(self, options: EvaluateOptions, ranks: Ranks, on_progress: Callable[[str, int, int], None]) -> None:
        """Begin.

        Args:
            options: what to do.
            ranks: all ranks, in a process group if they are several.
            on_progress: told, on rank 0, what is done, and batches done and to do.
        """
        self._options, self._ranks, self._on_progress = options, ranks, on_progress
        self._group = ranks if ranks.world_size > 1 else None
        self._tasks: dict[int, dict[str, Any]] = {}  # of lm-eval, by the length that the model takes

    def steps_of(self, run: str, wanted: Sequence[int]) -> list[int]:
        """Return which checkpoints of a run are meant: the `wanted` ones, or all.

        Raises:
            ConfigError: the run does not have one.
        """
        return self._agree(lambda: _steps_of(run, wanted))

    def judge(self, run: str, step: int | None) -> Judged:
        """Evaluate a checkpoint, the newest good one if `step` is None, or read what is kept of it.

        Raises:
            LonghaulError: it cannot be read, or what it is evaluated on.
        """
        checkpoint = self._agree(lambda: _Checkpoint(run, step, self._options, self._ranks.device))
        with closing(checkpoint):
            kept = checkpoint.kept()
            missing = [name for name in checkpoint.wanted if self._options.again or name not in kept]
            if self._group:
                missing = self._group.from_first(missing)
            if not missing:
                return Judged(run, checkpoint.step, kept, is_kept=True)
            loaded = self._agree(lambda: load_run(run, step, self._options.allow_pipe))
            if loaded.step == checkpoint.step:
                entries = kept | self._compute(checkpoint, loaded, missing)
                return Judged(run, checkpoint.step, {name: entries[name] for name in checkpoint.wanted})
        return self.judge(run, loaded.step)  # the newest one is damaged

    def _compute(self, checkpoint: _Checkpoint, loaded: LoadedRun, missing: Sequence[str]) -> dict[str, Any]:
        """Evaluate, and keep what comes out."""
        loaded.model.to(self._ranks.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[self._options.dtype])
        found = {}
        if "held-out" in missing:
            found["held-out"] = self._held_out(checkpoint, loaded)
        if _ANSWERS in missing:
            found[_ANSWERS] = self._answers(checkpoint, loaded)
        if tasks := [name for name in missing if name not in _OWN]:
            found |= self._do_tasks(checkpoint, loaded, tasks)
        for name, entry in found.items():
            entry |= {"name": name, "settings": checkpoint.wanted[name]}
        if self._ranks.is_first:
            checkpoint.keep(found)
        return found

    def _agree(self, action: Callable[[], Any]) -> Any:
        return self._group.agree(action) if self._group else action()

    def _held_out(self, checkpoint: _Checkpoint, loaded: LoadedRun) -> dict[str, Any]:
        rows = checkpoint.rows
        assert rows is not None
        result = evaluate(
            loaded.model, rows, loaded.tokenizer.token_bytes(), loaded.config.train.micro_batch_size, self._group,
            self._ranks.device,
        )  # fmt: skip
        found = rows.take_damaged()
        parts = self._group.gather(found) if self._group else [found]
        is_whole = self._is_whole(rows, [one for part in parts for one in part])
        assert result.rows_RS is not None
        plain = [[round(loss, 6), int(tokens), int(text)] for loss, tokens, text in result.rows_RS.tolist()]
        error = ratio_stderr(*zip(*[row[:2] for row in plain], strict=True))
        return {
            "result": result.numbers() | {"loss_stderr": error}, "rows": plain, "is_whole": is_whole,
            "ranges": {name: [numbers.start, numbers.stop] for name, numbers in rows.sources()},
        }  # fmt: skip

    def _answers(self, checkpoint: _Checkpoint, loaded: LoadedRun) -> dict[str, Any]:
        rows, metric = checkpoint.rows, checkpoint.wanted[_ANSWERS]["metric"]
        assert rows is not None
        size = loaded.config.train.micro_batch_size * loaded.config.data.seq_len
        answered = judge_answers(metric, loaded.model, loaded.tokenizer, rows, size, self._group)
        # Rank 0 alone has read the examples, and keeps what comes out.
        return {
            "result": {"metric": metric} | asdict(answered), "is_whole": self._is_whole(rows, rows.take_damaged()),
        }  # fmt: skip

    def _is_whole(self, rows: ValRows, found: Sequence[Damage]) -> bool:
        """Count documents that could not be read, and name new ones; return whether there are none."""
        damaged = rows.damage.add(found)
        if self._ranks.is_first:
            for damage in damaged:
                warn(f"held-out {damage}; it is not scored")
        return not rows.damage.num_documents

    def _do_tasks(self, checkpoint: _Checkpoint, loaded: LoadedRun, names: Sequence[str]) -> dict[str, Any]:
        options, ranks = self._options, self._ranks
        template = self._agree(lambda: _template_of(loaded) if options.chat else None)
        tasks = self._agree(lambda: self._load(names, loaded.model.shape.seq_len) if ranks.is_first else {})
        doing = [""]
        scorer = Scorer(
            loaded.model, loaded.tokenizer, loaded.config.train.micro_batch_size * loaded.config.data.seq_len,
            self._group, end_ids=end_ids(loaded.tokenizer) if options.chat else stop_ids(loaded.tokenizer),
            on_progress=(lambda *numbers: self._on_progress(doing[0], *numbers)) if ranks.is_first else None,
        )  # fmt: skip

        def work() -> dict[str, Any]:
            if not ranks.is_first:
                scorer.serve()
                return {}
            harness, found = import_harness("--tasks"), {}
            length = loaded.model.shape.seq_len
            try:
                model = harness.HarnessModel(scorer, loaded.tokenizer, length, options.begins_with_bos, template)
                for name in names:
                    doing[0] = f"{checkpoint.label} {name}"
                    files = _stamps(path for task in tasks[name] for path in task.files())
                    found[name] = {"result": harness.run_tasks(tasks[name], model), "files": files}
            finally:
                scorer.end()
            return found

        found = self._agree(work)
        return self._group.from_first(found) if self._group else found

    def _load(self, names: Sequence[str], max_length: int) -> dict[str, Any]:
        """Load tasks once for all runs of the same length."""
        known = self._tasks.setdefault(max_length, {})
        if new := [name for name in names if name not in known]:
            harness = import_harness("--tasks")
            settings = harness.TaskSettings(self._options.num_fewshot, self._options.limit)
            known |= harness.load_tasks(dict.fromkeys(new, settings), self._options.include_path, max_length, "--tasks")
        return known


def _steps_of(run: str, wanted: Sequence[int]) -> list[int]:
    steps = place_of_run(Path(run)).list_steps()
    if unknown := [step for step in wanted if step not in steps]:
        has = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"--steps has {unknown[0]}; expected checkpoints of {run}, which has {has}.")
    return [*(wanted or steps)]


class _Checkpoint:
    """A checkpoint before its weights are read, and what its evaluations depend on."""

    def __init__(self, run: str, step: int | None, options: EvaluateOptions, device: torch.device) -> None:
        path = Path(run)
        place = place_of_run(path)
        steps = place.list_steps()
        if not steps or (step is not None and step not in steps):
            load_run(run, step)  # says what is wrong
        self.step = steps[-1] if step is None else step
        self.label = f"{run}@{self.step}"
        self._path = path / FOLDER / f"step-{self.step:08d}.json"
        reader = place.open(self.step)
        config = parse_config(reader.manifest["about"]["config"])
        reader.close()
        common: dict[str, Any] = {
            "checkpoint": manifest_digest(reader.manifest), "dtype": options.dtype, "device": _name_of(device),
            "versions": {"longhaul": __version__, "torch": torch.__version__},
        }  # fmt: skip
        self.wanted: dict[str, dict[str, Any]] = {}
        self.rows: ValRows | None = None
        if options.held_out:
            config = config.model_copy(
                update={"data": config.data.model_copy(update={"allow_pipe": options.allow_pipe})}
            )
            self.rows = ValRows(config, open_tokenizer(config.tokenizer, path).fingerprint, options.max_rows)
            self.wanted["held-out"] = common | {"rows": self.rows.identity()}
            if config.eval.metric:
                check_metric(config.eval.metric)
                self.wanted[_ANSWERS] = self.wanted["held-out"] | {"metric": config.eval.metric}
        own = {
            "include_path": options.include_path and str(Path(options.include_path).absolute()),
            "num_fewshot": options.num_fewshot, "limit": options.limit, "chat": options.chat,
            "begins_with_bos": options.begins_with_bos,
        }  # fmt: skip
        versions = common["versions"] | {"lm_eval": _version_of("lm_eval")}
        self.wanted |= {name: common | own | {"versions": versions} for name in options.tasks}

    def close(self) -> None:
        """Close the shards."""
        if self.rows is not None:
            self.rows.close()

    def kept(self) -> dict[str, dict[str, Any]]:
        """Return the kept entries that are of this checkpoint, these settings, versions and files."""
        entries = _read(self._path)
        found = {}
        for name, settings in self.wanted.items():
            for entry in entries:
                if entry["name"] == name and entry["settings"] == settings and _is_current(entry.get("files", {})):
                    found[name] = entry
        return found

    def keep(self, found: Mapping[str, dict[str, Any]]) -> None:
        """Add entries to the file, in place of those that differ in versions or checkpoint only."""
        whole = [entry for entry in found.values() if entry.get("is_whole", True)]
        replaced = [_without_versions(entry) for entry in whole]
        entries = [entry for entry in _read(self._path) if _without_versions(entry) not in replaced]
        try:
            self._path.parent.mkdir(exist_ok=True)
            write_text(self._path, json.dumps({"step": self.step, "entries": [*entries, *whole]}) + "\n")
        except OSError as error:
            warn(f"{self._path}: cannot be written ({error.strerror}); the next comparison computes this again")


def _without_versions(entry: Mapping[str, Any]) -> Any:
    return entry["name"], {
        key: value for key, value in entry["settings"].items() if key not in ("versions", "checkpoint")
    }


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the kept entries; a file that cannot be read holds none, for all of it can be computed again."""
    try:
        entries = json.loads(path.read_bytes())["entries"]
        return [entry for entry in entries if entry.keys() >= {"name", "settings", "result"}]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of files."""
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _is_current(files: Mapping[str, list[int]]) -> bool:
    try:
        return _stamps(map(Path, files)) == files
    except OSError:
        return False


def _template_of(loaded: LoadedRun) -> str:
    template = chat_template(loaded.tokenizer)
    if template is None:
        raise ConfigError(
            f"--apply-chat-template: the tokenizer of {loaded.run} has no chat template and no tokens of ChatML; "
            "expected one. Leave the option out."
        )
    return template


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
