"""Preparing data sets from files as the original sites have them, without network."""

import gzip
import io
import ssl
import sys
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds

from woodfisher_jax import data
from woodfisher_jax.data import DataMissingError, prepare


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder whose files take the place of the downloads."""
    folder = tmp_path / "site"
    folder.mkdir()

    def download(self, addresses):
        return {name: folder / name for name in addresses}

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(prepare, "_check_reachable", lambda name, address: None)
    return folder


def write_idx(site, prefix, images, labels):
    with gzip.open(site / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes(16) + images.tobytes())
    with gzip.open(site / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(bytes(8) + labels.tobytes())


def examples(seed, count, shape):
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(count, *shape), dtype=np.uint8)
    return images, np.arange(count, dtype=np.uint8)


def check(split, images, labels):
    """The split holds these examples; their labels tell which is which."""
    assert sorted(split.labels.tolist()) == labels.tolist()
    np.testing.assert_array_equal(split.images, images[split.labels])


def test_mnist(site, tmp_path):
    train, test = examples(0, 10, (28, 28, 1)), examples(1, 4, (28, 28, 1))
    write_idx(site, "train", *train)
    write_idx(site, "t10k", *test)
    prepare.prepare("mnist", str(tmp_path))
    ours = data.load("mnist", data_dir=str(tmp_path))
    check(ours.train, *train)
    check(ours.test, *test)
    assert "tensorflow" not in sys.modules


def test_cifar10(site, tmp_path, capsys):
    train, test = examples(0, 10, (32, 32, 3)), examples(1, 4, (32, 32, 3))
    files = {f"data_batch_{k + 1}": slice(2 * k, 2 * k + 2) for k in range(5)}
    with tarfile.open(site / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, (images, labels), part in [
            *((name, train, part) for name, part in files.items()),
            ("test_batch", test, slice(None)),
        ]:
            planes = images[part].transpose(0, 3, 1, 2).reshape(-1, 3072)
            content = np.hstack([labels[part, None], planes]).tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    prepare.main(["cifar10", f"--data_dir={tmp_path}"])
    assert "cifar10 is ready in" in capsys.readouterr().out
    ours = data.load("cifar10", data_dir=str(tmp_path))
    check(ours.train, *train)
    check(ours.test, *test)
    theirs = tfds.data_source("cifar10", split="train", data_dir=tmp_path)
    assert theirs[0]["id"] == f"train_{theirs[0]['label']:05d}".encode()


def test_cifar100_has_the_fine_labels(site, tmp_path):
    train, test = examples(0, 10, (32, 32, 3)), examples(1, 4, (32, 32, 3))
    with tarfile.open(site / "cifar-100-binary.tar.gz", "w:gz") as archive:
        for name, (images, labels) in {"train": train, "test": test}.items():
            planes = images.transpose(0, 3, 1, 2).reshape(-1, 3072)
            coarse = 19 - labels[:, None]
            content = np.hstack([coarse, labels[:, None], planes]).tobytes()
            member = tarfile.TarInfo(f"cifar-100-binary/{name}.bin")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    prepare.prepare("cifar100", str(tmp_path))
    ours = data.load("cifar100", data_dir=str(tmp_path))
    assert ours.num_classes == 100
    check(ours.train, *train)
    check(ours.test, *test)
    theirs = tfds.data_source("cifar100", split="train", data_dir=tmp_path)
    assert theirs[0]["coarse_label"] == 19 - theirs[0]["label"]


def test_what_is_prepared_is_left_alone(tfds_dir):
    folder = prepare.prepare("mnist", str(tfds_dir))
    assert folder.parent == tfds_dir / "mnist"


def test_an_incomplete_folder_is_not_taken_for_a_finished_one(site, tmp_path):
    builder = tfds.builder("mnist", data_dir=tmp_path, file_format="array_record")
    builder.data_path.mkdir(parents=True)
    with pytest.raises(DataMissingError, match="Delete that folder"):
        prepare.prepare("mnist", str(tmp_path))


def fails_with(monkeypatch, error):
    def fail(request, timeout):
        assert request.get_method() == "HEAD"
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)


def test_no_network_is_reported_in_one_line(monkeypatch, tmp_path, capsys):
    fails_with(monkeypatch, urllib.error.URLError("no route"))
    with pytest.raises(SystemExit) as caught:
        prepare.main(["mnist", f"--data_dir={tmp_path}"])
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert "error: mnist cannot be downloaded: no connection" in said
    assert "(no route)" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "answer",
    [
        urllib.error.HTTPError("address", 403, "no HEAD", None, None),
        urllib.error.URLError(ssl.SSLCertVerificationError("unknown issuer")),
    ],
)
def test_a_site_that_answers_is_left_to_tfds(monkeypatch, answer):
    fails_with(monkeypatch, answer)
    prepare._check_reachable("mnist", "https://example.org/file")
