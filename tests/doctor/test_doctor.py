"""`longhaul doctor` as a whole: its command, what it prints, and checks that fail, crash or hang."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from pretrain.doctor.doctor_options import Page, as_json, parse
from pretrain.doctor.examination import CHECKS, Check, chosen, run_check
from pretrain.doctor.findings import Line, Request, failure, ok, python_command, refused, skipped, warning
from pretrain.errors import ConfigError
from tests.helpers.rank_helpers import run_command

# `sitecustomize.py` of the check's process: puts a check there whose end is the test's.
PROBE = """
import sys, tempfile, time, types

def check(request):
    from pretrain.doctor.findings import ok
    yield ok("first", request.folder)
{body}

module = types.ModuleType("pretrain.doctor.probe")
module.check = check
sys.modules["pretrain.doctor.probe"] = module
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a check whose body is given, for `seconds` at most."""

    def run(body: str, seconds: float = 60) -> list[Line]:
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "sitecustomize.py").write_text(PROBE.format(body=lines))
        check = Check("probe", "probe", seconds, "Mend it.", variables={"PYTHONPATH": str(tmp_path)})
        return run_check(check, Request(folder="here"))

    return run


@pytest.mark.launches
def test_a_check_that_fails_is_a_line_with_its_last_error_and_keeps_what_it_had_found(probe):
    assert probe("raise ValueError('nothing works')") == [
        ok("first", "here"),
        failure("probe", "the check ended with status 1: ValueError: nothing works", "Mend it."),
    ]


@pytest.mark.launches
def test_a_check_that_crashes_is_a_line_with_the_signal(probe):
    found = probe("import ctypes; ctypes.string_at(0)")
    text = "the check ended with SIGSEGV: Fatal Python error: Segmentation fault"
    assert found == [ok("first", "here"), failure("probe", text, "Mend it.")]


@pytest.mark.launches
def test_a_check_that_hangs_is_ended_with_what_it_has_started_and_removes_what_it_has_written(probe, tmp_path: Path):
    begin = time.monotonic()
    found = probe(
        f"""import subprocess
process = subprocess.Popen(["sleep", "1000"])
open({str(tmp_path / "pid")!r}, "w").write(str(process.pid))
with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}, prefix="left-"):
    time.sleep(1000)""",
        seconds=3,
    )
    assert found == [ok("first", "here"), failure("probe", "no answer in 3 s", "Mend it.")]
    assert time.monotonic() - begin < 60 and list(tmp_path.glob("left-*")) == []
    pid = (tmp_path / "pid").read_text()
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):  # a killed process may still be there as one that nobody has asked for
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the check has started goes on")


@pytest.mark.launches
def test_secrets_are_not_printed(probe):
    assert probe("yield ok('url', 'https://me:pass@host/x?sig=1 password=hunter2')")[1:] == [
        ok("url", "https://host/x?… password=…")
    ]


@pytest.mark.launches
def test_a_check_that_cannot_be_run_does_not_stop_the_rest():
    machine = next(check for check in CHECKS if check.group == "machine")
    found = [run_check(one, Request()) for one in (Check("lost", "lost_check", 60, "Mend it."), machine)]
    assert found[0] == [
        failure("lost", "the check ended with status 1: ModuleNotFoundError: No module named 'pretrain.doctor.lost_check'",
                "Run `make setup` again, in the environment of this Python: a package is missing or broken.")
    ]  # fmt: skip
    assert {"memory", "cores", "open files"} <= {line.name for line in found[1]}
    assert not any(line.outcome == "failure" for line in found[1])


@pytest.mark.launches
def test_a_low_limit_of_the_shell_is_seen(tmp_path: Path):
    command = python_command("pretrain.doctor.child", "machine_check", "{}", str(tmp_path / "lines"))
    limits = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))  # noqa: E731
    subprocess.run(command, preexec_fn=limits, timeout=120, check=True)
    lines = [Line(**json.loads(line)) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line for line in lines if line.name == "open files"] == [
        warning("open files", "512; expected 1,024 at least", "Run `ulimit -n 65536` first, or have "
                "/etc/security/limits.conf say so.")
    ]  # fmt: skip


@pytest.mark.launches
def test_a_whole_run_on_this_machine(tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_command(
        "launch/doctor.py", "absent.yaml", "--quick", "--json", "--dir", tmp_path, "--store", f"file://{tmp_path}",
        timeout=280,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1, done.stderr  # for there is no such config
    content = json.loads(done.stdout)
    assert list(content) == ["longhaul", "host", "timestamp", "seconds", "status", "counts", "checks"]
    assert [check["group"] for check in content["checks"]] == [check.group for check in CHECKS]
    lines = [line for check in content["checks"] for line in check["lines"]]
    assert all(set(line) == {"name", "outcome", "text", "mend"} and line["text"] for line in lines)
    assert all(line["mend"] for line in lines if line["outcome"] in ("warning", "failure"))
    assert content["counts"] == {"ok": 0, "warning": 0, "skipped": 0} | Counter(line["outcome"] for line in lines)
    failed = [(line["name"], line["text"]) for line in lines if line["outcome"] == "failure"]
    assert failed == [("config", "absent.yaml: cannot be read: No such file or directory")]
    assert content["status"] == "failure" and content["seconds"] > 1
    used = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    assert used < 60  # of processors' time: 8 s when it was written; how long they are waited for, others decide


def test_what_is_asked_for_decides_the_checks():
    groups = [check.group for check in CHECKS]
    assert [check.group for check in chosen(Request())] == [one for one in groups if one not in ("store", "run")]
    assert [check.group for check in chosen(Request(config="a", store="b"))] == groups
    compiling = next(check for check in chosen(Request(compiles=True)) if check.group == "DeepSpeed")
    assert compiling.seconds > next(check for check in CHECKS if check.group == "DeepSpeed").seconds
    slow = next(check for check in CHECKS if check.is_slow)
    assert run_check(slow, Request(is_quick=True)) == [skipped(slow.group, "left out by --quick")]


LINES = [ok("torch", "2.13.0"), warning("space", "word " * 40, "Free some."), failure("disk", "full", "Mend it.")]


def test_lines_are_aligned_and_plain_where_nobody_looks(monkeypatch: pytest.MonkeyPatch):
    output = io.StringIO()
    page = Page(output)
    page.write_group(CHECKS[0], LINES)
    page.write_sum(Counter(line.outcome for line in LINES), 3.2)
    found = output.getvalue().splitlines()
    assert "\x1b" not in output.getvalue() and max(map(len, found)) <= 120
    assert found[:3] == ["", CHECKS[0].group, "  ok       torch                  2.13.0"]
    assert found[-5:] == [
        f"{'':34}→ Free some.",
        "  failure  disk                   full",
        f"{'':34}→ Mend it.",
        "",
        "1 ok, 1 warning, 1 failure, in 3 s",
    ]


def test_a_terminal_has_colours_unless_it_wants_none(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for value, is_coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        output = Terminal()
        Page(output).write_group(CHECKS[0], LINES)
        assert ("\x1b[31;1mfailure  \x1b[0m" in output.getvalue()) is is_coloured


@pytest.mark.parametrize(("lines", "status"), [(LINES, "failure"), (LINES[:2], "warning"), (LINES[:1], "ok")])
def test_the_status_of_all_is_that_of_the_worst(lines: list[Line], status: str):
    content = as_json([(CHECKS[0], lines, 1.0)], Counter(line.outcome for line in lines), 1.0)
    assert content["status"] == status and content["checks"][0]["lines"][0] == vars(LINES[0])


def test_an_override_needs_a_config(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        parse(["run.dir=x"], "")
    assert stopped.value.code == 2
    assert (
        "CONFIG is run.dir=x; expected a YAML file or run folder before the first key=value" in capsys.readouterr().err
    )


def test_an_error_becomes_a_line_and_its_mend():
    error = ConfigError("a.yaml:3: model.dim is 2050; expected a multiple of 16. Use 2048.")
    assert refused("config", error) == failure(
        "config", "a.yaml:3: model.dim is 2050; expected a multiple of 16", "Use 2048."
    )
    assert refused("x", ConfigError("s3://a cannot be read: no. 3 is down; tried once. Mend it.")).mend == "Mend it."
    assert refused("x", ConfigError("nothing")) == failure("x", "nothing", "Mend what the line says.")


def test_it_is_found_in_whatever_folder(tmp_path: Path):
    (tmp_path / "pretrain.py").write_text("raise SystemExit(3)")  # as in launch/
    done = subprocess.run(
        [*python_command("pretrain.doctor.child", "compiler_check", "{}", str(tmp_path / "lines"))],
        cwd=tmp_path, env=os.environ | {"CC": "/bin/false"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "C compiler" in (tmp_path / "lines").read_text()
