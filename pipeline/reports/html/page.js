// The browser of tiles: a grid that shows one layer of every tile, and a viewer with a divider between two layers of one.
"use strict";

const viewer = document.getElementById("viewer");
const part = (name) => viewer.querySelector(`[data-part="${name}"]`);
let shown = null; // {browser, at}: which tile of which browser is open

function startBrowser(section) {
  const layers = JSON.parse(section.querySelector("script").textContent); // by tile: {layer: data URL}
  const list = section.querySelector(".tiles");
  const items = [...list.children];
  items.forEach((item, number) => {
    const image = item.querySelector("img");
    item.layers = { ...layers[number] };
    item.layers[image.dataset.layer] = image.src; // written once, in the grid
    item.querySelector("button").addEventListener("click", () => open(browser, order().indexOf(item)));
  });
  const order = () => [...list.children];
  const layer = section.querySelector("[data-choose=layer]");
  const names = [...layer.options].map((option) => option.value);
  const exact = new Set([...layer.options].filter((option) => "exact" in option.dataset).map((option) => option.value));
  const browser = { order, names, exact, legend: section.querySelector(".legends"), left: names[0], right: names[1] ?? names[0] };
  layer.addEventListener("change", () => items.forEach((item) => showThumbnail(item, layer.value, exact.has(layer.value))));
  const sort = section.querySelector("[data-choose=order]");
  sort.addEventListener("change", () => {
    const value = (item) => {
      const figures = JSON.parse(item.dataset.figures);
      return sort.value in figures ? figures[sort.value] : -Infinity; // a tile without the figure comes last
    };
    const sign = sort.selectedOptions[0].dataset.sign;
    const sorted = sort.value === "" ? items : [...items].sort((a, b) =>
      value(a) === -Infinity || value(b) === -Infinity ? value(b) - value(a) || 0 : sign * (value(a) - value(b)));
    list.append(...sorted);
  });
}

function showThumbnail(item, name, exact) {
  const image = item.querySelector("img");
  const absent = item.querySelector(".absent");
  const there = name in item.layers;
  image.hidden = !there;
  absent.hidden = there;
  absent.textContent = `no ${name}`;
  image.alt = `${item.dataset.tile}: ${name}`;
  if (there) image.src = item.layers[name];
  image.classList.toggle("exact", exact);
}

function open(browser, at) {
  shown = { browser, at };
  for (const side of ["left", "right"]) {
    const choice = part(side);
    choice.replaceChildren(...browser.names.map((name, i) => new Option(i < 9 ? `${i + 1} ${name}` : name, name)));
    choice.value = browser[side];
  }
  part("legends").replaceChildren(browser.legend.cloneNode(true));
  draw();
  if (!viewer.open) viewer.showModal();
  part("split").focus();
}

function draw() {
  const { browser, at } = shown;
  const tiles = browser.order();
  const tile = tiles[at];
  part("title").textContent = tile.dataset.tile;
  part("facts").textContent = tile.dataset.facts;
  part("place").textContent = `${at + 1} of ${tiles.length}`;
  part("previous").disabled = at === 0;
  part("next").disabled = at === tiles.length - 1;
  part("stage").style.setProperty("--ratio", tile.dataset.width / tile.dataset.height);
  for (const side of ["left", "right"]) {
    const name = browser[side];
    const layer = part(`${side}-layer`);
    layer.classList.toggle("exact", browser.exact.has(name));
    if (name in tile.layers) {
      const image = new Image();
      image.alt = `${tile.dataset.tile}: ${name}`;
      image.draggable = false;
      image.src = tile.layers[name];
      layer.replaceChildren(image);
    } else {
      layer.replaceChildren(`no ${name} of this tile`);
    }
  }
  move();
}

function move() {
  const share = part("split").value;
  part("stage").style.setProperty("--split", `${share}%`);
  part("split").setAttribute("aria-valuetext", `${share} % ${shown.browser.left}, ${100 - share} % ${shown.browser.right}`);
}

function turn(by) {
  const at = shown.at + by;
  if (at < 0 || at >= shown.browser.order().length) return;
  shown.at = at;
  draw();
  if (document.activeElement === document.body) part("split").focus(); // its button was disabled at an end
}

function choose(side, name) {
  shown.browser[side] = name;
  part(side).value = name;
  draw();
}

part("split").addEventListener("input", move);
part("previous").addEventListener("click", () => turn(-1));
part("next").addEventListener("click", () => turn(1));
part("close").addEventListener("click", () => viewer.close());
for (const side of ["left", "right"]) part(side).addEventListener("change", (event) => choose(side, event.target.value));
viewer.addEventListener("close", () => {
  const { browser, at } = shown;
  browser.order()[at].querySelector("button").focus();
});
viewer.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
  const digit = /^Digit([1-9])$/.exec(event.code);
  const split = part("split");
  if (event.key === "n" || event.key === "PageDown") turn(1);
  else if (event.key === "p" || event.key === "PageUp") turn(-1);
  else if (digit && digit[1] <= shown.browser.names.length) choose(event.shiftKey ? "right" : "left", shown.browser.names[digit[1] - 1]);
  else if ((event.key === "ArrowLeft" || event.key === "ArrowRight") && event.target !== split) {
    split.value = Number(split.value) + (event.key === "ArrowRight" ? 1 : -1);
    split.focus();
    move();
  } else return;
  event.preventDefault();
});
document.querySelectorAll(".browser").forEach(startBrowser);
