"""The code in the documentation is true: commands, configs, Python, JSON.

Each block says its language. `bash`, `sh` and `console` are commands, whose files, targets, flags and options exist; `yaml`
is a config, a part of one or a task; `python` compiles, and is run where a comment `<!-- run -->` stands before it; `json`
parses; `text` is what is printed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints.weights_checkpoint import write_weights
from pretrain.options.settings import load_config
from tests.docs.doc_pages import BLOCKS, PAGES, SECTIONS, Block, text_of
from tests.helpers.rank_helpers import ROOT

LANGUAGES = {"bash", "sh", "console", "yaml", "python", "json", "text"}
# Programs that are not ours: their own arguments are theirs.
FOREIGN = set(
    "apptainer apt-get aws break cd cp docker done export for git grep if in ip llama-cli mkdir nvidia-smi ollama pdsh pip"
    " pre-commit sacct salloc sbatch scancel scontrol sed set sinfo sleep source squeue ssh tail tensorboard wandb".split()
)
# What stands for something of the reader's in a command, and what it is taken for.
STANDS_FOR = {"N": "8", "K": "3", "$SLURM_ARRAY_TASK_ID/16": "1/16"}


def named(language: str) -> Any:
    chosen = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", chosen, ids=[f"{one.page}:{one.line}" for one in chosen])


def test_every_block_says_its_language() -> None:
    assert [f"{one.page}:{one.line}: {one.language!r}" for one in BLOCKS if one.language not in LANGUAGES] == []


# --- commands


class Parsed(Exception):
    """A command's arguments were understood."""


def parse_only(parse: Any) -> Any:
    """Have a parser's method end its command when it has read the arguments."""

    def read(self: ArgumentParser, *arguments: Any) -> Namespace:
        raise Parsed(parse(self, *arguments))

    return read


def simple_commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell script, each as words; redirections and variables before them are left out."""
    lexer = shlex.shlex(text.replace("\\\n", " ").replace("$'", "'"), posix=True, punctuation_chars=";&|<>()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    is_file = False  # of a redirection
    for token in lexer:
        if is_file or set(token) <= set("<>"):
            is_file = not is_file
        elif set(token) <= set(";&|()\n"):
            if words and ")" not in token:  # a pattern of `case` is none
                yield words
            words = []
        elif words or (token not in ("do", "then", "else", "fi", "esac") and not re.match(r"[A-Z_a-z]\w*=", token)):
            words.append(token)
    if words:
        yield words


def without_comments(text: str) -> str:
    """Shell lines without comments, which may have apostrophes in them."""
    lines = []
    for line in text.splitlines():
        quote = ""
        for place, letter in enumerate(line):
            if letter in "'\"" and quote in ("", letter):
                quote = "" if quote else letter
            elif letter == "#" and not quote and (place == 0 or line[place - 1] in " \t"):
                line = line[:place]
                break
        lines.append(line.rstrip())
    return "\n".join(lines)


@functools.cache
def launcher_flags() -> dict[str, list[str]]:
    """The flags of `deepspeed` and of `torchrun`, from their own parsers, in a process of their own."""
    code = (
        "import argparse, json\nflags = {}\ndef keep(self, *rest, **others):\n"
        "    flags[self.prog] = list(self._option_string_actions)\n    raise KeyError\n"
        "argparse.ArgumentParser.parse_args = keep\n"
        "import deepspeed.launcher.runner as runner, torch.distributed.run as run\n"
        "flags['torchrun'] = list(run.get_args_parser()._option_string_actions)\n"
        "try: runner.parse_args([])\nexcept KeyError: pass\n"
        "flags['deepspeed'] = next(value for key, value in flags.items() if key != 'torchrun')\n"
        "print(json.dumps(flags))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The config of the README, which stands for every config of a reader."""
    return write_mine(tmp_path)


def write_mine(folder: Path) -> Path:
    [text] = [block.text for block in BLOCKS if block.page == Path("README.md") and block.language == "yaml"]
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return folder / "mine.yaml"


def check_launch(name: str, words: list[str], mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a command of launch/ read its arguments; configs and overrides are those of a config that is right."""
    command = importlib.import_module(f"launch.{name}")
    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(ArgumentParser, method, parse_only(getattr(ArgumentParser, method)))
    try:
        command.main([STANDS_FOR.get(word, word) for word in words])
        raise AssertionError(f"launch/{name}.py ran: it reads its arguments in a way that this test does not know")
    except Parsed as parsed:
        arguments = parsed.args[0]
    except SystemExit as error:
        assert error.code == 0 and "--help" in words, f"launch/{name}.py does not understand {words}"
        return
    finally:
        monkeypatch.undo()
    config = getattr(arguments, "config", None)
    overrides = [word for word in getattr(arguments, "overrides", None) or [] if "=" in word]
    if config is None and not overrides:
        return
    known = ROOT / (config or "")
    if isinstance(config, str) and config.startswith("configs/"):
        assert known.is_file() or config == "configs/mine.yaml", f"{config} does not exist"
    overrides = [word for word in overrides if "…" not in word]
    load_config(known if config and known.is_file() else mine, overrides)


def check_words(words: list[str], mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one command: its program, the files that it names, the flags that are ours."""
    words = [word for word in words if word not in ("…",)]
    for word in words:  # `sbatch --wrap 'python launch/prepare.py …'`, `container launch/pretrain.py`
        if " launch/" in word or word.startswith("python launch/"):
            for inner in simple_commands(without_comments(word)):
                check_words(inner, mine, monkeypatch)
    program = Path(words[0]).name
    for word in words:
        if re.match(r"(launch|configs|benchmarks|docs|tests|examples)/[\w./-]+$", word) and word != "configs/mine.yaml":
            assert (ROOT / word).exists(), f"{word} does not exist"
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):.*## ", text_of(Path("Makefile")), re.MULTILINE))
        asked = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
        assert asked <= targets, f"make has no target {asked - targets}"
    if program == "longhaul" and words[1:] not in ([], ["--help"]):
        from launch.cli import COMMANDS

        assert words[1] in COMMANDS, words
        check_launch(COMMANDS[words[1]][0], words[2:], mine, monkeypatch)
    for place, word in enumerate(words):
        script = re.fullmatch(r"(?:.*/)?(launch|benchmarks|docs)/(\w+)\.py", word)
        module = re.fullmatch(r"launch\.(\w+)", word) if words[place - 1] == "-m" else None
        if script and script[1] == "launch" or module:
            check_launch((script and script[2]) or (module and module[1]) or "", words[place + 1 :], mine, monkeypatch)
            check_launcher(words[:place])
            return
        if script and "/" not in word.removeprefix(f"{script[1]}/"):
            source = text_of(Path(word))
            for flag in words[place + 1 :]:
                if flag.startswith("--") and flag != "--help":
                    assert f'"{flag.partition("=")[0]}"' in source, f"{word} has no {flag}"
            return
    if program in ("python", "python3", "bash"):
        if "-m" in words[1:3]:
            module_name = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module_name) is not None, f"no module {module_name}"
        elif "-c" in words:
            compile(words[words.index("-c") + 1], "-c", "exec")
        return
    assert program in FOREIGN | {"make", "deepspeed", "torchrun", "srun", "echo", "status", "case", "longhaul", "*"}, (
        f"{program} is neither ours nor one of FOREIGN"
    )


def check_launcher(words: list[str]) -> None:
    """Check the flags between `deepspeed` or `torchrun` and the script."""
    for place, word in enumerate(words):
        if (name := Path(word).name) in ("deepspeed", "torchrun"):
            for flag in words[place + 1 :]:
                if flag.startswith("--") and " " not in flag:
                    known = launcher_flags()[name]
                    spelt = {flag.partition("=")[0], flag.partition("=")[0].replace("-", "_")}
                    assert spelt & set(known), f"{name} has no {flag}"


@named("bash")
def test_commands_exist_with_their_files_and_flags(block: Block, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_script(block.text, mine, monkeypatch)


@named("sh")
def test_scripts_exist_with_their_files_and_flags(block: Block, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_script(block.text, mine, monkeypatch)


@named("console")
def test_commands_that_are_shown_with_their_output(block: Block, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    assert typed, "no line begins with `$ `"
    check_script("\n".join(typed), mine, monkeypatch)


def check_script(text: str, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["bash", "-n"], input=text.replace("…", ""), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in simple_commands(without_comments(text)):
        check_words(words, mine, monkeypatch)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parts[:2] != ("docs", "notes")], ids=str)
def test_commands_in_the_text(page: Path, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"^( *)(```+).*?^ *\2 *$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`((?:python (?:launch|benchmarks)/|make |deepspeed |torchrun )[^`]+)`", text):
        words = code.split()
        if "…" not in code and not words[-1].endswith(".py"):  # a command, not its name
            for command in simple_commands(without_comments(" ".join(words))):
                check_words(command, mine, monkeypatch)


# --- configs


@named("yaml")
def test_yaml_is_a_config_or_a_part_of_one(block: Block, tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    for text in fragments(block.text):
        content = YAML(typ="safe").load(text)
        if "task" in content:  # a task of lm-eval
            continue
        assert set(content) <= SECTIONS, f"{set(content) - SECTIONS} are no sections of a config"
        whole = YAML(typ="safe").load(write_mine(tmp_path).read_text(encoding="utf-8"))
        if not {"data", "model", "optim", "train", "tokenizer"} <= set(content):
            merge(whole, content)
            content = whole
        with open(tmp_path / "part.yaml", "w", encoding="utf-8") as file:
            YAML(typ="safe").dump(content, file)
        load_config(tmp_path / "part.yaml")


def fragments(text: str) -> list[str]:
    """One config, or the lines of a list of alternatives, each of which begins with the same section."""
    lines = text.splitlines()
    heads = [line.partition(":")[0] for line in lines if line and not line.startswith((" ", "#"))]
    return [text] if len(set(heads)) == len(heads) else [line for line in lines if line]


def merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, dict) and isinstance(whole.get(name), dict):
            merge(whole[name], value)
        else:
            whole[name] = value


# --- Python, JSON


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages' code reads: a checkpoint, a state dict, a run's metrics."""
    import torch

    folder = tmp_path_factory.mktemp("world")
    tensors = {"blocks.0.attention.qkv.weight": torch.arange(12.0).reshape(4, 3)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    checkpoints = folder / "runs/quickstart/checkpoints"
    written = write_weights(checkpoints, tensors.items(), shapes, load_config(write_mine(folder)), "0" * 64, {})
    written.rename(checkpoints / "step-00000300")
    for name in ("exports/mine-torch", "runs/mine"):
        (folder / name).mkdir(parents=True)
    torch.save(tensors, folder / "exports/mine-torch/model.pt")
    lines = [{"step": 1, "event": "start"}, {"step": 1, "loss": 10.4, "tokens_per_second": 3e4}]
    (folder / "runs/mine/metrics.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8"
    )
    return folder


@named("python")
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block.page), "exec")


def test_python_runs_where_it_says_so(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(world)
    results: dict[str, Any] = {}
    for block in BLOCKS:
        if block.language == "python" and block.before == "<!-- run -->":
            exec(compile(block.text, str(block.page), "exec"), results)
    expected = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(results["weight"], expected)  # docs/checkpoint-format.md
    assert torch.equal(results["weights"]["blocks.0.attention.qkv.weight"], expected)  # docs/conversion.md
    assert [line["loss"] for line in results["steps"]] == [10.4]  # docs/training.md


@named("json")
def test_json_parses(block: Block) -> None:
    json.loads(block.text)
