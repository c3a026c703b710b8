"""Text that a model writes while it is trained, in the run folder's `samples/`.

All ranks compute every sample together, since at ZeRO stage 3 each holds a part of the weights only. Rank 0's choice of
each token is everybody's: on GPUs, logits may differ in their last bit between ranks, and ranks that chose for
themselves could part, one of them waiting for ever.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pretrain.generation.generate import Completion, encode_prompts, generate
from pretrain.generation.generate_options import GenerateOptions
from pretrain.options.config import Config
from pretrain.ranks.distributed import Ranks
from pretrain.storage.whole_file import write_text
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.transformer.model import Transformer

logger = logging.getLogger("longhaul")


class Samples:
    """What a run writes every so often, from the same prompts."""

    def __init__(self, config: Config, model: Transformer, tokenizer: Tokenizer, ranks: Ranks) -> None:
        """Check the prompts.

        Raises:
            ConfigError: a prompt leaves no room for a token.
        """
        self._section, self._seed = config.eval, config.run.seed
        self.model, self._tokenizer, self._ranks = model, tokenizer, ranks
        if self._section.sample_every_steps:
            encode_prompts(tokenizer, self._section.sample_prompts, config.data.max_seq_len, "eval.sample_prompts")

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether text is sampled after this step."""
        every = self._section.sample_every_steps
        return bool(every) and (step % every == 0 or is_last)

    def write(self, step: int, num_tokens: int) -> str:
        """Let the model, in evaluation mode, go on from each prompt; return a page for people, on every rank.

        Args:
            step: of training, which with the run's seed fixes the random numbers.
            num_tokens: trained on so far.

        Raises:
            TrainingError: the model computes NaN or infinity; on all ranks.
        """
        section = self._section
        options = GenerateOptions(
            max_new_tokens=section.sample_tokens, temperature=section.sample_temperature,
            seed=(self._seed * 1_000_003 + step) % 2**63,
        )  # fmt: skip
        completions = generate(
            self.model, self._tokenizer, section.sample_prompts, options, agree=self._ranks.take_first
        )
        head = f"step {step}, {num_tokens:,} tokens trained on; temperature {section.sample_temperature:g}"
        return "\n\n".join([head, *(_paragraph(item) for item in completions)]) + "\n"


def _paragraph(completion: Completion) -> str:
    return f"--- prompt {completion.prompt!r}, ended by {completion.finish} ---\n{completion.prompt}{completion.text}"


def save_samples(folder: Path, step: int, text: str) -> Path:
    """Write a page to `samples/step-NNNNNNNN.txt`, complete or not at all, and return its path.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / "samples" / f"step-{step:08d}.txt"
    path.parent.mkdir(exist_ok=True)
    write_text(path, text)
    return path


def drop_samples_after(folder: Path, step: int) -> None:
    """Remove the pages of later steps, which the run is about to write again, and what a crash left of one."""
    pages = folder / "samples"
    later = [path for path in pages.glob("step-*.txt") if path.stem[5:].isdecimal() and int(path.stem[5:]) > step]
    for path in [*later, *pages.glob(".step-*.tmp-*")]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # it will be overwritten, or say so
            logger.warning("%s could not be removed: %s", path, error)
