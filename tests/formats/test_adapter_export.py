"""Adapters in peft's format: loaded by peft onto the exported base, they compute what the tuned model computes."""

from __future__ import annotations

import json
import os

import pytest
import torch

from launch.convert import main
from pretrain.checkpoints.adapters import BASE
from pretrain.checkpoints.checkpoint_files import CheckpointReader
from pretrain.checkpoints.run_folder import load_run
from pretrain.errors import ConfigError
from pretrain.formats.adapter_export import export_adapter
from pretrain.formats.convert import ConvertOptions, convert
from tests.helpers.rank_helpers import prepare, run_cases
from tests.helpers.tuning_helpers import write_task

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.slow,
    pytest.mark.launches,
    pytest.mark.timeout(900),
]
MODELS = {
    "llama": [],
    "gpt2": ["model={family: gpt2, dim: 64, num_layers: 2, num_heads: 4}"],
    "starcoder2": ["model={family: starcoder2, dim: 64, num_layers: 1, num_heads: 4, num_kv_heads: 2}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bases of several families, each with adapters that were trained for some steps."""
    folder = write_task(tmp_path_factory.mktemp("peft"))
    for name in ("base", "tune"):
        prepare(folder / f"{name}.yaml")
    targets = {"starcoder2": ", targets: [qkv, ffn_down]"}
    listed = []
    for family, model in MODELS.items():
        listed += [
            {"config": str(folder / "base.yaml"), "overrides": [f"run.dir={folder}/{family}", "train.num_steps=4", *model]},
            {"overrides": [f"run.dir={folder}/{family}-tuned", f"resume.from={folder}/{family}", "train.num_steps=8",
                           f"train.lora={{rank: 4{targets.get(family, '')}}}", "optim.lr=0.01", *model]},
        ]  # fmt: skip
    assert run_cases(folder / "tune.yaml", listed, 1, folder / "ranks", timeout=500) == ["done"] * len(listed)
    return folder


@pytest.mark.parametrize("family", MODELS)
def test_peft_and_transformers_compute_what_the_tuned_model_does(folder, family):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned, base, out = folder / f"{family}-tuned", folder / f"{family}-hf", folder / f"{family}-peft"
    convert(folder / family, base, options=ConvertOptions(dtype="fp32"))
    report = export_adapter(tuned, out)
    assert report["largest_difference"] < 1e-6 and report["source"]["base"]["checkpoint"].endswith("step-00000004")
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "verification.json"
    ]  # fmt: skip
    ours = load_run(tuned).model
    tokens_BT = torch.randint(360, (2, 40), generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = plain(input_ids=tokens_BT).logits
    theirs = PeftModel.from_pretrained(plain, out).eval()
    with torch.no_grad():
        logits = theirs(input_ids=tokens_BT).logits
    wanted = ours.logits(tokens_BT)
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (before - wanted).abs().max() > 100 * (logits - wanted).abs().max()


def test_a_merged_export_is_verified_as_any_other(folder):
    report = convert(folder / "llama-tuned", folder / "merged", options=ConvertOptions(dtype="fp32"))
    assert report["logits"]["max_relative_difference"] < 5e-5


def test_what_cannot_be_exported(folder, capsys):
    with pytest.raises(ConfigError, match="has no adapters; expected a run with train.lora"):
        export_adapter(folder / "llama", folder / "none")
    (folder / "taken").mkdir()
    (folder / "taken" / "file").touch()
    assert main([str(folder / "llama-tuned"), str(folder / "taken"), "--to", "peft"]) == 2
    assert "exists already; expected no such folder" in capsys.readouterr().err
    assert (
        main([str(folder / "llama-tuned"), str(folder / "by-command"), "--to", "peft", "--dtype", "bf16", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    [step] = (folder / "llama-tuned" / "checkpoints").iterdir()
    assert BASE in CheckpointReader(step).training
