"""Read a config: YAML 1.2 and `key=value` overrides in, a checked `Config` out, or every problem with its place.

Data flow of `load_config`: YAML nodes -> plain values, each with the line it came from (`_Given`) -> overrides put
over them -> pydantic's models -> rules between options (`checks.py`). Each stage adds problems to one list, which
is reported at once, sorted by line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pretrain.errors import ConfigError
from pretrain.options.checks import check_options, idle_options
from pretrain.options.config import Config
from pretrain.options.config_docs import options, yaml_value
from pretrain.options.explain import OptionPath, dotted, explain, pattern, short
from pretrain.options.section import Section, option_of
from pretrain.options.spellings import suggest_option

_COMMAND_LINE = 10**9  # places on the command line sort behind all lines of a file
_LARGEST_EXACT = 2**53  # a float up to here that is a whole number is that number


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an option was given: its rank in the report, and how the report names it."""

    order: int
    text: str


_PlaceOf = Callable[[int], _Place]  # the place of a line, counted from 0


class _NotYaml(Exception):
    """A text is not YAML: the line, from 0, and the reason."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class _Given:
    """What the user wrote: nested plain values, the place of each, and the problems found so far."""

    def __init__(self, top: _Place) -> None:
        self.data: dict[str, Any] = {}
        self.places: dict[OptionPath, _Place] = {(): top}
        self.problems: list[tuple[_Place, str]] = []
        self.unreadable: set[OptionPath] = set()  # reported already: what pydantic says of them adds nothing

    def place_of(self, path: OptionPath) -> _Place:
        """Return the place of an option, or of the innermost section around it that was given."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def report(self, place: _Place, text: str) -> None:
        """Note a problem."""
        self.problems.append((place, text))

    def raise_problems(self) -> None:
        """Raise every problem noted so far, in the order of their places."""
        if self.problems:
            lines = [f"{place.text}: {text}" for place, text in sorted(self.problems, key=lambda item: item[0].order)]
            raise ConfigError("\n".join(dict.fromkeys(lines)))

    def names(self) -> set[str]:
        """Return the dotted names of everything that was given."""
        return {dotted(path) for path in self.places}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, put overrides over it and check everything.

    Args:
        path: YAML file.
        overrides: `section.option=value`, with the value in YAML; an item of a list is its number from 0, and
            `option=null` takes an option back to its default.

    Returns:
        the config, with `run.dir` filled in.

    Raises:
        ConfigError: every problem, one a line, each with `file:line` or `command line`.
    """
    given = _Given(_Place(1, f"{path}:1"))
    _read_file(given, Path(path))
    for number, override in enumerate(overrides):
        _put_override(given, override, _Place(_COMMAND_LINE + number, "command line"))
    config = _validate(given)
    if not config.run.dir:
        run = config.run.model_copy(update={"dir": f"runs/{Path(path).stem}"})
        config = config.model_copy(update={"run": run})
    return config


def parse_config(mapping: Mapping[str, Any]) -> Config:
    """Check a config that a run or a checkpoint stored with all its defaults.

    Raises:
        ConfigError: every problem, one a line.
    """
    given = _Given(_Place(0, "stored config"))
    given.data = json.loads(json.dumps(mapping))
    for path, value in _leaves(given.data):
        option = options().get(pattern(path))
        # A default that is written out asks for nothing, and so does a section that is null.
        if option is None or (value is not None if option.section else yaml_value(value) != option.default):
            given.places[path] = given.places[()]
    return _validate(given)


def resolved_yaml(config: Config) -> str:
    """Write a config with every default; `load_config` reads it back as an equal config.

    Options that do nothing in this config are there as comments, each with the reason.
    """
    idle = idle_options(config)
    lines: list[str] = []
    for section_name in type(config).model_fields:
        lines.append(f"{section_name}:")
        section = getattr(config, section_name)
        for key in type(section).model_fields:
            value, name = getattr(section, key), f"{section_name}.{option_of(key)}"
            if isinstance(value, list) and value and isinstance(value[0], Section):
                lines.append(f"  {key}:")
                for number, item in enumerate(value):
                    fields = _option_lines(item, f"{name}.{number}", idle)
                    lines += [("    - " if index == 0 else "      ") + line for index, line in enumerate(fields)]
        lines += [f"  {line}" for line in _option_lines(section, section_name, idle)]
    return "\n".join(lines) + "\n"


def _option_lines(section: Section, prefix: str, idle: Mapping[str, str]) -> list[str]:
    """Write the plain options of one section, one a line."""
    lines = []
    for key in type(section).model_fields:
        value, key = getattr(section, key), option_of(key)
        name = f"{prefix}.{key}"
        if isinstance(value, list) and value and isinstance(value[0], Section):
            continue
        if isinstance(value, Section):
            own = _option_lines(value, name, idle)
            holds = any(not line.startswith("#") for line in own)  # else YAML would read null
            lines += [f"{key}:" if holds else f"{key}: {{}}", *(f"  {line}" for line in own)]
            continue
        comment = f"  # {idle[name]}" if name in idle else ""
        lines.append(f"{'# ' if comment else ''}{key}: {yaml_value(value)}{comment}")
    return lines


def _leaves(value: Any, path: OptionPath = ()) -> Iterator[tuple[OptionPath, Any]]:
    """Yield each option of nested mappings with its path; a list of plain values is one option."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))
    else:
        yield path, value


# Reading YAML


def _read_file(given: _Given, path: Path) -> None:
    """Read a config file into `given`; raise where there is nothing to go on with."""

    def place(line: int) -> _Place:
        return _Place(line + 1, f"{path}:{line + 1}")

    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the file is not UTF-8 (byte {error.start}); expected a YAML file.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.{_other_files(path)}") from error
    try:
        root = _compose(text)
    except _NotYaml as error:
        raise ConfigError(f"{place(error.line).text}: the file is not YAML: {error}.") from error
    if root is None:
        raise ConfigError(
            f"{path}:1: the config is empty; expected sections such as model and data. See docs/config.md."
        )
    data = _plain(given, root, (), place)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: the config is {short(data)}; expected sections such as model and data.")
    given.data = data


def _other_files(path: Path) -> str:
    """Name config files that the user may have meant, if there are any beside `path`."""
    if (path / "config.yaml").is_file():
        return f" Did you mean {path / 'config.yaml'}?"
    names = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _compose(text: str) -> Node | None:
    """Return the YAML node of `text`, None if it holds nothing, or raise `_NotYaml`."""
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = str(error.problem)
        if "'\\t'" in reason:
            reason = "a tab is used for indentation; expected spaces"
        elif "another document" in reason:
            reason = "a second document begins; expected one"
        raise _NotYaml(mark.line if mark else 0, reason) from error
    except YAMLError as error:
        raise _NotYaml(0, str(error).splitlines()[0]) from error


def _plain(given: _Given, node: Node, path: OptionPath, place: _PlaceOf, inside: frozenset[int] = frozenset()) -> Any:
    """Turn a YAML node into plain values; note the place of each, and duplicate keys and odd tags as problems."""
    given.places.setdefault(path, place(node.start_mark.line))
    if id(node) in inside:
        given.report(
            place(node.start_mark.line), f"{dotted(path)} holds itself through an alias. Write the values out."
        )
        given.unreadable.add(path)
        return None
    inside |= {id(node)}
    if isinstance(node, SequenceNode):
        return [_plain(given, item, (*path, number), place, inside) for number, item in enumerate(node.value)]
    if isinstance(node, MappingNode):
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line
            if key in values:
                text = f"{dotted((*path, key))} is given twice; expected once. The first is on line {lines[key] + 1}."
                given.report(place(line), text)
                continue
            lines[key] = line
            given.places[(*path, key)] = place(line)
            values[key] = _plain(given, value_node, (*path, key), place, inside)
        return values
    assert isinstance(node, ScalarNode), "aliases are resolved by the composer"
    return _scalar(given, node, path, place)


def _scalar(given: _Given, node: ScalarNode, path: OptionPath, place: _PlaceOf) -> Any:
    """Return the value of a scalar: null, bool, int, float or text (a date is text)."""
    kind = str(node.tag).rpartition(":")[2]
    if kind in ("null", "bool", "int", "float"):
        value = YAML(typ="safe", pure=True).constructor.construct_object(node, deep=True)
        whole = isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_EXACT
        return int(value) if whole else value
    if kind not in ("str", "timestamp"):
        given.report(
            place(node.start_mark.line), f"{dotted(path)} has the tag {node.tag}; expected none. Drop the tag."
        )
        given.unreadable.add(path)
    return node.value


# Overrides


def _put_override(given: _Given, override: str, place: _Place) -> None:
    """Put one `key=value` over what was given, or note why it cannot be put."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        given.report(place, f"{override!r} is not an override; expected option=value, such as optim.lr=3e-4.")
        return
    if not text.strip():
        given.report(place, f"{name} has no value; expected {name}=value. {name}=null takes the default.")
        return
    parent: Any = given.data
    path: OptionPath = ()
    *sections, last = name.split(".")
    for segment in [*sections, last]:
        key = int(segment) if isinstance(parent, list) and segment.isdecimal() else segment
        if isinstance(parent, list) and not (isinstance(key, int) and key < len(parent)):
            given.report(place, f"{name} does not exist; {dotted(path)} has {len(parent)}, counted from 0.")
            return
        path = (*path, key)
        if len(path) == len(sections) + 1:
            break
        if isinstance(parent, dict) and parent.get(key) is None:
            parent[key] = {}
        parent = parent[key]
        if not isinstance(parent, (dict, list)):
            given.report(place, f"{name} does not exist; {dotted(path)} is {short(parent)}.")
            return
    try:
        node = _compose(text)
    except _NotYaml as error:
        given.report(place, f"{name} is {short(text)}; expected YAML: {error}.")
        return
    _forget(given, path)
    value = None if node is None else _plain(given, node, path, lambda line: place)
    if value is None and isinstance(parent, dict):
        parent.pop(path[-1], None)
        given.places.pop(path, None)
    else:
        parent[path[-1]] = value


def _forget(given: _Given, path: OptionPath) -> None:
    """Drop the places of an option and of everything in it."""
    for other in [other for other in given.places if other[: len(path)] == path]:
        del given.places[other]


# Checking


def _validate(given: _Given) -> Config:
    """Check what was given against the models and the rules between options; raise all problems."""
    for name in Config.model_fields:
        if name in given.data and given.data[name] is None:
            given.data[name] = {}  # `log:` with all its options commented out
    config, errors = _read_models(given.data)
    named = [one for error in errors for one in _where_given(given, *error)]
    texts = {path: explain(path, error_type, value) for path, error_type, value in named}
    for path, error_type, _ in named:
        misspelled = any(text.endswith(f"Did you mean {dotted(path)}?") for text in texts.values())
        if path not in given.unreadable and not (error_type == "missing" and misspelled):
            given.report(given.place_of(path), texts[path])
    if config is None and all(error_type == "extra_forbidden" for _, error_type, _ in errors):
        for path, _, _ in errors:
            _remove(given.data, path)
        config, _ = _read_models(given.data)  # values are right, so the rules between them can be checked as well
    if config is not None:
        for problem in check_options(config, given.names()):
            segments = [int(part) if part.isdecimal() else part for part in problem.option.split(".")]
            given.report(given.place_of(tuple(segments)), problem.text)
        known = [name for name in options() if "*" not in name]
        for number, name in enumerate(config.run.allow_changes):
            if name not in known:
                text = f"run.allow_changes has {short(name)}; expected options. {suggest_option(name, known)}"
                given.report(given.place_of(("run", "allow_changes", number)), text)
    given.raise_problems()
    assert config is not None, "a config that is not valid has problems, which were raised"
    return config


def _where_given(given: _Given, path: OptionPath, error_type: str, value: Any) -> Iterator[tuple[OptionPath, str, Any]]:
    """Yield an error, or one for each option that an override gives in a section that is unknown."""
    inside = [other for other in given.places if other[: len(path)] == path and other[:-1] not in given.places]
    if error_type == "extra_forbidden" and inside and path not in given.places:
        yield from ((other, error_type, value) for other in inside)
    else:
        yield path, error_type, value


def _read_models(data: dict[str, Any]) -> tuple[Config | None, list[tuple[OptionPath, str, Any]]]:
    """Return the config, or pydantic's errors: where, of which kind, and the value there."""
    try:
        # JSON's strict mode: no text or bool for a number, but lists for tuples
        return Config.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        # A default that depends on other options is missing where one of those is wrong, which is no problem by itself.
        found = [item for item in error.errors(include_url=False, include_context=False)
                 if item["input"] is not PydanticUndefined]  # fmt: skip
        return None, [(tuple(item["loc"]), item["type"], item["input"]) for item in found]


def _remove(data: Any, path: OptionPath) -> None:
    """Remove an option from nested values."""
    for segment in path[:-1]:
        data = data[segment]
    del data[path[-1]]
