from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import Silent
from resvit_engines.targets.table import Precision
from resvit_export.cli.main import cli, run
from resvit_export.cli.options import recipe_options, resolve_recipe
from resvit_export.recipe.choices import StageName, TaskKind
from resvit_export.recipe.file import absolute_reference, recipe_from_toml, recipe_to_toml
from resvit_export.recipe.pairs import preprocess_values, read_pairs, task_values
from resvit_export.recipe.recipe import SETTINGS, Recipe
from resvit_export.recipe.setting import Setting
from resvit_quantize.pruning.groups import Kind

ROOT = Path(__file__).parent.parent
OTHERS: dict[str, Any] = {
    "input_shape": "3x8x8",
    "shapes": ("image=1x3x8x8",),
    "own_targets": {"box": {"like": "l4"}},
    "batch": "1:2:4",
}
"""Values that are not the default, where the type does not say one."""

EVERY = pytest.mark.parametrize("item", SETTINGS.values(), ids=list(SETTINGS))
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
        ("[target]\nbatch = '2:1:8'\n", "rising order"),
        ("[target]\nbatch = '1:8:4'\n", "rising order"),
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


@pytest.mark.whole
@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=80).map(lambda text: f"[model]\nname = {text}".encode()))
def test_whatever_bytes_a_recipe_has_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(data)
    try:
        recipe_from_toml(path)
    except ResvitError as error:
        refused = error
    else:
        return
    assert refused.code is ExitCode.INPUT
    assert refused.fix


def test_a_recipe_by_windows_editors_is_read_or_told_how_to_save_it(tmp_path: Path) -> None:
    path, text = tmp_path / "r.toml", '[model]\nname = "resvit:embed-nano"\n'
    path.write_bytes(text.encode("utf-8-sig").replace(b"\n", b"\r\n"))
    assert recipe_from_toml(path) == Recipe(model="resvit:embed-nano")
    for encoding in ("utf-16", "utf-16-le"):
        path.write_bytes(b"" if encoding == "utf-16" else b"\xff\xfe")
        path.write_bytes(path.read_bytes() + text.encode(encoding))
        with pytest.raises(ResvitError, match="UTF-16"):
            recipe_from_toml(path)
    path.write_bytes(b'[model]\nname = "caf\xe9"\n')
    with pytest.raises(ResvitError, match="not UTF-8: line 2"):
        recipe_from_toml(path)


def test_nothing_waits_for_a_recipe_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ResvitError, match="and not a file"):
            recipe_from_toml(path)
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(ResvitError, match="not valid TOML"):
        recipe_from_toml(tmp_path / "deep.toml")


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def test_what_the_run_folder_adds_to_the_flags_is_said(tmp_path: Path) -> None:
    kept = tmp_path / "recipe.toml"
    kept.write_text(recipe_to_toml(FULL.with_settings({"validation_data": "/images/old"})))
    heard = Heard()
    resolve_recipe(flags(run_folder=tmp_path, data="/images/new"), heard)
    (said,), (warned,) = heard.said, heard.warned
    assert str(kept) in said
    for part in ("--validation-data /images/old", "--max-drop 0.25", "--precision fp8", "--exclude Conv head"):
        assert part in said
    assert "--data " not in said
    assert "--data is another" in warned
    assert "--validation-data /images/old" in warned


@EVERY
def test_every_setting_that_stays_is_named(item: Setting, tmp_path: Path) -> None:
    if item.name == "model":
        return
    one = another(item)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(Recipe(model="resvit:embed-nano", **{item.name: one})))
    heard = Heard()
    resolve_recipe(flags(run_folder=tmp_path), heard)
    flag = f"--no-{item.flag.removeprefix('--')}" if one is False else item.flag
    assert (flag if item.since else item.toml) in heard.said[0]


def test_nothing_is_said_where_the_user_named_the_recipe_or_said_everything(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(FULL))
    heard = Heard()
    resolve_recipe(flags(recipe_file=tmp_path / "recipe.toml", run_folder=tmp_path), heard)
    resolve_recipe(flags(run_folder=tmp_path, data="fashion-mnist", model="resvit:embed-nano"), heard)
    assert heard.said == heard.warned == []
    resolve_recipe(flags(run_folder=tmp_path, data="fashion-mnist"), heard)
    assert heard.warned == []  # the same data as before


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


def test_one_text_may_hold_several_pairs() -> None:
    told = ["mean=0.5,0.5,0.5 std=0.25", "size=96"]
    assert read_pairs("--preprocess", told, preprocess_values) == {
        "mean": [0.5, 0.5, 0.5], "std": [0.25], "size": [96, 96],
    }  # fmt: skip
    assert read_pairs("--task-option", ["characters=0 1 =2", "blank=0"], task_values) == {
        "characters": "0 1 =2", "blank": 0,
    }  # fmt: skip


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


def another(item: Setting) -> Any:
    """A value of the setting that is not its default."""
    if item.name in OTHERS:
        return OTHERS[item.name]
    if item.kind is dict:
        return {"mean": [0.5], "name": "x"}
    if item.choices:
        value = next(choice for choice in item.choices if choice not in (item.default, *(item.default or ())))
    elif item.kind is bool:
        value = not item.default
    elif item.kind in (int, float):
        value = item.kind(item.high if item.high is not None else 7)
    else:
        value = "/a/b.py" if item.place else "some"
    return (value,) if item.many else value


@EVERY
def test_every_setting_is_on_the_command_lines_from_its_stage_on(item: Setting) -> None:
    assert item.description.endswith((".", "…"))
    for stage in StageName:
        command = click.command()(recipe_options(stage)(lambda **_: None))
        found = [option for option in command.params if option.name == item.name]
        assert len(found) == (item.since in stage.upto)
        for option in found:
            assert isinstance(option, click.Option)
            assert option.help == item.help
            assert item.flag in option.opts


@EVERY
def test_every_setting_is_in_the_guide(item: Setting) -> None:
    text = (ROOT / "docs/guide.md").read_text().partition("## The recipe file")[2]
    tables = re.split(r"^\[(\w+)[^\]]*\]", text.split("```")[1], flags=re.MULTILINE)
    content = dict(zip(tables[1::2], tables[2::2], strict=True))[item.table]
    key = item.toml.partition(".")[2]
    assert not key or re.search(rf"^(# )?{key} = ", content, flags=re.MULTILINE)


def test_the_recipe_of_the_guide_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs/guide.md").read_text().partition("## The recipe file")[2].split("```")[1]
    (tmp_path / "recipe.toml").write_text(text.removeprefix("toml"))
    assert recipe_from_toml(tmp_path / "recipe.toml").task is TaskKind.AUTO


@EVERY
def test_every_setting_survives_being_written_and_read(item: Setting, tmp_path: Path) -> None:
    value = another(item)
    assert value != item.default
    recipe = Recipe(**{item.name: value})
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize(
    ("item", "wrong"),
    [
        pytest.param(item, wrong, id=f"{item.name} {wrong}")
        for item in SETTINGS.values()
        for wrong in (
            *(["strange"] if item.choices else []),
            *([item.low - 1, item.high + 1] if item.low is not None and item.high is not None else []),
        )
    ],
)
def test_what_a_setting_cannot_be_is_refused(
    item: Setting, wrong: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert item.since is not None
    line = [item.since.value, "--model", "resvit:embed-nano", "--run", str(tmp_path / "run"), item.flag, str(wrong)]
    code = run(line)
    said = capsys.readouterr().err
    assert code in (ExitCode.USAGE, ExitCode.INPUT)
    assert str(wrong) in said
    for where in (Recipe, lambda **given: recipe_from_toml(written(tmp_path, item, given[item.name]))):
        with pytest.raises(ResvitError, match=f"{re.escape(item.toml)}|{item.name}") as caught:
            where(**{item.name: (wrong,) if item.many else wrong})
        assert caught.value.code == ExitCode.INPUT
        assert str(wrong) in caught.value.problem


def written(folder: Path, item: Setting, value: Any) -> Path:
    table, _, key = item.toml.partition(".")
    shown = list(value) if isinstance(value, tuple) else value
    (folder / "wrong.toml").write_text(f"[{table}]\n{key} = {shown!r}\n")
    return folder / "wrong.toml"


@EVERY
def test_a_value_of_another_type_is_refused(item: Setting) -> None:
    with pytest.raises(ResvitError, match=f"{item.name} = .* is of the wrong type"):
        Recipe(**{item.name: 1j})


def test_python_may_give_texts_and_paths() -> None:
    recipe = Recipe(
        model=Path("net.py:make"),  # type: ignore[arg-type]
        precision="fp8",  # type: ignore[arg-type]
        prune_what=["embed"],  # type: ignore[arg-type]
        key=Path("a.key"),  # type: ignore[arg-type]
        targets="l4",  # type: ignore[arg-type]
        batch=8,  # type: ignore[arg-type]
    )
    assert (recipe.model, recipe.key, recipe.targets, recipe.batch) == ("net.py:make", "a.key", ("l4",), "8")
    assert recipe.precision is Precision.FP8
    assert recipe.prune_what == (Kind.EMBED,)
    assert f"{recipe.precision} {recipe.effort} {recipe.quantizer}" == "fp8 fast resvit"


def test_flags_that_need_no_value(tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    @click.command()
    @recipe_options("bundle")
    def command(**flags: Any) -> None:
        given.update(flags)

    (tmp_path / "r.toml").write_text("[target]\nstrip_weights = true\n[search]\nenabled = true\n")
    line = f"--recipe {tmp_path}/r.toml --model resvit:embed-nano --recover --no-search --require-fused"
    command.main(shlex.split(line), standalone_mode=False)
    recipe, _ = resolve_recipe(given)
    assert (recipe.recover, recipe.search, recipe.require_fused, recipe.strip_weights) == ("always", False, True, True)


def test_every_stage_is_a_command() -> None:
    assert {stage.value for stage in StageName} <= set(cli.list_commands(click.Context(cli)))
