"""The generated set: JPEG files in two forms, the same each time, easy to learn."""

import errno
import io
import sys

import numpy as np
import pytest
from PIL import Image

from woodfisher_jax import data
from woodfisher_jax.data import generated
from woodfisher_jax.data.image_folder import find_images
from woodfisher_jax.written_files import WriteError

SHAPE = generated.Shape(classes=4, per_class=3, test_per_class=2, side=32)


def test_a_folder_has_what_was_asked_for(tmp_path):
    generated.write_folder(tmp_path, SHAPE)
    train, test = find_images("generated", tmp_path)
    assert train.classes == ("n00000000", "n00000001", "n00000002", "n00000003")
    assert np.bincount(train.labels).tolist() == [3] * 4
    assert np.bincount(test.labels).tolist() == [2] * 4
    contents = {split.read(i)[0] for split in (train, test) for i in range(split.size)}
    assert len(contents) == 20
    for content in contents:
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "JPEG"
            assert image.mode == "RGB"
            assert all(24 <= side <= 40 for side in image.size)


def test_both_forms_hold_the_same_files(tmp_path, capfd):
    generated.write_folder(tmp_path / "folder", SHAPE, seed=5)
    generated.write_records(tmp_path, SHAPE, seed=5)
    assert capfd.readouterr().out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "imagenet2012"}
    folder = data.load("image_folder", data_dir=str(tmp_path / "folder"))
    records = data.load("imagenet", data_dir=str(tmp_path))
    for split in ("train", "test"):
        one, other = (getattr(dataset, split).source for dataset in (folder, records))
        assert {one.read(i) for i in range(one.size)} == {
            other.read(i) for i in range(other.size)
        }
    assert "tensorflow" not in sys.modules


def test_the_seed_and_nothing_else_decides(tmp_path):
    trees = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        generated.write_folder(tmp_path / place, SHAPE, seed)
        files = sorted((tmp_path / place).rglob("*.JPEG"))
        trees.append([file.read_bytes() for file in files])
    assert trees[0] == trees[1]
    assert trees[0] != trees[2]


def test_colours_tell_classes_apart():
    """The nearest mean colour, after brightness is divided out, is the class's own."""

    def colours(first, count):
        rng = np.random.default_rng(first)
        means = [
            [generated.draw(label, SHAPE, rng).mean(axis=(0, 1)) for _ in range(count)]
            for label in range(SHAPE.classes)
        ]
        return np.array(means) / np.linalg.norm(means, axis=-1, keepdims=True)

    centres = colours(0, 8).mean(axis=1)
    distances = np.linalg.norm(colours(1, 8)[:, :, None] - centres, axis=-1)
    expected = np.tile(np.arange(SHAPE.classes)[:, None], (1, 8))
    np.testing.assert_array_equal(distances.argmin(axis=-1), expected)


@pytest.mark.parametrize(
    ("form", "write"),
    [("images", generated.write_folder), ("records", generated.write_records)],
)
def test_it_is_written_once(form, write, tmp_path, monkeypatch):
    calls = []

    def note(root):
        calls.append(root)
        write(root, SHAPE)

    monkeypatch.setitem(generated.FORMS, form, note)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = data.ImageOptions(image_size=16, resize=20)
    for data_dir, parent in (
        (str(tmp_path / "own"), tmp_path / "own"),
        (None, tmp_path / "cache" / "woodfisher_jax"),
    ):
        calls.clear()
        for _ in range(2):
            dataset = data.load(f"generated_{form}", data_dir=data_dir, options=options)
            assert (dataset.train.size, dataset.test.size) == (12, 8)
            assert dataset.num_classes == 4
            assert dataset.image_shape == (16, 16, 3)
        assert len(calls) == 1
        assert len(list(parent.iterdir())) == 1  # no scratch folder stays


def test_two_processes_at_once_leave_one_complete_copy(tmp_path, monkeypatch):
    def write(root):
        generated.write_folder(root, SHAPE)
        # Meanwhile, another process has finished.
        generated.write_folder(tmp_path / "generated_images-1", SHAPE)

    monkeypatch.setitem(generated.FORMS, "images", write)
    root = generated.write_once("images", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [root.name]
    assert find_images("generated", root)[0].size == 12


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def write(root):
        raise PermissionError(errno.EACCES, "Permission denied", str(root))

    monkeypatch.setitem(generated.FORMS, "images", write)
    message = f"data_dir={tmp_path}: .*Permission denied.; expected a folder that can"
    with pytest.raises(WriteError, match=message):
        generated.write_once("images", str(tmp_path))
    assert not list(tmp_path.iterdir())
