"""Explain a finished run, layer by layer: formats, ranges, noise, selections, and who is to blame for the error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hadaptive_q.atomic import output_folder
from hadaptive_q.data.datasets import spread
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError, nearest
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.quant.sites import find_sites
from hadaptive_q.report.ach import explain_ach
from hadaptive_q.report.blame import measure_blame
from hadaptive_q.report.explanation import Explanation, Logits
from hadaptive_q.report.measure import measure_layers
from hadaptive_q.report.render import write_report_pages
from hadaptive_q.report.rounding import float_islands, measure_rounding
from hadaptive_q.restore import FinishedRun
from hadaptive_q.rewrite.products import find_products


def explain(run: FinishedRun, layers: Sequence[str] = (), samples: int = 64) -> Explanation:
    """Explain `run` on `samples` validation images, spread evenly over the split.

    `layers` keeps the modules of these names and what lies inside them; all where none is given.
    Raises UserError for a layer the network does not have.
    """
    sites = find_sites(run.calibrated.graph)
    islands = float_islands(run.deploy, run.calibrated.plan)
    achs = [name for name, _ in run.model.ach_modules()]
    _check_names(layers, {*achs, *(site.layer for site in sites), *(island.layer for island in islands)})
    data, val = run.data, run.data.val
    inputs = normalise(torch.stack([val[i][0] for i in spread(len(val), samples)]), data.preprocess)

    program = run.program()
    records = measure_layers(run.deploy, program, inputs)
    asked = [site for site in sites if _asked_for(site.layer, layers)]
    choices = {product.choice for product in find_products(run.deploy) if product.choice}
    blames = measure_blame(run.calibrated.graph, sites, asked, choices, inputs)
    tensors = measure_rounding(run.calibrated.graph, asked, records, inputs, blames.sites)
    overlaps = {a.name: a.train_eval_overlap for a in run.report.ach if a.train_eval_overlap is not None}
    explained = explain_ach(run.model, run.deploy, program, records, inputs, overlaps)
    with torch.no_grad():
        reference = run.deploy(inputs)
    return Explanation(
        model=run.report.model,
        recipe=run.report.recipe,
        recipe_digest=run.report.recipe_digest,
        data=data.name,
        samples=len(inputs),
        logits=Logits(
            program_to_float_db=sqnr_db(reference, blames.rounded),
            parameters_db=sqnr_db(reference, blames.plain),
            rounding_db=sqnr_db(blames.plain, blames.rounded),
            held_db=sqnr_db(blames.plain, blames.held),
        ),
        tensors=sorted(tensors, key=lambda tensor: -tensor.blame.share),
        ach=[ach for ach in explained if _asked_for(ach.name, layers)],
        float_islands=[island for island in islands if _asked_for(island.layer, layers)],
    )


def write_explanation(run: FinishedRun, explanation: Explanation) -> None:
    """Write ``explain.json`` into the run's folder and its report once more, with the explanation in it."""
    with output_folder(run.folder):
        explanation.write(run.folder / "explain.json")
        write_report_pages(run.report, run.folder, explanation)


def _asked_for(layer: str, names: Sequence[str]) -> bool:
    return not names or any(f"{layer}.".startswith(f"{name}.") for name in names)


def _check_names(names: Iterable[str], layers: set[str]) -> None:
    parts = [layer.split(".") for layer in layers]
    known = {".".join(path[:depth]) for path in parts for depth in range(1, len(path) + 1)}
    for name in names:
        if name not in known:
            raise UserError(
                f"--layer {name}", "no such layer", "a module of the network, such as blocks.0", nearest(name, known)
            )
