"""Documents name what there is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
WINGS = {wing: ROOT / wing / f"resvit_{wing}" for wing in ("export", "quantize", "calibrate", "engines")}
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
]
MODULE = re.compile(r"\bresvit_(?:export|quantize|calibrate|engines)(?:\.[a-z_]+)+")


def test_the_page_on_architecture_names_every_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text.partition("```\n")[2].partition("```")[0]
    for wing, folder in WINGS.items():
        part = tree.partition(f"{wing}/resvit_{wing}")[2].partition("\n\n")[0]
        rooms = {child.name for child in folder.iterdir() if (child / "__init__.py").exists()}
        named = set(re.findall(r"[\w/.]+", part))
        assert rooms <= named, f"{wing}: {rooms - named}"
        for file in (name for name in named if name.endswith(".py")):
            assert (folder / file).exists(), file


def test_the_page_on_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`([\w/]+\.(?:py|md))`", text):
        if "NAME" in name:
            continue
        places = [ROOT, *WINGS.values()]
        assert any((place / name).exists() for place in places), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_documents_name_exist(page: Path) -> None:
    for name in MODULE.findall(page.read_text()):
        wing, *parts = name.split(".")
        place = WINGS[wing.removeprefix("resvit_")]
        # The last part may be what a module holds.
        ways = (place.joinpath(*parts), place.joinpath(*parts[:-1]))
        assert any(way.with_suffix(".py").exists() or (way / "__init__.py").exists() for way in ways), name


def test_the_tests_that_the_page_on_threats_names_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


def test_the_fleet_of_the_page_on_fleets_reads() -> None:
    from resvit_export.fleet.plan import fleet_from_document

    text = (ROOT / "docs" / "fleets.md").read_text()
    block = text.partition("```toml\n")[2].partition("```")[0]
    for commented in (block, re.sub(r"^# (\w+ = )", r"\1", block, flags=re.MULTILINE)):
        fleet = fleet_from_document(tomllib.loads(commented), ROOT / "fleet.toml")
        assert (fleet.name, fleet.devices) == ("cameras", 122)
