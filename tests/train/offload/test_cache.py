"""Slots: which piece goes, what must be waited for, how many reads a step takes."""

import threading
import time

import pytest
import torch
from offload_support import Gated, content

from mnemic.train.offload.cache import Cache
from mnemic.train.offload.io import Io
from mnemic.train.offload.memory import ALIGN
from mnemic.train.offload.store import Piece, Plan, Store


def cached(count, slots, **changes):
    """(cache over `count` pieces of one page, all written, their contents, the backends)."""
    pieces = [Piece(str(i), ALIGN) for i in range(count)]
    plan = Plan(pieces, changes.pop("directories", 1))
    backends = [Gated(size) for size in plan.sizes]
    store = Store(plan, Io(backends), None)
    data = [content(piece, i) for i, piece in enumerate(pieces)]
    for piece, buffer in zip(pieces, data, strict=True):
        store.write(piece.name, buffer)
    store.commit(0, {})
    return Cache(store, ALIGN, slots, **changes), data, backends


def use(cache, name):
    found = cache.acquire(name).clone()
    cache.release(name)
    return found


def test_the_least_recently_used_slot_goes_first():
    cache, data, _ = cached(5, 3)
    for name in "012":
        assert torch.equal(use(cache, name), data[int(name)])
    use(cache, "0")
    for wanted, gone in (("3", "1"), ("4", "2"), ("1", "0")):
        assert torch.equal(use(cache, wanted), data[int(wanted)])
        assert cache.holds(wanted) and not cache.holds(gone)
    assert (cache.misses, cache.hits) == (6, 1)
    cache.store.close()


def test_a_held_piece_is_never_evicted():
    cache, data, _ = cached(4, 2)
    first = cache.acquire("0")
    for name in "123":
        use(cache, name)
        assert cache.holds("0") and torch.equal(first, data[0])
    second = cache.acquire("3")
    cache.prefetch("1")
    assert not cache.holds("1") and torch.equal(first, data[0]) and torch.equal(second, data[3])
    with pytest.raises(AssertionError, match="more pieces are held at once than there are slots"):
        cache.acquire("1")
    # Held twice, it stays until it was let go twice.
    cache.acquire("0")
    cache.release("0")
    use_of_other = cache.acquire("3")
    cache.release("3")
    cache.release("3")
    assert torch.equal(use_of_other, data[3])
    use(cache, "1")
    assert cache.holds("0") and not cache.holds("3")
    cache.store.close()


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize(("count", "slots"), [(3, 3), (5, 3), (6, 4), (8, 3), (8, 7)])
def test_a_pass_forward_and_back_reads_twice_what_has_no_slot(count, slots, ahead):
    cache, data, _ = cached(count, slots)
    taken, before = 0, 0
    for step in range(4):
        forward = list(range(count))
        for order in (forward, forward[::-1]):
            for position, index in enumerate(order):
                buffer = cache.acquire(str(index))
                for other in order[position + 1 : position + 1 + ahead]:
                    cache.prefetch(str(other))
                assert torch.equal(buffer, data[index])
                cache.release(str(index))
                taken += 1
        if step:
            assert cache.misses - before == 2 * (count - slots)
        before = cache.misses
    # Every acquire without a read of its own is a hit, one that was read ahead too.
    assert cache.hits == (taken if ahead else taken - cache.misses) - (1 if ahead else 0)
    cache.store.close()


def test_a_slot_is_not_filled_before_it_was_written_back():
    cache, data, (backend,) = cached(2, 1)
    buffer = cache.acquire("0")
    changed = content(Piece("x", ALIGN), 77)
    buffer.copy_(changed)
    backend.writes.clear()
    cache.write("0")
    cache.release("0")
    cache.prefetch("1")
    assert not cache.slots[0].read.done and torch.equal(cache.slots[0].host, changed)
    backend.writes.set()
    assert torch.equal(use(cache, "1"), data[1])
    assert torch.equal(use(cache, "0"), changed)
    cache.store.close()


def test_changing_a_slot_waits_for_its_last_write():
    cache, _, (backend,) = cached(1, 1)
    backend.writes.clear()
    cache.acquire("0")
    cache.write("0")
    settled = threading.Thread(target=cache.settle, args=("0",))
    settled.start()
    settled.join(0.05)
    assert settled.is_alive()
    backend.writes.set()
    settled.join(20)
    assert not settled.is_alive() and cache.slots[0].write is None
    cache.release("0")
    cache.store.close()


def test_acquire_waits_for_what_was_read_ahead():
    cache, data, (backend,) = cached(2, 2)
    backend.reads.clear()
    cache.prefetch("1")
    found = []
    thread = threading.Thread(target=lambda: found.append(use(cache, "1")))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive() and not found
    backend.reads.set()
    thread.join(20)
    assert torch.equal(found[0], data[1]) and (cache.misses, cache.hits) == (1, 1)
    cache.store.close()


def test_a_read_that_nobody_took_does_not_land_on_the_next_content():
    """Two disks: the second's read could overtake the first's."""
    cache, data, (slow, _) = cached(2, 1, directories=2)
    slow.reads.clear()
    cache.prefetch("0")
    cache.prefetch("1")
    time.sleep(0.02)
    assert not cache.slots[0].read.done
    slow.reads.set()
    assert torch.equal(use(cache, "1"), data[1])
    cache.store.close()


def test_what_was_never_written_is_zeros_even_in_a_used_slot():
    plan = Plan([Piece("0", ALIGN), Piece("1", ALIGN)])
    store = Store(plan, Io([Gated(plan.sizes[0])]), None)
    cache = Cache(store, ALIGN, 1)
    cache.acquire("0").fill_(7)
    cache.write("0")
    cache.release("0")
    assert not use(cache, "1").any()
    assert (use(cache, "0") == 7).all()
    store.close()


def test_content_apart_from_the_host_is_moved_when_taken_and_written(tmp_path):
    cache, data, _ = cached(3, 2, copy_to_device=True)
    buffer = cache.acquire("0")
    assert buffer is not cache.slots[0].host and torch.equal(buffer, data[0])
    buffer.fill_(9)
    cache.write("0")
    cache.release("0")
    for name in "12":
        assert torch.equal(use(cache, name), data[int(name)])
    assert (use(cache, "0") == 9).all()
    cache.drop()
    assert not any(cache.holds(name) for name in "012") and (use(cache, "0") == 9).all()
    cache.store.close()
