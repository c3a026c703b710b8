"""Other wordings are trained on beside their originals, and never with what is held out; a source may be held out whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from launch.prepare import main
from pretrain.data.examples import encode_example
from pretrain.data.shard_reader import ShardReader
from pretrain.data.shards import Manifest
from pretrain.data.stream import TokenStream, ValRows
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config, TokenizerSection
from pretrain.options.settings import load_config
from pretrain.preparing.prepare import prepare
from pretrain.preparing.sources import document_digest, is_validation
from pretrain.tokenizers.sentencepiece_tokenizer import fit
from pretrain.tokenizers.tokenizer import save_file
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from tests.helpers.data_helpers import batch_plan
from tests.helpers.tuning_helpers import make_examples, write_lines

NUM, FRACTION = 120, 0.25


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    words = " ".join(f"{one['prompt']} {one['response']} {one['prompt'].upper()}" for one in make_examples(300))
    save_file(path, fit([words.encode()], TokenizerSection(model="t", vocab_size=360, sample_bytes=100_000)))
    return path


def config_of(folder: Path, model: Path, *sources: dict, **data: object) -> Config:
    return Config.model_validate(
        {
            "tokenizer": {"model": str(model), "vocab_size": 360},
            "data": {"sources": sources, "seq_len": 96, "val_fraction": FRACTION, "prepare_processes": 1} | data,
            "model": {"dim": 16, "num_layers": 1, "num_heads": 1},
            "optim": {"lr": 0.001},
            "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def source_of(folder: Path, name: str = "own", file: str = "text.jsonl", **options: object) -> dict:
    return {"name": name, "paths": [str(folder / file)], "shards": str(folder / f"{name}-shards"), **options}


def documents_of(folder: Path, config: Config, name: str, split: str) -> list[str]:
    """The texts of shards; of examples with the bit of context taken off."""
    tokenizer, shards = open_tokenizer(config.tokenizer), folder / f"{name}-shards"
    manifest = Manifest.load(shards)
    mask = (1 << manifest.context_bit) - 1 if manifest.context_bit is not None else -1
    texts = []
    for shard in manifest.shards(split):
        with closing(ShardReader(shards, shard, manifest.dtype)) as reader:
            ids = [reader.read(number) for number in range(shard.num_documents)]
            texts += [tokenizer.decode((one.astype(int) & mask).tolist()) for one in ids]
    return texts


def write_texts(folder: Path) -> tuple[list[str], list[dict]]:
    """Texts, and a paraphrase of every other one, which is it in capital letters."""
    texts = [one["prompt"] for one in make_examples(NUM)]
    write_lines(folder / "text.jsonl", [{"text": text} for text in texts])
    pairs = [{"original": {"text": text}, "paraphrase": {"text": text.upper()}} for text in texts[::2]]
    write_lines(folder / "other.jsonl", pairs)
    return texts, pairs


def sides(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    is_val = [is_validation(document_digest(text.encode()), FRACTION) for text in texts]
    return [t for t, val in zip(texts, is_val, strict=True) if not val], [
        t for t, val in zip(texts, is_val, strict=True) if val
    ]


def test_paraphrases_are_on_the_side_of_their_originals(tmp_path: Path, model: Path) -> None:
    texts, _ = write_texts(tmp_path)
    config = config_of(
        tmp_path, model, source_of(tmp_path, augment={"back_translation": str(tmp_path / "other.jsonl")})
    )
    prepare(config)
    train, val = sides(texts)
    others = [text.upper() for text in train if text in texts[::2]]
    assert sorted(documents_of(tmp_path, config, "own", "train")) == sorted(train + others)
    assert sorted(documents_of(tmp_path, config, "own", "val")) == sorted(val)
    counts = Manifest.load(tmp_path / "own-shards").counts
    assert counts["held_out_paraphrases"] == len([text for text in val if text in texts[::2]]) > 5
    # by their own hashes some of them would have been held out
    assert any(is_validation(document_digest(text.encode()), FRACTION) for text in others)


def test_without_the_option_the_bytes_are_as_before(tmp_path: Path, model: Path) -> None:
    write_texts(tmp_path)
    plain = source_of(tmp_path, "own")
    prepare(config_of(tmp_path, model, plain))
    before = {path.name: path.read_bytes() for path in (tmp_path / "own-shards").glob("*.tar")}
    (tmp_path / "own-shards").rename(tmp_path / "plain")
    noise = {"augment": {"token_dropout": 0.5, "span_shuffle": 0.5}}  # which is for those who read rows
    prepare(config_of(tmp_path, model, source_of(tmp_path, "own", **noise)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "own-shards").glob("*.tar")} == before


def test_paraphrases_of_examples(tmp_path: Path, model: Path) -> None:
    examples = make_examples(NUM)
    write_lines(tmp_path / "examples.jsonl", examples)
    pairs = [{"original": one, "paraphrase": one | {"prompt": one["prompt"].upper()}} for one in examples]
    write_lines(tmp_path / "other.jsonl", pairs)
    fields = {"template": "{prompt} =", "response": "response"}
    config = config_of(
        tmp_path, model,
        source_of(tmp_path, file="examples.jsonl", examples=fields,
                  augment={"back_translation": str(tmp_path / "other.jsonl")}),
    )  # fmt: skip
    prepare(config)
    train = documents_of(tmp_path, config, "own", "train")
    val = documents_of(tmp_path, config, "own", "val")
    assert 0 < len(val) < NUM and len(train) == 2 * (NUM - len(val))
    lowered = sorted(f"{text.partition(' =')[0].lower()} ={text.partition(' =')[2]}" for text in train)
    assert lowered[::2] == lowered[1::2] and not set(lowered) & set(val)
    manifest = Manifest.load(tmp_path / "own-shards")
    assert manifest.context_bit is not None  # and the answers alone are scored, as in the source's own lines
    tokenizer = open_tokenizer(config.tokenizer)
    stored = encode_example(tokenizer, json.dumps({"prompt": "OAK =", "response": "tree"}))
    assert (stored >> manifest.context_bit).sum() == len(tokenizer.encode("OAK =")) + 1


def test_what_cannot_be_a_paraphrase(tmp_path: Path, model: Path) -> None:
    texts, pairs = write_texts(tmp_path)
    train, _ = sides(texts)
    good = {"original": {"text": train[0]}, "paraphrase": {"text": "THE GOOD ONE"}}
    bad = [
        "{",
        json.dumps({"original": {"text": train[0]}}),
        json.dumps({"original": train[0], "paraphrase": {"text": "x"}}),
        json.dumps({"original": {"text": train[0]}, "paraphrase": {"txt": "x"}}),
        json.dumps({"original": {"text": train[1]}, "paraphrase": {"text": ""}}),
        json.dumps({"original": {"text": train[1]}, "paraphrase": {"text": train[1]}}),  # no other wording
    ]
    (tmp_path / "other.jsonl").write_text("\n".join([*bad, json.dumps(good)]) + "\n")
    augment = {"back_translation": str(tmp_path / "other.jsonl")}
    config = config_of(tmp_path, model, source_of(tmp_path, augment=augment))
    prepare(config)
    assert sorted(documents_of(tmp_path, config, "own", "train")) == sorted([*train, "THE GOOD ONE"])
    counts = Manifest.load(tmp_path / "own-shards").counts
    reasons = ("bad_json", "no_paraphrase", "no_text", "empty")
    assert [counts.get(f"skipped_{reason}") for reason in reasons] == [1, 2, 1, 1] and counts["duplicates"] == 1
    strict = config_of(tmp_path, model, source_of(tmp_path, "strict", augment=augment), on_bad_document="error")
    with pytest.raises(DataError, match=r"other.jsonl:1: the document cannot be used: it is not JSON"):
        prepare(strict)
    missing = config_of(
        tmp_path, model, source_of(tmp_path, "missing", augment={"back_translation": str(tmp_path / "none")})
    )
    with pytest.raises(
        DataError,
        match=r"data.sources\[missing\].augment.back_translation is .*none, which is no file; expected one of JSON",
    ):
        prepare(missing)


def test_other_paraphrases_make_other_shards(tmp_path: Path, model: Path) -> None:
    write_texts(tmp_path)
    config = config_of(
        tmp_path, model, source_of(tmp_path, augment={"back_translation": str(tmp_path / "other.jsonl")})
    )
    prepare(config)
    write_lines(tmp_path / "other.jsonl", [])
    with pytest.raises(ConfigError, match="augment.back_translation"):
        prepare(config)


def test_a_source_that_is_held_out_whole(tmp_path: Path, model: Path) -> None:
    texts, _ = write_texts(tmp_path)
    new = [one["prompt"] for one in make_examples(30, seed=9)]
    write_lines(tmp_path / "new.jsonl", [{"text": text} for text in new])
    config = config_of(
        tmp_path, model,
        source_of(tmp_path, val_fraction=0),
        source_of(tmp_path, "new", "new.jsonl", val_fraction=1, weight=0),
        val_fraction=0.1,
    )  # fmt: skip
    prepare(config)
    assert sorted(documents_of(tmp_path, config, "own", "train")) == sorted(texts)
    assert documents_of(tmp_path, config, "own", "val") == documents_of(tmp_path, config, "new", "train") == []
    assert sorted(documents_of(tmp_path, config, "new", "val")) == sorted(new)
    tokenizer = open_tokenizer(config.tokenizer)
    with closing(ValRows(config, tokenizer.fingerprint, 0)) as rows:
        held_out = rows.batch(range(rows.num_rows)).targets_BT
    assert int((held_out >= 0).sum()) == sum(len(tokenizer.encode(text)) + 1 for text in new)
    with closing(TokenStream(config, batch_plan(4, 1, 4, seq_len=96), 0, tokenizer.fingerprint)) as stream:
        assert stream.plan.names == ["own"]
        assert torch.is_tensor(stream.next_step().micro_batches[0].tokens_BT)


CONFIG = """\
tokenizer: {model: t.model, vocab_size: 360}
data:
  sources: [%s]
  seq_len: 64
model: {dim: 16, num_layers: 1, num_heads: 1}
optim: {lr: 1e-3}
train: {num_steps: 1, global_batch_size: 1, micro_batch_size: 1}
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{name: b, paths: [y], shards: s, val_fraction: 1}",
         r"data.sources.1.val_fraction is 1; expected less, because b is trained on. Set its weight to 0, or lower it."),
        ("{name: b, paths: [y], shards: s, val_fraction: 1, weight: 0, augment: {token_dropout: 0.1}}",
         r"augment.token_dropout is 0.1; expected to be left out. It is for training, and all of the source is held out."),
        ("{name: b, paths: [y], shards: s, augment: {span_shuffle: 0.1}}",
         r"augment.span_shuffle is 0.1; expected to be left out. It is for prompts, and the source has no `examples`."),
        ("{name: b, shards: s, augment: {back_translation: f}}",
         r"augment.back_translation is f; expected to be left out. It is for reading raw text"),
        ("{name: b, paths: [y], shards: s, augment: {token_dropout: 1.5}}", r"augment.token_dropout is 1.5; expected"),
        ("{name: b, paths: [y], shards: s, weight: 0}", r"data.sources.1.weight is 0; expected above 0, or b in one of"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(tmp_path: Path, options: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG % f"{{name: a, paths: [x], shards: r}}, {options}")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_an_index_of_tars_has_no_place_for_paraphrases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(b"\0" * 10240)
    source = f"{{name: a, paths: ['{tmp_path}/*.tar'], shards: '{tmp_path}/s', augment: {{back_translation: f}}}}"
    (tmp_path / "c.yaml").write_text(CONFIG % source)
    assert main([str(tmp_path / "c.yaml"), "--index"]) == 2
    assert "--index: data.sources[a].augment.back_translation is f; expected none" in capsys.readouterr().err
