"""What other certificates and sequential certification would save on given logs, and the rules compared."""

import importlib
import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import CODES, EXCERPTS, random_log
from scipy import stats

from spacte.smooth.certificates import Certificate, multiclass_certificate


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


def test_the_tools_for_certificates_from_all_votes(certify, script):
    """Each rule has its row; with all the votes fewer draws reach Cohen's accuracy."""
    log = certify("a", "--N", 1000, "--batch_size", 1000)
    code, out, err = script("studies/certificate_savings.py", log)
    assert code == 0 and out.count("| all-votes") == 2 and out.count("| cohen") == 2, err
    code, _, err = script("studies/certificate_savings.py", log, "--N", 5)
    assert code == 2 and "--N 5 at --alpha 0.001 can never certify" in err and err.count("\n") == 1
    code, _, err = script("studies/certificate_savings.py", certify("b", "--skip_wrong"))
    assert code == 2 and "has images without estimation votes" in err
    code, _, err = script("studies/certificate_savings.py", EXCERPTS)
    assert code == 2 and "has no vote counts beside it" in err


def test_the_rules_for_certificates_that_are_compared(monkeypatch):
    """On a few votes: ours is the library's certificate, Cohen's too, and the joint test's p-value is exact."""
    monkeypatch.syspath_prepend(str(CODES))
    compare = importlib.import_module("compare_certificates")
    selection = np.array([90, 6, 4])
    for estimation in (np.array([900, 60, 40]), np.array([500, 300, 200]), np.array([0, 600, 400])):
        ours = multiclass_certificate(selection, estimation, 0.001, 1.0)[1]
        assert compare.RULES["half"](selection, estimation, 0.001) == pytest.approx(ours, abs=1e-9)
        cohens = Certificate(0.001, 1.0)(selection, estimation)[1]
        assert compare.RULES["Cohen's"](selection, estimation, 0.001) == pytest.approx(cohens, abs=1e-9)
        for rule in compare.RULES.values():
            assert 0 <= rule(selection, estimation, 0.001) < stats.norm.ppf(0.999)
