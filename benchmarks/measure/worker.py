"""A process that takes steps of our op on request: two of them, each with its own nitp_ops, are an
A/B comparison.

python -m benchmarks.measure.worker THREADS      reads a JSON request a line, writes a JSON answer a line
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

#: Seconds between two steps: OpenMP threads of the process that has just run go on spinning for
#: some milliseconds.
PAUSE = 0.02


class Worker:
    """The parent's end of one process.

    Args:
        path: folders of modules, first come first served.
        threads: of torch in it.
    """

    def __init__(self, path: Sequence[Path], threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
        self.seconds = 0.0
        """Spent in steps so far, by the process's own clock."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.measure.worker", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=path[0],  # `python -m` looks there first
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            OSError: the process died, or could not do it.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"a measuring process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise OSError(answer["failed"])
        return answer

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        """Make the inputs of a case and take two steps; {"nitp_ops": its folder, "bits": digest of
        its results}."""
        return self.ask(do="prepare", op=case["op"], sizes=case["sizes"], dtype=case["dtype"])

    def step(self) -> None:
        """One step; its time is added to `seconds`."""
        time.sleep(PAUSE)
        self.seconds += self.ask(do="step")["seconds"]

    def peak(self) -> int:
        """Most bytes resident in a step above those before it."""
        return self.ask(do="peak")["bytes"]


def answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The process's end."""
    import torch

    import nitp_ops
    from benchmarks.cases import OPS
    from benchmarks.implementations import forward, step

    from . import cpu, process_memory

    inputs, function = None, None
    for line in lines:
        request = json.loads(line)
        if request["do"] == "prepare":
            op = OPS[request["op"]]
            inputs, function = (
                op.inputs(request["sizes"], getattr(torch, request["dtype"])),
                forward(op.name, "ours"),
            )
            values = cpu.value_and_gradients(function, inputs)
            digest = hashlib.sha256()
            for value in values.values():
                digest.update(
                    value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                )
            inputs.clear()
            step(function, inputs)
            yield {
                "nitp_ops": str(Path(nitp_ops.__file__).resolve().parent),
                "bits": digest.hexdigest(),
            }
            continue
        assert inputs is not None and function is not None
        inputs.clear()
        if request["do"] == "peak":
            yield {"bytes": process_memory.peak_of(partial(step, function, inputs), inputs.clear)}
            continue
        start = time.perf_counter()
        step(function, inputs)
        yield {"seconds": time.perf_counter() - start}


def main() -> None:
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # the pipe is for answers alone
        try:
            for answer in answers(sys.stdin):
                print(json.dumps(answer), file=out, flush=True)
        except Exception as error:
            reason = " ".join(str(error).split())
            print(
                json.dumps({"failed": f"{type(error).__name__}: {reason}"[:300]}),
                file=out,
                flush=True,
            )


if __name__ == "__main__":
    main()
