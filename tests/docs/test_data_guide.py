"""The page docs/data-guide.md: its configs are configs, and its commands do what it says, in its order."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.options.phases import phases_of
from pretrain.options.settings import load_config
from tests.conftest import write_tiny_corpus
from tests.helpers.rank_helpers import ROOT, losses, metric_lines, run_command
from tests.storage.test_s3 import bucket, needs_moto  # noqa: F401 (a fixture)

PAGE = (ROOT / "docs" / "data-guide.md").read_text(encoding="utf-8")
# The page's run in the size of a test, thousandth by thousandth.
SMALL = (
    "tokenizer.vocab_size=512 tokenizer.sample_bytes=400000 data.seq_len=32 data.phases.0.from_step=16 "
    "data.phases.1.from_step=18 data.phases.1.seq_len=64 data.val_fraction=0.1 model.dim=32 model.num_layers=2 "
    "model.num_heads=4 model.num_kv_heads=2 model.ffn_dim=64 train.num_steps=20 train.global_batch_size=16 "
    "train.micro_batch_size=16 train.precision=fp32 schedule.warmup_steps=2 schedule.decay_steps=4 eval.every_steps=10 "
    "eval.max_rows=16 checkpoint.every_steps=10 log.tensorboard=false"
).split()
OF_PREPARE = ["data.shard_bytes=65536", "data.prepare_processes=1"]


def blocks(language: str, section: int | None = None) -> list[str]:
    """The code blocks of the page, or of one of its numbered sections."""
    text = PAGE if section is None else PAGE.split(f"\n## {section}. ")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(section: int) -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash", section) for line in block.splitlines()]


def write_configs(folder: Path) -> None:
    for name, content in zip(("mine.yaml", "cluster.yaml"), blocks("yaml"), strict=True):
        (folder / name).write_text(content, encoding="utf-8")


def run(command: list[str], folder: Path, *overrides: str) -> str:
    """Run a command of the page in a folder, small; what it prints."""
    assert command[0] == "python" and command[1].startswith("launch/")
    arguments = list(command[2:])
    config = next((place for place, one in enumerate(arguments) if one.endswith(".yaml")), None)
    if config is not None:
        of_prepare = OF_PREPARE if command[1].endswith("prepare.py") else []
        arguments[config + 1 : config + 1] = [*SMALL, *of_prepare, *overrides]
    done = run_command(ROOT / command[1], *arguments, cwd=folder, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def test_the_configs_are_configs_of_the_same_run(tmp_path: Path) -> None:
    write_configs(tmp_path)
    mine, cluster = (load_config(tmp_path / name) for name in ("mine.yaml", "cluster.yaml"))
    assert [(phase.first_step, phase.rows_per_step, phase.seq_len) for phase in phases_of(mine)] == [
        (0, 256, 2048), (16000, 256, 2048), (18000, 64, 8192),
    ]  # fmt: skip
    assert phases_of(cluster) == phases_of(mine) and cluster.data.cache_dir == "/local/longhaul"
    for section in ("run", "tokenizer", "model", "optim", "schedule", "train", "eval", "checkpoint"):
        assert getattr(cluster, section) == getattr(mine, section)
    assert cluster.data.val_fraction == mine.data.val_fraction


def test_the_page_is_linked_and_its_links_lead_somewhere() -> None:
    for page in ("README.md", "docs/getting-started.md", "docs/data.md"):
        assert "data-guide.md)" in (ROOT / page).read_text(encoding="utf-8"), page
    for page, anchor in re.findall(r"\]\(([\w.-]+\.md)(?:#([\w-]+))?\)", PAGE):
        headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{page}#{anchor}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which sections 1 to 4 of the page were done."""
    folder = tmp_path_factory.mktemp("guide")
    write_tiny_corpus(folder / "text")
    (folder / "raw/papers").mkdir(parents=True)
    (folder / "text/code").rename(folder / "raw/web")
    (folder / "text/prose.jsonl").rename(folder / "raw/papers/a.jsonl")
    write_configs(folder)
    said = [run(command, folder) for section in (3, 4) for command in commands(section)]
    assert said[0] == "runs/mine\n" and "steps/epoch" in said[1]
    assert "rows of 32 tokens: train" in said[3] and "rows of 64 tokens: train" in said[3] and "--- train-" in said[3]
    assert all("every checksum is right" in one for one in said[4:6])
    assert len(losses(folder / "runs/try")) == 20
    return folder


def train_from(folder: Path, store: str) -> None:
    """Do sections 5 and 6 from a store in which the shards are, and look at what section 7 says."""
    for command in commands(5):
        assert "every checksum is right" in run([one.replace("s3://my-bucket", store) for one in command], folder)
    cluster = (folder / "cluster.yaml").read_text(encoding="utf-8").replace("s3://my-bucket", store)
    (folder / "here.yaml").write_text(cluster.replace("/local/longhaul", f"{folder}/cache"), encoding="utf-8")
    run(["python", "launch/pretrain.py", "here.yaml"], folder, f"run.dir={folder}/runs/store")
    run(["python", "launch/pretrain.py", "mine.yaml"], folder, f"run.dir={folder}/runs/local")
    assert losses(folder / "runs/store") == losses(folder / "runs/local") and len(losses(folder / "runs/local")) == 20
    lines = metric_lines(folder / "runs/store")
    keys = re.findall(r"`([\w/]+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE.split("\n## 7. ")[1], re.MULTILINE)))
    assert len(keys) == 9 and set(keys) <= {key for line in lines for key in line}
    assert [line["step"] for line in lines if line.get("event") == "phase"] == [17, 19]
    assert [line["damaged_documents"] for line in lines if "loss" in line] == [0] * 20


@pytest.mark.slow
@pytest.mark.launches
def test_the_page_from_text_to_a_run_from_a_store(prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "guide"))
    (upload,) = blocks("sh", 5)
    sync, last = (shlex.split(line) for line in upload.splitlines()[1:3])
    assert last[-2].endswith("/manifest.json")
    for path in (path for path in (folder / "data").rglob("*/*") if path.is_file()):
        name = path.relative_to(folder / "data")
        inside = Path(*name.parts[1:])
        if is_sent(str(inside), sync) or inside.name == "manifest.json":
            (folder / "store/corpora" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "store/corpora" / name)
        else:
            assert inside.name == "prepare.jsonl" or inside.name[0] == ".", inside
    assert not is_sent("share-1-of-2/train-000000.tar", sync)
    train_from(folder, f"file://{folder}/store")


def is_sent(name: str, sync: list[str]) -> bool:
    """Whether `aws s3 sync` copies a file: the last filter that fits decides."""
    sends = True
    for option, pattern in zip(sync, sync[1:], strict=False):
        if option in ("--exclude", "--include") and fnmatch.fnmatch(name, pattern):
            sends = option == "--include"
    return sends


@needs_moto
@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.filterwarnings("default")  # boto's and moto's own
def test_the_page_from_text_to_a_run_from_s3(bucket: str, prepared: Path, tmp_path: Path) -> None:  # noqa: F811
    import s3fs

    folder = Path(shutil.copytree(prepared, tmp_path / "guide"))
    s3fs.S3FileSystem().mkdir("my-bucket")
    (upload,) = blocks("python", 5)
    done = subprocess.run([sys.executable, "-c", upload], cwd=folder, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "data/web/manifest.json").read_text())
    found = s3fs.S3FileSystem().find("my-bucket/corpora/web")
    assert len(found) == 2 * len(manifest["train"] + manifest["val"]) + 2 * 7 + 1
    train_from(folder, "s3://my-bucket")
