"""A process for `Answerer` that does with itself what it is told: answer, end, or never answer."""

from __future__ import annotations

import os
import signal
import time

from deepflow.bench.child import conversation

if __name__ == "__main__":
    with conversation() as (questions, answer):
        for question in questions:
            if question["do"] == "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            if question["do"] == "hang":
                time.sleep(600)
            answer({"state": "passed", "pid": os.getpid()})
