"""What is computed twice, and what is kept meanwhile and where: bytes that live at once, counted at every operator."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from pretrain.errors import ConfigError
from pretrain.options.config import ModelSection
from pretrain.options.families import resolve_shape
from pretrain.transformer import activation_offload
from pretrain.transformer.activation_offload import check_checkpointing
from pretrain.transformer.model import Transformer
from tests.transformer.live_tensors import LiveTensors
from tests.transformer.test_model import ALL, GPT2, Counter, batch, build

FAMILIES = pytest.mark.parametrize("options", ALL, ids=[options["family"] for options in ALL])
T, D, F = 512, 32, 256  # a row whose feed-forward is the widest by far


@FAMILIES
def test_chunks_of_the_feed_forward_change_nothing_and_repeat_no_more_than_full(options):
    tokens, targets, starts = batch()
    ids, found, products = torch.tensor([3, 4]), {}, {}
    for mode, chunk in (("none", 0), ("none", 10), ("full", 0), ("full", 10), ("offload", 10), ("none", 48)):
        model = build(options, checkpointing=mode, ffn_chunk_tokens=chunk, dropout=0.0)
        loss, _ = model(tokens, targets, starts, ids, 7)
        with Counter() as counter:
            loss.backward()
        found[mode, chunk] = loss.detach(), [p.grad for p in model.parameters()]
        products[mode, chunk] = sum(counter.calls[name] for name in ("mm", "addmm", "bmm"))
        with torch.no_grad():
            assert torch.equal(model(tokens, targets, starts, ids, 7)[0], loss)
    loss, grads = found["none", 0]
    for one, other in found.values():
        torch.testing.assert_close(one, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(other, grads, rtol=1e-4, atol=1e-6)
    num_layers, num_chunks = 2, 5
    assert products["none", 48] == products["none", 0]  # all tokens are one chunk: nothing is computed again
    # Four products of a chunk's gradients and one again; of a whole feed-forward, which `full` repeats too, likewise.
    assert products["none", 10] == products["none", 0] + num_layers * (5 * num_chunks - 4)
    # A norm behind it needs what the feed-forward returns, so that `full` computes that once more, by chunks or whole.
    more = 2 * num_chunks - 1 if model.shape.norm == "reordered_rmsnorm" else 0
    assert products["full", 10] == products["full", 0] + num_layers * (5 * (num_chunks - 1) + more)
    assert products["offload", 10] == products["full", 10]


def test_dropout_is_the_same_by_chunks():
    tokens, targets, starts = batch()
    found = []
    for chunk in (0, 10):
        model = build(GPT2, checkpointing="full", ffn_chunk_tokens=chunk, dropout=0.2, attention_dropout=0.2)
        model(tokens, targets, starts, torch.tensor([3, 4]), 7)[0].backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def peak_of(monkeypatch, num_layers, mode="none", chunk=0, num_rows=1):
    """Return the peak of what lives on the device in a step in units of a `[T, D]` tensor, and of what is on the host."""
    to_host, on_host = activation_offload._to_host, []

    def counted(tensor):
        with _disable_current_modes():  # the host's memory is another
            copy = to_host(tensor)
        on_host.append(copy.nbytes)
        return copy

    monkeypatch.setattr(activation_offload, "_to_host", counted)
    section = ModelSection(dim=D, num_layers=num_layers, num_heads=4, ffn_dim=F)
    model = Transformer(resolve_shape(section, 128, T), 1, mode, ffn_chunk_tokens=chunk)
    tokens = torch.arange(num_rows * T).view(num_rows, T) % 128
    args = tokens, tokens.roll(-1, 1), torch.zeros(num_rows, T, dtype=torch.int32)
    model(*args)[0].backward()  # gradients exist from now on
    on_host.clear()
    with LiveTensors() as live:
        model(*args)[0].backward()
    assert live.count() == 0
    monkeypatch.undo()
    return live.peak_bytes / (T * D * 4), sum(on_host) / (T * D * 4)


def test_a_feed_forward_by_chunks_holds_what_is_wide_for_a_chunk_only(monkeypatch):
    wide = 3 * F / D  # gate and up, and their product
    for mode, num_layers in (("none", 1), ("full", 3)):
        whole, _ = peak_of(monkeypatch, num_layers, mode)
        chunked, _ = peak_of(monkeypatch, num_layers, mode, T // 16)
        assert whole - chunked > 0.8 * wide, (mode, whole, chunked)
    # without recomputing blocks every one of them keeps it: what a further block costs falls by as much
    deeper = [
        peak_of(monkeypatch, 3, "none", chunk)[0] - peak_of(monkeypatch, 2, "none", chunk)[0] for chunk in (0, 32)
    ]
    assert deeper[0] - deeper[1] == pytest.approx(wide, rel=0.05)


def test_offloaded_inputs_of_blocks_are_in_the_other_memory(monkeypatch):
    kept = {mode: [peak_of(monkeypatch, num_layers, mode) for num_layers in (3, 6)] for mode in ("full", "offload")}
    growth = {mode: tuple(b - a for a, b in zip(*found, strict=True)) for mode, found in kept.items()}
    # of each block its input and the residual stream
    assert growth["full"] == pytest.approx((6.0, 0.0), abs=0.1)
    assert growth["offload"] == pytest.approx((0.0, 6.0), abs=0.1)
    assert kept["offload"][1][1] == 2 * 6 - 1  # the first block's input is the residual stream


def test_what_is_offloaded_is_a_copy_and_can_be_read_twice():
    inputs = activation_offload.KeptOnHost()
    x = torch.ones(3, requires_grad=True)
    with inputs.of_block():
        y = x.exp()
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().exp())


def test_a_cpu_has_no_other_memory():
    for mode in ("none", "selective", "full"):
        check_checkpointing(mode, torch.device("cpu"))
    check_checkpointing("offload", torch.device("cuda", 0))
    with pytest.raises(ConfigError) as caught:
        check_checkpointing("offload", torch.device("cpu"))
    assert str(caught.value) == (
        "train.activation_checkpointing is offload; expected none, selective or full on a CPU, whose memory is the "
        "host's. Use train.activation_checkpointing=full, which computes the same."
    )
