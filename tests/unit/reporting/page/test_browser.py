"""The page in a real browser: every plot is drawn, no script fails, and nothing is asked of the network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_run import make

from nemo_spin.reporting.page import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = """
--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking
--disable-component-update --disable-default-apps --disable-sync --disable-extensions --metrics-recording-only
--virtual-time-budget=20000 --window-size=1200,900 --enable-logging=stderr
""".split()


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)}")
    return found


def opened(browser: str, page: Path, directory: Path) -> tuple[str, str, list[str]]:
    """The page as the browser has made it, what its scripts complain of, and the addresses that it asked for."""
    net_log = directory / "net.json"
    places = [f"--user-data-dir={directory / 'profile'}", f"--log-net-log={net_log}"]
    command = [browser, *OPTIONS, *places, "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    complaints = "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)
    # requests on behalf of a page bear its origin, those that the browser makes for itself do not
    events = [
        line for line in net_log.read_text(encoding="utf-8").splitlines() if '"network_isolation_key":"file:' in line
    ]
    addresses = [address for line in events for address in re.findall(r'"url":"((?:http|ws|ftp)[^"]*)"', line)]
    return run.stdout, complaints, addresses


def plots_of(dom: str) -> dict[str, str]:
    """What is inside of each plot, by the name of its figure."""
    found = re.findall(r'<div class="plot[^>]*data-figure="figure-(\w+)"[^>]*>(.*?)<figcaption', dom, flags=re.DOTALL)
    return dict(found)


def is_drawn(plot: str) -> bool:
    """Whether there is a drawing of some size, with a line or bars in it that go somewhere."""
    size = re.search(r'<svg class="main-svg"[^>]* width="([\d.]+)" height="([\d.]+)"', plot)
    shapes = re.findall(r'<path class="js-line"[^>]* d="(M[^"]{8,})"', plot)
    shapes += re.findall(r'<g class="point"><path d="(M[^"]{8,})"', plot)
    return size is not None and min(map(float, size.groups())) > 100 and bool(shapes)


def test_every_plot_is_drawn_without_errors_or_network(browser: str, tmp_path: Path) -> None:
    dom, complaints, addresses = opened(browser, write_report(make(tmp_path / "run")), tmp_path)
    plots = plots_of(dom)
    assert len(plots) == 15
    assert [key for key, plot in plots.items() if not is_drawn(plot)] == []
    assert complaints == ""
    assert addresses == []


def test_the_test_sees_what_goes_wrong(browser: str, tmp_path: Path) -> None:
    page = write_report(make(tmp_path / "run"))
    text = page.read_text(encoding="utf-8")
    broken = text.replace('id="figure-kl"', 'id="figure-gone"').replace(
        "</main>", '<img src="http://127.0.0.1:9/a"></main>'
    )
    page.write_text(broken, encoding="utf-8")
    dom, complaints, addresses = opened(browser, page, tmp_path)
    assert not is_drawn(plots_of(dom)["kl"])
    assert "null" in complaints and "127.0.0.1:9" in complaints
    assert addresses == []  # the page's own policy refuses the request
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", broken)
    page.write_text(without_policy, encoding="utf-8")
    assert set(opened(browser, page, tmp_path)[2]) == {"http://127.0.0.1:9/a"}
