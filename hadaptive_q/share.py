"""Share a finished run: as a folder with a model card, on the Hugging Face hub; and take one back.

What is shared is the run itself, file by file: every command works on what was taken back.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from hadaptive_q import atomic
from hadaptive_q.errors import UserError, first_line
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.network import Network
from hadaptive_q.report.card import CARD, model_card
from hadaptive_q.report.passport import ARTEFACTS, passport_path
from hadaptive_q.report.record import read_report
from hadaptive_q.verify import verify

log = logging.getLogger(__name__)
NETWORK = ("float.safetensors", "float.json")
# In the order in which they are written: the report says that the folder is whole.
RUN = (
    *NETWORK,
    *("quantized.safetensors", "model.pte", "model.onnx", "float.pte", "selection.json"),
    *("recipe.yaml", "calibration.yaml", "report.md", "report.html", "report.json"),
)
NEEDED = (*NETWORK, "model.pte", "recipe.yaml", "report.json")


def save_pretrained(run: Path, folder: Path, name: str | None = None) -> None:
    """Write what can be shared of the finished run `run` into `folder`, with a model card made from its report.

    `name` is what the card tells others to pull, that of the folder unless given.
    Raises UserError where the run is not finished or a file is not the one its passport was written for.
    """
    _check_whole(run)
    report = read_report(run)
    with atomic.output_folder(folder):
        _copy(run, folder)
        shared = [file for file in RUN if (run / file).is_file()]
        atomic.write_text(folder / CARD, model_card(report, shared, name or folder.name))


def push_to_hub(run: Path, name: str, private: bool = False, revision: str | None = None) -> str:
    """Upload the finished run `run` as the hub's repository `name` (``user/repository``) and return its address.

    The repository is created where it does not exist; the token is the one that `huggingface_hub` finds.
    Raises UserError where the run is not finished, was changed, or the hub refuses it.
    """
    with tempfile.TemporaryDirectory() as staged, _explained(f"push {name}"):
        folder = Path(staged)
        save_pretrained(run, folder, name)
        log.info("recipe, report and passports name the data as %s", read_report(run).data)
        hub = HfApi()
        address = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=f"Upload {run.name}")
    return str(address)


def pull(name: str, out: Path, revision: str | None = None) -> None:
    """Take a shared run, of the hub's repository `name` or of a folder, into the folder `out`.

    Raises UserError where it cannot be had, is no shared run, or holds a file that is not its passport's; `out` stays
    as it was then.
    """
    _check_out(out)
    passports = [passport_path(Path(file)).name for file in RUN if file.rsplit(".")[-1] in ARTEFACTS]
    source = _found(name, revision, [*RUN, *passports])
    _check_whole(source)
    with atomic.output_folder(out):
        _copy(source, out)


def from_pretrained(name: str, revision: str | None = None) -> Network:
    """Return the float network of a shared run, of the hub's repository `name` or of a folder, in eval mode.

    Only tensors and JSON are read. Raises UserError where there is none.
    """
    return load_model(_found(name, revision, NETWORK) / NETWORK[0])


def _found(name: str, revision: str | None, files: tuple[str, ...] | list[str]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    with _explained(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
    try:
        yield
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise UserError(
            where,
            f"'{first_line(error)}'",
            "a folder, or a repository of the hub that this machine may use",
            "sign in with `hf auth login`, and look at the name: user/repository",
        ) from error


def _check_out(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not (out / "report.json").is_file():
        raise UserError(f"--out {out}", "a folder with other things in it", "an empty or new one, or an earlier run")


def _check_whole(run: Path) -> None:
    missing = [name for name in NEEDED if not (run / name).is_file()]
    if missing:
        raise UserError(f"run {run}", f"no {', '.join(missing)}", "the folder of a finished qat or ptq run")
    for verdict in verify(run, answers=False):
        if verdict["problems"]:
            raise UserError(verdict["file"], verdict["problems"][0], "the file that was measured", "run it again")


def _copy(run: Path, folder: Path) -> None:
    for name in reversed(RUN):
        (folder / name).unlink(missing_ok=True)  # of an earlier run; the report first
        passport_path(folder / name).unlink(missing_ok=True)
    for name in RUN:
        for file in (run / name, passport_path(run / name)):
            if file.is_file():
                atomic.write_with(folder / file.name, lambda part, file=file: shutil.copyfile(file, part))  # type: ignore[misc]
