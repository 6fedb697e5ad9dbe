"""Every check of the metrics passes, and one that fails is reported."""

import json

import pytest

from trm_diffusion.metrics import selfcheck


@pytest.mark.parametrize("check", selfcheck.CHECKS, ids=lambda check: check.__name__)
def test_check_holds(check):
    found, expected, tolerance = check()
    assert abs(found - expected) <= tolerance


@pytest.mark.parametrize("found, passes", [(1.0, True), (1.2, False), (float("nan"), False)])
def test_the_last_line_says_whether_all_hold(monkeypatch, capsys, found, passes):
    def some_check():
        """Something is 1."""
        return found, 1, 0.1

    monkeypatch.setattr(selfcheck, "CHECKS", (selfcheck.fid_50k_label, some_check))
    assert selfcheck.selfcheck() is passes
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["pass"] is report["checks"]["some_check"]["pass"] is passes
    assert report["checks"]["fid_50k_label"]["pass"]
