"""Two engines side by side: real ones of TensorRT, by layers and profiles in its own forms, and hostile files."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from conftest import DEMO
from layer_files import layer_info, profile, written
from resvit_engines.audit.compare.comparison import EngineComparison, compare_engines
from resvit_engines.audit.compare.engine import ListedEngine, engine_from_file, engine_from_kernels
from resvit_engines.audit.compare.pairing import By
from resvit_engines.audit.compare.text import comparison_lines, sentences_of
from resvit_engines.audit.kernels import Kernel
from resvit_engines.cli.main import cli as engine_cli
from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.cli.main import cli, run
from resvit_export.recipe.file import recipe_to_toml
from resvit_export.recipe.recipe import Recipe
from resvit_export.report.sections.compare import write_comparison_page
from resvit_export.tools.engine_compare import engine_of

RESNET18 = [
    f"resnet18-a100-b32-{kind}"
    for kind in ("fp32", "fp16", "int8-no-residual-qdq", "int8-residual-qdq", "int8-residual-qdq-gap")
]
RESNET50 = [f"resnet50-rtx3090-b32-{kind}" for kind in ("fp32", "fp16", "int8")]
PRODUCTS = {"resnet18": 21, "resnet50": 54}


def listed(folder: Path, name: str, form: str = "10.x") -> ListedEngine:
    return engine_from_file(*written(folder, name, form))


def compared(folder: Path, a: str, b: str, form: str = "10.x") -> EngineComparison:
    return compare_engines(listed(folder, a), listed(folder, b, form))


def kernel(name: str, nodes: str, *, kind: str = "gemm", weights: int = 64, dtype: str = "Half") -> Kernel:
    """A product of 8 channels with its ONNX nodes, or another kernel without weights."""
    constants = ((dtype,), ((8, weights // 8),)) if kind == "gemm" else ((), ())
    return Kernel(name, kind, (dtype,), (dtype,), ((1, 8),), ((1, 8),), tuple(nodes.split()), *constants)


def test_resnet50_in_int8_beside_fp16(tmp_path: Path) -> None:
    found = compared(tmp_path, "resnet50-rtx3090-b32-fp16", "resnet50-rtx3090-b32-int8")
    products = [row for row in found.rows if row.kind == "conv"]
    assert len(products) == 54
    assert all(row.in_both for row in products)
    assert {(row.a.precision, row.b.precision) for row in products} == {("FP16", "INT8")}
    assert found.ratio == pytest.approx(2195.47 / 4020.29, rel=1e-3)
    assert sum(found.totals[1].eight_bits.values()) == 54
    assert found.a.total_us == pytest.approx(4272.8, rel=1e-3)
    # Everything that is measured is in a row: nothing is lost between the kernels and the operators.
    assert sum(row.a.us or 0 for row in found.rows) == pytest.approx(found.a.total_us)
    assert sum(row.b.us or 0 for row in found.rows) == pytest.approx(found.b.total_us)
    assert "1.83 times as fast" in sentences_of(found)[0]
    assert [row.operator for row in found.only(True)] == ["resnet50/conv1_conv/Conv2D__6"]


def test_what_residual_qdq_are_worth_is_seen(tmp_path: Path) -> None:
    """Without Q/DQ on the shortcut the max pool is a kernel of its own, and FP32 is converted between layers."""
    found = compared(tmp_path, "resnet18-a100-b32-int8-residual-qdq", "resnet18-a100-b32-int8-no-residual-qdq")
    by_name = {row.operator: row for row in found.rows}
    assert "-maxpool" in by_name["conv1"].differences
    assert "+2 moves" in by_name["layer1.0.conv1"].differences
    assert "MaxPool_12" in [row.operator for row in found.only(False)]
    assert found.slower[0].operator in {"conv1", "layer1.0.conv1"}
    assert found.slower[0].change_us > 50
    kinds = {kind: counts for kind, counts, _ in found.kinds}
    assert kinds["reformat"] == (3, 12)
    assert sum(count for count, _ in found.moves(False).values()) == 12


@pytest.mark.parametrize(("a", "b"), [*itertools.permutations(RESNET18, 2), *itertools.permutations(RESNET50, 2)])
def test_every_product_of_two_real_engines_of_one_network_has_its_partner(tmp_path: Path, a: str, b: str) -> None:
    found = compared(tmp_path, a, b)
    products = [row for row in found.rows if row.kind == "conv"]
    assert len(products) == PRODUCTS[a.partition("-")[0]]
    assert all(row.in_both for row in products)
    shapes = [(row.a.kernel.kernel.output_shapes[0][1], row.b.kernel.kernel.output_shapes[0][1]) for row in products]  # type: ignore[union-attr]
    assert all(before == after for before, after in shapes)


def test_versions_that_write_other_forms_are_compared_alike(tmp_path: Path) -> None:
    old = compared(tmp_path, RESNET50[1], RESNET50[2], "10.x").to_json()
    new = compared(tmp_path, RESNET50[1], RESNET50[2], "11.x").to_json()
    assert old == new


def test_an_engine_beside_itself_differs_in_nothing(tmp_path: Path) -> None:
    found = compared(tmp_path, RESNET18[1], RESNET18[1])
    assert found.by is By.NAMES
    assert found.ratio == 1.0
    assert not any(row.differences for row in found.rows)
    assert found.slower == ()


@pytest.mark.parametrize(
    ("a", "b"), [(RESNET18[1], RESNET50[1]), (RESNET50[2], "mobilenet-int8"), (RESNET18[3], "mobilenet-int8")]
)
def test_engines_of_two_networks_are_refused(tmp_path: Path, a: str, b: str) -> None:
    with pytest.raises(ResvitError, match="two networks") as caught:
        compared(tmp_path, a, b)
    assert caught.value.code == ExitCode.INPUT


def test_nodes_pair_kernels_whose_names_and_order_differ() -> None:
    half = engine_from_kernels(
        "fp16",
        [kernel("k0", "a/MatMul a/Add"), kernel("k1", "b/MatMul", weights=128), kernel("k2", "n/Gelu", kind="x")],
    )
    eight = engine_from_kernels(
        "int8",
        [
            kernel("other", "b/MatMul_QuantizeLinear b/MatMul a/DequantizeLinear", weights=128, dtype="Int8"),
            kernel("__myl_1", "a/MatMul a/Add n/Gelu", dtype="Int8"),
        ],
    )
    found = compare_engines(half, eight)
    assert found.by is By.NAMES
    assert {row.operator: row.differences for row in found.rows} == {
        "a/MatMul": ("FP16 to INT8", "+gelu"),
        "b/MatMul": ("FP16 to INT8",),
        "n/Gelu": ("only in the first",),
    }
    assert sentences_of(found)[0].startswith("Of fp16 and int8 no times are known")


def test_numbers_in_names_that_lie_are_not_believed() -> None:
    """Q/DQ shift the numbers of an exporter: Conv_2 here is another layer than Conv_2 there."""
    half = engine_from_kernels("a", [kernel(f"k{n}", f"Conv_{n}", weights=64 << n) for n in range(4)])
    eight = engine_from_kernels("b", [kernel(f"q{n}", f"Conv_{n + 1}", weights=64 << n) for n in range(4)])
    found = compare_engines(half, eight)
    assert found.by is By.STRUCTURE
    assert [(row.a.kernel.kernel.name, row.b.kernel.kernel.name) for row in found.rows] == [  # type: ignore[union-attr]
        (f"k{n}", f"q{n}") for n in range(4)
    ]


def test_profiles_alone_are_compared_by_their_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        rows = [{"name": f"conv{n}/Conv + conv{n}/Relu", "averageMs": 0.01 * (n + 1)} for n in range(5)]
        rows += [{"name": "Reformatting CopyNode for Output Tensor 0 to conv4", "averageMs": 0.002}]
        rows[2]["averageMs"] *= 2 if name == "two" else 1  # type: ignore[operator]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"count": 7}, *rows]))
    found = compare_engines(engine_from_file(tmp_path / "one.json"), engine_from_file(tmp_path / "two.json"))
    assert [row.operator for row in found.slower] == ["conv2/Conv"]
    assert found.slower[0].change_us == pytest.approx(30.0)
    assert found.ratio == pytest.approx(182 / 152)


def test_a_profile_of_another_network_is_told_by_its_names(tmp_path: Path) -> None:
    layers, _, _ = written(tmp_path, RESNET50[2])
    _, other, _ = written(tmp_path, "mobilenet-int8")
    with pytest.raises(ResvitError, match="is of another engine") as caught:
        engine_from_file(layers, other)
    assert caught.value.code == ExitCode.INPUT
    assert "of its 62 layers" in caught.value.problem


def test_profiles_of_builds_that_name_other_nodes_ask_for_the_layer_files(tmp_path: Path) -> None:
    files = [written(tmp_path, name) for name in (RESNET18[1], RESNET18[3])]
    with pytest.raises(ResvitError, match="only the names of layers are known") as caught:
        compare_engines(*(engine_from_file(profile) for _, profile, _ in files))
    assert "two networks:" not in caught.value.problem
    assert "Give the layer files of both" in caught.value.fix


def test_times_of_another_engine_are_refused(tmp_path: Path) -> None:
    layers, by_layer, own = written(tmp_path, RESNET18[3])
    _, _, other = written(tmp_path, RESNET50[2])
    assert engine_from_file(layers, by_layer, own).latency_us
    with pytest.raises(ResvitError, match=r"is of another engine than .* its runs take 2,") as caught:
        engine_from_file(layers, by_layer, other)
    assert caught.value.code == ExitCode.INPUT


def test_a_profile_of_zeros_is_named_as_what_tells_no_times(tmp_path: Path) -> None:
    files = [written(tmp_path, name) for name in (RESNET18[1], RESNET18[3])]
    zeros = [{**row, "averageMs": 0.0} if "averageMs" in row else row for row in json.loads(files[0][1].read_text())]
    files[0][1].write_text(json.dumps(zeros))
    a, b = (engine_from_file(layers, by_layer) for layers, by_layer, _ in files)
    (said, *_) = [line for line in sentences_of(compare_engines(a, b)) if "no times are known" in line]
    assert said.startswith(f"Of {a.name} no times")


def test_a_file_that_is_not_there_and_a_run_that_is_not_finished_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResvitError) as caught:
        engine_of("nothing.json")
    assert caught.value.problem == "The layer file nothing.json does not exist."
    recipe = Recipe(model="resvit:embed-nano", targets=("jetson-orin",), data="fashion-mnist")
    Path("runs/begun").mkdir(parents=True)
    Path("runs/begun/recipe.toml").write_text(recipe_to_toml(recipe))
    with pytest.raises(ResvitError, match="runs/begun is not finished: The stage") as caught:
        engine_of("runs/begun")
    assert "build --run runs/begun" in caught.value.fix


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "null",
        "[]",
        "{}",
        '{"Layers": []}',
        '{"Layers": ["a", "b"]}',
        '{"Layers": [{"Name": "a", "Inputs": 3}]}',
        '{"Layers": [{"Name": "a", "Inputs": [{"Dimensions": ["x"]}], "Outputs": []}]}',
        '[{"count": 3}]',
        '[{"name": "a", "averageMs": -1}]',
        '[{"name": "a", "averageMs": 1e999}]',
        '[{"name": "a", "averageMs": NaN}]',
        '[{"name": "a", "averageMs": true}]',
        '[{"name": "a", "averageMs": "1"}]',
        '[{"averageMs": 1}]',
        '[{"name": "a", "averageMs": 1}, 7]',
        "[" * 100_000,
        '{"Layers": ' + "[" * 100_000,
    ],
)
def test_files_that_are_no_layers_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ResvitError) as caught:
        engine_from_file(tmp_path / "file.json")
    assert caught.value.code == ExitCode.INPUT
    assert caught.value.fix


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    layers, times_by_layer, whole = written(tmp_path, RESNET18[1])
    for path in (layers, times_by_layer, whole):
        text = path.read_text()
        for share in (0.1, 0.5, 0.9):
            path.write_text(text[: int(len(text) * share)])
            with pytest.raises(ResvitError) as caught:
                engine_from_file(layers, times_by_layer, whole)
            assert caught.value.code == ExitCode.INPUT
        path.write_text(text)
    engine_from_file(layers, times_by_layer, whole)


@pytest.mark.parametrize("text", ["[]", "{}", '[{"latencyMs": 1}]', '[{"computeMs": -1}]', '[{"computeMs": null}]'])
def test_times_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    layers, _, whole = written(tmp_path, RESNET18[1])
    whole.write_text(text)
    with pytest.raises(ResvitError):
        engine_from_file(layers, None, whole)


def test_more_layers_than_any_engine_has_are_refused(tmp_path: Path) -> None:
    rows = [{"name": f"n{n}", "averageMs": 0.1} for n in range(50_001)]
    (tmp_path / "many.json").write_text(json.dumps(rows))
    with pytest.raises(ResvitError, match="more than any engine"):
        engine_from_file(tmp_path / "many.json")


@pytest.mark.whole
def test_many_equal_layers_are_paired_without_comparing_each_with_each() -> None:
    kernels = [kernel("same", "x/MatMul") for _ in range(50_000)]
    found = compare_engines(engine_from_kernels("a", kernels), engine_from_kernels("b", kernels))
    assert len(found.rows) == 50_000


def test_tables_fit_80_columns_and_names_cannot_speak_for_us(tmp_path: Path) -> None:
    found = compared(tmp_path, RESNET50[1], RESNET50[2])
    screen = Console(width=80, record=True, force_terminal=False, color_system=None)
    for line in comparison_lines(found)[:2]:
        screen.print(line)
    lines = screen.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("conv2_block2_3_conv" in line for line in lines)
    assert "MB of activations moved" in "\n".join(lines)


def test_the_page_holds_every_operator_and_runs_nothing(tmp_path: Path) -> None:
    kernels = [kernel(f"k{n}", f"<script>alert({n})</script>/MatMul", weights=64 << n) for n in range(3)]
    engine = engine_from_kernels("a <b>", kernels)
    write_comparison_page(tmp_path / "untimed.html", compare_engines(engine, engine))
    text = (tmp_path / "untimed.html").read_text()
    assert "<script" not in text
    assert "a &lt;b&gt;" in text
    found = compared(tmp_path, RESNET50[1], RESNET50[2])
    write_comparison_page(tmp_path / "page.html", found)
    text = (tmp_path / "page.html").read_text()
    assert text.count('data-label="kernel in A"') == len(found.rows)
    assert "Where the time went" in text
    assert "http" not in text.replace("http-equiv", "")


def arguments(folder: Path, a: str, b: str) -> list[str]:
    one, two = written(folder, a), written(folder, b)
    return [
        *("compare", str(one[0]), str(two[0]), "--profile-a", str(one[1]), "--profile-b", str(two[1])),
        *("--times-a", str(one[2]), "--times-b", str(two[2])),
    ]


@pytest.mark.parametrize("command", [cli, engine_cli], ids=["resvit-export", "resvit-engine"])
def test_both_commands_compare_files_of_trtexec(tmp_path: Path, command: Any) -> None:
    line = arguments(tmp_path, RESNET18[1], RESNET18[3])
    shown = CliRunner().invoke(command, [*line, "--json"], catch_exceptions=False)
    document = json.loads(shown.stdout)
    assert document["ratio"] == pytest.approx(545.8 / 862.2, rel=1e-3)
    assert document["paired_by"] == By.STRUCTURE.value
    assert document["only_in_a"] == ["MaxPool_2"]
    people = CliRunner().invoke(command, line, catch_exceptions=False).stdout
    assert "Operators by change of time" in people
    brief = CliRunner().invoke(command, [*line, "--quiet"], catch_exceptions=False).stdout
    assert brief.startswith(f"{RESNET18[3]}.layers runs 1.58 times as fast")


def test_the_page_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    line = [*arguments(tmp_path, RESNET18[1], RESNET18[3]), "--html", str(tmp_path / "page.html")]
    shown = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert f"page: {tmp_path / 'page.html'}" in shown.stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize("source", ["nothing", "folder", "plan.resvit"])
def test_what_is_no_engine_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "plan.resvit").write_bytes(b"no zip")
    with pytest.raises(ResvitError) as caught:
        engine_of(str(tmp_path / source))
    assert caught.value.code == ExitCode.INPUT


@pytest.mark.whole
@pytest.mark.usefixtures("workspace")
def test_runs_are_compared_with_their_own_fp16_and_their_bundle(seeded: Callable[..., str]) -> None:
    seeded("runs/embed-nano", "rtx-4090", "jetson-orin")
    for target in ("rtx-4090", "jetson-orin"):
        assert run(["build", "--quiet", "--target", target, *shlex.split(DEMO)]) == 0
        found = compare_engines(engine_of("runs/embed-nano:fp16"), engine_of("runs/embed-nano", target))
        assert found.by is By.NAMES
        assert sum(found.totals[1].eight_bits.values()) > sum(found.totals[0].eight_bits.values()) == 0
        assert ("predicted by TensorRT's rules" in found.b.note) is (target == "jetson-orin")
    with pytest.raises(ResvitError, match="was not built for l4"):
        engine_of("runs/embed-nano", "l4")
    engines = sorted(Path().glob("runs/embed-nano/bundle-*/*.resvit"))
    assert len(engines) == 2
    for path in engines:
        if "jetson" in path.name:
            with pytest.raises(ResvitError, match="holds no engine yet"):
                engine_of(str(path))
        else:
            assert len(engine_of(str(path)).kernels) > 20


def test_layer_files_of_the_tests_are_tensorrts_forms() -> None:
    assert set(layer_info(RESNET18[1])) == {"Layers", "Bindings"}
    assert set(layer_info(RESNET18[1], "11.x")) == {"Layers", "I/O Tensors"}
    assert set(profile(RESNET18[1])[1]) == {"name", "timeMs", "averageMs", "medianMs", "percentage"}
