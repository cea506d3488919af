"""The 3-gram model is a probability distribution and scores as computed by hand."""

import math

import numpy as np

from lasp.data import trigram


def test_probabilities_of_a_context_sum_to_one() -> None:
    train = np.random.default_rng(0).integers(97, 105, 500)
    model = trigram._Trigrams(train)
    every = np.arange(256)
    for a, b in ((97, 98), (97, 200), (200, 201)):  # seen pair, unseen pair after a seen byte, nothing seen
        total = model.probability(np.full(256, a), np.full(256, b), every).sum()
        assert math.isclose(total, 1, rel_tol=1e-12)


def test_score_is_that_of_a_count_by_hand() -> None:
    train = np.frombuffer(b"abcabdabc", np.uint8)
    # contexts of the first two labels hold made-up bytes; from the third on: a b -> c
    model = trigram._Trigrams(train)
    singles, pairs = 7, {("b", "c"): 2, ("b", "d"): 1}  # of complete triples
    assert model.singles.sum() == singles and model.pairs[98, 99] == pairs["b", "c"]
    p1 = (2 + 1) / (7 + 256)
    p2 = (2 + 2 * p1) / (3 + 2)
    p3 = (2 + 2 * p2) / (3 + 2)
    found = model.probability(np.array([97]), np.array([98]), np.array([99]))
    assert math.isclose(found[0], p3, rel_tol=1e-12)


def test_predictable_text_costs_little_and_noise_costs_eight_bits() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 60_000)
    score = trigram.bits_per_byte(noise[:50_000], noise[50_000:], 9_999)
    assert 7.9 < score < 9.5
    regular = np.tile(np.frombuffer(b"sequence ", np.uint8), 3000)
    assert trigram.bits_per_byte(regular, regular[:5000], 4999) < 0.1


def test_the_separator_is_paid_for_but_is_no_byte_of_text() -> None:
    train = np.array([97, 256] * 500)
    with_separator = trigram.bits_per_byte(train, np.array([97, 256, 97, 256, 97]), 4)
    assert with_separator > 0 and math.isfinite(with_separator)
