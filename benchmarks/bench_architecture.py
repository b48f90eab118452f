"""Decoding, ours against transformers: same weights, same tokens, same run.

    python benchmarks/bench_architecture.py [--device cuda] [--model NAME] [--smoke]

Both run eagerly, greedily and never stop early; a step's time is that of n new tokens
less that of one, over n - 1. Repeats alternate, so that a drift hits both alike. The
first repeat is the warm-up, which a user waits for, too: it has its own column.

Prediction. Such decoding is bound by launches: a step of a 16-layer Llama is about 30
kernels a layer, 500 in all; at about 6 us each that is 3 ms, where the weights alone
would need 0.54 ms (2.47 GB at 4.6 TB/s).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama.architecture.cache import StaticCaches
from minllama.architecture.config import LlamaConfig
from minllama.architecture.generate import generate
from minllama.architecture.model import MinimalLlama

READ_LIMIT = 4608e9  # bytes/s, the best read kernel measured on an H200


def transformers_twin(model: MinimalLlama):
    """transformers' model with the very same weights."""
    import transformers

    c = model.config
    rope = {
        "rope_type": "default",
        **(c.rope_scaling or {}),
        "rope_theta": c.rope_theta,
    }
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, rope_parameters=rope,
        tie_word_embeddings=c.tie_embeddings, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    weight = model.embed_tokens.weight
    with torch.device(weight.device):
        twin = transformers.LlamaForCausalLM(config).to(weight.dtype)
    state = {
        name if name.startswith("lm_head") else f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    twin.load_state_dict(state)
    return twin.eval()


@torch.no_grad()
def captured_decode(model: MinimalLlama, prompt: torch.Tensor, new: int):
    """Greedy decoding whose step was captured once and is replayed: no launches."""
    size = prompt.size(1) + new + 4
    caches = model.new_caches(prompt.size(0), size, kind=StaticCaches)
    token = model(prompt, caches=caches, at=-1).argmax(-1)  # (B, 1)

    def step() -> None:
        token.copy_(model(token, caches=caches).argmax(-1))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(), step()  # warm-up; what they wrote is written over
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    caches.lengths.fill_(prompt.size(1))
    token.copy_(prompt[:, -1:])
    out = []
    for _ in range(new):
        graph.replay()
        out.append(token.clone())
    return torch.cat(out, dim=1)


def seconds(run, n: int) -> float:
    """Wall time of `run(n)`, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(n)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def compare_decode(
    model: MinimalLlama, prompt: torch.Tensor, new: int, repeats: int
) -> list[dict]:
    """Rows of tokens/s for both, medians of `repeats` alternating runs."""
    twin = transformers_twin(model)

    def ours(n: int) -> torch.Tensor:
        return generate(model, prompt, max_new_tokens=n, stop_ids=())

    def theirs(n: int) -> torch.Tensor:
        return twin.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=n, min_new_tokens=n, pad_token_id=0,
        )  # fmt: skip

    def captured(n: int) -> torch.Tensor:
        return captured_decode(model, prompt, n)

    gap = (model(prompt) - twin(prompt).logits).abs().max() / model(prompt).abs().max()
    runs = {"minllama": ours, "transformers": theirs}
    if prompt.is_cuda:
        runs["minllama, captured graph"] = captured
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):  # the first is the warm-up
        for name, run in runs.items():
            step = (seconds(run, new) - seconds(run, 1)) / (new - 1)
            times[name].append(step)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    base = statistics.median(times["transformers"][1:])
    for name, steps in times.items():
        step = statistics.median(steps[1:])
        rows.append({
            "library": name.replace(",", ":"), "ms_per_step": f"{step * 1e3:.3f}",
            "tokens_per_s": f"{prompt.size(0) / step:.1f}",
            "first_run_tokens_per_s": f"{prompt.size(0) / steps[0]:.1f}",
            "times_transformers": f"{base / step:.2f}",
            "weights_GB_per_s": f"{size / step / 1e9:.1f}",
            "spread": f"{(max(steps[1:]) - min(steps[1:])) / step:.1%}",
            "logits_gap": f"{gap:.1e}",
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="a shipped name, or a name of the registry")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    name = options.model or ("llama-3.2-1b" if options.device == "cuda" else "stories")
    if options.smoke:
        options.new, options.repeats, options.prompt = 8, 1, 16
    if name.startswith("stories"):
        model = MinimalLlama.from_pretrained(name, device=options.device)
    else:
        with torch.device("meta"):
            model = MinimalLlama.from_config(LlamaConfig.from_name(name)).bfloat16()
        model.to_empty(device=options.device)
        model.init_weights()
        for norm in (m for m in model.modules() if "Norm" in type(m).__name__):
            torch.nn.init.ones_(norm.weight)
        model.tie_weights()
        model.eval()
    shape = (options.batch_size, options.prompt)
    prompt = torch.randint(0, model.config.vocab_size, shape, device=options.device)
    rows = compare_decode(model, prompt, options.new, options.repeats)
    case = {
        "model": name, "device": options.device, "batch": options.batch_size,
        "prompt": options.prompt, "new": options.new,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
    }  # fmt: skip
    rows = [{**case, **row} for row in rows]
    print(record.table(rows))
    if not options.smoke:
        path = record.write(
            f"architecture_decode_{options.device}",
            rows,
            options.device,
            Path(options.out),
        )
        print(f"written to {path.name}")


if __name__ == "__main__":
    main()
