"""Threads of UUIDs (Needle Threading): every character is random, so a compressor must keep a pair whole, or refuse."""

import json
import random
import uuid

from fewer_eval.asked.base import Asked, Setting


def thread(rng: random.Random, place: float) -> Asked:
    pairs = {str(uuid.UUID(int=rng.getrandbits(128))): str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(12)}
    key = list(pairs)[round(place * 11)]
    return Asked(
        (json.dumps(pairs, indent=1),), f'What is the value of the key "{key}"?', pairs[key], (key, pairs[key])
    )


THREADS = Setting("uuid-threads", "a JSON object of twelve pairs of UUIDs", thread, answerable=False)
