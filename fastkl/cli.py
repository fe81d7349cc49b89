"""The command `fastkl`."""

import argparse
import importlib.util
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

import fastkl
from fastkl import backends, demo

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Packages that the extra `demo` installs. Only `fastkl demo` needs them, so they are not imported
# at the top of this file.
_EXTRA = ("rich", "matplotlib")

# argparse's own exit code for a command line that it rejects.
_USAGE = 2
_FAILURE = 1
# The exit code that shells give a program ended by Ctrl-C (signal 2): 128 + 2.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program's name; by default the process's.

    Returns
    -------
    int
        0 if all went well, 1 if the work failed or its output could not be written, 2 if the work
        could not be started as requested, 130 if it was interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # If stdout's encoding has no ‖, write "?" rather than fail. stderr never fails that way.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return _run(argv)
        finally:
            # Flush here, where a write error is handled, rather than when Python exits.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does when it has read enough lines.
        _drop(sys.stdout)
        return _FAILURE
    except OSError as error:
        _drop(sys.stdout)
        return _complain(error, _FAILURE)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.command == "backends":
        return _backends()
    return _demo(arguments.seed, arguments.backend, arguments.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastkl",
        description="KL divergence between a language model and its circuits, from logits.",
    )
    parser.add_argument("--version", action="version", version=f"fastkl {fastkl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    commands.add_parser(
        "backends",
        help="list the backends, what is missing to run them, and which are chosen",
        description=(
            "List the backends, what is missing to run them on this machine, and which of them "
            "measures float32 logits here, where a call names none."
        ),
    )

    demo_command = commands.add_parser(
        "demo",
        help="train a small transformer and measure the KL of its circuits",
        description=(
            "Train a small attention-only transformer to copy from its context, rank its heads by "
            "ablation, run circuits of the most important ones, and measure the KL divergence of "
            "each from the full model. Takes about a minute on one core and downloads nothing. Writes "
            "kl_curve.png and kl_curve.json."
        ),
    )
    demo_command.add_argument(
        "--seed", type=_seed, default=0, help="seed of the weights and prompts (default: 0)"
    )
    demo_command.add_argument(
        "--backend",
        help="a backend that `fastkl backends` lists (default: the fastest that can run)",
    )
    demo_command.add_argument(
        "--out",
        type=_folder,
        default=Path(),
        metavar="FOLDER",
        help="where to write the files, created if need be (default: the current folder)",
    )
    return parser


def _seed(text: str) -> int:
    """Parse a seed that torch.Generator.manual_seed accepts."""
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2^63 - 1, got {text}")
    return seed


def _folder(text: str) -> Path:
    """Parse a folder's name; refuse an empty one (an unset variable) instead of using "."."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got an empty text")
    return Path(text)


def _backends() -> int:
    missing = fastkl.unavailable_backends()
    width = max(map(len, backends.NAMES))
    for name in backends.NAMES:
        print(f"{name:{width}}  {missing.get(name, 'can run here')}")
    print()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    code = _FAILURE
    for device in devices:
        try:
            chosen = _chosen(device)
            # One device is enough: FASTKL_BACKEND may name a GPU-only backend if there is a GPU.
            code = 0
        except (RuntimeError, ValueError) as error:
            chosen = f"none: {error}"
        print(f"{device.upper()} tensors: {chosen}")
    return code


def _chosen(device: str) -> str:
    """Name the backend for logits on a device; raise what `choose` raises if none can run."""
    with warnings.catch_warnings():
        # No warning is needed: the list above says what is missing, and nothing is measured here.
        warnings.simplefilter("ignore")
        chosen = backends.choose(None, torch.device(device), torch.float32).NAME
    variable = backends.ENVIRONMENT_VARIABLE
    return f"{chosen} ({variable})" if os.environ.get(variable) else chosen


def _demo(seed: int, backend: str | None, out: Path) -> int:
    # Before the training, check everything that could make the job fail.
    try:
        _check_extra()
        place = demo.pick_place(backend)
        _check_out(out)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _complain(error, _USAGE)

    from rich.console import Console  # noqa: PLC0415

    console = Console(highlight=False)
    console.print("Training a small transformer to copy from its context, then ablating its heads.")
    try:
        result = demo.run(seed, place)
    except demo.NotLearnedError as error:
        return _complain(error, _FAILURE)
    # Write the files before printing, so that no results are lost if printing fails.
    try:
        names = _write_files(result, out)
    except OSError as error:
        return _complain(f"cannot write to the folder {out}: {_reason(error)}", _FAILURE)
    _show(result, console)
    # A folder's name may hold brackets, which rich would take for markup.
    console.print(f"Wrote {' and '.join(names)}", soft_wrap=True, markup=False)
    return 0


def _check_extra() -> None:
    """Raise ModuleNotFoundError, saying what to install, if a package of the extra is missing."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'fastkl demo needs {" and ".join(missing)}: from a clone, pip install -e ".[demo]"'
        )


def _check_out(folder: Path) -> None:
    """Create the folder if need be; raise OSError if no file can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"--out must be a folder: {error.filename} is a file") from error
    except OSError as error:
        raise OSError(f"--out: cannot create the folder {folder}: {_reason(error)}") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out: cannot write to the folder {folder}: {_reason(error)}") from error


def _show(result: demo.Result, console: "Console") -> None:
    """Print the tables, then the heads of each role."""
    training = result.training
    console.print(
        f"After {training.steps} steps, {training.seconds:.0f} s, its {len(result.heads)} heads "
        f"copy {training.accuracy:.1%} of held-out tokens.\n"
    )

    console.print("[bold]Layers[/bold], each ablated alone")
    layers = _table("layer", "KL (nats)")
    for layer, kl in result.layers:
        layers.add_row(f"L{layer}", _nats(kl))
    console.print(layers)

    console.print("[bold]Heads[/bold], each ablated alone, and what they attend to")
    heads = _table("head", "KL (nats)", "induction", "previous token")
    heads.add_column("role")
    for head in result.heads:
        scores = (f"{head.induction:.2f}", f"{head.previous_token:.2f}")
        heads.add_row(head.name, _nats(head.kl), *scores, head.role)
    console.print(heads)

    console.print("[bold]Circuits[/bold], the first n of these heads and all others ablated")
    circuits = _table("last added", "size", "KL (nats)", "top-1 agreement")
    added = ("none", *(head.name for head in result.heads))
    for row in zip(added, result.sizes, result.kl, result.agreement, strict=True):
        name, size, kl, share = row
        circuits.add_row(name, str(size), _nats(kl), f"{share:.1%}")
    console.print(circuits)

    console.print(
        f"KL(full model ‖ circuit), a mean over {result.rows} predictions among {result.n_vocab} "
        f"tokens, by fastkl.measure_kl_div (backend {result.backend} on {result.device})."
    )
    for role, score in (("induction", "induction"), ("previous token", "previous_token")):
        found = [f"{h.name} ({getattr(h, score):.2f})" for h in result.heads if h.role == role]
        console.print(f"{role.capitalize()} heads: {', '.join(found) or 'none found'}")


def _table(name: str, *numbers: str) -> "Table":
    from rich.table import Table  # noqa: PLC0415

    table = Table()
    table.add_column(name)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _nats(kl: float) -> str:
    if kl == 0:
        return "0 exactly"
    return f"{kl:.4f}" if kl >= 1e-3 else f"{kl:.1e}"


def _write_files(result: demo.Result, folder: Path) -> tuple[str, str]:
    """Write kl_curve.png and kl_curve.json to a folder; return their names."""
    from fastkl.plot import kl_curve  # noqa: PLC0415

    as_json, as_png = folder / "kl_curve.json", folder / "kl_curve.png"
    as_json.write_text(result.to_json(), encoding="utf-8")
    figure = kl_curve(
        result.sizes,
        result.kl,
        result.agreement,
        added=[head.name for head in result.heads],
        title=f"How many heads does copying take? (fastkl demo, seed {result.seed})",
    )
    figure.savefig(as_png)
    return str(as_png), str(as_json)


def _complain(error: Exception | str, code: int) -> int:
    try:
        print(f"fastkl: error: {error}", file=sys.stderr)
    except OSError:
        # The message cannot be shown; the exit code still reports the failure.
        _drop(sys.stderr)
    return code


def _reason(error: OSError) -> str:
    """Return the system's message, without the error number and the file's name."""
    return error.strerror or str(error)


def _drop(stream: TextIO | None) -> None:
    """Redirect a stream to the null device, so that its buffer does not fail again at exit."""
    try:
        number = stream.fileno() if stream else None
    except OSError:
        # The caller has replaced the stream by an object without a file descriptor.
        number = None
    if number is not None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), number)
