import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.campaign import commands, damages, inputs, kills, place

PARTS = {"kills": kills.cases, "damages": damages.cases, "inputs": inputs.cases}
SLICE = {  # part: its jobs or kinds, and how many cases of each
    "kills": (("images",), 2),
    "damages": (("images, continued",), 3),
    "inputs": (("GenEval's results", "safetensors", "DPG's answers", "evaluations"), 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all by default")
    parser.add_argument("--only", action="append", default=[], help="jobs or kinds of input; may be repeated")
    parser.add_argument("--most", type=int, default=1000, help="cases of each job or kind")
    parser.add_argument("--slice", action="store_true", help="a few cases of each part, in a minute")
    parser.add_argument("--seed", type=int, default=0, help="of the points and the bits; inputs do not depend on it")
    parser.add_argument("--inputs", help="directory for what the cases start from and leave; kept, and used again")
    options = parser.parse_args()
    commands.import_all()
    report, start = {}, time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {line}", flush=True)

    with contextlib.ExitStack() as stack:
        root = Path(options.inputs or stack.enter_context(tempfile.TemporaryDirectory()))
        jobs = place.make(root, whole=not options.slice)
        say("the inputs are made")
        for part in options.part or PARTS:
            names, most = SLICE[part] if options.slice else (tuple(options.only), options.most)
            report[part] = run_part(part, PARTS[part](jobs, options.seed, names, most), say)
    passed = not any(result["failed"] for result in report.values())
    print(json.dumps({**report, "seconds": round(time.monotonic() - start), "pass": passed}), flush=True)
    return 0 if passed else 1


def run_part(part: str, cases, say) -> dict:
    """Runs the cases, and counts their ends."""
    result = {"tried": 0, "right": 0, "one line": 0, "failed": 0}
    for name, end in cases:
        kind = end if end in result else "failed"
        result["tried"] += 1
        result[kind] += 1
        say(f"{part}: {name}: {end}")
    return result


if __name__ == "__main__":
    sys.exit(main())
