"""What the tests of the study share."""

import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib.study import own_logits, report
from lib.study.results import COLUMNS
from lib.study.settings import ROOT


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder of the committed run on digits, with its report."""
    out = tmp_path_factory.mktemp("run") / "digits"
    shutil.copytree(ROOT / "outputs" / "reference" / "digits", out)
    report.build(out)
    return out


@pytest.fixture(scope="session")
def studied(tmp_path_factory):
    """The folder of a small run with its report: few rows, and a wide figure."""
    out = tmp_path_factory.mktemp("run") / "studied"
    (out / "figures").mkdir(parents=True)
    figure = plt.figure(figsize=(12.5, 5.2))
    figure.savefig(out / "figures" / "leakage_against_accuracy.png", dpi=130)
    plt.close(figure)
    about = dict.fromkeys(COLUMNS, "") | dict(
        notebook="01", experiment="main", dataset="digits", arch="mlp", n_models=32
    )
    about |= dict(n_examples=1200)
    rows = [about | dict(optimizer="sgd", attack="rmia", metric="auc", value=0.637, ci_low=0.626, ci_high=0.647)]
    for rate, share, *numbers in ((0.01, 0.01, 0.0743, 0.0541, 0.101), (0.001, 0.1, 0.799, 0.685, 0.879)):
        metric = f"precision@{rate},prevalence={share}"
        rows.append(rows[0] | dict(zip(("metric", "value", "ci_low", "ci_high"), (metric, *numbers), strict=True)))
    exposed = about | dict(optimizer="sgd", attack="lira_shrunk")
    rows += [exposed | dict(coordinate=f"example={k}", metric="exposure", value=3.0) for k in (7, 3)]
    rows.append(exposed | dict(metric="exposed_in_both_halves", value=0.625, ci_low=0.4, ci_high=0.81))
    rows.append(exposed | dict(metric="exposed_by_chance", value=0.01))
    rows.append(rows[0] | dict(optimizer="sam", baseline="sgd", rho=0.1, value=0.02, ci_low=0.01, ci_high=0.03))
    pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    report.build(out)
    return out


@pytest.fixture(scope="session")
def audited(tmp_path_factory):
    """The folder of an audit of two sets of logits, the second of which leaks more, with its report."""
    out, rng = tmp_path_factory.mktemp("run") / "audited", np.random.default_rng(0)
    half = rng.permuted(np.tile(np.arange(200) % 2 == 0, (4, 1)), axis=1)
    member, y = np.stack([half, ~half], axis=1).reshape(8, 200), np.arange(200) // 2 % 4
    noise = rng.normal(size=(8, 200, 4)).astype(np.float32)
    given = {name: noise + leak * np.eye(4, dtype=np.float32)[y] * member[..., None]
             for name, leak in (("sgd", 1.0), ("sam", 1.5))}  # fmt: skip
    own_logits.audit({name: {"logits": z, "y": y, "member": member} for name, z in given.items()}, out)
    return out
