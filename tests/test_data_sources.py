"""Documents from files: what is read, under which names, and what is said of the rest."""

import gzip
import json
import os
import sys

import pytest
import zstandard

from data.config import SourceConfig
from data.readers import Document
from data.report import NAMES_KEPT, SourceReport
from data.sources import check_disjoint, documents, find_source
from data.split import HoldOut, check_split, choose_hold_out, is_held_out


def read(path, min_bytes=1, field="text"):
    report = SourceReport(str(path))
    source = find_source(SourceConfig(str(path), field=field))
    return list(documents(source, min_bytes, report)), report


def test_folder_is_read_recursively_in_sorted_order_by_relative_name(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.txt", "b/a.py", "a.txt", ".hidden"):
        (tmp_path / name).write_text(f"text of {name}")
    found, report = read(tmp_path)
    assert [(d.name, d.text) for d in found] == [
        (name, f"text of {name}") for name in ("a.txt", "b/a.py", "z.txt")
    ]
    assert (report.files, report.documents) == (3, 3)
    assert report.text_bytes == sum(d.text_bytes for d in found)


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path):
    for parent in ("here", "over/there"):
        (tmp_path / parent / "sub").mkdir(parents=True)
        (tmp_path / parent / "sub/x.txt").write_text("x")
    names = [[d.name for d in read(tmp_path / p)[0]] for p in ("here", "over/there")]
    assert names[0] == names[1] == ["sub/x.txt"]


def test_text_is_kept_byte_for_byte(tmp_path):
    content = "NUL \x00, CRLF\r\n, tab\t, é, 語, 🙂, no newline at end".encode()
    (tmp_path / "odd.txt").write_bytes(content)
    (document,), report = read(tmp_path)
    assert document.text.encode() == content
    assert document.text_bytes == len(content)
    assert not report.skipped


def test_bad_files_are_counted_and_named_and_do_not_stop_the_rest(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link.txt").symlink_to(tmp_path / "good.txt")
    found, report = read(tmp_path)
    assert [d.name for d in found] == ["good.txt"]
    assert report.names == {
        "unreadable": ["broken.txt"],
        "empty": ["empty.txt"],
        "not UTF-8": ["latin.txt"],
        "duplicate (link to a file already read)": ["link.txt"],
    }
    assert "left out: 1 duplicate" in report.lines()[0]
    assert "  not UTF-8: latin.txt" in report.lines()


def test_a_file_that_cannot_be_opened_is_reported(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "locked.txt").write_text("b")
    original = type(tmp_path).open

    def refuse(path, mode):
        if path.name == "locked.txt":
            raise PermissionError(13, "Permission denied")
        return original(path, mode)

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    found, report = read(tmp_path)
    assert [d.name for d in found] == ["a.txt"]
    assert report.names == {"unreadable": ["locked.txt"]}


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    original = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, report = read(tmp_path)
    assert [d.name for d in found] == ["a.txt"]
    assert report.names == {"unreadable": ["closed"]}


def test_min_bytes_counts_utf8_bytes(tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "wide.txt").write_text("語語")  # 2 characters, 6 bytes
    found, report = read(tmp_path, min_bytes=4)
    assert [d.name for d in found] == ["wide.txt"]
    assert report.names == {"empty": ["short.txt"]}


def test_empty_files_are_left_out_at_any_limit(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert read(tmp_path, min_bytes=0)[1].names == {"empty": ["empty.txt"]}


def test_report_keeps_the_first_names_and_counts_the_others():
    report = SourceReport("x")
    for number in range(NAMES_KEPT + 3):
        report.skip("empty", f"f{number}")
    assert report.skipped == {"empty": NAMES_KEPT + 3}
    assert report.lines()[1].endswith(f"f{NAMES_KEPT - 1} and 3 more")


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path):
    path = str(tmp_path).encode() + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("text")
    (document,), _ = read(tmp_path)
    assert document.name == r"caf\xe9.txt"


# ---- JSONL and Parquet ---------------------------------------------------------------------------


def test_jsonl_lines_are_documents_and_bad_lines_are_named(tmp_path):
    lines = [
        json.dumps({"text": "first"}),
        "",
        "{broken",
        json.dumps({"other": "no text"}),
        json.dumps(["a list"]),
        json.dumps({"text": 3}),
        '{"text": "\\ud800"}',
        json.dumps({"text": ""}),
        json.dumps({"text": "zweite é"}, ensure_ascii=False),
    ]
    (tmp_path / "d.jsonl").write_bytes("\r\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    found, report = read(tmp_path / "d.jsonl")
    assert [(d.name, d.text) for d in found] == [("d.jsonl:1", "first"), ("d.jsonl:9", "zweite é")]
    assert report.names == {
        "malformed line": ["d.jsonl:3"],
        "no text in field 'text'": ["d.jsonl:4", "d.jsonl:5", "d.jsonl:6"],
        "not UTF-8": ["d.jsonl:7", "d.jsonl:10"],
        "empty": ["d.jsonl:8"],
    }


def test_jsonl_field_is_chosen_by_name(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "no", "content": "yes"}))
    assert [d.text for d in read(tmp_path / "d.jsonl", field="content")[0]] == ["yes"]


def test_jsonl_is_read_line_by_line(tmp_path):
    """The first document comes before a later line is looked at."""
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{broken\n')
    report = SourceReport("d")
    stream = documents(find_source(SourceConfig(str(tmp_path / "d.jsonl"))), 1, report)
    assert next(stream).text == "a"
    assert not report.skipped
    assert list(stream) == []
    assert report.skipped == {"malformed line": 1}


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "three"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    found, report = read(tmp_path)
    assert [(d.name, d.text) for d in found] == [("a.parquet:1", "one"), ("a.parquet:3", "three")]
    assert report.names["no text in field 'text'"] == ["a.parquet:2"]
    assert report.names["not a Parquet file"] == ["b.parquet"]
    assert read(tmp_path / "a.parquet", field="body")[1].names == {
        "no text in field 'body'": ["a.parquet"]
    }


def test_parquet_without_pyarrow_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install pyarrow.*JSONL"):
        find_source(SourceConfig(str(tmp_path)))


RECORDS = [{"text": f'doc {i}, "quoted" é\nnext', "n": i} for i in range(3)]
TEXTS = [record["text"] for record in RECORDS]
LINES = "\n".join(json.dumps(record) for record in RECORDS).encode()
CELLS = [text.replace('"', '""') for text in TEXTS]
KINDS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=1).encode(),
    "A.CSV": ('n,"text"\n' + "\n".join(f'0,"{cell}"' for cell in CELLS)).encode(),
    "a.tsv": ("n\ttext\n" + "\n".join(f'0\t"{cell}"' for cell in CELLS)).encode(),
}
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_its_texts_compressed_or_not_with_a_mark_or_without(
    tmp_path, name, packed
):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packed]
    for mark in (b"", BOM):
        (tmp_path / (name + packed)).write_bytes(pack(mark + KINDS[name]))
        found, report = read(tmp_path / (name + packed))
        assert [document.text for document in found] == TEXTS
        assert [document.name for document in found] == [f"{name}{packed}:{n}" for n in (1, 2, 3)]
        assert not report.skipped


def test_one_object_over_several_lines_is_one_document(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[0], indent=2))
    (tmp_path / "two.json").write_text(json.dumps(RECORDS[0]))
    assert [d.text for d in read(tmp_path)[0]] == TEXTS[:1] * 2


def test_the_mark_of_byte_order_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + b"text")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(BOM + b"text"))
    found, _ = read(tmp_path)
    assert [(d.text, d.text_bytes) for d in found] == [("text", 4)] * 2


def test_compressed_text_in_several_parts_is_one_text(tmp_path):
    zstd = zstandard.ZstdCompressor().compress
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one, ") + gzip.compress(b"two"))
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"one, ") + zstd(b"two"))
    (tmp_path / "b.txt.zst").write_bytes(zstd(b"long " * 99_999))
    assert [d.text for d in read(tmp_path)[0]] == ["one, two"] * 2 + ["long " * 99_999]


@pytest.mark.parametrize("cut", [1, 9, 20])
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_cut_or_altered_compressed_file_is_named(tmp_path, packed, cut):
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packed]
    whole = pack(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(999)))
    (tmp_path / f"cut.jsonl{packed}").write_bytes(whole[:-cut])
    (tmp_path / f"no.txt{packed}").write_bytes(b"not compressed at all")
    found, report = read(tmp_path)
    assert {document.name.partition(":")[0] for document in found} <= {f"cut.jsonl{packed}"}
    named = [name for names in report.names.values() for name in names if ":" not in name]
    assert sorted(named) == [f"cut.jsonl{packed}", f"no.txt{packed}"]
    assert all("cut or damaged" in reason for reason in report.skipped if "line" not in reason)
    assert packed == ".zst" or len(found) > 900  # what comes before the damage


@pytest.mark.parametrize("first", [b'{"text": "caf\xe9"}', b'{"text": ', b"[1"])
def test_a_broken_first_line_of_json_lines_costs_no_other(tmp_path, first):
    (tmp_path / "a.json").write_bytes(first + b'\n{"text": "b"}\n{"text": "c"}\n')
    found, report = read(tmp_path)
    assert [d.text for d in found] == ["b", "c"]
    assert [name for names in report.names.values() for name in names] == ["a.json:1"]


def test_bad_json_and_csv_are_named_and_cost_no_other_document(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,n\ngood,1\nbad \xff,2\none, two,3\n\nlast,4\n")
    (tmp_path / "b.csv").write_bytes(b"label,n\nx,1\n")
    (tmp_path / "c.csv").write_bytes(b'text\ngood\n"never ended\n')
    (tmp_path / "d.json").write_bytes(b'[{"text": "a"},')
    (tmp_path / "e.json").write_bytes(b'[{"text": "good"}, "bare", {"no": 1}]')
    (tmp_path / "f.tar").write_bytes(b"x" * 512)
    found, report = read(tmp_path)
    assert [d.name for d in found] == ["a.csv:1", "a.csv:4", "c.csv:1", "e.json:1"]
    reasons = {name: reason for reason, names in report.names.items() for name in names}
    assert reasons.pop("c.csv").startswith("malformed CSV (unexpected end of data)")
    assert reasons == {
        "a.csv:2": "not UTF-8",
        "a.csv:3": "no text in field 'text'",
        "b.csv": "no text in field 'text'",
        "d.json": "malformed JSON",
        "e.json:2": "no text in field 'text'",
        "e.json:3": "no text in field 'text'",
        "f.tar": "an archive; unpack it",
    }


def test_a_cell_of_a_table_may_be_a_book(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"' + "word " * 100_000 + '"\n')
    assert [len(d.text) for d in read(tmp_path)[0]] == [500_000]


def test_a_bad_byte_in_parquet_costs_its_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array([b"ok", b"caf\xe9", b"fine"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    large = pyarrow.array(["ok", "", "fine"], pyarrow.large_string())
    for name, column in {"a": text, "b": raw, "c": large, "d": large.dictionary_encode()}.items():
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "e.parquet.gz").write_bytes(gzip.compress(whole))
    (tmp_path / "f.parquet").write_bytes(whole[:4] + bytes(20) + whole[24:])
    found, report = read(tmp_path)
    assert [d.name for d in found] == [f"{n}.parquet:{i}" for n in "abcd" for i in (1, 3)] + [
        "e.parquet.gz:1",
        "e.parquet.gz:3",
    ]
    assert report.names["not UTF-8"] == ["a.parquet:2", "b.parquet:2", "e.parquet.gz:2"]
    assert [n for names in report.names.values() for n in names if n[0] == "f"] == ["f.parquet"]


# ---- Paths ---------------------------------------------------------------------------------------


def test_one_file_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.py", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    names = lambda path: [d.name for d in read(path)[0]]  # noqa: E731
    assert names(tmp_path / "a.txt") == ["a.txt"]
    assert names(tmp_path / "*.txt") == ["a.txt"]
    assert names(tmp_path / "**/*.txt") == ["a.txt", "sub/c.txt"]
    assert names(tmp_path / "s*/*") == ["sub/c.txt"]


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.txt").write_text("a")
    (tmp_path / "real/loop").symlink_to(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "real")
    assert [d.name for d in read(tmp_path / "corpus")[0]] == ["linked/a.txt"]


def test_missing_path_and_empty_folder_name_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/nowhere does not exist"):
        find_source(SourceConfig(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=rf"no files match '\*\*/\*' in folder {tmp_path}"):
        find_source(SourceConfig(str(tmp_path)))
    with pytest.raises(ValueError, match=rf"'{tmp_path}/\*\.md'.*pattern in folder {tmp_path}"):
        find_source(SourceConfig(str(tmp_path / "*.md")))


def test_stdlib_is_the_interpreters_own_source():
    source = find_source(SourceConfig("stdlib"))
    names = [file.name for file in source.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "__pycache__", "idle_test"}
    assert source.fingerprint() == find_source(SourceConfig("stdlib")).fingerprint()


def test_fingerprint_follows_names_sizes_and_mtimes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(0, 1000))
    first = find_source(SourceConfig(str(tmp_path))).fingerprint()
    os.utime(path, ns=(0, 2000))
    touched = find_source(SourceConfig(str(tmp_path))).fingerprint()
    path.rename(tmp_path / "b.txt")
    renamed = find_source(SourceConfig(str(tmp_path))).fingerprint()
    assert len({first, touched, renamed}) == 3


def test_sources_that_share_a_file_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    sources = [find_source(SourceConfig(str(p))) for p in (tmp_path, tmp_path / "*.txt")]
    with pytest.raises(ValueError, match=r"both hold .*a\.txt"):
        check_disjoint(sources)
    check_disjoint(sources[:1])


# ---- Split ---------------------------------------------------------------------------------------


def test_split_takes_its_share_and_raising_it_only_adds():
    names = [f"doc{n}" for n in range(4000)]
    small, large = ({n for n in names if is_held_out(n, share)} for share in (0.05, 0.2))
    assert small < large
    assert len(small) / len(names) == pytest.approx(0.05, abs=0.015)  # 4 sigma
    assert len(large) / len(names) == pytest.approx(0.2, abs=0.026)
    assert not any(is_held_out(n, 0.0) for n in names)


def corpus_of(*sizes: int) -> list[Document]:
    return [Document(f"f{n}", "word " * size, 5 * size) for n, size in enumerate(sizes)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32, 100])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.9])
def test_no_side_of_a_small_corpus_is_empty(count, share):
    for first in range(20):
        found = [Document(f"{first}/{n}", "some words " * 99, 1089) for n in range(count)]
        hold_out = choose_hold_out(found, share)
        sides = [side for document in found for side in hold_out.sides(document)]
        assert {out for _, out in sides} == {True, False}
        assert "".join(d.text for d, _ in sides) == "".join(d.text for d in found)  # nothing lost
        assert all(d.text_bytes == len(d.text.encode()) for d, _ in sides)
        if hold_out.name:
            held = sum(d.text_bytes for d, out in sides if out)
            assert held <= max(1.1 * share, 0.02) * 1089 * count + 20


def test_where_the_hash_serves_it_decides_as_ever():
    found = corpus_of(*[9] * 100)
    hold_out = choose_hold_out(iter(found), 0.2)
    assert hold_out == HoldOut(0.2)
    assert all(hold_out.sides(d) == [(d, is_held_out(d.name, 0.2))] for d in found)
    assert choose_hold_out(found, 0.0) == HoldOut(0.0)
    assert not any(out for d in found for _, out in HoldOut(0.0).sides(d))


def test_one_document_holds_out_its_last_lines():
    text = "".join(f"line {n} é\n" for n in range(100))
    (document,) = [Document("only.txt", text, len(text.encode()))]
    hold_out = choose_hold_out([document], 0.05)
    (head, _), (tail, _) = hold_out.sides(document)
    assert head.text + tail.text == text
    assert tail.text.startswith("line 9")
    assert str(hold_out) == "the last 0.05 of only.txt"


def test_a_large_document_of_two_is_not_held_out_whole():
    for large in (0, 1):
        found = corpus_of(*[10_000 if n == large else 1 for n in range(2)])
        sides = [s for d in found for s in choose_hold_out(found, 0.05).sides(d)]
        assert sum(d.text_bytes for d, out in sides if out) <= 0.05 * 50_005 + 5


def test_too_little_text_for_two_sides_names_the_option():
    check_split("s", 5, 0, 0.0)
    check_split("s", 5, 1, 0.1)
    assert (
        choose_hold_out([Document("a", "x", 1)], 0.05).sides(Document("a", "x", 1))[0][1] is False
    )
    with pytest.raises(ValueError, match=r"1 documents are too little text.*--data.held-out 0"):
        check_split("s", 1, 0, 0.05)
