"""The web page in headless Chromium, and what the server sends with it."""

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from server_process import metric, picture, running

import perception_rt as prt
from perception_rt.runtime.request import Exchange
from perception_rt.serve.page import PAGE_PATHS

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
KEY = "a-key-of-the-test"
BOX = "[100,200,300,400]"
# Answers the questions of the page with pieces of text. Then the answer is complete, the connection
# is closed or breaks, or nothing more comes.
FAKE_SERVER = r"""
    const [pieces, end] = arguments;
    window.fetch = async (path, { signal }) => {
        const events = pieces.map((content) => {
            const data = { choices: [{ delta: { content } }] };
            return `data: ${JSON.stringify(data)}\n\n`;
        });
        if (end === "complete") events.push("data: [DONE]\n\n");
        const pull = (controller) => {
            if (events.length) controller.enqueue(new TextEncoder().encode(events.shift()));
            else if (end === "broken") controller.error(new TypeError("gone"));
            else if (end === "closed") controller.close();
            else return new Promise((resolve, reject) => {
                signal.onabort = () => reject(signal.reason);
            });
        };
        return new Response(new ReadableStream({ pull }));
    };
"""
in_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and its driver")


@pytest.fixture
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1100,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def find(browser: Any, css: str) -> Any:
    return browser.find_element("css selector", css)


def all_of(browser: Any, css: str) -> list[Any]:
    return list(browser.find_elements("css selector", css))


def wait(condition: Callable[[], Any]) -> Any:
    """The first true value of a condition; fails after two minutes."""
    end = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def open_page(browser: Any, base: str, *pictures: Path) -> None:
    browser.get(base)
    wait(lambda: all_of(browser, "#classify option"))
    for path in pictures:
        find(browser, "#files").send_keys(str(path))


def set_scheme(browser: Any, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def ask(browser: Any, text: str) -> str:
    """Types a question and Enter; returns the answer once it is complete."""
    send(browser, text)
    wait(lambda: find(browser, "#ask .main").is_enabled())
    assert find(browser, "#error").text == ""
    turn = all_of(browser, "#talk li")[-1]
    assert "Tokens" in turn.text
    return str(turn.find_element("css selector", ".answer").text)


def send(browser: Any, text: str) -> None:
    """Types a question and Enter, which disables the button until the answer is complete."""
    find(browser, "#tab-ask").click()
    find(browser, "#ask textarea").send_keys(text, "\n")


def test_files_are_strict_small_and_open() -> None:
    folder = Path(prt.__file__).parent / "serve" / "static"
    for path in folder.iterdir():
        data = path.read_bytes()
        assert data.isascii()
        assert b"http:" not in data
        assert b"https:" not in data
        assert len(data) < 20_000


def test_headers(base: str) -> None:
    for path in PAGE_PATHS:
        answer = httpx.get(base + path)
        assert answer.status_code == 200
        policy = answer.headers["Content-Security-Policy"]
        rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
        assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert httpx.post(base).status_code == 405


@pytest.mark.slow
@in_browser
def test_an_answer_streams_and_its_box_is_drawn(
    base: str, browser: Any, plm: prt.Generator
) -> None:
    open_page(browser, base, picture("locate"))
    browser.execute_script("""
        window.lengths = [];
        const talk = document.getElementById("talk");
        const note = () => lengths.push(talk.textContent.length);
        new MutationObserver(note).observe(talk, { childList: true, subtree: true });
    """)
    expected = plm.generate("Where is the 5?", images=[picture("locate")])
    assert ask(browser, "Where is the 5?") == expected.text
    assert len(set(browser.execute_script("return lengths"))) > 3
    (box,) = expected.boxes()
    image, drawn = find(browser, ".frame img").rect, find(browser, ".box").rect
    found = [
        (drawn["x"] - image["x"]) / image["width"],
        (drawn["y"] - image["y"]) / image["height"],
        drawn["width"] / image["width"],
        drawn["height"] / image["height"],
    ]
    assert found == pytest.approx([box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1], abs=0.02)
    assert_quiet(browser, base)
    find(browser, "#shown button").click()
    assert all_of(browser, ".box") == []


@pytest.mark.slow
@in_browser
def test_a_conversation_and_starting_over(base: str, browser: Any, plm: prt.Generator) -> None:
    open_page(browser, base, picture("digit_3"))
    history: list[Exchange] = []
    for question, images in (
        ("What number is written here?", [picture("digit_3")]),
        ("Where is the 5?", [picture("locate")]),
        ("Where is the 8?", []),
    ):
        if history and images:
            find(browser, "#files").send_keys(str(images[0]))
        expected = plm.generate(question, images=images, history=history)
        assert ask(browser, question) == expected.text
        history.append(Exchange(prompt=question, images=images, answer=expected.text))
        assert boxes_per_image(browser)[0] == 0  # boxes are in the image of the second question
    assert len(all_of(browser, "#talk li")) == 3
    assert boxes_per_image(browser) == [0, 1]
    restart = find(browser, "[name=restart]")
    restart.click()
    assert all_of(browser, "#talk li") == all_of(browser, ".box") == []
    assert not restart.is_enabled()
    assert browser.switch_to.active_element.get_attribute("name") == "question"
    find(browser, "#shown button").click()
    alone = plm.generate("Where is the 5?", images=[picture("locate")])
    assert ask(browser, "Where is the 5?") == alone.text


def boxes_per_image(browser: Any) -> list[int]:
    return [len(f.find_elements("css selector", ".box")) for f in all_of(browser, ".frame")]


@pytest.mark.slow
@in_browser
def test_a_box_is_drawn_on_its_image_or_not_at_all(base: str, browser: Any) -> None:
    open_page(browser, base, picture("compare_1"), picture("compare_2"))
    captions = [caption.text.split(":")[0] for caption in all_of(browser, "figcaption")]
    assert captions == ["Image 1", "Image 2"]
    for question, answer, expected in (
        ("Where is the 5?", BOX, [0, 0]),
        ("Where is the 5 in image 2?", BOX, [0, 1]),
        ("Where is the 5 in image 3?", BOX, [0, 0]),
        ("Where is the 5?", f"In the first picture at {BOX}", [1, 0]),
        ("Is the 5 of image 1 also in image 2?", f"In image 2: {BOX}", [0, 1]),
        ("Where is the 5?", f"Image 1: {BOX}\nImage 2: {BOX} and {BOX}", [1, 2]),
        ("Where is the 5?", f"Image 1 and image 2 have it: {BOX}", [0, 0]),
    ):
        browser.execute_script(FAKE_SERVER, [answer], "complete")
        send(browser, question)
        wait(lambda: find(browser, "#ask .main").is_enabled())
        assert boxes_per_image(browser) == expected, (question, answer)
        assert ("not clear which image" in find(browser, "#talk").text) == (expected == [0, 0])
        find(browser, "[name=restart]").click()


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("end", ["broken", "closed", "stopped"])
def test_an_incomplete_answer_stays(base: str, browser: Any, end: str) -> None:
    open_page(browser, base, picture("locate"))
    browser.execute_script(FAKE_SERVER, ["It is ", f"at {BOX}"], end)
    send(browser, "Where is the 5?")
    wait(lambda: BOX in find(browser, "#talk").text)
    if end == "stopped":
        find(browser, "[name=stop]").click()
    wait(lambda: find(browser, "#ask .main").is_enabled())
    talk = find(browser, "#talk").text.split("\n")
    note = "Stopped" if end == "stopped" else "Incomplete"
    assert talk == ["Where is the 5?", "locate.png", f"It is at {BOX}", note]
    assert ("closed the connection" in find(browser, "#error").text) == (end != "stopped")
    assert boxes_per_image(browser) == [1]


@pytest.mark.slow
@in_browser
def test_the_server_is_gone(browser: Any) -> None:
    with running("demo:plm", "demo:pe", "--threads", "1") as (base, process):
        open_page(browser, base, picture("locate"))
        ask(browser, "Where is the 5?")
        process.kill()
        process.wait()
        send(browser, "Where is the 8?")
        wait(lambda: "does not answer" in find(browser, "#error").text)
        assert len(all_of(browser, "#talk li")) == 1
        assert find(browser, "#ask textarea").get_property("value") == "Where is the 8?"


@pytest.mark.slow
@in_browser
def test_unusable_files(base: str, browser: Any, tmp_path: Path) -> None:
    open_page(browser, base, picture("locate"))
    for name, data, reason in (
        ("a.png", b"no image", "a.png: image of 8 bytes is not"),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg: image of 41 bytes is not"),
        ("a.mp4", b"no video", "a.mp4: video is damaged"),
        ("a.bmp", bytes(2 << 20), "more than 1048576 bytes"),
    ):
        (tmp_path / name).write_bytes(data)
        find(browser, "#files").send_keys(str(tmp_path / name))
        if name != "a.svg":
            wait(lambda name=name: f"{name} (this browser cannot" in find(browser, "#shown").text)
        send(browser, "Where is the 5?")
        wait(lambda reason=reason: reason in find(browser, "#error").text)
        assert find(browser, "#talk").text == ""
        all_of(browser, "#shown button")[-1].click()
        browser.execute_script("document.querySelector('#ask textarea').value = ''")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(200 << 20)
    for name, reason in (("huge.png", "at most"), ("a.txt", "neither an image nor a video")):
        (tmp_path / "a.txt").touch()
        find(browser, "#files").send_keys(str(tmp_path / name))
        wait(lambda reason=reason: reason in find(browser, "#error").text)
    assert len(all_of(browser, "figure")) == 1
    assert ask(browser, "Where is the 5?")


@pytest.mark.slow
@in_browser
def test_classify_and_features(base: str, browser: Any, pe: prt.Embedder) -> None:
    open_page(browser, base, picture("digit_3"))
    find(browser, "#tab-ask").send_keys("\ue014")  # arrow right
    assert browser.switch_to.active_element.get_attribute("id") == "tab-classify"
    labels = ["two", "three", "eight"]
    find(browser, "#classify textarea").send_keys("\n".join(labels))
    find(browser, "#classify .main").click()
    rows = wait(lambda: all_of(browser, ".bar"))
    (expected,) = pe.classify([picture("digit_3")], labels).tolist()
    shown = {row.text.split()[0]: row.text.split()[1] for row in rows}
    assert shown == {n: f"{100 * p:.1f}%" for n, p in zip(labels, expected, strict=True)}
    assert rows[0].text.startswith("three")
    find(browser, "#tab-features").click()
    find(browser, "#features .main").click()
    image = wait(lambda: all_of(browser, "#picture img"))[0]
    assert image.get_attribute("src").startswith("data:image/png")
    wait(lambda: image.get_property("naturalWidth") > 100)
    assert_quiet(browser, base)


def assert_quiet(browser: Any, base: str) -> None:
    """The page asked no other host, and the browser has no complaint."""
    assert browser.get_log("browser") == []
    asked = browser.execute_script("return performance.getEntriesByType('resource')")
    urls = [entry["name"] for entry in asked]
    assert [u for u in urls if not u.startswith((base, "blob:", "data:"))] == []


@pytest.mark.slow
@in_browser
def test_errors_and_stop(base: str, browser: Any, tmp_path: Path) -> None:
    open_page(browser, base)
    find(browser, "#tab-features").click()
    find(browser, "#features .main").click()
    wait(lambda: find(browser, "#error").text == "Choose an image first.")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    find(browser, "#files").send_keys(str(broken))
    find(browser, "#features .main").click()
    wait(lambda: "broken.png: image of" in find(browser, "#error").text)
    find(browser, "#shown button").click()
    find(browser, "#files").send_keys(str(picture("locate")))
    find(browser, "#tab-ask").click()
    slow = {"offline": False, "latency": 20_000, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    find(browser, "#ask textarea").send_keys("Where is the 5?\n")
    assert not find(browser, "#ask .main").is_enabled()
    find(browser, "[name=stop]").click()
    wait(lambda: find(browser, "#ask .main").is_enabled())
    assert not find(browser, "[name=stop]").is_enabled()
    assert find(browser, "#error").text == find(browser, "#talk").text == ""
    assert find(browser, "#ask textarea").get_property("value") == "Where is the 5?"


@pytest.mark.slow
@in_browser
def test_a_dropped_video(base: str, browser: Any, plm: prt.Generator, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        for level in (0, 80, 160, 240):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    open_page(browser, base)
    browser.execute_script(
        """
        const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], "v.mp4", { type: "video/mp4" }));
        const options = { dataTransfer, bubbles: true };
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
        """,
        base64.b64encode(path.read_bytes()).decode(),
    )
    assert len(all_of(browser, "#shown video")) == 1
    assert ask(browser, "Is there a 4?") == plm.generate("Is there a 4?", videos=[path]).text


@pytest.mark.slow
@in_browser
def test_the_page_asks_for_the_key(browser: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with running("demo:pe", "--threads", "1", "--api-key-file", str(keys)) as (base, _):
        for path in PAGE_PATHS:
            assert httpx.get(base + path).status_code == 200
        browser.get(base)
        wait(lambda: find(browser, "#key").is_displayed())
        find(browser, "#key").send_keys("a-wrong-key\n")
        wait(lambda: "does not accept" in find(browser, "#key-note").text)
        wait(lambda: find(browser, "#key").is_displayed())
        find(browser, "#key").send_keys(KEY, "\n")
        wait(lambda: all_of(browser, "#classify option"))
        wait(lambda: find(browser, "#tab-classify").get_attribute("aria-selected") == "true")
        browser.refresh()
        wait(lambda: all_of(browser, "#classify option"))
        header = {"Authorization": f"Bearer {KEY}"}
        assert metric(base, "perception_rt_errors_total", header, code="invalid_api_key") == 2


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_and_phone_width(base: str, browser: Any, scheme: str, tmp_path: Path) -> None:
    set_scheme(browser, scheme)
    open_page(browser, base, picture("locate"))
    ask(browser, "Where is the 5?")
    browser.save_screenshot(str(tmp_path / f"{scheme}.png"))
    color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in color.removeprefix("rgb(").rstrip(")").split(",")]
    assert (min(levels) > 200) if scheme == "light" else (max(levels) < 60)
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.save_screenshot(str(tmp_path / f"{scheme}-phone.png"))
