"""A webhook's receiver for tests: a real server that answers as it is told."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "T00/B00/hush-hush"


class Receiver:
    """A real server that answers as it is told.

    Attributes:
        answers: statuses of the next answers, or ``hang`` and ``drop``; the last one stays.
        received: path, content type and body of each POST.
    """

    def __init__(self) -> None:
        self.answers: list[int | str] = [200]
        self.location = ""
        self.received: list[tuple[str, str, bytes]] = []
        self.got: list[str] = []
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                return

            def do_GET(self) -> None:
                outer.got.append(self.path)
                self.send_response(200)
                self.end_headers()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.received.append((self.path, self.headers["Content-Type"], body))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if isinstance(answer, str):
                    if answer == "hang":
                        outer.release.wait(60)
                    self.close_connection = True
                    return
                self.send_response(answer)
                if outer.location:
                    self.send_header("Location", outer.location)
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/{SECRET}?token=quiet"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
