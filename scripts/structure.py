"""Measures the structure of a checkout: sizes, imports, frames, programs.

    python scripts/structure.py [CHECKOUT]

Prints one row a figure, for this checkout or another one (an older version, say):
lines and code lines of the package (without blank lines, comments and docstrings), the
largest folder, the longest chain of imports, the most arguments of a function, the
frames between ``wf.prune`` and the Cholesky factor, and what the first ``wf.prune`` of
two small arrays compiles and takes. The last three run the checkout in a process of its
own.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

PACKAGE = "woodfisher_jax"

FIRST_CALL = """
import time, traceback
import jax, jax.numpy as jnp
import woodfisher_jax as wf

programs, frames = [], []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: programs.append(name)
    if name.endswith("backend_compile_duration") else None)
cholesky = jax.lax.linalg.cholesky
def noted(*args, **kwargs):
    files = [f.filename for f in traceback.extract_stack()[:-1]]
    frames.append(sum("woodfisher_jax/" in name for name in files))
    return cholesky(*args, **kwargs)
jax.lax.linalg.cholesky = noted

def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - 1) ** 2)

params = {"a": jax.random.normal(jax.random.key(0), (6, 4)), "b": jnp.ones((4, 4))}
x = jax.random.normal(jax.random.key(1), (16, 6))
jax.block_until_ready((params, x))
programs.clear()
started = time.process_time()
found = wf.prune(loss_fn, params, x, sparsity=0.5, damping=1e-3)
jax.block_until_ready(found[0])
print(len(programs), round(time.process_time() - started, 2), min(frames))
"""


def code_lines(text: str) -> int:
    """Lines that are neither blank nor all comment or docstring."""
    docs = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
            found |= set(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    return sum(1 for n in found - docs if n <= len(lines) and lines[n - 1].strip())


def module_name(path: Path, root: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(sources: dict[Path, str], root: Path) -> dict[str, set[str]]:
    """From module to the modules of the package that it imports."""
    names = {module_name(path, root) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, text in sources.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                # A submodule by name counts as itself, not as its package.
                found |= (full & names) or {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[module_name(path, root)] = (found & names) - {module_name(path, root)}
    graph.pop(PACKAGE, None)
    return {name: found - {PACKAGE} for name, found in graph.items()}


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a row, the longest such row."""
    longest: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in longest:
            longest[name] = [name]  # Ends a circle, if there is one.
            below = max((chain(n) for n in graph.get(name, ())), key=len, default=[])
            longest[name] = [name, *below]
        return longest[name]

    return max((chain(name) for name in graph), key=len)


def most_arguments(sources: dict[Path, str]) -> tuple[int, str]:
    """The most arguments of a public function, and its name."""
    found = []
    for text in sources.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                given = node.args
                number = (
                    len(given.args) + len(given.kwonlyargs) + len(given.posonlyargs)
                )
                number += (given.vararg is not None) + (given.kwarg is not None)
                found.append((number, node.name))
    return max(found)


def read(folder: Path) -> dict[Path, str]:
    """The Python files below a folder."""
    return {path: path.read_text() for path in sorted(folder.rglob("*.py"))}


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("checkout", type=Path, nargs="?", default=here)
    root = parser.parse_args().checkout.resolve()
    package, tests = read(root / PACKAGE), read(root / "tests")
    folders = Counter(path.parent for path in package)
    folder, modules = folders.most_common(1)[0]
    chain = longest_chain(imports(package, root))
    arguments, function = most_arguments(package)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    everything = "".join(package.values())
    comments = len(re.findall(r"^\s*#", everything, re.M))
    lines, code = everything.count("\n"), sum(map(code_lines, package.values()))
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL],
        capture_output=True,
        text=True,
        cwd=root,
        check=True,
    )
    programs, seconds, frames = done.stdout.split()
    for name, value in (
        (
            "package, lines (code lines)",
            f"{lines} ({code})",
        ),
        ("modules", len(package)),
        ("comment lines", f"{100 * comments / lines:.1f} %"),
        ("tests, lines", sum(text.count("\n") for text in tests.values())),
        ("most modules in a folder", f"{modules} ({folder.relative_to(root)})"),
        ("longest import chain", f"{len(chain)} ({' -> '.join(chain)})"),
        ("most arguments of a public function", f"{arguments} ({function})"),
        ("frames from wf.prune to the Cholesky", frames),
        ("XLA programs in a first wf.prune", programs),
        ("processor seconds of it", seconds),
        ("direct dependencies", len(project["dependencies"])),
    ):
        print(f"{name:40} {value}")


if __name__ == "__main__":
    main()
