"""Continued pretraining: from a published model by the config that its import writes, on two ranks."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from pretrain.checkpoints.run_folder import load_run
from pretrain.data.stream import TokenStream
from pretrain.formats import hf_export, hf_import
from pretrain.formats.adapter_export import export_adapter
from pretrain.formats.convert import convert
from pretrain.formats.hf_import import import_hf
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.settings import load_config
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.tokenizers.tokenizer_files import write_tokenizer_files
from tests.formats.published_models import make_model
from tests.helpers.rank_helpers import losses, metric_lines, prepare, run_cases

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(600)]
COMMON = ["train={num_steps: 5, global_batch_size: 16, micro_batch_size: 8, precision: fp32}", "data.seq_len=32", "schedule.warmup_steps=1",
          "optim.lr=1e-3", "eval.every_steps=0", "log.tensorboard=false", "checkpoint.every_steps=0"]  # fmt: skip
STAGE = {"llama": 1, "olmo2": 3, "qwen2": 1}


@pytest.fixture(scope="module")
def runs(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Import each model and train five steps from it; return the folder, and how each case ended."""
    folder = tmp_path_factory.mktemp("continued")
    tiny = load_config(tiny_config)
    cases: dict[str, dict] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_import, "NUM_TEXTS", 100)
        for name, stage in STAGE.items():
            source = folder / "published" / name
            make_model(name, source, **({} if name == "qwen2" else {"vocab_size": 512}))
            shards = [str(source.shards) for source in tiny.data.sources]
            if name != "qwen2":  # the corpus is prepared with this tokenizer already
                tokenizer = SentencePieceTokenizer(tiny.tokenizer.model)
                write_tokenizer_files(tokenizer, source, 96)
            import_hf(source, folder / name)
            sources = [f"{{name: {place}, shards: {one}}}" for place, one in zip("ab", shards, strict=True)]
            own = [f"run.dir={folder}/{name}-continued", f"parallel.zero_stage={stage}", *COMMON]
            if name == "qwen2":
                sources = [f"{{name: a, paths: [{Path(tiny_config).parent}/code], shards: {folder}/shards}}"]
            own.append(f"data.sources=[{', '.join(sources)}]")
            cases[name] = {"config": str(folder / name / "continue.yaml"), "overrides": own}
        prepare(folder / "qwen2/continue.yaml", *cases["qwen2"]["overrides"])
    other = [f"run.dir={folder}/other", "model.rope_theta=20000"]
    cases["other"] = cases["llama"] | {"overrides": [*cases["llama"]["overrides"], *other]}
    meant = [f"run.dir={folder}/meant", "run.allow_changes=[model.rope_theta]"]
    cases["meant"] = cases["llama"] | {"overrides": [*cases["other"]["overrides"], *meant]}
    for stage in (1, 3):  # adapters beside what was imported: nothing but `train.lora` is written
        adapted = [
            f"run.dir={folder}/lora-{stage}",
            f"parallel.zero_stage={stage}",
            "train.lora={rank: 4}",
            "optim.lr=1e-2",
        ]
        cases[f"lora {stage}"] = cases["olmo2"] | {"overrides": [*cases["olmo2"]["overrides"], *adapted]}
    outcomes = run_cases(tiny_config, list(cases.values()), 2, folder / "ranks")
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder, dict(zip(cases, outcomes, strict=True))


def first_loss_in_transformers(folder: Path, name: str) -> float:
    """Loss of the first step's rows, document by document, by the published model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "published" / name, dtype=torch.float32)
    config = load_config(folder / f"{name}-continued" / "config.yaml")
    plan = BatchPlan.of(config, 1)
    total, num_targets = 0.0, 0
    with (
        closing(TokenStream(config, plan, 0, load_run(folder / name).tokenizer.fingerprint)) as stream,
        torch.no_grad(),
    ):
        for batch in stream.next_step().micro_batches:
            for tokens_T, targets_T, start_T in zip(batch.tokens_BT, batch.targets_BT, batch.doc_start_BT, strict=True):
                for start in start_T.unique().tolist():
                    own = start_T == start
                    logits_TV = model(input_ids=tokens_T[own][None].long()).logits[0]
                    total += float(F.cross_entropy(logits_TV, targets_T[own].long(), reduction="sum"))
                    num_targets += int((targets_T[own] >= 0).sum())
    return total / num_targets


@pytest.mark.parametrize("name", STAGE)
def test_the_first_loss_is_that_of_the_published_model_and_it_goes_on_from_there(name, runs, tmp_path, monkeypatch):
    folder, outcomes = runs
    assert outcomes[name] == "done"
    found = losses(folder / f"{name}-continued")
    assert len(found) == 5 and found[0] == pytest.approx(first_loss_in_transformers(folder, name), abs=2e-5)
    assert found[-1] < found[0]
    [event] = [line for line in metric_lines(folder / f"{name}-continued") if line.get("event") == "resumed_from"]
    assert event["message"].endswith(f"{name}/checkpoints/step-00000000: weights")
    monkeypatch.setattr(hf_export, "NUM_TEXTS", 100)
    assert convert(folder / f"{name}-continued", tmp_path / "back")["tokenizer"]["mismatches"] == 0


def test_another_model_is_refused_unless_it_is_meant(runs):
    folder, outcomes = runs
    assert outcomes["other"] == (
        f"ConfigError: resume.from is {folder}/llama, whose model is another one; expected the same:\n"
        "  model.rope_theta: 10000.0 there, 20000.0 here\n"
        "Use its `model` section, or, where a change is meant that leaves all shapes, "
        "'run.allow_changes=[model.rope_theta]'."
    )
    assert outcomes["meant"] == "done"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_beside_an_import_are_peft_s_beside_the_published_model(runs, stage: int, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from peft import PeftModel

    folder, outcomes = runs
    assert outcomes[f"lora {stage}"] == "done"
    tuned = folder / f"lora-{stage}"
    assert losses(tuned) == pytest.approx(losses(folder / "lora-1"), abs=1e-4)
    [begun] = [line["message"] for line in metric_lines(tuned) if line.get("event") == "resumed_from"]
    assert begun == f"{folder / 'olmo2'}/checkpoints/step-00000000: weights"
    assert load_config(tuned / "config.yaml").train.lora is not None  # is read back as it was written
    export_adapter(tuned, folder / f"peft-{stage}")
    published = transformers.AutoModelForCausalLM.from_pretrained(folder / "published/olmo2", dtype=torch.float32)
    tokens_BT = torch.randint(500, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = published(input_ids=tokens_BT).logits
        adapted = PeftModel.from_pretrained(published, folder / f"peft-{stage}").eval()
        logits = adapted(input_ids=tokens_BT).logits
        wanted = load_run(tuned).model.logits(tokens_BT)
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (before - wanted).abs().max() > 100 * (logits - wanted).abs().max()
