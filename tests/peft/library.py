"""One tiny base in transformers and here; methods of the PEFT library beside ours."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from minllama.architecture import MinimalLlama
from minllama.peft import (
    add_adalora,
    add_dora,
    add_ia3,
    add_llama_adapter,
    add_lora,
    add_norm_tuning,
    add_olora,
    add_pissa,
    add_prefix,
    add_prompt,
    add_rslora,
    add_trainable_tokens,
    add_vera,
    prepend_prompt,
)

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
C = "CAUSAL_LM"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Method:
    """A method: how the library says it, and how we say it."""

    theirs: Callable[[], peft.PeftConfig]
    ours: Callable[[nn.Module], nn.Module]
    family: str = "llama"
    tied: bool = False
    prompt: int = 0  # logits that theirs has in front


METHODS: dict[str, Method] = {
    "lora": Method(
        lambda: peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=ALL, task_type=C,
            rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3},
        ),
        lambda m: add_lora(
            m, 4, 8, "all-linear",
            rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3},
        ),
    ),
    "lora-parts": Method(
        lambda: peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=C,
            bias="lora_only", modules_to_save=["lm_head"],
            layers_to_transform=[1], trainable_token_indices=[3, 96],
        ),
        lambda m: add_lora(
            m, 4, 8, ["q_proj", "v_proj"], layers_to_transform=[1], bias="lora_only",
            modules_to_save=["lm_head"], trainable_tokens=[3, 96],
        ),
        family="qwen2",
    ),
    "lora-tables": Method(
        lambda: peft.LoraConfig(
            r=4, target_modules=["embed_tokens", "lm_head", "o_proj"], task_type=C
        ),
        lambda m: add_lora(m, 4, 8, ["embed_tokens", "lm_head", "o_proj"]),
    ),
    "rslora": Method(
        lambda: peft.LoraConfig(
            r=4, target_modules=r".*\.(q|v)_proj", use_rslora=True, task_type=C
        ),
        lambda m: add_rslora(m, 4, 8, r".*\.(q|v)_proj"),
    ),
    "pissa": Method(
        lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa",
            task_type=C,
        ),
        lambda m: add_pissa(m, 4, 8, ["q_proj", "up_proj"]),
    ),
    "olora": Method(
        lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="olora",
            task_type=C,
        ),
        lambda m: add_olora(m, 4, 8, ["q_proj", "up_proj"]),
    ),
    "dora": Method(
        lambda: peft.LoraConfig(r=4, target_modules=ALL, use_dora=True, task_type=C),
        lambda m: add_dora(m, 4, 8, "all-linear"),
    ),
    "dora-bias": Method(
        lambda: peft.LoraConfig(r=4, target_modules=ALL, use_dora=True, task_type=C),
        lambda m: add_dora(m, 4, 8, "all-linear"),
        family="qwen2",
    ),
    "ia3": Method(
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"], task_type=C,
        ),
        lambda m: add_ia3(m),
        family="qwen2",
    ),
    "vera": Method(
        lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type=C),
        lambda m: add_vera(m, 8),
    ),
    "adalora": Method(
        lambda: peft.AdaLoraConfig(
            init_r=6, target_r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"],
            total_step=21, tinit=2, tfinal=5, deltaT=2, task_type=C,
        ),
        lambda m: add_adalora(m, 6, 8, ["q_proj", "up_proj"]),
    ),
    "prefix": Method(
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type=C),
        lambda m: add_prefix(m, 5),
    ),
    "prefix-projected": Method(
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=5, task_type=C, prefix_projection=True,
            encoder_hidden_size=12,
        ),
        lambda m: add_prefix(m, 5, hidden=12),
    ),
    "prompt": Method(
        lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type=C),
        lambda m: add_prompt(m, 5),
        prompt=5,
    ),
    "p-tuning": Method(
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=5, task_type=C, encoder_hidden_size=12
        ),
        lambda m: add_prompt(m, 5, hidden=12),
        prompt=5,
    ),
    "llama-adapter": Method(
        lambda: peft.AdaptionPromptConfig(
            adapter_len=3, adapter_layers=2, task_type=C
        ),
        lambda m: add_llama_adapter(m, 3, 2),
    ),
    "norm-tuning": Method(
        lambda: peft.LNTuningConfig(
            target_modules=["input_layernorm", "norm"], task_type=C
        ),
        lambda m: add_norm_tuning(m, ["input_layernorm", "norm"]),
    ),
    "trainable-tokens": Method(
        lambda: peft.TrainableTokensConfig(
            token_indices=[3, 96], target_modules=["embed_tokens"], task_type=C
        ),
        lambda m: add_trainable_tokens(m, [3, 96]),
    ),
    "trainable-tokens-tied": Method(
        lambda: peft.TrainableTokensConfig(
            token_indices=[3, 96], target_modules=["embed_tokens"], task_type=C
        ),
        lambda m: add_trainable_tokens(m, [3, 96]),
        tied=True,
    ),
}  # fmt: skip


def widen(model: nn.Module) -> None:
    """Weights under which a mistake shows."""
    with torch.no_grad():
        for weight in dict.fromkeys(model.parameters()):
            if weight.dim() > 1:
                weight.normal_(std=1.3 / weight.size(-1) ** 0.5)
            else:
                weight.normal_(mean=1.0, std=0.3)


def make_base(folder, family: str = "llama", tied: bool = False, vocab_size: int = 97):
    """Write one model to `folder` in Hugging Face's format."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": vocab_size, "tie_word_embeddings": tied}
    if family == "llama":
        model = LlamaForCausalLM(TheirConfig(**sizes))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    widen(model)
    model.save_pretrained(folder)
    return folder


def load_theirs(folder, family: str = "llama") -> nn.Module:
    kind = LlamaForCausalLM if family == "llama" else Qwen2ForCausalLM
    return kind.from_pretrained(folder).eval()


def load_ours(folder) -> MinimalLlama:
    return MinimalLlama.from_pretrained(folder).eval()


def make_exact(model: nn.Module) -> nn.Module:
    """Theirs in float64 throughout: its norms would go through float32."""
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm"):
            module.forward = functools.partial(_exact_norm, module)
    return model.double()


def _exact_norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def their_logits(model: nn.Module, tokens: Tensor, prompt: int = 0) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits[:, prompt:]


def our_logits(model: nn.Module, tokens: Tensor, prompt: int = 0) -> Tensor:
    if prompt:
        return model(prepend_prompt(model, tokens))[:, prompt:]
    return model(tokens)


def quiet_save(model, folder) -> None:
    with warnings.catch_warnings():  # that it saves an adapted embedding, too
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def quiet_load(base: nn.Module, folder) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).eval()


def quiet_add(base: nn.Module, config: peft.PeftConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config, autocast_adapter_dtype=False)
