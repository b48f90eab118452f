"""Our tokenizers against tiktoken, sentencepiece and tokenizers on real vocabularies.

    python benchmarks/parity_tokenizers.py ../shared/data

DATA/tokenizers holds Llama 3's and Llama 2's tokenizer.model, GPT-2's pair and test
vectors; DATA/text holds texts. Each tokenizer encodes two million characters of prose
in three languages, Python code, emoji and noise, as read from its own file and from the
tokenizer.json that we write, and decodes them again. Any difference is an error.
"""

import argparse
import base64
import os
import random
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from minllama.architecture.bpe import LLAMA3_PATTERN
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.tokenizer_json import GPT2_PATTERN

CHARACTERS = 2_000_000
JOINER, VARIATION, SKIN = 0x200D, 0xFE0F, 0x1F3FD

Encode = Callable[[str], list[int]]


def pieces(data: Path, rng: random.Random) -> list[str]:
    """The texts, in pieces of up to 4,000 characters as a person might paste them."""
    found = []
    for text in (*prose(data), code(), *noise(rng)):
        start = rng.randrange(max(1, len(text) - CHARACTERS // 8))
        text = text[start : start + CHARACTERS // 8]
        while text:
            end = rng.randrange(1, 4000)
            found.append(text[:end])
            text = text[end:]
    return found


def prose(data: Path) -> Iterator[str]:
    """English, Russian and Japanese."""
    for name in ("wikitext2_valid", "tinystories_ru_train", "wagahai_neko_ja"):
        yield (data / "text" / f"{name}.txt").read_text(encoding="utf-8")


def code() -> str:
    """This project's Python, and the standard library's."""
    ours = sorted(Path(__file__).parent.parent.glob("minllama/**/*.py"))
    theirs = sorted(Path(random.__file__).parent.glob("[a-f]*.py"))
    return "".join(path.read_text(encoding="utf-8") for path in (*ours, *theirs))


def noise(rng: random.Random) -> Iterator[str]:
    """Emoji with joiners, damaged UTF-8, characters of all kinds, white space."""
    n = CHARACTERS // 8
    emoji = [*range(0x1F300, 0x1FB00), *[JOINER, VARIATION, SKIN, 32] * 300]
    yield "".join(map(chr, rng.choices(emoji, k=n)))
    yield "".join(filter(assigned, rng.randbytes(n).decode("utf-8", errors="replace")))
    yield "".join(rng.choices(list(filter(assigned, map(chr, range(0x110000)))), k=n))
    spaces = rng.choices(" \t\n\r\x0b\x1c\x85\u00a0\u2028\u3000a'1.", k=n)
    yield "".join(char * rng.randrange(1, 6) for char in spaces)


def assigned(char: str) -> bool:
    """Whether Unicode has long had the character: libraries differ on newer ones."""
    return unicodedata.ucd_3_2_0.category(char) not in ("Cn", "Cs")


def cases(folder: Path, copies: Path) -> Iterator[tuple[str, Tokenizer, Encode]]:
    """Each pair of a tokenizer of ours and the library's that it must equal."""
    llama3 = Tokenizer.from_pretrained(folder / "llama3")
    lines = (folder / "llama3" / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(t): int(rank) for t, rank in map(bytes.split, lines)}
    oracle = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    yield "llama3 tiktoken", llama3, oracle.encode_ordinary
    yield copied("llama3", llama3, copies)

    llama2 = Tokenizer.from_pretrained(folder / "llama2")
    model = str(folder / "llama2" / "tokenizer.model")
    oracle = sentencepiece.SentencePieceProcessor(model_file=model)
    yield "llama2 sentencepiece", llama2, oracle.encode
    yield copied("llama2", llama2, copies)

    gpt2 = Tokenizer.from_pretrained(folder / "gpt2")
    names = [str(folder / "gpt2" / name) for name in ("vocab.bpe", "encoder.json")]
    ranks = data_gym_to_mergeable_bpe_ranks(*names)
    oracle = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    yield "gpt2 tiktoken", gpt2, oracle.encode_ordinary
    oracle = tokenizers.ByteLevelBPETokenizer(*reversed(names))
    yield "gpt2 tokenizers", gpt2, lambda text: oracle.encode(text).ids
    yield copied("gpt2", gpt2, copies)


def copied(name: str, tok: Tokenizer, copies: Path) -> tuple[str, Tokenizer, Encode]:
    """The same vocabulary by way of the tokenizer.json that we write."""
    tok.save_pretrained(copies / name)
    oracle = tokenizers.Tokenizer.from_file(str(copies / name / "tokenizer.json"))
    oracle.encode_special_tokens = True
    encode = lambda text: oracle.encode(text, add_special_tokens=False).ids
    return f"{name} tokenizers (json)", Tokenizer.from_pretrained(copies / name), encode


def vectors(folder: Path) -> Iterator[tuple[str, Tokenizer, Encode]]:
    """llama.cpp's texts with the ids that each tokenizer should give."""
    for name, stem in (("llama2", "llama-spm"), ("gpt2", "gpt-2")):
        texts = (folder / "vectors" / f"{stem}.inp").read_text("utf-8")
        lines = (folder / "vectors" / f"{stem}.out").read_text("utf-8").split("\n")
        ids = [[int(id) for id in line.split()] for line in lines]
        expected = dict(zip(texts.split("\n__ggml_vocab_test__\n"), ids, strict=True))
        yield f"{name} vectors", Tokenizer.from_pretrained(folder / name), expected


def timed(function: Callable, inputs: list) -> tuple[list, float]:
    start = time.perf_counter()
    return [function(x) for x in inputs], time.perf_counter() - start


def compare(name: str, tok: Tokenizer, oracle: Encode, inputs: list[str]) -> int:
    """Print one line, and the first difference; the number of pieces that differ."""
    ours, our_time = timed(tok.encode, inputs)
    theirs, their_time = timed(oracle, inputs)
    back, back_time = timed(tok.decode, ours)
    wrong = [i for i in range(len(inputs)) if ours[i] != theirs[i]]
    spaced = lambda text: text.replace("▁", " ") if name.startswith("llama2") else text
    lost = [i for i in range(len(inputs)) if back[i] != spaced(inputs[i])]
    n_ids = sum(map(len, ours))
    print(
        f"{name:26} {n_ids:9,} {len(wrong):10} {len(lost):10} "
        f"{our_time:9.2f} {their_time:9.2f} {back_time:9.2f}"
    )
    for i in wrong[:1]:
        at = next((k for k, (a, b) in enumerate(zip(ours[i], theirs[i])) if a != b), 0)
        print("  ours  ", [tok.token_bytes(id) for id in ours[i][at : at + 8]])
        print("  theirs", [tok.token_bytes(id) for id in theirs[i][at : at + 8]])
    return len(wrong) + len(lost)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with tokenizers/ and text/")
    data = parser.parse_args().data
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # read the files, not an older copy
    inputs = pieces(data, random.Random(0))
    print(f"{len(inputs)} pieces, {sum(map(len, inputs)):,} characters; seconds\n")
    print(
        f"{'':26} {'ids':>9} {'mismatches':>10} {'not back':>10} "
        f"{'ours':>9} {'theirs':>9} {'decode':>9}"
    )
    with tempfile.TemporaryDirectory() as copies:
        wrong = sum(
            compare(*c, inputs) for c in cases(data / "tokenizers", Path(copies))
        )
    for name, tok, expected in vectors(data / "tokenizers"):
        wrong += compare(name, tok, expected.get, list(expected))
    print(f"\n{wrong} mismatches")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
