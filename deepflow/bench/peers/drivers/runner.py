"""The far end of every engine: loads one driver script, then answers line by line, a JSON object in, one out.

Run as `python -P runner.py DRIVER.py`. The first line holds the keyword arguments of the driver's class `Driver`; each
line after it names one of its methods in `do` and holds that method's arguments. An exception is answered as `error`
and ends the process. It runs in foreign environments: standard library only, and nothing of this project.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any


def main() -> None:
    """Until the end of standard input."""
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: a process that was stopped when its parent died would stay for ever.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # Whatever a library prints is not an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        driver = runpy.run_path(sys.argv[1])["Driver"](**json.loads(sys.stdin.readline()))
        answer(driver.describe())
        for line in sys.stdin:
            question = json.loads(line)
            answer(getattr(driver, question.pop("do"))(**question) or {})
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        # Not sys.exit: the threads of a broken engine may not end.
        os._exit(1)


if __name__ == "__main__":
    main()
