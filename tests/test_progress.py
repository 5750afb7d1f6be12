"""Steps on standard error, results on standard output, and a library that says nothing by itself."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from contextlib import redirect_stderr

import pytest

from hadaptive_q.progress import shown


def said(quiet: bool) -> str:
    with redirect_stderr(io.StringIO()) as err, shown(quiet):
        logging.getLogger("hadaptive_q.anything").info("lowering %d files", 2)
        logging.getLogger("hadaptive_q.anything").error("no %s", "disk")
        logging.getLogger("somebody").info("else")
    return err.getvalue()


def test_steps_are_shown_with_their_seconds() -> None:
    first, second = said(quiet=False).splitlines()
    assert re.fullmatch(r" +\d+\.\d s  lowering 2 files", first)
    assert second.endswith("no disk")


def test_quiet_leaves_errors() -> None:
    (line,) = said(quiet=True).splitlines()
    assert line.endswith("no disk")


def test_a_handler_that_a_library_gave_the_root_logger_repeats_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert said(quiet=False).count("lowering") == 1
    assert [record.getMessage() for record in caplog.records if record.name.startswith("hadaptive_q")] == []


def test_nothing_is_left_behind() -> None:
    logger = logging.getLogger("hadaptive_q")
    before = (logger.level, list(logger.handlers), logger.propagate)
    said(quiet=False)
    with pytest.raises(KeyError), redirect_stderr(io.StringIO()), shown(False):
        raise KeyError
    assert (logger.level, list(logger.handlers), logger.propagate) == before


TRAINED = """
import sys, torch
from hadaptive_q.data.datasets import ImageData, TensorSplit
from hadaptive_q.data.sources import open_data
from hadaptive_q.models.families import create_model
from hadaptive_q.recipe import load_recipe
from hadaptive_q.train.loop import Training, train
data = open_data("digits", 32)
few = TensorSplit(data.train.images[:64], data.train.labels[:64], data.train.identities[:64])
config = load_recipe("float", ["float.epochs=1"]).float
training = Training(config, 0, "float")
train(create_model("hadaptive_net_nano", 10), ImageData("few", data.preprocess, few, few, False), training)
"""


def test_the_library_trains_in_silence() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # What torchao says when it is imported is not ours to change in a program that is not ours.
    ours = [line for line in done.stderr.splitlines() if "float" in line and "loss" in line]
    assert (done.stdout, ours) == ("", [])
