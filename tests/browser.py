"""Pages as a browser has them: headless Chromium, told what to do by its own protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOOK = """(() => {
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const out = [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide,pre,svg *'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80));
  const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
  const cut = [...document.querySelectorAll('svg text')].filter(t => {
    const [a, b] = [t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()];
    return a.right > b.right + 1 || a.left < b.left - 1 || a.bottom > b.bottom + 1;
  }).map(t => t.textContent);
  return JSON.stringify({wide, out, broken, cut, images: document.images.length,
                         charts: document.querySelectorAll('svg').length});
})()"""


def look(page, width, picture=None):
    """What is wrong with `page` in a window of `width` px, and how much it shows; a picture of all
    of it if a path is given. Skips, visibly, where there is no browser.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser on this machine: apt-get install {NAMES[0]}")
    return asyncio.run(_look(browser, Path(page).resolve(), width, picture))


async def _look(browser, page, width, picture):
    profile = page.parent / f".browser-{width}"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen([browser, *options], stderr=subprocess.DEVNULL)
    try:
        port = profile / "DevToolsActivePort"
        for _ in range(600):
            if port.exists() and port.read_text().count("\n"):
                break
            time.sleep(0.1)
        where = f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json/list"
        async with aiohttp.ClientSession() as session:
            async with session.get(where) as answer:
                tab = next(each for each in await answer.json() if each["type"] == "page")
            socket = session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
            async with socket as devtools:
                return await _ask(Devtools(devtools), page, width, picture)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(profile, ignore_errors=True)


class Devtools:
    """A tab's protocol: questions with their answers, and the events in between."""

    def __init__(self, socket):
        self.socket, self.asked, self.events = socket, 0, []

    async def ask(self, method, **given):
        self.asked += 1
        await self.socket.send_json({"id": self.asked, "method": method, "params": given})
        while (answer := await self._next()).get("id") != self.asked:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    async def until(self, event):
        while not any(each["method"] == event for each in self.events):
            await self._next()

    async def _next(self):
        answer = json.loads((await self.socket.receive()).data)
        if "method" in answer:
            self.events.append(answer)
        return answer


async def _ask(tab, page, width, picture):
    for domain in ("Page", "Log", "Runtime"):
        await tab.ask(f"{domain}.enable")
    shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    await tab.ask("Emulation.setDeviceMetricsOverride", **shape)
    await tab.ask("Page.navigate", url=page.as_uri())
    await tab.until("Page.loadEventFired")
    found = json.loads((await tab.ask("Runtime.evaluate", expression=LOOK))["result"]["value"])
    wrong = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    found["errors"] = [each["params"] for each in tab.events if each["method"] in wrong]
    if picture:
        taken = await tab.ask("Page.captureScreenshot", captureBeyondViewport=True)
        Path(picture).write_bytes(base64.b64decode(taken["data"]))
    return found
