"""The report as one HTML file that needs nothing else, in the dress of a run's own report."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import writing
from claims import claims
from evidence import Study
from plots import plots

from nemo_spin.reporting.page.page import write_whole


def write(study: Study, output: Path) -> None:
    """Written whole or not at all."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    import nemo_spin.reporting.page

    theirs = Path(nemo_spin.reporting.page.__file__).parent
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [get_plotlyjs(), (theirs / "page.js").read_text(encoding="utf-8")]
    write_whole(
        environment.get_template("study.html.j2").render(
            introduction=writing.introduction(study),
            claims=claims(study),
            rows=writing.comparisons,
            failures=study.failures,
            plots=[(plot, Markup(plot.json)) for plot in plots(study)],
            tables=writing.all_figures(study),
            hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
            scripts=[Markup(script) for script in scripts],
            style=Markup((theirs / "page.css").read_text(encoding="utf-8")),
        ),
        output,
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
