"""Damage as it comes over the net and off old disks, seeded: what `inputs/check_videos.py` and the
decoder are tried on."""

import random

KINDS = ("cut", "bits", "header", "zeros", "gone", "twice", "noise")


def mutated(data, others, seed):
    """-> kind of damage, bytes. others: contents of other good files, whose beginnings are put
    before this one."""
    rng = random.Random(seed)
    kind, data = rng.choice(KINDS), bytearray(data)
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    if kind == "cut":
        del data[a:]
    elif kind == "bits":
        for _ in range(rng.choice((1, 3, 30, 300))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "header":
        n = rng.choice((8, 32, 200, 1000))
        data[:n] = rng.choice(others)[:n]
    elif kind == "zeros":
        data[a:b] = bytes(b - a)
    elif kind == "gone":
        del data[a:b]
    elif kind == "twice":
        data[a:a] = data[a:b]
    else:
        data[a:b] = rng.randbytes(b - a)
    return kind, bytes(data)
