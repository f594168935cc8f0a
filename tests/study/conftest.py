"""What the tests of the study share."""

import shutil

import pytest

from lib.study import report
from lib.study.settings import ROOT


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder of the committed run on digits, with its report."""
    out = tmp_path_factory.mktemp("run") / "digits"
    shutil.copytree(ROOT / "outputs" / "reference" / "digits", out)
    report.build(out)
    return out
