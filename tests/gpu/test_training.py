"""Training on a GPU: the losses that PyTorch's operators give, and no wait for the GPU in forward and backward."""

import pytest
import torch

pytest.importorskip("pydantic", reason="needs pydantic, with which the options of a model are checked")

from pretrain.options.families import resolve_shape
from tests.helpers.training_agreement import (
    ALL,
    BYTES_VOCAB,
    FP32_BOUND,
    backward_once,
    bf16_excess,
    build,
    byte_steps,
    compare,
    make_config,
    train,
    with_train,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda is not available"),
    pytest.mark.filterwarnings("ignore:attention. fp32"),  # PyTorch's attention runs: the others are compared
]
SEQ_LEN, NUM_STEPS = 512, 200


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def sized(family, **model):
    """A model of 20 million parameters, and batches of 2,048 tokens."""
    options = {"family": family, "dim": 512, "num_layers": 6, "num_heads": 8, "ffn_dim": 1408}
    config = make_config(
        model=options | {"num_kv_heads": 2 if family == "llama" else None} | model,
        data={"seq_len": SEQ_LEN}, train={"global_batch_size": 4, "micro_batch_size": 4}, optim={"lr": 5e-4},
    )  # fmt: skip
    return config, resolve_shape(config.model, BYTES_VOCAB, SEQ_LEN)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_200_steps_with_operators_on_are_those_with_them_off(family):
    config, shape = sized(family)
    steps = byte_steps(config, NUM_STEPS, "cuda")
    truth = train(config, shape, steps, device="cuda")
    assert sum(truth[-20:]) < 0.85 * sum(truth[:20])

    _, found, torchs = compare(config, shape, steps, ALL, truth, "cuda", num_roundings=2)
    # PyTorch's own roundings may part further than 1e-5 here: then by as much, of which two runs are a rough guess.
    bound = max(FP32_BOUND, 3 * max(one.relative for one in torchs))
    assert found.relative <= bound, (found, torchs)

    half = with_train(config, precision="bf16")
    _, found, torchs = compare(half, shape, steps, ALL, truth, "cuda", num_roundings=1)
    assert bf16_excess(found, torchs) <= 1.0, (found, torchs)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # says that it does not see everything
def test_forward_and_backward_do_not_wait_for_the_gpu(family, checkpointing):
    config, shape = sized(family, dropout=0.1, attention_dropout=0.1)
    config = with_train(config, activation_checkpointing=checkpointing)
    model, (step,) = build(config, shape, "cuda").bfloat16(), byte_steps(config, 1, "cuda")
    for _ in range(2):  # compiles programs, and looks up what is kept of the GPU
        backward_once(model, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = backward_once(model, step)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(loss) > 0.0
