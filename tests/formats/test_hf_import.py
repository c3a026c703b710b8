"""A published model becomes a run folder that computes the same, or nothing."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.convert import main
from pretrain.checkpoints import weights_checkpoint
from pretrain.checkpoints.checkpoint_files import CheckpointReader
from pretrain.checkpoints.run_folder import load_run
from pretrain.errors import ConfigError, ExportError
from pretrain.formats import hf_export, hf_import, import_check
from pretrain.formats.added_tokens import AddedTokens
from pretrain.formats.convert import ConvertOptions, convert
from pretrain.formats.hf_import import import_hf
from pretrain.formats.import_tokenizer import choose_tokenizer
from pretrain.options.settings import load_config
from tests.formats.published_models import (
    MODELS,
    NUM_IDS,
    change_config,
    copy_of,
    make_model,
    sentencepiece_model,
    write_byte_level,
)
from tests.helpers.small_disk import small_disk


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(hf_import, "NUM_TEXTS", 150)
    monkeypatch.setattr(hf_export, "NUM_TEXTS", 150)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "llama"
    make_model("llama", folder)
    return folder


def refused(source: Path, out: Path, message: str, error: type[Exception] = ExportError) -> None:
    """The import fails with this message, and leaves nothing."""
    with pytest.raises(error, match=message):
        import_hf(source, out)
    assert not out.exists() and not list(out.parent.glob(".*partial*"))


FAST = ("mistral", "olmo2", "stablelm", "gpt2")  # each in a way of its own; the others take as long again


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_logits_are_those_of_transformers_and_the_way_back_gives_the_same_tensors(name, tmp_path):
    theirs = make_model(name, tmp_path / "published")
    report = import_hf(tmp_path / "published", tmp_path / "run")
    assert report["logits"]["max_difference"] < 1e-4 and report["logits"]["max_relative_difference"] < 5e-6
    assert report["vocabulary"] == {
        "published": NUM_IDS,
        "tokenizer": NUM_IDS,
        "imported": NUM_IDS,
        "trimmed": 0,
        "added": 0,
    }
    assert report["logits"]["greedy_tokens"] == 32 and report["logits"]["greedy_tie_at"] is None
    tokens = torch.randint(NUM_IDS, (2, 90), generator=torch.Generator().manual_seed(7))
    run = load_run(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(run.model.logits(tokens), theirs(input_ids=tokens).logits, rtol=0, atol=1e-4)
    convert(tmp_path / "run", tmp_path / "back", options=ConvertOptions(dtype="fp32"))
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("published", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_run_folder_holds_what_goes_on(llama, tmp_path, capsys):
    source, out = copy_of(llama, tmp_path / "model"), tmp_path / "runs" / "imported"
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert main([str(source), str(out), "--from", "hf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "import.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "checkpoints", "config.yaml", "continue.yaml", "import.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    reader = CheckpointReader(out / "checkpoints" / "step-00000000")
    reader.verify()
    assert set(map(tuple, reader.states.values())) == {("master",)} and reader.training["num_tokens"] == 0
    assert reader.manifest["about"]["imported"]["sha256"].keys() == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    config = load_config(out / "continue.yaml")
    assert config.model == load_config(out / "config.yaml").model and config.resume.from_ == str(out)
    assert config.tokenizer.model == str(out / "tokenizer.json") and config.model.norm_eps == 1e-5
    assert (config.data.seq_len, load_run(out).config.data.seq_len) == (96, 96)
    assert [path.name for path in out.parent.iterdir()] == ["imported"], "no temporary folder is left"
    back = tmp_path / "back"
    convert(out, back)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_bf16_shards_and_small_files_keep_every_bit(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_checkpoint, "FILE_BYTES", 20_000)
    import transformers

    source = copy_of(llama, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="30KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 3
    import_hf(source, tmp_path / "run")
    assert len(list((tmp_path / "run/checkpoints/step-00000000").glob("weights-*"))) > 3
    convert(tmp_path / "run", tmp_path / "back", options=ConvertOptions(dtype="bf16"))
    after = load_file(tmp_path / "back" / "model.safetensors")
    before = {key: tensor for path in shards for key, tensor in load_file(path).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    shards[1].unlink()
    refused(
        source, tmp_path / "other", "model-00002-of-.*: is missing; expected it, since model.safetensors.index.json"
    )


def test_old_checkpoints_of_gpt2_have_other_names_and_masks(tmp_path):
    make_model("gpt2", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 96, 96).tril()
    save_file(tensors, path, {"format": "pt"})
    report = import_hf(tmp_path / "model", tmp_path / "run")
    assert report["left_out"] == ["h.0.attn.bias"]


def test_a_pickle_of_tensors_is_read_and_one_that_runs_programs_is_not(llama, tmp_path):
    source = copy_of(llama, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    assert import_hf(source, tmp_path / "run")["source"]["sha256"].keys() >= {"pytorch_model.bin"}

    class Program:
        def __reduce__(self):
            return (Path(tmp_path / "was_run").touch, ())

    torch.save(tensors | {"x": Program()}, source / "pytorch_model.bin")
    refused(
        source, tmp_path / "other", r"pytorch_model.bin: is a pickle that needs more than tensors \(getattr\); expected"
    )
    (source / "pytorch_model.bin").rename(source / "model.safetensors")
    refused(source, tmp_path / "other", "model.safetensors: is a pickle, as torch.save writes .* Name it pytorch_model")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Program()))
    refused(source, tmp_path / "other", "pytorch_model.bin: is (a pickle that needs more|not readable)")
    assert not (tmp_path / "was_run").exists()


def test_a_padded_vocabulary_is_trimmed(tmp_path):
    make_model("qwen3", tmp_path / "model", vocab_size=512)
    report = import_hf(tmp_path / "model", tmp_path / "run")
    assert report["vocabulary"] == {
        "published": 512,
        "tokenizer": NUM_IDS,
        "imported": NUM_IDS,
        "trimmed": 91,
        "added": 0,
    }
    assert load_run(tmp_path / "run").model.shape.vocab_size == NUM_IDS


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_new_tokens_have_the_mean_of_all_rows_and_change_no_other_id(kind, llama, tmp_path):
    source, names = copy_of(llama, tmp_path / "model"), ("<|user|>", "<|bot|>")
    if kind == "sentencepiece":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).unlink()
        use_sentencepiece(source)
    report = import_hf(source, tmp_path / "run", AddedTokens(names, ("α β",)))
    assert report["vocabulary"] == {"published": 421, "tokenizer": 421, "imported": 424, "trimmed": 0, "added": 3}
    run = load_run(tmp_path / "run")
    assert run.tokenizer.special_tokens().items() >= {"<|user|>": 421, "<|bot|>": 422}.items()
    assert 423 in run.tokenizer.encode("x α β y") and 421 not in run.tokenizer.encode("<|user|>")
    assert run.tokenizer.decode(run.tokenizer.encode("x α β y")) == "x α β y"
    old = load_file(source / "model.safetensors")
    for ours, theirs in (("embedding", "model.embed_tokens.weight"), ("output", "lm_head.weight")):
        weight = run.model.get_submodule(ours).weight.detach()
        assert torch.equal(weight[:421], old[theirs]) and (weight[424:] == 0).all()
        torch.testing.assert_close(weight[421:424], old[theirs].mean(0).expand(3, -1))
    exported = convert(tmp_path / "run", tmp_path / "back")
    assert exported["tokenizer"]["mismatches"] == 0


def use_sentencepiece(folder: Path) -> None:
    """Give a model the tokenizer that an export of ours has."""
    from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
    from pretrain.tokenizers.tokenizer_files import write_tokenizer_files

    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    write_tokenizer_files(SentencePieceTokenizer(folder / "tokenizer.model"), folder, 96)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))


def test_the_token_that_ends_documents_may_be_named_by_the_config_alone(llama, tmp_path):
    source = copy_of(llama, tmp_path / "model")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    change_config(source, {"eos_token_id": [0, 5]})
    import_hf(source, tmp_path / "run")
    assert load_run(tmp_path / "run").tokenizer.eos_id == 0
    assert load_config(tmp_path / "run" / "continue.yaml").tokenizer.eos == "<|endoftext|>"


def test_tokens_that_are_there_are_refused(llama, tmp_path, capsys):
    assert main([str(llama), str(tmp_path / "a"), "--from", "hf", "--add-tokens", "<|endoftext|>"]) == 2
    assert "'<|endoftext|>' is empty, given twice or a token already; expected new ones" in capsys.readouterr().err
    assert main([str(llama), str(tmp_path / "a"), "--from", "hf", "--add-symbols", "absent.txt"]) == 2
    assert "absent.txt is no file; expected one with a token a line. Correct the path; " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "a"), "--to", "hf", "--add-tokens", "x"])
    assert not (tmp_path / "a").exists()


def test_the_sentencepiece_model_is_kept_and_tokens_beside_it_make_the_other_file_count(llama, tmp_path):
    source = copy_of(llama, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    use_sentencepiece(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    report = import_hf(source, tmp_path / "run")
    assert report["tokenizer"]["file"] == "tokenizer.model"
    assert (tmp_path / "run/chat_template.jinja").read_text() == "{{ messages }}"
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][-1] | {"id": 421, "content": "<|more|>"})
    (source / "tokenizer.json").write_text(json.dumps(spec))
    change_config(source, {"vocab_size": 421})
    refused(
        source, tmp_path / "small", "the tokenizer has 422 ids, and config.json says vocab_size 421; expected no more"
    )


def test_a_class_that_builds_another_tokenizer_than_its_file_is_passed_over(tmp_path):
    make_model("qwen2", tmp_path / "model")
    write_byte_level(tmp_path / "model")  # GPT-2's way of cutting text, which transformers' class for Qwen replaces
    report = import_hf(tmp_path / "model", tmp_path / "run")
    assert report["tokenizer"]["class_differs"].startswith("Qwen2Tokenizer: its ids of ")


def test_ids_that_transformers_does_not_give_are_refused_by_the_first_text(llama):
    class Other:
        bos_token_id, eos_token_id = None, 0

        def get_vocab(self):
            return {"x": NUM_IDS - 1}

        def __call__(self, texts, **options):
            return {"input_ids": [[5] for _ in texts]}

    with pytest.raises(
        ExportError, match=r"llama: tokenizer.json: its ids of '.*' are \[.*\], and \[5\] in transformers. Exp"
    ):
        choose_tokenizer(llama, {}, lambda folder, is_plain=False: Other(), [], 20)


def test_a_sentencepiece_model_that_transformers_does_not_read_so_is_passed_over(llama, tmp_path):
    source = copy_of(llama, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    use_sentencepiece(source)
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][::-1]
    (source / "tokenizer.json").write_text(json.dumps(spec))
    report = import_hf(source, tmp_path / "run")  # the other file is what transformers reads
    assert report["tokenizer"]["file"] == "tokenizer.json"
    assert report["tokenizer"]["passed_over"][0].startswith("tokenizer.model: its ids of ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; expected one of gpt2, llama, mistral, olmo2, qwen2, qwen3, sta"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM. Only language models"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is given; expected none"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu', which family llama always has"),
        ({"attention_multiplier": 0.1}, "attention_multiplier is 0.1; expected no such key, since its meaning for llama"),
        ({"rope_interleaved": True}, "rope_interleaved is True; expected False"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2; expected 1"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'dynamic'; expected"),
        ({"rms_norm_eps": 1.0}, "norm_eps"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(changes, message, llama, tmp_path):
    source = copy_of(llama, tmp_path / "model")
    change_config(source, changes)
    refused(source, tmp_path / "run", message, ConfigError)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True; expected False"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True; expected False"),
        ("starcoder2", {"use_bias": False}, "model.ffn_bias is false; expected true for family starcoder2"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9}, "max_window_layers is 1; expected 0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; expected False"),
        ("olmo2", {"tie_word_embeddings": True}, "model.tie_embeddings is true; expected false for family olmo2"),
    ],
)
def test_what_a_family_does_not_have_is_refused(name, more, message, tmp_path):
    make_model(name, tmp_path / "model", **more)
    refused(tmp_path / "model", tmp_path / "run", message, ConfigError)


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "final_norm.weight: the parameter .1 such. has no tensor|missing_keys"),
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "k_proj.weight: the tensor is missing; expected"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "model.extra: the tensor .1 such. has no counterpart"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            "final_norm.weight: is of shape .31.; expected .32.",
        ),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), "final_norm.weight: holds NaN or infinity"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "is of torch.int8; expected bf16",
        ),
    ],
    ids=["lost", "part", "extra", "shape", "nan", "int8"],
)
def test_weights_that_do_not_fit_are_refused(change, message, llama, tmp_path):
    source = copy_of(llama, tmp_path / "model")
    change_weights(source, change)
    refused(source, tmp_path / "run", message)


def test_an_output_layer_that_is_tied_must_be_the_embedding(tmp_path):
    make_model("llama3-tied", tmp_path / "model")
    change_weights(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    import_hf(tmp_path / "model", tmp_path / "run")
    change_weights(tmp_path / "model", lambda t: t["lm_head.weight"].add_(1))
    refused(
        tmp_path / "model", tmp_path / "other", "lm_head.weight is not model.embed_tokens.weight, and tie_word_embedd"
    )


def test_files_that_are_not_whole_are_refused(llama, tmp_path):
    source = copy_of(llama, tmp_path / "model")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-100])
    refused(source, tmp_path / "run", "model.safetensors: is not a whole safetensors file; expected one")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "run", "holds no weights; expected model.safetensors, pytorch_model.bin or an index")
    (source / "config.json").unlink()
    refused(source, tmp_path / "run", "config.json: is not readable .*; expected a folder in Hugging Face", ConfigError)
    (source / "config.yaml").touch()
    refused(
        source, tmp_path / "run", "tokenizer. This is a run folder, which --to converts; training goes", ConfigError
    )


def test_a_small_disk_is_refused_before_it_is_filled(llama, tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        refused(
            llama, disk / "run", r"run: it takes [\d,]+ bytes, and [\d,]+ are free; expected a folder .* Name another"
        )


def test_a_full_disk_leaves_nothing(llama, tmp_path, monkeypatch):
    def write(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_checkpoint, "write_tensors", write)
    refused(llama, tmp_path / "run", "run: cannot be written .*No space left.*; expected a folder on a disk with room")


def test_what_computes_something_else_is_refused(llama, tmp_path, monkeypatch):
    """The proof itself is tried: a wrong epsilon, a wrong weight, another greedy text."""
    source, right = copy_of(llama, tmp_path / "model"), hf_import.check_config

    def other_epsilon(*args):
        shape = right(*args)
        args[0].options["norm_eps"] = 1e-4
        return shape

    monkeypatch.setattr(hf_import, "check_config", other_epsilon)
    refused(
        source,
        tmp_path / "run",
        r"import: text row, position \d+: the logit of token \d+ is .*; expected .*, as in tra",
    )
    monkeypatch.setattr(hf_import, "check_config", right)
    monkeypatch.setattr(import_check, "_compare", lambda ours, theirs, *rest: (0.0, 1.0))

    reference_of = hf_export.reference_of

    def with_another_token(*args):
        read = reference_of(*args)
        read.greedy_logits = read.greedy_logits.clone()
        read.greedy[3] = int(read.greedy_logits[3].topk(2).indices[1])
        read.greedy_logits[3, read.greedy[3]] += 10
        return read

    monkeypatch.setattr(hf_export, "reference_of", with_another_token)
    refused(
        source, tmp_path / "run", r"import: token 3 of the greedy continuation is \d+; expected \d+, whose logit is"
    )
