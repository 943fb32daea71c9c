import pytest

PAGE = """<!doctype html><title>A page</title>
<svg width="200" height="100"><rect width="100" height="50" fill="navy"/></svg>
<p style="width: 600px">wide</p>
<script>
  console.log("not an error");
  console.error("one " + 1);
  setTimeout(() => { throw new Error("two"); });
</script>
<img src="missing.png">
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    return path


def test_what_a_page_complains_of_is_heard(browser, page):
    opened = browser.open_page(page.as_uri())
    assert opened.page.title() == "A page"
    opened.page.wait_for_timeout(100)
    assert [error.split(" (")[0] for error in opened.errors if "missing" not in error] == [
        "one 1",
        "uncaught: two",
    ]
    assert any("missing.png" in error for error in opened.errors)
    assert opened.requests == [page.as_uri(), (page.parent / "missing.png").as_uri()]


def test_what_is_drawn_has_ink_and_what_is_too_wide_is_seen(browser, page):
    opened = browser.open_page(page.as_uri(), width=390)
    assert opened.ink("svg") == pytest.approx([0.25], abs=0.01)
    assert opened.overflow() > 600 - 390
    assert browser.open_page(page.as_uri(), width=1280).overflow() == 0
