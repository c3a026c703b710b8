"""Short texts about people, matches, films and voyages that do not exist, with what is to be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from pretrain.tasks.task_grammars import Example, pick

_FIRST_NAMES = (
    "Ada Bruno Clara David Elena Felix Greta Hugo Irene Jonas Karla Leon Maria Nils Olga Peter Rosa Simon".split()
)
_LAST_NAMES = (
    "Adler Brook Costa Dunn Ekman Ford Grant Holt Ivers Jansen Klein Lang Moser Novak Olsen Park Quist Reed".split()
)
_CITIES = "Bergen Lisbon Vienna Dublin Prague Geneva Oslo Riga Turin Cork Ghent Basel Porto Malmo Leeds Graz".split()
_JOBS = "painter,baker,teacher,doctor,lawyer,farmer,pilot,tailor,writer,singer,chemist,printer".split(",")
UNANSWERABLE = "unanswerable"


_SAID = ("{name} is a {job} from {home}.", "The {job} from {home} is {name}.")
_ASKED = (
    ("Where is {name} from?", "home"), ("Where is the {job} from?", "home"), ("What is {name}?", "job"),
    ("Who is from {home}?", "name"), ("Who is the {job}?", "name"), ("How old is {name}?", ""),
    ("What is said about {name}?", "said"), ("What is said about the {job}?", "said"),
)  # fmt: skip


def make_question(random: Random) -> Example:
    """A context with facts about two people and a question whose answer is a span of it, or is not in it.

    The layout is that of SQuAD's documents (`dataset_files`). Nothing is true of both people, so that a kind of answer
    alone leaves two to choose from.
    """
    first_names, last_names, cities, jobs = (
        _distinct(random, items, 2) for items in (_FIRST_NAMES, _LAST_NAMES, _CITIES, _JOBS)
    )
    people = [
        {"name": f"{first} {last}", "home": city, "job": job}
        for first, last, city, job in zip(first_names, last_names, cities, jobs, strict=True)
    ]
    for person in people:
        person["said"] = pick(random, _SAID).format(**person)
    background = " ".join(person["said"] for person in people)
    asked, (question, answer) = pick(random, people), pick(random, _ASKED)
    return Example(
        f"Background: {background}\n\nQ: {question.format(**asked)}\nA:\n",
        asked.get(answer, UNANSWERABLE),
        frozenset(person["name"] for person in people),
    )


def _distinct(random: Random, items: Sequence[str], count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        one = pick(random, items)
        if one not in found:
            found.append(one)
    return found


_TEAMS = (
    "Arden Belmont Carlow Derby Elgin Falkirk Galway Hexham Ilford Jarrow Kendal Ludlow Marlow Newry Oakham Penrith"
    " Rugby Stafford"
).split()
_GROUNDS = "North Park,Mill Lane,Harbour Road,King's Field,the Old Meadow,Bridge Street".split(",")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_WEATHER = "It rained,It was cold,A strong wind blew,The sun was shining,It was warm".split(",")


def make_summary(random: Random) -> Example:
    """A report of a match, goal by goal, and one line with who won, how, where and when: goals are to be counted."""
    home, away = pick(random, _TEAMS), pick(random, _TEAMS)
    while away == home:
        away = pick(random, _TEAMS)
    ground, day = pick(random, _GROUNDS), pick(random, _DAYS)
    num_goals = int(random.random() * 4)
    minutes = sorted({1 + int(random.random() * 89) for _ in range(num_goals)})
    scorers = [pick(random, (home, away)) for _ in minutes]
    lines = [f"{pick(random, _WEATHER)}."] if random.random() < 0.5 else []
    lines += [
        f"{pick(random, _LAST_NAMES)} scored for {team} in minute {minute}."
        for team, minute in zip(scorers, minutes, strict=True)
    ]
    goals = {team: scorers.count(team) for team in (home, away)}
    first, second = (home, away) if goals[home] >= goals[away] else (away, home)
    result = f"{goals[first]} to {goals[second]}"
    verb = f"{first} beat {second} {result}" if goals[first] > goals[second] else f"{home} and {away} drew {result}"
    opening = f"On {day} {home} met {away} at {ground}."
    return Example(
        f"Report: {' '.join([opening, *lines])}\nSummary:\n",
        f"{verb} at {ground} on {day}.",
        frozenset([" ".join(sorted((home, away)))]),
    )


_ASPECTS = (
    "plot,music,ending,acting,dialogue,camera work,pace,cast,script,humour,opening,story,hero,editing,lighting,costumes"
).split(",")
_PRAISE = "wonderful,moving,clever,brilliant,charming,gripping,fresh,superb,convincing,graceful".split(",")
_BLAME = "boring,dull,clumsy,awful,tired,silly,weak,dreadful,lifeless,careless".split(",")
_IS = {True: ("is", "was", "seemed", "felt"), False: ("is not", "was never", "did not seem", "was anything but")}
_CONCEDE = ("Although", "Even though", "While")


def make_label(random: Random) -> Example:
    """A review of a film and whether it is positive or negative: negations turn words round, concessions weigh less."""
    is_positive = pick(random, (True, False))
    content: set[str] = set()
    used: set[str] = set()
    sentences = []
    for _ in range(1 + int(random.random() * 2)):
        main = _opinion(random, is_positive, content, used)
        if random.random() < 0.3:
            other = _opinion(random, not is_positive, content, used)
            sentences.append(f"{pick(random, _CONCEDE)} the {other}, the {main}.")
        else:
            sentences.append(f"The {main}.")
    response = "positive" if is_positive else "negative"
    return Example(f"Review: {' '.join(sentences)}\nSentiment:\n", response, frozenset(content))


def _opinion(random: Random, is_positive: bool, content: set[str], used: set[str]) -> str:
    """What is said of one aspect; aspect and word together are content."""
    aspect = pick(random, _ASPECTS)
    while aspect in used:
        aspect = pick(random, _ASPECTS)
    used.add(aspect)
    is_plain = random.random() < 0.8
    word = pick(random, _PRAISE if is_positive == is_plain else _BLAME)
    content.add(f"{aspect} {word}")
    return f"{aspect} {pick(random, _IS[is_plain])} {word}"


_SHIPS = "Marigold,North Star,Heron,Constance,Swan,Good Hope,Eagle,Meridian,Rose,Falcon".split(",")
_HARBOURS = "Bergen,Cadiz,Lisbon,Hull,Malta,Genoa,Danzig,Bristol,Naples,Tangier,Riga,Bordeaux".split(",")
_CARGO = "salt,timber,wool,copper,oranges,tar,glass,grain,wine,iron".split(",")
_WINDS = "north,north-east,east,south-east,south,south-west,west,north-west".split(",")
_SAILS = {"calm": "all sails set", "slight": "all sails set", "high": "two sails set", "rough": "no sail set"}


def make_log(random: Random) -> Example:
    """The heading of a ship's log and its pages: the days go up, ship and harbours come again, sails suit the sea."""
    ship, (start, end) = pick(random, _SHIPS), (pick(random, _HARBOURS), pick(random, _HARBOURS))
    while end == start:
        end = pick(random, _HARBOURS)
    first, second = pick(random, _CARGO), pick(random, _CARGO)
    cargo = first if first == second else f"{first} and {second}"
    lines = [f"Day 1. The {ship} left {start} with {cargo}."]
    num_days = 3 + int(random.random() * 2)
    for day in range(2, num_days):
        sea = pick(random, tuple(_SAILS))
        lines.append(f"Day {day}. Wind {pick(random, _WINDS)}, sea {sea}, {_SAILS[sea]}.")
    lines.append(f"Day {num_days}. The {ship} came to {end} with the {first}.")
    year = 1800 + int(random.random() * 90)
    return Example(f"Log of the {ship}, {start} to {end}, {year}\n\n", "\n".join(lines), frozenset([f"{start} {end}"]))
