"""What MKL keeps for a thread that multiplied and now waits is given back, and asked for again."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from memtrain import kernel_buffers


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")
def test_a_waiting_threads_buffers_are_freed_and_its_products_stay_right() -> None:
    a = torch.randn(512, 512)
    expected = a @ a
    multiplied, freed = threading.Event(), threading.Event()
    products: list[torch.Tensor] = []

    def multiply() -> None:
        products.append(a @ a)
        multiplied.set()
        assert freed.wait(30)
        products.append(a @ a)

    before = kernel_buffers.kept_bytes()
    thread = threading.Thread(target=multiply)
    thread.start()
    assert multiplied.wait(30)
    assert kernel_buffers.kept_bytes() > before > 0
    kernel_buffers.give_back()
    assert kernel_buffers.kept_bytes() == 0
    freed.set()
    thread.join()
    assert all(torch.equal(product, expected) for product in products)
    assert torch.equal(a @ a, expected)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")
def test_products_that_are_under_way_keep_theirs() -> None:
    a = torch.randn(384, 384)
    expected = a @ a
    wrong, over = [], threading.Event()

    def multiply() -> None:
        while not over.is_set():
            if not torch.equal(a @ a, expected):
                wrong.append(1)

    threads = [threading.Thread(target=multiply) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        kernel_buffers.give_back()
        time.sleep(0.001)
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_mkl_nothing_is_kept_and_nothing_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_buffers, "_mkl", lambda name: None)
    kernel_buffers.give_back()
    assert kernel_buffers.kept_bytes() == 0
