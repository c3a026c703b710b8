"""Block inputs in the host's memory: the same gradients as `full`, and less of the GPU's memory."""

from __future__ import annotations

import pytest
import torch

from pretrain.options.config import ModelSection
from pretrain.options.families import resolve_shape
from pretrain.training.run import set_determinism
from pretrain.transformer.model import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
]
T, D, LAYERS = 4096, 256, 12


def step(mode, chunk):
    """Return the gradients of the second of two steps, and the peak of its memory beyond what was there before."""
    shape = resolve_shape(ModelSection(dim=D, num_layers=LAYERS, num_heads=4), 512, T)
    model = Transformer(shape, 1, mode, ffn_chunk_tokens=chunk).to("cuda", torch.bfloat16)
    tokens = (torch.arange(T, device="cuda") * 7 % 512)[None]
    starts = torch.zeros(1, T, dtype=torch.int32, device="cuda")
    for _ in range(2):
        model.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(tokens, tokens.roll(-1, 1), starts)[0].backward()
        torch.cuda.synchronize()
    return [p.grad for p in model.parameters()], torch.cuda.max_memory_allocated() - before


def test_gradients_are_the_same_and_memory_is_less():
    set_determinism(True)
    try:
        (expected, full), (found, offloaded) = step("full", 0), step("offload", 0)
        chunked, least = step("offload", T // 16)
    finally:
        set_determinism(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for a, b in zip(chunked, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))
    block = 2 * T * D * 2  # bytes of what a block keeps
    assert full - offloaded > (LAYERS - 4) * block  # a few are on their way
    assert least < offloaded
