import dataclasses

import pytest
import torch

from kernels.dropout import DropoutKey, attention_keep_mask, attention_seeds, dropout, keep_mask, philox
from tests.helpers.interpreter_process import run_interpreted


def test_triton_in_the_interpreter():
    run_interpreted("tests/kernels/interpreter_operators.py", "dropout")


# Random123's kat_vectors for philox4x32-10: counter, key, result
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox(key[0] | key[1] << 32, tuple(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in words) == expected


def key(rows=(7, 8), seed=3, step=5, layer=2, site=1):
    return DropoutKey(seed, step, torch.tensor(rows), layer, site)


def test_mask_of_a_row_does_not_depend_on_its_place_in_the_batch():
    together = keep_mask((2, 5, 7), 0.5, key((7, 8)))
    assert torch.equal(together[1:], keep_mask((1, 5, 7), 0.5, key((8,))))
    assert torch.equal(together.flip(0), keep_mask((2, 5, 7), 0.5, key((8, 7))))


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"seed": 3 + 2**40}, {"step": 6}, {"layer": 3}, {"site": 2}, {"rows": (9, 8)}]
)
def test_mask_varies_with_every_part_of_the_key(other):
    a, b = keep_mask((2, 400), 0.5, key())[0], keep_mask((2, 400), 0.5, key(**other))[0]
    assert 120 < (a != b).sum() < 280


@pytest.mark.parametrize("shape", [(2, 12, 8), (2, 12, 5), (2, 6, 3)])  # parts that begin between words, too
def test_mask_of_a_part_of_the_slots_is_that_part_of_the_mask(shape):
    whole = keep_mask(shape, 0.5, key())
    for size in (2, 3):
        each = shape[1] // size
        for index in range(size):
            part = dataclasses.replace(key(), first_slot=index * each)
            own = slice(index * each, (index + 1) * each)
            assert torch.equal(keep_mask((2, each, shape[2]), 0.5, part), whole[:, own])
            assert torch.equal(dropout(torch.ones(2, each, shape[2]), 0.5, part) > 0, whole[:, own])


def test_mask_is_the_documented_word_of_the_documented_counter():
    mask = keep_mask((1, 11), 0.3, key((2**32 + 9,)))[0]
    for element in range(11):
        word = philox(3, (torch.tensor(element // 4), 9, 5, 2 * 8 + 1))[element % 4]
        assert mask[element] == (int(word) >= round(0.3 * 2**32))


def test_share_and_scale():
    x = torch.ones(4, 50_000)
    y = dropout(x, 0.1, DropoutKey(1, 0, torch.arange(4)))
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert y.max().item() == pytest.approx(1 / 0.9)
    assert abs((y == 0).float().view(4, -1, 2).prod(-1).mean().item() - 0.01) < 0.003  # neighbours are independent


def test_zero_probability_is_the_identity():
    x = torch.ones(2, 3)
    assert dropout(x, 0.0, key()) is x


def test_gradient_uses_the_same_mask():
    x = torch.ones(2, 64, requires_grad=True)
    y = dropout(x, 0.5, key())
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_the_mask_of_attention_follows_row_and_head_only():
    together = attention_keep_mask(attention_seeds(4, key((7, 2**32 + 8))), 9, 11, 0.5)
    alone = attention_keep_mask(attention_seeds(4, key((2**32 + 8,))), 9, 11, 0.5)
    assert torch.equal(together[1:], alone)
    # a longer row and more keys begin with the same mask; a rank that holds two of four heads draws theirs
    longer = attention_keep_mask(attention_seeds(4, key((7,))), 20, 30, 0.5)
    assert torch.equal(longer[:, :, :9, :11], together[:1])
    assert torch.equal(attention_keep_mask(attention_seeds(4, key((7,)))[:, 2:], 9, 11, 0.5), together[:1, 2:])


@pytest.mark.parametrize("other", [{"seed": 4}, {"step": 6}, {"layer": 3}, {"site": 2}, {"rows": (9,)}])
def test_every_part_of_the_key_changes_the_mask_of_attention(other):
    keys = (key((7,)), key(**({"rows": (7,)} | other)))
    masks = [attention_keep_mask(attention_seeds(2, key), 40, 50, 0.5) for key in keys]
    assert 0.45 < (masks[0] != masks[1]).float().mean() < 0.55
    assert 0.45 < (masks[0][:, 0] != masks[0][:, 1]).float().mean() < 0.55  # heads differ
    assert 0.45 < (masks[0][..., 1:, :] != masks[0][..., :-1, :]).float().mean() < 0.55  # and queries


def test_seeds_of_all_layers_are_those_of_each():
    together = attention_seeds(3, key((7, 2**32 + 8), layer=torch.arange(5)[:, None, None]))
    assert together.shape == (5, 2, 3)
    for layer in range(5):
        assert torch.equal(together[layer], attention_seeds(3, key((7, 2**32 + 8), layer=layer)))


def test_step_and_layer_may_be_tensors():
    for draw in (lambda key: keep_mask((2, 5, 7), 0.5, key), lambda key: attention_seeds(3, key)):
        of_tensors = draw(key(step=torch.tensor(2**33 + 5), layer=torch.tensor(2)))
        assert torch.equal(of_tensors, draw(key(step=2**33 + 5, layer=2)))


def test_attention_drops_as_often_as_asked():
    for p in (0.1, 0.9):
        kept = attention_keep_mask(attention_seeds(4, key((1, 2, 3))), 100, 100, p)
        assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.005)


def test_words_of_attention_by_hand():
    seeds = attention_seeds(2, key((7,)))
    words = philox(int(seeds[0, 1]) & (2**64 - 1), (5 // 4, 3, 0, 0))
    threshold = words[5 % 4] / 2**32
    below, above = (attention_keep_mask(seeds, 4, 6, p)[0, 1, 3, 5] for p in (threshold - 1e-6, threshold + 1e-6))
    assert below and not above
