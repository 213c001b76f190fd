"""Names from files become paths only where they stay in the folder that they are put in."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_engines.bundle.bundle import read_manifest, write_bundle
from resvit_engines.bundle.manifest import Manifest, check_names
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.install.state import model_folder
from resvit_engines.names import is_file_name, is_name, is_relative_path, require_name
from resvit_engines.records import Record
from resvit_engines.remote.job import packed_into
from resvit_engines.targets.own import AS_IN_THE_TABLE, resolve_target
from resvit_engines.targets.table import Target, find_target
from resvit_export.recipe.recipe import Recipe

HOSTILE = ("..", ".", "/", "\\", "\x00", "\x1b[2J", "\n", ":", "C:", "~", "-rf", "\ud800", "\u202e", "é", "CON", " ")
TEXT = st.one_of(
    st.text(st.characters(codec=None), max_size=260),  # surrogates too: names of files may hold them
    st.lists(st.sampled_from((*HOSTILE, "net", "a", "1")), max_size=8).map("".join),
)


def kept_or_refused(function, *arguments, code: ExitCode = ExitCode.INPUT) -> object:
    """What the function gives; None where it refuses with ``code`` in one printable sentence, and nothing else."""
    try:
        return function(*arguments)
    except ResvitError as error:
        refusal = error
    assert refusal.code is code
    assert str(refusal).replace("\n  → ", "").isprintable()
    return None


@settings(deadline=None)
@given(TEXT)
def test_a_file_name_stays_in_any_folder(text: str) -> None:
    folder = Path("/some/folder")
    if is_file_name(text):
        assert os.path.normpath(folder / text) == str(folder / text)
        assert (folder / text).parent == folder
        assert len(os.fsencode(text)) <= 200
    if is_name(text):
        assert is_file_name(text)
        assert text.isascii()
        assert text[0] not in "-."


@settings(deadline=None)
@given(st.lists(TEXT, max_size=4).map("/".join))
def test_a_relative_path_stays_below_its_folder(text: str) -> None:
    if is_relative_path(text):
        assert os.path.normpath(Path("/some/folder") / text) == f"/some/folder/{text}"
    kept = kept_or_refused(lambda: check_names([text], "It is refused") or True)
    assert bool(kept) == is_relative_path(text)


@settings(deadline=None)
@given(TEXT)
def test_names_of_bundles_models_and_targets_are_kept_or_refused(text: str) -> None:
    root = Path("/some/root")
    for place in (
        kept_or_refused(model_folder, root, text),
        kept_or_refused(packed_into, root, text),
    ):
        if place is not None:
            assert isinstance(place, Path)
            assert place.parent == root
            assert is_name(text)
    target = kept_or_refused(Target.from_json, Record({**find_target("l4").to_json(), "name": text}, "a manifest"))
    read = kept_or_refused(Manifest.from_json, Record({**Manifest().to_json(), "name": text}, "a manifest"))
    own = kept_or_refused(resolve_target, text, AS_IN_THE_TABLE, {text: {"like": "l4"}})
    assert (target is not None) == (read is not None) == is_name(text)
    assert own is None or is_name(text)


@settings(deadline=None)
@given(TEXT)
def test_every_model_has_a_bundle_name(text: str) -> None:
    label = dataclasses.replace(Recipe(), model=text).label
    assert is_name(f"{label[:60]}-l4-int8")


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("nets/rec.onnx", "rec"),
        ("rec.v2.onnx", "rec.v2"),
        ("a net.pt2", "a-net"),
        ("net.py:make", "net-make"),
        ("net.pyramid", "net.pyramid"),
        ("timm:levit_128s", "levit_128s"),
        (".onnx", "model"),
    ],
)
def test_the_ending_of_a_file_is_no_part_of_the_name(model: str, label: str) -> None:
    assert dataclasses.replace(Recipe(), model=model).label == label


@pytest.mark.parametrize("name", ["../ESCAPED", "/tmp/x", "a/b", "..", "", "a\nb", "-x", ".x", "x" * 101])
def test_a_bundle_of_such_a_name_does_not_read(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path / "b.resvit", Manifest(name), {"model.onnx": b"x"})
    with pytest.raises(ResvitError, match=r"name of the manifest\.json"):
        read_manifest(tmp_path / "b.resvit")


def test_a_name_may_have_a_length_of_its_own() -> None:
    assert require_name("abc", "It", 3) == "abc"
    with pytest.raises(ResvitError, match="1 to 3 letters"):
        require_name("abcd", "It", 3)
