"""Which kernel of one engine computes what a kernel of the other does.

By the ONNX nodes that both name, where they do: engines of one graph, of two precisions or versions. Exporters number
nodes, and Q/DQ shift the numbers, so names only count where the weights agree too. Else by structure: weights and
channels of products, in order; and operation and shape of the rest.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from resvit_engines.audit.compare.engine import Listed, ListedEngine
from resvit_engines.audit.kernel_totals import PRODUCTS
from resvit_engines.audit.kernels import Kernel
from resvit_engines.errors import ResvitError

_AGREE = 0.8
"""Of what names pair, so much must have the same weights."""
_SAME_NETWORK = 0.5
"""Of the products of the engine that has more, so many must have a partner."""


class By(str, enum.Enum):
    """What the pairs rest on."""

    NAMES = "names of ONNX nodes"
    STRUCTURE = "weights and shapes, in order"


@dataclass(frozen=True)
class Pairing:
    """Index pairs into the kernels of both engines, and what they rest on."""

    by: By
    pairs: tuple[tuple[int, int], ...]


def pair_up(a: ListedEngine, b: ListedEngine) -> Pairing:
    """Pair the kernels that compute something; those that only move data are nobody's partner.

    Raises:
        ResvitError: INPUT where fewer than half of the products have a partner: these are two networks.
    """
    own, other = _computing(a), _computing(b)
    products, others = _products(a, own), _products(b, other)
    detailed = bool(products and others)
    if not detailed:
        # Of a profile alone only names are known.
        products, others = own, other
    named = _by_nodes(a, products, b, others)
    agreeing = [(i, j) for i, j in named if _weights_agree(a.kernels[i].kernel, b.kernels[j].kernel)]
    most = max(len(products), len(others))
    by_names = len(agreeing) >= max(_SAME_NETWORK * most, _AGREE * len(named))
    chosen = agreeing if by_names else []
    if detailed:
        chosen = [*chosen, *_in_order(a, _left(products, chosen, 0), b, _left(others, chosen, 1), _signature)]
    if len(chosen) < _SAME_NETWORK * most and not detailed:
        told = " and ".join(engine.name for engine in (a, b) if not engine.detailed) or f"{a.name} and {b.name}"
        raise ResvitError(
            f"Of {told} only the names of layers are known, and of {len(products)} and {len(others)} only "
            f"{len(chosen)} have a partner of the same nodes: builds with and without Q/DQ name them otherwise, and so "
            "do two networks.",
            "Give the layer files of both (trtexec --exportLayerInfo --profilingVerbosity=detailed), and these "
            "profiles with --profile-a and --profile-b.",
        )
    if len(chosen) < _SAME_NETWORK * most:
        raise ResvitError(
            f"{a.name} and {b.name} are engines of two networks: of {len(products)} and {len(others)} products only "
            f"{len(chosen)} have a partner in the other.",
            "Compare two engines of one network.",
        )
    rest_a, rest_b = _left(own, chosen, 0), _left(other, chosen, 1)
    more = _by_nodes(a, rest_a, b, rest_b) if by_names else _in_order(a, rest_a, b, rest_b, _shape_of_rest)
    return Pairing(By.NAMES if by_names else By.STRUCTURE, tuple(sorted([*chosen, *more])))


def _left(among: Sequence[int], pairs: Sequence[tuple[int, int]], side: int) -> list[int]:
    """Those that have no partner yet."""
    taken = {pair[side] for pair in pairs}
    return [index for index in among if index not in taken]


def _computing(engine: ListedEngine) -> list[int]:
    return [index for index, listed in enumerate(engine.kernels) if not listed.moves]


def _products(engine: ListedEngine, among: Iterable[int]) -> list[int]:
    return [index for index in among if engine.kernels[index].kernel.operation in PRODUCTS]


def nodes_that_compute(kernel: Kernel) -> tuple[str, ...]:
    """The nodes of a kernel, those left out that only carry numbers: Q/DQ, weights, constants."""
    return tuple(name for name in kernel.layers if not _carries(name))


def _carries(name: str) -> bool:
    last = name.rpartition("/")[2]
    return any(
        word in last.lower() for word in ("quantizelinear", "quantlinearnode", "readvariableop")
    ) or last.endswith((".weight", ".bias", "_weight", "_bias", "weight:0"))


def _by_nodes(a: ListedEngine, own: Sequence[int], b: ListedEngine, other: Sequence[int]) -> list[tuple[int, int]]:
    """Each kernel with that one, not yet taken, with which it shares the most nodes."""
    holders: dict[str, list[int]] = {}
    for j in other:
        for node in nodes_that_compute(b.kernels[j].kernel):
            holders.setdefault(node, []).append(j)
    taken: set[int] = set()
    pairs = []
    for i in own:
        shared = Counter(
            j for node in nodes_that_compute(a.kernels[i].kernel) for j in holders.get(node, ())[:8] if j not in taken
        )
        if shared:
            best = max(shared, key=lambda j: (shared[j], -j))
            taken.add(best)
            pairs.append((i, best))
    return pairs


def _in_order(
    a: ListedEngine,
    own: Sequence[int],
    b: ListedEngine,
    other: Sequence[int],
    key: Callable[[Listed], Hashable],
) -> list[tuple[int, int]]:
    """The first of each kind with the first, the second with the second, and so on."""
    waiting: dict[Hashable, deque[int]] = {}
    for j in other:
        waiting.setdefault(key(b.kernels[j]), deque()).append(j)
    pairs = []
    for i in own:
        queue = waiting.get(key(a.kernels[i]))
        if queue:
            pairs.append((i, queue.popleft()))
    return pairs


def _weights(kernel: Kernel) -> int | None:
    """How many weights a product has: of its largest constant; None where the listing does not say."""
    sizes = [math.prod(shape) for shape in kernel.constant_shapes if shape and min(shape) > 0]
    return max(sizes, default=None)


def _weights_agree(one: Kernel, other: Kernel) -> bool:
    weights = _weights(one), _weights(other)
    return None in weights or weights[0] == weights[1]


def _signature(listed: Listed) -> Hashable:
    """What stays the same of a product in every precision: its weights or, where they are not told, its output."""
    kernel = listed.kernel
    shape = kernel.output_shapes[0] if kernel.output_shapes else ()
    channels = shape[1] if len(shape) in (4, 5) else shape[-1] if shape else 0
    weights = _weights(kernel)
    return (channels, weights) if weights is not None else (channels, shape)


def _shape_of_rest(listed: Listed) -> Hashable:
    kernel = listed.kernel
    return kernel.operation, kernel.output_shapes[:1]
