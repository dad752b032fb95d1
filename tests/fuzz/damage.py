"""Ways to damage a file, each a function of the content and a generator of random numbers."""

import random
from collections.abc import Callable

Damage = Callable[[bytes, random.Random], bytes]


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def bit_flipped(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def overwritten(content: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(content)), rng.randint(1, 64)
    return content[:place] + rng.randbytes(length) + content[place + length :]


def cut_out(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) - 1)
    return content[:place] + content[place + rng.randint(1, 64) :]


def prolonged(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randint(1, 64))


def random_bytes(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(0, 4000))


def zeroed(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes(len(content) - place)


ALL: tuple[Damage, ...] = (
    truncated,
    bit_flipped,
    overwritten,
    cut_out,
    prolonged,
    random_bytes,
    zeroed,
)
