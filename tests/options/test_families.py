import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.errors import ConfigError
from pretrain.options.config import ModelSection
from pretrain.options.families import FAMILIES, flops_per_token, nearest_exported, num_parameters, resolve_shape
from pretrain.transformer.model import Transformer

SMALL = {"dim": 32, "num_layers": 2, "num_heads": 4}


def resolve(vocab_size=300, seq_len=16, **options):
    return resolve_shape(ModelSection(**(SMALL | options)), vocab_size, seq_len)


def problems(**options):
    with pytest.raises(ConfigError) as error:
        resolve(**options)
    return str(error.value).splitlines()


def test_defaults_of_llama():
    shape = resolve()
    assert (shape.norm, shape.activation, shape.positions) == ("rmsnorm", "swiglu", "rope")
    assert not (shape.attention_bias or shape.ffn_bias or shape.tie_embeddings)
    assert (shape.num_kv_heads, shape.head_dim, shape.ffn_dim) == (4, 8, 128)  # 8/3 of 32 is 85.3
    assert (shape.vocab_size, shape.padded_vocab_size, shape.seq_len) == (300, 384, 16)


def test_defaults_of_gpt2():
    shape = resolve(family="gpt2")
    assert (shape.norm, shape.activation, shape.positions) == ("layernorm", "gelu", "learned")
    assert shape.attention_bias and shape.ffn_bias and shape.tie_embeddings
    assert (shape.num_kv_heads, shape.head_dim, shape.ffn_dim) == (4, 8, 128)


def test_default_ffn_dim_of_llama_is_the_published_rule():
    assert resolve(dim=768, num_heads=12).ffn_dim == 2048
    assert resolve(dim=1024, num_heads=16).ffn_dim == 2752  # 2730.7 rounded up


def test_vocabulary_that_is_a_multiple_is_not_padded():
    assert resolve(vocab_size=384).padded_vocab_size == 384


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"norm": "layernorm"},
            "model.norm is layernorm; expected rmsnorm for family llama. Remove model.norm, or use model.family stablelm.",
        ),
        (
            {"qk_norm": True},
            "model.qk_norm is true; expected false for family llama. Remove model.qk_norm, or use model.family qwen3.",
        ),
        (
            {"attention_bias": "qkv"},
            "model.attention_bias is qkv; expected false or true for family llama. Remove model.attention_bias, or use "
            "model.family qwen2.",
        ),
        (
            {"family": "qwen3", "attention_bias": True},
            "model.attention_bias is true; expected false for family qwen3. Remove model.attention_bias, or use "
            "model.family llama.",
        ),
        (
            {"family": "starcoder2", "ffn_bias": False},
            "model.ffn_bias is false; expected true for family starcoder2. Remove model.ffn_bias, or use model.family "
            "llama.",
        ),
        (
            {"family": "stablelm", "head_dim": 16},
            "model.head_dim is 16; expected dim / num_heads (8) for family stablelm. Remove model.head_dim, or use "
            "model.family llama.",
        ),
        (
            {"sliding_window": 8},
            "model.sliding_window is 8; expected null for family llama. Remove model.sliding_window, or use model.family "
            "mistral.",
        ),
        (
            {"family": "gpt2", "sliding_window": 8},
            "model.sliding_window is 8; expected null for family gpt2. Remove model.sliding_window, or use model.family "
            "starcoder2.",
        ),
        (
            {"rope_fraction": 0.5},
            "model.rope_fraction is 0.5; expected 1 for family llama. Remove model.rope_fraction, or use model.family "
            "stablelm.",
        ),
        (
            {"family": "gpt2", "rope_fraction": 0.5},
            "model.rope_fraction is 0.5; expected no value for positions learned, where it does nothing. Remove "
            "model.rope_fraction, or use model.family stablelm.",
        ),
        (
            {"family": "stablelm", "rope_fraction": 0.4},
            "model.rope_fraction is 0.4, which is 3 of 8 dimensions; expected an even number, at least 2. Use 0.25.",
        ),
        (
            {"attention_softcap": 50.0},
            "model.attention_softcap is 50; expected null for family llama. Remove model.attention_softcap, or use "
            "model.family custom, which is not exported.",
        ),
        (
            {"family": "gpt2", "logit_softcap": 30.0},
            "model.logit_softcap is 30; expected null for family gpt2. Remove model.logit_softcap, or use model.family "
            "custom, which is not exported.",
        ),
        (
            {"family": "qwen3", "sliding_window": 16},
            "model.sliding_window is 16; expected less than data.seq_len (16), because a row has no more. Remove "
            "model.sliding_window.",
        ),
        (
            {"family": "gpt2", "attention_bias": False},
            "model.attention_bias is false; expected true for family gpt2. Remove model.attention_bias, "
            "or use model.family llama.",
        ),
        (
            {"family": "gpt2", "num_kv_heads": 2},
            "model.num_kv_heads is 2; expected num_heads (4) for family gpt2. Remove model.num_kv_heads, "
            "or use model.family starcoder2.",
        ),
        (
            {"family": "gpt2", "head_dim": 16},
            "model.head_dim is 16; expected dim / num_heads (8) for family gpt2. Remove model.head_dim, "
            "or use model.family llama.",
        ),
        (
            {"family": "gpt2", "rope_theta": 5e5},
            "model.rope_theta is 500000; expected no value for positions learned, where it does nothing. "
            "Remove model.rope_theta, or use model.family starcoder2.",
        ),
        (
            {"family": "gpt2", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "model.rope_scaling is linear; expected no value for positions learned, where it does nothing. "
            "Remove model.rope_scaling, or use model.family starcoder2.",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "model.rope_scaling.original_seq_len is null; expected the data.seq_len before scaling, for yarn. Set it, for "
            "example to 4.",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_seq_len": 8}},
            "model.rope_scaling.factor is 4.0; expected data.seq_len / original_seq_len (2.0), which some versions of "
            "transformers 4 take for it. Use 2.0, or model.family custom.",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_seq_len": 16}},
            "model.rope_scaling.original_seq_len is 16; expected less than data.seq_len (16). Lower it.",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_seq_len": 8, "beta_fast": 1.0}},
            "model.rope_scaling.beta_fast is 1; expected more than beta_slow (1). Use 4.",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "original_seq_len": 8, "low_freq_factor": 4.0}},
            "model.rope_scaling.high_freq_factor is 4; expected more than low_freq_factor (4). Use 16.",
        ),
        ({"dim": 2050, "num_heads": 16}, "model.dim is 2050; expected a multiple of model.num_heads (16). Use 2048 or 2064."),
        ({"dim": 3}, "model.dim is 3; expected a multiple of model.num_heads (4). Use 4."),
        (
            {"num_heads": 12, "dim": 48, "num_kv_heads": 5},
            "model.num_kv_heads is 5; expected a divisor of model.num_heads (12). Use 4 or 6.",
        ),
        ({"num_kv_heads": 8}, "model.num_kv_heads is 8; expected a divisor of model.num_heads (4). Use 4."),
        ({"head_dim": 5}, "model.head_dim is 5; expected an even number for positions rope. Set model.head_dim to 4 or 6."),
        (
            {"dim": 60},
            "dim / num_heads is 15; expected an even number for positions rope. Set model.head_dim to 14 or 16.",
        ),
    ],
)  # fmt: skip
def test_an_option_that_the_family_does_not_take(options, message):
    assert problems(**options) == [message]


def test_options_of_a_family_lead_to_the_family_that_has_them_all():
    lines = problems(norm="layernorm", activation="gelu", sliding_window=8)
    assert len(lines) == 3 and all(line.endswith("or use model.family starcoder2.") for line in lines)


def test_custom_takes_any_combination():
    shape = resolve(
        family="custom", norm="layernorm", positions="learned", qk_norm=True, attention_bias="qkv", ffn_bias=True,
        num_kv_heads=1, head_dim=5, sliding_window=3, attention_softcap=20.0, tie_embeddings=True,
    )  # fmt: skip
    assert (shape.activation, shape.ffn_dim, shape.head_dim) == ("swiglu", 128, 5)
    assert resolve(family="custom", activation="gelu", dim=60, num_heads=2).ffn_dim == 240
    yarn = {"type": "yarn", "factor": 4.0, "original_seq_len": 8}
    assert resolve(family="custom", rope_scaling=yarn).rope_scaling.factor == 4.0


def test_a_factor_that_is_no_round_number_can_be_given():
    assert resolve(rope_scaling={"type": "yarn", "factor": 16 / 9, "original_seq_len": 9}).rope_scaling.factor == 16 / 9


def test_the_nearest_exported_family_and_what_differs():
    assert nearest_exported(resolve(family="custom")) == ("llama", [])
    assert nearest_exported(resolve(family="custom", qk_norm=True, sliding_window=8)) == ("qwen3", [])
    gelu = resolve(family="custom", norm="layernorm", activation="gelu", attention_softcap=30.0)
    assert nearest_exported(gelu) == ("stablelm", [
        "model.activation is gelu (stablelm: swiglu)",
        "model.attention_softcap is 30 (stablelm: null)",
    ])  # fmt: skip


def test_every_problem_is_reported_at_once():
    lines = problems(
        family="gpt2", norm="rmsnorm", activation="swiglu", positions="rope", ffn_bias=False, num_kv_heads=1
    )
    assert [line.split()[0] for line in lines] == [
        "model.norm", "model.activation", "model.positions", "model.ffn_bias", "model.num_kv_heads",
    ]  # fmt: skip


def test_a_config_with_every_default_written_out_is_the_same():
    section = ModelSection(**SMALL, family="gpt2")
    assert resolve_shape(ModelSection(**section.model_dump()), 300, 16) == resolve_shape(section, 300, 16)


SHAPES = [
    resolve(),
    resolve(num_kv_heads=1, head_dim=6, ffn_dim=50, attention_bias=True, ffn_bias=True, tie_embeddings=True),
    resolve(family="gpt2"),
    resolve(family="gpt2", tie_embeddings=False, num_layers=3),
    resolve(family="qwen3", num_kv_heads=2, head_dim=10, sliding_window=5),
    resolve(family="olmo2", num_kv_heads=2),
    resolve(family="stablelm"),
    resolve(family="stablelm", attention_bias="qkv", num_kv_heads=2, tie_embeddings=True),
    resolve(family="starcoder2", num_kv_heads=1),
    resolve(family="custom", norm="layernorm", qk_norm=True, attention_bias="qkv", ffn_bias=True, positions="learned"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_num_parameters_is_that_of_the_module(shape):
    assert num_parameters(shape) == sum(p.numel() for p in Transformer(shape, 1).parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_count_the_weights_that_are_multiplied(shape):
    matrices = sum(
        p.numel() for n, p in Transformer(shape, 1).named_parameters() if p.dim() == 2 and "embedding" not in n
    )
    if shape.tie_embeddings:
        matrices += shape.padded_vocab_size * shape.dim
    matrices -= (shape.padded_vocab_size - shape.vocab_size) * shape.dim
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * shape.seq_len
    assert flops_per_token(shape, causal=False) == 6 * matrices + attention
    assert flops_per_token(shape, causal=True) == 6 * matrices + attention / 2


def test_flops_are_those_that_pytorch_counts():
    # With dropout attention is explicit products, which the counter sees; the fused operator it does not.
    shape = dataclasses.replace(resolve(vocab_size=384, attention_dropout=0.1), padded_vocab_size=384)
    model, tokens = Transformer(shape, 1), torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, torch.zeros_like(tokens), torch.arange(2))[0].backward()
    total = counter.get_total_flops()
    assert total == 2 * 16 * flops_per_token(shape, causal=False)
    # attention's products are those of batches of matrices; causal order needs half of them
    of_attention = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(name))
    assert 0 < of_attention < total
    assert total - of_attention / 2 == 2 * 16 * flops_per_token(shape, causal=True)


def test_every_family_allows_its_own_defaults():
    assert set(FAMILIES) == set(ModelSection.model_fields["family"].annotation.__args__)
    for family in FAMILIES:
        assert resolve(family=family).family == family
