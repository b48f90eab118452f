"""A session keeps its cache, and says what a fresh model would say."""

import io

import pytest
import torch

from minllama import MinimalLlama, Tokenizer, generate
from minllama.architecture.generate import Sampling
from minllama.recipes import chat
from minllama.recipes.chat import Session, converses


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_pretrained("stories-mini")


@pytest.fixture(scope="module")
def model():
    return MinimalLlama.from_pretrained("stories-mini")


def fed(model):
    """Counts the tokens that the model is given."""
    seen = []
    return seen, model.embed_tokens.register_forward_hook(
        lambda m, x, y: seen.append(x[0].numel())
    )


def test_a_story_told_by_two_equals_one_generated_whole(model, tok):
    session = Session(model, tok, Sampling(), chat=False, max_new_tokens=12)
    first = "".join(session.say("Once upon a time"))
    second = "".join(session.say(" Then Tom"))
    text = "Once upon a time" + first + " Then Tom"
    assert session.transcript() == text + second + "\n"
    ids = session.story[: -len(tok.encode(second))] if second else session.story
    out = generate(model, torch.tensor([ids]), 12)
    assert tok.decode(out[0, len(ids) :].tolist()) == second


def test_a_turn_costs_only_its_own_tokens(model, tok):
    session = Session(model, tok, Sampling(), chat=False, max_new_tokens=10)
    list(session.say("There was a dog and a cat and a bird in a big green tree."))
    seen, hook = fed(model)
    list(session.say(" It ran"))
    hook.remove()
    assert seen[0] <= len(tok.encode(" It ran")) + 1  # and the last token, not yet seen


def test_a_chat_equals_the_whole_conversation_encoded_anew(model, tok):
    session = Session(model, tok, Sampling(), chat=True, system="Be kind.",
                      max_new_tokens=8)  # fmt: skip
    answers = ["".join(session.say(text)) for text in ("Hi!", "Who are you?")]
    ids = tok.encode_chat([
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "Who are you?"},
    ])  # fmt: skip
    stops = (*model.config.eos_ids, *tok.stop_ids)
    out = generate(model, torch.tensor([ids]), 8, stop_ids=stops)
    assert tok.decode(out[0, len(ids) :].tolist()) == answers[1]


def test_a_long_chat_forgets_its_oldest_turns_but_not_the_system(model, tok):
    session = Session(model, tok, Sampling(), chat=True, system="S", max_new_tokens=4)
    for turn in range(12):
        list(session.say(f"{turn} " + "word " * 60))
    roles = [message["role"] for message in session.messages]
    assert roles[0] == "system" and session.messages[1]["role"] == "user"
    assert not session.messages[1]["content"].startswith("0 ") and len(roles) < 20


def test_an_interrupted_turn_leaves_a_session_that_goes_on(model, tok):
    session = Session(model, tok, Sampling(), chat=False, max_new_tokens=30)
    turn = session.say("Once upon a time")
    heard = [next(turn) for _ in range(5)]
    turn.close()
    assert session.text == "Once upon a time" + "".join(heard)
    ids = [*session.story, *tok.encode(" and")]
    text = "".join(session.say(" and"))  # the cache is rewound to what was heard
    out = generate(model, torch.tensor([ids]), 30)[0, len(ids) :].tolist()
    assert text and tok.decode(out) == text


def test_reset_forgets(model, tok):
    session = Session(model, tok, Sampling(), chat=False, max_new_tokens=10)
    first = list(session.say("A small boat"))
    session.reset()
    assert list(session.say("A small boat")) == first


def test_a_full_context_is_told(model, tok):
    session = Session(model, tok, Sampling(), chat=False)
    with pytest.raises(
        ValueError, match="leave no room in a context of 512; begin anew"
    ):
        list(session.say("word " * 600))


def test_a_message_that_is_too_long_leaves_no_trace(model, tok):
    session = Session(model, tok, Sampling(), chat=True, system="S", max_new_tokens=4)
    list(session.say("Hello"))
    before = list(session.messages)
    with pytest.raises(ValueError, match="leave no room"):
        list(session.say("word " * 600))
    assert session.messages == before and list(session.say("And now?")) is not None
    story = Session(model, tok, Sampling(), chat=False, max_new_tokens=4)
    with pytest.raises(ValueError, match="leave no room"):
        list(story.say("word " * 600))
    assert story.text == "" and list(story.say("A boat"))


def test_an_interrupt_while_reading_leaves_the_cache_honest(model, tok):
    session = Session(model, tok, Sampling(), chat=False, max_new_tokens=8)
    list(session.say("A small boat"))

    def interrupt(module, inputs, output):
        raise KeyboardInterrupt

    hook = model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(session.say(" and then"))
    hook.remove()
    ids = [*session.story, *tok.encode(" the")]
    text = "".join(session.say(" the"))
    out = generate(model, torch.tensor([ids]), 8)[0, len(ids) :].tolist()
    assert tok.decode(out) == text


def test_a_model_converses_if_it_ends_its_turns(model, tok):
    assert not converses(model, tok)
    ends = (tok.eos_id, tok.special_tokens["<|eot_id|>"])
    config = type(model.config)(**{**model.config.to_dict(), "eos_ids": ends})
    assert converses(MinimalLlama(config), tok)


def test_the_command_answers_lines_and_obeys_slashes(monkeypatch, capsys, tmp_path):
    lines = ["A boat", "", "/save " + str(tmp_path / "s.txt"), "/save /no/such/f",
             "/what", "/reset", "A fox", "/quit", "never read"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    chat.chat_with("stories-mini", Sampling(seed=1), max_new_tokens=5, device="cpu")
    out = capsys.readouterr().out
    assert "goes on from what you write" in out and "begun anew" in out
    assert (tmp_path / "s.txt").read_text().startswith("A boat")
    assert "f was not written" in out and out.count("/quit") == 2
