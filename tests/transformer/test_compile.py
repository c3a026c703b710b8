"""Compiled blocks: one code for all layers and steps, the same loss, evaluation and generation left alone."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from pretrain.errors import TrainingError
from pretrain.options.config import ModelSection
from pretrain.options.families import resolve_shape
from pretrain.transformer import compiling
from pretrain.transformer.compiling import compiled, should_compile
from pretrain.transformer.model import KVCache, Transformer
from tests.helpers.interpreter_process import run_interpreted
from tests.helpers.rank_helpers import losses, newest, run_cases
from tests.options.test_checks import config_of

# The compiler's own code warns; nothing of it reaches a user (the last test).
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]
VOCAB, LENGTH = 128, 16
MODELS = {
    "llama": {"num_kv_heads": 2},
    "gpt2": {"family": "gpt2", "attention_dropout": 0.0},
    "qwen3": {"family": "qwen3"},
    "custom": {"family": "custom", "attention_softcap": 20.0, "sliding_window": 5},
}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2}


def build(checkpointing="none", **options):
    section = ModelSection(**({"dim": 32, "num_layers": 3, "num_heads": 4} | options))
    return Transformer(resolve_shape(section, VOCAB, LENGTH), 2**32 - 5, checkpointing)


def batch(rows=2, length=LENGTH):
    tokens = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows))
    starts = torch.zeros_like(tokens)
    starts[:, length // 2 :] = length // 2
    return tokens, tokens.roll(-1, 1), starts, torch.arange(rows) + 2**33


def train(model, num_steps):
    """Return the losses of some steps, and the gradients of the last one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(num_steps):
        optimizer.zero_grad()
        objective, loss = model(*batch(), step)
        objective.backward()
        found.append(float(loss))
        optimizer.step()
    return found, [parameter.grad for parameter in model.parameters()]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("llama", "none"), ("gpt2", "none"), ("gpt2", "selective"), ("llama", "full"), ("qwen3", "selective"),
     ("custom", "full")],
)  # fmt: skip
def test_one_code_computes_what_all_layers_and_steps_do(name, checkpointing, capfd):
    model = build(checkpointing, **DROPOUT | MODELS[name])
    model.compile_blocks("aot_eager")
    assert list(model.state_dict()) == list(build(**MODELS[name]).state_dict())
    found, grads = train(model, 20)
    assert num_graphs() == 1 and not counters["graph_break"]
    expected, expected_grads = train(build(**DROPOUT | MODELS[name]), 20)
    assert expected[-1] < expected[0] - 1
    assert found == pytest.approx(expected, rel=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert capfd.readouterr() == ("", "")  # the compiler has nothing to say to users


def test_bf16():
    found = []
    for compiles in (False, True):
        model = build().bfloat16()
        if compiles:
            model.compile_blocks("aot_eager")
        objective, loss = model(*batch(), 0)
        objective.backward()
        assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())
        found.append(float(loss))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.slow
def test_the_graph_of_a_gpu_in_the_interpreter():
    run_interpreted("tests/transformer/interpreter_compile.py", "")


def test_checkpointing_keeps_less_in_compiled_code_too():
    kept = {}
    for checkpointing in ("none", "selective", "full"):
        model, sizes = build(checkpointing), []
        model.compile_blocks("aot_eager")

        def keep(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(*batch(), 0)
        kept[checkpointing] = sum(sizes)
    assert kept["full"] < kept["selective"] < kept["none"]


def test_evaluation_and_generation_are_not_compiled():
    model, plain = build(), build()
    model.compile_blocks("aot_eager")
    for rows in (1, 2, 3):  # the last batch of an evaluation has a size of its own
        tokens, targets, starts, _ = batch(rows)
        for mode in (True, False):
            assert torch.equal(*(m.train(mode).token_losses(tokens, targets, starts) for m in (model, plain)))
        assert torch.equal(*(m.eval()(tokens, targets, starts)[0] for m in (model, plain)))
    cache = KVCache(model.shape, torch.zeros(1, dtype=torch.int64), LENGTH, torch.float32)
    for token in range(LENGTH):
        model.logits(torch.tensor([[token]]), cache)
    assert num_graphs() == 0
    model.train()(*batch())
    assert num_graphs() == 1


def test_a_compiler_that_fails_is_one_message():
    def backend(graph, inputs):
        raise RuntimeError("no compiler: g++\nand more lines")

    model = build()
    model.compile_blocks(backend)
    with pytest.raises(TrainingError) as caught:
        model(*batch())
    assert str(caught.value) == (
        "train.compile: the blocks cannot be compiled here (RuntimeError: no compiler: g++). Use train.compile=false; "
        "or mend the compiler: on a CPU it needs g++, on a GPU Triton and a C compiler."
    )


def test_code_that_cannot_be_one_graph_is_the_same_message():
    with pytest.raises(TrainingError, match=r"^train\.compile: the blocks cannot be compiled here \(\w+: .*\)\. Use"):
        compiled(lambda x: x + 1 if x.sum() > 0 else x, "aot_eager")(torch.ones(2))


def test_errors_of_running_stay_what_they_are():
    def backend(graph, inputs):
        def run(*args):
            raise torch.OutOfMemoryError("full")

        return run

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        compiled(lambda x: x + 1, backend)(torch.ones(2))


def test_null_compiles_where_it_was_measured_to_win(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert not should_compile(config_of(), cpu) and not should_compile(config_of(), cuda)
    assert should_compile(config_of(train__compile=True), cpu)
    monkeypatch.setattr(compiling, "WINS", frozenset(["cuda"]))
    assert should_compile(config_of(), cuda) and not should_compile(config_of(), cpu)
    assert not should_compile(config_of(train__compile=False), cuda)
    for hooked in ({"parallel__zero_stage": 3}, {"train__ffn_chunk_tokens": 9},
                   {"train__activation_checkpointing": "offload"}):  # fmt: skip
        assert not should_compile(config_of(**hooked), cuda)


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(1500)
def test_training_on_two_ranks_is_training_without(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    names = {"plain": ["train.compile=false"]}
    names |= {f"zero-{stage}": ["train.compile=true", f"parallel.zero_stage={stage}"] for stage in (0, 1, 2)}
    names["shared"] = ["train.compile=true", "parallel.sequence_parallel_size=2"]
    shared = ["train.micro_batch_size=4", "model.dropout=0.1", "model.attention_dropout=0.1",
              "train.activation_checkpointing=selective", "eval={every_steps: 10, max_rows: 5}"]  # fmt: skip
    cases = [{"overrides": [f"run.dir={tmp_path}/{name}", *shared, *own]} for name, own in names.items()]
    outcomes = run_cases(tiny_config, cases, 2, tmp_path / "ranks", timeout=1400)
    assert outcomes == ["done"] * len(cases)
    expected = losses(tmp_path / "plain")
    for name in list(names)[1:]:
        found = losses(tmp_path / name)
        assert found == pytest.approx(expected, rel=1e-5), name
        assert found != expected, name  # other code ran: its rounding is not the same to the last bit
        assert newest(tmp_path / name).shapes == newest(tmp_path / "plain").shapes, name
    assert "Warning" not in (tmp_path / "ranks" / "output-0").read_text()
