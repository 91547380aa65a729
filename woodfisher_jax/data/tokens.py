"""Text as tokens: sequences of one length to calibrate with and to evaluate on."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from woodfisher_jax.data.array_records import DataMissingError
from woodfisher_jax.extras import require

TOKENIZER = "tokenizer.json"

PARTS = ("calibration", "evaluation")

EVALUATED = 4
"""Of the sequences of a text file the last one in so many are for evaluation."""


class TokensError(ValueError):
    """Tokens that a network cannot take; the message says which."""


class Tokens(NamedTuple):
    """Text for a language model.

    Attributes:
        calibration: [sequences, tokens], int32.
        evaluation: The same, perhaps of another length.
        kinds: Of each sequence for evaluation, such as the name of its file; empty
            where not known.
    """

    calibration: np.ndarray
    evaluation: np.ndarray
    kinds: tuple[str, ...] = ()


def read_tokens(
    source: str | Path,
    vocab_size: int,
    *,
    length: int = 512,
    tokenizer: str | Path | None = None,
) -> Tokens:
    """Reads tokens, or makes them of text.

    Args:
        source: An ``.npz`` file with the arrays ``calibration`` and ``evaluation``
            [sequences, tokens] and perhaps ``kinds`` [sequences for evaluation], words;
            or a folder of ``.txt`` files in UTF-8, each a kind. A file is cut into
            sequences, of which the last quarter evaluates and the rest calibrates; the
            files take turns, so that any first sequences have all kinds.
        vocab_size: Tokens that the network knows.
        length: Tokens a sequence, of a folder; default 512. What is left over at the
            end of a file is not used.
        tokenizer: Folder with ``tokenizer.json``, of a folder that has none.

    Raises:
        DataMissingError: If there is no such source, no text in it, or no tokenizer.
        TokensError: If a token is outside the vocabulary, sequences are of unequal
            length, or the text is too short or mostly of unknown tokens.
        MissingExtraError: If text is to be cut and ``tokenizers`` is not installed.
    """
    source = Path(source)
    if source.is_dir():
        found = _of_folder(source, length, tokenizer)
    elif source.is_file():
        found = _of_file(source)
    else:
        raise DataMissingError(
            f"{source}: there is no such file or folder; expected an .npz file of "
            "tokens or a folder of .txt files"
        )
    for name in PARTS:
        _check(source, name, getattr(found, name), vocab_size)
    if found.kinds and len(found.kinds) != len(found.evaluation):
        raise TokensError(
            f"{source}: kinds has {len(found.kinds)} words; expected one for each of "
            f"the {len(found.evaluation)} sequences of evaluation"
        )
    calibration, evaluation = (getattr(found, n).astype(np.int32) for n in PARTS)
    return Tokens(calibration, evaluation, found.kinds)


def _of_file(path: Path) -> Tokens:
    arrays = {}
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise ValueError("it is no archive of np.savez")
        with np.load(path, allow_pickle=False) as file:
            for name in (*PARTS, "kinds"):
                if name in file:
                    arrays[name] = file[name]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if "Object arrays" in str(error):
            raise TokensError(
                f"{path}: {name} has sequences of unequal length; expected an array "
                "[sequences, tokens]: cut all to one length"
            ) from error
        raise TokensError(
            f"{path} cannot be read ({error!s:.200}); expected an .npz file with the "
            "arrays calibration and evaluation, or a folder of .txt files"
        ) from error
    missing = [name for name in PARTS if name not in arrays]
    if missing:
        raise TokensError(
            f"{path}: it has no array {' and no '.join(missing)}; expected calibration "
            "and evaluation [sequences, tokens]"
        )
    kinds = tuple(map(str, arrays.get("kinds", ())))
    return Tokens(arrays["calibration"], arrays["evaluation"], kinds)


def _check(source: Path, name: str, tokens: np.ndarray, vocab_size: int) -> None:
    """Raises unless an array can be the input of a network."""
    numbers = tokens.ndim == 2 and tokens.dtype.kind in "iu"
    # A token is predicted from the one before it.
    if not numbers or len(tokens) < 1 or tokens.shape[1] < 2:
        raise TokensError(
            f"{source}: {name} is {tokens.dtype}{list(tokens.shape)}; expected whole "
            "numbers [sequences, tokens], sequences of one length of at least 2"
        )
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        sequence, place = wrong[0]
        raise TokensError(
            f"{source}: {name}[{sequence}, {place}] is {tokens[sequence, place]}; "
            f"expected tokens from 0 to {vocab_size - 1}: take the tokenizer of the "
            "network"
        )


def _of_folder(folder: Path, length: int, tokenizer: str | Path | None) -> Tokens:
    texts = sorted(folder.glob("*.txt"))
    if not texts:
        raise DataMissingError(
            f"{folder}: there are no .txt files in it; expected text in UTF-8, or give "
            "an .npz file of tokens"
        )
    places = [folder, *([] if tokenizer is None else [Path(tokenizer)])]
    known = [place / TOKENIZER for place in places if (place / TOKENIZER).is_file()]
    if not known:
        raise DataMissingError(
            f"{TOKENIZER} is not in {' or '.join(map(str, places))}; copy it there "
            "from the folder of the network"
        )
    encoder = require("tokenizers", "text").Tokenizer.from_file(str(known[0]))
    sequences: dict[str, np.ndarray] = {}
    for path in texts:
        try:
            ids = encoder.encode(path.read_text(encoding="utf-8")).ids
        except UnicodeDecodeError as error:
            raise TokensError(f"{path}: {error}; expected UTF-8") from error
        number = len(ids) // length
        sequences[path.stem] = np.reshape(ids[: number * length], (number, length))
    _check_known(folder, known[0], encoder, sequences)
    ends = {kind: -(-len(rows) // EVALUATED) for kind, rows in sequences.items()}
    parts = {
        "calibration": {k: r[: len(r) - ends[k]] for k, r in sequences.items()},
        "evaluation": {k: r[len(r) - ends[k] :] for k, r in sequences.items()},
    }
    turns = {name: _in_turn(rows) for name, rows in parts.items()}
    if not turns["calibration"]:
        total = sum(map(len, sequences.values()))
        raise TokensError(
            f"{folder}: its text makes {total} sequences of {length} tokens; expected "
            "two or more of a file: give more text, or a smaller length"
        )
    arrays = {n: np.array([row for _, row in rows]) for n, rows in turns.items()}
    return Tokens(**arrays, kinds=tuple(kind for kind, _ in turns["evaluation"]))


def _check_known(
    folder: Path, tokenizer: Path, encoder: Any, sequences: dict[str, np.ndarray]
) -> None:
    """Raises if most of a text is the token of what a tokenizer does not know."""
    word = getattr(encoder.model, "unk_token", None)
    ids = np.concatenate([rows.reshape(-1) for rows in sequences.values()])
    unknown = 0 if word is None else int((ids == encoder.token_to_id(word)).sum())
    if 2 * unknown > len(ids):
        raise TokensError(
            f"{folder}: {unknown} of its {len(ids)} tokens are {word!r}, which "
            f"{tokenizer} gives for what it does not know; expected text in the "
            "language of the network, or its own tokenizer"
        )


def _in_turn(rows: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The rows of all kinds, one of each kind at a time."""
    most = max(map(len, rows.values()))
    return [(k, own[i]) for i in range(most) for k, own in rows.items() if i < len(own)]
