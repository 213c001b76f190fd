"""Annotations in XML, within bounds of depth and number, and without entities: these could grow beyond all memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias
from xml.parsers import expat

from resvit_engines.errors import ResvitError
from resvit_engines.outside import TEXT_MOST, read_outside

Started: TypeAlias = Callable[[tuple[str, ...], dict[str, str]], None]
Ended: TypeAlias = Callable[[tuple[str, ...], str], None]

_DEPTH_MOST = 32


def read_xml(path: Path, started: Started, ended: Ended, fix: str, most: int = TEXT_MOST) -> None:
    """Read a file of at most ``most`` bytes, and tell where elements begin and end.

    ``started`` gets the names of the elements around and of the new one, from the outermost on, and its attributes;
    ``ended`` the same names and the text at the element's end, without white space around it.

    Raises:
        ResvitError: with ``fix``, for what is no XML, declares entities, or is deeper than any annotation.
    """
    stack: list[str] = []
    text: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        stack.append(tag)
        text.clear()
        if len(stack) > _DEPTH_MOST:
            raise ResvitError(f"{path} is deeper than any annotation.", fix)
        started(tuple(stack), attributes)

    def end(tag: str) -> None:
        del tag
        ended(tuple(stack), "".join(text).strip())
        stack.pop()
        text.clear()

    def entity(*_: object) -> None:
        raise ResvitError(f"{path} declares entities, which an annotation does not need.", "Remove its DOCTYPE.")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(read_outside(path, most), True)
    except expat.ExpatError as error:
        raise ResvitError(f"{path} is no XML: {error}.", fix) from error
