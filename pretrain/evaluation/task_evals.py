"""Tasks of lm-eval that a run does while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from pretrain.errors import ConfigError
from pretrain.evaluation.scoring import Scorer
from pretrain.options.config import Config
from pretrain.ranks.distributed import Ranks, is_communication_failure
from pretrain.tokenizers.chat import stop_ids
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.transformer.model import Transformer

Results = dict[str, dict[str, Any]]  # as of `harness.run_tasks`


def import_harness(where: str) -> ModuleType:
    """Import what knows lm-eval, which takes seconds.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from pretrain.evaluation import harness
    except ImportError as error:
        raise ConfigError(
            f"{where}: tasks need lm_eval, which cannot be imported ({error}); expected it to be installed. "
            "pip install 'longhaul[evals]', or leave the tasks out."
        ) from None
    return harness


class TaskEvals:
    """The tasks of `eval.tasks`. Rank 0 knows them; all ranks compute."""

    def __init__(self, config: Config, model: Transformer, tokenizer: Tokenizer, ranks: Ranks) -> None:
        """Load the tasks and their data.

        Raises:
            ConfigError: one of them cannot be done.
        """
        self._section, self._model, self._tokenizer, self._ranks = config.eval, model, tokenizer, ranks
        self._batch_tokens = config.train.micro_batch_size * config.data.seq_len  # what training computes at once
        self._is_divided = config.parallel.zero_stage == 3
        self._loaded: dict[str, list[Any]] = {}
        if self._section.tasks and ranks.is_first:
            harness = import_harness("eval.tasks")
            wanted = {
                name: harness.TaskSettings(given.get("num_fewshot"), given.get("limit", 0))
                for name, given in self._section.tasks.items()
            }
            self._loaded = harness.load_tasks(wanted, None, model.shape.seq_len, "eval.tasks")

    def due(self, step: int, is_last: bool) -> list[str]:
        """Which tasks are done after this step."""
        every = {
            name: given.get("every_steps", self._section.every_steps) for name, given in self._section.tasks.items()
        }
        return [name for name, steps in every.items() if step % steps == 0 or is_last]

    def run(self, names: Sequence[str]) -> tuple[Results, str]:
        """Do tasks with the model, in evaluation mode.

        Returns:
            On rank 0 the results, and what kept it from them or nothing; on others neither.
        """
        scorer = Scorer(
            self._model, self._tokenizer, self._batch_tokens, self._ranks, self._is_divided, stop_ids(self._tokenizer)
        )
        if not self._ranks.is_first:
            scorer.serve()
            return {}, ""
        harness = import_harness("eval.tasks")
        try:
            model = harness.HarnessModel(scorer, self._tokenizer, self._model.shape.seq_len)
            return harness.run_tasks([one for name in names for one in self._loaded[name]], model), ""
        except Exception as error:  # also of a task's own code, which is no reason to end a run
            if is_communication_failure(error):
                raise
            return {}, f"{type(error).__name__}: {error}"
        finally:
            scorer.end()


def values_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return results as numbers by `task/metric`, with standard errors where there are."""
    values = {}
    for task, result in results.items():
        for metric, number in result["metrics"].items():
            values[f"{task}/{metric}"] = number["value"]
            if number["stderr"] is not None:
                values[f"{task}/{metric}_stderr"] = number["stderr"]
    return values
