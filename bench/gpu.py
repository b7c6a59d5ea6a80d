"""Everything about the CUDA backend on a GPU at hand, in one command: is it right, and how fast is it?

python bench/gpu.py                                  # under ten minutes; writes bench/results/gpu.json
python bench/gpu.py --quick -o quick.json            # fewer sizes
python bench/gpu.py --sections products,kernels      # some of it
python bench/gpu.py --simulate                       # the checks, at toy sizes, without a GPU
python bench/gpu.py --analytic                       # what a step costs at least, by arithmetic, without a GPU

Sections run in processes of their own, so that one that crashes or hangs takes nothing else with it. The exit code is 1
where a check failed or a section did not come to its end. Nothing is downloaded: models are made of random weights.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "tools")]

import gpu_records  # noqa: E402
from gpu_records import Records  # noqa: E402

from pymla import __version__  # noqa: E402

#: Sections in their order, and the seconds that one may take on a GPU; the simulator may take as long as it does.
SECTIONS = {
    "device": 60,
    "products": 120,
    "layers": 60,
    "experts": 180,
    "attention": 180,
    "sparse": 120,
    "sampling": 60,
    "logits": 240,
    "kernels": 150,
    "sweep": 240,
}
#: Of these the simulator can say something.
SIMULATED = ("device", "products", "layers", "experts", "attention", "sparse", "sampling", "logits")

#: The environment of a process whose kernels run in the simulator.
SIMULATOR = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}

#: Bars on an H200: name, kind and name of the record, the figure in it, what it is divided by, unit, bar, stretch.
BARS = (
    ("matvec Q4_0, 2048 × 102400, of copy bandwidth", "time", "matvec Q4_0 102400 × 2048", "share", 0.01, "%", 75, 90),
    ("matvec Q8_0, 2048 × 102400, of copy bandwidth", "time", "matvec Q8_0 102400 × 2048", "share", 0.01, "%", 75, 90),
    (
        "decode attention, 128 × 4096, f16 cache",
        "time",
        "absorbed f16, 128 × 4096, 16 heads",
        "rate",
        1e12,
        "TB/s",
        2,
        3,
    ),
    ("int8 matmul 4096³", "time", "matmul Q8_0 4096 × 4096, 4096 tokens", "rate", 1e12, "TOP/s", 500, 900),
    ("TG at N_KV 0", "sweep", "graph on, N_KV 0", "s_tg", 1, "t/s", 400, 1000),
    ("TG at N_KV 32k", "sweep", "graph on, N_KV 31744", "s_tg", 1, "t/s", 250, 600),
    ("PP at N_KV 0", "sweep", "graph on, N_KV 0", "s_pp", 1, "t/s", 10_000, 30_000),
    ("PP at N_KV 32k", "sweep", "graph on, N_KV 31744", "s_pp", 1, "t/s", 4_000, 12_000),
)


@click.command(epilog="\b\n" + __doc__.split("\n\n")[1])
@click.option("--quick", is_flag=True, help="Fewer sizes and depths.")
@click.option("--simulate", is_flag=True, help="Checks at toy sizes in the simulator; nothing is timed.")
@click.option("--analytic", is_flag=True, help="The time that a step takes at least, by arithmetic.")
@click.option("--bandwidth", type=float, help="For --analytic, TB/s; by default those of an H100 and of an H200.")
@click.option("--int8", "int8", type=float, help="For --analytic, TOP/s of dense int8.")
@click.option("--gap", default=1.0, show_default=True, help="For --analytic, µs from launch to launch in a graph.")
@click.option("--launch", default=15.0, show_default=True, help="For --analytic, µs of a launch from Python.")
@click.option("--sections", "chosen", default="", help=f"Some of {', '.join(SECTIONS)}, with commas between them.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="By default bench/results/gpu.json.")
@click.option("--section", "one", hidden=True, help="Run a section in this process and write to --out.")
def main(quick, simulate, analytic, bandwidth, int8, gap, launch, chosen, out, one):
    """Check and measure the CUDA backend."""
    if one:
        run_section(one, Records(out, one), quick, simulate)
        return
    if analytic:
        if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=SIMULATOR, check=False).returncode)
        import gpu_analytic

        print("\n".join(gpu_analytic.table(bandwidth, int8, gap, launch)))
        return
    names = chosen.split(",") if chosen else list(SIMULATED if simulate else SECTIONS)
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}; choose among {', '.join(SECTIONS)}", param_hint="--sections")
    report = measure(names, quick, simulate)
    if out is None and not simulate:
        out = HERE / "results" / "gpu.json"
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + "\n".join(table(report)))
    if out:
        print(f"wrote {out}")
    sys.exit(0 if report["passed"] else 1)


def run_section(name, records, quick, simulate):
    """A section, in this process."""
    import gpu_checks
    import gpu_models
    import gpu_times

    sizes = gpu_checks.TOY if simulate else gpu_checks.REAL
    run = {
        "device": lambda: gpu_times.device(records, simulate),
        "products": lambda: gpu_checks.products(records, sizes),
        "layers": lambda: gpu_checks.layers(records, sizes),
        "experts": lambda: gpu_checks.experts(records, sizes),
        "attention": lambda: gpu_checks.attention(records, sizes),
        "sparse": lambda: gpu_checks.sparse(records, sizes),
        "sampling": lambda: gpu_checks.sampling(records, sizes),
        "logits": lambda: gpu_models.logits(records, simulate),
        "kernels": lambda: gpu_times.kernels(records, quick),
        "sweep": lambda: gpu_models.sweep(records, quick),
    }
    run[name]()


def measure(names, quick, simulate):
    """Run sections, each in a process of its own; returns all that is known then, as plain types."""
    began, sections, records = time.perf_counter(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name}:", flush=True)
            path, start = Path(folder) / f"{name}.jsonl", time.perf_counter()
            problem = in_process(name, path, quick, simulate, None if simulate else SECTIONS[name])
            records += gpu_records.read(path)
            sections[name] = {"seconds": round(time.perf_counter() - start, 1), "problem": problem}
            if problem:
                print(f"  FAILED: {problem}", flush=True)
    by_kind = {f"{kind}s": [each for each in records if each["kind"] == kind] for kind in gpu_records.KINDS}
    return {
        "passed": not any(each["problem"] for each in sections.values()) and not any(map(failed, records)),
        "simulated": simulate,
        "quick": quick,
        "pymla": __version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
        "sections": sections,
        **by_kind,
    }


def failed(record):
    """Whether a check was missed, or something could not be measured."""
    return not record.get("passed", True) or bool(record.get("failure"))


def in_process(name, path, quick, simulate, seconds):
    """Run a section in another process; returns what went wrong, or None."""
    command = [sys.executable, str(HERE / "gpu.py"), "--section", name, "--out", str(path)]
    command += ["--quick"] * quick + ["--simulate"] * simulate
    try:
        code = subprocess.run(command, env=SIMULATOR if simulate else None, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"not done within {seconds} s"
    return None if code == 0 else f"ended with exit code {code}"


def table(report):
    """Lines of the last table: what failed, and the figures against the bars."""
    checks, bad = (
        report["checks"],
        [each for key in ("checks", "times", "sweeps") for each in report[key] if failed(each)],
    )
    yield f"{sum(each['passed'] for each in checks)} of {len(checks)} checks passed, {report['seconds']:.0f} s"
    for each in bad:
        why = each["failure"] or f"{each['error']}, allowed {each['allowed']}"
        yield f"FAILED {each['section']}: {each['name']}: {why}"
    for name, each in report["sections"].items():
        if each["problem"]:
            yield f"FAILED section {name}: {each['problem']}"
    if report["simulated"]:
        return
    for each in report["facts"]:
        yield f"{each['name']}: {each['value']}"
    yield f"| {'':48} | {'':>10} | {'bar':>8} | {'stretch':>8} |"
    yield f"| {'-' * 48} | {'-' * 9}: | {'-' * 7}: | {'-' * 7}: |"
    for title, kind, name, figure, unit_size, unit, bar, stretch in BARS:
        found = [each[figure] for each in report[f"{kind}s"] if each["name"] == name and each.get(figure)]
        value = f"{found[0] / unit_size:.1f} {unit}" if found else "-"
        yield f"| {title:48} | {value:>10} | {bar:>8} | {stretch:>8} |"


if __name__ == "__main__":
    main()
