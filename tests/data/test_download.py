import base64
import dataclasses
import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from effir_ray import leases
from effir_ray.caches import data_folder
from effir_ray.data import download
from effir_ray.data.datasets import load_dataset
from effir_ray.errors import InputError
from effir_ray.leases import LEASES, lease
from effir_ray.progress import show_progress

WriteFolder = Callable[..., Path]


class Server(ThreadingHTTPServer):
    """Serves ``content`` on loopback; ``breaks`` holds after how many bytes each coming answer breaks off."""

    content = b""
    breaks: list[int]
    ranges: list[str | None]
    supports_ranges = True
    length: str | None = None  # what it says instead of the true one


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        resumes = wanted is not None and self.server.supports_ranges
        start = int(str(wanted).removeprefix("bytes=").rstrip("-")) if resumes else 0
        body = self.server.content[start:]
        if not self.path.endswith(".zip"):
            self.send_error(404)
            return
        if wanted and not body:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", self.server.length or str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.breaks.pop(0)] if self.server.breaks else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_folder: WriteFolder) -> Iterator[Server]:
    """A server that holds a small SciFact, whose checksum is known, and an empty data folder."""
    server = Server(("127.0.0.1", 0), Handler)
    server.breaks, server.ranges = [], []
    serve(server, archive_of(write_folder(tmp_path / "made" / "scifact"), "scifact"), monkeypatch)
    monkeypatch.setenv("EFFIR_RAY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("EFFIR_RAY_BEIR_URL", f"http://127.0.0.1:{server.server_port}/BEIR")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def serve(server: Server, content: bytes, monkeypatch: pytest.MonkeyPatch, name: str = "scifact") -> None:
    server.content = content
    known = dataclasses.replace(download.BEIR_SETS[name], md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(download.BEIR_SETS, name, known)


def archive_of(folder: Path, top: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, f"{top}/{path.relative_to(folder)}")
    return buffer.getvalue()


def test_a_data_set_is_downloaded_once_and_then_loads_by_name(server: Server, tmp_path: Path) -> None:
    folder = download.get("scifact")
    assert folder == tmp_path / "data" / "scifact"
    assert load_dataset("scifact").qrels("test")["q20"] == {"d20": 1}
    assert download.get("SciFact") == folder
    assert server.ranges == [None]
    assert sorted(path.name for path in folder.parent.iterdir() if path.name != LEASES) == ["scifact"]
    assert {listing.name: listing.folder for listing in download.list_datasets()}["scifact"] == folder


def test_who_waits_for_another_download_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_SAY_FIRST", 0.1)
    root = data_folder()
    display, other = io.StringIO(), ExitStack()
    other.enter_context(lease(root / LEASES, "scifact"))
    threading.Timer(0.5, other.close).start()
    with show_progress(display):
        assert download.get("scifact").is_dir()
    assert f"(process {os.getpid()}), 0 s" in display.getvalue()
    assert display.getvalue().startswith("waiting for data set scifact, held by ")


def test_an_interrupted_transfer_goes_on_where_it_broke(server: Server) -> None:
    server.breaks = [1000, 500]
    assert download.get("scifact").is_dir()
    assert server.ranges == [None, "bytes=1000-", "bytes=1500-"]


def test_a_later_call_goes_on_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_ATTEMPTS", 1)
    server.breaks = [1000]
    with pytest.raises(InputError, match="closed early; 0 MiB are kept and the same command goes on"):
        download.get("scifact")
    assert download.get("scifact").is_dir()
    assert server.ranges == [None, "bytes=1000-"]


@pytest.mark.parametrize("length", ["many", "-5", "9" * 30, "1e9"])
def test_a_length_that_is_no_number_is_refused(server: Server, length: str) -> None:
    server.length = length
    with pytest.raises(InputError, match="the server says Content-Length"):
        download.get("scifact")


@pytest.mark.parametrize(
    "url", ["nowhere", "htp://x", "http://[", "http://a b/", "http://x:port/", "ftp://localhost:1"]
)
def test_a_mirror_that_is_no_address_is_named(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFIR_RAY_DATA", str(tmp_path))
    with pytest.raises(InputError) as raised:
        download.get("scifact", base_url=url)
    assert "\n" not in str(raised.value)
    assert url[:8] in str(raised.value)


@pytest.mark.parametrize("encoded", [True, False], ids=["data", "file"])
def test_a_mirror_is_on_the_network(
    encoded: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right archive would come of both, if they were opened."""
    (tmp_path / "scifact.zip").write_bytes(server.content)
    content = base64.b64encode(server.content).decode()
    url = f"data:application/zip;base64,{content}#" if encoded else tmp_path.as_uri()
    monkeypatch.setenv("EFFIR_RAY_BEIR_URL", url)
    with pytest.raises(InputError, match="expected http:// or https://"):
        download.get("scifact")
    assert not (tmp_path / "data" / "scifact").exists()


def test_a_finished_transfer_is_not_repeated(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scifact.zip.partial").write_bytes(server.content)
    assert download.get("scifact").is_dir()
    assert server.ranges == [f"bytes={len(server.content)}-"]


def test_a_server_without_ranges_sends_all_again(server: Server) -> None:
    server.supports_ranges, server.breaks = False, [1000]
    assert download.get("scifact").is_dir()
    assert server.ranges == [None, "bytes=1000-"]


def test_a_wrong_checksum_is_refused_and_cleared(server: Server, tmp_path: Path) -> None:
    good = server.content
    server.content = good[:-1] + b"x"
    with pytest.raises(InputError, match="BEIR publishes"):
        download.get("scifact")
    assert not (tmp_path / "data" / "scifact").exists()
    server.content = good
    assert download.get("scifact").is_dir()


@pytest.mark.parametrize("member", ["../evil.txt", "/evil.txt", "scifact/../../evil.txt", "C:\\evil.txt"])
def test_an_archive_that_reaches_outside_is_refused(
    server: Server, member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("scifact/corpus.jsonl", "{}")
        file.writestr(member, "x")
    serve(server, buffer.getvalue(), monkeypatch)
    with pytest.raises(InputError, match="reaches outside"):
        download.get("scifact")
    assert not list(tmp_path.rglob("evil*"))
    assert not (tmp_path / "data" / "scifact").exists()


def test_links_in_an_archive_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        link = zipfile.ZipInfo("scifact/corpus.jsonl")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    serve(server, buffer.getvalue(), monkeypatch)
    with pytest.raises(InputError, match="reaches outside"):
        download.get("scifact")


def test_a_forum_of_cqadupstack_by_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_folder: WriteFolder
) -> None:
    for forum in ("android", "tex"):
        write_folder(tmp_path / "cqa" / forum)
    serve(server, archive_of(tmp_path / "cqa", "cqadupstack"), monkeypatch, "cqadupstack")
    assert download.get("cqadupstack/tex") == tmp_path / "data" / "cqadupstack" / "tex"
    assert load_dataset("cqadupstack/android").name == "cqadupstack/android"
    with pytest.raises(InputError, match="name one of its parts: cqadupstack/android, cqadupstack/tex"):
        load_dataset("cqadupstack")


def test_without_a_connection_it_says_what_to_do(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFIR_RAY_BEIR_URL", "http://127.0.0.1:9/BEIR")
    with pytest.raises(InputError, match=r"Connection refused.* copy the unpacked BEIR folder to"):
        download.get("scifact")


def test_unknown_names_and_full_disks_are_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown data set 'scifax'; known: stdlib, arguana"):
        download.get("scifax")
    with pytest.raises(InputError, match="unknown data set 'cqadupstack/cooking'"):
        download.get("cqadupstack/cooking")
    usage = download.shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="make room or set EFFIR_RAY_DATA"):
        download.get("scifact")


def test_the_thirteen_sets_of_the_paper_have_names() -> None:
    assert sum(listing.in_paper for listing in download.list_datasets()) == 13
    assert sum(listing.name.startswith("cqadupstack/") for listing in download.list_datasets()) == 12
