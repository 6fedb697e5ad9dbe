"""A campaign of kills, damages and malformed inputs: nothing may be lost, and nothing may be silently wrong.

    python -m tests.campaign [--part=kills|damages|inputs ...] [--slice]

prints a line for each case and one line of JSON at the end, and exits with 1 if a case failed.

kills     A job is killed (or asked to stop) at a counted operation on a file or at a size of a file. Started again, it
          must end with the same bits as a job that was left alone.
damages   A file that a job reads is cut, emptied, deleted, or has one bit flipped. The job must end with the right
          result, or with one line and exit code 2.
inputs    Malformed files of each kind that users bring. The job must end, with bounded memory, with 0 or with one line
          and exit code 2.
"""
