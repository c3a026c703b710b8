"""Take the pictures of the docs: `python docs/screenshots.py RUN TEXT_FILE [PICTURE …]`. Needs Chromium, and tmux.

RUN is a run folder whose data is still where its config says: for the terminal, the same is trained anew for a minute.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

DOCS = Path(__file__).resolve().parent
LAUNCH = DOCS.parent / "launch"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COLUMNS, LINES, TERMINAL_SECONDS, PORT = 104, 24, 60, 16006
CURVES = r"^(train/(loss|grad_norm)|eval/loss|perf/tokens_per_second)$"
WITHOUT_WEBGL = "--disable-3d-apis"  # TensorBoard then draws its curves at once, and not in a worker's own time
TERMINAL_PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; padding: 14px; background: {background}; color: {foreground}; }}
pre {{ margin: 0; font: 14px/1.35 "DejaVu Sans Mono", monospace; }}</style><pre>{code}</pre>"""
PHONE_PAGE = """<!doctype html><style>body, iframe {{ margin: 0; border: 0; display: block; }}</style>
<iframe src="{page}" width="{width}" height="{height}"></iframe>"""


def take(page: str, picture: Path, width: int, height: int, *flags: str) -> None:
    """Have Chromium draw a page, by address."""
    assert BROWSER
    with tempfile.TemporaryDirectory() as profile:
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--screenshot={picture}", f"--window-size={width},{height}",
            "--virtual-time-budget=60000", "--allow-file-access-from-files", *flags, page,
        ]  # fmt: skip
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


def inspecting(run: Path, text: Path, folder: Path) -> None:
    """Draw the page of what a model makes of a text."""
    page = folder / "inspecting.html"
    command = [sys.executable, str(LAUNCH / "report.py"), str(run), "--inspect-file", str(text), "--out", str(page)]
    subprocess.run(command, check=True)
    take(page.as_uri(), DOCS / "inspecting.png", 1200, 800)


def terminal(run: Path, text: Path, folder: Path) -> None:
    """Draw a terminal in which a run trains, which is stopped then."""
    del text
    if shutil.which("tmux") is None:
        sys.exit("error: tmux is not installed. On Debian: apt-get install tmux")
    tmux = ["tmux", "-L", f"longhaul-{folder.name}", "-f", "/dev/null"]
    training = [sys.executable, str(LAUNCH / "pretrain.py"), str(run / "config.yaml"), f"run.dir={folder / 'run'}"]
    size = ["-x", str(COLUMNS), "-y", str(LINES)]
    subprocess.run([*tmux, "new-session", "-d", *size, *training], check=True, cwd=LAUNCH.parent)
    try:
        begun = None
        while begun is None or time.monotonic() < begun + TERMINAL_SECONDS:
            time.sleep(1)
            capture = [*tmux, "capture-pane", "-e", "-p"]
            shown = subprocess.run(capture, check=True, capture_output=True, text=True).stdout
            begun = begun or (time.monotonic() if "held out" in shown else None)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"))
    console.print(Text.from_ansi(shown.rstrip("\n")))
    page = folder / "terminal.html"
    content = console.export_html(theme=DIMMED_MONOKAI, code_format=TERMINAL_PAGE, inline_styles=True)
    page.write_text(content, encoding="utf-8")
    take(
        page.as_uri(), DOCS / "terminal.png", 28 + round(8.43 * COLUMNS), 28 + 19 * len(shown.rstrip("\n").split("\n"))
    )


def tensorboard(run: Path, text: Path, folder: Path) -> None:
    """Draw TensorBoard's page of the runs beside each other in the folder that RUN is in."""
    del text
    with serve_tensorboard(run.resolve().parent) as address:
        take(f"{address}/?tagFilter={CURVES}#timeseries", DOCS / "tensorboard.png", 1400, 1000, WITHOUT_WEBGL)


@contextmanager
def serve_tensorboard(folder: Path) -> Iterator[str]:
    """Start TensorBoard on a folder of runs, and yield its address once it has read them."""
    command = [str(Path(sys.executable).with_name("tensorboard")), "--logdir", str(folder), "--port", str(PORT)]
    server = subprocess.Popen([*command, "--load_fast=false"], stderr=subprocess.DEVNULL)
    address, found = f"http://localhost:{PORT}", b""
    try:
        while b"train/loss" not in found:
            time.sleep(0.5)
            with suppress(OSError), urllib.request.urlopen(f"{address}/data/plugin/scalars/tags") as answer:
                found = answer.read()
        yield address
    finally:
        server.terminate()
        server.wait()


def report(run: Path, text: Path, folder: Path) -> None:
    """Draw the page of the run's curves as on a desk and on a phone, light and dark."""
    del text
    page, frame = folder / "report.html", folder / "frame.html"
    done = subprocess.run([sys.executable, str(LAUNCH / "report.py"), str(run), "--out", str(page)], check=False)
    if done.returncode:
        sys.exit("error: launch/report.py made no page of the run; what it says is above")
    for name, scheme in (("dark", 0), ("light", 1)):
        flag = f"--blink-settings=preferredColorScheme={scheme}"
        take(page.as_uri(), DOCS / f"report-desktop-{name}.png", 1280, 1000, flag)
        # a window of Chromium's is not as narrow as a phone; a frame is
        frame.write_text(PHONE_PAGE.format(page=page.name, width=390, height=844), encoding="utf-8")
        take(frame.as_uri(), DOCS / f"report-phone-{name}.png", 390, 844, flag)


PICTURES: dict[str, Callable[[Path, Path, Path], None]] = {
    "inspecting": inspecting, "terminal": terminal, "tensorboard": tensorboard, "report": report,
}  # fmt: skip


def main() -> int:
    """Take those that are asked for, or all."""
    if len(sys.argv) < 3 or not set(sys.argv[3:]) <= set(PICTURES):
        first = re.split(r"\n", __doc__ or "")[0]
        print(f"{first}\nPICTURE is one of {', '.join(PICTURES)}; all of them without.", file=sys.stderr)
        return 2
    if BROWSER is None:
        print("error: no Chromium is installed. On Debian: apt-get install chromium", file=sys.stderr)
        return 1
    for name in sys.argv[3:] or PICTURES:
        with tempfile.TemporaryDirectory() as folder:
            PICTURES[name](Path(sys.argv[1]), Path(sys.argv[2]), Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
