"""A small Hub on the loopback address: it stores what the official client sends, gives it back, and fails when asked.

    with HubStandIn(users={"hf_secret": "ann"}) as hub:
        hub.make_faults(503, 503)                 # the next two requests
        ...                                       # HF_ENDPOINT=hub.url HF_TOKEN=hf_secret HF_HUB_DISABLE_XET=1
        hub.files("ann/dog")["README.md"]         # bytes

It speaks the part of the Hub's interface that huggingface_hub uses to make a repository, to upload (preupload, LFS and
commit; not xet), to list and to download.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS = (".safetensors", ".bin", ".png", ".jpg", ".webp")  # as a new repository's .gitattributes has them
DROP = "drop"  # a fault: the connection ends half way through the request


@dataclass
class Request:
    """One request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Repo:
    """A repository: what each commit holds, oldest first."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def head(self) -> str:
        """The name of the last commit."""
        return hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()


class HubStandIn:
    """The server. Use it as a context manager.

    Args:
        users: token -> user name. A user may write to what begins with the name.
    """

    def __init__(self, users: dict[str, str]) -> None:
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.requests: list[Request] = []
        self.faults: list[tuple[int | str, str]] = []  # (status or DROP, part of the path)
        self.delay = 0.0  # seconds before each answer
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def make_faults(self, *faults: int | str, path: str = "") -> None:
        """Let the next requests, or those with a part of their path, fail: each with a status, or with DROP."""
        self.faults += [(fault, path) for fault in faults]

    def files(self, repo: str) -> dict[str, bytes]:
        """What a repository holds now."""
        return self.repos[repo].commits[-1]

    def put(self, repo: str, files: dict[str, bytes]) -> None:
        """A repository that was there before."""
        self.repos[repo] = Repo(commits=[files])


class Handler(BaseHTTPRequestHandler):
    """Answers one request after another on a connection."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen: `hub.requests` has it all."""

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_HEAD(self) -> None:
        self.handle_one("HEAD")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_PUT(self) -> None:
        self.handle_one("PUT")

    def handle_one(self, method: str) -> None:
        """Read, fail if that is due, else find the route and answer."""
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        request = Request(method, self.path, dict(self.headers.items()))
        hub.requests.append(request)
        fault = next((each for each in hub.faults if each[1] in path), None)
        if fault is not None:
            hub.faults.remove(fault)
            if fault[0] == DROP:
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                self.close_connection = True
                self.connection.close()
                return
        request.body = self.read_body()
        threading.Event().wait(hub.delay)  # not `time.sleep`, which tests replace
        if fault is not None:
            self.answer(int(fault[0]), {"error": f"asked to fail with {fault[0]}"})
            return
        for verb, pattern, route in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in verb.split("|"):
                route(self, request, *match.groups())
                return
        self.answer(404, {"error": f"no such page: {method} {path}"})

    def read_body(self) -> bytes:
        """The request's body, of a known length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Send JSON, or bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if isinstance(content, dict) and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.send_header("Content-Type", "application/octet-stream" if body is content else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- who may what -----------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        """Whose token came along."""
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, repo: str) -> bool:
        """Whether to go on; otherwise the answer is given."""
        user = self.user()
        if user is None:
            self.answer(401, {"error": "Invalid username or password."})
        elif repo.split("/")[0] != user:
            self.answer(403, {"error": f"You don't have the rights to create a model under {repo.split('/')[0]!r}"})
        elif repo not in self.hub.repos:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            return True
        return False

    def readable(self, repo: str) -> Repo | None:
        """A repository that the asker may see; otherwise the answer is given."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and repo.split("/")[0] != self.user()):
            self.answer(401 if self.user() is None else 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    # --- routes: uploading ------------------------------------------------------------------------------------------

    def who(self, request: Request) -> None:
        user = self.user()
        self.answer(*((200, {"type": "user", "name": user}) if user else (401, {"error": "Invalid username"})))

    def create(self, request: Request) -> None:
        wanted = json.loads(request.body)
        user = self.user()
        repo = f"{wanted['organization'] or user}/{wanted['name']}"
        known = repo in self.hub.repos
        self.hub.repos.setdefault(repo, Repo(private=wanted.get("visibility") == "private"))
        if not self.may_write(repo):
            if not known:
                del self.hub.repos[repo]
        elif known:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        else:
            self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self, request: Request) -> None:
        """As the Hub: the head of the card must be YAML; a card without one is warned of."""
        card = json.loads(request.body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        try:
            values = yaml.safe_load(head[1]) if head else None
        except yaml.YAMLError as fault:
            self.answer(400, {"errors": [{"message": str(fault)}], "warnings": []})
            return
        warnings = [] if isinstance(values, dict) else [{"message": "empty or missing yaml metadata in repo card"}]
        self.answer(200, {"errors": [], "warnings": warnings})

    def preupload(self, request: Request, repo: str) -> None:
        if not self.may_write(repo):
            return
        there = self.hub.files(repo)
        files = []
        for each in json.loads(request.body)["files"]:
            path, large = each["path"], each["path"].endswith(LFS)
            known = {"oid": (sha256 if large else git_hash)(there[path])} if path in there else {}
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | known)
        self.answer(200, {"files": files})

    def lfs_batch(self, request: Request, repo: str) -> None:
        if not self.may_write(repo):
            return
        objects: list[dict[str, Any]] = []
        for each in json.loads(request.body)["objects"]:
            place = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}?signature=abc"}}
            place["verify"] = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
            objects.append(each if each["oid"] in self.hub.storage else each | {"actions": place})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, name: str) -> None:
        """What the storage behind the Hub takes: an object under its own hash, without a token."""
        if sha256(request.body) != name:
            self.answer(400, {"error": "the content has another hash"})
            return
        self.hub.storage[name] = request.body
        self.answer(200, b"")

    def lfs_verify(self, request: Request, repo: str) -> None:
        if self.may_write(repo):
            known = json.loads(request.body)["oid"] in self.hub.storage
            self.answer(*((200, {}) if known else (404, {"error": "the object is not there"})))

    def commit(self, request: Request, repo: str) -> None:
        if not self.may_write(repo):
            return
        lines = [json.loads(line) for line in request.body.splitlines()]
        files, message = dict(self.hub.files(repo)), ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.storage[value["oid"]]
                case other:
                    self.answer(400, {"error": f"this stand-in knows no {other}"})
                    return
        found = self.hub.repos[repo]
        found.commits.append(files)
        found.messages.append(message)
        url = f"{self.hub.url}/{repo}/commit/{found.head}"
        self.answer(200, {"commitUrl": url, "commitOid": found.head, "success": True})

    # --- routes: downloading ----------------------------------------------------------------------------------------

    def info(self, request: Request, repo: str, revision: str | None) -> None:
        found = self.readable(repo)
        if found is not None:
            names = [{"rfilename": name} for name in found.commits[-1]]
            facts = {"id": repo, "modelId": repo, "private": found.private, "sha": found.head, "siblings": names}
            self.answer(200, facts | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, request: Request, repo: str, revision: str) -> None:
        found = self.readable(repo)
        if found is None:
            return
        rows = []
        for name, content in found.commits[-1].items():
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            if name.endswith(LFS):
                row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            rows.append(row)
        self.answer(200, rows)

    def resolve(self, request: Request, repo: str, revision: str, name: str) -> None:
        found = self.readable(repo)
        if found is None:
            return
        content = found.commits[-1].get(name)
        if content is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        mark = sha256(content) if name.endswith(LFS) else git_hash(content)
        self.answer(200, content, {"ETag": f'"{mark}"', "X-Repo-Commit": found.head, "Accept-Ranges": "none"})


Route = Callable[..., None]
REPO = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Route]] = [
    ("GET", r"/api/whoami-v2", Handler.who),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{REPO}/preupload/main", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_put),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", Handler.lfs_verify),
    ("POST", rf"/api/models/{REPO}/commit/main", Handler.commit),
    ("GET", rf"/api/models/{REPO}(?:/revision/(\w+))?", Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/(\w+)", Handler.tree),
    ("GET|HEAD", rf"/{REPO}/resolve/(\w+)/(.+)", Handler.resolve),
]


def sha256(content: bytes) -> str:
    """An LFS object's name."""
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    """A small file's name in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
