"""A rank's memory that other ranks write into, and the exchange of summaries through it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lasp.exchange.peer.kernels import FLAG_BYTES, WORDS, collect_kernel, fold_kernel, push_kernel
from lasp.kernels.triton.common.launch import Launch, bind

# A summary is cut into so many programs at most: all run at once, beside whatever else a GPU does.
BLOCK, WARPS = 4096, 4
# What a poll of a flag takes at least: a deadline in seconds is so many polls.
POLLS_PER_S = 1_000_000
MOST_POLLS = 2**31 - 1
# No product and sum in one rounding: PyTorch's kernels, by which other schedules fold, do not either.
_ROUNDED_APART = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
_ASSERTING = {"debug": True, "sanitize_overflow": False}
_INTERPRETED = not isinstance(push_kernel, triton.JITFunction)


def slot_needed(nbytes: int) -> int:
    """Bytes of a slot for a summary of so many."""
    return nbytes + 8 * int(WORDS.value)


def bytes_needed(ranks: int, slot_bytes: int) -> int:
    """Bytes of every rank's memory."""
    return int(FLAG_BYTES.value) + 2 * ranks * slot_bytes


class PeerMemory:
    """The memories of all ranks of a group, as one of them sees them.

    Args:
        rank: this one.
        memories: [bytes] of uint8 of every rank, all mapped into this process and writable, those of this rank on
            its device. All flags must be zero before any rank begins.
        slot_bytes: the most that a summary and its header may take (`slot_needed`); a multiple of 16.
        timeout_s: after which a wait fails. On a GPU that is an assertion on the device, which ends the process's use
            of it.
    """

    def __init__(self, rank: int, memories: Sequence[Tensor], slot_bytes: int, timeout_s: float) -> None:
        device = memories[rank].device
        self.slot_bytes, self._rank, self._memories = slot_bytes, rank, tuple(memories)
        self._addresses = torch.tensor([memory.data_ptr() for memory in memories], dtype=torch.int64, device=device)
        self._epoch = torch.zeros(2, dtype=torch.int32, device=device)
        # Of what belongs to no call, and where nobody looks.
        self._no_header = torch.zeros(int(WORDS.value), dtype=torch.int64, device=device)
        self._unseen = torch.zeros(2 * int(WORDS.value), dtype=torch.int64, device=device)
        # Copied over the flags to end a wait: by then no kernel may be loaded, which waits for the GPU.
        pinned = device.type == "cuda"
        self._raised = torch.full((len(memories),), MOST_POLLS, dtype=torch.int32, pin_memory=pinned)
        self._polls = min(MOST_POLLS, int(timeout_s * POLLS_PER_S))

    def push(self, transition: Tensor | None, state: Tensor, header: Tensor | None = None) -> None:
        """Give this rank's summary to all ranks: what its transition stores, if anything, and its state, contiguous.

        header: int64 [4], of the call that this belongs to (`lasp.distributed.sealed`).
        """
        stored = 0 if transition is None else transition.numel()
        launch = _push(state.dtype, self._rank, len(self._memories), stored, state.numel(), self.slot_bytes)
        header = self._no_header if header is None else header
        launch(
            transition_ptr=state if transition is None else transition,
            state_ptr=state,
            header_ptr=header,
            memories_ptr=self._addresses,
            epoch_ptr=self._epoch,
        )

    def fold(
        self,
        initial: Tensor | None,
        state: Tensor,
        stored: int,
        seal: tuple[Tensor, Tensor] | None = None,
        *,
        reverse: bool,
        want_total: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Wait for all summaries, of decays: what enters this rank, and, if wanted, what leaves the last one.

        Args:
            initial: what enters the first rank, contiguous; zero if None.
            state: any of the same shape and dtype, [.., K, V].
            stored: how many numbers a transition stores.
            seal: this call's header, and where to write both if a summary is of another: what comes of it is NaN.
        """
        entering = torch.empty_like(state)
        total = torch.empty_like(state) if want_total else None
        each = state.numel() // stored if stored else 0
        launch = _fold(
            state.dtype, self._rank, len(self._memories), stored, state.numel(), self.slot_bytes, self._polls, each,
            reverse, initial is None,
        )  # fmt: skip
        header, found = seal or self._unsealed()
        launch(
            memories_ptr=self._addresses,
            epoch_ptr=self._epoch,
            header_ptr=header,
            found_ptr=found,
            initial_ptr=entering if initial is None else initial,
            entering_ptr=entering,
            total_ptr=total,
        )
        return entering, total

    def collect(self, state: Tensor, stored: int, seal: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Wait for all summaries: [ranks, stored + n], each as `Summary.pack` has it, of states [n] like this one."""
        collected = state.new_empty(len(self._memories), stored + state.numel())
        launch = _collect(
            state.dtype, self._rank, len(self._memories), stored, state.numel(), self.slot_bytes, self._polls
        )
        header, found = seal or self._unsealed()
        launch(
            memories_ptr=self._addresses,
            epoch_ptr=self._epoch,
            header_ptr=header,
            found_ptr=found,
            collected_ptr=collected,
        )
        return collected

    def end_wait(self) -> None:
        """Raise all flags here for good, from another thread: what a kernel then takes belongs to no call of now."""
        own = self._memories[self._rank]
        with torch.cuda.stream(torch.cuda.Stream(own.device)):
            own[: 4 * len(self._memories)].view(torch.int32).copy_(self._raised, non_blocking=True)

    def _unsealed(self) -> tuple[Tensor, Tensor]:
        return self._no_header, self._unseen


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


@lru_cache(maxsize=256)
def _push(dtype: torch.dtype, rank: int, ranks: int, stored: int, size: int, slot_bytes: int) -> Launch:
    fixed = {"rank": rank, "stored": stored, "size": size, "slot_bytes": slot_bytes}
    fixed |= {"SIZE": ranks, "BLOCK": BLOCK, "EVEN": size % BLOCK == 0}
    grid = (_blocks(size) + _blocks(stored), 1)
    return bind(push_kernel, grid, fixed, warps=WARPS, stages=1)


@lru_cache(maxsize=256)
def _fold(
    dtype: torch.dtype,
    rank: int,
    ranks: int,
    stored: int,
    size: int,
    slot_bytes: int,
    polls: int,
    each: int,
    reverse: bool,
    zero: bool,
) -> Launch:
    fixed = {"rank": rank, "stored": stored, "size": size, "slot_bytes": slot_bytes, "polls": polls}
    fixed |= {"SIZE": ranks, "BLOCK": BLOCK, "EVEN": size % BLOCK == 0, "EACH": each}
    fixed |= {"REVERSE": reverse, "FROM_ZERO": zero, "EXACT": not _INTERPRETED}
    grid = (_blocks(size), 1)
    return bind(fold_kernel, grid, fixed, warps=WARPS, stages=1, **_ROUNDED_APART, **_ASSERTING)


@lru_cache(maxsize=256)
def _collect(dtype: torch.dtype, rank: int, ranks: int, stored: int, size: int, slot_bytes: int, polls: int) -> Launch:
    fixed = {"rank": rank, "stored": stored, "size": size, "slot_bytes": slot_bytes, "polls": polls}
    fixed |= {"SIZE": ranks, "BLOCK": BLOCK}
    grid = (_blocks(stored + size), 1)
    return bind(collect_kernel, grid, fixed, warps=WARPS, stages=1, **_ASSERTING)
