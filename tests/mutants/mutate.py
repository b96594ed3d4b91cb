"""Breaks one line at a time of what the numbers rest on, and asks whether a test notices.

`make mutants` samples mutants with a seed, runs the tests of their module on each in a copy of
the checkout, and adds one row per mutant to results.jsonl; a second call goes on where the first
was cut off. Operators are Cosmic Ray's. Mutants that differ only in annotations, or not at all
once parsed, are never drawn. equivalent.toml names survivors that no test can tell apart, and why.
A mutant that loops, or waits for ever, is a `timeout`: one test alone took 60 s, about three times
what all tests of its module take without a mutant on a quiet machine.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from pathlib import Path
from queue import Queue
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.jsonl")
EQUIVALENT = RESULTS.with_name("equivalent.toml")
TESTS = {  # the fastest that can notice, without torch first: a run ends at the first failure
    "shards/order.py": "unit/test_windows unit/test_subset unit/test_mixture "
    "unit/test_golden_batches unit/test_plan integration/test_streaming",
    "shards/rng.py": "unit/test_golden_batches unit/test_plan",
    "shards/crops.py": "unit/test_golden_batches unit/test_plan unit/test_densities "
    "integration/test_crops",
    "shards/record.py": "unit/test_record unit/test_beton unit/test_verify "
    "integration/test_reliability",
    "shards/tar.py": "unit/test_record unit/test_verify integration/test_build",
    "shards/index.py": "unit/test_record unit/test_progress unit/test_verify "
    "integration/test_reliability",
    "shards/spec.py": "unit/test_settings unit/test_record unit/test_verify "
    "integration/test_version2 integration/test_reliability",
    "shards/loader.py": "unit/test_golden_batches unit/test_loader unit/test_sets "
    "integration/test_streaming",
    "shards/reading.py": "unit/test_turbojpeg unit/test_vectored unit/test_loader "
    "integration/test_streaming integration/test_device_decode",
    "shards/turbojpeg.py": "unit/test_turbojpeg",
    "shards/weighting.py": "integration/test_crops integration/test_library "
    "integration/test_stored_weights integration/test_map_weights integration/test_several_sets",
    "shards/remote/cache.py": "unit/test_cache integration/test_streaming",
    "shards/remote/prefetch.py": "unit/test_prefetch integration/test_streaming",
    "preprocess/shard.py": "unit/test_settings unit/test_record unit/test_densities "
    "integration/test_build "
    "integration/test_backends::test_what_a_worker_says_is_looked_at",
    "preprocess/building.py": "integration/test_build integration/test_maps "
    "integration/test_datasets::test_counts_far_from_those_published_are_refused",
    "train/loss.py": "integration/test_train_parts integration/test_method "
    "integration/test_figures",
    "train/masking.py": "integration/test_train_parts integration/test_method "
    "integration/test_attention",
}
LEAVE = (  # of these files: minutes for what others notice, or about the very rows made here
    "tests/integration/test_reliability.py"
    "::test_the_table_of_mutants_is_rendered_from_their_rows_and_few_survive",
    "tests/integration/test_build.py::test_the_same_bytes_after_kills",
    "tests/integration/test_maps.py::test_the_same_bytes_after_kills",
)
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
    """Names the code of a module: rows of other code are of no use. Comments and docstrings are
    none of it.
    """
    path = ROOT / module
    if not path.exists():
        return ""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def copy_of_the_tree(folder: str) -> Path:
    copy = Path(folder, "kamim")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def run(copy: Path, module: str, python: str, limit: float) -> tuple[str, float]:
    """Runs a module's tests in `copy`: killed, survived, timeout or slow, and the seconds it took.

    timeout: one test alone took `limit`. slow: all took ten times that, but no test as much.
    """
    begin = time.monotonic()
    # Bytecode is told apart by second and size, which a mutant shares with the code before it.
    data = os.environ.get("KAMIM_DATA", ROOT.parent / "shared" / "data")
    extra = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "KAMIM_DATA": str(data)}
    extra["OMP_NUM_THREADS"] = "1"
    line = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    line += [f"--basetemp={copy.parent / 'tmp'}", f"--timeout={limit:.0f}"]
    line += ["--timeout-method=thread", *(f"--deselect={name}" for name in LEAVE)]
    for stage in ("unit", "integration"):  # not in one: the second imports torch
        names = [name.partition("::") for name in TESTS[module].split() if name.startswith(stage)]
        places = ["".join((f"tests/{file}.py", *test)) for file, *test in names]
        if not places:
            continue
        process = subprocess.Popen(
            [*line, *places],
            cwd=copy,
            env=os.environ | extra,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            told = process.communicate(timeout=10 * limit)[0]
        except subprocess.TimeoutExpired:
            return "slow", time.monotonic() - begin
        finally:  # what the tests started goes too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            outcome = "timeout" if "++ Timeout ++" in told else "killed"
            return outcome, time.monotonic() - begin
    return "survived", time.monotonic() - begin


def test(copy: Path, module: str, code: str, python: str, limit: float) -> tuple[str, float]:
    """As run, with the code of `module` replaced."""
    before = (copy / module).read_text()
    (copy / module).write_text(code)
    try:
        return run(copy, module, python, limit)
    finally:
        (copy / module).write_text(before)


def known_rows(results: Path) -> list[dict[str, Any]]:
    """The rows of `results` that are of the modules' present code."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [row for row in map(json.loads, lines) if row["source"] == source(row["module"])]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--python", default=sys.executable, help="runs the tests")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--count", type=int, default=12, help="mutants per module")
    parse.add_argument("--jobs", type=int, default=2)
    parse.add_argument("--limit", type=float, default=60, help="seconds of one test")
    parse.add_argument("--survivors", action="store_true", help="try the survivors again")
    parse.add_argument("--results", type=Path, default=RESULTS)
    parse.add_argument("modules", nargs="*", default=list(TESTS))
    chosen = parse.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    same = {"seed": chosen.seed, "commit": commit.strip(), "date": f"{date.today()}"}
    rows = known_rows(chosen.results)
    if chosen.survivors:  # tests were added: only they can tell
        named = tomllib.loads(EQUIVALENT.read_text())["mutant"]
        same_to_all = {(each["module"], each["was"], each["now"]) for each in named}
        rows = [
            row
            for row in rows
            if row["outcome"] in ("killed", "timeout")
            or row["module"] not in chosen.modules
            or (row["module"], row["was"], row["now"]) in same_to_all
        ]
    chosen.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {(row["module"], row["was"], row["now"]) for row in rows}  # comments move lines
    turns: list[tuple[int, dict[str, Any], str]] = []
    for module in chosen.modules:
        before, text = (ROOT / module).read_text(), source(module)
        for turn, (line, code) in enumerate(sample(module, chosen.count, chosen.seed)):
            was, now = changed(before, code)
            if (module, was, now) not in known:
                row = {"module": module, "line": line, "was": was, "now": now, "source": text}
                turns.append((turn, row, code))
    # Module by module in turn: cut off at any time, it has looked everywhere alike.
    work = [(row, code) for _, row, code in sorted(turns, key=lambda each: each[0])]
    print(f"{len(work)} mutants to try, {len(known)} known", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, chosen.results.open("a") as out:
        copies: Queue[Path] = Queue()
        for job in range(chosen.jobs):
            copies.put(copy_of_the_tree(f"{folder}/{job}"))

        def outcome_of(module: str, code: str) -> tuple[str, float]:
            copy = copies.get()
            try:
                return test(copy, module, code, chosen.python, chosen.limit)
            finally:
                copies.put(copy)

        def try_one(item: tuple[dict[str, Any], str]) -> None:
            row, code = item
            row["outcome"], took = outcome_of(row["module"], code)
            row |= {"seconds": round(took, 1)} | same
            out.write(json.dumps(row) + "\n")
            out.flush()
            place = f"{row['module']}:{row['line']}"
            print(f"{row['outcome']:9}{took:6.1f} s  {place}  {row['now']}", file=sys.stderr)

        def fails_anyway(module: str) -> bool:
            return outcome_of(module, (ROOT / module).read_text())[0] != "survived"

        with ThreadPoolExecutor(chosen.jobs) as pool:
            list(pool.map(try_one, work))
            tried = {row["module"] for row, _ in work}
            passed = {row["module"] for row, _ in work if row["outcome"] == "survived"}
            unsure = sorted(tried - passed)  # all were killed: without a mutant, too?
            bad = list(pool.map(fails_anyway, unsure))
            void = [each for each, fails in zip(unsure, bad, strict=True) if fails]
    if void:
        rows = [row for row in known_rows(chosen.results) if row["module"] not in void]
        chosen.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
        raise SystemExit(f"tests fail without a mutant, so no row counts: {', '.join(void)}")


if __name__ == "__main__":
    main()
