"""Whether Python and the packages are in the ranges that Longhaul's own metadata gives, and which extras are there."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pretrain.doctor.findings import Line, Request, failure, ok, skipped, warning

VersionOf = Callable[[str], str | None]
PURPOSES = {  # of the extras in setup.py
    "bench": "peers for `make bench`",
    "data": "near-duplicates, Wikipedia and languages in `prepare`",
    "docs": "`make docs`",
    "evals": "tasks of lm-eval",
    "gguf": "`convert --to gguf`",
    "gs": "data and checkpoints at gs://",
    "report": "pages and pictures of `launch/report.py`",
    "s3": "data and checkpoints at s3://",
    "tasks": "metrics of answers",
    "test": "`make test`",
    "wandb": "`log.wandb`",
}


def check(request: Request) -> Iterator[Line]:
    """Compare what is installed with what `setup.py` asks for."""
    try:
        own = distribution("longhaul")
    except PackageNotFoundError:
        yield warning(
            "longhaul", "is not installed in this environment, so that it is not known what it needs",
            "Run `make setup`, or `pip install -e .` in its folder.",
        )  # fmt: skip
        return
    yield ok("longhaul", own.version)
    yield judge_python(platform.python_version(), own.metadata["Requires-Python"] or "")
    needed = [Requirement(text) for text in own.requires or []]
    yield from judge_required([one for one in needed if is_wanted(one, "")], installed_version)
    for extra in own.metadata.get_all("Provides-Extra") or []:
        wanted = [one for one in needed if is_wanted(one, extra) and not is_wanted(one, "")]
        yield judge_extra(extra, wanted, installed_version)
    yield from judge_triton(_requires("torch"), installed_version)


def installed_version(package: str) -> str | None:
    """Return a package's version, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _requires(package: str) -> Sequence[str]:
    try:
        return requires(package) or []
    except PackageNotFoundError:
        return []


def is_wanted(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement holds on this system, with an extra or, if that is empty, without any."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def judge_python(found: str, wanted: str) -> Line:
    """Say whether this Python will do."""
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return ok("Python", f"{found} ({platform.python_implementation()}), within {wanted}")
    return failure(
        "Python", f"{found}; expected {wanted}",
        "Install that (Debian, Ubuntu: apt-get install python3.11-venv; conda create -n longhaul python=3.11) and run "
        "`make setup` with it.",
    )  # fmt: skip


def _misfits(requirements: Sequence[Requirement], version_of: VersionOf) -> Iterator[tuple[Requirement, str]]:
    for one in requirements:
        found = version_of(one.name)
        if found is None:
            yield one, f"{one.name} is not installed; expected {one.specifier}"
        elif not one.specifier.contains(found, prereleases=True):
            yield one, f"{one.name} is {found}; expected {one.specifier}"


def _install(requirements: Sequence[Requirement]) -> str:
    wanted = " ".join(f"'{one.name}{one.specifier}'" for one in requirements)
    return f"pip install {wanted}"


def judge_required(requirements: Sequence[Requirement], version_of: VersionOf) -> Iterator[Line]:
    """Yield a line for each package that is missing or of a wrong version, and one for the others."""
    wrong = list(_misfits(requirements, version_of))
    for one, text in wrong:
        yield failure(one.name, text, f"Run `{_install([one])}`, or `make setup` again.")
    names = {one.name for one, _ in wrong}
    right = [f"{one.name} {version_of(one.name)}" for one in requirements if one.name not in names]
    yield ok("required", f"{len(right)} of {len(requirements)} in their ranges: {', '.join(right)}")


def judge_extra(extra: str, requirements: Sequence[Requirement], version_of: VersionOf) -> Line:
    """Say whether an extra is installed, and well."""
    name, purpose = f"extra {extra}", PURPOSES.get(extra, "")
    wrong = list(_misfits(requirements, version_of))
    present = [one for one in requirements if version_of(one.name)]
    if not wrong:
        return ok(name, ", ".join(f"{one.name} {version_of(one.name)}" for one in requirements))
    missing = [one for one, _ in wrong if version_of(one.name) is None]
    if not present:
        names = ", ".join(one.name for one in missing)
        return skipped(name, f"not installed ({names}): for {purpose}", f"If wanted: pip install 'longhaul[{extra}]'.")
    if len(missing) == len(wrong):  # others' packages may have brought the rest
        return skipped(name, f"in part: {'; '.join(text for _, text in wrong)}",
                       f"If wanted for {purpose}: {_install(missing)}.")  # fmt: skip
    return warning(name, "; ".join(text for _, text in wrong), f"Run `{_install([one for one, _ in wrong])}`.")


def judge_triton(requirements_of_torch: Sequence[str], version_of: VersionOf) -> Iterator[Line]:
    """Say whether triton is the one that torch was built with; torch's CPU builds name none."""
    parsed = [Requirement(text) for text in requirements_of_torch]
    pinned = [one for one in parsed if one.name == "triton" and is_wanted(one, "")]
    found = version_of("triton")
    if found is None or version_of("torch") is None:
        return
    if not pinned:
        yield ok("triton and torch", f"triton {found} beside torch {version_of('torch')}, which asks for none")
    for one in pinned:
        if one.specifier.contains(found, prereleases=True):
            yield ok("triton and torch", f"triton {found} is the one that torch {version_of('torch')} asks for")
        else:
            yield warning(
                "triton and torch",
                f"triton is {found}; expected {one.specifier}, which torch {version_of('torch')} was built with",
                f"Run `{_install([one])}`.",
            )
