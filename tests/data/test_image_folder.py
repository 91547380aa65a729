"""Image files in folders of their classes, found and not found."""

import pickle

import numpy as np
import pytest

from woodfisher_jax.data import DataMissingError
from woodfisher_jax.data.image_folder import find_images


@pytest.fixture
def root(tmp_path):
    """Three classes; a file says where it is."""
    names = ["b/2.JPEG", "b/10.jpg", "a/x.png", "a/deeper/y.JPG", "C/z.jpeg"]
    for split in ("train", "val"):
        for name in [*names, "a/notes.txt", "README", "b/.DS_Store"]:
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{split} {name}")
    return tmp_path


def test_labels_are_the_sorted_class_names(root):
    train, test = find_images("mine", root)
    assert train.classes == test.classes == ("C", "a", "b")
    assert train.labels.tolist() == [0, 1, 1, 2, 2]
    assert train.labels.dtype == np.int32
    contents = [train.read(index) for index in range(train.size)]
    assert contents == [
        (b"train C/z.jpeg", 0),
        (b"train a/deeper/y.JPG", 1),
        (b"train a/x.png", 1),
        (b"train b/10.jpg", 2),
        (b"train b/2.JPEG", 2),
    ]
    assert test.read(4) == (b"val b/2.JPEG", 2)
    assert train.place(3) == str(root / "train" / "b" / "10.jpg")


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_evaluation_folder(root, name):
    (root / "val").rename(root / name)
    assert find_images("mine", root)[1].place(0) == str(root / name / "C" / "z.jpeg")


def test_names_of_any_language_survive_the_way_to_another_process(root):
    (root / "train" / "b" / "Löwe été.jpg").write_text("grr")
    train = pickle.loads(pickle.dumps(find_images("mine", root)[0]))
    assert train.read(train.size - 1) == (b"grr", 2)
    assert len(pickle.dumps(train.paths)) < 1000


def failure(root):
    with pytest.raises(DataMissingError) as caught:
        find_images("mine", root)
    text = str(caught.value)
    assert text.startswith(f"mine in {root} cannot be used: ")
    assert "train/<class>/" in text
    assert "--config.data.dir" in text
    return text


def test_nothing_there(tmp_path):
    assert f"there is no folder {tmp_path / 'train'}" in failure(tmp_path)


def test_only_the_training_half(root):
    (root / "val").rename(root / "elsewhere")
    assert f"there is no folder {root / 'val'}" in failure(root)


@pytest.fixture
def unsplit(tmp_path):
    """Three classes of 2, 5 and 11 images, without a folder for evaluation."""
    for name, count in (("a", 2), ("b", 5), ("c", 11)):
        for number in range(count):
            path = tmp_path / name / f"{number}.webp"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    return tmp_path


@pytest.mark.parametrize("folder", ["", "train"])
def test_a_fifth_of_each_class_is_held_out(unsplit, folder, tmp_path):
    if folder:
        (unsplit / folder).mkdir()
        for name in "abc":
            (unsplit / name).rename(unsplit / folder / name)
    train, test = find_images("mine", unsplit, may_split=True)
    assert train.classes == test.classes == ("a", "b", "c")
    assert np.bincount(train.labels).tolist() == [1, 4, 9]
    assert np.bincount(test.labels).tolist() == [1, 1, 2]
    assert train.folder == test.folder == unsplit / folder
    places = {one.place(i) for one in (train, test) for i in range(one.size)}
    assert len(places) == 18
    again = find_images("mine", unsplit, may_split=True)[1]
    assert again.paths.tolist() == test.paths.tolist()
    # Not the first ones, which may be of one day or one camera.
    assert test.paths.tolist() != sorted(train.paths.tolist() + test.paths.tolist())[:4]


def test_no_class_is_split_with_a_single_image(unsplit):
    (unsplit / "a" / "0.webp").unlink()
    with pytest.raises(DataMissingError, match="a single image: a; expected two"):
        find_images("mine", unsplit, may_split=True)


def test_a_folder_that_is_not_there_is_not_split(tmp_path):
    with pytest.raises(DataMissingError, match="there is no folder"):
        find_images("mine", tmp_path / "photos", may_split=True)


def test_images_for_evaluation_are_taken_where_they_are(root):
    train, test = find_images("mine", root, may_split=True)
    assert train.folder != test.folder


def test_a_class_without_images(root):
    (root / "train" / "C" / "z.jpeg").rename(root / "train" / "C" / "z.jpeg.part")
    assert "train has class folders without images: C" in failure(root)


def test_no_classes(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert f"{tmp_path / 'train'} has no class folders" in failure(tmp_path)


def test_a_class_in_one_split_only(root):
    (root / "val" / "a").rename(root / "a")
    text = failure(root)
    assert "train has 3 classes and val 2; in one of them only: a." in text


def test_many_differences_are_shortened(root):
    for number in range(9):
        folder = root / "train" / f"n{number}"
        folder.mkdir()
        (folder / "x.png").touch()
    assert "n0, n1, n2, n3, n4 and 4 more" in failure(root)
