# mypy: ignore-errors
"""Kernels that write into the memory of other ranks and wait for what those wrote here.

Every rank owns a piece of memory that all can write (`lasp.exchange.peer.memory`): a flag for every rank, then,
twice, a slot for every rank's summary, with a header of the call that it belongs to. An exchange is an epoch. In it a
rank writes its summary into its slot on every rank and then raises its flag there to the epoch; and it waits until all
flags have reached the epoch. So nobody can be two epochs ahead: who begins the next one but one has seen all others
begin the next, hence end this one, and two slots, used in turn, are enough. Epochs are counted on the device: a
captured graph goes on counting.

An epoch's two kernels run on one stream, one exchange after the other.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

FLAG_BYTES = tl.constexpr(4096)  # ahead of the slots: room for the flags of 1024 ranks, and alignment
WORDS = tl.constexpr(4)  # of int64 at the head of a slot: which call the summary behind it belongs to


@triton.jit
def _slot(memory, epoch, rank, slot_bytes, SIZE: tl.constexpr, dtype: tl.constexpr):
    """Address at which `rank` writes its summary of an epoch into the memory at address `memory`."""
    address = _head(memory, epoch, rank, slot_bytes, SIZE) + 8 * WORDS
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _head(memory, epoch, rank, slot_bytes, SIZE: tl.constexpr):
    """The address of the header in front of it."""
    turn = (epoch % 2) * SIZE + rank
    return memory + FLAG_BYTES + turn.to(tl.int64) * slot_bytes


@triton.jit
def _is_of_another(memory, epoch, source, slot_bytes, header_ptr, found_ptr, SIZE: tl.constexpr):
    """True if what `source` wrote belongs to another call; then both headers are told to the host."""
    word = tl.arange(0, WORDS)
    own = tl.load(header_ptr + word)
    head = _head(memory, epoch, source, slot_bytes, SIZE).to(tl.pointer_type(tl.int64))
    other = tl.load(head + word, cache_modifier=".cg")
    differs = tl.sum((own != other).to(tl.int32), 0) > 0
    if differs & (tl.program_id(0) == 0):
        tl.store(found_ptr + WORDS + word, other)
        tl.store(found_ptr + word, own)
    return differs


@triton.jit
def _all_have_come(memory, epoch, polls, SIZE: tl.constexpr):
    """Returns once every rank's flag here has reached the epoch; what they wrote before is visible then."""
    for rank in tl.static_range(SIZE):
        flag = memory.to(tl.pointer_type(tl.int32)) + rank
        left = polls
        reached = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        while (reached < epoch) & (left > 0):
            reached = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            left -= 1
        tl.device_assert(reached >= epoch, "a rank did not send its state in time")
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rank", "stored", "size", "slot_bytes"])
def push_kernel(
    transition_ptr,  # [stored]
    state_ptr,  # [size], of the same dtype
    header_ptr,  # int64 [WORDS]: of the call that this belongs to
    memories_ptr,  # int64 [SIZE]: the address of every rank's memory
    epoch_ptr,  # int32 [2]: epochs begun, and programs of this one that are done
    rank,
    stored,
    size,
    slot_bytes,
    SIZE: tl.constexpr,  # ranks
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,  # size is a multiple of BLOCK
):
    """Writes state and transition, one after the other, into this rank's slot on every rank; then raises the flags.

    The last programs are the transition's.
    """
    # The last program to end counts the epoch, when all have read it.
    epoch = tl.load(epoch_ptr) + 1
    blocks = tl.cdiv(size, BLOCK)
    if tl.program_id(0) == 0:
        word = tl.arange(0, WORDS)
        header = tl.load(header_ptr + word)
        for peer in tl.static_range(SIZE):
            head = _head(tl.load(memories_ptr + peer), epoch, rank, slot_bytes, SIZE)
            tl.store(head.to(tl.pointer_type(tl.int64)) + word, header)
    if tl.program_id(0) < blocks:
        flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        _write(state_ptr, flat, flat, flat < size, memories_ptr, epoch, rank, slot_bytes, SIZE, EVEN)
    else:
        flat = (tl.program_id(0) - blocks) * BLOCK + tl.arange(0, BLOCK)
        _write(transition_ptr, flat, size + flat, flat < stored, memories_ptr, epoch, rank, slot_bytes, SIZE, False)
    tl.debug_barrier()
    done = tl.atomic_add(epoch_ptr + 1, 1, sem="acq_rel", scope="sys")
    if done == tl.num_programs(0) - 1:
        tl.store(epoch_ptr + 1, 0)
        tl.store(epoch_ptr, epoch)
        for peer in tl.static_range(SIZE):
            flag = tl.load(memories_ptr + peer).to(tl.pointer_type(tl.int32)) + rank
            tl.atomic_xchg(flag, epoch, sem="release", scope="sys")


@triton.jit
def _write(
    source, at, to, mask, memories_ptr, epoch, rank, slot_bytes, SIZE: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """`at` of `source` to places `to` of this rank's slot on every rank; without a mask, in 16 bytes a store."""
    value = tl.load(source + at) if WHOLE else tl.load(source + at, mask=mask, other=0.0)
    for peer in tl.static_range(SIZE):
        slot = _slot(tl.load(memories_ptr + peer), epoch, rank, slot_bytes, SIZE, value.dtype)
        if WHOLE:
            tl.store(slot + to, value)
        else:
            tl.store(slot + to, value, mask=mask)


@triton.jit(do_not_specialize=["rank", "stored", "size", "slot_bytes", "polls"])
def fold_kernel(
    memories_ptr,  # int64 [SIZE]
    epoch_ptr,  # int32 [2]
    header_ptr,  # int64 [WORDS]: of this call
    found_ptr,  # int64 [2 * WORDS], on the host, written where a summary is of another: both headers
    initial_ptr,  # [size]; any tensor if FROM_ZERO
    entering_ptr,  # [size], written: the state that enters this rank
    total_ptr,  # [size], written: the state after all ranks; or None
    rank,
    stored,
    size,
    slot_bytes,
    polls,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    EACH: tl.constexpr,  # elements of a state that one number of the transition decays; 0: no decay
    REVERSE: tl.constexpr,  # the line of ranks begins with the last
    FROM_ZERO: tl.constexpr,
    EXACT: tl.constexpr,  # the exponential of PyTorch's kernels, bit by bit; no for the interpreter, which has none
):
    """Waits for all summaries and applies them in the order of the line, as `Summary.apply` does, to its last bit."""
    epoch = tl.load(epoch_ptr)
    memory = tl.load(memories_ptr + rank)
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.full((BLOCK,), True, tl.int1) if EVEN else flat < size
    dtype: tl.constexpr = entering_ptr.dtype.element_ty
    state = tl.zeros((BLOCK,), dtype)
    if not FROM_ZERO:
        state = tl.load(initial_ptr + flat, mask=inside, other=0.0)
    _all_have_come(memory, epoch, polls, SIZE)
    for position in tl.static_range(SIZE):
        source = SIZE - 1 - position if REVERSE else position
        if source == rank:
            tl.store(entering_ptr + flat, state, mask=inside)
        slot = _slot(memory, epoch, rank * 0 + source, slot_bytes, SIZE, dtype)
        if _is_of_another(memory, epoch, rank * 0 + source, slot_bytes, header_ptr, found_ptr, SIZE):
            state += float("nan")
        # Around the first cache, which may hold what was here two epochs ago.
        if EACH > 0:
            if EACH % BLOCK == 0:  # one number for the whole block
                number = tl.program_id(0) * BLOCK // EACH
                log_decay = tl.load(slot + size + number, mask=number < stored, other=0.0, cache_modifier=".cg")
            else:
                log_decay = tl.load(slot + size + flat // EACH, mask=inside, other=0.0, cache_modifier=".cg")
            decay = libdevice.exp(log_decay) if EXACT else tl.exp(log_decay)
            state = tl.where(log_decay == float("-inf"), 0.0, decay * state)
        state += tl.load(slot + flat, mask=inside, other=0.0, cache_modifier=".cg")
    if total_ptr is not None:
        tl.store(total_ptr + flat, state, mask=inside)


@triton.jit(do_not_specialize=["rank", "stored", "size", "slot_bytes", "polls"])
def collect_kernel(
    memories_ptr,  # int64 [SIZE]
    epoch_ptr,  # int32 [2]
    header_ptr,  # int64 [WORDS]: of this call
    found_ptr,  # int64 [2 * WORDS], on the host, written where a summary is of another: both headers
    collected_ptr,  # [SIZE, stored + size], written: transition and state, as `Summary.pack` has them
    rank,
    stored,
    size,
    slot_bytes,
    polls,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Waits for all summaries and copies them, for transitions that take matrix products."""
    epoch = tl.load(epoch_ptr)
    memory = tl.load(memories_ptr + rank)
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < stored + size
    packed = tl.where(flat < size, stored + flat, flat - size)
    _all_have_come(memory, epoch, polls, SIZE)
    for source in tl.static_range(SIZE):
        slot = _slot(memory, epoch, rank * 0 + source, slot_bytes, SIZE, collected_ptr.dtype.element_ty)
        value = tl.load(slot + flat, mask=inside, other=0.0, cache_modifier=".cg")
        if _is_of_another(memory, epoch, rank * 0 + source, slot_bytes, header_ptr, found_ptr, SIZE):
            value += float("nan")
        tl.store(collected_ptr + tl.cast(source, tl.int64) * (stored + size) + packed, value, mask=inside)
