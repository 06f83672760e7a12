"""What all training tests run with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """As the children have; networks this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
