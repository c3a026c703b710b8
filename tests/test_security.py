"""Foreign files run nothing and write nothing, and secrets are not written down."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoints.checkpoint_files import MANIFEST, CheckpointReader, manifest_digest
from pretrain.checkpoints.run_folder import RunFolder, environment, open_log
from pretrain.data.remote_corpus import open_remote
from pretrain.data.shards import _load_index, index_path
from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.formats.model_card import _plain
from pretrain.options.config import SourceSection, TokenizerSection
from pretrain.options.run_options import LogSection
from pretrain.preparing.sources import ReadLog, read_documents
from pretrain.ranks.distributed import Ranks
from pretrain.redaction import redact
from pretrain.storage.tensor_files import sha256_of
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from pretrain.training.metrics import MetricLog
from tests.helpers.rank_helpers import ROOT, newest, run_cases
from tests.helpers.store_reader import remote_config

SOURCES = [path for package in ("kernels", "pretrain", "launch") for path in sorted((ROOT / package).rglob("*.py"))]


class Malice:
    """Whoever unpickles it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path):
    """A file that must not come to be; unpickling would make it."""
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Malice(path)))
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists(), "a pickle was run"


def test_a_pickle_in_a_checkpoint_is_refused(tmp_path, marker):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    for content in (pickle.dumps(Malice(marker)), torch_file(Malice(marker))):
        file = folder / "rank-00000.safetensors"
        file.write_bytes(content)
        manifest = {
            "format_version": 2, "step": 1, "training": {}, "about": {},
            "parameters": {"w": {"shape": [1], "states": ["master"], "fragments": [[file.name, 0, 1]]}},
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}},
        }  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
        reader = CheckpointReader(folder)
        reader.verify()  # whoever made it could make its checksums too
        with pytest.raises(CheckpointError, match="is not readable .* expected a safetensors file"):
            reader.read_whole("w")
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(CheckpointError, match="expected a checkpoint's manifest"):
            CheckpointReader(folder)


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_pickle_in_a_shard_is_no_document_and_one_in_an_index_is_refused(tmp_path, marker):
    path = tmp_path / "web.tar"
    members = {"0.txt": b"a text", "0.pkl": pickle.dumps(Malice(marker)), "0.pyd": pickle.dumps(Malice(marker)),
               "0.pth": torch_file(Malice(marker)), "1.txt": pickle.dumps(Malice(marker), protocol=0)}  # fmt: skip
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    texts = read_texts(path)
    assert texts == ["a text", members["1.txt"].decode()]  # a text, whatever it says
    index = np.empty(1, dtype=object)
    index[0] = Malice(marker)
    np.save(index_path(tmp_path, "train-000000.tar"), index, allow_pickle=True)
    with pytest.raises(DataError, match="Python objects in dtype"):
        _load_index(tmp_path, "train-000000.tar")
    index_path(tmp_path, "train-000000.tar").write_bytes(pickle.dumps(Malice(marker)))
    with pytest.raises(DataError, match=r"contains pickled \(object\) data"):
        _load_index(tmp_path, "train-000000.tar")


def read_texts(path: Path) -> list[str]:
    source = SourceSection(name="web", paths=[str(path)], shards="unused")
    return [document.text for document in read_documents([path], source, "skip", "error", ReadLog())]


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_pickle_for_a_tokenizer_is_refused(tmp_path, marker, name):
    (tmp_path / name).write_bytes(pickle.dumps(Malice(marker)))
    with pytest.raises((DataError, ConfigError)):
        open_tokenizer(TokenizerSection(model=str(tmp_path / name), vocab_size=512))


def test_no_member_of_a_tar_leaves_it(tmp_path):
    """Tars are read and never unpacked: paths, links and devices in them are names."""
    inner = tmp_path / "a/b"
    inner.mkdir(parents=True)
    secret = tmp_path / "secret.txt"
    secret.write_text("not to be read")
    path = inner / "web.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../../evil.txt", f"{tmp_path}/absolute.txt", "good.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"text"))
        for name, kind in (("link.txt", tarfile.SYMTYPE), ("hard.txt", tarfile.LNKTYPE), ("dev.txt", tarfile.CHRTYPE),
                           ("block.txt", tarfile.BLKTYPE), ("fifo.txt", tarfile.FIFOTYPE)):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, str(secret)
            tar.addfile(entry)
    before = sorted(tmp_path.rglob("*"))
    try:
        texts = read_texts(path)
    except DataError as error:
        texts = [str(error)]
    assert "not to be read" not in texts
    assert sorted(tmp_path.rglob("*")) == before


FORBIDDEN = {
    "pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml",  # modules
    "extract", "extractall", "unpack_archive", "load_module", "unsafe_load", "os.system", "os.popen", "torch.load",
    "torch.hub", "eval", "exec", "__import__", "set_start_method",
}  # fmt: skip
ALLOWED = {
    "pretrain/storage/stores.py": {"shell=True"},  # `pipe:`, which data.allow_pipe allows
    "pretrain/formats/hf_tensors.py": {
        "pickle",
        "torch.load",
    },  # with weights_only: the name of the error of all that is more
    "pretrain/formats/torch_export.py": {"torch.load"},  # of what it has just written, with weights_only
}


def dangers_of(path: Path) -> set[str]:
    """What could run foreign code or write where an archive says."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names} & FORBIDDEN
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").partition(".")[0], *(alias.name for alias in node.names)} & FORBIDDEN
        elif isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            last = text.rpartition(".")[2]
            found |= {text} & FORBIDDEN | ({last} & {"extract", "extractall", "unpack_archive", "unsafe_load"})
            for keyword in node.keywords:
                name = f"{keyword.arg}={ast.unparse(keyword.value)}"
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not name.endswith("=False"):
                    found.add(name)
            if (
                text == "YAML"
                and {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}["typ"] != "'safe'"
            ):
                found.add("YAML")
    return found


def test_nothing_in_the_sources_unpickles_unpacks_or_runs_a_shell():
    found = {str(path.relative_to(ROOT)): dangers for path in SOURCES if (dangers := dangers_of(path))}
    assert found == ALLOWED


def test_the_search_for_dangers_finds_them(tmp_path):
    bad = tmp_path / "bad.py"
    for line in ("import pickle", "from pickle import loads", "torch.load(x)", "np.load(x, allow_pickle=True)",
                 "tar.extractall(x)", "subprocess.run(x, shell=True)", "eval(x)", "os.system(x)", "YAML(typ='unsafe')",
                 "f(trust_remote_code=True)", "np.load(x, allow_pickle=flag)"):  # fmt: skip
        bad.write_text(line)
        assert dangers_of(bad), line
    bad.write_text("model.eval()\nYAML(typ='safe')\nnp.load(x, allow_pickle=False)")
    assert not dangers_of(bad)


def test_a_pipe_runs_only_where_the_config_allows_it(tmp_path):
    command = f"pipe:touch {tmp_path}/ran; cat {{}}"
    with pytest.raises(ConfigError) as caught:
        open_remote(command, remote_config(command, tmp_path).data)
    assert str(caught.value) == (
        f"data.sources: shards is {command}, which runs what follows pipe: in a shell; expected data.allow_pipe=true for "
        "that. Set it if you trust whoever wrote the config (launch/evaluate.py has --allow-pipe), or use a folder or a "
        "URL."
    )
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError):  # there is no such corpus
        open_remote(command, remote_config(command, tmp_path, allow_pipe=True, retry_seconds=1).data)
    assert (tmp_path / "ran").exists()


PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MY_DB_PASSWORD": "correct-horse-battery",
    "HF_TOKEN": "hf_" + "a" * 34,
}


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("cannot read s3://user:pa55@host/a/b?X-Sig=abc&y=1: gone", "cannot read s3://host/a/b?…: gone"),
        ("https://token@host/x and http://host/y", "https://host/x and http://host/y"),
        ("api_key=abc123 password: hunter22, access-token=t", "api_key=… password: …, access-token=…"),
        ("key is AKIAABCDEFGHIJKLMNOP.", "key is [access key]."),
        ("with correct-horse-battery inside", "with … inside"),
        ("tokenizer.model=a.model train.num_tokens=10 at s3://bucket/key", None),
        ("user@host: 12 tokens: 5; what? optim.lr=1e-3", None),
    ],
)
def test_secrets_are_taken_out_of_texts_and_nothing_else(monkeypatch, text, redacted):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "tokenizer.model=a.model")  # no secret by its name
    monkeypatch.setenv("SSH_KEY", "/home/user/key")  # a path
    assert redact(text) == (redacted or text)


def test_no_planted_secret_reaches_the_run_folder(tmp_path, monkeypatch, capsys):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    everything = " ".join(PLANTED.values()) + " https://user:s3cr3tpass@host/x?sig=s1gnature"
    monkeypatch.setattr(sys, "argv", ["pretrain", "data.sources.0.shards=https://user:s3cr3tpass@host/x", everything])
    config = remote_config("https://user:s3cr3tpass@host/web?sig=s1gnature", tmp_path / "cache")
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path / "run")})})
    folder = RunFolder(config)
    folder.write_status("failed", 1, 0, everything)
    folder.close()
    log = MetricLog(folder.path, LogSection(tensorboard=True), num_steps=1, tokens_per_step=1, world_size=1,
                    first_step=0, attempt=1, flops_per_token={1: (1.0, 1.0)}, peak_flops=1.0, tracker=None)  # fmt: skip
    log.event(0, "failed", everything, documents=[everything])
    log.close(failed=True)
    logger = logging.getLogger("longhaul")
    handlers = list(logger.handlers)
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    open_log(folder.path, ranks)
    try:
        raise ValueError(everything)
    except ValueError:
        logger.exception("went wrong with %s", everything)
    finally:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
            logger.removeHandler(handler)
        logger.propagate = True
    assert_no_secrets(folder.path)
    printed = "".join(capsys.readouterr())
    assert not [value for value in (*PLANTED.values(), "s3cr3tpass", "s1gnature") if value in printed]
    assert environment()["command"][0] == "pretrain"
    assert "https://host/web" in (folder.path / "config.yaml").read_text()


def assert_no_secrets(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        leaks = [value for value in (*PLANTED.values(), "s3cr3tpass", "s1gnature") if value.encode() in content]
        assert not leaks, (path, leaks)


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(300)
def test_a_run_writes_down_no_secret(tiny_config, tmp_path, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    prompt = f"eval.sample_prompts=[https://user:s3cr3tpass@host/, {PLANTED['MY_DB_PASSWORD']}]"
    common = [f"run.dir={tmp_path}/run", "train.num_steps=4", "eval.sample_every_steps=2", prompt]
    assert run_cases(tiny_config, [{"overrides": common}], 1, tmp_path / "ranks") == ["done"]
    assert PLANTED["MY_DB_PASSWORD"] not in json.dumps(newest(tmp_path / "run").manifest)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "log.txt", "status.json"):
        content = (tmp_path / "run" / name).read_text()
        assert not [value for value in (*PLANTED.values(), "s3cr3tpass") if value in content], name


@pytest.mark.parametrize(
    "name", ["a|b", "<script>alert(1)</script>", "x\n# head", "[l](javascript:1)", "`code`", "*b* _i_ ~s~ &amp;", "\\"]
)
def test_a_name_in_a_model_card_is_text(name):
    shown = _plain(name)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]<>|&#~]", shown)
    assert re.sub(r"\\(.)", r"\1", shown) == " ".join(name.split())
    assert _plain("llama-350m") == "llama-350m"
