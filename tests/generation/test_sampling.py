"""Sampling against transformers' own logits processors, and text that is released token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pretrain.generation.generate_options import GenerateOptions
from pretrain.generation.sampling import NOT_FINITE, TextStream, choose_tokens, penalise, probabilities
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

OPTION_SETS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product((0.3, 1.0, 1.7), (0, 1, 40, 3000), (0.05, 0.7, 0.99, 1.0), (0.0, 0.02, 1.0), (1.0, 1.3))
]  # fmt: skip


def processors(options: GenerateOptions) -> LogitsProcessorList:
    """Build them in the order of transformers' `_get_logits_processor`."""
    found = LogitsProcessorList()
    if options.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature != 1:
        found.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(options.top_p))
    found.append(MinPLogitsWarper(options.min_p))
    return found


def test_the_order_is_that_of_transformers() -> None:
    from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                         vocab_size=300))  # fmt: skip
    given = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.3)
    given._pad_token_tensor = None
    theirs = GenerationMixin._get_logits_processor(model, given, input_ids_seq_length=1)
    ours = processors(GenerateOptions(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.3))
    assert [type(item) for item in theirs] == [type(item) for item in ours]


@pytest.mark.parametrize("vocab_size", [50, 5000])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_the_distribution_is_that_of_transformers(vocab_size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = spread * torch.randn(3, vocab_size, generator=generator)
    ids = torch.randint(vocab_size, (3, 7), generator=generator)
    seen = torch.zeros(3, vocab_size, dtype=torch.bool).scatter_(1, ids, True)
    sizes = set()
    for chosen in OPTION_SETS:
        options = GenerateOptions(**chosen)
        # in fp64 as we compute, since their cumulative sum over thousands of tokens is rough in fp32
        expected = processors(options)(ids, logits.double()).softmax(-1)
        found = probabilities(penalise(logits.double(), seen, options.repetition_penalty), options)
        assert torch.equal(found > 0, expected > 0), chosen
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        sizes.add(int((found[0] > 0).sum()))
    assert len(sizes) > 10 and 1 in sizes and vocab_size in sizes  # the sets differ in what they keep


def test_logits_that_are_equal_are_kept_together_by_top_k() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])  # bf16 models give many of them
    kept = probabilities(logits, GenerateOptions(top_k=2)) > 0
    assert kept.tolist() == (TopKLogitsWarper(2)(None, logits) > -torch.inf).tolist() == [[True, True, True, False]]


def test_a_flat_nucleus_reaches_beyond_the_tokens_that_are_ordered_first() -> None:
    logits = torch.cat([torch.zeros(1, 4000), torch.linspace(0, 20, 4000)[None]])
    options = GenerateOptions(top_p=0.9)
    kept = (probabilities(logits, options) > 0).sum(-1).tolist()
    assert kept[0] in (3600, 3601) and kept[1] == int((probabilities(logits[1:], options) > 0).sum()) < 1024


def test_choices_follow_the_distribution_and_never_a_dropped_token() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)) * 2
    options = GenerateOptions(temperature=0.8, top_p=0.95, min_p=0.01)
    probs = probabilities(logits, options)[0]
    uniform = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    counts = torch.bincount(choose_tokens(logits.expand(20000, -1), uniform, options), minlength=200)
    assert (counts[probs == 0] == 0).all()
    expected = probs * 20000
    chi2 = ((counts - expected) ** 2 / expected.clamp(min=1e-9))[probs > 0].sum()
    assert chi2 < 2 * int((probs > 0).sum())


def test_a_row_depends_on_itself_only() -> None:
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(3))
    logits[3] = 0.0  # its nucleus needs the full order
    uniform = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    options = GenerateOptions(top_p=0.8)
    together = choose_tokens(logits, uniform, options).tolist()
    assert together == [int(choose_tokens(logits[r : r + 1], uniform[r : r + 1], options)) for r in range(8)]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-300])
def test_logits_that_are_not_finite_are_said_to_be_so(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("inf"), 0.0], [-float("inf"), 0.0]])
    options = GenerateOptions(temperature=temperature)
    chosen = choose_tokens(logits, torch.full((4,), 0.99, dtype=torch.float64), options).tolist()
    assert chosen == [1, NOT_FINITE, NOT_FINITE, 1]


# Text that comes token by token


@pytest.fixture(scope="module")
def tokenizer(tiny_config):
    return SentencePieceTokenizer(tiny_config.parent / "tokenizer.model")


def released(tokenizer, prompt_ids, ids, stop=()):
    stream = TextStream(tokenizer.decode, prompt_ids, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    assert "".join(pieces) == stream.text
    return pieces, stream


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_text(tokenizer, data) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    prompt = [1, *tokenizer.encode(data.draw(st.text(max_size=12).filter(lambda text: "\u2581" not in text)))]
    pieces, _ = released(tokenizer, prompt, ids)
    whole = tokenizer.decode([*prompt, *ids])
    assert "".join(pieces) == whole[len(tokenizer.decode(prompt)) :]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30).filter(lambda text: "\u2581" not in text and "\ufffd" not in text))
def test_no_half_characters(tokenizer, text) -> None:
    pieces, _ = released(tokenizer, [1], tokenizer.encode(text))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_characters_of_several_tokens_come_whole(tokenizer) -> None:
    ids = tokenizer.encode("a🦊b")
    pieces, _ = released(tokenizer, [1], ids)
    assert len(ids) > 4 and [piece for piece in pieces if piece] == ["a", "🦊", "b"]
    cut, _ = released(tokenizer, [1], ids[:3])
    assert cut[:3] == ["a", "", ""] and cut[3] == tokenizer.decode(ids[:3])[1:] != ""  # as the decoder writes it


class Letters:
    """A tokenizer whose ids are characters."""

    @staticmethod
    def decode(ids):
        return "".join(map(chr, ids))


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("ab", max_size=14),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_nothing_of_a_stop_string_is_released(text, stop) -> None:
    pieces, stream = released(Letters, [], [ord(letter) for letter in text], stop)
    first = next((end for end in range(1, len(text) + 1) if any(text[:end].endswith(s) for s in stop)), None)
    if first is None:
        assert not stream.stopped and stream.text == text
    else:  # the text ends before the longest stop string that was complete first
        begins = [first - len(s) for s in stop if text[:first].endswith(s)]
        assert stream.stopped and stream.text == text[: min(begins)]
    for end in range(1, len(pieces) - stream.stopped):  # at no time what could yet become a stop string
        arrived, shown = text[:end], "".join(pieces[:end])
        pending = max((n for s in stop for n in range(len(s)) if arrived.endswith(s[:n])), default=0)
        assert shown == arrived[: end - pending]


def test_text_is_held_back_only_as_long_as_needed() -> None:
    stream = TextStream(Letters.decode, [], ("abc",))
    assert [stream.add(ord(letter)) for letter in "xabxabaabc"] == ["x", "", "", "abx", "", "", "ab", "a", "", ""]
    assert stream.stopped and stream.end() == "" and stream.text == "xabxaba"


def test_a_first_token_is_decoded_as_what_follows_the_prompt() -> None:
    class Stripping:  # as sentencepiece models with a dummy prefix do, Llama 2's among them
        decode = staticmethod(lambda ids: "".join(map(chr, ids)).removeprefix(" "))

    pieces, _ = released(Stripping, [ord("a")], [ord(" "), ord("b"), ord(" "), ord("c")])
    assert "".join(pieces) == " b c"


def test_a_token_costs_the_same_in_a_long_text() -> None:
    decoded = []
    stream = TextStream(lambda ids: decoded.append(len(ids)) or Letters.decode(ids), [65] * 1000, ("zz",))
    for _ in range(500):
        stream.add(65)
    assert max(decoded) <= 9 and sum(decoded[-10:]) <= 20
