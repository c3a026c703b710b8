"""From text to a verified export with tokenizers of every kind: prepare, train, evaluate, generate, convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.convert import main as convert_main
from launch.evaluate import main as evaluate_main
from launch.generate import main as generate_main
from pretrain.checkpoints.run_folder import load_run
from pretrain.data.shard_reader import ShardReader
from pretrain.data.shards import Manifest
from pretrain.formats import hf_export
from pretrain.options.settings import load_config
from pretrain.preparing.prepare import prepare
from pretrain.tokenizers import tokenizer_trial
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from tests.helpers.rank_helpers import losses, run_cases
from tests.helpers.tokenizer_helpers import train_json, train_sentencepiece

pytestmark = pytest.mark.launches

PLAIN = {"normalization_rule_name": "identity", "byte_fallback": True}


def make_tokenizers(folder: Path) -> dict[str, dict[str, object]]:
    """One of each kind; the `tokenizer` section of the config of each."""
    json_size, foreign_size = 600, 1500
    bare = train_json("gpt2", folder / "bare", json_size, files=False)
    with_files = train_json("llama3", folder / "with-files", json_size)
    train_json("qwen", folder / "rebuilt", json_size)
    symbols = ["<tool>", "\u2581\u2581", "\n"]
    llama2 = train_sentencepiece(
        folder / "llama2.model", model_type="bpe", remove_extra_whitespaces=False, user_defined_symbols=symbols, **PLAIN
    )
    t5 = train_sentencepiece(
        folder / "t5" / "tokenizer.model", model_type="unigram", bos_id=-1, pad_id=0, eos_id=1, unk_id=2, **PLAIN
    )
    nfkc = train_sentencepiece(folder / "nfkc.model", model_type="bpe", byte_fallback=True)
    return {
        "bare": {"model": bare, "vocab_size": json_size, "eos": "<|endoftext|>"},
        "with-files": {"model": with_files.parent, "vocab_size": json_size},
        "rebuilt": {"model": folder / "rebuilt", "vocab_size": json_size + 1},
        "llama2": {"model": llama2, "vocab_size": foreign_size},
        "t5": {"model": t5.parent, "vocab_size": foreign_size},
        "nfkc": {"model": nfkc, "vocab_size": foreign_size},
        "unigram": {"model": folder / "own.model", "vocab_size": 512, "kind": "unigram", "sample_bytes": 200_000},
    }


@pytest.fixture(scope="module")
def journeys(tiny_config, tmp_path_factory):
    """Prepare and train with each in one start; (folder, config overrides, what prepare said) by name."""
    folder = tmp_path_factory.mktemp("journeys")
    (folder / "boxes.txt").write_text("a line of boxes \u2581\u2581\u2581 and words\n" * 20)
    overrides, said = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_trial, "NUM_TEXTS", 500)
        for name, section in make_tokenizers(folder).items():
            source = {
                "name": "code",
                "paths": [f"{tiny_config.parent}/code", f"{folder}/boxes.txt"],
                "shards": f"{folder}/{name}/shards",
            }
            overrides[name] = [
                f"run.dir={folder}/{name}/run", "train.num_steps=3", f"data.sources={json.dumps([source])}",
                f"tokenizer={json.dumps(section, default=str)}",
            ]  # fmt: skip
            lines: list[str] = []
            patch.setattr("pretrain.preparing.prepare.LiveLine.say", lambda self, text, lines=lines: lines.append(text))
            prepare(load_config(tiny_config, overrides[name]))
            said[name] = "\n".join(lines)
    outcomes = run_cases(tiny_config, [{"overrides": case} for case in overrides.values()], 1, folder / "ranks")
    assert outcomes == ["done"] * len(overrides)
    return folder, overrides, said


NAMES = ("bare", "with-files", "rebuilt", "llama2", "t5", "nfkc", "unigram")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_trained_judged_and_sampled(journeys, name, capsys):
    run = journeys[0] / name / "run"
    assert len(losses(run)) == 3 and all(2 < loss < 8 for loss in losses(run))
    assert evaluate_main([str(run), "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert 2 < judged["bits_per_byte"] < 9
    manifest = Manifest.load(journeys[0] / name / "shards")
    if name in ("bare", "with-files", "rebuilt", "unigram"):  # the bytes that ids stand for are those of the text
        assert judged["bytes"] == manifest.text_bytes["val"]
    else:
        assert judged["bytes"] == pytest.approx(manifest.text_bytes["val"], rel=0.3)
    assert generate_main([str(run), "--prompt", "import os\n", "--max-new-tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completions"][0]["finish"] in ("length", "eos")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "nfkc"])
def test_its_export_is_verified(journeys, name, monkeypatch, tmp_path):
    monkeypatch.setattr(hf_export, "NUM_TEXTS", 1000)
    folder, out = journeys[0] / name, tmp_path / "out"
    assert convert_main([str(folder / "run"), str(out), "--to", "hf"]) == 0
    report = json.loads((out / "verification.json").read_text())["tokenizer"]
    assert report["mismatches"] == 0 and report["texts"] == 1000
    assert (report["ties"] > 0) == (name == "t5")
    begin = {"bare": [], "with-files": ["<|begin_of_text|>"], "rebuilt": [], "t5": ["</s>"]}.get(name, ["<s>"])
    assert report["begins_texts_with"] == begin
    loaded = load_run(folder / "run")
    if name in ("bare", "with-files", "rebuilt"):
        assert (out / "tokenizer.json").read_bytes() == loaded.tokenizer.files["tokenizer.json"]
        assert not (out / "tokenizer.model").exists()
    else:
        assert (out / "tokenizer.model").read_bytes() == loaded.tokenizer.files["tokenizer.model"]
    config = json.loads((out / "tokenizer_config.json").read_text())
    if name == "with-files":
        assert (out / "tokenizer_config.json").read_bytes() == loaded.tokenizer.files["tokenizer_config.json"]
        assert config["chat_template"] and "class_replaced_because" not in report
    if name == "rebuilt":  # Qwen2Tokenizer splits numbers otherwise than this tokenizer.json says
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["pad_token"] == "<|im_end|>"
        assert "in transformers; expected" in report["class_replaced_because"]
    card = (out / "README.md").read_text()
    assert report["kind"] in card and ("puts it first" in card) == (name not in ("bare", "rebuilt"))


def test_an_export_that_cannot_be_exact_is_refused_and_was_foretold(journeys, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hf_export, "NUM_TEXTS", 1000)
    folder, _, said = journeys
    assert convert_main([str(folder / "nfkc" / "run"), str(tmp_path / "out"), "--to", "hf"]) == 1
    shown = capsys.readouterr().err
    assert "in transformers; expected" in shown and "this sentencepiece model has no exact counterpart" in shown
    assert not (tmp_path / "out").exists()
    assert "warning: a model that is trained with it cannot be exported to Hugging Face's format: " in said["nfkc"]
    assert "other ids from tokenizer.json, such as" in said["nfkc"]


def test_prepare_says_what_a_foreign_tokenizer_loses(journeys):
    said = journeys[2]
    for name in ("bare", "with-files"):
        assert "ids, " in said[name] and "warning" not in said[name] and "bits per byte are off" not in said[name]
    assert "tokenizer.json, byte-level BPE, 600 ids" in said["bare"]
    assert "documents begin with <|endoftext|> and end with <|endoftext|>" in said["bare"]
    assert "documents begin with </s> and end with </s>" in said["t5"]
    for name in ("llama2", "t5"):
        assert "its tokenizer.json for exports gives the same ids for" in said[name]
        assert "so bits per byte are off by as much" in said[name]
    assert "do not come back" not in said["llama2"]
    assert "documents do not come back from their ids exactly, such as" in said["t5"]
    assert "tokenizer: wrote" in said["unigram"] and "warning" not in said["unigram"]


def test_only_tokenizers_that_lose_u2581_leave_documents_with_it_out(journeys):
    for name in NAMES:
        manifest = Manifest.load(journeys[0] / name / "shards")
        assert manifest.counts.get("skipped_u2581", 0) == (0 if name in ("bare", "with-files", "rebuilt") else 1)


def test_documents_are_whole_in_the_shards(journeys, tiny_config):
    folder, overrides, _ = journeys
    texts = {path.read_text() for path in (tiny_config.parent / "code").iterdir()} | {
        (folder / "boxes.txt").read_text()
    }
    for name in ("bare", "with-files"):
        tokenizer = open_tokenizer(load_config(tiny_config, overrides[name]).tokenizer)
        manifest = Manifest.load(folder / name / "shards")
        found = set()
        for split in ("train", "val"):
            for shard in manifest.shards(split):
                reader = ShardReader(folder / name / "shards", shard, manifest.dtype)
                for number in range(shard.num_documents):
                    ids = reader.read(number).tolist()
                    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
                    found.add(tokenizer.decode(ids))
                reader.close()
        assert found == texts
