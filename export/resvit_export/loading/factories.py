"""From the name that the user gave to the ``nn.Module`` behind it."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from resvit_calibrate.readers.user.code import module_from
from resvit_calibrate.readers.user.torchvision_import import import_beside_torchvision
from resvit_engines.errors import ResvitError, chain_of
from resvit_engines.outside import expanded, leads_to_file
from resvit_export.loading.libraries import import_timm
from resvit_export.loading.spec import Scalar
from resvit_export.loading.user_code import user_error


def module_from_name(model: str, arguments: Mapping[str, Scalar]) -> nn.Module:
    """Make the module that a name stands for.

    A name is ``resvit:NAME``, ``timm:NAME``, ``hf:FOLDER``, ``package.module:factory`` or ``file.py:factory``.
    Weights are random (seed 0) unless a factory loads its own. The current folder is importable, and so are the
    neighbours of ``file.py``. Raises ``ResvitError`` for a name that leads nowhere, and with the user's own
    message and line where the factory raises or returns something else.
    """
    if model.startswith("hf:"):
        from resvit_export.loading.hugging_face import hugging_face_model

        torch.manual_seed(0)
        return hugging_face_model(model.removeprefix("hf:"), arguments)
    place, colon, name = model.partition(":") if model.startswith("timm:") else model.rpartition(":")
    if not colon or not name:
        raise ResvitError(
            f"'{model}' does not say where the model is.",
            "Write resvit:NAME, timm:NAME, hf:FOLDER, package.module:factory, path/to/file.py:factory, a .pt2 or an "
            ".onnx file.",
        )
    if place == "object":
        raise ResvitError(
            f"{name} was given from Python, in memory, and is not there any more.",
            "Call resvit_export.build with it again.",
        )
    torch.manual_seed(0)
    if place == "resvit":
        from resvit_export.models.reference import resvit_model

        return _call(resvit_model, (name,), arguments, model)
    if place == "timm":
        return _timm_model(name, arguments)
    factory = _find_factory(place, name)
    if place.partition(".")[0] == "torchvision":
        # Its builders fetch a backbone's weights unless they are told not to, and nothing is downloaded here.
        offered = inspect.signature(factory).parameters
        none = dict.fromkeys(key for key in ("weights", "weights_backbone") if key in offered)
        return _call(factory, (), {**none, **arguments}, model)
    return _call(factory, (), arguments, model)


def _timm_model(name: str, arguments: Mapping[str, Scalar]) -> nn.Module:
    timm = import_timm()
    hub, _, kept = name.partition(":")
    if hub in ("hf_hub", "hf-hub", "local-dir") or "/" in name:
        own = (kept or name).rpartition("/")[2].partition("@")[0]
        raise ResvitError(
            f"timm:{name} names a place, not a model of timm's.",
            f"Nothing is downloaded here. Name the model, and its weights beside it: --model timm:{own} --checkpoint "
            "model.safetensors (hf download fetches it where there is a network).",
        )
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.6)
        raise ResvitError(
            f"timm has no model '{name}'.",
            f"Some that it has: {', '.join(near)}." if near else "timm.list_models() names those that it has.",
        )
    with _nothing_downloaded(name):
        return _call(timm.create_model, (name,), {"pretrained": False, **arguments}, f"timm:{name}")


@contextlib.contextmanager
def _nothing_downloaded(name: str) -> Iterator[None]:
    """Let timm find weights that are on this machine, and say at once where they are not."""
    import timm
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except ResvitError as error:
        offline = ("LocalEntryNotFoundError", "OfflineModeIsEnabled")
        if not any(type(item).__name__ in offline for item in chain_of(error)):
            raise
        hub = getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None) or f"timm/{name}"
        raise ResvitError(
            f"The trained weights of timm:{name} are not on this machine, and nothing is downloaded.",
            f"Fetch them where there is a network (hf download {hub}), or give them with --checkpoint.",
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _call(
    factory: Callable[..., object], positional: tuple[object, ...], arguments: Mapping[str, Scalar | None], model: str
) -> nn.Module:
    try:
        # Arguments that do not fit the signature are the recipe's fault, not the factory's.
        inspect.signature(factory).bind(*positional, **arguments)
    except TypeError as error:
        raise ResvitError(
            f"{model} does not take these arguments: {error}.",
            f"Its signature is {inspect.signature(factory)}.",
        ) from error
    except ValueError:
        pass  # a builtin without a signature
    try:
        made = factory(*positional, **arguments)
    except ResvitError:
        raise
    except Exception as error:
        raise user_error(error, f"{model} failed", "Mend the factory or its arguments (--model-arg).") from error
    if not isinstance(made, nn.Module):
        raise ResvitError(
            f"{model} returned a {type(made).__name__}, not a torch.nn.Module.",
            "The factory must return the network itself.",
        )
    return made


def _find_factory(place: str, name: str) -> Callable[..., object]:
    if place.endswith(".py") and not leads_to_file(expanded(place)):
        raise ResvitError(f"The file {place} does not exist.", "Check the path given to --model.")
    try:
        torchvision = place.partition(".")[0] == "torchvision"
        module = import_beside_torchvision(place, "host") if torchvision else module_from(place)
    except ResvitError:
        raise
    except ModuleNotFoundError as error:
        if place.endswith(".py"):
            raise user_error(error, f"Importing {place} failed", "Mend the file.") from error
        raise ResvitError(
            f"There is no module '{error.name}'.",
            f"Check the spelling of '{place}', or run from the folder that holds it.",
        ) from error
    except Exception as error:
        raise user_error(error, f"Importing {place} failed", "Mend the file.") from error
    factory: object = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        near = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))[:8]
        raise ResvitError(
            f"{place} has no function or class '{name}'.",
            f"It has: {', '.join(near)}." if near else "It defines none at all.",
        )
    return factory
