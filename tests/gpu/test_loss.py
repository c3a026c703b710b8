"""The Triton cross-entropy on a GPU, by the rule that the interpreter's tests use, at the sizes of training."""

import pytest
import torch
import torch.nn.functional as F

from kernels import loss_chunks
from kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from tests.helpers.loss_cases import DTYPES, OPTIONS, draw, measure, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_stay_within_twice_those_of_eager_code(dtype, options):
    shapes = ((0, 7), (33, 1), (1, 7), (33, 7), (1, 100), (33, 100), (7, 4097), (64, 8192), (199, 50257))
    for num_tokens, num_classes in shapes:
        ratio = measure(draw(num_tokens, num_classes, dtype, "cuda"), num_classes, **options)
        assert ratio <= 1.0, f"{num_tokens} x {num_classes}: {ratio:.2f} of the bound"


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_vocabulary_in_several_chunks(dtype, options, monkeypatch):
    monkeypatch.setattr(loss_chunks, "CHUNK_ELEMENTS", 2**26)
    for num_classes in (128256, 50257):
        inputs = draw(1500, num_classes, dtype, "cuda", width=256, padding=47)
        assert measure(inputs, num_classes, **options) <= 1.0


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_large_logits(options):
    x, weight, targets = draw(17, 100, torch.float32, "cuda")
    top = (x @ weight[:100].t()).abs().max()
    assert measure((x * (1e4 / top), weight, targets), 100, **options) <= 1.0


def test_the_same_bits_every_time():
    x, weight, targets = draw(4099, 50257, torch.bfloat16, "cuda", width=256)
    first = results(lambda *a: linear_cross_entropy(*a, 50257), x, weight, targets, 0.3)
    for _ in range(20):
        again = results(lambda *a: linear_cross_entropy(*a, 50257), x, weight, targets, 0.3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nan_in_gives_nan_out():
    x, weight, targets = draw(4, 5000, torch.float32, "cuda")
    targets[:] = torch.arange(4)
    x[1, 3] = float("nan")
    assert token_losses(x, weight, targets, 5000).isnan().tolist() == [False, True, False, False]
    _, _, grad_x, _ = results(lambda *a: linear_cross_entropy(*a, 5000), x, weight, targets, 1.0)
    assert grad_x[1].isnan().all() and not grad_x[[0, 2, 3]].isnan().any()


def test_compiles_as_one_graph():
    x, weight, targets = draw(300, 5000, torch.float32, "cuda", width=64)
    weight = torch.nan_to_num(weight)

    def loss(x, weight, targets):
        with torch.autocast("cuda", torch.bfloat16):
            return linear_cross_entropy(x * 1.5, weight, targets, 5000, 1e-4, 0.1, 30.0)

    found = [results(f, x, weight, targets, 0.3) for f in (loss, torch.compile(loss, fullgraph=True))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_peak_memory_is_a_sixth_of_the_unfused():
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    N, V, D = 8192, 128256, 2048
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, V, (N,), device="cuda")

    def unfused():
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    peaks = []
    for loss in (lambda: linear_cross_entropy(x, weight, targets, V)[0], unfused):
        (loss() / N).backward()  # what libraries allocate once
        x.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (loss() / N).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        x.grad = weight.grad = None
    fused, plain = peaks
    formula = 4 * (loss_chunks.chunk_rows(N, V) * V + V * D + N * D) + 8 * N
    assert fused <= 1.03 * formula + 2**26, f"{fused:,} bytes; the formula says {formula:,}"
    assert fused <= plain / 5.5, f"{fused:,} against {plain:,} bytes"
