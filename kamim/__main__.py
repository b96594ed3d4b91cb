"""The `kamim` command: each room's commands behind one door.

Results go to stdout (JSON with --json), logs and progress to stderr. Exit status: 0 all that was
asked for was done, 1 it was not, 2 the request was wrong, 70 a bug of ours (a line and the
traceback), 130 or 143 it was stopped.
"""

import os
import sys

# `python -m` and torchrun put the current folder first: a train.py of the user's there must not
# stand in for a room of ours.
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.path and os.path.abspath(sys.path[0]) == os.getcwd() != _HERE:
    del sys.path[0]

import io
import json
import re
import signal
import threading
import traceback
from importlib.util import find_spec
from types import FrameType
from typing import Annotated, NoReturn

import typer

import kamim.bench.cli
import kamim.compare
import kamim.evaluate.cli
import kamim.evaluate.dense_cli  # this and the next add their commands to those of cli
import kamim.evaluate.export_cli
import preprocess.cli
import preprocess.edges_cli
import preprocess.forms_cli  # these two add their commands to those of cli
import preprocess.maps_cli
import train.cli
from preprocess import BuildError
from shards.errors import UserError, install

OURS = {"kamim", "preprocess", "shards", "train"}
GO_ON = {"build", "pretrain", "finetune", "probe", "copy", "bench"}  # when they are typed again

app = typer.Typer(
    help="Keypoint-weighted masked image modelling from offline shards.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(preprocess.cli.app, name="shards")
app.add_typer(preprocess.maps_cli.app, name="maps")
app.add_typer(train.cli.app)
app.add_typer(kamim.evaluate.cli.app)
app.add_typer(kamim.compare.app)
app.add_typer(kamim.bench.cli.app)


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print the parts as JSON.")] = False,
) -> None:
    """Say what this machine has, what is missing, and what to type."""
    from kamim.doctor import examine

    rows = examine()
    if json_output:
        parts = [{"part": part, "state": state, "type": hint} for part, state, hint in rows]
        print(json.dumps(parts, indent=2))
    for part, state, hint in [] if json_output else rows:
        print(f"{part:20s} {state}{f'; {hint}' if hint else ''}")


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"kamim {version('kamim')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Keypoint-weighted masked image modelling from offline shards."""


class Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """A line in place of a trace; whoever waits for the thread says what it means for the rest."""
    print(f"{failure.exc_type.__name__} in a thread: {failure.exc_value}", file=sys.stderr)


def _plain(text: str, arguments: list[str]) -> str:
    """A usage error with the value that was typed, and without its library's own words."""
    form = r"Invalid value for '(--[\w-]+)': (?:Value error, |Input )?(.*?)(?:, unable to .*)?"
    found = re.fullmatch(form, text.rstrip("."))
    if not found:
        return text.rstrip(".")
    option, rule = found.groups()
    words = [part for word in arguments for part in word.split("=", 1)]
    typed = words[words.index(option) + 1 :] if option in words and "'" not in rule else []
    return " ".join([option, *map(repr, typed[:1]), rule])


def _is_missing(module: str) -> bool:
    """Whether a package of others is not installed; a module that lacks in one is a bug."""
    package, _, inside = module.partition(".")
    return bool(package) and package not in OURS and (not inside or find_spec(package) is None)


def _prepare_output() -> None:
    """Have stderr open, or another file would get its number, and print names that are no text."""
    if sys.stderr is None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.set_inheritable(2, True)
        sys.stderr = os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def _with_home(argument: str) -> str:
    """`argument` with ~/ as the home folder, where no shell has put it: in quotes, or after =."""
    option, _, value = argument.partition("=")
    if option.startswith("--") and value.startswith("~/"):
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(argument) if argument.startswith("~/") else argument


def _of_system(error: OSError | MemoryError) -> tuple[int, str]:
    """Exit status and line of what the system refused."""
    if isinstance(error, MemoryError):
        words = f" ({error})" if str(error) else ""
        return 1, f"not enough memory{words}; use fewer processes or workers, or smaller batches"
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        return 2, f"{error.filename} is a file, or lies below one; name a folder"
    return 1, f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")


def main() -> None:
    """Run the command line; every expected failure is one line on stderr and a status."""
    arguments = [_with_home(argument) for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:
        threading.excepthook = _thread_failed
    signal.signal(signal.SIGTERM, _terminate)
    _prepare_output()
    # When workers are ended in the middle, joblib's resource tracker may warn of semaphores that
    # are gone already; nothing is left behind, and it would be the last thing a user reads.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    status, line = 1, ""
    caught: Exception | None = None
    try:
        status = app(arguments, prog_name="kamim", standalone_mode=False) or 0
    except typer.Exit as stop:
        status = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except Terminated:
        status = 143
    except UserError as error:
        caught = error
        status, line = 2, str(error)
    except BuildError as error:
        caught = error
        line = str(error)
    except (OSError, MemoryError) as error:
        caught = error
        status, line = _of_system(error)
    except Exception as error:
        caught = error
        if isinstance(error, ModuleNotFoundError) and _is_missing(error.name or ""):
            status, line = 2, f"{error.name} is not installed; {install(error.name or '')}"
        elif hasattr(error, "format_message"):  # the command line's own errors of usage
            status, text = 2, error.format_message()
            if text.startswith("Usage: "):  # no command was given: the help, which is no error
                print(text, file=sys.stderr)
            else:
                line = f"{_plain(text, arguments)} (see --help)"
        else:
            status = 70
            line = f"a bug of kamim ({type(error).__name__}: {error}); report it with what follows"
            debug = True
    if status in {130, 143}:  # some versions of typer turn Ctrl-C into a plain 130 themselves
        more = "; what is finished is kept, the same command goes on"
        line = f"stopped{more if GO_ON & {*arguments[:2]} else ''}"
    if line:
        print(f"kamim: {line}", file=sys.stderr)
    if debug and caught:
        traceback.print_exception(caught)
    sys.exit(status)


if __name__ == "__main__":
    main()
