"""The model card of a shared run: what the hub shows, made from the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from hadaptive_q.report.record import Report
from hadaptive_q.report.render import pages

CARD = "README.md"


def model_card(report: Report, files: Sequence[str], name: str) -> str:
    """Return the card of the run of `report`, as Markdown with the hub's fields on top.

    `files` are what is shared as `name`. Accuracies are those of `model.pte`, run over the whole validation split.
    """
    data = report.data if report.data.startswith("hf:") else Path(report.data).name
    accuracies = {"accuracy": report.accuracy.pte_top1, "top_5_accuracy": report.accuracy.pte_top5}
    fields = ModelCardData(
        library_name="executorch",
        pipeline_tag="image-classification",
        tags=["hadaptive-net", "quantized", "xnnpack", report.recipe],
        model_name=f"{report.model}-{report.recipe}",
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=data.removeprefix("hf:"),
                dataset_name=data.removeprefix("hf:"),
                metric_type=metric,
                metric_value=round(value, 2),
            )
            for metric, value in accuracies.items()
        ],
    )
    body = pages().get_template("card.md.j2").render(report=report, data=data, files=files, name=name)
    return f"---\n{fields.to_yaml()}\n---\n\n{body}"
