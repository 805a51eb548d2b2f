"""`kernels/ahead`: what a GPU asks of each process is begun on a thread."""

import pytest
import torch

from theodora.kernels.ahead import begin_with_gpu


def test_without_a_gpu_there_is_nothing_to_begin():
    assert begin_with_gpu(torch.device("cpu")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_fails_there_is_left_to_where_it_is_needed():
    thread = begin_with_gpu(torch.device("cuda", 0))  # a failing thread would be a warning, which is an error here
    thread.join()
