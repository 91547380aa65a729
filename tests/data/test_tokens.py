import json

import numpy as np
import pytest

from woodfisher_jax.data.array_records import DataMissingError
from woodfisher_jax.data.tokens import TokensError, read_tokens

VOCABULARY = {"model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0}}}
VOCABULARY["model"]["vocab"] |= {word: i for i, word in enumerate("abc", 1)}
VOCABULARY["pre_tokenizer"] = {"type": "Whitespace"}


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_file_of_tokens(tmp_path):
    rows = np.arange(6, dtype=np.uint16).reshape(2, 3)
    path = saved(
        tmp_path / "t.npz", calibration=rows, evaluation=rows + 1, kinds=["x", "y"]
    )
    tokens = read_tokens(path, vocab_size=7)
    assert tokens.calibration.dtype == np.int32
    np.testing.assert_array_equal(tokens.evaluation, rows + 1)
    assert tokens.kinds == ("x", "y")


ROWS = np.ones((2, 3), int)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"evaluation": ROWS * [1, 8, 9]}, r"evaluation\[0, 1\] is 8; .* 0 to 7"),
        ({"calibration": -ROWS}, r"calibration\[0, 0\] is -1; expected tokens"),
        ({"calibration": ROWS[0]}, r"calibration is int64\[3\]; .* of one length"),
        ({"evaluation": ROWS / 2}, r"evaluation is float64\[2, 3\]; expected whole"),
        (
            {"evaluation": np.array([[1], [1, 2]], object)},
            "evaluation has sequences of unequal length",
        ),
        (
            {"evaluation": np.ones((3, 1), int)},
            r"evaluation is int64\[3, 1\]; expected",
        ),
        ({"kinds": ["x"]}, "kinds has 1 words; expected one for each of the 2"),
    ],
)
def test_tokens_that_a_network_cannot_take(tmp_path, arrays, message):
    given = {"calibration": ROWS, "evaluation": ROWS, **arrays}
    with pytest.raises(TokensError, match=message):
        read_tokens(saved(tmp_path / "t.npz", **given), vocab_size=8)


def test_files_without_tokens(tmp_path):
    with pytest.raises(TokensError, match="has no array evaluation; expected"):
        read_tokens(saved(tmp_path / "t.npz", calibration=ROWS), vocab_size=8)
    (tmp_path / "t.npz").write_text("no archive")
    with pytest.raises(
        TokensError, match=r"t.npz cannot be read \(it is no archive of"
    ):
        read_tokens(tmp_path / "t.npz", vocab_size=8)
    with pytest.raises(DataMissingError, match="no such file or folder; expected an"):
        read_tokens(tmp_path / "u.npz", vocab_size=8)


def test_a_folder_of_text(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "long.txt").write_text("a b " * 9)  # 9 sequences of two tokens
    (tmp_path / "short.txt").write_text("c c b b c")  # two, and one token
    with pytest.raises(DataMissingError, match=r"tokenizer.json is not in .*network"):
        read_tokens(tmp_path, 4, length=2)
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    tokens = read_tokens(tmp_path, 4, length=2, tokenizer=model)
    assert tokens.calibration.tolist() == [[1, 2], [3, 3], *[[1, 2]] * 5]
    assert tokens.evaluation.tolist() == [[1, 2], [2, 2], [1, 2], [1, 2]]
    assert tokens.kinds == ("long", "short", "long", "long")
    with pytest.raises(TokensError, match="makes 1 sequences of 12 tokens; expected"):
        read_tokens(tmp_path, 4, length=12, tokenizer=model)


def test_text_that_the_tokenizer_does_not_know(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    (tmp_path / "text.txt").write_text("a x " * 6)  # half of it
    assert len(read_tokens(tmp_path, 4, length=2).calibration) == 4
    (tmp_path / "text.txt").write_text("a x " * 6 + "x x")
    with pytest.raises(TokensError, match=r"8 of its 14 tokens are '\?', which .*json"):
        read_tokens(tmp_path, 4, length=2)


def test_a_folder_without_text(tmp_path):
    with pytest.raises(DataMissingError, match=r"there are no .txt files in it"):
        read_tokens(tmp_path, 4)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    pytest.importorskip("tokenizers")
    with pytest.raises(TokensError, match=r"a.txt: .*expected UTF-8"):
        read_tokens(tmp_path, 4)
