"""Hugging Face's models: from a folder to a network, with random and with trained weights, and what goes wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from hf_models import CLASSES, folder_of
from resvit_calibrate.readers.scenes import Scenes
from resvit_calibrate.runtime.runner import onnx_runner
from resvit_engines.errors import ExitCode, ResvitError
from resvit_engines.progress import SILENT
from resvit_export.cli.main import run
from resvit_export.loading.hugging_face import hugging_face_model
from resvit_export.loading.libraries import import_transformers
from resvit_export.loading.load import load_network
from resvit_export.loading.spec import ModelSpec
from resvit_export.loading.weights.drawn import draw_weights
from resvit_export.recipe.file import absolute_reference
from resvit_export.to_onnx.export import onnx_from_program
from resvit_quantize.fold.program import fold_program

pytest.importorskip("transformers")
WRITER = Path(__file__).parent.parent / "examples" / "scenes.py"


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with COCO annotations, as examples/scenes.py writes them."""
    spec = importlib.util.spec_from_file_location("write_scenes_example", WRITER)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = tmp_path_factory.mktemp("scenes")
    for split in ("train", "test"):
        example.write_scenes(Scenes(split), 8, folder, SILENT)
    return folder / "detection"


SHAPES = {
    "rt_detr": {"logits": (20, CLASSES), "pred_boxes": (20, 4)},
    "detr": {"logits": (20, CLASSES + 1), "pred_boxes": (20, 4)},
    "vit": {"logits": (CLASSES,)},
    "segformer": {"logits": (CLASSES, 24, 24)},
}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in ("rt_detr", "segformer", "detr") else ()) for kind in SHAPES],
)
def test_every_kind_is_exported_for_any_batch(kind: str, tmp_path: Path) -> None:
    network = load_network(ModelSpec(f"hf:{folder_of(kind, tmp_path / kind)}"))
    assert network.notes == ("random weights: no checkpoint was given",)
    program, report = fold_program(network.program)
    exported = onnx_from_program(program, tmp_path / "model.onnx", opset=20)
    assert dict(exported.outputs) == {name: ("batch", *shape) for name, shape in SHAPES[kind].items()}
    # Of what transformers computes for photos of any size, nothing is left: no masks, no position codes.
    assert not {"Where", "CumSum", "Sin", "Cos", "GatherND", "And", "If"} & set(exported.operators)
    assert ("parallel_convolution" in report.counts()) == (kind == "rt_detr")


@pytest.mark.slow
@pytest.mark.whole
def test_trained_weights_give_what_transformers_gives(tmp_path: Path) -> None:
    folder = folder_of("rt_detr", tmp_path / "model", weights=True)
    network = load_network(ModelSpec(f"hf:{folder}"))
    assert network.notes == ()
    images = np.random.default_rng(0).standard_normal((3, 3, 96, 96), dtype=np.float32)
    own = import_transformers().RTDetrForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = own(pixel_values=torch.from_numpy(images))
    found = network.runner()({"input": images})
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["pred_boxes"], expected.pred_boxes.numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.whole
def test_a_checkpoint_of_the_models_own_keys_fits(tmp_path: Path) -> None:
    folder = folder_of("vit", tmp_path / "trained", weights=True)
    own = import_transformers().ViTForImageClassification.from_pretrained(folder).eval()
    torch.save(own.state_dict(), tmp_path / "fine_tuned.pt")
    network = load_network(ModelSpec(f"hf:{folder_of('vit', tmp_path / 'bare')}", tmp_path / "fine_tuned.pt"))
    images = np.ones((1, 3, 32, 32), np.float32)
    with torch.no_grad():
        expected = own(pixel_values=torch.from_numpy(images)).logits.numpy()
    np.testing.assert_allclose(network.runner()({"input": images})["logits"], expected, atol=1e-5)


@pytest.mark.whole
def test_random_weights_keep_signals_alive(tmp_path: Path) -> None:
    model = hugging_face_model(str(folder_of("rt_detr", tmp_path / "model")), {}).eval()
    with torch.no_grad():
        answer = model(torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    # With transformers' own start all scores are equal, and no query is selected for a reason.
    assert float(answer["logits"].std()) > 0.1
    assert len(torch.unique(answer["logits"])) > 100


@pytest.mark.whole
def test_preprocessing_is_read_from_the_folder(tmp_path: Path) -> None:
    models = {kind: hugging_face_model(str(folder_of(kind, tmp_path / kind)), {}) for kind in SHAPES}
    vit, detr, rt_detr = (models[kind].preprocess for kind in ("vit", "detr", "rt_detr"))
    assert (vit.size, vit.resize, vit.interpolation, vit.mean) == ((32, 32), "stretch", "bicubic", (0.5, 0.5, 0.5))
    assert (rt_detr.mean, rt_detr.std) == ((0.0,) * 3, (1.0,) * 3)
    assert (detr.size, detr.resize) == ((96, 96), "letterbox")
    np.testing.assert_allclose(detr.pad_value, [255 * 0.485, 255 * 0.456, 255 * 0.406])
    assert models["detr"].task_options == {"activation": "softmax"}
    assert models["rt_detr"].task_options == {}


@pytest.mark.parametrize(
    ("own", "size", "resize", "fraction", "mean"),
    [
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}, (224, 224), "crop", 0.875, 0.5),
        ({"size": 384}, (384, 384), "crop", 1.0, 0.5),
        # 1/127.5 and no offset: pixels 0 to 2.
        ({"size": {"height": 8, "width": 9}, "rescale_factor": 1 / 127.5}, (8, 9), "stretch", 1.0, 0.25),
    ],
)
def test_sizes_and_factors(own: dict, size: tuple, resize: str, fraction: float, mean: float, tmp_path: Path) -> None:
    folder = folder_of("vit", tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **own})
    )
    found = hugging_face_model(str(folder), {"image_size": 32}).preprocess
    assert (found.size, found.resize, found.crop_fraction) == (size, resize, fraction)
    assert found.mean == pytest.approx((mean,) * 3)


def damaged(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None}))
    return folder


def test_what_goes_wrong_is_said(tmp_path: Path) -> None:
    vit = folder_of("vit", tmp_path / "vit")
    with pytest.raises(ResvitError, match=r"neither a folder .* nor in the hub's cache") as caught:
        hugging_face_model("nobody/nothing", {})
    assert "hf download nobody/nothing" in caught.value.fix
    with pytest.raises(ResvitError, match="has no setting hidden_siz") as caught:
        hugging_face_model(str(vit), {"hidden_siz": 8})
    assert "hidden_size" in caught.value.fix
    with pytest.raises(ResvitError, match="does not say which class") as caught:
        hugging_face_model(str(damaged(folder_of("vit", tmp_path / "a"), architectures=None)), {})
    assert " or ViTForImageClassification or " in caught.value.fix
    with pytest.raises(ResvitError, match="is the configuration alone") as caught:
        hugging_face_model(str(vit / "config.json"), {})
    assert caught.value.fix == f"Give its folder: hf:{vit}."
    with pytest.raises(ResvitError, match="neither a folder") as caught:
        hugging_face_model("https://huggingface.co/nobody/nothing", {})
    assert "(hf download nobody/nothing)" in caught.value.fix
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ResvitError, match="is an adapter"):
        hugging_face_model(str(tmp_path / "lora"), {})
    (tmp_path / "timm").mkdir()
    of_timm = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {"tag": "a1_in1k"}}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(of_timm))
    with pytest.raises(ResvitError, match="is a model of timm's") as caught:
        hugging_face_model(str(tmp_path / "timm"), {})
    assert "--model timm:resnet18 --checkpoint" in caught.value.fix
    known = damaged(folder_of("vit", tmp_path / "d"), auto_map={"AutoModel": "own.Model"})
    assert any("which was not run" in note for note in load_network(ModelSpec(f"hf:{known}")).notes)
    with pytest.raises(ResvitError, match="has no model class ViTForNothing"):
        hugging_face_model(str(vit), {"architecture": "ViTForNothing"})
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    with pytest.raises(ResvitError, match="comes with code of its own, which is not run"):
        hugging_face_model(str(damaged(folder_of("vit", tmp_path / "b"), auto_map=auto, model_type="own_kind")), {})
    (vit / "preprocessor_config.json").write_text("{")
    with pytest.raises(ResvitError, match="does not read as JSON"):
        hugging_face_model(str(vit), {})
    own = damaged(folder_of("vit", tmp_path / "c"), auto_map={"AutoModel": "own.Model"}, architectures=["Own"])
    with pytest.raises(ResvitError, match="comes with code of its own, which is not run"):
        hugging_face_model(str(own), {})
    (vit / "config.json").write_text("{")
    with pytest.raises(ResvitError, match="transformers cannot load"):
        hugging_face_model(str(vit), {})


@pytest.mark.parametrize(
    "own",
    [
        [],
        {"size": "big"},
        {"size": {"height": -3, "width": 0}},
        {"size": {"height": 32, "width": 32}, "image_mean": "x"},
        {"size": {"height": 32, "width": 32}, "image_std": [0, 0, 0]},
        {"size": {"height": 32, "width": 32}, "rescale_factor": 0},
        {"do_center_crop": True, "crop_size": {"height": 32}},
        {"size": {"height": "a", "width": None}},
    ],
)
def test_preprocessing_that_nobody_could_mean_is_the_files_fault(own: object, tmp_path: Path) -> None:
    folder = folder_of("vit", tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    with pytest.raises(ResvitError) as caught:
        hugging_face_model(str(folder), {})
    assert caught.value.code is ExitCode.INPUT


def test_a_model_without_a_size_asks_for_one(tmp_path: Path) -> None:
    folder = folder_of("rt_detr", tmp_path / "m")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ResvitError, match="does not say which images it takes") as caught:
        load_network(ModelSpec(f"hf:{folder}"))
    assert "--input-shape" in caught.value.fix


def test_weights_of_a_backbone_alone_are_refused(tmp_path: Path) -> None:
    folder = folder_of("vit", tmp_path / "vit")
    transformers = import_transformers()
    transformers.ViTModel(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(ResvitError, match=r"do not cover the model: \d+ tensors .*classifier"):
        hugging_face_model(str(folder), {"architecture": "ViTForImageClassification"})


def test_a_model_of_texts_is_refused(tmp_path: Path) -> None:
    transformers = import_transformers()
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ResvitError, match="reads input_ids: an engine here is a function of images alone"):
        hugging_face_model(str(tmp_path), {})


def test_a_folder_in_a_recipe_is_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert absolute_reference("hf:models", tmp_path) == f"hf:{tmp_path / 'models'}"
    assert absolute_reference("hf:owner/name", tmp_path) == "hf:owner/name"


@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        pytest.param("rt_detr", ("rtx-4090", "jetson-orin"), marks=pytest.mark.slow),
        pytest.param("detr", ("rtx-4090", "jetson-orin"), marks=pytest.mark.slow),
    ],
    ids=["rt_detr-both", "detr-both"],
)
def test_a_detector_goes_to_an_engine_and_a_bundle(
    kind: str, targets: tuple[str, ...], tmp_path: Path, scenes_folder: Path
) -> None:
    model = ["--model", f"hf:{folder_of(kind, tmp_path / kind)}", "--data", str(scenes_folder)]
    few = ["--calibration-images", "8", "--validation-images", "8", "--no-search", "--quiet"]
    target = [*(word for name in targets for word in ("--target", name)), "--run", str(tmp_path / "run")]
    # Random weights detect nothing: the build is whole, and the verdict says that nothing is proven.
    assert run(["build", *model, *few, *target]) == ExitCode.UNDECIDED
    (quantised, *_) = (tmp_path / "run").glob("quantize-*/quantize.json")
    nodes = {node["name"]: node for node in json.loads(quantised.read_bytes())["nodes"]}
    boxes = [node for name, node in nodes.items() if "bbox" in name and node["macs"]]
    assert boxes
    assert {node["precision"] for node in boxes} == {"fp16"}
    assert any("boxes" in node["reason"] for node in boxes)
    assert len(list((tmp_path / "run").glob("bundle-*/*.resvit"))) == len(targets)
    (verdict, *_) = (tmp_path / "run").glob("validate-*/verdict.json")
    golden = json.loads(verdict.read_bytes())["golden"]
    assert golden.get("sets", False) is (kind == "rt_detr")
    (exported, *_) = (tmp_path / "run").glob("export-*/model.onnx")
    assert onnx.load(exported).graph.input[0].name == "input"
    assert set(onnx_runner(exported)({"input": np.zeros((1, 3, 96, 96), np.float32)})) == {"logits", "pred_boxes"}


def bare_folder(name: str, folder: Path, **settings: object) -> Path:
    """A folder with nothing but the configuration of a class of transformers."""
    config = getattr(import_transformers(), name.rpartition(":")[0])(**settings)
    config.architectures = [name.rpartition(":")[2]]
    config.save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("name", "says", "fix"),
    [
        ("CLIPConfig:CLIPModel", "reads input_ids", "architecture=CLIPVisionModel"),
        ("OwlViTConfig:OwlViTForObjectDetection", "reads input_ids, pixel_values", "architecture=OwlViTVisionModel"),
        ("GroundingDinoConfig:GroundingDinoForObjectDetection", "reads pixel_values, input_ids", "a module of yours"),
        ("OneFormerConfig:OneFormerForUniversalSegmentation", "reads pixel_values, task_inputs", "a module of yours"),
        ("SuperPointConfig:SuperPointForKeypointDetection", "as many points as it finds", "a module of yours"),
        ("EfficientLoFTRConfig:EfficientLoFTRForKeypointMatching", "compares two images", "a module of yours"),
        ("VideoMAEConfig:VideoMAEModel", "takes films", "a module of yours"),
        ("SamConfig:SamModel", "takes points or boxes", "architecture=SamVisionModel;"),
        ("Siglip2Config:Siglip2ForImageClassification", "reads patches of photos", "fixed size"),
        ("MllamaConfig:MllamaVisionModel", "reads pixel_values, aspect_ratio_ids", "a module of yours"),
        ("Llama4Config:Llama4ForConditionalGeneration", "reads input_ids", "architecture=Llama4VisionModel"),
        ("BertConfig:BertModel", "reads input_ids", "a module of yours"),
    ],
)
def test_what_is_no_function_of_one_image_is_refused_before_it_is_built(
    name: str, says: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(import_transformers(), name.rpartition(":")[2])
    folder = bare_folder(name, tmp_path)
    monkeypatch.setattr(kind, "__init__", lambda *_: pytest.fail("it was built"))
    with pytest.raises(ResvitError, match=says) as caught:
        hugging_face_model(str(folder), {})
    assert caught.value.code == ExitCode.INPUT
    assert fix in caught.value.fix


def test_the_part_that_sees_comes_out_of_a_model_of_images_and_text(tmp_path: Path) -> None:
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    folder = bare_folder("CLIPConfig:CLIPModel", tmp_path, vision_config=vision, text_config=SMALL)
    transformers = import_transformers()
    whole = transformers.CLIPModel(transformers.AutoConfig.from_pretrained(folder)).eval()
    whole.save_pretrained(folder)
    model = hugging_face_model(str(folder), {"architecture": "CLIPVisionModel"}).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = whole.vision_model(pixel_values=images).pooler_output
        torch.testing.assert_close(model(images)["pooler_output"], expected)
    assert model.input_shape == (3, 32, 32)


def test_a_tower_that_inherits_the_name_of_the_words_reads_its_image(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    vision |= {"image_size": 16, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16}
    folder = bare_folder(
        "Llama4Config:Llama4VisionModel", tmp_path, vision_config={**vision, "projector_output_dim": 16}
    )
    kind = import_transformers().Llama4VisionModel
    assert kind.main_input_name == "input_ids"
    with torch.no_grad():
        answers = hugging_face_model(str(folder), {}).eval()(torch.randn(2, 3, 16, 16))
    assert {len(answer) for answer in answers.values()} == {2}


def test_a_library_that_is_not_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*_: object) -> None:
        raise ImportError("\nViTModel requires the pasta library but it was not found in your environment.\nMore.")

    folder = bare_folder("ViTConfig:ViTModel", tmp_path)
    monkeypatch.setattr(import_transformers().ViTModel, "__init__", built)
    with pytest.raises(ResvitError, match="requires the pasta library") as caught:
        hugging_face_model(str(folder), {})
    assert caught.value.code == ExitCode.MISSING


@pytest.mark.whole
@pytest.mark.parametrize("registers", [0, 4])
def test_a_backbone_answers_with_its_maps(registers: int, tmp_path: Path) -> None:
    # Without register tokens, one of its parameters is empty: there is nothing in it to look at.
    settings = {**SMALL, "image_size": 32, "patch_size": 8, "num_register_tokens": registers}
    folder = bare_folder("DINOv3ViTConfig:DINOv3ViTBackbone", tmp_path, out_features=["stage1", "stage2"], **settings)
    network = load_network(ModelSpec(f"hf:{folder}"))
    answers = network.runner()({"input": np.ones((2, 3, 32, 32), np.float32)})
    assert {name: value.shape for name, value in answers.items()} == {
        "feature_maps_0": (2, 32, 4, 4),
        "feature_maps_1": (2, 32, 4, 4),
    }


def test_a_masked_autoencoder_sees_all_patches_in_their_order(tmp_path: Path) -> None:
    folder = bare_folder("ViTMAEConfig:ViTMAEModel", tmp_path, **SMALL, image_size=32, patch_size=8)
    with pytest.raises(ResvitError, match="leaves out 75% of its patches") as caught:
        hugging_face_model(str(folder), {})
    assert "mask_ratio=0.0" in caught.value.fix
    model = hugging_face_model(str(folder), {"mask_ratio": 0.0}).eval()
    images = torch.randn(2, 3, 32, 32)
    swapped = images.clone()
    swapped[:, :, :8, :8], swapped[:, :, :8, 8:16] = images[:, :, :8, 8:16], images[:, :, :8, :8]
    with torch.no_grad():
        answers = [model(batch) for batch in (images, images, swapped)]
    answer, again, other = (each["last_hidden_state"] for each in answers)
    assert set(answers[0]) == {"last_hidden_state"}
    assert answer.shape == (2, 1 + 16, 32)
    torch.testing.assert_close(again, answer, rtol=0, atol=0)
    assert not torch.allclose(other, answer)


def test_an_encoder_answers_with_its_pyramid_beside_its_last_map(tmp_path: Path) -> None:
    trunk = {"hidden_size": 8, "image_size": [128, 128], "embed_dim_per_stage": [8, 16, 24, 32]}
    trunk |= {"blocks_per_stage": [1, 1, 2, 1], "num_attention_heads_per_stage": [1, 1, 1, 1]}
    trunk |= {
        "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [3],
        "model_type": "sam2_hiera_det_model",
    }
    sizes = [[32, 32], [16, 16], [8, 8]]
    vision = {"backbone_config": trunk, "backbone_channel_list": [32, 24, 16, 8], "fpn_hidden_size": 8}
    folder = bare_folder(
        "Sam2Config:Sam2VisionModel", tmp_path, vision_config={**vision, "backbone_feature_sizes": sizes}
    )
    with torch.no_grad():
        answers = hugging_face_model(str(folder), {}).eval()(torch.randn(2, 3, 128, 128))
    shapes = {name: tuple(answer.shape) for name, answer in answers.items()}
    # Neither positions, which are no answers, nor the layers' own outputs.
    assert shapes == {
        "last_hidden_state": (2, 4, 4, 32),
        **{f"fpn_hidden_states_{index}": (2, 8, *size) for index, size in enumerate(sizes)},
    }


@pytest.mark.whole
def test_a_size_that_windows_do_not_divide_is_said_with_the_next(tmp_path: Path) -> None:
    folder = bare_folder("RfDetrConfig:RfDetrForObjectDetection", tmp_path)  # by its own defaults: 518 px
    with pytest.raises(ResvitError, match="multiples of 56; they are 518 and 518") as caught:
        load_network(ModelSpec(f"hf:{folder}"))
    assert caught.value.fix == "Give --input-shape 3,504,504."


def test_points_of_deformable_attention_stay_near_their_grid() -> None:
    class Sampling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sampling_offsets, self.head = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
            torch.nn.init.zeros_(self.sampling_offsets.weight)
            torch.nn.init.zeros_(self.head.weight)
            torch.nn.init.zeros_(self.head.bias)

    module = Sampling()
    draw_weights(module)
    values = torch.randn(100, 16)
    with torch.no_grad():
        moved = module.sampling_offsets(values) - module.sampling_offsets.bias
        assert 0 < float(moved.std()) < 0.02
        assert float(module.head(values).std()) > 0.5
