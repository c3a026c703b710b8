"""Configs of popular published models, in the words of transformers 4 and 5, become the right shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from pretrain.errors import ConfigError
from pretrain.formats.hf_config import check_config, read_config
from pretrain.formats.hf_export import resolved_config
from pretrain.options.families import num_parameters

_QWEN: dict[str, Any] = dict(
    attention_dropout=0.0, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True,
    use_sliding_window=False, vocab_size=151936, initializer_range=0.02, torch_dtype="bfloat16", use_cache=True,
    transformers_version="4.51.0",
)  # fmt: skip
# Hyper-parameters as published with the weights, those that decide what is computed; then the ids of the tokenizer, the
# number of parameters as the publishers' weights have it, and what our options must be.
PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "Llama-3.2-1B": (dict(
        model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
        bos_token_id=128000, eos_token_id=128001, head_dim=64, hidden_act="silu", hidden_size=2048, initializer_range=0.02,
        intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
        num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                          rope_type="llama3"),
        tie_word_embeddings=True, vocab_size=128256, use_cache=True,
    ), 1_235_814_400, dict(rope_theta=5e5, num_kv_heads=8, head_dim=64, seq_len=131072, tie_embeddings=True)),
    "SmolLM2-135M": (dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000, rope_scaling=None,
        rope_interleaved=False, tie_word_embeddings=True, vocab_size=49152, is_llama_config=True, hidden_act="silu",
        initializer_range=0.041666666666666664,
    ), 134_515_008, dict(rope_theta=1e5, num_kv_heads=3, norm_eps=1e-5, head_dim=64, init_std=0.041666666666666664)),
    "Mistral-7B-v0.3": (dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False, vocab_size=32768, hidden_act="silu",
    ), 7_248_023_552, dict(sliding_window=None, head_dim=128, rope_theta=1e6)),
    "Mistral-7B-v0.1": (dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
        tie_word_embeddings=False, vocab_size=32000, hidden_act="silu",
    ), 7_241_732_096, dict(sliding_window=4096, rope_theta=1e4)),
    "Qwen2.5-0.5B": (_QWEN | dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, max_window_layers=24, sliding_window=32768, use_mrope=False,
    ), 494_032_768, dict(attention_bias="qkv", sliding_window=None, tie_embeddings=True, norm_eps=1e-6)),
    "Qwen3-0.6B": (_QWEN | dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, max_window_layers=28, sliding_window=None,
        attention_bias=False, rope_scaling=None,
    ), 596_049_920, dict(qk_norm=True, head_dim=128, seq_len=40960)),
    "GPT-2": (dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], activation_function="gelu_new", attn_pdrop=0.1, embd_pdrop=0.1,
        resid_pdrop=0.1, initializer_range=0.02, layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=768, n_head=12, n_layer=12,
        n_positions=1024, vocab_size=50257, summary_type="cls_index", task_specific_params={"text-generation": {}},
    ), 124_439_808, dict(ffn_dim=3072, positions="learned", attention_bias=True, dropout=0.0)),
    "StableLM-2-1.6B": (dict(
        model_type="stablelm", hidden_act="silu", hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=32, num_key_value_heads=32, layer_norm_eps=1e-5, max_position_embeddings=4096,
        partial_rotary_factor=0.25, rope_theta=10000, tie_word_embeddings=False, use_qkv_bias=True, vocab_size=100352,
    ), 1_644_515_328, dict(rope_fraction=0.25, rope_dim=16, attention_bias="qkv", norm="layernorm")),
    "StarCoder2-3B": (dict(
        model_type="starcoder2", attention_dropout=0.1, embedding_dropout=0.1, residual_dropout=0.1, hidden_act="gelu_pytorch_tanh",
        hidden_size=3072, intermediate_size=12288, num_hidden_layers=30, num_attention_heads=24, num_key_value_heads=2,
        max_position_embeddings=16384, mlp_type="default", norm_type="layer_norm", norm_epsilon=1e-5,
        rope_theta=999999.4420358813, sliding_window=4096, use_bias=True, vocab_size=49152,
    ), 3_030_371_328, dict(sliding_window=4096, rope_theta=999999.4420358813, tie_embeddings=True)),
    "OLMo-2-1B": (dict(
        model_type="olmo2", attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=2048,
        intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16,
        max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=500000, rope_scaling=None, tie_word_embeddings=False,
        vocab_size=100352,
    ), 1_484_916_736, dict(norm="reordered_rmsnorm", qk_norm="full", norm_eps=1e-6)),
}  # fmt: skip


@pytest.mark.parametrize("style", ["transformers 4", pytest.param("transformers 5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_right_shape_and_number_of_parameters(name, style, tmp_path):
    raw, num_published, expected = PUBLISHED[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    if style == "transformers 5":  # as it saves what it has read
        transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        raw = json.loads(path.read_text())
        assert "rope_theta" not in raw
    resolved = resolved_config(tmp_path)
    found = read_config(raw, resolved, "config.json")
    shape = check_config(found, resolved, found.vocab_size, "config.json")
    assert {key: getattr(shape, key) for key in expected} == expected
    padding = (shape.padded_vocab_size - shape.vocab_size) * shape.dim * (1 if shape.tie_embeddings else 2)
    assert num_parameters(shape) - padding == num_published
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_published


def read(changes, name="Llama-3.2-1B", **resolved):
    raw = PUBLISHED[name][0] | changes
    return read_config(
        raw, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}} | raw | resolved, "config.json"
    )


def test_scaled_rope_is_read_in_all_its_forms():
    llama3 = dict(PUBLISHED["Llama-3.2-1B"][0]["rope_scaling"], rope_theta=5e5)
    assert read({}, rope_parameters=llama3).options["rope_scaling"] == {
        "type": "llama3", "factor": 32.0, "original_seq_len": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32768}
    found = read({"max_position_embeddings": 32768}, rope_parameters=yarn)
    assert found.seq_len == 131072 and "max_position_embeddings was 32768" in found.notes[0]
    assert found.options["rope_scaling"] == {"type": "yarn", "factor": 4.0, "original_seq_len": 32768}
    with pytest.raises(ConfigError, match="mscale of RoPE is 0.7; expected none for type yarn"):
        read({}, rope_parameters=yarn | {"mscale": 0.7})
    with pytest.raises(ConfigError, match="partial_rotary_factor of RoPE is 0.5; expected none for type default"):
        read({}, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})


def test_a_window_of_whole_rows_and_dropout_are_said_to_be_left_behind():
    found = read({"sliding_window": 32768}, "Mistral-7B-v0.3")
    assert "sliding_window" not in found.options and found.notes == (
        "sliding_window was 32768, which is no less than a row",
    )
    assert read({"attention_dropout": 0.1}).notes == ("attention_dropout was 0.1 in its training; 0 here",)
