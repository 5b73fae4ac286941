"""What readers touch, in a real browser without a network: the exported page without a kernel, and JupyterLab with one.

Needs Debian's Chromium, the packages playwright and jupyterlab, and html-manager from npm (README says how to get them). What is
missing skips these tests; with LLADA_BROWSER=1, as in CI, it fails them.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
WEB = ROOT / "build" / "web"
CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
MANAGER, REQUIRE = "jupyter-widgets-html-manager-*.tgz", "requirejs-*.tgz"
LACKING = [
    what
    for what, there in {
        "chromium (apt-get install -y chromium)": CHROMIUM,
        "playwright (pip install playwright)": importlib.util.find_spec("playwright"),
        "jupyterlab (pip install jupyterlab)": importlib.util.find_spec("jupyterlab"),
        "html-manager in build/web (npm pack, see README)": list(WEB.glob(MANAGER)) and list(WEB.glob(REQUIRE)),
    }.items()
    if not there
]

VIEWER = """\
import torch
import llada_helpers as h

tokenizer = h.CharTokenizer.from_text("<b>abcdef & so on</b>\\n")


def generate(prompt, seed):
    "The prompt and its 16 followers from left to right, then the same backwards: nothing to train, easy to foretell."
    ids = tokenizer.encode((prompt + "<b>abcdef & so on</b>")[: len(prompt) + 16])[None]
    order = torch.arange(ids.shape[1])[None] - len(prompt)
    backwards = torch.where(order < 0, -1, order.max() - order)
    return {
        f"forwards {seed}": h.Generation(ids, order.clamp(min=-1), 16),
        f"backwards {seed}": h.Generation(ids, backwards, 16),
    }


films = generate("", 0)
viewer = h.DenoisingViewer({**films, "race": {"AR": films["forwards 0"], "LLaDA": films["backwards 0"]}}, tokenizer, generate)
"""


@pytest.fixture(scope="module", autouse=True)
def everything_is_there():
    if LACKING and os.environ.get("LLADA_BROWSER") == "1":
        pytest.fail(f"LLADA_BROWSER=1, but missing: {'; '.join(LACKING)}")
    if LACKING:
        pytest.skip(f"missing: {'; '.join(LACKING)}")


@pytest.fixture(scope="module")
def browser(everything_is_there):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page without a network, but with the two scripts that an exported notebook asks for; a script error fails the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route(re.compile("^https?://(?!127.0.0.1|localhost)"), answer_from_npm)
    page.set_default_timeout(60_000)
    yield page
    page.close()
    assert not errors


def answer_from_npm(route) -> None:
    for part, archive, member in (
        ("require.min.js", REQUIRE, "package/require.js"),
        ("html-manager", MANAGER, "package/dist/embed-amd.js"),
    ):
        if part in route.request.url:
            with tarfile.open(next(WEB.glob(archive))) as packed:
                script = packed.extractfile(member).read()
            return route.fulfill(body=script, content_type="text/javascript")
    return route.abort()  # fonts and MathJax: the viewer must do without


def clean_environment(directory: Path) -> dict[str, str]:
    """Jupyter's settings and the caller's presets stay out; the helper is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLADA_", "JUPYTER"))}
    own = {f"JUPYTER_{kind}_DIR": str(directory / f".jupyter-{kind.lower()}") for kind in ("CONFIG", "RUNTIME")}
    return {**kept, **own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JUPYTERLAB_SETTINGS_DIR": str(directory / ".lab")}


def notebook(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def export(path: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", *options, str(path)]
    done = subprocess.run(command, env=clean_environment(path.parent), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return path.with_suffix(".html")


@pytest.fixture(scope="module")
def exported(everything_is_there, tmp_path_factory) -> Path:
    """A notebook with nothing but the viewer, executed and exported."""
    return export(notebook(tmp_path_factory.mktemp("export") / "viewer.ipynb", VIEWER + "viewer"), "--execute")


def shows(page, text: str) -> None:
    """Wait until a viewer's frame that is in sight says `text`."""
    page.locator(".llada:visible", has_text=text).first.wait_for()


def gets_to(page, passes: int, viewer: int = 0) -> None:
    """Wait until a viewer that plays shows so many forward passes, or more: a single frame may be gone too soon to be seen."""
    script = """([viewer, passes]) => {
        const shown = document.querySelectorAll('.llada-viewer')[viewer].querySelector('.llada').innerText;
        return Number(/(\\d+) of \\d+ forward passes|pass (\\d+)/.exec(shown).slice(1).find(Boolean)) >= passes;
    }"""
    page.wait_for_function(script, arg=[viewer, passes])


def press(page, key: str, times: int = 1, viewer: int = 0) -> None:
    """Press a key on the slider of the generation that is shown."""
    page.locator(".llada-viewer").nth(viewer).locator(".llada-pages .noUi-handle:visible").first.focus()
    for _ in range(times):
        page.keyboard.press(key)


def test_the_slider_moves_without_a_kernel(page, exported):
    page.goto(exported.as_uri())
    shows(page, "step 0 · t = 1.00 · 0 of 16 characters revealed · 0 of 16 forward passes")
    press(page, "ArrowRight", 3)
    shows(page, "step 3 · t = 0.81 · 3 of 16 characters revealed · 3 of 16 forward passes")
    text = page.locator(".llada:visible pre")
    assert text.inner_text() == "<b>" + "█" * 13, "the text, not bold text"
    assert text.locator("u").inner_text() == ">"
    assert text.locator("u").evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(240, 228, 66)"
    sign = "e => getComputedStyle(e, '::before').content"
    assert page.locator(".widget-play i:visible").first.evaluate(sign) == '"▶"', "the page has no icon font"
    track = page.locator(".llada-pages .noUi-base:visible").bounding_box()
    page.mouse.move(track["x"] + track["width"] * 3 / 16, track["y"] + track["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] + 20, track["y"], steps=8)
    page.mouse.up()
    shows(page, "t = 0.00")
    assert text.inner_text() == "<b>abcdef & so o"


def test_play_runs_to_the_end_at_the_chosen_speed(page, exported):
    page.goto(exported.as_uri())
    shows(page, "0 of 16 forward passes")
    speed, play = page.locator(".llada-viewer .noUi-handle").first, page.locator(".widget-play button:visible")
    speed.focus()
    page.keyboard.press("End")
    started = page.evaluate("performance.now()")
    play.first.click()
    gets_to(page, 3)
    assert page.evaluate("performance.now()") - started >= 2000, "a second per pass"
    speed.focus()
    page.keyboard.press("Home")
    shows(page, " 16 of 16 forward passes")
    assert page.locator(".llada-pages .widget-readout:visible").inner_text() == "16"
    play.nth(1).click()
    shows(page, " 0 of 16 forward passes")


def test_play_pauses(page, exported):
    page.goto(exported.as_uri())
    shows(page, "0 of 16 forward passes")
    page.locator(".widget-play button:visible").first.click()
    gets_to(page, 2)
    page.locator(".widget-play button:visible").first.click()
    before = page.locator(".llada:visible").inner_text()
    page.wait_for_timeout(600)
    assert page.locator(".llada:visible").inner_text() == before and " 16 of 16 forward" not in before


def test_the_choice_shows_another_generation_and_the_race(page, exported):
    page.goto(exported.as_uri())
    shows(page, "0 of 16 forward passes")
    page.locator("select").select_option("backwards 0")
    press(page, "ArrowRight", 2)
    shows(page, " 2 of 16 forward passes")
    assert page.locator(".llada:visible pre").inner_text() == "█" * 14 + " o"
    page.locator("select").select_option("race")
    press(page, "ArrowRight", 4)
    shows(page, "pass 4 of 16 · 4 of 16 characters")
    assert page.locator(".llada:visible pre").all_inner_texts() == ["<b>a" + "█" * 12, "█" * 12 + "so o".rjust(4)]
    page.locator("select").select_option("backwards 0")
    shows(page, " 2 of 16 forward passes")


def test_the_committed_notebook_exported_from_disk(page, tmp_path):
    shutil.copy(ROOT / "EG_TakeHome_LLaDA.ipynb", tmp_path)
    page.goto(export(tmp_path / "EG_TakeHome_LLaDA.ipynb").as_uri())
    shows(page, "t = 1.00")
    viewers = page.locator(".llada-viewer")
    assert viewers.count() == 2, "the generations, and the race"
    names = viewers.first.locator("select option").all_inner_texts()
    assert len(names) >= 4
    beginnings = set()
    for name in names:
        viewers.first.locator("select").select_option(name)
        press(page, "End")
        shows(page, "t = 0.00")
        beginnings.add(viewers.first.locator(".llada:visible pre").inner_text())
    assert len(beginnings) == len(names) and not any("█" in text for text in beginnings)
    press(page, "ArrowRight", 5, viewer=1)
    shows(page, "pass 5 of ")
    viewers.nth(1).locator(".widget-play button:visible").first.click()
    gets_to(page, 9, viewer=1)


@pytest.fixture
def lab(tmp_path, everything_is_there):
    """The address of a JupyterLab server in a directory with one notebook."""
    notebook(tmp_path / "viewer.ipynb", VIEWER + "viewer")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={tmp_path}", "--ServerApp.port_retries=0", "--LabApp.news_url="]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=clean_environment(tmp_path), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (found := list((tmp_path / ".jupyter-runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "lab.log").read_text()[-3000:]
            time.sleep(0.2)
        yield json.loads(found[0].read_text())["url"]
    finally:
        server.terminate()
        server.wait(30)


def test_jupyterlab_moves_the_slider_and_generates_again(page, lab):
    page.goto(lab + "lab/tree/viewer.ipynb")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    shows(page, "0 of 16 forward passes")
    press(page, "ArrowRight", 3)
    shows(page, " 3 of 16 forward passes")
    assert page.locator(".llada:visible pre").inner_text() == "<b>" + "█" * 13
    page.locator("select:visible", has_text="race").select_option("race")
    page.get_by_placeholder("a prompt of your own").fill("bad & ")
    page.get_by_role("button", name="generate again").click()
    page.locator("select:visible", has_text="forwards 1").wait_for()
    shows(page, " 0 of 16 forward passes")
    press(page, "End")
    shows(page, "t = 0.00")
    assert page.locator(".llada:visible pre").inner_text() == "bad & <b>abcdef & so o"
    page.locator("select:visible", has_text="backwards 1").select_option("backwards 1")
    press(page, "ArrowRight", 1)
    shows(page, " 1 of 16 forward passes")
    assert page.locator(".llada:visible pre").inner_text() == "bad & " + "█" * 15 + "o"
    page.get_by_placeholder("a prompt of your own").fill("<script>?")
    page.get_by_role("button", name="generate again").click()
    page.get_by_text("characters not in the vocabulary: ['?'").wait_for()
    shows(page, " 1 of 16 forward passes")
