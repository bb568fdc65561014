"""The object store, on a folder and on a real S3 server (versitygw, where one is built)."""

import http.server
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

pytest.importorskip("obstore", reason="needs the trainer extra")

from finetune_api.causes import Cause
from finetune_api.run import ENV_LOCAL
from finetune_operator.cluster.processes import free_port
from finetune_trainer.outcome import RunError
from finetune_trainer.storage import Store, digest, file_digest
from tests.cluster import binaries
from tests.conftest import available

AWS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@contextmanager
def serving(command, port, **environment):
    """A server's process that listens at this port of the loopback interface."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=os.environ | environment, **quiet)
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    process.send_signal(signal.SIGTERM)
    process.wait()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The S3 server of the cluster tests, whose objects are files. (environment, folder)"""
    available(lambda: binaries.require(["versitygw"]))
    folder = tmp_path_factory.mktemp("s3")
    (folder / "team").mkdir()
    port = free_port()
    command = [binaries.folder() / "versitygw", "--port", f"127.0.0.1:{port}", "--quiet", "posix", str(folder)]
    with serving(command, port, ROOT_ACCESS_KEY="key", ROOT_SECRET_KEY="secret") as environment:
        yield environment, folder


@pytest.fixture(scope="session")
def flat_s3_server():
    """One that knows keys only, as AWS does: the environment to reach it. Its buckets come into being by themselves."""
    available(binaries.flat_s3)
    port = free_port()
    with serving([binaries.flat_s3(), f"127.0.0.1:{port}"], port) as environment:
        yield environment


@pytest.fixture
def no_credentials(monkeypatch):
    for name in AWS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def s3(s3_server, no_credentials, monkeypatch):
    """The server, its keys in the environment."""
    environment, folder = s3_server
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def flat_s3(flat_s3_server, no_credentials, monkeypatch):
    """The other server, in the environment."""
    for name, value in flat_s3_server.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["s3", "flat_s3"])
def raw_s3(request):
    """Each of two servers of unlike behaviour, by a client that knows keys only; they have a bucket team."""
    request.getfixturevalue(request.param)
    return keys_client()


def keys_client():
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")


@pytest.fixture(params=["file", "s3", "flat_s3"])
def store(request, tmp_path):
    """An empty folder of each kind."""
    if request.param == "file":
        return Store(f"file://{tmp_path}/a%20folder/deep")
    request.getfixturevalue(request.param)
    return Store(f"s3://team/{request.node.name.split('[')[0]}/deep/")


# --- what every store does --------------------------------------------------------------------------------------


def test_what_is_put_is_there(store):
    assert store.list() == []
    store.put("b/c.txt", b"hello")
    store.put("a.txt", b"")
    store.put("b/c.txt", b"hello again")
    assert store.get("b/c.txt") == b"hello again"
    assert store.get("a.txt") == b""
    assert [(entry.path, entry.size) for entry in store.list()] == [("a.txt", 0), ("b/c.txt", 11)]
    assert [entry.path for entry in store.list("b")] == ["b/c.txt"]
    assert [entry.path for entry in store.list("b/c.txt")] == ["b/c.txt"]
    assert store.list("nothing") == []


def test_what_is_missing_is_a_file_not_found_error(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="nope does not exist"):
        store.get("nope")
    with pytest.raises(FileNotFoundError):
        store.download("nope", tmp_path / "x")


def test_uris(store):
    assert store.uri("a/b") == store.uri() + "/a/b"
    assert not store.uri().endswith("/")


def test_another_version_is_told_from_the_one_before(store):
    store.put("a", b"1")
    [first] = store.list()
    store.put("a", b"2")
    [second] = store.list()
    assert first.version != second.version


@pytest.mark.parametrize("size", [0, 1, 16 * 2**20, 40 * 2**20 + 7], ids=["empty", "byte", "part", "parts"])
def test_files_go_there_and_back_in_parts(store, tmp_path, size):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    store.put("deep/file", source)
    store.download("deep/file", tmp_path / "back")
    assert file_digest(tmp_path / "back") == file_digest(source) == digest(source.read_bytes())


def test_of_many_writers_exactly_one_creates_an_object(store):
    start = threading.Barrier(8)

    def create(number: int) -> bool:
        start.wait()
        return store.put_if_absent("claim", str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert store.get("claim") == str(won.index(True)).encode()
    assert store.put_if_absent("claim", b"late") is False


def test_a_folder_is_deleted_with_everything_in_it_and_nothing_beside_it(store):
    for path in ("step-1/a", "step-1/b/c", "step-10/a", "step-1.txt"):
        store.put(path, b"x")
    store.delete("step-1")
    assert [entry.path for entry in store.list()] == ["step-1.txt", "step-10/a"]
    store.delete("step-1.txt")
    store.delete("never-was")
    assert [entry.path for entry in store.list()] == ["step-10/a"]
    store.delete("")
    assert store.list() == []


def test_names_with_odd_characters(store):
    for name in ("a b", "ü", "50%", "x+y", "loss#one", "a/..b"):
        store.put(name, name.encode())
        assert store.get(name) == name.encode()
    assert len(store.list()) == 6


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_deleted_folder_leaves_no_empty_folders(tmp_path):
    store = Store(f"file://{tmp_path}/x")
    store.put("step-1/a/b", b"x")
    store.put("step-2/a", b"x")
    store.delete("step-1")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["step-2"]


def test_an_unfinished_file_is_not_listed(tmp_path):
    store = Store(f"file://{tmp_path}")
    store.put("a", b"1")
    (tmp_path / "a#1").write_bytes(b"left by a crash")
    assert [entry.path for entry in store.list()] == ["a"]
    store.delete("")
    assert not (tmp_path / "a#1").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_access_denied(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RunError) as error:
        Store(f"file://{tmp_path}/locked").put("a", b"1")
    assert error.value.cause is Cause.ACCESS_DENIED


def test_a_full_or_broken_disk_is_storage_unavailable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write file://.*Check the free space and the mount") as error:
        Store(f"file://{tmp_path}/file/below").put("a", b"1")
    assert error.value.cause is Cause.STORAGE_UNAVAILABLE


# --- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["/plain/path", "hf://org/name", "ftp://x/y", "s3:/x"])
def test_what_is_no_storage_uri_is_refused(uri):
    with pytest.raises(RunError, match="is no storage URI; accepted: s3://BUCKET/PATH") as error:
        Store(uri)
    assert error.value.cause is Cause.INVALID_CONFIGURATION


def test_bad_keys_are_access_denied_and_say_what_is_needed(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = Store("s3://team/x")
    for act in (
        store.list,
        lambda: store.get("a"),
        lambda: store.put("a", b"1"),
        lambda: store.put_if_absent("a", b"1"),
    ):
        with pytest.raises(
            RunError, match=r"s3://team/x.*SignatureDoesNotMatch.*spec\.credentials\.secretName"
        ) as error:
            act()
        assert error.value.cause is Cause.ACCESS_DENIED
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(RunError) as error:
        Store("s3://team/x").get("a")
    assert error.value.cause is Cause.ACCESS_DENIED


def test_no_credentials_at_all_are_access_denied(no_credentials, monkeypatch):
    class Forbids(BaseHTTPRequestHandler):
        """The metadata service of a cloud that gives this machine no role."""

        def do_PUT(self) -> None:
            self.send_error(403)

        do_GET = do_PUT  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Forbids) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(RunError, match="The pods need AWS_ACCESS_KEY_ID") as error:
            Store("s3://team/x", patience=0.5).get("a")
        assert error.value.cause is Cause.ACCESS_DENIED
        assert "put them into a Secret" in error.value.message
        monkeypatch.setenv(ENV_LOCAL, "true")
        with pytest.raises(RunError, match="set them in the environment of the finetune command") as error:
            Store("s3://team/x", patience=0.5).get("a")
        assert "Secret" not in error.value.message and "pods" not in error.value.message
        server.shutdown()


# --- folders that are only names --------------------------------------------------------------------------------


def test_markers_of_folders_are_no_files(raw_s3):
    for key in ("markers/", "markers/sub/", "markers/rows.jsonl/", "markers/alone/", "markers/empty.txt"):
        raw_s3.put_object(Bucket="team", Key=key, Body=b"")
    raw_s3.put_object(Bucket="team", Key="markers/rows.jsonl/part-0.jsonl", Body=b"x")
    store = Store("s3://team/markers")
    assert [entry.path for entry in store.list()] == ["empty.txt", "rows.jsonl/part-0.jsonl"]
    assert [entry.path for entry in store.list("rows.jsonl")] == ["rows.jsonl/part-0.jsonl"]
    assert store.list("alone") == []
    assert store.find("empty.txt").size == 0
    assert store.find("alone") is None
    store.delete("")
    assert store.list() == []


def test_a_name_with_an_empty_part_is_named_with_what_to_do(flat_s3):
    client = keys_client()
    client.put_object(Bucket="team", Key="odd/a//b.jsonl", Body=b"x")
    client.put_object(Bucket="team", Key="odd/fine/c.jsonl", Body=b"x")
    with pytest.raises(RunError, match=r'cannot list s3://team/odd .*"odd/a//b\.jsonl".*Rename or delete') as error:
        Store("s3://team/odd").list()
    assert error.value.cause is Cause.INVALID_CONFIGURATION, "no restart would change it"
    assert "DNS" not in error.value.message
    assert [entry.path for entry in Store("s3://team/odd/fine").list()] == ["c.jsonl"]


def test_a_uri_with_an_empty_part_tells_the_place_that_is_used(store):
    odd = Store(store.uri().replace("/deep", "//deep/"))
    odd.put("a", b"1")
    assert odd.uri("a") == store.uri("a")
    assert [entry.path for entry in store.list()] == ["a"]


def test_a_link_into_nowhere_is_passed_over(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert [entry.path for entry in Store(f"file://{tmp_path}").list()] == ["a"]


def test_a_missing_bucket_is_named(s3):
    store = Store("s3://nobody/x")
    for act in (store.list, lambda: store.put("a", b"1")):
        with pytest.raises(RunError, match=r"s3://nobody/x.*bucket or container does not exist") as error:
            act()
        assert error.value.cause is Cause.INVALID_CONFIGURATION
    with pytest.raises(FileNotFoundError):
        store.get("a")


def test_an_unreachable_endpoint_is_tried_for_a_while_and_then_named(no_credentials, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    start = time.monotonic()
    with pytest.raises(RunError) as error:
        Store("s3://team/x", patience=1).put("a", b"1")
    assert time.monotonic() - start > 0.3
    assert error.value.cause is Cause.STORAGE_UNAVAILABLE
    assert error.value.message == (
        "cannot write s3://team/x/a (endpoint http://127.0.0.1:1): Connection refused. Tried for up to 1 s. Check the "
        "endpoint, DNS and network policies."
    )


class Flaky(http.server.BaseHTTPRequestHandler):
    """Answers 503 to the first requests of every method, then takes and gives one object."""

    failures = 2
    body = b""

    def _answer(self):
        kind = type(self)
        length = int(self.headers.get("Content-Length") or 0)
        received = self.rfile.read(length)
        if kind.failures:
            kind.failures -= 1
            self.send_response(503)
        elif self.command == "PUT":
            kind.body = received
            self.send_response(200)
            self.send_header("ETag", '"1"')
        else:
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Mon, 23 Nov 2026 00:00:00 GMT")
            self.send_header("Content-Length", str(len(kind.body)))
            self.end_headers()
            self.wfile.write(kind.body)
            return
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = _answer  # noqa: N815

    def log_message(self, *_):
        pass


def test_a_server_that_fails_for_a_moment_is_tried_again(no_credentials, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = Store("s3://team/x", patience=20)
    store.put("a", b"hello")
    Flaky.failures = 2
    assert store.get("a") == b"hello"
    server.shutdown()


class OtherTime(http.server.BaseHTTPRequestHandler):
    """An S3 server whose clock goes otherwise; ``code`` is what it refuses with."""

    ahead = timedelta(minutes=16)
    code = "RequestTimeTooSkewed"

    def _answer(self):
        kind, now = type(self), datetime.now(UTC) + self.ahead
        time_there = f"<ServerTime>{now:%Y-%m-%dT%H:%M:%SZ}</ServerTime>" if kind.code == "RequestTimeTooSkewed" else ""
        body = f"<Error><Code>{kind.code}</Code><Message>No.</Message>{time_there}</Error>".encode()
        self.send_response_only(403)
        self.send_header("Date", format_datetime(now, usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = _answer  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("code", "ahead", "said"),
    [
        ("RequestTimeTooSkewed", 16, "is 16 minutes behind the storage's"),
        ("RequestTimeTooSkewed", -180, "is 180 minutes ahead of the storage's"),
        ("AccessDenied", 16, "is 16 minutes behind the storage's"),  # some say no more than that
        ("AccessDenied", 5, None),
    ],
)
def test_a_clock_that_is_off_is_no_question_of_credentials(no_credentials, monkeypatch, code, ahead, said):
    kind = type("Server", (OtherTime,), {"ahead": timedelta(minutes=ahead), "code": code})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        store = Store("s3://team/x", patience=1)
        for act in (store.list, lambda: store.find("a"), lambda: store.put("a", b"1")):
            with pytest.raises(RunError) as error:
                act()
            if said:
                assert error.value.cause is Cause.CLOCK_SKEW
                assert said in error.value.message
                assert socket.gethostname() in error.value.message
                assert "spec.credentials" not in error.value.message
            else:
                assert error.value.cause is Cause.ACCESS_DENIED
        server.shutdown()


class Unconditional(http.server.BaseHTTPRequestHandler):
    """An S3 server that ignores If-None-Match."""

    objects: ClassVar[dict[str, bytes]] = {}

    def _send(self, status, body=b""):
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 23 Nov 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_PUT(self):
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200)

    def do_GET(self):
        if "list-type" not in self.path:
            return self._send(200 if self.path in self.objects else 404, self.objects.get(self.path, b""))
        keys = "".join(
            f"<Contents><Key>{path.removeprefix('/team/')}</Key><Size>{len(data)}</Size><ETag>1</ETag>"
            "<LastModified>2026-11-23T00:00:00.000Z</LastModified></Contents>"
            for path, data in sorted(self.objects.items())
        )
        return self._send(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>".encode())

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


def test_a_server_without_conditional_writes_is_told_of_at_the_first_claim(no_credentials, monkeypatch, caplog):
    from finetune_trainer.fence import claim

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unconditional) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        assert claim(Store("s3://team/x"), attempt=1).number == 1
        assert "s3://team/x: the storage writes over an object where it was asked not to" in caplog.text
        server.shutdown()


def test_of_a_server_with_conditional_writes_nothing_is_said(store, caplog):
    from finetune_trainer.fence import claim

    assert [claim(store, attempt=number).number for number in (1, 2)] == [1, 2]
    assert caplog.text == ""
