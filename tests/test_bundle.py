from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from random import Random

import pytest

from resvit_engines.bundle import source
from resvit_engines.bundle.bundle import extract_bundle, read_manifest, verify_bundle, write_bundle
from resvit_engines.bundle.manifest import Manifest
from resvit_engines.bundle.parts import BundledFile
from resvit_engines.bundle.source import RecordedFile
from resvit_engines.bundle.zip_layout import Member, directory, local_header, read_local_header
from resvit_engines.errors import ExitCode, ResvitError

FILES: dict[str, Path | bytes] = {"model.onnx": bytes(range(256)) * 40, "data/golden.npy": b"\x93NUMPY", "empty": b""}
MANIFEST = Manifest("net", other={"note": "Größe"})


@pytest.fixture
def bundle(tmp_path) -> Path:
    path = tmp_path / "net.resvit"
    write_bundle(path, MANIFEST, FILES)
    return path


def refused(function, *arguments) -> str:
    with pytest.raises(ResvitError) as caught:
        function(*arguments)
    assert caught.value.code is ExitCode.INPUT
    return str(caught.value)


def rewritten(source: Path, target: Path, change) -> Path:
    """Copy a bundle member by member; ``change(info, data)`` returns the members to write in its place."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            for changed, data in change(info, old.read(info)):
                new.writestr(changed, data)
    return target


def laid_out(path: Path, contents: dict[str, bytes]) -> Path:
    """A zip in the very layout of bundles, with any names and contents."""
    members = [Member(name, len(data), zlib.crc32(data)) for name, data in contents.items()]
    parts = [local_header(member) + contents[member.name] for member in members]
    path.write_bytes(b"".join([*parts, directory(members)]))
    return path


def entries_of(members: dict[str, bytes]) -> list[dict[str, object]]:
    return [
        {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in members.items()
    ]


def foreign_bundle(path: Path, members: dict[str, bytes]) -> Path:
    """A bundle whose manifest is right about members that no honest writer would put there."""
    members = dict(sorted(members.items()))
    manifest = {"format": "resvit-bundle", "format_version": 2, "files": entries_of(members)}
    return laid_out(path, {"manifest.json": json.dumps(manifest).encode(), **members})


def rezipped(path: Path, members: dict[str, bytes], mode: int = stat.S_IFREG | 0o644, method: int = 0) -> Path:
    """The same, written by another program: with links, or compressed."""
    manifest = {"format": "resvit-bundle", "format_version": 2, "files": entries_of(members)}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("manifest.json"), json.dumps(manifest))
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = method
            archive.writestr(info, data)
    return path


def test_what_goes_in_comes_out(bundle, tmp_path) -> None:
    manifest = extract_bundle(bundle, tmp_path / "out")
    assert manifest == read_manifest(bundle) == verify_bundle(bundle)
    assert dataclasses.replace(manifest, files=()) == MANIFEST
    assert [file.path for file in manifest.files] == ["data/golden.npy", "empty", "model.onnx"]
    assert manifest.release == 1
    assert manifest.files[2] == BundledFile("model.onnx", 10240, hashlib.sha256(FILES["model.onnx"]).hexdigest())
    for name, data in FILES.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest.to_json()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.resvit", "out"]


def test_the_bytes_depend_on_the_content_alone(bundle, tmp_path) -> None:
    source = tmp_path / "source"
    source.write_bytes(FILES["model.onnx"])
    os.utime(source, (1, 1))
    source.chmod(0o600)
    write_bundle(tmp_path / "again", MANIFEST, {**dict(reversed(FILES.items())), "model.onnx": source})
    assert (tmp_path / "again").read_bytes() == bundle.read_bytes()
    # The same on every Python that is supported, so a changed digest means a changed format.
    assert hashlib.sha256(bundle.read_bytes()).hexdigest() == DIGEST


DIGEST = "0a65c86200437e75752cdf64f7cfe494a98ed807469db1eb73d80c209b59f403"


def test_the_manifest_is_the_first_member_and_nothing_is_compressed(bundle) -> None:
    with zipfile.ZipFile(bundle) as archive:
        infos = archive.infolist()
        assert [info.filename for info in infos] == ["manifest.json", "data/golden.npy", "empty", "model.onnx"]
        assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.testzip() is None


def test_a_jetson_can_unpack_it_with_the_standard_library(bundle, tmp_path) -> None:
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(bundle), str(tmp_path / "out")], check=True)
    assert (tmp_path / "out/data/golden.npy").read_bytes() == FILES["data/golden.npy"]


def test_every_changed_byte_of_a_file_is_noticed(bundle, tmp_path) -> None:
    data = bytearray(bundle.read_bytes())
    for name in ("model.onnx", "data/golden.npy"):
        with zipfile.ZipFile(bundle) as archive:
            start = archive.getinfo(name).header_offset + 30 + len(name)
        for offset in (start, start + 5):
            changed = bytearray(data)
            changed[offset] ^= 1
            (tmp_path / "bad.resvit").write_bytes(changed)
            refused(verify_bundle, tmp_path / "bad.resvit")
            refused(extract_bundle, tmp_path / "bad.resvit", tmp_path / "out")
            assert not (tmp_path / "out").exists()


def test_a_file_swapped_for_one_with_a_valid_checksum_is_noticed(bundle, tmp_path) -> None:
    def swap(info, data):
        yield info, data[::-1] if info.filename == "model.onnx" else data

    forged = rewritten(bundle, tmp_path / "forged.resvit", swap)
    refused(verify_bundle, forged)
    with zipfile.ZipFile(forged) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    laid_out(forged, contents)
    assert "model.onnx in" in refused(verify_bundle, forged)
    assert "damaged" in refused(extract_bundle, forged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncation_at_any_length_is_noticed(bundle, tmp_path) -> None:
    data = bundle.read_bytes()
    cut = tmp_path / "cut.resvit"
    for length in [0, 1, 100, len(data) // 2, len(data) - 22, len(data) - 1]:
        cut.write_bytes(data[:length])
        assert "is not a whole bundle" in refused(read_manifest, cut)


def test_random_damage_never_ends_in_another_error(bundle, tmp_path) -> None:
    data, random = bundle.read_bytes(), Random(0)
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(random.choice((1, 2, 20))):
            # The headers at both ends are where a reader can be led astray.
            place = random.choice((random.randrange(900), len(data) - 1 - random.randrange(300)))
            changed[place] = random.randrange(256)
        (tmp_path / "bad").write_bytes(changed)
        with contextlib.suppress(ResvitError):
            verify_bundle(tmp_path / "bad")


def test_missing_and_uninvited_files_are_noticed(bundle, tmp_path) -> None:
    def drop(info, data):
        if info.filename != "empty":
            yield info, data

    def add(info, data):
        yield info, data
        if info.filename == "empty":
            yield zipfile.ZipInfo("extra.so"), b"x"

    for change in (drop, add):
        refused(verify_bundle, rewritten(bundle, tmp_path / "changed", change))
        refused(extract_bundle, tmp_path / "changed", tmp_path / "out")
    with zipfile.ZipFile(bundle) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    # As large as the manifest says, with another file in place of one that it lists.
    swapped = {("extra" if name == "empty" else name): data for name, data in contents.items()}
    assert "the header of empty" in refused(verify_bundle, laid_out(tmp_path / "swapped", swapped))
    assert "whole" in refused(verify_bundle, laid_out(tmp_path / "more", {**contents, "zzz": b""}))


def test_a_bundle_that_another_program_rewrote_is_refused(bundle, tmp_path) -> None:
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(bundle), str(tmp_path / "out")], check=True)
    with zipfile.ZipFile(tmp_path / "again", "w") as archive:
        for name in ("manifest.json", "data/golden.npy", "empty", "model.onnx"):
            archive.write(tmp_path / "out" / name, name)
    refused(verify_bundle, tmp_path / "again")


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/../../evil", "a//b", "./a", "a/", "..\\evil", "C:evil", "a\nb", "a\x00b", ".."],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name) -> None:
    assert "plain relative path" in refused(write_bundle, tmp_path / "new.resvit", Manifest(), {name: b"x"})
    forged = foreign_bundle(tmp_path / "forged.resvit", {name: b"x"})
    for function, rest in ((verify_bundle, ()), (extract_bundle, (tmp_path / "deep/out",))):
        refused(function, forged, *rest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forged.resvit"]


@pytest.mark.parametrize("members", [{"a": b"", "A": b""}, {"a": b"", "a/b": b""}, {"A/b/c": b"", "a/B": b""}])
def test_names_that_collide_on_some_system_are_refused(tmp_path, members) -> None:
    refused(write_bundle, tmp_path / "new.resvit", Manifest(), members)
    refused(extract_bundle, foreign_bundle(tmp_path / "forged", members), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_and_compressed_members_are_refused(tmp_path) -> None:
    link = rezipped(tmp_path / "link", {"model.onnx": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)
    refused(extract_bundle, link, tmp_path / "out")
    bomb = rezipped(tmp_path / "bomb", {"model.onnx": bytes(1 << 20)}, method=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 5000
    assert "not a whole bundle" in refused(verify_bundle, bomb)
    # The same bomb, with a size in its manifest that makes the sum right.
    small = rezipped(tmp_path / "small", {"model.onnx": bytes(range(256))}, method=zipfile.ZIP_DEFLATED)
    refused(verify_bundle, small)
    for path in (link, bomb, small):
        refused(extract_bundle, path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_foreign_files_are_told_from_damaged_ones(tmp_path) -> None:
    text = tmp_path / "text.resvit"
    text.write_text("hello" * 100)
    assert "not a whole bundle" in refused(read_manifest, text)
    assert "There is no bundle" in refused(read_manifest, tmp_path / "absent.resvit")
    assert "is a folder, and no bundle" in refused(read_manifest, tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no bundle" in refused(verify_bundle, tmp_path / "other.zip")
    zipfile.ZipFile(tmp_path / "none.zip", "w").close()
    assert "not a whole bundle" in refused(verify_bundle, tmp_path / "none.zip")


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (b"{", "does not read"),
        (b"[" * 100_000, "does not read"),
        (b"\xff\xfe", "does not read"),
        (b"[]", "no bundle of resvit-export"),
        (b'{"format": "other"}', "no bundle of resvit-export"),
        (b'{"format": "resvit-bundle", "format_version": 1, "files": []}', "bundle format 1"),
        (b'{"format": "resvit-bundle", "format_version": 2}', "does not say files"),
        (b'{"format": "resvit-bundle", "format_version": 2, "files": [{"path": 1}]}', "files[0].path"),
    ],
)
def test_odd_manifests_are_refused(tmp_path, manifest, says) -> None:
    laid_out(tmp_path / "odd", {"manifest.json": manifest})
    assert says in refused(read_manifest, tmp_path / "odd")


def test_only_an_empty_or_new_folder_is_filled(bundle, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").write_text("dear")
    assert "not an empty folder" in refused(extract_bundle, bundle, tmp_path / "mine")
    assert (tmp_path / "mine/letter").read_text() == "dear"
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    refused(extract_bundle, bundle, tmp_path / "link")
    (tmp_path / "new").mkdir()
    extract_bundle(bundle, tmp_path / "new")
    assert (tmp_path / "new/empty").exists()


def test_a_missing_source_leaves_no_bundle_and_keeps_the_old(bundle, tmp_path) -> None:
    before = bundle.read_bytes()
    assert "is not there" in refused(write_bundle, bundle, Manifest(), {"model.onnx": tmp_path / "absent"})
    assert "twice" in refused(write_bundle, bundle, Manifest(), {"manifest.json": b""})
    assert bundle.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["net.resvit"]


CONTENT = b"checked" * 300_000  # more than is read at once


@pytest.fixture
def recorded(tmp_path) -> RecordedFile:
    (tmp_path / "source").write_bytes(CONTENT)
    return RecordedFile(tmp_path / "source", hashlib.sha256(CONTENT).hexdigest())


def test_a_file_is_packed_only_as_it_was_recorded(bundle, tmp_path, recorded) -> None:
    before = bundle.read_bytes()
    write_bundle(tmp_path / "new.resvit", Manifest(), {"model.onnx": recorded})
    assert verify_bundle(tmp_path / "new.resvit").digest_of("model.onnx") == recorded.sha256
    others = (CONTENT[:-1] + b"!", CONTENT + b"x", CONTENT[:-1], b"", b"!" + CONTENT[1:])
    for other in others:
        recorded.path.write_bytes(other)
        assert "not what was checked" in refused(write_bundle, bundle, Manifest(), {"model.onnx": recorded})
    recorded.path.unlink()
    for make in (lambda path: None, Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")):
        make(recorded.path)
        assert "is not there" in refused(write_bundle, bundle, Manifest(), {"model.onnx": recorded})
        if recorded.path.is_dir():
            recorded.path.rmdir()
        else:
            recorded.path.unlink(missing_ok=True)
    assert bundle.read_bytes() == before


def colliding(content: bytes) -> bytes:
    """Other bytes of the same length and CRC-32: a checksum is no digest."""
    changed = b"EVIL" + content[4:-4]
    wanted = zlib.crc32(content)
    # CRC-32 is linear: four bytes at the end give any value; their bits are found by elimination.
    zero = zlib.crc32(changed + bytes(4))
    columns = [(zlib.crc32(changed + (1 << bit).to_bytes(4, "little")) ^ zero, 1 << bit) for bit in range(32)]
    target, chosen = wanted ^ zero, 0
    for place in range(32):
        pivot = next(i for i in range(place, 32) if columns[i][0] >> place & 1)
        columns[place], columns[pivot] = columns[pivot], columns[place]
        for i in range(32):
            if i != place and columns[i][0] >> place & 1:
                columns[i] = (columns[i][0] ^ columns[place][0], columns[i][1] ^ columns[place][1])
    for place in range(32):
        if target >> place & 1:
            chosen ^= columns[place][1]
    made = changed + chosen.to_bytes(4, "little")
    assert zlib.crc32(made) == wanted
    return made


@pytest.mark.parametrize("bare", [False, True])
def test_a_file_that_changes_between_check_and_copy_is_not_packed(
    bundle, tmp_path, recorded, monkeypatch, bare
) -> None:
    """Even by bytes of the same length and checksum, at the last moment."""
    evil, before = colliding(CONTENT), bundle.read_bytes()
    copy = source.copy_as_described

    def changed_first(what, file, out):
        recorded.path.write_bytes(evil)
        copy(what, file, out)

    monkeypatch.setattr("resvit_engines.bundle.bundle.copy_as_described", changed_first)
    packed = recorded.path if bare else recorded
    assert "changed while" in refused(write_bundle, bundle, Manifest(), {"model.onnx": packed})
    assert bundle.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.resvit", "source"]


def test_sizes_and_releases_that_are_no_whole_numbers_are_refused(bundle, tmp_path) -> None:
    for release in (True, 1.0, "2", -1, 1 << 60):
        assert "release" in refused(Manifest, "net", release)
    for size in (True, -1, 1 << 60, 1e3):
        manifest = {
            "format": "resvit-bundle",
            "format_version": 2,
            "files": [{**entries_of({"a": b""})[0], "bytes": size}],
        }
        laid_out(tmp_path / "odd", {"manifest.json": json.dumps(manifest).encode(), "a": b""})
        assert "files[0].bytes" in refused(read_manifest, tmp_path / "odd")


def test_large_members_have_headers_that_others_read(tmp_path) -> None:
    # A hole of 5 GiB takes no space on the disk.
    sparse = Member("sparse", 5 << 30, 0)
    after = Member("after", 3, zlib.crc32(b"abc"))
    with (tmp_path / "large.zip").open("wb") as stream:
        stream.write(local_header(sparse))
        stream.seek(sparse.size, os.SEEK_CUR)
        stream.write(local_header(after) + b"abc" + directory([sparse, after]))
    with zipfile.ZipFile(tmp_path / "large.zip") as archive:
        assert [(info.filename, info.file_size) for info in archive.infolist()] == [("sparse", 5 << 30), ("after", 3)]
        assert archive.read("after") == b"abc"
        with archive.open("sparse") as part:
            assert part.read(10) == bytes(10)
    with (tmp_path / "large.zip").open("rb") as stream:
        assert read_local_header(stream) == (sparse, local_header(sparse))


def test_checksums_of_the_zip_count_too(bundle, tmp_path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for wrong in contents:
        members = [Member(name, len(data), zlib.crc32(data) ^ (name == wrong)) for name, data in contents.items()]
        parts = [local_header(member) + contents[member.name] for member in members]
        (tmp_path / "odd").write_bytes(b"".join([*parts, directory(members)]))
        assert "damaged" in refused(verify_bundle, tmp_path / "odd")
