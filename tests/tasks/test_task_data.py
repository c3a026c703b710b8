"""Examples of the tasks: the same ones each time, held out by content, and right by rules that their makers do not use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from launch.make_tasks import main
from pretrain.errors import ConfigError
from pretrain.tasks.task_data import TASKS, make_examples, write_task
from pretrain.tasks.task_grammars import Example
from pretrain.tasks.task_metrics import METRICS, parse_roles

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def examples() -> dict[str, tuple[list[Example], list[Example]]]:
    return {name: make_examples(name, 400, 60) for name in TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_what_is_held_out_is_new_in_content(name: str, examples: dict) -> None:
    train, held_out = examples[name]
    assert len({one.prompt for one in train + held_out}) == 460
    known = {combination for one in train for combination in one.content}
    new = {combination for one in held_out for combination in one.content}
    assert all(one.content for one in train + held_out) and not known & new
    # the parts of what is held out are known, so that there is something to generalise from
    words = Counter(word for one in train for word in one.prompt.split() if not word.strip(".,?").isdigit())
    share = [word in words for one in held_out for word in one.prompt.split() if not word.strip(".,?").isdigit()]
    assert sum(share) / len(share) > 0.97
    # and both sides have the same mixture of short and long
    lengths = [sum(len(one.prompt) for one in side) / len(side) for side in (train, held_out)]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.12)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    make = "import sys; from pretrain.tasks.task_data import *; [write_task(n, f'{sys.argv[1]}/{n}', 20, 5) for n in TASKS]"
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run(
            [sys.executable, "-c", make, str(tmp_path / hash_seed)], cwd=ROOT, env=environment, check=True, timeout=120
        )
    for name in TASKS:
        write_task(name, tmp_path / "other" / name, 20, 5, seed=2)
        for file in ("train.jsonl", "held-out.jsonl"):
            first, second, other = ((tmp_path / folder / name / file).read_bytes() for folder in ("1", "2", "other"))
            assert first == second != other


def test_files_are_lines_of_prompt_and_response(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roles", "translation", "--out", str(tmp_path), "--train", "30", "--held-out", "7"]) == 0
    assert capsys.readouterr().out.startswith("roles: 30 training and 7 held-out examples: ")
    for name in ("roles", "translation"):
        for file, count in (("train.jsonl", 30), ("held-out.jsonl", 7)):
            records = [json.loads(line) for line in (tmp_path / name / file).read_text("utf-8").splitlines()]
            assert len({record["id"] for record in records}) == count
            for record in records:
                assert record.keys() == {"id", "prompt", "response"}
                assert record["prompt"].endswith("\n") and record["response"] == record["response"].strip() != ""
    assert "Straße" in (tmp_path / "translation/train.jsonl").read_text("utf-8")  # and not an escape


def test_what_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dialogue", "--out", str(tmp_path)]) == 2
    assert "task is dialogue; expected one of translation, summary" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--train", "0"])
    (tmp_path / "file").write_text("")
    assert main(["roles", "--out", str(tmp_path / "file"), "--train", "1", "--held-out", "1"]) == 1
    with pytest.raises(
        ConfigError, match=r"^task roles: examples wanted are 3; expected at most about 2, which is what"
    ):
        make_examples_of_few()


def make_examples_of_few() -> None:
    """Ask for more than a grammar has: one that knows two sentences."""
    monkey = pytest.MonkeyPatch()
    made = [Example(f"{number}\n", "x", frozenset()) for number in range(2)]
    monkey.setitem(TASKS, "roles", type(TASKS["roles"])(lambda random: made[int(random.random() * 2)], "roles"))
    monkey.setattr("pretrain.tasks.task_data._MAX_TRIES", 50)
    try:
        make_examples("roles", 3, 1)
    finally:
        monkey.undo()


def test_every_task_has_a_metric_that_there_is() -> None:
    assert {task.metric for task in TASKS.values()} - {None} <= METRICS.keys()


def test_german_agrees(examples: dict) -> None:
    """A noun's article tells its gender or case wrong only if a table is: here is one that was written on its own."""
    masculine = (
        "Garten Brief Tisch Stuhl Zug Fluss See Baum Apfel Mantel Schlüssel Hund Lehrer Arzt Freund Gast".split()
    )
    feminine = "Lampe Flasche Tür Straße Stadt Brücke Blume Tasche Uhr Tasse Katze Frau Schwester".split()
    phrase = re.compile(r"\b([Dd](?:er|ie|as|en|em)|[Ii]m|k?ein(?:e[rnm]?)?) (?:(\w+) )?([A-ZÄÖÜ]\w+)")
    found = 0
    for one in examples["translation"][0]:
        for article, adjective, noun in phrase.findall(one.response):
            found += 1
            gender = "m" if noun in masculine else "f" if noun in feminine else "n"
            article = article.lower().replace("im", "dem").removeprefix("k")
            allowed = {
                "m": {"der": "e", "den": "en", "dem": "en", "einen": "en", "ein": "er"},
                "f": {"die": "e", "der": "en", "eine": "e"},
                "n": {"das": "e", "dem": "en", "ein": "es"},
            }[gender]
            assert article in allowed, one.response
            assert not adjective or adjective.endswith(allowed[article]), one.response
        assert one.prompt.startswith("English: ") and " a a" not in one.prompt and " a old" not in one.prompt
    assert found > 500


def test_german_word_order(examples: dict) -> None:
    translations = {one.prompt.splitlines()[0]: one.response for side in examples["translation"] for one in side}
    modal = re.compile(r" (kann|kannst|können|muss|musst|müssen|darf|darfst|dürfen) ")
    for english, german in translations.items():
        if re.search(r" (can|must|may) ", english):
            assert modal.search(german) and german.endswith("en."), german
        if " not " in english:
            assert german.endswith(" nicht.") != (" kein" in german), german
        if re.match("English: (Today|Now|Yesterday|In May) ", english):
            second = german.split()[2 if german.startswith("Im Mai") else 1]
            assert second.islower() and second not in ("ich", "du", "er", "sie", "wir", "der", "die", "das"), german


def test_roles_are_spans_of_the_sentence(examples: dict) -> None:
    kinds: Counter[str] = Counter()
    for one in examples["roles"][0]:
        sentence = one.prompt.splitlines()[0].removeprefix("Sentence: ")
        roles = parse_roles(one.response)
        kinds.update(role for role, _ in roles)
        assert all(span in sentence for _, span in roles)
        by_role = {role: span for role, span in roles}
        assert len(by_role) == len(roles) and {"V", "ARG1"} <= by_role.keys()
        if f" was {by_role['V']}" in sentence:  # passive: who did it has `by`, or is not said
            assert by_role.get("ARG0", "by ").startswith("by ")
        left = sentence
        for span in by_role.values():
            left = left.replace(span, "", 1)
        assert re.fullmatch(r"(was|[\s,.])*", left), one  # nothing but auxiliaries and commas is without a role
    assert min(kinds[role] for role in ("ARG0", "ARG2", "ARGM-TMP", "ARGM-LOC", "ARGM-MNR")) > 30


def test_answers_are_in_their_contexts(examples: dict) -> None:
    kinds: Counter[str] = Counter()
    for one in examples["questions"][0]:
        background, question = re.fullmatch(r"Background: (.*)\n\nQ: (.*)\nA:\n", one.prompt).groups()
        kinds[question.split()[0]] += 1
        if question.startswith("How old"):
            assert one.response == "unanswerable"
            continue
        if question.startswith("What is said about "):  # the answer is the sentence that says it
            kinds["said"] += 1
            subject = question.removeprefix("What is said about ").removesuffix("?").removeprefix("the ")
            sentences = re.findall(r"\S[^.]*\.", background)
            assert [sentence for sentence in sentences if subject in sentence] == [one.response], one
            continue
        assert len(re.findall(rf"\b{one.response}\b", background)) == 1
        [sentence] = [part for part in background.split(". ") if one.response in part]
        name = re.search(r"[A-Z][a-z]+ [A-Z][a-z]+", sentence.removeprefix("The "))[0]
        city, job = re.search(r"from (\w+)", sentence)[1], re.search(r"(?:^The|\ba) ([a-z]+)", sentence)[1]
        asked = re.fullmatch(r"(Where is|What is|Who is) (.*?)( from)?\?", question).groups()
        expected = {"Where is": city, "What is": job, "Who is": name}[asked[0]]
        assert expected == one.response, one
        subject = asked[1].removeprefix("from ").removeprefix("the ")
        assert subject in (name, city, job)  # it asks about the one whose answer it is
    assert min(kinds[word] for word in ("Who", "Where", "What", "How", "said")) > 20


def test_summaries_count_the_goals(examples: dict) -> None:
    results: Counter[str] = Counter()
    for one in examples["summary"][0]:
        day, home, away = re.search(r"On (\w+) (\w+) met (\w+) at", one.prompt).groups()
        goals = Counter(re.findall(r"scored for (\w+) in", one.prompt))
        first, verb, second, mine, yours = re.match(
            r"(\w+) (beat|and) (\w+) (?:drew )?(\d) to (\d) at .* on " + day + r"\.$", one.response
        ).groups()
        results[verb] += 1
        assert {first, second} == {home, away}
        assert (goals[first], goals[second]) == (int(mine), int(yours))
        assert (verb == "beat") == (mine > yours) and (verb == "and") == (mine == yours)
    assert results["and"] > 30 and results["beat"] > 200


def test_labels_follow_negations_and_concessions(examples: dict) -> None:
    praise = set("wonderful moving clever brilliant charming gripping fresh superb convincing graceful".split())
    for one in examples["classification"][0]:
        for sentence in one.prompt.splitlines()[0].removeprefix("Review: ").rstrip(".").split(". "):
            main_clause = sentence.split(", ")[-1]
            is_negated = re.search(r" not | never | anything but ", main_clause) is not None
            assert ((main_clause.split()[-1] in praise) != is_negated) == (one.response == "positive"), one
    labels = Counter(one.response for one in examples["classification"][0])
    assert min(labels.values()) > 150 and len(labels) == 2


def test_logs_keep_their_ship_and_route(examples: dict) -> None:
    for one in examples["generation"][0]:
        ship, start, end = re.match(r"Log of the (.+), (\w+) to (\w+), \d{4}\n\n", one.prompt).groups()
        lines = one.response.splitlines()
        assert [line.split(".")[0] for line in lines] == [f"Day {day}" for day in range(1, len(lines) + 1)]
        cargo = re.search(rf"The {ship} left {start} with (\w+)", lines[0])[1]
        assert lines[-1].endswith(f"The {ship} came to {end} with the {cargo}.")
