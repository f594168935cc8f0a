import pandas as pd

from lib.analysis import interventions
from lib.study import text


def test_a_defence_is_told_with_its_price_and_the_strictest_rate_there_is():
    rows = [
        ("test_accuracy", "", -0.02),
        ("auc", "lira", -0.1),
        ("auc", "confidence", 0.01),
        ("tpr@0.01", "lira", -0.2),
    ]
    frame = pd.DataFrame(rows, columns=["metric", "attack", "value"])
    frame = frame.assign(ci_low=frame.value - 0.005, ci_high=frame.value + 0.005)
    assert interventions.strict_rate(frame) == [0.01] and interventions.strict_rate(frame[:3]) == []
    said = text.bought("swa", frame, interventions.strict_rate(frame))
    assert said.startswith("**swa** leaks less: accuracy -2.0 points") and "its TPR at 1% FPR -20.0 points" in said
    more = pd.concat([frame, frame.assign(metric="tpr@0.001"), frame.assign(metric="tpr@0.0001")])
    assert interventions.strict_rate(more) == [0.001]
