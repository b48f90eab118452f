"""`minllama finetune`, as a user types it."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minllama import MinimalLlama, Tokenizer
from minllama.architecture.data import encode_documents, read_documents
from minllama.cli import main, make_parser
from minllama.peft import load_adapter
from minllama.peft.sft import held_out_loss
from minllama.recipes import finetune as recipe
from minllama.recipes.finetune_options import METHODS, FinetuneOptions

TEXTS = Path(__file__).parents[2] / "minllama/assets/texts"
TALES = "Arr, me hearties! The sea be wide. {}\n<|endoftext|>\n"
QUESTION = {"instruction": "What be the sea?", "input": "", "output": "Wide."}


def told(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    code = main([str(word) for word in arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def data(tmp_path):
    text = "".join(TALES.format(f"I saw {n} fish.") for n in range(12))
    (tmp_path / "tales.txt").write_text(text)
    lines = [json.dumps({**QUESTION, "output": f"Wide, {n}."}) for n in range(8)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    pairs = [{"prompt": f"The sea {n}", "chosen": " be wide.", "rejected": " is wide."}
             for n in range(8)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path


def words(folder, *more, file="tales.txt"):
    source = "--dpo" if file == "pairs.jsonl" else "--data"
    return [
        "finetune", source, folder / file, "--out", folder / "out", "--model",
        "stories-mini", "--device", "cpu", "--seq-len", 32, "--batch-size", 2,
        "--steps", 4, *more,
    ]  # fmt: skip


def scores(folder):
    return json.loads((folder / "out/scores.json").read_text())


def test_finetune_writes_an_adapter_that_does_what_was_scored(capsys, data):
    code, out, _ = told(capsys, *words(data, "--lr", "3e-3", "--valid-share", "0.25"))
    assert code == 0 and "parameters learn" in out and "3 held out" in out
    names = {file.name for file in (data / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "curve.csv"} <= names
    assert not names & {"training_state.pt", "model.safetensors", "merged"}
    before, after = (scores(data)[k]["held-out loss"] for k in ("before", "after"))
    assert after < before - 0.1
    model = MinimalLlama.from_pretrained("stories-mini", dtype=torch.float32)
    tok = Tokenizer.from_pretrained("stories-mini")
    docs = encode_documents(read_documents(data / "tales.txt"), tok)
    whole = held_out_loss(model, docs, 32)
    load_adapter(model, data / "out")
    assert held_out_loss(model, docs, 32) < whole - 0.1


def test_merged_the_folder_is_a_model_that_the_other_commands_take(capsys, data):
    assert told(capsys, *words(data, "--merge"))[0] == 0
    merged = data / "out/merged"
    code, out, _ = told(capsys, "generate", "Arr", "--model", merged, "--device", "cpu",
                        "--max-new-tokens", 3)  # fmt: skip
    assert code == 0 and out.startswith("Arr")
    model = MinimalLlama.from_pretrained("stories-mini", dtype=torch.float32)
    load_adapter(model, data / "out")
    other = MinimalLlama.from_pretrained(merged, dtype=torch.float32)
    tokens = torch.arange(50, 70)[None]
    torch.testing.assert_close(model(tokens), other(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_what_can_be_loaded(capsys, data, method):
    code, out, err = told(capsys, *words(data, "--method", method, "--size", 4))
    assert code == 0, err
    base = MinimalLlama.from_pretrained("stories-mini", dtype=torch.float32)
    tokens = torch.arange(50, 70)[None]
    before = base(tokens)
    if method == "full":
        after = MinimalLlama.from_pretrained(data / "out", dtype=torch.float32)(tokens)
    elif method == "prompt":
        from minllama.peft import prepend_prompt

        load_adapter(base, data / "out")
        after = base(prepend_prompt(base, tokens))[:, 4:]
    else:
        after = load_adapter(base, data / "out")(tokens)
    assert not torch.equal(before, after) and after.isfinite().all()


def test_a_frozen_model_may_be_bfloat16_while_its_adapter_learns_in_float32(
    capsys, data
):
    code, _, err = told(capsys, *words(data, "--dtype", "bfloat16", "--lr", "3e-3"))
    assert code == 0, err
    tensors = load_file(data / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    score = scores(data)
    assert score["after"]["held-out loss"] < score["before"]["held-out loss"] - 0.1


def test_answers_are_learned_from_records_and_the_format_is_told(capsys, data):
    code, out, _ = told(capsys, *words(data, "--lr", "3e-3", file="talks.jsonl"))
    assert code == 0 and "8 records, format plain" in out
    score = scores(data)
    assert score["after"]["held-out loss"] < score["before"]["held-out loss"]


def test_a_model_that_learned_turns_says_where_they_end(capsys, data):
    more = ("--format", "llama3", "--merge", "--seq-len", "64")
    assert told(capsys, *words(data, *more, file="talks.jsonl"))[0] == 0
    tok = Tokenizer.from_pretrained(data / "out/merged")
    model = MinimalLlama.from_pretrained(data / "out/merged")
    assert tok.special_tokens["<|eot_id|>"] in model.config.eos_ids
    code, out, _ = told(capsys, *words(data, "--model", data / "out/merged", "--fresh",
                                       file="talks.jsonl"))  # fmt: skip
    assert code == 0 and "format llama3" in out  # it is known to converse now


def test_what_is_cut_is_said(capsys, data):
    long = {**QUESTION, "output": "word " * 99}
    ask = {**QUESTION, "instruction": "word " * 99}
    with (data / "talks.jsonl").open("a") as file:
        file.write("\n" + json.dumps(long) + "\n" + json.dumps(ask))
    _, out, _ = told(capsys, *words(data, file="talks.jsonl"))
    assert "1 of them lost the end of an answer at 32 tokens" in out
    assert "1 more left out: their question alone fills a row" in out


def test_preferences_are_learned_with_the_base_as_reference(capsys, data):
    more = ("--lr", "3e-3", "--steps", "12", "--valid", data / "pairs.jsonl")
    code, out, _ = told(capsys, *words(data, *more, file="pairs.jsonl"))
    assert code == 0 and "8 pairs" in out
    before, after = scores(data)["before"], scores(data)["after"]
    assert before["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: nothing learned
    assert after["accuracy"] == 1 and after["loss"] < 0.5 and after["margin"] > 0.3


def test_ipo_and_smoothing_are_taken(capsys, data):
    more = ("--preference-loss", "ipo", "--beta", "0.5")
    assert told(capsys, *words(data, *more, file="pairs.jsonl"))[0] == 0
    assert scores(data)["before"]["loss"] == pytest.approx(1.0)  # (0 - 1 / (2 beta))^2
    more = ("--label-smoothing", "0.1", "--fresh")
    assert told(capsys, *words(data, *more, file="pairs.jsonl"))[0] == 0


@pytest.mark.parametrize("file", ["tales.txt", "pairs.jsonl"])
def test_a_stopped_run_goes_on_and_ends_alike(capsys, data, monkeypatch, file):
    run = words(data, "--save-every", 2, "--dropout", "0.2", "--steps", 6, file=file)
    assert told(capsys, *run)[0] == 0
    adapter = data / "out/adapter_model.safetensors"
    whole, first = load_file(adapter), scores(data)
    adapter.unlink()

    class StopAtFive(recipe.Progress):
        def __call__(self, run):
            if run.step == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "Progress", StopAtFive)
    assert told(capsys, *run)[0] == 130
    monkeypatch.undo()
    state = data / "out/training_state.pt"
    assert state.stat().st_size < 2**20  # of 71,680 parameters, not of a million
    code, _, err = told(capsys, *run, "--lr", "0.5")
    assert code == 2 and "lr: None -> 0.5" in err
    code, out, _ = told(capsys, *run)
    assert code == 0 and "going on from step 4 of 6" in out
    again = load_file(adapter)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert scores(data) == first and not state.exists()


def test_a_stopped_run_refuses_other_data(capsys, data):
    assert told(capsys, *words(data))[0] == 0
    (data / "out/training_state.pt").write_bytes(b"")
    (data / "tales.txt").write_text("Another text altogether, and long enough.")
    code, _, err = told(capsys, *words(data))
    assert code == 2 and "data_sha256" in err
    (data / "out/options.json").unlink()
    assert "options.json is missing" in told(capsys, *words(data))[2]


@pytest.mark.parametrize(("more", "expected"), [
    (("--method", "lorra"), "method='lorra' must be one of full, lora, rslora"),
    (("--preference-loss", "hinge"), "preference_loss='hinge' must be one of dpo, ipo"),
    (("--dpo", "x.jsonl"), "give one of the two"),
    (("--method", "prefix", "--merge"), "method='prefix' is no change of a weight"),
    (("--method", "full", "--merge"), "method='full' leaves nothing to merge"),
    (("--method", "full", "--dtype", "bfloat16"), "dtype='bfloat16' with"),
    (("--dtype", "int8"), "dtype='int8' must be one of float32, bfloat16"),
    (("--lr", "0"), "lr=0.0 must be a number above 0"),
    (("--epochs", "nan"), "epochs=nan must be a number above 0"),
    (("--beta", "-1"), "beta=-1.0 must be a number above 0"),
    (("--steps", "0"), "steps=0 must be at least 1"),
    (("--valid-share", "1"), "valid_share=1.0 must lie in 0..0.9"),
    (("--label-smoothing", "0.6"), "label_smoothing=0.6 must lie in 0..0.5"),
    (("--warmup", "2"), "warmup=2.0 must lie in 0..1"),
    (("--seq-len", "513"), "seq_len=513 exceeds what the model has room for; give "
     "--seq-len 512"),
    (("--method", "prefix", "--seq-len", "500"), "give --seq-len 496 or less"),
    (("--targets", "q_prj,v_proj"), "target 'q_prj' is none of"),
    (("--data", "no.txt"), "no.txt does not exist"),
    (("--data", "no.jsonl"), "no.jsonl is no file"),
    (("--rank", "0"), "rank=0 must be at least 1"),
    (("--valid", "nowhere.txt"), "nowhere.txt does not exist"),
])  # fmt: skip
def test_a_wrong_option_is_told_before_any_work(capsys, data, more, expected):
    code, _, err = told(capsys, *words(data, *more))
    assert code == 2 and expected in err
    assert not (data / "out").exists()


@pytest.mark.parametrize("method", ["full", "prompt"])
def test_preferences_need_an_adapter_that_can_be_switched_off(capsys, data, method):
    code, _, err = told(capsys, *words(data, "--method", method, file="pairs.jsonl"))
    assert code == 2 and f"method='{method}' with --dpo: the reference is" in err


def test_one_document_is_learned_with_nothing_held_out(capsys, data):
    (data / "tales.txt").write_text("Arr, the sea be wide, me hearties, and cold.")
    code, out, _ = told(capsys, *words(data))
    assert code == 0 and "nothing was held out" in out
    assert scores(data) == {"before": {}, "after": {}}


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        make_parser().parse_args(["finetune", "--help"])
    lines = capsys.readouterr().out.splitlines()
    nxt = dict(zip(lines, lines[1:]))
    flags = [line for line in lines if line.startswith("  --")]
    assert len(flags) == len(fields(FinetuneOptions))
    for flag in flags:
        assert len(flag.split()) > 3 or nxt[flag].startswith(" " * 10), flag
