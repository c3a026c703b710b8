"""Examples for tuning: what a line must have, the ids and their marks in shards, the rows that training reads."""

from __future__ import annotations

import json
import shutil
from contextlib import closing

import numpy as np
import pytest

from pretrain.data.data_plan import open_plan
from pretrain.data.examples import context_bit, encode_example, fields_of, fill_in, parse_example, plain_text
from pretrain.data.row_reader import RowAddress, RowReader
from pretrain.data.shard_reader import ShardReader
from pretrain.data.shards import Manifest
from pretrain.data.stream import ValRows
from pretrain.errors import ConfigError, DataError
from pretrain.evaluation import answers
from pretrain.evaluation.answers import read_examples
from pretrain.options.config import ExamplesSection, ModelSection
from pretrain.options.families import resolve_shape
from pretrain.options.settings import load_config
from pretrain.preparing.inspect_shards import inspect
from pretrain.preparing.prepare import prepare
from pretrain.preparing.verify_shards import verify
from pretrain.tokenizers import messages
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.transformer.model import Transformer
from tests.helpers.tuning_helpers import make_conversation, make_examples, write_lines, write_task

SHAPE = resolve_shape(ModelSection(family="llama", dim=32, num_layers=1, num_heads=2), 360, 96)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task, prepared in one go by one process: 300 pairs, 20 conversations, an example too long for a row."""
    folder = write_task(tmp_path_factory.mktemp("examples"))
    conversations = [make_conversation(make_examples(2, seed)) for seed in range(20)]
    long = {"prompt": "the oak " * 60, "response": "tree"}
    write_lines(folder / "examples.jsonl", [*make_examples(300), *conversations, long])
    prepare(load_config(folder / "tune.yaml"))
    return folder


@pytest.fixture
def tokenizer(task):
    return SentencePieceTokenizer(task / "t.model")


def documents_of(folder):
    manifest = Manifest.load(folder)
    for split in ("train", "val"):
        for shard in manifest.shards(split):
            reader = ShardReader(folder, shard, manifest.dtype)
            for number in range(shard.num_documents):
                yield split, reader.read(number)
            reader.close()


def test_a_pair_is_scored_from_its_response_on(tokenizer):
    stored = encode_example(tokenizer, json.dumps({"prompt": "the oak =", "response": "tree"}))
    ids, is_context = stored & 0x7FFF, stored >> 15 == 1
    prompt, response = tokenizer.encode("the oak ="), tokenizer.encode("tree")
    assert stored.dtype == np.uint16 and context_bit(tokenizer) == 15
    assert ids.tolist() == [tokenizer.bos_id, *prompt, *response, tokenizer.eos_id]
    assert is_context.tolist() == [True] * (1 + len(prompt)) + [False] * (len(response) + 1)


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ('{"prompt": "a"}', "no_example", "its field 'response' is missing"),
        ('{"prompt": "a", "response": ""}', "no_response", "is empty"),
        ('{"prompt": 3, "response": "b"}', "no_example", "'prompt' is int"),
        ('{"prompt": "a", "response": null}', "no_example", "'response' is NoneType"),
        ('{"messages": "a"}', "no_example", "is str, not a list"),
        ('{"messages": []}', "no_response", "no answer"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no_response", "no answer"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "no_example", "message 1 whose role is 'tool'"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "no_example", "message 1 without a text"),
        ('{"messages": ["a"]}', "no_example", "role is None"),
        ("[1]", "no_text", "a JSON list"),
        ("{", "bad_json", "not JSON"),
    ],
)
def test_lines_that_are_no_examples(line, reason, message):
    bad = parse_example(line.encode(), ExamplesSection())
    assert bad.reason == reason and message in bad.message


def test_templates_put_fields_in_and_leave_what_stands_in_them():
    section = ExamplesSection(template="Q: {question}\n{{{context}}}\nA:", response="answer")
    line = json.dumps({"question": "{context}?", "context": "it {is}", "answer": "yes"})
    assert json.loads(parse_example(line.encode(), section)) == {
        "prompt": "Q: {context}?\n{it {is}}\nA:",
        "response": "yes",
    }
    assert plain_text(parse_example(line.encode(), section)).endswith("A:yes")
    assert fields_of("{a} {b} {a} {{c}}") == ["a", "b"] and fill_in("{{", {}) == "{"
    for wrong in ("{", "a }", "{}", "{a"):
        with pytest.raises(ConfigError, match="expected a name between each pair"):
            fields_of(wrong)


def test_every_example_lies_in_the_shards_once(task, tokenizer):
    manifest = Manifest.load(task / "kinds-shards")
    assert (manifest.version, manifest.context_bit, manifest.dtype) == (2, 15, "uint16")
    found = list(documents_of(task / "kinds-shards"))
    expected = [one | {"prompt": f"{one['prompt']} ="} for one in make_examples(300)]
    expected += [make_conversation(make_examples(2, seed)) for seed in range(20)]
    assert sorted(ids.tobytes() for _, ids in found) == sorted(
        encode_example(tokenizer, json.dumps(one)).tobytes() for one in expected
    )
    assert {split for split, _ in found} == {"train", "val"}
    assert manifest.counts["skipped_longer_than_a_row"] == 1
    assert sum(manifest.text_bytes.values()) < 300 * 40 + 20 * 120


def test_rows_score_answers_only(task, tokenizer):
    config = load_config(task / "tune.yaml")
    plan, [corpus] = open_plan(config, tokenizer.fingerprint)
    rows = RowReader()
    table, seen = corpus.rows[96], 0
    addresses = [RowAddress(corpus, table, *table.locate(number), number) for number in range(table.num_rows)]
    batch, num_targets, damaged = rows.read(addresses, 96)
    assert not damaged and num_targets == batch.count_targets()
    stored = [ids for split, ids in documents_of(task / "kinds-shards") if split == "train"]
    assert num_targets == sum(int((ids >> 15 == 0).sum()) for ids in stored)
    assert int(batch.tokens_BT.max()) < 360 and plan.hash
    by_context = {ids[:-1].tobytes(): ids for ids in ((ids & 0x7FFF).astype(np.int64) for ids in stored)}
    marks = {(ids & 0x7FFF)[:-1].astype(np.int64).tobytes(): ids >> 15 == 0 for ids in stored}
    for tokens, targets, starts in zip(
        batch.tokens_BT.numpy(), batch.targets_BT.numpy(), batch.doc_start_BT.numpy(), strict=True
    ):
        for begin in np.unique(starts):
            place = starts == begin
            key = tokens[place].tobytes()
            if key not in by_context:  # padding
                assert (targets[place] == -100).all()
                continue
            assert targets[place].tolist() == np.where(marks[key][1:], by_context[key][1:], -100).tolist()
            seen += 1
    assert seen == len(stored)
    rows.close()


def test_the_metric_of_squad_takes_the_best_of_all_answers(task, tokenizer, tmp_path, monkeypatch):
    texts = {"Who?": ["the oak", "an old oak", "the oak", "oak tree"], "What?": ["rain"], "Why?": []}
    asked = [{"question": question, "id": question, "answers": [{"text": text} for text in given]}
             for question, given in texts.items()]  # fmt: skip
    paragraphs = [{"context": "the old oak saw rain", "qas": asked}]
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"data": [{"title": "", "paragraphs": paragraphs}]}))
    kinds = f"{{name: kinds, shards: {task}/kinds-shards}}"
    dev = f"{{name: dev, paths: [{tmp_path}/dev-v2.0.json], shards: {tmp_path}/dev, examples: {{}}, val_fraction: 1, weight: 0}}"
    config = load_config(task / "tune.yaml", [f"data.sources=[{kinds}, {dev}]", f"run.dir={tmp_path}/run"])
    prepare(config)
    with closing(ValRows(config, tokenizer.fingerprint, 0)) as rows:
        found = [one for one in read_examples(rows, tokenizer.eos_id) if "Background" in tokenizer.decode(one.prompt)]
        by_first = {tokenizer.decode(one.answers[0]).strip(): one for one in found}
        assert {first: [tokenizer.decode(other).strip() for other in one.answers[1:]] for first, one in by_first.items()} == {
            "the oak": ["an old oak", "oak tree"], "rain": [], "unanswerable": []
        }  # fmt: skip
        assert by_first["the oak"].answers[0][-1] == tokenizer.eos_id  # which is scored, and what follows is not
        answered = {"the oak": "oak tree", "rain": "rain tree", "unanswerable": "unanswerable"}
        monkeypatch.setattr(answers.Scorer, "generate", lambda scorer, asked: [
            next((answered[first] for first, one in by_first.items() if one.prompt == prompt.ids), "") for prompt in asked
        ])  # fmt: skip
        monkeypatch.setattr(answers, "read_examples", lambda *given: found)
        judged = answers.judge_answers("squad", Transformer(SHAPE, 0), tokenizer, rows, 64)
    assert judged.values == {"f1": pytest.approx(100 * (1 + 2 / 3 + 1) / 3), "exact_match": pytest.approx(100 * 2 / 3)}


def test_checks_and_looks_know_the_marks(task):
    assert verify(task / "kinds-shards", 1)["problems"] == []
    [*samples] = inspect(task / "kinds-shards", tokenizer=str(task / "t.model"))["samples"]
    assert all("=" in one["text"] or "Name the kind." in one["text"] for one in samples), samples


def test_several_processes_and_shares_give_the_same_bytes(task, tmp_path):
    for name in ("t.model", "examples.jsonl"):
        shutil.copy(task / name, tmp_path)
    text = (task / "tune.yaml").read_text().replace(str(task), str(tmp_path))
    (tmp_path / "tune.yaml").write_text(text.replace("prepare_processes: 1", "prepare_processes: 2"))
    config = load_config(tmp_path / "tune.yaml")
    for number in (1, 2):
        prepare(config, share=(number, 2))
    prepare(config, num_shares=2)
    ours, theirs = (Manifest.load(folder / "kinds-shards") for folder in (tmp_path, task))
    assert ours.fingerprint() == theirs.fingerprint()


def test_what_would_change_the_shards_is_refused(task):
    for override, what in (
        ("data.seq_len=32", "the longest example, in tokens from 96 to 32"),
        ("data.sources.0.examples={template: '{prompt}:'}", r"data.sources\[\].examples"),
        ("data.sources.0.examples=null", r"data.sources\[\].examples|holds shards that were prepared otherwise"),
    ):
        with pytest.raises(ConfigError, match=what):
            prepare(load_config(task / "tune.yaml", [override]))


def test_bad_lines_are_counted_or_refused_with_their_line(task, tmp_path):
    shutil.copy(task / "t.model", tmp_path)
    write_lines(tmp_path / "examples.jsonl", [*make_examples(30), {"prompt": "x", "response": ""}, {"prompt": "x"}])
    (tmp_path / "tune.yaml").write_text((task / "tune.yaml").read_text().replace(str(task), str(tmp_path)))
    with pytest.raises(
        DataError, match=r"examples.jsonl:31: the document cannot be used: its field 'response' is empty"
    ):
        prepare(load_config(tmp_path / "tune.yaml", ["data.on_bad_document=error"]))
    prepare(load_config(tmp_path / "tune.yaml"))
    counts = Manifest.load(tmp_path / "kinds-shards").counts
    assert (counts["skipped_no_response"], counts["skipped_no_example"]) == (1, 1)


def test_sources_that_hold_no_examples(task, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="is a file of text; expected .jsonl, .csv, .tsv, SQuAD or IMDB, because"):
        prepare(
            load_config(
                task / "tune.yaml", [f"data.sources.0.paths=[{tmp_path}/a.txt]", f"data.sources.0.shards={tmp_path}/s"]
            )
        )
    with pytest.raises(ConfigError, match="expected that of the model which the examples of"):
        prepare(
            load_config(
                task / "tune.yaml", [f"tokenizer.model={tmp_path}/other.model", f"data.sources.0.shards={tmp_path}/s"]
            )
        )
    with pytest.raises(ConfigError, match="data.packing is concat; expected best_fit or document"):
        load_config(task / "tune.yaml", ["data.packing=concat"])
    with pytest.raises(
        ConfigError, match=r"data.sources.0.text_field is text; expected to be left out. The source holds"
    ):
        load_config(task / "tune.yaml", ["data.sources.0.text_field=text"])


def test_the_loss_is_that_of_answers_alone(task, tokenizer):
    """Objective and gradients of packed rows are those of each example by itself, summed over its answers by hand."""
    import torch

    from pretrain.options.families import resolve_shape
    from pretrain.transformer.model import Transformer

    config = load_config(task / "tune.yaml")
    model = Transformer(resolve_shape(config.model, 360, 96), 1)
    _, [corpus] = open_plan(config, tokenizer.fingerprint)
    rows, table = RowReader(), corpus.rows[96]
    numbers = range(table.num_rows)
    batch, num_targets, _ = rows.read([RowAddress(corpus, table, *table.locate(n), n) for n in numbers], 96)
    objective, cross_entropy = model(batch.tokens_BT, batch.targets_BT, batch.doc_start_BT, batch.row_ids_B, 0)
    objective.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    by_hand, count = torch.zeros(()), 0
    for split, stored in documents_of(task / "kinds-shards"):
        if split == "train":
            ids, is_scored = torch.from_numpy((stored & 0x7FFF).astype(np.int64)), torch.from_numpy(stored >> 15 == 0)
            starts = torch.zeros(1, len(ids) - 1, dtype=torch.int32)
            hidden_BTD = model._hidden(ids[None, :-1], starts, torch.arange(len(ids) - 1)[None], None, None)
            log_probs = model.output(hidden_BTD, None)[0].log_softmax(-1)
            picked = log_probs[torch.arange(len(ids) - 1), ids[1:]]
            by_hand = by_hand - picked[is_scored[1:]].sum()
            count += int(is_scored.sum())
    by_hand.backward()
    assert count == num_targets
    torch.testing.assert_close(objective, by_hand, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            packed[name], parameter.grad, rtol=1e-4, atol=1e-4 * float(parameter.grad.abs().max())
        )
    rows.close()


def test_a_conversation_that_the_template_refuses_is_named_with_its_line(task, tmp_path, monkeypatch):
    shutil.copy(task / "t.model", tmp_path)
    write_lines(tmp_path / "examples.jsonl", [*make_examples(30), make_conversation(make_examples(1))])
    (tmp_path / "tune.yaml").write_text((task / "tune.yaml").read_text().replace(str(task), str(tmp_path)))
    template = "{% for one in messages %}{% if one.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    monkeypatch.setattr(messages, "chat_template", lambda tokenizer: template)
    with pytest.raises(ConfigError) as refused:
        prepare(load_config(tmp_path / "tune.yaml"))
    assert str(refused.value) == (
        f"{tmp_path}/examples.jsonl:31: tokenizer: its chat template refuses a conversation of system, user, assistant "
        "(no system); expected one that it is made for. Change the messages."
    )
