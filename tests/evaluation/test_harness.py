"""Tasks of lm-eval: our model answers as transformers does with its export."""

from __future__ import annotations

import dataclasses
import json
import random
import sys

import numpy as np
import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.evaluation.scoring import Scorer
from pretrain.evaluation.task_evals import import_harness
from pretrain.formats import hf_export
from pretrain.tokenizers.chat import stop_ids
from tests.evaluation.task_files import documents, write_tasks
from tests.formats.test_hf_export import SEQ_LEN, export, make_run, tokenizer  # noqa: F401

pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval's libraries


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        for name in ("huggingface_hub.constants", "datasets.config"):  # which others may have imported before
            patch.setattr(f"{name}.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def run(tokenizer):  # noqa: F811
    """A model that writes no single bytes: where these are not UTF-8, tokenizers shows others than sentencepiece does."""
    run = make_run("llama", tokenizer).load()
    single = [token for token in range(tokenizer.vocab_size) if tokenizer.name_of(token).startswith("<0x")]
    assert len(single) == 256
    with torch.no_grad():
        run.model.output.weight[single] = 0.0  # a logit of 0, and the largest is above
    return run


def make_harness(run, batch_tokens=256, **options):
    from pretrain.evaluation.harness import HarnessModel

    scorer = Scorer(run.model, run.tokenizer, batch_tokens, end_ids=stop_ids(run.tokenizer))
    return HarnessModel(scorer, run.tokenizer, SEQ_LEN, **options)


def answers(results, task):
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda one: one["doc_id"])]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_transformers_and_our_model_give_the_same_scores(run, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(hf_export, "NUM_TEXTS", 200)
    export(make_run("llama", tokenizer, run.model), tmp_path / "export", "fp32")
    docs, ours = documents(12), make_harness(run)
    folder = write_tasks(tmp_path / "tasks", docs)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def scores(model, names, **model_args):
        common = dict(tasks=names, task_manager=manager, bootstrap_iters=100, batch_size=4, device="cpu")
        if model == "hf":
            model_args |= {"pretrained": str(tmp_path / "export"), "dtype": "float32"}
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


def test_ids_of_contexts_and_continuations(run):
    ours, tokenizer = make_harness(run), run.tokenizer  # noqa: F811
    bos = tokenizer.bos_id
    assert ours.tok_encode("return x") == [bos, *tokenizer.encode("return x")]
    assert ours._split("", " the value") == ([bos], tokenizer.encode(" the value"))
    # spaces at the end of a context belong to what follows, as in the texts that the model was trained on
    assert ours._split("the ", "value") == ([bos, *tokenizer.encode("the")], tokenizer.encode(" value"))
    without = make_harness(run, begins_with_bos=False)
    assert without.tok_encode("return x") == tokenizer.encode("return x")
    assert without._split("", "x") == ([bos], tokenizer.encode("x"))  # something must be before it
    joined = next(token for token in range(300, 421) if len(tokenizer.decode([token]).strip()) > 2)
    text = tokenizer.decode([joined]).strip()
    assert len(tokenizer.encode(text)) == 1  # one token spans the cut, where lm-eval's own models fail
    assert ours._split(text[:1], text[1:]) == ([bos, *tokenizer.encode(text[:1])], tokenizer.encode(text[1:]))


def test_what_does_not_fit_is_cut_or_refused(run):
    ours = make_harness(run)
    ids = run.tokenizer.encode("return the value of the parser " * 20)
    cut = ours._loglikelihood_tokens([(None, ids[:100], ids[100:103])])
    assert cut == ours._loglikelihood_tokens([(None, ids[100 - SEQ_LEN + 2 : 100], ids[100:103])])
    assert ours._loglikelihood_tokens([(None, [1], [])]) == [(0.0, True)]
    with pytest.raises(ConfigError, match=rf"a continuation is 65 tokens; expected at most {SEQ_LEN}, the length"):
        ours._loglikelihood_tokens([(None, [1], ids[:65])])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"until": "\n\n", "max_gen_toks": 8}, dict(temperature=0.0, stop=("\n\n",), max_new_tokens=8)),
        ({"until": ["a", ""], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}, dict(temperature=0.0, stop=("a",))),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 8}, dict(temperature=0.7, top_p=0.9)),
        ({"max_gen_toks": 8, "num_beams": 4}, "t: generation_kwargs has num_beams; expected until, max_gen_toks, do_sample"),
        ({"max_gen_toks": SEQ_LEN}, f"t: max_gen_toks is {SEQ_LEN}; expected fewer than the {SEQ_LEN} tokens"),
    ],
)  # fmt: skip
def test_how_tasks_want_texts_to_be_generated(settings, expected):
    from pretrain.evaluation.harness import generation_options

    if isinstance(expected, dict):
        found = dataclasses.asdict(generation_options(settings, SEQ_LEN, "t"))
        assert {key: found[key] for key in expected} == expected
    else:
        expected = expected or "t: max_gen_toks is 256; expected fewer than"  # lm-eval's own default
        with pytest.raises(ConfigError, match=expected):
            generation_options(settings, SEQ_LEN, "t")


def test_tasks_are_loaded_run_and_leave_no_trace(run, tmp_path, capsys):
    from pretrain.evaluation.harness import TaskSettings, load_tasks, run_tasks

    folder = write_tasks(tmp_path / "tasks")
    wanted = {
        "letters": TaskSettings(),
        "choices": TaskSettings(1, 5),
        "rol*": TaskSettings(),
        f"{folder}/answers.yaml": TaskSettings(),
    }
    (folder / "choices.yaml").write_text((folder / "choices.yaml").read_text() + "fewshot_split: test\n")
    with pytest.raises(ConfigError, match="rol\\* is unknown"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            harness_module(), "TaskManager", lambda include_path=None, include_defaults=True: manager_of(include_path)
        )
        load_tasks({"rol*": TaskSettings()}, None, SEQ_LEN, "--tasks")
    with pytest.MonkeyPatch.context() as patch:  # lm-eval's own names take long to read
        patch.setattr(
            harness_module(), "TaskManager", lambda include_path=None, include_defaults=True: manager_of(include_path)
        )
        loaded = load_tasks(wanted, str(folder), SEQ_LEN, "--tasks")
    assert {name: [one.name for one in tasks] for name, tasks in loaded.items()} == {
        "letters": ["letters"], "choices": ["choices"], "rol*": ["rolling"], f"{folder}/answers.yaml": [f"{folder}/answers.yaml"]
    }  # fmt: skip
    assert (
        folder / "data.jsonl" in loaded["choices"][0].files()
        and folder / "choices.yaml" in loaded["choices"][0].files()
    )
    torch.manual_seed(4)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    tasks = [task for one in loaded.values() for task in one]
    first, again = (run_tasks(tasks, make_harness(run, batch_tokens)) for batch_tokens in (256, 256))
    assert first == again  # the same examples before each question
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert {name: (one["samples"], one["num_fewshot"]) for name, one in first.items()} == {
        "letters": (12, 2), "choices": (5, 1), "rolling": (12, 0), "answers": (12, 0)
    }  # fmt: skip
    acc = first["letters"]["metrics"]["acc"]
    assert acc["value"] == pytest.approx(np.mean(first["letters"]["values"]["acc"])) and acc["higher_is_better"] is True
    assert acc["stderr"] == pytest.approx(np.std(first["letters"]["values"]["acc"], ddof=1) / 12**0.5)
    assert first["rolling"]["metrics"]["bits_per_byte"]["stderr"] is None
    json.dumps(first)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == ""


def test_a_group_has_the_mean_of_its_tasks(run, tmp_path, monkeypatch):
    from pretrain.evaluation.harness import TaskSettings, load_tasks, run_tasks

    monkeypatch.setattr(
        harness_module(), "TaskManager", lambda include_path=None, include_defaults=True: manager_of(include_path)
    )
    folder = write_tasks(tmp_path / "tasks", names=["choices", "letters"])
    group = "group: both\ntask: [choices, letters]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "both.yaml").write_text(group)
    loaded = load_tasks({"both": TaskSettings(limit=8)}, str(folder), SEQ_LEN, "--tasks")
    results = run_tasks(loaded["both"], make_harness(run))
    acc = {name: result["metrics"]["acc"]["value"] for name, result in results.items()}
    assert acc.keys() == {"both", "choices", "letters"} and acc["both"] == (acc["choices"] + acc["letters"]) / 2
    with pytest.raises(ConfigError, match="--tasks: choices is in both and in choices; expected each task once"):
        load_tasks(dict.fromkeys(["both", "choices"], TaskSettings()), str(folder), SEQ_LEN, "--tasks")


def harness_module():
    from pretrain.evaluation import harness

    return harness


def manager_of(include_path):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("dataset_path: json", "dataset_path: someone/absent"), "choices cannot be loaded .*expected a task whose data set is on this machine .*dataset_path: json"),
        (("{{question}}", "{{absent_field}}"), r"choices cannot be loaded \('absent_field' is undefined\); expected a task file that fits its data"),
        (("output_type:", "unsafe_code: true\noutput_type:"), "choices runs code that the model writes; expected a task of text"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_done_are_named(tmp_path, change, message):
    from pretrain.evaluation.harness import TaskSettings, load_tasks

    folder = write_tasks(tmp_path / "tasks", names=["choices"])
    path = folder / "choices.yaml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ConfigError, match=f"--tasks: {message}"):
        load_tasks({"choices": TaskSettings()}, str(folder), SEQ_LEN, "--tasks")


def test_names_that_are_wrong(tmp_path, monkeypatch):
    from pretrain.evaluation.harness import TaskSettings, load_tasks

    folder = write_tasks(tmp_path / "tasks", names=["choices"])
    monkeypatch.setattr(
        harness_module(), "TaskManager", lambda include_path=None, include_defaults=True: manager_of(include_path)
    )
    with pytest.raises(
        ConfigError, match="eval.tasks: choises is unknown; expected a task of lm-eval or .* Did you mean choices?"
    ):
        load_tasks({"choises": TaskSettings()}, str(folder), SEQ_LEN, "eval.tasks")
    with pytest.raises(
        ConfigError, match="eval.tasks: no/such.yaml does not exist; expected a task file. Correct the path"
    ):
        load_tasks({"no/such.yaml": TaskSettings()}, str(folder), SEQ_LEN, "eval.tasks")
    with pytest.raises(ConfigError, match=r"--tasks: .*empty holds no .yaml file; expected a folder of task files"):
        load_tasks({"choices": TaskSettings()}, str(tmp_path / "empty"), SEQ_LEN, "--tasks")


def test_a_conversation_has_control_tokens_and_one_bos(run):
    from pretrain.evaluation.harness import encode_rendered
    from pretrain.tokenizers.chat import chat_template

    ours = make_harness(run, template=chat_template(run.tokenizer))
    text = ours.apply_chat_template([{"role": "user", "content": "the value?"}])
    special = run.tokenizer.special_tokens()
    ids = ours.tok_encode(text)
    assert ids[0] == run.tokenizer.bos_id and ids.count(run.tokenizer.bos_id) == 1
    assert ids.count(special["<|im_start|>"]) == 2 and ids.count(special["<|im_end|>"]) == 1
    assert encode_rendered(run.tokenizer, "plain") == run.tokenizer.encode("plain")
    assert make_harness(run).tok_encode("<|im_end|>").count(special["<|im_end|>"]) == 0  # text of tasks is text


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pretrain.evaluation.harness", None)
    monkeypatch.delattr("pretrain.evaluation.harness", raising=False)
    with pytest.raises(ConfigError, match=r"--tasks: tasks need lm_eval, .* pip install 'longhaul\[evals\]'"):
        import_harness("--tasks")
