"""Tables of labeled texts: formats, splits and error messages."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_language import reviews, write_table

from nipq_search.errors import UserError
from nipq_search.tasks.text.splits import TextSplits, split_rows
from nipq_search.tasks.text.table import Row, TextTable, read_rows

CSV = 'text,label,other\n"one, two\nthree ""four""",1,5.5\nplain,0,x\n'
ROWS = [Row(text='one, two\nthree "four"', label="1"), Row(text="plain", label="0")]


def table(path, **changes):
    return TextTable(path=str(path), **{"text": "text", "label": "label", **changes})


def split(rows, *, files=None, labels=None, **changes):
    used = table("unused.csv", labels=labels)
    splits = TextSplits(**{"validation": 0.2, "test": 0.2, **changes})
    given = {str(Path(name).absolute()): rows for name, rows in (files or {}).items()}
    return split_rows(rows, used, splits, lambda path, key: given[path])


def as_rows(count=200):
    return [Row(text=r["review"], label=r["verdict"], group=r["film"]) for r in reviews(count)]


@pytest.mark.parametrize("end", ["", ".gz", ".bz2"])
def test_csv_with_quotes_and_line_breaks(tmp_path, end):
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[end]
    path = tmp_path / f"table.csv{end}"
    path.write_bytes(pack(CSV.encode()))
    assert read_rows(table(path)) == ROWS


def test_quotes_in_tsv_are_characters(tmp_path):
    (tmp_path / "dev.tsv").write_text('1\t"a\n0\tb "c"\n')
    found = read_rows(table(tmp_path / "dev.tsv", columns=["label", "text"]))
    assert found == [Row(text='"a', label="1"), Row(text='b "c"', label="0")]


def test_parquet(tmp_path):
    content = pyarrow.table({"text": ["a", None], "label": [3, 4], "more": [1.0, 2.0]})
    pyarrow.parquet.write_table(content, tmp_path / "t.parquet")
    found = read_rows(table(tmp_path / "t.parquet"))
    assert found == [Row(text="a", label="3"), Row(text="", label="4")]


def test_a_lone_quote_inside_a_value_is_a_character(tmp_path):
    (tmp_path / "t.csv").write_text('text,label\n5" wide,1\n')
    assert read_rows(table(tmp_path / "t.csv"))[0].text == '5" wide'


@pytest.mark.parametrize("name", ["text", "label"])
@pytest.mark.parametrize("values", [[["a"], ["b"]], [b"a", b"b"], [0.0, 1.0]])
def test_columns_of_other_kinds_are_named(tmp_path, name, values):
    content = pyarrow.table({"text": ["a", "b"], "label": [0, 1], name: values})
    pyarrow.parquet.write_table(content, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=f"{name}: column .{name}. of .*, not text or in"):
        read_rows(table(tmp_path / "t.parquet"))


def test_a_file_in_utf_16_is_read(tmp_path):
    (tmp_path / "t.csv").write_bytes("text,label\na,1\n".encode("utf-16"))
    assert read_rows(table(tmp_path / "t.csv", encoding="utf-16"))[0].text == "a"


def test_another_encoding(tmp_path):
    (tmp_path / "t.csv").write_bytes("text,label\nné,1\n".encode("latin-1"))
    assert read_rows(table(tmp_path / "t.csv", encoding="latin-1"))[0].text == "né"
    with pytest.raises(UserError, match=r"t.csv: byte 12 is not valid utf-8; .* latin-1"):
        read_rows(table(tmp_path / "t.csv"))
    with pytest.raises(UserError, match="'utf8000' is not a known encoding"):
        read_rows(table(tmp_path / "t.csv", encoding="utf8000"))


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        (
            "t.csv",
            b"text,lable\na,1\n",
            r"args.label: .* no column 'label' \(did you mean 'lable'",
        ),
        ("t.csv", b"a,b\n1,2,3\n", "cannot be read as a table: .*Expected 2 columns, got 3"),
        ("t.csv", b"", "cannot be read as a table"),
        ("t.txt", b"a,b\n", "must end in one of .csv, .tsv, .tab, .parquet"),
        ("t.csv.bz2", b"text,label\n", "cannot be decompressed as .bz2"),
        ("t.csv.gz", b"text,label\n", "cannot be decompressed as .gz"),
        (
            "t.csv.gz",
            gzip.compress(b"text,label\n", mtime=0)[:-9],
            "cannot be decompressed as .gz",
        ),
        ("t.parquet", b"PAR1", "cannot be read as a table"),
        ("t.csv", b"text,label\n", "t.csv has columns but no rows"),
        ("t.csv", b"text,text,label\na,b,1\n", "args.text: .* has 2 columns 'text'"),
        ("t.csv", b'text,label\na,1\n"b,0\nc,1\n', "the quote on line 3 is not closed"),
        ("t.csv", b'label,text\n1,a\n0,"b\n1,c\n', "the quote on line 3 is not closed"),
        ("t.csv", "text,label\n".encode("utf-16"), "encoded as UTF-16; .*encoding: utf-16"),
        ("t.csv", "text,label\na,1\n".encode("utf-16-le"), "not a text file"),
        ("t.csv", b"\x89PNG\x00\xff\xfe", "not a text file, because it contains NUL bytes"),
    ],
)
def test_bad_tables_are_named_in_one_line(tmp_path, name, data, problem):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=problem) as error:
        read_rows(table(tmp_path / name))
    assert "\n" not in str(error.value)


def test_no_group_and_no_text_is_in_two_splits():
    rows = as_rows()
    found = split([*rows, *rows[:30]])
    assert found.classes == ("bad", "good")
    assert found.dropped["duplicate"] >= 30
    groups = [{row.group for row in part} for part in found.rows.values()]
    texts = [{row.text for row in part} for part in found.rows.values()]
    for sets in (groups, texts):
        assert len(set.union(*sets)) == sum(map(len, sets))
    assert [len(names) for names in groups] == [12, 4, 4]
    assert split(rows, split_seed=1).rows != found.rows


def test_rows_without_groups_keep_the_classes_in_proportion():
    rows = [Row(text=str(n), label="b" if n % 4 else "a") for n in range(400)]
    found = split(rows, train_samples=40)
    counts = {k: [r.label for r in part].count("a") for k, part in found.rows.items()}
    assert counts == {"train": 10, "validation": 20, "test": 20}


def test_splits_from_files_take_their_texts_and_groups_from_the_table():
    rows = as_rows()
    own = rows[:8]
    found = split(rows, validation=("dev",), files={"dev": own})
    kept = {row.content for row in found.rows["validation"]}
    assert kept == {row.content for row in own}
    for name in ("train", "test"):
        assert not kept & {row.content for row in found.rows[name]}
        assert not {r.group for r in own} & {r.group for r in found.rows[name]}


def test_other_labels_are_dropped_and_whole_numbers_sort_as_such():
    rows = [Row(text=str(n), label=str(n % 12)) for n in range(240)]
    assert split(rows).classes == tuple(map(str, range(12)))
    found = split(rows, labels=("11", "2"))
    assert found.classes == ("11", "2") and found.dropped == {"label": 200}


@pytest.mark.parametrize(
    ("rows", "changes", "problem"),
    [
        (
            [Row(text="a", label=""), Row(text="b", label="x")],
            {},
            "label: .* empty in 1 of 2 rows",
        ),
        ([Row(text=str(n), label=str(n)) for n in range(1001)], {}, "1001 distinct values"),
        ([Row(text=str(n), label="x") for n in range(50)], {}, "one class, x; at least two are"),
        (as_rows(), {"labels": ("Good", "bad")}, r"labels: .* 'Good' \(did you mean 'good'\?\)"),
        (
            [Row(text=str(n), label=f"{n % 9}.5") for n in range(99)],
            {},
            "such as 0.5 instead",
        ),
        (
            [*as_rows(), *(Row(text=f"{n % 2}", label="rare") for n in range(8))],
            {"validation": 0.01},
            "class 'rare' has no row .*dropped rows: .*6 with a duplicate text",
        ),
        (as_rows(), {"train_samples": 999}, "train_samples: 999 exceeds the 1"),
        (as_rows(4), {}, "class 'bad' has no row in the (train|validation|test) split"),
        (as_rows(), {"train_samples": 1}, "train_samples: class '.*' has no row in the train"),
    ],
)
def test_bad_labels_are_named_in_one_line(rows, changes, problem):
    with pytest.raises(UserError, match=problem) as error:
        split(rows, **changes)
    assert "\n" not in str(error.value)


def test_rows_without_text_are_dropped():
    rows = [Row(text=" " * n if n < 5 else str(n), label=str(n % 2)) for n in range(100)]
    assert split(rows).dropped == {"empty": 5}


def test_all_columns_are_read(tmp_path):
    path = write_table(tmp_path / "r.csv", reviews(3))
    columns = {"text": "review", "label": "verdict", "text_pair": "film", "group": "film"}
    row = read_rows(table(path, **columns))[0]
    assert (row.text_pair, row.group, row.label) == ("film 0", "film 0", "bad")
