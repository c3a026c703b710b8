"""Metrics of tasks against numbers computed by hand, by definitions, and by what their authors publish."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from pretrain.errors import ConfigError
from pretrain.tasks import task_metrics
from pretrain.tasks.task_metrics import METRICS, check_metric, normalize_answer, parse_roles, score, token_f1


def test_squad_normalises_as_published() -> None:
    assert normalize_answer("  The Denver-Broncos, a  team; AN answer's end. ") == "denverbroncos team answers end"
    assert normalize_answer("another theory") == "another theory"  # articles are whole words


def test_token_f1_counts_repeated_words_once_each() -> None:
    assert token_f1("the cat sat", "cat sat down") == pytest.approx(2 * (2 / 2 * 2 / 3) / (2 / 2 + 2 / 3))
    assert token_f1("no no no", "no yes") == pytest.approx(2 * (1 / 3 * 1 / 2) / (1 / 3 + 1 / 2))
    assert token_f1("", "") == token_f1("The", "a") == 1.0
    assert token_f1("", "cat") == token_f1("cat", "") == token_f1("dog", "cat") == 0.0


def test_squad_takes_the_best_of_the_references() -> None:
    assert score("squad", ["The Denver Broncos!", "Paris, France"], [["Broncos", "denver broncos"], ["France"]]) == {
        "f1": pytest.approx(100 * (1 + 2 / 3) / 2),
        "exact_match": 50.0,
    }


def test_bleu_is_sacrebleus() -> None:
    # by hand: of 5 words 4 are right (the full stop is one), of 4 pairs 2, of 3 triples 1; no four in a row:
    # exponential smoothing gives 1/(2 x 2); lengths are equal, so there is no penalty
    expected = 100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** (1 / 4)
    assert score("bleu", ["the cat sat down ."], ["the cat sat here ."])["bleu"] == pytest.approx(expected)
    # two of seven words missing at the end: the brevity penalty alone
    short = score("bleu", ["a b c d e"], ["a b c d e f g"])
    assert short["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 5))
    several = score("bleu", ["x", "one two three four"], ["y", ["one", "one two three four"]])
    assert several["chrf"] > 50  # the number of references may differ between examples
    assert score("bleu", ["the cat is on the mat."] * 2, ["the cat is on the mat."] * 2) == {"bleu": 100, "chrf": 100}


def test_chrf_by_hand() -> None:
    # one-letter n-grams: 2 of 3 both ways; pairs: 1 of 2; triples: 0 of 1; longer ones there are none, and they do not
    # count. beta is 2 and precision equals recall, so that F is their mean (Popovic 2015)
    assert score("bleu", ["abc"], ["abd"])["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_rouge_by_hand() -> None:
    # Lin 2004, section 3: "police killed the gunman" against two candidates; ROUGE-L is 3/4 and 2/4
    reference = "police killed the gunman"
    assert score("rouge", ["police kill the gunman"], [reference])["rouge_l"] == 100.0  # stems are equal
    first = score("rouge", ["police stop the gunman"], [reference])
    assert first == {"rouge_l": 75.0, "rouge_1": 75.0, "rouge_2": pytest.approx(100 / 3)}
    assert score("rouge", ["the gunman stop police"], [reference])["rouge_l"] == 50.0
    assert score("rouge", ["the gunman"], [["police", "the gunman"]])["rouge_l"] == 100.0
    assert score("rouge", [""], [reference])["rouge_l"] == 0.0


def test_roles_are_counted_over_all_sentences() -> None:
    predictions = ["ARG0: the cat | V: saw | ARG1: a dog", "V: ran|ARGM-TMP:  in   May ", "a dog"]
    references = ["ARG0: the cat | V: saw | ARG1: the dog | ARGM-TMP: today", "V: ran | ARGM-TMP: in May", "V: slept"]
    # right: 2 + 2 of 3 + 2 + 1 given and 4 + 2 + 1 wanted
    assert score("roles", predictions, references) == {
        "role_f1": pytest.approx(100 * 2 * 4 / (6 + 7)),
        "role_precision": pytest.approx(100 * 4 / 6),
        "role_recall": pytest.approx(100 * 4 / 7),
    }
    assert parse_roles("V: a | V: a | no role | ") == Counter({("V", "a"): 2, ("", "no role"): 1})
    repeated = score("roles", ["V: ran | V: ran | V: ran"], ["V: ran"])
    assert repeated["role_precision"] == pytest.approx(100 / 3) and repeated["role_recall"] == 100.0
    assert score("roles", [""], ["V: ran"]) == {"role_f1": 0.0, "role_precision": 0.0, "role_recall": 0.0}
    assert score("roles", ["V: b"], [["V: a", "V: b"]])["role_f1"] == 100.0


def test_accuracy_and_macro_f1() -> None:
    scores = score("accuracy", ["Pos", " neg\n", "neg", "other"], ["pos", "pos", "neg", "neg"])
    # pos: 1 given, 2 wanted, 1 right; neg: 2 given, 2 wanted, 1 right; a label that nobody wanted has no F1 of its own
    assert scores == {"accuracy": 50.0, "macro_f1": pytest.approx(100 * (2 / 3 + 1 / 2) / 2)}


def test_exact_is_character_for_character() -> None:
    assert score("exact", ["A b", "a  b", " a b "], ["a b"] * 3) == {"exact_match": pytest.approx(100 / 3)}


@pytest.mark.parametrize("name", METRICS)
def test_right_answers_have_100_and_wrong_ones_0(name: str) -> None:
    right = ["V: alpha beta gamma delta", "V: epsilon zeta eta theta"]
    assert next(iter(score(name, right, right).values())) == pytest.approx(100)
    wrong = next(iter(score(name, ["7", "8"], right).values()))
    assert wrong == 0.0
    for values in (score(name, right, right), score(name, ["7", "8"], right)):
        assert all(0.0 <= value <= 100.0 for value in values.values())


def test_what_cannot_be_scored() -> None:
    with pytest.raises(
        ConfigError, match=r"^metric is meteor; expected one of bleu, rouge, squad, roles, accuracy, exact\. "
    ):
        score("meteor", ["a"], ["a"])
    for predictions, references in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match=r"predictions and \d references, each to have one"):
            score("exact", predictions, references)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_metrics, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"metric is bleu; expected the library sacrebleu.*pip install 'longhaul\[tasks\]'"
    ):
        check_metric("bleu")
    check_metric("roles")
