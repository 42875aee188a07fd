"""Images that lay beside, or over, each other in one slide: found by their pixels."""

from collections.abc import Sequence

import numpy as np
from scipy import fft

from cellseg.data.descriptors import ImageDescriptor

SAME, SHARED, BORDER = "the same pixels", "shared tissue", "a shared border"
MIN_BORDER = 48
"""Pixels of border that two images must have in common to be compared."""
MIN_AGREEMENT = 6.0
"""Of two borders that go on in each other. Of 20,900 pairs of CoNSeP's images from different tiles
the best reaches 5.7 by chance; of its images that were cut apart nine in ten pass 6."""
MIN_LIKENESS = 0.985  # cosine of two patches around the same spot
MIN_SPOTS = 3  # that two images must have in common


def find_links(descriptors: Sequence[ImageDescriptor]) -> dict[tuple[int, int], str]:
    """Return the pairs (i, j), i < j, of images that come from one place, and how one knows.

    The same pixels, if need be flipped or turned; spots in common, as where one image overlaps
    another or is a recompressed copy of it; or borders that go on in the other image.
    """
    links = {pair: BORDER for pair in _pairs(border_agreement(descriptors) >= MIN_AGREEMENT)}
    links |= {pair: SHARED for pair in _pairs(common_spots(descriptors) >= MIN_SPOTS)}
    digests = np.array([one.digest for one in descriptors])
    links |= {pair: SAME for pair in _pairs(digests[:, None] == digests)}
    return dict(sorted(links.items()))


def _pairs(found: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, for which a matrix is true in either order."""
    rows, columns = np.nonzero(np.triu(found | found.T, 1))
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def common_spots(descriptors: Sequence[ImageDescriptor]) -> np.ndarray:
    """Return int [N, N]: how many spots of image i have their likeness in image j.

    A spot of i counts for the image in which its most similar patch lies, if that is a likeness.
    """
    owners = np.repeat(np.arange(len(descriptors)), [len(one.spots) for one in descriptors])
    spots = np.concatenate([one.spots for one in descriptors])
    found = np.zeros((len(descriptors), len(descriptors)), dtype=np.int64)
    for index, one in enumerate(descriptors):
        if len(one.spots):
            cosines = one.spots @ spots.T
            cosines[:, owners == index] = 0
            best = cosines.argmax(axis=1)
            alike = cosines[np.arange(len(best)), best] >= MIN_LIKENESS
            np.add.at(found[index], owners[best[alike]], 1)
    return found


def border_agreement(descriptors: Sequence[ImageDescriptor]) -> np.ndarray:
    """Return float [N, N]: how well the lower or right border of i goes on in image j.

    The signs of change along a border are compared with those along the other one, at every
    offset that leaves `MIN_BORDER` pixels in common. The agreement of n pixels is the mean product
    of their signs, -1 to 1, times the root of n: what chance gives does not grow with n.
    """
    down = _best_agreement(
        [k.borders["bottom"] for k in descriptors], [k.borders["top"] for k in descriptors]
    )
    across = _best_agreement(
        [k.borders["right"] for k in descriptors], [k.borders["left"] for k in descriptors]
    )
    agreement = np.maximum(down, across)
    np.fill_diagonal(agreement, 0)
    return agreement


def _best_agreement(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """Return float [N, M]: the best agreement of signs [n, 3] with others at any offset."""
    lengths = [np.array([len(signs) for signs in side]) for side in (first, second)]
    size = fft.next_fast_len(int(lengths[0].max() + lengths[1].max()) + 1, real=True)
    spectra = [
        fft.rfft(np.stack([_padded(signs, size) for signs in side]), axis=-1)
        for side in (first, second)
    ]
    lags = np.arange(size)
    lags[lags >= lengths[0].max()] -= size
    best = np.zeros((len(first), len(second)))
    for index, spectrum in enumerate(spectra[0]):
        # The correlation theorem: one product of spectra gives the sums at all offsets.
        sums = fft.irfft((spectrum * spectra[1].conj()).sum(axis=1), size, axis=-1)
        end = np.minimum(lengths[0][index], lengths[1][:, None] + lags)
        common = end - np.maximum(lags, 0)
        agreement = sums / (3 * np.sqrt(np.maximum(common, 1)))
        best[index] = np.where(common >= MIN_BORDER, agreement, 0).max(axis=1)
    return best


def _padded(signs: np.ndarray, size: int) -> np.ndarray:
    """Return signs [n, 3] as float32 [3, size], zeros behind."""
    return np.pad(signs.T.astype(np.float32), ((0, 0), (0, size - len(signs))))
