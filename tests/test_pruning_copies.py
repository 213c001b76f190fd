"""Copies of modules, and runs that leave nothing behind: whatever a user's forward keeps, pruning goes on."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from resvit_engines.errors import ExitCode, ResvitError
from resvit_quantize.pruning.answers import parts_of, tensors_in
from resvit_quantize.pruning.apply import prune
from resvit_quantize.pruning.copies import copy_of, forgetting
from resvit_quantize.pruning.find.discover import groups_from_module
from resvit_quantize.pruning.groups import Kind


class Keeping(nn.Module):
    """A small network whose middle is scaled, per channel, by something computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.gain = nn.Parameter(torch.rand(16) + 0.5)
        self.second = nn.Conv2d(16, 8, 3)

    def scale(self) -> Tensor:
        return self.gain.exp()

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.norm(self.first(image)) * self.scale()[:, None, None]
        return self.second(hidden.relu()).mean((2, 3))


class InDict(Keeping):
    """As LeViT's attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def scale(self) -> Tensor:
        if "gain" not in self.kept:
            self.kept["gain"] = self.gain.exp()
        return self.kept["gain"]


class InAttribute(Keeping):
    kept: Tensor | None = None

    def scale(self) -> Tensor:
        if self.kept is None:
            self.kept = self.gain.exp()
        return self.kept


class InBuffer(Keeping):
    def scale(self) -> Tensor:
        if "kept" not in self._buffers:
            self.register_buffer("kept", self.gain.exp(), persistent=False)
        return self.kept  # type: ignore[return-value]


class InProperty(Keeping):
    @functools.cached_property
    def kept(self) -> Tensor:
        return self.gain.exp()

    def scale(self) -> Tensor:
        return self.kept


class InMethod(Keeping):
    @functools.lru_cache  # noqa: B019 - what users write
    def scale(self) -> Tensor:
        return self.gain.exp()


class _Store:
    """A user's own object."""

    def __init__(self) -> None:
        self.levels: list[list[Tensor]] = [[]]


class InObject(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.store = _Store()

    def scale(self) -> Tensor:
        if not self.store.levels[0]:
            self.store.levels[0].append(self.gain.exp())
        return self.store.levels[0][0]


class _Scale(nn.Module):
    """Reads its parent's parameter through a weak reference."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self) -> Tensor:
        parent = self.parent()
        assert isinstance(parent, Keeping)
        return parent.gain.exp()


class ByWeakReference(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.by = _Scale(self)

    def scale(self) -> Tensor:
        answer: Tensor = self.by()
        return answer


class ByClosure(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.by = lambda: self.gain.exp()  # noqa: PLW0108 - a closure is what is tested

    def scale(self) -> Tensor:
        return self.by()


class ByHook(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.norm.register_forward_hook(lambda _m, _i, output: output * self.gain.exp()[:, None, None])

    def scale(self) -> Tensor:
        return torch.ones(1)


class Uncopied(Keeping):
    """Holds what Python cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.random = threading.Lock(), torch.Generator()
        self.numbers: Iterator[int] = (number for number in range(3))
        self.nested = {"lock": [threading.RLock()]}


KINDS = [InDict, InAttribute, InBuffer, InProperty, InMethod, InObject, ByWeakReference, ByClosure, ByHook, Uncopied]


@pytest.mark.parametrize("kind", KINDS)
def test_used_module_copies(kind: type[Keeping]) -> None:
    module, image = kind().eval(), torch.randn(2, 3, 8, 8)
    before = module(image)  # with gradients: what is kept hangs on the graph
    made = copy_of(module)
    torch.testing.assert_close(made(image), before)
    own = {id(parameter) for parameter in module.parameters()}
    assert all(id(parameter) not in own for parameter in made.parameters())
    torch.testing.assert_close(module(image), before)
    assert not made.training


@pytest.mark.parametrize("kind", KINDS)
def test_copies_live_on_their_own_weights(kind: type[Keeping]) -> None:
    module, image = kind().eval(), torch.randn(2, 3, 8, 8)
    made = copy_of(module)
    with torch.no_grad():
        made.gain += 1.0
    assert not torch.allclose(made(image), module(image))


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_keep_is_forgotten(kind: type[Keeping]) -> None:
    module, image = kind().eval(), torch.randn(2, 3, 8, 8)
    with forgetting(module):
        before = module(image)
    with torch.no_grad():
        module.gain += 1.0
    if kind is not InMethod:
        assert not torch.allclose(module(image), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_keeps_is_pruned(kind: type[Keeping]) -> None:
    module = kind().eval()
    found = groups_from_module(module, torch.zeros(2, 3, 8, 8), frozenset(Kind))
    (group,) = found.groups
    assert group.units == 16
    less = copy_of(module)
    prune(less, found.groups, {group.name: torch.arange(0, 16, 2).numpy()})
    assert less(torch.randn(2, 3, 8, 8)).shape == (2, 8)
    assert less.gain.shape == (8,)


def test_training_keeps_its_statistics() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    module[1].extra = 1
    with forgetting(module):
        module(torch.randn(2, 3, 4, 4))
        module[1].extra = 2
    assert module[1].extra == 2
    assert int(module[1].num_batches_tracked) == 1  # type: ignore[arg-type]


def test_a_module_that_refuses_is_named() -> None:
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: dict[int, object]) -> Stubborn:
            raise RuntimeError("I am one of a kind")

    with pytest.raises(ResvitError, match="one of a kind") as caught:
        copy_of(nn.Sequential(Stubborn()))
    assert caught.value.code is ExitCode.INPUT


class Hooked(Keeping):
    """Sets a hook in its first run, and remembers that it did, as transformers collect hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, image: Tensor) -> Tensor:
        if not getattr(self, "hooked", False):
            self.first.register_forward_hook(lambda *_: self.calls.append(1))
            self.hooked = True
        self.calls.clear()
        answer = super().forward(image)
        return answer * len(self.calls)


def test_hooks_that_a_run_set_are_set_once() -> None:
    network, image = Hooked().eval(), torch.zeros(1, 3, 8, 8)
    for _ in range(2):
        with forgetting(network):
            network(image)
    assert not network.first._forward_hooks
    network(image)
    assert len(network.calls) == 1


@dataclasses.dataclass
class Answer:
    boxes: Tensor
    more: object = None


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_the_tensors_of_an_answer_are_found_whatever_holds_them() -> None:
    one, two, three, four = (torch.full((1,), float(number)) for number in range(4))
    answer = {"a": Answer(one, [None, 3, "x", two]), "b": (Pair(three, four),), "c": object()}
    assert [float(tensor) for tensor in tensors_in(answer)] == [0, 1, 2, 3]
    assert tensors_in(None) == tensors_in("text") == tensors_in(Answer) == []
    assert parts_of(Pair(one, two)) == {"first": one, "second": two}
    assert parts_of("text") is None
