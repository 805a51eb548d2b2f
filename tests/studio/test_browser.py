"""The studio in a real Chromium: a newcomer's way from a dropped file to a trained adapter, and what may come between.

`make test-studio` runs it, and keeps the pictures that docs/studio.md shows (STUDIO_IMAGES names their folder).
"""

import json
import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from scripts import ROOT
from studios import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-studio installs Playwright")
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]
CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Chile": "Santiago",
}
HOSTILE = "<img src=x onerror='window.hacked = true'>"
REPORT = """<h1>tiny-llama: lora, dora</h1>
<p class="warning">This comparison is not finished: 2 cells are still to run.</p>
<h2>In words: test score</h2><ul><li><b>dora</b> against lora: no difference found at this size.</li></ul>
<h2>Results</h2><table><tr><th>method</th><th>test score, %</th><th>test loss</th></tr>
<tr><td>lora</td><td>81.2 ± 0.7</td><td>0.4012 ± 0.0031</td></tr>
<tr><td>dora &lt;img src=x&gt;</td><td>82.0 ± 0.9</td><td>0.3954 ± 0.0022</td></tr></table>
<h2>Figures</h2><figure><figcaption>Score over parameters</figcaption><svg viewBox="0 0 300 120" width="100%">
<script>window.hacked = true</script><rect width="300" height="120" fill="#eef" style="stroke: #3b6fb6"/>
<path d="M10 100 L150 40 L290 20" stroke="#d1603d" fill="none"/></svg></figure>
<script>window.hacked = true</script>"""
IMAGES = Path(os.environ["STUDIO_IMAGES"]).absolute() if os.environ.get("STUDIO_IMAGES") else None
SHOWN = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/studio.md"))
"""Where those pictures are that are kept."""
OPEN = "field => { const group = field.closest('details'); if (group) group.open = true; }"
WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_model_dir):
    """A home with data and a model in a folder to work in."""
    work = tmp_path / "geography"
    work.mkdir()
    shutil.copytree(tiny_model_dir(), work / "tiny-llama")
    drawn = random.Random(0)
    system = {"role": "system", "content": "You are a patient teacher of geography."}
    rows = []
    for number in range(96):
        country = drawn.choice(list(CAPITALS))
        asked = f"What is the capital of {country}?" + " Tell me something that few people know, too." * (
            number % 3 == 1
        )
        told = f"The capital of {country} is {CAPITALS[country]}." + " Its streets are older than its maps." * (
            number % 3
        )
        turns = [system, {"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        rows.append({"messages": turns, "source": "a school-book"})
    (work / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    general = [
        {"text": f"The number {n} comes after {n - 1} and before {n + 1}, as everybody knows."} for n in range(24)
    ]
    (work / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(work)
    return tmp_path


@pytest.fixture
def studio(home, _runs_of_fork_server):
    with Served(home / ".cache" / "theodora" / "studio") as served:
        yield served


@pytest.fixture
def page_of(chromium):
    """`page_of(studio)`: a page of it, watched: what it asks for, and what goes wrong in it."""
    contexts = []

    def make(studio, viewport=WIDE, scheme="light", **more):
        context = chromium.new_context(viewport=viewport, color_scheme=scheme, **more)
        contexts.append(context)
        return watched(context, studio)

    yield make
    for context in contexts:
        context.close()


def watched(context, studio):
    page = context.new_page()
    page.set_default_timeout(120_000)  # machines are slow at times; that it comes is what counts
    page.wrong, page.asked = [], []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(studio.address)
    page.wait_for_selector("body[data-ready]")
    return page


def picture(page, name):
    if IMAGES is not None and f"studio-{name}.png" in SHOWN:
        page.wait_for_timeout(400)  # for what moves to come to rest
        page.screenshot(path=IMAGES / f"studio-{name}.png")


def until(page, found):
    deadline = time.monotonic() + 240  # that it comes is what counts
    while not found():
        assert time.monotonic() < deadline, page.inner_text("main")
        page.wait_for_timeout(100)


def badge(page, name):
    card = page.locator(".run", has=page.get_by_text(name, exact=True))
    return card.locator(".badge").inner_text() if card.count() else ""


def start(page, **typed):
    page.click("nav >> text=Train")
    for name, value in typed.items():
        page.eval_on_selector(f"#field-{name}", OPEN)
        if page.eval_on_selector(f"#field-{name}", "field => field.tagName") == "SELECT":
            page.select_option(f"#field-{name}", value)
        else:
            page.fill(f"#field-{name}", value)
    page.click("text=Start training")
    page.wait_for_selector("#runs-screen:not([hidden])")


def test_a_newcomers_way(studio, page_of, home):
    page = page_of(studio)
    assert "token" not in page.url
    page.wait_for_selector("text=No run yet")
    page.click("#runs-screen >> text=Look at data")
    page.fill("#data-model", "tiny-llama")
    page.fill("#data-length", "180")
    page.set_input_files("#data-file", home / "geography" / "capitals.jsonl")
    page.wait_for_selector(".sample")
    assert page.input_value("#data-path") == str(home / ".cache" / "theodora" / "studio" / "data" / "capitals.jsonl")
    learned = "".join(page.locator(".sample").first.locator(".t.learned").all_inner_texts())
    assert learned.startswith("The capital of ")
    assert page.locator(".t.cut").count()
    assert page.is_visible("text=Left out: the column 'source': not used (96 rows)")
    page.fill("#data-path", "capitals.jsonl")
    page.click("text=Look at it")
    page.wait_for_selector(".result pre >> text=--data capitals.jsonl")
    page.wait_for_selector(".sample")
    page.locator(".result").scroll_into_view_if_needed()
    page.evaluate("scrollTo(0, 250)")
    picture(page, "data")

    page.click("text=Train on it")
    assert page.input_value("#field-data") == "capitals.jsonl"
    page.fill("#field-rank", "many")
    page.wait_for_selector(".wrong >> text=expected a whole number")
    page.fill("#field-rank", "")
    page.click("text=Start training")  # what is missing is said where it is missing
    page.wait_for_selector("#field-output-problem >> text=output is missing")
    assert page.evaluate("document.activeElement.id") == "field-output"
    page.fill("#field-output", "runs/dora")
    page.click("text=Does it fit?")
    page.wait_for_selector(".note.good")
    picture(page, "train")
    typed = {"general": "general.jsonl", "num_train_epochs": "8", "learning_rate": "0.002"}
    start(page, **typed)
    start(page, **typed | {"output": "runs/lora", "method": "lora", "learning_rate": "0.001"})
    until(page, lambda: badge(page, "lora"))
    page.reload()
    page.wait_for_selector("body[data-ready]")
    until(page, lambda: badge(page, "lora") == badge(page, "dora") == "finished")
    for box in page.locator(".swatch:not(:checked)").all():
        box.check()
    page.click(".run .name >> text=dora")
    page.wait_for_selector("td >> text=Held-out loss")
    until(page, lambda: page.locator(".chart:visible").count() == 7)
    picture(page, "runs")
    assert page.wrong == []
    assert all(url.startswith((studio.base, "data:")) for url in page.asked), page.asked

    look(page)
    assert page.wrong == []
    assert all(url.startswith((studio.base, "data:")) for url in page.asked), page.asked

    dark = page_of(studio, scheme="dark")
    dark.click(".run .name >> text=lora")
    dark.locator(".swatch:not(:checked)").first.check()
    dark.wait_for_selector("td >> text=Held-out loss")
    picture(dark, "dark")
    phone = page_of(studio, viewport=PHONE, device_scale_factor=2, has_touch=True, is_mobile=True)
    phone.wait_for_selector("td >> text=Held-out loss")
    picture(phone, "phone")
    for name in ("answers", "chat"):
        dark.goto(f"{studio.base}#look/{name}")
        phone.goto(f"{studio.base}#look/{name}")
        for each in (dark, phone):
            each.wait_for_selector(".pairs tbody tr" if name == "answers" else ".composer")
        picture(dark, f"{name}-dark")
        picture(phone, f"{name}-phone")
    for screen in ("data", "train", "runs", "look/answers", "look/chat"):
        phone.goto(f"{studio.base}#{screen}")
        assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth"), screen


def look(page):
    """From a run that has ended to its answers, and to a chat with it."""
    page.click("#runs-screen button >> text=Before and after")
    page.fill("#answers-tokens", "24")
    page.click("button >> text=Compare")
    page.wait_for_selector(".pairs tbody tr")
    assert page.locator(".pairs tbody tr").count() > 4
    changes = [abs(float(text.replace("−", "-"))) for text in page.locator(".pairs td:last-child").all_inner_texts()]
    assert changes == sorted(changes, reverse=True)
    picture(page, "answers")
    first = page.locator(".pairs tbody tr").first
    first.locator("button").press("Enter")
    page.wait_for_selector(".pairs tr.open >> text=You are a patient teacher of geography.")
    page.click(".pairs th button >> text=#")
    assert page.locator(".pairs tbody td:first-child").all_inner_texts()[:3] == ["1", "2", "3"]
    page.reload()
    page.wait_for_selector(".pairs tbody tr")

    page.keyboard.press("g")
    page.keyboard.press("r")
    page.click(".run .name >> text=dora")
    page.click("#runs-screen button >> text=Chat")
    page.click("#look-chat .chip >> text=lora")
    page.click("#look-chat button >> text=Load")
    page.wait_for_selector(".composer")
    page.fill("#chat-text", "What is the capital of Peru?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".reply[aria-busy=true] .answer:not(:text('…'))")  # while it is made
    until(page, lambda: page.locator(".reply[aria-busy=false]").count() == 3)
    assert page.locator(".reply header b").all_inner_texts() == ["base", "dora", "lora"]
    page.fill("#chat-text", "And of Norway? Tell me all that you know.")
    page.keyboard.press("Enter")
    picture(page, "chat")
    with suppress(playwright.TimeoutError):  # where the answers are over already
        page.click("#look-chat button:visible >> text=Stop", timeout=2000)
    until(page, lambda: page.locator(".reply[aria-busy=false]").count() == 6)
    told = page.locator(".talk").inner_text()
    page.reload()
    page.wait_for_selector(".composer")
    assert page.locator(".talk").inner_text() == told


def test_what_changed_reports_and_what_is_made(studio, page_of, home, adapter):
    work = home / "geography"
    shutil.copytree(adapter, work / "runs" / "loud")
    report = work / "runs" / "study"
    report.mkdir()
    (report / "report.html").write_text(REPORT)
    near = {"prompt": "Where does the ferry to the islands begin its way?", "completion": "At the old pier, by eight."}
    rows = [{"prompt": f"{n} and {n}?", "completion": str(2 * n)} for n in range(30)]
    for name, more in (("some.jsonl", near), ("held_out.jsonl", near | {"completion": "At the old pier, by noon."})):
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in [*rows[:6], more]))

    page = page_of(studio)
    page.click("nav >> text=Data")
    page.fill("#data-path", "some.jsonl")
    page.fill("#data-eval", "held_out.jsonl")
    page.click("text=Look at it")
    page.click(".near summary >> text=7 of 7 held-out rows are nearly in what is trained on")
    page.wait_for_selector(".near .pair >> text=At the old pier, by noon.")
    picture(page, "near")

    page.goto(f"{studio.base}#look/change")
    page.fill("#change-runs-typed", "runs/nowhere")
    page.click("button >> text=Measure")
    page.wait_for_selector(".wrong >> text=is no folder of this machine")
    page.fill("#change-runs-typed", "runs/loud")
    page.click("button >> text=Measure")
    page.wait_for_selector("#look-change td >> text=q_proj")
    until(
        page,
        lambda: (
            page.evaluate("[...document.querySelectorAll('#look-change img')].filter(each => each.naturalWidth).length")
            >= 1
        ),
    )
    picture(page, "change")
    page.keyboard.press("Escape")

    page.click("#look-tab-reports")
    page.wait_for_selector("#look-reports td >> text=dora <img src=x>")
    until(
        page,
        lambda: (
            page.evaluate(
                "[...document.querySelectorAll('#look-reports img')].filter(each => each.naturalWidth).length"
            )
            == 1
        ),
    )
    picture(page, "reports")
    assert page.locator("#look-reports :not(.drawn) > img, #look-reports script, #look-reports svg").count() == 0

    page.click("#look-tab-make")
    page.fill("#make-adapter", "runs/loud")
    page.keyboard.press("Tab")
    assert page.input_value("#make-output") == "runs/loud-merged"
    page.click("#look-make button >> text=Export")
    page.wait_for_selector(".said >> text=The two forms agree.")
    picture(page, "make")
    page.click("#look-make button >> text=Export")
    page.wait_for_selector(".wrong >> text=nothing is replaced")
    page.reload()
    page.wait_for_selector(".said >> text=The two forms agree.")
    assert page.wrong == []
    assert page.evaluate("window.hacked === undefined")
    assert all(url.startswith((studio.base, "data:")) for url in page.asked), page.asked

    dark = page_of(studio, scheme="dark")
    phone = page_of(studio, viewport=PHONE, device_scale_factor=2, has_touch=True, is_mobile=True)
    for name, ready in (("change", "td >> text=q_proj"), ("reports", "td >> text=dora"), ("make", ".said")):
        for kind, each in (("dark", dark), ("phone", phone)):
            each.goto(f"{studio.base}#look/{name}")
            each.wait_for_selector(f"#look-{name} {ready}")
            picture(each, f"{name}-{kind}")
        assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth"), name


def test_tabs_and_a_server_that_is_killed_and_started_again(studio, page_of, home):
    page = page_of(studio)
    other = watched(page.context, studio)
    start(page, model="tiny-llama", data="capitals.jsonl", output="runs/long", max_steps="3000", save_steps="3000")
    until(other, lambda: badge(other, "long") == "training")
    studio.__exit__()
    page.wait_for_selector("#banner >> text=does not answer")
    with Served(home / ".cache" / "theodora" / "studio", studio.port) as again:
        page.wait_for_selector("#banner >> text=Its address is a new one")
        page.goto(again.address)
        until(page, lambda: badge(page, "long") == "training")
        step = int(page.locator(".figure b").first.inner_text().split(" / ")[0].replace(",", ""))
        page.click("button.danger")
        until(other, lambda: badge(other, "long") == "stopped")  # the other tab has the new cookie, too
        page.click("button >> text=Resume")
        until(page, lambda: badge(page, "long") == "training")
        until(page, lambda: int(page.locator(".figure b").first.inner_text().split(" / ")[0].replace(",", "")) > step)
        page.click("button.danger")
        until(page, lambda: badge(page, "long") == "stopped")
        assert page.wrong == other.wrong == []


def kept(home, kind, id, asked, rows=(), log=""):
    """A work of an earlier studio."""
    folder = home / ".cache" / "theodora" / "studio" / kind / id
    folder.mkdir(parents=True)
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "log").write_text(log)
    if rows:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_comparison_that_is_chosen_while_another_is_read_is_shown(studio, page_of, home):
    answer = {"loss": 1.0, "answer": "4", "right": True}
    rows = [{"row": 1, "prompt": "2+2=", "expected": "4", "tokens": 2, "base": answer} | answer]
    for id, model in (("1-a", "first"), ("2-b", "second")):
        kept(home, "answers", id, {"model": model, "base": "", "data": "rows.jsonl"}, rows)
    page, held = page_of(studio), []
    page.route("**/api/look/answers/2-b", lambda route: held.append(route))
    page.click("nav >> text=Look")
    until(page, lambda: held)
    page.click("#look-answers .chip >> text=first")
    held[0].continue_()
    page.wait_for_selector("#look-answers h2 >> text=first")
    assert page.get_attribute("#look-answers .chip:has-text('first')", "aria-pressed") == "true"
    assert page.wrong == []


def test_what_a_failed_run_said_goes_when_the_run_goes_on(studio, page_of, home):
    run = home / "geography" / "runs" / "first"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "reward": 0.25}\n')
    (run / "studio.log").write_text("step 1/9  loss 1.0\nNo space is left.\n")
    page, states = page_of(studio), ["failed"]

    def told(route):
        answer = route.fetch().json()
        for each in answer["runs"]:
            each["state"] = states[-1]
        route.fulfill(json=answer)

    page.route("**/api/runs", told)
    page.wait_for_selector(".note.bad >> text=No space is left.")
    assert "reward 0.25" in page.inner_text(".run .about")
    states.append("training")
    page.wait_for_selector(".note.bad >> text=No space is left.", state="hidden")
    page.unroute("**/api/runs")
    assert page.wrong == []


def test_hostile_names_and_rows_are_text(studio, page_of, home):
    work = home / "geography"
    rows = [{"prompt": HOSTILE, "completion": f"<script>window.hacked = true</script>{HOSTILE}"}] * 3
    (work / "hostile.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = work / "runs" / HOSTILE.replace("/", "")
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, HOSTILE: 2}) + "\n")
    (run / "studio.log").write_text(f"{HOSTILE}\n\x1b[31m red \u202e\n")
    (run / "README.md").write_text(f"## Results\n\n| {HOSTILE} | before |\n|---|---|\n| {HOSTILE} | javascript:1 |\n")
    answer = {"loss": 1.0, "answer": HOSTILE, "right": False}
    row = {"row": 1, "prompt": [{"role": HOSTILE, "content": HOSTILE}] * 2, "expected": HOSTILE, "tokens": 3}
    asked = {"model": HOSTILE, "base": "", "data": HOSTILE, "words": [HOSTILE]}
    kept(home, "answers", "1-a", asked, [row | answer | {"base": answer}], HOSTILE)
    kept(home, "jobs", "1-a", {"kind": "merge", "title": HOSTILE}, log=HOSTILE)
    page = page_of(studio)
    page.wait_for_selector(f"th:has-text('{HOSTILE[:8]}')")
    assert HOSTILE in page.inner_text(".log")
    assert "\\x1b[31m red \\u202e" in page.inner_text(".log")
    page.click("nav >> text=Look")
    page.click(".pairs button[aria-expanded]")
    assert page.inner_text(".pairs tbody").count(HOSTILE) == 7  # two turns with their roles, expected, before, after
    result = page.locator("#look-answers .look-result")
    assert HOSTILE in result.locator("h2").inner_text()
    for summary in ("In a terminal", "Log"):
        result.locator("summary", has_text=summary).click()
        assert HOSTILE[:10] in result.locator("details", has_text=summary).locator("pre").inner_text()
    page.click("#look-tab-make")
    for part in ("h2", ".note"):
        assert HOSTILE in page.inner_text(f"#look-make .look-result {part}")
    assert page.locator("main img, main script, main iframe").count() == 0
    page.click("nav >> text=Data")
    page.fill("#data-path", "hostile.jsonl")
    page.fill("#data-model", "tiny-llama")
    page.click("text=Look at it")
    page.wait_for_selector(".sample")
    assert HOSTILE in page.locator(".sample").first.inner_text()
    page.click("text=Train on it")
    page.fill("#field-output", HOSTILE)
    page.fill("#field-rank", HOSTILE)
    page.wait_for_selector(".wrong")
    assert page.locator("main img, main script, main iframe").count() == 0
    assert page.evaluate("window.hacked === undefined")
    assert page.wrong == []
    # And if the page had a hole, the browser would not let markup through.
    refused = "() => { try { document.body.innerHTML = '<b>x</b>'; return false; } catch { return true; } }"
    assert page.evaluate(refused)
