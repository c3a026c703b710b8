"""Tasks of lm-eval: our model answers as transformers does with its export."""

from __future__ import annotations

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
    """A model that writes no single bytes: where these are not UTF-8, tokenizers shows others than sentencepiece does."""
    run = make_run("llama", tokenizer)
    single = [token for token in range(tokenizer.vocab_size) if tokenizer.name_of(token).startswith("<0x")]
    assert len(single) == 256
    with torch.no_grad():
        run.model.output.weight[single] = 0.0  # a logit of 0, and the largest is above
    return run


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
        if model == "hf":
            model_args |= {"pretrained": str(export), "dtype": "float32"}
        return simple_evaluate(model=model, model_args=model_args or None, **common)

    names = ["choices", "letters", "lambada_like"]
    same_scores(scores(ours, names), scores("hf", names, add_bos_token=True))
    # Told to add bos, lm-eval's own model scores it as the first token of a text too (its issue 3333).
    rolling = scores(ours, ["rolling"])
    same_scores(rolling, scores("hf", ["rolling"], add_bos_token=False))
    doubled = scores("hf", ["rolling"])["results"]["rolling"]["bits_per_byte,none"]
    assert doubled > 1.01 * rolling["results"]["rolling"]["bits_per_byte,none"]
    texts = [sample["filtered_resps"][0] for sample in scores(ours, ["answers"])["samples"]["answers"]]
    assert len(set(texts)) > 4 and all("\n" not in text for text in texts)
    for doc, text in list(zip(docs, texts, strict=True))[::2]:
        doc["word"] = text
    write_tasks(folder, docs)
    generated, theirs = scores(ours, ["answers"]), scores("hf", ["answers"])
    assert answers(generated, "answers") == answers(theirs, "answers")
    assert 0.5 <= generated["results"]["answers"]["exact_match,none"] < 1
    same_scores(generated, theirs)


def same_scores(ours, theirs):
    """Assert that two results of lm-eval are equal to within rounding, sample by sample and in all."""
    assert ours["results"].keys() == theirs["results"].keys()
    for name, numbers in theirs["results"].items():
        for mine, other in zip(answers(ours, name), answers(theirs, name), strict=True):
            if isinstance(other[0], str):
                assert mine == other
            else:
                flat = [torch.tensor(side, dtype=torch.float64).flatten() for side in (mine, other)]
                assert torch.allclose(*flat, rtol=1e-5, atol=1e-4), name
        values = {key: value for key, value in numbers.items() if isinstance(value, float)}
        assert values and {key: ours["results"][name][key] for key in values} == pytest.approx(values, rel=1e-5)
