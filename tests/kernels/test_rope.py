import math

import pytest
import torch

from kernels.rope import RopeScaling, rope, rope_tables, rope_tile, rope_truth
from tests.helpers.interpreter_process import run_interpreted


def test_triton_in_the_interpreter():
    run_interpreted("tests/kernels/interpreter_operators.py", "rope or Rope")


@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 128, 256])
@pytest.mark.parametrize("num_heads", [1, 2, 5, 20, 40, 136])
def test_a_tile_holds_all_pairs_and_fits_the_registers(num_heads, head_dim):
    tokens, heads, pairs, num_warps = rope_tile(num_heads, head_dim)
    assert all(size & (size - 1) == 0 for size in (tokens, heads, pairs, num_warps))
    assert pairs >= head_dim // 2 and tokens * heads * pairs <= 16 * 32 * max(num_warps, 1)
    assert heads >= num_heads or heads * pairs == 4096


def tables(length=6, head_dim=8, theta=100.0):
    return rope_tables(torch.arange(length)[None], head_dim, theta)


def test_a_pair_is_turned_by_position_over_wavelength():
    cos, sin = tables()
    x = torch.zeros(1, 6, 1, 8)
    x[..., 1] = 1.0  # pairs with element 1 + 8/2
    y = rope(x, cos, sin)[0, 3, 0]
    angle = 3 * 100.0 ** (-2 / 8)
    expected = torch.zeros(8)
    expected[1], expected[5] = math.cos(angle), math.sin(angle)
    torch.testing.assert_close(y, expected)


def test_scores_depend_on_distance_alone():
    cos, sin = tables(12)
    q, k = torch.randn(8), torch.randn(8)
    rotated_q, rotated_k = (rope(v.expand(1, 12, 1, 8), cos, sin)[0, :, 0] for v in (q, k))
    scores = rotated_q @ rotated_k.T
    torch.testing.assert_close(scores.diagonal(-3), scores[3, 0].expand(9))


def test_equals_the_truth_forward_and_backward_and_leaves_its_input_alone():
    x = torch.randn(2, 6, 7, 8)[:, :, 1:5].requires_grad_()  # not contiguous
    cos, sin = rope_tables(torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]), 8, 100.0)
    before, grad = x.detach().clone(), torch.randn(2, 6, 4, 8)
    y = rope(x, cos, sin)
    torch.testing.assert_close(y, rope_truth(x, cos, sin))
    torch.testing.assert_close(
        torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(rope_truth(x, cos, sin), x, grad)[0]
    )
    assert torch.equal(x, before)


def test_tables_are_fp32_and_bf16_inputs_are_rounded_once():
    cos, sin = tables()
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(1, 6, 2, 8).bfloat16()
    assert torch.equal(rope(x, cos, sin), rope(x.float(), cos, sin).bfloat16())


def turns(scaling, length=3, head_dim=16, theta=10000.0):
    """Return what each pair turns by one position, and the length of the turned unit vector."""
    cos, sin = (table[0, 1, 0].double() for table in rope_tables(torch.arange(length)[None], head_dim, theta, scaling))
    return torch.atan2(sin, cos), (cos**2 + sin**2).sqrt()


def plain(head_dim=16, theta=10000.0):
    return theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)


def test_linear_scaling_divides_every_angle():
    angles, length = turns(RopeScaling("linear", 4.0))
    torch.testing.assert_close(angles, plain() / 4.0, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(length, torch.ones_like(length))


def test_llama3_scaling_leaves_what_turns_often():
    angles, _ = turns(RopeScaling("llama3", 8.0, original_seq_len=1000))
    rounds = 1000 * plain() / (2 * math.pi)  # in an original row
    expected = []
    for angle, times in zip(plain().tolist(), rounds.tolist(), strict=True):
        kept = min(max((times - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(kept * angle + (1 - kept) * angle / 8.0)
    assert any(1 < times < 4 for times in rounds) and rounds.max() > 4 and rounds.min() < 1
    torch.testing.assert_close(angles, torch.tensor(expected).double(), rtol=1e-5, atol=1e-9)


def test_yarn_scaling_blends_along_a_ramp_and_lengthens():
    angles, length = turns(RopeScaling("yarn", 4.0, original_seq_len=1000))
    pair_of = lambda rounds: 8 * math.log(1000 / (rounds * 2 * math.pi)) / math.log(10000.0)  # noqa: E731
    begin, end = math.floor(pair_of(32)), math.ceil(pair_of(1))
    ramp = ((torch.arange(8).double() - begin) / (end - begin)).clamp(0, 1)
    assert 0 < ramp[2] < 1
    torch.testing.assert_close(angles, plain() * (1 - ramp) + plain() / 4.0 * ramp, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(length, torch.full_like(length, 0.1 * math.log(4.0) + 1.0), rtol=1e-6, atol=1e-6)
    _, given = turns(RopeScaling("yarn", 4.0, original_seq_len=1000, attention_factor=0.5))
    torch.testing.assert_close(given, torch.full_like(given, 0.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scaling", [RopeScaling("yarn", 4.0, 64), RopeScaling("llama3", 8.0, 64)])
def test_gradients_turn_back_with_the_scaled_tables(scaling):
    x = torch.randn(1, 6, 2, 8, dtype=torch.float32, requires_grad=True)
    cos, sin = rope_tables(torch.arange(6)[None], 8, 100.0, scaling)
    grad = torch.randn(1, 6, 2, 8)
    found, expected = (torch.autograd.grad(f(x, cos, sin), x, grad)[0] for f in (rope, rope_truth))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_without_gradients_the_bits_are_the_same(num_tokens):
    x, tables = torch.randn(2, num_tokens, 3, 16), rope_tables(torch.arange(num_tokens).expand(2, -1) + 7, 16, 1e4)
    with_gradients = rope(x, *tables)
    with torch.no_grad():
        assert torch.equal(rope(x, *tables), with_gradients)
