"""Folders, zips and tars are read alike; names that lead outside are refused."""

import io
import os
import stat
import tarfile
import zipfile

import pytest

from subfleet.core.errors import InputError
from subfleet.datasets.archives import Missing, Unreadable, open_tree

FILES = {"a/b.txt": b"one", "c.txt": b"two" * 1000}
OUTSIDE = ["/etc/passwd", "../x", "a/../../x", "C:/x", "..\\x", "\\x"]


def make_zip(path, files, mode=0):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.mkdir("a")
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(entry, data)
    return path


def make_tar(path, files, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as out:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, "/etc/passwd", len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def make_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture(params=["folder", "a.zip", "a.tar", "a.tar.gz", "a.tgz"])
def tree(request, tmp_path):
    path = tmp_path / request.param
    make = {"folder": make_folder, "a.zip": make_zip}.get(request.param, make_tar)
    return open_tree(make(path, FILES))


def test_names_and_bytes(tree):
    assert sorted(tree.names()) == sorted(FILES)
    assert {name: tree.read(name) for name in tree.names()} == FILES


def test_missing_too_long_and_outside(tree):
    with pytest.raises(Missing):
        tree.read("a/none")
    with pytest.raises(Unreadable, match="more than 100 bytes"):
        tree.read("c.txt", 100)
    with pytest.raises(Unreadable):
        tree.read("../a/b.txt")
    with pytest.raises(Unreadable):
        tree.read("a")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_with_paths_outside_is_refused(tmp_path, name, kind):
    make = make_zip if kind == "a.zip" else make_tar
    path = make(tmp_path / kind, {**FILES, name: b"x"})
    with pytest.raises(InputError, match="path outside its folder"):
        open_tree(path).names()
    assert os.listdir(tmp_path) == [kind]


def test_links_and_devices_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"link 'a/b\.txt'"):
        open_tree(make_zip(tmp_path / "a.zip", FILES, stat.S_IFLNK | 0o777))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
        with pytest.raises(InputError, match="a link or a device"):
            open_tree(make_tar(tmp_path / "a.tar", {"x": b""}, kind)).names()


def test_cut_archives(tmp_path):
    for path in (make_zip(tmp_path / "a.zip", FILES), make_tar(tmp_path / "a.tgz", FILES)):
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(InputError, match="cut short"):
            open_tree(path).names()


def test_a_damaged_entry(tmp_path):
    path = make_zip(tmp_path / "a.zip", FILES)
    data = bytearray(path.read_bytes())
    place = data.index(b"c.txt") + 5
    data[place : place + 6] = b"\xff" * 6
    path.write_bytes(data)
    with pytest.raises(Unreadable):
        open_tree(path).read("c.txt")
    assert open_tree(path).read("a/b.txt") == b"one"


def test_a_changed_zip_is_opened_anew(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a": b"1"})
    assert open_tree(path).names() == ["a"]
    make_zip(path, {"a": b"1", "bb": b"2"})
    assert open_tree(path).names() == ["a", "bb"]


def test_hidden_files_and_what_is_no_archive(tmp_path):
    make_folder(tmp_path / "f", {".DS_Store": b"", ".git/x": b"", "x": b""})
    assert open_tree(tmp_path / "f").names() == ["x"]
    for path in (tmp_path / "f" / "x", tmp_path / "none.zip", tmp_path / "none"):
        with pytest.raises(InputError, match=r"none|x is neither"):
            open_tree(path)
