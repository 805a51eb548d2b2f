"""Who may ask: nobody without the token, no other host's page, no other page's script."""

from importlib.resources import files

import pytest
from starlette.testclient import TestClient

from studios import ORIGIN, PORT, TOKEN


@pytest.fixture
def stranger(studio_of):
    return TestClient(studio_of().app, base_url=ORIGIN, follow_redirects=False)


@pytest.mark.parametrize(
    "path", ["/", "/api/runs", "/api/studio", "/static/app.js", "/?token=", "/?token=other", "/?x=1"]
)
def test_nothing_is_shown_without_the_token(stranger, path):
    reply = stranger.get(path)
    assert reply.status_code == 403
    assert TOKEN not in reply.text


def test_the_token_opens_the_page_and_leaves_the_address(stranger):
    reply = stranger.get(f"/?token={TOKEN}")
    assert (reply.status_code, reply.headers["location"]) == (303, "/")
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    page = stranger.get("/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy


@pytest.mark.parametrize("host", ["evil.com:7860", "127.0.0.1", "127.0.0.1:7861", "127.0.0.1.evil.example:7860", ""])
def test_other_hosts_are_refused(studio_of, host):
    assert studio_of().client.get("/api/runs", headers={"host": host}).status_code == 403


def test_localhost_is_this_host(studio_of):
    studio = studio_of()
    headers = {"host": f"localhost:{PORT}", "cookie": f"theodora-studio-{PORT}={TOKEN}"}
    assert studio.client.get("/api/runs", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:7861", "https://127.0.0.1:7860"]
)
def test_other_origins_cannot_post(studio_of, origin):
    headers = {} if origin is None else {"origin": origin}
    reply = studio_of().client.post("/api/folders", json={"path": "/"}, headers=headers)
    assert reply.status_code == 403


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"{}", 415),  # what a form of another page may send unasked
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b'{"path": "\\ud800"}', 400),
        ("application/json", b"[]", 400),
        ("application/json", b" " * (1 << 20) + b"{}", 413),
    ],
)
def test_bodies_that_are_no_form(studio_of, kind, body, status):
    headers = {"origin": ORIGIN, "content-type": kind}
    for path in ("/api/folders", "/api/check", "/api/runs", "/api/data"):
        assert studio_of().client.post(path, content=body, headers=headers).status_code == status


def test_other_methods_are_refused(studio_of):
    assert studio_of().client.delete("/api/runs", headers={"origin": ORIGIN}).status_code == 405


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e%2fapp.py", "/static/none.js", "/static/__init__.py", "/docs"]
)
def test_only_the_files_of_the_page_have_addresses(studio_of, path):
    assert studio_of().client.get(path).status_code == 404


def test_the_page_asks_for_nothing_elsewhere_and_has_no_script_in_it(studio_of):
    studio = studio_of()
    names = [file.name for file in files("theodora.studio").joinpath("static").iterdir()]
    texts = {name: studio.client.get(f"/static/{name}").text for name in names}
    for name, text in texts.items():
        assert "https://" not in text, name
        assert text.count("http://") == text.count("http://www.w3.org/2000/svg"), name  # a name, which is not asked for
        for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
            assert markup not in text, (name, markup)
    page = texts["index.html"]
    assert page.count("<script") == page.count('<script type="module" src="/static/') == 1
    assert " onclick" not in page
    assert "style=" not in page
