"""`scanside bench`: how fast, how near to what the machine allows, against what else one could use.

Nothing that measures is imported before it is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from benchmarks.record import Record

app = typer.Typer(help=__doc__.partition("\n\n")[0], no_args_is_help=True)

Out = Annotated[
    Path | None, typer.Option("--out", help="The record as JSON; its picture goes beside it, with the end .png.")
]
AsJson = Annotated[bool, typer.Option("--json", help="The record on stdout, and nothing else.")]
BundleFolder = Annotated[Path | None, typer.Option(help="Model bundle; default: the one that ships.")]
Backend = Annotated[str, typer.Option(help="auto, onnxruntime, onnxruntime-cuda, tensorrt or triton.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, or one that `scanside verify` has passed.")]
Seconds = Annotated[float, typer.Option(min=0.01, help="For how long each figure is measured.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often.")]
Disk = Annotated[Path, typer.Option(help="A folder on the disk to write to.")]
Matrix = Annotated[int, typer.Option(min=64, max=2048, help="Rows and columns of a slice.")]


@app.command()
def latency(
    bundle: BundleFolder = None,
    backend: Backend = "onnxruntime",
    precision: Precision = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Slices in one inference.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Of the processor; 0 takes all.")] = 0,
    matrix: Matrix = 512,
    servers: Annotated[
        str | None, typer.Option(help="Of triton: grpc://HOST:PORT or http://HOST:PORT, several with commas.")
    ] = None,
    seconds: Seconds = 3.0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """One inference: percentiles of its time, beside the engine alone and a slice's decoding."""
    from benchmarks import charts
    from benchmarks import latency as inference

    how = {"backend": backend, "precision": precision, "batch": batch, "threads": threads, "matrix": matrix}
    how["servers"] = servers.split(",") if servers else None
    record = inference.measure(bundle, **how, seconds=seconds)
    _tell(record, out, as_json)
    if out:
        charts.percentile_curve(record, _picture(out))


@app.command()
def throughput(
    bundle: BundleFolder = None,
    backend: Backend = "onnxruntime",
    precision: Precision = "fp32",
    batches: Annotated[str, typer.Option(help="Slices in one inference, several with commas.")] = "1,2,4",
    threads: Annotated[str, typer.Option(help="Threads of the processor, several with commas.")] = "1,2",
    matrix: Matrix = 512,
    seconds: Seconds = 3.0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Slices a second by batch and threads."""
    from benchmarks import charts
    from benchmarks import latency as inference

    how = {"backend": backend, "precision": precision, "matrix": matrix, "seconds": seconds}
    record = inference.throughput(bundle, **how, batches=_numbers(batches), threads=_numbers(threads))
    _tell(record, out, as_json)
    if out:
        charts.bars(record, _picture(out))


@app.command()
def ingest(
    slices: Annotated[int, typer.Option(min=2, help="Of each series.")] = 120,
    rounds: Rounds = 3,
    disk: Disk = Path(),
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Slices taken in and safe on the disk, beside DCMTK's storescp and Orthanc."""
    from benchmarks import ingest as intake

    record = intake.run(disk, slices, rounds)
    _tell(record, out, as_json)
    if out:
        intake.draw(record, _picture(out))


@app.command("end-to-end")
def end_to_end(
    slices: Annotated[str, typer.Option(help="Of a series, several with commas.")] = "40,320",
    rate: Annotated[float, typer.Option(min=0, help="Slices a second; 0 is as fast as it goes.")] = 20.0,
    rounds: Rounds = 10,
    orthanc: Annotated[bool, typer.Option("--orthanc", help="Into Orthanc instead of our own archive.")] = False,
    bundle: BundleFolder = None,
    precision: Precision = "auto",
    disk: Disk = Path(),
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """From the last slice's answer to each result in the archive, through the real node, beside the floor."""
    from benchmarks import charts
    from benchmarks import end_to_end as whole

    how = {"rate": rate or None, "rounds": rounds, "orthanc": orthanc, "precision": precision}
    record = whole.measure(_numbers(slices), bundle=bundle, disk=disk, **how)
    _tell(record, out, as_json)
    if out:
        marks = {case: ms for case, ms in whole.TARGETS_MS.items() if rate}
        charts.stacked(whole.stages(record), _picture(out), record.command(), marks=marks)


@app.command()
def peers(
    slices: Annotated[int, typer.Option(min=5, help="Of the series.")] = 40,
    rounds: Rounds = 5,
    bundle: BundleFolder = None,
    compiled: Annotated[bool, typer.Option(help="torch.compile too; it wants a C++ compiler.")] = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The same case through what one would build instead, with the same weights (needs the `train` extra)."""
    from benchmarks import charts
    from benchmarks import peers as others

    record = others.measure(slices=slices, rounds=rounds, bundle=bundle, compiled=compiled)
    _tell(record, out, as_json)
    if out:
        charts.bars(record, _picture(out))


@app.command()
def triton(
    batch: Annotated[int, typer.Option(min=1, help="Slices in one inference.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Of the processor, here and there; 0 takes all.")] = 1,
    matrix: Matrix = 512,
    seconds: Seconds = 12.0,
    bundle: BundleFolder = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The way to a Triton on this machine: gRPC with shared memory, gRPC, HTTP, beside no way (`make triton` first)."""
    from benchmarks import charts
    from benchmarks import triton as served

    record = served.measure(bundle, batch=batch, threads=threads, matrix=matrix, seconds=seconds)
    _tell(record, out, as_json)
    if out:
        charts.percentile_curve(record, _picture(out))


@app.command()
def replicas(
    counts: Annotated[str, typer.Option(help="How many Tritons, several with commas.")] = "1,2,4",
    matrix: Matrix = 512,
    seconds: Seconds = 10.0,
    bundle: BundleFolder = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Slices a second through more and more Tritons of one thread each, beside the ideal (`make triton` first)."""
    from benchmarks import charts
    from benchmarks import triton as served

    record = served.replicas(bundle, counts=_numbers(counts), matrix=matrix, seconds=seconds)
    _tell(record, out, as_json)
    if out:
        charts.bars(record, _picture(out))


@app.command()
def growth(
    slices: Annotated[str, typer.Option(help="Of a series.")] = "20,40,80,160,320,640,1280,2000",
    series: Annotated[str, typer.Option(help="At once.")] = "1,2,4,8,16",
    matrix: Annotated[str, typer.Option(help="Rows and columns.")] = "256,384,512,768,1024",
    associations: Annotated[str, typer.Option(help="At once.")] = "1,2,4,8,16",
    disk: Disk = Path(),
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What it costs as there is more of it: slices, series at once, matrix size, lesions, associations."""
    from benchmarks import charts
    from benchmarks import growth as curves

    sizes = {"slices": slices, "series": series, "matrices": matrix, "associations": associations}
    record = curves.measure(**{name: _numbers(text) for name, text in sizes.items()}, disk=disk)
    _tell(record, out, as_json)
    if out:
        charts.growth(curves.panels(record), _picture(out))


@app.command()
def network(
    architecture: Annotated[str, typer.Option(help="Of the catalogue, at its paper's widths.")] = "att_focus_net",
    grids: Annotated[str, typer.Option(help="Sides of what it sees a slice on, several with commas.")] = "128,512",
    slices: Annotated[int, typer.Option(min=5, help="Of the series.")] = 40,
    rounds: Rounds = 3,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A series through an untrained network, from files to labels, in FP32 and INT8 (needs the `train` extra)."""
    from benchmarks import charts
    from benchmarks import network as untrained
    from models import catalogue

    flat = [name for name, one in catalogue.ARCHITECTURES.items() if one.dimensions == 2]
    if architecture not in flat:
        raise typer.BadParameter(f"{architecture}: of the catalogue come {', '.join(flat)}")
    record = untrained.measure(architecture, grids=_numbers(grids), slices=slices, rounds=rounds)
    _tell(record, out, as_json)
    if out:
        charts.bars(record, _picture(out))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A record.")],
    second: Annotated[Path, typer.Argument(help="A later one, with the same options.")],
    tolerance: Annotated[float, typer.Option(min=0, help="A smaller change is none, as a share.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Say what has changed beyond noise; exit code 1 where something got worse."""
    import dataclasses

    from benchmarks import comparison
    from benchmarks import record as records

    before, after = records.read(first), records.read(second)
    changes = comparison.compare(before, after, tolerance)
    doubts = comparison.doubts(before, after)
    if as_json:
        print(json.dumps({"changes": [dataclasses.asdict(one) for one in changes], "doubts": doubts}, indent=2))
    else:
        for one in changes:
            print(one.line())
        for doubt in doubts:
            typer.echo(f"doubtful: {doubt}", err=True)
    raise typer.Exit(any(one.verdict == "worse" for one in changes))


def _tell(record: Record, out: Path | None, as_json: bool) -> None:
    from benchmarks import record as records

    if out:
        record.write(out)
    print(records.compact(record.told()) if as_json else "\n".join(record.lines()))


def _picture(out: Path) -> Path:
    return out.with_suffix(".png")


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{text}: write whole numbers with commas between, such as 1,2,4")
    return tuple(map(int, parts))
