"""The randomness of sampling: a pure function of (seed, choice, index), with no state to keep or to lose.

A counter-based generator (the idea of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with BLAKE2b
as its mixing function. The number drawn for the 5th token of choice 0 is the same whatever else is in the batch, and
the same when another engine takes the request over in the middle. It knows nothing of logits.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

_COUNTER = struct.Struct("<QQQ")


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1), a multiple of 2**-53, for output token `index` of `choice`; `seed` is unsigned 64 bit."""
    digest = blake2b(
        _COUNTER.pack(seed, choice, index), digest_size=8, person=b"flowserve-noise"
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
