"""Files of fixed size, and copies of a store in them: reserved at once, never resized, shared where
the file system can.
"""

import ctypes
import mmap
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
from offload_support import PIECES, content, flip, get, make, mounting, put

from mnemic.train.errors import UserError
from mnemic.train.offload.copies import open_copy, restore_store, save_store
from mnemic.train.offload.files import SsdFile
from mnemic.train.offload.io import UNIT, Io, Unit
from mnemic.train.offload.memory import ALIGN, aligned_buffer, bytes_of
from mnemic.train.offload.store import Piece, Plan, read_manifest


def test_direct_and_buffered_files_hold_the_same_bytes(tmp_path):
    files = {}
    for direct in (True, False):
        store = make(tmp_path / str(direct), direct=direct)
        assert store.io.backends[0].direct is direct
        sums = [store.write(p.name, content(p, i)).wait() for i, p in enumerate(PIECES)]
        assert all(torch.equal(get(store, p.name), content(p, i)) for i, p in enumerate(PIECES))
        files[direct] = (Path(store.io.backends[0].path).read_bytes(), sums)
        store.close()
    assert files[True] == files[False]
    assert files[True][1][1] == [zlib.crc32(bytes_of(content(PIECES[1], 1)))]


def cached_pages(path):
    """Pages of a file that are in memory."""
    size = path.stat().st_size
    with path.open("rb+") as file, mmap.mmap(file.fileno(), size) as mapped:
        found = (ctypes.c_ubyte * (size // ALIGN))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found) == 0
        return sum(flag & 1 for flag in found)


def test_buffered_files_leave_nothing_in_the_page_cache(tmp_path):
    control = tmp_path / "control"
    control.write_bytes(b"x" * (1 << 20))
    with control.open("rb+") as file:
        os.fsync(file.fileno())
        assert cached_pages(control) == 256
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(control):
        pytest.skip("this file system has no pages to drop (tmpfs)")
    file = SsdFile(tmp_path / "data.bin", 1 << 20, direct=False)
    buffer = content(Piece("x", 1 << 20), 1)
    file.write(0, bytes_of(buffer))
    assert cached_pages(tmp_path / "data.bin") == 0
    file.read(0, bytes_of(buffer))
    assert cached_pages(tmp_path / "data.bin") == 0
    file.close()


@pytest.fixture
def mounted(tmp_path):
    with mounting(tmp_path) as mount:
        yield mount


def test_a_file_system_without_direct_io_is_used_without(mounted):
    """ramfs refuses O_DIRECT (EINVAL), and has no fallocate of its own."""
    store = make(mounted("ramfs", "defaults", "ramfs"))
    assert not store.io.backends[0].direct
    data = put(store, "a", 1)
    store.commit(1, {})
    assert store.open()["step"] == 1 and torch.equal(get(store, "a"), data)
    store.close()


def test_a_full_disk_is_met_when_the_file_is_made_and_keeps_nothing(mounted):
    place = mounted("small", "size=1m")
    with pytest.raises(UserError, match=r"data.bin cannot be used: No space left .* 2,097,152 by"):
        SsdFile(place / "data.bin", 2 << 20)
    assert list(place.iterdir()) == []
    file = SsdFile(place / "data.bin", 512 << 10)
    assert (place / "data.bin").stat().st_blocks * 512 >= 512 << 10
    file.close()


def test_a_file_of_another_size_stays_as_it_is(tmp_path):
    path = tmp_path / "data.bin"
    SsdFile(path, 2 * ALIGN).close()
    path.write_bytes(b"precious" * 1024)
    for size in (ALIGN, 3 * ALIGN):
        with pytest.raises(UserError, match=f"data.bin has 8,192 bytes where {size:,} belong"):
            SsdFile(path, size)
    assert path.read_bytes() == b"precious" * 1024


def test_a_file_for_reading_is_neither_made_nor_changed(tmp_path):
    path = tmp_path / "data.bin"
    with pytest.raises(UserError, match="No such file"):
        SsdFile(path, ALIGN, writable=False)
    assert not path.exists()
    path.touch()
    with pytest.raises(UserError, match="has 0 bytes where 4,096 belong"):
        SsdFile(path, ALIGN, writable=False)
    path.write_bytes(bytes(ALIGN))
    path.chmod(0o444)
    file = SsdFile(path, ALIGN, writable=False)
    transfer = Io([file]).write([Unit(0, 0, ALIGN)], aligned_buffer(ALIGN))
    with pytest.raises(UserError, match=r"data.bin: Bad file descriptor; nothing of the last comm"):
        transfer.wait()


def test_io_errors_say_of_which_file(tmp_path):
    store = make(tmp_path, directories=2)
    put(store, "a", 1)
    put(store, "b", 2)
    store.commit(1, {})
    os.truncate(tmp_path / "1" / "data.bin", ALIGN)
    with pytest.raises(UserError, match=r"/1/data.bin: the file ends early; nothing of the last"):
        store.open()
    store.close()


def test_a_deleted_file_is_noticed_at_the_next_commit(tmp_path):
    store = make(tmp_path, directories=2)
    put(store, "a", 1)
    store.commit(1, {})
    (tmp_path / "1" / "data.bin").unlink()
    with pytest.raises(
        UserError, match=r"step 2 could not .*/1/data.bin was deleted under the run"
    ):
        store.commit(2, {})
    assert read_manifest(tmp_path / "0")["step"] == 1
    shutil.rmtree(tmp_path / "0")
    with pytest.raises(UserError, match="was deleted under the run; run the same command again"):
        store.commit(2, {})
    store.close()


# Copies ----------------------------------------------------------------------------------------


def test_a_copy_brings_back_what_was_written_and_what_was_not(tmp_path):
    pieces = [*PIECES, Piece("never", ALIGN), Piece("big", UNIT + ALIGN)]
    store = make(tmp_path / "first", pieces, directories=2)
    for name in ("a", "b", "frozen", "big"):
        put(store, name, 1)
    store.commit(0, {})
    kept = {name: put(store, name, 2) for name in ("a", "big")}
    kept |= {name: get(store, name) for name in ("b", "frozen")}
    copy = tmp_path / "copy"
    copy.mkdir()
    save_store(store, copy)
    assert (copy / "offload.bin").stat().st_size == sum(p.padded for p in pieces)

    # Into a store of another number of disks, which holds later commits of other content.
    for directories in (1, 3):
        other = make(tmp_path / f"into{directories}", pieces, directories)
        for name in (*kept, "never"):
            put(other, name, 3)
        other.commit(9, {})
        put(other, "never", 4)
        restore_store(other, copy)
        assert all(torch.equal(get(other, name), data) for name, data in kept.items())
        assert not other.written("never") and "never" not in other.checksums
        # Nothing of it is committed yet.
        other.rollback()
        assert torch.equal(get(other, "a"), content(PIECES[0], 3))
        restore_store(other, copy)
        other.commit(4, {})
        other.close()
        again = make(tmp_path / f"into{directories}", pieces, directories)
        assert again.open()["step"] == 4 and not again.written("never")
        assert all(torch.equal(get(again, name), data) for name, data in kept.items())
        again.close()
    store.close()


def test_damage_is_not_copied_as_if_it_were_content(tmp_path):
    store = make(tmp_path)
    put(store, "a", 1)
    put(store, "b", 2)
    store.commit(1, {})
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
    save_store(store, tmp_path / "good")
    unit = store.plan.units["b"][store.current["b"]][0]
    flip(store, unit, 4999)
    with pytest.raises(
        UserError, match=r"b is damaged \(.*data.bin, 8,192 .* written there; delete"
    ):
        save_store(store, tmp_path / "bad")
    flip(store, unit, 4999)
    # A copy whose bits changed while nobody looked (a resumed run checks its files first).
    with (tmp_path / "good" / "offload.bin").open("rb+") as file:
        file.seek(3 * ALIGN)
        file.write(b"x")
    with pytest.raises(UserError, match=r"offload.bin: b is damaged, .*; resume from another chec"):
        restore_store(store, tmp_path / "good")
    store.rollback()
    assert torch.equal(get(store, "b"), content(PIECES[1], 2))
    store.close()


def test_a_copy_is_read_without_being_changed(tmp_path):
    store = make(tmp_path)
    put(store, "a", 1)
    save_store(store, tmp_path)
    path = tmp_path / "offload.bin"
    path.chmod(0o444)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    copy = open_copy(tmp_path, store.plan)
    assert torch.equal(get(copy, "a"), get(store, "a"))
    assert copy.written("a") and not copy.written("b")
    copy.close()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    with pytest.raises(UserError, match="another shape; resume with the recipe that wrote it"):
        open_copy(tmp_path, Plan(PIECES[:1]))
    store.close()


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_copy_shares_blocks_where_the_file_system_can(tmp_path, mounted, kind):
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"needs mkfs.{kind}")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(320 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
    place = mounted("disk", "loop", kind, image)
    store = make(place, [*PIECES, Piece("big", 4 * UNIT)])
    data = {name: put(store, name, 1) for name in ("a", "big")}
    store.commit(0, {})
    os.sync()
    before = shutil.disk_usage(place).used
    save_store(store, place)
    os.sync()
    assert (place / "offload.bin").stat().st_size > 4 * UNIT
    assert shutil.disk_usage(place).used - before < UNIT
    # Shared until one of them is written.
    put(store, "big", 2)
    store.commit(1, {})
    put(store, "big", 3)
    store.flush()
    copy = open_copy(place, store.plan)
    assert all(torch.equal(get(copy, name), piece) for name, piece in data.items())
    copy.close()
    store.close()
