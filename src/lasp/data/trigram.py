"""A byte 3-gram model: the score that a trained model has to beat.

    p(c | a b) = (n(abc) + d(ab) p(c | b)) / (n(ab) + d(ab))

with n the counts in the training text and d the number of different bytes seen after a context (Witten and Bell,
1991), the 2-gram and 1-gram models likewise and add-one at the bottom: a strong 3-gram model without a knob.
The document separator counts as byte 0, so the 3-gram model pays for it just as the language model does.
"""

import numpy as np

from lasp.data.stream import Tokens


def bits_per_byte(train: Tokens, validation: Tokens, num_tokens: int) -> float:
    """Score of the 3-gram model of `train` on tokens 1 .. num_tokens of `validation`, in bits per byte of text.

    train, validation: byte tokens (0..255, separator 256), one-dimensional. The tokens scored are those which a
    language model predicts from the first num_tokens tokens; they see their context across sequence borders.
    """
    # Two bytes of made-up context in front, so that the first token scored needs no rule of its own.
    text = np.concatenate([[0, 0], validation[: num_tokens + 1] & 0xFF]).astype(np.int64)
    probability = _Trigrams(train).probability(text[1:-2], text[2:-1], text[3:])
    num_bytes = np.count_nonzero(validation[1 : num_tokens + 1] < 256)
    return float(-np.log2(probability).sum() / num_bytes)


class _Trigrams:
    def __init__(self, train: Tokens) -> None:
        # In blocks: the intermediate 64-bit codes of a large text would not fit.
        triples = np.zeros(1 << 24, dtype=np.int64)
        block = 1 << 24
        for start in range(0, max(len(train) - 2, 0), block):
            x = (np.asarray(train[start : start + block + 2]) & 0xFF).astype(np.int32)
            triples += np.bincount((x[:-2] << 16) + (x[1:-1] << 8) + x[2:], minlength=1 << 24)
        self.triples = triples.reshape(256, 256, 256)
        self.pairs = self.triples.sum(axis=0)
        self.singles = self.pairs.sum(axis=0)

    def probability(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """p(c | a b), fp64, one for each position."""
        p = (self.singles[c] + 1) / (self.singles.sum() + 256)
        for counts, context in ((self.pairs, (b,)), (self.triples, (a, b))):
            place = (*context, c)
            total = counts.sum(axis=-1)[context]
            distinct = np.count_nonzero(counts, axis=-1)[context]
            seen = (counts[place] + distinct * p) / np.maximum(total + distinct, 1)
            p = np.where(total > 0, seen, p)
        return p
