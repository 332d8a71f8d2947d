"""Who gets in, who does not, and how long it lasts."""

from __future__ import annotations

import asyncio
import re
import time

import httpx
import pytest

from dicom_node.page import login
from dicom_node.page.app import Application
from dicom_node.page.login import ATTEMPTS, Attempts, LoginError, Sessions, Users, make_line
from tests.dicom_node.page.conftest import SAME, Folder, browse

PASSWORD = "correct horse"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(login, "N", 16)


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users"
    path.write_text(f"# the emergency room\n{make_line('doctor', PASSWORD)}\n")
    return path


def let_in(page):
    return page.post("/login", data={"name": "doctor", "password": PASSWORD})


def test_nobody_sees_anything_before_a_login(folder: Folder, users):
    placed = folder.place(1)
    page = browse(folder, users=users)
    for address in ("/", placed.address):
        answer = page.get(address)
        assert (answer.status_code, answer.headers["location"].partition("?")[0]) == (303, "/login"), address
    fragment = page.get("/board", headers={"hx-request": "true"})
    assert (fragment.status_code, fragment.headers["hx-redirect"]) == (401, "/login")
    picture = page.get(f"{placed.address}/slices/1.2.1.1.1/brain.png", headers={"sec-fetch-dest": "image"})
    assert picture.status_code == 401
    assert "Doe" not in page.get("/login").text
    assert page.get("/static/page.css").status_code == 200
    assert page.post("/alerts/1/acknowledge", data={"by": "A"}).status_code == 401


def test_passwords_that_are_tried_at_once_are_counted_like_others(folder: Folder, users, monkeypatch):
    tried = []
    monkeypatch.setattr(Users, "check", lambda *told: tried.append(told) or time.sleep(0.01))
    application = Application(folder.config(users=users))

    async def try_all() -> list[int]:
        way = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=way, base_url="http://127.0.0.1", headers=SAME) as browser:
            data = [{"name": f"n{number}", "password": "x" * 9} for number in range(3 * ATTEMPTS)]
            answers = await asyncio.gather(*(browser.post("/login", data=each) for each in data))
        return [each.status_code for each in answers]

    assert sorted(asyncio.run(try_all())) == [403] * ATTEMPTS + [429] * 2 * ATTEMPTS
    assert len(tried) == ATTEMPTS


def test_a_login_lasts_and_its_name_acknowledges(folder: Folder, users):
    placed = folder.place(1)
    folder.analyse(placed, "critical")
    page = browse(folder, users=users)
    answer = let_in(page)
    cookie = answer.headers["set-cookie"]
    assert re.search(r"httponly", cookie, re.IGNORECASE)
    assert re.search(r"samesite=lax", cookie, re.IGNORECASE)
    assert "Doe, John1" in page.get("/").text
    (alert,) = folder.ledger.alerts()
    page.post(f"/alerts/{alert.id}/acknowledge", data={"by": "another"})
    assert folder.ledger.alerts()[0].acknowledged_by == "doctor"
    again = browse(folder, users=users)  # the page was started again
    again.cookies = page.cookies
    assert again.get("/").status_code == 200
    page.post("/logout")
    assert page.get("/").status_code == 303


@pytest.mark.parametrize("name", ["doctor", "fischer", "anna.kuehn", "Zoë"])  # in base64: whole, and with both paddings
def test_a_browser_sends_back_what_the_cookie_says(folder: Folder, users, name):
    users.write_text(f"{make_line(name, PASSWORD)}\n")
    page = browse(folder, users=users)
    answer = page.post("/login", data={"name": name, "password": PASSWORD})
    value = answer.headers["set-cookie"].partition(";")[0].partition("=")[2]
    assert not set(value) & set('"= ,;\\')
    page.cookies.clear()
    assert page.get("/", headers={"cookie": f"{login.COOKIE}={value}"}).status_code == 200


def test_a_login_leads_to_what_was_asked_for(folder: Folder, users):
    placed = folder.place(1)
    page = browse(folder, users=users)
    to_login = page.get(placed.address).headers["location"]
    assert f'action="{to_login}"' in page.get(to_login).text
    answer = page.post(to_login, data={"name": "doctor", "password": PASSWORD})
    assert (answer.status_code, answer.headers["location"]) == (303, placed.address)


@pytest.mark.parametrize("place", ["//evil.example/", "https://evil.example/", "/\\evil.example", "", "/%0d%0aX: y"])
def test_a_login_leads_nowhere_else(folder: Folder, users, place):
    page = browse(folder, users=users)
    answer = page.post(f"/login?next={place}", data={"name": "doctor", "password": PASSWORD})
    assert answer.headers["location"] == ("/%0D%0AX%3A%20y" if "%0d" in place else "/")


def test_with_tls_the_cookie_is_for_tls_alone(folder: Folder, users):
    config = folder.config(users=users)
    assert config.page.tls is False
    page = browse(folder, users=users)
    assert "secure" not in let_in(page).headers["set-cookie"].lower()


@pytest.mark.parametrize(("name", "password"), [("doctor", "wrong"), ("nurse", PASSWORD), ("", ""), ("doctor", "")])
def test_a_wrong_password_lets_nobody_in(folder: Folder, users, name, password):
    page = browse(folder, users=users)
    answer = page.post("/login", data={"name": name, "password": password})
    assert (answer.status_code, "Name or password is wrong" in answer.text) == (403, True)
    assert page.get("/").status_code == 303


def test_after_some_wrong_passwords_even_the_right_one_waits(folder: Folder, users):
    page = browse(folder, users=users)
    for _ in range(login.ATTEMPTS):
        page.post("/login", data={"name": "doctor", "password": "wrong"})
    answer = let_in(page)
    assert (answer.status_code, "Too many" in answer.text) == (429, True)


def test_attempts_are_forgotten_in_time_and_in_number(monkeypatch):
    attempts = Attempts()
    now = [0.0]
    monkeypatch.setattr(login.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(login, "MOST_REMEMBERED", 10)
    for _ in range(login.ATTEMPTS):
        attempts.failed("a")
    assert attempts.wait_s("a", "b") == login.PENALTY_S
    now[0] = login.PENALTY_S + 1
    assert attempts.wait_s("a") <= 0
    for number in range(100):
        attempts.failed(str(number))
    assert len(attempts._wrong) == 10


def test_a_cookie_of_another_or_of_yesterday_is_none(folder: Folder, users, monkeypatch):
    sessions = Sessions(Users(users), folder.path)
    cookie = sessions.open(Users(users).find("doctor"))
    assert sessions.whose(cookie) == "doctor"
    name, until, signature = cookie.split(".")
    later = f"{name}.{int(until) + 9999}.{signature}"
    for forged in ("", ".", "..", later, cookie[:-1], f"{name}.x.{signature}", f"%%.{until}.{signature}", "ä.1.ö"):
        assert sessions.whose(forged) is None, forged
    (folder.path / login.KEY).unlink()
    assert Sessions(Users(users), folder.path).whose(cookie) is None
    monkeypatch.setattr(login, "SESSION_S", -1)
    assert sessions.whose(sessions.open(Users(users).find("doctor"))) is None


def test_another_password_ends_a_session(folder: Folder, users):
    page = browse(folder, users=users)
    let_in(page)
    assert page.get("/").status_code == 200
    users.write_text(make_line("doctor", "another password") + "\n")
    assert page.get("/").status_code == 303


def test_the_key_of_cookies_is_for_the_node_alone(folder: Folder, users):
    Sessions(Users(users), folder.path)
    assert (folder.path / login.KEY).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "text", ["", "doctor", "doctor:plain:x", "doctor:scrypt:16:8:1:x:y", ":scrypt:16:8:1:AAAA:AAAA"]
)
def test_a_file_of_users_with_a_mistake_is_refused(tmp_path, text):
    path = tmp_path / "users"
    path.write_text(text)
    with pytest.raises(LoginError, match="page.users"):
        Users(path)
    with pytest.raises(LoginError, match="page-password"):
        Users(tmp_path / "none")


@pytest.mark.parametrize(("name", "password"), [("a:b", PASSWORD), ("", PASSWORD), ("a", "short"), ("a\n", PASSWORD)])
def test_no_line_is_made_that_could_not_be_read(name, password):
    with pytest.raises(LoginError):
        make_line(name, password)


def test_without_a_login_there_is_none(folder: Folder):
    assert browse(folder).get("/login").headers["location"] == "/"
