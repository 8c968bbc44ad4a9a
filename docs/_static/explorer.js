// Shows one of the settings that attnlab computed when the site was built. Nothing is fetched and nothing is computed
// here but the drawing.
"use strict";

(() => {
  const root = document.getElementById("explorer");
  const data = window.ATTNLAB;
  if (!root || !data) return;
  const names = { is_causal: "causal" };
  const controls = root.querySelector("fieldset");
  const canvas = root.querySelector("canvas");
  const chosen = { mechanism: "local", length: 64, window: 16, dilation: 4, stride: 1, is_causal: true, sinks: 0, axis: 1 };
  for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
    if (name in chosen) chosen[name] = name === "mechanism" ? value : JSON.parse(value);
  if (!(chosen.mechanism in data.kinds)) chosen.mechanism = "local";

  function select(name, values, value, change) {
    const label = document.createElement("label");
    label.textContent = names[name] || name;
    const list = document.createElement("select");
    list.name = name;
    for (const each of values) {
      const option = new Option(each === null ? "none" : each === true ? "yes" : each === false ? "no" : each, JSON.stringify(each));
      option.selected = each === value;
      list.add(option);
    }
    list.addEventListener("change", () => change(JSON.parse(list.value)));
    label.append(list);
    controls.append(label);
  }

  function build() {
    controls.replaceChildren();
    select("mechanism", Object.keys(data.kinds), chosen.mechanism, (value) => {
      chosen.mechanism = value;
      build();
      controls.querySelector("select").focus();
    });
    for (const [name, values] of Object.entries(data.kinds[chosen.mechanism].controls)) {
      if (!values.includes(chosen[name])) chosen[name] = values[values.length > 2 ? 2 : 0];
      select(name, values, chosen[name], (value) => {
        chosen[name] = value;
        show();
      });
    }
    show();
  }

  const number = (value) => (value === null ? "–" : value.toLocaleString("en"));
  const percent = (part, whole) => `${(100 * part / whole).toFixed(part < whole / 100 ? 2 : 1)} %`;

  function show() {
    const kind = data.kinds[chosen.mechanism];
    const options = Object.keys(kind.controls);
    const found = kind.entries[options.map((name) => JSON.stringify(chosen[name])).join("|")];
    const pre = root.querySelector("pre"), table = root.querySelector(".numbers table");
    pre.className = found.refused ? "refused" : "";
    pre.textContent = found.refused ? `ValueError: ${found.refused}` : found.call;
    table.replaceChildren();
    try {
      history.replaceState(null, "", "#" + ["mechanism", ...options].map((name) => `${name}=${chosen[name]}`).join("&"));
    } catch { /* a browser that keeps no history of files */ }
    draw(found);
    if (found.refused) return;
    const length = chosen.length, tiles = [...found.tiles], all = tiles.length;
    const visited = tiles.filter((tile) => tile !== "0").length, whole = tiles.filter((tile) => tile === "2").length;
    const rows = [
      ["keys per query, mean", (found.pairs / length).toFixed(1)],
      [`tiles of ${data.tile} × ${data.tile} seen into`, `${visited} of ${all}`],
      ["of these seen wholly", number(whole)],
      ["skipping the other tiles", found.skips ? `at most ${(all / visited).toFixed(1)} times faster` : "does not apply"],
      ["operations between the heads", number(found.flops)],
      ["beside dense attention", percent(found.flops, found.dense)],
      ["numbers kept to decode", number(found.state)],
      ["beside dense attention", found.state === null ? "–" : percent(found.state, found.dense_state)],
    ];
    for (const [what, value] of rows) {
      const row = table.insertRow();
      row.insertCell().textContent = what;
      row.insertCell().textContent = value;
    }
    canvas.setAttribute("aria-label", `Who sees whom: ${rows[0][1]} keys per query, tiles seen into: ${rows[1][1]}`);
  }

  function draw(found) {
    // As many pixels as the screen has, so that cells stay even.
    const length = chosen.length, width = canvas.clientWidth * (window.devicePixelRatio || 1);
    const scale = Math.max(1, Math.floor(width / length)), size = length * scale, gap = scale > 5 ? 1 : 0;
    const context = canvas.getContext("2d"), style = getComputedStyle(document.body);
    const colour = (name) => style.getPropertyValue(name).trim();
    canvas.width = canvas.height = size;
    context.clearRect(0, 0, size, size);
    if (found.refused) return;
    const tile = data.tile * scale, across = Math.ceil(length / data.tile);
    context.fillStyle = colour("--who-plus");
    context.globalAlpha = 0.14;
    [...found.tiles].forEach((seen, index) => {
      if (seen !== "0") context.fillRect((index % across) * tile, Math.floor(index / across) * tile, tile, tile);
    });
    context.globalAlpha = 1;
    let query = 0;
    for (const [count, parts] of found.rows)
      for (let i = 0; i < count; i++, query++)
        for (let j = 0; j < parts.length; j += 3)
          for (let key = parts[j]; key <= parts[j + 1]; key += parts[j + 2])
            context.fillRect((query + key) * scale, query * scale, scale - gap, scale - gap);
    context.strokeStyle = colour("--who-line");
    context.lineWidth = 1;
    for (let i = 1; i < across; i++)
      for (const [x0, y0, x1, y1] of [[i * tile, 0, i * tile, size], [0, i * tile, size, i * tile]]) {
        context.beginPath();
        context.moveTo(x0 + 0.5, y0 + 0.5);
        context.lineTo(x1 + 0.5, y1 + 0.5);
        context.stroke();
      }
  }

  new MutationObserver(show).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  addEventListener("resize", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  build();
})();
