# mypy: ignore-errors
"""Cross entropy of a row of logits, and its gradient in the row's place.

    log p = (x - max x) - log sum exp(x - max x),  loss = -log p[label],  gradient = p, less one at the label

A program has a row: it reads it once from memory, for the sum, and once more from the cache. Exponents are to base 2.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _less_one(x):
    """exp(x) - 1 of x <= 0, which as a difference would have no digits near zero."""
    small = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, small, tl.exp(x) - 1)


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # [rows, VOCAB], replaced by the loss's gradient if GRADIENT; zero where the label is ignored
    labels_ptr,  # int64 [rows]
    losses_ptr,  # fp32 [rows], written; NaN where the label is none
    VOCAB: tl.constexpr,
    IGNORED: tl.constexpr,
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,  # columns of a lane at a time, which has a maximum and a sum of its own
):
    """A program for a row."""
    row = tl.cast(tl.program_id(0), tl.int64)
    logits_ptr += row * VOCAB
    label = tl.load(labels_ptr + row)
    is_ignored = label == IGNORED
    known = (label >= 0) & (label < VOCAB)
    # Before any of the row is replaced: the sums below make all threads wait.
    at_label = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    largest = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for first in range(0, VOCAB, LANES * EACH):
        x = tl.load(logits_ptr + first + columns, mask=first + columns < VOCAB, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(x, 1))
        # A lane that has seen nothing yet: -inf less itself is no number.
        from_here = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp2((before - from_here) * LOG2_E) + tl.sum(tl.exp2((x - from_here[:, None]) * LOG2_E), 1)
    most = tl.max(largest, 0)
    # Not added to the maximum, which would leave a sure token's logarithm without digits.
    log_sum = tl.log(tl.sum(total * tl.exp2((largest - most) * LOG2_E), 0))
    log_p = (at_label - most) - log_sum
    tl.store(losses_ptr + row, tl.where(is_ignored, 0.0, -log_p))
    if GRADIENT:
        for first in range(0, VOCAB, LANES * EACH):
            place = logits_ptr + first + columns
            inside = first + columns < VOCAB
            x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            d = tl.where(first + columns == label, _less_one(log_p), tl.exp2((x - most - log_sum) * LOG2_E))
            d = tl.where(is_ignored, 0.0, d)
            tl.store(place, d.to(logits_ptr.dtype.element_ty), mask=inside)
