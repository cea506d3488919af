"""The functional API over several processes:  torchrun --nproc-per-node 4 examples/functional.py"""

import torch
import torch.distributed as dist

import lasp

dist.init_process_group("gloo")
sp = lasp.SequenceParallel(dist.group.WORLD)  # or one axis of a DeviceMesh: mesh["sp"]

torch.manual_seed(0)  # the same global sequence on every rank, to compare with; real ranks load only their part
B, T, H, D = 1, 4096, 4, 64
q, k, v = (torch.randn(B, T, H, D) for _ in range(3))
g = torch.tensor([-0.001, -0.01, -0.1, -1.0])  # natural log of each head's decay

shards = [sp.shard(tensor).requires_grad_() for tensor in (q, k, v)]  # this rank's consecutive tokens
o, final_state = lasp.linear_attention(*shards, g, sp=sp, output_final_state=True)
o.square().sum().backward()  # gradients cross the ranks in one exchange, from the last to the first

whole, _ = lasp.linear_attention(q, k, v, g)
error = (o - sp.shard(whole)).norm() / whole.norm()
print(f"rank {sp.rank}: {o.shape[1]} of {T} tokens, sent {sp.counters.sent_bytes} bytes, error {error:.0e}")
dist.destroy_process_group()
