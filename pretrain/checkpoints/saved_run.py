"""A checkpoint as a model: opened, so that its weights can be read one by one, or loaded whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.checkpoint_files import CheckpointReader
from pretrain.errors import CheckpointError
from pretrain.options.config import Config
from pretrain.options.families import ModelShape, resolve_shape
from pretrain.options.settings import parse_config
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from pretrain.transformer.model import Transformer


@dataclass
class LoadedRun:
    """A model read back from a run folder: fp32, on the CPU, in evaluation mode."""

    model: Transformer
    config: Config
    tokenizer: Tokenizer
    step: int
    num_tokens: int
    checkpoint: str  # name of its folder
    run: Path


@dataclass
class SavedRun:
    """A run's checkpoint, verified and open: its weights are read one by one.

    Args:
        shapes: of each parameter, by name, in the model's order.
        read: reads a parameter, fp32, from the files' ranges that hold it.
        manifest: what the checkpoint says of itself.
    """

    config: Config
    tokenizer: Tokenizer
    shape: ModelShape
    step: int
    num_tokens: int
    checkpoint: str  # name of its folder
    run: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    manifest: dict[str, Any]

    def load(self) -> LoadedRun:
        """Read all weights into a model."""
        with torch.device("meta"):  # its weights are read, not drawn
            model = Transformer(self.shape, self.config.run.seed)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.read(name))
        return LoadedRun(
            model.eval(), self.config, self.tokenizer, self.step, self.num_tokens, self.checkpoint, self.run
        )


def saved_run(reader: CheckpointReader, run: Path, allow_pipe: bool) -> SavedRun:
    """Say what an open checkpoint holds.

    Args:
        reader: of a checkpoint that was verified.
        run: the run folder, where the tokenizer lies.
        allow_pipe: takes the place of the config's `data.allow_pipe`.

    Raises:
        CheckpointError: its parameters, or the run folder's tokenizer, are not those that its config describes.
        DataError, ConfigError: the tokenizer is missing, damaged, or does not fit the config.
    """
    config = parse_config(reader.manifest["about"]["config"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"allow_pipe": allow_pipe})})
    tokenizer = open_tokenizer(config.tokenizer, run)
    trained_with = reader.manifest["about"].get("tokenizer", tokenizer.fingerprint)
    if trained_with != tokenizer.fingerprint:
        raise CheckpointError(
            f"{run}: its tokenizer has the fingerprint {tokenizer.fingerprint[:12]}…; expected {trained_with[:12]}…, "
            f"with which {reader.folder.name} was trained. Restore the tokenizer's files in the run folder."
        )
    shape = resolve_shape(config.model, tokenizer.vocab_size, config.data.max_seq_len)
    with torch.device("meta"):
        expected = {name: tuple(one.shape) for name, one in Transformer(shape, 0).named_parameters()}
    if reader.shapes != expected:
        raise CheckpointError(
            f"{reader.folder}: its parameters are not those of the model that its config describes; expected the same. "
            "Use another checkpoint (--step)."
        )
    return SavedRun(
        config, tokenizer, shape, reader.manifest["step"], reader.training["num_tokens"], reader.folder.name, run,
        expected, reader.read_whole, reader.manifest,
    )  # fmt: skip
