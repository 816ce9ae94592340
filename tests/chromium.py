"""A page in a real browser: Debian's chromium without a window, driven over its debugging pipe by the standard library alone."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0
"""Seconds until an answer must be there."""


class Browser:
    """One tab. What it says and asks for while a page is open is kept in `events`."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._number = to, back, b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = None
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
        raise RuntimeError("the browser is gone")

    def _messages(self) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            while b"\0" in self._rest:
                message, self._rest = self._rest.split(b"\0", 1)
                read = json.loads(message)
                if "method" in read:
                    self.events.append(read)
                yield read
            more = os.read(self._back, 1 << 20)
            if not more:
                return
            self._rest += more
        raise TimeoutError("the browser does not answer")

    def open(self, file: Path, *, width: int, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Show a file; returns when it is loaded."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=file.resolve().as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            for message in self._messages():
                if message.get("method") == "Page.loadEventFired":
                    break

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))[
            "data"
        ]
        file.write_bytes(base64.b64decode(data))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def paper(self, file: Path) -> None:
        """Write a PDF of the page."""
        file.write_bytes(
            base64.b64decode(self.ask("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])
        )

    @property
    def requests(self) -> list[str]:
        """What was asked for beside the page itself."""
        urls = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("file:", "data:"))] + [
            url for url in urls if url.startswith("file:")
        ][1:]

    @property
    def complaints(self) -> list[str]:
        """What the console says."""
        return [json.dumps(event["params"]) for event in self.events if event["method"] in SAID]


SAID = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"}


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that has never been used before, and leaves nothing behind."""
    assert PROGRAM is not None
    read_there, to = os.pipe()
    back, write_there = os.pipe()
    # The pipe is to be on descriptors 3 and 4 there, and is first brought where these two are not in the way.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read_there, write_there)]
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        placed = [
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, ends[0], 3),
            (os.POSIX_SPAWN_DUP2, ends[1], 4),
        ]
        command = [PROGRAM, *FLAGS, f"--user-data-dir={folder}"]
        process = os.posix_spawn(PROGRAM, command, dict(os.environ), file_actions=placed)
        for end in (read_there, write_there, *ends):
            os.close(end)
        try:
            yield Browser(to, back)
        finally:
            os.close(to)  # which tells it to end
            os.close(back)
            _wait_for(process)


def _wait_for(process: int) -> None:
    for _ in range(100):
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
