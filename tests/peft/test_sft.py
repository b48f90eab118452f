"""Supervised fine-tuning: what is read, what is learned, and the pirate experiment."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import AdamW
from torch.testing import assert_close

from benchmarks.bench_peft_pirate import (
    choose,
    energy_shares,
    forgotten_at,
    read_table,
    spectrum,
)
from benchmarks.pirate import METHODS, Bench, read_texts
from benchmarks.record import RESULTS
from minllama import MinimalLlama, Tokenizer
from minllama.architecture.chat import Special
from minllama.architecture.data import (
    IGNORE,
    PackedBatches,
    make_batch,
    mark,
)
from minllama.architecture.optim import make_adamw
from minllama.architecture.train import Run, next_token_loss, train, warmup_cosine
from minllama.dist_checkpoint import load_checkpoint, save_checkpoint
from minllama.peft import (
    RankAllocator,
    add_adalora,
    add_lora,
    add_prompt,
    lora_plus_groups,
    make_galore,
    set_adapter,
    trainable_parameters,
)
from minllama.peft.instruct import (
    check_format,
    encode_conversation,
    encode_conversations,
)
from minllama.peft.records import Conversation, read_conversations
from minllama.peft.sft import held_out_loss, with_prompt
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


def make_run(method="lora", rank=2):
    """Eight steps of one of the ways to learn, dropout and all."""
    torch.manual_seed(3)
    model = make_model("llama", tie_embeddings=True)
    if method == "adalora":
        optimizer = make_adamw(add_adalora(model, rank + 1, 4), 1e-2)
        RankAllocator(model, optimizer, rank, steps=8, warmup=1, final=2)
    elif method == "galore":
        optimizer = make_galore(model, 1e-2, rank, every=3)
    else:
        add_lora(model, rank, 4, "all-linear", dropout=0.3)
        groups = lora_plus_groups(model, 1e-3)
        optimizer = make_adamw(model, 1e-2) if method == "lora" else AdamW(groups)
    rng = np.random.default_rng(0)
    docs = [mark(rng.integers(0, 97, n), rng.random(n) < 0.5) for n in range(6, 26)]
    return Run(model, optimizer, PackedBatches(docs, batch_size=2, seq_len=32), 8)


def go(run, steps):
    schedule = warmup_cosine(8, 2)
    return train(run.model, run.optimizer, run.batches, steps, schedule, run=run)


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("method", ["lora", "lora+", "adalora", "galore"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, method, steps):
    """From a checkpoint of what learns and what its optimizer remembers."""
    whole = go(make_run(method), 8)
    stopped = go(make_run(method), steps)
    save_checkpoint(tmp_path, stopped, parts="trainable")
    resumed = make_run(method)
    loaded = load_checkpoint(tmp_path, resumed, strict=False)
    frozen = {n for n, p in whole.model.named_parameters() if not p.requires_grad}
    assert set(loaded.left_alone) == frozen and bool(frozen) == (method != "galore")
    assert (resumed.step, resumed.tokens) == (steps, stopped.tokens)
    go(resumed, 8)
    for (name, a), b in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert whole.loss == resumed.loss


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    save_checkpoint(tmp_path, make_run(), parts="trainable")
    with pytest.raises(ValueError, match=r"\(2, 32\).*where the model has \(3, 32\)"):
        load_checkpoint(tmp_path, make_run(rank=3), strict=False)


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


TABLE = read_table(RESULTS / "peft_pirate.csv")
LORA = "lora, upper half"


@dataclass
class Voyage:
    """One seed: nats a token on held-out tales (style) and on own stories."""

    share: float  # of the model's numbers, that the adapter learns
    full: dict[str, float]
    adapter: dict[str, float]
    off: dict[str, float]  # the adapter, switched off
    slow: dict[str, float]  # full fine-tuning at a fifth of its best rate


@pytest.fixture(scope="module")
def bench():
    texts = read_texts("stories-mini", None, own=8)
    texts = {name: texts[name] for name in ("tales", "style", "own")}
    return Bench("stories-mini", "cpu", texts)


@pytest.fixture(scope="module")
def before(bench):
    return bench.score(bench.base, "full")


@pytest.fixture(scope="module")
def voyages(bench):
    """Teach stories-mini the tales in 15 steps: all of it, and less than two percent.

    Each at its best rate for 15 steps, which the benchmark's table knows from tales
    that it kept out of training. The tales that score here had no say.
    """
    short = [row for row in TABLE if int(row["steps"]) == 15]
    best = {method: choose(short, method)[0] for method in ("full", LORA)}
    found = []
    for seed in range(3):
        full, adapter, slow = (
            bench.learn((method, rate, 15, seed))[0]
            for method, rate in [*best.items(), ("full", best["full"] / 5)]
        )
        share = trainable_parameters(adapter) / trainable_parameters(full)
        scores = [bench.score(model, "full") for model in (full, adapter, slow)]
        off = bench.score(set_adapter(adapter, {"default": 0.0}), LORA)
        found.append(Voyage(share, scores[0], scores[1], off, scores[2]))
    return found


def test_less_than_two_percent_learn_the_style_and_forget_less_than_all(
    voyages, before
):
    """0.3 nats learned, and below 0.6 of the forgetting, each at its own best rate."""
    for voyage in voyages:
        assert voyage.share < 0.02
        assert voyage.adapter["style"] < before["style"] - 0.3
        lost = voyage.adapter["own"] - before["own"]
        assert 0.05 < lost < 0.6 * (voyage.full["own"] - before["own"])


def test_switched_off_an_adapter_has_forgotten_nothing(voyages, before):
    for voyage in voyages:
        assert voyage.off == before


def test_full_fine_tuning_at_a_lower_rate_forgets_less_than_the_adapter(
    voyages, before
):
    """And learns more: with so few numbers to move, the same style costs more."""
    for voyage in voyages:
        assert voyage.slow["style"] < voyage.adapter["style"]
        assert voyage.slow["own"] < voyage.adapter["own"]


def test_the_best_rate_is_the_one_that_kept_out_tales_choose():
    row = {"method": "lora", "lr": "0.1", "steps": "30", "seed": "0", "strength": "1.0"}
    rows = [
        {**row, "slice": "4.0"},
        {**row, "slice": "3.0", "lr": "0.2"},
        {**row, "slice": "1.0", "strength": "0.5"},  # half strength has no say,
        {**row, "slice": "1.0", "seed": "1"},  # nor has another seed,
        {**row, "slice": "1.0", "method": "full"},  # nor another method
    ]
    assert choose(rows, "lora") == (0.2, 30)


def test_what_is_forgotten_at_equal_learning_lies_between_two_rates():
    row = {"steps": "30", "style": "5.0", "own": "1.0"}
    rows = [
        {**row, "lr": "0.3", "style": "4.0", "own": "1.5"},
        {**row, "lr": "0.1", "style": "4.8", "own": "1.1"},
        {**row, "lr": "0.2", "style": "4.6", "own": "1.2"},
    ]
    assert forgotten_at(rows, row, 0.7) == pytest.approx(0.35)
    assert np.isnan(forgotten_at(rows, row, 1.1))


@pytest.mark.parametrize("method", [name for name in METHODS if "lora" in name])
def test_adapters_of_the_experiment_learn_less_than_two_percent(method):
    model = MinimalLlama.from_pretrained("stories-mini", dtype=torch.float32)
    whole = trainable_parameters(model)
    METHODS[method][0](model)
    assert (trainable_parameters(model) < 0.02 * whole) == (method != "lora, r = 32")


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
