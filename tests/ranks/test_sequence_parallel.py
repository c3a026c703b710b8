"""Ranks that share rows: the same batches, losses and checkpoints as ranks that do not."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.options.batch_plan import BatchPlan
from pretrain.options.settings import load_config
from pretrain.ranks import sequence_parallel
from pretrain.ranks.sequence_parallel import SequenceGroup, exchange_parts
from tests.helpers.rank_helpers import ROOT, losses, metric_lines, run_cases
from tests.transformer.test_model import ALL, batch, build, sharpen

_THREAD = threading.local()  # `index` of the rank that a thread stands for


def as_ranks(size, work):
    """Call `work` with the group of each of `size` ranks, which are threads here; return what each returns."""
    barrier, sent = threading.Barrier(size, timeout=60), [None] * size

    def exchange(output, parts, group):
        sent[_THREAD.index] = parts
        barrier.wait()
        for source, theirs in enumerate(sent):
            output[source] = theirs[_THREAD.index]
        barrier.wait()

    name = f"{size} threads"
    sequence_parallel._EXCHANGES[name] = exchange, None

    def run(index):
        _THREAD.index = index
        return work(SequenceGroup(size, index, name))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def test_slots_become_heads_and_heads_slots_again():
    q, k, v = torch.randn(2, 12, 8, 5), torch.randn(2, 12, 2, 5), torch.randn(2, 12, 2, 5)

    def work(group):
        own = group.own(12)
        got = group.slots_to_heads(q[:, own], k[:, own], v[:, own])
        assert torch.equal(got[0], q[:, :, group.own(8)])
        kv_heads = group.own(2) if group.size == 2 else slice(group.index // 2, group.index // 2 + 1)
        assert torch.equal(got[1], k[:, :, kv_heads]) and torch.equal(got[2], v[:, :, kv_heads])
        assert torch.equal(group.heads_to_slots(got[0]), q[:, own])

    for size in (2, 4):
        as_ranks(size, work)


def test_an_exchange_passes_opcheck():
    def check(group):
        x = torch.randn(2, 3, requires_grad=True)
        torch.library.opcheck(exchange_parts, (x, group.name), test_utils=("test_schema", "test_faketensor"))
        exchange_parts(x, group.name)[group.index].sum().backward()
        return x.grad

    for index, grad in enumerate(as_ranks(2, check)):  # what stayed here, and what the other did not ask for
        assert grad[index].tolist() == [1.0] * 3 and not grad[1 - index].any()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", ALL, ids=[options["family"] for options in ALL])
def test_parts_of_rows_give_the_loss_and_the_gradients_of_whole_ones(options, size):
    """Packed documents, windows, grouped queries, learned positions, soft-caps and dropout."""
    options = options | {"dropout": 0.2, "attention_dropout": 0.2}
    tokens, targets, starts = batch()
    ids, whole = torch.tensor([2**31 + 5, 11]), sharpen(build(options), 0.1)
    loss, cross_entropy = whole(tokens, targets, starts, ids, 3)
    loss.backward()

    def work(group):
        model = build(options, group=group, checkpointing="full" if group.size == 4 else "selective")
        model.load_state_dict(whole.state_dict())
        own = group.own(tokens.shape[1])
        loss, cross_entropy = model(tokens[:, own], targets[:, own], starts, ids, 3)
        loss.backward()
        return loss.detach(), cross_entropy, [p.grad for p in model.parameters()]

    losses, entropies, grads = zip(*as_ranks(size, work), strict=True)
    torch.testing.assert_close(sum(losses), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(entropies), cross_entropy, rtol=1e-6, atol=0)
    for (name, parameter), *parts in zip(whole.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(sum(parts), parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    # generation has whole rows on every rank
    torch.testing.assert_close(
        build(options, group=SequenceGroup(size, 1)).logits(tokens), build(options).logits(tokens)
    )


def test_what_is_exchanged():
    """Two exchanges a block and direction; `full` has those of its second forward pass, `selective` keeps theirs."""
    tokens, targets, starts = batch()
    B, T, H, K, C, L = *tokens.shape, 4, 2, 8, 2

    def count(group, mode):
        model, own, exchanged = build(group=group, checkpointing=mode), group.own(T), []
        for run in (lambda: model(tokens[:, own], targets[:, own], starts)[0], lambda: exchanged[0][1].backward()):
            with Exchanged() as counter:
                out = run()
            exchanged.append((counter.num_elements, out))
        return [num_elements for num_elements, _ in exchanged]

    for size in (2, 4):
        forward = [B * (T // size) * C * part for part in (H + 2 * max(K, size), H)] * L
        for mode, times in (("none", 1), ("selective", 1), ("full", 2)):
            for found in as_ranks(size, lambda group, mode=mode: count(group, mode)):
                assert found == [sum(forward), times * sum(forward)], (size, mode)


class Exchanged(TorchDispatchMode):
    """Counts the elements that exchanges return."""

    num_elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.num_elements += out.numel() if operator is torch.ops.longhaul.exchange_parts.default else 0
        return out


def test_the_command_of_the_docs_divides():
    [command] = re.findall(r"deepspeed launch/pretrain.py (configs/llama-7b.yaml data.seq_len=.*?)\n```",
                           (ROOT / "docs/training.md").read_text(encoding="utf-8"), re.DOTALL)  # fmt: skip
    path, *overrides = command.replace("\\", "").split()
    config = load_config(ROOT / path, overrides)
    assert config.parallel.sequence_parallel_size == 8
    assert [BatchPlan.of(config, num_ranks).num_micro_steps for num_ranks in (8, 64)] == [32, 4]


MODELS = {
    "llama": ["eval.sample_every_steps=20", "eval.sample_tokens=4"],  # grouped queries: two key heads for four ranks
    "gpt2": ["model={family: gpt2, dim: 32, num_layers: 2, num_heads: 4, dropout: 0.1, attention_dropout: 0.1}"],
    "qwen3": ["model={family: qwen3, dim: 32, num_layers: 2, num_heads: 4, ffn_dim: 64, sliding_window: 9}",
              "train.activation_checkpointing=selective"],
    "custom": ["model={family: custom, dim: 24, num_layers: 2, num_heads: 4, num_kv_heads: 1, ffn_dim: 52, "
               "qk_norm: true, attention_softcap: 3.0, dropout: 0.1}", "train.z_loss=1e-3",
               "train.activation_checkpointing=full", "train.ffn_chunk_tokens=50"],
    "bf16": ["train.precision=bf16"],
}  # fmt: skip
# ranks that share a row, and ZeRO stage; a run each, by number of ranks
TOPOLOGIES = {
    1: {name: [(1, 0)] for name in MODELS},
    2: {"llama": [(2, 0)], "qwen3": [(2, 2)], "custom": [(2, 3)], "bf16": [(2, 1)]},
    4: {"llama": [(4, 1), (2, 3)], "qwen3": [(2, 1)], "custom": [(4, 2)]},
}


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(900)
def test_losses_and_batches_do_not_depend_on_how_many_ranks_share_a_row(tiny_config, tmp_path):
    """Two runs go on with dropout where others saved: 2 ranks to a row, then 1, and 2, then 4 at another stage."""
    for num_ranks in (2, 1, 4):
        cases = [
            {"overrides": [f"run.dir={tmp_path}/{name}-r{num_ranks}-s{size}-z{stage}", "eval.every_steps=10", *MODELS[name],
                           f"parallel={{sequence_parallel_size: {size}, zero_stage: {stage}}}",
                           f"train.micro_batch_size={8 if num_ranks > 1 else 16}"], "watch_loading": True}
            for name, sizes in TOPOLOGIES[num_ranks].items() for size, stage in sizes
        ]  # fmt: skip
        expected = ["done"] * len(cases)
        for other in (1, 4):
            if num_ranks in (2, other):
                cases.append({"overrides": [
                    f"run.dir={tmp_path}/gpt2-moved-{other}", "eval.every_steps=10", *MODELS["gpt2"],
                    f"parallel={{sequence_parallel_size: {num_ranks}, zero_stage: {num_ranks - 1}}}",
                    f"train.micro_batch_size={4 * num_ranks}"], "watch_loading": True})  # fmt: skip
                expected.append("stopped" if num_ranks == 2 else "done")
                cases[-1] |= {"signal_at": 8, "signal_rank": 1} if num_ranks == 2 else {}
        assert run_cases(tiny_config, cases, num_ranks, tmp_path / f"ranks-{num_ranks}") == expected
    differences = {}
    for run in sorted(tmp_path.glob("*-*-*")):
        name = run.name.split("-")[0]
        alone = tmp_path / f"{name}-r1-s1-z0"
        assert (run / "batches.jsonl").read_text() == (alone / "batches.jsonl").read_text(), run.name
        for key in ("loss", "eval/loss", "grad_norm"):
            found, wanted = ([line[key] for line in metric_lines(path) if key in line] for path in (run, alone))
            assert len(found) == (2 if "eval" in key else 20)
            differences[run.name, key] = max(abs(a - b) / b for a, b in zip(found, wanted, strict=True))
    print("largest relative differences:", {key: f"{value:.2g}" for key, value in differences.items()})
    exact = {case: value for case, value in differences.items() if not case[0].startswith("bf16")}
    assert len(exact) == 3 * 13 and max(exact.values()) < 1e-5, exact
    assert max(differences.values()) < 0.02, differences
    learned = losses(tmp_path / "gpt2-moved-4")
    assert learned[0] > learned[-1] + 0.3
    assert (tmp_path / "llama-r4-s4-z1/samples/step-00000020.txt").exists()
