"""Pictures of measurements. Only they need matplotlib."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pymla.errors import PymlaError
from pymla.files import outputs

#: File types of pictures.
SUFFIXES = (".png", ".svg")

_MARKERS = "osD^vP*X"


class Series(NamedTuple):
    """A line of both panels: rates at each N_KV, in tokens per second; None where nothing was measured."""

    label: str
    n_kv: Sequence[int]
    pp: Sequence[float | None]
    tg: Sequence[float | None]
    # (lowest, highest) of the repetitions for each point, or nothing
    pp_range: Sequence[tuple[float, float]] = ()
    tg_range: Sequence[tuple[float, float]] = ()


def check(path: str | Path) -> None:
    """Fail early where a picture could not be written.

    Raises
    ------
    PymlaError
        matplotlib is missing, or the file's name does not end in .png or .svg.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PymlaError(f"{path}: a plot's name ends in {' or '.join(SUFFIXES)}")
    _matplotlib()


@contextlib.contextmanager
def picture(path: str | Path, title: str, size: tuple[float, float]) -> Iterator[Any]:
    """Draw a picture: yields a matplotlib Figure of some size in inches, which is written when the block ends.

    Raises
    ------
    PymlaError
        As `check`, or the file cannot be written.
    """
    check(path)
    matplotlib = _matplotlib()
    # Text of an .svg stays text, which can be searched and is sharp at any size.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 10}):
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        yield figure
        figure.suptitle(title, fontsize=11)
        data = io.BytesIO()
        figure.savefig(data, dpi=150, format=Path(path).suffix[1:].lower())
    outputs.write(Path(path), data.getvalue())


def sweep(series: Sequence[Series], path: str | Path, title: str) -> None:
    """Prompt and generation speed against N_KV, side by side, a line for each series.

    Parameters
    ----------
    series : list of Series
    path : str or Path
        Ending in .png or .svg.
    title : str
        Machine and settings; it may have several lines.

    Raises
    ------
    PymlaError
        matplotlib is missing, or the file cannot be written.
    """
    with picture(path, title, (11, 5.2)) as figure:
        for axes, name, kind in zip(
            figure.subplots(1, 2), ("Prompt (PP)", "Generation (TG)"), ("pp", "tg"), strict=True
        ):
            for i, each in enumerate(series):
                _draw(axes, each, kind, f"C{i}", _MARKERS[i % len(_MARKERS)])
            axes.set_title(name)
            axes.set_xlabel("tokens in the cache (N_KV)")
            axes.set_ylabel("tokens per second")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        handles, labels = axes.get_legend_handles_labels()
        if not handles:
            handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))))


def _draw(axes: Any, series: Series, kind: str, color: str, marker: str) -> None:
    rates = getattr(series, kind)
    spread = getattr(series, f"{kind}_range") or [(rate, rate) for rate in rates]
    points = [(n, rate, ends) for n, rate, ends in zip(series.n_kv, rates, spread, strict=True) if rate is not None]
    if not points:
        return
    n_kv, rates, ends = zip(*points, strict=True)
    axes.plot(n_kv, rates, color=color, marker=marker, markersize=5, label=series.label)
    if any(low < high for low, high in ends):
        axes.fill_between(n_kv, *zip(*ends, strict=True), color=color, alpha=0.15, linewidth=0)


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise PymlaError(f'plots need matplotlib ({error}): pip install "pymla[bench]"') from None
    return matplotlib
