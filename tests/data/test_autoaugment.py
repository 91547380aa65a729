"""The operations beside formulas on pixels, the policy beside torchvision's."""

import numpy as np
import pytest
from PIL import Image

from woodfisher_jax.data.autoaugment import OPERATIONS, POLICY, autoaugment

PIXELS = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def changed(name, level, sign=1, image=IMAGE):
    return np.asarray(OPERATIONS[name](image, level / 9, sign)).astype(int)


@pytest.mark.parametrize(
    ("level", "bits"), [(0, 8), (5, 6), (6, 5), (7, 5), (8, 4), (9, 4)]
)
def test_posterize_keeps_leading_bits(level, bits):
    step = 2 ** (8 - bits)
    np.testing.assert_array_equal(
        changed("posterize", level), PIXELS.astype(int) // step * step
    )


@pytest.mark.parametrize("level", [0, 3, 4, 5, 7, 8])
def test_solarize_inverts_above_its_threshold(level):
    threshold = 255 - 255 * level / 9
    pixels = PIXELS.astype(int)
    expected = np.where(pixels < threshold, pixels, 255 - pixels)
    np.testing.assert_array_equal(changed("solarize", level), expected)


def test_invert():
    np.testing.assert_array_equal(changed("invert", 0), 255 - PIXELS.astype(int))


def test_autocontrast_stretches_each_channel():
    found = changed("autocontrast", 0, image=Image.fromarray(PIXELS // 4 + 50))
    assert found.min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert found.max(axis=(0, 1)).min() >= 254  # Pillow rounds down


def test_equalize_flattens_the_histogram():
    dark = (np.linspace(0, 1, 4096) ** 3 * 255).astype(np.uint8).reshape(64, 64)
    found = changed("equalize", 0, image=Image.fromarray(np.stack([dark] * 3, -1)))
    quarters = np.histogram(found, bins=4, range=(0, 256))[0] / found.size
    np.testing.assert_allclose(quarters, 0.25, atol=0.03)


@pytest.mark.parametrize("sign", [-1, 1])
def test_contrast_scales_the_distance_from_the_mean_grey(sign):
    small = Image.fromarray(PIXELS // 4 + 96)  # so that nothing is clipped
    mean = round(np.asarray(small.convert("L")).mean())
    expected = mean + (1 + sign * 0.9 * 3 / 9) * (np.asarray(small, float) - mean)
    found = changed("contrast", 3, sign, image=small)
    np.testing.assert_allclose(found, expected, atol=1)


@pytest.mark.parametrize(
    "name", ["color", "contrast", "sharpness", "rotate", "shear_x"]
)
def test_level_zero_changes_nothing(name):
    np.testing.assert_array_equal(changed(name, 0), PIXELS)


def test_color_towards_grey():
    found = changed("color", 9, -1)
    assert (found.max(axis=-1) - found.min(axis=-1)).max() <= 26  # a tenth is left


def dot(row, column):
    pixels = np.zeros((41, 41, 3), np.uint8)
    pixels[row - 1 : row + 2, column - 1 : column + 2] = 255
    return Image.fromarray(pixels)


def middle(pixels):
    weight = pixels[:, :, 0] / pixels[:, :, 0].sum()
    down, across = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return (weight * down).sum(), (weight * across).sum()


@pytest.mark.parametrize("sign", [-1, 1])
def test_rotate_turns_up_to_30_degrees(sign):
    down, across = middle(changed("rotate", 9, sign, image=dot(20, 35)))
    np.testing.assert_allclose(across, 20 + 15 * np.cos(np.pi / 6), atol=0.7)
    np.testing.assert_allclose(down, 20 - sign * 15 * np.sin(np.pi / 6), atol=0.7)


@pytest.mark.parametrize("sign", [-1, 1])
def test_shear_moves_rows_by_up_to_a_third_of_their_place(sign):
    down, across = middle(changed("shear_x", 9, sign, image=dot(30, 20)))
    np.testing.assert_allclose(across, 20 - sign * 0.3 * 30, atol=0.7)
    assert down == pytest.approx(30, abs=0.1)


def test_the_policy_is_the_one_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms")
    theirs = transforms.AutoAugment()._get_policies(
        transforms.AutoAugmentPolicy.IMAGENET
    )
    names = {"ShearX": "shear_x"}
    assert [
        [(names.get(n, n.lower()), p, level or 0) for n, p, level in pair]
        for pair in theirs
    ] == [[tuple(change) for change in pair] for pair in POLICY]


def test_the_policy_has_25_pairs_of_known_operations():
    assert len(POLICY) == 25
    assert {c.operation for pair in POLICY for c in pair} == set(OPERATIONS)


def test_the_same_numbers_give_the_same_image():
    found = [
        np.asarray(autoaugment(IMAGE, np.random.default_rng(seed)))
        for seed in range(40)
    ]
    assert {image.shape for image in found} == {(16, 16, 3)}
    again = np.asarray(autoaugment(IMAGE, np.random.default_rng(7)))
    np.testing.assert_array_equal(found[7], again)
    assert len({image.tobytes() for image in found}) > 15


def test_probabilities_are_kept():
    """A mark in place of an image counts which operations it went through."""
    counts = dict.fromkeys(OPERATIONS, 0)
    rng = np.random.default_rng(0)

    def mark(name):
        def note(image, strength, sign):
            counts[name] += 1
            return image

        return note

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setitem(OPERATIONS, name, mark(name))
        for _ in range(5000):
            autoaugment(IMAGE, rng)
    expected = dict.fromkeys(OPERATIONS, 0.0)
    for pair in POLICY:
        for change in pair:
            expected[change.operation] += 5000 * change.probability / len(POLICY)
    for name, count in counts.items():
        assert abs(count - expected[name]) < 5 * np.sqrt(expected[name]), name
