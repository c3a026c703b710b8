"""How good answers to a task's prompts are, each metric as its field publishes it. All are from 0 to 100.

sacrebleu and rouge_score, an extra (`pip install 'longhaul[tasks]'`), count what BLEU, chrF and ROUGE are of.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from pretrain.errors import ConfigError

References = Sequence[str | Sequence[str]]
ROLE_SEPARATOR = " | "
_LIBRARIES = {"bleu": "sacrebleu", "rouge": "rouge_score"}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROUGE_TYPES = {"rougeL": "rouge_l", "rouge1": "rouge_1", "rouge2": "rouge_2"}


def check_metric(name: str) -> None:
    """Check that a metric is known, and that its library is installed.

    Raises:
        ConfigError: it is not.
    """
    if name not in METRICS:
        raise ConfigError(f"metric is {name}; expected one of {', '.join(METRICS)}. Choose one of them.")
    library = _LIBRARIES.get(name)
    if library and find_spec(library) is None:
        raise ConfigError(
            f"metric is {name}; expected the library {library}, which is not installed. Install it: "
            "pip install 'longhaul[tasks]'"
        )


def score(name: str, predictions: Sequence[str], references: References) -> dict[str, float]:
    """Score answers; white space around them does not count.

    Args:
        name: one of `METRICS`.
        predictions: what was answered, in the order of the examples.
        references: of each example the right answer, or several of which the best match counts.

    Returns:
        Numbers from 0 to 100, more being better. The first one is the metric that a task is judged by.

    Raises:
        ConfigError: no such metric, or its library is not installed.
        ValueError: there are no examples, not as many references, or one has none.
    """
    check_metric(name)
    right = [[one] if isinstance(one, str) else list(one) for one in references]
    if not predictions or len(predictions) != len(right) or not all(right):
        raise ValueError(f"{len(predictions)} predictions and {len(right)} references, each to have one at least")
    return METRICS[name](
        [prediction.strip() for prediction in predictions], [[one.strip() for one in several] for several in right]
    )


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation (ASCII's) and the articles a, an, the; words with one space between.

    Source: Rajpurkar et al., arXiv 1606.05250, section 6.1.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over normalised words, 0 to 1; of an empty side, whether both are.

    Source: Rajpurkar et al., arXiv 1606.05250, section 6.1; of no words: arXiv 1806.03822's evaluation.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    return _f1((Counter(predicted) & Counter(expected)).total(), len(predicted), len(expected))


def parse_roles(text: str) -> Counter[tuple[str, str]]:
    """Roles and their spans out of `ARG0: the cat | V: saw | ARG1: a dog`; what has no colon is a span of no role."""
    roles: Counter[tuple[str, str]] = Counter()
    for part in filter(str.strip, text.split(ROLE_SEPARATOR.strip())):
        role, colon, span = part.partition(":")
        roles[(role.strip(), " ".join(span.split())) if colon else ("", " ".join(part.split()))] += 1
    return roles


def _f1(num_shared: int, num_predicted: int, num_expected: int) -> float:
    return 2 * num_shared / (num_predicted + num_expected) if num_predicted + num_expected else 1.0


def _percent(values: Sequence[float]) -> float:
    return 100.0 * sum(values) / len(values)


def _bleu(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU of the whole set (13a tokens) and chrF, with sacrebleu's defaults (Post, arXiv 1804.08771)."""
    import sacrebleu

    most = max(map(len, references))
    streams: Any = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
    bleu, chrf = sacrebleu.corpus_bleu(predictions, streams), sacrebleu.corpus_chrf(predictions, streams)
    return {
        "bleu": min(float(bleu.score), 100.0),
        "chrf": float(chrf.score),
    }  # BLEU of equal texts is 100 and some bits


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_ROUGE_TYPES), use_stemmer=True)


def _rouge(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """F of ROUGE-L, 1 and 2 with Porter's stems, the mean over examples (Lin 2004); a-z and digits alone are words."""
    scores = [_rouge_scorer().score_multi(several, one) for one, several in zip(predictions, references, strict=True)]
    return {name: _percent([one[kind].fmeasure for one in scores]) for kind, name in _ROUGE_TYPES.items()}


def _squad(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """SQuAD's exact match and F1 of words, of each question the best reference."""
    pairs = list(zip(predictions, references, strict=True))
    best_f1 = [max(token_f1(one, right) for right in several) for one, several in pairs]
    is_exact = [normalize_answer(one) in map(normalize_answer, several) for one, several in pairs]
    return {"f1": _percent(best_f1), "exact_match": _percent(is_exact)}


def _roles(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Labelled spans over all sentences, as CoNLL-2005 counts arguments (Carreras and Marquez), the verb's too."""
    num_shared = num_predicted = num_expected = 0
    for one, several in zip(predictions, references, strict=True):
        predicted = parse_roles(one)
        best = max(map(parse_roles, several), key=lambda roles: _f1(*_overlap(predicted, roles)))
        shared, predicted_here, expected_here = _overlap(predicted, best)
        num_shared, num_predicted = num_shared + shared, num_predicted + predicted_here
        num_expected += expected_here
    return {
        "role_f1": 100.0 * _f1(num_shared, num_predicted, num_expected),
        "role_precision": 100.0 * num_shared / num_predicted if num_predicted else 0.0,
        "role_recall": 100.0 * num_shared / num_expected if num_expected else 0.0,
    }


def _overlap(predicted: Counter[tuple[str, str]], expected: Counter[tuple[str, str]]) -> tuple[int, int, int]:
    return (predicted & expected).total(), predicted.total(), expected.total()


def _accuracy(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Share of right labels, whatever their case, and the mean of F1 over the labels that references have."""
    labels = [one.casefold() for one in predictions]
    right = [[one.casefold() for one in several] for several in references]
    expected = [one if one in several else several[0] for one, several in zip(labels, right, strict=True)]
    num_right = Counter(one for one, label in zip(labels, expected, strict=True) if one == label)
    num_predicted, num_expected = Counter(labels), Counter(expected)
    each = [_f1(num_right[label], num_predicted[label], num) for label, num in sorted(num_expected.items())]
    return {"accuracy": 100.0 * num_right.total() / len(labels), "macro_f1": _percent(each)}


def _exact(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Share of answers that are a reference, character for character."""
    return {"exact_match": _percent([one in several for one, several in zip(predictions, references, strict=True)])}


METRICS: dict[str, Callable[[list[str], list[list[str]]], dict[str, float]]] = {
    "bleu": _bleu,
    "rouge": _rouge,
    "squad": _squad,
    "roles": _roles,
    "accuracy": _accuracy,
    "exact": _exact,
}
