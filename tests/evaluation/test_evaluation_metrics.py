"""Metrics against scikit-learn and hand-computed values; docs/evaluation.md has the table."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from perception_rt.evaluation.encoder.linear_probe import choose_penalty, validation_rows
from perception_rt.evaluation.encoder.logistic import fit_logistic
from perception_rt.evaluation.metrics import classification
from perception_rt.evaluation.metrics.bootstrap import bootstrap_intervals
from perception_rt.evaluation.metrics.neighbours import neighbour_votes
from perception_rt.evaluation.metrics.retrieval import dual_softmax, first_match_ranks
from perception_rt.evaluation.outcomes import mean_of

CASES = 20


def scored(seed: int, items: int = 200, classes: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, items - classes)])
    scores = rng.standard_normal((items, classes))
    scores[np.arange(items), labels] += 1
    return scores, labels


def unit_rows(rng: np.random.Generator, count: int, width: int = 16) -> np.ndarray:
    rows = rng.standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(CASES))
def test_classification_equals_scikit_learn(seed: int) -> None:
    scores, labels = scored(seed)
    ranks = classification.label_ranks(scores, labels)
    for k in (1, 5):
        assert (ranks < k).mean() == pytest.approx(top_k_accuracy_score(labels, scores, k=k))
    right, answers = (ranks == 0).astype(float), scores.argmax(axis=1)
    found = classification.mean_per_class(right, labels)
    assert found == pytest.approx(balanced_accuracy_score(labels, answers), abs=1e-15)
    counts = classification.confusion_matrix(labels, answers, 11)
    assert (counts == confusion_matrix(labels, answers, labels=range(11))).all()


def test_equal_scores_favour_the_lower_class_as_argmax_does() -> None:
    scores = np.array([[1.0, 1.0, 0.0]] * 3)
    assert classification.label_ranks(scores, np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_mean_per_class_leaves_out_classes_that_were_not_drawn() -> None:
    found = classification.mean_per_class(np.array([1.0, 0.0, 1.0]), np.array([0.0, 0.0, 5.0]))
    assert found == 0.75


@pytest.mark.parametrize("seed", range(CASES))
def test_recall_equals_sorting_each_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(30), rng.integers(0, 30, 60)])
    scores = rng.standard_normal((30, 90)).astype(np.float32)
    scores = scores.round(1)  # many ties
    to_text = first_match_ranks(scores, np.arange(30), owners)
    for query, rank in enumerate(to_text):
        order = np.argsort(-scores[query], kind="stable")
        assert rank == np.flatnonzero(owners[order] == query)[0]
    to_item = first_match_ranks(scores.T, owners, np.arange(30))
    for query, rank in enumerate(to_item):
        order = np.argsort(-scores.T[query], kind="stable")
        assert order[rank] == owners[query]


def test_dual_softmax_of_two_queries_by_hand() -> None:
    # Both queries prefer item 0; the softmax over queries leaves it to the first.
    scores = np.array([[3.0, 0.5], [2.0, 1.5]], np.float32)
    odds = 1 / (1 + np.exp(-1.0))
    expected = [[3 * odds, 0.5 * (1 - odds)], [2 * (1 - odds), 1.5 * odds]]
    np.testing.assert_allclose(dual_softmax(scores), expected, rtol=1e-6)
    assert scores.argmax(axis=1).tolist() == [0, 0]
    assert dual_softmax(scores).argmax(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(CASES))
def test_neighbours_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    train, test = unit_rows(rng, 120), unit_rows(rng, 50)
    labels = np.concatenate([np.arange(7), rng.integers(0, 7, 113)])
    theirs = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(train, labels)
    votes = neighbour_votes(test @ train.T, labels, 7, k=20, temperature=0.07)
    shares = votes / votes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, theirs.predict_proba(test), atol=2e-5)


@pytest.mark.parametrize(("seed", "penalty"), [(0, 1e-1), (1, 1e-2), (2, 1e-3), (3, 1e-4)])
def test_logistic_regression_equals_scikit_learn(seed: int, penalty: float) -> None:
    rng = np.random.default_rng(seed)
    features, labels = unit_rows(rng, 150), rng.integers(0, 5, 150)
    theirs = LogisticRegression(C=1 / (150 * penalty), tol=1e-10, max_iter=10_000)
    theirs.fit(features.astype(np.float64), labels)
    ours = fit_logistic(features, labels, 5, penalty)
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-5)
    # scikit-learn leaves the mean of the biases open, which changes no answer.
    centred = theirs.intercept_ - theirs.intercept_.mean()
    np.testing.assert_allclose(ours.bias - ours.bias.mean(), centred, atol=2e-5)


def test_the_penalty_is_chosen_on_rows_that_are_not_fitted() -> None:
    labels = np.repeat([0, 1], 40)
    held_out = validation_rows(labels, ["a", "b"])
    assert [(labels[held_out] == number).sum() for number in (0, 1)] == [8, 8]
    features = np.zeros((80, 2), np.float32)
    features[np.arange(80), labels] = 1
    features[held_out] = features[held_out][:, ::-1]  # only there, the features mislead
    _, accuracies = choose_penalty(features, labels, 2, held_out, lambda *_: None)
    assert max(accuracies) == 0


def test_the_interval_of_a_share_has_the_binomial_width() -> None:
    right = np.array([1.0] * 320 + [0.0] * 80)
    (interval,) = bootstrap_intervals([mean_of("right").compute], {"right": right})
    spread = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert interval == pytest.approx((0.8 - spread, 0.8 + spread), abs=0.006)


def test_paired_intervals_see_only_the_items_that_differ() -> None:
    own, other = np.array([1.0, 0.0] * 200), np.array([1.0, 0.0] * 200)
    other[1] = 1
    metric = mean_of("right").compute
    (same,) = bootstrap_intervals([metric], {"right": own}, {"right": own})
    (one,) = bootstrap_intervals([metric], {"right": own}, {"right": other})
    assert same == (0, 0)
    assert 0 <= one[0] < 1 / 400 < one[1] < 5 / 400
