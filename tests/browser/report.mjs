// Opens a report in a real browser: its content, both widths, both colour schemes, the keyboard, no request
// to the outside, no error, and what axe-core says of its accessibility.
//
// Usage: REPORT=FILE.html CHROMIUM=PATH [SCREENSHOTS=FOLDER] node --test report.mjs

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import test, { after, before } from "node:test";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const [file, screenshots] = [process.env.REPORT, process.env.SCREENSHOTS];
const url = pathToFileURL(path.resolve(file)).href;
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core"), "utf8");
const SIZES = { phone: [360, 740], desktop: [1280, 900] };
let browser;

before(async () => {
  browser = await puppeteer.launch({
    executablePath: process.env.CHROMIUM,
    args: ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"],
  });
});
after(() => browser?.close());

async function open(size, scheme, javascript = true) {
  const page = await browser.newPage();
  const seen = { errors: [], requests: [] };
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  page.on("console", (message) => {
    if (["error", "warn"].includes(message.type())) seen.errors.push(message.text());
  });
  page.on("request", (request) => {
    if (!request.url().startsWith("data:") && request.url() !== url) seen.requests.push(request.url());
  });
  const [width, height] = SIZES[size];
  await page.setViewport({ width, height, deviceScaleFactor: size === "phone" ? 2 : 1 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.setJavaScriptEnabled(javascript);
  await page.goto(url, { waitUntil: "load" });
  return { page, seen };
}

async function shoot(page, name) {
  if (!screenshots) return;
  const height = await page.evaluate(() => document.documentElement.scrollHeight);
  // Taller pictures are cut, so that each stays readable.
  for (let top = 0, part = 0; top < height; top += 1800, part++) {
    const clip = { x: 0, y: top, width: page.viewport().width, height: Math.min(1800, height - top) };
    await page.screenshot({ path: path.join(screenshots, `${name}-${part}.png`), clip });
  }
}

for (const size of Object.keys(SIZES)) {
  for (const scheme of ["light", "dark"]) {
    test(`${size}, ${scheme}: whole, silent, accessible`, async () => {
      const { page, seen } = await open(size, scheme);
      const found = await page.evaluate(() => ({
        title: document.title,
        headings: [...document.querySelectorAll("h2")].map((h) => h.textContent),
        overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        tables: [...document.querySelectorAll("table")].every(
          (t) => t.caption && t.querySelector("th[scope]")),
        charts: [...document.querySelectorAll("svg.chart")].every((c) => c.querySelector("title, desc")),
        images: [...document.images].every((i) => i.complete && i.naturalWidth > 0),
      }));
      assert.match(found.title, /vlmq report/);
      assert.ok(found.headings.length >= 4, found.headings.join());
      assert.equal(found.overflow, 0, "the page is wider than the screen");
      assert.deepEqual([found.tables, found.charts, found.images], [true, true, true]);
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => window.axe.run());
      const told = violations.map((v) => `${v.id}: ${v.nodes.slice(0, 3).map((n) => n.target).join(" | ")}`);
      assert.deepEqual(told, []);
      await page.evaluate(() => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
      await shoot(page, `${size}-${scheme}`);
      assert.deepEqual(seen, { errors: [], requests: [] });
      await page.close();
    });
  }
}

const drawn = (page) => page.evaluate(() => {
  const article = document.querySelector(".sample:not([hidden])");
  const classes = (what) => [...article.querySelectorAll(what)].map((e) => e.getAttribute("class")).join();
  return {
    cells: classes(".cells rect"),
    words: classes(".token"),
    heaviest: article.querySelector(".heaviest").innerText,
    shares: article.querySelector(".shares").innerText,
    where: article.querySelector(".where")?.textContent,
    whyNot: document.getElementById("why-not").textContent,
  };
});

test("the script draws what the page had before it", async () => {
  const { page } = await open("desktop", "light", false);
  // Without a script all samples are shown; with it one.
  const before = await drawn(page);
  assert.equal(await page.$eval("#controls", (c) => getComputedStyle(c).display), "none");
  await page.close();
  const { page: later } = await open("desktop", "light");
  assert.deepEqual(await drawn(later), before);
  await later.close();
});

test("another layer, linear and sample change the picture, by keyboard alone", async () => {
  const { page, seen } = await open("desktop", "light");
  const first = await drawn(page);
  // From the top, tab by tab, to each control.
  const reach = async (id) => {
    for (let i = 0; i < 60; i++) {
      if (await page.evaluate((id) => document.activeElement.id === id, id)) return;
      await page.keyboard.press("Tab");
    }
    assert.fail(`${id} cannot be reached with the tab key`);
  };
  await reach("pick-sample");
  await page.keyboard.press("ArrowDown");
  const other = await drawn(page);
  assert.notEqual(other.cells, first.cells);
  await page.keyboard.press("ArrowUp");
  assert.deepEqual(await drawn(page), first);
  await reach("pick-layer");
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  assert.notEqual(outline, "none", "the focus is not to be seen");
  await page.keyboard.press("End");
  const last = await drawn(page);
  assert.notEqual(last.cells, first.cells);
  assert.notEqual(last.words, first.words);
  assert.notEqual(last.heaviest, first.heaviest);
  assert.notEqual(last.where, first.where);
  await page.keyboard.press("Home");
  const none = await drawn(page);
  assert.match(none.whyNot, /alike/);
  assert.ok(!/t\d/.test(none.cells), "nothing is drawn where there is nothing");
  await page.keyboard.press("End");
  await reach("pick-projection");
  await page.keyboard.press("ArrowDown");
  assert.notEqual((await drawn(page)).cells, last.cells);
  assert.deepEqual(seen, { errors: [], requests: [] });
  await page.close();
});

test("on paper nothing is hidden but the controls", async () => {
  const { page } = await open("desktop", "dark");
  await page.emulateMediaType("print");
  const display = (what) => page.$eval(what, (e) => getComputedStyle(e).display);
  assert.equal(await display("nav"), "none");
  assert.equal(await display("#controls"), "none");
  assert.notEqual(await display(".map"), "none");
  await page.close();
});
