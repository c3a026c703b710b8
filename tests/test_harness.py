"""Tasks of lm-eval: our model answers as transformers does with its export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pretrain import hf_export
from pretrain.hf_export import export_hf
from pretrain.scoring import Scorer
from tests.task_files import documents, write_tasks
from tests.test_hf_export import SEQ_LEN, make_rows, make_run, tokenizer  # noqa: F401

pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval's libraries


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def run(tokenizer):  # noqa: F811
    return make_run("llama", tokenizer)


def make_harness(run, batch_tokens=256, **options):
    from pretrain.harness import HarnessModel

    return HarnessModel(Scorer(run.model, run.tokenizer, batch_tokens), run.tokenizer, SEQ_LEN, **options)


def answers(results, task):
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda one: one["doc_id"])]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_transformers_and_our_model_give_the_same_scores(run, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(hf_export, "NUM_TEXTS", 200)
    export = tmp_path / "export"
    export.mkdir()
    export_hf(run, export, "fp32", make_rows())
    docs, ours = documents(12), make_harness(run)
    folder = write_tasks(tmp_path / "tasks", docs)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def scores(model, names, **model_args):
        common = dict(tasks=names, task_manager=manager, bootstrap_iters=100, batch_size=4, device="cpu")
        if model_args:
            model_args |= {"pretrained": str(export), "dtype": "float32"}
        return simple_evaluate(model=model, model_args=model_args or None, **common)

    names = ["choices", "letters", "lambada_like"]
    theirs, own = scores("hf", names, add_bos_token=True), scores(ours, names)
    for name in names:
        for mine, other in zip(answers(own, name), answers(theirs, name), strict=True):
            flat = [(torch.tensor(side, dtype=torch.float64).flatten()) for side in (mine, other)]
            assert torch.allclose(*flat, rtol=1e-5, atol=1e-4), name
        for key, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert own["results"][name][key] == pytest.approx(value, rel=1e-5), (name, key)
