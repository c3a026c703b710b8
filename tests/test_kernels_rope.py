import math

import torch

from kernels.rope import rope, rope_tables, rope_truth


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
