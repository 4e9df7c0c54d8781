"""The page in a real browser, on the server's real HTTP part and a service without models."""

from __future__ import annotations

import base64
import json
import re
import shlex

import pytest
from fake_service import PAGE, Condition, FakeService
from page_browser import Visit, chromium

pytestmark = pytest.mark.slow
HTML = PAGE.read_bytes()
NASTY = """it's "all" $HOME `ls` \\ <script>alert(1)</script> <img src=x onerror=alert(2)>"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def expect(browser):
    from playwright.sync_api import expect

    return expect


def write_prompt(tab, words="a red dragon", count=1):
    tab.select_option("#model", "monsters-64")
    tab.fill("#prompt", words)
    tab.fill("#count", str(count))


def test_a_prompt_becomes_pictures_that_are_seen_on_their_way(browser, expect):
    with Visit(browser, FakeService("monsters-64", row_s=0.15), HTML) as visit:
        write_prompt(visit.tab, count=2)
        visit.tab.press("#prompt", "Control+Enter")
        first = visit.tab.locator("#stage .tile").first
        expect(first).to_have_attribute("data-status", "running")
        expect(first.locator("img")).to_be_visible()
        assert first.get_attribute("data-status") == "running"
        seen = first.locator("img").get_attribute("src")
        expect(first.locator("img")).not_to_have_attribute("src", seen)
        visit.pictures(2)
        expect(visit.tab.locator("#run-words")).to_have_text("2 of 2 pictures")
        (job,) = visit.jobs()
        assert visit.bytes(job, 0) != visit.bytes(job, 1)


def test_chips_stand_for_the_labels_that_a_model_knows(browser, expect):
    service = FakeService("iclevr-64", "digits", "seeds", "both")
    with Visit(browser, service, HTML) as visit:
        tab = visit.tab
        expect(tab.locator("#chips .chip")).to_have_count(24)
        expect(tab.locator("#prompt-field")).to_be_hidden()
        tab.click("#generate")
        expect(tab.locator("#form-error")).to_have_text("Choose at least one object.")
        for name in ("red cube", "blue sphere"):
            tab.get_by_role("button", name=name, exact=True).click()
        tab.click("#generate")
        visit.pictures(4)
        tab.select_option("#model", "digits")  # one class: the last one counts
        for name in "37":
            tab.get_by_role("button", name=name, exact=True).click()
        tab.click("#generate")
        visit.pictures(8)
        tab.select_option("#model", "seeds")
        for part in ("#prompt-field", "#labels-field"):
            expect(tab.locator(part)).to_be_hidden()
        assert tab.locator("#guidance").is_disabled()
        tab.click("#generate")
        visit.pictures(12)
        tab.select_option("#model", "both")
        tab.fill("#prompt", "on a table")
        tab.get_by_role("button", name="red cube", exact=True).click()
        tab.click("#generate")
        visit.pictures(16)
        asked = [(request.task.prompt, request.task.labels) for request in service.submitted]
        assert asked == [
            (None, ("red cube", "blue sphere")),
            (None, ("7",)),
            (None, None),
            ("on a table", ("red cube",)),
        ]
        assert service.submitted[2].task.guidance_scale == 1


@pytest.fixture
def condition(monkeypatch):
    """(name, condition): a model that the fake service can have."""
    import fake_service

    return lambda name, condition: monkeypatch.setitem(fake_service.CONDITIONS, name, condition)


def test_a_thousand_classes_are_searched_and_a_number_is_typed(browser, expect, condition):
    condition("classes", Condition("labels", "one class", tuple(f"class-{i}" for i in range(1000)), one=True))
    condition("angles", Condition("labels", "one number"))
    service = FakeService("classes", "angles")
    with Visit(browser, service, HTML) as visit:
        tab = visit.tab
        tab.fill("#filter", "s-77")
        shown = tab.locator("#chips .chip:visible")
        expect(shown).to_have_count(11)
        shown.first.click()
        expect(tab.locator("#chosen")).to_have_text("class-77")
        tab.click("#generate")
        visit.pictures(4)
        tab.select_option("#model", "angles")
        tab.fill("#number", "0.25")
        tab.click("#generate")
        visit.pictures(8)
        assert [request.task.labels for request in service.submitted] == [("class-77",), ("0.25",)]


def test_a_locked_seed_gives_the_same_bytes_and_an_open_one_others(browser, expect):
    with Visit(browser, FakeService("monsters-64"), HTML) as visit:
        tab = visit.tab
        write_prompt(tab)
        tab.fill("#seed", "9007199254740993")  # more than a number of JavaScript holds
        tab.click("#lock")
        for count in (1, 2):
            tab.click("#generate")
            visit.pictures(count)
        tab.click("#lock")
        tab.click("#generate")
        visit.pictures(3)
        first, second, third = (visit.bytes(job) for job in visit.jobs())
        assert first == second != third
        assert "seed 9007199254740993" not in tab.locator("#stage").inner_text()
        tab.locator("#runs .run").last.click()
        expect(tab.locator("#stage .caption")).to_have_text("seed 9007199254740993")


def test_a_reload_and_another_tab_keep_the_job(browser, expect):
    with Visit(browser, FakeService("monsters-64", row_s=0.1), HTML) as visit:
        write_prompt(visit.tab, count=3)
        visit.tab.click("#generate")
        expect(visit.tab.locator("#stage .tile[data-status=running]")).to_have_count(1)
        address = visit.tab.url
        assert "#jobs=" in address
        visit.tab.reload()
        assert visit.tab.url == address
        expect(visit.tab.locator("#prompt")).to_have_value("a red dragon")
        expect(visit.tab.locator("#stage .tile")).to_have_count(3)
        visit.pictures(3)
        assert len(visit.client.get(f"/v1/images/jobs/{visit.jobs()[0]}").json()["images"]) == 3
        other = visit.open(address.removeprefix(visit.base))
        visit.pictures(3, other)
        unknown = visit.open("/#jobs=gone1,gone2")
        visit.allowed = ("404",)
        expect(unknown.locator("#notice")).to_contain_text("no longer keeps 2 jobs")


def test_a_reload_while_the_server_does_not_answer_loses_no_job(browser, expect):
    with Visit(browser, FakeService("monsters-64"), HTML) as visit:
        write_prompt(visit.tab, count=2)
        visit.tab.click("#generate")
        visit.pictures(2)
        job = visit.jobs()
        visit.allowed = ("503", "ERR_FAILED")
        away = {"status": 503, "body": "{}", "headers": {"Retry-After": "1"}}
        visit.tab.route("**/v1/images/jobs/**", lambda route: route.fulfill(**away))
        visit.tab.reload()
        write_prompt(visit.tab, "meanwhile")
        visit.tab.click("#generate")
        expect(visit.tab.locator("#stage h2")).to_have_text("meanwhile")
        expect(visit.tab).to_have_url(re.compile("#jobs=[^,;]+;[^,;]+$"))
        assert set(job) < set(visit.jobs())
        visit.tab.unroute("**/v1/images/jobs/**")
        visit.pictures(3)


def test_cancel_ends_the_job_and_keeps_what_is_done(browser, expect):
    service = FakeService("monsters-64", row_s=0.1)
    with Visit(browser, service, HTML) as visit:
        write_prompt(visit.tab, count=10)
        visit.tab.click("#generate")
        expect(visit.tab.locator("#gallery .tile").first).to_be_visible()
        visit.tab.click("#cancel")
        expect(visit.tab.locator("#run-words")).to_contain_text("cancelled")
        assert service.cancelled == visit.jobs()
        job = visit.client.get(f"/v1/images/jobs/{visit.jobs()[0]}").json()
        done = [image["index"] for image in job["images"] if image["status"] == "done"]
        assert 1 <= len(done) < 10
        visit.pictures(len(done))
        expect(visit.tab.locator("#again")).to_be_visible()


def test_a_job_that_the_server_has_forgotten_is_said_to_be_lost_and_made_again(browser, expect):
    service = FakeService("monsters-64")
    with Visit(browser, service, HTML) as visit:
        visit.allowed = ("404",)
        gone = {"status": 404, "body": '{"error": {"message": "there is no such job", "code": "job_not_found"}}'}
        visit.tab.route("**/v1/images/jobs/**", lambda route: route.fulfill(**gone))
        write_prompt(visit.tab, count=2)
        visit.tab.click("#generate")
        expect(visit.tab.locator("#stage .tile[data-status=lost]")).to_have_count(2)
        expect(visit.tab.locator("#run-words")).to_contain_text("2 failed")
        visit.tab.unroute("**/v1/images/jobs/**")
        visit.tab.click("#again")
        visit.pictures(2)
        first, second = service.submitted
        assert first.task == second.task


def test_a_busy_server_is_asked_again_and_a_reload_keeps_what_was_not_handed_in(browser, expect):
    service = FakeService("monsters-64")
    service.room = 0
    with Visit(browser, service, HTML) as visit:
        visit.allowed = ("429",)
        write_prompt(visit.tab, count=2)
        visit.tab.check("input[name=mode][value=pair]", force=True)
        visit.tab.fill("#steps-b", "3")
        visit.tab.click("#generate")
        expect(visit.tab.locator("#run-words")).to_contain_text("as much work as it can do in time. Trying again in")
        visit.tab.reload()
        expect(visit.tab.locator("#run-words")).to_contain_text("Trying again in")
        service.room = 1000
        visit.tab.click("#try-now")
        visit.pictures(4)
        assert [request.task.num_inference_steps for request in service.submitted] == [8, 3]


def test_the_states_of_a_model_and_of_the_server_are_said_in_words(browser, expect):
    service = FakeService("monsters-64")
    service.models["monsters-64"].state = "starting"
    with Visit(browser, service, HTML) as visit:
        expect(visit.tab.locator("#server")).to_have_text("monsters-64 is starting")
        service.models["monsters-64"].state = "ready"
        expect(visit.tab.locator("#server")).to_have_text("monsters-64 is ready")
        write_prompt(visit.tab)
        service.models["monsters-64"].state = "restarting"
        expect(visit.tab.locator("#server")).to_contain_text("restarts")
        visit.allowed = ("503", "ERR_CONNECTION_REFUSED")
        visit.tab.click("#generate")
        expect(visit.tab.locator("#run-words")).to_contain_text("Trying again in")
        service.models["monsters-64"].state = "ready"
        visit.pictures(1)
        service.draining = True
        visit.tab.click("#generate")
        expect(visit.tab.locator("#run-words")).to_contain_text("the server is ending")
        visit.tab.click("#cancel")
        visit.client.server.should_exit = True
        expect(visit.tab.locator("#server")).to_contain_text("does not answer")


def test_a_refused_field_is_marked_and_the_reason_shown(browser, expect):
    service = FakeService("monsters-64")
    with Visit(browser, service, HTML) as visit:
        visit.allowed = ("400",)
        write_prompt(visit.tab)
        visit.tab.fill("#steps", "1001")
        visit.tab.click("#generate")
        expect(visit.tab.locator("#form-error")).to_contain_text("1001")
        expect(visit.tab.locator("#steps")).to_have_attribute("aria-invalid", "true")
        expect(visit.tab.locator("#steps")).to_be_focused()
        visit.tab.fill("#steps", "8")
        visit.tab.click("summary")
        visit.tab.fill("#from", "2")
        visit.tab.click("#generate")
        expect(visit.tab.locator("#form-error")).to_contain_text("before which guidance ends")
        expect(visit.tab.locator("#steps")).not_to_have_attribute("aria-invalid", "true")
        visit.tab.fill("#to", "6")
        visit.tab.click("#generate")
        visit.pictures(1)
        assert service.submitted[0].task.guidance_interval == (2, 6)


def test_the_key_is_asked_for_once_and_kept_in_the_tab(browser, expect):
    with Visit(browser, FakeService("monsters-64"), HTML, keys=("correct-horse",)) as visit:
        visit.allowed = ("401",)
        tab = visit.tab
        for key in ("wrong-horse", "correct-horse"):
            tab.fill("#key", key)
            tab.press("#key", "Enter")
            expect(tab.locator("#key-error")).to_be_visible(visible=key == "wrong-horse")
        write_prompt(tab)
        tab.click("#generate")
        visit.pictures(1)
        tab.reload()
        visit.pictures(1)
        expect(tab.locator("#key-dialog")).to_be_hidden()
        assert "correct-horse" not in tab.url
        assert tab.evaluate("() => JSON.stringify({...localStorage})").count("horse") == 0


def test_a_grid_has_headings_and_the_same_seeds_for_every_setting(browser, expect):
    service = FakeService("monsters-64")
    with Visit(browser, service, HTML) as visit:
        tab = visit.tab
        write_prompt(tab, count=2)
        tab.fill("#seed", "5")
        tab.check("input[name=mode][value=grid]", force=True)
        tab.fill("#steps-list", "3, 6")
        tab.fill("#guidance-list", "1 2.5")
        tab.get_by_role("button", name="unipc").click()
        expect(tab.locator("#plan")).to_contain_text("8 settings × 2 seeds: 16 pictures")
        tab.click("#generate")
        visit.pictures(16)
        heads = tab.locator("#stage thead tr")
        assert [heads.nth(i).locator("th").all_inner_texts() for i in range(2)] == [
            ["seed 5", "seed 6"],
            ["3 steps", "6 steps"] * 2,
        ]
        rows = [row.locator("th").all_inner_texts() for row in tab.locator("#stage tbody tr").all()]
        assert rows == [["ddim", "guidance 1"], ["guidance 2.5"], ["unipc", "guidance 1"], ["guidance 2.5"]]
        assert {request.task.seed for request in service.submitted} == {5}
        before = tab.locator("#stage table").inner_text()
        tab.reload()  # the table is made again of the jobs alone
        visit.pictures(16)
        assert tab.locator("#stage table").inner_text() == before


def test_two_settings_stand_side_by_side_with_their_difference(browser, expect):
    with Visit(browser, FakeService("monsters-64"), HTML) as visit:
        tab = visit.tab
        write_prompt(tab)
        tab.check("input[name=mode][value=pair]", force=True)
        tab.fill("#steps-b", "4")
        tab.click("#generate")
        visit.pictures(2)
        assert tab.locator("#stage thead th").all_inner_texts() == ["8 steps", "4 steps"]
        expect(tab.locator("#stage .caption")).to_contain_text("differs by")
        tab.fill("#steps-b", "8")
        tab.click("#generate")
        visit.pictures(4)
        expect(tab.locator("#stage .caption")).to_have_text("the same pixels")


def test_words_of_people_and_models_are_shown_as_text(browser, expect, condition):
    condition(NASTY, Condition("text and labels", NASTY, (NASTY, "dog"), tokens=77))
    with Visit(browser, FakeService(NASTY), HTML) as visit:
        tab = visit.tab
        tab.fill("#prompt", NASTY)
        tab.get_by_role("button", name=NASTY, exact=True).click()
        tab.click("#generate")
        visit.pictures(4)
        tab.locator("#gallery .tile").first.click()
        for part in ("#model-facts", "#chosen", "#stage h2", "#details-title", "#facts"):
            assert "<script>alert(1)</script>" in tab.locator(part).inner_text()
        assert tab.locator("body script").count() == 1
        assert tab.locator("img[src=x]").count() == 0


def test_the_details_say_how_to_make_the_picture_again(browser, expect):
    with Visit(browser, FakeService("monsters-64"), HTML) as visit:
        tab = visit.tab
        write_prompt(tab, NASTY)
        tab.fill("#seed", "42")
        tab.click("#generate")
        visit.pictures(1)
        tab.locator("#gallery .tile").click()
        command = shlex.split(tab.locator("#recipe").inner_text())
        assert command[:3] == ["fastgen", "generate", "--prompt"]
        assert command[3] == NASTY
        settings = ["--seed", "42", "--num-inference-steps", "8", "--guidance-scale", "2", "--scheduler", "ddim"]
        assert command[4:] == [*settings, "--model", "monsters-64", "--engine", "fake", "--dtype", "fp32"]
        tab.check("input[value=curl]", force=True)
        curl = shlex.split(tab.locator("#recipe").inner_text().replace("\\\n", " "))
        answer = visit.client.post(curl[2].removeprefix(visit.base), json=json.loads(curl[curl.index("-d") + 1]))
        made = visit.bytes(visit.jobs()[0])
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == made
        tab.check("input[value=python]", force=True)
        compile(tab.locator("#recipe").inner_text(), "recipe", "exec")
        tab.check("input[value=manifest]", force=True)
        assert json.loads(tab.locator("#recipe").inner_text())["seed"] == 42
        with tab.expect_download() as download:
            tab.click("#download")
        assert download.value.path().read_bytes() == made
        assert download.value.suggested_filename.endswith("-42.png")
        tab.click("#use")
        expect(tab.locator("#seed")).to_have_value("42")
        expect(tab.locator("#lock")).to_have_attribute("aria-pressed", "true")


def test_the_python_recipe_runs_and_gives_the_same_bytes(browser, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="openai is not installed")
    with Visit(browser, FakeService("both"), HTML) as visit:
        visit.tab.fill("#prompt", 'true, "false", true')
        visit.tab.get_by_role("button", name="red cube", exact=True).click()
        visit.tab.fill("#count", "1")
        visit.tab.click("#generate")
        visit.pictures(1).click()
        visit.tab.check("input[value=python]", force=True)
        monkeypatch.chdir(tmp_path)
        exec(visit.tab.locator("#recipe").inner_text(), {})
        (file,) = tmp_path.iterdir()
        assert file.read_bytes() == visit.bytes(visit.jobs()[0])


def test_500_pictures_need_fewer_than_200_images_and_no_more_memory_when_scrolled(browser, expect):
    with Visit(browser, FakeService("monsters-64"), HTML) as visit:
        ids = []
        for i in range(50):
            body = {"prompt": "many", "n": 10, "seed": 10 * i, "detached": True, "num_inference_steps": 1}
            ids.append(visit.client.post("/v1/images/generations", json=body).json()["id"])
        tab = visit.open(f"/#jobs={','.join(ids[:25])};{';'.join(ids[25:])}")
        visit.pictures(500, tab)
        devtools = visit.context.new_cdp_session(tab)
        devtools.send("Performance.enable")

        def scrolled() -> dict[str, float]:
            height = tab.evaluate("() => document.documentElement.scrollHeight")
            for y in [*range(0, height, 600), 0]:
                tab.evaluate("y => window.scrollTo(0, y)", y)
                tab.wait_for_timeout(60)
                assert tab.locator("img").count() < 200
            devtools.send("HeapProfiler.collectGarbage")
            return {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}

        tab.wait_for_timeout(3000)
        scrolled()
        before, after = scrolled(), scrolled()
        assert tab.locator("img").count() > 20
        for name in ("JSHeapUsedSize", "Nodes"):
            assert after[name] < 1.1 * before[name], name


LUMINANCE = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = (text) => { const [r, g, b] = channels(text).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (node) => { for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/, 0\\)|transparent/.test(colour)) return colour;
  } return getComputedStyle(document.body).backgroundColor; };
  const found = {body: luminance(getComputedStyle(document.body).backgroundColor), least: 21, where: ''};
  for (const node of document.querySelectorAll('h1, h2, p, label, legend, button, select, input, dt, dd, pre, th')) {
    if (!node.checkVisibility() || !node.textContent.trim() || node.disabled) continue;
    const [a, b] = [luminance(getComputedStyle(node).color), luminance(ground(node))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < found.least) { found.least = contrast; found.where = node.id + ' ' + node.textContent; }
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_legible_and_the_toggle_wins_over_the_system(browser, expect, scheme):
    with Visit(browser, FakeService("iclevr-64"), HTML, color_scheme=scheme) as visit:
        tab = visit.tab
        tab.get_by_role("button", name="red cube", exact=True).click()
        tab.click("#generate")
        visit.pictures(4).first.click()
        found = tab.evaluate(LUMINANCE)
        assert found["least"] >= 4.5, found
        assert (found["body"] > 0.5) == (scheme == "light")
        tab.click("#close")
        for _ in range(1 if scheme == "dark" else 2):
            tab.click("#theme")
        assert (tab.evaluate(LUMINANCE)["body"] > 0.5) == (scheme == "dark")
        tab.reload()
        assert (tab.evaluate(LUMINANCE)["body"] > 0.5) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 390, 820])
def test_a_narrow_window_never_scrolls_sideways(browser, expect, width):
    with Visit(browser, FakeService("iclevr-64"), HTML, viewport={"width": width, "height": 740}) as visit:
        tab = visit.tab

        def fits():
            assert tab.evaluate("() => document.documentElement.scrollWidth") <= width

        tab.get_by_role("button", name="red cube", exact=True).click()
        tab.click("summary")
        made = 0
        for mode, pictures in (("one", 4), ("pair", 8), ("grid", 36)):
            tab.check(f"input[name=mode][value={mode}]", force=True)
            if mode == "pair":
                tab.fill("#steps-b", "3")
            fits()
            tab.click("#generate")
            made += pictures
            tiles = visit.pictures(made)
            fits()
        tiles.first.click()
        fits()
        assert tab.locator("#details").evaluate("node => node.scrollWidth <= node.clientWidth")


def test_the_page_is_used_by_keyboard_alone(browser, expect):
    with Visit(browser, FakeService("monsters-64"), HTML) as visit:
        tab = visit.tab
        tab.focus("#prompt")
        tab.keyboard.type("a blue slime")
        tab.keyboard.press("Control+Enter")
        visit.pictures(4)
        expect(tab.locator("#live")).to_contain_text("4 of 4 pictures")
        tab.locator("#gallery .tile").first.focus()
        tab.keyboard.press("Enter")
        expect(tab.locator("#details")).to_be_visible()
        seed = tab.locator("#facts dd").first.inner_text()
        tab.keyboard.press("ArrowRight")
        expect(tab.locator("#facts dd").first).not_to_have_text(seed)
        tab.keyboard.press("Escape")
        expect(tab.locator("#details")).to_be_hidden()
        unnamed = (
            "() => [...document.querySelectorAll('button, a, input, select, textarea')].filter((n) => n.checkVisibility()"
            " && !(n.getAttribute('aria-label') || n.labels?.length || n.textContent.trim())).map((n) => n.outerHTML)"
        )
        assert tab.evaluate(unnamed) == []
