"""--inspect: its figures are those of the documents that were prepared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from launch.prepare import main
from pretrain.errors import ConfigError
from pretrain.preparing.inspect_shards import inspect
from pretrain.preparing.prepare import prepare
from pretrain.preparing.sources import document_digest, is_validation
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.helpers.data_helpers import make_corpus, random_documents
from tests.preparing.test_prepare import VOCAB_SIZE, config_of, text_of


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    lines = [json.dumps({"text": text_of(number, number + 1)}) for number in range(150)]
    (folder / "raw").mkdir()
    (folder / "raw/a.jsonl").write_text("\n".join([*lines, lines[3], "{}"]))
    prepare(config_of(folder))
    return folder


def test_every_figure(done: Path) -> None:
    content = inspect(done / "shards")
    tokenizer = SentencePieceTokenizer(done / "t.model")
    texts = [text_of(number, number + 1) for number in range(150)]
    lengths = sorted(len(tokenizer.encode_document(text)) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert content["total"]["num_documents"] == 150 and content["total"]["num_tokens"] == sum(lengths)
    assert content["total"]["text_bytes"] == num_bytes
    held_out = [text for text in texts if is_validation(document_digest(text.encode()), 0.1)]
    assert content["held_out_documents"] == len(held_out) / 150
    assert content["held_out_bytes"] == sum(len(text.encode()) for text in held_out) / num_bytes
    assert content["compression"]["text_bytes_per_token"] == num_bytes / (sum(lengths) - 300)
    files = [path for path in (done / "shards").iterdir() if path.suffix == ".tar" or path.name.endswith("index.npy")]
    stored = sum(path.stat().st_size for path in files)
    assert content["compression"]["text_bytes_per_stored_byte"] == num_bytes / stored
    assert content["lengths"]["max"] == lengths[-1]
    assert content["lengths"]["mean"] == pytest.approx(sum(lengths) / 150)
    expected = {str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in (1, 5, 25, 50, 75, 95, 99)}
    assert content["lengths"]["percentiles"] == expected
    histogram = {one["up_to"]: one["num_documents"] for one in content["lengths"]["histogram"]}
    assert sum(histogram.values()) == 150
    assert histogram[64] == sum(32 < length <= 64 for length in lengths)
    assert content["counts"] == {"documents_read": 152, "files_read": 1, "duplicates": 1, "skipped_no_text": 1}
    rows = content["rows"][0]
    train = [len(tokenizer.encode_document(text)) - 1 for text in texts if text not in held_out]
    assert rows["seq_len"] == 64 and rows["train"]["fill"] == sum(train) / (rows["train"]["num_rows"] * 64)
    assert content["tokenizer"] == {
        "fingerprint": tokenizer.fingerprint, "vocab_size": VOCAB_SIZE, "file": str((done / "t.model").resolve()),
        "kind": tokenizer.kind,
    }  # fmt: skip
    for sample in content["samples"]:
        assert any(text.startswith(sample["text"].rstrip("\ufffd")) for text in texts)
    assert len(content["samples"]) == 3


def test_words_and_json(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inspect", str(done / "shards"), "--json", "--samples", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect(done / "shards", num_samples=2)
    assert main(["--inspect", str(done / "shards"), "--samples", "1"]) == 0
    text = capsys.readouterr().out
    for part in ("corpus web", f"{VOCAB_SIZE} ids as uint16", "held out: ", "percentiles: 1%: ", "rows of 64 tokens: ",
                 "% full", "1  duplicates", "1  skipped no text", "--- train-0"):  # fmt: skip
        assert part in text, part
    moved = tmp_path / "alone/below/moved"
    shutil.copytree(done / "shards", moved)
    assert main(["--inspect", str(moved)]) == 0
    assert "not found: name it by --tokenizer" in capsys.readouterr().out
    assert inspect(moved, tokenizer=str(done / "t.model"))["samples"] == inspect(done / "shards")["samples"]
    config = config_of(done).model_dump(mode="json", exclude_defaults=True) | {"optim": {"lr": 0.001}}
    with open(tmp_path / "config.yaml", "w") as file:
        YAML().dump(config, file)
    assert main(["--inspect", str(moved), str(tmp_path / "config.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"]["file"] == str(done / "t.model")


def test_rows_of_every_length_and_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = random_documents(300, 1)
    make_corpus(tmp_path / "web", documents, seq_lens=(32, 16), packings=("best_fit", "concat", "document"))
    for name in ("rows-8-other", "rows-x", "rows-16-best_fit"):
        (tmp_path / "web" / name).mkdir()
    rows = inspect(tmp_path / "web")["rows"]
    assert [(one["seq_len"], one["packing"]) for one in rows] == [
        (seq_len, packing) for seq_len in (16, 32) for packing in ("best_fit", "concat", "document")
    ]
    num_slots = sum(len(one) - 1 for one in documents)
    for one in rows:
        assert one["train"]["fill"] == num_slots / (one["train"]["num_rows"] * one["seq_len"])
    assert rows[4]["train"]["fill"] > rows[3]["train"]["fill"] > rows[5]["train"]["fill"]
    assert main(["--inspect", str(tmp_path / "web")]) == 0
    text = capsys.readouterr().out
    assert "rows of 16 tokens: train" in text and "rows of 32 tokens, concat: train" in text


def test_another_tokenizer_is_refused(done: Path, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    make_corpus(tmp_path / "web", random_documents(5, 1, vocab_size=VOCAB_SIZE), vocab_size=VOCAB_SIZE)
    with pytest.raises(ConfigError, match=r"t\.model: its fingerprint is \w{12}; expected a{12}, that of the tokeni"):
        inspect(tmp_path / "web", tokenizer=str(done / "t.model"))


def test_damage_is_shown_where_it_is(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "shards", tmp_path / "shards")
    (tmp_path / "shards/rows-64/train.offsets.npy").write_bytes(b"")
    sampled = inspect(tmp_path / "shards", tokenizer=str(done / "t.model"))["samples"][0]["shard"]
    path = tmp_path / f"shards/{sampled}.tar"
    path.write_bytes(path.read_bytes()[:600])
    content = inspect(tmp_path / "shards", tokenizer=str(done / "t.model"))
    assert "is damaged" in content["rows"][0]["problem"]
    assert "it was truncated" in next(one["problem"] for one in content["samples"] if one["shard"] == sampled)
