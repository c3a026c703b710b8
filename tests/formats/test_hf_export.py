"""An export computes in transformers what the trained model computes, or it fails."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoints.saved_run import SavedRun
from pretrain.errors import ExportError
from pretrain.formats import family_table, hf_export, hf_files, tokenizer_export
from pretrain.formats.family_table import export_tensors, import_tensors, published_config
from pretrain.formats.hf_export import export_hf
from pretrain.formats.partial_export import PartialExport, Progress
from pretrain.formats.published import PUBLISHED_MODELS
from pretrain.formats.reference import compute_reference
from pretrain.formats.tokenizer_export import verify_tokenizer
from pretrain.generation.generate import generate
from pretrain.generation.generate_options import GenerateOptions
from pretrain.options.config import ModelSection
from pretrain.options.families import FAMILIES, num_parameters, resolve_shape
from pretrain.options.settings import parse_config
from pretrain.tokenizers import hf_tokenizer
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, choose_sample, fit
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.tokenizers.varied_texts import varied_texts
from pretrain.transformer.model import Transformer

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 64
MODELS = {
    "llama": dict(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=56),
    "llama-tied-biased": dict(dim=24, num_layers=3, num_heads=4, num_kv_heads=1, head_dim=10, tie_embeddings=True,
                              attention_bias=True, ffn_bias=True, rope_theta=5e5, norm_eps=1e-6),
    "llama-llama3": dict(dim=32, num_layers=2, num_heads=4,
                         rope_scaling=dict(type="llama3", factor=8.0, original_seq_len=16)),
    "llama-yarn": dict(dim=32, num_layers=2, num_heads=4, rope_theta=5e5,
                       rope_scaling=dict(type="yarn", factor=4.0, original_seq_len=16, attention_factor=1.25)),
    "qwen3": dict(family="qwen3", dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12),
    "qwen3-tied-window": dict(family="qwen3", dim=32, num_layers=3, num_heads=4, tie_embeddings=True, sliding_window=9,
                              rope_theta=1e6, norm_eps=1e-6),
    "stablelm": dict(family="stablelm", dim=32, num_layers=2, num_heads=4),
    "stablelm-tied-biased": dict(family="stablelm", dim=32, num_layers=2, num_heads=4, num_kv_heads=1,
                                 tie_embeddings=True, attention_bias="qkv",
                                 rope_scaling=dict(type="linear", factor=2.0)),
    "starcoder2": dict(family="starcoder2", dim=32, num_layers=2, num_heads=4, num_kv_heads=2, sliding_window=9),
    "starcoder2-untied": dict(family="starcoder2", dim=32, num_layers=2, num_heads=2, tie_embeddings=False,
                              rope_scaling=dict(type="yarn", factor=4.0, original_seq_len=16)),
    "gpt2": dict(family="gpt2", dim=32, num_layers=2, num_heads=4),
    "gpt2-untied": dict(family="gpt2", dim=32, num_layers=2, num_heads=2, ffn_dim=40, tie_embeddings=False),
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    source = Path(os.__file__).with_name("argparse.py").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(fit(choose_sample([source], 100_000, seed=0), config_of("llama").tokenizer))
    return SentencePieceTokenizer(path)


def config_of(name: str):
    return parse_config({
        "model": {"family": "llama"} | MODELS[name],
        "tokenizer": {"model": "tokenizer.model", "vocab_size": 421},
        "data": {"sources": [{"name": "code", "shards": "shards"}], "seq_len": SEQ_LEN},
        "optim": {"lr": 1e-3},
        "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    })  # fmt: skip


def make_model(name: str, vocab_size: int = 421) -> Transformer:
    """A model that looks trained: no parameter keeps a value such as 0 or 1 that would hide a mistake."""
    model = Transformer(resolve_shape(ModelSection(**MODELS[name]), vocab_size, SEQ_LEN), seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def make_run(name: str, tokenizer: Tokenizer, model: Transformer | None = None) -> SavedRun:
    model = model or make_model(name)
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}
    shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
    return SavedRun(
        config_of(name), tokenizer, model.shape, 30, 12345, "step-00000030", Path("runs/a"), shapes,
        lambda key: parameters[key].clone(), {"about": {"longhaul": "0.1", "torch": "2"}, "step": 30},
    )  # fmt: skip


def export(run: SavedRun, out: Path, dtype: str = "bf16", make=export_hf, **options) -> dict:
    """Export to a folder as `convert` does; rows to compare are made up."""
    partial = PartialExport(out, {}, Progress(io.StringIO()))
    try:
        report = make(run, partial, dtype, make_rows(), **options)
        partial.finish()
    finally:
        partial.close(discard=True)
    return report


def make_rows() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {"random": [torch.randint(421, (length,), generator=generator) for length in (SEQ_LEN, SEQ_LEN, 5, 1)]}


@pytest.fixture
def few_texts(monkeypatch):
    monkeypatch.setattr(hf_export, "NUM_TEXTS", 200)


@pytest.fixture(scope="module")
def llama_export(tokenizer, tmp_path_factory):
    """One export of a llama model, with its report."""
    folder = tmp_path_factory.mktemp("export")
    return folder, export(make_run("llama", tokenizer), folder)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bf16") for name in MODELS), ("llama", "fp32"), ("gpt2", "fp32"), ("llama", "fp16")]
)
def test_logits_weights_and_ids_are_the_same(name, dtype, tokenizer, tmp_path, few_texts):
    run = make_run(name, tokenizer)
    before = {key: run.read(key) for key in run.shapes}
    report = export(run, tmp_path, dtype)
    assert report["logits"]["max_relative_difference"] < 1e-5
    assert report["logits"]["rows"] == {"random": 4} and report["logits"]["tokens"] == 2 * SEQ_LEN + 6
    written = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {hf_files.DTYPES[dtype]}
    restored = dict(import_tensors(run.shape, written))
    assert restored.keys() == before.keys()
    for key, parameter in before.items():
        rows = slice(421 if key in ("embedding.weight", "output.weight") else None)
        assert torch.equal(restored[key][rows], parameter.to(hf_files.DTYPES[dtype])[rows]), key
    assert ("lm_head.weight" in written) == (not run.shape.tie_embeddings)


def test_the_report_counts_texts_and_files(llama_export):
    folder, report = llama_export
    assert report["tokenizer"]["texts"] == 10_000 and report["tokenizer"]["mismatches"] == 0
    assert report == json.loads((folder / "verification.json").read_text())
    assert report["source"]["step"] == 30 and report["source"]["tokens"] == 12345
    (name, described), = report["files"].items()  # fmt: skip
    assert name == "model.safetensors" and (folder / name).stat().st_size == described["bytes"]


def test_files_can_be_read_by_others_as_the_folder_can(llama_export):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) & 0o044 for path in llama_export[0].iterdir()}
    assert modes["model.safetensors"] == stat.S_IMODE(llama_export[0].stat().st_mode) & 0o044


def test_config_is_read_alike_by_old_and_new_transformers(tokenizer, tmp_path, few_texts):
    export(make_run("llama-tied-biased", tokenizer), tmp_path, "bf16")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] == 421
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["head_dim"] == 10 and config["num_key_value_heads"] == 1 and config["tie_word_embeddings"] is True
    assert config["attention_bias"] is config["mlp_bias"] is True and config["rms_norm_eps"] == 1e-6
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 5] and generation["do_sample"] is False


def test_scaled_rope_is_written_for_old_and_new_transformers():
    """4.57.6 and 5.24 compute the same logits from these files (docs/notes/0005-families.md)."""
    llama = published_config(make_model("llama-llama3").shape)
    assert llama["rope_theta"] == 1e4 and llama["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }  # fmt: skip
    assert llama["rope_parameters"] == llama["rope_scaling"] | {"rope_theta": 1e4}
    yarn = published_config(make_model("llama-yarn").shape)["rope_scaling"]
    assert yarn == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": 1.25,
    }  # fmt: skip
    assert "attention_factor" not in published_config(make_model("starcoder2-untied").shape)["rope_scaling"]
    stablelm = published_config(make_model("stablelm-tied-biased").shape)
    assert stablelm["rope_parameters"] == {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    assert stablelm["partial_rotary_factor"] == 1.0 and stablelm["use_qkv_bias"] is True
    assert "rope_scaling" not in published_config(make_model("llama").shape)


def test_windows_are_written_as_transformers_reads_them():
    window, plain = (published_config(make_model(name).shape) for name in ("qwen3-tied-window", "qwen3"))
    assert (window["sliding_window"], window["use_sliding_window"], window["max_window_layers"]) == (9, True, 0)
    assert window["layer_types"] == ["sliding_attention"] * 3
    assert (plain["sliding_window"], plain["use_sliding_window"], plain["max_window_layers"]) == (None, False, 2)
    assert plain["layer_types"] == ["full_attention"] * 2
    assert published_config(make_model("starcoder2").shape)["sliding_window"] == 9
    assert published_config(make_model("starcoder2-untied").shape)["sliding_window"] is None


def test_the_card_warns_of_a_client_that_ignores_an_option(tokenizer, tmp_path, few_texts):
    report = export(make_run("starcoder2", tokenizer), tmp_path, "bf16")
    assert report["ignored_by"] == {"sliding_window": "llama.cpp"}
    card = (tmp_path / "README.md").read_text()
    assert "> **llama.cpp loads this model and computes something else**: it ignores `sliding_window`." in card
    assert "| Context length | 64 tokens, each seeing 9 at most |" in card


def test_every_family_is_exported_or_says_that_it_is_not():
    assert {name for name, family in FAMILIES.items() if family.exported} == set(PUBLISHED_MODELS)


def test_a_custom_model_names_the_nearest_family_and_what_differs(tokenizer, tmp_path):
    MODELS["custom"] = dict(family="custom", dim=32, num_layers=1, num_heads=4, qk_norm=True, norm="layernorm")
    try:
        run = make_run("custom", tokenizer)
    finally:
        del MODELS["custom"]
    with pytest.raises(ExportError) as caught:
        export(run, tmp_path, "bf16")
    assert str(caught.value) == (
        "runs/a: model.family is custom; expected one that is exported. The nearest is qwen3. It differs in: model.norm "
        "is layernorm (qwen3: rmsnorm). Train without that under model.family qwen3."
    )
    assert list(tmp_path.iterdir()) == []


def test_gpt2_config_has_what_llama_cpp_reads(tokenizer, tmp_path, few_texts):
    export(make_run("gpt2", tokenizer), tmp_path, "bf16")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == SEQ_LEN and config["n_inner"] == 128
    assert config["activation_function"] == "gelu_new" and config["layer_norm_epsilon"] == 1e-5
    assert config["attn_pdrop"] == config["embd_pdrop"] == config["resid_pdrop"] == 0.0


def test_the_card_says_what_the_model_is(llama_export):
    card = (llama_export[0] / "README.md").read_text()
    shape = make_model("llama").shape
    padding = 2 * (shape.padded_vocab_size - 421) * shape.dim
    assert padding > 0 and f"| Parameters | {num_parameters(shape) - padding:,} |" in card
    assert "12,345 tokens in 30 steps" in card and "Licence: not chosen yet" in card and "10,000 texts" in card


@pytest.mark.parametrize("name", ["llama", "gpt2-untied"])
def test_sharded_weights_load(name, tokenizer, tmp_path, few_texts):
    report = export(make_run(name, tokenizer), tmp_path, "fp32", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(report["files"])
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == names
    stored = {key: tensor for name in names for key, tensor in load_file(tmp_path / name).items()}
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names


@pytest.mark.parametrize("name", MODELS)
def test_export_and_import_are_inverse(name):
    model = make_model(name)
    published = dict(export_tensors(model.shape, model.named_parameters()))
    assert {len(published[key]) for key in published if "embed" in key or "wte" in key or "lm_head" in key} == {421}
    restored = dict(import_tensors(model.shape, published))
    for key, parameter in model.named_parameters():
        rows = slice(421 if key in ("embedding.weight", "output.weight") else None)
        assert restored[key].shape == parameter.shape and torch.equal(restored[key][rows], parameter[rows])
    again = dict(export_tensors(model.shape, restored.items()))
    assert again.keys() == published.keys() and all(torch.equal(again[key], published[key]) for key in again)
    model.load_state_dict(restored, strict=True)


def test_every_tensor_must_have_its_place():
    model = make_model("llama")
    published = dict(export_tensors(model.shape, model.named_parameters()))
    with pytest.raises(ExportError, match=r"blocks.0.gate.weight: the parameter has no counterpart"):
        dict(export_tensors(model.shape, [("blocks.0.gate.weight", torch.zeros(1))]))
    with pytest.raises(ExportError, match=r"model.layers.9.input_layernorm.weight: the tensor \(1 such\) has no count"):
        dict(import_tensors(model.shape, published | {"model.layers.9.input_layernorm.weight": torch.zeros(32)}))
    without = {key: tensor for key, tensor in published.items() if key != "model.layers.1.self_attn.k_proj.weight"}
    with pytest.raises(
        ExportError, match=r"layers.1.self_attn.k_proj.weight: the tensor is missing; expected it beside"
    ):
        dict(import_tensors(model.shape, without))
    with pytest.raises(
        ExportError, match=r"k_proj.weight: the tensor has 16 rows; expected 32. The model is of another"
    ):
        dict(import_tensors(dataclasses.replace(model.shape, num_kv_heads=4), published))


def swap_names(monkeypatch, family: str, first: str, second: str) -> None:
    """Make the table give each of two tensors the other's name, in both directions."""
    swap = {first: second, second: first}
    model = family_table.PUBLISHED_MODELS[family]
    weights = tuple(
        dataclasses.replace(weight, theirs=tuple(swap.get(name, name) for name in weight.theirs))
        for weight in model.weights
    )
    models = dict(family_table.PUBLISHED_MODELS) | {family: dataclasses.replace(model, weights=weights)}
    monkeypatch.setattr(family_table, "PUBLISHED_MODELS", models)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("llama", "model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        ("llama", "model.layers.{i}.self_attn.k_proj.weight", "model.layers.{i}.self_attn.v_proj.weight"),
        ("llama", "model.layers.{i}.input_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
        ("llama", "model.embed_tokens.weight", "lm_head.weight"),
        ("gpt2", "transformer.h.{i}.ln_1.bias", "transformer.h.{i}.ln_2.bias"),
        ("qwen3", "model.layers.{i}.self_attn.q_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    ],
)
def test_two_swapped_tensors_are_found(name, first, second, tokenizer, tmp_path, few_texts, monkeypatch):
    swap_names(monkeypatch, MODELS[name].get("family", "llama"), first, second)
    with pytest.raises(
        ExportError, match=r"random row 0, position [01]: the logit of token \d+ is .* in transformers; exp"
    ):
        export(make_run(name, tokenizer), tmp_path, "fp32")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("llama", "rms_norm_eps", 1e-6, "rms_norm_eps is 1e-06 in transformers; expected 1e-05"),
        (
            "llama",
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 20000.0},
            "rope_theta is 20000.0 in transformers; expected 10000.0",
        ),
        ("llama", "hidden_act", "gelu", "hidden_act is 'gelu' in transformers; expected 'silu'"),
        ("llama", "vocab_size", 512, "mismatched_keys|does not load it"),
        ("llama", "num_hidden_layers", 3, "missing_keys"),
        ("llama", "num_hidden_layers", 1, "unexpected_keys"),
        ("qwen3-tied-window", "sliding_window", 10, "sliding_window is 10 in transformers; expected 9"),
        ("qwen3-tied-window", "max_window_layers", 1, "max_window_layers is 1 in transformers; expected 0"),
        ("starcoder2", "norm_epsilon", 1e-6, "norm_epsilon is 1e-06 in transformers; expected 1e-05"),
        ("starcoder2", "hidden_act", "gelu", "hidden_act is 'gelu' in transformers; expected 'gelu_pytorch_tanh'"),
        ("stablelm", "use_qkv_bias", True, "missing_keys"),
        (
            "stablelm",
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            "partial_rotary_factor is 0.25 in transformers; expected 1.0",
        ),
        ("stablelm", "use_parallel_residual", True, "unexpected_keys"),
        (
            "llama-llama3",
            "rope_scaling",
            {"rope_type": "linear", "factor": 8.0},
            r"rope_parameters is {'rope_type': 'linear', .*} in transformers; expected {'rope_type': 'llama3'",
        ),
        ("gpt2", "n_head", 8, "n_head is 8 in transformers; expected 4"),
    ],
)
def test_an_altered_config_is_found(name, key, value, message, tokenizer, tmp_path, few_texts, monkeypatch):
    right = hf_files.hf_config
    monkeypatch.setattr(hf_export, "hf_config", lambda *args: right(*args) | {key: value})
    with pytest.raises(ExportError, match=message):
        export(make_run(name, tokenizer), tmp_path, "fp32")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama-tied-biased", "rms_norm_eps", 1e-5),
        ("stablelm", "layer_norm_eps", 1e-6),
        ("starcoder2", "hidden_act", "gelu"),  # the exact form for the tanh one
        ("starcoder2", "sliding_window", 10),
        ("qwen3-tied-window", "sliding_window", 8),
        ("llama-yarn", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
    ],
)
def test_logits_alone_show_a_mistake(name, key, value, tokenizer, tmp_path, few_texts, monkeypatch):
    """The tolerance is between rounding and the smallest mistake, even if the config's own comparison missed it."""
    right = hf_files.hf_config
    changes = {key: value} if key != "rope_parameters" else {key: value, "rope_scaling": None}
    monkeypatch.setattr(hf_export, "hf_config", lambda *args: right(*args) | changes)
    monkeypatch.setattr(hf_export, "_compare_config", lambda *args: None)
    with pytest.raises(ExportError, match=r"position \d+: the logit of token \d+ is .* in transformers; expected"):
        export(make_run(name, tokenizer), tmp_path, "fp32")


def test_one_altered_bit_is_found(tokenizer, tmp_path, few_texts, monkeypatch):
    """A token's embedding that no compared row holds moves no logit: the weights themselves are compared too."""
    right = hf_files.export_tensors

    def alter(shape, parameters):
        for name, tensor in right(shape, parameters):
            if name == "model.embed_tokens.weight" and not tensor.is_meta:
                tensor = tensor.clone()
                tensor[unused] *= 1 + 2**-20
            yield name, tensor

    unused = next(token for token in range(421) if not any((row == token).any() for row in make_rows()["random"]))
    monkeypatch.setattr(hf_files, "export_tensors", alter)
    with pytest.raises(ExportError, match="model.embed_tokens.weight: comes back altered; expected the same bits"):
        export(make_run("llama", tokenizer), tmp_path, "fp32")


def test_an_altered_tokenizer_is_found(tokenizer, tmp_path, monkeypatch):
    right = hf_tokenizer._merges
    monkeypatch.setattr(hf_tokenizer, "_merges", lambda normal: right(normal)[::-1])
    with pytest.raises(ExportError, match=r"tokenizer: ids of '.*' are \[.*\] in transformers; expected \["):
        export(make_run("llama", tokenizer), tmp_path, "fp32")


def test_another_special_token_is_found(tokenizer, tmp_path, monkeypatch):
    right = tokenizer_export.write_tokenizer_files

    def write(tokenizer, out_dir, max_length):
        right(tokenizer, out_dir, max_length)
        path = out_dir / "tokenizer_config.json"
        path.write_text(path.read_text().replace('"eos_token": "</s>"', '"eos_token": "<pad>"'))

    monkeypatch.setattr(tokenizer_export, "write_tokenizer_files", write)
    with pytest.raises(ExportError, match="tokenizer: eos_id is 3 in transformers; expected 2"):
        export(make_run("llama", tokenizer), tmp_path, "fp32")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "fp32"), (1e5, "fp16")])
def test_weights_that_are_not_finite_are_refused(value, dtype, tokenizer, tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.final_norm.weight[3] = value
    run = make_run("llama", tokenizer, model)
    with pytest.raises(
        ExportError, match=r"final_norm.weight: holds NaN or infinity as torch.float\d\d; expected finite"
    ):
        export(run, tmp_path, dtype)


def test_exporting_and_loading_need_no_network(tokenizer, tmp_path, few_texts, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    export(make_run("llama", tokenizer), tmp_path, "bf16")


def test_generation_in_transformers_continues_as_the_model_does(llama_export, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = llama_export
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(folder)("def main(", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs["input_ids"][0, 0] == tokenizer.bos_id
    generated = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)[0]
    ours = hf_export._rounded_model(make_run("llama", tokenizer), torch.bfloat16)
    tokens = inputs["input_ids"]
    for _ in range(20):
        tokens = torch.cat([tokens, ours.logits(tokens)[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == tokens[0].tolist()


def test_a_repetition_penalty_is_that_of_transformers(llama_export, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = llama_export
    theirs, read = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    ours = hf_export._rounded_model(make_run("llama", tokenizer), torch.bfloat16)
    prompts, repeated = ["def main(", "import import import", "x"], {}
    for penalty in (1.0, 1.3):
        options = GenerateOptions(max_new_tokens=30, temperature=0.0, repetition_penalty=penalty)
        found = [completion.ids for completion in generate(ours, tokenizer, prompts, options)]  # one batch, padded
        for prompt, ids in zip(prompts, found, strict=True):
            inputs = read(prompt, return_tensors="pt")
            made = theirs.generate(
                **inputs, max_new_tokens=30, do_sample=False, repetition_penalty=penalty, eos_token_id=tokenizer.eos_id
            )[0].tolist()
            expected = made[inputs["input_ids"].shape[1] :]
            assert ids == [token for token in expected if token != tokenizer.eos_id]
        repeated[penalty] = sum(len(ids) - len(set(ids)) for ids in found)
    assert repeated[1.3] < repeated[1.0]


def test_transformers_does_not_take_our_kernels_for_its_own(llama_export):
    """transformers imports a package named `kernels` from PyPI where it is installed; ours stands in its place."""
    program = (
        "import sys, kernels, kernels.dispatch, transformers\n"
        "from transformers.utils import is_kernels_available\n"
        "assert not is_kernels_available(), 'transformers would use our package'\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(llama_export[0])!r})\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(llama_export[0])!r})\n"
        "ids = model.generate(**tokenizer('x', return_tensors='pt'), max_new_tokens=3, eos_token_id=None)\n"
        "print(kernels.__file__, ids.shape[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(ROOT / "kernels" / "__init__.py")


def test_a_second_package_named_kernels_is_explained(llama_export, tokenizer, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ImportError("cannot import name 'CUDAProperties' from 'kernels'", name="kernels")

    monkeypatch.setattr(hf_export.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ExportError, match="PyPI's package `kernels` is installed .* Run `pip uninstall kernels`"):
        run = make_run("llama", tokenizer)
        reference = compute_reference(run.load().model, make_rows(), tmp_path / "reference")
        hf_export.verify_model(run, torch.bfloat16, llama_export[0], reference)


def test_varied_texts_cut_from_samples_are_compared_too(tokenizer, llama_export):
    report = verify_tokenizer(
        tokenizer, hf_export.load_tokenizer(llama_export[0]), ["held-out text with \u2581 in it\n" * 40], 1000
    )
    assert report["texts"] == 1000 and report["mismatches"] == 0
    assert "held-out" in "".join(varied_texts(100, 0, ["held-out text\n" * 40]))
