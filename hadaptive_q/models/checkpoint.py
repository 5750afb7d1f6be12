"""Float checkpoints: weights as safetensors, their configuration as JSON beside them.

`model.safetensors` holds tensors only and `model.json` the network's shape and preprocessing, so nothing in a
checkpoint can execute. `load_model` reads the authors' files too (see `authors`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hadaptive_q.atomic import write_bytes, write_text
from hadaptive_q.errors import UserError, first_line, nearest
from hadaptive_q.models.authors import read_authors
from hadaptive_q.models.config import FAMILIES, NetworkConfig, Preprocess
from hadaptive_q.models.families import build, find_family
from hadaptive_q.models.network import Network

AnyConfig = TypeVar("AnyConfig", bound=NetworkConfig)


class CheckpointConfig(BaseModel, Generic[AnyConfig]):
    """The JSON beside the weights of a network of one family."""

    model_config = ConfigDict(extra="forbid")
    format: int = 1
    model: AnyConfig
    preprocess: Preprocess | None = None
    training_key: str | None = None


def save_model(model: Network, path: Path, training_key: str | None = None) -> None:
    """Write `path` (`*.safetensors`) and its configuration (`*.json`), each in one step.

    `training_key` says what the weights were trained from, so that a finished training is not repeated.
    """
    config = CheckpointConfig[Any](model=model.config, preprocess=model.preprocess, training_key=training_key)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights = save(tensors)
    if not path.is_file() or path.read_bytes() != weights:
        # Removed first, written last: a configuration must never stand beside other weights.
        path.with_suffix(".json").unlink(missing_ok=True)
        write_bytes(path, weights)
    write_text(path.with_suffix(".json"), config.model_dump_json(indent=1) + "\n")


def read_training_key(path: Path) -> str | None:
    """Return what the weights at `path` were trained from, or None where that is unknown or they are missing."""
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return None
    return _read_safetensors(path)[0].training_key


def load_model(path: str | Path) -> Network:
    """Return the network stored at `path`, in float32 and eval mode.

    `path`: a `*.safetensors` with its `*.json` beside it, a folder that holds `model.safetensors`, or an
    authors' checkpoint (`*.pt`, `*.pth`). Half-precision weights are widened to float32.
    Raises UserError for anything else, a truncated file, or weights that do not fit the configuration.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"checkpoint {path}", "no such file", "a .safetensors file, its folder, or a .pt file")
    if path.suffix == ".safetensors":
        config, tensors = _read_safetensors(path)
    else:
        model_config, tensors = read_authors(path)
        config = CheckpointConfig[Any](model=model_config)
    try:
        with torch.device("meta"):  # a configuration that lies is found out before its tensors take memory
            expected = build(config.model).state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = first_line(error)
        raise UserError(f"checkpoint {path}", f"'{reason}'", "the configuration of a network") from error
    _check_tensors(expected, tensors, f"checkpoint {path}", config.model.name)
    model = build(config.model)
    with torch.no_grad():
        model.load_state_dict({n: t.to(expected[n].dtype) for n, t in tensors.items()})
    model.preprocess = config.preprocess
    return model.eval()


def _read_safetensors(path: Path) -> tuple[CheckpointConfig[Any], dict[str, Tensor]]:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise UserError(
            f"checkpoint {path}", f"no {beside.name} beside it", "the configuration written with the weights"
        )
    config = read_config(beside)
    try:
        return config, load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {path}", f"'{error}'", "a whole safetensors file", "it may be truncated: copy it again"
        ) from error


def read_config(path: Path) -> CheckpointConfig[Any]:
    """Return the configuration in the JSON at `path`. Raises UserError for anything else."""
    try:
        content = json.loads(path.read_text())
        family = _family(content)
        if family not in FAMILIES:
            raise UserError(
                f"checkpoint {path}, model.family",
                repr(family),
                f"one of {', '.join(FAMILIES)}",
                nearest(family, FAMILIES),
            )
        config: CheckpointConfig[Any] = CheckpointConfig[find_family(family).config].model_validate(content)  # type: ignore[misc]
        return config
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"checkpoint {path}, {key}", repr(first["input"])[:80], first["msg"]) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {path}", f"'{error}'", "the JSON written with the weights") from error


def _family(content: Any) -> str:
    """Return the family of the network in a checkpoint's JSON; checkpoints older than families name none."""
    model = content.get("model") if isinstance(content, dict) else None
    family = model.get("family", "hadaptive_net") if isinstance(model, dict) else None
    # Nothing that is a network's: it is said what is wrong with it where it is validated.
    return family if isinstance(family, str) else "hadaptive_net"


def _check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str, name: str) -> None:
    """Raise UserError unless `tensors` are finite and have the names, shapes and kinds of numbers of `expected`."""
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise UserError(
            where,
            f"{len(missing)} tensors missing, {len(unknown)} unknown (such as {(missing + unknown)[0]})",
            f"the tensors of {name}",
        )
    for key, tensor in tensors.items():
        wanted = expected[key]
        if tensor.shape != wanted.shape:
            raise UserError(f"{where}, {key}", f"shape {tuple(tensor.shape)}", f"{tuple(wanted.shape)}")
        if tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex():
            raise UserError(f"{where}, {key}", str(tensor.dtype), f"numbers like {wanted.dtype}")
        # The norms of the temperature rule are NaN until their step has come.
        if not key.endswith(("gradient_norm", "stored_norm")) and not tensor.to(wanted.dtype).isfinite().all():
            raise UserError(f"{where}, {key}", "NaN or infinity", "finite weights")
