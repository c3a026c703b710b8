from dataclasses import replace

import torch

from kernels.dropout import DropoutKey
from kernels.visibility import visibility
from pretrain.options.config import ModelSection
from pretrain.options.families import resolve_shape
from pretrain.transformer.layers import Attention, Block, Context, LayerNorm, Linear, Output, RMSNorm, make_norm


def shape_of(**options):
    section = ModelSection(**({"dim": 16, "num_layers": 2, "num_heads": 4} | options))
    return resolve_shape(section, vocab_size=300, seq_len=8)


def fill(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def context(rows=2, length=8, key=None):
    starts = torch.zeros(rows, length, dtype=torch.int32)
    return Context(visibility(starts, length, torch.float32), None, key)


def test_norms_are_those_of_the_family():
    assert isinstance(make_norm(shape_of()), RMSNorm)
    assert isinstance(make_norm(shape_of(family="gpt2")), LayerNorm)


def test_a_norm_adds_to_the_residual_stream_first():
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    for norm in (fill(RMSNorm(16, 1e-5)), fill(LayerNorm(16, 1e-5))):
        y, stream = norm(x, residual)
        alone, same = norm(x + residual, None)
        assert torch.equal(stream, x + residual) and torch.equal(y, alone) and torch.equal(same, stream)


def test_a_block_is_two_residual_additions():
    block, shared = fill(Block(shape_of())), context()
    x, residual = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    added, stream = block(x, residual, shared)
    h = x + residual
    h = h + block.attention(block.attention_norm(h, None)[0], shared)
    torch.testing.assert_close(stream, h)
    torch.testing.assert_close(added, block.ffn(block.ffn_norm(h, None)[0], shared))


def test_grouped_queries_equal_full_attention_with_repeated_heads():
    grouped, full = fill(Attention(shape_of(num_kv_heads=2))), Attention(shape_of(num_kv_heads=4))
    with torch.no_grad():
        q, k, v = grouped.qkv.weight.view(8, 4, 16).split((4, 2, 2))
        full.qkv.weight.copy_(torch.cat((q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))).view(48, 16))
        full.output.weight.copy_(grouped.output.weight)
    x = torch.randn(2, 8, 16)
    torch.testing.assert_close(grouped(x, context()), full(x, context()))


def test_dropout_differs_between_layers_and_places():
    shape = shape_of(dropout=0.5)
    key = DropoutKey(1, 0, torch.arange(2))
    x, zeros = torch.ones(2, 8, 16), []
    for layer in (0, 1):
        block, own = fill(Block(shape)), context(key=replace(key, layer=layer))
        added, residual = block(x, torch.zeros_like(x), own)
        zeros += [residual == x, added == 0]  # what attention adds, and what the feed-forward does
    for a in range(4):
        assert 0.3 < zeros[a].float().mean() < 0.7
        assert all(not torch.equal(zeros[a], zeros[b]) for b in range(a))


def test_output_gives_logits_losses_or_their_sum():
    output = fill(Output(shape_of(), None))
    x, targets = torch.randn(2, 8, 16), torch.randint(0, 300, (2, 8))
    targets[0, :3] = -100
    logits, losses = output(x, None), output(x, targets, per_token=True)
    assert logits.shape == (2, 8, 300) and logits.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), expected.detach())
    objective, cross_entropy = output(x, targets)
    torch.testing.assert_close(cross_entropy, losses.sum())
    assert torch.equal(objective.detach(), cross_entropy)


def test_layers_leave_their_values_to_the_model():
    assert isinstance(Linear(2, 2), torch.nn.Linear)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Block(shape_of())
    assert torch.equal(torch.get_rng_state(), before)
