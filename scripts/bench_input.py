"""Images a second of the input pipeline, and how long training waits for it.

    python scripts/bench_input.py

Draws JPEG files of 500 x 375 pixels with the spectrum of photographs and times training
batches of 224 x 224 crops: made by a plain loop of Pillow in one thread, and by the
pipeline in threads and in 1 and 2 processes. The files lie in the system's cache. The
first batches, before which processes start, are not timed. Besides images a second it
prints milliseconds of a core an image, which do not depend on what else is running.

The second table is of steps that leave the cores alone, as an accelerator's do, and
take 0.5, 1, 1.5 and 3 times as long as a batch takes to make; it says what share of the
time the loop waited for data.
"""

import argparse
import io
import itertools
import os
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import psutil

from woodfisher_jax import data
from woodfisher_jax.data.image_folder import find_images

WIDTH, HEIGHT, SIZE, BATCH = 500, 375, 224, 64
CLASSES, PER_CLASS = 4, 100
LINKS = 50  # names of each training file, for epochs longer than a measurement
WARM_UP = 4  # batches: more than are made ahead


def write_photographs(root: Path) -> int:
    """Writes JPEG files with the spectrum of photographs; returns their mean bytes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    down, across = np.meshgrid(
        np.fft.fftfreq(HEIGHT), np.fft.rfftfreq(WIDTH), indexing="ij"
    )
    # Amplitudes of photographs fall with 1 / frequency.
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / WIDTH)
    sizes = []
    for split, count in (("train", PER_CLASS), ("val", 1)):
        for label, number in itertools.product(range(CLASSES), range(count)):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            phases = rng.uniform(0, 2 * np.pi, (3, *amplitude.shape))
            waves = np.fft.irfft2(amplitude * np.exp(1j * phases), (HEIGHT, WIDTH))
            waves = waves / waves.std() * 50 + 128 + rng.normal(0, 4, waves.shape)
            pixels = np.clip(waves, 0, 255).astype(np.uint8).transpose(1, 2, 0)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
            path = folder / f"{number}.JPEG"
            path.write_bytes(file.getvalue())
            sizes.append(len(file.getvalue()))
            for copy in range(LINKS if split == "train" else 0):
                os.link(path, folder / f"{number}-{copy}.JPEG")
    return round(sum(sizes) / len(sizes))


def plain_loop(root: Path, batch_size: int) -> Generator[np.ndarray, None, None]:
    """The same work by Pillow alone: crop, flip, scale, normalise, stack."""
    from PIL import Image

    rng = np.random.default_rng(0)
    train = find_images("photographs", root)[0]
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    while True:
        images = []
        for index in rng.integers(train.size, size=batch_size):
            with Image.open(io.BytesIO(train.read(index)[0])) as image:
                share, ratio = rng.uniform(0.08, 1), np.exp(rng.uniform(-0.28, 0.28))
                area = share * WIDTH * HEIGHT
                wide = min(WIDTH, round((area * ratio) ** 0.5))
                high = min(HEIGHT, round((area / ratio) ** 0.5))
                left = rng.integers(WIDTH - wide + 1)
                top = rng.integers(HEIGHT - high + 1)
                crop = image.convert("RGB").crop((left, top, left + wide, top + high))
                crop = crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
                if rng.random() < 0.5:
                    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                images.append(np.asarray(crop, np.float32) / 255)
        yield (np.stack(images) - mean) / std


def pipeline(
    dataset: data.DataSet, batch_size: int
) -> Generator[np.ndarray, None, None]:
    """Training batches of an epoch."""
    steps = data.steps_per_epoch(dataset, batch_size)
    for batch in data.epoch_batches(
        dataset, seed=0, epoch=0, start=0, stop=steps, batch_size=batch_size
    ):
        yield batch["image"]


def core_seconds() -> float:
    """Time that this process and its children have spent on cores."""
    process = psutil.Process()
    each = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(times.user + times.system for times in each)


def rate(batches: Iterator[np.ndarray], seconds: float) -> tuple[float, float]:
    """Images a second, and seconds of a core an image, after a warm-up."""
    for _ in range(WARM_UP):
        next(batches)
    count, start, used = 0, time.perf_counter(), core_seconds()
    while time.perf_counter() - start < seconds:
        count += len(next(batches))
    spent = core_seconds() - used
    return count / (time.perf_counter() - start), spent / count


def waiting(
    batches: Iterator[np.ndarray], step_seconds: float, steps: int
) -> tuple[float, float]:
    """Seconds a step that a loop waits for data, and that its steps take."""
    waited = worked = 0.0
    for step in range(-WARM_UP, steps):
        start = time.perf_counter()
        next(batches)
        ready = time.perf_counter()
        time.sleep(step_seconds)
        if step >= 0:
            waited += ready - start
            worked += time.perf_counter() - ready
    return waited / steps, worked / steps


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description="Times the input pipeline.")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of a row (default 15)"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2"
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_photographs(Path(folder))
        sets = {
            workers: data.load(
                "image_folder",
                data_dir=folder,
                options=data.ImageOptions(image_size=SIZE, workers=workers),
            )
            for workers in flags.workers
        }
        print(
            f"JPEG files of {WIDTH} x {HEIGHT}, {size:,} bytes; {os.cpu_count()} cores"
        )
        print(f"\n{'':24}{'images/s':>10}{'core ms an image':>20}")
        rows = {"plain loop of Pillow": plain_loop(Path(folder), BATCH)}
        for workers, dataset in sets.items():
            rows[f"workers={workers}"] = pipeline(dataset, BATCH)
        rates = {}
        for name, batches in rows.items():
            rates[name], cost = rate(batches, flags.seconds)
            batches.close()
            print(f"{name:24}{rates[name]:10.0f}{1e3 * cost:20.2f}", flush=True)

        workers, dataset = next(iter(sets.items()))
        own = BATCH / rates[f"workers={workers}"]
        print(f"\nworkers={workers}, {BATCH} images a step: {1e3 * own:.0f} ms to make")
        print(f"{'step ms':>10}{'waited ms':>12}{'waited %':>10}")
        for factor in (0.5, 1.0, 1.5, 3.0):
            batches = pipeline(dataset, BATCH)
            steps = max(10, round(flags.seconds / (own * max(1, factor))))
            waited, worked = waiting(batches, factor * own, steps)
            batches.close()
            share = 100 * waited / (waited + worked)
            print(f"{1e3 * worked:10.0f}{1e3 * waited:12.1f}{share:10.1f}", flush=True)


if __name__ == "__main__":
    main()
