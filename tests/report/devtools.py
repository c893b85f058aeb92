"""A headless Chromium, asked over a pipe: what a page shows, asks for and complains of. No library but this one's.

Source: https://chromedevtools.github.io/devtools-protocol, over `--remote-debugging-pipe`: JSON, each with a zero byte
after it.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
ANSWERS_WITHIN_S = 60.0

# The browser reads commands from file 3 and answers on file 4, which only a process of its own can have for sure.
LAUNCHER = """
import os, sys
commands, answers = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2]))
os.dup2(commands, 3); os.dup2(answers, 4)
os.set_inheritable(3, True); os.set_inheritable(4, True)  # a duplicate onto itself stays as it was
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """Return the browser that RECRAY_BROWSER names, else one on the path; None without any."""
    named = os.environ.get("RECRAY_BROWSER")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._left, self._last, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what a command answers; events that come meanwhile are kept."""
        self._last += 1
        session = {"sessionId": self._session} if self._session else {}
        command = {"id": self._last, "method": method, "params": parameters, **session}
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while (message := self._next()).get("id") != self._last:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        result: dict[str, Any] = message["result"]
        return result

    def open(self, page: Path) -> None:
        """Load a page, and wait until all that it asks for is there or has failed."""
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not self._happened("Page.loadEventFired"):
            self.events.append(self._next())

    def see(self, *, media: str = "screen", scheme: str = "light", width: int = 1280) -> None:
        """Show the page on a screen or on paper, in a colour scheme, so wide (CSS pixels)."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"]["value"]

    def complaints(self) -> list[str]:
        """Return what went to the console, and errors that nothing caught."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in names]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for, the page's own first."""
        asked = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked]

    def _happened(self, method: str) -> bool:
        return any(event.get("method") == method for event in self.events)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWERS_WITHIN_S
        while b"\0" not in self._left:
            if not select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {ANSWERS_WITHIN_S:g} s")
            some = os.read(self._from, 1 << 20)
            if not some:
                raise RuntimeError("the browser ended")
            self._left += some
        message, self._left = self._left.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    """Yield a browser with a profile of its own, which ends with the block."""
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    flags = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    # The sandbox refuses to run as root, as in most containers. The page is our own.
    flags += ["--no-sandbox", "--disable-dev-shm-usage"] if os.geteuid() == 0 else []
    launch = [sys.executable, "-c", LAUNCHER, str(commands), str(answers), program, *flags]
    silent = subprocess.DEVNULL
    process = subprocess.Popen(launch, pass_fds=(commands, answers), stdout=silent, stderr=silent)
    os.close(commands)
    os.close(answers)
    try:
        own = Browser(to_browser, from_browser)
        yield own
        own.call("Browser.close")
    finally:
        os.close(to_browser)
        os.close(from_browser)
        process.terminate()
        process.wait(timeout=30)
