"""What a user's program may look like: mypy checks it against the package, nothing runs it."""

from pathlib import Path

import hadaptive_q
from hadaptive_q.evaluate import evaluate_file
from hadaptive_q.pipeline import quantize
from hadaptive_q.recipe import load_recipe
from hadaptive_q.regress import hold

model = hadaptive_q.create_model("hadaptive_net_s", num_classes=10)
hadaptive_q.save_model(model, Path("model.safetensors"))
report = quantize(load_recipe("int8_ptq", ["seed=1"]), Path("runs/mine"), Path("model.safetensors"))
drop: float = report.accuracy.float_top1 - report.accuracy.pte_top1
broken: list[str] = [held.budget for held in hold(Path("runs/mine"), ["accuracy.drop <= 0.5"]).broken]
measured = evaluate_file(Path("runs/mine/model.pte"), "digits")
samples: str = report.accuracy.samples  # the one mistake
