"""Calibration manifests: which samples decide the ranges, by source, indices or count and seed, and digest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic import ValidationError as PydanticError
from torch import Tensor

from hadaptive_q.data.datasets import ImageData, digest
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError, nearest
from hadaptive_q.recipe import read_yaml, shipped

DEFAULT_COUNT = 512


class Manifest(BaseModel):
    """`indices`, or `count` samples drawn without replacement with `seed`, of `split` of `source`.

    `digest` is over what determines the samples (see `Split.identity`), so that other data under the same name
    is noticed. No images are stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    split: Literal["train", "val"] = "train"
    count: PositiveInt | None = None
    seed: NonNegativeInt = 0
    indices: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    digest: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Manifest:
        if (self.count is None) == (self.indices is None):
            raise ValueError("either count or indices")
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


def find_manifest(name: str, data: ImageData) -> Manifest:
    """Return manifest `name` (a shipped name or a path); ``auto`` is the one for `data`, drawn anew if none ships."""
    known = shipped("calib")
    if name == "auto":
        if data.name not in known:
            count = min(DEFAULT_COUNT, data.train.reach)
            return Manifest(source=data.name, count=count)
        path = known[data.name]
    elif name in known:
        path = known[name]
    elif Path(name).is_file():
        path = Path(name)
    else:
        raise UserError(
            f"calibration.manifest {name}",
            "no such manifest",
            f"auto, {', '.join(known)}, or a file",
            nearest(name, known),
        )
    return read_manifest(path)


def read_manifest(path: Path) -> Manifest:
    """Read one manifest. Raises UserError for a wrong key or value."""
    try:
        return Manifest.model_validate(read_yaml(path))
    except PydanticError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "manifest"
        raise UserError(f"{path}, {key}", repr(first["input"])[:80], first["msg"]) from error


def resolve(manifest: Manifest, data: ImageData) -> Manifest:
    """Return `manifest` with its indices and digest filled in.

    Raises UserError where it belongs to other data or its digest differs.
    """
    where = f"calibration manifest for {manifest.source}"
    if manifest.source != data.name:
        raise UserError(where, f"data {data.name}", f"data {manifest.source}", "choose another calibration.manifest")
    split = data.train if manifest.split == "train" else data.val
    of_split = f"the size of the {manifest.split} split" if split.reach == len(split) else "what a stream keeps"
    if manifest.indices is not None:
        indices = list(manifest.indices)
    else:
        assert manifest.count is not None
        if manifest.count > split.reach:
            raise UserError(where, f"count {manifest.count}", f"at most {split.reach}, {of_split}")
        drawn = np.random.default_rng(manifest.seed).permutation(split.reach)[: manifest.count]
        indices = sorted(drawn.tolist())
    if max(indices) >= split.reach:
        raise UserError(where, f"index {max(indices)}", f"below {split.reach}, {of_split}")
    found = digest(split, indices)
    if manifest.digest is not None and manifest.digest != found:
        raise UserError(
            where,
            f"samples with digest {found[:19]}...",
            f"{manifest.digest[:19]}...",
            "the data changed: make a new manifest",
        )
    return manifest.model_copy(update={"indices": tuple(indices), "count": None, "digest": found})


def batches(manifest: Manifest, data: ImageData, batch_size: int) -> Iterator[Tensor]:
    """Yield the network inputs of a resolved manifest, `(B, 3, S, S)`."""
    assert manifest.indices is not None
    split = data.train if manifest.split == "train" else data.val
    for start in range(0, len(manifest.indices), batch_size):
        chosen = manifest.indices[start : start + batch_size]
        yield normalise(torch.stack([split[i][0] for i in chosen]), data.preprocess)
