"""`python -m deepflow.doctor.probe cuda|npu`: loads torch, adds two numbers on every device, prints what came of it.

It runs alone in a process, because all of that may hang or crash.
"""

from __future__ import annotations

import sys

from deepflow.doctor import torch_probe


def main() -> None:
    """Print one line of answer."""
    kind = sys.argv[1]
    names: list[str] = []
    error = ""
    try:
        import torch

        runtime = getattr(torch, kind, None)
        if runtime is None or not runtime.is_available():
            error = f"torch sees no {kind} device"
        else:
            for index in range(runtime.device_count()):
                ones = torch.ones(64, device=f"{kind}:{index}")
                total = float((ones + ones).sum().item())
                if total != 128.0:
                    error = f"{kind}:{index} adds up to {total} instead of 128"
                names.append(str(runtime.get_device_name(index)))
    except (ImportError, OSError, RuntimeError) as failure:  # whatever a driver answers torch with
        error = " ".join(f"{type(failure).__name__}: {failure}".split())
    print(torch_probe.answer(names, error), flush=True)  # noqa: T201 # the answer


if __name__ == "__main__":
    main()
