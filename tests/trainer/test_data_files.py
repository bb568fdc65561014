"""Reading files: every kind, packed or not, row by row; what cannot be read names file and line."""

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest

from finetune_api.causes import Cause
from finetune_trainer.data.files import read_rows
from finetune_trainer.data.records import BadRowError
from finetune_trainer.fetching.wanted import data_files, data_kind, local_files, split_pattern
from finetune_trainer.outcome import RunError


def lines(path: Path, split: str = "") -> list[tuple[str, dict]]:
    return [(str(place), row) for place, row in read_rows(path, split)]


def test_jsonl_with_blank_lines_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"a": "é"}\n\n{"a": 2}'.encode())
    assert lines(file) == [("a.jsonl:1", {"a": "é"}), ("a.jsonl:3", {"a": 2})]


def test_json_lists_know_the_line_of_each_row(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"a": [1]}, {"a": 2}], indent=2))
    assert lines(file) == [("a.json:2", {"a": [1]}), ("a.json:7", {"a": 2})]


def test_json_lines_under_the_name_json(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}\n{"a": 2}\n')
    assert lines(file) == [("a.json:1", {"a": 1}), ("a.json:2", {"a": 2})]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"instruction": ["a", "b"], "output": ["c", "d"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert lines(tmp_path)[1] == ("a.parquet:2", {"instruction": "b", "output": "d"})


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name in ("b.jsonl", "a.json", ".hidden.jsonl", "README.md"):
        (tmp_path / name).write_text(f'{{"from": "{name}"}}')
    assert [row["from"] for _, row in lines(tmp_path)] == ["a.json", "b.jsonl"]


def test_the_split_of_a_hub_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"a": "{split} 1"}}\n{{"a": "{split} 2"}}\n')
    assert lines(tmp_path, "test") == [("split test:1", {"a": "test 1"}), ("split test:2", {"a": "test 2"})]
    with pytest.raises(RunError, match="split 'nope' of the data set cannot be read"):
        lines(tmp_path, "nope")


ROWS = [{"text": "one\ntwo", "label": "a"}, {"text": '你好, "x"', "label": "b"}]


def pack_zst(content: bytes) -> bytes:
    return bytes(pytest.importorskip("pyarrow").compress(content, "zstd"))


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": pack_zst}


@pytest.mark.parametrize(("ending", "pack"), list(PACKED.items()))
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_every_kind_is_read_packed_and_unpacked(tmp_path, kind, ending, pack):
    content = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "json": json.dumps(ROWS),
        "csv": 'text,label\n"one\ntwo",a\n"你好, ""x""",b\n',
        "txt": "one\n\n你好\n",
    }[kind]
    file = tmp_path / f"a.{kind}{ending}"
    file.write_bytes(pack(content.encode()))
    expected = [{"text": "one"}, {"text": "你好"}] if kind == "txt" else ROWS
    assert [row for _, row in lines(file)] == expected


def test_a_csv_row_of_several_lines_is_named_by_its_first(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n"x\ny",1\n\n2,3\n4\n')
    (first, _), (second, row), (third, bad) = lines(tmp_path / "a.csv")
    assert (first, second, third) == ("a.csv:2", "a.csv:5", "a.csv:6") and row == {"a": "2", "b": "3"}
    assert isinstance(bad, BadRowError) and str(bad).startswith("1 cells; accepted: 2")


def test_a_quotation_mark_in_a_tsv_is_part_of_the_cell(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"quoted\t1\nand "here"\t0\n')
    assert [row["text"] for _, row in lines(tmp_path / "a.tsv")] == ['"quoted', 'and "here"']


@pytest.mark.parametrize("writer", ["new_file", "new_stream"])
def test_arrow_files_and_streams(tmp_path, writer):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["a", "b", "c"]})
    with getattr(pyarrow.ipc, writer)(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=2)
    assert lines(tmp_path / "a.arrow")[2] == ("a.arrow:3", {"text": "c"})


def test_what_datasets_saved_is_read_with_the_names_of_its_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(names), "label": names}
    )
    made = datasets.Dataset.from_dict({"tokens": [["Ada", "runs"]], "tags": [[1, 0]], "label": [-1]}, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "a.parquet"))
    expected = {"tokens": ["Ada", "runs"], "tags": ["B-PER", "O"], "label": None}
    assert [row for _, row in lines(tmp_path / "saved")] == [expected]
    assert [row for _, row in lines(tmp_path / "a.parquet")] == [expected]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [("a.txt:1", "one"), ("a.txt:2", "two"), ("a.txt:5", "three")]),
        ("paragraph", [("a.txt:1", "one\ntwo"), ("a.txt:5", "three")]),
        ("document", [("a.txt:1", "one\ntwo\n\n\nthree")]),
    ],
)
def test_what_of_a_text_is_one_row(tmp_path, unit, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert [(str(place), row["text"]) for place, row in read_rows(tmp_path / "a.txt", unit=unit)] == expected


def test_columns_of_words_and_tags(tmp_path):
    (tmp_path / "a.txt").write_text("-DOCSTART- -X- O O\n\nAda NNP B-PER\nruns VBZ O\n\nalone\n")
    (_, first), (place, bad) = read_rows(tmp_path / "a.txt", unit="conll")
    assert first == {"tokens": ["Ada", "runs"], "tags": ["B-PER", "O"]}
    assert str(place) == "a.txt:6" and "one column" in str(bad)


def test_a_large_list_and_a_large_table_are_read_in_constant_memory(tmp_path):
    row = {"text": "word " * 200, "label": "x"}
    (tmp_path / "a.json").write_text(json.dumps([row] * 8_000))
    (tmp_path / "a.csv").write_text("text,label\n" + f"{row['text']},x\n" * 8_000)
    for name in ("a.json", "a.csv"):
        tracemalloc.start()
        assert sum(1 for _ in read_rows(tmp_path / name)) == 8_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * 2**20 < (tmp_path / name).stat().st_size


def test_a_list_whose_elements_do_not_fit_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_trainer.data.files._PIECE", 7)
    rows = [{"a": "x" * size, "b": [{}, "]"]} for size in (0, 1, 5, 30, 2, 100)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert [row for _, row in lines(tmp_path / "a.json")] == rows


def test_patterns_and_folders(tmp_path):
    for name in (
        "a/one.jsonl",
        "a/b/two.jsonl.gz",
        "a/b/three.csv",
        "a/.hidden/x.jsonl",
        "a/LICENSE.txt",
        "a/state.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def found(pattern: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in local_files(tmp_path / pattern)]

    assert found("a") == ["a/b/three.csv", "a/b/two.jsonl.gz", "a/one.jsonl"]
    assert found("a/*.jsonl") == ["a/one.jsonl"]
    assert found("a/**/*.jsonl*") == ["a/b/two.jsonl.gz", "a/one.jsonl"]
    assert found("a/?/t[a-h]ree.csv") == ["a/b/three.csv"]
    assert found("*/*.txt") == ["a/LICENSE.txt"]
    assert data_files(["b.txt", "a.txt"]) == ["a.txt", "b.txt"]
    assert split_pattern("s3://b/x/part-*.jsonl") == ("s3://b/x", "part-*.jsonl")
    assert split_pattern("s3://b/x.jsonl") == ("s3://b/x.jsonl", "")
    assert [data_kind(name) for name in ("a.jsonl.zst", "a.parquet", "a.parquet.gz", "a.gz", "a.md")] == [
        *(".jsonl", ".parquet", "", "", "")
    ]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl:2: not JSON (Expecting value"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl:2: the row is a list; accepted: an object"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, "a.jsonl:2: not JSON (maximum recursion"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl:2: not UTF-8"),
        ("a.txt", b"a\n\xff\n", "a.txt:2: not UTF-8"),
    ],
)
def test_a_row_that_cannot_be_read_is_given_in_its_place(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    (_, row), (place, bad) = read_rows(tmp_path / name)
    assert isinstance(row, dict) and isinstance(bad, BadRowError)
    assert f"{place}: {bad}".startswith(complaint)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a\.json:2: not JSON"),
        ("a.json", b'[{"a": 1},\n', r"a\.json:2: the list is not closed"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json cannot be read"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: the first row, which names the columns, repeats a"),
        ("a.csv", b"a,b\n1,\xff\n", r"a\.csv"),
        ("a.jsonl.gz", b"nonsense", r"a\.jsonl\.gz cannot be read \(Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n', mtime=0)[:-9],
            r"a\.jsonl\.gz cannot be read \(Compressed file ended",
        ),
        ("a.jsonl.xz", b"nonsense", r"a\.jsonl\.xz cannot be read"),
        ("a.jsonl.zst", b"nonsense", r"a\.jsonl\.zst cannot be read"),
        ("a.parquet", b"nonsense", r"a\.parquet cannot be read"),
        ("a.arrow", b"nonsense", r"a\.arrow cannot be read"),
        ("a.xlsx", b"", r"a\.xlsx is no data file; accepted: names that end in \.jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=complaint) as error:
        lines(tmp_path / name)
    assert error.value.cause is Cause.INVALID_DATA


# --- what a file's own form puts into its rows ------------------------------------------------------------------------

PADDED = [
    {"calls": [{"name": "a", "arguments": {"city": "Rome", "days": None}}], "note": None},
    {"calls": [{"name": "b", "arguments": {"city": None, "days": 2}}], "note": "x"},
]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_file_gives_an_object_no_fields_of_others(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    table, file = pyarrow.Table.from_pylist(PADDED), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, file)
    else:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert [row["calls"][0]["arguments"] for _, row in lines(file)] == [{"city": "Rome"}, {"days": 2}]
    assert [row["note"] for _, row in lines(file)] == [None, "x"], "of the row itself the columns stay"


def test_a_null_that_a_row_of_json_lines_has_is_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, PADDED)))
    assert [row for _, row in lines(tmp_path / "a.jsonl")] == PADDED


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_is_a_bad_row(tmp_path, name):
    good, bad = {"a": "whole \U0001f600"}, '{"a": ["Hi \\ud83d there"]}'
    rows = [json.dumps(good), bad, json.dumps({"a": "\\ud83d is six characters"})]
    (tmp_path / name).write_text("\n".join(rows) if name == "a.jsonl" else "[" + ",\n".join(rows) + "]")
    [(_, first), (place, second), (_, third)] = lines(tmp_path / name)
    assert first == good and isinstance(second, BadRowError) and third == {"a": "\\ud83d is six characters"}
    assert place == f"{name}:2" and "it holds \\ud83d, half a character" in str(second)
