"""A network fed with other numbers than it was trained with is recognised, and one that is merely weak is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from resvit_calibrate.answers.classes import INPUT
from resvit_calibrate.answers.other_preprocess import (
    Normalization,
    OtherPreprocess,
    other_preprocess,
    usual_normalizations,
)
from resvit_calibrate.images.indexed import IndexedImageSet
from resvit_calibrate.images.pixels import ArrayPixels
from resvit_calibrate.images.preprocess import Preprocess
from resvit_calibrate.readers.npz import pixels_from_npz
from resvit_calibrate.runtime.runner import Array, Arrays, Runner
from resvit_calibrate.tasks.kinds import task_named
from resvit_engines.errors import ExitCode
from resvit_export.cli.main import run

CLASSES, SIDE, COUNT = 8, 4, 200
COLOURS = np.array([[r, g, b] for r in (40, 200) for g in (60, 220) for b in (30, 180)], np.float32)
"""One for each class, no two alike when channels are exchanged."""


def colours_of(channels: int) -> np.ndarray:
    return COLOURS if channels == 3 else np.linspace(20, 235, CLASSES, dtype=np.float32)[:, None]


def images(preprocess: Preprocess, channels: int = 3) -> IndexedImageSet:
    random = np.random.default_rng(0)
    labels = np.sort(np.arange(COUNT) % CLASSES)
    pixels = colours_of(channels)[labels][:, None, None, :] + random.normal(0, 6, (COUNT, SIDE, SIDE, channels))
    stored = ArrayPixels("flat", np.clip(pixels, 0, 255).astype(np.uint8), labels.astype(np.int64))
    return IndexedImageSet(stored, range(COUNT), preprocess)


def trained_with(true: Normalization) -> Runner:
    """A network that tells colours apart, as long as they come as it was trained."""
    mean, std = (np.array(value, np.float32).reshape(-1, 1, 1) for value in (true.mean, true.std))
    colours = colours_of(len(true.mean))

    def answer(arrays):
        seen = (arrays[INPUT] * std + mean).mean((2, 3)) * 255
        seen = seen[:, ::-1] if true.channel_order == "bgr" else seen
        return {"logits": -np.square(seen[:, None] - colours[None]).sum(-1).astype(np.float32) / 1e4}

    return answer


def prepared_by(how: Normalization) -> Preprocess:
    return Preprocess((SIDE, SIDE), len(how.mean), "none", mean=how.mean, std=how.std, channel_order=how.channel_order)


CLASSIFICATION = task_named("classification", {})


@pytest.mark.parametrize("channels", [1, 3])
def test_the_normalisation_that_a_network_was_trained_with_is_named(channels: int) -> None:
    usual = usual_normalizations(channels)
    for true in usual:
        for own in usual:
            found = other_preprocess(CLASSIFICATION, trained_with(true), images(prepared_by(own), channels), 16)
            if found is None:
                # As fed it answers as well: nothing to be said.
                assert right(trained_with(true), images(prepared_by(own), channels)) > 0.8, (true, own)
            else:
                assert true != own
                assert right(trained_with(true), images(prepared_by(found.normalization), channels)) > 0.9
                assert "--preprocess mean=" in found.words
                assert OtherPreprocess.from_json(json.loads(json.dumps(found.to_json()))) == found


def right(network: Runner, fed: IndexedImageSet) -> float:
    answered = [network({INPUT: batch.images})["logits"].argmax(1) for batch in fed.batches(16)]
    return float((np.concatenate(answered) == fed.labels).mean())


def test_what_the_network_itself_says_is_tried_too() -> None:
    own = Normalization((0.9, 0.1, 0.4), (0.2, 0.9, 0.5), "rgb")
    fed = images(prepared_by(Normalization((0.5,) * 3, (0.5,) * 3, "rgb")))
    found = other_preprocess(CLASSIFICATION, trained_with(own), fed, 16, prepared_by(own))
    assert found is not None
    assert found.normalization == own


def test_masks_and_depths_tell_it_as_classes_do(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    masks = (random.random((COUNT, 8, 8)) < 0.4).astype(np.uint8)
    pixels = (40 + 150 * masks[..., None] + random.normal(0, 5, (COUNT, 8, 8, 3))).astype(np.uint8)
    np.savez(tmp_path / "masks.npz", images=pixels, masks=masks)
    metres = pixels.mean(3).astype(np.float32) / 50
    np.savez(tmp_path / "depth.npz", images=pixels, depth=metres)
    true, wrong = Normalization((0.5,) * 3, (0.5,) * 3, "rgb"), Normalization((0.0,) * 3, (1 / 255,) * 3, "rgb")

    def grey(arrays: Arrays) -> Array:
        seen: Array = (arrays[INPUT] * 0.5 + 0.5).mean(1, keepdims=True) * 255
        return seen

    def segment(arrays: Arrays) -> Arrays:
        return {"logits": np.concatenate([115 - grey(arrays), grey(arrays) - 115], 1)}

    def measure(arrays: Arrays) -> Arrays:
        return {"depth": np.maximum(grey(arrays) / 50, 0.01).astype(np.float32)}

    for name, file, network in (("segmentation", "masks", segment), ("depth", "depth", measure)):
        task, stored = task_named(name, {}), pixels_from_npz(tmp_path / f"{file}.npz")[0]
        for own in (true, wrong):
            prepared = Preprocess((8, 8), 3, "none", mean=own.mean, std=own.std)
            found = other_preprocess(task, network, IndexedImageSet(stored, range(COUNT), prepared), 16)
            # ImageNet's numbers are near enough to a half for a threshold.
            assert (found is None) == (own == true), name
            assert found is None or max(found.normalization.std) <= 0.5


def test_a_network_that_guesses_is_left_alone() -> None:
    random = np.random.default_rng(0)
    guess = lambda arrays: {"logits": random.normal(size=(len(arrays[INPUT]), CLASSES)).astype(np.float32)}  # noqa: E731
    for own in usual_normalizations(3):
        assert other_preprocess(CLASSIFICATION, guess, images(prepared_by(own)), 16) is None


@pytest.mark.slow
@pytest.mark.whole
def test_a_build_on_wrong_numbers_says_so_first_and_is_not_accepted(
    workspace: object, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "build --target jetson-orin --model resvit:embed-nano --checkpoint runs/demo/embed-nano.pt"
    wrong = "--data fashion-mnist --preprocess mean=0.0 --preprocess std=0.00392157"
    assert run([*arguments.split(), *wrong.split()]) == ExitCode.UNDECIDED
    said = " ".join(capsys.readouterr().err.split())
    assert said.index("Look at the preprocessing first") < said.index("calibrate: ")
    assert "--preprocess mean=0.286" in said
