"""Flash decoding is attention to a cache: split, paged, ragged, and still the same."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minllama.architecture.kernels import interpreting, launches
from minllama.fast_ops.flash_decode import (
    flash_decode,
    flash_decode_forward,
    flash_decode_reference,
    gather_pages,
)
from tests.conftest import DEVICE
from tests.fast_ops.test_flash_attention import BF16, CLOSE, ends

# the function hides the file of its name, so ask for the file
file = importlib.import_module("minllama.fast_ops.flash_decode")


def draw(B=2, T=1, S=70, H=4, K=2, d=16, dtype=torch.float32) -> list[Tensor]:
    shapes = ((B, T, H, d), (B, S, K, d), (B, S, K, d))
    return [torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes]


def ragged(B: int, T: int, *lengths: int) -> Tensor:
    """The index of each new token's own key."""
    start = torch.tensor(lengths[:B], device=DEVICE)[:, None]
    return start + torch.arange(T, device=DEVICE)


@pytest.fixture(params=[1, 5])
def splits(request, monkeypatch) -> int:
    """The number of splits that the host would choose on some GPU."""
    chosen, forced = file.decode_sizes, {"splits": request.param, "BLOCK_N": 16}
    monkeypatch.setattr(file, "decode_sizes", lambda *a: {**chosen(*a), **forced})
    return request.param


def test_the_kernels_ran_and_not_the_reference():
    if DEVICE == "cpu" and not interpreting():
        pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1")
    before = launches.copy()
    flash_decode(*draw())
    after = launches - before
    assert after["_decode_split"] == after["_decode_combine"] == 1


@pytest.mark.parametrize("T", [1, 5, 16])
def test_the_newest_tokens_see_all_before_them(T: int, splits: int):
    inputs = draw(T=T)
    assert_close(flash_decode(*inputs), flash_decode_reference(*inputs), **CLOSE)


@pytest.mark.parametrize("T", [1, 3])
def test_rows_of_any_length(T: int, splits: int):
    """From the first token on: most splits are empty then."""
    inputs = draw(B=3, T=T)
    last = ragged(3, T, 0, 33, 67)
    true = flash_decode_reference(*inputs, None, last)
    assert_close(flash_decode(*inputs, None, last), true, **CLOSE)


def test_what_lies_behind_the_end_is_not_read(splits: int):
    q, k, v = draw()
    last = ragged(2, 1, 5, 40)
    for row, end in enumerate((5, 40)):
        k[row, end + 1 :] = v[row, end + 1 :] = torch.nan
    assert flash_decode(q, k, v, None, last).isfinite().all()


def test_a_window_is_a_first_key(splits: int):
    inputs, last = draw(T=2), ragged(2, 2, 9, 60)
    true = flash_decode_reference(*inputs, last - 20, last)
    assert_close(flash_decode(*inputs, last - 20, last), true, **CLOSE)
    first = torch.full((1, 2), 30, device=DEVICE)  # of a triangle, for all rows
    true = flash_decode_reference(*inputs, first)
    assert_close(flash_decode(*inputs, first), true, **CLOSE)


@pytest.mark.parametrize("page", [1, 6, 16])
def test_pages_lie_anywhere(page: int, splits: int):
    q = draw(B=3, T=2, H=4, K=2, d=20)[0]
    k, v = (torch.randn(40, page, 2, 20, device=DEVICE) for _ in "kv")
    pages = torch.randperm(40, device=DEVICE)[:36].view(3, 12)
    last = ragged(3, 2, 0, 6 * page, 12 * page - 2)
    got = flash_decode(q, k, v, None, last, pages)
    assert_close(got, flash_decode_reference(q, k, v, None, last, pages), **CLOSE)
    whole = gather_pages(k, pages), gather_pages(v, pages)
    assert_close(got, flash_decode(q, *whole, None, last), **CLOSE)


def test_entries_behind_the_end_may_be_anything():
    """A table is longer than what a row has: -1 there, or a number of long ago."""
    q = draw(B=1)[0]
    k, v = (torch.randn(4, 8, 2, 16, device=DEVICE) for _ in "kv")
    table = torch.tensor([[2, 0, -1, 99999]], device=DEVICE, dtype=torch.int32)
    got = flash_decode(q, k, v, None, ragged(1, 1, 11), table)
    true = flash_decode_reference(q, k, v, None, ragged(1, 1, 11), table[:, :2])
    assert_close(got, true, **CLOSE)
    v[0, 4:] = torch.nan  # of the last page, what no token is yet
    for decode in (flash_decode, flash_decode_reference):
        y = decode(q, k, v, None, ragged(1, 1, 11), table)
        assert_close(y, true, **CLOSE)


def test_what_the_cache_holds_behind_the_end_may_be_no_number():
    q, k, v = draw(S=20)
    last = ragged(2, 1, 4, 11)
    want = flash_decode_reference(q, k, v, None, last)
    for x in (k, v):
        x[0, 12:], x[1, 12:] = torch.nan, torch.inf
    for decode in (flash_decode, flash_decode_reference):
        assert_close(decode(q, k, v, None, last), want, **CLOSE)


def test_the_reference_takes_whole_pages():
    q = draw(B=1)[0]
    k, v = (torch.randn(3, 8, 2, 16, device=DEVICE) for _ in "kv")
    table = torch.tensor([[2, 0, 1]], device=DEVICE)
    got = flash_decode_reference(q, k, v, pages=table)
    assert_close(got, flash_decode(q, gather_pages(k, table), gather_pages(v, table)))


def test_a_table_may_be_a_view():
    q = draw(B=2)[0]
    k, v = (torch.randn(12, 8, 2, 16, device=DEVICE) for _ in "kv")
    table = torch.randperm(12, device=DEVICE).view(2, 6)
    last = ragged(2, 1, 20, 9)
    for view in (table[:, ::2], table.view(6, 2).T):
        got = flash_decode(q, k, v, None, last, view)
        want = flash_decode_reference(q, k, v, None, last, view.contiguous())
        assert_close(got, want, **CLOSE)


def test_more_heads_than_a_grid_is_wide(monkeypatch, splits: int):
    inputs = draw(B=3, H=4, K=2)
    expected = flash_decode(*inputs)
    monkeypatch.setattr(file, "GRID", 4)  # of 6
    assert_close(flash_decode(*inputs), expected)


def test_a_gradient_is_refused():
    q, k, v = draw()
    with pytest.raises(ValueError, match="use flash_attention"):
        flash_decode(q.requires_grad_(), k, v)
    with torch.no_grad():
        flash_decode(q, k, v)


@pytest.mark.parametrize("H, K, d", [(1, 1, 8), (6, 2, 80), (8, 1, 96), (3, 3, 20)])
def test_heads_and_widths(H: int, K: int, d: int):
    inputs = draw(T=2, H=H, K=K, d=d)
    assert_close(flash_decode(*inputs), flash_decode_reference(*inputs), **CLOSE)


def test_bfloat16_is_rounded_only_at_the_end(splits: int):
    inputs = draw(dtype=torch.bfloat16)
    wide = [x.double() for x in inputs]
    true = flash_decode_reference(*wide).bfloat16()
    assert_close(flash_decode(*inputs), true, **BF16)


def test_a_view_of_a_longer_cache():
    q, k, v = draw(S=100)
    cut = k[:, :37], v[:, :37]
    copied = [x.contiguous() for x in cut]
    assert_close(flash_decode(q, *cut), flash_decode(q, *copied), rtol=0, atol=0)


@pytest.mark.parametrize("B, T, S", [(0, 1, 5), (2, 0, 5)])
def test_empty_inputs(B: int, T: int, S: int):
    assert flash_decode(*draw(B=B, T=T, S=S)).shape == (B, T, 4, 16)


def test_the_operator_is_registered_as_pytorch_wants_it():
    q, k, v = draw(T=2)
    last = ragged(2, 2, 5, 40)
    inputs = (q, k, v, last - 3, last, None, 0.25)
    torch.library.opcheck(flash_decode_forward, inputs)
    pages = torch.arange(2, device=DEVICE)[:, None]
    torch.library.opcheck(flash_decode_forward, (q, k, v, None, last, pages, 0.25))


WRONG = {
    "no multiple of 2": lambda q, k, v: (q[:, :, :3], k, v),
    "are more than 128 rows": lambda q, k, v: (q.repeat(1, 65, 1, 1), k, v),
    r"pages \(1, 3\)": lambda *qkv: (*qkv, None, ends(2, 1), ends(1, 3)),
    "pages .* of torch.float32": lambda *qkv: (
        *qkv,
        None,
        ends(2, 1),
        ends(2, 3) * 1.0,
    ),
    "last=None with pages": lambda *qkv: (*qkv, None, None, ends(2, 3)),
    "pages .* of torch.bool": lambda *qkv: (*qkv, None, ends(2, 1), ends(2, 3) > 0),
    "has no page": lambda q, k, v: (q, k[:0], v[:0], None, ends(2, 1), ends(2, 3)),
    "pages on meta": lambda *qkv: (*qkv, None, ends(2, 1), ends(2, 3).to("meta")),
    "dtype=torch.int64": lambda *qkv: [x.long() for x in qkv],
}


@pytest.mark.parametrize("words", WRONG)
def test_what_the_kernels_would_misread_is_refused(words: str):
    with pytest.raises(ValueError, match=words):
        flash_decode(*WRONG[words](*draw()))


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are a GPU's")
def test_a_captured_step_serves_growing_rows():
    q, k, v = draw(B=4, S=2048, H=32, K=8, d=128, dtype=torch.bfloat16)
    last = ragged(4, 1, 0, 5, 63, 64)
    flash_decode(q, k, v, None, last)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = flash_decode(q, k, v, None, last)
    for step in (0, 1, 64, 1900):
        last += step
        graph.replay()
        assert_close(y, flash_decode_reference(q, k, v, None, last), **BF16)
