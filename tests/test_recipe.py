from __future__ import annotations

from pathlib import Path

import pytest

from resvit_engines.errors import ResvitError
from resvit_export.cli.options import resolve_recipe
from resvit_export.pairs import preprocess_values
from resvit_export.recipe import Recipe
from resvit_export.recipe_file import absolute_reference, recipe_from_toml, recipe_to_toml

FULL = Recipe(
    model="timm:vit_tiny_r_s16_p8_224",
    checkpoint="/weights/a b.pth",
    model_args={"num_classes": 7, "drop_rate": 0.5, "flag": True, "name": "x"},
    input_shape="3x96x64",
    data="fashion-mnist",
    calibration_images=64,
    preprocess={"mean": [0.5, 0.5, 0.5], "resize": "crop"},
    precision="fp8",
    include=("blocks.*",),
    exclude=("Conv", "head"),
    max_drop=0.25,
    targets=("l4",),
    batch="1:8:32",
)


def flags(**given: object) -> dict[str, object]:
    return {"run_folder": None, "recipe_file": None, "model": None, **given}


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(FULL))
    assert recipe_from_toml(tmp_path / "recipe.toml") == FULL


def test_paths_in_a_recipe_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[model]\nname = "net.py:make"\ncheckpoint = "w/a.pth"\n')
    recipe = recipe_from_toml(tmp_path / "recipe.toml")
    assert recipe.model == f"{tmp_path.resolve()}/net.py:make"
    assert recipe.checkpoint == str(tmp_path.resolve() / "w/a.pth")


@pytest.mark.parametrize("name", ["timm:vit_small_r26_s32_224", "resvit:embed-nano", "fashion-mnist", "pkg.mod:make"])
def test_names_are_not_taken_for_paths(name: str, tmp_path: Path) -> None:
    assert absolute_reference(name, tmp_path) == name


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[quantize]\nprecison = 'int8'\n", "quantize.precision"),
        ("[quantize]\nprecision = 'int4'\n", "int8, fp8, fp16"),
        ("[data]\nseed = 'x'\n", "data.seed"),
        ("[quantize]\nexclude = 'head'\n", "wrong type"),
        ("[data\n", "TOML"),
        ("[target]\nbatch = '8:1:2'\n", "rising order"),
        ("[model]\ninput_shape = '3x0x4'\n", "CHANNELSxHEIGHTxWIDTH"),
        ("[validate]\nmax_drop = -1\n", "out of range"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ResvitError) as caught:
        recipe_from_toml(path)
    assert part in str(caught.value)


def test_flags_win_over_the_recipe_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(FULL))
    recipe, _ = resolve_recipe(flags(recipe_file=path, precision="int8", model_args=("num_classes=9",)))
    assert recipe.precision == "int8"
    assert recipe.model_args == {**FULL.model_args, "num_classes": 9}
    assert recipe.max_drop == FULL.max_drop


def test_a_run_continues_with_its_own_recipe_unless_a_model_is_given(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(FULL))
    continued, folder = resolve_recipe(flags(run_folder=tmp_path))
    assert (continued, folder) == (FULL, tmp_path)
    fresh, _ = resolve_recipe(flags(run_folder=tmp_path, model="resvit:embed-nano"))
    assert fresh == Recipe(model="resvit:embed-nano")


def test_the_local_recipe_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("resvit.toml").write_text('[model]\nname = "timm:resnet18"\n')
    recipe, folder = resolve_recipe(flags(precision="fp16"))
    assert (recipe.model, recipe.precision, folder) == ("timm:resnet18", "fp16", Path("runs/resnet18"))


def test_no_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResvitError, match="No model"):
        resolve_recipe(flags())


@pytest.mark.parametrize(
    ("batch", "expected"), [("1", (1, 1, 1)), ("8", (8, 8, 8)), ("1:8:32", (1, 8, 32)), ("2:2:2", (2, 2, 2))]
)
def test_batches(batch: str, expected: tuple[int, int, int]) -> None:
    recipe = Recipe(batch=batch)
    assert recipe.batch_range == expected
    assert recipe.dynamic_batch == (expected[0] != expected[2])


def test_preprocess_values() -> None:
    assert preprocess_values("mean", "0.5,0.25,1") == [0.5, 0.25, 1.0]
    assert preprocess_values("size", "96x64") == [96, 64]
    assert preprocess_values("size", "96") == [96, 96]
    assert preprocess_values("crop_fraction", "0.875") == 0.875
    with pytest.raises(ResvitError):
        preprocess_values("std", "a,b")


def test_own_targets_and_several_targets_survive(tmp_path: Path) -> None:
    text = '[target]\nname = ["our-box", "l4"]\n[targets.our-box]\nlike = "jetson-orin"\nint8 = 85.0\n'
    (tmp_path / "in.toml").write_text(text)
    recipe = recipe_from_toml(tmp_path / "in.toml")
    assert (recipe.targets, recipe.target) == (("our-box", "l4"), "our-box")
    assert recipe.own_targets == {"our-box": {"like": "jetson-orin", "int8": 85.0}}
    (tmp_path / "out.toml").write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(tmp_path / "out.toml") == recipe
    assert 'name = "l4"' in recipe_to_toml(Recipe(targets=("l4",)))


def test_a_key_in_a_recipe_is_a_path_or_the_agent(tmp_path: Path) -> None:
    for text, key in (("keys/a.key", str(tmp_path.resolve() / "keys/a.key")), ("agent:work", "agent:work")):
        (tmp_path / "recipe.toml").write_text(f'[bundle]\nkey = "{text}"\n')
        assert recipe_from_toml(tmp_path / "recipe.toml").key == key
