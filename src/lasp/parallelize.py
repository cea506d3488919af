"""A single-device model, spread over a mesh: sequence parallel and DistributedDataParallel, in that order.

Every process holds all weights. The processes of a sequence hold different tokens of it, those of different
data-parallel groups different sequences; for the weights both are the same thing, so one DDP group over the whole
world sums the gradients.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lasp.distributed.mesh import SP_AXIS
from lasp.sequence import SequenceParallel


@dataclass
class ParallelModel:
    """A model with the means to run it on its mesh."""

    module: nn.Module
    """The model itself: parameters, generation, evaluation."""
    training: nn.Module
    """What to call in training: the same model, whose backward pass also sums gradients over all processes."""
    sp: SequenceParallel | None
    """Handed to the model's forward; None where one process holds whole sequences."""
    num_processes: int = 1
    _largest: list[Tensor] = field(default_factory=list)
    _largest_names: list[str] = field(default_factory=list)

    def mean_loss(self, loss_sum: Tensor, global_tokens: int) -> Tensor:
        """The scalar to call backward on: this process's share of the mean loss over `global_tokens` tokens.

        loss_sum: sum of this process's token losses (nats). global_tokens: tokens of all processes and of all
        accumulated parts of the step. Gradients then are those of the mean over the global batch.
        """
        # DDP averages gradients over processes. Here they must be summed: the shares are of one mean.
        return loss_sum * (self.num_processes / global_tokens)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Context of one accumulated part: gradients travel only in the last one."""
        if last or not isinstance(self.training, DistributedDataParallel):
            return nullcontext()
        return self.training.no_sync()

    @contextmanager
    def watching_gradients(self) -> Iterator[None]:
        """Around a step's backward passes: note this process's own gradients before they are summed."""
        self._largest.clear()
        self._largest_names.clear()
        yield
        if not isinstance(self.training, DistributedDataParallel):
            named = [(name, p.grad) for name, p in self.module.named_parameters() if p.grad is not None]
            self._note([name for name, _ in named], [gradient for _, gradient in named])

    def bad_gradients(self) -> list[str]:
        """Parameters whose gradient on this process, in the last watched step, has NaN or infinity."""
        if not self._largest:
            return []
        finite = torch.isfinite(torch.cat(self._largest)).tolist()
        bad = {name for name, good in zip(self._largest_names, finite, strict=True) if not good}
        return [name for name, _ in self.module.named_parameters() if name in bad]

    def _note(self, names: list[str], gradients: list[Tensor]) -> None:
        # The largest magnitude is NaN or infinite exactly when an entry is; a sum might overflow by itself.
        self._largest.append(torch.stack(torch._foreach_norm(gradients, float("inf"))).float())
        self._largest_names.extend(names)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    *,
    exchange: str = "auto",
    timeout_s: float = 120.0,
) -> ParallelModel:
    """Spread `model` (on its device already) over `mesh`, as `lasp.distributed.mesh.build_mesh` makes it.

    mesh None is a single process. exchange: see lasp.SequenceParallel. Collective over the mesh.
    """
    if mesh is None:
        return ParallelModel(model, model, None)
    sp = None
    if mesh[SP_AXIS].size() > 1:
        sp = SequenceParallel(mesh[SP_AXIS], exchange=exchange, timeout_s=timeout_s)
    if mesh.size() == 1:
        return ParallelModel(model, model, sp)
    # Buffers are constants of the configuration: nothing to broadcast in every forward pass.
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
    training = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parallel = ParallelModel(model, training, sp, mesh.size())
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    def sum_noting_bad(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        # After the sum every process has the NaN; only here is it known whose it was.
        parallel._note([names[parameter] for parameter in bucket.parameters()], bucket.gradients())
        return allreduce_hook(group, bucket)  # type: ignore[arg-type]

    training.register_comm_hook(None, sum_noting_bad)
    return parallel
