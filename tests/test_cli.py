"""The command line as a user meets it: what it prints, and how it answers mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hadaptive_q import search
from hadaptive_q.__main__ import main
from hadaptive_q.lower.onnx import OnnxFile, to_onnx
from hadaptive_q.lower.parity import compare
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.checkpoint import save_model
from hadaptive_q.models.families import create_model
from hadaptive_q.options import parse_size
from hadaptive_q.recipe import load_recipe


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Call the entry point as a process would, but in this one: starting Python costs seconds each time."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        warnings.catch_warnings(),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["hadaptive-q", *arguments])
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "hadaptive_q", "qat", "--recipe", "int88"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_one_clear_line(done, "int88", "'int8'")
    done = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in ("train", "qat", "ptq", "eval", "bench", "explain", "search", "export", "import", "info", "recipes"):
        assert name in done.stdout


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes with eight small images each, in a folder with a space and an umlaut."""
    root = tmp_path_factory.mktemp("data") / "zwei Größen"
    generator = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (root / label).mkdir(parents=True)
        for index in range(8):
            pixels = generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def nano_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "nano.safetensors"
    save_model(create_model("hadaptive_net_nano", 2), path)
    return path


def test_info_tells_the_published_size() -> None:
    done = run("info", "hadaptive_net_s", "--classes", "100", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["params"] == 2_102_632
    assert round(facts["macs"] / 1e6, 1) == 131.0
    assert len(facts["stages"]) == 11


def test_recipes_lists_what_ships() -> None:
    done = run("recipes", "--json")
    assert done.returncode == 0, done.stderr
    assert {"float", "int8", "int8_ptq", "int8_static"} <= set(json.loads(done.stdout))


def test_import_and_eval(tmp_path: Path, golden: Path) -> None:
    done = run("import", str(golden / "nano_conductor.pt"), "--out", str(tmp_path / "imported"))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "imported").iterdir()) == ["model.json", "model.safetensors"]
    done = run("eval", str(tmp_path / "imported"), "--data", "digits", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["samples"] == 359
    assert 0 <= result["top1"] <= result["top5"] <= 100


MISTAKES = [
    (["qat", "--recipe", "int88"], ["int88", "'int8'"]),
    (["qat", "--recipe", "missing.yaml"], ["missing.yaml", "no such file"]),
    (["ptq", "--recipe", "int8"], ["int8", "hadaptive-q qat"]),
    (["qat", "--set", "fit.epoch=3"], ["fit.epoch", "'epochs'"]),
    (["qat", "--set", "fit.epochs=many"], ["fit.epochs", "'many'", "integer"]),
    (["qat", "--set", "quantize.selection=fixed"], ["quantize.selection", "'fixed'", "'dynamic'"]),
    (["ptq", "--input", "uint8_nhwc"], ["--input uint8_nhwc", "float32, uint8, uint8_nchw", "'uint8_nchw'"]),
    (["qat", "--set", "quantize.input=byte"], ["quantize.input", "'byte'", "'uint8'"]),
    (["qat", "--set", "nonsense"], ["nonsense", "key=value"]),
    (["qat", "--data", "digit"], ["--data", "'digit'", "'digits'"]),
    (["qat", "--data", "nowhere/at/all"], ["nowhere/at/all"]),
    (["train", "--model", "hadaptive_net_xs"], ["hadaptive_net_xs", "hadaptive_net_s"]),
    (["qat", "--set", "image_size=16"], ["image_size", "16", "32"]),
    (["info", "hadaptive_net"], ["hadaptive_net", "hadaptive_net_s"]),
    (["bench", "nothing.pte"], ["nothing.pte", "no such file"]),
    (["bench", "nothing.pte", "--core", "cortex-a7"], ["cortex-a7", "cortex-a76"]),
    (["explain", "nothing"], ["run nothing", "no such folder", "hadaptive-q qat"]),
    (["explain", "."], ["no recipe.yaml", "report.json", "hadaptive-q qat"]),
    (["qat", "--to", "pte,onxx"], ["--to onxx", "'onnx'"]),
    (["export", ".", "--to", "tflite"], ["--to tflite", "pte, onnx"]),
    (["export", "."], ["no recipe.yaml", "report.json", "hadaptive-q qat"]),
    (["eval", "nothing.onnx"], ["nothing.onnx", "no such file"]),
    (["eval", "nothing.pte"], ["nothing.pte", "no such file"]),
    (["eval", "nothing.safetensors"], ["nothing.safetensors", "no such file"]),
    (["ptq", "--set", "calibration.manifest=digitz"], ["digitz", "'digits'"]),
    (["ptq", "--set", "calibration.manifest=glyphs"], ["digits", "glyphs"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_get_one_line(arguments: list[str], words: list[str], tmp_path: Path, nano_ten: Path) -> None:
    if arguments[0] in ("qat", "ptq") and "image_size=16" not in arguments:
        arguments = [*arguments, "--out", "out"]
    if any("manifest" in argument for argument in arguments):
        arguments = [*arguments, "--checkpoint", str(nano_ten)]
    done = run(*arguments, cwd=tmp_path)
    assert_one_clear_line(done, *words)
    assert not list(tmp_path.rglob("*.pte"))


@pytest.fixture(scope="module")
def nano_ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "nano.safetensors"
    save_model(create_model("hadaptive_net_nano", 10), path)
    return path


def test_class_count_of_checkpoint_and_data(nano_checkpoint: Path, tmp_path: Path) -> None:
    done = run("ptq", "--checkpoint", str(nano_checkpoint), "--out", str(tmp_path / "out"))
    assert_one_clear_line(done, "2 classes", "10")


@pytest.mark.parametrize("cut", [0, 7, 1000])
def test_truncated_checkpoint(nano_checkpoint: Path, tmp_path: Path, cut: int) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(nano_checkpoint.read_bytes()[:cut])
    broken.with_suffix(".json").write_text(nano_checkpoint.with_suffix(".json").read_text())
    done = run("ptq", "--checkpoint", str(broken), "--out", str(tmp_path / "out"))
    assert_one_clear_line(done, "broken.safetensors", "truncated")


def test_foreign_checkpoint(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pt"
    torch.save({"state_dict": {}}, foreign)
    done = run("import", str(foreign), "--out", str(tmp_path / "out"))
    assert_one_clear_line(done, "foreign.pt", "model_desc")
    assert not (tmp_path / "out").exists()


def test_unreadable_image(images: Path, nano_checkpoint: Path, tmp_path: Path) -> None:
    for label in ("cats", "dogs"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for source in (images / label).iterdir():
            (tmp_path / "data" / label / source.name).write_bytes(source.read_bytes())
    (tmp_path / "data" / "dogs" / "3.png").write_bytes(b"no image")
    done = run(
        "ptq", "--checkpoint", str(nano_checkpoint), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "o")
    )
    assert_one_clear_line(done, "3.png", "image")


def test_class_folder_without_images(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
    done = run("qat", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    assert_one_clear_line(done, "0 images")


def test_output_that_cannot_be_written(tmp_path: Path, nano_ten: Path) -> None:
    # A file where a folder is needed: also refused to root, whom permissions do not stop.
    (tmp_path / "file").write_text("")
    done = run("ptq", "--checkpoint", str(nano_ten), "--out", str(tmp_path / "file" / "out"))
    assert_one_clear_line(done, "--out", "can be written")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".yaml", "no\nsuch"])
def test_names_no_system_takes(name: str, tmp_path: Path) -> None:
    for arguments in (["eval", name], ["qat", "--recipe", name], ["qat", "--data", name], ["explain", name]):
        done = run(*arguments, *(["--out", str(tmp_path / "out")] if arguments[0] == "qat" else []))
        assert_one_clear_line(done, "xxx" if "x" in name else "such")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"preprocess": 7}', "[" * 10**5], ids=range(5))
def test_a_broken_preprocessing_beside_a_file(content: str, nano_run: Any, tmp_path: Path) -> None:
    shutil.copy(nano_run.folder / "model.pte", tmp_path / "model.pte")
    (tmp_path / "float.json").write_text(content)
    assert_one_clear_line(run("eval", str(tmp_path / "model.pte")), "float.json")


@pytest.mark.parametrize("name", ["garbage.pte", "garbage.onnx"])
def test_garbage_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    done = run("eval", str(tmp_path / name))
    assert_one_clear_line(done, name)


def test_folder_from_images_to_file(images: Path, tmp_path: Path) -> None:
    """Two classes in a folder, a network trained for one epoch, a file that runs."""
    out = tmp_path / "lauf eins"
    settings = ["model=hadaptive_net_nano", "image_size=32", "float.epochs=1", "float.batch_size=4", "fit.epochs=1"]
    arguments = [part for setting in [*settings, "fit.batch_size=4"] for part in ("--set", setting)]
    done = run("qat", "--data", str(images), "--out", str(out), *arguments, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["accuracy"]["samples"] == 4
    assert report["size"]["pte_bytes"] == (out / "model.pte").stat().st_size
    done = run("eval", str(out / "model.pte"), "--data", str(images), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["top1"] == report["accuracy"]["pte_top1"]
    done = run("eval", str(out / "float.safetensors"), "--data", str(images), "--json")
    assert json.loads(done.stdout)["top1"] == report["accuracy"]["float_top1"]


def test_bytes_from_quantization_to_every_consumer(nano_ten: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sized = ["--set", "image_size=32"]
    done = run("ptq", "--checkpoint", str(nano_ten), "--input", "uint8", "--out", str(out), *sized)
    assert done.returncode == 0, done.stderr
    assert "input: uint8 (1, 32, 32, 3)" in done.stdout.splitlines()
    report = json.loads((out / "report.json").read_text())
    assert report["input"] == {"dtype": "uint8", "shape": [1, 32, 32, 3]}
    assert report["parity"]["integer_identical"] == 1.0
    assert "uint8 (1, 32, 32, 3)" in (out / "report.md").read_text()
    done = run("eval", str(out / "model.pte"), "--json")
    assert json.loads(done.stdout)["top1"] == report["accuracy"]["pte_top1"]
    done = run("bench", str(out / "model.pte"), "--compare", str(out / "float.pte"), "--json")
    assert [result["host_ms_median"] > 0 for result in json.loads(done.stdout)] == [True, True]
    done = run("export", str(out), "--to", "pte", "--out", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "model.pte").read_bytes() == (out / "model.pte").read_bytes()
    done = run("explain", str(out), "--samples", "4", "--json")
    assert done.returncode == 0, done.stderr
    (image,) = [
        tensor for tensor in json.loads(done.stdout)["tensors"] if tensor["scale"] == float(np.float32(1 / 255))
    ]
    assert (image["zero_point"], image["clipped"]) == (-128, 0)
    assert image["kind"] == "activation"


@pytest.fixture
def run_folder(nano_run: Any, tmp_path: Path) -> Path:
    shutil.copytree(nano_run.folder, tmp_path / "ein Lauf")
    return tmp_path / "ein Lauf"


EXPLAINED = {
    *("model", "recipe", "recipe_digest", "data", "samples", "logits", "tensors", "ach", "float_islands"),
}
TENSOR = {
    *("layer", "name", "kind", "tensors", "format", "granularity", "low", "high", "scale", "smallest_scale"),
    *("zero_point", "clipped", "sqnr_db", "blame"),
}
ACH_KEYS = {
    *("name", "selection", "flip_rate", "rank_flip_rate", "operand_sqnr_db", "product_sqnr_db", "output_sqnr_db"),
    *("operand_scale", "output_scale", "scale_ratio", "rank_gap", "score_error", "tau", "slope", "bias_max"),
}


def test_explain_as_json(run_folder: Path) -> None:
    done = run("explain", str(run_folder), "--samples", "8", "--json")
    assert done.returncode == 0, done.stderr
    explained = json.loads(done.stdout)
    assert explained.keys() >= EXPLAINED
    assert explained["samples"] == 8
    assert explained["logits"].keys() >= {"program_to_float_db", "parameters_db", "rounding_db", "held_db"}
    for tensor in explained["tensors"]:
        assert tensor.keys() >= TENSOR
        assert tensor["blame"].keys() >= {"alone_db", "gained_db", "share", "held_share"}
    assert all(ach.keys() >= ACH_KEYS for ach in explained["ach"])
    assert json.loads((run_folder / "explain.json").read_text()) == explained


def test_explain_one_layer_as_text(run_folder: Path) -> None:
    before = (run_folder / "report.html").read_bytes()
    arguments = ["--layer", "blocks.2.expansion", "--layer", "head", "--samples", "8"]
    done = run("explain", str(run_folder), *arguments)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 120
    for word in ("blocks.2.expansion.pointwise: weight", "head.classifier: ", "own scores", "fp32 islands"):
        assert word in done.stdout
    assert "blocks.3" not in done.stdout
    # A part of it is no report.
    assert not (run_folder / "explain.json").exists()
    assert (run_folder / "report.html").read_bytes() == before


def test_explain_names_the_nearest_layer(run_folder: Path) -> None:
    done = run("explain", str(run_folder), "--layer", "blocks.2.expension")
    assert_one_clear_line(done, "--layer blocks.2.expension", "'blocks.2.expansion'")
    assert run("explain", str(run_folder), "--samples", "0").returncode == 2


def test_export_writes_the_program_of_the_run(
    run_folder: Path, nano_run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "neue Datei"
    done = run("export", str(run_folder), "--to", "pte,onnx", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    # Nor do the exporter and native code print past Python's streams.
    steps = [line for line in done.stderr.splitlines() if not re.match(r" +\d+\.\d s  ", line)]
    assert (steps, *capfd.readouterr()) == ([], "", "")
    written = json.loads(done.stdout)
    assert written == [{"file": str(path), "bytes": path.stat().st_size} for path in files(out)]
    # Rebuilt and exported a second time, the program gives the same bytes.
    assert (out / "model.onnx").read_bytes() == to_onnx(nano_run.program)
    report = nano_run.report.accuracy
    for path, top1 in zip(files(out), (report.pte_top1, report.quantized_top1), strict=True):
        done = run("eval", str(path), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["top1"] == pytest.approx(top1, abs=0.6)  # two of 359 images


def files(folder: Path) -> list[Path]:
    return [folder / "model.pte", folder / "model.onnx"]


def test_search_from_a_run(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one size whatever is in them: lowering takes most of the time and is looked at elsewhere."""
    monkeypatch.setattr(search, "lower", lambda _: SimpleNamespace(data=bytes(60_000)))
    monkeypatch.setattr(search, "missing", lambda: "no emulator here")
    (tmp_path / "few.yaml").write_text("source: digits\ncount: 16\n")
    few = ["--samples", "8", "--set", f"calibration.manifest={json.dumps(str(tmp_path / 'few.yaml'))}"]
    arguments = ["search", str(run_folder), *few, "--out", str(tmp_path / "out")]
    done = run(*arguments, "--target-size", "60kB")
    assert done.returncode == 0, done.stderr
    assert "0 of 15 layers in 4 bits: 60,000 bytes" in done.stdout
    assert "instructions: none counted, no emulator here" in done.stdout
    assert f"recipe: {tmp_path / 'out' / 'int8_ptq_mixed.yaml'}" in done.stdout
    assert load_recipe(str(tmp_path / "out" / "int8_ptq_mixed.yaml")).task == "ptq"
    done = run(*arguments, "--max-drop", "100", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert {layer["bits"] for layer in record["layers"]} == {4}, "nothing loses more"
    assert json.loads((tmp_path / "out" / "search.json").read_text()) == record
    done = run(*arguments, "--target-size", "9000")
    assert_one_clear_line(done, "--target-size 9,000 bytes", "60,000", f"{record['smallest_bytes']:,}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--target-size and --max-drop", "neither"]),
        (["--target-size", "1MB", "--max-drop", "1"], ["both"]),
        (["--target-size", "small"], ["--target-size small", "1.4MB"]),
        (["--target-size", "0"], ["--target-size 0"]),
        (["--target-size", "1MB"], ["no such file"]),
        (["--target-size", "1MB", "--core", "cortex-a7"], ["cortex-a7", "cortex-a76"]),
        (["--target-size", "1MB", "--recipe", "float"], ["a recipe for train"]),
        (["--target-size", "1MB", "--recipe", "int9"], ["int9"]),
    ],
    ids=str,
)
def test_search_mistakes(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    done = run("search", "nowhere.safetensors", *arguments, "--out", str(tmp_path / "out"))
    assert_one_clear_line(done, *words)


@pytest.mark.parametrize(
    ("text", "size"), [("1.4MB", 1_400_000), ("900 kB", 900_000), ("123456", 123_456), (".5M", 500_000), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_nano", "starnet_nano"])
def test_every_command_about_a_network_of_another_family(name: str, tmp_path: Path) -> None:
    """From a checkpoint through its file and its ONNX to every question that a run answers."""
    torch.manual_seed(0)
    model = create_model(name, 10)
    for _ in range(10):  # running statistics that belong to the weights
        model.train()(torch.randn(16, 3, 32, 32))
    save_model(model.eval(), tmp_path / "net.safetensors")
    out, written = tmp_path / "out", tmp_path / "onnx"

    def answer(*arguments: str) -> Any:
        done = run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    report = answer(
        *("ptq", "--checkpoint", str(tmp_path / "net.safetensors"), "--out", str(out), "--set", "image_size=32")
    )
    accuracy = report["accuracy"]
    assert (report["model"], report["parity"]["integer_identical"]) == (name, 1.0)
    assert answer("eval", str(out / "model.pte"))["top1"] == accuracy["pte_top1"]
    assert answer("check", str(out), "--budget", "coverage.fp32_ops == 0", "--budget", "coverage.delegates == 1") == []
    verified = answer("verify", str(out))
    assert len(verified) == 4
    assert not any(file["problems"] for file in verified)
    explained = answer("explain", str(out), "--samples", "4")
    assert (explained["model"], explained["ach"], explained["float_islands"]) == (name, [], [])
    (measured,) = answer("bench", str(out / "model.pte"))
    assert measured["host_ms_median"] > 0
    sized = ("--image-size", "32")
    assert answer("info", name, "--classes", "10", *sized) == answer("info", str(tmp_path / "net.safetensors"), *sized)

    answer("export", str(out), "--to", "onnx", "--out", str(written))
    assert answer("eval", str(written / "model.onnx"))["top1"] == pytest.approx(accuracy["quantized_top1"], abs=0.6)
    onnx, pte = OnnxFile(written / "model.onnx"), PteFile(out / "model.pte")
    x = torch.randn(16, 3, 32, 32)
    wanted = torch.cat([pte(image[None]) for image in x])
    parity = compare(wanted, onnx(x), float(wanted.unique().diff().min()))
    assert len(wanted.unique()) > 20
    # onnxruntime multiplies in float32 and rounds ties another way.
    assert (parity.max_codes <= 1, parity.changed_fraction <= 0.01) == (True, True)
