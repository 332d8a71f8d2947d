"""What stands before every request: under which name it comes, from whose page, from whom; and what no answer lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from dicom_node.configuration.config import is_loopback
from dicom_node.page.login import COOKIE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from dicom_node.configuration.sections import Page
    from dicom_node.page.login import Sessions

OPEN = ("/login", "/static/")  # to those who have not logged in
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
LONGEST_FORM = 4096  # bytes


class Guard:
    """Wraps the page's application.

    Parameters
    ----------
    app : what answers
    page : the section of the configuration
    sessions : who is logged in; None where nobody has to

    """

    def __init__(self, app: ASGIApp, page: Page, sessions: Sessions | None) -> None:
        self._app, self._page, self._sessions = app, page, sessions
        names = {"localhost", "127.0.0.1", "::1", page.address.lower()} | {name.lower() for name in page.hosts}
        self._names = names if is_loopback(page.address) else None  # beyond, any name may lead here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if self._page.tls:
                    headers["Strict-Transport-Security"] = "max-age=31536000"
                # what is about a patient stays in no cache; the pictures say for themselves what may
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await (self._refusal(scope) or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._names is not None and _name_of(host) not in self._names:
            return PlainTextResponse(f"{_name_of(host)!r} is no name of this page: see page.hosts\n", 421)
        if scope["method"] not in ("GET", "HEAD") and not _is_from_here(headers, host):
            return PlainTextResponse("a request from another site\n", 403)
        if self._sessions is not None:
            scope["user"] = self._sessions.whose(_cookie(headers, COOKIE))
            if not scope["user"] and not scope["path"].startswith(OPEN):
                return _sent_to_login(scope["method"], scope["path"], headers)
        return None


def _sent_to_login(method: str, path: str, headers: Headers) -> Response:
    if "hx-request" in headers:  # a fragment: the whole page has to go there
        return Response(status_code=401, headers={"HX-Redirect": "/login"})
    if method == "GET" and headers.get("sec-fetch-dest", "document") == "document":
        return RedirectResponse("/login" if path == "/" else f"/login?next={quote(path)}", 303)
    return PlainTextResponse("log in first\n", 401)


def user_of(request: Request) -> str | None:
    """Who has logged in; None where nobody has to."""
    return request.scope.get("user")


async def form_of(request: Request) -> Mapping[str, str]:
    """The fields of a short form; none of a longer one."""
    from urllib.parse import parse_qsl  # noqa: PLC0415  # for the few that post

    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_FORM:
            return {}
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True))
    except UnicodeDecodeError:
        return {}


def _is_from_here(headers: Headers, host: str) -> bool:
    """Whether a browser says that one of our pages sent it: by Sec-Fetch-Site, or an old one by Origin."""
    if site := headers.get("sec-fetch-site"):
        return site == "same-origin"
    return urlsplit(headers.get("origin", "")).netloc == host != ""


def _name_of(host: str) -> str:
    """The name of a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _cookie(headers: Headers, name: str) -> str:
    for part in headers.get("cookie", "").split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return ""
