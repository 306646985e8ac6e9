"""The demo's functions, without a browser; its page where gradio is installed."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest
from PIL import Image

from eval.ask import demo


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 84, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def page(checkpoint, loaded) -> demo.Demo:
    return demo.Demo(loaded, str(checkpoint))


def test_both_answers_costs_and_drawing(page):
    few, many = (page.compare(picture(), "describe the sign", "divprune", budget) for budget in (9, 18.0))
    (baseline, answer, rows, drawn), other = few, many
    assert baseline == other[0] and isinstance(answer, str)
    tokens = {name: values for name, *values in rows}["vision tokens entering the decoder"]
    assert tokens == ["36", "9 (-75%)"]
    assert not np.array_equal(np.asarray(drawn), np.asarray(other[3].resize(drawn.size)))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((None, "what", "divprune", 9), "image: there is none yet"),
        ((picture(), " ", "divprune", 9), "question: there is none yet"),
        ((picture(), "what", "divprunee", 9), "did you mean divprune"),
    ],
)
def test_what_is_wrong_is_one_line(page, given, line):
    with pytest.raises(ValueError, match=line) as error:
        page.compare(*given)
    assert "\n" not in str(error.value)


def test_methods_are_those_with_a_budget(page):
    assert {"divprune", "mustdrop_plus", "visionzip"} <= set(page.methods())
    assert not {"vanilla", "yopo"} & set(page.methods())


def test_example_scenes_bring_their_questions():
    (image, question), *_ = demo.examples([7])
    assert image.size == (336, 336) and question.endswith("?")


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main([]) == 2
    assert capsys.readouterr().err == "error: gradio: it is not installed here; pip install '.[demo]'\n"
    assert demo.main(["--port", "70000"]) == 2


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
def test_the_page_asks(page, tmp_path):
    from gradio_client import Client, handle_file

    picture().save(tmp_path / "photo.png")
    blocks = demo.page(page)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    try:
        asked = Client(address, verbose=False, download_files=str(tmp_path))
        few, many = (
            asked.predict(
                handle_file(tmp_path / "photo.png"), "describe the sign", "divprune", budget, api_name="/compare"
            )
            for budget in (16, 24)
        )
        assert few[0] == many[0] and few[2]["data"][1][2].startswith("16 ")
        assert few[3] and few[3] != many[3]
    finally:
        blocks.close()


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gradio", "playwright"))) or shutil.which("chromium") is None,
    reason="gradio, playwright or Chromium is not installed",
)
def test_the_page_in_a_browser(page):
    from playwright.sync_api import expect, sync_playwright

    _, address, _ = (blocks := demo.page(page)).launch(prevent_thread_lock=True, quiet=True)
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page()
            tab.goto(address)
            chosen = tab.locator("input[aria-label=method]")
            chosen.fill("divprune")
            chosen.press("Enter")
            slider, drawing = tab.locator("input[type=range]"), tab.get_by_role("link", name="Download")
            slider.press("Home")
            tab.get_by_role("button", name="ask").click()
            cell = tab.get_by_role("row").filter(has_text="vision tokens entering the decoder")
            expect(cell).to_contain_text("16 (-56%)", timeout=60_000)
            before = drawing.get_attribute("href")
            slider.press("ArrowRight")
            expect(cell).to_contain_text("24 (-33%)", timeout=60_000)
            assert drawing.get_attribute("href") != before
            browser.close()
    finally:
        blocks.close()
