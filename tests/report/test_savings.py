"""What sequential certification would save on given logs: sequential_savings.py."""

import json
import re

import pandas as pd
from conftest import EXCERPTS, random_log


def test_savings_tell_the_largest_change_of_a_single_run(script):
    """Of 25 images, a run's certified accuracy changes by a multiple of 4 points, and no less than the mean does."""
    code, out, err = script("studies/sequential_savings.py", *sorted(EXCERPTS.rglob("*.log")))
    assert code == 0, err
    assert out.count("\n") >= 5 and "Gaussian" in out
    header, _, *rows = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("|")]
    table = pd.DataFrame(rows, columns=[cell.strip() for cell in header])
    for name in ("table", "1.5 sigma"):
        mean, single = (table[f"{name}: {kind} off"].astype(float) for kind in ("mean", "single"))
        assert (single >= mean).all() and (single % 4 == 0).all()


def test_savings_take_the_draws_from_the_configuration(script, tmp_path):
    """The same radii, of N 200: so few draws leave little to save."""

    def saved():
        return float(re.search(r"table: mean draws N/([\d.]+),", script("studies/sequential_savings.py", log)[1])[1])

    log, config = tmp_path / "noise-0.25" / "x.log", {"N": 200, "alpha": 0.001, "certificate": "cohen"}
    random_log(log, 10, 0)
    assert saved() > 5
    log.with_suffix(".json").write_text(json.dumps({"config": config, "about": {}}))
    assert saved() < 2
    log.with_suffix(".json").write_text(json.dumps({"config": config | {"certificate": "all-votes"}, "about": {}}))
    code, _, err = script("studies/sequential_savings.py", log)
    assert code == 2 and "logs of a fixed N with Cohen's certificate" in err
