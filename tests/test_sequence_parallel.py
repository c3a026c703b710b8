"""Ranks that share rows: the same batches, losses and checkpoints as ranks that do not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pretrain import sequence_parallel
from pretrain.sequence_parallel import SequenceGroup, exchange_parts
from tests.rank_helpers import losses, metric_lines, newest, run_cases
from tests.test_model import ALL, batch, build, sharpen

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
    torch.testing.assert_close(build(options, group=SequenceGroup(size, 1)).logits(tokens), build(options).logits(tokens))
