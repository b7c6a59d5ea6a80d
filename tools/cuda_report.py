"""Compile every CUDA kernel to machine code, without a GPU, and say what the compiler makes of it.

python tools/cuda_report.py                    # a table for compute capability 9.0
python tools/cuda_report.py --cc 8.0,8.9,9.0
python tools/cuda_report.py --write            # the table that the tests compare with: some types, all three
python tools/cuda_report.py gemv --ptx         # PTX of the kernels whose names contain a word
"""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click

TESTS = Path(__file__).resolve().parents[1] / "tests"
TABLE = TESTS / "golden" / "cuda_kernels.json"
#: Ampere, Ada, Hopper.
CAPABILITIES = ((8, 0), (8, 9), (9, 0))


def kernels():
    """Every kernel of `pymla.cuda`, by name."""
    from pymla.cuda import needed

    return needed.everything()


def recorded():
    """Those of them that the table has: of the types that tests of whole operations run over."""
    sys.path.append(str(TESTS))
    from cases import GPU_REPRESENTATIVES

    from pymla.cuda import needed

    return needed.everything(GPU_REPRESENTATIVES)


def products():
    """The products of every type with one and with many activations, whose registers the type's functions fill."""
    from pymla import ggml
    from pymla.cuda.matmul.gemm import gemm_kernel
    from pymla.cuda.matmul.gemm_layout import NARROW
    from pymla.cuda.matmul.gemv import gemv_kernel

    made = [kernel for qtype in ggml.QUANTISED for kernel in (gemv_kernel(qtype), gemm_kernel(qtype, NARROW))]
    return {kernel.__name__: kernel for kernel in made}


def figures(name, capabilities):
    """What the compiler says about a kernel, {"8.0": figures as a dict, …}. In one process, because the functions that
    a kernel calls are typed and lowered for the first capability only: the others take a fifth of its time."""
    kernel = kernels()[name]
    return {"{}.{}".format(*each): kernel.compiled(each).figures._asdict() for each in capabilities}


def report(capabilities, names):
    """{name: {"8.0": figures, …}}, compiled on all cores."""
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(names), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        found = pool.map(figures, names, [capabilities] * len(names))
        return dict(zip(names, found, strict=True))


@click.command()
@click.argument("word", default="")
@click.option("--cc", default="9.0", help="Compute capabilities, with commas between them.")
@click.option("--write", is_flag=True, help=f"Write {TABLE.name}.")
@click.option("--ptx", is_flag=True, help="Print PTX instead.")
def main(word, cc, write, ptx):
    """Figures of the kernels whose names contain WORD."""
    found = kernels()
    names = sorted(name for name in found if word in name)
    if not names:
        raise click.ClickException(f"no kernel's name contains {word!r}")
    capabilities = CAPABILITIES if write else [tuple(map(int, each.split("."))) for each in cc.split(",")]
    if ptx:
        from pymla.cuda.runtime.compiling import to_ptx

        for name in names:
            click.echo(to_ptx(found[name], capabilities[0]))
        return
    if write:
        names = sorted(recorded())
    result = report(capabilities, names)
    columns = list(next(iter(next(iter(result.values())).values())))
    click.echo(f"{'kernel':40}  cc   " + " ".join(f"{column:>9}" for column in columns))
    for name in names:
        for capability, each in result[name].items():
            click.echo(f"{name:40}  {capability:4} " + " ".join(f"{each[column]:9}" for column in columns))
    if write:
        TABLE.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        click.echo(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
