"""What is quantised: a float ONNX, the network that it came from, and stored images to calibrate and to test with."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import elpv

from peers.images import StoredImages, store_images
from peers.lines import store_texts
from resvit_calibrate.data.image_sets import open_image_sets
from resvit_calibrate.images.image_set import DataSpec, ImageSet
from resvit_calibrate.images.preprocess import Preprocess
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.files import atomic_file, sha256_file
from resvit_engines.progress import Reporter
from resvit_export.loading.network_record import NetworkRecord
from resvit_export.loading.preprocessing import preprocess_from
from resvit_export.recipe.file import recipe_from_toml

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).parents[2] / "tests" / "assets"
RANDOM, PERTURBED = "random", "perturbed"


@dataclass(frozen=True)
class Case:
    """``accurate`` says whether the network was trained for the images: else only fidelity means something."""

    name: str
    source: str
    checkpoint: Path | None
    model: Path
    digest: str
    """SHA-256 of ``model``."""
    calibration: StoredImages
    test: StoredImages
    accurate: bool
    weights: str
    lines: bool = False
    """Whether it reads lines of text (see ``peers/lines.py``)."""

    def facts(self) -> dict[str, Any]:
        """Plain values for the result's record."""
        return {
            "model": self.name,
            "weights": self.weights,
            "accuracy_means_something": self.accurate,
            "float_onnx_sha256": self.digest,
            "calibration": {"images": len(self.calibration), "what": self.calibration.description,
                            "digest": self.calibration.digest},
            "test": {"images": len(self.test), "what": self.test.description, "digest": self.test.digest},
        }  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """What the command line asks for. ``weights`` is for networks without a checkpoint: random or perturbed.

    ``export`` are further options of ``resvit-export export``, for ONNX files. Such a network is a recogniser of text:
    its test lines are those of ``test``, with ``texts`` (JSON, a list) written in ``characters``, one to a line.
    """

    model: str
    checkpoint: Path | None
    data: str | None
    weights: str
    calibration_images: int
    images: int | None
    test: str | None = None
    export: tuple[str, ...] = ()
    texts: Path | None = None
    characters: Path | None = None

    @property
    def lines(self) -> bool:
        """Whether it is a recogniser of text."""
        return self.model.endswith(".onnx")

    @property
    def label(self) -> str:
        """The name of the result's file."""
        name = Path(self.model.rpartition(":")[2]).stem
        return f"{name}-{self.weights}" if self._untrained else name

    @property
    def _untrained(self) -> bool:
        return self.checkpoint is None and self.model.startswith("timm:")


def case_from(wish: Wish, folder: Path, report: Reporter) -> Case:
    """Export the network and store the images in ``folder``, or take what is there from last time."""
    source, checkpoint, weights = _network(wish, folder, report)
    exported = _export(source, checkpoint, wish.export, folder / "run")
    network = NetworkRecord.from_json(json.loads((exported / "network.json").read_bytes()))
    preprocess = preprocess_from(network, recipe_from_toml(exported.parent / "recipe.toml").preprocess, wish.data)
    calibration, test, accurate = _image_sets(wish, preprocess, report)
    stored = store_images(calibration, folder / "calibration"), store_images(test, folder / "test")
    if wish.lines and wish.texts and wish.characters:
        store_texts(wish.texts, wish.characters, folder / "test", len(stored[1]))
        accurate = True
    return Case(
        Path(wish.model).name if wish.lines else wish.model,
        source,
        checkpoint,
        exported / "model.onnx",
        sha256_file(exported / "model.onnx"),
        *stored,
        accurate and weights not in (RANDOM, PERTURBED),
        weights,
        wish.lines,
    )


def _network(wish: Wish, folder: Path, report: Reporter) -> tuple[str, Path | None, str]:
    """(what ``--model`` takes, checkpoint, what the weights are)."""
    if wish.model in elpv.HYBRIDS:
        path = wish.checkpoint or folder / f"{wish.model}.pt"
        if not path.is_file():
            report.say("training the hybrid for solar cells, once")
            elpv.train(wish.model, path, epochs=40, seed=0, report=report)
        return f"{Path(elpv.__file__).resolve()}:{elpv.HYBRIDS[wish.model].__name__}", path, "trained"
    if wish.checkpoint is not None or wish.lines:
        return wish.model, wish.checkpoint, "trained"
    if wish.model.startswith("resvit:"):
        path = ASSETS / f"{wish.model.removeprefix('resvit:')}.pt"
        if not path.is_file():
            raise ResvitError(f"There is no {path}.", "Train one (examples/fashion_mnist), and give --checkpoint.")
        return wish.model, path, "trained"
    if wish.weights == RANDOM:
        return wish.model, None, RANDOM
    path = folder / "perturbed.pt"
    if not path.is_file():
        _write_perturbed(wish.model, path)
    return wish.model, path, PERTURBED


def _write_perturbed(source: str, path: Path) -> None:
    import torch

    from resvit_export.loading.factories import module_from_name

    module = module_from_name(source, {})
    perturb(module, torch.Generator().manual_seed(0))
    with atomic_file(path) as partial:
        torch.save({"state_dict": module.state_dict()}, partial)


def perturb(module: torch.nn.Module, random: torch.Generator) -> None:
    """Give random weights some of what training does to them, in place.

    Normalisations get uneven gains, a few of them large (the outlier channels of trained transformers), and biases;
    matrices and filters uneven output channels; fresh weights are all alike, and any quantiser does well on them.
    """
    import torch
    from torch import nn

    def drawn(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=random)

    with torch.no_grad():
        for layer in module.modules():
            weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
            if not isinstance(weight, nn.Parameter):
                continue
            if weight.ndim == 1:
                outlier = torch.rand(weight.shape, generator=random) < 0.01
                weight.mul_(torch.exp(0.4 * drawn(weight)) * torch.where(outlier, 8.0, 1.0))
            elif isinstance(layer, (nn.Linear, nn.Conv2d)):
                channel = drawn(weight.flatten(1)[:, 0]).reshape([-1] + [1] * (weight.ndim - 1))
                weight.mul_(torch.exp(0.3 * channel) * (1.0 + 0.5 * drawn(weight)))
            if isinstance(bias, nn.Parameter):
                bias.add_(0.1 * drawn(bias))


def _export(source: str, checkpoint: Path | None, options: tuple[str, ...], run: Path) -> Path:
    """The folder of the float ONNX: opset 20, free batch."""
    command = [str(Path(sys.executable).with_name("resvit-export")), "export", "--model", source, "--json"]
    if not Path(command[0]).is_file():
        command[:1] = [sys.executable, "-m", "resvit_export"]
    command += ["--target", "jetson-orin", "--batch", "1:8:64", "--run", str(run), *options]
    command += ["--checkpoint", str(checkpoint)] if checkpoint else []
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE)
    if done.returncode:
        raise ResvitError(f"The export of {source} failed.", "See above.", ExitCode(done.returncode))
    return Path(json.loads(done.stdout)["folder"])


def _image_sets(wish: Wish, preprocess: Preprocess, report: Reporter) -> tuple[ImageSet, ImageSet, bool]:
    """(to calibrate with, to test with, whether the network may know the classes)."""
    if wish.data is None and (wish.model in elpv.HYBRIDS or wish.model.startswith("timm:")):
        cells = elpv.read_cells()
        sets = (
            elpv.image_set(cells.train, preprocess, wish.calibration_images),
            elpv.image_set(cells.test, preprocess, wish.images),
        )
        return (*sets, wish.model in elpv.HYBRIDS)
    data, bare = wish.data or "fashion-mnist", wish.lines
    spec = DataSpec(data, wish.test, wish.calibration_images, wish.images, unlabelled=bare, unjudged=bare)
    return (*open_image_sets(spec, preprocess, report), not bare)
