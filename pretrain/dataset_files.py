"""SQuAD and IMDB as they are published, as documents of plain text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pretrain.source_files import Bad, BrokenFile

UNANSWERABLE = "unanswerable"
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
    try:
        articles = json.loads(data)["data"]
        paragraphs = [(one.get("title", ""), paragraph) for one in articles for paragraph in one["paragraphs"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFile(f"it is not SQuAD's JSON: {type(error).__name__}: {error}") from None
    for title, paragraph in paragraphs:
        try:
            yield _squad_text(title, paragraph)
        except (KeyError, TypeError, AttributeError) as error:
            yield Bad("bad_json", f"it is not a paragraph of SQuAD ({type(error).__name__}: {error})")


def _squad_text(title: str, paragraph: dict[str, Any]) -> str:
    parts = [f"Title: {title.replace('_', ' ')}", f"Background: {paragraph['context'].strip()}"]
    for question in paragraph["qas"]:
        answers = Counter(answer["text"].strip() for answer in question["answers"])
        is_answered = answers and not question.get("is_impossible", False)
        answer = answers.most_common(1)[0][0] if is_answered else UNANSWERABLE
        parts.append(f"Q: {question['question'].strip()}\nA: {answer}")
    return "\n\n".join(parts) + "\n"


def imdb_text(text: str) -> str:
    """A review as running text: its `<br />` are line ends."""
    return _LINE_BREAK.sub("\n", text)
