"""Settings of an ensemble, fitted on records of images that no member was trained on.

A coordinate search by AP50 (uncapped, the course's measure) that starts from the defaults. In a
round each kind of change is tried in turn: one member left out, another rule, another threshold,
another weight of one member. The best of a kind is made if it passes the guard; rounds go on until
one brings nothing.

The guard against over-fitting asks for both: a gain of `MARGIN`, as a smaller one is no reason to
leave settings that work everywhere, and an interval of the paired difference over drawn images
that lies above 0, as of many changes some gain the margin on a few images by luck. What passes is
still the best of what was tried on these very images: their AP50 promises a little too much.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cellseg.coco import Record
from cellseg.ensemble.evidence import Evidence, Plan, ap50
from cellseg.ensemble.rules import RULES
from cellseg.errors import SettingsError
from cellseg.evaluation import Interval
from cellseg.evaluation.intervals import bootstrap_interval, draw_images
from cellseg.evaluation.matches import Matches
from cellseg.evaluation.scores import Truth

IOU_THRESHOLD, AGREEMENT = 0.5, "mean"  # the defaults
THRESHOLDS = (0.5, 0.4, 0.6, 0.3, 0.7)  # of equal ones the first is taken: near the default
WEIGHTS = (1.0, 0.5, 2.0, 0.25, 4.0)
MARGIN = 0.002  # least gain of a change in AP50
ROUNDS = 10  # at most; each tries 5 M + 6 changes for M members, and makes four of them at most
DRAWS = 500  # of images, for an interval

Change = tuple[str, Plan]
Kind = Callable[[Plan, Sequence[str]], Iterator[Change]]


@dataclass(frozen=True)
class Tuning:
    """Settings of an ensemble, and what they rest on.

    Attributes:
        weights: name of a member -> its weight, 0 if it is left out; empty if nothing was tuned.
        iou_threshold: mask IoU over which records of a class show one cell.
        agreement: name of the rule, of `RULES`.
        interval: AP50 out of fold with these settings; None if nothing was tuned.
        default: the same with the defaults.
        images: number of images with truth.
        steps: what was changed, in order, and the paired gain of each.
        reason: why nothing could be tuned; empty if it was.
    """

    weights: dict[str, float] = field(default_factory=dict)
    iou_threshold: float = IOU_THRESHOLD
    agreement: str = AGREEMENT
    interval: Interval | None = None
    default: Interval | None = None
    images: int = 0
    steps: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def members(self) -> list[str]:
        """Names of the members that were chosen."""
        return [name for name, weight in self.weights.items() if weight > 0]

    @property
    def ap50(self) -> float | None:
        """AP50 out of fold, 0-1."""
        return None if self.interval is None else self.interval.value

    def sentence(self) -> str:
        """Say in a line what was tuned and gained, or why nothing was."""
        if self.reason:
            return f"The settings are the defaults: {self.reason}."
        text = f"Out of fold on {self.images} images the AP50 is {self.interval}"
        if not self.steps:
            return f"{text} with the defaults; no change passed the guard."
        return f"{text}, with the defaults {self.default}: {'; '.join(self.steps)}."


def tune_ensemble(
    members_oof: Mapping[str, Sequence[Record]],
    truth: Truth,
    *,
    groups: Mapping[int, Hashable] | None = None,
    seed: int = 0,
) -> Tuning:
    """Return the settings of an ensemble that records out of fold speak for.

    The result depends neither on the order of members nor on that of records. Of changes with the
    same AP50 the first is taken: names in their order, thresholds and weights from the nearest to
    the default on.

    Args:
        members_oof: name of a member -> its records for the truth's images, each found by a model
            that was not trained on the image.
        truth: COCO dict as `truth_from_targets` makes it.
        groups: image_id -> its group (slide, patient), drawn as a whole for the intervals.
        seed: of the draws.

    Raises:
        SettingsError: if there is no member.
        RecordsError: if a record's image, class or mask size is not the truth's.
    """
    if not members_oof:
        raise SettingsError("there is no member to tune; give records out of fold")
    names = sorted(members_oof)
    lists = [members_oof[name] for name in names]
    search = _Search(Evidence(lists, truth, lowest_iou=min(THRESHOLDS)), truth, groups, seed)
    start = Plan((1.0,) * len(names), IOU_THRESHOLD, AGREEMENT)
    plan, steps = search.run(start, names)
    return Tuning(
        weights=dict(zip(names, plan.weights, strict=True)),
        iou_threshold=plan.iou_threshold,
        agreement=plan.agreement,
        interval=search.interval(plan),
        default=search.interval(start),
        images=len(truth["images"]),
        steps=steps,
    )


class _Search:
    """The coordinate search over one evidence, with one set of draws."""

    def __init__(
        self,
        evidence: Evidence,
        truth: Truth,
        groups: Mapping[int, Hashable] | None,
        seed: int,
    ) -> None:
        """Draw the images of all intervals."""
        self._evidence = evidence
        ids = [image["id"] for image in truth["images"]]
        self._draws = draw_images(ids, samples=DRAWS, seed=seed, groups=groups)

    def run(self, plan: Plan, names: Sequence[str]) -> tuple[Plan, list[str]]:
        """Return the best plan that was reached, and the steps to it."""
        steps: list[str] = []
        for _ in range(ROUNDS):
            before = plan
            for kind in KINDS:
                found = self._best(plan, list(kind(plan, names)))
                if found is not None:
                    text, plan, gain = found
                    steps.append(f"{text} {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")
            if plan == before:
                break
        return plan, steps

    def interval(self, plan: Plan) -> Interval:
        """Return the AP50 of a plan."""
        matches = self._evidence.match(plan)
        return bootstrap_interval(lambda weights: ap50(matches, weights), self._draws)

    def _best(self, plan: Plan, changes: Sequence[Change]) -> tuple[str, Plan, Interval] | None:
        """Return the best of some changes with its gain, None if it does not pass the guard."""
        now = self._evidence.match(plan)
        best, best_ap50 = None, ap50(now) + MARGIN
        for text, changed in changes:
            value = ap50(self._evidence.match(changed))
            if value > best_ap50 or (best is None and value == best_ap50):
                best, best_ap50 = (text, changed), value
        if best is None:
            return None
        gain = self._gain(now, self._evidence.match(best[1]))
        return (*best, gain) if gain.low > 0 else None

    def _gain(self, now: Matches, then: Matches) -> Interval:
        """Return by how much the AP50 grows, on the same draws."""
        return bootstrap_interval(
            lambda weights: ap50(then, weights) - ap50(now, weights), self._draws
        )


def _without_one(plan: Plan, names: Sequence[str]) -> Iterator[Change]:
    """Yield the plan without each of its members, unless it is the last one."""
    if np.count_nonzero(plan.weights) > 1:
        for k, name in enumerate(names):
            if plan.weights[k] > 0:
                yield f"without {name}", _with_weight(plan, k, 0.0)


def _other_rules(plan: Plan, names: Sequence[str]) -> Iterator[Change]:
    """Yield the plan with each other rule."""
    for rule in RULES:
        if rule != plan.agreement:
            yield f"agreement {rule}", replace(plan, agreement=rule)


def _other_thresholds(plan: Plan, names: Sequence[str]) -> Iterator[Change]:
    """Yield the plan with each other threshold."""
    for iou in THRESHOLDS:
        if iou != plan.iou_threshold:
            yield f"IoU threshold {iou:g}", replace(plan, iou_threshold=iou)


def _other_weights(plan: Plan, names: Sequence[str]) -> Iterator[Change]:
    """Yield the plan with each other weight of each of its members; one alone needs none."""
    if np.count_nonzero(plan.weights) > 1:
        for weight in WEIGHTS:
            for k, name in enumerate(names):
                if plan.weights[k] not in (0.0, weight):
                    yield f"weight {weight:g} for {name}", _with_weight(plan, k, weight)


def _with_weight(plan: Plan, member: int, weight: float) -> Plan:
    """Return the plan with another weight of one member."""
    weights = list(plan.weights)
    weights[member] = weight
    return replace(plan, weights=tuple(weights))


KINDS: tuple[Kind, ...] = (_without_one, _other_rules, _other_thresholds, _other_weights)
