"""The documentation: it builds without a warning, every link leads somewhere, and every code block is true.

Each block of code says its language. `bash` and `console` are commands, whose files, targets and flags exist; `yaml` is a
config, a part of one or a task; `python` compiles, and is run where a comment `<!-- run -->` stands before it; `json`
parses; `text` is what is printed. The messages that docs/faq.md quotes are in the sources.
"""

from __future__ import annotations

import ast
import functools
import html.parser
import importlib
import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from kernels.tile_table import KERNELS, read_table
from pretrain.checkpoints.weights_checkpoint import write_weights
from pretrain.options.config_docs import options
from pretrain.options.families import num_parameters
from pretrain.options.settings import load_config
from tests.rank_helpers import ROOT
from tests.test_configs import shape_of

PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
LANGUAGES = {"bash", "sh", "console", "yaml", "python", "json", "text"}
SECTIONS = {name for name, option in options().items() if option.section and "." not in name}
# Programs that are not ours: their own arguments are theirs.
FOREIGN = set(
    "apptainer apt-get aws break cd cp docker done export for git grep if in ip llama-cli mkdir nvidia-smi ollama pdsh pip"
    " pre-commit sacct salloc sbatch scancel scontrol sed set sinfo sleep source squeue ssh tail tensorboard wandb".split()
)
# What stands for something of the reader's in a command, and what it is taken for.
STANDS_FOR = {"N": "8", "K": "3", "$SLURM_ARRAY_TASK_ID/16": "1/16"}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    before: str


def text_of(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: Path) -> Iterator[Block]:
    text = text_of(page)
    for found in re.finditer(r"^( *)(```+)([^\n`]*)\n(.*?)^ *\2 *$", text, re.MULTILINE | re.DOTALL):
        before = text[: found.start()]
        yield Block(page, before.count("\n") + 1, found[3].strip(), found[4], before.rstrip().rpartition("\n")[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(language: str) -> Any:
    chosen = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", chosen, ids=[f"{one.page}:{one.line}" for one in chosen])


def test_every_block_says_its_language() -> None:
    assert [f"{one.page}:{one.line}: {one.language!r}" for one in BLOCKS if one.language not in LANGUAGES] == []


# --- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", "docs", "-d", str(folder / "trees"),
         ".", str(folder / "html")],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert made.returncode == 0 and made.stderr == "", made.stderr[-5000:]
    return folder / "html"


class Links(html.parser.HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and tag in ("a", "img", "script", "link", "source"):
                self.targets.append(value)


def test_the_site_has_every_page_and_no_link_that_leads_nowhere(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html")}
    built = {path.relative_to(site).with_suffix(".md") for path in pages}
    assert {page for page in PAGES if page.parts[0] == "docs"} | {
        Path("CONTRIBUTING.md"),
        Path("CHANGELOG.md"),
    } <= built
    wrong = []
    for path, links in pages.items():
        for target in links.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc or not (url.path or url.fragment):
                continue
            place = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not place.is_file() or (
                url.fragment and place in pages and unquote(url.fragment) not in pages[place].anchors
            ):
                wrong.append(f"{path.relative_to(site)}: {target}")
    assert wrong == [] and len(pages) > 60


def test_the_contents_name_every_page_once() -> None:
    index = text_of(Path("docs/index.md"))
    listed = re.findall(r"^- \[.+?\]\((.+?)\)", index, re.MULTILINE)
    assert len(listed) == len(set(listed))
    unlisted = [page.name for page in PAGES if page.parent == Path("docs") and page.name not in {*listed, "index.md"}]
    assert unlisted == [], "docs/index.md does not list them"


# --- links, as a git host shows the pages


@functools.cache
def anchors_of(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page."""
    counts: dict[str, int] = {}
    anchors = set()
    text = re.sub(r"^( *)(```+).*?^ *\2 *$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors.add(slug if slug not in counts else f"{slug}-{counts[slug]}")
        counts[slug] = counts.get(slug, -1) + 1
    return frozenset(anchors)


def prose_of(page: Path) -> str:
    text = re.sub(r"^( *)(```+).*?^ *\2 *$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", prose_of(page)):
        url = urlsplit(target)
        if url.scheme or url.netloc:
            if url.scheme != "https" or "." not in url.netloc:
                wrong.append(target)
            continue
        place = (ROOT / page).parent / unquote(url.path) if url.path else ROOT / page
        place = place.resolve()
        if not place.exists() or not place.is_relative_to(ROOT.resolve()):
            wrong.append(target)
        elif (
            url.fragment and place.suffix == ".md" and url.fragment not in anchors_of(place.relative_to(ROOT.resolve()))
        ):
            wrong.append(target)
    assert wrong == []


def test_pages_that_the_sources_name_exist() -> None:
    wrong = []
    for path in [*ROOT.glob("configs/**/*.yaml"), *(one for folder in ("pretrain", "kernels", "launch", "benchmarks", "tests")
                                                     for one in (ROOT / folder).rglob("*.*"))]:  # fmt: skip
        if path.suffix in (".py", ".yaml", ".sh", ".sbatch", ".def", ".js"):
            for name in re.findall(r"\bdocs/(?:notes/)?[a-z0-9-]+\.md\b", path.read_text(encoding="utf-8")):
                if not (ROOT / name).is_file():
                    wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


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
                if flag.startswith("--"):
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


# --- messages


@functools.cache
def messages_in_sources() -> tuple[str, ...]:
    """Every text in the sources, with a `\\0` for what is filled in."""
    found = []
    for folder in ("pretrain", "launch", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(str(one.value) if isinstance(one, ast.Constant) else "\0" for one in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    makefile = re.sub(r"\\\n\s*", "", text_of(Path("Makefile")))
    found.append(re.sub(r"\$\(PYTHON\)", "\0", makefile))
    return tuple(" ".join(text.split()) for text in found)


def quoted(block: Block) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", block.text) if paragraph.strip()]


QUOTED = [(block, message) for block in BLOCKS if block.page == Path("docs/faq.md") and block.language == "text"
          for message in quoted(block)]  # fmt: skip


@pytest.mark.parametrize(
    ("block", "message"), QUOTED, ids=[f"line {block.line}: {text[:50]}" for block, text in QUOTED]
)
def test_messages_of_the_faq_are_in_the_sources(block: Block, message: str) -> None:
    parts = [part.strip() for part in message.split("…")]
    pattern = re.compile(".*?".join(re.escape(part) for part in parts))
    assert sum(map(len, parts)) > 20, "too little to be found by"
    assert any(pattern.search(text) for text in messages_in_sources()), message


# --- tables


def test_the_table_of_sizes_is_that_of_the_configs() -> None:
    rows = re.findall(r"^\| (`configs/.*?)\|(.*?)\|(.*?)\|(.*?)\|", text_of(Path("docs/sizes.md")), re.MULTILINE)
    units = {"M": 1e6, "B": 1e9, "T": 1e12, "GB": 1e9, "TB": 1e12}
    named = set()
    for names, *cells in rows:
        columns = [[float(n) * units[unit] for n, unit in re.findall(r"([\d.]+) (\w+)", cell)] for cell in cells]
        for place, name in enumerate(re.findall(r"([\w.-]+\.yaml)", names)):
            config = load_config(ROOT / "configs" / name)
            size = num_parameters(shape_of(config))
            tokens = (
                config.train.num_tokens or config.train.num_steps * config.train.global_batch_size * config.data.seq_len
            )
            found = [column[place] for column in columns]
            assert found == pytest.approx([size, tokens, 20 * size], rel=0.04), name
            named.add(name)
    assert named == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_the_table_of_tiles_is_that_of_the_kernels() -> None:
    page = text_of(Path("docs/kernels.md"))
    for kernel in KERNELS:
        [row] = re.findall(rf"^\| `{kernel}` .*?\|(.*)\|$", page, re.MULTILINE)
        shown = [tuple(map(int, re.findall(r"\d+", cell))) for cell in row.split("|")]
        assert shown == [tuple(read_table(gpu)["tiles"][kernel]["128 long"]) for gpu in ("sm_80", "sm_86", "sm_90")], (
            kernel
        )
