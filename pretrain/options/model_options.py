"""The options of the model; `config.py` has the others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.options.section import Bool, Count, Probability, Section


class RopeScalingSection(Section):
    """RoPE for rows longer than those that a model was trained on before."""

    type: Literal["linear", "llama3", "yarn"] = Field(description="How the frequencies are lowered.")
    factor: float = Field(gt=1, description="By how much: of all (`linear`) or of the low frequencies.")
    original_seq_len: Count | None = Field(
        None, description="`data.seq_len` before scaling. Required for `llama3` and `yarn`."
    )
    low_freq_factor: float = Field(
        1.0, gt=0, description="`llama3` lowers by the factor what turns fewer times than this in an original row."
    )
    high_freq_factor: float = Field(
        4.0, gt=0, description="`llama3` leaves what turns more often than this in an original row."
    )
    beta_fast: float = Field(32.0, gt=0, description="`yarn` leaves what turns so often in an original row.")
    beta_slow: float = Field(
        1.0, gt=0, description="`yarn` lowers by the factor what turns no more often than this in an original row."
    )
    attention_factor: float | None = Field(
        None, gt=0, description="`yarn` multiplies cosines and sines by this. Null: 0.1 ln(factor) + 1."
    )


class ModelSection(Section):
    """The Transformer. Options left at `null` take the family's value."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "olmo2", "stablelm", "starcoder2", "gpt2", "custom"] = Field(
        "llama",
        description="Published architecture that the model is, and is exported as. `custom` takes any combination of "
        "options and is exported as nothing.",
    )
    dim: Count = Field(description="Model width D.")
    num_layers: Count = Field(description="Number of Transformer blocks.")
    num_heads: Count = Field(description="Query heads H.")
    num_kv_heads: Count | None = Field(
        None, description="Key and value heads K: H is MHA, 1 is MQA, between them GQA. Null: H."
    )
    head_dim: Count | None = Field(None, description="Width C of one head. Null: dim / num_heads.")
    ffn_dim: Count | None = Field(
        None, description="Feed-forward width F. Null: swiglu 8/3 of dim rounded up to a multiple of 64, gelu 4 dim."
    )
    norm: Literal["rmsnorm", "layernorm", "reordered_rmsnorm"] | None = Field(
        None, description="Normalisation of what each sublayer computes from; `reordered_rmsnorm`: of what it adds. "
        "Null: the family's."
    )  # fmt: skip
    norm_eps: float = Field(1e-5, gt=0, le=1e-2, description="Added to the variance before the root.")
    activation: Literal["swiglu", "gelu"] | None = Field(None, description="Feed-forward kind. Null: the family's.")
    positions: Literal["rope", "learned"] | None = Field(None, description="Position encoding. Null: the family's.")
    rope_theta: float = Field(10000.0, gt=1, description="Base of RoPE's wavelengths; only for `positions: rope`.")
    rope_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of each head's dimensions, the first ones, that RoPE turns."
    )
    rope_scaling: RopeScalingSection | None = Field(
        None, description="RoPE for rows longer than those of an earlier training; only for `positions: rope`."
    )
    qk_norm: Literal[True, False, "full"] | None = Field(
        None, description="RMSNorm of each head's queries and keys before RoPE; `full`: of all heads' together. Null: "
        "the family's."
    )  # fmt: skip
    sliding_window: Count | None = Field(
        None, description="A token sees this many tokens at most, itself included, in every block. Null: all before it."
    )
    attention_softcap: float | None = Field(
        None, gt=0, description="Attention scores s become c tanh(s / c), with this c. Null: they stay as they are."
    )
    logit_softcap: float | None = Field(
        None, gt=0, description="Logits z become c tanh(z / c), with this c. Null: they stay as they are."
    )
    attention_bias: Literal[True, False, "qkv"] | None = Field(
        None, description="Biases in the query, key, value and output projections; `qkv`: not in the output's. Null: "
        "the family's."
    )  # fmt: skip
    ffn_bias: Bool | None = Field(None, description="Biases in the feed-forward. Null: the family's.")
    tie_embeddings: Bool | None = Field(
        None, description="The output layer uses the embedding's weights. Null: the family's (gpt2, starcoder2 true)."
    )
    dropout: Probability = Field(0.0, description="Dropout after the embedding and on what each sublayer adds.")
    attention_dropout: Probability = Field(0.0, description="Dropout of attention probabilities.")
    init_std: float = Field(
        0.02, gt=0, le=1, description="Standard deviation of initial weights; outputs of sublayers use it / sqrt(2 L)."
    )
