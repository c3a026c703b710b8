"""transformers' models under transformers' Trainer, as people use them: what Longhaul's step is compared with.

A model is built from the options that an export of the same shape would have, so it has the same parameters.
`Trainer.train()` itself runs, not an imitation of its loop: in a thread of its own that waits for the micro-batches of
its next step, so that whoever measures decides when each step happens. What is asked of it is in the Trainer's favour:
batches that are already on the device, no logging, no saving, no look at every loss for NaN.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.updates import Rows
from pretrain.formats.family_table import check_exported, export_tensors, published_config
from pretrain.options.config import Config
from pretrain.options.families import ModelShape, num_parameters
from pretrain.transformer.model import Transformer

if importlib.util.find_spec("accelerate") is None:
    raise ImportError("transformers' Trainer needs accelerate. Install it: pip install 'accelerate>=1.1,<2'")

from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

MOST_STEPS = 1_000_000  # the Trainer wants a number; it is never reached


def make_model(shape: ModelShape, device: torch.device) -> nn.Module:
    """Build transformers' model of this shape, vocabulary padded as ours is, with its own initial weights in fp32.

    Raises:
        ExportError: transformers has no such model.
        ValueError: it has another number of parameters than ours.
    """
    check_exported(shape, "benchmark")
    config = AutoConfig.for_model(**published_config(_padded(shape)), bos_token_id=None, eos_token_id=None)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    found, expected = sum(parameter.numel() for parameter in model.parameters()), num_parameters(shape)
    if found != expected:
        raise ValueError(f"{type(model).__name__} has {found} parameters; expected {expected}, as ours has")
    return model


def _padded(shape: ModelShape) -> ModelShape:
    return dataclasses.replace(shape, vocab_size=shape.padded_vocab_size)


def copy_weights(ours: Transformer, theirs: nn.Module, shape: ModelShape) -> None:
    """Give transformers' model the weights of ours."""
    tensors = {name: tensor.detach() for name, tensor in export_tensors(_padded(shape), ours.named_parameters())}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) > {"lm_head.weight"}:  # which may be tied
        raise ValueError(f"weights without a counterpart: {[*missing, *unexpected]}")


def use_liger(shape: ModelShape) -> None:
    """Replace the operators of models that are built from now on by Liger's, as its documentation says.

    Raises:
        ValueError: Liger cannot run here, or has none for this model.
    """
    if not torch.cuda.is_available():
        raise ValueError("Liger's operators are Triton kernels and need a GPU")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("liger_kernel is not installed. Install it: pip install liger-kernel")
    import liger_kernel.transformers

    check_exported(shape, "benchmark")
    kind = published_config(shape)["model_type"]
    apply = getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{kind}", None)
    if apply is None:
        raise ValueError(f"Liger has no operators for {kind}")
    apply()


class TrainerLoop:
    """The Trainer's loop over a model, one step at a time.

    Args:
        model: one of transformers', on the device where the rows are.
        config: its optimizer, clipping and precision are the Trainer's.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        if torch.cuda.device_count() > 1:
            raise ValueError(
                f"{torch.cuda.device_count()} GPUs are visible, and the Trainer would use all. "
                "Set CUDA_VISIBLE_DEVICES=0."
            )
        self._orders: SimpleQueue[tuple[list[Rows], float] | None] = SimpleQueue()
        self._answers: SimpleQueue[float | BaseException] = SimpleQueue()
        self._thread: Thread | None = None
        with _without_ranks():
            self._trainer = _Trainer(model, _arguments(config), self._orders, self._answers)

    def step(self, batches: list[Rows], lr: float) -> float:
        """Let the Trainer do one update from these micro-batches; return the mean loss.

        Raises:
            Exception: what the Trainer raised; the next call starts its loop anew, with weights and optimizer kept.
        """
        if self._thread and len(batches) != self._trainer.args.gradient_accumulation_steps:
            self.close()
        if self._thread is None:
            self._trainer.args.gradient_accumulation_steps = len(batches)
            self._thread = Thread(target=self._train, daemon=True)
            self._thread.start()
        self._orders.put((batches, lr))
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            self._thread = None
            try:
                raise answer
            finally:
                del answer  # else it and this frame keep each other, and the tensors of the Trainer's frames
        return answer

    def close(self) -> None:
        """End the Trainer's loop."""
        if self._thread:
            self._orders.put(None)
            self._thread.join()
            self._thread = None

    def _train(self) -> None:
        try:
            self._trainer.train()
        except _Closed:
            pass
        except BaseException as error:
            self._answers.put(error)


class _Closed(Exception):
    """No further step is wanted; this is how `Trainer.train()` is left."""


class _Trainer(Trainer):
    """The Trainer with its two documented hooks: where batches come from, and a look at each loss."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        orders: SimpleQueue[tuple[list[Rows], float] | None],
        answers: SimpleQueue[float | BaseException],
    ) -> None:
        super().__init__(model=model, args=args)
        self.orders, self.answers = orders, answers
        self.losses: list[Tensor] = []

    def get_train_dataloader(self) -> Any:
        """Return what yields the micro-batches of one ordered step after the other."""
        return _Feed(self)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch; the losses of a step add up to its mean."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss)
        return loss


class _Feed:
    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        trainer = self.trainer
        trainer.losses.clear()
        while (order := trainer.orders.get()) is not None:
            batches, lr = order
            for group in trainer.optimizer.param_groups:
                group["lr"] = lr
            for rows in batches:
                # `shift_labels` is the token that follows each one, as our targets are; `labels` asks for a loss
                yield {"input_ids": rows.tokens_BT, "labels": rows.targets_BT, "shift_labels": rows.targets_BT}
            # The loop asks for more once it is done with the step: clip, update, its books and its callbacks.
            del order, batches, rows
            total = float(torch.stack(trainer.losses).sum())
            trainer.losses.clear()
            trainer.answers.put(total)
        raise _Closed


def _arguments(config: Config) -> TrainingArguments:
    """The config's optimizer and precision in the Trainer's words; else its defaults, without logs and files."""
    if config.optim.name != "adamw" or config.train.precision == "fp16":
        raise ValueError(
            f"optim.name is {config.optim.name}, train.precision {config.train.precision}; expected adamw and bf16 or "
            "fp32 for the Trainer"
        )
    return TrainingArguments(
        output_dir=os.path.join(tempfile.gettempdir(), "longhaul-peer"),  # nothing is written
        max_steps=MOST_STEPS,
        optim="adamw_torch_fused",
        learning_rate=config.optim.lr,
        adam_beta1=config.optim.betas[0],
        adam_beta2=config.optim.betas[1],
        adam_epsilon=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.clip_norm,
        lr_scheduler_type="constant",
        bf16=config.train.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=config.run.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
    )


@contextmanager
def _without_ranks() -> Iterator[None]:
    """Hide the rank, else the Trainer takes a process group of one for its own and wraps the model for it."""
    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
