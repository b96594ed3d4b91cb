"""Breaks one line at a time of what the numbers rest on, and asks whether a test notices.

`make mutants` samples mutants with a seed, runs the tests of their module on each in a copy of
the checkout, and adds one row per mutant to results.jsonl; a second call goes on where the first
was cut off. Operators are Cosmic Ray's. Mutants that differ only in annotations, or not at all
once parsed, are never drawn. equivalent.toml names survivors that no test can tell apart, and why.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.jsonl")
TESTS = {  # the fastest first: a run ends at the first failure
    "shards/order.py": "unit/test_windows unit/test_plan",
    "shards/rng.py": "unit/test_plan integration/test_golden",
    "shards/crops.py": "unit/test_plan unit/test_densities integration/test_crops",
    "shards/record.py": "unit/test_record unit/test_verify",
    "shards/tar.py": "unit/test_record unit/test_verify",
    "shards/index.py": "unit/test_record unit/test_verify unit/test_loader",
    "shards/spec.py": "unit/test_record unit/test_verify integration/test_version2",
    "shards/loader.py": "unit/test_loader",
    "shards/weighting.py": "integration/test_crops integration/test_stored_weights "
    "integration/test_library",
    "shards/remote/cache.py": "integration/test_streaming integration/test_remote",
    "shards/remote/prefetch.py": "integration/test_streaming",
    "preprocess/shard.py": "unit/test_record unit/test_densities integration/test_build",
    "preprocess/building.py": "integration/test_build integration/test_maps",
    "train/loss.py": "integration/test_method integration/test_golden",
    "train/masking.py": "integration/test_method integration/test_attention",
}
# A name in place of another is mostly an error at once, and says little of the tests.
LEFT_OUT = {"core/VariableReplacer", "core/VariableInserter", "core/RemoveDecorator"}


class Plain(ast.NodeTransformer):
    """Drops what changes no result: annotations, docstrings and bare strings."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(0)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        bare = isinstance(node.value, ast.Constant)
        return ast.Constant(0) if bare else self.generic_visit(node)


def plain(code: str) -> str:
    return ast.dump(Plain().visit(ast.parse(code)))


def sample(module: str, count: int, seed: int) -> list[tuple[int, str]]:
    """Up to `count` mutants (line, code): places of the text drawn evenly, one mutant of each."""
    code = (ROOT / module).read_text()
    nodes, same = list(ast_nodes(get_ast(code))), plain(code)
    found = defaultdict(list)
    for name in sorted(set(operator_names()) - LEFT_OUT):
        operator = get_operator(name)()
        places = [place for node in nodes for place, _ in operator.mutation_positions(node)]
        for number, place in enumerate(places):
            found[place].append((operator, number))
    draw = random.Random(f"{seed} {module}")
    drawn: list[tuple[int, str]] = []
    for place in draw.sample(sorted(found), len(found)):
        if len(drawn) == count:
            break
        for operator, number in draw.sample(found[place], len(found[place])):
            mutated = mutate_code(code, operator, number)
            if parses(mutated) and plain(mutated) != same:
                drawn.append((place[0], mutated))
                break
    return drawn


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def changed(before: str, after: str) -> tuple[str, str]:
    """The lines in which a mutant differs, was and now."""
    was, now = before.splitlines(), after.splitlines()
    different = [i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b]
    first, last = different[0], different[-1] + 1
    return tuple(" ".join(map(str.strip, lines[first:last])) for lines in (was, now))


def source(module: str) -> str:
    """Names the text of a module: rows of another text are of no use."""
    path = ROOT / module
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else ""


def copy_of_the_tree(folder: str) -> Path:
    copy = Path(folder, "kamim")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def test(copy: Path, module: str, code: str, python: str, limit: float) -> tuple[str, float]:
    """Runs a module's tests with its code replaced: killed, survived or timeout, and the time."""
    before = (copy / module).read_text()
    (copy / module).write_text(code)
    places = [f"tests/{name}.py" for name in TESTS[module].split()]
    line = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *places]
    # Bytecode is told apart by second and size, which a mutant shares with the code before it.
    data = os.environ.get("KAMIM_DATA", ROOT.parent / "shared" / "data")
    extra = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "KAMIM_DATA": str(data)}
    begin = time.monotonic()
    try:
        done = subprocess.run(
            line, cwd=copy, env=os.environ | extra, capture_output=True, timeout=limit, check=False
        )
        outcome = "killed" if done.returncode else "survived"
    except subprocess.TimeoutExpired:
        outcome = "timeout"
    finally:
        (copy / module).write_text(before)
    return outcome, time.monotonic() - begin


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--python", default=sys.executable, help="runs the tests")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--count", type=int, default=40, help="mutants per module")
    parse.add_argument("--jobs", type=int, default=2)
    parse.add_argument("--limit", type=float, default=600, help="seconds per mutant")
    parse.add_argument("--survivors", action="store_true", help="try the survivors again")
    parse.add_argument("--results", type=Path, default=RESULTS)
    parse.add_argument("modules", nargs="*", default=list(TESTS))
    chosen = parse.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    lines = chosen.results.read_text().splitlines() if chosen.results.exists() else []
    rows = [row for row in map(json.loads, lines) if row["source"] == source(row["module"])]
    if chosen.survivors:  # tests were added: only they can tell
        rows = [row for row in rows if row["outcome"] != "survived"]
    chosen.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {(row["module"], row["line"], row["now"]) for row in rows}
    work = []
    for module in chosen.modules:
        before = (ROOT / module).read_text()
        for line, code in sample(module, chosen.count, chosen.seed):
            was, now = changed(before, code)
            if (module, line, now) not in known:
                work.append((module, line, was, now, code))
    random.Random(chosen.seed).shuffle(work)  # cut off at any time, it has looked everywhere
    print(f"{len(work)} mutants to try, {len(known)} known", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, chosen.results.open("a") as out:
        copies: Queue[Path] = Queue()
        for job in range(chosen.jobs):
            copies.put(copy_of_the_tree(f"{folder}/{job}"))

        def try_one(item: tuple[str, int, str, str, str]) -> None:
            module, line, was, now, code = item
            copy = copies.get()
            try:
                outcome, took = test(copy, module, code, chosen.python, chosen.limit)
            finally:
                copies.put(copy)
            row = {"module": module, "line": line, "was": was, "now": now, "outcome": outcome}
            row |= {"seconds": round(took, 1), "seed": chosen.seed, "commit": commit.strip()}
            row["source"] = source(module)
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(f"{outcome:9}{took:6.1f} s  {module}:{line}  {now}", file=sys.stderr)

        with ThreadPoolExecutor(chosen.jobs) as pool:
            list(pool.map(try_one, work))


if __name__ == "__main__":
    main()
