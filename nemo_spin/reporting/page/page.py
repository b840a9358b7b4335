"""The page: one HTML file that needs nothing else, with everything that was written by others escaped."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemo_spin.errors import UserError
from nemo_spin.reporting.page import tables
from nemo_spin.reporting.page.figures import figures
from nemo_spin.reporting.page.findings import Finding
from nemo_spin.reporting.page.run_directory import Run
from nemo_spin.reporting.page.samples import Sample
from nemo_spin.runtime.files import written_whole

FOLDED_FROM = 500  # characters of a response from which it is folded
CUT_FROM = 20_000  # characters of a text that stand in the page


def render(run: Run, findings: list[Finding], samples: list[Sample]) -> str:
    """The report as HTML."""
    from plotly.offline import get_plotlyjs

    directory = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(directory),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # scripts by their hashes: a text of the run that slipped through the escaping would still not run
    scripts = [get_plotlyjs(), (directory / "page.js").read_text(encoding="utf-8")]
    columns, rows = tables.iterations(run)
    return environment.get_template("page.html.j2").render(
        run=run,
        title=tables.title(run),
        headline=tables.headline(run),
        findings=findings,
        figures=[(figure, Markup(figure.json)) for figure in figures(run)],
        columns=columns,
        rows=rows,
        metrics=tables.metrics(run),
        notes=tables.notes(run),
        samples=samples,
        folded_from=FOLDED_FROM,
        cut_from=CUT_FROM,
        hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup((directory / "page.css").read_text(encoding="utf-8")),
    )


def write_whole(page: str, output: Path) -> Path:
    """Write the page whole or not at all. Raises UserError if it cannot be written."""
    try:
        # text of the run may hold half of a surrogate pair, which no encoding has
        with written_whole(output) as file:
            file.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): choose another file with --output.") from None
    return output


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
