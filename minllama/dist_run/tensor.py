"""Tensor parallelism: every matrix is cut, every rank sees every token.

    column   q, k, v, gate, up   cut by outputs: a rank has H / n heads, F / n channels
    row      o, down             cut by inputs: each rank's product is a part of the sum
    words    embedding, head     cut by the vocabulary

A column cut feeds a row cut, so each half of a block needs one sum over the ranks. With
sequence parallelism the sum leaves each rank only its part of the tokens (a
reduce-scatter), norms and the residual stream hold T / n tokens, and an all-gather
brings them together before the next half: the same bytes on the wire, n times less
memory for what lies between.

Papers: Megatron, Shoeybi et al. 2019, arXiv:1909.08053 · sequence parallel, Korthikanti
et al. 2022, 2205.05198.
"""

import re
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle, PrepareModuleInput
from torch.distributed.tensor.placement_types import Placement

from minllama.architecture.config import LlamaConfig
from minllama.architecture.data import Batch
from minllama.architecture.model import MinimalLlama
from minllama.dist_run.parallel_loss import vocabulary_cross_entropy

Model = TypeVar("Model", bound=MinimalLlama)

PLAN = {  # names within a block -> how they are cut
    "self_attn.q_proj": "column",
    "self_attn.k_proj": "column",
    "self_attn.v_proj": "column",
    "self_attn.o_proj": "row",
    "mlp.gate_proj": "column",
    "mlp.up_proj": "column",
    "mlp.down_proj": "row",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "self_attn.q_norm": "heads",
    "self_attn.k_norm": "heads",
}
STYLES = ("column", "row", "norm", "heads")


class Cut(ParallelStyle):
    """A layer with `in_features` and `out_features`, cut by outputs or by inputs.

    The rule is one of shapes, so that it holds for adapters around a layer, too:
    cut by columns, each parameter whose first size is out_features is divided along
    it; cut by rows, each whose last size is in_features. Others are on every rank, and
    DTensor carries the rest through the layer's own forward.
    """

    def __init__(self, kind: str, into: Placement, local: bool = True) -> None:
        super().__init__()
        self.kind, self.into, self.local = kind, into, local

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        divide = partial(self._divide, module)
        return distribute_module(
            module,
            device_mesh,
            divide,
            self._take,  # type: ignore[arg-type]
            self._give,  # type: ignore[arg-type]
        )

    def _divide(self, layer, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for kind in ("_parameters", "_buffers"):
            for key, tensor in vars(module)[kind].items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                where = self._placement(layer, tensor)
                cut = distribute_tensor(tensor, mesh, [where])
                if kind == "_parameters":
                    cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
                vars(module)[kind][key] = cut

    def _placement(self, layer, tensor: Tensor) -> Placement:
        if self.kind == "column" and tensor.size(0) == layer.out_features:
            return Shard(0)
        if self.kind == "row" and tensor.dim() > 1:
            if tensor.size(-1) == layer.in_features:
                return Shard(tensor.dim() - 1)
        return Replicate()

    def _take(self, module, inputs: tuple, mesh: DeviceMesh) -> tuple:
        x, *rest = inputs
        here = Replicate() if self.kind == "column" else Shard(-1)
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [here], run_check=False)
        return x.redistribute(placements=[here]), *rest

    def _give(self, module, y: DTensor, mesh: DeviceMesh) -> Tensor:
        y = y.redistribute(placements=[self.into])
        return y.to_local() if self.local else y


class Words(ParallelStyle):
    """The embedding: each rank looks up the words it holds, and the ranks add up."""

    def __init__(self, into: Placement) -> None:
        super().__init__()
        self.into = into

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            self._divide,
            self._take,  # type: ignore[arg-type]
            self._give,  # type: ignore[arg-type]
        )

    def _divide(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, tensor in module.named_parameters(recurse=False):
            cut = distribute_tensor(tensor, mesh, [Shard(0)])
            cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
            module.register_parameter(key, cut)

    def _take(self, module, inputs: tuple, mesh: DeviceMesh) -> Tensor:
        T = inputs[0].size(1)
        if self.into == Shard(1) and T % mesh.size():
            raise ValueError(
                f"T={T} tokens do not divide by the {mesh.size()} ranks that share "
                "the sequence; pad them, or use tensor_parallel(…, sequence=False), as "
                "generation does."
            )
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

    def _give(self, module, y: DTensor, mesh: DeviceMesh) -> Tensor:
        return y.redistribute(placements=[self.into]).to_local()


class Norm(ParallelStyle):
    """Weights on every rank, each norming its own tokens or heads; local in and out.

    The gradient of the weight is a sum over what each rank has seen.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own = Shard(dim)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            self._copy,
            self._take,  # type: ignore[arg-type]
            self._give,  # type: ignore[arg-type]
        )

    def _copy(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, tensor in module.named_parameters(recurse=False):
            same = distribute_tensor(tensor, mesh, [Replicate()])
            same = nn.Parameter(same, requires_grad=tensor.requires_grad)
            module.register_parameter(key, same)

    def _take(self, module, inputs: tuple, mesh: DeviceMesh) -> tuple:
        x, *rest = inputs
        return DTensor.from_local(x, mesh, [self.own], run_check=False), *rest

    def _give(self, module, y: DTensor, mesh: DeviceMesh) -> Tensor:
        return y.to_local()


def tensor_parallel(
    model: Model,
    mesh: DeviceMesh,
    sequence: bool = True,
    gather_logits: bool = True,
    plan: dict[str, str] | None = None,
) -> Model:
    """Cut every matrix over the ranks of the mesh's axis `tensor`. Same outputs.

    In place; parameters become DTensors of the same names. After adapters, before
    `checkpoint_activations` and `shard`. Every rank gets the same tokens.

    Args:
        model: of MinimalLlama or a subclass.
        mesh: of `init_mesh`; its axis tensor, of n ranks.
        sequence: norms and residual stream hold T / n tokens a rank, and so do
            `hidden_states`. For training; a decoding step has one token, so generation
            wants False.
        gather_logits: False leaves logits cut by the vocabulary, a DTensor, for
            `tensor_parallel_loss`: n times less memory.
        plan: how modules that a subclass adds to a block are cut: name within the block
            (`self_attn.gate_proj`) -> column, row, norm (of the residual stream) or
            heads (a norm of each head).

    Raises:
        ValueError: heads, channels or words do not divide by n; a module has weights
            and no place in the plan; the model is cut already; or the mesh has no such
            axis.
    """
    mesh = _tensor_axis(mesh)
    if mesh.size() > 1:
        _check_uncut(model)
    plan = {**PLAN, **(plan or {})}
    _check(model, mesh.size(), plan, sequence)
    if mesh.size() == 1:
        return model
    stream: Placement = Shard(1) if sequence else Replicate()
    for block in model.layers:
        _cut_block(block, mesh, plan, stream, sequence)
    Words(stream)._apply(model.embed_tokens, mesh)
    if sequence:
        Norm(1)._apply(model.norm, mesh)
        model.register_forward_pre_hook(_refuse_at, with_kwargs=True)
    words = Replicate() if gather_logits else Shard(-1)
    head = Cut("column", words, local=gather_logits)
    _enter(model.lm_head, mesh, stream, 1)
    if model.config.tie_embeddings:
        model.tie_weights()
    head._apply(model.lm_head, mesh)
    return model


def _tensor_axis(mesh: DeviceMesh) -> DeviceMesh:
    if mesh.ndim > 1 and "tensor" not in (mesh.mesh_dim_names or ()):
        raise ValueError(
            f"mesh of shape {tuple(mesh.shape)} with the axes {mesh.mesh_dim_names}, "
            "and none is called tensor; make it with init_mesh(tensor=…)."
        )
    return mesh["tensor"] if mesh.ndim > 1 else mesh


def _check_uncut(model: nn.Module) -> None:
    if getattr(model, "gradient_exchange", None) is not None:
        raise ValueError(
            f"{type(model).__name__} exchanges gradients by hand, of whole matrices; "
            "use tensor_parallel, then shard."
        )
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            by = "shard" if isinstance(model, FSDPModule) else "tensor_parallel"
            raise ValueError(
                f"{name} is a DTensor, {tuple(p.placements)}, by {by}; tensor_parallel "
                "is called once, and before shard."
            )


def _refuse_at(model: nn.Module, inputs: tuple, named: dict) -> None:
    if named.get("at") is not None or len(inputs) > 4:
        raise ValueError(
            f"at={named.get('at')} picks tokens, of which each rank holds a part; use "
            "tensor_parallel(…, sequence=False), as generation does."
        )


def _cut_block(block, mesh: DeviceMesh, plan: dict, stream, sequence: bool) -> None:
    for half in (block.self_attn, block.mlp):
        _enter(half, mesh, stream, 3 if half is block.self_attn else 1)
    for name, style in plan.items():
        try:
            module = block.get_submodule(name)
        except AttributeError:
            continue
        if style == "column":
            Cut("column", Shard(-1))._apply(module, mesh)
        elif style == "row":
            Cut("row", stream)._apply(module, mesh)
        elif style == "heads":
            Norm(2)._apply(module, mesh)
        elif sequence:
            Norm(1)._apply(module, mesh)


def _enter(module: nn.Module, mesh: DeviceMesh, stream: Placement, inputs: int) -> None:
    """What reads the residual stream gets all tokens, gathered once for all readers."""
    rest = (None,) * (inputs - 1)
    given, wanted = (stream, *rest), (Replicate(), *rest)
    PrepareModuleInput(
        input_layouts=given, desired_input_layouts=wanted
    )._apply(module, mesh)  # fmt: skip


def undivided(config: LlamaConfig, n: int) -> str:
    """A size that n ranks cannot share, as name=value; nothing if they share all.

    Example:
        >>> undivided(LlamaConfig.from_name("llama-3.2-1b"), 16)
        'n_kv_heads=8'
    """
    sizes = {
        name: getattr(config, name) for name in ("n_heads", "n_kv_heads", "ffn_dim")
    }
    return next((f"{name}={size}" for name, size in sizes.items() if size % n), "")


def _check(model: MinimalLlama, n: int, plan: dict[str, str], sequence: bool) -> None:
    whole = undivided(model.config, n)
    if whole:
        raise ValueError(
            f"{whole} does not divide by the {n} ranks of the axis tensor; take a "
            "smaller axis, and shard=… for the rest."
        )
    wrong = {name: style for name, style in plan.items() if style not in STYLES}
    if wrong:
        raise ValueError(f"plan={wrong}: a style is one of {', '.join(STYLES)}.")
    placed = re.compile("|".join(re.escape(name) + r"(\.|$)" for name in plan))
    lost = sorted(
        {name for block in model.layers for name, _ in block.named_parameters()
         if not placed.match(name)}
    )  # fmt: skip
    if lost:
        raise ValueError(
            f"a block of {type(model).__name__} has the parameters {', '.join(lost)}, "
            "of which tensor_parallel does not know how they are cut; say so with "
            "plan={'self_attn.gate_proj': 'column'} or the like "
            f"(one of {', '.join(STYLES)})."
        )
    known = ("embed_tokens", "layers", "norm", "lm_head")
    others = [p for p, _ in model.named_parameters() if p.split(".")[0] not in known]
    if others and sequence and n > 1:
        raise ValueError(
            f"{', '.join(others)} would see only some tokens in each rank, and get "
            "the gradient of these alone; use sequence=False."
        )


def tensor_parallel_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The hub's `next_token_loss` of a model made with gather_logits=False.

    Each rank takes the softmax of its words; three numbers a token are exchanged.
    """
    logits = model(batch.tokens, layout=batch.layout)
    return vocabulary_cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
