"""SQuAD and IMDB as they are published, as documents of plain text and as records to tune on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.data.source_files import Bad, BrokenFile

UNANSWERABLE = "unanswerable"
_MALFORMED = (KeyError, TypeError, AttributeError)
_LABELS = {"pos": "positive", "neg": "negative"}
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


def squad_documents(data: bytes) -> Iterator[str | Bad]:
    """Yield a document for each paragraph of SQuAD 1.1 or 2.0: its title and context, then its questions and answers.

    A question's answer is the one that most annotators gave, the first of those where several are; of 2.0's questions
    that the context does not answer it is `unanswerable`.

    Args:
        data: the whole file, such as `train-v2.0.json`.

    Raises:
        BrokenFile: it is not JSON, or not SQuAD's.

    Source: Rajpurkar et al., arXiv 1606.05250 and 1806.03822; the layout is that of the prompts of Brown et al.,
        arXiv 2005.14165.
    """
    for title, paragraph in _paragraphs(data):
        try:
            parts = [f"Title: {title}", _background(paragraph)]
            parts += [f"{_asked(question)} {_answer(question)}" for question in paragraph["qas"]]
        except _MALFORMED as error:
            yield _bad_paragraph(error)
        else:
            yield "\n\n".join(parts) + "\n"


def squad_records(data: bytes) -> Iterator[dict[str, Any] | Bad]:
    """Yield a record for each question of SQuAD 1.1 or 2.0, to tune on, in the layout of `squad_documents`.

    It has `title`, `context` and `question`, a `prompt` of the last two, and the answer as `response`, with what other
    annotators answered as `references`. A paragraph with a malformed question is bad as a whole.

    Args:
        data: the whole file.

    Raises:
        BrokenFile: it is not JSON, or not SQuAD's.
    """
    for title, paragraph in _paragraphs(data):
        try:
            records = [
                {
                    "title": title,
                    "context": paragraph["context"].strip(),
                    "question": question["question"].strip(),
                    "prompt": f"{_background(paragraph)}\n\n{_asked(question)}\n",
                    "response": _answer(question),
                    "references": _other_answers(question),
                }
                for question in paragraph["qas"]
            ]
        except _MALFORMED as error:
            yield _bad_paragraph(error)
        else:
            yield from records


def _paragraphs(data: bytes) -> list[tuple[str, dict[str, Any]]]:
    try:
        articles = json.loads(data)["data"]
        titles = [str(one.get("title", "")).replace("_", " ") for one in articles]
        return [(title, one) for title, article in zip(titles, articles, strict=True) for one in article["paragraphs"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFile(f"it is not SQuAD's JSON: {type(error).__name__}: {error}") from None


def _bad_paragraph(error: Exception) -> Bad:
    return Bad("bad_json", f"it is not a paragraph of SQuAD ({type(error).__name__}: {error})")


def _background(paragraph: dict[str, Any]) -> str:
    return f"Background: {paragraph['context'].strip()}"


def _asked(question: dict[str, Any]) -> str:
    return f"Q: {question['question'].strip()}\nA:"


def _answers(question: dict[str, Any]) -> list[str]:
    """The different answers to a question, the most frequent first, of those as frequent the one that came first."""
    if question.get("is_impossible", False):
        return [UNANSWERABLE]
    counts = Counter(answer["text"].strip() for answer in question["answers"])
    return [text for text, _ in counts.most_common()] or [UNANSWERABLE]


def _answer(question: dict[str, Any]) -> str:
    return _answers(question)[0]


def _other_answers(question: dict[str, Any]) -> list[str]:
    return [text for text in _answers(question)[1:] if text]


def imdb_text(text: str) -> str:
    """A review as running text: its `<br />` are line ends."""
    return _LINE_BREAK.sub("\n", text)


def imdb_record(text: str, path: Path) -> dict[str, str] | Bad:
    """A review to tune on: `review`, a `prompt` of it, and as `response` what its folder says, `pos` or `neg`."""
    label = _LABELS.get(path.parent.name)
    if label is None:
        return Bad("no_label", f"its folder is {path.parent.name}; pos and neg say what to answer", False)
    review = imdb_text(text).strip()
    return {"review": review, "prompt": f"Review: {review}\nSentiment:\n", "response": label}
