"""Pushed and pulled through the real client, against a stand-in for the Hub on this machine.

The stand-in keeps the bytes it is sent and serves them back: repositories, branches, commits, LFS uploads, redirects. What it does not know it
answers with 404, so a client that starts to call something else fails here and not at a user's. The client reads its settings on import,
so it runs in processes of its own.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from memarch import create_model, hub

TOKEN = "hf_standin"


class Repo:
    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, str]] = {}  # commit -> path -> sha256 of its blob
        self.branches = {"main": self.commit({}, "created")}

    def commit(self, files: dict[str, str], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {files}".encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def at(self, revision: str) -> dict[str, str]:
        return self.commits[self.resolve(revision)]


class StandIn(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store = f"http://localhost:{self.server_port}"  # another host, as where the Hub keeps large files
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[str] = []

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: self.blobs[sha] for path, sha in self.repos[repo].at(revision).items()}


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def reply(self, body: object = b"", status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.reply({"error": code}, 404, X_Error_Code=code)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self.body()
        self.server.seen.append(f"{self.command} {path}")
        for methods, pattern, reply in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, path)):
                names = match.groupdict()
                if "repo" in names:
                    return self.of_repo(reply, data, **names)
                return reply(self, data, **names)
        self.reply({"error": f"the stand-in does not know {self.command} {path}"}, 404)

    def of_repo(self, reply, data: bytes, repo: str, rev: str = "main", **names: str) -> None:
        found = self.server.repos.get(repo)
        if found is None or (found.private and not self.known()):
            return self.refuse("RepoNotFound")
        if self.command == "POST" and not self.known():
            return self.reply({"error": "Invalid token"}, 401)
        if found.resolve(rev) is None:
            return self.refuse("RevisionNotFound")
        reply(self, found, data, rev, **names)

    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    do_GET = do_HEAD = do_POST = do_PUT = answer

    # Pushing

    def create(self, data: bytes) -> None:
        if not self.known():
            return self.reply({"error": "Invalid token"}, 401)
        ask = json.loads(data)
        name = f"{ask['organization'] or 'me'}/{ask['name']}"
        exists = name in self.server.repos
        if not exists:
            self.server.repos[name] = Repo("private" in (ask.get("visibility"), ask.get("private") and "private"))
        self.reply({"url": f"{self.server.url}/{name}", "error": "You already created this model repo"}, 409 if exists else 200)

    def branch(self, repo: Repo, data: bytes, rev: str, name: str) -> None:
        exists = name in repo.branches
        repo.branches.setdefault(name, repo.branches["main"])
        self.reply({"error": "exists"}, 409 if exists else 200)

    def validate(self, data: bytes) -> None:
        self.reply({"errors": [], "warnings": []})

    def preupload(self, repo: Repo, data: bytes, rev: str) -> None:
        files = json.loads(data)["files"]
        modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
        self.reply({"files": [{"path": file["path"], "uploadMode": mode, "shouldIgnore": False} for file, mode in zip(files, modes, strict=True)]})

    def batch(self, repo: Repo, data: bytes, rev: str) -> None:
        objects = [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in json.loads(data)["objects"]]
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, data: bytes, oid: str) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            return self.reply({"error": "other bytes than announced"}, 400)
        self.server.blobs[oid] = data
        self.reply()

    def commit(self, repo: Repo, data: bytes, rev: str) -> None:
        files = dict(repo.at(rev))
        header, *lines = map(json.loads, data.splitlines())
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.server.blobs
                files[value["path"]] = value["oid"]
            else:
                content = base64.b64decode(value["content"])
                files[value["path"]] = hashlib.sha256(content).hexdigest()
                self.server.blobs[files[value["path"]]] = content
        repo.branches[rev] = oid = repo.commit(files, header["value"]["summary"])
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/me/model/commit/{oid}", "pullRequestUrl": None})

    # Pulling

    def tree(self, repo: Repo, data: bytes, rev: str) -> None:
        self.reply([{"type": "file", "path": path, "size": len(self.server.blobs[sha]), "oid": sha[:40]} for path, sha in repo.at(rev).items()])

    def resolve(self, repo: Repo, data: bytes, rev: str, file: str) -> None:
        sha, commit = repo.at(rev).get(file), repo.resolve(rev)
        if sha is None:
            return self.reply({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if file.endswith(".safetensors"):  # large files live elsewhere
            size = str(len(self.server.blobs[sha]))
            return self.reply(b"", 302, X_Repo_Commit=commit, X_Linked_Etag=f'"{sha}"', X_Linked_Size=size, Location=f"{self.server.store}/lfs/{sha}")
        self.reply(self.server.blobs[sha], X_Repo_Commit=commit, ETag=f'"{sha[:40]}"')

    def blob(self, data: bytes, oid: str) -> None:
        assert "Authorization" not in self.headers  # the token is for the Hub alone
        self.reply(self.server.blobs[oid], ETag=f'"{oid}"')


NAME = "(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{NAME}/branch/(?P<name>.+)", Handler.branch),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/preupload/(?P<rev>.+)", Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.batch),
    ("POST", f"/api/models/{NAME}/commit/(?P<rev>.+)", Handler.commit),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", Handler.upload),
    ("GET", f"/api/models/{NAME}/tree/(?P<rev>[^/]+)", Handler.tree),
    ("GET HEAD", f"/{NAME}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", Handler.resolve),
    ("GET HEAD", "/lfs/(?P<oid>[0-9a-f]+)", Handler.blob),
]


@pytest.fixture
def standin():
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


HEAD = f"""
import json, sys, torch
from memarch import create_model, from_pretrained
torch.set_num_threads(1)
TOKEN, said = {TOKEN!r}, {{}}

def model(seed):
    return create_model("hybrid-tiny", seed=seed)

def equal(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())

def refusal(*args, **kwargs):
    try:
        from_pretrained(*args, **kwargs)
    except FileNotFoundError as error:
        assert error.__cause__ is None and "\\n" not in str(error), error
        return str(error)
"""


def client(script: str, folder: Path, endpoint: str, **env: str) -> dict:
    """Run a script with the client's cache in `folder`; what it puts into `said` comes back."""
    (folder / "script.py").write_text(HEAD + textwrap.dedent(script) + "\njson.dump(said, open(sys.argv[1], 'w'))\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    # hf_xet speaks to a storage service of its own, which no stand-in plays; without it the client uploads and downloads over HTTP.
    quiet = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
    here = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(Path(hub.__file__).parents[1])}
    command = [sys.executable, "script.py", "said.json"]
    run = subprocess.run(command, cwd=folder, env={**clean, **quiet, **here, **env}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "said.json").read_text())


ONLINE = """
first = model(1).push_to_hub("me/model", token=TOKEN, private=True, max_shard_size="60KB", card={"license": "apache-2.0"})
said["first"], said["url"] = first.oid, str(first)
said["sharded"] = equal(from_pretrained("me/model", token=TOKEN), model(1))

branch = model(2).push_to_hub("me/model", token=TOKEN, revision="v2", commit_message="longer")
second = model(3).push_to_hub("me/model", token=TOKEN)
said["main"] = equal(from_pretrained("me/model", token=TOKEN), model(3))
said["branch"] = equal(from_pretrained("me/model", token=TOKEN, revision="v2"), model(2))
said["commit"] = equal(from_pretrained("me/model", token=TOKEN, revision=first.oid), model(1))
said["cached"] = equal(from_pretrained("me/model", local_files_only=True), model(3))
said["elsewhere"] = refusal("me/model", local_files_only=True, cache_dir="other")

said["no repository"] = refusal("me/nothing", token=TOKEN)
said["no token"] = refusal("me/model", cache_dir="other")
said["no revision"] = refusal("me/model", token=TOKEN, revision="v3")
"""

OFFLINE = """
said["main"] = equal(from_pretrained("me/model"), model(3))
said["branch"] = equal(from_pretrained("me/model", revision="v2"), model(2))
said["commit"] = equal(from_pretrained("me/model", revision=COMMIT), model(1))
said["nothing"] = refusal("me/nothing")
"""


def test_pushed_and_pulled_is_itself_online_and_offline(standin, tmp_path):
    said = client(ONLINE, tmp_path, standin.url)
    assert said["url"].endswith(f"/commit/{said['first']}")
    for case in ("sharded", "main", "branch", "commit", "cached"):
        assert said[case], case
    assert "neither a folder here nor whole in the cache, and the Hub was not asked" in said["elsewhere"]
    assert "no folder me/nothing and no repository me/nothing on the Hub" in said["no repository"]
    assert "for a private one pass token" in said["no token"]
    assert said["no revision"] == "me/model has no branch, tag or commit 'v3'."

    # What arrived is what save_pretrained writes, byte for byte; the card names the repository, and no stale shard is left.
    here = hub.save_pretrained(create_model("hybrid-tiny", seed=3), tmp_path / "here")
    arrived = standin.files("me/model")
    assert sorted(arrived) == sorted(file.name for file in here.iterdir())
    for file in here.iterdir():
        want = file.read_bytes().replace(b'from_pretrained(".")  # this folder', b'from_pretrained("me/model")')
        assert arrived[file.name] == want, file.name
    assert hub.INDEX in standin.files("me/model", said["first"])
    assert b"license: apache-2.0" in standin.files("me/model", said["first"])[hub.CARD]
    assert [seen for seen in standin.seen if seen.startswith("POST") and "/commit/" in seen] == [
        "POST /api/models/me/model/commit/main",
        "POST /api/models/me/model/commit/v2",
        "POST /api/models/me/model/commit/main",
    ]

    asked = len(standin.seen)
    said = client(f"COMMIT = {said['first']!r}\n" + OFFLINE, tmp_path, standin.url, HF_HUB_OFFLINE="1")
    assert said["main"]
    assert said["branch"]
    assert said["commit"]
    assert "the Hub was not asked" in said["nothing"]
    assert len(standin.seen) == asked  # nobody was asked


FOREIGN = """
from memarch import ConfigError
try:
    from_pretrained("some/llama")
except ConfigError as error:
    said["foreign"] = str(error)
said["pickle"] = refusal("some/pickle")
try:
    model(1).push_to_hub("me/model", token="hf_wrong")
except OSError as error:
    said["wrong token"] = str(error)
"""


def test_a_foreign_model_is_refused_before_its_weights_are_fetched(standin, tmp_path):
    for name, files in {
        "some/llama": {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"gigabytes"},
        "some/pickle": {"config.json": json.dumps(config()).encode(), "pytorch_model.bin": b"code"},
    }.items():
        repo = standin.repos[name] = Repo(private=False)
        blobs = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        standin.blobs |= blobs
        repo.branches["main"] = repo.commit(dict(zip(files, blobs, strict=True)), "foreign")
    said = client(FOREIGN, tmp_path, standin.url)
    assert "some/llama is not an export of memarch" in said["foreign"]
    assert "'llama', a model of another library" in said["foreign"]
    assert "some/pickle has no weights: neither model.safetensors nor model.safetensors.index.json is there" in said["pickle"]
    assert "401" in said["wrong token"]
    assert not any("some/llama" in seen and "safetensors" in seen for seen in standin.seen)
    assert not any("pytorch_model.bin" in seen for seen in standin.seen)


def config() -> dict:
    made = create_model("hybrid-tiny", device="meta").config
    return hub.encode(hub.Export(format_version=1, library_name="memarch", memarch_version="0", model=made))
