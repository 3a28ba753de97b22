"""Batches: mixture, resuming, processes; held-out batches and the bytes they score."""

import gzip
import itertools

import numpy as np
import pytest
import tokenizers
from data_helpers import SEQ_LEN, prepared, process_rows, write_corpus
from tokenizers import models, pre_tokenizers

from data.config import SourceConfig
from data.evaluation import gzip_bits_per_byte, held_out_reader
from data.loader import train_loader
from data.packing import PackedRows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two sources that a row's letters tell apart, weighted 3 to 1; no document is rearranged."""
    folder = tmp_path_factory.mktemp("mixed")
    low, high = (write_corpus(folder / name, alphabet=name) for name in ("abc", "xyz"))
    sources = SourceConfig(str(low), weight=3.0), SourceConfig(str(high), weight=1.0)
    return prepared(folder, *sources, segment_mask=True, fim_rate=0.0)


def ramp(step):
    """(first sequence, count) of a batch that grows: 4, 4, 8, 8, 8 ..."""
    return (4 * step, 4) if step < 2 else (8 + 8 * (step - 2), 8)


# ---- Training ------------------------------------------------------------------------------------


def test_a_batch_is_consecutive_rows_in_micro_batches(corpus):
    loader = train_loader(corpus, 8, 4)
    batch = loader.batch_at(16, 8)
    assert set(batch) == {"tokens"}
    assert batch["tokens"].shape == (2, 4, SEQ_LEN + 1)
    assert batch["tokens"].dtype == np.int32
    ones = np.stack([train_loader(corpus, 1).batch_at(i, 1)["tokens"][0, 0] for i in range(16, 24)])
    np.testing.assert_array_equal(batch["tokens"].reshape(8, -1), ones)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_resumed_and_split_over_processes_the_batch_is_the_same(corpus, processes):
    whole = [train_loader(corpus, 8, 4).batch_at(*ramp(step))["tokens"] for step in range(6)]
    loaders = [
        train_loader(corpus, 8, 4, process_rows(4, process, processes))
        for process in range(processes)
    ]
    for start in (0, 3):
        streams = [loader.batches(ramp, start, 6) for loader in loaders]
        for step, parts in zip(range(start, 6), zip(*streams, strict=True), strict=True):
            joined = np.concatenate([part["tokens"] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, whole[step])


def test_a_process_reads_only_its_own_rows(corpus, monkeypatch):
    loader = train_loader(corpus, 8, 4, range(1, 2))
    read = []
    original = loader._row
    monkeypatch.setattr(loader, "_row", lambda index: (read.append(index), original(index))[1])
    loader.batch_at(8, 8)
    assert read == [9, 13]


def test_iteration_ends_at_the_last_step(corpus):
    loader = train_loader(corpus, 4)
    assert list(loader.batches(ramp, 2, 2)) == []
    loader = train_loader(corpus, 8, 4)
    assert len(list(loader.batches(ramp, 1, 4))) == 3


def test_the_sequence_goes_on_over_many_epochs(corpus):
    loader = train_loader(corpus, 2)
    far = loader.batch_at(10**9, 2)["tokens"]
    assert far.shape == (1, 2, SEQ_LEN + 1)
    assert (far != loader.batch_at(0, 2)["tokens"]).any()


def source_of(prepared, rows):
    """0 or 1 for each row, by its letters."""
    texts = [prepared.tokenizer.decode(row) for row in rows]
    assert not any(set("abc") & set(text) and set("xyz") & set(text) for text in texts)
    return np.array([bool(set("xyz") & set(text)) for text in texts], int)


def test_mixture_keeps_its_weights_in_every_stretch(mixed):
    tokens = train_loader(mixed, 20).batch_at(0, 400)["tokens"].reshape(400, -1)
    second = source_of(mixed, [row[row > 2] for row in tokens])
    assert abs(int(second.sum()) - 100) <= 1
    for stretch in second.reshape(20, 20):
        assert abs(int(stretch.sum()) - 5) <= 1


def test_mixture_reads_each_source_in_its_own_order(mixed):
    """The k-th row of a source is the same under any weights."""
    rows = train_loader(mixed, 40).batch_at(0, 40)["tokens"][0]
    second = source_of(mixed, [row[row > 2] for row in rows])
    own = PackedRows(mixed.stores[1].train, SEQ_LEN, mixed.seed + (1 << 32))
    for k, row in enumerate(rows[second == 1]):
        np.testing.assert_array_equal(row, own[k]["tokens"])


def test_segment_mode_numbers_documents_from_one(mixed):
    batch = train_loader(mixed, 32).batch_at(0, 32)
    tokens, segments = batch["tokens"][0], batch["segments"][0]
    assert segments.shape == tokens.shape
    # A new document begins exactly after an eos.
    ends = np.cumsum(tokens == mixed.tokenizer.eos_id, axis=1)
    before = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
    np.testing.assert_array_equal(segments, before + 1)
    assert segments.max() > 1


def test_fim_reaches_the_batches_at_its_rate(tmp_path):
    p = prepared(tmp_path, fim_rate=0.5)
    loader = train_loader(p, 1)
    rows = (p.stores[0].train.tokens + 3 * round(p.stores[0].train.documents / 2) - 1) // SEQ_LEN
    tokens = np.concatenate([loader.batch_at(i, 1)["tokens"][0, 0, 1:] for i in range(rows)])
    begins = (tokens == p.tokenizer.fim.begin).sum()
    # The stream's first token and last partial row hold no target: up to two are not seen.
    assert 0 <= round(p.stores[0].train.documents / 2) - begins <= 2


def test_too_small_a_corpus_says_what_it_has_and_needs(corpus):
    # By default a tenth of the documents are rearranged, which adds three tokens to each.
    train = corpus.stores[0].train
    available = train.tokens + 3 * round(0.1 * train.documents)
    message = rf"{available} training tokens, but --train.batch-size 9999 rows .* need 159985\."
    with pytest.raises(ValueError, match=message):
        train_loader(corpus, 9999)


def test_sizes_that_do_not_divide_are_refused(corpus):
    with pytest.raises(ValueError, match="6 rows is no multiple of micro_batch_size=4"):
        train_loader(corpus, 8, 4).batch_at(0, 6)
    with pytest.raises(ValueError, match=r"rows range\(2, 6\) lie outside a micro batch of 4"):
        train_loader(corpus, 8, 4, range(2, 6))


# ---- Held-out ------------------------------------------------------------------------------------


def held_out_stream(prepared):
    splits = [store.held_out for store in prepared.stores]
    return np.concatenate([split.read([(0, split.tokens)])[0] for split in splits])


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", ["corpus", "mixed"])
def test_every_held_out_token_is_scored_exactly_once(name, batch_size, request):
    p = request.getfixturevalue(name)
    reader = held_out_reader(p, batch_size)
    targets, inputs = [], []
    for batch in reader:
        assert batch["tokens"].shape == (1, batch_size, SEQ_LEN + 1)
        assert batch["mask"].shape == (1, batch_size, SEQ_LEN)
        scored = batch["mask"] == 1
        targets.append(batch["tokens"][..., 1:][scored])
        inputs.append(batch["tokens"][..., :-1][scored])
        assert (batch["tokens"][..., 1:][~scored] == p.tokenizer.pad_id).all()
    expected = held_out_stream(p)
    np.testing.assert_array_equal(np.concatenate(targets), expected)
    np.testing.assert_array_equal(
        np.concatenate(inputs), np.append(p.tokenizer.eos_id, expected[:-1])
    )
    assert reader.targets == len(expected)
    assert reader.eval_bytes == sum(len(part) for s in p.stores for part in s.held_out_text())
    assert reader.batches == len(targets)


def test_held_out_batches_hold_no_training_text(corpus):
    training = {
        corpus.stores[0].train.read([(a, b)])[0].tobytes()
        for a, b in itertools.pairwise(corpus.stores[0].train.offsets)
    }
    held = {
        corpus.stores[0].held_out.read([(a, b)])[0].tobytes()
        for a, b in itertools.pairwise(corpus.stores[0].held_out.offsets)
    }
    assert training
    assert held
    assert not training & held


def test_a_partial_evaluation_is_spread_and_counts_its_own_bytes(corpus):
    whole, part = held_out_reader(corpus, 4), held_out_reader(corpus, 4, max_batches=3)
    assert (part.rows, part.batches) == (12, 3)
    rows = np.concatenate([batch["tokens"][0] for batch in part])
    every = np.concatenate([batch["tokens"][0] for batch in whole])[: whole.rows]
    chosen = [n * whole.rows // 12 for n in range(12)]
    np.testing.assert_array_equal(rows, every[chosen])
    text = corpus.tokenizer.decode(rows[:, 1:].ravel(), skip_special=True)
    assert part.eval_bytes == len(text.encode())  # ASCII: tokens decode on their own
    assert part.targets == 12 * SEQ_LEN
    assert held_out_reader(corpus, 4, max_batches=10**6).eval_bytes == whole.eval_bytes


def test_held_out_batches_divide_over_processes(corpus):
    whole = list(held_out_reader(corpus, 4))
    parts = [list(held_out_reader(corpus, 4, 0, process_rows(4, p, 2))) for p in range(2)]
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([part[step][key] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, batch[key])


def test_held_out_segments_number_documents_and_leave_padding_zero(mixed):
    for batch in held_out_reader(mixed, 4):
        tokens, segments = batch["tokens"][0], batch["segments"][0]
        used = np.concatenate([np.ones((4, 1), bool), batch["mask"][0] == 1], axis=1)
        used &= used[:, 1:2]  # rows that only pad the batch
        ends = np.cumsum(tokens == mixed.tokenizer.eos_id, axis=1)
        before = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        np.testing.assert_array_equal(segments, np.where(used, before + 1, 0))


def test_bytes_of_a_part_need_byte_level_tokens(tmp_path):
    vocab = {"<unk>": 0, "<｜begin▁of▁sentence｜>": 1, "<｜end▁of▁sentence｜>": 2}
    words = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    p = prepared(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), fim_rate=0.0)
    assert p.stores[0].meta["byte_exact"] is False
    whole = held_out_reader(p, 1)
    assert whole.eval_bytes == p.stores[0].held_out.text_bytes
    with pytest.raises(ValueError, match=r"only over the whole .* Give --train.eval-batches 0"):
        held_out_reader(p, 1, max_batches=1)


def test_no_held_out_text_is_an_error(tmp_path):
    p = prepared(tmp_path, held_out=0.0)
    with pytest.raises(ValueError, match="no held-out text"):
        held_out_reader(p, 4)
    with pytest.raises(ValueError, match="no held-out text"):
        gzip_bits_per_byte(p.stores)


def test_gzip_yardstick_is_that_of_gzip_9(mixed):
    text = b"".join(part for store in mixed.stores for part in store.held_out_text())
    expected = 8 * len(gzip.compress(text, 9)) / len(text)
    assert gzip_bits_per_byte(mixed.stores) == pytest.approx(expected, rel=1e-3)
