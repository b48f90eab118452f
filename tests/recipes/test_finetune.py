"""`minllama finetune`, as a user types it."""

import csv
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minllama import MinimalLlama, Tokenizer
from minllama.architecture import kernels
from minllama.architecture.data import encode_documents, read_documents
from minllama.cli import main, make_parser
from minllama.peft import (
    GaLore,
    add_adalora,
    load_adapter,
    merge,
    orthogonality_loss,
)
from minllama.peft.adalora import AdaLoRALinear
from minllama.peft.sft import held_out_loss
from minllama.recipes import finetune as recipe
from minllama.recipes.finetune_options import METHODS, FinetuneOptions
from tests.conftest import make_model, random_tokens

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
    assert not names & {"checkpoints", "model.safetensors", "merged"}
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
    if METHODS[method].whole:
        after = MinimalLlama.from_pretrained(data / "out", dtype=torch.float32)(tokens)
    elif method == "prompt":
        from minllama.peft import prepend_prompt

        load_adapter(base, data / "out")
        after = base(prepend_prompt(base, tokens))[:, 4:]
    else:
        after = load_adapter(base, data / "out")(tokens)
    assert not torch.equal(before, after) and after.isfinite().all()


def run_of(data, method, **more):
    """A run of four steps and what it left in memory."""
    sizes = {"steps": 4, "seq_len": 32, "batch_size": 2, "device": "cpu", **more}
    where = {"data": str(data / "tales.txt"), "out": str(data / "out")}
    options = FinetuneOptions(**where, model="stories-mini", method=method, **sizes)
    return recipe.run_finetuning(options)


def test_lora_plus_teaches_b_faster_by_the_ratio(data):
    run = run_of(data, "lora+", lr=1e-3, loraplus_lr_ratio=5.0)
    rates = {
        name.rpartition(".")[2]: group["peak_lr"]
        for name, p in run.model.named_parameters()
        for group in run.optimizer.param_groups
        if any(p is one for one in group["params"])
    }
    assert rates == {"a": 1e-3, "b": pytest.approx(5e-3)}


def test_adalora_ends_at_the_rank_that_was_asked_for(data):
    run = run_of(data, "adalora", rank=2)
    layers = [m for m in run.model.modules() if isinstance(m, AdaLoRALinear)]
    alive = sum(int(layer.e.count_nonzero()) for layer in layers)
    assert {layer.rank for layer in layers} == {3} and alive == 2 * len(layers)


def test_adaloras_penalty_counts_once_in_the_mean_of_a_step(data):
    """At birth it is all that its loss has beyond LoRA's, whatever the batches."""

    def first_loss(method, accumulate):
        run_of(data, method, fresh=True, accumulate=accumulate)
        with (data / "out/curve.csv").open() as file:
            return float(next(csv.DictReader(file))["loss"])

    torch.manual_seed(0)
    model = MinimalLlama.from_pretrained("stories-mini", dtype=torch.float32)
    penalty = 0.5 * orthogonality_loss(add_adalora(model, 12)).item()
    for accumulate in (1, 3):
        more = first_loss("adalora", accumulate) - first_loss("lora", accumulate)
        assert more == pytest.approx(penalty, abs=1e-4) and penalty > 0.1


def test_galore_projects_to_the_rank_that_was_asked_for(data):
    optimizer = run_of(data, "galore", rank=3).optimizer
    ranks = {len(s["mean"]) for s in optimizer.state.values() if "basis" in s}
    assert isinstance(optimizer, GaLore) and ranks == {3}


def test_a_frozen_model_may_be_bfloat16_while_its_adapter_learns_in_float32(
    capsys, data
):
    code, _, err = told(capsys, *words(data, "--dtype", "bfloat16", "--lr", "3e-3"))
    assert code == 0, err
    tensors = load_file(data / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    score = scores(data)
    assert score["after"]["held-out loss"] < score["before"]["held-out loss"] - 0.1


def test_kernels_checkpointing_and_compiled_blocks_learn_the_same(
    capsys, data, monkeypatch
):
    monkeypatch.setattr(kernels, "_INTERPRET", False)  # references: quick on a CPU
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    flags = ("--fast", "--compile", "--checkpointing", "full")
    found = []
    for more in ((), flags):
        code, _, err = told(capsys, *words(data, "--fresh", "--lr", "3e-3", *more))
        assert code == 0, err
        found.append(scores(data)["after"]["held-out loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert len(compiled) == 4 and all(type(f).__name__ == "Recompute" for f in compiled)


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


def stop_at(words, step):
    """Fine-tune, and press Ctrl-C after that step."""

    class Stopped(recipe.Progress):
        def __call__(self, run):
            if run.step == step:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "Progress", Stopped)
        assert main([str(word) for word in words]) == 130


@pytest.mark.parametrize(("method", "file"), [
    ("lora", "tales.txt"), ("lora", "pairs.jsonl"), ("lora+", "tales.txt"),
    ("adalora", "tales.txt"), ("adalora", "pairs.jsonl"), ("galore", "tales.txt"),
])  # fmt: skip
def test_a_stopped_run_goes_on_and_ends_alike(capsys, data, method, file):
    more = ("--save-every", 2, "--dropout", "0.2", "--steps", 6, "--method", method)
    run = words(data, *more, file=file)
    assert told(capsys, *run)[0] == 0
    name = "model.safetensors" if METHODS[method].whole else "adapter_model.safetensors"
    learned = data / "out" / name
    whole, first = load_file(learned), scores(data)
    learned.unlink()
    stop_at(run, 5)
    capsys.readouterr()
    code, out, _ = told(capsys, *run)
    assert code == 0 and "going on from step 4 of 6" in out
    again = load_file(learned)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert scores(data) == first and not (data / "out/checkpoints").exists()


def test_a_stopped_run_refuses_other_options_and_is_as_small_as_its_adapter(
    capsys, data
):
    run = words(data, "--save-every", 2)
    stop_at(run, 3)
    states = [file for file in (data / "out/checkpoints").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in states) < 2**20  # 71,680 of a million
    code, _, err = told(capsys, *run, "--lr", "0.5")
    assert code == 2 and "lr: None -> 0.5" in err


def test_a_stopped_run_refuses_other_data(capsys, data):
    run = words(data, "--save-every", 2)
    stop_at(run, 3)
    (data / "tales.txt").write_text("Another text altogether, and long enough.")
    code, _, err = told(capsys, *run)
    assert code == 2 and "data_sha256" in err
    (data / "out/options.json").unlink()
    assert "options.json is missing" in told(capsys, *run)[2]


def test_what_began_anew_never_goes_on_from_the_run_before(capsys, data):
    run = words(data, "--save-every", 2)
    stop_at(run, 3)
    other = [*run, "--lr", "0.5"]
    stop_at([*other, "--fresh"], 1)  # before a checkpoint of its own
    code, out, _ = told(capsys, *other)
    assert code == 0 and "going on" not in out


def test_biases_are_merged_where_the_family_has_them(tmp_path):
    """Qwen2 has those of q, k and v."""
    options = {"data": "tales.txt", "out": "out", "method": "bitfit", "merge": True}
    model, add = make_model("qwen2"), METHODS["bitfit"].add
    with pytest.raises(ValueError, match="o_proj, up_proj of this model .* give --targ"
                       "ets k_proj,q_proj,v_proj, or leave"):  # fmt: skip
        add(model, FinetuneOptions(**options))
    add(model, FinetuneOptions(**options, targets="k_proj,q_proj,v_proj"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    tokens = random_tokens(2, 9)
    learned = model(tokens)
    merge(model).save_pretrained(tmp_path)
    again = MinimalLlama.from_pretrained(tmp_path, device=tokens.device)
    torch.testing.assert_close(again(tokens), learned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("more", "expected"), [
    (("--method", "lorra"), "method='lorra' must be one of full, lora, rslora"),
    (("--preference-loss", "hinge"), "preference_loss='hinge' must be one of dpo, ipo"),
    (("--dpo", "x.jsonl"), "give one of the two"),
    (("--method", "prefix", "--merge"), "method='prefix' is no change of a weight"),
    (("--method", "full", "--merge"), "method='full' leaves nothing to merge"),
    (("--method", "galore", "--merge"), "method='galore' leaves nothing to merge"),
    (("--method", "bitfit", "--merge"), "down_proj, gate_proj, k_proj, o_proj, q_proj, "
     "up_proj, v_proj of this model have no bias, and its files no place for one; "
     "leave --merge out"),
    (("--method", "pissa", "--rank", "129"), "exceeds 128, its smaller side"),
    (("--method", "olora", "--rank", "129"), "exceeds 128, its smaller side"),
    (("--method", "pissa", "--targets", "lm_head"), "init='pissa' on lm_head would"),
    (("--method", "full", "--dtype", "bfloat16"), "dtype='bfloat16' with"),
    (("--method", "adalora", "--steps", "1"), "leave some of steps=1, one to look"),
    (("--checkpointing", "half"), "checkpointing='half' must be one of full, sel"),
    (("--dtype", "int8"), "dtype='int8' must be one of float32, bfloat16"),
    (("--lr", "0"), "lr=0.0 must be a number above 0"),
    (("--loraplus-lr-ratio", "0"), "loraplus_lr_ratio=0.0 must be a number above 0"),
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


@pytest.mark.parametrize("method", ["full", "galore", "prompt"])
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
