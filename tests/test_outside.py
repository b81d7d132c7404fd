"""The outside world: URLs that the broker watches for members, and webhooks by which others speak to a mesh.

The sites watched here are scripted servers on this machine; which names lead to them, and to where else, says a
table that stands in for the name server.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
import ssl
import time

import pytest

import broker as hub
import store as storage
import wire
from broker import Broker
from world import World, certificate, story

spec = pytest.mark.spec


class Site:
    """A server whose answers are a dict: path to status, body, or the raw bytes of an answer, or a function."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, object] = {}
        self.asked: list[wire.Request] = []
        self.tls = tls

    async def __aenter__(self) -> Site:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.server.close()

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await wire.read_request(reader)
        if request is not None:
            self.asked.append(request)
            page = self.pages.get(request.path, 404)
            if isinstance(page, int):
                page = wire.response(page, b"")
            elif isinstance(page, str):
                page = wire.response(200, page.encode())
            if page is not None:
                writer.write(page)
                await wire.hang_up(reader, writer)
                return
            await reader.read()  # says nothing until the other side has had enough
        writer.close()


class Names:
    """A name server: each name has a list of answers, one a look-up; the last stays."""

    def __init__(self, **names: list[list[str]]) -> None:
        self.names = {name.replace("_", "."): answers for name, answers in names.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.names:
            raise OSError("no such host")
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


def redirect(to: str) -> bytes:
    return wire.response(302, b"", headers=[("Location", to)])


async def checked(world: World, seconds: float = 0.0) -> None:
    """Lets time pass and every check that is then due come to its end."""
    world.pass_seconds(seconds)
    while world.broker.fetches:
        await asyncio.wait(world.broker.fetches)
        await asyncio.sleep(0)


async def watch(peer, url: str, **fields) -> dict:
    answer = await peer.request("watch", url=url, **fields)
    assert answer["type"] == "watch_ack", answer
    return answer


async def listed(peer) -> list[dict]:
    return (await peer.request("watch_list"))["watches"]


# --- what a watch sees ----------------------------------------------------------------------------


@spec("WATCH-1", "WATCH-3", "WATCH-7", "WATCH-8")
@story(watch_allow_private=True)
async def test_a_change_of_the_body_is_told_and_the_first_look_is_not(world):
    async with Site() as site:
        site.pages["/"] = "one"
        ana = await world.peer("ana")
        answer = await watch(ana, site.url(), label="front page")
        assert (answer["url"], answer["mode"], answer["interval"]) == (site.url(), "hash", 30)
        assert len(answer["watchId"]) == 10 and answer["watchId"].startswith("w_")
        await checked(world)
        assert [f for f in await ana.silence() if f["type"] == "push"] == []
        await checked(world, 29)
        assert len(site.asked) == 1
        await checked(world, 2)
        assert len(site.asked) == 2
        site.pages["/"] = "two"
        await checked(world, 31)
        push = await ana.answer(lambda frame: frame.get("event") == "watch_triggered")
        assert (push["subtype"], push["senderPubkey"], push["priority"], push["nonce"], push["ciphertext"]) == (
            "system", "system", "now", "", "")
        assert push["eventData"] == {
            "watchId": answer["watchId"], "url": site.url(), "label": "front page", "mode": "hash",
            "oldValue": "7692c3ad3540bb80", "newValue": "3fc4ccfe745870e2"}
        [entry] = await listed(ana)
        assert (entry["lastValue"], entry["lastHash"]) == ("3fc4ccfe745870e2", "3fc4ccfe745870e2")
        assert entry["lastCheck"] and "error" not in entry


DOCUMENT = json.dumps({"build": {"state": "green", "steps": [{"ms": 12}, {"ms": 7.5}], "ok": True, "note": None}})


@spec("WATCH-7")
@pytest.mark.parametrize(("mode", "extract", "body", "value"), [
    ("hash", None, "one", "7692c3ad3540bb80"),
    ("status", None, "one", "200"),
    ("json", None, "one", "7692c3ad3540bb80"),
    ("json", "build.state", DOCUMENT, "green"),
    ("json", "$.build.state", DOCUMENT, "green"),
    ("json", "build.steps.1.ms", DOCUMENT, "7.5"),
    ("json", "build.ok", DOCUMENT, "true"),
    ("json", "build.note", DOCUMENT, "null"),
    ("json", "build.steps.2.ms", DOCUMENT, "null"),
    ("json", "build.steps", DOCUMENT, '[{"ms": 12}, {"ms": 7.5}]'),
    ("json", "no.such.thing", DOCUMENT, "null"),
    ("json", "$", '"ü"', "ü"),
    ("json", "0", '["\\ud800"]', "?"),
    ("json", "a", "<html>" + "x" * 300, "<html>" + "x" * 194),
    ("json", "a", "[" * 100_000, "[" * 200),
    ("json", "a", '{"a": "' + "y" * 1001 + '"}', "y" * 1000 + "… e5eb60c27bcd8b21"),
])
def test_what_a_watch_sees_in_an_answer(mode, extract, body, value):
    row = storage.Watch("w_1", "m", "http://x/", mode, extract, 30.0, "change", {}, None, None, None, 0)
    seen = hub.read_value(row, wire.Answer(200, {}, body.encode()))
    assert seen.partition("… ")[0] == value.partition("… ")[0] and len(seen) == len(value)


@spec("WATCH-8")
@pytest.mark.parametrize(("rule", "told"), [
    ("change", [("red", "green"), ("green", "blue"), ("blue", "red")]),
    ("match:green", [("red", "green")]),
    ("not_match:green", [("green", "blue")]),
    ("match:", []),
])
@story(watch_allow_private=True)
async def test_a_rule_says_which_changes_are_told(world, rule, told):
    async with Site() as site:
        ana = await world.peer("ana")
        site.pages["/"] = '{"light": "red"}'
        await watch(ana, site.url(), mode="json", extract="light", notify_on=rule, interval=5)
        await checked(world)
        for colour in ("red", "green", "green", "blue", "red"):
            site.pages["/"] = json.dumps({"light": colour})
            await checked(world, 6)
        pushes = [f["eventData"] for f in await ana.silence() if f.get("event") == "watch_triggered"]
        assert [(data["oldValue"], data["newValue"]) for data in pushes] == told


@spec("WATCH-8")
@story(watch_allow_private=True)
async def test_an_empty_value_is_a_value(world):
    async with Site() as site:
        ana = await world.peer("ana")
        site.pages["/"] = '{"a": ""}'
        await watch(ana, site.url(), mode="json", extract="a", interval=5)
        await checked(world)
        site.pages["/"] = '{"a": "x"}'
        await checked(world, 6)
        data = await ana.event("watch_triggered")
        assert (data["oldValue"], data["newValue"], "label" in data) == ("", "x", False)


@spec("WATCH-8")
@story(watch_allow_private=True)
async def test_what_a_watch_has_to_tell_waits_for_its_owner(world):
    async with Site() as site:
        ana, bo = await world.peer("ana"), await world.peer("bo")
        site.pages["/"] = "one"
        await watch(ana, site.url(), interval=5)
        await checked(world)
        await ana.leave()
        assert (await bo.event("peer_left"))["name"] == "ana"
        site.pages["/"] = "two"
        await checked(world, 6)
        await world.restart()  # and is not lost with the broker
        again = await world.peer("ana", sessionId="next")
        frame = await again.next()
        assert (frame["event"], frame["eventData"]["oldValue"]) == ("watch_triggered", "7692c3ad3540bb80")
        assert [f for f in await bo.silence() if f.get("event") == "watch_triggered"] == []


@spec("WATCH-3", "WATCH-9")
@story(watch_allow_private=True)
async def test_watches_survive_a_restart_with_what_they_saw(world):
    async with Site() as site:
        ana = await world.peer("ana")
        site.pages["/"] = "one"
        answer = await watch(ana, site.url(), headers={"X-Token": "abc"})
        await checked(world)
        await ana.leave()
        site.pages["/"] = "two"
        await world.stop()
        await world.start()
        world.mesh = world.broker.meshes[world.mesh.id]  # opened for the watch, nobody has come
        await checked(world)
        again = await world.peer("ana")
        frame = await again.next()
        assert frame["eventData"]["watchId"] == answer["watchId"]
        assert site.asked[-1].headers["x-token"] == "abc"


@spec("WATCH-8", "TURN-2")
@story(watch_allow_private=True)
async def test_a_change_that_could_not_be_stored_is_told_at_the_next_look(world, monkeypatch):
    async with Site() as site:
        ana = await world.peer("ana")
        site.pages["/"] = "one"
        await watch(ana, site.url(), interval=5)
        await checked(world)
        site.pages["/"] = "two"
        with monkeypatch.context() as patch:
            patch.setattr(storage.Store, "saw", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("disk full")))
            await checked(world, 6)
        assert [f for f in await ana.silence() if f.get("event") == "watch_triggered"] == []
        await checked(world, 6)
        assert (await ana.event("watch_triggered"))["newValue"] == "3fc4ccfe745870e2"


# --- owners and limits ----------------------------------------------------------------------------


@spec("WATCH-9")
@story(watch_allow_private=True)
async def test_only_its_owner_ends_a_watch(world):
    async with Site() as site:
        ana, bo = await world.peer("ana"), await world.peer("bo")
        answer = await watch(ana, site.url())
        assert await listed(bo) == []
        assert (await bo.request("unwatch", watchId=answer["watchId"]))["code"] == "not_found"
        other = await world.peer("ana", sessionId="other")
        ended = await other.request("unwatch", watchId=answer["watchId"])
        assert (ended["type"], ended["url"], ended["interval"]) == ("watch_ack", site.url(), 0)
        assert await listed(ana) == []
        assert (await ana.request("unwatch", watchId=answer["watchId"]))["code"] == "not_found"
        asked = len(site.asked)
        await checked(world, 60)
        assert (len(site.asked), world.mesh.store.watches()) == (asked, [])


@spec("WATCH-2")
@pytest.mark.parametrize(("code", "fields"), [
    ("invalid_url", {"url": "ftp://example.test/"}),
    ("invalid_url", {"url": "file:///etc/passwd"}),
    ("invalid_url", {"url": "gopher://127.0.0.1:25/"}),
    ("invalid_url", {"url": "//example.test/"}),
    ("invalid_url", {"url": "http://"}),
    ("invalid_url", {"url": "http://user:pass@example.test/"}),
    ("invalid_url", {"url": "http://example.test:99999/"}),
    ("invalid_url", {"url": "http://exa mple.test/"}),
    ("invalid_url", {"url": "http://example.test/\r\nX: y"}),
    ("invalid_url", {"url": "http://[::1"}),
    ("invalid_url", {"url": "http://nowhere.test/"}),
    ("too_large", {"url": "http://example.test/" + "x" * 2048}),
    ("malformed", {"mode": "regex"}),
    ("malformed", {"interval": "often"}),
    ("malformed", {"notify_on": "sometimes"}),
    ("malformed", {"headers": {"Host": "localhost"}}),
    ("malformed", {"headers": {"Content-Length": "5"}}),
    ("malformed", {"headers": {"Proxy-Authorization": "x"}}),
    ("malformed", {"headers": {"X": "a\r\nY: b"}}),
    ("malformed", {"headers": {"X Y": "a"}}),
    ("malformed", {"headers": {"X": 7}}),
    ("too_large", {"headers": {"X": "y" * 4096}}),
])
@story(resolve=Names(example_test=[["93.184.216.34"]]))
async def test_bad_input_gets_its_error_and_leaves_nothing(world, code, fields):
    ana = await world.peer("ana")
    assert (await ana.request("watch", **{"url": "http://example.test/"} | fields))["code"] == code
    assert (await listed(ana), world.mesh.watches, world.mesh.store.watches()) == ([], {}, [])


@spec("WATCH-2")
@story(watch_allow_private=True)
async def test_intervals_and_numbers_are_bounded(world, monkeypatch):
    monkeypatch.setattr(hub, "WATCHES_PER_MEMBER", 3)
    async with Site() as site:
        ana, bo = await world.peer("ana"), await world.peer("bo")
        assert [(await watch(ana, site.url(), interval=i))["interval"] for i in (0, 7.5, 10**400)] == [5, 7.5, 86_400]
        assert (await ana.request("watch", url=site.url()))["code"] == "limit"
        await watch(bo, site.url())


@spec("WATCH-3")
@story(watch_allow_private=True)
async def test_checks_do_not_overlap_and_a_member_has_few_at_once(world, monkeypatch):
    monkeypatch.setattr(hub, "WATCH_SECONDS", 0.2)
    async with Site() as site:
        ana = await world.peer("ana")
        site.pages["/"] = None  # never answers
        world.broker.timer.cancel()
        for _ in range(6):
            await watch(ana, site.url(), interval=5)
        world.pass_seconds(0)
        await asyncio.sleep(0)
        assert len(world.broker.fetches) == 4
        world.pass_seconds(60)
        assert len(world.broker.fetches) == 4
        await checked(world)
        await checked(world)  # now there is room for the other two
        assert [entry.get("error") for entry in await listed(ana)] == ["no answer in 0.2 s"] * 6


# --- which addresses ------------------------------------------------------------------------------


@spec("WATCH-4")
@pytest.mark.parametrize(("address", "public"), [
    ("93.184.216.34", True), ("2606:4700::1111", True),
    ("127.0.0.1", False), ("127.8.8.8", False), ("0.0.0.0", False), ("10.1.2.3", False), ("172.16.0.1", False),
    ("192.168.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False),
    ("255.255.255.255", False), ("192.0.2.1", False), ("::1", False), ("::", False), ("fe80::1", False),
    ("fe80::1%eth0", False), ("fd00::1", False), ("fec0::1", False), ("ff02::1", False), ("::ffff:127.0.0.1", False),
    ("::ffff:10.0.0.1", False), ("::127.0.0.1", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
    ("2001:0:7f00:1::", False),
])
def test_which_addresses_are_public(address, public):
    assert hub.is_public(address) is public


@spec("WATCH-4")
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "2130706433", "0x7f.1", "localhost", "169.254.169.254",
                                  "[::ffff:127.0.0.1]"])
@story
async def test_addresses_that_are_not_public_are_refused_however_they_are_written(world, host):
    async with Site() as site:
        ana = await world.peer("ana")
        assert (await ana.request("watch", url=site.url(host=host)))["code"] == "forbidden"
        assert (await listed(ana), site.asked) == ([], [])


@spec("WATCH-4")
def test_a_name_that_changes_its_address_after_the_check_leads_nowhere(tmp_path, monkeypatch):
    names = Names(rebind_test=[["93.184.216.34"], ["127.0.0.1"]])  # public when it is set, ours when it is fetched

    async def tell() -> None:
        async with Site() as site, World(tmp_path, resolve=names) as world:
            ana = await world.peer("ana")
            await watch(ana, site.url(host="rebind.test"), interval=5)
            await checked(world)
            assert [entry["error"] for entry in await listed(ana)] == ["rebind.test is at no public address"]
            assert (site.asked, names.asked) == ([], ["rebind.test", "rebind.test"])

    asyncio.run(tell())


@spec("WATCH-4")
def test_the_connection_goes_to_the_address_that_was_checked(tmp_path, monkeypatch):
    names = Names(example_test=[["10.0.0.1", "93.184.216.34"]])
    connected: list[tuple[str, int]] = []

    async def open_connection(host: str, port: int, **how: object) -> None:
        connected.append((host, port))
        raise OSError("recorded")

    async def tell() -> None:
        async with World(tmp_path, resolve=names) as world:
            ana = await world.peer("ana")
            await watch(ana, "http://example.test/")
            monkeypatch.setattr(asyncio, "open_connection", open_connection)
            await checked(world)
            monkeypatch.undo()
            assert connected == [("93.184.216.34", 80)]  # an address, never the name; the private one is left out
            assert [entry["error"] for entry in await listed(ana)] == ["recorded"]

    asyncio.run(tell())


@spec("WATCH-4")
def test_every_redirect_is_checked_anew(tmp_path, monkeypatch):
    names = Names(public_test=[["127.0.0.1"]], inside_test=[["127.0.0.2"]])
    monkeypatch.setattr(hub, "is_public", lambda address: address == "127.0.0.1")

    async def tell() -> None:
        async with Site() as site, World(tmp_path, resolve=names) as world:
            ana = await world.peer("ana")
            site.pages["/"] = redirect(site.url("/secret", host="inside.test"))
            site.pages["/scheme"] = redirect("file:///etc/passwd")
            await watch(ana, site.url(host="public.test"))
            await watch(ana, site.url("/scheme", host="public.test"))
            await checked(world)
            assert [entry["error"] for entry in await listed(ana)] == [
                "inside.test is at no public address", "not a http:// or https:// URL: 'file:///etc/passwd'"]
            assert [request.path for request in site.asked] == ["/", "/scheme"]

    asyncio.run(tell())


@spec("WATCH-6")
@story(watch_allow_private=True)
async def test_three_redirects_are_followed_and_a_fourth_is_not(world):
    async with Site() as site:
        ana = await world.peer("ana")
        for hop in range(4):
            site.pages[f"/{hop}"] = redirect(f"/{hop + 1}")
        site.pages["/4"] = "here"
        await watch(ana, site.url("/1"))
        await watch(ana, site.url("/0"))
        await checked(world)
        good, bad = await listed(ana)
        assert (len(good["lastValue"]), bad["error"]) == (16, "more than 3 redirects")


@spec("WATCH-6")
@story(watch_allow_private=True)
async def test_headers_are_for_the_server_they_were_given_for(world):
    async with Site() as site, Site() as other:
        ana = await world.peer("ana")
        site.pages["/"] = redirect("/again")
        site.pages["/again"] = redirect(other.url("/away"))
        other.pages["/away"] = "x"
        await watch(ana, site.url(), headers={"Authorization": "Bearer t", "User-Agent": "mine"})
        await checked(world)
        assert [request.headers.get("authorization") for request in site.asked] == ["Bearer t", "Bearer t"]
        assert site.asked[0].headers["user-agent"] == "mine"
        assert "authorization" not in other.asked[0].headers


# --- answers that are not what they should be -----------------------------------------------------


def raw(head: str, body: bytes = b"") -> bytes:
    return head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body


MIB = 1024 * 1024
CHUNKED = "HTTP/1.1 200 OK\nTransfer-Encoding: chunked"


@spec("WATCH-6")
@pytest.mark.parametrize(("answer", "error"), [
    (raw("HTTP/1.1 200 OK\nContent-Length: 1048577"), "the answer is longer than 1048576 bytes"),
    (raw("HTTP/1.1 200 OK", b"x" * (MIB + 1)), "the answer is longer than 1048576 bytes"),
    (raw(CHUNKED, b"100001\r\n"), "the answer is longer than 1048576 bytes"),
    (raw(CHUNKED, b"1\r\nx\r\n" * 16_385), "the answer is cut into too many pieces"),
    (raw(CHUNKED, b"zz\r\n"), "malformed chunk"),
    (raw(CHUNKED, b"2\r\nabcd\r\n"), "malformed chunk"),
    (raw(CHUNKED, b"5\r\nab"), "the answer ended early, or is no HTTP"),
    (raw("HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked"), "a transfer coding that nobody asked for"),
    (raw("HTTP/1.1 200 OK\nContent-Length: many"), "malformed Content-Length"),
    (raw("HTTP/1.1 200 OK\nContent-Length: 10", b"short"), "the answer ended early, or is no HTTP"),
    (raw("HTTP/1.1 103 Early Hints") * 9, "too many interim answers"),
    (raw("SSH-2.0-OpenSSH_9.2"), "no HTTP answer"),
    (b"x" * 100_000, "the request line is too long"),
    (raw("HTTP/1.1 200 OK\n" + "X: y\n" * 200), "the header is too large"),
    (b"", "no HTTP answer"),
], ids=range(15))
@story(watch_allow_private=True)
async def test_an_answer_that_is_too_much_or_no_answer_is_an_error_in_the_list(world, answer, error):
    async with Site() as site:
        ana = await world.peer("ana")
        site.pages["/"] = answer
        await watch(ana, site.url())
        began = time.monotonic()
        await checked(world)
        assert time.monotonic() - began < 3
        [entry] = await listed(ana)
        assert (entry["error"], entry["lastValue"], "lastCheck" in entry) == (error, "", False)


@spec("WATCH-6", "WATCH-7")
@pytest.mark.parametrize("answer", [
    raw("HTTP/1.1 200 OK\nContent-Length: 3", b"one"),
    raw("HTTP/1.1 200 OK", b"one"),
    raw(CHUNKED, b"2;name=value\r\non\r\n1\r\ne\r\n0\r\n\r\n"),
    raw("HTTP/1.1 103 Early Hints\nLink: x") + raw("HTTP/1.1 200 OK\nContent-Length: 3", b"one"),
    raw("HTTP/1.0 500 No", b"one"),
], ids=["length", "to the end", "chunked", "interim", "error"])
@story(watch_allow_private=True)
async def test_every_legal_way_to_send_a_body_is_read(world, answer):
    async with Site() as site:
        ana = await world.peer("ana")
        site.pages["/"] = answer
        await watch(ana, site.url())
        await checked(world)
        assert [entry["lastValue"] for entry in await listed(ana)] == ["7692c3ad3540bb80"]


@spec("WATCH-6", "WATCH-7")
@story(watch_allow_private=True)
async def test_a_status_needs_no_body_however_long(world):
    async with Site() as site:
        ana = await world.peer("ana")
        site.pages["/"] = raw("HTTP/1.1 503 Busy\nContent-Length: 99999999999")
        await watch(ana, site.url(), mode="status")
        await checked(world)
        assert [entry["lastValue"] for entry in await listed(ana)] == ["503"]


@pytest.fixture(scope="module")
def good_test(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return certificate(tmp_path_factory.mktemp("tls"), "good.test")


@spec("WATCH-5")
def test_a_certificate_has_to_be_that_of_the_name_watched(tmp_path, good_test, monkeypatch):
    names = Names(good_test=[["127.0.0.1"]], evil_test=[["127.0.0.1"]])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*good_test)

    async def tell(trusted: bool) -> list[dict]:
        async with Site(server) as site, World(tmp_path / str(trusted), resolve=names, watch_allow_private=True) as world:
            site.pages["/"] = "one"
            ana = await world.peer("ana")
            for host in ("good.test", "evil.test"):
                await watch(ana, f"https://{host}:{site.port}/")
            await checked(world)
            return await listed(ana)

    untrusted = asyncio.run(tell(False))
    assert ["CERTIFICATE_VERIFY_FAILED" in entry["error"] for entry in untrusted] == [True, True]
    monkeypatch.setenv("SSL_CERT_FILE", good_test[0])
    good, evil = asyncio.run(tell(True))
    assert (good["lastValue"], "error" in good) == ("7692c3ad3540bb80", False)
    assert "not valid for 'evil.test'" in evil["error"]


@spec("WATCH-3", "OPS-4")
def test_a_check_under_way_does_not_hold_up_the_end_of_the_broker(tmp_path):
    async def tell() -> float:
        async with Site() as site, World(tmp_path, watch_allow_private=True) as world:
            ana = await world.peer("ana")
            site.pages["/"] = None
            await watch(ana, site.url())
            world.pass_seconds(0)
            while not site.asked:
                await asyncio.sleep(0.001)
            await ana.leave()
            began = time.monotonic()
            await world.broker.stop()
            ended = time.monotonic() - began
            await world.start()
            return ended

    assert asyncio.run(tell()) < 1.5


# --- webhooks -------------------------------------------------------------------------------------


async def webhook(peer, name: str = "ci") -> str:
    """Creates a webhook; the path of its address."""
    answer = await peer.request("create_webhook", name=name)
    assert answer["type"] == "webhook_ack", answer
    base, _, path = answer["url"].partition("/hook/")
    assert base == wire.http_base(peer.world.broker.public_url)
    assert path == f"{peer.world.mesh.id}/{answer['secret']}" and len(answer["secret"]) == 64
    return "/hook/" + path


@spec("HOOK-1", "HOOK-3")
@story
async def test_a_post_becomes_a_push_to_everybody(world):
    ana, bo, cleo = await world.peer("ana"), await world.peer("bo", capabilities=None), await world.peer("cleo")
    await cleo.request("set_visible", visible=False)
    path = await webhook(ana)
    body = {"ref": "main", "ok": True, "text": "Grüße", "list": [1, None]}
    assert await world.http("POST", path, body) == (200, {"ok": True, "delivered": 3, "held": 0})
    for peer in (ana, bo, cleo):  # hidden and plain ones too, and who created it
        push = await peer.push()
        assert {name: push[name] for name in ("subtype", "event", "eventData", "senderPubkey", "priority", "nonce")} == {
            "subtype": "webhook", "event": "ci", "eventData": body, "senderPubkey": "webhook:ci", "priority": "next",
            "nonce": ""}
        assert json.loads(base64.b64decode(push["ciphertext"])) == body
        wire.check(push, "broker")
    [entry] = (await ana.request("audit_query", eventType="message_sent"))["entries"]
    assert entry["actor"] == "ci"


@spec("HOOK-3")
@story
async def test_a_post_waits_for_who_is_busy_or_away(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    await bo.request("set_status", status="working")
    world.member("cleo")
    path = await webhook(ana)
    await ana.leave()
    await bo.event("peer_left")
    assert await world.http("POST", path, [1, 2]) == (200, {"ok": True, "delivered": 1, "held": 2})
    assert [f for f in await bo.silence() if f.get("subtype") == "webhook"] == []
    await bo.request("set_status", status="idle")
    assert (await bo.push())["eventData"] == [1, 2]
    await world.restart()
    for name in ("ana", "cleo"):
        assert (await (await world.peer(name)).push())["eventData"] == [1, 2]


@spec("HOOK-3", "HOOK-4")
@story
async def test_what_a_post_is_refused_for(world):
    ana = await world.peer("ana")
    path = await webhook(ana)
    wrong = path[:-1] + ("0" if path[-1] != "0" else "1")
    for target, body, status in [
        (path, b"not json", 400), (wrong, b"not json", 400), (path, b"", 400), (path, b"7", 400), (path, b"null", 400),
        (path, b'"text"', 400), (path, b"NaN", 400), (path, b"\xff", 400), (path, b"[" * 64 + b"]" * 64, 400),
        (path, b'"\\ud800"', 400), (path, b'{"a": "\\ud800"}', 400),
        (wrong, b"{}", 401), (wrong, b"7", 401), (path[:-1], b"{}", 401), (path.upper().replace("HOOK", "hook"), b"{}", 401),
        (f"/hook/{'0' * 32}/{'0' * 64}", b"{}", 401), (path + "/more", b"{}", 404), ("/hook/x", b"{}", 404),
        (path, b"[" + b" " * 65_535 + b"]", 413),
    ]:
        answered, answer = await world.http("POST", target, raw=body)
        assert answered == status, (target, body[:20])
        if status != 404:
            assert answer["ok"] is False and answer["error"]
    assert (await world.http("GET", path))[0] == 404
    assert [f for f in await ana.silence() if f["type"] == "push"] == []
    assert (await world.http("POST", path + "?from=ci", raw=b"[" * 63 + b"]" * 63))[0] == 200
    wire.decode(json.dumps(await ana.push()))  # as deep as a frame may be


@spec("HOOK-2")
@story
async def test_the_secret_is_told_once_and_not_kept(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    secret = (await webhook(ana)).rpartition("/")[2]
    for peer in (ana, bo):
        [entry] = (await peer.request("list_webhooks"))["webhooks"]
        assert (entry["name"], entry["active"]) == ("ci", True)
        assert entry["url"].endswith(f"/hook/{world.mesh.id}/********")
    kept = b"".join(path.read_bytes() for path in (world.data / "den").iterdir() if path.is_file())
    assert secret.encode() not in kept
    assert all(secret not in json.dumps(record) for record in world.log)


@spec("HOOK-4")
@story
async def test_secrets_are_compared_in_constant_time(world, monkeypatch):
    ana, compared = await world.peer("ana"), []
    path = await webhook(ana)
    await webhook(ana, "other")
    monkeypatch.setattr(hub.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert (await world.http("POST", path, {}))[0] == 200
    assert len(compared) == 2  # each of them, whichever is right


@spec("HOOK-1")
@pytest.mark.parametrize("name", ["", " ", " ci", "x" * 65, "a\nb", "a\u202eb"])
@story
async def test_a_name_that_is_none_is_refused(world, name):
    ana = await world.peer("ana")
    assert (await ana.request("create_webhook", name=name))["code"] == "invalid_webhook"


@spec("HOOK-1", "HOOK-5")
@story
async def test_a_name_is_used_once_at_a_time_and_free_again_after_deletion(world):
    ana, bo = await world.peer("ana"), await world.peer("bo")
    old = await webhook(ana)
    assert (await bo.request("create_webhook", name="ci"))["code"] == "webhook_exists"
    assert (await bo.request("delete_webhook", name="ci"))["code"] == "forbidden"
    assert (await ana.request("delete_webhook", name="no such"))["code"] == "not_found"
    gone = await ana.request("delete_webhook", name="ci")
    assert (gone["type"], gone["name"], gone["url"], gone["secret"]) == ("webhook_ack", "ci", "", "")
    assert (await world.http("POST", old, {}))[0] == 401
    assert (await ana.request("list_webhooks"))["webhooks"] == []
    new = await webhook(bo)
    assert new != old
    assert [(await world.http("POST", path, {}))[0] for path in (old, new)] == [401, 200]
    events = [entry["eventType"] for entry in (await ana.request("audit_query"))["entries"]]
    assert [event for event in events if event.startswith("webhook")] == [
        "webhook_created", "webhook_deleted", "webhook_created"]


@spec("HOOK-5")
@story
async def test_an_admin_deletes_anybodys_webhook(world):
    world.member("admin", role="admin")
    ana, admin = await world.peer("ana"), await world.peer("admin")
    await webhook(ana)
    assert (await admin.request("delete_webhook", name="ci"))["type"] == "webhook_ack"


@spec("HOOK-1", "HOOK-6")
@story
async def test_posts_and_webhooks_are_bounded(world, monkeypatch):
    monkeypatch.setattr(hub, "WEBHOOKS_PER_MESH", 2)
    ana = await world.peer("ana")
    path, other = await webhook(ana, "one"), await webhook(ana, "two")
    assert (await ana.request("create_webhook", name="three"))["code"] == "limit"
    statuses = [(await world.http("POST", path, {}))[0] for _ in range(61)]
    assert statuses == [200] * 60 + [429] or statuses == [200] * 61 and (await world.http("POST", path, {}))[0] == 429
    assert (await world.http("POST", other, {}))[0] == 200
    world.skipped += 2
    assert (await world.http("POST", path, {}))[0] == 200


@spec("HOOK-1")
def test_the_address_is_the_brokers_own_public_one(tmp_path):
    async def tell() -> str:
        async with World(tmp_path, public_url="wss://mesh.example/ws") as world:
            return (await (await world.peer("ana")).request("create_webhook", name="ci"))["url"]

    assert asyncio.run(tell()).startswith("https://mesh.example/hook/")


def test_the_option_for_private_addresses_reaches_the_broker():
    options = vars(hub.parser().parse_args(["--watch-allow-private", "--data", "/nowhere"]))
    assert Broker(**options).settings.watch_allow_private is True


@spec("SCHED-3", "SCHED-5", "SCHED-8", "CLOCK-2", "CLOCK-4", "WATCH-2", "WATCH-3", "WATCH-6", "WATCH-7", "HOOK-1", "HOOK-6")
def test_the_numbers_are_those_of_the_specification():
    assert (hub.SCHEDULED_PER_MEMBER, hub.FIRE_BATCH, hub.SCHEDULED_LIST_CHARS) == (10_000, 256, 512 * 1024)
    assert (hub.SCHEDULE_MAX_MS, hub.CLOCK_SPEEDS, hub.SIM_TICK_MS) == (3_153_600_000_000, (1, 100), 60_000)
    assert (hub.WATCHES_PER_MEMBER, hub.WATCH_INTERVAL, hub.FETCHES, hub.FETCHES_PER_MEMBER) == (20, (5, 30, 86_400), 64, 4)
    assert (hub.WATCH_SECONDS, hub.WATCH_REDIRECTS, hub.WATCH_BYTES, hub.VALUE_CHARS) == (10, 3, 2**20, 1000)
    assert (hub.WATCH_HEADER_CHARS, hub.WEBHOOKS_PER_MESH, hub.WEBHOOK_RATE) == (4096, 100, (60, 60))
    assert hub.LENGTHS["schedule"] == {"to": 256, "message": 65_536}
    assert hub.LENGTHS["watch"] == {"url": 2048, "extract": 256, "notify_on": 1024, "label": 128}
