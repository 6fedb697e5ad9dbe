"""python -m trm_diffusion.metrics --selfcheck: checks the metrics against known answers."""

import argparse
import sys

from trm_diffusion.metrics.selfcheck import selfcheck

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--selfcheck", action="store_true", required=True, help="run all checks; the last line is one JSON object"
    )
    parser.parse_args()
    sys.exit(0 if selfcheck() else 1)
