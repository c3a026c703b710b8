"""Whole runs whose checkpoints are on S3, as moto plays it: the same numbers as with a folder, whatever fails there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pretrain.checkpoints.run_folder import load_run, place_of_run
from tests.helpers.rank_helpers import losses, metric_lines, newest, run_cases, run_command
from tests.helpers.s3_server import SECRET, needs_moto, proxied, s3_server
from tests.zero.test_topology import same_tensors

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.filterwarnings("default"), needs_moto]


def copy(filesystem, source, target):
    for path in filesystem.find(source):
        filesystem.copy(path, path.replace(source, target, 1))


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Runs that stop at step 12 on two ranks, and go on on one; return (outcomes, folder, changes asked of S3)."""
    import s3fs

    folder = tmp_path_factory.mktemp("store-runs")
    common = ["train.micro_batch_size=4", "checkpoint.every_steps=4", "checkpoint.keep_last=2"]

    def case(name, *overrides, **extra):
        place = [] if name == "folder" else [f"checkpoint.dir=s3://runs/{name}"]
        cache = [] if name == "folder" else ["data.retry_seconds=20", f"data.cache_dir={folder}/cache-{name}"]
        return {"overrides": [f"run.dir={folder}/{name}", *place, *cache, *overrides], **extra}

    with s3_server("runs"):
        with proxied() as proxy:
            proxy.writes["refused/step-00000008/rank-00001.safetensors"] = "403"
            cases = [
                case("folder", signal_at=12),
                case("store", signal_at=12, signal_rank=1),
                case("refused"),
                case("missing", "checkpoint.dir=s3://no-such-bucket/missing"),
            ]
            outcomes = run_cases(tiny_config, cases, 2, folder / "ranks-2", overrides=common)
            changes = [(method, path) for method, path in proxy.requests if method not in ("GET", "HEAD")]
        filesystem = s3fs.S3FileSystem(use_listings_cache=False)
        shutil.copytree(folder / "store", folder / "damaged")
        copy(filesystem, "runs/store", "runs/damaged")
        path = "runs/damaged/step-00000012/rank-00001.safetensors"
        content = filesystem.cat_file(path)
        filesystem.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
        others = case("other", "checkpoint.dir=s3://runs/store")
        branches = [
            {
                "overrides": [
                    f"run.dir={folder}/branch-{n}",
                    f"resume.from=s3://runs/{url}",
                    f"data.cache_dir={folder}/c{n}",
                ]
            }
            for n, url in enumerate(["folderless", "store", "store/step-00000016", "store/step-00000004"])
        ]
        cases = [case("folder"), case("store"), case("damaged"), others, *branches]
        outcomes += run_cases(tiny_config, cases, 1, folder / "ranks-1", overrides=common)
        yield outcomes, folder, changes


def test_a_run_on_two_ranks_goes_on_on_one_bit_for_bit_as_with_a_folder(runs):
    outcomes, folder, _ = runs
    assert outcomes[:3] == ["stopped", "stopped", "done"] and outcomes[4:7] == ["done"] * 3, outcomes
    assert losses(folder / "store") == losses(folder / "folder") and len(losses(folder / "store")) == 20
    place = place_of_run(folder / "store")
    assert place.list_steps() == [16, 20] and not (folder / "store" / "checkpoints").exists()
    reader = place.open(20)
    reader.verify()
    assert reader.training == newest(folder / "folder").training
    same_tensors(reader, newest(folder / "folder"))
    reader.close()


def test_each_manifest_comes_last_and_goes_first(runs):
    _, _, changes = runs
    for step in (4, 8, 12):
        prefix = f"/runs/store/step-{step:08d}/"
        names = [(method, path.removeprefix(prefix)) for method, path in changes if path.startswith(prefix)]
        puts = [name for method, name in names if method == "PUT"]
        assert puts[-1] == "manifest.json" and len(puts) == 5, puts
        assert {"rank-00000.safetensors", "rank-00001.safetensors"} < set(puts)
    names = [(method, path) for method, path in changes if "/store/" in path or path.startswith("/runs?delete")]
    first = names.index(("DELETE", "/runs/store/step-00000004/manifest.json"))
    assert names[first - 1][0] != "PUT" or "step-00000012" in names[first - 1][1]
    assert any(path.startswith("/runs?delete") for _, path in names[first:])  # its other files, after that


def test_a_damaged_object_is_passed_over(runs):
    _, folder, _ = runs
    events = [line for line in metric_lines(folder / "damaged") if line.get("event") == "checkpoint_damaged"]
    (event,) = events
    assert "s3://runs/damaged/step-00000012/rank-00001.safetensors: its sha256 is another than" in event["message"]
    assert losses(folder / "damaged")[:8] == losses(folder / "folder")[:8] and len(losses(folder / "damaged")) == 20
    place = place_of_run(folder / "damaged")
    assert place.list_steps() == [16, 20]  # 12 was saved again, and pruned


def test_a_save_that_is_refused_on_one_rank_fails_on_all_and_the_run_goes_on(runs):
    _, folder, _ = runs
    failed = [line for line in metric_lines(folder / "refused") if line.get("event") == "save_failed"]
    assert [line["saved_step"] for line in failed] == [8]
    expected = "s3://runs/refused/step-00000008: could not be written: s3://runs/refused/step-00000008/rank-00001.safet"
    assert failed[0]["message"].startswith(expected), failed
    assert "tried once. Correct checkpoint.dir, or the rights there. Earlier" in failed[0]["message"]
    assert losses(folder / "refused")[:12] == losses(folder / "store")[:12]
    assert place_of_run(folder / "refused").list_steps() == [16, 20]


def test_what_cannot_be_used_is_said_before_the_first_step(runs):
    outcomes, folder, _ = runs
    assert outcomes[3].startswith("StoreAccessError: s3://no-such-bucket/missing"), outcomes[3]
    assert outcomes[7].startswith("ConfigError: checkpoint.dir is s3://runs/store; expected a place of this run alone")
    assert f"the run in {folder}/store on " in outcomes[7]


def test_commands_find_the_checkpoints_where_the_config_says(runs, capsys):
    _, folder, _ = runs
    far, near = load_run(folder / "store", 16), load_run(folder / "folder", 16)
    assert (far.step, far.checkpoint, far.num_tokens) == (16, "step-00000016", near.num_tokens)
    for one, other in zip(far.model.parameters(), near.model.parameters(), strict=True):
        assert torch.equal(one, other)
    prompt = ["--prompt", "def", "--max-new-tokens", "4", "--temperature", "0"]
    texts = [run_command("launch/generate.py", folder / name, *prompt) for name in ("store", "folder")]
    assert texts[0].returncode == 0 and texts[0].stdout == texts[1].stdout, texts[0].stderr


def test_credentials_are_in_nothing_that_is_written(runs):
    _, folder, _ = runs
    for path in folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    config = (folder / "store" / "config.yaml").read_text()
    assert "s3://runs/store" in config
    owner = json.loads((folder / "store" / "environment.json").read_text())
    assert len(owner["run_id"]) == 32


def test_another_run_begins_with_what_is_at_a_url(runs):
    outcomes, folder, _ = runs
    nothing, newest_one, named, pruned = outcomes[8:]
    assert nothing.startswith(
        "ConfigError: resume.from is s3://runs/folderless; expected a run folder with checkpoints"
    )
    assert newest_one.startswith("ConfigError: train.num_steps is 20; expected more than the 20 steps of resume.from")
    assert named == "done" and losses(folder / "branch-2") == losses(folder / "store")[16:]
    assert pruned.startswith(
        "CheckpointError: resume.from is s3://runs/store/step-00000004; expected a checkpoint that"
    )
    assert "s3://runs/store/step-00000004" in pruned and "there is no such file" in pruned
