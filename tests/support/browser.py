"""A browser without a network, where there is one: Debian's package chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = (
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-extensions",
    "--hide-scrollbars",
)


def screenshot(page: Path, into: Path) -> bytes:
    """The PNG of a page as it opens from the disk."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        *QUIET,
        "--window-size=1200,2000",
        f"--screenshot={into}",
    ]
    command += [f"--user-data-dir={into.parent / 'profile'}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return into.read_bytes()


def drawn(page: Path, into: Path) -> bool:
    """Whether a browser shows more of the page than of an empty one."""
    blank = into.with_name("blank.html")
    blank.write_text("<!doctype html><title>blank</title>")
    shown, empty = screenshot(page, into), screenshot(blank, into.with_name("blank.png"))
    return shown.startswith(b"\x89PNG") and len(shown) > 4 * len(empty)
