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
from notebooks import python_path

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

FILMS = """\
import torch
from IPython.display import display
from ipywidgets import interact_manual
import llada_helpers as H

tokenizer = H.CharTokenizer.from_text("<b>abcdef & so on</b>\\n")


def films(prompt, seed):
    "The prompt and its 16 followers from left to right, then the same backwards: nothing to train, easy to foretell."
    ids = tokenizer.encode((prompt + "<b>abcdef & so on</b>")[: len(prompt) + 16])[None]
    order = torch.arange(ids.shape[1])[None] - len(prompt)
    backwards = torch.where(order < 0, -1, order.max() - order)
    orders = {"forwards": order.clamp(min=-1), "backwards": backwards}
    made = {name: H.Generation(ids, order, 16) for name, order in orders.items()}
    frames = {f"{name} {seed}": H.frames(one, tokenizer) for name, one in made.items()}
    return frames | {"race": [a + b for a, b in zip(*frames.values())]}


def view(prompt="", seed=0):
    display(H.DenoisingViewer(films(prompt, seed)))


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
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(directory / ".lab"), "PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1"}
    return kept | own


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
    return export(notebook(tmp_path_factory.mktemp("export") / "viewer.ipynb", FILMS + "view()"), "--execute")


def shows(page, text: str) -> None:
    """Wait until a viewer's frame that is in sight says `text`."""
    page.locator(".llada:visible", has_text=text).first.wait_for()


def gets_to(page, passes: int, viewer: int = 0) -> None:
    """Wait until a viewer that plays shows so many forward passes, or more: a single frame may be gone too soon to be seen."""
    script = """([viewer, passes]) => {
        const shown = document.querySelectorAll('.llada-viewer')[viewer].querySelector('.llada').innerText;
        return Number(/pass (\\d+) of/.exec(shown)[1]) >= passes;
    }"""
    page.wait_for_function(script, arg=[viewer, passes])


def press(page, key: str, times: int = 1, viewer: int = 0) -> None:
    """Press a key on the slider of the generation that is shown."""
    page.locator(".llada-viewer").nth(viewer).locator(".llada-pages .noUi-handle:visible").first.focus()
    for _ in range(times):
        page.keyboard.press(key)


def test_the_slider_moves_without_a_kernel(page, exported):
    page.goto(exported.as_uri())
    shows(page, "pass 0 of 16 · 0 of 16 characters · t = 1.00")
    press(page, "ArrowRight", 3)
    shows(page, "pass 3 of 16 · 3 of 16 characters · t = 0.81")
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
    shows(page, "pass 0 of 16")
    speed, play = page.locator(".llada-viewer .noUi-handle").first, page.locator(".widget-play button:visible")
    speed.focus()
    page.keyboard.press("End")
    started = page.evaluate("performance.now()")
    play.first.click()
    gets_to(page, 3)
    assert page.evaluate("performance.now()") - started >= 2000, "a second per pass"
    speed.focus()
    page.keyboard.press("Home")
    shows(page, "pass 16 of 16")
    assert page.locator(".llada-pages .widget-readout:visible").inner_text() == "16"
    play.nth(1).click()
    shows(page, "pass 0 of 16")


def test_play_pauses(page, exported):
    page.goto(exported.as_uri())
    shows(page, "pass 0 of 16")
    page.locator(".widget-play button:visible").first.click()
    gets_to(page, 2)
    page.locator(".widget-play button:visible").first.click()
    before = page.locator(".llada:visible").inner_text()
    page.wait_for_timeout(600)
    assert page.locator(".llada:visible").inner_text() == before and "pass 16 of" not in before


def test_the_choice_shows_another_generation_and_the_race(page, exported):
    page.goto(exported.as_uri())
    shows(page, "pass 0 of 16")
    page.locator("select").select_option("backwards 0")
    press(page, "ArrowRight", 2)
    shows(page, "pass 2 of 16")
    assert page.locator(".llada:visible pre").inner_text() == "█" * 14 + " o"
    page.locator("select").select_option("race")
    press(page, "ArrowRight", 4)
    shows(page, "pass 4 of 16 · 4 of 16 characters")
    assert page.locator(".llada:visible pre").all_inner_texts() == ["<b>a" + "█" * 12, "█" * 12 + "so o".rjust(4)]
    page.locator("select").select_option("backwards 0")
    shows(page, "pass 2 of 16")


def test_the_committed_notebook_exported_from_disk(page, tmp_path):
    """Every generation of every viewer runs to its end; two texts are never the same."""
    shutil.copy(ROOT / "EG_TakeHome_LLaDA.ipynb", tmp_path)
    page.goto(export(tmp_path / "EG_TakeHome_LLaDA.ipynb").as_uri())
    shows(page, "t = 1.00")
    viewers = page.locator(".llada-viewer")
    assert viewers.count() >= 1
    for i in range(viewers.count()):
        viewer, written = viewers.nth(i), []
        for film in viewer.locator("select option").all_inner_texts():
            viewer.locator("select").select_option(film)
            press(page, "End", viewer=i)
            frame = viewer.locator(".llada:visible")
            frame.filter(has_text="t = 0.00").first.wait_for()
            assert all(text.count("t = 0.00") == 1 and "█" not in text for text in frame.all_inner_texts())
            written.append(tuple(viewer.locator(".llada:visible pre").all_inner_texts()))
        assert len(set(written)) == len(written) >= 1
    press(page, "Home")
    viewers.first.locator(".widget-play button:visible").first.click()
    gets_to(page, 3)


@pytest.fixture
def lab(tmp_path, everything_is_there):
    """The address of a JupyterLab server in a directory with one notebook."""
    again = "interact_manual(view, prompt='', seed=1)"
    notebook(tmp_path / "viewer.ipynb", FILMS + "view()", again)
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
    """With a kernel, `interact_manual` asks for a prompt and a seed and shows another viewer, or what went wrong."""
    page.goto(lab + "lab/tree/viewer.ipynb")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    shows(page, "pass 0 of 16")
    press(page, "ArrowRight", 3)
    shows(page, "pass 3 of 16")
    assert page.locator(".llada:visible pre").inner_text() == "<b>" + "█" * 13
    press(page, "End")
    shows(page, "pass 16 of 16")
    prompt, again = page.locator(".widget-text input"), page.get_by_role("button", name="Run Interact")
    prompt.fill("bad & ")
    again.click()
    page.locator("select:visible", has_text="forwards 1").wait_for()
    press(page, "End", viewer=1)
    second = page.locator(".llada-viewer").nth(1)
    assert second.locator(".llada:visible pre").inner_text() == "bad & <b>abcdef & so o"
    second.locator("select").select_option("backwards 1")
    press(page, "ArrowRight", 1, viewer=1)
    second.locator(".llada:visible", has_text="pass 1 of 16").wait_for()
    assert second.locator(".llada:visible pre").inner_text() == "bad & " + "█" * 15 + "o"
    prompt.fill("<script>?")
    again.click()
    page.get_by_text("characters not in the vocabulary: ['?'").first.wait_for()
