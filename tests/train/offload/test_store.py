"""Pieces, extents and commits: what is committed stays byte for byte until the next commit."""

import os
import time
from pathlib import Path

import pytest
import torch
from offload_support import PIECES, Gated, content, flip, get, make, put, raw

from mnemic.train.errors import UserError
from mnemic.train.offload.files import SsdFile
from mnemic.train.offload.io import UNIT, Io
from mnemic.train.offload.memory import ALIGN, aligned_buffer, bytes_of
from mnemic.train.offload.store import Piece, Plan, Store, read_manifest
from mnemic.train.offload.work import MANIFEST

# Plan ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directories", [1, 2, 3])
def test_extents_fill_their_files_without_overlap_and_units_take_turns(directories):
    big = Piece("big", 3 * UNIT + 1)
    plan = Plan([*PIECES, big], directories)
    taken = [[] for _ in range(directories)]
    for name, extents in plan.units.items():
        assert len(extents) == plan.pieces[name].copies
        for units in extents:
            assert sum(unit.length for unit in units) == plan.pieces[name].padded
            for unit in units:
                assert unit.offset % ALIGN == unit.length % ALIGN == 0 < unit.length <= UNIT
                taken[unit.directory].append((unit.offset, unit.offset + unit.length))
    for spans, size in zip(taken, plan.sizes, strict=True):
        spans.sort()
        assert [start for start, _ in spans] == [0, *[stop for _, stop in spans[:-1]]]
        assert spans[-1][1] == size
    turns = [unit.directory for extents in plan.units.values() for unit in extents[0]]
    assert turns == [i % directories for i in range(len(turns))]
    assert len(plan.units["big"][0]) == 4


def test_another_layout_has_another_digest():
    plans = [
        Plan(PIECES), Plan(PIECES, 2), Plan(PIECES[:2]), Plan(PIECES[::-1]),
        Plan([Piece("a", 3 * ALIGN - 1), *PIECES[1:]]), Plan([Piece("a", 3 * ALIGN, 1)]),
    ]  # fmt: skip
    assert len({plan.digest() for plan in plans}) == len(plans)
    assert Plan(list(PIECES)).digest() == plans[0].digest()


# Store -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_a_commit_is_found_again_and_what_came_after_it_is_not(tmp_path, direct):
    store = make(tmp_path, direct=direct)
    assert store.open() is None
    frozen, a, b = put(store, "frozen", 1), put(store, "a", 2), put(store, "b", 3)
    store.commit(0, {})
    a2 = put(store, "a", 4)
    store.commit(7, {"cursor": torch.arange(3), "callbacks": {"metrics": {"bytes": 12}}})
    put(store, "a", 5)
    put(store, "b", 6)
    store.close()

    again = make(tmp_path, direct=direct)
    found = again.open()
    assert found["step"] == 7 and found["state"]["callbacks"] == {"metrics": {"bytes": 12}}
    assert found["state"]["cursor"].tolist() == [0, 1, 2]
    for name, expected in (("a", a2), ("b", b), ("frozen", frozen)):
        assert torch.equal(get(again, name), expected)
    assert not torch.equal(a, a2)
    again.close()


def test_a_rollback_gives_the_committed_bytes_back(tmp_path):
    store = make(tmp_path)
    old = {name: put(store, name, i) for i, name in enumerate(("a", "b", "frozen"))}
    store.commit(1, {})
    for _ in range(2):
        put(store, "a", 10)
        new = put(store, "b", 11)
        assert torch.equal(get(store, "b"), new)
        store.rollback()
        assert all(torch.equal(get(store, name), data) for name, data in old.items())
    # A commit after it is of the old bytes, and counts as one.
    store.commit(2, {})
    store.close()
    again = make(tmp_path)
    assert again.open()["step"] == 2
    assert all(torch.equal(get(again, name), data) for name, data in old.items())
    again.close()


def test_a_rollback_to_before_the_first_write(tmp_path):
    store = make(tmp_path)
    put(store, "b", 1)
    store.commit(0, {})
    put(store, "a", 2)
    store.rollback()
    assert not store.written("a") and store.written("b")
    assert list(store.checksums) == ["b"]
    store.close()


def test_no_write_between_two_commits_touches_the_committed_extent(tmp_path):
    store = make(tmp_path)
    put(store, "a", 0)
    store.commit(0, {})
    places = []
    for step in range(1, 4):
        extents = store.plan.units["a"]
        before = [raw(store, unit) for unit in extents[store.committed["a"]]]
        for again in range(3):
            new = put(store, "a", 10 * step + again)
            assert store.current["a"] == 1 - store.committed["a"]
            assert [raw(store, unit) for unit in extents[store.committed["a"]]] == before
            written = b"".join(raw(store, unit) for unit in extents[store.current["a"]])
            assert written == bytes(bytes_of(new))
        places.append(extents[store.current["a"]][0].offset)
        store.commit(step, {})
    assert places[0] == places[2] != places[1]
    store.close()


def test_a_commit_reaches_the_disk_in_an_order_that_a_power_cut_cannot_tear(tmp_path, monkeypatch):
    """Data, then the new manifest's bytes, then its name, then the folder: each before the next."""
    store = make(tmp_path, directories=2)
    names = {backend.fd: Path(backend.path).parent.name for backend in store.io.backends}
    events = []

    def spied(name, shown):
        real = getattr(os, name)

        def call(*args):
            events.append((name, shown(*args)))
            return real(*args)

        monkeypatch.setattr(os, name, call)

    def shown(fd, *_):
        return names[fd] if fd in names else Path(os.readlink(f"/proc/self/fd/{fd}")).name

    spied("pwritev", shown)
    spied("fdatasync", shown)
    spied("fsync", shown)
    spied("replace", lambda source, target: target.name)
    for name in ("a", "b"):
        store.write(name, content(store.plan.pieces[name], 1))
    store.commit(1, {})
    assert sorted(events[:2]) == [("pwritev", "0"), ("pwritev", "1")]
    assert events[2:] == [
        ("fdatasync", "0"), ("fdatasync", "1"), ("fsync", ".commit.tmp"), ("replace", "commit"),
        ("fsync", "0"),
    ]  # fmt: skip
    monkeypatch.undo()
    store.close()


def test_a_read_behind_a_write_sees_all_of_it(tmp_path):
    """The write is held back; the read begins before it has ended."""
    plan = Plan([Piece("a", 2 * ALIGN)])
    backend = Gated(plan.sizes[0])
    store = Store(plan, Io([backend]), None)
    for seed in range(2):
        backend.writes.clear()
        data, buffer = content(plan.pieces["a"], seed), aligned_buffer(2 * ALIGN)
        writing = store.write("a", data)
        reading = store.read_span("a", ALIGN, buffer[ALIGN:]) if seed else store.read("a", buffer)
        time.sleep(0.02)
        assert not (writing.done or reading.done)
        backend.writes.set()
        reading.wait()
        assert writing.done and torch.equal(buffer[ALIGN:], data[ALIGN:])
    store.close()


def test_spans_of_a_piece_over_several_disks(tmp_path):
    piece = Piece("big", 2 * UNIT + 3 * ALIGN)
    store = make(tmp_path, [piece], directories=3)
    data = put(store, "big", 1)
    assert torch.equal(get(store, "big"), data)
    assert [u.directory for u in store.plan.units["big"][0]] == [0, 1, 2]
    for start, length in (
        (0, ALIGN),
        (UNIT - ALIGN, 2 * ALIGN),
        (ALIGN, 2 * UNIT),
        (2 * UNIT, 8192),
    ):
        buffer = aligned_buffer(length)
        store.read_span("big", start, buffer).wait()
        assert torch.equal(buffer, data[start : start + length])
    store.close()


def test_every_single_unit_is_checked(tmp_path):
    pieces = [*PIECES, Piece("big", 2 * UNIT + ALIGN)]
    store = make(tmp_path, pieces, directories=2)
    for seed, piece in enumerate(pieces):
        put(store, piece.name, seed)
    store.commit(0, {})
    put(store, "a", 9)
    store.commit(3, {})
    count = 0
    for name, extents in store.plan.units.items():
        for index, units in enumerate(extents):
            for unit in units:
                for at in (0, unit.length - 1):
                    flip(store, unit, at)
                    if index == store.committed[name]:
                        where = f"{store.io.backends[unit.directory].path}, {unit.length:,} bytes "
                        with pytest.raises(UserError) as caught:
                            store.open()
                        assert f"{name} is damaged ({where}" in str(caught.value)
                        assert "the commit of step 3; delete" in str(caught.value)
                    else:
                        # The other extent is no content.
                        assert store.open()["step"] == 3
                    flip(store, unit, at)
                    count += 1
    assert count == 2 * 2 * (1 + 1 + 3) + 2
    assert store.open()["step"] == 3
    store.close()


def test_a_damaged_manifest_is_never_believed(tmp_path):
    store = make(tmp_path)
    put(store, "a", 1)
    store.commit(1, {"cursor": 5})
    path = tmp_path / "0" / MANIFEST
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"commit: damaged; delete .*/0 to go on from"):
            store.open()
        path.write_bytes(whole[:at])
        with pytest.raises(UserError, match="damaged"):
            store.open()
    path.write_bytes(whole)
    assert read_manifest(path.parent)["state"] == {"cursor": 5}
    store.close()


def test_a_manifest_of_another_layout_is_refused(tmp_path):
    store = make(tmp_path)
    put(store, "a", 1)
    store.commit(1, {})
    store.close()
    other = Plan([Piece("a", 3 * ALIGN, 1), *PIECES[1:]])
    file = SsdFile(tmp_path / "other.bin", other.sizes[0])
    with pytest.raises(UserError, match="0 holds a model or optimizer of another shape"):
        Store(other, Io([file]), tmp_path / "0").open()


def test_content_from_elsewhere_spares_the_commit(tmp_path):
    """A run that begins from a checkpoint although there is a commit may be killed half-way."""
    store = make(tmp_path)
    for step in (4, 5):  # in the first extent, in the second
        old = put(store, "a", step)
        store.commit(step, {})
        store.close()
        begun = make(tmp_path)
        begun.spare()
        put(begun, "a", 3)
        begun.close()
        store = make(tmp_path)
        assert store.open()["step"] == step and torch.equal(get(store, "a"), old)
    store.close()
    again = make(tmp_path)
    again.open()
    # It is also the way out of damage: neither content nor manifest need be right.
    path = tmp_path / "0" / MANIFEST
    for damage in (
        lambda: flip(again, again.plan.units["a"][again.committed["a"]][0], 0),
        lambda: path.write_bytes(b"nothing"),
        path.unlink,
    ):
        damage()
        begun = make(tmp_path)
        begun.spare()
        new = put(begun, "a", 6)
        begun.commit(2, {})
        assert again.open()["step"] == 2 and torch.equal(get(again, "a"), new)
        begun.close()
    again.close()
