"""A headless Chromium for the tests that look at pages: driven over two pipes by the DevTools protocol, no network.

``CLIPGRAFT_CHROMIUM`` names the browser, otherwise one is looked for on the PATH. Without one these tests are skipped,
or fail where ``CLIPGRAFT_BROWSER=required``.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0
"""Longest wait for an answer [s]; a loaded machine takes several for the first page."""


def find_chromium() -> str | None:
    """The browser's path; None without one."""
    given = os.environ.get("CLIPGRAFT_CHROMIUM")
    return shutil.which(given) if given else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser process with an empty profile. ``Tab`` is what pages are looked at with."""

    def __init__(self, program: str) -> None:
        self.profile = tempfile.TemporaryDirectory(prefix="clipgraft-chromium-", ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, program, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._rest, self.events = itertools.count(1), b"", list[dict[str, Any]]()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one command."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            found = self._read(until)
            if found.get("id") != number:
                self.events.append(found)
            elif "error" in found:
                raise RuntimeError(f"{method}: {found['error']['message']}")
            else:
                return dict(found["result"])

    def wait(self, event: str, session: str) -> dict[str, Any]:
        """The next event of this name; those that came meanwhile are kept."""
        until = time.monotonic() + PATIENCE
        while True:
            for found in self.events:
                if found.get("method") == event and found.get("sessionId") == session:
                    return found
            self.events.append(self._read(until))

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(until - time.monotonic(), 0))
            part = os.read(self._in, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError(f"the browser {'closed' if ready else 'said nothing for'} {PATIENCE:.0f} s")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process and remove its profile."""
        os.close(self._out)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        self.profile.cleanup()


class Tab:
    """One page, opened in a tab of its own: ``width`` in CSS pixels, ``scheme`` light or dark."""

    def __init__(self, browser: Browser, file: Path, *, width: int = 1200, scheme: str = "light") -> None:
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.target = target
        self.session = str(browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Log", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        self.resize(width)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=file.resolve().as_uri())
        browser.wait("Page.loadEventFired", self.session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command to this page."""
        return self.browser.call(method, self.session, **params)

    def resize(self, width: int, height: int = 900) -> None:
        """Another size [CSS pixels]."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def press(self, key: str, code: int, *, text: str = "") -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def own(self, event: str) -> list[dict[str, Any]]:
        """The parameters of this page's events of one name so far."""
        self.run("0")  # whatever came before this is read
        return [e["params"] for e in self.browser.events if e.get("method") == event and e["sessionId"] == self.session]

    def complaints(self) -> list[str]:
        """Errors and warnings in the console, and exceptions."""
        entries = [e["entry"] for e in self.own("Log.entryAdded")]
        said = [e["text"] for e in entries if e["level"] in ("error", "warning")]
        said += [str(e["args"]) for e in self.own("Runtime.consoleAPICalled") if e["type"] in ("error", "warning")]
        return said + [e["exceptionDetails"]["text"] for e in self.own("Runtime.exceptionThrown")]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, but for itself and for data that it holds."""
        urls = [e["request"]["url"] for e in self.own("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("data:", "file:"))] + [
            url for url in urls if url.startswith("file:") and url != self.run("location.href.split('#')[0]")
        ]

    def picture(self, path: Path) -> Path:
        """The whole page as a PNG file."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser for the session."""
    program = find_chromium()
    if program is None:
        reason = "no Chromium on the PATH and none in CLIPGRAFT_CHROMIUM (Debian: apt-get install chromium)"
        if os.environ.get("CLIPGRAFT_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    running = Browser(program)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def tab(browser: Browser) -> Any:
    """``tab(file, width=390, scheme="dark")``, a context manager."""
    return lambda file, **how: Tab(browser, file, **how)
