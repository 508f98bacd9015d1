# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face hub: files of repositories, by its library's routes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_LIST = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/main")


class StandInHub:
    """What it serves, and what it was asked for."""

    def __init__(self, repos: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repos = {repo: dict(files) for repo, files in repos.items()}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.break_after: dict[str, int] = {}  # file: bytes after which its next answer breaks off
        self.etags: dict[str, str] = {}  # where they aren't the checksum
        self.url = ""


@contextmanager
def serve(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[StandInHub]:
    """Run a hub on a free port while the block runs."""
    hub = StandInHub(repos)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *args: object) -> None: ...

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.split("?")[0]
            hub.asked.append((self.command, path, self.headers.get("Range")))
            if found := _RESOLVE.fullmatch(path):
                self._send_file(found["repo"], found["file"], with_body)
            elif (found := _LIST.fullmatch(path)) and found["repo"] in hub.repos:
                body = [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": len(data)}
                    for name, data in hub.repos[found["repo"]].items()
                ]
                self._send(200, json.dumps(body).encode(), {}, with_body)
            else:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)

        def _send_file(self, repo: str, name: str, with_body: bool) -> None:
            if repo not in hub.repos:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
            data = hub.repos[repo].get(name)
            commit = {"X-Repo-Commit": COMMIT}
            if data is None:
                return self._send(404, b"", commit | {"X-Error-Code": "EntryNotFound"}, with_body)
            tag = hub.etags.get(name, hashlib.sha256(data).hexdigest())
            headers = commit | {"ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
            status, start = 200, 0
            if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                status, start = 206, int(wanted[1])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            limit = hub.break_after.pop(name, None) if with_body else None
            self._send(status, data[start:], headers, with_body, limit)

        def _send(
            self,
            status: int,
            body: bytes,
            headers: Mapping[str, str],
            with_body: bool,
            limit: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body[:limit])
            if limit is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
