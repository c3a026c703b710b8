"""The Triton norms on a GPU, by the rule that the interpreter's tests use."""

import pytest
import torch

from tests.helpers.norm_cases import DTYPES, KINDS, SHAPES, implementations, inputs, measure, results, strided_ratio

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
]

LARGE = ((199, 4096), (8192, 1024), (64, 8192), (5, 32768))


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_stay_within_twice_those_of_eager_code(kind, dtype, with_residual):
    for shape in (*SHAPES, *LARGE):
        ratio = measure(kind, shape, dtype, "cuda", with_residual)
        assert ratio <= 1.0, f"{shape}: {ratio:.2f} of the bound"


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs_are_read_right_and_left_alone(kind):
    assert strided_ratio(kind, "cuda") <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind):
    arguments = inputs(kind, (4099, 1128), torch.bfloat16, "cuda", True)
    norm, _ = implementations(kind, True)
    grads = [torch.randn(4099, 1128, device="cuda") for _ in range(2)]
    first = results(norm, arguments, grads)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, results(norm, arguments, grads), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_past_two_to_the_31_elements(kind):
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    rows, width = 2**31 // 8192 + 3, 8192
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    _, _, weight, bias = inputs(kind, (1, width), torch.bfloat16, "cuda", False)
    norm, _ = implementations(kind, False)
    whole = results(norm, [x, None, weight, bias], [x])
    tail = results(norm, [x[-5:].clone(), None, weight, bias], [x[-5:]])
    assert torch.equal(whole[0][-5:], tail[0])
    assert torch.equal(whole[1][-5:], tail[1])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_gives_nan_out(kind):
    arguments = inputs(kind, (3, 192), torch.float32, "cuda", False)
    arguments[0][1, 5] = float("nan")
    norm, _ = implementations(kind, False)
    y, grad_x, *_ = results(norm, arguments, [torch.ones(3, 192, device="cuda")])
    assert y[1].isnan().all() and grad_x[1].isnan().all()
    assert not y[0].isnan().any() and not y[2].isnan().any()
