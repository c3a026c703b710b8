"""What is wrong with one option, in words: `<name> is <value>; expected <rule>. <fix>`."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from typing import Any

from pretrain.options.config_docs import Option, options, yaml_value
from pretrain.options.spellings import suggest_option

OptionPath = tuple[str | int, ...]  # keys, and numbers for the items of lists


def explain(path: OptionPath, error_type: str, value: Any) -> str:
    """Write what pydantic found out about one option.

    Args:
        path: where.
        error_type: pydantic's name of the kind of error.
        value: what was given there.
    """
    known = options()
    name, option = dotted(path), known.get(pattern(path))
    if error_type == "extra_forbidden":
        return f"{name} is unknown; expected an option. {suggest_option(pattern(path), list(known))}"
    if option is None:  # an item of a list or of names of plain values
        holder = next(path[:end] for end in range(len(path) - 1, 0, -1) if pattern(path[:end]) in known)
        option = known[pattern(holder)]
        _, is_ruled, rule = option.rule.partition(", each ")
        if is_ruled and len(holder) == len(path) - 1:
            rule = rule.removeprefix("with ")
            return f"{name} is {short(value)}; expected {rule}.{_mend(replace(option, rule=rule), value)}"
        return f"{name} is {short(value)}; expected {dotted(holder)} to be {option.rule}."
    if error_type == "missing":
        inner = [inner.name.rpartition(".")[2] for inner in known.values() if _is_needed_in(inner, option)]
        rule = f"a section that gives {', '.join(inner)}" if option.section and inner else option.rule
        return f"{name} is missing; expected {rule}. Add it: {option.description}"
    return f"{name} is {short(value)}; expected {option.rule}.{_mend(option, value)}"


def _is_needed_in(inner: Option, section: Option) -> bool:
    """Say whether `inner` must be given in `section`."""
    return inner.required and inner.name.rpartition(".")[0] in (section.name, f"{section.name}.*")


_MENDS = {("parallel.offload", "nvme"): " Use optimizer, with parallel.nvme_dir for the folder on the disk."}
# Others' words for values.
_MEANT = {"cpu": "optimizer", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


def _meant(option: Option, value: Any) -> str | None:
    """Return the choice that a wrong value comes near."""
    if (meant := _MEANT.get(str(value).lower())) in option.choices:
        return meant
    return next(iter(difflib.get_close_matches(str(value).lower(), option.choices, n=1, cutoff=0.5)), None)


def _mend(option: Option, value: Any) -> str:
    """Return what to write instead of a wrong value, where that is clear."""
    if text := _MENDS.get((option.name, str(value).lower())):
        return text
    meant = _meant(option, value) if option.choices else None
    if option.rule.startswith(("a list of texts", "a list, each one of")) and isinstance(value, str):
        return f" Write [{yaml_value(meant or value)}]."
    if meant:
        return f" Use {meant}."
    if option.rule.startswith("true or false") or "true" in option.choices:
        words = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
        meant = words.get(str(value).lower())
        return f" Write {meant}." if meant else ""
    if option.choices:
        return ""
    if option.rule.startswith("text") and isinstance(value, (int, float)):
        return f' Put it in quotes: "{yaml_value(value)}".'
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9._]+(e[-+]?[0-9]+)?", value, re.IGNORECASE):
        return " Drop the quotes."
    if value is None and option.default is not None:
        return f" Leave it out for the default, {option.default}."
    return ""


def dotted(path: OptionPath) -> str:
    """Return the dotted name of an option."""
    return ".".join(str(segment) for segment in path) or "the config"


def pattern(path: OptionPath) -> str:
    """Return the dotted name of an option with `*` for the items of lists."""
    return ".".join("*" if isinstance(segment, int) else segment for segment in path)


def short(value: Any) -> str:
    """Write a value for a message; a long one is cut."""
    text = f"'{value}'" if isinstance(value, str) else yaml_value(value)
    return text if len(text) <= 60 else text[:57] + "..."
