"""A small hub on localhost: the endpoints that huggingface_hub calls to create, fill, list and read a model repository.

It keeps every commit as a dict of files, so that a revision can be asked for by its commit or as `main`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` serves at `hub.url` until the block ends."""

    daemon_threads = True

    def __init__(self, token: str = "hf_secret") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repos: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def put(self, repo: str, files: dict[str, bytes]) -> str:
        """A commit that adds `files`; its id."""
        entry = self.repos.setdefault(repo, {"private": False, "commits": {}, "head": None})
        merged = {**entry["commits"].get(entry["head"], {}), **files}
        names = json.dumps(sorted((n, hashlib.sha1(b).hexdigest()) for n, b in merged.items())) + str(len(entry["commits"]))
        entry["head"] = hashlib.sha1(names.encode()).hexdigest()
        entry["commits"][entry["head"]] = merged
        return str(entry["head"])

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and files of a revision."""
        entry = self.repos.get(repo)
        if entry is None:
            return None
        commit = entry["head"] if revision == "main" else revision
        return (commit, entry["commits"][commit]) if commit in entry["commits"] else None


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _send(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _missing(self, code: str) -> None:
        self._send(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._send(401, {"error": "a token is needed"})
        elif path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            is_private = given.get("visibility") == "private" or given.get("private") is True  # new and old clients
            self.server.repos.setdefault(repo, {"commits": {}, "head": None})["private"] = is_private
            self._send(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._send(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif match := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            lines = [json.loads(line) for line in body.splitlines() if line]
            added = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in lines if e["key"] == "file"}
            commit = self.server.put(match[1], added)
            self._send(
                200, {"commitUrl": f"{self.server.url}/{match[1]}/commit/{commit}", "commitOid": commit, "success": True}
            )
        else:
            self._missing("EntryNotFound")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if found:
            self._listing(found[1], found[2], found[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            held = self.server.files(match[1], match[2])
            if held is None or match[3] not in held[1]:
                self._missing("RepoNotFound" if held is None else "EntryNotFound")
                return
            content = held[1][match[3]]
            headers = {"X-Repo-Commit": held[0], "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self._send(200, content, {**headers, "Content-Type": "application/octet-stream"})
        else:
            self._missing("EntryNotFound")

    do_HEAD = do_GET

    def _listing(self, repo: str, kind: str | None, revision: str) -> None:
        held = self.server.files(repo, revision)
        if held is None:
            self._missing("RepoNotFound" if repo not in self.server.repos else "RevisionNotFound")
        elif kind == "tree":
            entries = [(name, len(raw), hashlib.sha1(raw).hexdigest()) for name, raw in sorted(held[1].items())]
            self._send(200, [{"type": "file", "path": n, "size": size, "oid": oid} for n, size, oid in entries])
        else:
            siblings = [{"rfilename": name} for name in sorted(held[1])]
            self._send(200, {"id": repo, "modelId": repo, "sha": held[0], "siblings": siblings, "private": False, "tags": []})
