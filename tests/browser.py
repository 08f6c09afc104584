"""Headless Chromium for tests of pages: driven through its own pipe, so it needs no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe")  # fmt: skip
PATIENCE = float(os.environ.get("MEMORY_BENCH_TEST_PATIENCE", "120"))


def chromium() -> str | None:
    """The program; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser."""

    def __init__(self, out: int, back: int) -> None:
        self._out, self._back, self._rest, self._number = out, back, b"", 0
        self.session = ""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the devtools protocol and its answer; events on the way are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            assert time.monotonic() < end, "the browser does not answer"
            if select.select([self._back], [], [], 1.0)[0]:
                part = os.read(self._back, 1 << 20)
                assert part, "the browser has ended"
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def evaluate(self, script: str) -> Any:
        """The value of an expression on the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"never: {condition}; {self.problems()}"
            time.sleep(0.1)

    def open(
        self, path: Path, width: int = 1300, height: int = 900, *, mobile: bool = False, dark: bool = False
    ) -> None:
        """A file, seen as wide as that."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, down and up."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def picture(self, *, whole: bool = False) -> bytes:
        """A screenshot as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])

    def problems(self) -> list[str]:
        """What the page complained of: exceptions, errors and warnings of its console, refused loads."""
        self.evaluate("1")
        said = []
        for event in self.events:
            kind, facts = event.get("method", ""), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                said.append(json.dumps(facts["exceptionDetails"])[:600])
            elif kind == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
                said.append(json.dumps(facts["args"])[:600])
            elif kind == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
                said.append(json.dumps(facts["entry"])[:600])
        return said

    def requested(self) -> list[str]:
        """Addresses that the page asked for."""
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith(("data:", "blob:"))]


@contextmanager
def browser(program: str, folder: Path) -> Iterator[Browser]:
    """A browser with one page; `folder`: for its profile."""
    to_read, out = os.pipe()
    back, to_write = os.pipe()

    def places() -> None:  # the protocol's pipe has fixed numbers in the child
        os.dup2(to_read, 63)
        os.dup2(to_write, 64)
        os.dup2(63, 3)
        os.dup2(64, 4)

    command = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        command, preexec_fn=places, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_read)
    os.close(to_write)
    try:
        page = Browser(out, back)
        target = next(t for t in page.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        page.session = page.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        process.terminate()
        process.wait(30)
        os.close(out)
        os.close(back)
