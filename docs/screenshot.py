"""Take the picture of `docs/inspecting.md`: `python docs/screenshot.py RUN TEXT_FILE`. Needs Chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent


def main() -> int:
    """Inspect the text, and draw the page."""
    run, text = sys.argv[1:]
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("error: no Chromium is installed. On Debian: apt-get install chromium", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        report = [
            sys.executable,
            str(DOCS.parent / "launch/report.py"),
            run,
            "--inspect-file",
            text,
            "--out",
            str(page),
        ]
        subprocess.run(report, check=True)
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        picture = [f"--screenshot={DOCS / 'inspecting.png'}", "--window-size=1200,800", "--virtual-time-budget=10000"]
        subprocess.run([browser, *flags, *picture, page.as_uri()], check=True, stderr=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
