"""Networks in PyTorch whose outputs have their batch elsewhere than in front."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ResvitError
from resvit_export.loading.axes.batch_axis import batch_axis, to_the_front
from resvit_export.loading.load import Network, network_from_module
from resvit_export.loading.spec import ModelSpec
from resvit_export.to_onnx.export import onnx_from_program

SHAPE = (3, 16, 24)


class Reader(nn.Module):
    """A recogniser of text: steps, images, characters, beside features with their batch in front."""

    def __init__(self, *, recurrent: bool = False, alone: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.steps = nn.LSTM(8, 8, bidirectional=True) if recurrent else nn.Linear(8, 16)
        self.head = nn.Linear(16, 11)
        self.alone = alone

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = torch.relu(self.conv(images))
        if self.alone:
            maps = maps.view(1, 8, 8, 12)
        found = self.steps(maps.mean(2).permute(2, 0, 1))
        steps = found[0] if isinstance(found, tuple) else found
        return {"text": self.head(steps), "features": maps.mean((2, 3))}


def loaded(module: nn.Module) -> Network:
    return network_from_module(module, ModelSpec("object:Reader", input_shape=SHAPE))


@pytest.mark.whole
@pytest.mark.parametrize("recurrent", [False, True], ids=["linear", "lstm"])
@pytest.mark.parametrize("alone", [False, True], ids=["any batch", "batch 1"])
def test_the_batch_comes_to_the_front_on_the_way_to_onnx(recurrent: bool, alone: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Reader(recurrent=recurrent, alone=alone).eval()
    network = loaded(module)
    assert "output text: its batch stood elsewhere and was brought to the front" in network.notes
    assert not any("output features" in note for note in network.notes)
    images = torch.randn(1 if alone else 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(images)
    onnx_from_program(network.program, tmp_path / "model.onnx")
    for answers in (
        network.runner()({"input": images.numpy()}),
        onnx_runner(tmp_path / "model.onnx")({"input": images.numpy()}),
    ):
        np.testing.assert_allclose(answers["text"], expected["text"].numpy().transpose(1, 0, 2), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answers["features"], expected["features"].numpy(), rtol=1e-4, atol=1e-5)


def test_what_has_no_batch_anywhere_is_refused() -> None:
    class Anchors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.conv(images).mean((2, 3)), self.conv.weight.mean((2, 3))

    with pytest.raises(ResvitError, match=r"is \[8, 3\] whatever the batch"):
        loaded(Anchors())


@pytest.mark.parametrize(
    ("shape", "batch", "axis"),
    [
        ((20, "b", 5), "b", 1),
        (("b", 20, 5), "b", None),
        (("other", "b", 5), "b", None),
        ((20, 7, 5), "b", None),
        ((20, "b", "b"), "b", None),
        ((20, 1, 5), 1, 1),
        ((20, 1, 1), 1, 1),
        ((20, 5, 1), 1, 2),
        ((1, 1, 5), 1, None),
        ((20, 4, 5), 4, 1),
        ((20, 4, 4), 4, None),
        ((), 1, None),
    ],
)
def test_where_a_batch_lies(shape: tuple[int | str, ...], batch: int | str, axis: int | None) -> None:
    assert batch_axis(shape, batch) == axis


def test_all_other_axes_keep_their_order() -> None:
    assert to_the_front(2, 4) == [2, 0, 1, 3]
