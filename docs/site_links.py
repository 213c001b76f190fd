"""Lets the pages of ``docs/`` link to the rest of the repository, on the site as in the files: a hook of MkDocs.

Documents elsewhere (benchmarks and their results, the changes) become pages of the site, in their own folders; other
files that a page names are copied beside them, and of folders only the name is kept.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "benchmarks/results/*.md")
_LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents from elsewhere, and what they and the pages link to."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            _add(files, config, path)
    for file in list(files.documentation_pages()):
        for _, target, _ in _LINK.findall(file.content_string):
            path = _source(file.src_uri).parent.joinpath(target).resolve()
            if path.is_file() and path.is_relative_to(ROOT):
                _add(files, config, path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between places of the repository into links between places of the site."""
    del config
    here = page.file.src_uri

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link.group(1), link.group(2), link.group(3) or ""
        path = _source(here).parent.joinpath(target).resolve()
        if path.is_dir():
            return text
        uri = _uri(path)
        if files.get_file_from_path(uri) is None:
            return link.group(0)  # and MkDocs says so
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor})"

    return _LINK.sub(turned, markdown)


def _add(files: Files, config: Any, path: Path) -> None:
    if files.get_file_from_path(_uri(path)) is None:
        files.append(File.generated(config, _uri(path), abs_src_path=str(path)))


def _uri(path: Path) -> str:
    """Where a file of the repository lies on the site: those of ``docs/`` at its top."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    if name == "README.md":
        return "index.md"
    return name.removeprefix("docs/")


def _source(uri: str) -> Path:
    """Where a page of the site lies in the repository."""
    inside = ROOT / "docs" / uri
    return inside if inside.exists() else ROOT / uri
