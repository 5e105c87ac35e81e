"""Everything under tests/adapters runs without autograd, as inference does, and on one thread: the models are tiny."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking others costs more than they add, a hundredfold on a busy machine
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
