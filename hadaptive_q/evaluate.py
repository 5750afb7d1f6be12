"""Accuracy of one file in its own runtime."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hadaptive_q.data.datasets import ImageData, labels_of
from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError
from hadaptive_q.lower.file_formats import FORMATS, find_formats, open_file
from hadaptive_q.lower.isolated import isolated
from hadaptive_q.lower.parity import top1, topk
from hadaptive_q.models.checkpoint import load_model, read_config
from hadaptive_q.models.config import Preprocess
from hadaptive_q.train.loop import predict


def evaluate_file(file: Path, data_name: str) -> dict[str, float | int | str]:
    """Return `top1` and `top5` in percent and `samples`, over the validation split of `data_name`.

    A `.pte` runs in the ExecuTorch runtime, an `.onnx` in onnxruntime, each in a process of its own; on images as they
    are where it takes bytes, and otherwise prepared as `float.json` beside it says or as the data is by default.
    Raises UserError where the file's classes or image size do not fit the data.
    """
    if file.suffix.removeprefix(".") in FORMATS:
        find_formats([file.suffix.removeprefix(".")])
        return isolated(evaluate_written, f"file {file}", str(file), data_name)
    model = load_model(file)
    trained = model.preprocess
    data = open_data(data_name, trained.image_size, trained.crop) if trained else open_data(data_name)
    logits, labels = predict(model, data.val, trained or data.preprocess)
    return _result(file, logits, labels, data)


def evaluate_written(name: str, data_name: str) -> dict[str, float | int | str]:
    """Do the work of `evaluate_file` for the `.pte` or `.onnx` called `name` in this very process."""
    file = Path(name)
    written = open_file(file)
    beside = _beside(file)
    data = open_data(data_name, written.input.image_size, beside.crop if beside else None)
    logits = written.predict(data.val, beside or data.preprocess)
    return _result(file, logits, labels_of(data.val), data)


def _result(file: Path, logits: Tensor, labels: Tensor, data: ImageData) -> dict[str, float | int | str]:
    if logits.shape[1] != data.num_classes:
        raise UserError(str(file), f"{logits.shape[1]} classes", f"{data.num_classes}, as --data {data.name} has")
    return {"file": str(file), "top1": top1(logits, labels), "top5": topk(logits, labels, 5), "samples": len(labels)}


def _beside(file: Path) -> Preprocess | None:
    config = file.parent / "float.json"
    return read_config(config).preprocess if config.is_file() else None
