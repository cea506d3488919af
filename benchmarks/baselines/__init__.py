"""Other ways to share a sequence, small and clear, on any backend of torch.distributed; see docs/guide/planning.md.

Each is exact: outputs and gradients equal those of one device. They are fair: linear attention always takes the
right product first, messages are as few and small as the method allows, and gradients of keys do not travel a hop
more than they must.
"""
