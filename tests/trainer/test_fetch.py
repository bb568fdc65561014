"""Fetching: what is taken, what is kept, what is noticed, and what a user reads when it fails."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

pytest.importorskip("obstore", reason="needs the trainer extra")

from finetune_api.causes import Cause
from finetune_api.run import ENV_CACHE, ENV_CONFIG, ENV_TERMINATION_LOG, EXIT_FAILED, EXIT_USER, Termination
from finetune_api.spec import DataSource
from finetune_trainer import fetch as fetching
from finetune_trainer.data.files import read_rows
from finetune_trainer.fetch import fetch
from finetune_trainer.fetching.wanted import local_files, split_pattern
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import Store, file_digest, local_path
from tests.trainer.test_storage import flat_s3, flat_s3_server, no_credentials, raw_s3, s3, s3_server
from tests.trainer.tiny import ROOT, make_config

__all__ = ["flat_s3", "flat_s3_server", "no_credentials", "raw_s3", "s3", "s3_server"]  # fixtures

PLAIN = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "model.safetensors": b"weights" * 1000,
}
CLUTTER = {
    "README.md": b"x",
    "pytorch_model.bin": b"x",
    "consolidated.safetensors": b"x",
    "original/params.json": b"x",
    "modeling_x.py": b"x",
    "onnx/model.onnx": b"x",
    "model.Q4.gguf": b"gguf",
}
SHARDED = {
    **{name: content for name, content in PLAIN.items() if name != "model.safetensors"},
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    ).encode(),
    "m-1.safetensors": b"1",
    "m-2.safetensors": b"2",
}
ROWS = b'{"instruction": "a", "output": "b"}\n'


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


class Bucket:
    """Stands in for an object store, on a folder: fetch sees s3:// URIs, and requests are counted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.down = False
        bucket = self

        class Counted(Store):
            def __init__(self, uri: str) -> None:
                self.asked = uri
                super().__init__(f"file://{folder}/" + uri.split("://", 1)[1])

            def list(self, prefix: str = "") -> Any:
                bucket.count(f"list {prefix}", self.asked)
                return super().list(prefix)

            def download(self, path: str, to: Path) -> None:
                bucket.count(f"get {path}", self.asked)
                super().download(path, to)

        monkeypatch.setattr(fetching, "Store", Counted)

    def count(self, request: str, uri: str) -> None:
        if self.down:
            raise RunError(Cause.STORAGE_UNAVAILABLE, f"cannot reach {uri}")
        self.requests.append(request)

    def put(self, prefix: str, files: dict[str, bytes]) -> None:
        put(self.folder / prefix, files)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    bucket = Bucket(tmp_path / "store", monkeypatch)
    bucket.put("b/model", PLAIN | CLUTTER)
    bucket.put("b/data", {"rows.jsonl": ROWS})
    return bucket


def config_for(tmp_path, uri="s3://b/model", train="s3://b/data/rows.jsonl", **of_model):
    return make_config(tmp_path, model={"uri": uri} | of_model, data={"train": [{"uri": train}]})


# --- in place ---------------------------------------------------------------------------------------------------


def test_files_are_used_where_they_are(tmp_path):
    model, data = put(tmp_path / "a model", PLAIN), put(tmp_path / "data", {"rows.jsonl": ROWS})
    config = config_for(tmp_path, model.as_uri(), f"{data.as_uri()}/rows.jsonl")
    fetched = fetch(config, tmp_path / "cache")
    assert (fetched.model, fetched.train, fetched.eval) == (model, [data / "rows.jsonl"], [])
    assert not (tmp_path / "cache").exists()
    assert local_path(config.model.uri) == model


def test_the_digest_of_files_in_place_follows_their_content(tmp_path):
    model, data = put(tmp_path / "model", PLAIN), put(tmp_path / "data", {"rows.jsonl": ROWS, ".hidden": b"x"})
    config = config_for(tmp_path, model.as_uri(), data.as_uri())
    first = fetch(config, tmp_path / "cache").digests
    put(data, {".hidden": b"y"})
    assert fetch(config, tmp_path / "cache").digests == first
    put(data, {"rows.jsonl": ROWS + ROWS})
    second = fetch(config, tmp_path / "cache").digests
    assert second[data.as_uri()] != first[data.as_uri()]
    assert second[model.as_uri()] == first[model.as_uri()]


def test_large_weights_in_place_are_sampled_and_large_data_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "_LARGE", 4 * 2**20)
    big = bytearray(os.urandom(5 * 2**20))
    model, data = put(tmp_path / "model", PLAIN | {"model.safetensors": big}), put(tmp_path / "d", {"a.jsonl": big})
    config = config_for(tmp_path, model.as_uri(), data.as_uri())
    first = fetch(config, tmp_path / "cache").digests
    assert first[model.as_uri()].startswith("sampled:")
    assert first[data.as_uri()].startswith("sha256:")
    big[3 * 2**20 + 2**19] ^= 1  # between the samples
    put(data, {"a.jsonl": bytes(big)})
    second = fetch(config, tmp_path / "cache").digests
    assert second[data.as_uri()] != first[data.as_uri()]
    monkeypatch.setattr(fetching, "file_digest", lambda file: "again" if file.suffix == ".jsonl" else file_digest(file))
    assert fetch(config, tmp_path / "cache").digests == second, "large data is read once per node"


@pytest.mark.parametrize(
    ("model", "train", "cause"),
    [
        ("file:///nowhere/model", None, Cause.MODEL_NOT_FOUND),
        (None, "file:///nowhere/rows.jsonl", Cause.DATA_NOT_FOUND),
    ],
)
def test_a_missing_file_is_named(tmp_path, model, train, cause):
    here = put(tmp_path / "model", PLAIN)
    config = config_for(tmp_path, model or here.as_uri(), train or here.as_uri())
    with pytest.raises(RunError, match=r"file:///nowhere/.* is not there on this node") as error:
        fetch(config, tmp_path / "cache")
    assert error.value.cause is cause


# --- object storage ---------------------------------------------------------------------------------------------


def test_only_what_a_model_needs_is_fetched(tmp_path, bucket):
    fetched = fetch(config_for(tmp_path), tmp_path / "cache")
    assert names(fetched.model) == set(PLAIN)
    assert fetched.train[0].name == "rows.jsonl"
    assert fetched.train[0].read_bytes() == ROWS
    assert fetched.digests["s3://b/model"].startswith("sha256:")


def test_the_shards_that_the_index_names_are_fetched(tmp_path, bucket):
    bucket.put("b/sharded", SHARDED | CLUTTER)
    assert names(fetch(config_for(tmp_path, "s3://b/sharded"), tmp_path / "cache").model) == set(SHARDED)
    (bucket.folder / "b/sharded/m-2.safetensors").unlink()
    with pytest.raises(RunError, match=r"incomplete: .*index\.json names m-2\.safetensors, which are not there"):
        fetch(config_for(tmp_path, "s3://b/sharded"), tmp_path / "cache", refresh=True)


def test_code_is_fetched_only_where_it_is_trusted(tmp_path, bucket):
    trusted = config_for(tmp_path, trust_remote_code=True)
    assert "modeling_x.py" in names(fetch(trusted, tmp_path / "cache").model)
    assert "modeling_x.py" not in names(fetch(config_for(tmp_path), tmp_path / "cache").model)


def test_a_gguf_file_is_fetched_by_name(tmp_path, bucket):
    fetched = fetch(config_for(tmp_path, gguf_file="model.Q4.gguf"), tmp_path / "cache")
    assert names(fetched.model) == {*PLAIN, "model.Q4.gguf"} - {"model.safetensors"}
    with pytest.raises(RunError, match=r"holds no file 'x\.gguf' .*its GGUF files: model\.Q4\.gguf"):
        fetch(config_for(tmp_path, gguf_file="x.gguf"), tmp_path / "cache")


def test_a_folder_of_data_is_fetched_whole(tmp_path, bucket):
    bucket.put("b/many", {"a.jsonl": ROWS, "deep/b.json": ROWS, "notes.txt": b"x"})
    fetched = fetch(config_for(tmp_path, train="s3://b/many"), tmp_path / "cache")
    assert names(fetched.train[0]) == {"a.jsonl", "deep/b.json"}


def test_the_second_fetch_asks_nobody(tmp_path, bucket):
    config = config_for(tmp_path)
    first = fetch(config, tmp_path / "cache", refresh=True)
    bucket.down = True
    assert fetch(config, tmp_path / "cache") == first


def test_a_refresh_of_what_has_not_changed_downloads_nothing(tmp_path, bucket):
    config = config_for(tmp_path)
    first = fetch(config, tmp_path / "cache", refresh=True)
    bucket.requests.clear()
    assert fetch(config, tmp_path / "cache", refresh=True) == first
    assert bucket.requests == ["list ", "list "]


def test_a_refresh_takes_what_has_changed_and_leaves_the_old_to_those_who_use_it(tmp_path, bucket):
    config = config_for(tmp_path)
    first = fetch(config, tmp_path / "cache", refresh=True)
    bucket.put("b/data", {"rows.jsonl": ROWS * 2})
    second = fetch(config, tmp_path / "cache", refresh=True)
    assert second.train[0].read_bytes() == ROWS * 2
    assert first.train[0].read_bytes() == ROWS
    assert second.digests["s3://b/data/rows.jsonl"] != first.digests["s3://b/data/rows.jsonl"]
    assert second.model == first.model
    assert fetch(config, tmp_path / "cache") == second


def test_without_the_storage_a_refresh_uses_what_is_cached(tmp_path, bucket, caplog):
    config = config_for(tmp_path)
    first = fetch(config, tmp_path / "cache", refresh=True)
    bucket.down = True
    assert fetch(config, tmp_path / "cache", refresh=True) == first
    assert "going on with the cached sha256:" in caplog.text
    with pytest.raises(RunError, match="cannot reach"):
        fetch(config, tmp_path / "another", refresh=True)


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_cache_is_fetched_again(tmp_path, bucket, refresh, damage):
    config = config_for(tmp_path)
    weights = fetch(config, tmp_path / "cache").model / "model.safetensors"
    if damage == "shorter":
        weights.write_bytes(b"weights")
    else:
        weights.unlink()
    assert (fetch(config, tmp_path / "cache", refresh=refresh).model / "model.safetensors").stat().st_size == 7000


def test_a_refresh_finds_a_flipped_bit(tmp_path, bucket):
    config = config_for(tmp_path)
    weights = fetch(config, tmp_path / "cache").model / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(weights.read_bytes().replace(b"w", b"v", 1))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = fetch(config, tmp_path / "cache", refresh=True).model / "model.safetensors"
    assert again.read_bytes() == PLAIN["model.safetensors"]


def test_what_a_crash_left_half_fetched_is_not_taken(tmp_path, bucket, monkeypatch):
    config = config_for(tmp_path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "write_record", die)
        with pytest.raises(KeyboardInterrupt):
            fetch(config, tmp_path / "cache")
    assert names(fetch(config, tmp_path / "cache").model) == set(PLAIN)


def test_many_fetchers_of_one_cache_download_once(tmp_path, bucket):
    config = config_for(tmp_path)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: fetch(config, tmp_path / "cache"), range(6)))
    assert len({str(each) for each in found}) == 1
    # who waited for the lock lists again, but downloads nothing
    assert bucket.requests.count("get model.safetensors") == 1


@pytest.mark.parametrize(
    ("files", "match", "cause"),
    [
        ({}, "does not exist, or the folder is empty", Cause.MODEL_NOT_FOUND),
        (
            {"config.json": b"{}", "pytorch_model.bin": b""},
            "Only safetensors are accepted",
            Cause.INVALID_CONFIGURATION,
        ),
        ({"config.json": b"{}", "x.gguf": b""}, r"name one in spec\.model\.gguf_file, .* \(x\.gguf\)", None),
        ({"a.txt": b""}, r"holds no model: no \*\.safetensors file among a\.txt", Cause.MODEL_NOT_FOUND),
    ],
)
def test_a_folder_that_holds_no_readable_model_says_what_it_holds(tmp_path, bucket, files, match, cause):
    bucket.put("b/other", files)
    with pytest.raises(RunError, match=match) as error:
        fetch(config_for(tmp_path, "s3://b/other"), tmp_path / "cache")
    assert cause is None or error.value.cause is cause


def test_a_pattern_fetches_what_it_matches_and_nothing_else(tmp_path, bucket):
    bucket.put("b/rows", dict.fromkeys(("1.jsonl", "2.jsonl.gz", "x/3.jsonl", "4.csv", "README.txt"), b"{}"))
    for pattern, found in (
        ("s3://b/rows/*.jsonl*", ["1.jsonl", "2.jsonl.gz"]),
        ("s3://b/rows/**/[0-3].jsonl", ["1.jsonl", "x/3.jsonl"]),
        ("s3://b/rows", ["1.jsonl", "2.jsonl.gz", "4.csv", "x/3.jsonl"]),
    ):
        [path] = fetch(config_for(tmp_path, train=pattern), tmp_path / "cache").train
        root = Path(split_pattern(str(path))[0])
        assert [str(file.relative_to(root)) for file in local_files(path)] == found
    with pytest.raises(RunError, match=r"holds no data"):
        fetch(config_for(tmp_path, train="s3://b/rows/*.parquet"), tmp_path / "cache")


def test_a_folder_without_data_says_what_is_looked_for(tmp_path, bucket):
    with pytest.raises(RunError, match=r"ends in \.jsonl, \.json, .*\.arrow among a\.md") as error:
        bucket.put("b/other", {"a.md": b""})
        fetch(config_for(tmp_path, train="s3://b/other"), tmp_path / "cache")
    assert error.value.cause is Cause.DATA_NOT_FOUND


def test_a_cache_that_cannot_be_written_is_named(tmp_path, bucket):
    (tmp_path / "cache").write_text("")
    with pytest.raises(RunError, match=r"cannot write to the cache .*Check its free space") as error:
        fetch(config_for(tmp_path), tmp_path / "cache")
    assert error.value.cause is Cause.STORAGE_UNAVAILABLE


def test_a_real_s3_server(tmp_path, s3):
    put(s3 / "team" / "model", PLAIN | CLUTTER)
    Store("s3://team/data").put("rows.jsonl", ROWS)
    config = config_for(tmp_path, "s3://team/model", "s3://team/data/rows.jsonl")
    fetched = fetch(config, tmp_path / "cache", refresh=True)
    assert names(fetched.model) == set(PLAIN)
    assert fetched.train[0].read_bytes() == ROWS
    assert fetch(config, tmp_path / "cache", refresh=True) == fetched


# --- the hub ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "s3", "flat_s3"])
def place(request, tmp_path):
    """Somewhere to put files: (URI of a folder, what puts files below it)."""
    if request.param == "file":
        return (tmp_path / "place").as_uri(), lambda files: put(tmp_path / "place", files)
    request.getfixturevalue(request.param)
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    store = Store(f"s3://team/{name}")
    return store.uri(), lambda files: [store.put(path, content) for path, content in files.items()]


PARTS = {f"part-{number}.jsonl": ROWS * 10 for number in range(3)}
"""What Spark writes of rows.jsonl: a folder of that name."""


def read(tmp_path, uri, cache="cache"):
    """The rows of a source that are read, and the digest of what was fetched."""
    model = put(tmp_path / "model", PLAIN)
    fetched = fetch(config_for(tmp_path, model.as_uri(), uri), tmp_path / cache, refresh=True)
    return sum(1 for _ in read_rows(fetched.train[0])), fetched.digests[uri]


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows"])
def test_a_folder_is_read_whole_whatever_its_name(tmp_path, place, name, slash):
    uri, put_there = place
    put_there({f"{name}/{part}": content for part, content in (PARTS | {"_SUCCESS": b""}).items()})
    rows, digest = read(tmp_path, f"{uri}/{name}{slash}")
    assert rows == 30
    digests = {read(tmp_path, f"{uri}/{name}{other}")[1] for other in ("", "/")} | {digest}
    assert len(digests) == 1


def test_of_a_file_and_a_folder_of_one_name_a_slash_means_the_folder(tmp_path, flat_s3, caplog):
    store = Store("s3://team/both")
    for path, content in {"rows.jsonl": ROWS, **{f"rows.jsonl/{part}": c for part, c in PARTS.items()}}.items():
        store.put(path, content)
    assert read(tmp_path, "s3://team/both/rows.jsonl/")[0] == 30
    assert read(tmp_path, "s3://team/both/rows.jsonl")[0] == 1
    assert "s3://team/both/rows.jsonl is a file and a folder" in caplog.text


def test_a_marker_of_a_folder_is_neither_a_file_nor_a_change(tmp_path, raw_s3):
    for key in ("marked/", "marked/rows.jsonl/", "marked/sub.jsonl/"):
        raw_s3.put_object(Bucket="team", Key=key, Body=b"")
    for part, content in PARTS.items():
        raw_s3.put_object(Bucket="team", Key=f"marked/rows.jsonl/{part}", Body=content)
    for uri in ("s3://team/marked", "s3://team/marked/", "s3://team/marked/rows.jsonl", "s3://team/marked/rows.jsonl/"):
        assert read(tmp_path, uri)[0] == 30, uri


def test_a_cache_of_before_is_not_taken_for_a_folder_named_like_a_file(tmp_path, bucket):
    bucket.put("b/rows.jsonl", PARTS)
    config = config_for(tmp_path, train="s3://b/rows.jsonl/")
    fetch(config, tmp_path / "cache")
    [record] = [r for r in (tmp_path / "cache").glob("*/record.json") if "part-0" in r.read_text()]
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "only"}))
    bucket.requests.clear()
    assert local_files(fetch(config, tmp_path / "cache").train[0]) != []
    assert bucket.requests == ["list "], "nothing is downloaded again"
    bucket.down = True
    assert len(local_files(fetch(config, tmp_path / "cache").train[0])) == 3


def test_a_reward_function_is_a_file(tmp_path, bucket):
    bucket.put("b/rewards.py", {"a.py": b"x"})
    with pytest.raises(RunError, match=r"s3://b/rewards\.py is a folder with a\.py\. Name one file in it"):
        fetching._source(DataSource(uri="s3://b/rewards.py"), None, Cause.DATA_NOT_FOUND, tmp_path, False, {})


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client asks for."""

    files: dict[str, dict[str, bytes]]
    requests: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path).strip("/")
        self.requests.append(f"{self.command} {path}")
        if "gated" in path:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if "/revision/" in path:
            kind, rest = path.removeprefix("api/").split("/", 1)
            repo, revision = rest.split("/revision/")
            files = self.files.get(f"datasets/{repo}" if kind == "datasets" else repo)
            if files is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            if revision == "missing":
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            siblings = [{"rfilename": name} for name in files]
            return self._send(200, json.dumps({"id": repo, "sha": "c" * 40, "siblings": siblings}).encode(), {}, body)
        if "/resolve/" not in path:
            return self._send(404, b"{}", {}, body)
        repo, rest = path.split("/resolve/")
        name = rest.split("/", 1)[1]
        content = self.files[repo][name]
        large = name.endswith(".safetensors")
        etag = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        return self._send(200, content, {"X-Repo-Commit": "c" * 40, "ETag": f'"{etag}"'}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    """(endpoint, handler class)"""
    kind = type("OneHub", (Hub,), {"files": {}, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()


def init_container(tmp_path, config, *options, **environment):
    """Run the init container; (exit code, stderr)."""
    (tmp_path / "config.json").write_text(config.model_dump_json())
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_", "FINETUNE_"))}
    done = subprocess.run(
        [sys.executable, *options, "-m", "finetune_trainer.fetch"],
        env=keep
        | {
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "trainer_image")),
            "HF_HUB_DISABLE_XET": "1",
            ENV_CONFIG: str(tmp_path / "config.json"),
            ENV_CACHE: str(tmp_path / "cache"),
            ENV_TERMINATION_LOG: str(tmp_path / "termination"),
        }
        | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def word(tmp_path) -> Termination:
    return Termination.model_validate_json((tmp_path / "termination").read_bytes())


def test_the_init_container_fetches_from_the_hub_and_the_trainer_finds_it_there(tmp_path, hub, monkeypatch):
    endpoint, kind = hub
    kind.files = {
        "org/name": SHARDED | CLUTTER,
        "datasets/org/rows": {"README.md": b"x", "train.jsonl": ROWS, "a.py": b""},
    }
    config = config_for(tmp_path, "hf://org/name", "hf://datasets/org/rows")
    code, said = init_container(tmp_path, config, HF_ENDPOINT=endpoint)
    assert code == 0, said
    assert not (tmp_path / "termination").exists()
    fetched = fetch(config, tmp_path / "cache")  # HF_ENDPOINT is not set here: no request could succeed
    assert names(fetched.model) == set(SHARDED)
    assert names(fetched.train[0]) == {"README.md", "train.jsonl"}
    assert fetched.digests == {
        "hf://org/name@main": "git:" + "c" * 40,
        "hf://datasets/org/rows@main": "git:" + "c" * 40,
    }
    assert str(fetched.model).startswith(str(tmp_path / "cache" / "hf")), "HF_HOME defaults to the shared cache"
    # again, without the hub: HF_HUB_OFFLINE, and a hub that is down
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}):
        code, said = init_container(tmp_path, config, **environment)
        assert code == 0, said


def test_one_file_of_a_hub_data_set(tmp_path, hub):
    endpoint, kind = hub
    kind.files = {"org/name": PLAIN, "datasets/org/rows": {"a/one.jsonl": ROWS, "a/two.jsonl": b""}}
    config = config_for(tmp_path, "hf://org/name", "hf://datasets/org/rows/a/one.jsonl")
    code, said = init_container(tmp_path, config, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "home"))
    assert code == 0, said
    [path] = fetch(config, tmp_path / "cache").train
    assert path.read_bytes() == ROWS
    assert str(path).startswith(str(tmp_path / "home"))


@pytest.mark.parametrize("uri", ["hf://datasets/org/rows.jsonl", "hf://datasets/org/name/rows.jsonl"])
def test_a_folder_of_the_hub_is_read_whole_whatever_its_name(tmp_path, hub, uri):
    endpoint, kind = hub
    inside = uri.removeprefix("hf://datasets/org/").partition("/")[2]
    files = {f"{inside}/{part}" if inside else part: content for part, content in PARTS.items()}
    kind.files = {"org/name": PLAIN, "/".join(uri.removeprefix("hf://").split("/")[:3]): files}
    config = config_for(tmp_path, "hf://org/name", uri)
    code, said = init_container(tmp_path, config, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "home"))
    assert code == 0, said
    assert sum(1 for _ in read_rows(fetch(config, tmp_path / "cache").train[0])) == 30


def test_the_init_container_is_light_and_quick(tmp_path):
    model = put(tmp_path / "model", PLAIN)
    code, said = init_container(tmp_path, config_for(tmp_path, model.as_uri(), model.as_uri()), "-X", "importtime")
    assert code == 0, said
    imported = {line.rsplit("|", 1)[-1].strip() for line in said.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "transformers", "datasets", "numpy", "huggingface_hub", "peft"}


@pytest.mark.parametrize(
    ("model", "revision", "cause", "said"),
    [
        ("hf://org/nothing", "main", Cause.MODEL_NOT_FOUND, "no such repository, or it is private"),
        ("hf://org/name", "missing", Cause.MODEL_NOT_FOUND, "no such revision"),
        ("hf://org/gated", "main", Cause.ACCESS_DENIED, "is gated"),
        ("hf://org/name/../x y", "main", Cause.MODEL_NOT_FOUND, ""),
    ],
)
def test_what_the_hub_refuses_is_a_mistake_of_the_user(tmp_path, hub, model, revision, cause, said):
    endpoint, kind = hub
    kind.files = {"org/name": PLAIN}
    config = config_for(tmp_path, model, revision=revision)
    code, stderr = init_container(tmp_path, config, HF_ENDPOINT=endpoint)
    assert code == EXIT_USER, stderr
    last = word(tmp_path)
    assert (last.cause, last.exit_code) == (cause, EXIT_USER)
    assert said in last.message
    assert model in last.message


def test_an_unreachable_hub_names_endpoint_and_model_and_is_tried_again(tmp_path):
    config = config_for(tmp_path, "hf://org/name")
    code, stderr = init_container(tmp_path, config, HF_ENDPOINT="http://127.0.0.1:1")
    assert code == EXIT_FAILED, stderr
    last = word(tmp_path)
    assert last.cause is Cause.STORAGE_UNAVAILABLE
    assert last.message.startswith("hf://org/name (revision main, endpoint http://127.0.0.1:1) cannot be fetched: ")
    assert "Connection refused" in last.message
    assert "set HF_ENDPOINT for a mirror" in last.message


def test_offline_without_a_copy_says_which_cache_was_looked_into(tmp_path):
    config = config_for(tmp_path, "hf://org/name")
    code, stderr = init_container(tmp_path, config, HF_HUB_OFFLINE="1")
    assert code == EXIT_USER, stderr
    assert f"is not in the cache {tmp_path}/cache/hf/hub, and HF_HUB_OFFLINE forbids" in word(tmp_path).message


def test_a_broken_configuration_is_a_mistake_of_the_user(tmp_path):
    config = config_for(tmp_path)
    broken = type("Broken", (), {"model_dump_json": lambda _: config.model_dump_json()[:-5]})()
    code, _ = init_container(tmp_path, broken)
    assert code == EXIT_USER
    assert word(tmp_path).cause is Cause.INVALID_CONFIGURATION
