"""Chapter 4: train a little beside a model that stays as it is."""

from minllama.peft.accounting import Plan, adapter_memory, memory_table
from minllama.peft.adalora import RankAllocator, add_adalora, orthogonality_loss
from minllama.peft.adapter import (
    Adapter,
    adapter_names,
    disabled,
    remove_adapter,
    reset_adapters,
    set_adapter,
    trainable_parameters,
)
from minllama.peft.dpo import (
    PairBatches,
    PreferenceLoss,
    dpo_loss,
    ipo_loss,
    score_preferences,
)
from minllama.peft.files import load_adapter, save_adapter
from minllama.peft.galore import GaLore, make_galore
from minllama.peft.houlsby import add_houlsby
from minllama.peft.ia3 import add_ia3
from minllama.peft.instruct import encode_conversations, encode_preferences
from minllama.peft.llama_adapter import add_llama_adapter
from minllama.peft.lora import (
    add_dora,
    add_lora,
    add_lora_fa,
    add_olora,
    add_pissa,
    add_rslora,
    lora_plus_groups,
)
from minllama.peft.merge import merge, unmerge
from minllama.peft.prefix import add_prefix
from minllama.peft.prompt import add_prompt, prepend_prompt
from minllama.peft.records import read_conversations, read_preferences
from minllama.peft.rows import adapter_rows, mix_adapters, set_rows
from minllama.peft.saved import add_bitfit, add_norm_tuning
from minllama.peft.sft import held_out_loss
from minllama.peft.tokens import add_trainable_tokens
from minllama.peft.vera import add_vera

__all__ = [
    "Adapter",
    "GaLore",
    "PairBatches",
    "Plan",
    "PreferenceLoss",
    "RankAllocator",
    "adapter_memory",
    "adapter_names",
    "adapter_rows",
    "add_adalora",
    "add_bitfit",
    "add_dora",
    "add_houlsby",
    "add_ia3",
    "add_llama_adapter",
    "add_lora",
    "add_lora_fa",
    "add_norm_tuning",
    "add_olora",
    "add_pissa",
    "add_prefix",
    "add_prompt",
    "add_rslora",
    "add_trainable_tokens",
    "add_vera",
    "disabled",
    "dpo_loss",
    "encode_conversations",
    "encode_preferences",
    "held_out_loss",
    "ipo_loss",
    "load_adapter",
    "lora_plus_groups",
    "make_galore",
    "memory_table",
    "merge",
    "mix_adapters",
    "orthogonality_loss",
    "prepend_prompt",
    "read_conversations",
    "read_preferences",
    "remove_adapter",
    "reset_adapters",
    "save_adapter",
    "score_preferences",
    "set_adapter",
    "set_rows",
    "trainable_parameters",
    "unmerge",
]
