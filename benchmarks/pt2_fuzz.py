"""Archives of exported programs with one thing changed in them, and a watch on what reading one does.

Used by ``pt2_archives.py`` and, in a short form, by the tests.
"""

from __future__ import annotations

import contextlib
import copy
import encodings.cp437  # noqa: F401 what zipfile decodes names with, and reads when it is first needed
import json
import random
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mutants import listening

CANARY = "pt2_canary"
"""A module that there is not: whoever looks for it, executed what the archive says."""
_NODE = {"type": "builtins.tuple", "context": "null", "children_spec": []}
_LEAF = {"type": None, "context": None, "children_spec": []}


def _nested(levels: int) -> str:
    return '{"type": "builtins.tuple", "context": "null", "children_spec": [' * levels + "]}" * levels


STRUCTURES = tuple(
    [
        json.dumps([1, {**_NODE, "context": context}])
        for context in (
            json.dumps({"__enum__": True, "fqn": f"{CANARY}:x", "name": "y"}),
            json.dumps({"__enum__": True, "fqn": "ctypes:cdll", "name": "/tmp/evil.so"}),
            json.dumps({"__enum__": True, "fqn": "this:s", "name": "x"}),
            json.dumps([{"__enum__": True, "fqn": "os:environ", "name": "PATH"}]),
            "[" * 5000,
            "{",
            5,
        )
    ]
    + [
        json.dumps([1, {"type": kind, "context": context, "children_spec": children}])
        for kind, context, children in (
            (
                "collections.defaultdict",
                {"default_factory_module": CANARY, "default_factory_name": "s", "dict_context": []},
                [],
            ),
            ("collections.defaultdict", {"default_factory_module": "os", "default_factory_name": "system"}, []),
            ("collections.namedtuple", f"{CANARY}.Y", []),
            ("collections.OrderedDict", json.dumps(["a", "a"]), [_LEAF, _LEAF]),
            ("builtins.dict", json.dumps(["x\nimport pt2_canary\n"]), [_LEAF]),
            ("builtins.dict", json.dumps(["self", "x): import pt2_canary"]), [_LEAF, _LEAF]),
            (f"{CANARY}.Output", json.dumps({"__enum__": True, "fqn": f"{CANARY}:x", "name": "y"}), []),
            (f"{CANARY}.Output", json.dumps(["logits", "logits"]), [_LEAF]),
            ("os.system", "null", [_LEAF]),
            ("NO_SERIALIZED_TYPE_NAME_FOUND", "null", []),
            (None, "null", [_LEAF]),
        )
    ]
    + [f"[1, {_nested(3000)}]", f"[2, {_nested(1)}]", "[1]", "null", "[[[[", json.dumps([1, _LEAF])]
)
"""Structures of inputs and outputs that name what to import, or are none."""

EXPRESSIONS = (
    *("9**9**9**9", "Pow(Integer(9), Pow(Integer(9), Pow(Integer(9), Integer(99))))", "1 << 10**9", "2**s77**s77"),
    *("(" * 5000 + "s77" + ")" * 5000, "+".join(["s77"] * 20000), "-" * 9000 + "1", "s77.__class__", "s77[0]"),
    *(f"__import__('{CANARY}')", "Function('f')(s77)", "Lambda(s77, s77)", "lambda: 0", "factorial(10**8)", "s77!"),
    *("Float('1', precision=1000000000)", "Float('1e999999999')", "Integer(" + "9" * 4000 + ")", "9" * 6000),
    *(f"Symbol('s77', **__import__('{CANARY}'))", f"Symbol('{CANARY}')", "Symbol('u99999999999')", "Symbol(s77)"),
    *("Add(" * 200 + "s77" + ")" * 200, "Mul(" + ", ".join(["Add(s0, s1, s2, s3)"] * 30) + ")", "Max(*[s77])"),
    *("Piecewise((s77, True), evaluate=False)", "sympify('1')", "parse_expr('1')", "eval('1')", "S('1')", "zoo"),
    *("Pow(Add(s0, s1, s2, s3, s4, s5), Integer(60))", "Mod(Pow(s0, 64), Pow(s1, 63))", "Integer(1) if s77 else 2"),
)
"""Sizes that are no arithmetic, or more of it than anybody could compute."""

OPERATORS = (
    *("torch.hub.load", "torch.load", "torch.ops.load_library", "torch.classes.load_library", "torch.os.system"),
    *("torch.utils.cpp_extension.load", "torch._C._jit_set_profiling_mode", "torch.multiprocessing.spawn", "torch.sys"),
    *(
        "_operator.attrgetter",
        "_operator.methodcaller",
        "_operator.call",
        "math.factorial",
        "#x:y",
        "os.system",
        "eval",
    ),
    *("torch.ops.aten.from_file.default", "torch.ops.aten.set_.source_Storage", "torch.ops.aten._print.default"),
    *(
        "torch.ops.aten.__class__.mro",
        "torch.ops.aten.no_such.default",
        "torch.ops.aten.relu.no_such",
        "torch.ops.aten",
    ),
    *("torch.ops.aten.relu.default.__globals__", "torch.ops.prim.device.default", "torch.ops.quantized.add.default"),
    *("torch.ops.higher_order.aoti_call_delegate", "torch.ops.higher_order.while_loop", "torch.ops.higher_order.print"),
    *(f"{CANARY}.f", f"torch.{CANARY}", "torch.onnx.export", "torch.nn.functional.relu", "torch.compile"),
)

TEXTS = (
    *("", " ", "a b", "a.b", "self", "torch", "lambda", "None", "__class__", "__init__", "forward", "_parameters"),
    *(f"x\nimport {CANARY}\n", f"x'); import {CANARY} #", f'x"]; import {CANARY} #', f"x=__import__('{CANARY}')"),
    *(f"x): import {CANARY}", "a;b,c", "\x00", "\x1b[31mred", "\u202e", "\ud800", "ﬁ", "a" * 5000, "é" * 300),
    *("/etc/passwd", "../../../etc/passwd", "/tmp/evil.so", "weight_0/../../x", "C:\\x", "file:///etc/passwd", "$(id)"),
    *(CANARY, f"{CANARY}:x", "ctypes:cdll", "this:s", "antigravity", "true", "NaN", "Infinity", "s0", "u0", "1"),
)

NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 7, 99, 255, 65536, 2**31, 2**40, 2**62, 2**63, -(2**63), 2**64, 10**30, 0.5, 1e300, -0.0),
    *(True, False, None, "1", [], {}, [1], {"as_int": 3}),
)
ANYTHING: tuple[Any, ...] = (None, True, 5, -1.5, [], {}, [[]], {"a": 1}, "text")
HOSTILE: tuple[Any, ...] = (*TEXTS, *OPERATORS, *EXPRESSIONS, *STRUCTURES, *ANYTHING)

_WATCHED = re.compile(
    r"import|open|ctypes\..*|subprocess\..*|socket\..*|pickle\..*|pty\..*|shutil\..*|urllib\..*|webbrowser\..*|ftplib\..*"
    r"|os\.(system|exec|fork|forkpty|posix_spawn|spawn|startfile|kill|putenv|remove|rename|rmdir|mkdir|link|symlink|chmod"
    r"|chown|truncate|listdir|scandir|chdir|add_dll_directory)"
)


@contextlib.contextmanager
def watched(archive: Path, seen: list[str]) -> Iterator[None]:
    """Note in ``seen`` what a process does besides computing while it reads ``archive``: imports of what is not yet
    imported, files opened, libraries loaded, processes and connections.

    Not noted are the archive itself, and source files and encodings that are read to show a traceback.
    """
    libraries = tuple({str(Path(module.__file__).parent) for module in _libraries()})

    def watcher(event: str, arguments: tuple[Any, ...]) -> None:
        if not _WATCHED.fullmatch(event):
            return
        if event == "open" and isinstance(arguments[0], (str, bytes, Path)):
            name, mode = str(arguments[0]), arguments[1]
            if name == str(archive) or (name.endswith(".py") and name.startswith(libraries) and mode in ("r", "rb")):
                return
        if event == "import" and (arguments[0] in sys.modules or str(arguments[0]).startswith("encodings.")):
            return
        seen.append(f"{event} {arguments[:2]!r:.200}")

    with listening(watcher):
        yield


def _libraries() -> list[Any]:
    return [sys.modules[name] for name in ("torch", "sympy", "json", "resvit_export", __name__) if name in sys.modules]


class Parts:
    """The JSON of an archive, taken apart: also the structures inside, which are JSON in JSON."""

    MEMBERS = (
        "models/model.json",
        "data/weights/model_weights_config.json",
        "data/constants/model_constants_config.json",
    )

    def __init__(self, archive: Path) -> None:
        with zipfile.ZipFile(archive) as file:
            self.root = file.namelist()[0].partition("/")[0]
            self.members = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
        self.documents = {name: json.loads(self.members[name]) for name in self.MEMBERS if name in self.members}
        self.places: dict[str, list[tuple[str, tuple[Any, ...]]]] = defaultdict(list)
        """By the kind of place, such as ``models/model.json graph_module.graph.nodes[].target``: where such are."""
        for member, document in self.documents.items():
            for path in _paths(document):
                self.places[f"{member} {_kind(path)}"].append((member, path))

    def written(self, path: Path, changed: Mapping[str, bytes]) -> Path:
        """Write the archive with members replaced or added."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
            for name, data in {**self.members, **changed}.items():
                out.writestr(f"{self.root}/{name}", data)
        return path

    def changed(self, place: tuple[str, tuple[Any, ...]], value: Any, *, key: bool = False) -> dict[str, bytes]:
        """The member in which ``value`` stands at a place instead, or as the key of it."""
        member, path = place
        document = copy.deepcopy(self.documents[member])
        holder = document
        for step in path[:-1]:
            holder = holder[step]
        if key and isinstance(holder, dict):
            holder[value if isinstance(value, str) else repr(value)] = holder.pop(path[-1])
        else:
            holder[path[-1]] = value
        return {member: json.dumps(document).encode("utf-8", "surrogatepass")}


def changes(
    parts: Parts, chosen: random.Random, values: Sequence[Any] = HOSTILE
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every kind of place with every value in it, in random order: what was changed, and the changed members.

    Numbers get numbers too; keys become texts, and new keys are added.
    """
    pairs = [(kind, value, False) for kind in parts.places for value in values]
    pairs += [(kind, value, False) for kind in parts.places for value in NUMBERS]
    pairs += [(kind, value, True) for kind in parts.places for value in TEXTS]
    chosen.shuffle(pairs)
    for kind, value, key in pairs:
        place = chosen.choice(parts.places[kind])
        yield f"{kind} {'named' if key else 'is'} {ascii(value)[:80]}", parts.changed(place, value, key=key)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in steps:
        yield (*path, step)
        yield from _paths(part, (*path, step))


_MAPS = ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "range_constraints", "config")


def _kind(path: tuple[Any, ...]) -> str:
    """The place without the names that a network gives, and without what lies below a node's notes."""
    words = [
        "[]" if isinstance(step, int) else "*" if before in _MAPS else str(step)
        for before, step in zip((None, *path), path, strict=False)
    ]
    return ".".join(words)
