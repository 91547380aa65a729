"""Crops, mirroring and shifts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from woodfisher_jax.data.augment import PADDING, crop_and_flip, shift


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 4),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)),
)
def test_each_image_is_a_window_of_its_padded_self_or_the_mirror_of_one(
    seed, count, size
):
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 256, size=(count, *size), dtype=np.uint8)
    before = images.copy()
    result = crop_and_flip(rng, images)
    assert result.shape == images.shape
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(images, before)
    height, width, _ = size
    for image, changed in zip(images, result, strict=True):
        padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        windows = (
            padded[top : top + height, left : left + width]
            for top in range(2 * PADDING + 1)
            for left in range(2 * PADDING + 1)
        )
        assert any(
            np.array_equal(changed, window) or np.array_equal(changed, window[:, ::-1])
            for window in windows
        )


def test_every_place_and_both_directions_are_equally_likely():
    # Pixel (row, column) of a 9 x 9 image holds its index, so the pixel at the centre
    # tells the shift, and its right neighbour the direction.
    index = np.arange(81, dtype=np.uint8).reshape(9, 9, 1) + 1
    result = crop_and_flip(np.random.default_rng(0), np.tile(index, (16_200, 1, 1, 1)))
    centre = result[:, 4, 4, 0].astype(int) - 1
    counts = np.bincount(centre, minlength=81)
    assert counts.min() > 140  # 200 are expected, with a standard deviation of 14
    assert counts.max() < 260
    # A shift to an edge leaves black beside the centre; compare two pixels that are
    # in the image for every shift but those.
    inner = (centre % 9 > 0) & (centre % 9 < 8)
    right = result[inner, 4, 5, 0].astype(int) - 1
    mirrored = right < centre[inner]
    assert 0.48 < mirrored.mean() < 0.52


def test_half_of_the_images_take_one_of_nine_places():
    index = np.arange(25, dtype=np.uint8).reshape(5, 5, 1) + 1
    images = np.tile(index, (18_000, 1, 1, 1))
    result = shift(np.random.default_rng(0), images)
    assert result.shape == images.shape
    assert result.dtype == np.uint8
    assert (images == index).all()
    centre = result[:, 2, 2, 0].astype(int) - 1
    down, right = np.divmod(centre, 5)
    counts = np.bincount(3 * (down - 1) + right - 1, minlength=9)
    assert counts.sum() == 18_000
    stays = counts[4]
    assert abs(stays - 10_000) < 300  # with a standard deviation of 67
    assert abs(np.delete(counts, 4) - 1_000).max() < 150  # of 31


def test_what_a_shift_uncovers_is_black():
    images = np.full((200, 4, 6, 2), 7, np.uint8)
    result = shift(np.random.default_rng(1), images)
    assert set(np.unique(result)) == {0, 7}
    assert (result[:, 1:-1, 1:-1] == 7).all()
    black = (result == 0).all(axis=(1, 2, 3))
    assert not black.any()
