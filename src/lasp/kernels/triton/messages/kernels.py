# mypy: ignore-errors
"""Kernels that count calls and put a header in front of a message, or compare it (lasp.distributed.sealed).

A header is four words of int64: the call's number, that of the forward call whose gradients it takes, the plan, the
step. It lies in front of the payload, which begins at a whole word.
"""

import triton
import triton.language as tl

WORDS = tl.constexpr(4)


@triton.jit(do_not_specialize=["plan"])
def begin_kernel(
    state_ptr,  # int64 [2]: calls so far, and the step
    header_ptr,  # int64 [WORDS], written
    forward_ptr,  # int64 [WORDS], the forward call's header, or None
    plan,
):
    """Counts a call and writes its header. One program."""
    number = tl.load(state_ptr) + 1
    tl.store(state_ptr, number)
    tl.store(header_ptr, number)
    forward = number * 0
    if forward_ptr is not None:
        forward = tl.load(forward_ptr)
    tl.store(header_ptr + 1, forward)
    tl.store(header_ptr + 2, number * 0 + plan)
    tl.store(header_ptr + 3, tl.load(state_ptr + 1))


@triton.jit(do_not_specialize=["count"])
def seal_kernel(
    header_ptr,  # int64 [WORDS]
    payload_ptr,  # [count]
    message_ptr,  # [HEAD + count, and more], written
    count,
    HEAD: tl.constexpr,  # numbers of the payload's dtype that a header is
    BLOCK: tl.constexpr,
):
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        word = tl.arange(0, WORDS)
        tl.store(message_ptr.to(tl.pointer_type(tl.int64)) + word, tl.load(header_ptr + word))
    tl.store(message_ptr + HEAD + flat, tl.load(payload_ptr + flat, mask=flat < count), mask=flat < count)


@triton.jit(do_not_specialize=["length"])
def open_kernel(
    header_ptr,  # int64 [WORDS]
    messages_ptr,  # [n, length]; what follows another header is written
    found_ptr,  # int64 [2 * WORDS], on the host; written where there is another
    length,
    HEAD: tl.constexpr,
    FLOATING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A message is one row of programs. Where all is well they read two headers each, and write nothing."""
    message = messages_ptr + tl.program_id(1).to(tl.int64) * length
    word = tl.arange(0, WORDS)
    own = tl.load(header_ptr + word)
    other = tl.load(message.to(tl.pointer_type(tl.int64)) + word)
    if tl.sum((own != other).to(tl.int32), 0) > 0:
        flat = HEAD + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        if FLOATING:
            tl.store(message + flat, float("nan"), mask=flat < length)
        if tl.program_id(0) == 0:
            tl.store(found_ptr + WORDS + word, other)
            tl.store(found_ptr + word, own)
