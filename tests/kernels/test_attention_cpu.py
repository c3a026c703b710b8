import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import attention_cpu, pieces
from kernels.attention import attention
from kernels.attention_torch import attention_truth
from kernels.visibility import visibility

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def starts_of(*lengths):
    return torch.tensor([sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)])


def ends_of(*lengths):
    return torch.tensor([sum(lengths[: i + 1]) for i, length in enumerate(lengths) for _ in range(length)])


def one(*lengths):
    return starts_of(*lengths)[None]


ROWS = {
    "one document": one(300),
    "one document in two rows": one(700).expand(2, -1),
    "a long document": one(1600),
    "many short ones": one(*[7] * 50),
    "documents of one token": one(*[1] * 257),
    "one long beside short ones": one(3, 1, 1600, 20, 60, 80, 1, 1),
    "lengths around a chunk": one(63, 64, 65, 95, 96, 97, 127, 128, 129),
    "different cuts": torch.stack([starts_of(400), starts_of(100, 300), starts_of(*[10] * 40), starts_of(400)]),
    "short rows": torch.stack([starts_of(150), starts_of(1, 100, 49), starts_of(*[2] * 75)]),
    "several thousand tokens": one(900, 30, 200, 5, 1700, 300, 65),
}


class Scores(TorchDispatchMode):
    """Counts the scores of a head that PyTorch's fused kernel is asked for."""

    def __init__(self):
        super().__init__()
        self.count = self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is FLASH:
            q, k = args[:2]
            is_causal = args[4] if len(args) > 4 else (kwargs or {}).get("is_causal", False)
            keys = k.shape[2] / 2 + 256 if is_causal and k.shape[2] > 512 else k.shape[2]  # whole blocks of 512
            self.count += q.shape[0] * q.shape[2] * keys
            self.calls += 1
        return function(*args, **(kwargs or {}))


def draw(rows, queries, keys, heads=4, kv_heads=2, width=8, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = ((rows, queries, heads, width), (rows, keys, kv_heads, width), (rows, keys, kv_heads, width))
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


def assert_is_the_truth(starts, window=None, ends=None, num_keys=None, **sizes):
    B, T = starts.shape
    num_keys = num_keys or T
    tensors = draw(B, T, num_keys, **sizes)
    visible = visibility(starts, num_keys, torch.float32, window, ends)
    grad = torch.randn(tensors[0].shape)
    y, expected = (function(*tensors, visible) for function in (attention, attention_truth))
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, tensors, grad)
    for a, b in zip(found, torch.autograd.grad(expected, tensors, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    return y, found


@pytest.mark.parametrize("window", [None, 1, 50, 300])
@pytest.mark.parametrize("rows", ROWS)
def test_pieces_together_are_the_truth(rows, window):
    starts = ROWS[rows]
    assert_is_the_truth(starts, window, **({"heads": 2, "kv_heads": 1} if starts.shape[1] > 1000 else {}))


def test_a_window_longer_than_the_row():
    assert_is_the_truth(ROWS["different cuts"], 5000)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_may_share_keys(kv_heads):
    assert_is_the_truth(ROWS["different cuts"], kv_heads=kv_heads)


@pytest.mark.parametrize("window", [None, 40])
def test_full_attention_within_documents(window):
    lengths = (250, 3, 1, 90, 100)
    assert_is_the_truth(one(*lengths), window, ends_of(*lengths)[None])


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("num_queries", [1, 2, 100, 400])
def test_queries_that_follow_a_cache(num_queries, window):
    starts = torch.tensor([[0], [30], [300]]).expand(-1, num_queries)
    assert_is_the_truth(torch.minimum(starts, 500 - num_queries + torch.arange(num_queries)), window, num_keys=500)


@pytest.mark.parametrize("num_keys", [1, 40, 150])
def test_queries_that_see_nothing_get_zeros(num_keys):
    y, (grad_q, _, _) = assert_is_the_truth(torch.zeros(2, 400, dtype=torch.int64), num_keys=num_keys)
    assert (y[:, : 400 - num_keys] == 0).all() and (grad_q[:, : 400 - num_keys] == 0).all()


@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("rows", ["one document", "different cuts", "short rows", "lengths around a chunk"])
def test_bf16_is_within_twice_the_rounding_of_the_truth(rows, has_units, monkeypatch):
    for module in (attention_cpu, pieces):
        monkeypatch.setattr(module, "has_bf16_units", lambda: has_units)
    starts = ROWS[rows]
    B, T = starts.shape
    tensors = draw(B, T, T, dtype=torch.bfloat16)
    grad = torch.randn(tensors[0].shape).bfloat16()

    def errors(function):
        y = function(*tensors, visibility(starts, T, torch.bfloat16))
        found = zip([y, *torch.autograd.grad(y, tensors, grad)], exact, strict=True)
        return [float((a.detach().double() - b.detach()).square().mean().sqrt()) for a, b in found]

    wide = [x.detach().double().requires_grad_() for x in tensors]
    y = attention_truth(*wide, visibility(starts, T, torch.float64))
    exact = [y, *torch.autograd.grad(y, wide, grad.double())]
    for ours, truth in zip(errors(attention), errors(attention_truth), strict=True):
        assert ours <= 2 * truth + 1e-6


@pytest.mark.parametrize("has_units", [False, True])
def test_bf16_queries_that_see_nothing_get_zeros(has_units, monkeypatch):
    for module in (attention_cpu, pieces):
        monkeypatch.setattr(module, "has_bf16_units", lambda: has_units)
    tensors = draw(1, 20, 6, dtype=torch.bfloat16)
    y = attention(*tensors, visibility(torch.zeros(1, 20), 6, torch.bfloat16))
    assert (y[:, :14] == 0).all() and (y[:, 14:] != 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum(), tensors))


def test_queries_keys_and_values_may_be_parts_of_one_projection():
    starts = ROWS["different cuts"]
    qkv = torch.randn(4, 400, 8, 16, dtype=torch.float64, requires_grad=True)
    visible = visibility(starts, 400, torch.float64)
    grad = torch.randn(4, 4, 400, 16, dtype=torch.float64).transpose(1, 2)
    ys = [f(qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:], visible, scale=0.3) for f in (attention, attention_truth)]
    torch.testing.assert_close(*ys, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, grad)[0] for y in ys), rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    tensors = [x.detach().double().requires_grad_() for x in draw(1, 200, 200, heads=2, kv_heads=1, width=2)]
    visible = visibility(one(70, 100, 30), 200, torch.float64)
    torch.autograd.gradcheck(lambda *x: attention(*x, visible), tensors, fast_mode=True)


def test_checkpointing_computes_the_same_again():
    tensors = draw(4, 400, 400)
    visible = visibility(ROWS["different cuts"], 400, torch.float32)
    plain = torch.autograd.grad(attention(*tensors, visible).sum(), tensors)
    again = torch.autograd.grad(checkpoint(attention, *tensors, visible, use_reentrant=False).sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_compiler_can_be_used_around_it():
    tensors = draw(4, 400, 400)
    visible = visibility(ROWS["different cuts"], 400, torch.float32)
    y, expected = (f(*tensors, visible) for f in (torch.compile(attention, backend="aot_eager"), attention_truth))
    torch.testing.assert_close(y, expected)
    grads = (torch.autograd.grad(x.square().sum(), tensors) for x in (y, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "rows, window, most",
    [
        # scores to scores that are seen; a causal document in one masked call is 2.0
        ("one document", None, 1.3),
        ("one document in two rows", None, 1.2),
        ("a long document", None, 1.4),  # is_causal
        ("one long beside short ones", None, 1.4),
        ("lengths around a chunk", None, 1.8),
        ("several thousand tokens", None, 1.3),
        ("several thousand tokens", 300, 1.3),
        ("a long document", 200, 1.4),
        ("different cuts", None, 1.4),
        ("short rows", None, 3.0),  # cut in the same places in all rows
    ],
)
def test_few_scores_are_computed_that_nothing_sees(rows, window, most):
    starts = ROWS[rows]
    B, T = starts.shape
    visible = visibility(starts, T, torch.float32, window)
    with Scores() as scores, torch.no_grad():
        attention(*draw(B, T, T), visible)
    seen = int(visible.seen_BTS.sum())
    assert 0.9 * seen <= scores.count <= most * seen, (scores.count / seen, scores.calls)


def test_scores_grow_with_the_window_and_not_with_the_square_of_the_row():
    counts = []
    for T in (2000, 4000):
        with Scores() as scores, torch.no_grad():
            attention(*draw(1, T, T, heads=1, kv_heads=1), visibility(one(T), T, torch.float32, 300))
        counts.append(scores.count)
    assert counts[1] < 2.1 * counts[0]


def test_calls_are_few():
    for rows, window, most in (("one document in two rows", None, 11), ("many short ones", None, 6)):
        starts = ROWS[rows]
        visible = visibility(starts, starts.shape[1], torch.float32, window)
        assert len(visible.pieces) <= most
    full = visibility(one(900), 900, torch.float32, doc_end_BT=ends_of(900)[None])
    assert len(full.pieces) == 1 and full.pieces[0].bias_B1TS is None
    assert len(visibility(torch.tensor([[0], [7], [9]]), 5000, torch.float32).pieces) == 1


def test_biases_are_not_as_large_as_a_mask():
    def elements(visible):
        biases = {id(p.bias_B1TS): p.bias_B1TS for p in visible.pieces if p.bias_B1TS is not None}
        return sum(bias.numel() for bias in biases.values())

    assert elements(visibility(one(5000), 5000, torch.float32)) == 0
    assert elements(visibility(one(5000), 5000, torch.float32, 500)) < 0.15 * 5000**2
    assert elements(visibility(one(*[500] * 10), 5000, torch.float32)) < 0.01 * 5000**2
    assert math.prod(visibility(one(5000), 5000, torch.float32).bias_B1TS.shape) == 5000**2
