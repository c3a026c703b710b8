"""The rules that keep the project small: tiers, libraries, sizes, docstrings, and options that are read."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pretrain.options.config_docs import options
from pretrain.options.section import option_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "pretrain", "launch")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BENCHMARKS = sorted(path.relative_to(ROOT) for path in (ROOT / "benchmarks").glob("*.py"))

# The packages of `pretrain`, from the lowest: a module imports its own package and lower ones. The modules of `pretrain`
# itself are below all of them, and `kernels` is below those.
ORDER = (
    "storage options ranks optimizers zero tokenizers data transformer checkpoints cluster generation preparing tasks"
    " planning evaluation training doctor formats reporting"
).split()

# One third-party library, one file: what goes wrong with it is in one place, and the rest is testable without it.
FILE_OF_LIBRARY = {
    "aiohttp": "pretrain/storage/stores.py",
    "datasketch": "pretrain/preparing/near_duplicates.py",
    "deepspeed": "pretrain/zero/engine.py",
    "lm_eval": "pretrain/evaluation/harness.py",
    "fsspec": "pretrain/storage/stores.py",
    "jinja2": "pretrain/tokenizers/messages.py",
    "gguf": "pretrain/formats/gguf_export.py",
    "llama_cpp": "pretrain/formats/llama_cpp.py",
    "matplotlib": "pretrain/reporting/report_plots.py",
    "mwparserfromhell": "pretrain/preparing/wikipedia.py",
    "plotly": "pretrain/reporting/report_page.py",
    "py3langid": "pretrain/preparing/languages.py",
    "packaging": "pretrain/doctor/package_check.py",
    "psutil": "pretrain/ranks/network.py",
    "pyarrow": "pretrain/preparing/table_files.py",
    "pydantic_core": "pretrain/options/settings.py",
    "ruamel": "pretrain/options/settings.py",
    "rouge_score": "pretrain/tasks/task_metrics.py",
    "sacrebleu": "pretrain/tasks/task_metrics.py",
    "safetensors": "pretrain/storage/tensor_files.py",
    "sentencepiece": "pretrain/tokenizers/sentencepiece_tokenizer.py",
    "rich": "pretrain/training/live_view.py",
    "tensorboard": "pretrain/training/tensorboard_events.py",
    "tokenizers": "pretrain/tokenizers/hf_tokenizer.py",
    "transformers": "pretrain/formats/hf_export.py",
    "wandb": "pretrain/training/tracking.py",
    "webdataset": "pretrain/data/shards.py",
    "zstandard": "pretrain/data/source_files.py",
}
# Data are prepared, and runs planned and submitted, on machines that have no use for torch, and quickly without it: these
# packages, except for what reads tensors.
WITHOUT_TORCH = "storage options tokenizers data preparing tasks planning cluster".split()
WITH_TORCH = {"pretrain/storage/tensor_files.py", "pretrain/data/row_reader.py", "pretrain/data/feed.py"}

MAX_FILE_LINES = 400
MAX_BODY_LINES = 60
MAX_COMMAND_LINES = 70
MAX_OPTIONS = 160

# Words by which code calls a section, beside its own name and `section`.
SECTION_WORDS = {
    "data.sources.*": {"source"},
    "optim.groups.*": {"rule"},
    "data.phases.*": {"phase"},
    "eval": {"evaluation"},
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Yield the dotted name of every import in a file, those inside functions too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            module = node.module or ""
            if (ROOT / module.replace(".", "/")).is_dir():  # `from pretrain.data import feed` imports a module
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def place_of(package: str) -> int:
    """Return how high a package of `pretrain` is; its own modules, such as pretrain.errors, are below all."""
    return ORDER.index(package) if package in ORDER else -1


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_downward(path: Path) -> None:
    package, module = path.parts[0], path.stem
    inside = path.parts[1] if len(path.parts) > 2 else ""
    assert package != "pretrain" or not inside or inside in ORDER, f"{path} is in no package of ORDER: add it there"
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top not in PACKAGES:
            continue
        assert top != "launch" or name == "launch" or package == "launch", f"{path} imports {name}"
        if package == "kernels":
            assert top == "kernels", f"{path} imports {name}"
        if package == "pretrain" and top == "pretrain" and rest:
            assert place_of(rest.partition(".")[0]) <= place_of(inside), f"{path} imports {name}, which is above it"
            assert rest != f"{inside}.{module}".strip("."), f"{path} imports itself"


def test_no_imports_go_in_circles() -> None:
    modules = {".".join(path.with_suffix("").parts) for path in FILES}
    graph = {}
    for path in FILES:
        named = {name if name in modules else name.rpartition(".")[0] for name in imports_of(path)}
        graph[".".join(path.with_suffix("").parts)] = named & modules
    list(TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


@pytest.mark.parametrize("path", FILES, ids=str)
def test_one_library_one_file(path: Path) -> None:
    for name in imports_of(path):
        library = "tensorboard" if name.startswith("torch.utils.tensorboard") else name.partition(".")[0]
        if library in sys.stdlib_module_names or library in PACKAGES or library == "__future__":
            continue
        if path.parts[0] == "kernels":
            assert library in ("torch", "triton"), f"{path} imports {name}"
        elif library == "torch":
            assert path.parts[1] not in WITHOUT_TORCH or str(path) in WITH_TORCH, f"{path} imports {name}"
        elif library not in ("numpy", "pydantic"):
            assert FILE_OF_LIBRARY.get(library) == str(path), f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES + BENCHMARKS, ids=str)
def test_files_and_functions_are_short(path: Path) -> None:
    num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{path} has {num_lines} lines"
    for function in functions_of(path):
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
        assert length <= MAX_BODY_LINES, f"{path}:{function.lineno}: the body of {function.name} has {length} lines"


@pytest.mark.parametrize("path", FILES + BENCHMARKS, ids=str)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = tree_of(path)
    if (ROOT / path).read_text(encoding="utf-8"):
        assert ast.get_docstring(tree), f"{path} has no docstring"
    for holder in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]:
        for node in holder.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != "_":
                assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def test_every_option_is_read() -> None:
    reads: set[tuple[str, str]] = set()  # (what it is read from, option)
    for path in FILES:
        if path.stem in ("config", "checks", "settings"):  # they read options only to judge them
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute):
                base = node.value
                word = base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""
                reads.add((word.lstrip("_").removesuffix("_section"), option_of(node.attr)))
    keys = Counter(name.rpartition(".")[2] for name, option in options().items() if not option.section)
    dead = []
    for name, option in options().items():
        if option.section:
            continue
        section, _, key = name.rpartition(".")
        words = {section, "section", *SECTION_WORDS.get(section, ())}
        if not any(found == key and (keys[key] == 1 or word in words) for word, found in reads):
            dead.append(name)
    assert dead == [], "options that nothing reads"


@pytest.mark.launches
def test_text_is_prepared_without_torch() -> None:
    check = "import sys, pretrain.preparing.prepare, pretrain.options.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=120).returncode == 0


def test_options_are_few() -> None:
    assert sum(not option.section for option in options().values()) <= MAX_OPTIONS


def test_kernels_can_be_taken_for_another_package() -> None:
    # transformers imports a package of this name if it finds one
    assert (ROOT / "kernels/__init__.py").read_bytes() == b""


def test_tests_lie_as_the_sources_do() -> None:
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("*.py")} - {Path()}
    sources = {*ORDER, "kernels", "launch", "benchmarks", "docs"}
    assert sorted({str(folder) for folder in folders} - sources - {"fault", "gpu", "slurm", "helpers"}) == []
    # with `tests` on sys.path, tests/kernels would shadow kernels: pytest puts the first folder without this file there
    assert [str(folder) for folder in folders if not (tests / folder / "__init__.py").exists()] == []
    # and Python puts the folder of a script there
    helpers = [path.name for path in tests.glob("*.py") if not path.name.startswith("test_")]
    assert sorted(helpers) == ["__init__.py", "conftest.py"]


def test_no_command_has_the_name_of_a_standard_module() -> None:
    # the folder of a script that is run as a file is first on sys.path
    assert [path.stem for path in (ROOT / "launch").glob("*.py") if path.stem in sys.stdlib_module_names] == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parts[0] == "launch" and path.stem != "__init__"], ids=str
)
def test_commands_guard_sys_path(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert "sys.path[0] = str(Path(__file__).resolve().parents[1])" in text, f"{path} lacks the guard"
    assert len(text.splitlines()) <= MAX_COMMAND_LINES, f"{path} is not thin: move it to pretrain/"


def test_the_map_names_every_module() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    modules = [path.name for path in FILES if path.parts[0] == "pretrain" and path.stem != "__init__"]
    assert [name for name in modules if f"`{name}`" not in page] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [package for package in ORDER if f"  {package}/" not in readme] == []
