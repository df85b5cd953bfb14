"""Digests by themselves: which damages they see, and that only the bytes count, wherever they lie."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megastow.device import Direction, device_for
from megastow.digest import digest

PAGE = 4096


def of(data):
    return int(digest(data))


def random_bytes(nbytes, seed=0):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def width_of(data):
    """How many words there are to a sum's row; see the note in the module."""
    return math.isqrt(data.numel() // 8) | 1


@pytest.mark.parametrize("nbytes", [1, 7, 8, 9, 64, 101])
def test_every_bit_of_a_small_storage_counts(nbytes):
    for data in (random_bytes(nbytes), torch.zeros(nbytes, dtype=torch.uint8)):
        seen = {of(data)}
        for position in range(nbytes):
            for bit in range(8):
                data[position] ^= 1 << bit
                seen.add(of(data))
                data[position] ^= 1 << bit
        assert len(seen) == 1 + 8 * nbytes  # and no two damages look alike


@settings(max_examples=20, deadline=None)
@given(bits=st.sets(st.integers(0, 8 * ((1 << 18) + 5) - 1), min_size=1, max_size=4))
def test_any_few_bits_of_a_large_storage_count(bits):
    data = random_bytes((1 << 18) + 5)
    before = of(data)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    assert of(data) != before


def exchange(data, one, other, nbytes):
    kept = data[one : one + nbytes].clone()
    data[one : one + nbytes] = data[other : other + nbytes]
    data[other : other + nbytes] = kept


def zeroed_page(data):
    data[7 * PAGE : 8 * PAGE] = 0


def swapped_pages(data):
    exchange(data, 3 * PAGE, 200 * PAGE, PAGE)


def page_from_elsewhere(data):
    data[9 * PAGE : 10 * PAGE] = data[4 * PAGE : 5 * PAGE]


def swapped_rows(data):
    row = 8 * width_of(data)
    exchange(data, 2 * row, 5 * row, row)


def swapped_columns(data):
    width = width_of(data)
    rows = data.view(torch.int64)[: data.numel() // 8 // width * width].view(-1, width)
    rows[:, [4, 17]] = rows[:, [17, 4]].clone()


def swapped_neighbours(data):
    exchange(data, 1000, 1008, 8)


def swapped_halves_of_words(data):
    exchange(data, 1000, 1004, 4)


def swapped_chunks(data):
    exchange(data, 0, data.numel() // 2, data.numel() // 2)


def rotated_by_one_byte(data):
    data[:] = data.roll(1)


def rotated_by_one_word(data):
    data[:] = data.roll(8)


def one_word_moved(data):
    words = data.view(torch.int64)
    words[100:5000] = words[100:5000].roll(1)


def sign_of_every_word(data):
    data[7::8] ^= 0x80


def sign_of_every_word_of_a_page(data):
    data[5 * PAGE + 7 : 6 * PAGE : 8] ^= 0x80


def line_stuck_at_one(data):
    data[3::8] |= 0x40


def the_other_byte_order(data):
    data[:] = data.view(-1, 4).flip(1).flatten()


def nothing_arrived(data):
    data.zero_()


DAMAGES = [
    zeroed_page,
    swapped_pages,
    page_from_elsewhere,
    swapped_rows,
    swapped_columns,
    swapped_neighbours,
    swapped_halves_of_words,
    swapped_chunks,
    rotated_by_one_byte,
    rotated_by_one_word,
    one_word_moved,
    sign_of_every_word,
    sign_of_every_word_of_a_page,
    line_stuck_at_one,
    the_other_byte_order,
    nothing_arrived,
]


@pytest.mark.parametrize("nbytes", [1 << 20, (1 << 20) - PAGE, 5 << 20])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_to_noise_are_seen(damage, nbytes):
    data = random_bytes(nbytes)
    before = of(data)
    damage(data)
    assert of(data) != before


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_to_regular_values_are_seen(damage):
    """Values with much symmetry: sums over them are easily the same."""
    data = torch.arange(1 << 17, dtype=torch.float64).sin().view(torch.uint8)
    before = of(data)
    damage(data)
    assert of(data) != before


@pytest.mark.parametrize("size", [7, 10, 31, 64, 181])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
def test_exchanged_rows_of_an_identity_matrix_are_seen(size, dtype):
    """All rows and all columns have the same sum, before and after."""
    matrix = torch.eye(size, dtype=torch.float64).to(dtype)
    seen = {of(matrix.view(torch.uint8).flatten())}
    for other in range(1, size):
        rows = matrix.clone()
        rows[[0, other]] = rows[[other, 0]]
        seen.add(of(rows.view(torch.uint8).flatten()))
    assert len(seen) == size


@pytest.mark.parametrize("distance", [1, 2, 254, 255, 256, 257, 258, 259, 512, 255 * 257 - 1000])
def test_the_top_bits_of_two_words_do_not_cancel(distance):
    data = random_bytes(255 * 257 * 8)
    assert width_of(data) == 255
    words, top = data.view(torch.int64), -(1 << 63)
    before = of(data)
    for place in (0, 7, 254, 999):
        words[[place, place + distance]] ^= top
        assert of(data) != before
        words[[place, place + distance]] ^= top


def test_runs_that_change_places_are_seen_at_any_distance():
    """The worst there is for sums: all that leaves one of them comes into it again from the other run."""
    choose = random.Random(0)
    words = torch.zeros(61 * 63, dtype=torch.int64)
    for _ in range(300):
        length = choose.randint(1, 40)
        one = choose.randint(0, len(words) - 2 * length)
        other = choose.randint(one + length, len(words) - length)
        period = choose.choice([1, 3, 7, 61])
        words.zero_()
        words[one : one + length : period] = 5
        before = of(words.view(torch.uint8))
        words[other : other + length : period] = 5
        words[one : one + length] = 0
        assert of(words.view(torch.uint8)) != before


def test_the_length_counts():
    lengths = range(1, 400)
    assert len({of(torch.zeros(n, dtype=torch.uint8)) for n in lengths}) == len(lengths)


@pytest.mark.parametrize("nbytes", [1, 8, 13, 4096, 100_003])
def test_only_the_bytes_count(nbytes):
    data = random_bytes(nbytes)
    elsewhere = torch.zeros(nbytes + 512, dtype=torch.uint8)[512:]
    elsewhere.copy_(data)
    with torch.device("meta"):
        assert of(elsewhere) == of(data)
    assert torch.equal(elsewhere, data)


def test_it_is_the_function_that_the_note_describes():
    """Written again, in Python's integers; a digest of another version of the library may be compared with ours."""
    data = random_bytes(8 * 1000 + 3)
    words = [int.from_bytes(bytes(data[i : i + 8].tolist()), "little") for i in range(0, 8000, 8)]
    sums = [sum(words[start::width]) for width in (31, 33) for start in range(width)]
    sums.append(int.from_bytes(bytes(data[8000:].tolist()), "little"))
    total = 0
    for number, each in enumerate(sums, start=len(data) << 24):
        z = (each + number * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        total += z ^ z >> 31
    assert of(data) % 2**64 == total % 2**64


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_a_gpu
@pytest.mark.parametrize("expected", [[7], [3, -1, 1 << 62]])
def test_results_come_to_the_host_ahead_of_copies_that_were_queued_before(expected):
    device = device_for(torch.device("cuda", 0))
    source = torch.zeros(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
    values = [torch.tensor(value, device="cuda") for value in expected]
    device.fetch(values)  # a kernel that is loaded for the first time waits for everything
    torch.cuda.synchronize()
    with device.copying(Direction.OUT):
        target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    with torch.device("cuda"):
        found = device.fetch(values)
    assert not copied.query()
    assert found == expected
    held = torch.cuda.memory_allocated()
    assert device.fetch(values * 500) == found * 500
    assert torch.cuda.memory_allocated() == held
    copied.synchronize()


@needs_a_gpu
@pytest.mark.parametrize("nbytes", [1, 13, 4096, 100_003, (64 << 20) + 5])
def test_it_is_the_same_on_a_gpu(nbytes):
    data = random_bytes(nbytes)
    assert of(data.cuda()) == of(data)
