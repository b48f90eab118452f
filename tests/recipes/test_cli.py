"""The command line, as a user types it."""

import json
import subprocess
import sys

import pytest

from minllama import Tokenizer
from minllama.architecture.config import REGISTRY
from minllama.cli import main, make_parser

MINI = ["--model", "stories-mini", "--device", "cpu"]


def told(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    code = main(list(arguments))
    return code, *capsys.readouterr()


def test_generate_needs_only_a_prompt(capsys):
    code, out, err = told(
        capsys, "generate", "Once upon a time", "--seed", "1", "--max-new-tokens", "20"
    )
    assert code == 0 and out.startswith("Once upon a time, ") and "tokens/s" in err


def test_generate_repeats_itself_with_a_seed_and_obeys_stops(capsys):
    words = ["generate", "A cat", *MINI, "--seed", "3", "--max-new-tokens", "30"]
    first, second = told(capsys, *words)[1], told(capsys, *words)[1]
    assert first == second
    cut = told(capsys, *words, "--stop", ".")[1]
    assert cut.strip() == first[: first.index(".")].strip()


def test_a_long_prompt_leaves_what_room_there_is(capsys):
    code, out, _ = told(capsys, "generate", "a " * 400, *MINI, "--seed", "1")
    assert code == 0 and len(out) > 800
    code, _, err = told(capsys, "generate", "a " * 600, *MINI)
    assert code == 2 and "exceed max_seq_len=512" in err


def test_evaluate_prints_bits_per_byte(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time, there was a cat.")
    code, out, _ = told(capsys, "evaluate", str(tmp_path / "a.txt"), *MINI)
    assert code == 0 and "bits per byte" in out and "34 bytes" in out


@pytest.mark.parametrize("name", ["llama-3.2-1b", "stories", "qwen3-0.6b"])
def test_info_counts_the_parameters(capsys, name):
    code, out, _ = told(capsys, "info", name)
    expected = {"llama-3.2-1b": "1,235,814,400", "stories": "6,820,096",
                "qwen3-0.6b": "596,049,920"}  # fmt: skip
    assert code == 0 and expected[name] in out


def test_info_without_a_name_lists_what_exists(capsys):
    _, out, _ = told(capsys, "info")
    assert all(name in out for name in REGISTRY) and "stories-mini" in out


@pytest.mark.parametrize("arguments", [
    ("info", "llama-9"), ("generate", "x", "--model", "llama-9"),
    ("evaluate", "x.txt", "--model", "stories-mini"), ("verify", "llama-9"),
    ("generate", "x", "--temperature", "-1"), ("train", "--data", "no", "--out", "o"),
])  # fmt: skip
def test_a_wrong_value_is_told_in_a_line_without_a_traceback(
    capsys, arguments, tmp_path
):
    code, out, err = told(capsys, *arguments)
    words = out + err
    assert code in (1, 2) and "Traceback" not in words
    assert any(
        w in words for w in ("llama-9", "x.txt", "temperature=-1.0", "no does not")
    )


def test_unknown_names_list_what_exists(capsys):
    assert "llama-3.2-1b" in told(capsys, "info", "llama-9")[2]
    assert "stories, stories-mini" in told(capsys, "generate", "x", "--model", "y")[2]


def test_every_command_has_help_that_says_what_its_flags_do(capsys):
    for command in (
        "generate",
        "chat",
        "train",
        "evaluate",
        "info",
        "convert",
        "verify",
    ):
        with pytest.raises(SystemExit, match="0"):
            make_parser().parse_args([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        flags = [line for line in lines if line.startswith("  --")]
        nxt = dict(zip(lines, lines[1:]))
        for flag in flags:  # the help stands behind the flag, or in the next line
            assert len(flag.split()) > 2 or nxt[flag].startswith(" " * 10), flag


def train_words(tmp_path, *more):
    (tmp_path / "corpus.txt").write_text("low lower lowest newer wider. " * 200)
    return [
        "train", "--data", str(tmp_path / "corpus.txt"), "--out", str(tmp_path / "out"),
        "--vocab-size", "270", "--dim", "32", "--n-layers", "1", "--seq-len", "32",
        "--batch-size", "4", "--steps", "6", "--warmup", "2", "--device", "cpu", *more,
    ]  # fmt: skip


def test_train_writes_a_model_that_generates(capsys, tmp_path):
    code, out, _ = told(capsys, *train_words(tmp_path, "--dropout", "0.1"))
    folder = tmp_path / "out"
    assert code == 0 and "6 steps" in out
    names = {file.name for file in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "curve.csv", "curve.png"} <= names
    assert "checkpoints" not in names
    code, out, _ = told(capsys, "generate", "low", "--model", str(folder),
                        "--device", "cpu", "--max-new-tokens", "4")  # fmt: skip
    assert code == 0 and out.startswith("low")
    assert told(capsys, "verify", str(folder))[0] == 0


def stop_at(words: list[str], step: int) -> None:
    """Train, and press Ctrl-C after that step."""
    from minllama.recipes import train as recipe

    class Stopped(recipe.Progress):
        def __call__(self, run):
            if run.step == step:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "Progress", Stopped)
        assert main(words) == 130


def test_train_goes_on_where_it_was_stopped_and_ends_alike(capsys, tmp_path):
    words = train_words(tmp_path, "--save-every", "2", "--dropout", "0.2")
    main(words)
    whole = (tmp_path / "out/model.safetensors").read_bytes()
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    stop_at(words, 5)
    code, out, _ = told(capsys, *words)
    assert code == 0 and "going on from step 4 of 6" in out
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole


def test_a_stopped_run_refuses_other_options(capsys, tmp_path):
    words = train_words(tmp_path, "--save-every", "2")
    stop_at(words, 3)
    code, _, err = told(capsys, *words, "--lr", "0.5")
    assert code == 2 and "lr: 0.003 -> 0.5" in err
    assert json.loads((tmp_path / "out/options.json").read_text())["lr"] == 0.003


def test_fresh_begins_anew(capsys, tmp_path):
    words = train_words(tmp_path, "--save-every", "2")
    stop_at(words, 3)
    code, out, _ = told(capsys, *words, "--lr", "0.5", "--fresh")
    assert code == 0 and "going on" not in out


def test_a_config_file_holds_flags_and_typed_ones_win(capsys, tmp_path):
    words = train_words(tmp_path)[:5]
    file = tmp_path / "run.toml"
    file.write_text(
        "vocab-size = 270\ndim = 32\nn_layers = 1\nsteps = 9\nlr = 1e-3\n"
        "seq_len = 32\nbatch_size = 4\nwarmup = 2\nbf16 = false\n"
    )
    code, out, _ = told(capsys, *words, "--config", str(file), "--steps", "2")
    assert code == 0 and "2 steps of 4 x 32" in out
    facts = json.loads((tmp_path / "out/options.json").read_text())
    assert facts["lr"] == 1e-3 and facts["bf16"] is False
    file.write_text("steps = [1, 2]")
    code, _, err = told(capsys, *words, f"--config={file}")
    assert code == 2 and "steps is no plain value" in err


def test_train_goes_on_from_a_shipped_model(capsys, tmp_path):
    code, _, _ = told(capsys, *train_words(tmp_path, "--model", "stories-mini"))
    assert code == 0
    code, out, _ = told(capsys, "info", str(tmp_path / "out"))
    assert "951,424" in out


def test_a_finished_folder_is_trained_anew_with_its_own_tokenizer(capsys, tmp_path):
    words = train_words(tmp_path)
    main(words)
    (tmp_path / "corpus.txt").write_text("жил был кот и пёс, и дом, и лес. " * 300)
    assert told(capsys, *words)[0] == 0
    tok = Tokenizer.from_pretrained(tmp_path / "out")
    assert len(tok.encode("кот")) < 6  # it learned from the new text


def test_other_data_under_a_stopped_run_is_noticed(capsys, tmp_path):
    words = train_words(tmp_path, "--save-every", "2")
    stop_at(words, 3)
    (tmp_path / "corpus.txt").write_text("another text. " * 300)
    code, _, err = told(capsys, *words)
    assert code == 2 and "data_sha256" in err


def test_a_folder_named_like_a_shipped_model_is_not_taken_for_it(
    capsys, tmp_path, monkeypatch
):
    words = train_words(tmp_path, "--valid", str(tmp_path / "corpus.txt"))
    monkeypatch.chdir(tmp_path)
    words[words.index("--out") + 1] = "stories"
    _, out, _ = told(capsys, *words)
    assert str(tmp_path / "stories") in out
    bits = float(out.split(" bits per byte")[0].split()[-1])
    assert bits > 1.5  # six steps do not make a storyteller


@pytest.mark.parametrize("arguments, words", [
    (("evaluate", "a.txt", "--device", "nonsense"), "device='nonsense' cannot be used"),
    (("train", "--data", "a.txt", "--out", "a.txt"), "a.txt"),
    (("train", "--data", "a.txt", "--out", "o"), "--vocab-size"),
    (("generate", "x", "--seed", str(2**70)), "seed="),
    (("info", "x" * 300), "x" * 300),
])  # fmt: skip
def test_what_the_machine_refuses_is_told_in_a_line(
    capsys, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one short text")
    code, _, err = told(capsys, *arguments)
    assert code == 2 and words in err and "Traceback" not in err


def test_options_that_make_no_sense_are_refused(capsys, tmp_path):
    for flag, value in (
        ("--optimizer", "sgd"),
        ("--epochs", "0"),
        ("--lr", "-1"),
        ("--steps", "0"),
    ):
        code, _, err = told(capsys, *train_words(tmp_path, flag, value))
        assert code == 2 and f"{flag[2:]}=" in err


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "minllama.cli", "info", "stories-mini"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "951,424" in done.stdout
