"""What `compatibility.py` runs inside of one set of versions: write files with their answers, or run somebody's.

    python benchmarks/one_set.py write FOLDER
    python benchmarks/one_set.py run FOLDER --core cortex-a76

`run` prints a line of JSON per file: on how many images it gives its own program's logits, or why it does not run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from files import QUANTIZED, make_file, make_program, preprocess_of, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from hadaptive_q.arm.count import run_on
from hadaptive_q.data.transforms import normalise
from hadaptive_q.errors import UserError
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.quant.interpreter import IntegerProgram
from hadaptive_q.quant.program import QuantizedProgram

MODEL, IMAGE_SIZE, IMAGES = "hadaptive_net_nano", 32, 16
# A float file adds in another order than torch: a few dozen roundings of 6e-8.
FLOAT_TOLERANCE = 1e-5
PREPROCESS = preprocess_of(IMAGE_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["write", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--core", help="beside this machine, an emulated one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.job == "write":
        write(arguments.folder)
        return
    for core in ("", *filter(None, [arguments.core])):
        for path in sorted(arguments.folder.glob("*.pte")):
            row = {"file": path.stem, "core": core, **run(path, core)}
            print(json.dumps(row), flush=True)  # before the next one, which may crash


def write(folder: Path) -> None:
    """Write every form of the nano network, `FORM.pte`, and beside it images and the logits its program gives them."""
    model, inputs = random_model(MODEL, IMAGE_SIZE)
    images = torch.randint(0, 256, (IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    with torch.no_grad():
        answers = {"float": (model(normalise(images, PREPROCESS)), make_file("float", model, inputs))}
    answers |= {form: quantized(make_program(form, model, inputs), images) for form in QUANTIZED}
    for form, (logits, file) in answers.items():
        path = folder / f"{form}.pte"
        path.write_bytes(file)
        save_file({"images": images, "logits": logits}, path.with_suffix(".safetensors"))


def quantized(program: QuantizedProgram, images: Tensor) -> tuple[Tensor, bytes]:
    """Return the logits of the integer interpreter and the file."""
    seen = PREPROCESS if program.input == "float32" else PREPROCESS.unnormalised
    return IntegerProgram(program)(normalise(images, seen)), lower(program.export()).data


def run(path: Path, core: str) -> dict[str, int | str]:
    """Return `same`, the images whose logits are those beside the file, bit for bit where it computes on codes."""
    expected = load_file(path.with_suffix(".safetensors"))
    try:
        file = PteFile(path)
        given = torch.cat([file.input.of(image[None], PREPROCESS) for image in expected["images"]])
        if core:
            found = torch.from_numpy(run_on(path, core, given))
        else:
            found = torch.cat([file(image[None]) for image in given])
    except UserError as error:
        return {"refused": str(error)}
    allowed = FLOAT_TOLERANCE * float(expected["logits"].abs().max()) if path.stem == "float" else 0.0
    return {"same": int(((found - expected["logits"]).abs() <= allowed).all(dim=1).sum()), "images": len(found)}


if __name__ == "__main__":
    main()
