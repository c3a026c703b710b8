"""Run folders with a checkpoint that no training has written: quick, and divided as wanted."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pretrain.checkpoints.checkpoint_files import FORMAT_VERSION, manifest_digest, tensor_key
from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.options.settings import resolved_yaml
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.transformer.model import Transformer


def write_run(run: Path, config: object, tokenizer: Tokenizer, model: Transformer, num_ranks: int = 3) -> Path:
    """Write a run folder whose checkpoint of step 30 holds a model, cut for so many ranks; return the folder."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({"run_id": "x", "starts": [{"git_commit": "abc1234"}]}))
    lines = [{"step": step, "tokens": 100 * step, "loss": 8.0 - step / 10} for step in range(1, 41)]
    lines += [{"step": 20, "tokens": 2000, "eval/loss": 6.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in tokenizer.files.items():
        (run / name).write_bytes(content)
    place = FolderPlace(run / "checkpoints")
    place.claim("test", run)
    place.begin(30, 0, num_ranks)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    files, fragments = {}, {name: [] for name in parameters}
    for rank in range(num_ranks):
        tensors, file = {}, f"rank-{rank:05d}.safetensors"
        for name, parameter in parameters.items():
            part = -(-parameter.numel() // num_ranks)
            start, stop = (min(one * part, parameter.numel()) for one in (rank, rank + 1))
            if start < stop:
                fragments[name].append([file, start, stop - start])
                tensors[tensor_key(name, "master", start)] = parameter.flatten()[start:stop].clone()
        num_bytes, sha256 = place.write_tensors(30, file, tensors, {})
        files[file] = {"bytes": num_bytes, "sha256": sha256}
    manifest = {
        "format_version": FORMAT_VERSION, "step": 30, "files": files,
        "training": {"num_tokens": 12345, "data": {"tokens_per_corpus": {"code": 12345}, "epochs": {"code": 0.5}}},
        "about": {"config": config.model_dump(mode="json"), "tokenizer": tokenizer.fingerprint, "longhaul": "0.1"},
        "parameters": {name: {"shape": list(parameters[name].shape), "states": ["master"], "fragments": fragments[name]}
                       for name in parameters},
    }  # fmt: skip
    assert all(sum(one[2] for one in fragments[name]) == math.prod(parameters[name].shape) for name in parameters)
    place.complete(30, json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
    return run
