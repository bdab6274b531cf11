"""Threads that encode side by side give what one gives, in order, whatever fails."""

import threading
import time

import pytest
import torch

from loopitr.evaluation.side_by_side import Shares, side_by_side

BATCHES = [[i, i + 1] for i in range(0, 20, 2)]
SUMS = [2 * i + 1 for i in range(0, 20, 2)]


class Numbers(torch.utils.data.Dataset):
    """Item i is i; `opened_by` are the threads that asked for one."""

    def __init__(self):
        self.opened_by = set()

    def __getitem__(self, index):
        self.opened_by.add(threading.current_thread().name)
        return index


@pytest.fixture
def three_cores():
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    yield Shares.of(20, 6, 32, torch.device("cpu"))
    torch.set_num_threads(own)


def test_a_batch_is_shared_out_to_the_cores(three_cores):
    def of(count, batch_size, image_size=32, device="cpu"):
        shares = Shares.of(count, batch_size, image_size, torch.device(device))
        return shares.encoders, shares.size, shares.cores

    assert three_cores == Shares(encoders=3, size=2, cores=1)
    assert of(100, 64) == (3, 22, 1) and of(4, 64) == (3, 2, 1)
    assert of(100, 64, 224) == (3, 8, 1) and of(100, 64, 2000) == (3, 1, 1)
    assert of(100, 1) == of(1, 64) == of(0, 64) == (1, 1, 3)
    assert of(100, 64, 224, "cuda") == (1, 64, 1)


@pytest.mark.parametrize("how", [{"open_in_threads": True}, {}, {"num_workers": 1}], ids=["threads", "here", "workers"])
def test_order_threads_and_modes(how, three_cores):
    numbers, seen = Numbers(), set()

    def encode(batch):
        time.sleep(0.001 * (batch[0] % 3))  # The later ones are often ready first.
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        seen.add((threading.current_thread().name, torch.get_num_threads(), *modes))
        return sum(batch)

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert list(side_by_side(numbers, BATCHES, list, encode, shares=three_cores, **how)) == SUMS
    encoders = {name for name, *_ in seen}
    assert len(encoders) > 1 and all(name.startswith("encoder") for name in encoders)
    assert {tuple(rest) for _, *rest in seen} == {(1, True, True, torch.bfloat16)}
    if how != {"num_workers": 1}:
        assert numbers.opened_by <= encoders if how else numbers.opened_by == {threading.current_thread().name}
    assert torch.get_num_threads() == 3
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_an_error_comes_in_its_place_and_ends_it(three_cores):
    made = []

    def encode(batch):
        if batch[0] == 6:
            raise ValueError("batch 6")
        made.append(batch[0])
        return sum(batch)

    stream = side_by_side(Numbers(), BATCHES, list, encode, shares=three_cores, open_in_threads=True)
    assert [next(stream) for _ in range(3)] == SUMS[:3]
    with pytest.raises(ValueError, match="batch 6"):
        next(stream)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]
    stream = side_by_side(Numbers(), BATCHES, list, encode, shares=three_cores, open_in_threads=True)
    next(stream)
    stream.close()  # Nobody wants the rest.
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]
    assert len(made) < 2 * len(BATCHES)
