"""scanside: haemorrhage on head CT, segmented beside the scanner while the slices still arrive.

Research use only; not a medical device. The model that ships has been trained on synthetic phantoms alone.

More lines than other modules have, on purpose: every command of the contract stands here, thin, with its options.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from dicom_node.operation.commands import ConfigFile, Days, Json, alerts, end, err, out, outbox
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import click


class _Bench(TyperGroup):
    """The commands of `benchmarks`, of which nothing is loaded before one is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return self._commands().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._commands().get_command(ctx, cmd_name)

    @staticmethod
    def _commands() -> click.Group:
        from benchmarks.commands import app as commands

        return typer.main.get_group(commands)


app = typer.Typer(
    help=__doc__.rpartition("\n\n")[0], no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False
)
app.add_typer(outbox, name="outbox")
app.add_typer(alerts, name="alerts")
app.add_typer(
    typer.Typer(cls=_Bench, no_args_is_help=True), name="bench", help="How fast, against the limit and against peers."
)
bundles = typer.Typer(help="A model bundle: what it is, who vouches for it.", no_args_is_help=True)
app.add_typer(bundles, name="bundle")

BundleFolder = Annotated[Path | None, typer.Option(help="Model bundle; default: the one that ships.")]
BundleArgument = Annotated[Path | None, typer.Argument(help="A bundle; default: the one that ships.")]
SampleFolder = Annotated[
    Path | None,
    typer.Argument(
        help="DICOM series, or .npz with hu, spacing_mm and thickness_mm; may be left out of a bundle that was trained "
        "on phantoms: then they are phantoms never seen."
    ),
]
PhantomHeads = Annotated[int, typer.Option(min=3, help="How many phantoms, where no samples are named.")]
Seed = Annotated[int, typer.Option(min=0, help="Another head.")]
Lesions = Annotated[
    list[str] | None,
    typer.Option("--lesion", help="CLASS:MILLILITRES, several times: ich, sdh, edh, sah, ivh, cc (contusion)."),
]


def _tell_version(asked: bool) -> None:  # typer calls it so
    if asked:
        from importlib.metadata import version

        out.print(version("scanside"), highlight=False)
        raise typer.Exit


@app.callback()
def _set_up(
    version: Annotated[  # noqa: ARG001  # told by its callback
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="The version, and nothing else.")
    ] = False,
) -> None:
    """Keep what is logged away from stdout: that is for results."""
    from dicom_node.monitoring import log

    log.configure("warning", "auto")


def main() -> None:
    """Run the command line: a user's error is one line, a bug is a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name not in RESEARCH:
            raise
        end(f"{error.name} is not installed: in scanside's checkout, pip install '.[train,export]'", 3)
    except ScansideError as error:
        end(str(error), error.exit_code)
    except OSError as error:
        # about a file: the machine's fault or the user's. Writing to a full disk fails without the file's name
        if error.filename is None and error.errno not in DISK_FULL:
            raise
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        end(f"{place}{error.strerror}; {REMEDIES.get(error.errno or 0, 'name another path')}", 3)


RESEARCH = {"torch", "onnx", "onnxscript", "matplotlib", "nibabel", "pycocotools", "monai", "einops"}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
REMEDIES = {
    errno.ENOTDIR: "there is a file where a folder should be: name another path",
    errno.EEXIST: "there is a file where a folder should be: name another path",
    errno.EACCES: "name a path that you may use, or change its permissions",
    errno.EPERM: "name a path that you may use, or change its permissions",
    errno.EROFS: "name a path on a disk that can be written",
    **dict.fromkeys(DISK_FULL, "make room, or name a path on another disk"),
}


# the service


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--out", help="Where everything goes; an earlier demo there is replaced.")
    ] = Path("scanside-demo"),
    lesions: Lesions = None,
    slices: Annotated[int, typer.Option(min=5, help="Slices of the phantom.")] = 40,
    tilt: Annotated[float, typer.Option(help="Gantry tilt in degrees.")] = 0.0,
    seed: Seed = 1,
    rate: Annotated[float, typer.Option(min=0.1, help="Slices a second that the scanner pushes.")] = 20.0,
    as_json: Json = False,
) -> None:
    """Push a phantom head with a bleed through a node into a local PACS, and show what came out."""
    from dicom_node.operation import tables
    from dicom_node.simulation import demo as demonstration
    from dicom_node.simulation.phantom import write
    from training.lesions import Lesion
    from training.phantom import Scan, make

    def say(text: str) -> None:
        if not as_json:
            err.print(text, highlight=False)

    blood = tuple(Lesion.parse(text) for text in lesions or ("ich:30", "sdh:14"))
    scan = Scan(slices=slices, tilt_deg=tilt)
    demonstration.prepare(folder)
    say(f"a phantom head with {', '.join(f'{one.volume_ml:g} ml {one.name}' for one in blood)} (synthetic, no patient)")
    phantom = make(blood, scan, seed=seed)
    images = write(phantom.slices, folder / "scan", tilt_deg=tilt)
    told = demonstration.run(images, phantom.truth_ml, folder, rate=rate, say=say)
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        tables.show_demo(told, out)
    raise typer.Exit(0 if told["ok"] else 1)


@app.command()
def serve(config: ConfigFile) -> None:
    """Run the node until it is told to stop (SIGTERM or Ctrl-C); SIGHUP has the configuration read again."""
    from dicom_node.service import Service

    Service(config).run()


@app.command()
def page(config: ConfigFile) -> None:
    """Serve the triage page of a node's folder by itself; `serve` does so too where `page.port` is set."""
    from dicom_node.configuration import config as configuration
    from dicom_node.monitoring import log as logging
    from dicom_node.page import server

    settings = configuration.load(config)
    logging.configure(settings.log.level, settings.log.format)
    with server.listen(settings) as listening:
        scheme, port = "https" if settings.page.tls else "http", listening.getsockname()[1]
        err.print(f"the triage page: {scheme}://{settings.page.address}:{port}/", highlight=False)
        server.serve(settings, listening)


@app.command("page-password")
def page_password(name: Annotated[str, typer.Argument(help="Whoever logs in by it.")]) -> None:
    """Ask for a password and print a line for the file that `page.users` names; the password stands in it hashed."""
    from dicom_node.page.login import make_line

    if sys.stdin.isatty():
        password = typer.prompt(f"password of {name}", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    print(make_line(name, password))


@app.command()
def check(config: ConfigFile, as_json: Json = False) -> None:
    """Look at everything the node needs: configuration, disk, port, destinations, model. Every fault at once."""
    from dicom_node.configuration import config as configuration
    from dicom_node.operation import check as checks

    _hush_peers()
    items = checks.check(*configuration.examine(config))
    if as_json:
        print(json.dumps([{"name": i.name, "ok": i.ok, "kind": i.kind, "message": i.message} for i in items], indent=2))
    else:
        marks = {True: ("ok", "green"), False: ("fault", "bold red"), None: ("warning", "yellow")}
        for item in items:
            mark, style = marks[item.ok]
            out.print(f"{mark:>7}", style=style, end="  ")
            out.print(f"{item.name}: {item.message}", highlight=False)
    faults = {item.kind for item in items if item.ok is False}
    codes = {"configuration": 2, "environment": 3, "finding": 1}  # what has to be mended first comes first
    raise typer.Exit(next((code for kind, code in codes.items() if kind in faults), 0))


@app.command()
def conformance() -> None:
    """Print the DICOM conformance statement: what the node takes, sends and answers (docs/conformance.md)."""
    from dicom_node.operation import conformance as statement

    print(statement.compose(), end="")


@app.command("config")
def config_(
    example: Annotated[
        bool, typer.Option("--example", help="A commented file with every key and its default.")
    ] = False,
    show: Annotated[Path | None, typer.Option(help="A file as it is understood, environment included.")] = None,
) -> None:
    """Print a configuration."""
    from dicom_node.configuration import config as configuration
    from dicom_node.configuration import toml

    if example == (show is not None):
        raise typer.BadParameter("give either --example or --show FILE")
    print(toml.example() if example else toml.show(configuration.load(show)), end="")


@app.command()
def status(config: ConfigFile, days: Days = 1.0, as_json: Json = False) -> None:
    """What became of each series, what is arriving, and whether the node runs."""
    import dataclasses

    from dicom_node import status as looks
    from dicom_node.configuration import config as configuration
    from dicom_node.operation import tables

    told = looks.look(configuration.load(config), days)
    if as_json:
        print(json.dumps(dataclasses.asdict(told), indent=2))
    else:
        tables.show_status(told, out)


# the same without a network, and what stands around it


@app.command()
def analyse(
    folder: Annotated[Path, typer.Argument(help="DICOM files, any depth.")],
    target: Annotated[Path, typer.Option("--out", help="Results, one folder per series.")],
    config: Annotated[
        Path | None,
        typer.Option(help="The node's: its bundle, rules, limits and results hold. Default: the usual ones."),
    ] = None,
    bundle: BundleFolder = None,
    precision: Annotated[
        str | None,
        typer.Option(help="auto, fp32, or one that `scanside verify` has passed; default: the configuration's, auto."),
    ] = None,
    min_slices: Annotated[int | None, typer.Option(min=1, help="A series with fewer is not analysed (5).")] = None,
    as_json: Json = False,
) -> None:
    """Analyse a folder as the node would, without a network; report.html and montage.png need no viewer."""
    from dicom_node import folder as folders
    from dicom_node.analysis.analyser import Analyser
    from dicom_node.configuration import config as configuration
    from dicom_node.configuration.triton import servers
    from dicom_node.operation import tables
    from dicom_node.page import offline
    from dicom_node.page.palette import Palette
    from dicom_node.results.result_set import Form
    from runtime.bundle import open_bundle
    from runtime.session import open_session, self_test
    from runtime.triage import Rule

    series, others = folders.find(folder)
    said = configuration.load(config) if config else configuration.Config()
    opened = open_bundle(bundle or said.model.bundle, said.model.trusted_keys)
    told = said.model_dump(mode="json", include={"results", "codes"})
    form = Form.of(told["results"], told["codes"], opened.classes)
    session = open_session(
        opened,
        said.model.backend,
        precision=precision or said.model.precision,
        threads=said.model.threads,
        plans=said.model.plans,
        servers=servers(said.triton and said.triton.model_dump()),
    )
    self_test(session, opened)
    folders.prepare(target)
    analyser = Analyser(
        opened,
        session,
        [Rule(**rule.model_dump()) for rule in said.triage],
        min_slices=min_slices or said.series.min_slices,
        min_coverage_mm=said.series.min_coverage_mm,
        max_lossy_ratio=said.series.max_lossy_ratio,
        bone_kernels=said.series.bone_kernels,
        max_batch=said.model.max_batch or session.max_batch,
        form=form,
    )
    with _progress("images", sum(map(len, series.values()))) as advance:
        done = folders.analyse(analyser, series, target, advance)
    session.close()
    look = {"palette": Palette.of(said.codes), "hide_names": said.page.hide_names}
    for one, paths in zip(done, series.values(), strict=True):
        if one.outcome.report:
            report = json.loads((one.folder / "report.json").read_text())
            offline.write(paths, one.folder, report, one.series_uid, **look)
    told = [_told(one) for one in done]
    if as_json:
        engine = {"backend": session.identity.backend, "precision": session.identity.precision, "why": session.why}
        print(json.dumps({"engine": engine, "series": told, "not_dicom": [str(path) for path in others]}, indent=2))
    else:
        for one in told:
            tables.show_series(one, out)
        out.print(
            f"engine: {session.identity.backend}, {session.identity.precision}; {session.why}",
            style="dim",
            highlight=False,
        )
        _show_others("left alone", others)
    raise typer.Exit(1 if any(one["state"] == "failed" for one in told) else 0)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="DICOM files.")],
    address: Annotated[str, typer.Argument(help="HOST:PORT of a storage SCP.")],
    calling: Annotated[str, typer.Option(help="AE title of this scanner.")] = "SCANNER",
    called: Annotated[str, typer.Option(help="AE title of the node.")] = "SCANSIDE",
    rate: Annotated[float | None, typer.Option(min=0.01, help="Slices a second; default: as fast as it goes.")] = None,
    as_json: Json = False,
) -> None:
    """Send a folder as a scanner does: one association, slice after slice, at a pace."""
    from dicom_node.simulation import scanner

    def show(sent: scanner.Sent) -> None:
        if not as_json:
            answer = f"stored {sent.response_ms:7.1f} ms" if sent.is_stored else f"FAILED {sent.reason}"
            out.print(f"{sent.path.name}  {answer}", highlight=False)

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise typer.BadParameter(f"{address!r} is not HOST:PORT")
    _hush_peers()
    report = scanner.push([folder], (host, int(port)), calling_ae=calling, called_ae=called, rate=rate, on_slice=show)
    times = {f"p{p}": report.response_ms(p) for p in (50, 95, 100)} if report.sent else {}
    if as_json:
        told = {
            "sent": len(report.sent),
            "failed": [{"path": str(each.path), "reason": each.reason} for each in report.failed],
            "skipped": [{"path": str(path), "reason": reason} for path, reason in report.skipped],
            "push_s": report.seconds,
            "response_ms": times,
        }
        print(json.dumps(told, indent=2))
    else:
        for path, reason in report.skipped:
            if reason != scanner.NO_DICOM:
                out.print(f"not sent: {path}: {reason}", style="yellow", highlight=False)
        _show_others("not sent", [path for path, reason in report.skipped if reason == scanner.NO_DICOM])
        response = ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())
        out.print(
            f"{len(report.sent)} stored, {len(report.failed)} failed in {report.seconds:.2f} s; response ms: {response}"
        )
    raise typer.Exit(1 if report.failed else 0)


@app.command()
def phantom(
    target: Annotated[Path, typer.Argument(help="Folder for the series; must be new or empty.")],
    lesions: Lesions = None,
    slices: Annotated[int | None, typer.Option(help="How many; default: what covers the brain.")] = None,
    spacing: Annotated[
        str | None, typer.Option(help="Slice thickness in mm; several, with commas, change it on the way up: 4,7.")
    ] = None,
    tilt: Annotated[float, typer.Option(help="Gantry tilt in degrees.")] = 0.0,
    seed: Seed = 1,
    matrix: Annotated[int, typer.Option(min=64, max=2048, help="Rows and columns.")] = 512,
    hard: Annotated[
        bool, typer.Option(help="With motion, metal, decoys, old bleeds, pale blood: by the seed.")
    ] = False,
    enhanced: Annotated[bool, typer.Option("--enhanced", help="One Enhanced CT, each slice a frame of it.")] = False,
) -> None:
    """Write a synthetic head CT as a DICOM series, with truth.json (ml per class) and truth.npz (masks) beside it."""
    import numpy as np

    from dicom_node.simulation import enhanced as multi_frame
    from dicom_node.simulation import phantom as single_frame
    from training.lesions import CLASSES, Lesion, PhantomError
    from training.phantom import Scan, make

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PhantomError(f"{target} is not empty: choose another folder")
    try:
        thickness = tuple(float(part) for part in spacing.split(",")) if spacing else ()
    except ValueError:
        raise PhantomError(f"--spacing {spacing!r}: write millimetres, such as 5 or 4,7") from None
    scan = Scan(thickness, slices=slices, tilt_deg=tilt, matrix=matrix)
    wanted = tuple(Lesion.parse(text) for text in lesions or ())
    target.mkdir(parents=True, exist_ok=True)
    made = make(wanted, scan, seed=seed, hard=hard)
    (multi_frame if enhanced else single_frame).write(made.slices, target, tilt_deg=tilt)
    count = len(made.slices)
    truth = {"volume_ml": made.truth_ml, "classes": CLASSES, "tilt_deg": tilt, "seed": seed, "slices": count}
    (target / "truth.json").write_text(json.dumps(truth, indent=2) + "\n")
    np.savez_compressed(target / "truth.npz", labels=made.labels)
    blood = ", ".join(f"{n} {ml:.1f} ml" for n, ml in made.truth_ml.items())
    out.print(f"{count} slices in {target}: {blood or 'no blood'}")


# from data to a bundle


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="TOML, such as training/recipes/phantom-unet.toml.")],
    run: Annotated[Path, typer.Option("--out", help="Checkpoints and curves; an interrupted run there goes on.")],
    data: Annotated[Path | None, typer.Argument(help="The data set's folder or file; phantoms need none.")] = None,
) -> None:
    """Train a network from a recipe, or go on with a run that was interrupted (needs the `train` extra)."""
    # idle OpenMP threads spin by default, and on few cores they take them from those that work: half the time a step;
    # so do numpy's BLAS threads where every core already makes a phantom
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from training import recipe as recipes
    from training import train as training

    out.print(f"best checkpoint: {training.train(recipes.load(recipe), run, data)}")


@app.command()
def models(as_json: Json = False) -> None:
    """List every architecture: parameters, cost, memory, and what its paper measured (needs the `train` extra)."""
    import torch

    from models import catalogue

    rows = []
    with _progress("architectures", len(catalogue.ARCHITECTURES)) as advance:
        for name, one in catalogue.ARCHITECTURES.items():
            try:
                with torch.device("meta"):  # shapes alone: no weights, no time
                    network = catalogue.build(name)
            except catalogue.CatalogueError as error:
                end(str(error), 3)
            sides = (256, 512) if one.dimensions == 2 else (96,)
            costs = {
                str(side): catalogue.inference_cost(network, (1, network.config.in_channels, *[side] * one.dimensions))
                for side in sides
            }
            rows.append(
                {
                    "name": name,
                    "dimensions": one.dimensions,
                    "parameters": catalogue.parameters(network),
                    "gflops": {side: round(gflops, 1) for side, (gflops, _) in costs.items()},
                    "activations_mib": {side: round(memory / 2**20) for side, (_, memory) in costs.items()},
                    "widths": one.widths,
                    "paper": one.paper,
                    "headline": one.headline,
                }
            )
            advance(1)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("name", "parameters", "GFLOPs", "MiB", caption="1 multiply-accumulate is 2 FLOPs; activations alone")
    for row in rows:
        table.add_row(
            row["name"], f"{row['parameters']:,}", *(_by_side(row[key]) for key in ("gflops", "activations_mib"))
        )
    out.print(table, soft_wrap=False)
    for row in rows:
        out.print(f"{row['name']}  {row['headline']}", highlight=False)
        out.print(f"    {row['paper']}", f"    widths: {row['widths']}", sep="\n", style="dim", highlight=False)
    out.print("Each paper measured on its own data: these figures are no ranking.")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="best.pt of a training run, or an ONNX network from elsewhere.")],
    bundle: Annotated[Path, typer.Option("--out", help="Folder of the new bundle.")],
    minimum_ml: Annotated[
        float, typer.Option(help="Operating point: smallest volume of a class that is a finding.")
    ] = 0.5,
    minimum_probability: Annotated[
        float, typer.Option(min=0, max=1, help="And its highest probability in a slice that shows it.")
    ] = 0.0,
    minimum_slices: Annotated[
        int, typer.Option(min=1, max=16, help="And so many neighbouring slices in a row have to show it.")
    ] = 1,
    contract: Annotated[Path | None, typer.Option(help="TOML that says what an ONNX network sees and answers.")] = None,
) -> None:
    """Turn a checkpoint into a bundle: ONNX, golden slices, parity with PyTorch (needs the `export` extra)."""
    from export import bundle as bundles
    from export import foreign
    from runtime.types import OperatingPoint
    from training import recipe as recipes
    from training.heads import golden_slices
    from training.train import load_checkpoint

    if (checkpoint.suffix == ".onnx") != (contract is not None):
        raise typer.BadParameter("an ONNX network and its --contract go together: give both or neither")
    if contract is None:
        said, graph, learnt_from = load_checkpoint(checkpoint)
        model = None
    else:
        said, learnt_from = recipes.load(contract, recipes.Contract), "unknown"
        graph, model = foreign.surround(checkpoint, said)
    golden = golden_slices(said.input.view)
    point = OperatingPoint(minimum_ml, minimum_probability, minimum_slices)
    parity = bundles.write(said, graph, golden, bundle, point=point, learnt_from=learnt_from, model=model)
    out.print_json(data=parity)


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    data: Annotated[Path | None, typer.Argument(help="A data set with masks; left out: phantoms never seen.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe that says how the data is read and divided.")] = None,
    side: Annotated[str, typer.Option(help="Its part: test, validation, training or all.")] = "test",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for scores, table, cases and figures.")] = None,
    heads: Annotated[int | None, typer.Option(min=0, help="Phantoms with blood (60).")] = None,
    bleed_free: Annotated[int | None, typer.Option(min=0, help="Phantoms without (40).")] = None,
    hard: Annotated[bool, typer.Option(help="Phantoms that are hard to read.")] = False,
    seal: Annotated[bool, typer.Option(help="Keep scores and model card in the bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Score a bundle on cases whose truth is known (needs the `export` extra)."""
    from runtime import seal as sealing
    from runtime.bundle import open_bundle
    from runtime.session import open_session
    from training import card, collection
    from training import evaluate as evaluation
    from training import heads as phantoms
    from training import recipe as recipes

    if (data is None) != (recipe is None):
        raise typer.BadParameter("a data set and the recipe that reads it go together: give both or neither")
    if data is not None and (heads is not None or bleed_free is not None or hard):
        raise typer.BadParameter("--heads, --bleed-free and --hard are of phantoms: leave them out, or the data set")
    opened = open_bundle(bundle)
    if data is None or recipe is None:
        phantoms.check_classes(opened.classes)
        heads, bleed_free = 60 if heads is None else heads, 40 if bleed_free is None else bleed_free
        if heads + bleed_free == 0:
            raise typer.BadParameter("--heads 0 --bleed-free 0 leaves nothing to score")
        cases, total, source = phantoms.unseen(heads, bleed_free, hard=hard), heads + bleed_free, None
        kind = "hard synthetic phantoms" if hard else "synthetic phantoms"
        said = f"{kind} that no recipe trains on; they say nothing about human heads"
    else:
        read = recipes.load(recipe)
        listed = collection.side(read, data, side, opened)
        cases, total, source = (entry.load() for entry in listed), len(listed), read.data
        said = f"the {side} part of a data set, read by the recipe {read.name} {read.version}"
    session = open_session(opened, "onnxruntime")  # FP32: a plan in the user's cache is not what is scored
    scored = []
    with _progress("cases", total) as advance:
        for case in cases:
            scored.append(evaluation.score(case, collection.to_hu(case, source), opened, session))
            advance(1)
    summary = evaluation.summarise(scored, opened, session, said)
    if folder:
        evaluation.write(scored, summary, opened, folder)
    if seal:
        told = {"scores.json": json.dumps(summary, indent=2) + "\n", "MODEL_CARD.md": card.of_bundle(summary, opened)}
        was_signed = opened.is_signed
        sealing.add(bundle, told)
        _tell_unsigned(was_signed, bundle)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    shown = ("class", "cases", "Dice", "error, ml", "within 10 % or 1.5 ml", "found", "false findings")
    _print([{key: row[key] for key in shown} for row in card.rows(summary)])
    out.print("\ncases without any blood:")
    out.print_json(data=summary["bleed_free"])
    out.print(f"engine: {summary['engine']}, {summary['precision']}", style="dim", highlight=False)


@app.command()
def calibrate(
    bundle: Annotated[Path, typer.Argument(help="A bundle; its INT8 and FP16 graphs are written into it.")],
    data: SampleFolder = None,
    heads: PhantomHeads = 24,
    slices: Annotated[int, typer.Option(min=8, help="Slices to measure ranges on.")] = 64,
    limits: Annotated[
        list[str] | None, typer.Option("--budget", help="NAME=NUMBER of the bundle's budget, such as dice=0.99.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for a table and a picture of the search.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bundle's FP16 and INT8 graphs from what flows through it on samples (needs the `export` extra)."""
    from calibration import report
    from calibration.calibrate import calibrate as measure
    from calibration.calibrate import parse_budget, write
    from runtime.bundle import open_bundle
    from training.heads import FIRST_CALIBRATION

    opened = open_bundle(bundle)
    was_signed = opened.is_signed
    budget = parse_budget(limits or (), opened.budget)
    series = list(_series(opened, data, heads, FIRST_CALIBRATION))
    with _stages() as on_stage:
        made = measure(opened, series, count=slices, budget=budget, on_stage=on_stage)
    write(opened, made, budget)
    _tell_unsigned(was_signed, bundle)
    if folder:
        report.write(made, folder)
    if as_json:
        print(json.dumps(made.report, indent=2))
        return
    _print(report.rows(made))
    held_out = "" if data is None else " HELD_OUT, other series than these"
    out.print(f"now: scanside verify {bundle}{held_out}", highlight=False)


@app.command()
def verify(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; default: the one that ships.")] = None,
    data: SampleFolder = None,
    heads: PhantomHeads = 12,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge, and leave the bundle as it is.")] = False,
    tensorrt: Annotated[
        bool,
        typer.Option("--tensorrt", help="Judge this GPU's plans in place of the graphs: what fails is not served."),
    ] = False,
    plans: Annotated[
        Path | None, typer.Option(help="Folder of the plans, with --tensorrt; default: the user's cache.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The node's: its bundle, its folder of plans and its triage rules.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold every precision of a bundle against FP32 on series held out; the node serves what passes.

    Of the bundle that ships nothing is written, unless it is named. Exit code 1 where one fails (needs the `export`
    extra).
    """
    from calibration.verify import check_held_out, record
    from calibration.verify import verify as judge
    from dicom_node.configuration import config as configuration
    from runtime import gpu
    from runtime.bundle import open_bundle
    from runtime.plans import command, default_folder
    from runtime.triage import Rule, check_rules
    from runtime.verdict import Verdict
    from training.heads import FIRST_VERIFICATION

    if plans and not tensorrt:
        raise typer.BadParameter("--plans is of --tensorrt: give both, or leave it out")
    said = configuration.load(config) if config else configuration.Config()
    bundle = bundle or said.model.bundle
    opened = open_bundle(bundle, said.model.trusted_keys)
    rules = [Rule(**rule.model_dump()) for rule in said.triage]
    if config:
        check_rules(rules, opened.classes)
    where, there, missing = plans or said.model.plans, [], []
    if tensorrt:
        where = where or default_folder()
        there, missing = gpu.to_judge(opened, where, writing=not dry_run)
    series = list(_series(opened, data, heads, FIRST_VERIFICATION))
    check_held_out(series, opened)
    with _progress("series", len(series)) as advance:
        verdicts = judge(opened, series, rules, advance, on_gpu=there, plans=where)
    remedies = {name: command("build", opened, where or default_folder(), "--precision", name) for name in missing}
    not_built = {name: Verdict(False, (f"not built: {one}",), {}, is_decided=False) for name, one in remedies.items()}
    _show_verdicts(verdicts | not_built, as_json)
    if there and where and not dry_run:
        count = gpu.rule(where, opened, verdicts)
        err.print(f"written into {count} plan{'s' * (count != 1)} in {where}", highlight=False, soft_wrap=True)
    elif bundle and not dry_run:
        was_signed = opened.is_signed
        record(opened, verdicts, series, rules)
        _tell_unsigned(was_signed, bundle)
    if not all(one.passed for one in verdicts.values()):
        raise typer.Exit(1)


@app.command()
def build(
    bundle: BundleArgument = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or int8; best: all that have passed, of which the node takes the fastest.")
    ] = "best",
    batch: Annotated[str, typer.Option(help="Batch sizes, an engine each.")] = "1,8,32",
    sizes: Annotated[
        list[str] | None, typer.Option("--size", help="Rows x columns of the slices, several times; default 512x512.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--plans", help="Default: the user's cache.")] = None,
    config: Annotated[Path | None, typer.Option(help="The node's: its bundle and its folder of plans.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Build also what is there already.")] = False,
    as_json: Json = False,
) -> None:
    """Build TensorRT's engines for this GPU, and keep those that answer as the bundle says (needs the `gpu` extra).

    Exit code 1 where one fails.
    """
    from rich.markup import escape

    from dicom_node.configuration import config as configuration
    from runtime import gpu, plans
    from runtime.bundle import open_bundle

    said = configuration.load(config) if config else configuration.Config()
    opened = open_bundle(bundle or said.model.bundle, said.model.trusted_keys)
    batches = _numbers("--batch", batch, ",")
    shapes = [(n, *_numbers("--size", size, "x", 2)) for size in sizes or ("512x512",) for n in batches]
    where = folder or said.model.plans or plans.default_folder()
    for reason in gpu.passed(opened)[1] if precision == "best" else ():
        err.print(f"left out: {reason}", style="yellow", highlight=False, soft_wrap=True)
    rows: list[dict[str, Any]] = []
    try:
        with err.status("looking for a GPU", spinner="line") as status:
            made = gpu.make_all(
                opened,
                precision,
                shapes,
                where,
                read=_constants,
                again=again,
                tell=lambda text: status.update(escape(text)),
            )
            for row in made:
                rows.append(row)
                if not as_json:
                    status.stop()
                    _show_engine(row)
                    status.start()
    finally:  # a device that is lost takes nothing of what was made before
        if as_json and rows:
            print(json.dumps({"plans": str(where), "engines": rows}, indent=2))
        elif rows:
            out.print(f"in {where}", highlight=False)
    raise typer.Exit(1 if any(row["state"] == "failed" for row in rows) else 0)


# a bundle as a thing


@bundles.command("show")
def bundle_show(bundle: BundleArgument = None, as_json: Json = False) -> None:
    """Say what a bundle is, whether it is whole, and what each of its precisions is worth."""
    from runtime.bundle import describe, open_bundle

    told = describe(open_bundle(bundle))
    if as_json:
        print(json.dumps(told, indent=2))
        return
    precisions = told.pop("precisions")
    _print([told])
    _print(precisions)


@bundles.command("diff")
def bundle_diff(first: Path, second: Path, as_json: Json = False) -> None:
    """Show what two bundles' manifests say differently; exit code 1 where they do."""
    from runtime.bundle import differences, open_bundle

    found = differences(open_bundle(first), open_bundle(second))
    if as_json:
        print(json.dumps(found, indent=2))
    elif found:
        for one in found:
            lines = (one["entry"], f"  first:  {one['first'] or '-'}", f"  second: {one['second'] or '-'}")
            out.print("\n".join(lines), highlight=False)
    if found:
        raise typer.Exit(1)


@bundles.command("sign")
def bundle_sign(
    bundle: Path, key: Annotated[Path, typer.Option(help="Ed25519 private key: openssl genpkey -algorithm ed25519.")]
) -> None:
    """Vouch for a bundle as it is; whatever changes it later takes the signature away."""
    from runtime import signature
    from runtime.bundle import open_bundle

    signature.sign(open_bundle(bundle).folder, key)
    out.print(f"signed: {bundle}", highlight=False)


@bundles.command("operate")
def bundle_operate(
    bundle: Path,
    version: Annotated[str, typer.Option(help="The bundle's new version: it answers otherwise from now on.")],
    classes: Annotated[list[str] | None, typer.Option("--class", help="Only for this one; several times.")] = None,
    minimum_ml: Annotated[float | None, typer.Option(min=0, help="Smallest volume that is a finding.")] = None,
    minimum_probability: Annotated[
        float | None, typer.Option(min=0, max=1, help="Its highest probability in a slice that shows it.")
    ] = None,
    minimum_slices: Annotated[
        int | None, typer.Option(min=1, max=16, help="So many neighbouring slices in a row have to show it.")
    ] = None,
) -> None:
    """Change a bundle's operating point: what is below it is mentioned, is no finding and raises no alert."""
    from runtime import seal
    from runtime.bundle import open_bundle

    opened = open_bundle(bundle)
    unknown = {*(classes or ())} - {*opened.classes[1:]}
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the bundle has {', '.join(opened.classes[1:])}")
    asked = {
        "minimum_volume_ml": minimum_ml,
        "minimum_probability": minimum_probability,
        "minimum_slices": minimum_slices,
    }
    if all(value is None for value in asked.values()):
        raise typer.BadParameter("--minimum-ml, --minimum-probability, --minimum-slices: give one of them")
    changes = {
        name: {**(getattr(opened.manifest, name) or {}), **dict.fromkeys(classes or opened.classes[1:], value)}
        for name, value in asked.items()
        if value is not None
    }
    seal.change(bundle, lambda _: None, version=version, **changes)
    _tell_unsigned(opened.is_signed, bundle)
    for name, point in open_bundle(bundle).operating_point.items():
        out.print(f"{name}: {point}", highlight=False)
    out.print(f"now: scanside verify {bundle}, and scanside evaluate {bundle} --seal", highlight=False)


@bundles.command("verify")
def bundle_verify(
    bundle: BundleArgument = None,
    keys: Annotated[
        list[Path] | None, typer.Option("--key", help="Ed25519 public key that must have signed it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's hashes and signature, and let the engine answer its golden slices: no samples needed."""
    from runtime.bundle import open_bundle
    from runtime.session import open_session, self_test

    opened = open_bundle(bundle, keys or ())
    session = open_session(opened, "onnxruntime")  # FP32: a plan in the user's cache is not the bundle
    told = {
        "bundle": str(opened.folder),
        "name": opened.name,
        "version": opened.version,
        "digest": opened.digest,
        "intended_use": opened.intended_use,
        "training_data": opened.training_data,
        "signed_by_one_of": [str(key) for key in keys or ()],
        "backend": session.identity.backend,
        "precision": session.identity.precision,
        "self_test_worst_disagreement": self_test(session, opened),
    }
    session.close()
    print(json.dumps(told, indent=2)) if as_json else _print([told])


@bundles.command("triton")
def bundle_triton(
    repository: Annotated[Path, typer.Option("--out", help="Model repository; the model gets a folder in it.")],
    bundle: BundleArgument = None,
    precision: Annotated[str, typer.Option(help="fp32, or one that `scanside verify` has passed.")] = "fp32",
    engine: Annotated[
        str,
        typer.Option(
            help="onnxruntime; python, for a Triton that has no backend of ONNX Runtime; tensorrt, for this folder's "
            "plans of `scanside build --batch 1`."
        ),
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=0, help="Of the processor; 0: all cores.")] = 0,
    folder: Annotated[Path | None, typer.Option("--plans", help="With tensorrt. Default: the user's cache.")] = None,
    size: Annotated[str, typer.Option(help="With tensorrt: rows x columns of the slices.")] = "512x512",
) -> None:
    """Write a model repository for NVIDIA Triton (needs the `triton` extra)."""
    from export import triton
    from runtime.bundle import open_bundle

    if engine not in triton.ENGINES:
        raise typer.BadParameter(f"--engine {engine}: there are {', '.join(triton.ENGINES)}")
    height, width = _numbers("--size", size, "x", 2)
    opened = open_bundle(bundle)
    how = {"engine": engine, "threads": threads, "folder": folder, "size": (height, width)}
    try:
        written = triton.write(opened, precision, repository, **how)
    except ModuleNotFoundError as error:
        end(f"{error.name} is not installed: in scanside's checkout, pip install '.[triton]'", 3)
    out.print(f"{written}", highlight=False)


# how things are shown


def _hush_peers() -> None:
    """Keep what pynetdicom logs of a connection off stderr: the command says it in one line of its own."""
    import logging

    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)


def _show_others(fate: str, paths: list[Path]) -> None:
    """Count the files beside a series, such as a phantom's truth.json: nothing is wrong with them."""
    if paths:
        names = ", ".join([*(path.name for path in paths[:3]), *["..."][: len(paths) - 3 > 0]])
        what = "file that is" if len(paths) == 1 else "files that are"
        out.print(f"{fate}: {len(paths)} {what} no DICOM ({names})", style="dim", highlight=False)


def _series(bundle: Any, data: Path | None, heads: int, first: int) -> Iterator[Any]:
    """Whole series to measure on: of a folder, or phantoms where the bundle was made of them."""
    from calibration.samples import SampleError, Series, holds_series, read_arrays
    from training import heads as phantoms

    if data is None:
        if bundle.learnt_from is not None:
            raise SampleError(f"{bundle.name} was not trained on phantoms: name a folder with DICOM series")
        phantoms.check_classes(bundle.classes)
        with _progress("phantoms", heads) as advance:
            for case in phantoms.unseen(heads - heads // 4, heads // 4, first=first):
                yield Series.of(case.name, case.images, case.spacing_mm[1:], case.thickness_mm, "phantom")
                advance(1)
        return
    arrays = sorted(filter(holds_series, data.rglob("*.npz"))) if data.is_dir() else [data]
    yield from map(read_arrays, arrays)
    if data.is_dir():
        yield from _dicom_series(data, or_none=bool(arrays))


def _dicom_series(folder: Path, *, or_none: bool) -> Iterator[Any]:
    import hashlib

    from calibration.samples import Series
    from dicom_node import folder as folders

    try:
        found, _ = folders.find(folder)
    except folders.FolderError:
        if or_none:
            return
        raise
    with _progress("series", len(found)) as advance:
        for (study_uid, series_uid), paths in found.items():
            study = hashlib.sha256(study_uid.encode()).hexdigest()
            name = f"series {hashlib.sha256(series_uid.encode()).hexdigest()[:12]}"
            slices, scanner, refused = folders.slices(paths)
            if refused:
                reasons = ", ".join(f"{count} {reason.value}" for reason, count in refused.items())
                err.print(f"{name}: left out: {reasons}", style="yellow", highlight=False)
            if slices:
                yield Series.stacked(name, slices, scanner, study)
            advance(1)


def _tell_unsigned(was_signed: bool, bundle: Path) -> None:
    if was_signed:
        err.print(f"{bundle} has changed and is no longer signed: `scanside bundle sign` it again", style="yellow")


def _stages() -> Any:
    """Progress of work in stages, each with steps of its own, on a terminal; elsewhere nothing."""
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
        with Progress(console=err, disable=not err.is_terminal) as progress:

            def begin(what: str, total: int) -> Callable[[int], None]:
                task = progress.add_task(what, total=total)
                return lambda count: progress.advance(task, count)

            yield begin

    return bars()


def _show_verdicts(verdicts: dict[str, Any], as_json: bool) -> None:
    import dataclasses

    from calibration import report

    if as_json:
        print(json.dumps({name: dataclasses.asdict(one) for name, one in verdicts.items()}, indent=2), flush=True)
        return
    _print(report.verdict_rows(verdicts))
    for name, one in verdicts.items():
        for reason in one.reasons:
            out.print(f"{name}: {reason}", style="red" if one.is_decided else "yellow", highlight=False)


def _show_engine(row: dict[str, Any]) -> None:
    times = "" if row["slice_ms"] is None else f", {row['slice_ms']} ms a slice, {row['build_s']} s to build"
    what = f"{row['precision']}, batch {row['batch']}, {row['size']}: {row['state']}{times}"
    style = "red" if row["state"] == "failed" else None
    out.print(f"{what}: {row['types']}", style=style, highlight=False)


def _constants(graph: Path) -> bytes:
    """An ONNX graph with its weights as constants, which TensorRT wants."""
    try:
        from calibration.weights import load
    except ModuleNotFoundError as error:
        end(f"{error.name} is not installed: in scanside's checkout, pip install '.[gpu]'", 3)
    return load(graph).SerializeToString()


def _numbers(option: str, text: str, between: str, count: int | None = None) -> tuple[int, ...]:
    """Positive whole numbers of an option's value."""
    parts = [part.strip() for part in text.lower().split(between)]
    if not all(part.isdecimal() and int(part) for part in parts) or count not in (None, len(parts)):
        raise typer.BadParameter(f"{option} {text}: write {'512x512' if count else '1,8,32'}")
    return tuple(map(int, parts))


def _progress(what: str, total: int) -> Any:
    """Progress on a terminal; elsewhere nothing."""
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def bar() -> Iterator[Callable[[int], None]]:
        with Progress(console=err, disable=not err.is_terminal) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)

    return bar()


def _print(rows: list[dict[str, Any]]) -> None:
    if len(rows) == 1:
        for key, value in rows[0].items():
            out.print(f"{key}: {value}", highlight=False)
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    out.print(table, soft_wrap=False)


def _by_side(values: dict[str, float]) -> str:
    return ", ".join(f"{value:g} at {side}" for side, value in values.items())


def _told(one: Any) -> dict[str, Any]:
    import dataclasses

    outcome = one.outcome
    return {
        "series_uid": one.series_uid,
        "files": one.files,
        "state": str(outcome.state),
        "reason": outcome.reason,
        "report": dataclasses.asdict(outcome.report) if outcome.report else None,
        "refused": [{"path": str(path), "reason": reason} for path, reason in one.refused],
        "results": {file.path.stem: str(file.path) for file in outcome.files},
        "folder": str(one.folder) if outcome.report else None,
    }


if __name__ == "__main__":
    main()
