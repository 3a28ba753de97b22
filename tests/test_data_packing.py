"""Fill-in-the-middle and packing against a plain concatenation of the documents."""

import concurrent.futures

import numpy as np
import pytest
from data_helpers import SEQ_LEN, prepared
from hypothesis import given
from hypothesis import strategies as st

from data.fim import EXTRA, cut_pieces, fim_count, fim_cuts, fim_documents, fim_pieces
from data.packing import PackedRows
from data.randomness import DOCUMENT_ORDER, random_permutation, random_words
from data.tokenizer import FimTokens

SEED = 7
FIM = FimTokens(begin=1001, hole=1002, end=1003)
EOS = 1


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus")).stores[0].train


def document(split, index):
    """Tokens of a stored document, eos included."""
    return split.read([(split.offsets[index], split.offsets[index + 1])])[0].astype(np.int32)


def psm(tokens, start, stop):
    """The V3 report's order, spelled out."""
    text, eos = tokens[:-1], tokens[-1:]
    prefix, middle, suffix = text[:start], text[start:stop], text[stop:]
    order = [[FIM.begin], prefix, [FIM.hole], suffix, [FIM.end], middle, eos]
    return np.concatenate(order).astype(np.int32)


def stream(split, epoch, rate):
    """An epoch's stream and the number of each token's document, by plain concatenation."""
    rearranged = fim_documents(SEED, epoch, split.documents, rate)
    parts = []
    for index in random_permutation(SEED, DOCUMENT_ORDER, epoch, split.documents):
        tokens = document(split, index)
        if rearranged[index]:
            tokens = psm(tokens, *fim_cuts(SEED, epoch, int(index), len(tokens) - 1))
        parts.append(tokens)
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return np.concatenate(parts), numbers


# ---- Random numbers ------------------------------------------------------------------------------


def test_random_words_never_change():
    """A resumed run must draw what the stopped one would have drawn: these are fixed for good."""
    first = [int(word) for word in random_words(0, 0, 0, 0, 2)]
    other = [int(word) for word in random_words(1 << 40, 3, 2, 5, 2)]
    assert first == [213000021201967259, 4455796210202625458]
    assert other == [11774068116612942146, 3911155130841611194]


def test_random_words_differ_by_every_part_of_the_key():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({int(random_words(*key, 1)[0]) for key in keys}) == len(keys)


# ---- Fill-in-the-middle --------------------------------------------------------------------------


@given(st.data())
def test_pieces_of_any_slice_equal_the_slice_of_the_whole(data):
    length = data.draw(st.integers(0, 12))
    start, stop = sorted(data.draw(st.tuples(*2 * [st.integers(0, length)])))
    low, high = sorted(data.draw(st.tuples(*2 * [st.integers(0, length + 1 + EXTRA)])))
    tokens = np.append(np.arange(10, 10 + length), EOS)
    whole = psm(tokens, start, stop)
    pieces = cut_pieces(fim_pieces(length, start, stop, FIM), low, high)
    got = [p if isinstance(p, int) else tokens[p[0] : p[1]] for p in pieces]
    np.testing.assert_array_equal(np.hstack([[], *got]), whole[low:high])
    assert len(whole) == length + 1 + EXTRA


def test_psm_order_is_exact():
    tokens = np.array([10, 11, 12, 13, 14, EOS])
    pieces = fim_pieces(5, 1, 3, FIM)
    got = np.hstack([p if isinstance(p, int) else tokens[p[0] : p[1]] for p in pieces])
    assert got.tolist() == [1001, 10, 1002, 13, 14, 1003, 11, 12, EOS]


def test_each_epoch_rearranges_the_same_number_of_other_documents():
    epochs = [fim_documents(SEED, epoch, 1000, 0.1) for epoch in range(3)]
    assert [chosen.sum() for chosen in epochs] == [100, 100, 100]
    assert fim_count(1000, 0.1) == 100
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(epochs[0], fim_documents(SEED, 0, 1000, 0.1))
    assert not fim_documents(SEED, 0, 1000, 0.0).any()
    assert fim_documents(SEED, 0, 1000, 1.0).all()


def test_cuts_are_ordered_inside_the_document_and_spread():
    cuts = np.array([fim_cuts(SEED, 0, document, 99) for document in range(500)])
    assert (cuts[:, 0] <= cuts[:, 1]).all()
    assert cuts.min() >= 0
    assert cuts.max() <= 99
    # The smaller and larger of two uniform numbers average 1/3 and 2/3; 4 sigma is 4.2 here.
    np.testing.assert_allclose(cuts.mean(0), [33, 66], atol=4.3)
    assert fim_cuts(SEED, 0, 3, 0) == (0, 0)


# ---- Packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epochs_rows_are_the_stream_cut_into_rows(split, rate, epoch):
    rows = PackedRows(split, SEQ_LEN, SEED, rate, FIM, segments=True)
    tokens, numbers = stream(split, epoch, rate)
    assert len(tokens) == rows.tokens_per_epoch
    n = rows.rows_per_epoch
    assert n == (len(tokens) - 1) // SEQ_LEN
    starts = np.arange(n) * SEQ_LEN
    expected = {tokens[s : s + SEQ_LEN + 1].tobytes(): s for s in starts}
    seen = []
    for index in range(epoch * n, (epoch + 1) * n):
        row = rows[index]
        assert row["tokens"].dtype == row["segments"].dtype == np.int32
        start = expected[row["tokens"].tobytes()]
        seen.append(start)
        part = numbers[start : start + SEQ_LEN + 1]
        np.testing.assert_array_equal(row["segments"], part - part[0] + 1)
    assert sorted(seen) == starts.tolist()  # every row once
    assert seen != starts.tolist()  # and not in the stream's order


def test_rows_without_segments_have_tokens_only(split):
    assert set(PackedRows(split, SEQ_LEN, SEED)[0]) == {"tokens"}


def test_epochs_and_seeds_differ_and_repeat(split):
    rows = PackedRows(split, SEQ_LEN, SEED, 0.1, FIM)
    again = PackedRows(split, SEQ_LEN, SEED, 0.1, FIM)
    other = PackedRows(split, SEQ_LEN, SEED + 1, 0.1, FIM)
    n = rows.rows_per_epoch
    first = [rows[i]["tokens"].tobytes() for i in range(n)]
    assert [again[i]["tokens"].tobytes() for i in reversed(range(n))] == first[::-1]
    assert [rows[n + i]["tokens"].tobytes() for i in range(n)] != first
    assert [other[i]["tokens"].tobytes() for i in range(n)] != first


def test_any_row_is_read_on_its_own_from_any_thread(split):
    rows = PackedRows(split, SEQ_LEN, SEED, 0.5, FIM)
    n = rows.rows_per_epoch
    indices = [(i * 37) % (3 * n) for i in range(200)]  # jumps between three epochs
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda i: rows[i]["tokens"], indices))
    fresh = PackedRows(split, SEQ_LEN, SEED, 0.5, FIM)
    for index, tokens in sorted(zip(indices, got, strict=True), key=lambda pair: pair[0]):
        np.testing.assert_array_equal(tokens, fresh[index]["tokens"])


def test_a_row_may_be_longer_than_most_documents_and_shorter_than_one(split):
    """Rows of 300 tokens hold many documents, rows of 1 hold one token and its target."""
    for seq_len in (1, 300):
        tokens, _ = stream(split, 0, 0.0)
        rows = PackedRows(split, seq_len, SEED)
        count = rows.rows_per_epoch
        targets = np.concatenate([rows[i]["tokens"][1:] for i in range(count)])
        expected = tokens[1 : count * seq_len + 1]
        np.testing.assert_array_equal(np.sort(targets), np.sort(expected))


def test_a_corpus_that_fills_no_row_is_an_error_with_the_numbers(split):
    with pytest.raises(ValueError, match=rf"{split.tokens} training tokens .* needs 1000001"):
        PackedRows(split, 1_000_000, SEED)
    PackedRows(split, split.tokens - 1, SEED)
    with pytest.raises(ValueError, match="do not fill one row"):
        PackedRows(split, split.tokens, SEED)


def test_bad_rates_are_refused(split):
    with pytest.raises(ValueError, match=r"--data\.fim-rate 1\.1 is outside"):
        PackedRows(split, SEQ_LEN, SEED, 1.1, FIM)
    with pytest.raises(ValueError, match="no FIM tokens"):
        PackedRows(split, SEQ_LEN, SEED, 0.1, None)
