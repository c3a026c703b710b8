"""Memory of a micro-batch with the operators that run on a GPU, on the meta device: sizes without any data."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import activation, attention, dropout, layer_norm, linear_cross_entropy, rms_norm, rope
from kernels.loss_chunks import chunk_rows
from pretrain.options.config import Config
from pretrain.planning.plan_memory import shape_of
from pretrain.ranks.sequence_parallel import SequenceGroup
from pretrain.transformer import activation_offload
from pretrain.transformer.activation_offload import KeptOnHost
from pretrain.transformer.lora import add_adapters
from pretrain.transformer.model import Transformer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators make, as long as they live, and at most."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        """Count from zero, and not what is `known`."""
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0
        self.on_host = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        self.peak = max(self.peak, self.now + self._hidden(str(func), args))
        return out

    def _hidden(self, name: str, args: Any) -> int:
        """What our operators allocate inside."""
        if name.startswith("longhaul.linear_cross_entropy"):
            x, _, _, num_classes, *_ = args
            return 4 * chunk_rows(x.shape[0], num_classes) * num_classes
        return 4 * args[1].numel() if name.startswith("longhaul.attention_backward") else 0

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to where it is not counted among these."""
        copy = torch.empty_like(tensor)
        self.now -= copy.nbytes
        self._sizes[copy.untyped_storage()._cdata] = 0
        self.on_host += copy.nbytes
        return copy

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def measure(config: Config) -> tuple[int, int, int]:
    """Return the bytes that are live when the forward pass is over, at most in forward and backward pass, and on the host.

    Weights and their gradients are not among them, except those that the output layer's backward hands on. Of what
    `offload` brings back to the GPU, one block's is there at a time.
    """
    shape, train = shape_of(config), config.train
    B, T, n = train.micro_batch_size, config.data.seq_len, config.parallel.sequence_parallel_size
    group = SequenceGroup(n, 0, "")
    with ExitStack() as stack:
        for module in (activation, attention, dropout, layer_norm, linear_cross_entropy, rms_norm, rope):
            stack.enter_context(patch.object(module, "use_triton", lambda x: True))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda kind: False))  # which meta has none of
        default = torch.get_default_dtype()
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(DTYPES[train.precision])
        with torch.device("meta"):
            model = Transformer(
                shape, 1, train.activation_checkpointing, train.z_loss, train.label_smoothing, group,
                train.ffn_chunk_tokens,
            )  # fmt: skip
            if train.lora is not None:
                add_adapters(model, train.lora)
        torch.set_default_dtype(default)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        tokens_BT = torch.zeros(B, T // n, dtype=torch.int64, device="meta")
        doc_start_BT, row_ids_B = torch.zeros(B, T, dtype=torch.int32, device="meta"), torch.arange(B, device="meta")
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with LiveBytes([*model.parameters(), *gradients, tokens_BT, doc_start_BT, row_ids_B]) as live:
            stack.enter_context(patch.object(activation_offload, "_to_host", live.to_host))
            stack.enter_context(patch.object(KeptOnHost, "_fetch", lambda _, kept: torch.empty_like(kept.on_host)))
            objective, _ = model(tokens_BT, tokens_BT, doc_start_BT, row_ids_B, 0)
            at_end = live.now
            objective.backward()
    return at_end, live.peak, live.on_host
