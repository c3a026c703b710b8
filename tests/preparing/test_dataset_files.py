"""SQuAD and IMDB, in files of the structure in which they are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.data.source_files import list_files, published_formats
from pretrain.errors import DataError
from pretrain.options.config import SourceSection
from pretrain.preparing.sources import ReadLog, read_documents
from pretrain.tasks.task_data import make_examples


def read(path: Path, on_bad_document: str = "error", on_bad_file: str = "error", **options: str):
    source, log = SourceSection(name="s", paths=[str(path)], shards="unused", **options), ReadLog()
    files = list_files(source)
    return [one.text for one in read_documents(files, source, on_bad_document, on_bad_file, log)], log, files


SQUAD_1 = {
    "data": [
        {
            "title": "Super_Bowl_50",
            "paragraphs": [
                {
                    "context": "Super Bowl 50 was an American football game. The Denver Broncos won.",
                    "qas": [
                        {
                            "answers": [
                                {"answer_start": 49, "text": "Denver Broncos"},
                                {"answer_start": 45, "text": "The Denver Broncos"},
                                {"answer_start": 45, "text": "The Denver Broncos"},
                            ],
                            "question": "Who won? ",
                            "id": "56be4db0acb8001400a502ec",
                        },
                        {
                            "answers": [{"answer_start": 0, "text": "Super Bowl 50"}],
                            "question": "What was it?",
                            "id": "56be4db0acb8001400a502ed",
                        },
                    ],
                },
                {"context": "A second paragraph.", "qas": []},
            ],
        }
    ],
    "version": "1.1",
}
SQUAD_2 = {
    "version": "v2.0",
    "data": [
        {
            "title": "Normans",
            "paragraphs": [
                {
                    "qas": [
                        {
                            "plausible_answers": [{"text": "Normans", "answer_start": 4}],
                            "question": "Who gave their name to Normandy in the 1000's and 1100's",
                            "id": "5ad39d53604f3c001a3fe8d1",
                            "answers": [],
                            "is_impossible": True,
                        }
                    ],
                    "context": "The Normans gave their name to Normandy.",
                }
            ],
        }
    ],
}


def test_squad_paragraphs_are_documents_with_their_questions(tmp_path: Path) -> None:
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(SQUAD_1))
    (tmp_path / "train-v2.0.json").write_text(json.dumps(SQUAD_2))
    texts, log, files = read(tmp_path)
    assert texts == [
        "Title: Super Bowl 50\n\nBackground: Super Bowl 50 was an American football game. The Denver Broncos won.\n\n"
        "Q: Who won?\nA: The Denver Broncos\n\nQ: What was it?\nA: Super Bowl 50\n",
        "Title: Super Bowl 50\n\nBackground: A second paragraph.\n",
        "Title: Normans\n\nBackground: The Normans gave their name to Normandy.\n\n"
        "Q: Who gave their name to Normandy in the 1000's and 1100's\nA: unanswerable\n",
    ]
    assert log.counts == {"documents_read": 3, "files_read": 2}
    assert published_formats(files, "auto") == "squad"


def test_squad_under_another_name_needs_the_format(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(SQUAD_2))
    assert read(tmp_path)[0][0].startswith('{"version"')
    assert read(tmp_path, format="squad")[0][0].startswith("Title: Normans")


def test_damaged_squad_files(tmp_path: Path) -> None:
    path = tmp_path / "train-v1.1.json"
    for content in (b"{", b"[]", b'{"data": [3]}', b'{"data": [{}]}', json.dumps(SQUAD_1).encode()[:300], b"\xff"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-v1.1.json: the file cannot be read to its end \(it is not SQuAD's"):
            read(path)
    broken = json.loads(json.dumps(SQUAD_1))
    del broken["data"][0]["paragraphs"][0]["qas"][0]["question"]
    path.write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"train-v1.1.json:1: the document cannot be used: it is not a paragraph of SQ"):
        read(path)
    texts, log, _ = read(path, on_bad_document="skip")
    assert len(texts) == 1 and log.counts["skipped_bad_json"] == 1


def write_imdb(folder: Path) -> None:
    files = {
        "README": "Large Movie Review Dataset v1.0", "imdb.vocab": "the\nand\n", "imdbEr.txt": "0.0490972013402\n",
        "train/labeledBow.feat": "9 0:9 1:1\n", "train/urls_pos.txt": "http://www.imdb.com/title/tt0453418/usercomments\n",
        "train/unsupBow.feat": "0 0:8\n", "test/labeledBow.feat": "10 0:7\n", "test/urls_neg.txt": "http://\n",
        "train/pos/0_9.txt": "Bromwell High is a cartoon comedy.<br /><br />It ran at the same time.",
        "train/neg/0_3.txt": "Story of a man<BR/>who has unnatural feelings for a pig.",
        "train/unsup/12_0.txt": "I admit, the great majority of films are bad.",
        "test/pos/1_10.txt": "I went and saw this movie last night.",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


REVIEWS = [
    "I went and saw this movie last night.",
    "Story of a man\nwho has unnatural feelings for a pig.",
    "Bromwell High is a cartoon comedy.\n\nIt ran at the same time.",
    "I admit, the great majority of films are bad.",
]


def test_imdb_reviews_are_documents_and_the_lists_beside_them_are_not(tmp_path: Path) -> None:
    write_imdb(tmp_path / "aclImdb")
    texts, log, files = read(tmp_path)
    assert texts == REVIEWS and log.counts == {"documents_read": 4, "files_read": 4}
    assert published_formats(files, "auto") == "imdb"
    assert read(tmp_path / "aclImdb/train")[0] == REVIEWS[1:]
    assert len(read(tmp_path / "aclImdb/train/pos")[0]) == 1


def test_imdb_under_another_name_needs_the_format(tmp_path: Path) -> None:
    write_imdb(tmp_path / "reviews")
    assert len(read(tmp_path)[0]) == 12
    assert read(tmp_path, format="imdb")[0] == REVIEWS


def read_examples_of(path: Path, **options: str):
    source = SourceSection(name="s", paths=[str(path)], shards="unused", examples={}, **options)
    log = ReadLog()
    documents = list(read_documents(list_files(source), source, "skip", "error", log))
    return [json.loads(one.text) for one in documents], log, [one.origin for one in documents]


def test_squad_questions_are_examples(tmp_path: Path) -> None:
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(SQUAD_1))
    (tmp_path / "train-v2.0.json").write_text(json.dumps(SQUAD_2))
    examples, log, origins = read_examples_of(tmp_path)
    background = "Background: Super Bowl 50 was an American football game. The Denver Broncos won."
    assert examples == [
        {
            "prompt": f"{background}\n\nQ: Who won?\nA:\n",
            "response": "The Denver Broncos",
            "references": ["Denver Broncos"],
        },
        {"prompt": f"{background}\n\nQ: What was it?\nA:\n", "response": "Super Bowl 50"},
        {
            "prompt": "Background: The Normans gave their name to Normandy.\n\n"
            "Q: Who gave their name to Normandy in the 1000's and 1100's\nA:\n",
            "response": "unanswerable",
        },
    ]
    assert origins[1] == f"{tmp_path / 'dev-v1.1.json'}:2" and log.counts["documents_read"] == 3
    for own in ({"examples": {"response": "title"}}, {"augment": {"back_translation": "other.jsonl"}}):
        source = SourceSection(**{"name": "s", "paths": [str(tmp_path)], "shards": "unused", "examples": {}} | own)
        documents = read_documents(list_files(source), source, "skip", "error", ReadLog())
        assert not any("references" in json.loads(one.text) for one in documents)
    own = {"template": "{title}: {question} {context}\n"}
    source = SourceSection(name="s", paths=[str(tmp_path / "train-v2.0.json")], shards="unused", examples=own)
    [document] = read_documents(list_files(source), source, "error", "error", ReadLog())
    assert json.loads(document.text)["prompt"].startswith("Normans: Who gave their name")


def test_the_layout_is_that_of_the_made_questions(tmp_path: Path) -> None:
    [made], _ = make_examples("questions", 1, 1)
    context, question = made.prompt.removeprefix("Background: ").removesuffix("\nA:\n").split("\n\nQ: ")
    answers = [{"text": made.response, "answer_start": 0}]
    paragraph = {"context": context, "qas": [{"question": question, "answers": answers, "id": "1"}]}
    (tmp_path / "train-v1.1.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    assert read_examples_of(tmp_path)[0] == [{"prompt": made.prompt, "response": made.response}]


def test_reviews_of_imdb_are_examples(tmp_path: Path) -> None:
    write_imdb(tmp_path / "aclImdb")
    examples, log, _ = read_examples_of(tmp_path / "aclImdb" / "train")
    assert sorted(one["response"] for one in examples) == ["negative", "positive"]
    assert {
        "prompt": "Review: Bromwell High is a cartoon comedy.\n\nIt ran at the same time.\nSentiment:\n",
        "response": "positive",
    } in examples
    assert log.counts["skipped_no_label"] == 1 and "unsup" in log.examples["skipped_no_label"]
    [made], _ = make_examples("classification", 1, 1)
    assert made.prompt.startswith("Review: ") and made.prompt.endswith("\nSentiment:\n")


def test_tables_are_examples_by_their_columns(tmp_path: Path) -> None:
    (tmp_path / "IMDB Dataset.csv").write_text(
        'review,sentiment\n"Good, ""really"".",positive\nBad.,negative\n\nshort\n'
    )
    fields = {"template": "Review: {review}\nSentiment:\n", "response": "sentiment"}
    source = SourceSection(name="s", paths=[str(tmp_path)], shards="unused", examples=fields)
    log = ReadLog()
    examples = [json.loads(one.text) for one in read_documents(list_files(source), source, "skip", "error", log)]
    assert examples == [
        {"prompt": 'Review: Good, "really".\nSentiment:\n', "response": "positive"},
        {"prompt": "Review: Bad.\nSentiment:\n", "response": "negative"},
    ]
    assert log.counts["skipped_empty"] == log.counts["skipped_bad_row"] == 1
    with pytest.raises(
        DataError, match=r"Dataset.csv:1: .*its field 'prompt' is missing \(it has: review, sentiment\)"
    ):
        source = SourceSection(name="s", paths=[str(tmp_path)], shards="unused", examples={})
        list(read_documents(list_files(source), source, "error", "error", ReadLog()))
    (tmp_path / "odd.csv").write_bytes(b"review,sentiment\n\xff,positive\n")
    source = SourceSection(name="s", paths=[str(tmp_path / "odd.csv")], shards="unused", examples=fields)
    log = ReadLog()
    assert list(read_documents(list_files(source), source, "skip", "error", log)) == []
    assert log.examples["skipped_not_utf8"].endswith("it is not UTF-8")


def test_examples_are_not_looked_for_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("text")
    with pytest.raises(DataError, match=r"prose.txt is a file of text; expected .jsonl, .csv, .tsv, SQuAD or IMDB"):
        read_examples_of(tmp_path)
