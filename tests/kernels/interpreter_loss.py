"""The Triton cross-entropy in Triton's interpreter. Run in a process of its own by `test_linear_cross_entropy`.

`TRITON_INTERPRET` is read when a kernel is defined, so it cannot be set in a process that has imported `kernels`.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import cross_entropy as program
from kernels import linear_cross_entropy_op as operator
from kernels import loss_chunks
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_truth, token_losses
from tests.helpers.loss_cases import DTYPES, OPTIONS, draw, loss_of_logits, measure, results
from tests.kernels import interpreter_bf16, interpreter_speed

interpreter_bf16.install()
interpreter_speed.install()
torch.set_num_threads(1)


@pytest.fixture
def several_blocks(monkeypatch):
    """Let a row of a few hundred classes be several blocks and a rest."""
    monkeypatch.setattr(program, "MAX_BLOCK", 64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_stay_within_twice_those_of_eager_code(dtype, options):
    for num_tokens, num_classes in ((0, 7), (3, 1), (1, 7), (33, 100), (2, 4097)):
        ratio = measure(draw(num_tokens, num_classes, dtype), num_classes, **options)
        assert ratio <= 1.0, f"{num_tokens} x {num_classes}: {ratio:.2f} of the bound"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_several_blocks_whose_gradient_lies_over_their_logits(several_blocks, dtype, options):
    for num_classes in (192, 355):
        assert measure(draw(4, num_classes, dtype), num_classes, **options) <= 1.0


@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [5, 8])
def test_chunks_give_what_one_chunk_gives(rows, dtype, options, monkeypatch):
    x, weight, targets = draw(17, 100, dtype)
    whole = results(lambda *a, **o: linear_cross_entropy(*a, 100, **o), x, weight, targets, 0.7, **options)
    monkeypatch.setattr(loss_chunks, "CHUNK_ELEMENTS", rows * 100)
    monkeypatch.setattr(loss_chunks, "CHUNK_ROWS", 1)
    assert loss_chunks.chunk_rows(17, 100) <= rows
    parts = results(lambda *a, **o: linear_cross_entropy(*a, 100, **o), x, weight, targets, 0.7, **options)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_truth(options):
    x, weight, targets = draw(9, 100, torch.float32)
    found = results(lambda *a, **o: linear_cross_entropy(*a, 100, **o), x, weight, targets, 0.7, **options)
    truth = results(lambda *a, **o: linear_cross_entropy_truth(*a, 100, **o), x, weight, targets, 0.7, **options)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_tokens_and_none_scored_give_zeros(options):
    for num_tokens in (0, 5):
        x, weight, targets = draw(num_tokens, 100, torch.bfloat16)
        targets[:] = -100
        weight[100:] = 0
        found = results(lambda *a, **o: linear_cross_entropy(*a, 100, **o), x, weight, targets, 3.0, **options)
        assert all((part == 0).all() for part in found)
        assert token_losses(x, weight, targets, 100, options.get("softcap")).tolist() == [0.0] * num_tokens


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_large_logits(options):
    x, weight, targets = draw(17, 100, torch.float32)
    with torch.no_grad():
        top = (x @ weight[:100].t()).abs().max()
    assert measure((x * (1e4 / top), weight, targets), 100, **options) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_read_right_and_left_alone(dtype):  # fla#759, unsloth#10617
    wide, weight, _ = draw(66, 100, dtype, width=80)
    _, _, targets = draw(33, 100, dtype)
    before = wide.clone()
    every_other = torch.stack([targets, targets], 1).flatten()[::2]
    assert measure((wide[::2, 10:50], weight[:, 40:], every_other), 100) <= 1.0
    assert measure((wide[:, :33].t(), weight[:, :66].contiguous(), targets), 100) <= 1.0
    assert torch.equal(wide, before)


def test_two_calls_accumulate():  # a weight whose gradient was there already: Liger-Kernel#512, #827
    x, weight, targets = draw(20, 100, torch.float32)
    leaf = weight.clone().requires_grad_()
    for rows in (slice(0, 11), slice(11, 20)):
        linear_cross_entropy(x[rows], leaf, targets[rows], 100)[0].backward()
    whole = results(lambda *a: linear_cross_entropy(*a, 100), x, weight, targets, 1.0)
    torch.testing.assert_close(leaf.grad, whole[3], rtol=1e-5, atol=1e-6)


def test_fp16_keeps_probabilities_that_it_cannot_hold():
    # Half of the classes have a probability of 2^-30, where fp16 ends at 2^-24; their weights are all there is to x.
    x, weight = torch.ones(1, 2, dtype=torch.float16), torch.zeros(4096, 2, dtype=torch.float16)
    weight[2048:, 0] = -30 * 0.6931 + 11 * 0.6931
    weight[2048:, 1] = 1e-3
    _, _, grad_x, grad_weight = results(
        lambda *a: linear_cross_entropy(*a, 4096), x, weight, torch.tensor([0]), 2.0**12
    )
    assert grad_weight[2048:, 1].min() > 0.9 * 2.0**-18 and grad_weight[2048:, 1].max() < 1.1 * 2.0**-18
    assert grad_x[0, 1] > 0


def test_a_class_that_does_not_exist_gives_nan():  # and reads nothing outside: Liger-Kernel#916
    x, weight, targets = draw(3, 100, torch.float32)
    for wrong in (100, -1, 2**40):
        targets[0] = wrong
        assert token_losses(x, weight, targets, 100).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_losses(softcap):  # without gradients, so that none can be wrong: Liger-Kernel#968
    x, weight, targets = draw(12, 100, torch.float32)
    losses = token_losses(x, weight, targets, 100, softcap)
    for row in range(12):
        wanted = loss_of_logits(x[row : row + 1] @ weight[:100].t(), targets[row : row + 1], softcap=softcap)[1]
        torch.testing.assert_close(losses[row], wanted)
    with torch.no_grad():
        objective, cross_entropy = linear_cross_entropy(x, weight, targets, 100, 0.1, 0.0, softcap)
    torch.testing.assert_close(cross_entropy, losses.sum())
    assert objective > cross_entropy and not losses.requires_grad


def test_operators_pass_opcheck():
    x, weight, targets = draw(5, 24, torch.float32)
    leaves = (x.requires_grad_(), torch.nan_to_num(weight).requires_grad_())
    torch.library.opcheck(torch.ops.longhaul.linear_cross_entropy.default, (*leaves, targets, 24, 1e-2, 0.1, None))
    torch.library.opcheck(
        torch.ops.longhaul.token_losses.default, (x.detach(), leaves[1].detach(), targets, 24, 0.0, 0.0, 2.0)
    )
    torch.library.opcheck(torch.ops.longhaul.scaled.default, (x.detach(), torch.tensor(0.5), torch.bfloat16))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compiles_as_one_graph_and_runs_under_checkpointing(autocast):
    x, weight, targets = draw(9, 40, torch.float32)

    def plain(x, weight, targets, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return linear_cross_entropy(x * 1.5, weight, targets, 40, **options)

    def checkpointed(*arguments, **options):
        return checkpoint(plain, *arguments, use_reentrant=False, **options)

    functions = (plain, torch.compile(plain, fullgraph=True, backend="aot_eager"), checkpointed)
    options = {"z_loss": 1e-2, "softcap": 3.0}
    found = [results(function, x, weight, targets, 0.3, **options) for function in functions]
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    half = results(lambda x, w, t, **o: linear_cross_entropy((x * 1.5).bfloat16(), w.bfloat16(), t, 40, **o), x, weight,
                   targets, 0.3, **options)  # fmt: skip
    assert autocast == torch.equal(found[0][0], half[0])
    assert found[0][2].dtype == found[0][3].dtype == torch.float32


def test_factors_of_two_dtypes_are_multiplied_in_the_wider():
    x, weight, targets = draw(9, 40, torch.float32)
    found = results(lambda *a: linear_cross_entropy(*a, 40), x.bfloat16(), weight, targets, 1.0)
    wanted = results(lambda *a: linear_cross_entropy(*a, 40), x.bfloat16().float(), weight, targets, 1.0)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[2], wanted[2].bfloat16())
    assert torch.equal(found[3], wanted[3])


def test_the_same_bits_every_time():
    x, weight, targets = draw(9, 100, torch.float32)
    first, second = (results(lambda *a: linear_cross_entropy(*a, 100), x, weight, targets, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_lie_past_two_to_the_31(several_blocks, grad_dtype):
    stride = 2**30
    try:
        memory = torch.empty(2 * stride + 128, dtype=torch.float32)  # address space; only a few pages are touched
    except RuntimeError:
        pytest.skip("8 GiB of address space cannot be had")
    near, far = program.new_logits(3, 100, memory.device), memory.as_strided((3, 100), (stride, 1))
    near.copy_(torch.randn(3, 100))
    near[1] = float("nan")  # not scored: not read
    far.copy_(near)
    found = []
    for logits in (near, far):
        losses = torch.empty(2, 3)
        targets = torch.tensor([5, -100, 99])
        grad = program.cross_entropy_(logits, targets, losses[0], losses[1], (0.1, 0.1, 3.0), grad_dtype)
        found.append((losses, grad.clone()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[1][1][1] == 0).all() and (found[1][1][2] != 0).all()


class CountBytes(TorchDispatchMode):
    """Adds up all memory that operators allocate, whether it is freed or not."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, torch.Tensor):
                self.seen[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return out


def test_memory_is_what_the_formula_says(monkeypatch):
    monkeypatch.setattr(loss_chunks, "CHUNK_ELEMENTS", 1000)
    x, weight, targets = draw(33, 100, torch.float32)
    N, D, Vp, rows = 33, 24, 113, loss_chunks.chunk_rows(33, 100)
    with CountBytes() as count:
        outputs = operator.compute(x, weight, targets, 100, (0.0, 0.0, None), True)
    ours = {t.untyped_storage().data_ptr() for t in (x, weight, targets)}
    found = sum(size for address, size in count.seen.items() if address not in ours)
    assert len(outputs) == 4 and rows == 9
    assert found == 4 * rows * program.row_stride(100) + 4 * Vp * D + 4 * N * D + 8 * N
