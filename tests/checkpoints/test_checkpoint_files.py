"""Reading checkpoints by range, and refusing what is not whole."""

from __future__ import annotations

import json

import pytest
import torch

from pretrain.checkpoints.checkpoint_files import (
    FORMAT_VERSION,
    CheckpointReader,
    Piece,
    find_uncovered,
    list_steps,
    manifest_text,
    tensor_key,
)
from pretrain.errors import CheckpointError, ConfigError
from pretrain.storage.tensor_files import write_tensors

WHOLE = torch.arange(24, dtype=torch.float32)
CUTS = {"rank-00000.safetensors": (0, 7), "rank-00001.safetensors": (7, 10), "rank-00002.safetensors": (17, 7)}


def seal(path, manifest):
    (path / "manifest.json").write_text(manifest_text(manifest))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one 4 x 6 parameter, written by three ranks."""
    path = tmp_path / "step-00000012"
    path.mkdir()
    files, pieces = {}, []
    for name, (start, length) in CUTS.items():
        tensors = {tensor_key("w", state, start): WHOLE[start : start + length].clone() * factor
                   for state, factor in (("master", 1), ("exp_avg", 10))}  # fmt: skip
        num_bytes, sha256 = write_tensors(path / name, tensors, {})
        files[name] = {"bytes": num_bytes, "sha256": sha256}
        pieces.append([name, start, length])
    manifest = {"format_version": FORMAT_VERSION, "step": 12, "training": {}, "about": {},
                "parameters": {"w": {"shape": [4, 6], "states": ["master", "exp_avg"], "fragments": pieces[::-1]}},
                "files": files}  # fmt: skip
    seal(path, manifest)
    return path


def test_every_range_reads_back(folder):
    reader = CheckpointReader(folder)
    reader.verify()
    for start in range(24):
        for stop in range(start + 1, 25):
            assert torch.equal(reader.read("w", "exp_avg", start, stop - start), WHOLE[start:stop] * 10)
    assert torch.equal(reader.read_whole("w"), WHOLE.view(4, 6))


def test_a_part_is_read_into_its_place_and_nowhere_else(folder):
    target = torch.full((12,), -1.0)
    CheckpointReader(folder).read_into(target[2:10], "w", "exp_avg", 4)  # of two files
    assert target.tolist() == [-1, -1, *(10 * WHOLE[4:12]).tolist(), -1, -1]


def test_a_missing_state_or_parameter_is_named(folder):
    reader = CheckpointReader(folder)
    with pytest.raises(CheckpointError, match="has no 'square_avg' of 'w'"):
        reader.read("w", "square_avg", 0, 1)
    with pytest.raises(CheckpointError, match="has no 'master' of 'v'"):
        reader.read("v", "master", 0, 1)


def test_one_flipped_bit_is_found(folder):
    path = folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    said = f"^{folder}: is damaged: rank-00001.safetensors has another sha256 than when it was written. Use another"
    with pytest.raises(CheckpointError, match=said):
        CheckpointReader(folder).verify()


def test_a_short_and_a_missing_file_are_found(folder):
    short = folder / "rank-00000.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    (folder / "rank-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors has \d+ bytes, not .*rank-00002.* is missing"):
        CheckpointReader(folder).verify()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_bad_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="expected a checkpoint's manifest"):
        CheckpointReader(folder)


def test_a_manifest_has_a_line_for_each_parameter_and_file(folder):
    lines = (folder / "manifest.json").read_text().splitlines()
    assert [line.strip().partition(":")[0] for line in lines if line.startswith(" ")] == ['"w"', *map(json.dumps, CUTS)]
    assert len(lines) == 13 and json.loads("\n".join(lines))["training"] == {}
    with pytest.raises(ValueError, match="JSON"):
        manifest_text({"training": {"loss": float("nan")}})


def test_a_changed_manifest_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 12', '"step": 13'))
    with pytest.raises(CheckpointError, match="its sha256 is not the one that was written"):
        CheckpointReader(folder)


def test_version_1_had_one_list_of_states(folder):
    manifest = CheckpointReader(folder).manifest
    manifest["parameters"]["w"].pop("states")
    seal(folder, manifest | {"format_version": 1, "states": ["master", "exp_avg"]})
    reader = CheckpointReader(folder)
    reader.verify()
    assert reader.states == {"w": ["master", "exp_avg"]}
    assert torch.equal(reader.read_whole("w", "exp_avg"), WHOLE.view(4, 6) * 10)


def test_a_newer_format_is_refused(folder):
    manifest = {"format_version": FORMAT_VERSION + 1, "parameters": {"w": {"something": "else"}}}
    seal(folder, manifest)
    with pytest.raises(ConfigError, match=f"format version is {FORMAT_VERSION + 1}; expected at most {FORMAT_VERSION}"):
        CheckpointReader(folder)


def test_only_complete_checkpoints_are_listed(folder):
    (folder.parent / ".tmp-step-00000013").mkdir()
    (folder.parent / "step-00000014").mkdir()
    (folder.parent / "step-00000011.damaged").mkdir()
    assert list_steps(folder.parent) == [12]
    assert list_steps(folder.parent / "absent") == []


def test_uncovered_parameters_are_found():
    shapes = {"a": (2, 3), "b": (4,), "c": (2,)}
    pieces = {"a": [Piece("f", 3, 3), Piece("f", 0, 3)], "b": [Piece("f", 0, 2), Piece("f", 3, 1)]}
    assert find_uncovered(shapes, pieces) == [
        "'b' is covered up to element 2 of 4", "'c' is covered up to element 0 of 2",
    ]  # fmt: skip
    assert find_uncovered({"b": (4,)}, {"b": [Piece("f", 0, 3), Piece("g", 2, 2)]})
