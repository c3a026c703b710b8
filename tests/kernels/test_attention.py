import pytest
import torch

from kernels.attention import attention
from kernels.attention_torch import attention_truth, repeat_heads
from kernels.dropout import DropoutKey, attention_keep_mask, attention_seeds
from kernels.visibility import visibility

DOC_START = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 5, 5, 9], [0] * 10, list(range(10))])


def draw(queries=10, keys=10, heads=4, kv_heads=2, width=8, rows=3, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = ((rows, queries, heads, width), (rows, keys, kv_heads, width), (rows, keys, kv_heads, width))
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


def by_hand(q, k, v, doc_start, window=None, softcap=None):
    out = torch.zeros_like(q)
    offset = k.shape[1] - q.shape[1]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            end = offset + t + 1
            seen = slice(max(int(doc_start[b, t]), end - window if window else 0), end)
            for h in range(q.shape[2]):
                g = h * k.shape[2] // q.shape[2]
                scores = k[b, seen, g] @ q[b, t, h] / q.shape[3] ** 0.5
                probabilities = (softcap * (scores / softcap).tanh() if softcap else scores).softmax(0)
                out[b, t, h] = probabilities @ v[b, seen, g]
    return out


@pytest.mark.parametrize("function", [attention, attention_truth])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_query_sees_its_document_up_to_itself(function, kv_heads):
    q, k, v = draw(kv_heads=kv_heads)
    y = function(q, k, v, visibility(DOC_START, 10, q.dtype))
    torch.testing.assert_close(y, by_hand(q, k, v, DOC_START))


def test_gradients_equal_those_of_the_truth():
    tensors = draw()
    visible = visibility(DOC_START, 10, torch.float32)
    grad = torch.randn(3, 10, 4, 8)
    found = torch.autograd.grad(attention(*tensors, visible), tensors, grad)
    for a, b in zip(found, torch.autograd.grad(attention_truth(*tensors, visible), tensors, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_queries_are_the_last_of_the_slots():
    q, k, v = draw(queries=3)
    starts = torch.tensor([[0, 0, 0], [4, 4, 4], [7, 8, 9]])
    torch.testing.assert_close(attention(q, k, v, visibility(starts, 10, q.dtype)), by_hand(q, k, v, starts))


def test_a_long_row_of_many_short_documents():
    # Blocks of keys that a query sees nothing of must not leave NaN behind in the fused kernel.
    q, k, v = draw(queries=700, keys=700, rows=1)
    starts = (torch.arange(700) // 3 * 3)[None]
    visible = visibility(starts, 700, q.dtype)
    y = attention(q, k, v, visible)
    torch.testing.assert_close(y, attention_truth(q, k, v, visible))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), (q, k, v)))


def test_bf16_stays_within_twice_the_rounding_of_the_truth():
    wide = draw()
    narrow = [x.detach().bfloat16() for x in wide]
    exact = attention_truth(*(x.double() for x in narrow), visibility(DOC_START, 10, torch.float64))
    visible = visibility(DOC_START, 10, torch.bfloat16)
    error = (attention(*narrow, visible) - exact).abs().max()
    assert error <= 2 * (attention_truth(*narrow, visible) - exact).abs().max()


def test_dropout_drops_probabilities_by_the_mask_of_the_row():
    q, k, _ = draw(kv_heads=4, width=10)
    v = torch.eye(10)[None, :, None].expand(3, 10, 4, 10)  # the output is then the probabilities
    visible, key = visibility(DOC_START, 10, q.dtype), DropoutKey(1, 2, torch.tensor([5, 6, 7]), 3, 1)
    kept_BHTS = attention_keep_mask(attention_seeds(4, key), 10, 10, 0.25)
    probabilities = attention(q, k, v, visible).permute(0, 2, 1, 3)
    dropped = attention(q, k, v, visible, 0.25, key).permute(0, 2, 1, 3)
    torch.testing.assert_close(dropped, torch.where(kept_BHTS, probabilities / 0.75, 0.0))
    assert attention(q, k, v, visible, 0.25, None).equal(attention(q, k, v, visible))
    assert attention(q, k, v, visible, 0.25, attention_seeds(4, key)).equal(attention(q, k, v, visible, 0.25, key))


def test_repeated_heads_attend_as_grouped_ones_do():
    q, k, v = draw()
    visible, grad = visibility(DOC_START, 10, q.dtype), torch.randn(3, 10, 4, 8)
    grouped = attention(q, k, v, visible)
    repeated = attention(q, repeat_heads(k, 4), repeat_heads(v, 4), visible)
    torch.testing.assert_close(repeated, grouped)
    for a, b in zip(
        torch.autograd.grad(repeated, (k, v), grad), torch.autograd.grad(grouped, (k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [attention, attention_truth])
@pytest.mark.parametrize("window", [1, 2, 4, 10, 30])
def test_a_query_sees_the_last_keys_of_its_document_only(function, window):
    q, k, v = draw()
    y = function(q, k, v, visibility(DOC_START, 10, q.dtype, window))
    torch.testing.assert_close(y, by_hand(q, k, v, DOC_START, window))
    last = function(q[:, 7:], k, v, visibility(DOC_START[:, 7:], 10, q.dtype, window))  # as in generation
    torch.testing.assert_close(last, y[:, 7:])


def test_the_window_holds_in_the_short_bf16_path():
    wide = draw()
    narrow = [x.detach().bfloat16() for x in wide]
    exact = by_hand(*(x.double() for x in narrow), DOC_START, window=3)
    visible = visibility(DOC_START, 10, torch.bfloat16, 3)
    error = (attention(*narrow, visible) - exact).abs().max()
    assert error <= 2 * (attention_truth(*narrow, visible) - exact).abs().max()
    without = visibility(DOC_START, 10, torch.bfloat16)
    assert (attention(*narrow, without) - exact).abs().max() > 10 * error


def test_visibility_says_which_key_is_first():
    assert visibility(DOC_START, 10, torch.float32, 2).first_BT[0].tolist() == [0, 0, 1, 3, 3, 5, 5, 6, 7, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_bounds_the_scores(dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in draw())
    with torch.no_grad():
        q *= 20  # scores far beyond the cap
    visible = visibility(DOC_START, 10, dtype, 4)
    exact = by_hand(*(x.double() for x in (q, k, v)), DOC_START, 4, softcap=3.0)
    y = attention(q, k, v, visible, softcap=3.0)
    torch.testing.assert_close(y.double(), exact, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    assert (attention(q, k, v, visible) - exact).abs().max() > 0.1
    grads = torch.autograd.grad(y.float().square().sum(), (q, k, v))
    expected = torch.autograd.grad(exact.square().sum(), (q, k, v))
    for a, b in zip(grads, expected, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2  # of the scores that bf16 rounds before the cap
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_a_softcap_and_dropout_together():
    q, k, v = draw()
    visible, key = visibility(DOC_START, 10, q.dtype), DropoutKey(1, 2, torch.tensor([5, 6, 7]), 3, 1)
    capped = attention(q, k, v, visible, 0.25, key, softcap=1e-3)  # all scores are equal: probabilities are 1 / keys
    uniform = attention(torch.zeros_like(q), k, v, visible, 0.25, key)
    torch.testing.assert_close(capped, uniform, atol=5e-3, rtol=0)


def test_each_key_knows_the_queries_that_see_it():
    starts = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 5, 5, 9], [0] * 10, list(range(10))])
    ends = torch.tensor([[3, 3, 3, 5, 5, 9, 9, 9, 9, 10], [10] * 10, list(range(1, 11))])
    cases = [visibility(starts, num_keys, torch.float32, window) for num_keys in (4, 10, 17) for window in (None, 1, 3)]
    cases += [visibility(starts, 10, torch.float32, window, ends) for window in (None, 2)]
    for visible in cases:
        first_BS, end_BS = visible.queries_BS
        query_T1 = torch.arange(10)[:, None]
        assert torch.equal((query_T1 >= first_BS[:, None]) & (query_T1 < end_BS[:, None]), visible.seen_BTS)


def test_full_attention_sees_the_whole_document():
    q, k, v = draw(rows=1)
    starts, ends = torch.tensor([[0] * 4 + [4] * 6]), torch.tensor([[4] * 4 + [10] * 6])
    y = attention(q, k, v, visibility(starts, 10, q.dtype, doc_end_BT=ends))
    for begin, end in ((0, 4), (4, 10)):
        part = [x[:, begin:end].transpose(1, 2) for x in (q, k, v)]
        apart = torch.nn.functional.scaled_dot_product_attention(*part, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(y[:, begin:end], apart)


@pytest.mark.parametrize("function", [attention, attention_truth])
def test_a_query_that_sees_nothing_gets_zeros(function):
    q, k, v = draw(keys=4, rows=1)  # of ten queries the first six come before the first key
    visible = visibility(torch.zeros(1, 10, dtype=torch.int64), 4, q.dtype)
    y = function(q, k, v, visible)
    assert torch.equal(y[:, :6], torch.zeros_like(y[:, :6]))
    torch.testing.assert_close(y[:, 6:], function(q[:, 6:], k, v, visibility(torch.zeros(1, 4), 4, q.dtype)))
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads) and (grads[0][:, :6] == 0).all()


@pytest.mark.parametrize("function", [attention, attention_truth])
def test_scores_are_scaled_as_asked(function):
    q, k, v = draw()
    visible = visibility(DOC_START, 10, q.dtype)
    torch.testing.assert_close(function(q, k, v, visible, scale=0.7), function(q * (0.7 * 8**0.5), k, v, visible))
