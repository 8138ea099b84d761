"""python -m nitp_ops in a shell."""

import subprocess
import sys


def test_a_reader_that_stops_reading_is_no_error_to_tell():
    command = [sys.executable, "-W", "ignore", "-m", "nitp_ops", "list"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as done:
        assert done.stdout is not None and done.stderr is not None
        # before anything is written, as the `head` of a pipeline that has ended
        done.stdout.close()
        told = done.stderr.read()
    assert (done.returncode, told) == (1, "")
