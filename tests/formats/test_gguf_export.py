"""A GGUF file holds what the checkpoint does, in the layout and under the names that llama.cpp reads."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from functools import partial

import gguf
import pytest
import torch

from pretrain.errors import ExportError
from pretrain.formats import gguf_export, llama_cpp
from pretrain.formats.gguf_export import export_gguf, modelfile, read_parameters
from pretrain.formats.gguf_tables import GGUF_MODELS, check_gguf, extra_tensors, gguf_keys, gguf_tensors, parameters_of
from pretrain.formats.gguf_tokenizer import gguf_tokenizer, read_as_special
from pretrain.options.families import resolve_shape
from pretrain.options.model_options import ModelSection
from pretrain.tokenizers.hf_tokenizer import JsonTokenizer
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.transformer.model import Transformer
from tests.formats.test_hf_export import MODELS, SEQ_LEN, export, make_model, make_run, tokenizer  # noqa: F401
from tests.helpers.tokenizer_helpers import SOURCES, train_json, train_sentencepiece

EXPORTED = [name for name in MODELS if MODELS[name].get("sliding_window") is None]
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make(run, folder, dtype, rows, verify="tensors", licence=None):
    return export_gguf(run, folder, dtype, rows, verify, licence)


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8_0"])
def test_tensors_come_back(name, dtype, tokenizer, tmp_path):  # noqa: F811
    run = make_run(name, tokenizer)
    report = export(run, tmp_path, dtype, make)
    restored = dict(read_parameters(run.shape, tmp_path / "model.gguf"))
    assert restored.keys() == run.shapes.keys() and report["verified"] == "tensors"
    for key, tensor in restored.items():
        wanted = run.read(key)[: len(tensor)]
        if wanted.dim() == 1 or key == "position_embedding.weight":
            assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted), key
        elif dtype == "q8_0" and wanted.shape[1] % 32 == 0:
            blocks = wanted.reshape(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127
            assert ((tensor.reshape(-1, 32) - blocks).abs() <= 0.57 * step + 1e-5).all(), key
            assert not torch.equal(tensor, wanted)
        else:
            assert torch.equal(tensor, wanted.to(TORCH.get(dtype, torch.float16))), key


IMPORTED = {
    "mistral": dict(family="mistral", dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12),
    "qwen2": dict(family="qwen2", dim=32, num_layers=2, num_heads=4, num_kv_heads=2, rope_theta=1e6),
    "olmo2": dict(family="olmo2", dim=32, num_layers=3, num_heads=4, num_kv_heads=2, norm_eps=1e-6),
    "stablelm, partial RoPE": dict(family="stablelm", dim=64, num_layers=2, num_heads=4, rope_fraction=0.25),
}


def imported(name: str) -> Transformer:
    """A model of a kind that others publish, whose parameters are none of 0 or 1."""
    model = Transformer(resolve_shape(ModelSection(**IMPORTED[name]), 421, SEQ_LEN), seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("name", IMPORTED)
def test_tensors_of_imported_families_come_back(name, tokenizer, tmp_path):  # noqa: F811
    model = imported(name)
    run = make_run("llama", tokenizer, model)
    export(run, tmp_path, "fp32", make)
    restored = dict(read_parameters(model.shape, tmp_path / "model.gguf"))
    assert restored.keys() == run.shapes.keys()
    assert all(torch.equal(tensor, run.read(key)[: len(tensor)]) for key, tensor in restored.items())
    assert gguf_keys(model.shape)[f"{GGUF_MODELS[model.shape.family].architecture}.rope.dimension_count"] == (
        4 if "partial" in name else model.shape.head_dim
    )


def test_queries_and_keys_of_llama_are_rotated_as_neighbours():
    """llama.cpp turns elements (2i, 2i + 1) of a head by the angle by which we turn (i, i + C/2)."""
    shape, generator = make_model("llama").shape, torch.Generator().manual_seed(0)
    qkv = torch.randn((4 + 2 * 2) * 8, 32, generator=generator)
    found = dict(gguf_tensors(shape, [("blocks.0.attention.qkv.weight", qkv)]))
    x = torch.randn(32, generator=generator)
    angles = 5 * 1.0 / 10000.0 ** (torch.arange(4) / 4)
    for name, rows, heads in (("attn_q", qkv[:32], 4), ("attn_k", qkv[32:48], 2)):
        half = (rows @ x).view(heads, 2, 4)
        ours = torch.stack([half[:, 0] * angles.cos() - half[:, 1] * angles.sin(),
                            half[:, 1] * angles.cos() + half[:, 0] * angles.sin()], 1)  # fmt: skip
        pairs = (found[f"blk.0.{name}.weight"] @ x).view(heads, 4, 2)
        theirs = torch.stack([pairs[..., 0] * angles.cos() - pairs[..., 1] * angles.sin(),
                              pairs[..., 1] * angles.cos() + pairs[..., 0] * angles.sin()], -1)  # fmt: skip
        assert torch.allclose(theirs.transpose(1, 2), ours, atol=1e-5)
    assert torch.equal(found["blk.0.attn_v.weight"], qkv[48:])
    straight = dict(
        gguf_tensors(make_model("stablelm").shape, [("blocks.0.attention.qkv.weight", torch.randn(96, 32))])
    )
    assert list(straight) == [f"blk.0.attn_{one}.weight" for one in "qkv"]


def test_a_file_says_what_the_model_is_and_where_it_comes_from(tokenizer, tmp_path):  # noqa: F811
    export(make_run("llama-yarn", tokenizer), tmp_path, "q8_0", partial(make, licence="mit"))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert (
        keys["general.architecture"] == "llama" and keys["general.file_type"] == 7 and keys["general.license"] == "mit"
    )
    assert keys["llama.block_count"] == 2 and keys["llama.attention.head_count_kv"] == 4
    assert (
        keys["llama.context_length"] == 64 and keys["llama.rope.freq_base"] == 5e5 and keys["llama.vocab_size"] == 421
    )
    assert keys["llama.rope.scaling.type"] == "yarn" and keys["llama.rope.scaling.original_context_length"] == 16
    assert keys["llama.rope.scaling.attn_factor"] == pytest.approx(1.25 / (0.1 * math.log(4) + 1))
    assert keys["longhaul.step"] == "30" and keys["longhaul.tokens"] == "12345" and keys["longhaul.run"] == "a"
    assert keys["tokenizer.ggml.tokens"][:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert keys["tokenizer.ggml.token_type"][:7] == [2, 3, 3, 3, 3, 3, 3] and 6 in keys["tokenizer.ggml.token_type"]
    assert keys["tokenizer.ggml.add_space_prefix"] is False and keys["tokenizer.ggml.eot_token_id"] == 5
    assert "<|im_start|>" in keys["tokenizer.chat_template"]
    assert (
        json.loads((tmp_path / "verification.json").read_text())["files"]["model.gguf"]["bytes"]
        == (tmp_path / "model.gguf").stat().st_size
    )


def test_a_tied_stablelm_brings_its_output_layer_and_llama_3_its_factors(tokenizer, tmp_path):  # noqa: F811
    model = make_model("stablelm-tied-biased")
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    tensors = dict(gguf_tensors(model.shape, parameters.items()))
    assert torch.equal(tensors["output.weight"], tensors["token_embd.weight"]) and len(tensors["output.weight"]) == 421
    assert dict(parameters_of(model.shape, tensors)).keys() == parameters.keys()
    assert "output.weight" not in dict(
        gguf_tensors(make_model("gpt2").shape, [("embedding.weight", torch.zeros(512, 32))])
    )
    factors = extra_tensors(make_model("llama-llama3").shape)["rope_freqs.weight"]
    assert factors.tolist()[-1] == pytest.approx(8) and len(factors) == 4
    export(make_run("llama-llama3", tokenizer), tmp_path, "bf16", make)
    stored = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}["rope_freqs.weight"]
    assert stored.data.tolist() == factors.tolist() and "llama.rope.scaling.type" not in gguf_keys(
        make_model("llama").shape
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3-tied-window", {}, "model.sliding_window is 9; expected null, because llama.cpp's qwen3 attends to all"),
        ("starcoder2", {}, "model.sliding_window is 9; expected null, because llama.cpp's starcoder2 attends to all"),
        ("llama", {"family": "custom"}, "model.family is custom; expected one that is exported to GGUF: llama, qwen3"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, changes, message):
    shape = make_model(name).shape
    object.__setattr__(shape, "family", changes.get("family", shape.family))
    with pytest.raises(ExportError, match=f"run: {message}.*Export to Hugging Face's format"):
        check_gguf(shape, "run")


def test_scaling_that_an_architecture_does_not_read_is_refused():
    shape, scaled = make_model("stablelm").shape, make_model("llama-llama3").shape
    object.__setattr__(shape, "rope_scaling", scaled.rope_scaling)
    with pytest.raises(
        ExportError, match="type is llama3; expected linear or yarn, because llama.cpp's stablelm does not"
    ):
        check_gguf(shape, "run")
    check_gguf(scaled, "run")


@pytest.mark.parametrize("what", ["tensor", "key"])
def test_something_else_in_the_file_is_found(what, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    if what == "tensor":
        right = gguf_export._encode
        monkeypatch.setattr(
            gguf_export,
            "_encode",
            lambda name, one, kind: right(name, one * 2 if name == "blk.1.attn_k.weight" else one, kind),
        )
        message = "blocks.1.attention.qkv.weight: comes back altered; expected the same bits"
    else:
        right = gguf_export._add
        monkeypatch.setattr(
            gguf_export,
            "_add",
            lambda writer, key, value: right(writer, key, 0.25 if key.endswith("epsilon") else value),
        )
        message = "llama.attention.layer_norm_rms_epsilon is 0.25; expected 1e-05"
    with pytest.raises(ExportError, match=message):
        export(make_run("llama", tokenizer), tmp_path / "out", "fp32", make)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(tokenizer, tmp_path):  # noqa: F811
    model = make_model("llama")
    with torch.no_grad():
        model.output.weight[3, 3] = 1e6
    with pytest.raises(ExportError, match=r"output.weight: holds NaN or infinity as torch.float16; expected finite"):
        export(make_run("llama", tokenizer, model), tmp_path / "out", "fp16", make)


@pytest.mark.parametrize(
    ("kind", "pre", "note"), [("gpt2", "gpt-2", None), ("llama3", None, None), ("metaspace", None, None)]
)
def test_a_tokenizer_json_goes_along_if_llama_cpp_splits_text_so(kind, pre, note, tmp_path):
    theirs = JsonTokenizer(train_json(kind, tmp_path, 400))
    if pre is None:
        expected = "splits text in a way" if kind == "llama3" else "expected byte-level BPE for llama.cpp"
        with pytest.raises(ExportError, match=f"tokenizer: .*{expected}"):
            gguf_tokenizer(theirs)
        return
    keys, notes = gguf_tokenizer(theirs)
    assert keys["ggml.model"] == "gpt2" and keys["ggml.pre"] == pre and notes == ([note] if note else [])
    assert len(keys["ggml.tokens"]) == len(keys["ggml.token_type"]) == theirs.vocab_size
    assert keys["ggml.token_type"][theirs.eos_id] == 3 and " " in keys["ggml.merges"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "is a unigram model, which llama.cpp reads as T5's"),
        ({"byte_fallback": False}, "has no pieces for bytes"),
        ({"normalization_rule_name": "nfkc"}, "normalizes text .nfkc., which llama.cpp does not"),
        ({"remove_extra_whitespaces": True}, "drops spaces"),
        ({"user_defined_symbols": ["<tag>"]}, "has pieces defined by users"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_reads_otherwise_are_refused(options, message, tmp_path):
    recipe = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False}  # fmt: skip
    theirs = SentencePieceTokenizer(train_sentencepiece(tmp_path / "a.model", SOURCES, 700, **(recipe | options)))
    with pytest.raises(ExportError, match=f"tokenizer: {message}.*; expected one that gives the same ids there"):
        gguf_tokenizer(theirs)


def test_special_tokens_that_two_pieces_spell_are_told(tokenizer, tmp_path):  # noqa: F811
    assert read_as_special(tokenizer) == [] and gguf_tokenizer(tokenizer)[1] == []
    theirs = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
    theirs.__dict__ |= vars(tokenizer)
    pieces = tokenizer.file.pieces
    theirs.file = dataclasses.replace(
        tokenizer.file, pieces=(*pieces[:-2], ("</", -1.0, "normal"), ("s>", -2.0, "normal"))
    )
    assert (
        read_as_special(theirs) == ["<s>", "</s>"]
        and read_as_special(JsonTokenizer(train_json("gpt2", tmp_path, 400))) == []
    )
    assert gguf_tokenizer(theirs)[1] == [
        "Where plain text holds <s>, </s>, llama.cpp reads the token and not its letters."
    ]


def test_the_modelfile_names_template_and_ends(tokenizer, tmp_path):  # noqa: F811
    text = modelfile(tokenizer)
    assert text.startswith(
        'FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
    )
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n')
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(JsonTokenizer(train_json("gpt2", tmp_path, 400)))


needs_library = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama.cpp is not installed: pip install llama-cpp-python (docs/conversion.md)",
)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_llama_cpp_computes_the_same(name, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(llama_cpp, "NUM_TEXTS", 2000)
    report = export(make_run(name, tokenizer), tmp_path, "fp32", partial(make, verify="logits"))
    assert report["client"] == "llama.cpp" and report["logits"]["max_relative_difference"] < (
        2e-3 if make_model(name).shape.activation == "gelu" else 5e-6
    )
    assert report["greedy"]["equal_tokens"] > 0 and report["tokenizer"]["mismatches"] == 0


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", IMPORTED)
def test_llama_cpp_computes_imported_families(name, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(llama_cpp, "NUM_TEXTS", 100)
    report = export(make_run("llama", tokenizer, imported(name)), tmp_path, "fp32", partial(make, verify="logits"))
    assert report["client"] == "llama.cpp" and report["logits"]["max_relative_difference"] < 5e-6
    assert report["greedy"]["equal_tokens"] > 0 and report["tokenizer"]["mismatches"] == 0


@needs_library
@pytest.mark.slow
def test_llama_cpp_shows_rows_that_are_not_reordered(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(llama_cpp, "NUM_TEXTS", 10)
    from pretrain.formats import gguf_tables

    monkeypatch.setattr(gguf_tables, "_is_rotated", lambda *_: False)
    with pytest.raises(ExportError, match=r"row 0, position \d+: the logit of token \d+ is .* in llama.cpp; expected"):
        export(make_run("llama", tokenizer), tmp_path / "out", "fp32", partial(make, verify="logits"))
