"""python -m trm_diffusion.metrics --selfcheck: do the metrics give the answers that are known beforehand?"""

import argparse
import sys

from trm_diffusion.metrics.selfcheck import selfcheck

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--selfcheck", action="store_true", required=True, help="run all checks; last line one JSON object"
    )
    parser.parse_args()
    sys.exit(0 if selfcheck() else 1)
