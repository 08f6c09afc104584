"""The command line. Heavy packages are imported inside the commands, so that ``--help`` answers at once."""

import codecs
import json
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from memory_bench.errors import UserError
from memory_bench.files.plain import odd, shortened
from memory_bench.running.environment import cache_folder as _cache
from memory_bench.running.environment import data_folder as _data_folder
from memory_bench.running.environment import hub_allowed as _hub

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Models = Annotated[
    str, typer.Option(help="Comma-separated models, e.g. hmt,rmt,mplus, hmt[recall_query=current-half] or my_model.py.")
]
Tasks = Annotated[str, typer.Option(help="Comma-separated tasks, e.g. pg19,pubmedqa.")]
Backbone = Annotated[
    str, typer.Option(help="tiny, smollm2-135m, a folder or a hub id; default: what suits the machine.")
]
BudgetName = Annotated[
    str,
    typer.Option(
        "--budget",
        help="A preset (list budgets) or TOML file; more: a,b[device_bytes=1GB].",
    ),
]
Seeds = Annotated[str, typer.Option(help="How many seeds (3), or which (0,1,7); default: the budget's.")]
Suite = Annotated[str, typer.Option(help="A named suite or a TOML file with any of these options.")]
Data = Annotated[Path | None, typer.Option(help="Folder with real data (also MEMORY_BENCH_DATA).")]
NoStandIns = Annotated[bool, typer.Option("--no-stand-ins", help="Refuse stand-in data.")]
Out = Annotated[Path | None, typer.Option(help="Where results go; the same folder continues a run.")]
Limit = Annotated[
    str, typer.Option(help="Documents (language modelling) or questions per task: 8, or pg19=3,pubmedqa=9.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="An option of a model or task: hmt.segment=64.")]
NoControls = Annotated[bool, typer.Option("--no-controls", help="Leave out control models and control readings.")]
ExecutorName = Annotated[str, typer.Option("--executor", help="local (a process per cell), inline, ray or slurm.")]
Every = Annotated[
    str, typer.Option(help="Keep trainings on their way, every 500 optimiser steps or every 10m; default: never.")
]
Processes = Annotated[
    str, typer.Option(help="Processes that train each model together, on a GPU each (2); default: one.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Mlflow = Annotated[
    str | None,
    typer.Option(metavar="[URI]", help="Also show the results in MLflow: a server, or alone a database in --out."),
]


class Run(TyperCommand):
    """A command whose ``--mlflow`` may stand alone, which Typer's options cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a lonely ``--mlflow`` the empty value."""
        alone = [a == "--mlflow" and "".join(args[n + 1 : n + 2])[:1] in ("", "-") for n, a in enumerate(args)]
        return super().parse_args(ctx, [f"{a}=" if lonely else a for a, lonely in zip(args, alone, strict=True)])


@app.command(cls=Run)
def run(
    models: Models = "",
    tasks: Tasks = "",
    backbone: Backbone = "",
    budget: BudgetName = "",
    seeds: Seeds = "",
    suite: Suite = "",
    data: Data = None,
    no_stand_ins: NoStandIns = False,
    out: Out = None,
    limit: Limit = "",
    settings: Settings = None,
    no_controls: NoControls = False,
    executor: ExecutorName = "local",
    checkpoint_every: Every = "",
    processes: Processes = "",
    ray_address: Annotated[
        str, typer.Option("--ray-address", help="A running Ray cluster: HOST:PORT or auto; default: one is started.")
    ] = "",
    retry: Annotated[str, typer.Option(help="`failed`: run failed cells again.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Run every cell again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `plan`.")] = False,
    mlflow: Mlflow = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train what must be trained, evaluate, write results and a report; repeat the command to continue.

    Example: memory-bench run --models hmt,rmt,mplus --tasks pg19,pubmedqa
    """
    from memory_bench.command import commands
    from memory_bench.running.options import Options

    options = Options(
        models, tasks, backbone, budget, seeds, suite, _data_folder(data), not no_stand_ins, out, limit,
        tuple(settings or ()), not no_controls, executor, retry, force, quiet, as_json, _cache(), _hub(), mlflow,
        checkpoint_every, ray_address, processes,
    )  # fmt: skip
    try:
        code = commands.plan(options) if dry_run else commands.run(options)
    except KeyboardInterrupt:
        typer.echo("Interrupted. Finished cells are kept; the same command continues.", err=True)
        code = 130
    raise typer.Exit(code)


@app.command()
def plan(
    models: Models = "",
    tasks: Tasks = "",
    backbone: Backbone = "",
    budget: BudgetName = "",
    seeds: Seeds = "",
    suite: Suite = "",
    data: Data = None,
    no_stand_ins: NoStandIns = False,
    out: Out = None,
    limit: Limit = "",
    settings: Settings = None,
    no_controls: NoControls = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what `run` would do: cells, tokens, FLOPs, memory, time. Trains nothing.

    Example: memory-bench plan --models hmt,rmt --tasks pg19
    """
    from memory_bench.command import commands
    from memory_bench.running.options import Options

    options = Options(
        models, tasks, backbone, budget, seeds, suite, _data_folder(data), not no_stand_ins, out, limit,
        tuple(settings or ()), not no_controls, "local", "", False, quiet, as_json, _cache(), _hub(),
    )  # fmt: skip
    raise typer.Exit(commands.plan(options))


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="models, tasks, backbones, budgets, suites or reported.")],
    grep: Annotated[str, typer.Option(help="Only lines with this text.")] = "",
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Show what there is, one line each.

    Example: memory-bench list models
    """
    from memory_bench.command import listing

    rows = listing.rows(what, _data_folder(data), _cache())
    rows = [row for row in rows if grep.lower() in json.dumps(row, ensure_ascii=False).lower()]
    typer.echo(json.dumps(rows, indent=1, ensure_ascii=False) if as_json else listing.text(rows))


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="The --out folder of a run.")],
    group_by: Annotated[
        str, typer.Option(help="Put rows together by an axis of their memory: unit, capacity, write, read, inject …")
    ] = "",
    quiet: Quiet = False,
) -> None:
    """Rebuild tables, plots and the page from the records alone.

    Example: memory-bench report results/runs/latest
    """
    from memory_bench.command import commands

    raise typer.Exit(commands.report(out, quiet=quiet, axis=group_by, cache=_cache()))


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(help="Models of one run, or folders of runs.")],
    out: Annotated[Path, typer.Option(help="The run whose models are compared.")] = Path("results/runs/latest"),
    as_json: AsJson = False,
) -> None:
    """Paired, clustered, Holm-corrected differences between models of one run or between runs.

    Example: memory-bench compare hmt rmt --out results/runs/latest
    """
    from memory_bench.command import commands

    raise typer.Exit(commands.compare(names, out, as_json=as_json))


@app.command()
def check(
    out: Annotated[Path, typer.Argument(help="The --out folder of a run.")],
    against: Annotated[Path | None, typer.Option(help="A reference file.")] = None,
    write: Annotated[Path | None, typer.Option(help="Make a reference file of the run (clean tree, 3 seeds).")] = None,
    tolerance: Annotated[list[str] | None, typer.Option(help="accuracy=0.05, or a TOML file of such lines.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a table for a pull request.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML.")] = None,
    as_json: AsJson = False,
) -> None:
    """The regression gate: 0 the run holds against the reference, 1 something is worse, 2 not comparable.

    Example: memory-bench check results/runs/latest --against results/reference/smoke-cpu.jsonl
    """
    from memory_bench.gate import command as checking

    raise typer.Exit(
        checking.check(
            out, against=against, write=write, tolerances=tolerance or [], markdown=markdown, junit=junit,
            as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def verify(
    cases: Annotated[
        list[Path] | None, typer.Argument(help="Case folders, or folders of cases; default: shipped.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write certificates.json beside the shipped cases.")] = False,
    as_json: AsJson = False,
) -> None:
    """Replay reference vectors of the official implementations.

    Example: memory-bench verify
    """
    from memory_bench.command import commands

    raise typer.Exit(commands.verify(cases or [], write=write, as_json=as_json))


@app.command()
def reproduce(
    claims: Annotated[list[str] | None, typer.Argument(help="C1, P6 …; default: all.")] = None,
    seeds: Annotated[str, typer.Option(help="How many seeds, or which; fewer than 5 decide nothing. Default: 5.")] = "",
    data: Data = None,
    out: Out = None,
    executor: ExecutorName = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it would cost; run nothing.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Test published claims on this machine; prints reported beside reproduced. Repeat the command to continue.

    Example: memory-bench reproduce C1 P6 --data DIR
    """
    from memory_bench.reproduce.command import reproduce
    from memory_bench.running.options import Options

    options = Options(
        "", "", "", "", seeds, "", _data_folder(data), False, out, "",
        (), False, executor, "", False, quiet, as_json, _cache(), _hub(),
    )  # fmt: skip
    try:
        code = reproduce(claims or [], options, dry_run=dry_run)
    except KeyboardInterrupt:
        typer.echo("Interrupted. Finished cells are kept; the same command continues.", err=True)
        code = 130
    raise typer.Exit(code)


@app.command("lm-eval", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def lm_eval(
    arguments: Annotated[list[str] | None, typer.Argument(help="Of lm-eval's own command.")] = None,
    print_include_path: Annotated[
        bool, typer.Option("--print-include-path", help="Print the folder of our tasks for lm-eval.")
    ] = False,
) -> None:
    """lm-evaluation-harness with our models and tasks: what follows goes to its own command, exit codes are its own.

    Example: memory-bench lm-eval run --model memory-bench --model_args model=rmt,run=OUT --tasks mb_pg19
    """
    from memory_bench.lm_eval import include_path

    if print_include_path:
        typer.echo(include_path())
        return
    from memory_bench.lm_eval.command import command

    raise typer.Exit(command(arguments or []))


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="books, pubmedqa, tiny, smollm2-135m …; default: all.")
    ] = None,
    data: Data = None,
    no_stand_ins: NoStandIns = False,
) -> None:
    """Download and pin data and backbones beforehand.

    Example: memory-bench fetch books smollm2-135m
    """
    from memory_bench.command import commands

    raise typer.Exit(commands.fetch(names or [], _data_folder(data), _cache(), stand_ins=not no_stand_ins, hub=_hub()))


@app.command()
def sync(
    what: Annotated[str, typer.Argument(help="mlflow.")],
    out: Annotated[Path, typer.Argument(help="The --out folder of a run.")],
    uri: Annotated[str, typer.Option(help="A server (http://…) or database (sqlite:///…); default: in OUT.")] = "",
) -> None:
    """(Re)build the MLflow view of a run from its records; repeating it changes nothing.

    Example: memory-bench sync mlflow results/runs/latest --uri http://127.0.0.1:5000
    """
    from memory_bench.mlflow import sync as mlflow_sync

    raise typer.Exit(mlflow_sync.command(what, out, uri))


@app.command()
def doctor(data: Data = None) -> None:
    """Show what this machine can run: devices, memory, data sources, extras.

    Example: memory-bench doctor
    """
    from memory_bench.command import commands

    raise typer.Exit(commands.doctor(_data_folder(data), _cache(), hub=_hub()))


def main(arguments: list[str] | None = None) -> Any:
    """Entry of the command: user mistakes become one sentence and exit code 2."""
    codecs.register_error("spelled", _spelled)
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal or pipe of another character set still gets every table
        sys.stdout.reconfigure(errors="spelled")
    try:
        for argument in sys.argv[1:] if arguments is None else arguments:
            if fault := odd(argument):
                raise UserError(f"The argument {argument!a} {fault}: arguments must be UTF-8.")
        return app(args=arguments, standalone_mode=True)
    except UserError as error:
        problem = str(error)
    except Exception as error:
        problem = _told(error)
    typer.echo(f"Error: {problem}", err=True)
    sys.exit(2)


def _told(error: Exception) -> str:
    """The sentence for an error that is the machine's or of a path that was given; others are raised on."""
    from memory_bench.running.faults import fault

    if why := fault(error):
        return f"This machine is in the way: {why}. The same command goes on when it is mended."
    if (
        isinstance(error, OSError) and error.filename is not None
    ):  # of a path that was given; those of our own making are explained where they are used
        return f"Cannot use {shortened(str(error.filename), 200)}: {error.strerror or error}."
    raise error


SPELLED = {"Δ": "d", "−": "-", "–": "-", "—": "-", "±": "+/-", "·": ".", "…": "...", "×": "x", "²": "^2", "≥": ">=",
           "≤": "<=", "→": "->", "’": "'", "“": '"', "”": '"'}  # fmt: skip


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """What stands in a character set without our signs for those it lacks; all others are escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


if __name__ == "__main__":
    main()
