"""Tasks of lm-eval, the LM Evaluation Harness, with our model answering. The only file on lm_eval.

Imported where tasks are asked for, and on rank 0 only: it takes seconds, and the other ranks need nothing of it.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read at import. A pool of processes must not be forked from one with threads and a GPU.
os.environ.update({"DISABLE_MULTIPROC": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import apply_template, get_rolling_token_windows, make_disjoint_window

from pretrain.errors import ConfigError, LonghaulError
from pretrain.evaluation.scoring import Continuation, Prompt, Scorer
from pretrain.generation.generate_options import GenerateOptions
from pretrain.tokenizers.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 256  # of lm-eval's own models, where a task does not say
BOOTSTRAP_ROUNDS = 1000  # for standard errors that have no formula
FEWSHOT_SEED = 1234  # lm-eval's own default
_TASK_FILE = (".yaml", ".yml")
_GENERATION_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class TaskSettings:
    """How a task is run.

    Attributes:
        num_fewshot: examples before each question; None: as the task says.
        limit: documents used, the first ones; 0: all.
    """

    num_fewshot: int | None = None
    limit: int = 0


@dataclass(frozen=True)
class LoadedTask:
    """A task, or a group of them, ready to run."""

    name: str
    settings: TaskSettings
    content: Any  # of lm-eval's: tasks and groups by name

    def files(self) -> list[Path]:
        """What it was read from on this machine: its task files, Python beside them, and its data."""
        found: set[Path] = set()
        for task in self.content["tasks"].values():
            source = Path(str((task.get_config("metadata") or {}).get("config_source", "")))
            found |= {source, *(source.parent.glob("*.py") if source.is_file() else ())}
            data = (task.get_config("dataset_kwargs") or {}).get("data_files", ())
            names = data.values() if isinstance(data, dict) else [data]
            found |= {Path(one) for name in names for one in ([name] if isinstance(name, str) else name)}
        return sorted(path.absolute() for path in found if path.is_file())


class HarnessModel(TemplateLM):
    """A model as lm-eval sees it. Its requests reach the model as ids, on all ranks."""

    def __init__(
        self, scorer: Scorer, tokenizer: Tokenizer, max_length: int, begins_with_bos: bool = True,
        template: str | None = None,
    ) -> None:  # fmt: skip
        """Take what computes, and say how texts become ids.

        Args:
            scorer: answers requests.
            tokenizer: the run's.
            max_length: tokens that the model takes at once.
            begins_with_bos: contexts begin as documents did in training. Empty ones do in any case.
            template: by which questions are written as conversations; None: as they are.
        """
        super().__init__()
        self._scorer, self._tokenizer = scorer, tokenizer
        self._max_length, self._begins_with_bos = max_length, begins_with_bos
        self._template = template

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What is before a text without a context."""
        return self._tokenizer.bos_id

    @property
    def has_chat(self) -> bool:
        """Whether questions are written as conversations."""
        return self._template is not None

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers apart."""
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Turn a text into ids; as the beginning of a document unless `add_special_tokens` is False."""
        ids = self._tokenizer.encode(string) if self._template is None else encode_rendered(self._tokenizer, string)
        has_bos = ids[:1] == [self._tokenizer.bos_id]  # a chat template may write it
        wants_bos = self._begins_with_bos if add_special_tokens is None else add_special_tokens
        return [self._tokenizer.bos_id, *ids] if wants_bos and not has_bos else ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations of contexts; one of no ids is certain."""
        pairs = [self._split(*request.args) for request in requests]
        return self._loglikelihood_tokens([(("", ""), context, ids) for context, ids in pairs])

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both at once and cut between them, as lm-eval's own models do."""
        if not context:
            return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        context_ids, ids = self._encode_pair(context, continuation)
        if not ids and continuation:  # one token spans the cut, where lm-eval's own models fail (its issue 1297)
            return context_ids, self.tok_encode(continuation, add_special_tokens=False)
        return context_ids or [self.prefix_token_id], ids

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Score ids after ids, of which the first are dropped where they are more than the model takes."""
        answers, work = [(0.0, True)] * len(requests), {}
        for index, (_, context, ids) in enumerate(requests):
            if len(ids) > self._max_length:
                raise ConfigError(
                    f"tasks: a continuation is {len(ids)} tokens; expected at most {self._max_length}, the length that "
                    "the model was trained on. Leave the task out."
                )
            if ids:
                whole = (*context, *ids)[-(self._max_length + 1) :]
                work[index] = Continuation(whole[: -len(ids)], tuple(ids))
        for index, answer in zip(work, self._scorer.score(list(work.values())), strict=True):
            answers[index] = answer
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, each of whose tokens is predicted once, after as many as fit."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)  # bos is before them, and is not scored
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self._max_length, context_len=1)
            for context, own in map(make_disjoint_window, rolling):
                windows.append((None, context, own))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Go on from contexts, of which the first ids are dropped where there is no room for the answer."""
        prompts = []
        for request in requests:
            context, settings = request.args
            options = generation_options(settings, self._max_length, request.task_name or "")
            ids = self.tok_encode(context)[-(self._max_length - options.max_new_tokens) :]
            prompts.append(Prompt(context, tuple(ids or [self.prefix_token_id]), options))
        return self._scorer.generate(prompts)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write messages as one text."""
        assert self._template is not None
        names = {f"{which}_token": self._tokenizer.name_of(getattr(self._tokenizer, f"{which}_id"))
                 for which in ("bos", "eos")}  # fmt: skip
        return apply_template(
            self._template, names | {"messages": chat_history, "add_generation_prompt": add_generation_prompt}
        )


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Turn what a chat template wrote into ids, control tokens into their own."""
    special = tokenizer.special_tokens()
    names = sorted(special, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return [one for part in parts if part for one in ([special[part]] if part in special else tokenizer.encode(part))]


def generation_options(settings: Mapping[str, Any], max_length: int, task: str) -> GenerateOptions:
    """Return how a task wants text to be generated; greedily unless it says otherwise.

    Raises:
        ConfigError: it wants what we do not do, or more tokens than the model takes.
    """
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), DEFAULT_NEW_TOKENS))
    until, num_tokens, samples = kwargs.pop("until", None) or [], kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
    until = [until] if isinstance(until, str) else until
    unknown = sorted(set(kwargs) - set(_GENERATION_KEYS))
    if unknown:
        raise ConfigError(
            f"tasks: {task}: generation_kwargs has {unknown[0]}; expected until, max_gen_toks, do_sample, "
            f"{', '.join(_GENERATION_KEYS)}. Write a task file of your own that includes this one, without it."
        )
    if num_tokens >= max_length:
        raise ConfigError(
            f"tasks: {task}: max_gen_toks is {num_tokens}; expected fewer than the {max_length} tokens that the model "
            "was trained on. Write a task file of your own that includes this one, with generation_kwargs: "
            "{max_gen_toks: …}."
        )
    kwargs["temperature"] = kwargs.get("temperature", 1.0) if samples else 0.0
    options = GenerateOptions(max_new_tokens=num_tokens, stop=tuple(text for text in until if text), **kwargs)
    options.check()
    return options


def load_tasks(
    wanted: Mapping[str, TaskSettings], include_path: str | None, max_length: int, where: str
) -> dict[str, list[LoadedTask]]:
    """Load tasks by name, pattern or file, with their data sets, and try one document of each.

    Args:
        wanted: by name.
        include_path: a folder of task files that are known by name too.
        max_length: tokens that the model takes at once.
        where: what messages begin with.

    Returns:
        By name as wanted, of which a pattern may be several.

    Raises:
        ConfigError: a task or its data does not exist, is empty, or wants what we do not do.
    """
    if include_path and not any(Path(include_path).glob("**/*.yaml")):
        raise ConfigError(
            f"{where}: {include_path} holds no .yaml file; expected a folder of task files. Correct the path."
        )
    with quietly():
        # lm-eval's own fourteen thousand names take many seconds to read, and one's own tasks do without.
        managers = [TaskManager(include_path=include_path, include_defaults=False)]
        loaded = {}
        for name, settings in wanted.items():
            if name.endswith(_TASK_FILE) and not Path(name).is_file():
                raise ConfigError(f"{where}: {name} does not exist; expected a task file. Correct the path.")
            if not _is_own(managers[0], name) and len(managers) == 1:
                managers.append(TaskManager(include_path=include_path))
            manager = managers[0] if _is_own(managers[0], name) else managers[-1]
            names = _expand(manager, name, where)
            loaded[name] = [_load(manager, one, settings, max_length, where) for one in names]
    owners: dict[str, str] = {}
    for one in [one for tasks in loaded.values() for one in tasks]:
        for task in one.content["tasks"]:
            if owners.setdefault(task, one.name) != one.name:
                raise ConfigError(
                    f"{where}: {task} is in {owners[task]} and in {one.name}; expected each task once. Drop one."
                )
    return loaded


def _is_own(manager: TaskManager, name: str) -> bool:
    """Whether a manager without lm-eval's names can load a task; a group may refer to these."""
    return name in manager.all_subtasks or (Path(name).is_file() and "\ngroup:" not in "\n" + Path(name).read_text())


def _expand(manager: TaskManager, name: str, where: str) -> list[str]:
    if name in manager.all_tasks or name.endswith(_TASK_FILE):
        return [name]
    if "*" in name and (found := manager.match_tasks([name])):
        return list(found)
    close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
    mend = (
        f"Did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them; --include-path adds yours."
    )
    raise ConfigError(f"{where}: {name} is unknown; expected a task of lm-eval or the path of a task file. {mend}")


def _load(manager: TaskManager, name: str, settings: TaskSettings, max_length: int, where: str) -> LoadedTask:
    try:
        content = manager.load([name])
        for task in content["tasks"].values():
            _prepare(task, settings, max_length)
    except LonghaulError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('tasks: ')}") from None
    except ImportError as error:
        raise ConfigError(
            f"{where}: {name} needs a library that is missing ({error}); expected it. Install it."
        ) from None
    except Exception as error:  # whatever a data set's or a task's own code raises
        text = " ".join(str(error).split())[:300]
        if type(error).__module__.partition(".")[0] in ("yaml", "jinja2"):
            mend = "expected a task file that fits its data. Correct what it names in the file."
            raise ConfigError(f"{where}: {name} cannot be loaded ({text}); {mend}") from None
        raise ConfigError(
            f"{where}: {name} cannot be loaded ({type(error).__name__}: {text}); expected a task whose data set is on "
            "this machine or can be downloaded. Where there is no network, download it elsewhere and copy the cache "
            "($HF_HOME), or write a task file with dataset_path: json and dataset_kwargs: {data_files: …}."
        ) from None
    if not content["tasks"]:
        raise ConfigError(f"{where}: {name} holds no task; expected at least one. Correct the group.")
    return LoadedTask(name, settings, content)


def _prepare(task: Any, settings: TaskSettings, max_length: int) -> None:
    """Set a task up as `lm_eval` does, and build the requests of one document, which shows most mistakes."""
    for flag, reason in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "is not of text alone")):
        if getattr(task, flag, False):
            raise ConfigError(f"tasks: {task.task_name} {reason}; expected a task of text that does not. Leave it out.")
    if not len(task.eval_docs):
        raise ConfigError(f"tasks: {task.task_name} has no documents; expected at least one. Look at its data set.")
    own = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and own != 0:  # a 0 in its file is part of the task
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    if task.get_config("output_type") == "generate_until":
        generation_options(task.get_config("generation_kwargs") or {}, max_length, task.task_name)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    task.build_all_requests(limit=1)


def run_tasks(tasks: Sequence[LoadedTask], model: HarnessModel) -> dict[str, dict[str, Any]]:
    """Run tasks one after the other, and leave no random state changed.

    Returns:
        By task, groups and those within them too: `samples`, `version`, `num_fewshot`, `metrics` (by name: `value`,
        `stderr` or None, `higher_is_better` or None) and `values` (by metric, of each sample, where they are numbers).

    Raises:
        LonghaulError: the model cannot answer.
    """
    results: dict[str, dict[str, Any]] = {}
    with quietly(), _same_random_state():
        for loaded in tasks:
            for task in loaded.content["tasks"].values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples every time
            found = evaluate(
                model, loaded.content, limit=loaded.settings.limit or None, bootstrap_iters=BOOTSTRAP_ROUNDS,
                apply_chat_template=model.has_chat, fewshot_as_multiturn=model.has_chat,
            )  # fmt: skip
            for name in found["results"]:
                results[name] = _result(found, name)
    return results


def _result(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Gather what lm-eval says of one task or group."""
    numbers, better = found["results"][name], found["higher_is_better"].get(name) or {}
    samples = found.get("samples", {}).get(name, [])
    metrics, values = {}, {}
    for key, value in numbers.items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        shown = metric if rule == "none" else key
        stderr = numbers.get(f"{metric}_stderr,{rule}")
        metrics[shown] = {
            "value": float(value), "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            "higher_is_better": better.get(metric),
        }  # fmt: skip
        own = [sample[metric] for sample in samples if sample["filter"] == rule and metric in sample]
        if own and all(isinstance(one, (bool, int, float, np.number)) for one in own):
            values[shown] = [float(one) for one in own]
    return {
        "samples": int(numbers.get("sample_len", 0)), "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name), "metrics": metrics, "values": values,
    }  # fmt: skip


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep lm-eval's progress bars and prints off the output, which may be JSON; errors are raised anyway."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Put back the random states that tasks' code may draw from or seed."""
    devices = list(range(torch.cuda.device_count()))
    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)
