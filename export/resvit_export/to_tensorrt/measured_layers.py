"""Times of an engine's kernels as times of the network's layers, in the form that predictions are replaced by."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from resvit_engines.audit.compare.engine import ListedEngine, engine_from_file
from resvit_engines.targets.layer_work import LayerWork
from resvit_engines.targets.table import Precision


def listed_engine(layers: Path, profile: Sequence[tuple[str, float]]) -> ListedEngine:
    """An engine by TensorRT's own list of its layers, with microseconds by layer from a run with a profiler.

    Raises:
        ResvitError: INPUT for a file that lists no layers, and where the times are of another engine.
    """
    rows = [{"name": name, "averageMs": us / 1e3} for name, us in profile]
    with tempfile.TemporaryDirectory(prefix="resvit-profile-") as scratch:
        file = Path(scratch) / "profile.json"
        file.write_text(json.dumps(rows))
        return engine_from_file(layers, file)


def times_of_layers(
    works: Sequence[LayerWork], engine: ListedEngine, precisions: Mapping[str, Precision]
) -> dict[str, tuple[Precision, float]]:
    """Microseconds of each layer of a network, and the precision that it ran in, by the layer's name.

    ``precisions`` are those of the engine's products by name; others are FP16. A kernel is of the layer whose product,
    norm or pool it computes, whatever else it took in; one without is of the layer that its nodes belong to. A layer
    whose kernels also compute another one has no time of its own, and is left out; so are kernels that only change a
    format.
    """
    first = {node: work.name for work in works for node in (work.name, *work.nodes)}
    member = {node: work.name for work in works for node in work.members}
    times: dict[str, float] = {}
    shared: set[str] = set()
    for listed in engine.kernels:
        if listed.moves:
            continue
        nodes = listed.kernel.layers
        owners = {first[node] for node in nodes if node in first} or {member[n] for n in nodes if n in member}
        if len(owners) > 1 or listed.us is None:
            shared |= owners
        for name in owners:
            times[name] = times.get(name, 0.0) + (listed.us or 0.0)
    found = {}
    for work in works:
        us = times.get(work.name, 0.0)
        if us > 0 and work.name not in shared:
            found[work.name] = (work.precision(precisions), us)
    return found
