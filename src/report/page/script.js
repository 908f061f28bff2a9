"use strict";
(() => {
  const LEVELS = 9;
  const N_HEAVIEST = 8;
  const data = JSON.parse(document.getElementById("importance").textContent);
  const pick = (name) => document.getElementById("pick-" + name);

  // The numbers of one f16 per token, little-endian, as base64.
  function decoded(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const number = (_, i) => {
      const half = bytes[2 * i] | (bytes[2 * i + 1] << 8);
      const exponent = (half >> 10) & 31;
      const fraction = half & 1023;
      const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
      return half & 0x8000 ? -size : size;
    };
    return Array.from({ length: bytes.length / 2 }, number);
  }

  function level(weight) {
    if (!(weight > 0)) return 0;
    const up = (Math.log2(weight) - data.scale.low) / (data.scale.high - data.scale.low);
    return Math.min(Math.max(Math.floor(up * LEVELS), 0), LEVELS - 1);
  }

  const times = (w) => w.toFixed(w >= 10 ? 0 : w >= 1 ? 1 : 2) + " ×";

  function percent(share) {
    const p = 100 * share;
    return p.toFixed(p >= 10 || p === 0 ? 0 : p >= 1 ? 1 : 2) + " %";
  }

  // What each token is called, and its class.
  function names(sample) {
    const places = [];
    sample.images.forEach((grids, image) => {
      grids.forEach((grid, part) => {
        for (let i = 0; i < grid.rows * grid.cols; i++) {
          const [row, col] = [Math.floor(i / grid.cols) + 1, (i % grid.cols) + 1];
          const of = grids.length > 1 ? ` part ${part + 1},` : "";
          places.push(`image ${image + 1},${of} row ${row}, column ${col}`);
        }
      });
    });
    let nth = 0;
    return sample.runs.flatMap((run) =>
      Array.from({ length: run.n_tokens }, (_, i) => {
        const isImage = run.class === "vision";
        const name = isImage ? places[nth++] || `image token ${nth}` : JSON.stringify(run.texts[i]);
        return { name: isImage ? name : `${name} (${run.class})`, class: run.class };
      }));
  }

  function fill(table, rows, hasHead) {
    const body = table.tBodies[0];
    body.replaceChildren(...rows.map((cells) => {
      const row = document.createElement("tr");
      cells.forEach((text, i) => {
        const cell = document.createElement(hasHead && i === 0 ? "th" : "td");
        if (cell.tagName === "TH") cell.scope = "row";
        cell.textContent = text;
        row.append(cell);
      });
      return row;
    }));
  }

  function setLevel(element, weight) {
    for (let i = 0; i < LEVELS; i++) element.classList.remove("t" + i);
    if (weight !== undefined) element.classList.add("t" + level(weight));
  }

  const mean = (list) => list.reduce((a, b) => a + b, 0) / Math.max(list.length, 1);

  function drawWords(article, weights) {
    let at = 0;
    for (const token of article.querySelectorAll(".token")) {
      const n = Number(token.dataset.n || 1);
      const own = weights && weights.slice(at, at + n);
      setLevel(token, own && mean(own));
      if (token.dataset.n) token.querySelector("b").textContent = own ? times(mean(own)) : "–";
      at += n;
    }
  }

  function drawTables(article, sample, weights) {
    const all = names(sample);
    const sums = new Map();
    all.forEach((token, i) => {
      const sum = sums.get(token.class) || [0, 0];
      sums.set(token.class, [sum[0] + 1, sum[1] + (weights ? weights[i] : 0)]);
    });
    const total = weights ? weights.reduce((a, b) => a + b, 0) : 0;
    const shares = [...sums].sort().map(([name, [n, weight]]) =>
      [name, percent(n / all.length), total ? percent(weight / total) : "–"]);
    fill(article.querySelector(".shares"), shares, true);
    const order = [...(weights || []).keys()].sort((a, b) => weights[b] - weights[a] || a - b);
    const heaviest = order.slice(0, N_HEAVIEST).map((i) => [all[i].name, times(weights[i])]);
    fill(article.querySelector(".heaviest"), heaviest, false);
  }

  function draw() {
    const [s, layer, projection] = [pick("sample").value, pick("layer").value, pick("projection").value];
    const kept = data.layers[layer][projection];
    const weights = kept && decoded(kept[s]);
    const sample = data.samples[s];
    for (const article of document.querySelectorAll(".sample")) {
      article.hidden = article.dataset.sample !== s;
    }
    const article = document.querySelector(`.sample[data-sample="${s}"]`);
    const ofImages = [];
    let at = 0;
    for (const run of sample.runs) {
      if (weights && run.class === "vision") ofImages.push(...weights.slice(at, at + run.n_tokens));
      at += run.n_tokens;
    }
    article.querySelectorAll(".cells rect").forEach((cell, i) => setLevel(cell, ofImages[i]));
    article.querySelectorAll(".where").forEach((where) => {
      where.textContent = `layer ${layer}, ${projection}`;
    });
    drawWords(article, weights);
    drawTables(article, sample, weights);
    document.getElementById("shown-layer").textContent = layer;
    document.getElementById("why-not").textContent = weights ? "" : data.why_not[layer][projection] || "";
  }

  for (const name of ["sample", "layer", "projection"]) pick(name).addEventListener("input", draw);
  pick("strength").addEventListener("input", (event) => {
    const pictures = document.getElementById("pictures");
    pictures.style.setProperty("--strength", event.target.value / 100);
  });
  document.getElementById("controls").hidden = false;
  draw();
})();
