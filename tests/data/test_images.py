"""Decoding and cropping, beside plain slices of pixels and beside torchvision."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from woodfisher_jax.data import images


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(height, width):
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


def slopes(height, width):
    """An image whose colour tells the place: red from left to right, green down."""
    down, across = np.mgrid[:height, :width]
    red, green = 255 * across / width, 255 * down / height
    return np.stack([red, green, 0 * red], -1).round().astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (31, 20), (20, 20)])
def test_the_middle_is_cut_out_of_an_image_of_the_right_size(height, width):
    pixels = noise(height, width)
    crop = images.central_crop(encoded(Image.fromarray(pixels)), 16, short_side=20)
    top, left = round((height - 16) / 2), round((width - 16) / 2)
    np.testing.assert_array_equal(crop, pixels[top : top + 16, left : left + 16])


@pytest.mark.parametrize("size", [(37, 53), (64, 41), (20, 90)])
def test_the_middle_is_the_one_of_torchvision(size):
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(noise(*size))
    both = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28)])
    ours = images.central_crop(encoded(image), 28, short_side=32)
    np.testing.assert_array_equal(ours, both(image))


@given(width=st.integers(1, 600), height=st.integers(1, 600), seed=st.integers(0, 1000))
def test_a_random_window_is_inside_and_of_the_promised_form(width, height, seed):
    rng = np.random.default_rng(seed)
    left, top, right, bottom = images.random_window((width, height), rng)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 100:  # else rounding to whole pixels is much of it
        wide, high = right - left, bottom - top
        assert 0.72 < wide / high < 1.39
        largest = max(0.08, min(width / height, height / width))
        assert 0.07 < wide * high / (width * height) <= 1.0
        assert wide * high / (width * height) < 1.4 * largest


def test_random_windows_are_of_all_sizes_and_places():
    rng = np.random.default_rng(0)
    boxes = np.array([images.random_window((400, 400), rng) for _ in range(500)])
    shares = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) / 400**2
    # Uniform from 0.08 to 1, less windows too wide or too high to fit.
    assert shares.min() < 0.1
    assert shares.max() > 0.9
    assert 0.4 < shares.mean() < 0.54
    assert boxes[:, :2].min() == 0
    assert boxes[:, 2:].max() == 400
    ratios = np.log((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1]))
    assert abs(ratios.mean()) < 0.03
    assert ratios.min() < -0.25
    assert ratios.max() > 0.25


@pytest.mark.parametrize(
    ("size", "window"), [((900, 30), (430, 0, 470, 30)), ((30, 900), (0, 430, 30, 470))]
)
def test_a_window_that_never_fits_is_the_largest_in_the_middle(size, window):
    rng = np.random.default_rng(0)
    assert images.random_window(size, rng) == window


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_training_crop_is_the_window_scaled(form):
    """Pixels tell where they were, also where a JPEG is decoded at part of its size."""
    content = encoded(Image.fromarray(slopes(480, 640)), form)
    mirrored = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        crop = np.asarray(images.training_crop(content, 32, rng), float)
        rng = np.random.default_rng(seed)
        left, top, right, bottom = images.random_window((640, 480), rng)
        flipped = rng.random() < 0.5
        mirrored.add(flipped)
        crop = crop[:, ::-1] if flipped else crop
        centres = (np.arange(32) + 0.5) / 32
        red = 255 * (left + (right - left) * centres) / 640
        green = 255 * (top + (bottom - top) * centres) / 480
        np.testing.assert_allclose(crop[:, :, 0], np.tile(red, (32, 1)), atol=6)
        np.testing.assert_allclose(crop[:, :, 1], np.tile(green, (32, 1)).T, atol=6)
    assert mirrored == {True, False}


COLOUR = (200, 100, 50)
GREY = 123


def palette(transparency=None):
    image = Image.new("P", (40, 30), 1)
    image.putpalette([0, 0, 0, *COLOUR])
    image.info["transparency"] = transparency
    return image


FORMS = {
    "grey": (Image.new("L", (40, 30), GREY), "JPEG", (GREY,) * 3),
    "grey and alpha": (Image.new("LA", (40, 30), (GREY, 9)), "PNG", (GREY,) * 3),
    "grey of 16 bits": (Image.new("I;16", (40, 30), GREY * 256), "PNG", (GREY,) * 3),
    "black and white": (Image.new("1", (40, 30), 1), "PNG", (255,) * 3),
    "alpha": (Image.new("RGBA", (40, 30), (*COLOUR, 9)), "PNG", COLOUR),
    "CMYK": (Image.new("RGB", (40, 30), COLOUR).convert("CMYK"), "JPEG", COLOUR),
    "palette": (palette(), "PNG", COLOUR),
    "palette and alpha": (palette(bytes([0, 9])), "PNG", COLOUR),
}


@pytest.mark.parametrize("name", FORMS)
def test_images_of_every_mode_become_three_channels(name):
    image, form, colour = FORMS[name]
    content = encoded(image, form)
    with Image.open(io.BytesIO(content)) as found:
        assert found.mode == image.mode  # else the file does not test what it says
    for crop in (
        images.central_crop(content, 16, short_side=20),
        images.training_crop(content, 16, np.random.default_rng(0)),
    ):
        pixels = np.asarray(crop)
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels.reshape(-1, 3), [colour] * 256, atol=3)


def test_a_file_cut_short_is_an_error():
    content = encoded(Image.fromarray(noise(60, 60)), "JPEG")
    for bad in (b"", b"no image", content[: len(content) // 2]):
        with pytest.raises(OSError, match=r"identify|truncated"):
            images.central_crop(bad, 16, short_side=20)
        with pytest.raises(OSError, match=r"identify|truncated"):
            images.training_crop(bad, 16, np.random.default_rng(0))
