"""A single-device model, spread over a mesh: compiled, recomputed, sequence parallel, data parallel, in that order.

The processes of a sequence hold different tokens of it, those of different data-parallel groups different sequences;
for the weights both are the same thing: all processes' gradients are summed. What a process keeps of the weights,
their gradients and the optimizer's state is the choice of `data_parallel`:

    ddp     everything (DistributedDataParallel)
    zero1   weights and gradients; a share of the optimizer's state (DDP and ZeroRedundancyOptimizer)
    zero2   a share of all; weights are gathered for a step and kept until their gradients are there (FSDP2)
    zero3   a share of all; weights are gathered for a block, and again in the backward pass (FSDP2)

With `dp_replicate` copies in the mesh, zero2 and zero3 spread each copy over its own processes (hybrid sharding).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lasp.distributed.mesh import DATA_PARALLEL, SP_AXIS, weights_mesh
from lasp.layers import RMSNorm, ShortConvolution
from lasp.models.recomputation import (
    RECOMPUTATIONS,
    CompiledShapes,
    compile_block,
    recompute,
    run_in_pieces,
)
from lasp.sequence import SequenceParallel
from lasp.sequence.arguments import check_flags, whole

# Their weights may be rounded to 16 bits for a step: autocast rounds matrices itself, and a gain is a factor near 1.
# Learned angles and decays must not be, and PyTorch's LayerNorm refuses weights of another dtype than its input's.
_ROUNDED = (nn.Linear, RMSNorm, ShortConvolution)


@dataclass
class ParallelModel:
    """A model with the means to run it on its mesh."""

    module: nn.Module
    """The model itself: parameters (with zero2 and zero3 DTensors, this process's shares), evaluation."""
    training: nn.Module
    """What to call in training: the same model, whose backward pass also sums gradients over all processes."""
    sp: SequenceParallel | None
    """Handed to the model's forward; None where one process holds whole sequences."""
    num_processes: int = 1
    data_parallel: str = "ddp"
    """One of DATA_PARALLEL."""
    _largest: list[Tensor] = field(default_factory=list)
    _largest_names: list[str] = field(default_factory=list)

    @property
    def is_sharded(self) -> bool:
        """True if a process holds a share of the weights only, so that to run the model is collective."""
        return isinstance(self.module, FSDPModule)

    def mean_loss(self, loss_sum: Tensor, global_tokens: int) -> Tensor:
        """The scalar to call backward on: this process's share of the mean loss over `global_tokens` tokens.

        loss_sum: sum of this process's token losses (nats). global_tokens: tokens of all processes and of all
        accumulated parts of the step. Gradients then are those of the mean over the global batch.
        """
        # DDP and FSDP average gradients over processes. Here they must be summed: the shares are of one mean.
        return loss_sum * (self.num_processes / global_tokens)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Context of one accumulated part: gradients travel only in the last one."""
        if isinstance(self.training, FSDPModule):
            self.training.set_requires_gradient_sync(last)
        elif isinstance(self.training, DistributedDataParallel) and not last:
            return self.training.no_sync()
        return nullcontext()

    @contextmanager
    def watching_gradients(self) -> Iterator[None]:
        """Around a step's backward passes: note this process's own gradients before they are summed."""
        self._largest.clear()
        self._largest_names.clear()
        yield
        if self.num_processes == 1:
            named = [(name, p.grad) for name, p in self.module.named_parameters() if p.grad is not None]
            self._note([name for name, _ in named], [gradient for _, gradient in named])

    def bad_gradients(self) -> list[str]:
        """Parameters whose gradient on this process, in the last watched step, has NaN or infinity."""
        if not self._largest:
            return []
        finite = torch.isfinite(torch.cat(self._largest)).tolist()
        bad = {name for name, good in zip(self._largest_names, finite, strict=True) if not good}
        return [name for name, _ in self.module.named_parameters() if name in bad]

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale gradients so that their norm over all parameters is at most `max_norm`; the norm before, a scalar."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def release(self) -> None:
        """Let go of weights that a forward pass without a backward pass has gathered."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _note(self, names: list[str], gradients: list[Tensor]) -> None:
        # The largest magnitude is NaN or infinite exactly when an entry is; a sum might overflow by itself.
        self._largest.append(torch.stack(torch._foreach_norm(gradients, float("inf"))).float())
        self._largest_names.extend(names)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    *,
    data_parallel: str = "ddp",
    gather_dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
    recomputation: str = "none",
    ffn_piece_tokens: int | None = None,
    compile: bool = False,
    exchange: str = "auto",
    timeout_s: float = 120.0,
) -> ParallelModel:
    """Spread `model`, a CausalLM on its device, over `mesh`, as `lasp.distributed.mesh.build_mesh` makes it.

    Collective over the mesh; None is a single process. Make the optimizer afterwards, of the module's parameters.

    data_parallel: one of DATA_PARALLEL, see above.
    gather_dtype: of zero2 and zero3, the dtype in which a block's weights are gathered: bf16 under autocast to bf16
        halves the bytes and rounds matrices as autocast would. Weights, their gradients' sum and the optimizer's state
        stay fp32; blocks with parameters that 16 bits cannot hold (angles, decays) are gathered as they are.
    cpu_offload: of zero2 and zero3, shares of weights, gradients and optimizer state lie on the host.
    recomputation: what the backward pass computes again, block by block: "none", "selective" (all but what the
        exchange brought) or "full" (the exchange too). ffn_piece_tokens: run channel mixers on so many tokens at a
        time. compile: torch.compile each block. See lasp.models.recomputation.
    exchange: see lasp.SequenceParallel.

    Raises ValueError for unknown names and for options that do not go together.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a CausalLM, got {type(model).__name__}")
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise ValueError(f"mesh must be what build_mesh makes, or None, got {type(mesh).__name__}")
    check_flags(cpu_offload=cpu_offload, compile=compile)
    _check(data_parallel, gather_dtype, cpu_offload, recomputation, ffn_piece_tokens)
    spread_sequences = mesh is not None and mesh[SP_AXIS].size() > 1
    blocks = _blocks(model)
    if not blocks and (recomputation != "none" or ffn_piece_tokens is not None or compile):
        raise ValueError(
            f"recomputation, ffn_piece_tokens and compile go block by block, but {type(model).__name__} has no `blocks`"
        )
    shapes = CompiledShapes() if compile else None
    for block in blocks:
        _rework(block, recomputation, ffn_piece_tokens, shapes)  # type: ignore[arg-type]
    if mesh is None:
        return ParallelModel(model, model, None)
    sp = None
    if spread_sequences:
        sp = SequenceParallel(mesh[SP_AXIS], exchange=exchange, timeout_s=timeout_s)
    if mesh.size() == 1:
        return ParallelModel(model, model, sp)
    parallel = ParallelModel(model, model, sp, mesh.size(), data_parallel)
    if data_parallel in ("ddp", "zero1"):
        parallel.training = _replicated(model, parallel)
    else:
        shards = weights_mesh(mesh, offload=cpu_offload, timeout_s=timeout_s)
        _shard(model, shards, data_parallel == "zero3", gather_dtype, cpu_offload)
        _watch_shards(model, parallel)
    return parallel


def _check(
    data_parallel: str,
    gather_dtype: torch.dtype | None,
    cpu_offload: bool,
    recomputation: str,
    ffn_piece_tokens: int | None,
) -> None:
    if data_parallel not in DATA_PARALLEL:
        raise ValueError(f"data_parallel must be one of {', '.join(DATA_PARALLEL)}, got {data_parallel!r}")
    if data_parallel in ("ddp", "zero1") and (gather_dtype is not None or cpu_offload):
        raise ValueError(f"gather_dtype and cpu_offload are of zero2 and zero3: {data_parallel} gathers no weights")
    if recomputation not in RECOMPUTATIONS:
        raise ValueError(f"recomputation must be one of {', '.join(RECOMPUTATIONS)}, got {recomputation!r}")
    if ffn_piece_tokens is not None:
        whole("ffn_piece_tokens", ffn_piece_tokens, 1)


def _rework(block: nn.Module, recomputation: str, ffn_piece_tokens: int | None, shapes: CompiledShapes | None) -> None:
    """Inside out: what is compiled may hold pieces, and what is recomputed runs compiled both times."""
    if ffn_piece_tokens is not None and block.ffn is not None:
        run_in_pieces(block.ffn, ffn_piece_tokens)  # type: ignore[arg-type]
    if shapes is not None:
        compile_block(block, shapes)
    if recomputation != "none":
        recompute(block, recomputation)


def _replicated(model: nn.Module, parallel: ParallelModel) -> DistributedDataParallel:
    """All weights on every process."""
    # Buffers are constants of the configuration: nothing to broadcast in every forward pass.
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
    training = DistributedDataParallel(model, gradient_as_bucket_view=True)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    def sum_noting_bad(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        # After the sum every process has the NaN; only here is it known whose it was.
        parallel._note([names[parameter] for parameter in bucket.parameters()], bucket.gradients())
        return allreduce_hook(group, bucket)  # type: ignore[arg-type]

    training.register_comm_hook(None, sum_noting_bad)
    return training


def _blocks(model: nn.Module) -> list[nn.Module]:
    blocks = getattr(model, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def _shard(
    model: nn.Module, mesh: DeviceMesh, reshard: bool, gather_dtype: torch.dtype | None, cpu_offload: bool
) -> None:
    """Every process a share of every weight; a block is gathered at once, embedding and head with the whole."""
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, offload_policy=offload)
    for block in _blocks(model):
        exact = any(True for m in block.modules() for _ in m.parameters(recurse=False) if not isinstance(m, _ROUNDED))
        policy = MixedPrecisionPolicy(
            param_dtype=None if exact else gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        shard(block, reshard_after_forward=reshard, mp_policy=policy)
    # What is left is needed first and last: gathered again it would only wait.
    shard(model, reshard_after_forward=False)


def _watch_shards(model: nn.Module, parallel: ParallelModel) -> None:
    """Note gradients of whole weights, which exist between a block's backward pass and the sum over processes."""
    watched: dict[int, Tensor] = {}

    def watch(prefix: str, module: nn.Module, _arguments: Any) -> None:
        for name, parameter in module.named_parameters(prefix):
            # Those of blocks inside are shares still; they have their own turn.
            if not isinstance(parameter, DTensor) and parameter.requires_grad and id(parameter) not in watched:
                watched[id(parameter)] = parameter
                parameter.register_hook(lambda gradient, name=name: parallel._note([name], [gradient]))

    for prefix, module in list(model.named_modules()):
        if isinstance(module, FSDPModule):
            # After FSDP's own, which puts the whole weights in place.
            module.register_forward_pre_hook(partial(watch, prefix))  # type: ignore[attr-defined]
