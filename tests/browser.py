"""A real browser, driven through the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SERVED = "document.getElementById('state')?.dataset.state === 'ready'"
"""The page of ``maskmill serve`` is ready."""
WRITTEN = "document.readyState === 'complete'"
"""A page that is a file is ready."""


class Page:
    """A tab of a headless Chromium."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        self._loop = asyncio.new_event_loop()
        self._next = 0
        self._session: str | None = None
        self.console: list[str] = []
        self.requests: list[str] = []
        self._process = subprocess.Popen(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run", "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        told = folder / "DevToolsActivePort"
        deadline = time.monotonic() + 120
        while not (told.exists() and len(told.read_text().split()) == 2):
            assert time.monotonic() < deadline and self._process.poll() is None, "Chromium did not start"
            time.sleep(0.05)
        port, path = told.read_text().split()
        self._loop.run_until_complete(self._connect(f"ws://127.0.0.1:{port}{path}"))
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    async def _connect(self, url: str) -> None:
        self._client = aiohttp.ClientSession()
        self._socket = await self._client.ws_connect(url, max_msg_size=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 120))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        await self._socket.send_json(message)
        while True:
            reply = await self._socket.receive_json()
            if reply.get("id") == self._next:
                assert "error" not in reply, (method, reply)
                return reply["result"]
            self._heard(reply.get("method"), reply.get("params", {}))

    def _heard(self, method: str | None, what: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(what["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.console.append(what["entry"]["text"] + " " + what["entry"].get("url", ""))
        elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning"):
            self.console.append(json.dumps(what["args"])[:500])
        elif method == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])

    def run(self, expression: str) -> Any:
        """The value of an expression, which may be a promise."""
        done = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression: str, seconds: float = 90) -> Any:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, f"never: {expression}\n{self.console}"
            time.sleep(0.03)
        return value

    def open(
        self, url: str, *, width: int = 1280, height: int = 860, dark: bool = False, ready: str = SERVED
    ) -> None:
        """Open a page, and wait until an expression is true."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.console.clear()
        self.requests.clear()
        self.call("Page.navigate", url=url)
        self.wait(ready)

    def center(self, selector: str) -> tuple[float, float]:
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return box[0], box[1]

    def mouse(self, kind: str, x: float, y: float) -> None:
        pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def drag(self, *places: tuple[float, float]) -> None:
        self.mouse("mousePressed", *places[0])
        for place in places[1:]:
            self.call(
                "Input.dispatchMouseEvent",
                type="mouseMoved",
                x=place[0],
                y=place[1],
                button="left",
                buttons=1,
            )
        self.mouse("mouseReleased", *places[-1])

    def click(self, selector: str) -> None:
        place = self.center(selector)
        self.mouse("mousePressed", *place)
        self.mouse("mouseReleased", *place)

    def type(self, selector: str, text: str) -> None:
        # Focused rather than clicked: the page may still be moving to make room for an image.
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)
        self.key("Enter", 13, "\r")

    def key(self, name: str, code: int, text: str = "") -> None:
        more = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, windowsVirtualKeyCode=code, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def choose(self, selector: str, path: Path) -> None:
        """Give a file to a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def give(self, kind: str, selector: str, data: bytes, name: str) -> None:
        """Drop a file on an element, or paste it there."""
        text = base64.b64encode(data).decode()
        made = (
            "(() => { const transfer = new DataTransfer();"
            f" const bytes = Uint8Array.from(atob('{text}'), c => c.charCodeAt(0));"
            f" transfer.items.add(new File([bytes], {json.dumps(name)}));"
            f" document.querySelector({json.dumps(selector)}).dispatchEvent("
        )
        event, field = {"drop": ("DragEvent", "dataTransfer"), "paste": ("ClipboardEvent", "clipboardData")}[
            kind
        ]
        options = f"{{bubbles: true, cancelable: true, {field}: transfer}}"
        self.run(f"{made}new {event}('{kind}', {options})); return true; }})()")

    def screenshot(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(shot))

    def close(self) -> None:
        self._session = None
        self.call("Browser.close")
        self._loop.run_until_complete(self._client.close())
        self._process.wait(20)
        self._loop.close()
