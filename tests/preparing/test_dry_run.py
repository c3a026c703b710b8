"""What --dry-run foresees, beside what prepare then does; and that it writes nothing."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from launch.prepare import main
from pretrain.console import format_bytes
from pretrain.data.row_table import RowTable
from pretrain.data.shards import Manifest
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config, TokenizerSection
from pretrain.preparing import dry_run, source_sample
from pretrain.preparing.corpus import Corpus
from pretrain.preparing.dry_run import forecast
from pretrain.preparing.prepare import prepare
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from tests.helpers.token_writers import write_megatron, write_nanogpt
from tests.preparing.tar_helpers import text_samples, write_tar
from tests.preparing.test_table_files import save_dataset, write_csv

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 1000
SUFFIXES = (
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".csv",
    ".csv.zst",
    ".parquet",
    ".tar",
    "dataset",
    "megatron",
    "nanogpt",
)


def stdlib_texts() -> list[str]:
    """The standard library's sources of the tests and encodings, cut into documents of uneven lengths."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    rng, texts = random.Random(1), []
    for path in sorted([*folder.glob("*.py"), *folder.glob("asyncio/*.py"), *folder.glob("email/*.py")]):
        text = path.read_text(encoding="utf-8")
        place = 0
        while place < len(text):
            length = int(rng.lognormvariate(8, 1.2)) + 1
            texts.append(text[place : place + length])
            place += length
    return list(dict.fromkeys(texts))


def config_of(folder: Path, sources: list[dict], vocab_size: int = VOCAB_SIZE, **data: object) -> Config:
    return Config.model_validate(
        {
            "tokenizer": {"model": str(folder / "t.model"), "vocab_size": vocab_size, "sample_bytes": 2_000_000},
            "data": {"sources": sources, "seq_len": 256, "val_fraction": 0.01, "prepare_processes": 1} | data,
            "model": {"dim": 16, "num_layers": 1, "num_heads": 1},
            "optim": {"lr": 0.001},
            "train": {"num_steps": 100, "global_batch_size": 8, "micro_batch_size": 1},
        }
    )


def write_kind(folder: Path, kind: str, texts: list[str], tokenizer: SentencePieceTokenizer) -> dict:
    """Write documents as a kind of file; returns the source's options."""
    folder.mkdir(parents=True, exist_ok=True)
    path, options = folder / f"a{kind}", {}
    lines = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)).encode()
    if kind.endswith(".parquet"):
        pq.write_table(pa.table({"text": texts}), path, row_group_size=300)
    elif kind == "dataset":
        save_dataset(path, texts)
    elif kind == ".tar":
        write_tar(path, text_samples(texts, "mixed"))
    elif kind == "megatron":
        write_megatron(folder / "a", [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts])
        path = folder / "a.bin"
    elif kind == "nanogpt":
        path, options = folder / "a.bin", {"format": "nanogpt"}
        write_nanogpt(path, [tokenizer.encode(text) for text in texts], tokenizer.eos_id)
    else:
        if ".csv" in kind:
            lines = write_csv(folder / "plain.csv", [["id", "text"], *(["1", text] for text in texts)])
            (folder / "plain.csv").unlink()
        pack = gzip.compress if kind.endswith(".gz") else zstandard.compress if kind.endswith(".zst") else bytes
        path.write_bytes(pack(lines))
    return {
        "name": kind.strip(".").replace(".", "-"),
        "paths": [str(path)],
        "shards": str(folder / "shards"),
        **options,
    }


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in [folder, *folder.rglob("*")]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], SentencePieceTokenizer]:
    """A folder with a tokenizer, texts of 5 MB, and the tokenizer."""
    folder, texts = tmp_path_factory.mktemp("dry"), stdlib_texts()
    assert sum(map(len, texts)) > 4_000_000
    train_tokenizer(
        texts, TokenizerSection(model=str(folder / "t.model"), vocab_size=VOCAB_SIZE, sample_bytes=500_000), 1
    )
    return folder, texts, SentencePieceTokenizer(folder / "t.model")


def is_near(foreseen: float, real: float, share: float = 0.1) -> bool:
    return abs(foreseen / real - 1) <= share


def test_a_real_corpus_is_foreseen_within_a_tenth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the standard library, of which a quarter is sampled: before there is a tokenizer, and with it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts = ["*.py", "asyncio", "email", "encodings/*.py", "idlelib/*.py", "unittest", "test/test_[a-i]*.py"]
    source = {"name": "web", "paths": [str(folder / part) for part in parts], "shards": str(tmp_path / "shards")}
    config = config_of(tmp_path, [source], vocab_size=2048, prepare_processes=2)
    monkeypatch.setattr(dry_run, "SAMPLE_BYTES", 4_000_000)
    monkeypatch.setattr(dry_run, "SAMPLE_SECONDS", 1e6)  # a busy machine may read less
    before = snapshot(tmp_path)
    blind = forecast(config)
    assert snapshot(tmp_path) == before  # writes nothing
    assert "estimated by a tokenizer trained on 2.0 MB now; there is none yet" in blind["tokenizer"]["tokens_are"]
    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "_remove_shares", lambda corpus: None)
        prepare(config)
    (tmp_path / "shards").rename(tmp_path / "done")
    temporary_bytes = sum(path.stat().st_size for path in (tmp_path / "done/share-1-of-1").iterdir())
    shutil.rmtree(tmp_path / "done/share-1-of-1")
    before = snapshot(tmp_path)
    seen = forecast(config)
    assert snapshot(tmp_path) == before
    assert seen["tokenizer"]["tokens_are"] == f"counted with {tmp_path}/t.model"
    manifest = Manifest.load(tmp_path / "done")
    shards = manifest.train + manifest.val
    num_documents, num_tokens = (sum(getattr(one, key) for one in shards) for key in ("num_documents", "num_tokens"))
    size = sum(path.stat().st_size for path in (tmp_path / "done").rglob("*") if path.is_file())
    for one in (blind["sources"][0], seen["sources"][0]):
        assert not one["is_exact"] and one["state"] == "to do" and one["seconds"] > 0
        assert is_near(one["num_documents"], num_documents) and is_near(one["num_tokens"], num_tokens), one
        assert is_near(one["text_bytes"], sum(manifest.text_bytes.values())) and is_near(one["shard_bytes"], size)
        assert is_near(one["temporary_bytes"], temporary_bytes)
        assert is_near(one["num_rows"], RowTable.open(tmp_path / "done", manifest, "train", 256).num_rows)
        assert one["epoch_steps"] == pytest.approx(one["num_rows"] / 8, rel=1e-3)
        assert one["epochs"] == pytest.approx(100 / one["epoch_steps"])


@pytest.mark.parametrize("kind", SUFFIXES)
@pytest.mark.parametrize("share", ["whole", "sampled"])
def test_every_kind_of_file_is_foreseen(
    tmp_path: Path, corpus: tuple, kind: str, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly where all is read, and within a tenth where a tenth is."""
    folder, texts, tokenizer = corpus
    monkeypatch.setattr(dry_run, "SAMPLE_BYTES", 700_000 if share == "sampled" else 30_000_000)
    monkeypatch.setattr(dry_run, "SAMPLE_SECONDS", 1e6)  # a busy machine may read less
    config = config_of(folder, [write_kind(tmp_path, kind, [*texts, ""], tokenizer)])
    if share == "sampled" and kind == "megatron":
        monkeypatch.setattr(source_sample, "_NUM_TOKEN_DOCUMENTS", 500)
    found = forecast(config)["sources"][0]
    num_tokens = sum(len(tokenizer.encode(text)) + 2 for text in texts)
    expected = len(texts), sum(len(text.encode()) for text in texts), num_tokens
    values = found["num_documents"], found["text_bytes"], found["num_tokens"]
    assert found["is_exact"] == (share == "whole"), found
    if share == "whole" and kind in ("megatron", "nanogpt"):
        assert values == expected
    elif share == "whole":
        assert values[:2] == expected[:2] and is_near(values[2], expected[2], 0.02)
    else:
        assert all(map(is_near, values, expected)), (values, expected)


def test_a_small_source_is_counted_without_its_duplicates(corpus: tuple, tmp_path: Path) -> None:
    folder, texts, tokenizer = corpus
    source = write_kind(tmp_path, ".jsonl", [*texts[:50], *texts[:20]], tokenizer)
    found = forecast(config_of(folder, [source]))["sources"][0]
    assert (found["num_documents"], found["is_exact"]) == (50, True)
    found = forecast(config_of(folder, [source], drop_duplicates=False))["sources"][0]
    assert found["num_documents"] == 70


def test_sources_are_added_up_and_complete_ones_recalled(corpus: tuple, tmp_path: Path) -> None:
    folder, texts, tokenizer = corpus
    sources = [write_kind(tmp_path / kind, kind, texts[:300], tokenizer) for kind in (".jsonl", ".parquet")]
    prepare(config_of(folder, sources[:1]))
    ready = {"name": "ready", "shards": sources[0]["shards"]}
    sources[0]["shards"] = str(tmp_path / "other")
    sources[0]["weight"] = 3
    content = forecast(config_of(folder, [*sources, ready]))
    first, second, third = content["sources"]
    assert [one["state"] for one in content["sources"]] == ["to do", "to do", "complete"]
    manifest = Manifest.load(ready["shards"])
    assert third["num_tokens"] == sum(shard.num_tokens for shard in manifest.train + manifest.val)
    assert third["num_documents"] == 300 == first["num_documents"] and third["seconds"] == 0
    assert content["total"]["num_documents"] == 900
    assert 0.9 < first["temporary_bytes"] / first["shard_bytes"] < 1.1 and third["temporary_bytes"] == 0
    assert content["total"]["temporary_bytes"] == max(first["temporary_bytes"], second["temporary_bytes"])
    needed = first["shard_bytes"] + second["shard_bytes"]
    both = needed + content["total"]["temporary_bytes"]
    assert f"disk: {format_bytes(both)} while `prepare` runs, {format_bytes(needed)} when" in dry_run.render(content)
    assert first["epochs"] == pytest.approx(3 * second["epochs"], rel=0.05)
    assert (content["num_steps"], content["tokens_per_step"], content["seq_len"]) == (100, 8 * 256, 256)


def test_what_is_left_out_is_said_with_its_reason(
    corpus: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, texts, tokenizer = corpus
    for sample_bytes in (30_000_000, 100_000):  # read as a whole, and in windows
        monkeypatch.setattr(dry_run, "SAMPLE_BYTES", sample_bytes)
        source = write_kind(tmp_path, ".jsonl", [*texts, texts[0], "short"], tokenizer)
        content = forecast(config_of(folder, [source], filters={"min_characters": 200}))
        one, is_whole = content["sources"][0], sample_bytes == 30_000_000
        assert ("~ marks what a sample was taken of" in dry_run.render(content)) == (not is_whole)
        num_short = sum(len(text) < 200 for text in texts) + 1
        assert (one["counts"]["documents_read"] == len(texts) + 2) == (one["counts"].get("duplicates") == 1) == is_whole
        assert (
            one["counts"]["skipped_short"] == num_short if is_whole else 0 < one["counts"]["skipped_short"] <= num_short
        )
        assert "characters, less than 200" in one["examples"]["skipped_short"]
        assert f"jsonl: {one['counts']['skipped_short']:,} skipped short, of" in dry_run.render(content)
    content = forecast(config_of(folder, [source | {"text_field": "body"}]))
    one, shown = content["sources"][0], dry_run.render(content)
    assert (one["num_documents"], one["num_rows"], one["epochs"]) == (0, 0, 0)
    assert (
        f"warning: jsonl: no document to train on, of {one['counts']['documents_read']:,} documents that were" in shown
    )
    assert "a.jsonl:" in shown and "field 'body' is missing" in shown and "(text_field, examples)." in shown
    shown = dry_run.render(forecast(config_of(folder, [source], filters={"min_characters": 10**8})))
    assert "Relax data.filters (short), or set filter: false for this source." in shown and "text_field" not in shown


def test_epochs_follow_the_mixture_of_each_phase(tmp_path: Path) -> None:
    sources = [{"name": name, "shards": str(tmp_path / name)} for name in ("a", "b")]
    counts = {"counts": {}, "examples": {}, "num_files": 0, "source_bytes": 0, "num_documents": 1, "text_bytes": 1, "num_tokens": 1, "shard_bytes": 1,
              "temporary_bytes": 0}  # fmt: skip
    forecasts = [
        dry_run.Forecast(name, "complete", True, **counts, num_rows=rows, epochs=0.0, epoch_steps=0.0, seconds=0.0)
        for name, rows in (("a", 200), ("b", 400))
    ]

    def epochs_of(*phases: dict, **options: list[float]) -> list[float]:
        mixed = [
            source | {key: values[number] for key, values in options.items()} for number, source in enumerate(sources)
        ]
        config = config_of(tmp_path, mixed, phases=list(phases))
        return [dry_run._with_epochs(one, forecasts, config).epochs for one in forecasts]

    assert epochs_of(weight=[3, 1]) == pytest.approx([600 / 200, 200 / 400])  # 100 steps of 8 rows
    assert epochs_of(epochs=[2, 1]) == pytest.approx([2, 1]) == epochs_of(epochs=[4, 2])
    assert epochs_of(tokens=[6e5, 2e5]) == pytest.approx([3, 0.5])
    shorter_rows = {"from_step": 50, "weights": {"b": 1}, "seq_len": 128}
    assert epochs_of(shorter_rows, weight=[1, 0]) == pytest.approx([2, 1])


def test_what_prepare_would_refuse_is_an_error(corpus: tuple, tmp_path: Path) -> None:
    folder, texts, tokenizer = corpus
    source = {"name": "a", "paths": [str(tmp_path / "a.jsonl")], "shards": str(tmp_path / "shards")}
    with pytest.raises(DataError, match=r"paths: .*a.jsonl' names no file"):
        forecast(config_of(folder, [source]))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: the document cannot be used"):
        forecast(config_of(folder, [source], on_bad_document="error"))
    assert forecast(config_of(folder, [source]))["sources"][0]["num_documents"] == 1
    write_megatron(tmp_path / "b", [[VOCAB_SIZE]])
    source["paths"] = [str(tmp_path / "b")]
    with pytest.raises(DataError, match=r"id number 0 of the document is 1000; expected 0 to 999"):
        forecast(config_of(folder, [source]))
    with pytest.raises(ConfigError, match=r"which does not exist; expected the tokenizer that the ids"):
        forecast(config_of(tmp_path, [source]))


def test_a_sample_that_is_too_small_for_a_tokenizer_is_guessed_from(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words " * 100)
    source = {"name": "a", "paths": [str(tmp_path / "a.txt")], "shards": str(tmp_path / "shards")}
    content = forecast(config_of(tmp_path, [source]))
    assert content["tokenizer"]["tokens_are"] == "guessed: 4 bytes of text each; there is no tokenizer yet"
    assert content["sources"][0]["num_tokens"] == 1200 // 4 + 2


def test_the_command_shows_a_table_or_one_json_object(
    corpus: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, texts, tokenizer = corpus
    source = write_kind(tmp_path / "raw", ".jsonl", texts[:100], tokenizer)
    (tmp_path / "config.yaml").write_text(
        json.dumps(config_of(folder, [source]).model_dump(mode="json", exclude_unset=True))
    )
    before = snapshot(tmp_path), snapshot(folder)
    assert main([str(tmp_path / "config.yaml"), "--dry-run", "--json", "train.num_steps=7"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["num_steps"] == 7 and shown.err == ""
    assert main(["--dry-run", str(tmp_path / "config.yaml")]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].split() == "source files stored documents text tokens shards rows steps/epoch epochs time".split()
    assert lines[1].split()[:2] == ["jsonl", "1"] and "100" in lines[1].split() and lines[2].startswith("in all")
    assert lines[3] == f"tokens are counted with {folder}/t.model"
    assert "nothing was written" in lines[-1] and shown.err == ""
    with pytest.raises(SystemExit) as usage:
        main(["--json", str(tmp_path / "config.yaml")])
    assert usage.value.code == 2 and "--json is for --dry-run" in capsys.readouterr().err
    assert (snapshot(tmp_path), snapshot(folder)) == before


@pytest.mark.launches
def test_the_command_needs_neither_torch_nor_pyarrow_nor_a_place_to_write(corpus: tuple, tmp_path: Path) -> None:
    folder, texts, tokenizer = corpus
    source = write_kind(tmp_path / "raw", ".jsonl.zst", texts[:100], tokenizer)
    (tmp_path / "config.yaml").write_text(
        json.dumps(config_of(folder, [source]).model_dump(mode="json", exclude_unset=True))
    )
    code = (
        "import sys\n"
        "import launch.prepare\n"
        "status = launch.prepare.main([sys.argv[1], '--dry-run', '--json'])\n"
        "sys.exit(status or 3 * ('torch' in sys.modules or 'pyarrow' in sys.modules or 'webdataset' in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["total"]["num_documents"] == 100
