"""Pages in a real browser, headless: nothing is cut off at three widths, in light and in dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from beside import load

from qkd.report.comparing.comparison import compare_runs, render_comparison

findings = load(Path(__file__).parent / "test_findings.py")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
WIDTHS = (1400, 768, 390)
DARK, LIGHT = 0, 1  # Chromium's numbers of color schemes

# Measures each frame: the page's scroll width, elements that reach beyond it or hold more than they show, and letters
# that a picture's edge cuts off.
PROBE = """
<script>
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) {
    const page = frame.contentDocument, view = frame.contentWindow, faults = [];
    const name = element => element.tagName + ': ' + element.textContent.trim().slice(0, 40);
    for (const element of page.querySelectorAll('body *')) {
      const box = element.getBoundingClientRect(), picture = element.ownerSVGElement;
      if (picture) {
        const edge = picture.getBoundingClientRect();
        const isOut = box.left < edge.left - 1 || box.right > edge.right + 1 ||
          box.top < edge.top - 1 || box.bottom > edge.bottom + 1;
        if (element.tagName === 'text' && isOut)
          faults.push('cut by its picture, ' + name(element));
      } else {
        if (box.width && (box.right > view.innerWidth + 1 || box.left < -1))
          faults.push('beyond the page, ' + name(element));
        if (element.clientWidth && element.scrollWidth > element.clientWidth + 1 &&
            view.getComputedStyle(element).overflowX !== 'visible') faults.push('scrolls, ' + name(element));
      }
    }
    const color = view.getComputedStyle(page.body).backgroundColor.match(/[0-9]+/g).map(Number);
    found[frame.width] = {scroll: page.documentElement.scrollWidth, inner: view.innerWidth, faults,
                          elements: page.querySelectorAll('body *').length, brightness: color[0]};
  }
  document.body.textContent = 'FOUND' + JSON.stringify(found) + 'END';
};
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    """Return the path of a browser of Chromium's family."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser here (any of {', '.join(BROWSERS)}): apt-get install chromium")
    return path


def measured(browser: str, page: str, folder: Path, scheme: int) -> dict[str, dict[str, object]]:
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>' for width in WIDTHS)
    file = folder / "frames.html"
    file.write_text(f"<!DOCTYPE html><html><body>{frames}{PROBE}</body></html>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    options += [f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=20000", file.as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=300, check=False)
    match = re.search("FOUND(.*?)END", done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    found: dict[str, dict[str, object]] = json.loads(html.unescape(match[1]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [DARK, LIGHT], ids=["dark", "light"])
@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_nothing_is_cut_off(browser: str, tmp_path: Path, kind: str, scheme: int) -> None:
    run = findings.files.make_devices(findings.make_findings(tmp_path / ("run-with-a-long-name" * 4)))
    page = findings.page_of(run) if kind == "report" else render_comparison(compare_runs([run] * 3))
    found = measured(browser, page, tmp_path, scheme)
    assert sorted(map(int, found)) == sorted(WIDTHS)
    for width, facts in found.items():
        assert facts["inner"] == int(width) and facts["elements"] > 30  # type: ignore[operator]
        assert facts["scroll"] <= facts["inner"], f"the page scrolls sideways at {width} pixels"  # type: ignore[operator]
        assert facts["faults"] == [], width
        assert (facts["brightness"] < 128) is (scheme == DARK)  # type: ignore[operator]


@pytest.mark.slow
def test_the_probe_sees_what_is_cut_off(browser: str, tmp_path: Path) -> None:
    wide = '<body style="background: #fff"><p style="width: 900px">wide</p>' + "<i>x</i>" * 40
    found = measured(browser, wide, tmp_path, LIGHT)
    assert found["1400"]["faults"] == []
    for width in ("768", "390"):
        assert found[width]["scroll"] > found[width]["inner"] and found[width]["faults"]  # type: ignore[operator]
