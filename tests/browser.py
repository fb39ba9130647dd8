"""A real headless Chromium, spoken to as the W3C WebDriver standard says, without a package.

On Debian and Ubuntu: apt install chromium chromium-driver.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRIVER = shutil.which("chromedriver")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MISSING = "needs chromium and chromedriver (apt install chromium chromium-driver)"
PATIENCE = 120
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Browser:
    """One window."""

    def __init__(self, session: str):
        self.session = session

    def call(self, method: str, command: str, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self.session}{command}", data, method=method)
        request.add_header("Content-Type", "application/json")
        with LOCAL.open(request, timeout=PATIENCE) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path) -> None:
        self.call("POST", "/url", url=path.absolute().as_uri())

    def run(self, script: str, *arguments):
        """What a function body in JavaScript returns."""
        return self.call("POST", "/execute/sync", script=script, args=list(arguments))

    def click(self, selector: str) -> None:
        """A click of the mouse on the first such element, which must be seen to be hit."""
        found = self.call("POST", "/element", using="css selector", value=selector)
        self.call("POST", f"/element/{next(iter(found.values()))}/click")

    def set_dark(self, dark: bool) -> None:
        """Whether the reader prefers dark pages."""
        value = "dark" if dark else "light"
        self.devtools("Emulation.setEmulatedMedia",
                      features=[{"name": "prefers-color-scheme", "value": value}])  # fmt: skip

    def devtools(self, command: str, **parameters) -> None:
        """A command of Chromium's own protocol."""
        self.call("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def errors(self) -> list[str]:
        """What the page wrote to the console as errors, refused requests among them."""
        entries = self.call("POST", "/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@contextmanager
def chromium(width: int = 1200, height: int = 900) -> Iterator[Browser]:
    """A window of that size, closed at the end."""
    options = [f"--window-size={width},{height}", "--headless=new", "--no-sandbox",
               "--disable-gpu", "--disable-dev-shm-usage"]  # fmt: skip
    wanted = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"},
              "goog:chromeOptions": {"binary": CHROMIUM, "args": options}}  # fmt: skip
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            started = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
            service = f"http://127.0.0.1:{next(filter(None, started))[1]}/session"
            capabilities = {"alwaysMatch": wanted}
            made = Browser(service).call("POST", "", capabilities=capabilities)
            browser = Browser(f"{service}/{made['sessionId']}")
            try:
                yield browser
            finally:
                browser.call("DELETE", "")
        finally:
            driver.terminate()
