"""Downloads from a server that is really there: whole, cut, resumed, wrong, and away."""

import hashlib
import http.server
import importlib.util
import os
import threading
import zipfile
from contextlib import contextmanager

import pytest

from subfleet.core.errors import InputError
from subfleet.datasets.download import BY_HAND, DOWNLOADS, Remote, download, fetch, remotes, unpack

DATA = hashlib.sha256(b"").digest() * (3 << 16)  # 6 MiB
MD5 = hashlib.md5(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; knows ranges unless told not to; cuts after `server.cut` bytes."""

    server: "Server"

    def do_GET(self):
        ranged = self.headers.get("Range")
        self.server.asked.append((self.path, ranged))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[3:])
            self.end_headers()
            return
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start = int(ranged[6:-1]) if ranged and self.server.ranges else 0
        if ranged and self.server.ranges:
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cut = self.server.cut.pop(0) if self.server.cut else len(data)
        self.wfile.write(data[start : start + cut])

    def log_message(self, format, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, **files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"/{name}": data for name, data in files.items()}
        self.cut: list[int] = []
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request, client_address):
        pass  # the client hung up, as it may


@contextmanager
def serving(**files):
    server = Server(**files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server():
    with serving(set=DATA) as running:
        yield running


def remote(server, name="set", md5=MD5):
    return Remote("set.bin", (server.url(name),), md5)


def test_whole_with_progress_and_kept(server, tmp_path):
    calls = []
    path = fetch(remote(server), tmp_path / "new" / "folder", lambda *call: calls.append(call))
    assert path.read_bytes() == DATA and os.listdir(path.parent) == ["set.bin"]
    assert calls[-1] == ("fetch set.bin", len(DATA), len(DATA))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    fetch(remote(server), path.parent)
    assert len(server.asked) == 1


def test_a_redirect_is_followed(server, tmp_path):
    assert fetch(remote(server, "to/set"), tmp_path).read_bytes() == DATA


def test_it_goes_on_after_cuts(server, tmp_path):
    server.cut = [1_000_000, 2_000_000]
    assert fetch(remote(server), tmp_path).read_bytes() == DATA
    ranges = [ranged for _, ranged in server.asked]
    assert ranges == [None, "bytes=1000000-", "bytes=3000000-"]


def test_a_later_call_resumes(server, tmp_path):
    server.cut = [100, 0]
    with pytest.raises(
        InputError, match=r"cut off at 100 of .*What was fetched is kept in .*\.part"
    ):
        fetch(remote(server), tmp_path)
    assert (tmp_path / "set.bin.part").read_bytes() == DATA[:100]
    assert fetch(remote(server), tmp_path).read_bytes() == DATA
    assert server.asked[-1][1] == "bytes=100-" and os.listdir(tmp_path) == ["set.bin"]


def test_a_part_that_was_whole_already(server, tmp_path):
    (tmp_path / "set.bin.part").write_bytes(DATA)
    assert fetch(remote(server), tmp_path).read_bytes() == DATA


def test_a_server_without_ranges_is_asked_for_all(server, tmp_path):
    server.ranges = False
    (tmp_path / "set.bin.part").write_bytes(DATA[:1000])
    assert fetch(remote(server), tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("part", [b"another version", DATA + b"and more"])
def test_a_part_of_something_else_is_begun_anew(server, tmp_path, part):
    (tmp_path / "set.bin.part").write_bytes(part)
    assert fetch(remote(server), tmp_path).read_bytes() == DATA


def test_a_wrong_file_is_replaced(server, tmp_path):
    (tmp_path / "set.bin").write_bytes(b"cut")
    assert fetch(remote(server), tmp_path).read_bytes() == DATA


def test_a_wrong_sum_is_refused(server, tmp_path):
    with pytest.raises(InputError, match=rf"MD5 sum {MD5}, not 0000") as caught:
        fetch(remote(server, md5="0" * 32), tmp_path)
    assert os.listdir(tmp_path) == [] and str(tmp_path) in str(caught.value)


def test_a_mirror_serves_where_the_first_address_does_not(server, tmp_path):
    server.files["/old"] = b"something else"
    urls = (server.url("none"), server.url("old"), server.url("set"))
    assert fetch(Remote("set.bin", urls, MD5), tmp_path).read_bytes() == DATA
    server.files.clear()
    with pytest.raises(InputError, match=r"none answered 404 Not Found; .*set answered 404"):
        fetch(Remote("other.bin", urls, MD5), tmp_path)


def test_no_server_says_what_to_do(tmp_path):
    with serving() as gone:
        address = gone.url("set")
    with pytest.raises(InputError) as caught:
        fetch(Remote("set.bin", (address,), MD5), tmp_path)
    told = str(caught.value)
    assert "cannot be reached" in told and "no network" in told
    assert f"fetch {address} by hand into {tmp_path}" in told and os.listdir(tmp_path) == []


def test_a_name_that_does_not_resolve(tmp_path):
    with pytest.raises(InputError, match="cannot be reached"):
        fetch(Remote("set.bin", ("http://subfleet.invalid/set",), MD5), tmp_path)


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        fetch(remote(server), tmp_path / "file")


def test_two_at_once_do_not_mix(server, tmp_path):
    import fcntl

    with (tmp_path / "set.bin.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            fetch(remote(server), tmp_path)
    assert fetch(remote(server), tmp_path).read_bytes() == DATA


def test_addresses_and_sums_are_torchvisions():
    from torchvision.datasets import CIFAR10, MNIST

    assert remotes("cifar10") == [Remote(CIFAR10.filename, (CIFAR10.url,), CIFAR10.tgz_md5)]
    assert remotes("cifar100")[0].name == "cifar-100-python.tar.gz"
    files = remotes("mnist")
    assert len(files) == 4 and all(len(file.urls) == len(MNIST.mirrors) for file in files)


@pytest.mark.filterwarnings("ignore:.*MD5 sum is")
def test_mnist_from_a_server_to_rows(server, tmp_path, real_data, monkeypatch):
    from torchvision.datasets import MNIST

    from subfleet.datasets.mnist import Mnist
    from subfleet.datasets.reader import Faults

    packed = {name: (real_data / "mnist" / name).read_bytes() for name, _ in MNIST.resources}
    server.files = {f"/{name}": data for name, data in packed.items()}
    sums = [(name, hashlib.md5(data).hexdigest()) for name, data in packed.items()]
    monkeypatch.setattr(MNIST, "mirrors", [server.url("")])
    monkeypatch.setattr(MNIST, "resources", sums)
    server.cut = [500_000]
    source = download("mnist", tmp_path / "mnist")
    shards = Mnist(check=True).shards(source)
    (test,) = Mnist(check=True).read(shards[1], Faults())
    assert len(test.y) == 10_000 and len(server.asked) == 5


@pytest.mark.parametrize("name", BY_HAND)
def test_sets_without_a_downloader_say_where_they_are(name, tmp_path):
    with pytest.raises(InputError, match=rf"{name} has no downloader; .*http.*by hand into"):
        download(name, tmp_path)


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        download("cifar1", tmp_path)
    assert not set(BY_HAND) & set(DOWNLOADS)


@pytest.mark.skipif(importlib.util.find_spec("gdown") is not None, reason="gdown is installed")
def test_celeba_needs_gdown(tmp_path):
    with pytest.raises(InputError, match="Google Drive, which needs the package gdown"):
        download("celeba", tmp_path)


def test_unpacking_keeps_what_is_there_and_refuses_paths_outside(tmp_path):
    packed = tmp_path / "a.zip"
    with zipfile.ZipFile(packed, "w") as out:
        out.writestr("images/1.jpg", b"one")
        out.writestr("images/2.jpg", b"two")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"ONE")
    calls = []
    unpack(packed, tmp_path, lambda *call: calls.append(call))
    assert [(tmp_path / "images" / f"{n}.jpg").read_bytes() for n in (1, 2)] == [b"ONE", b"two"]
    assert sorted(os.listdir(tmp_path / "images")) == ["1.jpg", "2.jpg"]
    assert calls[-1] == ("unpack a.zip", 2, 2)
    with zipfile.ZipFile(packed, "a") as out:
        out.writestr("../3.jpg", b"three")
    with pytest.raises(InputError, match="path outside"):
        unpack(packed, tmp_path / "images")
    assert not (tmp_path / "3.jpg").exists()
