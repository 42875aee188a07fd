"""How far a score could be off by the choice of images: bootstrap intervals and comparisons.

Images are drawn anew with replacement, as many as there are, and the score is taken of each draw
(Efron, Annals of Statistics 7, 1979). Records are matched once; a draw only counts each image so
often, so an AP is accumulated over the ranks of the whole draw and is no mean of images' APs.

The intervals speak of images like these, not of another lab's, and of this model, not of another
training. With few images they are too narrow: of n images that differ by chance alone, the
interval of a mean holds the truth in 87 % of cases at n = 6 and in 93 % at n = 20, not in 95 %
(Student's t at 1.96 sqrt(1 - 1/n)); that of a ratio such as PQ in 83 and 92 % (a made case).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cellseg.coco import Record
from cellseg.errors import SettingsError
from cellseg.evaluation.matches import (
    Matches,
    average_precision,
    find_candidates,
    match_records,
)
from cellseg.evaluation.names import NUCLEI_NAMES, SCORE_NAMES
from cellseg.evaluation.nuclei import NucleiReport, nuclei_ratios, nuclei_sums
from cellseg.evaluation.scores import AT_50, AT_75, COCO_CAP, Truth, check_fit, mean_or_none

PERCENT = 95
_ONE_50, _ONE_75 = slice(AT_50, AT_50 + 1), slice(AT_75, AT_75 + 1)
# name -> (cap on records per image and class, IoUs)
_AP = {
    "ap": (None, slice(None)),
    "ap50": (None, _ONE_50),
    "ap75": (None, _ONE_75),
    "ap_100": (COCO_CAP, slice(None)),
    "ap50_100": (COCO_CAP, _ONE_50),
    "ap75_100": (COCO_CAP, _ONE_75),
}
STATISTICS = tuple(SCORE_NAMES)

Statistic = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Interval:
    """A score and the 95 % of its draws in the middle; None where there is nothing to score."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """Return e.g. "0.431 (0.402-0.460)"."""
        if self.value is None:
            return "-"
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True)
class Comparison:
    """Two record lists scored on the same draws of images.

    Attributes:
        value_a, value_b: the two scores.
        difference: B - A; `low` and `high` are the 95 % of its draws in the middle.
        sentence: all of it in words.
    """

    value_a: float | None
    value_b: float | None
    difference: float | None
    low: float | None
    high: float | None
    sentence: str


def image_bootstrap(
    truth: Truth,
    records: Sequence[Record],
    *,
    statistics: Sequence[str] = ("ap50", "ap"),
    score_threshold: float | None = None,
    samples: int = 1000,
    seed: int = 0,
    groups: Mapping[int, Hashable] | None = None,
) -> dict[str, Interval]:
    """Return scores with 95 % intervals by the percentiles of draws of images.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records: result records.
        statistics: names out of `STATISTICS`: APs as in `Scores`, pooled scores as in
            `NucleiScores`.
        score_threshold: the cut for the nuclei scores, which need one.
        samples: number of draws.
        seed: of the draws; equal seeds draw the same images.
        groups: image_id -> its group (slide, patient, tile), whole groups are drawn; None draws
            single images. Cells of one slide are alike: without groups intervals are too narrow.

    Returns:
        name -> interval, in the order asked for. Draws without anything to score are left out.

    Raises:
        SettingsError: if a statistic is unknown or lacks its cut, or an image has no group.
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    evidence = _gather(truth, records, statistics, score_threshold)
    draws = draw_images(_image_ids(truth), samples=samples, seed=seed, groups=groups)
    return {name: bootstrap_interval(partial(evidence.score, name), draws) for name in statistics}


def class_bootstrap(
    truth: Truth,
    records: Sequence[Record],
    *,
    samples: int = 1000,
    seed: int = 0,
    groups: Mapping[int, Hashable] | None = None,
) -> dict[str, Interval]:
    """Return the AP50 of each class with its 95 % interval, from one pass over the draws.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records: result records.
        samples: number of draws.
        seed: of the draws; equal seeds draw the same images as `image_bootstrap`.
        groups: as in `image_bootstrap`.

    Returns:
        class name -> interval, in the order of the class ids; draws without a cell of the class
        are left out of its interval.

    Raises:
        SettingsError: if an image has no group.
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    check_fit(truth, records)
    matches = match_records(truth, records)
    draws = draw_images(_image_ids(truth), samples=samples, seed=seed, groups=groups)
    once = np.ones((1, draws.shape[1]), dtype=np.int64)
    drawn = np.array(
        [
            average_precision(matches, weights=weights, ious=_ONE_50)[:, 0]
            for weights in np.concatenate([once, draws])
        ]
    )
    names = {category["id"]: category["name"] for category in truth["categories"]}
    return {
        names[category_id]: _middle(drawn[0, k], drawn[1:, k])
        for k, category_id in enumerate(matches.category_ids.tolist())
    }


def class_nuclei_bootstrap(
    truth: Truth,
    report: NucleiReport,
    *,
    samples: int = 1000,
    seed: int = 0,
    groups: Mapping[int, Hashable] | None = None,
) -> dict[str, dict[str, Interval]]:
    """Return the nuclei scores of each class with their 95 % intervals.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        report: of `score_nuclei`, with this truth.
        samples: number of draws.
        seed: of the draws; equal seeds draw the same images as `image_bootstrap`.
        groups: as in `image_bootstrap`.

    Returns:
        class name -> score by its name in `NucleiScores` -> interval; draws without a cell of the
        class are left out of its intervals.

    Raises:
        SettingsError: if an image has no group.
    """
    draws = draw_images(_image_ids(truth), samples=samples, seed=seed, groups=groups)
    weights = np.concatenate([np.ones((1, draws.shape[1]), dtype=np.int64), draws])
    cells = find_candidates(truth, [])
    places = {category_id: k for k, category_id in enumerate(cells.category_ids.tolist())}
    intervals = {}
    for category in truth["categories"]:
        asked = weights @ cells.truths[:, places[category["id"]]] > 0
        drawn = nuclei_ratios(weights @ report.class_sums[category["name"]])
        scores = {name: np.where(asked, values, np.nan) for name, values in drawn.items()}
        intervals[category["name"]] = {
            name: _middle(values[0], values[1:]) for name, values in scores.items()
        }
    return intervals


def compare_records(
    truth: Truth,
    records_a: Sequence[Record],
    records_b: Sequence[Record],
    *,
    statistic: str = "ap50",
    score_thresholds: tuple[float, float] | None = None,
    names: tuple[str, str] = ("A", "B"),
    samples: int = 1000,
    seed: int = 0,
    groups: Mapping[int, Hashable] | None = None,
) -> Comparison:
    """Return by how much B scores better than A, with a 95 % interval of the difference.

    Both are scored on the same draws, so what makes an image hard for both does not count.

    Args:
        truth: COCO dict as `truth_from_targets` makes it.
        records_a: result records.
        records_b: others for the same images.
        statistic: a name out of `STATISTICS`.
        score_thresholds: the cuts of A and B for the nuclei scores, which need them.
        names: what the sentence calls them.
        samples: number of draws.
        seed: of the draws.
        groups: as in `image_bootstrap`.

    Raises:
        SettingsError: if the statistic is unknown or lacks its cuts, or an image has no group.
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    cut_a, cut_b = score_thresholds or (None, None)
    scored_a = _gather(truth, records_a, [statistic], cut_a)
    scored_b = _gather(truth, records_b, [statistic], cut_b)

    def difference(weights: np.ndarray) -> float:
        return scored_b.score(statistic, weights) - scored_a.score(statistic, weights)

    draws = draw_images(_image_ids(truth), samples=samples, seed=seed, groups=groups)
    interval = bootstrap_interval(difference, draws)
    once = np.ones(draws.shape[1], dtype=np.int64)
    value_a, value_b = (_known(side.score(statistic, once)) for side in (scored_a, scored_b))
    drawn = describe_draws(draws.shape[1], count_groups(truth, groups))
    sentence = _sentence(SCORE_NAMES[statistic], names, (value_a, value_b), interval, drawn)
    return Comparison(value_a, value_b, interval.value, interval.low, interval.high, sentence)


def bootstrap_interval(statistic: Statistic, draws: np.ndarray) -> Interval:
    """Return a statistic of all images, and the 2.5th and 97.5th percentile of its draws.

    Args:
        statistic: takes int64 [I], how often each image counts; NaN where it has no value.
        draws: int64 [samples, I] of `draw_images`. Draws without a value are left out.
    """
    value = statistic(np.ones(draws.shape[1], dtype=np.int64))
    return _middle(value, np.array([statistic(weights) for weights in draws], dtype=float))


def draw_images(
    image_ids: Sequence[int],
    *,
    samples: int = 1000,
    seed: int = 0,
    groups: Mapping[int, Hashable] | None = None,
) -> np.ndarray:
    """Return how often each image occurs in draws with replacement, int64 [samples, I].

    As many groups are drawn as there are, each with all of its images; without groups an image is
    its own.

    Raises:
        SettingsError: if an image has no group.
    """
    groups = {image_id: image_id for image_id in image_ids} if groups is None else groups
    missing = [image_id for image_id in image_ids if image_id not in groups]
    if missing:
        raise SettingsError(f"image_id {missing[0]} has no group; give one for every image")
    number_of = {group: k for k, group in enumerate(dict.fromkeys(map(groups.get, image_ids)))}
    group = np.array([number_of[groups[image_id]] for image_id in image_ids], dtype=np.int64)
    if not number_of:
        return np.zeros((samples, 0), dtype=np.int64)
    shares = np.full(len(number_of), 1 / len(number_of))
    return np.random.default_rng(seed).multinomial(len(number_of), shares, size=samples)[:, group]


def count_groups(truth: Truth, groups: Mapping[int, Hashable] | None) -> int | None:
    """Return the number of groups of the truth's images, None if there are no groups."""
    return None if groups is None else len({groups[k] for k in _image_ids(truth)})


def describe_draws(images: int, groups: int | None) -> str:
    """Return what is drawn in words: "27 images", or "6 groups of 45 images"."""
    return f"{images} images" if groups is None else f"{groups} groups of {images} images"


def _middle(value: float, drawn: np.ndarray) -> Interval:
    """Return a value with the percentiles of its draws, those that are NaN left out."""
    known, drawn = _known(value), drawn[~np.isnan(drawn)]
    if known is None or not len(drawn):
        return Interval(known, known, known)
    low, high = np.percentile(drawn, [(100 - PERCENT) / 2, (100 + PERCENT) / 2])
    return Interval(known, float(low), float(high))


@dataclass(frozen=True)
class _Evidence:
    """What the scores of any choice of images follow from."""

    matches: Matches | None
    sums: np.ndarray | None

    def score(self, name: str, weights: np.ndarray) -> float:
        """Return a score of images that count so often; NaN where there is nothing to score."""
        if name in NUCLEI_NAMES:
            return float(nuclei_ratios(weights @ self.sums)[name])
        cap, ious = _AP[name]
        precision = average_precision(self.matches, weights=weights, cap=cap, ious=ious)
        mean = mean_or_none(precision)
        return np.nan if mean is None else mean


def _gather(
    truth: Truth,
    records: Sequence[Record],
    statistics: Sequence[str],
    score_threshold: float | None,
) -> _Evidence:
    """Match and paint what the statistics need, after checking that they can be had."""
    unknown = [name for name in statistics if name not in STATISTICS]
    if unknown:
        raise SettingsError(f"statistic {unknown[0]!r} is not one of {', '.join(STATISTICS)}")
    paints = any(name in NUCLEI_NAMES for name in statistics)
    if paints and score_threshold is None:
        raise SettingsError(
            "the nuclei scores need a score_threshold; choose_score_threshold finds one"
        )
    check_fit(truth, records)
    return _Evidence(
        matches=match_records(truth, records) if any(n in _AP for n in statistics) else None,
        sums=nuclei_sums(truth, records, score_threshold=score_threshold) if paints else None,
    )


def _sentence(
    shown: str,
    names: tuple[str, str],
    values: tuple[float | None, float | None],
    interval: Interval,
    drawn: str,
) -> str:
    """Return a comparison in words."""
    if interval.value is None:
        return f"{shown} has no value here: there is nothing to score."
    verdict = "these images cannot tell them apart"
    if interval.low > 0 or interval.high < 0:
        verdict = f"{names[interval.low > 0]} is better"
    return (
        f"{shown} is {values[1]:.3f} with {names[1]} and {values[0]:.3f} with {names[0]}: "
        f"{interval.value:+.3f} ({PERCENT} % interval {interval.low:+.3f} to "
        f"{interval.high:+.3f}, {drawn}); {verdict}."
    )


def _image_ids(truth: Truth) -> list[int]:
    """Return the ids of the images in the truth's order."""
    return [image["id"] for image in truth["images"]]


def _known(value: float) -> float | None:
    """Return a score, NaN as None."""
    return None if np.isnan(value) else float(value)
