"""Validates the scene judge, as one line of JSON: `python -m trm_diffusion.metrics.scenes --selfcheck`."""

import argparse
import json
import sys
from collections.abc import Sequence

from trm_diffusion.metrics.scenes.proof import prove_judge


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trm_diffusion.metrics.scenes", description=__doc__.split("\n")[0])
    parser.add_argument("--selfcheck", action="store_true", required=True, help="validate the judge on rendered scenes")
    parser.add_argument("--scenes", type=int, default=3000, help="scenes per image size and noise level")
    options = parser.parse_args(arguments)
    proof = prove_judge(options.scenes)
    print(json.dumps(proof))
    return 0 if proof["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
