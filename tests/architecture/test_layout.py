"""A layout shows each token an interval of keys; packed documents never meet."""

import dataclasses
import random

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minllama.architecture.layout import Layout, packed
from tests.conftest import DEVICE, make_model, random_tokens


def positions_of(*lengths: int) -> Tensor:
    """(1, T): documents of these lengths, one behind the other."""
    return torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]


def seen_keys(layout: Layout, S: int) -> list[list[list[int]]]:
    """By row and token, the keys that the mask shows."""
    mask = layout.mask(S)
    assert mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[3] == S
    return [[row.nonzero().flatten().tolist() for row in rows[0]] for rows in mask]


# ---- What the layout says


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 7), (3, 7), (7, 7)])
def test_a_triangle_sees_all_up_to_itself(T, S):
    layout = Layout(positions=torch.arange(S - T, S, device=DEVICE)[None])
    assert layout.is_triangle
    assert seen_keys(layout, S) == [[list(range(S - T + t + 1)) for t in range(T)]]


def test_packed_tokens_see_their_own_document_up_to_themselves():
    layout = packed(positions_of(3, 1, 2))
    assert not layout.is_triangle
    assert seen_keys(layout, 6) == [[[0], [0, 1], [0, 1, 2], [3], [4], [4, 5]]]


def test_one_document_packed_is_a_triangle():
    layout = packed(positions_of(5))
    triangle = Layout(positions=layout.positions)
    assert torch.equal(layout.mask(5), triangle.mask(5))


def test_a_row_may_begin_within_a_document():
    """A text longer than a row is cut: its second part begins anywhere."""
    layout = packed(torch.tensor([[7, 8, 0, 1]]))
    assert seen_keys(layout, 4) == [[[0], [0, 1], [2], [2, 3]]]


def test_rows_have_packings_of_their_own():
    rows = torch.cat([positions_of(2, 3), positions_of(4, 1)])
    for row, mask in zip(rows, packed(rows).mask(5)):
        assert torch.equal(mask, packed(row[None]).mask(5)[0])


def test_a_window_keeps_the_newest_keys_of_what_was_seen():
    random.seed(0)
    for _ in range(20):
        lengths = [random.randint(1, 6) for _ in range(3)]
        window, S = random.randint(1, 9), sum(lengths)
        layout = packed(positions_of(*lengths))
        expected = [keys[-window:] for keys in seen_keys(layout, S)[0]]
        assert seen_keys(layout.within(window, S), S) == [expected]


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("window", [1, 3, 8, 9, 10])
def test_a_window_over_a_triangle_with_a_past(T, S, window):
    layout = Layout(positions=torch.arange(S - T, S, device=DEVICE)[None])
    expected = [[keys[-window:] for keys in rows] for rows in seen_keys(layout, S)]
    assert seen_keys(layout.within(window, S), S) == expected


def test_a_window_over_slots_counts_from_each_tokens_own_key():
    last = torch.tensor([[2, 3], [5, 6]], device=DEVICE)
    layout = Layout(positions=last, last=last).within(3, 8)
    assert seen_keys(layout, 8) == [[[0, 1, 2], [1, 2, 3]], [[3, 4, 5], [4, 5, 6]]]


def test_windows_in_turn_are_the_smaller_one():
    layout = packed(positions_of(9, 4))
    both = layout.within(5, 13).within(3, 13)
    assert torch.equal(both.mask(13), layout.within(3, 13).mask(13))


def test_a_window_that_hides_nothing_leaves_the_triangle_to_fast_kernels():
    layout = Layout(positions=torch.arange(9, device=DEVICE)[None])
    assert layout.within(9, 9).is_triangle
    assert not layout.within(8, 9).is_triangle


def test_a_mask_is_made_once_for_all_layers():
    layout = packed(positions_of(4, 3))
    assert layout.mask(7) is layout.mask(7)
    assert layout.mask(9).size(-1) == 9  # and anew for another number of keys


def test_a_changed_layout_does_not_keep_the_old_mask():
    layout = packed(positions_of(4, 3))
    layout.mask(7)
    changed = dataclasses.replace(layout, first=layout.last)
    assert seen_keys(changed, 7) == [[[i] for i in range(7)]]


def test_fields_are_given_by_name_and_stay():
    """A subclass may add fields without shifting these (pitfall 10)."""
    with pytest.raises(TypeError):
        Layout(torch.zeros(1, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed(positions_of(2)).start = 1


# ---- What the model makes of it


def test_packed_logits_are_those_of_each_document_alone(any_model):
    any_model.double()
    lengths = [[9, 1, 13], [4, 17, 2]]
    tokens = random_tokens(2, 23)
    layout = packed(torch.cat([positions_of(*row) for row in lengths]))
    with torch.no_grad():
        together = any_model(tokens, layout=layout)
        for row, parts in enumerate(lengths):
            for document, logits in zip(
                tokens[row].split(parts), together[row].split(parts)
            ):
                alone = any_model(document[None])[0]
                assert_close(logits, alone, rtol=0, atol=1e-12)


def test_no_gradient_crosses_the_border_of_a_document(any_model):
    tokens, layout = random_tokens(1, 12), packed(positions_of(5, 4, 3))
    x = any_model.embed(tokens).detach().requires_grad_()
    hidden = any_model.hidden_states(None, layout=layout, embeds=x)
    (dx,) = torch.autograd.grad(hidden[:, 5:9].square().sum(), x)
    size = dx.abs().sum(-1)[0]  # (T,)
    assert (size[5:9] > 0).all()
    assert (size[:5] == 0).all() and (size[9:] == 0).all()


def test_without_the_layout_gradients_do_cross():
    """So the test above can fail."""
    model, tokens = make_model("llama"), random_tokens(1, 12)
    x = model.embed(tokens).detach().requires_grad_()
    hidden = model.hidden_states(None, embeds=x)
    (dx,) = torch.autograd.grad(hidden[:, 5:9].square().sum(), x)
    assert (dx[:, :5] != 0).any()


@pytest.mark.parametrize("shape", [(4,), (1, 5), (3, 4), (1, 1), (2, 1), (1, 4, 1)])
def test_positions_of_other_tokens_are_refused(shape):
    """Four tokens, four heads: positions (4,) would give each head its own mask."""
    layout = packed(torch.zeros(shape, dtype=torch.long, device=DEVICE))
    size = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"positions of shape {size} .* \(2, 4\)"):
        make_model("llama")(random_tokens(2, 4), layout=layout)


def test_one_layout_serves_all_rows(any_model):
    any_model.double()
    tokens, at = random_tokens(3, 12), positions_of(5, 4, 3)
    with torch.no_grad():
        shared = any_model(tokens, layout=packed(at))
        own = any_model(tokens, layout=packed(at.expand(3, -1).contiguous()))
    assert_close(shared, own, rtol=0, atol=1e-12)


def test_a_layout_may_be_used_again(any_model):
    """The rotation and the masks of one forward do not leak into the next."""
    tokens, layout = random_tokens(2, 9), packed(positions_of(4, 5))
    with torch.no_grad():
        first = any_model(tokens, layout=layout)
        any_model.rope.theta *= 2
        changed = any_model(tokens, layout=layout)
        any_model.rope.theta /= 2
        again = any_model(tokens, layout=layout)
    assert torch.equal(first, again) and not torch.equal(first, changed)
    assert layout.rotation is None


def test_a_triangle_that_the_caches_did_not_reserve_is_refused():
    model, tokens = make_model("llama"), random_tokens(1, 3)
    caches = model.new_caches(1, 8)
    by_hand = Layout(positions=torch.arange(3, device=tokens.device)[None])
    with pytest.raises(ValueError, match="layout.start=0 and 3 tokens .* length=0"):
        model(tokens, caches=caches, layout=by_hand)  # it would not be counted
    with pytest.raises(ValueError, match="3 tokens do not end at the caches' length=0"):
        model(tokens, caches=caches, layout=packed(by_hand.positions))
    layout = caches.reserve(3)
    shifted = dataclasses.replace(layout, positions=layout.positions + 5)
    torch.testing.assert_close(
        model(tokens, caches=caches, layout=shifted), model(tokens), rtol=0, atol=1e-4
    )
