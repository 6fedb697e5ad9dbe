"""Runs the command line and kills it with SIGKILL in its second shard: python -m tests.jobs.killed_in_shard FLAGS

`FakeEncoder` encodes texts.
"""

import os
import signal
import sys

from tests.jobs.encoders import FakeEncoder
from trm_diffusion.data.shards import ShardFile
from trm_diffusion.jobs import encode_text
from trm_diffusion.main import main

append = ShardFile.append


def append_and_die(self: ShardFile, record: bytes) -> None:
    append(self, record)
    if "-00001." in self.path.name and self.records == 2:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    ShardFile.append = append_and_die
    encode_text.PretrainedEncoder = FakeEncoder
    main(sys.argv)
