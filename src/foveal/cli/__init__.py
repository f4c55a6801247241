"""The command line: parse, call, print. Each command imports what it needs when it runs, so that help is quick.

Exit codes: 0 done, 1 a bug, 2 something in the settings, the data or the machine that the user can change,
130 stopped by Ctrl-C. FOVEAL_TRACEBACK=1 shows where an error comes from.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

# Before torch is loaded: OpenMP's threads sleep while they wait. Spinning, the default, is no faster in training and
# makes a small model's step ten times as long as soon as another program wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from foveal.cli import compare, demo, evaluate, explain, maps, predict, pretrain, supported, sweep, train
from foveal.cli.flags import Parser, UsageError

COMMANDS = {
    "demo": demo,
    "train": train,
    "compare": compare,
    "sweep": sweep,
    "maps": maps,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "predict": predict,
    "explain": explain,
    "supported": supported,
}

USAGE = {
    "demo": "foveal demo [--seeds N] [--out FOLDER] [--jobs N] [--again]",
    "train": "foveal train DATA [--config RECIPE] [--resume | --overwrite] [settings]",
    "compare": "foveal compare DATA [--mix MIX...] [--guide GUIDE...] [--label-fraction X...] [--seeds N] [settings]",
    "sweep": "foveal sweep DATA --guide GUIDE [--weights X...] [--seeds N] [--config RECIPE] [settings]",
    "maps": "foveal maps PHOTOS [--map MAP] [--model MODEL] [--masks FOLDER] [--out FOLDER] [settings]",
    "pretrain": "foveal pretrain DATA [--map MAP] [--config RECIPE] [--resume | --overwrite] [settings]",
    "evaluate": "foveal evaluate RUN [DATA] [--knn] [--linear] [--logistic] [--tokens T] [--block N...] [settings]",
    "predict": "foveal predict RUN IMAGES... [--top K] [--output FILE]",
    "explain": "foveal explain RUN IMAGES... [--discover [METHOD]] [--output FOLDER]",
    "supported": "foveal supported MODEL",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. argv: without the program's name, by default the process's own."""
    words = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _warn  # type: ignore[assignment]  # it takes any further arguments
    parser = _parser()
    try:
        values = parser.parse_args(words)
        run: Callable[..., int] | None = getattr(values, "run", None)
        if run is None:
            parser.print_help()
            return 0 if not words else 2
        return run(values)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except KeyboardInterrupt as stopped:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of processes that train together one speaks
            print(f"\n{stopped or 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # foveal predict ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _tell(error)


def _parser() -> Parser:
    from foveal import __version__

    parser = Parser(prog="foveal", description="Attention-guided learning for vision transformers.")
    parser.add_argument("--version", action="version", version=f"foveal {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        told = module.__doc__ or ""
        line = told.strip().splitlines()[0]
        module.declare(commands.add_parser(name, help=line, description=told, prog=f"foveal {name}", usage=USAGE[name]))
    return parser


def _tell(error: Exception) -> int:
    """Print what went wrong, in a line where the user can do something about it."""
    if os.environ.get("FOVEAL_TRACEBACK"):
        traceback.print_exception(error)
    expected = isinstance(error, ValueError | OSError) or _is_ours(error)
    kind = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else " (a bug? FOVEAL_TRACEBACK=1 shows where)"
    if isinstance(error, UsageError):
        hint = f" (see {error.command} --help)"
    print(f"foveal: {kind}{' '.join(str(error).split())}{hint}", file=sys.stderr)
    return 2 if expected else 1


def _warn(message: Warning | str, category: type[Warning], *_: object) -> None:
    """A warning as a line, without the place in the code."""
    print(f"foveal: {category.__name__}: {' '.join(str(message).split())}", file=sys.stderr)


def _is_ours(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "foveal"
