"""Sources: what they read, where they stand, and what they say of bad rows."""

import csv

import pytest
from support import TEXT, write_jsonl

from mnemic.train.data.rows import BadRow, BadRows, Row
from mnemic.train.data.sources import (
    CsvSource,
    JsonlSource,
    ListSource,
    ParquetSource,
    TextSource,
    find_files,
    open_source,
)
from mnemic.train.data.stream import Reader, one_pass
from mnemic.train.errors import UserError
from mnemic.train.recipe.data import HubData


def make(kind, folder):
    rows = [{"text": f"row {i}, with a 'quote' and\na line break"} for i in range(25)]
    if kind == "jsonl":
        paths = [write_jsonl(folder / f"{n}.jsonl", rows[s]) for n, s in
                 (("a", slice(10)), ("b", slice(10, None)))]  # fmt: skip
        return JsonlSource(paths)
    if kind == "csv":
        path = folder / "a.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["text"], *([r["text"]] for r in rows)])
        return CsvSource([path], {}, ",")
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=7)
        return ParquetSource([folder / "a.parquet"], {})
    if kind == "hub":
        pytest.importorskip("datasets")
        write_jsonl(folder / "hub.jsonl", rows)
        source = open_source(HubData(name=str(folder)))
        return source
    if kind == "list":
        return ListSource(rows, "list")
    (folder / "t.txt").write_text(TEXT)
    (folder / "u.txt").write_text("öäü€😀" * 5000 + "\nsecond\n\nthird")
    document = kind.split("-")[1]
    return TextSource([folder / "t.txt", folder / "u.txt"], document)


KINDS = ["jsonl", "csv", "parquet", "hub", "list", "text-file", "text-line", "text-paragraph"]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_exactly_behind_any_row(tmp_path, kind):
    source = make(kind, tmp_path)
    rows = list(source.read(None))
    assert len(rows) >= 4 and all(isinstance(row, Row) for row in rows)
    for index, row in enumerate(rows):
        if index % 5 == 0 or index > len(rows) - 3:
            rest = list(source.read(row.after))
            assert [r.fields for r in rest] == [r.fields for r in rows[index + 1 :]]


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_text_is_read_whole_and_in_order(tmp_path, document):
    source = make(f"text-{document}", tmp_path)
    rows = list(source.read(None))
    joined = "".join(row.fields["text"] for row in rows)
    expected = TEXT + (tmp_path / "u.txt").read_text()
    if document == "file":
        assert joined == expected
        assert [row.fields["last"] for row in rows].count(True) == 2
    else:
        assert joined.replace("\n", "") == expected.replace("\n", "")


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("name", ["t.txt", "u.txt"])
def test_the_shares_of_a_text_meet_and_do_not_overlap(tmp_path, share, name):
    make("text-file", tmp_path)
    path = tmp_path / name
    parts = []
    for low, high in ((0.0, 1 - share), (1 - share, 1.0)):
        source = TextSource([path])
        source.share = (low, high)
        parts.append("".join(row.fields["text"] for row in source.read(None)))
    assert "".join(parts) == path.read_text()
    assert abs(len(parts[1].encode()) / path.stat().st_size - share) < 0.2 and parts[1]


def test_jsonl_bad_rows_name_file_line_and_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n[1]\n\xff\xfe\x00\n{"text": 1,}\n\n{"text": "cut')
    rows = list(JsonlSource([path]).read(None))
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.where for row in bad] == [f"{path}:{n}" for n in (2, 3, 4, 6)]
    assert "a JSON list, not an object" in bad[0].reason
    assert "not UTF-8" in bad[1].reason
    assert "not valid JSON" in bad[2].reason
    assert "truncated" in bad[3].reason


def test_csv_bad_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n3\n"x,4\n')
    rows = list(CsvSource([path], {}, ",").read(None))
    assert isinstance(rows[0], Row)
    assert "1 cells under 2 columns" in rows[1].reason and rows[1].where == f"{path}:3"
    assert "not valid CSV" in rows[2].reason


def test_text_bad_rows(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" + b"\0\1\2" * 10)
    (row,) = TextSource([path]).read(None)
    assert isinstance(row, BadRow) and "binary" in row.reason
    path.write_bytes(b"caf\xe9\n")
    (row,) = TextSource([path]).read(None)
    assert isinstance(row, BadRow) and "not UTF-8" in row.reason


def test_columns_are_renamed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": 1, "a": 2, "z": 3}, {"q": 1}])
    good, bad = JsonlSource([path], {"prompt": "q", "completion": "a"}).read(None)
    assert good.fields == {"prompt": 1, "completion": 2, "z": 3}
    assert "no column 'a'" in bad.reason


def test_bad_rows_stop_or_are_counted(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nnope\n' * 10)
    with pytest.raises(UserError, match=r"a.jsonl:2: not valid JSON.*data.on_bad_row=skip"):
        one_pass(Reader(JsonlSource([path]), BadRows("stop")))
    bad = BadRows("skip")
    assert len(one_pass(Reader(JsonlSource([path]), bad))) == 10
    assert bad.count == 10
    assert len(caplog.records) == BadRows.REPORTED and "only counted" in caplog.text


def test_only_bad_rows_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("nope\n")
    with pytest.raises(UserError, match="no usable row"):
        one_pass(Reader(JsonlSource([path]), BadRows("skip", quiet=True)))


@pytest.mark.parametrize(
    ("name", "words"), [("none.txt", "not found"), ("*.nope", "not found"), (".", "is a folder")]
)
def test_missing_files(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        find_files(name, "data")


def test_empty_file_is_an_error(tmp_path):
    (tmp_path / "e.txt").touch()
    with pytest.raises(UserError, match="is empty"):
        find_files(str(tmp_path / "e.txt"), "data")
