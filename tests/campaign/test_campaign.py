"""A small part of the campaign: `python -m tests.campaign` is the whole."""

import json
import subprocess
import sys

from tests.commands import ROOT


def test_a_few_cases_of_each_part():
    command = [sys.executable, "-m", "tests.campaign", "--slice"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, f"{result.stdout[-5000:]}\n{result.stderr[-2000:]}"
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["pass"] and all(report[part]["tried"] >= 2 for part in ("kills", "damages", "inputs")), report
