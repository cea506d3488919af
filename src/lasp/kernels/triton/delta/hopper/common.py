# mypy: ignore-errors
"""Give the kernels for Hopper what they share: a segment's place, layouts of results, and tiles that come and go.

They are in the lower of Triton's languages, where registers, shared memory and waits are said: several products are in
flight together, and what the next chunk needs is on its way. They take chunks of 64 tokens, K and V of 128 or 256, and
bf16. Elsewhere, and in the interpreter, the kernels that they are named after make the same sums in the
same roundings.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

from lasp.kernels.triton.common.decays import CHANNEL, TOKEN
from lasp.kernels.triton.common.program import PLACE
from lasp.kernels.triton.delta.chunk import FORGOTTEN, SPAN

# A barrier between a program's threads; Triton 3.7 calls it otherwise.
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

TOKENS, WIDTH = gl.constexpr(64), gl.constexpr(128)
# Results of products between tokens, of tokens and channels, and of values and channels, by eight warps.
PAIRS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))
STATE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))
STATE_LEFT = gl.constexpr(gl.DotOperandLayout(0, STATE, 2))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # of a number a token, in shared memory


@gluon.jit
def segment_of(program, places_ptr, T, H_v, segments, segment_chunks, PACKED: gl.constexpr):
    """A segment's head, batch, first token and the one after its last, first chunk, the index of its run's border in
    [B or documents, H_v], and whether it is the run's last; as in `place`."""
    head = program % H_v
    batch = (program // H_v).to(gl.int64)
    segment = gl.program_id(1)
    if PACKED:
        entry = places_ptr + segment * PLACE
        first = gl.load(entry)
        last = gl.load(entry + 1)
        chunk = gl.load(entry + 2)
        border = gl.load(entry + 3).to(gl.int64) * H_v + head
        ends = gl.load(entry + 4) != 0
    else:
        first = segment * segment_chunks * TOKENS
        last = gl.minimum(first + segment_chunks * TOKENS, T)
        chunk = segment * segment_chunks
        border = batch * H_v + head
        ends = segment == segments - 1
    return head, batch, first, last, chunk, border, ends


@gluon.jit
def tokens_view(ptr, row, last, columns: gl.constexpr, layout: gl.constexpr):
    """Columns of a head's tokens from `ptr` on, with `row` elements from one token to the next, to be read in tiles
    [TOKENS, columns]; zeros from `last` on."""
    return tma.make_tensor_descriptor(ptr, [last, columns], [row, 1], [TOKENS, columns], layout)


@gluon.jit
def chunk_gradient_view(ptr, row, heads, last, SPREAD: gl.constexpr, layout: gl.constexpr):
    """Describe half the rows of D^T of every chunk of a head, each in the place of a token of a gradient, in tiles
    [TOKENS, TOKENS]: of every channel where its own gradient will be, or that of its neighbour.

    SPREAD: how many elements of D one of the gradient is long.
    """
    width: gl.constexpr = WIDTH * SPREAD
    return tma.make_tensor_descriptor(ptr + row * width, [last, width], [heads * width, 1], [TOKENS, TOKENS], layout)


@gluon.jit
def chunks_reached(bounds_ptr, at, count, REVERSE: gl.constexpr):
    """Count those of a segment's `count` chunks, its last (REVERSE: first), of which its end (start) knows anything; as
    the general launches' function of that name."""
    square: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    i = gl.arange(0, SPAN, gl.SliceLayout(1, square))
    j = gl.arange(0, SPAN, gl.SliceLayout(0, square))
    passed = 0.0
    reached = 1
    for first in range(0, count, SPAN):
        place = first + j if REVERSE else count - 1 - first - j
        bounds = gl.load(bounds_ptr + at + place, mask=first + j < count, other=0.0)
        before = passed + gl.sum(gl.where(j[None, :] < i[:, None], bounds[None, :], 0.0), 1)
        reached = gl.maximum(
            reached, gl.max(gl.where((first + i < count) & (before >= FORGOTTEN), first + i + 1, 0), 0)
        )
        passed += gl.sum(bounds, 0)
    return gl.where(passed == passed, gl.minimum(reached, count), count)


@gluon.jit
def ask_vector(tile, ptr, wanted):
    """Ask for numbers, fp32, as of each token of a chunk."""
    t = gl.arange(0, tile.shape[0], gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    async_copy.async_copy_global_to_shared(tile, ptr + t, mask=(t < tile.shape[0]) & wanted)


@gluon.jit
def last_of(vector):
    """Returns the number of a chunk's last token, from shared memory."""
    return gl.sum(vector.slice(TOKENS - 1, 1).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def between_pairs(prefix, norms, k_norms, KIND: gl.constexpr, NORMALIZE: gl.constexpr):
    """[TOKENS, TOKENS]: the decay from token j to a later i, and their lengths. Of an earlier i it may be infinite, so
    what it is multiplied with is to be replaced. All three are in shared memory."""
    factors = gl.full([TOKENS, TOKENS], 1.0, gl.float32, PAIRS)
    if KIND == TOKEN:
        rows = prefix.load(gl.SliceLayout(1, PAIRS))
        factors = gl.exp2(rows[:, None] - prefix.load(gl.SliceLayout(0, PAIRS))[None, :])
    if NORMALIZE:
        factors *= norms.load(gl.SliceLayout(1, PAIRS))[:, None] * k_norms.load(gl.SliceLayout(0, PAIRS))[None, :]
    return factors


@gluon.jit
def gradient_factors(prefix, q_norms, k_norms, scale, KIND: gl.constexpr, NORMALIZE: gl.constexpr):
    """[TOKENS]: decays from the chunk's start to its tokens, times the lengths of queries and `scale`; those times the
    lengths of keys; decays to the chunk's end, times these; and the decay of the whole chunk, base 2."""
    from_start = gl.full([TOKENS], 1.0, gl.float32, gl.SliceLayout(1, WIDE))
    to_end = from_start
    total = 0.0
    if KIND == TOKEN:
        total = last_of(prefix)
        from_start = gl.exp2(prefix.load(gl.SliceLayout(1, WIDE)))
        to_end = gl.exp2(total - prefix.load(gl.SliceLayout(1, WIDE)))
    q_read = from_start * scale
    k_read = from_start
    if NORMALIZE:
        lengths = k_norms.load(gl.SliceLayout(1, WIDE))
        q_read *= q_norms.load(gl.SliceLayout(1, WIDE))
        k_read *= lengths
        to_end *= lengths
    return q_read, k_read, to_end, total


@gluon.jit
def reading_factors(prefix, norms, scale, KIND: gl.constexpr, NORMALIZE: gl.constexpr, layout: gl.constexpr):
    """[TOKENS]: decays from the chunk's start to its tokens, times their lengths and `scale`."""
    factors = gl.full([TOKENS], 1.0, gl.float32, layout) * scale
    if KIND == TOKEN:
        factors *= gl.exp2(prefix.load(layout))
    if NORMALIZE and KIND != CHANNEL:
        factors *= norms.load(layout)
    return factors


@gluon.jit
def afresh(x):
    """x, int32; what is made of it is made again, lest the compiler keep what was made of it before."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def write(ptr, tile, row, start, last):
    """Store a tile [TOKENS, columns] of tokens from `start` on, but none from `last` on.

    row: elements from one token to the next.
    """
    t = start + gl.arange(0, TOKENS, gl.SliceLayout(1, tile.type.layout))
    d = gl.arange(0, tile.shape[1], gl.SliceLayout(0, tile.type.layout))
    inside = (t < last)[:, None] & (d >= 0)[None, :]
    gl.store(ptr + ((t.to(gl.int64) * row)[:, None] + d[None, :]), tile.to(ptr.dtype.element_ty), mask=inside)
