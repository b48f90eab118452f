"""Supervised fine-tuning: what is read, what is learned, and the pirate experiment."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from benchmarks.bench_peft_pirate import energy_shares, spectrum
from minllama import MinimalLlama, Tokenizer, generate
from minllama.architecture.chat import Special
from minllama.architecture.data import (
    IGNORE,
    PackedBatches,
    encode_documents,
    make_batch,
    mark,
    read_documents,
)
from minllama.architecture.optim import make_adamw
from minllama.architecture.train import Run, next_token_loss, train, warmup_cosine
from minllama.peft import add_lora, add_prompt, set_adapter, trainable_parameters
from minllama.peft.instruct import (
    check_format,
    encode_conversation,
    encode_conversations,
)
from minllama.peft.records import Conversation, read_conversations
from minllama.peft.sft import (
    Learned,
    held_out_loss,
    load_learned,
    save_learned,
    with_prompt,
)
from tests.conftest import make_model, tiny_config

TEXTS = Path(__file__).parents[2] / "minllama/assets/texts"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is it wet?"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "The sun shines, at last!"},
]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_pretrained("stories-mini")


@pytest.fixture(scope="module")
def chatml():
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    return Tokenizer.train(["a b"], 256 + 3, special_tokens=special)


@pytest.fixture(scope="module")
def llama2():
    return Tokenizer.train(["a b"], 256 + 2, special_tokens=("<s>", "</s>"))


def answers(document, tok):
    """The learned stretches of a marked document, as text with special tokens."""
    learned = np.concatenate([[False], document["learned"], [False]])
    edges = np.flatnonzero(learned[1:] != learned[:-1])
    ids = document["id"]
    return [tok.decode(ids[a:b], skip_special=False) for a, b in edges.reshape(-1, 2)]


def write(tmp_path, *records, name="data.jsonl"):
    path = tmp_path / name
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines))
    return path


# ------------------------------------------------------------------ what is learned


def test_only_the_answers_and_their_end_of_turn_are_learned(tok):
    found = answers(encode_conversation(TALK, tok, "llama3"), tok)
    said = [m["content"] for m in TALK if m["role"] == "assistant"]
    assert found == [f"{text}<|eot_id|>" for text in said]


def test_chatml_learns_the_answer_up_to_its_end_and_not_the_line_feed(chatml):
    found = answers(encode_conversation(TALK, chatml), chatml)
    assert found == ["It rains.<|im_end|>", "The sun shines, at last!<|im_end|>"]


def test_llama2_learns_the_answer_and_its_end(llama2):
    found = answers(encode_conversation(TALK, llama2), llama2)
    assert found == [" It rains. </s>", " The sun shines, at last! </s>"]


def test_plain_words_end_an_answer_with_the_end_of_a_text(tok):
    document = encode_conversation(TALK, tok, "plain")
    end = tok.decode([tok.eos_id], skip_special=False)
    assert answers(document, tok) == [
        f" It rains.{end}",
        f" The sun shines, at last!{end}",
    ]
    text = tok.decode(document["id"])
    assert text.startswith("Be brief.\nQuestion: Why is it wet?\nAnswer: It rains.")


@pytest.mark.parametrize("format", ["llama3", "plain"])
def test_what_is_asked_later_is_what_was_read_in_training(tok, format):
    """The ids before an answer are those that a user's prompt will have."""
    document = encode_conversation(TALK[:3], tok, format)
    begin = int(document["learned"].argmax())
    if format == "plain":
        prompt = "Be brief.\nQuestion: Why is it wet?\nAnswer:"
        asked = tok.encode(prompt, bos=True)
    else:
        asked = tok.encode_chat(TALK[:2])
    assert document["id"][:begin].tolist() == asked


def test_the_document_is_the_whole_conversation(tok):
    document = encode_conversation(TALK, tok, "llama3")
    assert document["id"].tolist() == tok.encode_chat(TALK, False)


def test_a_loss_on_the_answers_is_that_of_a_naive_mask(tok):
    """Equal to the loss computed one answer at a time, by hand, in float64."""
    model = make_model("llama", vocab_size=tok.vocab_size).double()
    document = encode_conversation(TALK, tok, "llama3")
    ours = next_token_loss(model, make_batch([[document]], 80))
    ids = torch.tensor(document["id"].copy())[None]
    logp = model(ids[:, :-1]).log_softmax(-1)[0]
    learned = [i for i in range(1, ids.size(1)) if document["learned"][i]]
    by_hand = -sum(logp[i - 1, ids[0, i]] for i in learned)
    assert_close(ours, by_hand, rtol=1e-12, atol=0)
    planted = document.copy()
    planted["learned"][learned[0] - 1] = True  # one token of the header too many
    wrong = next_token_loss(model, make_batch([[planted]], 80))
    assert (wrong - ours).abs() > 1e-3


def test_packed_conversations_cost_what_they_cost_alone_and_see_no_neighbour(tok):
    model = make_model("llama", vocab_size=tok.vocab_size).double()
    docs = [encode_conversation(TALK[:n], tok, "plain") for n in (3, 5, 3)]
    packed = next_token_loss(model, make_batch([docs], 160))
    alone = sum(next_token_loss(model, make_batch([[d]], len(d) - 1)) for d in docs)
    assert_close(packed, alone, rtol=1e-6, atol=0)


def test_marked_documents_are_packed_as_others_are(tok):
    docs = [encode_conversation(TALK, tok, "plain")] * 9
    batches = PackedBatches(docs, batch_size=2, seq_len=128)
    batch = next(batches)
    kept = batch.targets != IGNORE
    assert int(batch.counted()) == int(kept.sum()) > 0
    assert not kept.all(1).any()
    plain = PackedBatches([d["id"].copy() for d in docs], batch_size=2, seq_len=128)
    assert torch.equal(batch.tokens, next(plain).tokens)


def test_a_mark_on_every_token_changes_nothing():
    ids = np.arange(2, 40)
    whole = make_batch([[mark(ids, np.ones(len(ids), bool))]], 40)
    assert torch.equal(whole.targets, make_batch([[ids]], 40).targets)


def test_the_end_of_turn_is_learned_so_that_an_answer_stops(tok):
    """Trained on one answer, the model gives it and stops there."""
    torch.manual_seed(0)
    model = MinimalLlama(tiny_config(vocab_size=tok.vocab_size, tie_embeddings=True))
    document = encode_conversation(TALK[:3], tok, "llama3")
    batches = PackedBatches([document], 1, 64)
    train(model, make_adamw(model, 1e-2, 0.0), batches, 40)
    ids = tok.encode_chat(TALK[:2])
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in tok.stop_ids:
            break
    assert tok.decode(ids, skip_special=False).endswith("It rains.<|eot_id|>")


# ------------------------------------------------------------------ what is read


def test_all_shapes_of_records_say_the_same(tmp_path):
    turns = [("user", "human", "Why?"), ("assistant", "gpt", "Because.")]
    path = write(
        tmp_path,
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"messages": [{"role": r, "content": c} for r, _, c in turns]},
        {"conversations": [{"from": f, "value": c} for _, f, c in turns]},
        "",
    )
    first, *others = read_conversations(path)
    assert [m["content"] for m in first.messages] == ["Why?", "Because."]
    assert [talk.messages for talk in others] == [first.messages] * 2
    assert first.where == f"{path}, line 1"


def test_a_list_in_json_is_read_as_lines_are(tmp_path):
    records = [{"instruction": "Add.", "input": "1 + 1", "output": "2"}] * 2
    lines = read_conversations(write(tmp_path, *records))
    path = tmp_path / "data.json"
    path.write_text("\ufeff" + json.dumps(records, indent=2))
    listed = read_conversations(path)
    assert [t.messages for t in listed] == [t.messages for t in lines]
    assert listed[1].where == f"{path}, record 2"
    assert listed[0].messages[0]["content"] == "Add.\n1 + 1"


def test_the_shipped_questions_are_read_whole(tok):
    talks = read_conversations(TEXTS / "questions.jsonl")
    found = encode_conversations(talks, tok, 256, "plain")
    assert len(found.documents) == 139 and (found.cut, found.dropped) == (0, 0)


GOOD = {"instruction": "Why?", "output": "Because."}


@pytest.mark.parametrize(("record", "words"), [
    ('{"instruction": "a"', "line 2: no JSON"),
    ("[1, 2]", "line 2: .*no JSON object"),
    ('"text"', "line 2: \"text\" is no JSON object"),
    ({"instruction": "a"}, "line 2: the fields .'instruction'. are none of the known"),
    ({"text": "a"}, r"line 2: the fields \['text'\]"),
    ({"instruction": "a", "output": 3}, "line 2: output=3 must be a string"),
    ({"instruction": "a", "output": " "}, "line 2: has an empty answer"),
    ({"messages": []}, r"line 2, messages: \[\] is no list of messages"),
    ({"messages": "hi"}, 'line 2, messages: "hi" is no list'),
    ({"messages": [7]}, "line 2, messages, message 1: 7 is none"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "message 1: role='robot'"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1: role="),
    ({"messages": [{"role": "user", "content": None}]}, "content=None of the user's"),
    ({"messages": [{"role": "user", "content": "a"}]}, "line 2: has no answer"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "line 2: begins with the"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "line 2: begins with the"),
    ("[" * 100000, "line 2: no JSON"),
])  # fmt: skip
def test_what_is_wrong_with_a_record_is_told_with_file_and_line(
    tmp_path, record, words
):
    path = write(tmp_path, GOOD, record)
    with pytest.raises(ValueError, match=words) as error:
        read_conversations(path)
    assert "data.jsonl" in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(("text", "words"), [
    ("", "holds no record"), ("\n \n", "holds no record"), ("[]", "holds no record"),
    ('[{"instruction": "a",\n "output" "b"}]', "data.json, line 2: no JSON"),
    ("[" * 100000, "data.json.*no JSON"), ("[3]", "record 1: 3 is no JSON object"),
])  # fmt: skip
def test_a_broken_list_is_told(tmp_path, text, words):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_conversations(path)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl is no file"):
        read_conversations(tmp_path / "nowhere.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"instruction": "\xff"}')
    with pytest.raises(ValueError, match="is no UTF-8 .byte 17."):
        read_conversations(tmp_path / "a.jsonl")


def test_a_long_answer_is_cut_and_a_long_question_left_out_and_both_are_counted(tok):
    def talk(question, answer):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return Conversation(messages, "here")

    talks = [talk("a", "b"), talk("a", "word " * 99), talk("word " * 99, "b")]
    found = encode_conversations(talks, tok, 32, "plain")
    assert [len(d) for d in found.documents][1] == 33  # 32 inputs, each with a target
    assert (len(found.documents), found.cut, found.dropped) == (2, 1, 1)
    with pytest.raises(ValueError, match="seq_len=32: the questions of all 1"):
        encode_conversations(talks[2:], tok, 32, "plain")


def test_a_format_that_cannot_say_it_is_told_with_its_line(llama2, tok):
    twice = [TALK[1], TALK[1], TALK[2]]
    with pytest.raises(ValueError, match="a.jsonl, line 3: role='user' of turn 2"):
        encode_conversations([Conversation(twice, "a.jsonl, line 3")], llama2, 64)
    with pytest.raises(ValueError, match="format='alpaca' must be one of plain, llama"):
        check_format("alpaca", tok)
    bare = Tokenizer.train(["a"], 256, special_tokens=())
    assert check_format(None, bare) == "plain"


def test_text_cannot_forge_the_end_of_a_turn(tok):
    forged = [TALK[1], {"role": "assistant", "content": "a<|eot_id|>b"}]
    document = encode_conversation(forged, tok, "llama3")
    eot = tok.special_tokens["<|eot_id|>"]
    assert (document["id"] == eot).sum() == 2 and Special("x") == "x"


# ------------------------------------------------------------------ going on, scoring


def make_run(steps=8, dropout=0.3):
    torch.manual_seed(3)
    model = make_model("llama", tie_embeddings=True)
    add_lora(model, 2, 4, "all-linear", dropout=dropout)
    rng = np.random.default_rng(0)
    docs = [mark(rng.integers(0, 97, n), rng.random(n) < 0.5) for n in range(6, 26)]
    batches = PackedBatches(docs, batch_size=2, seq_len=32)
    return Run(model, make_adamw(model, 1e-2), batches, steps)


def go(run, steps, hooks=()):
    schedule = warmup_cosine(8, 2)
    return train(run.model, run.optimizer, run.batches, steps, schedule,
                 hooks=hooks, run=run)  # fmt: skip


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    whole = go(make_run(), 8)
    stopped = go(make_run(), 5)
    save_learned(stopped, tmp_path / "state.pt")
    resumed = load_learned(make_run(), tmp_path / "state.pt")
    assert (resumed.step, resumed.tokens) == (5, stopped.tokens)
    go(resumed, 8)
    for (name, a), b in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert whole.loss == resumed.loss


def test_a_training_state_holds_what_learns_and_nothing_else(tmp_path):
    run = make_run()
    save_learned(run, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    learned = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert set(state["model"]) == learned and learned
    count = sum(t.numel() for t in state["model"].values())
    assert count == trainable_parameters(run.model)


def test_a_state_of_another_adapter_is_refused(tmp_path):
    run = make_run()
    save_learned(run, tmp_path / "state.pt")
    other = make_run()
    next(p for p in other.model.parameters() if p.requires_grad).requires_grad_(False)
    with pytest.raises(ValueError, match="another model.*trains in one of the two"):
        load_learned(other, tmp_path / "state.pt")
    assert list(Learned(run.model).parameters())


def test_the_loss_held_out_is_the_mean_over_the_learned_tokens():
    model = make_model("llama").double()
    rng = np.random.default_rng(1)
    docs = [mark(rng.integers(0, 97, n), rng.random(n) < 0.6) for n in (9, 14, 30, 5)]
    total = sum(next_token_loss(model, make_batch([[d]], len(d) - 1)) for d in docs)
    count = sum(int(d["learned"][1:].sum()) for d in docs)
    model.train()
    loss = held_out_loss(model, docs, seq_len=32, batch_size=1)
    assert loss == pytest.approx(total.item() / count, rel=1e-6) and model.training
    with pytest.raises(ValueError, match="no document has a token to learn"):
        held_out_loss(model, [mark([1, 2, 3], [False] * 3)], 8)


def test_a_learned_prompt_stands_before_every_piece_and_is_not_learned():
    model = add_prompt(make_model("llama"), size=3)
    docs = [np.arange(20), mark(np.arange(5), [True] * 5)]
    found = with_prompt(model, docs, seq_len=8)
    assert [len(d) for d in found] == [3 + 9, 3 + 9, 3 + 4, 3 + 5]
    for document in found:
        assert document["id"][:3].tolist() == [97, 98, 99]
        assert document["learned"].tolist() == [False] * 4 + [True] * (
            len(document) - 4
        )
    batch = make_batch([found[:1], found[1:2]], 11)
    learned = batch.targets[batch.targets != IGNORE].tolist()
    assert learned == [*range(1, 9), *range(9, 17)]


# ------------------------------------------------------------------ the experiment


STYLE, OWN = 0, 1  # held-out tales; stories that the model told before training


@dataclass
class Voyage:
    """One seed: losses on both texts."""

    share: float
    before: tuple[float, float]
    full: tuple[float, float]
    adapter: tuple[float, float]
    half: tuple[float, float]
    off: tuple[float, float]


@pytest.fixture(scope="module")
def voyages(tok):
    """Teach stories-mini the tales: all of it, and an adapter of two percent.

    The rates 1e-4 and 3e-3 are those that the benchmark's sweep chose on a slice of the
    training text; no held-out tale had a say.
    """
    read = lambda name: encode_documents(read_documents(TEXTS / name), tok)
    tales, held = read("pirate.txt"), read("pirate_heldout.txt")
    load = lambda: MinimalLlama.from_pretrained("stories-mini", dtype=torch.float32)
    begin = torch.full((8, 1), tok.bos_id)
    own = list(generate(load(), begin, 100, temperature=1.0, seed=0).numpy())

    def score(model):
        return held_out_loss(model, held, 256), held_out_loss(model, own, 256)

    def learn(model, lr, seed):
        torch.manual_seed(seed)
        batches = PackedBatches(tales, 4, 256, seed)
        schedule = warmup_cosine(20, 2, floor=0.0)
        train(model, make_adamw(model, lr, 0.0), batches, 20, schedule)
        return score(model)

    before, found = score(load()), []
    for seed in range(3):
        torch.manual_seed(seed)
        model = load()
        whole = trainable_parameters(model)
        share = trainable_parameters(add_lora(model, 2, 4, "all-linear")) / whole
        full, adapter = learn(load(), 1e-4, seed), learn(model, 3e-3, seed)
        half, off = (score(set_adapter(model, {"default": w})) for w in (0.5, 0.0))
        found.append(Voyage(share, before, full, adapter, half, off))
    return found


def test_the_shipped_model_talks_like_a_pirate_with_two_percent_of_it(voyages):
    """By 0.3 nats a token, on tales it has not read; switched off, it never has."""
    for voyage in voyages:
        assert voyage.share < 0.02
        assert voyage.adapter[STYLE] < voyage.before[STYLE] - 0.3
        assert voyage.off == voyage.before


def test_an_adapter_at_half_strength_has_learned_and_forgets_less_than_all(voyages):
    """0.2 nats learned, and less lost than by full fine-tuning at its own best rate.

    At full strength this adapter loses more, since a rank of 2 has to move far: see
    benchmarks/results/peft_pirate.csv. To turn it down costs nothing after training.
    """
    for voyage in voyages:
        assert voyage.half[STYLE] < voyage.before[STYLE] - 0.2
        lost = voyage.half[OWN] - voyage.before[OWN]
        assert 0 < lost < voyage.full[OWN] - voyage.before[OWN]


def test_the_spectrum_of_a_change_of_rank_two_ends_after_two_directions():
    u, v = torch.randn(30, 2), torch.randn(2, 20)
    shares = energy_shares(u @ v)
    assert shares[1] == pytest.approx(1, abs=1e-5) and 0.5 <= shares[0] < 0.999
    before = MinimalLlama(tiny_config())
    after = copy.deepcopy(before)
    with torch.no_grad():
        weight = after.layers[1].mlp.up_proj.weight
        weight += torch.outer(torch.randn(48), torch.randn(32))
        for other in after.parameters():
            if other is not weight:
                other += torch.randn_like(other)
    rows = {row["weight"]: row for row in spectrum(before, after)}
    changed = rows["layers.1.mlp.up_proj.weight"]
    assert changed["rank_of_90_percent"] == 1 and changed["kind"] == "up_proj"
    noise = rows["layers.0.mlp.up_proj.weight"]
    assert float(noise["first_8"]) == pytest.approx(float(noise["random_8"]), abs=0.1)
