"""What no image reaches becomes constants; masks that hide nothing go; what an image reaches stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim, export

from resvit_calibrate.runtime.runner import onnx_runner
from resvit_export.to_onnx.export import onnx_from_program


class AnySize(nn.Module):
    """Position codes and a mask made anew at every call, as detectors for photos of any size make them."""

    def __init__(self, hides: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.hides = hides

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images)
        mask = torch.ones((x.shape[0], *x.shape[2:]))
        rows, columns = mask.cumsum(1), mask.cumsum(2)
        angle = torch.stack([rows, columns], 1).repeat(1, 8, 1, 1) * 0.3
        tokens = (x + angle.sin()).flatten(2).transpose(1, 2)
        scores = tokens @ tokens.transpose(1, 2)
        seen = mask.flatten(1) > (20 if self.hides else 0)
        if self.hides:
            seen = rows.flatten(1) <= 2
        scores = scores.masked_fill(~seen[:, None], -1e9)
        return scores.softmax(-1) @ tokens


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    ("hides", "batch"),
    [(False, None), (True, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 2), (True, None)))],
)
def test_position_codes_become_constants(batch: int | None, hides: bool, tmp_path) -> None:
    torch.manual_seed(0)
    module = AnySize(hides).eval()
    program = export(module, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: Dim.AUTO(min=1)},))
    report = onnx_from_program(program, tmp_path / "model.onnx", opset=20, batch=batch)
    assert not {"Sin", "CumSum", "Greater", "Not", "Tile"} & set(report.operators)
    assert ("Where" in report.operators) is hides
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16), dtype=np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    found = onnx_runner(tmp_path / "model.onnx")({"input": images})["output"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.whole
def test_what_differs_from_image_to_image_stays(tmp_path) -> None:
    class Numbered(nn.Module):
        """Adds to each image its number in the batch: of no content, and yet no constant."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) + torch.ones(images.shape[0], 1).cumsum(0)

    program = export(Numbered(), (torch.zeros(2, 3, 4, 4),), dynamic_shapes=({0: Dim.AUTO(min=1)},))
    report = onnx_from_program(program, tmp_path / "model.onnx", opset=20)
    assert "CumSum" in report.operators
    found = onnx_runner(tmp_path / "model.onnx")({"input": np.zeros((3, 3, 4, 4), np.float32)})["logits"]
    np.testing.assert_array_equal(found, [[1.0] * 3, [2.0] * 3, [3.0] * 3])
