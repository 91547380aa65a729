"""What the documentation says, done: its commands, its Python, its links.

A command of a ```bash block, or of an indented one, runs here as it stands, with
settings that make it quick, in a folder where ``runs/`` holds a finished run. One that
cannot says so in a comment above the block, ``<!-- needs: ImageNet -->``, or for a
whole page in ``<!-- every command needs: hours -->``. Python blocks run on a small
network unless ``<!-- fragment: ... -->`` stands above.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_lines import run_module

import woodfisher_jax as wf
from woodfisher_jax import data

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

GATE = {
    "pip install -e .",
    "pip install -e '.[digits,report]'",
    "pip install -e '.[dev]'",
    "python -m pytest",
    "python -m pytest -m slow",
    "ruff check .",
    "ruff format --check .",
    "mypy",
    "bash .ci/run",
    "python -m venv .venv",
    "source .venv/bin/activate",
}
"""What sets up the gate that this test is a part of, and what is in it."""

QUICK = (
    "--config.dense.epochs=1",
    "--config.train.epochs=1",
    "--config.prune.one_shot=True",
    "--config.prune.num_samples=20",
    "--config.compare_with=()",
)
"""Added to a run."""

MODULE = "python -m woodfisher_jax."
MAIN = f"{MODULE}main"
RUN = "runs/digits"
FIRST = f"{MAIN} digits --workdir={RUN}"


class Block(NamedTuple):
    """A block of code.

    Attributes:
        page: The name of its page.
        comment: The HTML comment above it.
        language: bash, python, or another.
        text: What is in it.
    """

    page: str
    comment: str
    language: str
    text: str


FENCED = re.compile(
    r"(?:<!-- (?P<comment>[^>]*) -->\n\s*)?```(?P<language>\w+)\n(?P<text>.*?)```",
    re.DOTALL,
)
INDENTED = re.compile(
    r"(?:<!-- (?P<comment>[^>]*) -->\n\s*)?(?P<text>(?:^    \S.*\n)(?:^     *\S.*\n)*)",
    re.MULTILINE,
)


def blocks_of(page: str, text: str) -> list[Block]:
    """The code of a page: fenced blocks, and commands that are indented."""
    found = [
        Block(page, m["comment"] or "", m["language"], m["text"])
        for m in FENCED.finditer(text)
    ]
    rest = FENCED.sub("(a block)\n", text)
    for m in INDENTED.finditer(rest):
        if re.match(r"    (python|pip|bash|tfds|woodfisher) ", m["text"]):
            found.append(Block(page, m["comment"] or "", "bash", m["text"]))
    return found


def commands_of(block: Block) -> list[str]:
    """The commands of a block, one a line, without comments and in one space."""
    lines = re.sub(r"\\\n", " ", block.text).splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in lines]
    commands = [part for line in lines for part in re.split(r"&&", line)]
    found = [" ".join(part.split()) for part in commands if part.strip()]
    # The command that an installed package has, and the module behind it.
    return [re.sub(r"^woodfisher(?= )", MAIN, command) for command in found]


BLOCKS = [
    block
    for page in PAGES
    for block in blocks_of(str(page.relative_to(ROOT)), page.read_text())
]
MARKED_PAGES = [
    str(page.relative_to(ROOT))
    for page in PAGES
    if re.search(r"<!-- every command needs: .+ -->", page.read_text())
]
COMMANDS = list(
    dict.fromkeys(
        command
        for block in BLOCKS
        if block.language == "bash"
        and not block.comment.startswith("needs: ")
        and block.page not in MARKED_PAGES
        for command in commands_of(block)
        if command not in GATE
    )
)
OWN_MODELS = "docs/own_models.md"
BATCH_NORM = "docs/batch_norm.md"
PYTHON = [block for block in BLOCKS if block.language == "python"]


# ---------------------------------------------------------------------------- commands


def run(command: str, folder: Path) -> str:
    """Runs a command in a folder as a user would in a clone, and returns its output."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "Agg",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def quick(command: str) -> str:
    """The command, with fewer epochs if it is a run."""
    if command.startswith(MAIN) and not re.search(r"--(plan|help\w*)\b", command):
        return " ".join([command, *(f"'{flag}'" for flag in QUICK)])
    return command


def run_here(command: str) -> object:
    """Without a process of its own, which takes as long as the command."""
    module, *arguments = shlex.split(quick(command).removeprefix(MODULE))
    return run_module(module, *arguments)


def clone(folder: Path) -> Path:
    """A folder with what a clone has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("configs", "scripts", "examples", "notebooks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the command that the documentation starts with."""
    folder = clone(tmp_path_factory.mktemp("clone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert not run_here(FIRST)
    assert (folder / RUN / "results.json").exists()
    return folder / RUN


def takes_long(command: str) -> bool:
    """A second run, or a data set that is written: what they do others show."""
    trains = command.startswith(MAIN) and not re.search(r"--plan\b", command)
    return command != FIRST and (trains or command.startswith("python scripts/"))


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] * takes_long(c)) for c in COMMANDS],
)
def test_a_command_runs(
    command: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == FIRST:
        assert (finished / "checkpoints").is_dir()
        return
    folder = clone(tmp_path / "clone")
    written = re.findall(r"--workdir=(\S+)", command) if MAIN in command else []
    for name in set(re.findall(r"runs/[\w-]+", command)) - set(written):
        shutil.copytree(finished, folder / name)
    before = set(folder.rglob("*"))
    if command.startswith(MODULE):
        monkeypatch.chdir(folder)
        code = run_here(command)
        output = "".join(capsys.readouterr())
        assert not code, output[-3000:]
    else:
        output = run(command, folder)
    assert output or set(folder.rglob("*")) - before
    for name in re.findall(r"--(?:out|masks)=(\S+)", command):
        assert (folder / name).exists(), name


def test_the_documentation_starts_with_a_run() -> None:
    assert COMMANDS[0] == FIRST


def test_the_gate_does_what_contributing_says() -> None:
    gate = (ROOT / ".ci" / "run").read_text()
    for command in (
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "python -m pytest",
    ):
        assert command in GATE
        assert re.search(rf"^{re.escape(command)}", gate, re.MULTILINE), command


def test_commands_that_are_marked_are_of_files_that_exist() -> None:
    marked = [b for b in BLOCKS if b.language == "bash"]
    named = {
        name
        for block in marked
        for name in re.findall(r"(?:scripts|examples|configs)/\w+\.py", block.text)
    }
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
    modules = {
        name for b in marked for name in re.findall(r"-m woodfisher_jax\.(\S+)", b.text)
    }
    for name in modules:
        spec = find_spec(f"woodfisher_jax.{name}")
        assert spec, name
        if spec.submodule_search_locations is not None:
            spec = find_spec(f"{spec.name}.__main__")
        assert spec, name
        # What Python runs with -m.
        text = Path(str(spec.origin)).read_text()
        assert re.search(r'\nif __name__ == "__main__":\n    \w+\(\)\n$', text), name


def test_a_new_command_is_found() -> None:
    text = "<!-- needs: a pod -->\n\n```bash\nfirst\n```\n\n"
    text += "```bash\na \\\n  --b # c\n```\n"
    text += (
        "\n    python indented.py\n\n<!-- needs: hours -->\n\n    python marked.py\n"
    )
    found = blocks_of("page", text)
    assert [b.comment for b in found] == ["needs: a pod", "", "", "needs: hours"]
    assert [commands_of(b) for b in found] == [
        ["first"],
        ["a --b"],
        ["python indented.py"],
        ["python marked.py"],
    ]


def test_overrides_name_fields_that_exist() -> None:
    from woodfisher_jax.training.config import Config, LanguageConfig, to_dict

    fields, others = to_dict(Config()), to_dict(LanguageConfig())
    fields |= {name: fields[name] | others[name] for name in ("data", "prune")}
    # Its option is one of the method that the page adds.
    for page in (p for p in PAGES if p.name != "adding_a_method.md"):
        for name in re.findall(r"--config\.([a-z][\w.]*)[= `]", page.read_text()):
            *sections, field = name.rstrip(".").split(".")
            found: Any = fields
            for section in sections:
                found = found[re.sub(r"_\d$", "", section)]
            open_ended = sections[-1:] in (["model"], ["optimizer"])
            assert open_ended or field in found, f"{page.name}: {name}"


# ------------------------------------------------------------------------------ Python


LONG = (
    "docs/comparison.md",
    "docs/concepts.md",
    "docs/configs.md",
    "docs/methods.md",
    "docs/quickstart.md",
    "docs/scaling.md",
    "docs/small_networks.md",
)
"""Pages whose Python takes five seconds and more to compile."""


def network() -> dict[str, Any]:
    """Names that examples take for granted: a network, its loss, and its data."""
    # In NumPy, which compiles nothing.
    digits = data.load("digits").train
    x = np.float32(digits.images.reshape(-1, 64)[:320] / 16)
    y = digits.labels[:320]
    draw = np.random.default_rng(0).standard_normal

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        logits = jnp.tanh(x @ params["hidden"]) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return {
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "wf": wf,
        "samples": (jnp.asarray(x), jnp.asarray(y)),
        "batches": jax.tree.map(jnp.asarray, [(x[i::40], y[i::40]) for i in range(40)]),
        "loss_fn": loss_fn,
        "params": {
            "hidden": jnp.asarray(0.1 * draw((64, 8)), jnp.float32),
            "out": jnp.asarray(0.1 * draw((8, 10)), jnp.float32),
        },
    }


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page in LONG))
        for page in dict.fromkeys(b.page for b in PYTHON)
    ],
)
def test_python_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if page in ("README.md", OWN_MODELS, BATCH_NORM):
        return  # Below, with their results.
    for block in (b for b in PYTHON if b.page == page):
        ast.parse(block.text)
        # What is shown as a file is run by the test of its page.
        if not block.comment.startswith(("fragment: ", "file: ")):
            # A page may add a method, which other tests must not see.
            with patch.dict(wf.METHODS):
                exec(compile(block.text, page, "exec"), network())


def test_the_snippet_of_the_readme_runs_as_it_stands() -> None:
    (snippet,) = (b.text for b in PYTHON if b.page == "README.md")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert set(names["masks"]) == {"hidden", "out"}
    kept = sum(np.count_nonzero(leaf) for leaf in names["params"].values())
    assert kept == names["info"].nonzero == names["info"].prunable // 10


@pytest.mark.slow
def test_the_page_on_your_own_models_runs() -> None:
    *which, loop = (b.text for b in PYTHON if b.page == OWN_MODELS)
    traced, given, chosen, trees = which
    names = network()
    exec(traced, names)
    assert list(names["masks"]) == ["hidden", "out"]
    assert names["axes"]["hidden"].roles == "io"
    exec(given, names)
    assert wf.patterns.check(names["masks"], "2:4", axes={"hidden": "io"})
    exec(chosen, names)
    assert list(names["masks"]) == ["hidden"]
    exec(trees, names)
    assert jax.tree.structure(names["products"]) == jax.tree.structure(names["params"])
    exec(loop, names)
    kept = sum(np.count_nonzero(leaf) for leaf in names["params"].values())
    assert kept == names["info"].nonzero == 592 // 10


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3), ids=("linen", "nnx", "equinox"))
def test_the_page_on_batch_norm_runs(number: int) -> None:
    text = [b.text for b in PYTHON if b.page == BATCH_NORM and not b.comment][number]
    names = network()
    x, _ = names["x"], names["y"] = names["samples"]
    exec(text, names)
    assert names["info"].nonzero == names["info"].prunable // 10
    state = names.get("stats", names.get("state"))
    mean = next(a for a in jax.tree.leaves(state) if jnp.ndim(a) == 1)
    (first,) = (a for a in jax.tree.leaves(names["params"]) if 64 in jnp.shape(a))
    inputs = x @ (first if len(first) == 64 else first.T)
    # Those of Equinox are not zero at the start.
    inputs += names["params"].first.bias if number == 2 else 0
    np.testing.assert_allclose(mean, inputs.mean(0), atol=1e-4)


# ------------------------------------------------------------------------------- pages


def anchors_of(page: Path) -> set[str]:
    """Of the headings of a page, as git hosts make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), link
        if anchor:
            assert anchor in anchors_of(there), link


def test_each_page_is_in_a_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = set(re.findall(r"^([\w/]+)$", index, re.MULTILINE))
    pages = {
        path.stem
        for kind in ("md", "rst")
        for path in (ROOT / "docs").glob(f"*.{kind}")
    }
    assert listed == pages - {"index"}
    notebooks = (ROOT / "docs" / "notebooks.md").read_text()
    for path in (ROOT / "notebooks").glob("*.py"):
        assert f"notebooks/{path.stem}\n" in notebooks


def test_each_method_of_the_table_is_named() -> None:
    for page in (README, ROOT / "docs" / "methods.md"):
        for name in wf.METHODS:
            assert f"`{name}`" in page.read_text(), name


def test_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = re.findall(
        r"^\| (?:global|WoodFisher|`wf).*\|$", README.read_text(), re.MULTILINE
    )
    assert len(rows) == 4
    for row in rows:
        for figure in row.strip("|").split(" | ")[1:]:
            assert f"| {figure.strip()} |" in benchmarks, figure


def test_each_config_and_variant_is_named() -> None:
    text = (ROOT / "docs" / "configs.md").read_text()
    for path in (ROOT / "configs").glob("*.py"):
        assert f"`{path.stem}`" in text, path.stem
        names: dict[str, Any] = {}
        exec(path.read_text(), names)
        for variant in names.get("VARIANTS", ()):
            assert f"`{variant}`" in text, f"{path.stem}:{variant}"


def test_public_names_are_in_the_reference() -> None:
    text = (ROOT / "docs" / "api.rst").read_text()
    for name in set(wf.__all__) - {"__version__"}:
        value = getattr(wf, name)
        title = value.__name__ if isinstance(value, ModuleType) else name
        assert re.search(rf":: {re.escape(title)}$", text, re.MULTILINE), name
