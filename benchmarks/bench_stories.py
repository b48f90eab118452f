"""The shipped models, scored: bits per byte in the protocol of the model card.

    python benchmarks/bench_stories.py --valid tinystories_en_valid.txt

Without --valid only our own held-out text is scored, which ships with the package.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama.architecture.accounting import count_parameters
from minllama.architecture.data import read_documents
from minllama.architecture.evaluate import score_documents
from minllama.architecture.model import MinimalLlama
from minllama.architecture.tokenizer import Tokenizer

TEXTS = Path(__file__).parent.parent / "minllama" / "assets" / "texts"


def score(name: str, text: Path, most: int | None) -> dict:
    model = MinimalLlama.from_pretrained(name)
    documents = read_documents(text)[:most]
    result = score_documents(model, Tokenizer.from_pretrained(name), documents)
    return {
        "model": name,
        "parameters": count_parameters(model.config),
        "text": text.name,
        "documents": len(documents),
        "bytes": result.bytes,
        "tokens": result.tokens,
        "bits_per_byte": f"{result.bits_per_byte:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--valid", type=Path, help="the TinyStories validation file")
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    options = parser.parse_args()
    texts = [TEXTS / "stories_en_heldout.txt", TEXTS / "pirate_heldout.txt"]
    texts += [options.valid] if options.valid else []
    names = ("stories-mini",) if options.smoke else ("stories", "stories-mini")
    most = 3 if options.smoke else None
    rows = [score(name, text, most) for text in texts for name in names]
    print(record.table(rows))
    if options.valid and not options.smoke:
        print(f"written to {record.write('stories', rows, 'cpu').name}")


if __name__ == "__main__":
    main()
