"""Groups of similar images, so that a split keeps apart what is alike; and a report of leaks.

Images of one slide share stain, scanner and often tissue: a model that has seen one of them knows
the others better than it will know a new slide. No file says which images these are, so they are
looked for. Only pixels are looked at: no annotation, no name, no place in a folder.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.cluster.hierarchy import linkage, to_tree
from scipy.spatial.distance import pdist, squareform
from tqdm.auto import tqdm

from cellseg import markdown
from cellseg.data.dataset import CellDataset, SampleImages
from cellseg.data.descriptors import ImageDescriptor, describe_image
from cellseg.data.links import BORDER, SAME, SHARED, find_links
from cellseg.errors import SettingsError

MAX_SHARE = 0.15
"""Largest share of all images in one group."""
ALIKE = 0.55
"""Mean distance up to which groups are joined. Two quarters of one image are at 1, two images of
one and the same tissue at half of it, since the mean of four quarters scatters half as much; a
tenth is added for chance."""
LINKED = 0.01
"""What remains of the distance of two images that are known to lie in one place."""
STIFFNESS = 0.05  # of the scatter within images: share of its mean added in every direction
LOOKS = "colour and texture"

Links = Mapping[tuple[int, int], str]


@dataclass(frozen=True)
class Nearest:
    """A validation image and the training image that is most like it.

    Attributes:
        val_id: the validation image.
        train_id: its nearest training image.
        distance: 0 for the same pixels; 1 is as far as two quarters of one image are on average.
            It is divided by a hundred where the two are known to lie in one place.
        cue: what they have in common: "the same pixels", "shared tissue", "a shared border", or
            no more than "colour and texture".
    """

    val_id: str
    train_id: str
    distance: float
    cue: str


def group_by_similarity(
    dataset: CellDataset,
    *,
    max_share: float = MAX_SHARE,
    progress: bool = False,
) -> dict[str, int]:
    """Return a group for each image: those of one slide, as far as pixels tell, fall together.

    Images that share a border, tissue or all their pixels come first (see `find_links`), then
    those that differ in colour and texture no more than images of one tissue do. Groups are
    joined by the mean distance of their images. A group that would hold more than `max_share` of
    all images is divided where it was joined last, again and again; only copies of one image
    stay together however many there are. The same images always give the same groups.

    Args:
        dataset: its images are read, its annotations are not.
        max_share: largest share of all images in one group, over 0, at most 1.
        progress: show a bar.

    Returns:
        sample_id -> number of its group, from 1, in the order of the sample ids.

    Raises:
        SettingsError: if `max_share` is not in its range.
        DataError: if an image cannot be read; names it.
    """
    if not 0 < max_share <= 1:
        raise SettingsError(f"max_share is {max_share}; it must lie over 0 and at most at 1")
    descriptors = _describe_all(dataset, progress)
    distances = group_distances(descriptors, find_links(descriptors))
    numbers: dict[str, int] = {}
    for number, members in enumerate(_cut(distances, int(max_share * len(descriptors))), start=1):
        numbers |= dict.fromkeys((dataset.sample_ids[index] for index in members), number)
    return dict(sorted(numbers.items()))


def nearest_training_images(
    dataset: CellDataset,
    train_ids: Iterable[str],
    val_ids: Iterable[str],
    *,
    progress: bool = False,
) -> list[Nearest]:
    """Return for each validation image the training image most like it, the closest pair first.

    Args:
        dataset: holds the images of both sides.
        train_ids: samples trained on.
        val_ids: samples validated on.
        progress: show a bar.

    Raises:
        SettingsError: if a side is empty, or a sample is unknown or on both sides.
        DataError: if an image cannot be read; names it.
    """
    train_ids, val_ids = set(train_ids), set(val_ids)
    if not train_ids or not val_ids or train_ids & val_ids:
        raise SettingsError(
            f"{len(train_ids)} training and {len(val_ids)} validation samples, "
            f"{len(train_ids & val_ids)} of them both; give two sides that have nothing in common"
        )
    both = dataset.subset([*train_ids, *val_ids])
    descriptors = _describe_all(both, progress)
    links = find_links(descriptors)
    distances = _brought_closer(appearance_distances(descriptors), links)
    is_train = np.array([name in train_ids for name in both.sample_ids])
    distances[:, ~is_train] = np.inf
    found = []
    for index in np.flatnonzero(~is_train):
        nearest = int(distances[index].argmin())
        cue = links.get((min(index, nearest), max(index, nearest)), LOOKS)
        names = both.sample_ids[index], both.sample_ids[nearest]
        found.append(Nearest(*names, float(distances[index, nearest]), cue))
    return sorted(found, key=lambda pair: (pair.distance, pair.val_id))


def leaks_table(nearest: Sequence[Nearest], *, rows: int = 10) -> str:
    """Return a leak report as Markdown: how many images share what, and the closest pairs.

    Args:
        nearest: from `nearest_training_images`.
        rows: list no more pairs than this.
    """
    counts = {
        cue: sum(pair.cue == cue for pair in nearest) for cue in (SAME, SHARED, BORDER, LOOKS)
    }
    told = ", ".join(f"{count} {cue}" for cue, count in counts.items() if count)
    closest = markdown.table(
        ("validation", "nearest in training", "distance", "in common"),
        [
            (markdown.escape(p.val_id), markdown.escape(p.train_id), f"{p.distance:.3f}", p.cue)
            for p in nearest[:rows]
        ],
    )
    return (
        f"{len(nearest)} validation images have in common with their nearest training image: "
        f"{told or 'nothing'}.\n\n{closest}\n"
    )


def _describe_all(dataset: CellDataset, progress: bool) -> list[ImageDescriptor]:
    """Return what every image of a dataset looks like."""
    images = SampleImages(dataset)
    indices = tqdm(
        range(len(images)), desc="describe", unit="image", disable=not progress, leave=False
    )
    return [describe_image(images[index][0]) for index in indices]


def appearance_distances(descriptors: Sequence[ImageDescriptor]) -> np.ndarray:
    """Return float64 [N, N]: how differently images are coloured and textured.

    A descriptor counts by what it varies between images against what it varies within one, since
    the quarters of an image are surely of one slide: the distance is that of Mahalanobis in their
    scatter, as for speakers in "Within-class covariance normalization for SVM-based speaker
    recognition" (Hatch, Kajarekar and Stolcke, 2006), the quarters in the place of known classes.
    """
    means = np.array([one.parts.mean(axis=0) for one in descriptors])
    scale = means.std(axis=0) + 1e-9
    inside = np.concatenate([(one.parts - one.parts.mean(axis=0)) / scale for one in descriptors])
    freedom = len(inside) - len(descriptors)
    size = means.shape[1]
    scatter = inside.T @ inside / freedom if inside.any() else np.eye(size)
    scatter += STIFFNESS * np.trace(scatter) / size * np.eye(size)
    values, vectors = np.linalg.eigh(scatter)
    turned = (means - means.mean(axis=0)) / scale @ vectors / np.sqrt(values)
    return squareform(pdist(turned)) / np.sqrt(2 * size)


def group_distances(descriptors: Sequence[ImageDescriptor], links: Links) -> np.ndarray:
    """Return the distances by which images are grouped: in one place, all are close to all."""
    pairs = np.array(list(links), dtype=int).reshape(-1, 2)
    shape = (len(descriptors), len(descriptors))
    graph = sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=shape)
    place = sparse.csgraph.connected_components(graph, directed=False)[1]
    rows, columns = np.nonzero(np.triu(place[:, None] == place, 1))
    together = dict.fromkeys(zip(rows.tolist(), columns.tolist(), strict=True), LOOKS)
    return _brought_closer(appearance_distances(descriptors), together | links)


def _brought_closer(distances: np.ndarray, links: Links) -> np.ndarray:
    """Return distances in which linked pairs are close, and copies of one image at 0."""
    changed = distances.copy()
    for (i, j), cue in links.items():
        changed[i, j] = changed[j, i] = 0.0 if cue == SAME else LINKED * distances[i, j]
    return changed


def _cut(distances: np.ndarray, limit: int) -> list[list[int]]:
    """Return groups of indices by average linkage, none of more than `limit` but for copies."""
    if len(distances) == 1:
        return [[0]]
    groups, waiting = [], [to_tree(linkage(squareform(distances, checks=False), "average"))]
    while waiting:
        node = waiting.pop()
        small = node.dist <= ALIKE and node.count <= limit
        if node.is_leaf() or node.dist == 0 or small:
            groups.append(sorted(node.pre_order()))
        else:
            waiting += [node.left, node.right]
    return sorted(groups)
