"""Accuracy of one file in its own runtime."""

from __future__ import annotations

from pathlib import Path

import torch

from hadaptive_q.data.sources import open_data
from hadaptive_q.errors import UserError
from hadaptive_q.lower.file_formats import FORMATS, open_file
from hadaptive_q.lower.parity import top1, topk
from hadaptive_q.models.checkpoint import load_model, read_config
from hadaptive_q.models.config import Preprocess
from hadaptive_q.train.loop import predict


def evaluate_file(file: Path, data_name: str) -> dict[str, float | int | str]:
    """Return `top1` and `top5` in percent and `samples`, over the validation split of `data_name`.

    A `.pte` runs in the ExecuTorch runtime, an `.onnx` in onnxruntime, on images as they are where it takes bytes, and
    otherwise prepared as `float.json` beside it says or as the data is by default.
    Raises UserError where the file's classes or image size do not fit the data.
    """
    if file.suffix.removeprefix(".") in FORMATS:
        written = open_file(file)
        data = open_data(data_name, written.input.image_size)
        preprocess = _beside(file) or data.preprocess
        logits = written.predict(data.val, preprocess)
        labels = torch.tensor([data.val[i][1] for i in range(len(data.val))])
    else:
        model = load_model(file)
        data = open_data(data_name, model.preprocess.image_size if model.preprocess else None)
        logits, labels = predict(model, data.val, model.preprocess or data.preprocess)
    if logits.shape[1] != data.num_classes:
        raise UserError(str(file), f"{logits.shape[1]} classes", f"{data.num_classes}, as --data {data_name} has")
    return {"file": str(file), "top1": top1(logits, labels), "top5": topk(logits, labels, 5), "samples": len(labels)}


def _beside(file: Path) -> Preprocess | None:
    config = file.parent / "float.json"
    return read_config(config).preprocess if config.is_file() else None
