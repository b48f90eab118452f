"""Direct preference optimization, against TRL and against the formula by hand."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minllama import Tokenizer
from minllama.architecture.data import PackedBatches, mark
from minllama.architecture.dropout import add_dropout
from minllama.architecture.optim import make_adamw
from minllama.architecture.train import Run, train
from minllama.dist_checkpoint import load_checkpoint, save_checkpoint
from minllama.peft import add_dora, add_ia3, add_lora, add_prefix, save_adapter
from minllama.peft.dpo import (
    PairBatch,
    PairBatches,
    PreferenceLoss,
    answer_log_probs,
    dpo_loss,
    ipo_loss,
    make_pairs,
    reference_log_probs,
    score_preferences,
)
from minllama.peft.instruct import encode_preferences
from minllama.peft.records import read_preferences
from tests.conftest import make_model


def document(prompt, answer):
    return mark([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def make_documents(count=3, vocab_size=97, seed=0):
    """Pairs whose prompts and answers have all kinds of lengths."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, vocab_size, rng.integers(1, 9)).tolist()
    prompts = [draw() for _ in range(count)]
    return [(document(p, draw()), document(p, draw())) for p in prompts]


def moved(model, std=0.1):
    """The model with its adapter somewhere else than at birth."""
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=std)
    return model


def adapted(name="llama", **changes):
    return moved(add_lora(make_model(name, **changes).double(), 4, 8, "all-linear"))


@torch.no_grad()
def log_prob(model, marked):
    """Of the answer, one token after the other, the slow way."""
    ids, total = torch.tensor(marked["id"].copy()), 0.0
    for i in range(1, len(ids)):
        if marked["learned"][i]:
            total = total + model(ids[None, :i])[0, -1].log_softmax(-1)[ids[i]]
    return total


# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_the_paper_written_out(smoothing):
    """Two models, the reference a copy made before the adapter; token by token."""
    base = make_model("llama").double()
    model = moved(add_lora(copy.deepcopy(base), 4, 8, "all-linear"))
    pairs, beta = make_documents(), 0.3
    by_hand = 0.0
    for chosen, rejected in pairs:
        h = log_prob(model, chosen) - log_prob(base, chosen)
        h = beta * (h - log_prob(model, rejected) + log_prob(base, rejected))
        by_hand += (1 - smoothing) * math.log1p(math.exp(-h))
        by_hand += smoothing * math.log1p(math.exp(h))
    each = functools.partial(dpo_loss, beta=beta, label_smoothing=smoothing)
    ours = PreferenceLoss(each, beta)(model, make_pairs(pairs))
    assert ours.item() == pytest.approx(float(by_hand), rel=1e-6)
    swapped = make_pairs([(b, a) for a, b in pairs])
    assert PreferenceLoss(each, beta)(model, swapped).item() != pytest.approx(
        float(by_hand), rel=1e-3
    )


def test_ipo_is_a_squared_distance_from_half_of_one_over_beta():
    model, pairs, beta = adapted(), make_documents(), 0.2
    batch = make_pairs(pairs)
    ratios = answer_log_probs(model, batch).over(reference_log_probs(model, batch))
    lengths = [[int(d["learned"].sum()) for d in pair] for pair in pairs]
    for i, (better, worse) in enumerate(lengths):
        h = ratios.chosen[i] / better - ratios.rejected[i] / worse
        assert_close(ipo_loss(ratios, beta)[i], (h - 2.5) ** 2)


def test_at_birth_the_loss_is_log_two_and_all_rewards_are_zero():
    for add in (add_lora, add_dora, add_ia3):
        model = add(make_model("llama"))
        loss = PreferenceLoss()
        found = loss(model, make_pairs(make_documents(4)))
        assert found.item() == pytest.approx(4 * math.log(2), rel=1e-6)
        assert loss.margin == 0 and loss.accuracy == 0


def test_the_reference_is_the_model_before_training_whatever_the_adapter_learned():
    for add in (add_lora, add_dora, add_ia3, add_prefix):
        base = make_model("llama")
        batch = make_pairs(make_documents())
        before = answer_log_probs(base, batch)
        model = moved(add(base))
        assert torch.equal(reference_log_probs(model, batch).chosen, before.chosen)
        assert not torch.equal(answer_log_probs(model, batch).chosen, before.chosen)


def test_the_reference_has_no_dropout_and_leaves_the_mode_as_it_was():
    model = add_dropout(adapted(), 0.5).train()
    batch = make_pairs(make_documents())
    first, second = (reference_log_probs(model, batch).chosen for _ in range(2))
    assert torch.equal(first, second) and model.training


def test_padding_and_neighbours_change_no_log_probability():
    model, pairs = adapted(), make_documents(5)
    found = answer_log_probs(model, make_pairs(pairs))
    for i, pair in enumerate(pairs):
        alone = answer_log_probs(model, make_pairs([pair]))
        assert_close(found.chosen[i], alone.chosen[0])
        assert_close(found.rejected[i], alone.rejected[0])


def test_gradients_reach_the_adapter_and_nothing_else():
    model = adapted()
    PreferenceLoss()(model, make_pairs(make_documents())).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_without_an_adapter_there_is_no_reference():
    batch = make_pairs(make_documents())
    with pytest.raises(ValueError, match="the model has no adapter"):
        PreferenceLoss()(make_model("llama"), batch)
    model = adapted()
    model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="norm.weight trains, but belongs to no adapt"):
        PreferenceLoss()(model, batch)
    with pytest.raises(ValueError, match="Batch holds no pairs"):
        PreferenceLoss()(adapted(), next(PackedBatches([np.arange(9)], 1, 8)))
    with pytest.raises(ValueError, match="no pair to score"):
        score_preferences(adapted(), [], PreferenceLoss())


# ------------------------------------------------------------------ against TRL


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_loss_is_trls(tmp_path, kind):
    """The same base, adapter and pairs in both; float32, as TRL computes there."""
    trl = pytest.importorskip("trl", reason="an oracle that is not installed with us")
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = make_model("llama", vocab_size=2048)
    model.save_pretrained(tmp_path / "base")
    moved(add_lora(model, 4, 8, "all-linear"))
    save_adapter(model, tmp_path / "adapter")
    Tokenizer.from_pretrained("stories-mini").save_pretrained(tmp_path / "tok")
    tok = AutoTokenizer.from_pretrained(tmp_path / "tok")
    tok.pad_token = tok.eos_token
    trainer = trl.DPOTrainer(
        LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        args=trl.DPOConfig(
            str(tmp_path / "o"), loss_type=kind, beta=0.3, bf16=False, use_cpu=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        ),
        processing_class=tok,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )  # fmt: skip
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert not set_peft_model_state_dict(trainer.model, tensors).unexpected_keys
    trainer.model.eval()
    pairs = make_documents(5, 2048)
    docs = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    longest = max(map(len, docs))
    padded = lambda rows: torch.stack([
        torch.nn.functional.pad(torch.tensor(row.copy()), (0, longest - len(row)))
        for row in rows
    ])  # fmt: skip
    inputs = {
        "input_ids": padded([d["id"] for d in docs]),
        "attention_mask": padded([np.ones(len(d), np.int64) for d in docs]),
        "completion_mask": padded([d["learned"].astype(np.int64) for d in docs]),
    }
    theirs = trainer._compute_loss(trainer.model, inputs, False)
    each = {"sigmoid": dpo_loss, "ipo": ipo_loss}[kind]
    loss = PreferenceLoss(functools.partial(each, beta=0.3), beta=0.3)
    ours = loss(model, make_pairs(pairs)) / len(pairs)
    assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)  # sums of 40 logits
    told = trainer._metrics["eval"]
    assert loss.margin.item() == pytest.approx(told["rewards/margins"][0], abs=1e-4)
    assert loss.accuracy.item() == told["rewards/accuracies"][0]


# ------------------------------------------------------------------ training


def test_training_makes_the_chosen_answers_the_likelier_ones(tmp_path):
    """On the pairs themselves; and a run that stopped goes on bit for bit."""

    def make_run():
        torch.manual_seed(1)
        model = add_lora(make_model("llama"), 4, 8, "all-linear")
        batches = PairBatches(make_documents(12), batch_size=4, seq_len=1)
        return Run(model, make_adamw(model, 1e-2, 0.0), batches, 20)

    def go(run, steps):
        return train(run.model, run.optimizer, run.batches, steps,
                     loss=PreferenceLoss(), run=run)  # fmt: skip

    run = go(make_run(), 20)
    score = score_preferences(run.model, make_documents(12), PreferenceLoss(), 5)
    assert score.accuracy > 0.9 and score.loss < 0.5 and score.margin > 0.5
    assert run.loss < 0.5
    stopped = go(make_run(), 7)
    save_checkpoint(tmp_path, stopped, parts="trainable")
    resumed = make_run()
    load_checkpoint(tmp_path, resumed, strict=False)
    go(resumed, 20)
    for a, b in zip(run.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


def test_a_score_is_the_mean_over_all_pairs_whatever_the_batch():
    model, pairs, loss = adapted(), make_documents(7), PreferenceLoss()
    whole, parts = (score_preferences(model, pairs, loss, n) for n in (7, 3))
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)
    assert whole.accuracy == pytest.approx(parts.accuracy)
    assert whole.margin == pytest.approx(parts.margin, rel=1e-5)


def test_batches_of_pairs_are_counted_and_moved_as_pairs():
    batches = PairBatches(make_documents(9), batch_size=4, seq_len=8)
    batch = next(batches).to("cpu")
    assert isinstance(batch, PairBatch) and int(batch.counted()) == 4
    assert batch.tokens.size(0) == 8 and batches.batches_per_epoch() == 2
    shares = [PairBatches(make_documents(9), 4, 8, rank=r, world=2) for r in (0, 1)]
    first = [next(share).tokens.size(0) for share in shares]
    assert first == [4, 4]


# ------------------------------------------------------------------ what is read


def write(tmp_path, *records):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def said(text, role="assistant"):
    return [{"role": role, "content": text}]


def test_texts_and_messages_become_pairs_with_one_prompt(tmp_path):
    tok = Tokenizer.from_pretrained("stories-mini")
    asked = said("Why?", "user")
    path = write(
        tmp_path,
        {"prompt": "Once", "chosen": " upon", "rejected": " more"},
        {"prompt": asked, "chosen": said("So."), "rejected": said("No.")},
        {"chosen": asked + said("So."), "rejected": asked + said("No.")},
    )
    found = encode_preferences(read_preferences(path), tok, 64, "llama3").documents
    (text, other), (told, _), (implied, _) = found
    assert text["id"].tolist() == tok.encode("Once", True) + tok.encode(
        " upon", eos=True
    )
    assert tok.decode(other["id"][other["learned"]]) == " more"
    assert told["id"].tolist() == tok.encode_chat(asked + said("So."), False)
    assert np.array_equal(told, implied)
    answer = tok.decode(told["id"][told["learned"]], skip_special=False)
    assert answer == "So.<|eot_id|>"


def test_answers_within_the_prompt_are_not_compared(tmp_path):
    tok = Tokenizer.from_pretrained("stories-mini")
    prompt = said("Hi.", "user") + said("Hello.") + said("Why?", "user")
    path = write(
        tmp_path, {"prompt": prompt, "chosen": said("So."), "rejected": said("No.")}
    )
    for format in ("llama3", "plain"):
        pair = encode_preferences(read_preferences(path), tok, 64, format).documents[0]
        texts = [tok.decode(d["id"][d["learned"]]).strip() for d in pair]
        assert texts == ["So.", "No."]


def test_too_long_pairs_are_cut_or_left_out_and_counted(tmp_path):
    tok = Tokenizer.from_pretrained("stories-mini")
    long = "word " * 60
    records = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": long, "rejected": "c"},
        {"prompt": long, "chosen": "b", "rejected": "c"},
    ]
    found = encode_preferences(read_preferences(write(tmp_path, *records)), tok, 32)
    assert (len(found.documents), found.cut, found.dropped) == (2, 1, 1)
    path = write(tmp_path, records[2])
    with pytest.raises(ValueError, match="seq_len=32: the prompts of all 1"):
        encode_preferences(read_preferences(path), tok, 32)


@pytest.mark.parametrize(("record", "words"), [
    ({"prompt": "a", "chosen": "b"}, "line 2: has no 'rejected'"),
    ({"chosen": "b", "rejected": "c"}, "line 2: texts need their prompt"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "line 2: chosen and reject"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "line 2: has an empty answer"),
    ({"prompt": "a", "chosen": "b", "rejected": 3}, "line 2: rejected=3 must be"),
    ({"prompt": 5, "chosen": "b", "rejected": "c"}, "line 2: prompt=5 must be"),
    ({"prompt": "a", "chosen": said("b"), "rejected": said("c")}, "prompt: .a. is no"),
    ({"prompt": said("a", "user"), "chosen": said("b"), "rejected": "c"},
     "line 2, rejected: .c. is no list"),
    ({"prompt": said("a", "user"), "chosen": said("b", "user"), "rejected": said("c")},
     "line 2: an answer must end with"),
    ({"chosen": said("a", "user"), "rejected": said("a", "user")}, "line 2: chosen"),
    ({"prompt": said("a", "user"), "chosen": said(" "), "rejected": said("c")},
     "line 2: has an empty answer"),
])  # fmt: skip
def test_what_is_wrong_with_a_preference_is_told_with_its_line(tmp_path, record, words):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match=words) as error:
        read_preferences(write(tmp_path, good, record))
    assert "pairs.jsonl" in str(error.value)
