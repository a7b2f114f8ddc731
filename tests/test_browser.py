"""In a real browser, where there is one: the page of a run on a phone, and the notebook's keep-alive."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from config import ResidualConfig
from newllm.report.page import artifact_paths
from newllm.report.record import find_records, read_record
from train import main as train

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
)  # fmt: skip
LOOK = """<script>addEventListener("load", () => {
    const images = [...document.images].map((image) => image.complete && image.naturalWidth > 500);
    const details = [...document.querySelectorAll("details")];
    details.forEach((each) => { each.open = true; });
    document.title = JSON.stringify({
        images, details: details.length, width: innerWidth, needed: document.documentElement.scrollWidth,
    });
});</script>"""


def shown(page, folder, *flags):
    """The document as the browser has it in the end."""
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'browser'}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_page_of_a_run_fits_a_phone(tiny_settings, tmp_path):
    """Pictures are shown, folded tables open, and nothing but a table scrolls sideways."""
    train(ResidualConfig(**tiny_settings | dict(artifacts=True)))
    (record,) = map(read_record, find_records(tiny_settings["checkpoint_dir"]))
    page = tmp_path / "page.html"
    page.write_text(artifact_paths(record.folder, record.kind, record.run)["report"].read_text() + LOOK)
    found = json.loads(
        re.search(r"<title>(\{.*?\})</title>", shown(page, tmp_path, "--window-size=500,900"))[1]
    )
    assert found["images"] == [True, True] and found["details"] == 4
    assert found["needed"] <= found["width"] <= 500


def test_the_keep_alive_clicks_once_a_minute(tmp_path):
    """The cell's own script on a page with Colab's button: two clicks in 2.5 minutes of its time."""
    cells = json.loads((ROOT / "notebooks" / "colab.ipynb").read_text())["cells"]
    (cell,) = [source for source in ("".join(c["source"]) for c in cells) if "setInterval" in source]
    assert "KEEP_ALIVE = False" in cell
    script = re.search(r'Javascript\(\s*"""(.*?)"""', cell, re.DOTALL)[1]
    page = tmp_path / "page.html"
    page.write_text(
        '<title>0</title><colab-toolbar-button id="connect" onclick="document.title = +document.title + 1">'
        f"</colab-toolbar-button><script>{script}</script>"
    )
    assert "<title>2</title>" in shown(page, tmp_path, "--virtual-time-budget=150000")
