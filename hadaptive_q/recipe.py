"""A recipe: one self-contained YAML file that says everything a run does.

Strict: an unknown key is an error that names its path and the nearest key. Free of torch, so that a mistake
is answered at once.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic import ValidationError as PydanticError

from hadaptive_q.errors import UserError, nearest
from hadaptive_q.models.config import MODELS, InputName, SlotOrder

Share = Annotated[float, Field(ge=0, lt=1)]
Bits = Annotated[int, Field(ge=2, le=8)]
BackendName = Literal["torchao", "brevitas"]
# Random generators take 64 bits, of which every epoch has a part of its own.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
ImageSize = Annotated[int, Field(gt=0, le=4096)]
LAYER_KEYS = "quantize.layers."
# The tasks whose runs write files.
QUANTIZING = ("ptq", "qat")


# Fields that came later are left out where they have no effect (`exclude_if`): a recipe keeps the digest it had.
class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AugmentConfig(_Section):
    """Random changes to a training batch, each a maximum; mirroring happens only where the data allows it.

    Crops of at least `least_area` of an image become the square (1: none). `randaugment` is the magnitude, of 30, of
    RandAugment's two operations; `mixup` and `cutmix` are the parameters of the Beta distributions of shares.
    """

    degrees: NonNegativeFloat = 10.0
    translate: Share = 0.08
    scale: Share = 0.1
    mirror: bool = True
    least_area: Annotated[float, Field(gt=0, le=1, exclude_if=lambda share: share == 1)] = 1.0
    randaugment: Annotated[int, Field(ge=0, lt=30, exclude_if=operator.not_)] = 0
    mixup: Annotated[float, Field(ge=0, exclude_if=operator.not_)] = 0.0
    cutmix: Annotated[float, Field(ge=0, exclude_if=operator.not_)] = 0.0


class MarginConfig(_Section):
    """The gap wanted between the scores that decide a selection, in units of X~, and the weight of that wish."""

    gap: PositiveFloat = 0.1
    weight: NonNegativeFloat = 0.0


class TrainConfig(_Section):
    """One training: the float network's, or the fine-tuning under quantization.

    A step takes the gradients of `accumulate` batches; processes that train together share each.
    """

    epochs: PositiveInt
    batch_size: PositiveInt = 64
    accumulate: Annotated[int, Field(gt=0, exclude_if=(1).__eq__)] = 1
    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 1e-4
    warmup: Share = 0.05
    label_smoothing: Share = 0.1
    ema: Share = 0.0
    noise_until: Annotated[float, Field(ge=0, le=1)] = 0.7
    margin: MarginConfig = MarginConfig()
    augment: AugmentConfig = AugmentConfig()
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    compile: Annotated[bool, Field(exclude_if=operator.not_)] = False
    channels_last: Annotated[bool, Field(exclude_if=operator.not_)] = False


class CalibrationConfig(_Section):
    """Which samples calibrate: a manifest by name or path, ``auto`` for the one named after the data."""

    manifest: str = "auto"
    batch_size: PositiveInt = 64


class QuantizeConfig(_Section):
    """Number formats, who finds and learns scales, and what the written file takes (`models.config.InputName`).

    `pointwise_weight_bits` holds for 1x1 convolutions and linears that the runtime has arithmetic with 4-bit weights
    for, except the stem and what a selection's scores are computed from; `weight_bits` for all other layers. `layers`
    has the exceptions, by the name of a layer or of a module around some. With 4 `activation_bits` the image, the
    logits and what scores are computed from keep 8.
    `rounding` is how weights that share bytes begin: at their nearest codes, or so that the layer's outputs move least.
    `equalise` makes the channels of products between depthwise convolutions equally large.
    `ranges` are those of activations in training; `weight_ranges` the scales of weights of few bits, with Brevitas of
    all weights, which training leaves as it finds them or learns.
    """

    backend: BackendName = "torchao"
    weight_bits: Bits = 8
    pointwise_weight_bits: Bits = 8
    layers: dict[str, Bits] = {}
    activation_bits: Literal[4, 8] = 8
    rounding: Literal["nearest", "gptq"] = "nearest"
    equalise: Annotated[bool, Field(exclude_if=operator.not_)] = False
    observer: Literal["minmax", "mse", "histogram", "product"] = "histogram"
    ranges: Literal["observed", "learned"] = "observed"
    weight_ranges: Literal["observed", "learned"] = "observed"
    selection: Literal["dynamic", "static"] = "dynamic"
    input: InputName = "float32"


class FitConfig(TrainConfig):
    """Quantization-aware fine-tuning.

    `distill` is the share of the float network's logits in the loss, `distill_features` the weight of its blocks'
    outputs; ``distill: 1`` follows the float network alone, without labels and without dropout. `damping` holds weights
    near the code they have; `gradual` is the share of the epochs in which weights of few bits come down from 8 to their
    own; BatchNorm stays `folded` or goes on `live`.
    """

    freeze_ranges: Annotated[float, Field(ge=0, le=1)] = 0.5
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0
    distill_features: NonNegativeFloat = 0.0
    damping: NonNegativeFloat = 0.0
    gradual: Annotated[float, Field(ge=0, lt=1, exclude_if=operator.not_)] = 0.0
    batch_norm: Literal["folded", "live"] = "folded"


class Recipe(_Section):
    """The resolved recipe; `float` trains the float model where no checkpoint is given.

    `crop` is as in `Preprocess`, by default as the checkpoint was trained, or 1. `workers` processes read images, by
    default as many as are worth it; the number changes no result, and is no part of what is written or of the digest.
    """

    name: str
    task: Literal["train", "ptq", "qat"]
    model: str = "hadaptive_net_s"
    slot_order: SlotOrder = "channel"
    data: str = "digits"
    image_size: ImageSize | None = None
    crop: Annotated[float, Field(gt=0, le=1)] | None = Field(None, exclude_if=operator.not_)
    workers: Annotated[int, Field(ge=0, le=256)] | None = Field(None, exclude=True)
    seed: Seed = 0
    float: TrainConfig
    calibration: CalibrationConfig = CalibrationConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    fit: FitConfig | None = None

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=_PlainDumper, sort_keys=False)

    def digest(self) -> str:
        """Return ``sha256:...`` of the resolved recipe, independent of comments and key order."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def shipped(kind: Literal["recipes", "calib"]) -> dict[str, Path]:
    """Return the YAML files that ship with the package by name, from the wheel or a checkout."""
    package = Path(__file__).parent
    folder = package / "_shipped" / kind
    if not folder.is_dir():
        folder = package.parent / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, aliases (an alias can grow without bound) and tags."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        found = "aliases" if isinstance(event, yaml.AliasEvent) else "tags" if getattr(event, "tag", None) else None
        if found:
            problem = f"{found} are not allowed"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"duplicate key {key!r}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper that puts into quotes what `_PlainLoader` would not read as text."""


# YAML 1.1 reads 1e-3 as text for want of a dot, and everybody writes learning rates so.
for _side in (_PlainLoader, _PlainDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
# ValueError comes from values that only look like a date or a number (2020-13-45, 0b_).
_NOT_PLAIN = (yaml.YAMLError, ValueError, RecursionError)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in `path`. Raises UserError for anything that is not plain YAML data."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, *_NOT_PLAIN) as error:
        raise UserError(str(path), f"'{' '.join(str(error).split())}'", "plain YAML") from error
    if not isinstance(content, dict):
        raise UserError(str(path), type(content).__name__, "a mapping of keys to values")
    return content


def load_recipe(name: str, settings: list[str] | None = None) -> Recipe:
    """Return recipe `name` (shipped, or a path to a `*.yaml`) with each ``key.path=value`` of `settings` applied.

    Raises UserError for an unknown recipe, an unknown key or a value of the wrong type.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"--recipe {name}", "no such file", "a recipe file or a shipped name")
    else:
        known = shipped("recipes")
        if name not in known:
            raise UserError(f"--recipe {name}", "an unknown recipe", f"one of {', '.join(known)}", nearest(name, known))
        path = known[name]
    content = {"name": path.stem, **read_yaml(path)}
    for setting in settings or []:
        _apply(content, setting)
    return parse_recipe(content, str(path))


def parse_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    """Validate `content`. Raises UserError that names the first wrong key and what was expected there."""
    try:
        recipe = Recipe.model_validate_json(json.dumps(content))
    except PydanticError as error:
        raise _explain(error, where) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(where, f"'{error}'", "numbers, texts, lists and mappings") from error
    if recipe.model not in MODELS:
        hint = nearest(recipe.model, MODELS)
        raise UserError(f"{where}, model", repr(recipe.model), f"one of {', '.join(MODELS)}", hint)
    if (recipe.fit is None) != (recipe.task != "qat"):
        raise UserError(f"{where}, task", repr(recipe.task), "'fit' with task: qat, and only there")
    return recipe


def _apply(content: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise UserError(f"--set {setting}", "no '='", "key=value, such as float.epochs=3")
    # The key of an exception is a layer's name, which has dots of its own.
    name = key.removeprefix(LAYER_KEYS)
    *parents, leaf = key.split(".") if name == key else [*LAYER_KEYS.split(".")[:-1], name]
    target = content
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {setting}", f"{parent!r}, which is a single value", "a section of the recipe")
    try:
        target[leaf] = yaml.load(text, _PlainLoader)
    except _NOT_PLAIN as error:
        raise UserError(f"--set {setting}", repr(text), "a plain YAML value") from error


def _explain(error: PydanticError, where: str) -> UserError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    path = ".".join(location)
    if first["type"] == "extra_forbidden":
        fields = _fields(location[:-1])
        return UserError(
            f"{where}, {path}", "an unknown key", f"one of {', '.join(fields)}", nearest(location[-1], fields)
        )
    message = first["msg"].replace("Input should be ", "").removeprefix("Value error, ")
    got = "nothing" if first["type"] == "missing" else repr(first["input"])
    return UserError(f"{where}, {path}", got, message[0].lower() + message[1:])


def _fields(location: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        annotation = section.model_fields[part].annotation
        options = (annotation, *typing.get_args(annotation))
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
