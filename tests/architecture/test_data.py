"""Documents to packed batches."""

from itertools import islice

import numpy as np
import pytest
import torch

from minllama import MinimalLlama, Tokenizer
from minllama.architecture.data import (
    IGNORE,
    Batch,
    PackedBatches,
    SingleBatch,
    best_fit,
    encode_documents,
    make_batch,
    read_documents,
)
from minllama.architecture.train import next_token_loss
from tests.conftest import tiny_config


def documents(*lengths):
    """Documents whose tokens are all different, so that each can be found again."""
    starts = np.cumsum([0, *lengths])
    return [np.arange(s, s + n) for s, n in zip(starts, lengths)]


def random_documents(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return documents(*rng.integers(2, longest, count))


def pairs(batches):
    """Every (token, next token) that is learned, in order."""
    found = []
    for batch in batches:
        keep = batch.targets != IGNORE
        found += zip(batch.tokens[keep].tolist(), batch.targets[keep].tolist())
    return found


def test_every_target_of_every_document_is_learned_once_an_epoch():
    docs = random_documents(60, 40)
    rows = list(best_fit(docs, seq_len=17))
    expected = sorted((int(a), int(b)) for d in docs for a, b in zip(d, d[1:]))
    assert sorted(pairs([make_batch(rows, 17)])) == expected


def test_no_row_is_overfull_and_only_long_documents_are_cut():
    docs = random_documents(200, 40)
    rows = list(best_fit(docs, seq_len=32))
    assert all(sum(len(d) - 1 for d in row) <= 32 for row in rows)
    whole = {int(d[0]): len(d) for d in docs if len(d) <= 33}
    kept = {int(d[0]): len(d) for row in rows for d in row if int(d[0]) in whole}
    assert kept == whole


def test_best_fit_leaves_little_padding():
    docs = random_documents(2000, 100)
    rows = list(best_fit(docs, seq_len=128))
    assert sum(len(d) - 1 for d in docs) > 0.95 * 128 * len(rows)


def test_positions_restart_at_each_border():
    batch = make_batch([documents(4, 3)], 8)
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.targets.tolist() == [[1, 2, 3, 5, 6, IGNORE, IGNORE, IGNORE]]
    assert int(batch.counted()) == 5


def test_a_packed_batch_costs_what_its_documents_cost_alone():
    model = MinimalLlama(tiny_config()).double()
    docs = [torch.randint(0, 97, (n,)).numpy() for n in (9, 5, 12, 3)]
    packed = next_token_loss(model, make_batch([docs[:2], docs[2:]], 16))
    alone = sum(next_token_loss(model, make_batch([[d]], len(d) - 1)) for d in docs)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)


def test_an_epoch_shuffles_and_the_next_shuffles_otherwise():
    batches = PackedBatches(random_documents(64, 9), batch_size=4, seq_len=8)
    size = batches.batches_per_epoch()
    first, second = list(islice(batches, size)), list(islice(batches, size))
    assert batches.epoch == 2 and pairs(first) != pairs(second)
    again = PackedBatches(random_documents(64, 9), batch_size=4, seq_len=8)
    assert pairs(islice(again, size)) == pairs(first)


def test_a_resumed_iteration_gives_the_batch_that_would_have_come():
    docs = random_documents(64, 9)
    batches = PackedBatches(docs, batch_size=4, seq_len=8)
    list(islice(batches, batches.batches_per_epoch() + 3))
    state = batches.state_dict()
    expected = pairs(islice(batches, 30))
    resumed = PackedBatches(docs, batch_size=4, seq_len=8)
    resumed.load_state_dict(state)
    assert pairs(islice(resumed, 30)) == expected


def test_ranks_share_a_batch_without_overlap():
    docs = random_documents(64, 9)
    whole = next(PackedBatches(docs, batch_size=6, seq_len=8))
    parts = [next(PackedBatches(docs, 6, 8, rank=r, world=3)) for r in range(3)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.tokens, whole.tokens[rank::3])


def test_a_corpus_smaller_than_a_batch_still_fills_it():
    batches = PackedBatches(documents(5), batch_size=3, seq_len=8)
    assert next(batches).tokens.shape == (3, 8)


def test_batches_move_as_one():
    batch = make_batch([documents(4)], 4).to("meta")
    assert isinstance(batch, Batch) and batch.targets.is_meta


# ------------------------------------------------------------------ reading


def test_a_file_is_cut_at_its_separators_and_blank_parts_are_dropped(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n<|endoftext|>\n\n<|endoftext|>two\n")
    assert read_documents(file) == ["one", "two"]


def test_a_folder_is_read_in_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.md", "a.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    assert read_documents(tmp_path) == ["a.txt", "b/2.md"]


def test_a_byte_order_mark_is_no_text_and_hidden_folders_are_not_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOnce")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("secret")
    assert read_documents(tmp_path) == ["Once"]


def test_each_document_stands_between_its_begin_and_its_end():
    tok = Tokenizer.from_pretrained("stories-mini")
    (ids,) = encode_documents(["A cat. <|end_of_text|>"], tok)
    assert ids[0] == tok.bos_id and ids[-1] == tok.eos_id
    assert tok.eos_id not in ids[1:-1]  # text never becomes a special token


def test_what_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere.txt does not exist"):
        read_documents(tmp_path / "nowhere.txt")
    (tmp_path / "bytes.bin").write_bytes(b"ok \xff\xfe")
    with pytest.raises(ValueError, match=r"bytes.bin is no UTF-8 text \(byte 3\)"):
        read_documents(tmp_path)
    (tmp_path / "bytes.bin").write_bytes(b" \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(tmp_path)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no document has two tokens"):
        PackedBatches(documents(1, 1), 2, 8)
    with pytest.raises(ValueError, match="batch_size=0"):
        PackedBatches(documents(5), 0, 8)
    with pytest.raises(ValueError, match="batch_size=4 is no multiple of world=3"):
        PackedBatches(documents(5), 4, 8, world=3)
    state = PackedBatches(documents(5), 2, 8, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed=1, these batches seed=0"):
        PackedBatches(documents(5), 2, 8).load_state_dict(state)


def test_rows_of_one_document_are_a_triangle_with_the_same_loss():
    docs = documents(9, 5)
    single, both = make_batch([[d] for d in docs], 8), make_batch([docs], 16)
    assert isinstance(single, SingleBatch) and single.layout is None
    assert type(single.to("cpu")) is SingleBatch
    assert not isinstance(both, SingleBatch) and both.layout is not None
    model = MinimalLlama(tiny_config())
    as_packed = Batch(single.tokens, single.targets, single.positions)
    expected = next_token_loss(model, as_packed)
    torch.testing.assert_close(next_token_loss(model, single), expected)
