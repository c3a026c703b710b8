"""Sentences out of grammars: English with its German, with agreement and word order; and with their labelled roles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A prompt with its answer, and what of its content decides between training and held out.

    Attributes:
        prompt: ends with a line end, behind which the response begins.
        response: the right answer.
        content: combinations in it that a held-out example shares with no training example.
    """

    prompt: str
    response: str
    content: frozenset[str]


Make = Callable[[Random], Example]


def pick(random: Random, items: Sequence[T]) -> T:
    """One of the items; for one state of the generator the same in every version of Python."""
    return items[int(random.random() * len(items))]


def capital(text: str) -> str:
    """The text with a capital letter in front."""
    return text[:1].upper() + text[1:]


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    """Entries between commas, their words apart; a hyphen is a space inside of one."""
    return tuple(tuple(word.replace("-", " ") for word in entry.split()) for entry in text.split(","))


# English, German, gender.
_NOUNS = _table(
    "house Haus n, garden Garten m, letter Brief m, book Buch n, lamp Lampe f,"
    "table Tisch m, chair Stuhl m, bottle Flasche f, picture Bild n, window Fenster n, door Tür f, car Auto n,"
    "train Zug m, ship Schiff n, street Straße f, city Stadt f, village Dorf n, bridge Brücke f, river Fluss m,"
    "lake See m, tree Baum m, flower Blume f, apple Apfel m, bread Brot n, coat Mantel m, shirt Hemd n, bag Tasche f,"
    "key Schlüssel m, clock Uhr f, knife Messer n, cup Tasse f"
)
_PEOPLE = _table(
    "dog Hund m, cat Katze f, horse Pferd n, teacher Lehrer m, doctor Arzt m, child Kind n, woman Frau f,"
    "friend Freund m, sister Schwester f, guest Gast m"
)
# English, German without its ending.
_ADJECTIVES = _table(
    "old alt, new neu, small klein, big groß, red rot, green grün, white weiß, black schwarz, beautiful schön,"
    "young jung, long lang, good gut, cheap billig, heavy schwer, quiet ruhig, strange seltsam, clean sauber,"
    "warm warm, cold kalt, famous berühmt"
)
# English: base, third person, past; German: infinitive, with ich, du, er and wir (as with the second sie), participle.
_VERBS = _table(
    "see sees saw sehen sehe siehst sieht sehen gesehen, find finds found finden finde findest findet finden gefunden,"
    "buy buys bought kaufen kaufe kaufst kauft kaufen gekauft, paint paints painted malen male malst malt malen gemalt,"
    "sell sells sold verkaufen verkaufe verkaufst verkauft verkaufen verkauft,"
    "look-for looks-for looked-for suchen suche suchst sucht suchen gesucht,"
    "bring brings brought bringen bringe bringst bringt bringen gebracht,"
    "take takes took nehmen nehme nimmst nimmt nehmen genommen,"
    "know knows knew kennen kenne kennst kennt kennen gekannt,"
    "forget forgets forgot vergessen vergesse vergisst vergisst vergessen vergessen,"
    "draw draws drew zeichnen zeichne zeichnest zeichnet zeichnen gezeichnet,"
    "show shows showed zeigen zeige zeigst zeigt zeigen gezeigt"
)
# English, German, which of the German forms of a verb.
_PRONOUNS = (
    ("I", "ich", 0),
    ("you", "du", 1),
    ("he", "er", 2),
    ("she", "sie", 2),
    ("we", "wir", 3),
    ("they", "sie", 3),
)
_HAVE = ("habe", "hast", "hat", "haben")
_MODALS = {
    "can": ("kann", "kannst", "kann", "können"),
    "must": ("muss", "musst", "muss", "müssen"),
    "may": ("darf", "darfst", "darf", "dürfen"),
}
_PLACES = (("in", "in"), ("behind", "hinter"), ("beside", "neben"), ("under", "unter"))
_TIMES = {False: (("today", "heute"), ("now", "jetzt")), True: (("yesterday", "gestern"), ("in May", "im Mai"))}
# By case and gender: the definite article, the adjective's ending behind it, the indefinite article, likewise.
_ARTICLES = {
    "nominative": {"m": ("der", "e", "ein", "er"), "f": ("die", "e", "eine", "e"), "n": ("das", "e", "ein", "es")},
    "accusative": {"m": ("den", "en", "einen", "en"), "f": ("die", "e", "eine", "e"), "n": ("das", "e", "ein", "es")},
    "dative": {"m": ("dem", "en", "einem", "en"), "f": ("der", "en", "einer", "en"), "n": ("dem", "en", "einem", "en")},
}


def _noun_phrase(
    random: Random, nouns: Sequence[tuple[str, ...]], case: str, content: set[str], is_definite: bool = True,
    is_negated: bool = False,
) -> tuple[str, str, str]:  # fmt: skip
    """English, German and the English noun; an adjective with its noun is content. Negated, `a` is `kein`."""
    (noun, wort, gender), adjective, stem = pick(random, nouns), "", ""
    if random.random() < 0.8:
        adjective, stem = pick(random, _ADJECTIVES)
        content.add(f"{adjective} {noun}")
    definite, weak, indefinite, strong = _ARTICLES[case][gender]
    article, ending = (definite, weak) if is_definite else (indefinite, strong)
    if is_negated and not is_definite:
        article = f"k{article}"
    words = " ".join(filter(None, (adjective, noun)))
    english = f"the {words}" if is_definite else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return english, " ".join(filter(None, (article, stem and stem + ending, wort))), noun


def make_translation(random: Random) -> Example:
    """An English sentence and its German: gender, case, endings, the verb in second place, its rest at the end."""
    kind = pick(random, ("present", "past", "modal", "negated"))
    base, third, past, infinitive, *forms, participle = pick(random, _VERBS)
    content: set[str] = set()
    if random.random() < 0.4:
        subject, subjekt, _ = _noun_phrase(random, _PEOPLE, "nominative", content)
        person = 2
    else:
        subject, subjekt, person = pick(random, _PRONOUNS)
    is_definite = random.random() < 0.6
    thing, ding, noun = _noun_phrase(random, _NOUNS + _PEOPLE, "accusative", content, is_definite, kind == "negated")
    content.add(f"{base} {noun}")
    end = ""
    if kind == "modal":
        modal = pick(random, tuple(_MODALS))
        verb, finite, end = f"{modal} {base}", _MODALS[modal][person], f" {infinitive}"
    elif kind == "past":
        verb, finite, end = past, _HAVE[person], f" {participle}"
    elif kind == "negated":
        verb, finite, end = f"{'does' if person == 2 else 'do'} not {base}", forms[person], " nicht" * is_definite
    else:
        verb, finite = third if person == 2 else base, forms[person]
    if kind != "negated" and random.random() < 0.3:
        (where, wo), (place, ort, _) = pick(random, _PLACES), _noun_phrase(random, _NOUNS, "dative", content)
        thing, ding = f"{thing} {where} {place}", f"{ding} {wo} {ort}".replace(" in dem ", " im ")
    english, german = f"{subject} {verb} {thing}.", f"{subjekt} {finite} {ding}{end}."
    if random.random() < 0.3:  # something else comes before the verb, and the subject behind it
        time, zeit = pick(random, _TIMES[kind == "past"])
        english, german = f"{time} {english}", f"{zeit} {finite} {subjekt} {ding}{end}."
    return Example(f"English: {capital(english)}\nGerman:\n", capital(german), frozenset(content))


_AGENTS = (
    "farmer nurse painter baker soldier lawyer pilot student widow tailor singer miner judge sailor gardener clerk"
    " captain neighbour merchant poet"
).split()
_THINGS = (
    "letter vase window door lamp boat bicycle fence map gate parcel ladder clock kettle mirror basket piano cart"
    " curtain barrel"
).split()
_PERSONAL, _MATERIAL = "old young tall tired famous".split(), "new wooden small heavy blue".split()
_WHOLE = "the {}|the {}|the {}|a {}|a {}|her {}|her {}|the {} from Rome".split("|")
# Past, participle.
_GIVING = _table("gave given, sold sold, sent sent, showed shown, lent lent, handed handed, offered offered")
_DOING = _table(
    "repaired repaired, painted painted, found found, carried carried, cleaned cleaned, stole stolen, drew drawn"
)
_CHANGING = _table("opened opened, broke broken, closed closed, moved moved, burned burned")
_MODIFIERS = {
    "ARGM-TMP": "on Monday|last week|in the morning|after the storm|in 1950|at noon".split("|"),
    "ARGM-LOC": "in the kitchen|at the harbour|near the church|behind the mill|in Rome".split("|"),
    "ARGM-MNR": "slowly|with great care|in silence|quickly|without a word".split("|"),
}


def _phrase(random: Random, nouns: Sequence[str], adjectives: Sequence[str]) -> tuple[str, str]:
    """A noun phrase, and its noun."""
    noun = pick(random, nouns)
    words = f"{pick(random, adjectives)} {noun}" if random.random() < 0.4 else noun
    phrase = pick(random, _WHOLE).format(words)
    return phrase.replace("a old", "an old"), noun


def make_roles(random: Random) -> Example:
    """A sentence and its roles as PropBank numbers them: active, passive, with either order of two objects.

    The spans are in the sentence's order and hold their prepositions; auxiliaries belong to none.

    Source: Palmer, Gildea and Kingsbury 2005, The Proposition Bank, sections 3 and 4.
    """
    kind = pick(random, ("giving", "giving", "doing", "changing"))
    past, participle = pick(random, {"giving": _GIVING, "doing": _DOING, "changing": _CHANGING}[kind])
    (agent, who), (other, _) = _phrase(random, _AGENTS, _PERSONAL), _phrase(random, _AGENTS, _PERSONAL)
    thing, what = _phrase(random, _THINGS, _MATERIAL)
    content = {f"{past} {what}"}
    parts: list[tuple[str, str]]
    is_passive, has_agent = random.random() < 0.35, True
    if is_passive:
        parts = [("ARG1", thing), ("", "was"), ("V", participle)]
        parts += [("ARG2", f"to {other}")] if kind == "giving" else []
        has_agent = random.random() < 0.7
        parts += [("ARG0", f"by {agent}")] if has_agent else []
    elif kind == "giving":
        objects = [("ARG1", thing), ("ARG2", f"to {other}")], [("ARG2", other), ("ARG1", thing)]
        parts = [("ARG0", agent), ("V", past), *pick(random, objects)]
    elif kind == "changing" and random.random() < 0.5:
        parts, has_agent = [("ARG1", thing), ("V", past)], False
    else:
        parts = [("ARG0", agent), ("V", past), ("ARG1", thing)]
    if has_agent:
        content.add(f"{who} {past}")
    roles = [role for role in _MODIFIERS if random.random() < 0.25][:2]
    modifiers = [(role, pick(random, _MODIFIERS[role])) for role in roles]
    if modifiers and modifiers[0][0] == "ARGM-TMP" and random.random() < 0.5:
        parts = [modifiers.pop(0), ("", ","), *parts]
    parts += reversed(modifiers)
    parts[0] = parts[0][0], capital(parts[0][1])
    sentence = " ".join(text for _, text in parts).replace(" ,", ",")
    response = " | ".join(f"{role}: {text}" for role, text in parts if role)
    return Example(f"Sentence: {sentence}.\nRoles:\n", response, frozenset(content))
