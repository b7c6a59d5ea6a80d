"""pymla and other engines on the same files, taking turns; ratios with their spread.

Every measurement is a process of its own, and the engines alternate, so that a machine whose speed drifts slows all of
them. A ratio is taken within a round; the median over the rounds counts.
"""

import datetime
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click

from pymla.errors import PymlaError
from pymla.files import outputs
from pymla.measure import facts, plot, sweep

EXAMPLES = """\b
Examples:
  python bench/against.py -m model.gguf --llama-sweep-bench build/bin/llama-sweep-bench --depths 0,4096
  python bench/against.py -m model.gguf --llama-sweep-bench "build/bin/llama-sweep-bench -rtr" --prompt 16384
  python bench/against.py -m model.gguf --llama-python venv/bin/python --llama-python "venv/bin/python flash_attn=False"
  python bench/against.py -m q4_k_m.gguf -m iq4_xs.gguf --llama-bench build/bin/llama-bench --depths 0,4096 --rounds 5

\b
A peer is given by the path of its program, with further arguments of its own in the same string. A peer option can be
repeated: every one is an engine."""

SCRIPT = Path(__file__).parent / "llama_python.py"


class Rates(NamedTuple):
    """Tokens per second at a depth; None where they were not asked for."""

    pp: float | None
    tg: float | None


@dataclass(frozen=True)
class Job:
    """What every engine does in a round: a prompt and generation at each depth, or one long prompt."""

    model: Path
    pp: int
    tg: int
    depths: tuple
    threads: int
    cache_type: str
    prompt: int | None = None

    @property
    def points(self):
        return (0,) if self.prompt else self.depths


@dataclass(frozen=True)
class Pymla:
    """`pymla bench`, with the interpreter that runs this script."""

    mla: str = "auto"
    label: str = "pymla"

    def measure(self, job):
        """Rates at each depth, measured by a new process."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            what = ["--prompt", job.prompt] if job.prompt else ["--pp", job.pp, "--tg", job.tg, "--depths", _csv(job)]
            command = [sys.executable, "-m", "pymla", "bench", "-m", job.model, "--mla", self.mla]
            command += ["--device", "cpu", *what]
            _run([*command, "--cache-type", job.cache_type, "--threads", job.threads, "--json", report])
            rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
        return {row["n_kv"]: Rates(row["s_pp"], row["s_tg"]) for row in rows}


@dataclass(frozen=True)
class SweepBench:
    """ik_llama.cpp's ``llama-sweep-bench``, which always begins at an empty cache."""

    program: str
    arguments: tuple
    label: str

    def measure(self, job):
        """Rates at each depth, measured by a new process."""
        command = [self.program, "-m", job.model, "-t", job.threads, "-ctk", job.cache_type, "-mla", 3, "-fa", "on"]
        if job.prompt:
            # Its prompt in one call is its own sweep without generation: batches of -ub tokens, one after the other.
            rows = self._rows(*command, "-c", job.prompt, "-ub", job.pp, "-n", 1)
            total = sum(row["pp"] for row in rows)
            if total != job.prompt:
                raise PymlaError(
                    f"{self.program}: a prompt of {total} tokens, not {job.prompt}; choose a -ub that fits"
                )
            return {0: Rates(total / sum(row["t_pp"] for row in rows), None)}
        if job.tg > job.pp:
            raise PymlaError(f"--tg {job.tg}: llama-sweep-bench has room for --pp {job.pp} tokens at the last depth")
        for depth in job.depths:
            if depth % job.pp:
                raise PymlaError(f"--depths {depth}: llama-sweep-bench measures at multiples of --pp {job.pp}")
        stride = math.gcd(*job.depths) // job.pp
        skip = ["--sweep-stride", stride] if stride > 1 else []
        rows = self._rows(*command, "-c", job.depths[-1] + job.pp, "-ub", job.pp, "-n", job.tg, *skip)
        return {row["n_kv"]: Rates(row["pp"] / row["t_pp"], row["tg"] / row["t_tg"]) for row in rows}

    def _rows(self, *command):
        # Its table is part of the log, which some versions write to standard error.
        return parse_sweep(_run([*command, *self.arguments], both=True))


@dataclass(frozen=True)
class LlamaBench:
    """llama.cpp's ``llama-bench``."""

    program: str
    arguments: tuple
    label: str

    def measure(self, job):
        """Rates at each depth, measured by a new process."""
        sizes = ["-p", job.prompt or job.pp, "-n", 0 if job.prompt else job.tg, "-d", _csv(job)]
        options = ["-t", job.threads, "-ctk", job.cache_type, "-fa", 1, "-r", 1, "-o", "json"]
        return parse_llama_bench(_run([self.program, "-m", job.model, *sizes, *options, *self.arguments]))


@dataclass(frozen=True)
class LlamaPython:
    """llama.cpp through llama-cpp-python, for another interpreter; arguments are ``name=value`` of `Llama`."""

    program: str
    arguments: tuple
    label: str

    def measure(self, job):
        """Rates at each depth, measured by a new process."""
        options = {"pp": job.prompt or job.pp, "tg": 0 if job.prompt else job.tg, "depths": job.points}
        options |= {"model": str(job.model), "threads": job.threads, "cache_type": job.cache_type}
        rows = json.loads(_run([self.program, SCRIPT, json.dumps(options), *self.arguments]))
        return {row["n_kv"]: Rates(row["s_pp"], row["s_tg"]) for row in rows}


def parse_sweep(text):
    """Rows of ``llama-sweep-bench``'s table: dictionaries of pp, tg, n_kv, t_pp and t_tg."""
    number = r" *([0-9.]+) *\|"
    found = re.findall(r"^\|" + 7 * number, text, re.MULTILINE)
    if not found:
        raise PymlaError("llama-sweep-bench printed no table: " + _last_line(text))
    return [
        {"pp": int(pp), "tg": int(tg), "n_kv": int(n_kv), "t_pp": float(t_pp), "t_tg": float(t_tg)}
        for pp, tg, n_kv, t_pp, _, t_tg, _ in found
    ]


def parse_llama_bench(text):
    """Rates at each depth from ``llama-bench -o json``, whose prompt and generation are rows of their own."""
    found = {}
    for row in json.loads(text[text.index("[") :] if "[" in text else text):
        pp, tg = found.get(row["n_depth"], (None, None))
        found[row["n_depth"]] = Rates(row["avg_ts"], tg) if row["n_prompt"] else Rates(pp, row["avg_ts"])
    return found


class Spread(NamedTuple):
    """Median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values):
        return cls(statistics.median(values), min(values), max(values))


def compare(rounds, first, peer, depth, kind):
    """Spread of ``rate of first / rate of peer`` over the rounds; None where either has no such rate.

    Parameters
    ----------
    rounds : list of dict
        Label of an engine to its rates by depth.
    first, peer : str
        Labels; as `peer` also "best": the fastest of all others in each round.
    depth : int
    kind : "pp" or "tg"
    """
    pairs = [(_rate(each, first, first, depth, kind), _rate(each, peer, first, depth, kind)) for each in rounds]
    ratios = [mine / theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    return Spread.of(ratios) if ratios else None


def table(results, engines):
    """Lines of a Markdown table: medians of the rates, and ratios with their spread.

    Parameters
    ----------
    results : list of (Job, list)
        A job for each model, and its rounds as in `compare`.
    engines : list
        The first is compared with the others.
    """
    first, peers = engines[0].label, [engine.label for engine in engines[1:]]
    if len(peers) > 1:
        peers.append("best")
    yield f"| model | N_KV | | {first} t/s | peer | peer t/s | ratio | lowest | highest |"
    yield "| --- | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |"
    for job, rounds in results:
        yield from _rows(job, rounds, first, peers)


def _rows(job, rounds, first, peers):
    for depth in job.points:
        for kind in ("pp", "tg"):
            name = f"prompt of {job.prompt}" if job.prompt else f"{kind.upper()}{getattr(job, kind)}"
            for peer in peers:
                ratio = compare(rounds, first, peer, depth, kind)
                if ratio is None:
                    continue
                mine, theirs = (statistics.median(_rates(rounds, label, first, depth, kind)) for label in (first, peer))
                yield (
                    f"| {job.model.stem} | {depth} | {name} | {mine:.2f} | {peer} | {theirs:.2f} | "
                    f"{ratio.median:.2f}x | {ratio.low:.2f}x | {ratio.high:.2f}x |"
                )


def _rate(rates, label, first, depth, kind):
    """An engine's rate in a round, or the best of all but `first`; None where there is none."""
    labels = [each for each in rates if each != first] if label == "best" else [label]
    found = [getattr(rates[each][depth], kind) for each in labels]
    return max((rate for rate in found if rate is not None), default=None)


def _rates(rounds, label, first, depth, kind):
    rates = [_rate(each, label, first, depth, kind) for each in rounds]
    return [rate for rate in rates if rate is not None]


def series(rounds, engines, job):
    """A line of the picture for each engine."""
    lines = []
    for engine in engines:
        columns = {}
        for kind in ("pp", "tg"):
            spreads = [Spread.of(_rates(rounds, engine.label, None, depth, kind) or [math.nan]) for depth in job.points]
            columns[kind] = [None if math.isnan(each.median) else each.median for each in spreads]
            columns[f"{kind}_range"] = [(each.low, each.high) for each in spreads]
        lines.append(plot.Series(engine.label, list(job.points), **columns))
    return lines


def _csv(job):
    return ",".join(map(str, job.points))


def _run(command, both=False):
    """Standard output of a command; `both`: with standard error in it.

    Raises
    ------
    PymlaError
        It cannot be started, or fails.
    """
    command = [str(part) for part in command]
    try:
        error_output = subprocess.STDOUT if both else subprocess.PIPE
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=error_output, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise PymlaError(f"{command[0]}: {error.strerror}") from None
    if result.returncode:
        said = _last_line(result.stderr or "") or _last_line(result.stdout)
        raise PymlaError(f"{shlex.join(command)} ended with code {result.returncode}: {said}")
    return result.stdout


def _last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _peers(kind, texts):
    for text in texts:
        program, *arguments = shlex.split(text)
        name = {SweepBench: "llama-sweep-bench", LlamaBench: "llama-bench", LlamaPython: "llama-cpp-python"}[kind]
        yield kind(program, tuple(arguments), " ".join([name, *arguments]))


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-m",
    "--model",
    "models",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    multiple=True,
)
@click.option("--llama-sweep-bench", "sweep_bench", multiple=True, metavar="'PATH [ARGS]'", help="ik_llama.cpp.")
@click.option("--llama-bench", multiple=True, metavar="'PATH [ARGS]'", help="llama.cpp.")
@click.option(
    "--llama-python",
    multiple=True,
    metavar="'PYTHON [NAME=VALUE]'",
    help="A Python interpreter that has llama-cpp-python, and arguments of its Llama.",
)
@click.option("--pp", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--tg", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--depths", default="0", show_default=True, metavar="N,N,…", help="N_KV of the points.")
@click.option(
    "--prompt", type=click.IntRange(min=1), help="Instead: one prompt of so many tokens, from an empty cache."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of every engine. [default: all usable cores]")
@click.option("--cache-type", default="q8_0", show_default=True, help="Of every engine.")
@click.option("--mla", default="auto", show_default=True, help="pymla's variant.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rates of every round.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw all engines: .png or .svg.")
def against(models, sweep_bench, llama_bench, llama_python, rounds, mla, json_path, plot_path, threads, depths, **what):
    """Compare pymla with other engines on a file, or on several, one after the other.

    The table goes to standard output. An interrupt ends the comparison; finished rounds count.
    """
    peers = [
        *_peers(SweepBench, sweep_bench),
        *_peers(LlamaBench, llama_bench),
        *_peers(LlamaPython, llama_python),
    ]
    if not peers:
        raise PymlaError("give at least one peer: --llama-sweep-bench, --llama-bench or --llama-python")
    engines = [Pymla(mla), *peers]
    if len({engine.label for engine in engines}) < len(engines):
        raise PymlaError("two peers have the same name and arguments; give each once")
    if len({model.stem for model in models}) < len(models):
        raise PymlaError("two models have the same name, by which the table tells them apart")
    files = {option: path for option, path in (("--json", json_path), ("--plot", plot_path)) if path}
    outputs.check(files, models, devices=True)
    if plot_path:
        if len(models) > 1:
            raise PymlaError("--plot draws one model; give one -m, or leave --plot out")
        plot.check(plot_path)
    from pymla.cpu import usable_cores

    points = _depths(depths, what["pp"], what["tg"])
    what |= {"depths": points, "threads": threads or usable_cores()}
    results, code, failure = [(Job(model=model, **what), []) for model in models], 0, None
    try:
        for job, done in results:
            for number in range(rounds):
                done.append(_round(engines, job, f"{job.model.name}, round {number + 1} of {rounds}"))
    except KeyboardInterrupt:
        code = 130
    except PymlaError as error:
        # Rounds before this one may have taken hours.
        failure = error
    results = [(job, done) for job, done in results if done]
    about = {"machine": facts.machine(), "date": datetime.date.today().isoformat(), "threads": what["threads"]}
    if results:
        title = _title(results, about)
        click.echo(title + "\n")
        click.echo("\n".join(table(results, engines)))
        if plot_path:
            (job, done), *_ = results
            plot.sweep(series(done, engines, job), plot_path, title)
    if json_path:
        settings = {name: what[name] for name in ("pp", "tg", "prompt", "cache_type")} | about
        record = settings | {"models": [{"model": job.model.name, "rounds": _record(done)} for job, done in results]}
        outputs.write(json_path, (json.dumps(record, indent=1) + "\n").encode())
    if failure:
        raise failure
    return code


def _title(results, about):
    names = ", ".join(job.model.name for job, _ in results)
    rounds = "/".join(map(str, sorted({len(done) for _, done in results})))
    (job, _), *_ = results
    settings = f"{job.cache_type} cache, {job.threads} threads, {rounds} rounds"
    return f"{names}: {settings}\n{about['machine']}, {about['date']}"


def _record(rounds):
    """The rounds as plain types, for JSON."""
    return [{label: {n: each._asdict() for n, each in rates.items()} for label, rates in r.items()} for r in rounds]


def _depths(text, pp, tg):
    """The depths, which `sweep.Settings` checks."""
    try:
        return sweep.Settings(pp, tg, tuple(int(part) for part in text.split(","))).depths
    except ValueError:
        raise PymlaError(f"--depths {text!r}: write numbers with commas between, as in 0,4096,15872") from None


def _round(engines, job, title):
    """Rates of every engine."""
    found = {}
    for engine in engines:
        click.echo(f"{title}: {engine.label} …", err=True)
        _bring_to_memory(job.model)
        rates = engine.measure(job)
        missing = [depth for depth in job.points if depth not in rates]
        if missing:
            raise PymlaError(f"{engine.label} measured nothing at a depth of {missing[0]} tokens")
        found[engine.label] = rates
        for depth in job.points:
            click.echo(f"  {depth:>6}: " + ", ".join(_shown(rates[depth])), err=True)
    return found


def _bring_to_memory(path):
    """Read a file, so that an engine finds it in memory, whatever those before it needed memory for."""
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _shown(rates):
    return [f"{kind} {rate:.2f} t/s" for kind, rate in rates._asdict().items() if rate is not None]


def main():
    """The script: errors that the user can mend are one line and exit code 2."""
    try:
        code = against(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except PymlaError as error:
        click.echo(f"against.py: error: {' '.join(str(error).split())}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
