"""The batch script of a run: `launch/slurm/pretrain.sbatch` with its settings filled in, and nothing else changed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "launch/slurm/pretrain.sbatch"
PROGRAM = ROOT / "launch/pretrain.py"
_LINE = "#SBATCH --"
_ARGUMENTS = "# [ $# -gt 0 ] || set -- "
_END = "# Settings end."


@dataclass(frozen=True)
class ScriptSettings:
    """What a batch script is filled in with.

    Attributes:
        options: of sbatch by their long names, without dashes.
        extra_options: further ones, as they are given to sbatch; they win.
        arguments: of `launch/pretrain.py`: CONFIG and overrides.
        python: on the nodes, or in the container.
        container: what stands between `srun` and Python; empty for none.
        variables: of the environment of the job, by name.
        command: that wrote it, for people.
        path: where the script will be.
        folder: that the job runs in, and that relative paths are of.
    """

    options: Mapping[str, str]
    arguments: Sequence[str]
    python: str
    command: Sequence[str]
    path: Path
    folder: Path
    extra_options: Sequence[str] = ()
    container: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def fill_in(template: str, settings: ScriptSettings) -> str:
    """Return a template's text with its settings filled in; what it has no setting for stays as it is.

    Args:
        template: `launch/slurm/pretrain.sbatch`, perhaps with lines that suit the cluster.
        settings: what to put there.
    Raises:
        ConfigError: the template has lost a line of its settings.
    """
    head, _, body = template.partition("\n\n")
    lines = [head.partition("\n")[0], *_head(settings), "", *body.splitlines()]
    for name, value in settings.options.items():
        _set_option(lines, name, value)
    after = _last(lines, _LINE) + 1
    lines[after:after] = [f"#SBATCH {_quoted(option)}" for option in settings.extra_options]
    program = "launch/pretrain.py" if settings.folder == ROOT else str(PROGRAM)
    _replace(lines, "PYTHON=", f"PYTHON={shlex.quote(settings.python)}")
    _replace(lines, "PROGRAM=", f"PROGRAM={shlex.quote(program)}")
    _replace(lines, _ARGUMENTS, f"[ $# -gt 0 ] || set -- {shlex.join(settings.arguments)}")
    if settings.container:
        _replace(lines, "container=(", f"container=({shlex.join(settings.container)})")
    end = _find(lines, _END)
    lines[end:end] = [f"export {name}={shlex.quote(value)}" for name, value in settings.variables.items()]
    return "\n".join(lines) + "\n"


def _head(settings: ScriptSettings) -> list[str]:
    """The comment at the beginning: how it came about and how to use it again."""
    return [
        "# Written from launch/slurm/pretrain.sbatch by",
        "#",
        f"#   {shlex.join(settings.command)}",
        "#",
        f"# in {settings.folder}. The same once more, without the checks: sbatch {shlex.quote(str(settings.path))}",
        "# docs/slurm.md explains every line.",
    ]


def _set_option(lines: list[str], name: str, value: str) -> None:
    """Set an `#SBATCH` line, with the comment that it has, or add it behind the others."""
    option = f"#SBATCH {_quoted(f'--{name}={value}' if value else f'--{name}')}"
    for number, line in enumerate(lines):
        if re.match(rf"#SBATCH --{name}\b(?!-)", line):
            _, mark, comment = line.partition("  #")
            lines[number] = f"{option:<35}{mark[1:]}{comment}" if mark else option
            return
    lines.insert(_last(lines, _LINE) + 1, option)


def _quoted(option: str) -> str:
    """Write an option as an `#SBATCH` line takes it."""
    name, sign, value = option.partition("=")
    if not re.search(r"[\s\"'#\\]", value):
        return option
    return f'{name}{sign}"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _replace(lines: list[str], start: str, new: str) -> None:
    lines[_find(lines, start)] = new


def _find(lines: Sequence[str], start: str) -> int:
    found = [number for number, line in enumerate(lines) if line.startswith(start)]
    if len(found) != 1:
        raise ConfigError(
            f"{TEMPLATE}: lines that begin with {start!r} are {len(found)}; expected one, which is filled in. Restore "
            "it."
        )
    return found[0]


def _last(lines: Sequence[str], start: str) -> int:
    return max(number for number, line in enumerate(lines) if line.startswith(start))


def enter_container(image: str, folders: Sequence[Path], folder: Path, has_gpus: bool) -> list[str]:
    """Return what runs a command in a container image, with folders where they are outside.

    Args:
        image: a `.sif` file, for Apptainer; or else what Pyxis takes: a `.sqsh` file or a name in a registry.
        folders: that training reads or writes.
        folder: that it runs in.
        has_gpus: whether GPUs are passed on; Pyxis passes what the job has.
    """
    mounts = [str(path) for path in covering(folders)]
    if image.endswith(".sif"):
        gpus = ["--nv"] if has_gpus else []
        return ["apptainer", "exec", *gpus, "--pwd", str(folder), "--bind", ",".join(mounts), image]
    pairs = ",".join(f"{path}:{path}" for path in mounts)
    return [f"--container-image={image}", f"--container-mounts={pairs}", f"--container-workdir={folder}"]


def covering(folders: Sequence[Path]) -> list[Path]:
    """Return the folders, and what they are links to, without those that are in another one of them."""
    every = {path for folder in folders for path in (folder.absolute(), folder.resolve())}
    return sorted(path for path in every if not any(other in path.parents for other in every))
