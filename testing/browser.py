"""Open a page in a headless Chromium, and say what it complains of: for tests of pages that hecate writes.

    python -m testing.browser      fetches a Chromium from the npm registry into .browser, with npm and node, once

It is driven over a pipe by the Chrome DevTools Protocol, so that nothing else is needed. No test fetches anything.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".browser"
PACKAGE = "@sparticuz/chromium@147.0.0"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
_FLAGS = (
    *("--headless", "--no-sandbox", "--no-zygote", "--single-process", "--in-process-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)


@dataclass(frozen=True)
class Browser:
    """A Chromium that can be started."""

    path: str
    environment: dict[str, str] = field(default_factory=dict)
    """what it needs beside the process's own"""


@dataclass
class Opened:
    """What was seen of a page."""

    complaints: list[str] = field(default_factory=list)
    """lines of the console, errors of scripts, and what could not be loaded"""
    missing_pictures: int = 0
    width: int = 0
    """CSS pixels that the page takes; more than it was given, where it must be scrolled sideways"""
    shot: bytes = b""
    """PNG of the whole page"""


def find_browser() -> Browser | None:
    """Return a Chromium of the PATH, or the one in .browser; None: there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return Browser(path)
    if not (FOLDER / "chromium").exists():
        return None
    return Browser(str(FOLDER / "chromium"), {"LD_LIBRARY_PATH": f"{FOLDER}/lib", "FONTCONFIG_FILE": f"{FOLDER}/fonts.conf"})


def open_page(browser: Browser, page: Path, width: int) -> Opened:
    """Open a file in a window of `width` CSS pixels, and wait until it has loaded.

    Raises:
        EOFError: the browser has ended.
    """
    with tempfile.TemporaryDirectory() as profile, _started(browser, profile) as pipe:
        opened = Opened()
        target = pipe.ask("Target.createTarget", url="about:blank")["targetId"]
        pipe.session = pipe.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            pipe.ask(f"{domain}.enable")
        pipe.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        pipe.ask("Page.navigate", url=page.as_uri())
        pipe.wait_for("Page.loadEventFired")
        opened.missing_pictures = pipe.value("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        opened.width = pipe.value("document.documentElement.scrollWidth")
        opened.shot = base64.b64decode(pipe.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        opened.complaints = [text for event in pipe.events if (text := _complaint(event["method"], event.get("params", {})))]
        return opened


def _complaint(method: str, of: dict[str, Any]) -> str | None:
    if method == "Runtime.consoleAPICalled":
        return f"console.{of['type']}: " + " ".join(str(one.get("value", one.get("description"))) for one in of["args"])
    if method == "Runtime.exceptionThrown":
        details = of["exceptionDetails"]
        return str(details.get("exception", {}).get("description", details["text"]))
    if method == "Log.entryAdded":
        return f"{of['entry']['text']} {of['entry'].get('url', '')}"
    return str(of["errorText"]) if method == "Network.loadingFailed" else None


class _Pipe:
    """Questions and answers of the DevTools protocol: JSON texts that end with a zero byte."""

    def __init__(self, to: BinaryIO, come: BinaryIO) -> None:
        self._to, self._come, self._number = to, come, 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        session = {} if self.session is None else {"sessionId": self.session}
        self._to.write(json.dumps({"id": self._number, "method": method, "params": parameters, **session}).encode() + b"\0")
        self._to.flush()
        while (message := self._read()).get("id") != self._number:
            self.events.append(message)
        if "error" in message:
            raise ValueError(f"{method}: {message['error']['message']}")
        result: dict[str, Any] = message["result"]
        return result

    def value(self, expression: str) -> int:
        return int(self.ask("Runtime.evaluate", expression=expression)["result"]["value"])

    def wait_for(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._come.read(1)) != b"\0":
            if not byte:
                raise EOFError("the browser has ended")
            text += byte
        message: dict[str, Any] = json.loads(text)
        return message


@contextmanager
def _started(browser: Browser, profile: str) -> Iterator[_Pipe]:
    """Start the browser, which reads from descriptor 3 and writes to 4."""
    (its_input, to), (come, its_output) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" 3</dev/fd/{its_input} 4>/dev/fd/{its_output}', "sh", browser.path, *_FLAGS, f"--user-data-dir={profile}"],
        env={**os.environ, "HOME": profile, **browser.environment},
        pass_fds=(its_input, its_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        with open(to, "wb") as writing, open(come, "rb") as reading:
            yield _Pipe(writing, reading)
    finally:
        process.kill()
        process.wait()


_UNPACK = "const z=require('zlib'),f=require('fs');f.writeFileSync(process.argv[2],z.brotliDecompressSync(f.readFileSync(process.argv[1])))"
_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{fonts}</dir><cachedir>{cache}</cachedir>
<match target="pattern"><edit name="family" mode="append"><string>DejaVu Sans</string></edit></match></fontconfig>
"""


def fetch() -> None:
    """Make .browser, which git ignores: Chromium for Linux on x86-64, its libraries, and matplotlib's fonts."""
    import matplotlib

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
        (packed,) = Path(folder).glob("*.tgz")
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        binaries = Path(folder, "package", "bin")
        for brotli in binaries.rglob("*.br"):
            subprocess.run(["node", "-e", _UNPACK, str(brotli), str(brotli.with_suffix(""))], check=True)
        new = Path(folder, "browser")
        new.mkdir()
        for inner in binaries.rglob("*.tar"):
            with tarfile.open(inner) as archive:
                archive.extractall(new, filter="data")
        (found,) = (path for path in binaries.rglob("chromium") if path.is_file())
        shutil.copy(found, new / "chromium")
        (new / "chromium").chmod(0o755)
        for library in new.glob("*.so*"):  # of the software renderer, which Chromium looks for beside itself
            library.chmod(0o755)
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        (new / "fonts.conf").write_text(_FONTS.format(fonts=fonts, cache=FOLDER / "cache"), encoding="utf-8")
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.move(new, FOLDER)
    print(f"{FOLDER}: {sum(path.stat().st_size for path in FOLDER.rglob('*') if path.is_file()) / 1e6:.0f} MB")


if __name__ == "__main__":
    fetch()
