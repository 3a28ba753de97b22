"""Token stores and `prepare`: contents, caching, atomicity, byte counts, error messages."""

import concurrent.futures
import dataclasses
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import SEQ_LEN, prepared, write_corpus

from data import prepare as prepare_module
from data import report, storage, store
from data import split as split_module
from data.config import DataConfig, SourceConfig
from data.prepare import check_config, prepare
from data.sources import find_source
from data.split import is_held_out
from data.store import find_store
from data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, prepared(folder)


def texts(split, tokenizer):
    """Documents of a split as text, after checking that each ends in its only eos."""
    rows = split.read(list(zip(split.offsets[:-1], split.offsets[1:], strict=True)))
    for row in rows:
        assert row[-1] == tokenizer.eos_id
        assert (row == tokenizer.eos_id).sum() == 1
    return [tokenizer.decode(row[:-1]) for row in rows]


def test_every_document_is_stored_once_in_its_split(corpus):
    folder, p = corpus
    files = sorted((folder / "text").iterdir())
    train, held_out = (
        [file.read_text() for file in files if is_held_out(file.name, 0.2) is out]
        for out in (False, True)
    )
    assert texts(p.stores[0].train, p.tokenizer) == train
    assert texts(p.stores[0].held_out, p.tokenizer) == held_out
    assert len(train) + len(held_out) == 40
    assert held_out


def test_counts_in_the_metadata_are_those_of_the_arrays(corpus):
    _, p = corpus
    for name, split in (("train", p.stores[0].train), ("held_out", p.stores[0].held_out)):
        counts = p.stores[0].meta["splits"][name]
        assert split.offsets[-1] == split.tokens == counts["tokens"]
        assert split.documents == counts["documents"] == len(split.offsets) - 1
        text_bytes = sum(len(text.encode()) for text in texts(split, p.tokenizer))
        assert split.text_bytes == counts["bytes"] == text_bytes
    assert p.stores[0].meta["tokenizer_sha256"] == p.tokenizer.sha256
    assert p.stores[0].meta["byte_exact"] is True


def test_held_out_text_is_the_held_out_documents_end_to_end(corpus):
    _, p = corpus
    text = b"".join(p.stores[0].held_out_text())
    assert text.decode() == "".join(texts(p.stores[0].held_out, p.tokenizer))
    assert len(text) == p.stores[0].held_out.text_bytes
    assert (Path(p.stores[0].place) / "held_out_text/00000.txt").read_bytes() == text


def test_the_tokenizer_never_sees_held_out_text(tmp_path):
    """Merges of a word that only held-out documents have would flatter the held-out loss."""
    folder = write_corpus(tmp_path / "text", files=30, alphabet="abc")
    for file in folder.iterdir():
        if is_held_out(file.name, 0.2):
            file.write_text("xyzzy " * 50)
    p = prepared(tmp_path, SourceConfig(str(folder)))
    assert len(p.tokenizer.encode("xyzzy")) == 5
    assert len(p.tokenizer.encode("abc")) < 3


def test_ids_take_two_bytes_or_four(tmp_path, corpus):
    assert corpus[1].stores[0].meta["dtype"] == "uint16"
    large = train_tokenizer(["ab"], (1 << 16) + 1)
    (tmp_path / "tokenizer.json").write_text(large.json, "utf-8")
    p = prepared(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    assert p.stores[0].meta["dtype"] == "uint32"
    assert p.tokenizer.vocab_size == 65537


def test_shards_text_parts_and_batches_join_without_a_seam(tmp_path, monkeypatch, corpus):
    """Tiny limits put every border inside the corpus; the contents stay the same."""
    for name, value in (("SHARD", 64), ("CHUNK", 16), ("TEXT_PART", 100), ("BATCH_BYTES", 500)):
        monkeypatch.setattr(store, name, value)
    p, whole = prepared(tmp_path), corpus[1]
    assert p.stores[0].meta["held_out_text_parts"] > 1
    assert len(list(Path(p.stores[0].place, "train/tokens/c").iterdir())) > 1
    assert list(p.stores[0].held_out_text()) != list(whole.stores[0].held_out_text())
    assert b"".join(p.stores[0].held_out_text()) == b"".join(whole.stores[0].held_out_text())
    for name in ("train", "held_out"):
        small, large = getattr(p.stores[0], name), getattr(whole.stores[0], name)
        np.testing.assert_array_equal(small.offsets, large.offsets)
        np.testing.assert_array_equal(*(s.read([(0, s.tokens)])[0] for s in (small, large)))


def test_reading_from_many_threads_gives_what_one_reads(corpus):
    split = corpus[1].stores[0].train
    whole = split.read([(0, split.tokens)])[0]
    spans = [(n * 7 % (split.tokens - 9), n * 7 % (split.tokens - 9) + 9) for n in range(400)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(lambda span: split.read([span])[0], spans))
    for (start, stop), row in zip(spans, rows, strict=True):
        np.testing.assert_array_equal(row, whole[start:stop])


def test_a_store_can_live_behind_a_url(tmp_path):
    p = prepared(tmp_path, cache_dir="memory://bucket/cache")
    assert p.stores[0].place.startswith("memory://bucket/cache/stores/")
    again = prepared(tmp_path, cache_dir="memory://bucket/cache/")
    assert again.tokenizer.sha256 == p.tokenizer.sha256
    assert b"".join(p.stores[0].held_out_text())
    assert not (tmp_path / "cache").exists()


# ---- Caching -------------------------------------------------------------------------------------


def built(folder, *sources, **options):
    """Lines that say that something was built."""
    lines = []
    sources = sources or (SourceConfig(str(folder / "text")),)
    settings = {"cache_dir": str(folder / "cache"), "vocab_size": 320, "held_out": 0.2, **options}
    prepare(DataConfig(sources=sources, **settings), SEQ_LEN, 0, lines.append)
    return [line for line in lines if "stored in" in line or "trained" in line]


def test_a_second_run_builds_nothing_and_a_change_rebuilds(tmp_path):
    folder = write_corpus(tmp_path / "text")
    assert len(built(tmp_path)) == 2
    assert built(tmp_path) == []
    assert built(tmp_path, fim_rate=0.5) == []  # decided when rows are read
    assert len(built(tmp_path, held_out=0.4)) == 2
    os.utime(folder / "000.txt", ns=(0, 0))
    assert len(built(tmp_path)) == 2
    assert len(built(tmp_path, vocab_size=330)) == 2
    assert built(tmp_path) == []


def test_reports_come_from_the_cache_too(tmp_path):
    write_corpus(tmp_path / "text")
    (tmp_path / "text/zz.txt").write_bytes(b"\xff")
    for _ in range(2):
        (report,) = prepared(tmp_path, SourceConfig(str(tmp_path / "text"))).reports
        assert report.names == {"not UTF-8": ["zz.txt"]}
        assert (report.files, report.documents) == (41, 40)


def test_a_half_built_store_is_never_taken_for_whole(tmp_path, monkeypatch):
    write_corpus(tmp_path / "text")

    def power_cut(place, meta):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "seal_store", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            built(tmp_path)
    (half,) = (tmp_path / "cache/stores").iterdir()
    assert (half / "train/tokens/zarr.json").exists()
    assert find_store(str(half)) is None
    (half / "train/tokens/c/99").write_text("left behind")
    assert len(built(tmp_path)) == 1
    assert not (half / "train/tokens/c/99").exists()
    assert find_store(str(half)) is not None


def test_a_damaged_store_is_an_error_that_names_it(tmp_path):
    place = prepared(tmp_path).stores[0].place
    meta = json.loads((Path(place) / "meta.json").read_text())
    meta["splits"]["train"]["tokens"] += 1
    storage.write_bytes(place, "meta.json", json.dumps(meta).encode())
    with pytest.raises(ValueError, match=r"train/tokens holds \d+ entries, .* Delete it to build"):
        find_store(place)


def copy_of(corpus, folder: Path) -> str:
    """A copy of the corpus' store, to damage."""
    return str(shutil.copytree(corpus[1].stores[0].place, folder / "store"))


FILES = (
    "train/tokens/c/0",
    "held_out/tokens/c/0",
    "train/offsets/c/0",
    "train/tokens/zarr.json",
    "meta.json:cut",
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_store_that_is_gone_is_named_and_never_read_as_zeros(corpus, tmp_path, name):
    place = copy_of(corpus, tmp_path)
    file = Path(place) / name.removesuffix(":cut")
    if name.endswith(":cut"):
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"is damaged.*Delete it") as refused:
        find_store(place)
    assert name.split(":")[0].removesuffix("zarr.json") in str(refused.value) + "meta.json"
    assert "tensorstore_spec" not in str(refused.value)


def test_tokens_that_vanish_or_change_under_a_run_are_an_error(tmp_path, corpus):
    for change in ("gone", "cut", "bit"):
        found = find_store(copy_of(corpus, tmp_path / change))
        assert found is not None
        file = Path(found.place) / "train/tokens/c/0"
        whole = file.read_bytes()
        file.unlink()
        if change != "gone":
            altered = bytes([whole[0] ^ 1]) + whole[1:]
            file.write_bytes(whole[:-7] if change == "cut" else altered)
        with pytest.raises(ValueError, match="train/tokens/c/0"):
            found.train.read([(0, 8)])


def test_held_out_text_that_is_gone_or_cut_is_an_error(corpus, tmp_path):
    for change in (b"", None):
        found = find_store(copy_of(corpus, tmp_path / str(change)))
        assert found is not None
        file = Path(found.place) / "held_out_text/00000.txt"
        file.write_bytes(change if change is not None else file.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"held_out_text/00000.txt is gone or cut"):
            list(found.held_out_text())


def test_a_store_whose_tokens_are_all_zero_reads_back(tmp_path):
    """Id 0 is what is filled in elsewhere; here zeros are written, and nothing is filled in."""
    tokenizer = train_tokenizer(["a"], 320)
    writer = store._SplitWriter(str(tmp_path / "train"), "uint16")
    writer.add(np.zeros(99, np.int32), 0, 99)
    counts = writer.finish()
    assert tokenizer.bos_id == 0
    assert not np.any(store._open_split(str(tmp_path), "train", counts).read([(0, 100)]))


def test_a_trained_tokenizer_that_is_damaged_is_named(tmp_path):
    source = SourceConfig(str(write_corpus(tmp_path / "text")))
    prepared(tmp_path, source)
    (file,) = (tmp_path / "cache/tokenizers").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*delete it"):
        prepared(tmp_path, source)


def test_processes_of_one_machine_build_once(tmp_path):
    write_corpus(tmp_path / "text")
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        lines = list(threads.map(lambda _: built(tmp_path), range(4)))
    assert sorted(map(len, lines)) == [0, 0, 0, 2]


def test_a_large_corpus_trains_the_tokenizer_on_a_sample(tmp_path, monkeypatch):
    """Of many files some, of one large file its beginning: the rest is not read at all."""
    folder = write_corpus(tmp_path / "text")
    with (tmp_path / "all.jsonl").open("w") as lines:
        for file in sorted(folder.iterdir()):
            lines.write(json.dumps({"text": file.read_text()}) + "\n")
    size = find_source(SourceConfig(str(folder))).size
    monkeypatch.setattr(prepare_module, "TRAINING_TEXT", size // 4)
    monkeypatch.setattr(prepare_module, "SAMPLE", 1000)
    for place in (folder, tmp_path / "all.jsonl"):
        said: list[str] = []
        config = DataConfig((SourceConfig(str(place)),), str(tmp_path / "c"), "", 320, 0.2)
        sources = [find_source(source) for source in config.sources]
        sampled = list(prepare_module._training_texts(config, sources, said.append))
        assert "% of the text" in said[0]
        assert len(sampled) < 20  # of 40
        assert sum(map(len, sampled)) == pytest.approx(size / 4, rel=0.2)
        prepare(config, SEQ_LEN, 0)


def test_what_is_held_out_of_a_large_corpus_is_bounded(tmp_path, monkeypatch):
    text = "some words of text\n"
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / f"text/{n}.txt").write_text(text * 100)
    (tmp_path / "one.txt").write_text(text * 4000)
    monkeypatch.setattr(split_module, "LOOKED_AT", 1000)
    for place in (tmp_path / "text", tmp_path / "one.txt"):
        (found,) = prepared(tmp_path, SourceConfig(str(place)), held_out_tokens=500).stores
        assert 0 < found.held_out.text_bytes <= 3 * 4 * 500
        kept = found.held_out.text_bytes + found.train.text_bytes
        assert kept == 4000 * len(text)  # nothing is lost


def test_what_takes_long_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SECONDS_PER_LINE", -1.0)
    folder = write_corpus(tmp_path / "text", files=3)
    lines: list[str] = []
    config = DataConfig((SourceConfig(str(folder)),), str(tmp_path / "c"), "", 320, 0.2)
    (tmp_path / "c").mkdir()
    with open(tmp_path / "c/.lock", "w") as lock, concurrent.futures.ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = pool.submit(prepare, config, SEQ_LEN, 0, lines.append)
        while not any("waiting for it" in line for line in lines):
            time.sleep(0.01)
        fcntl.flock(lock, fcntl.LOCK_UN)
        done.result()
    assert f"{folder}: 2 files listed so far" in lines
    assert any(line.startswith(f"{folder}: 2 documents, ") for line in lines)


# ---- Configurations that cannot work -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"sources": (SourceConfig("a", weight=0.0),)}, "'a' has weight 0.0; .* positive"),
        ({"sources": (SourceConfig("a", weight=-1.0),)}, "'a' has weight -1.0"),
        ({"sources": (SourceConfig("a", weight=float("nan")),)}, "'a' has weight nan"),
        ({"sources": (SourceConfig("a"), SourceConfig("a"))}, r"\['a'\] are listed twice"),
        ({"held_out": 1.0}, "--data.held-out is 1.0"),
        ({"held_out": -0.1}, "--data.held-out is -0.1"),
        ({"fim_rate": 1.5}, "--data.fim-rate is 1.5"),
    ],
)
def test_bad_values_are_refused_before_any_file_is_read(change, message):
    with pytest.raises(ValueError, match=message):
        check_config(dataclasses.replace(DataConfig(), **change), SEQ_LEN, 0)


def test_bad_sizes_and_seeds_are_refused():
    with pytest.raises(ValueError, match=r"--train\.seq-len is 0"):
        check_config(DataConfig(), 0, 0)
    with pytest.raises(ValueError, match="--seed is -1"):
        check_config(DataConfig(), 8, -1)


def test_a_source_without_documents_says_what_was_wrong_with_its_files(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("")
    (tmp_path / "text/b.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"(?s)no document.*1 empty, 1 not UTF-8.*empty: a\.txt"):
        prepared(tmp_path, SourceConfig(str(tmp_path / "text")))


def test_one_document_is_enough_and_too_little_text_leaves_no_store(tmp_path):
    (tmp_path / "one.txt").write_text("one document\n" * 9)
    lines: list[str] = []
    source = (SourceConfig(str(tmp_path / "one.txt")),)
    config = DataConfig(source, str(tmp_path / "cache"), "", 320, 0.2)
    (found,) = prepare(config, SEQ_LEN, 0, lines.append).stores
    assert (found.train.documents, found.held_out.documents) == (1, 1)
    assert b"".join(found.held_out_text()) == b"one document\n" * 2
    assert f"{source[0].path}: few documents; held out: the last 0.2 of one.txt" in lines
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match=r"--data\.held-out 0 to go without"):
        prepare(config, SEQ_LEN, 0)
    assert (
        len([place for place in (tmp_path / "cache/stores").iterdir() if find_store(str(place))])
        == 1
    )


def test_nothing_held_out_is_a_choice(tmp_path):
    p = prepared(tmp_path, held_out=0.0)
    assert p.stores[0].held_out.tokens == 0
    assert list(p.stores[0].held_out_text()) == []


def test_fim_without_fim_tokens_is_refused(tmp_path):
    spec = json.loads(train_tokenizer(["ab"], 300).json)
    spec["added_tokens"] = [t for t in spec["added_tokens"] if "fim" not in t["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    options = {"tokenizer": str(tmp_path / "tokenizer.json")}
    with pytest.raises(ValueError, match=r"fim-rate is 0\.1, but .* give --data\.fim-rate 0"):
        prepared(tmp_path, **options)
    assert prepared(tmp_path, **options, fim_rate=0.0).tokenizer.fim is None
