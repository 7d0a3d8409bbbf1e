"""What all tests share."""

import torch


def pytest_configure() -> None:
    """Use one thread: on tensors as small as the tests' more threads only wait for each other."""
    torch.set_num_threads(1)
