"""The Triton attention on a GPU, by the rule that the interpreter's tests use, at the sizes of training."""

import dataclasses
import itertools

import pytest
import torch

from kernels import attention_op
from kernels.attention import attention
from kernels.visibility import visibility
from tests.helpers.attention_cases import Case, check, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
]

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256)
SHAPES = ((1, 1), (1, 3), (2, 1), (3, 799), (113, 203), (239, 1), (511, 1), (1023, 1024), (1024, 1023), (2048, 2048))
DOCUMENTS = (1, 700, 33, 2, 300, 64, 5, 128, 1, 1, 900)
VARIANTS = (
    Case(1023, H=6, K=2, lengths=DOCUMENTS),
    Case(700, C=80, full=True, lengths=DOCUMENTS, window=100),
    Case(640, 1100, K=2, C=128, window=333, softcap=2.0, scale=0.3),
    Case(515, C=64, lengths=DOCUMENTS, dropout_p=0.3),
    Case(1000, C=128, lengths=DOCUMENTS, dropout_p=0.1, softcap=20.0),
)
MODES = pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "deterministic"])


@pytest.fixture(params=["as on this GPU", "pointers"])
def path(request, monkeypatch):
    """Run as training would here, and through pointers, as on GPUs before Hopper."""
    if request.param == "pointers":
        monkeypatch.setattr(attention_op, "_descriptors_pay", lambda device: False)


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_every_width_of_heads(path, C, dtype, deterministic):
    check(Case(239, 301, H=2, C=C, deterministic=deterministic), dtype, "cuda")


@MODES
@pytest.mark.parametrize("C", [64, 128])
def test_every_number_of_queries_and_keys(path, C, deterministic):
    for shape, full in itertools.product(SHAPES, (False, True)):
        check(Case(*shape, H=2, K=2, C=C, full=full, deterministic=deterministic), torch.bfloat16, "cuda")


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_windows_softcap_and_dropout(path, dtype, deterministic):
    for case in VARIANTS:
        check(dataclasses.replace(case, deterministic=deterministic), dtype, "cuda")


@MODES
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2), (8, 1), (32, 1)])
def test_query_heads_share_key_heads(path, H, K, deterministic):
    check(Case(500, H=H, K=K, C=64, deterministic=deterministic), torch.bfloat16, "cuda")


@MODES
def test_large_scores(path, deterministic):
    check(Case(1024, C=128, gain=5.0, deterministic=deterministic), torch.bfloat16, "cuda")


@pytest.mark.parametrize("C", [64, 128])
def test_the_same_bits_every_time(C):
    case = Case(1500, H=8, K=2, C=C, lengths=DOCUMENTS, deterministic=True)
    tensors = case.tensors(torch.bfloat16, "cuda")
    first = results(attention, case, tensors)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, results(attention, case, tensors), strict=True))


def test_one_pass_differs_by_rounding_only():
    case = Case(2048, H=4, K=4, C=128)
    tensors = case.tensors(torch.bfloat16, "cuda")
    expected = results(attention, dataclasses.replace(case, deterministic=True), tensors)
    for _ in range(20):
        for a, b in zip(results(attention, case, tensors), expected, strict=True):
            assert (a.double() - b.double()).norm() <= 2e-3 * b.double().norm()


def test_determinism_follows_torch():
    case = Case(1024, H=4, K=4, C=64)
    q, k, v, grad = case.tensors(torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = results(attention, dataclasses.replace(case, deterministic=True), [q, k, v, grad])
    torch.use_deterministic_algorithms(True)
    try:
        out = attention(*leaves, case.visible(torch.bfloat16, "cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.autograd.grad(out, leaves, grad)[0], expected[1])


def test_strided_tensors_are_read_right(path):
    wide = torch.randn(2, 333, 12, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = wide[:, :, :8], wide[:, :, 8:10], wide[:, :, 10:]
    grad = torch.randn(2, 8, 64, 333, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    case = Case(333, H=8, K=2, C=64, deterministic=True)
    found = results(attention, case, [q, k, v, grad])
    dense = results(attention, case, [x.contiguous() for x in (q, k, v, grad)])
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


def test_nan_in_gives_nan_out(path):
    q, k, v, _ = Case(300, C=64).tensors(torch.bfloat16, "cuda")
    q[0, 7, 0, 3] = float("nan")
    out = attention(q, k, v, Case(300, C=64).visible(torch.bfloat16, "cuda"))
    assert out[0, 7, 0].isnan().all() and int(out.isnan().any(-1).sum()) == 1


def test_more_rows_and_heads_than_an_axis_holds():
    B, H = 300, 256  # 76800 programs: other axes of a grid end at 65535
    q, k, v = (torch.randn(B, 16, H, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    visible = visibility(torch.zeros(B, 16, dtype=torch.int32, device="cuda"), 16, torch.bfloat16)
    part = visibility(torch.zeros(1, 16, dtype=torch.int32, device="cuda"), 16, torch.bfloat16)
    out = attention(q, k, v, visible)
    assert torch.equal(out[-1:], attention(q[-1:], k[-1:], v[-1:], part))


@MODES
def test_more_than_two_to_the_31_elements(deterministic):
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB of GPU memory")
    B, T, H, C = 17, 8192, 128, 128  # 2.28e9 elements; one key head, so that the rest fits
    q = torch.randn(B, T, H, C, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(B, T, 1, C, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    documents = (torch.arange(T, device="cuda") // 64 * 64).expand(B, -1)  # short ones: seconds, not minutes

    def run(rows: slice) -> list[torch.Tensor]:
        leaves = [x[rows].detach().requires_grad_() for x in (q, k, v)]
        visible = visibility(documents[rows], T, torch.bfloat16)
        out = attention(*leaves, visible, deterministic=deterministic)
        grads = torch.autograd.grad(out, leaves, q[rows])
        return [out[-1:].detach().clone(), *(grad[-1:].clone() for grad in grads)]

    whole, last = run(slice(None)), run(slice(-1, None))
    for a, b in zip(whole, last, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_compiles_as_one_graph():
    case = Case(257, H=4, K=2, C=64, lengths=DOCUMENTS)
    tensors = case.tensors(torch.bfloat16, "cuda")
    visible = case.visible(torch.bfloat16, "cuda")
    compiled = torch.compile(lambda q, k, v: attention(q * 2, k, v, visible), fullgraph=True)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    expected = attention(leaves[0] * 2, *leaves[1:], visible)
    torch.testing.assert_close(compiled(*leaves), expected, atol=2e-2, rtol=2e-2)
    compiled(*leaves).backward(tensors[3])
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
