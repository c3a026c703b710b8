"""Requests of tasks: what is answered is what the logits say, whatever is in the same batch."""

from __future__ import annotations

import random

import pytest
import torch

from pretrain.errors import LonghaulError, TrainingError
from pretrain.evaluation.scoring import Continuation, Prompt, Scorer
from pretrain.generation.generate import generate
from pretrain.generation.generate_options import GenerateOptions
from tests.formats.test_hf_export import SEQ_LEN, make_run, tokenizer  # noqa: F401


@pytest.fixture(scope="module")
def run(tokenizer):  # noqa: F811
    return make_run("llama", tokenizer).load()


def requests(number=20):
    draw = random.Random(2)
    found = []
    for _ in range(number):
        context = [draw.randrange(4, 421) for _ in range(draw.choice([1, 5, 30]))]
        ids = [draw.randrange(4, 421) for _ in range(draw.choice([1, 1, 6, SEQ_LEN - 30]))]
        found.append(Continuation(tuple(context), tuple(ids)))
    # four choices of one token, and one of two that begins like them
    found += [Continuation((9, 8, 7), (token,)) for token in (5, 6, 10, 11)] + [Continuation((9, 8), (7, 6))]
    return found


def by_hand(model, request):
    whole = torch.tensor([[*request.context, *request.ids]])
    log_probs = model.logits(whole[:, :-1])[0].log_softmax(-1)[-len(request.ids) :]
    ids = whole[0, -len(request.ids) :]
    return float(log_probs.gather(1, ids[:, None]).sum()), bool((log_probs.argmax(1) == ids).all())


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_scores_are_those_of_the_logits_in_any_batch(run, batch_tokens):
    wanted = [by_hand(run.model, request) for request in requests()]
    found = Scorer(run.model, run.tokenizer, batch_tokens).score(requests())
    assert [one[0] for one in found] == pytest.approx([one[0] for one in wanted], rel=1e-5)
    assert [one[1] for one in found] == [one[1] for one in wanted]


def test_what_the_model_would_say_is_known_to_be_the_most_probable(run):
    context = torch.tensor([[1, 50, 60]])
    first = int(run.model.logits(context)[0, -1].argmax())
    second = int(run.model.logits(torch.cat((context, torch.tensor([[first]])), 1))[0, -1].argmax())
    found = Scorer(run.model, run.tokenizer, 64).score(
        [Continuation((1, 50, 60), (first, second)), Continuation((1, 50, 60), (first, second + 1))]
    )
    assert [one[1] for one in found] == [True, False]


def test_requests_of_the_same_inputs_are_computed_once(run, monkeypatch):
    shapes = []
    score = run.model.score
    monkeypatch.setattr(run.model, "score", lambda *given: shapes.append(tuple(given[0].shape)) or score(*given))
    Scorer(run.model, run.tokenizer, 64).score([Continuation((9, 8, 7), (token,)) for token in range(4, 30)])
    assert shapes == [(1, 3)]


def test_batches_are_as_many_tokens_as_they_may_be(run, monkeypatch):
    sizes = []
    score = run.model.score
    monkeypatch.setattr(run.model, "score", lambda *given: sizes.append(given[0].numel()) or score(*given))
    Scorer(run.model, run.tokenizer, 200).score(requests())
    assert max(sizes) <= 200 and len(sizes) < 8


def test_texts_are_those_of_generate_and_end_where_a_turn_does(run, monkeypatch):
    options = GenerateOptions(max_new_tokens=10, temperature=0.8, stop=("e",))
    texts = ["def ", "import", "", "return x"]
    ids = [(1, *run.tokenizer.encode(text)) for text in texts]
    prompts = [Prompt(text, own, options) for text, own in zip(texts, ids, strict=True)]
    found = Scorer(run.model, run.tokenizer, 64).generate(prompts)
    wanted = generate(
        run.model, run.tokenizer, [f"1:{text}" for text in texts], options, prompt_ids=list(map(list, ids))
    )
    assert found == [one.text for one in wanted] and len(set(found)) > 2
    assert found == Scorer(run.model, run.tokenizer, 1).generate(prompts)
    twice = Scorer(run.model, run.tokenizer, 64).generate([prompts[0], prompts[0]])
    assert twice[0] == found[0] and twice[1] != twice[0]  # a task's repeats are other samples

    whole = GenerateOptions(max_new_tokens=10, temperature=0)
    completion = generate(run.model, run.tokenizer, ["def "], whole)[0]
    end = completion.ids[4]
    cut = Scorer(run.model, run.tokenizer, 64, end_ids=[end]).generate([Prompt("def ", ids[0], whole)])[0]
    num_taken = completion.ids.index(end)
    assert cut == run.tokenizer.decode(completion.ids[:num_taken]) and cut != completion.text

    steps = []
    logits = run.model.logits
    monkeypatch.setattr(
        run.model, "logits", lambda *given, **more: steps.append(len(given[0])) or logits(*given, **more)
    )
    Scorer(run.model, run.tokenizer, 64, end_ids=[end]).generate([Prompt("def ", ids[0], whole)])
    assert len(steps) == num_taken + 1  # not on to the most that it may be


def test_a_model_that_computes_nan_is_an_error(run, tokenizer):  # noqa: F811
    broken = make_run("llama", tokenizer).load()
    with torch.no_grad():
        broken.model.output.weight[7] = float("nan")
    with pytest.raises(LonghaulError, match="NaN") as caught:
        Scorer(broken.model, tokenizer, 64).generate([Prompt("", (1,), GenerateOptions(temperature=0))])
    assert isinstance(caught.value, TrainingError)
