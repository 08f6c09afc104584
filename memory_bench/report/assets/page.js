// Puts it together.

let table = null;
let looked = null; // the board of the charts, where the reader chose one
let paired = false; // whether prices are shown against the difference to the window
let drawing = 0;
const finished = [];

/** Rows that pass, in the order of the table. */
const visible = () => table.rows({ search: "applied", order: "applied" }).nodes().toArray().map((line) => byId.get(line.id));

async function put(holder, spec, title) {
  const width = Math.max(260, holder.clientWidth - 8);
  const whole = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width, height: Math.min(300, 0.75 * width), autosize: { type: "fit-x", contains: "padding" }, description: title, ...spec };
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  // `ast`: expressions are interpreted, so that the page needs no right to compile text.
  const made = await vegaEmbed(holder, whole, { ast: true, actions: false, renderer: "svg", config: CONFIG, tooltip: { theme: dark ? "dark" : "light" } });
  finished.push(made);
}

async function draw() {
  const turn = ++drawing, rows = visible();
  const boards = [...new Set(rows.map((row) => row.board))];
  const chosen = rows.filter((row) => picked.has(row.id));
  const place = boards.includes(looked) ? looked : chosen.length ? chosen.at(-1).board : boards[0];
  const holder = get("charts");
  for (const made of finished.splice(0)) made.finalize();
  holder.replaceChildren();
  if (place === undefined) return;
  const board = data.boards[place], all = data.rows.filter((row) => row.board === place);
  const mine = chosen.filter((row) => row.board === place);
  const shown = mine.length ? mine : rows.filter((row) => row.board === place);
  const choice = make("select", { name: "board", change: (event) => { looked = Number(event.target.value); draw(); } }, ...boards.map((i) => make("option", { value: i, selected: i === place }, data.boards[i].title)));
  const gaps = board.window && board.pairs.length ? make("label", {}, make("input", { type: "checkbox", name: "paired", checked: paired, change: (event) => { paired = event.target.checked; draw(); } }), ` costs against the paired difference to ${board.window}`) : null;
  holder.append(make("p", { class: "chosen" }, make("label", {}, "Charts of ", choice), ` ${mine.length ? `${mine.length} chosen rows` : "all rows shown above: choose some with their boxes"} `, gaps));
  const width = Math.max(260, Math.min(holder.clientWidth, holder.clientWidth < 1130 ? Infinity : holder.clientWidth / 2 - 12));
  const specs = [
    ["Retention", curveChart(board, shown, "distance", width)], ["Loss by position", curveChart(board, shown, "position", width)],
    ...Object.entries(board.prices).map(([kind, name]) => [`${board.name} against ${name}`, priceChart(board, shown, all, kind, width, paired && gaps !== null)]),
    ["Training", trainingChart(board, shown, width)],
  ].filter(([, spec]) => spec);
  const panels = specs.map(([title]) => make("figure", {}, make("figcaption", {}, title), make("div", { class: "chart" })));
  const box = make("div", { class: "panels" }, ...panels);
  holder.append(box, make("p", { class: "scope" }, "Bars and bands: 95 % intervals (bands up to six rows). Line: the best at each price or below, of the whole board. Faint: another row costs no more and is better beyond the tie. Hollow or dashed: controls. Crossed: not every seed is ok."));
  for (const [i, [title, spec]] of specs.entries()) {
    if (turn !== drawing) return;
    await put(panels[i].querySelector(".chart"), spec, title);
  }
  if (turn === drawing) document.body.dataset.drawn = String(turn);
}

let waiting = 0;
function later() {
  clearTimeout(waiting);
  waiting = setTimeout(draw, 60);
}

/** The row of the address, seen and opened. */
function follow() {
  const id = decodeURIComponent(location.hash.slice(1));
  if (!byId.has(id)) return;
  const line = table.row(`[id="${CSS.escape(id)}"]`).node() ?? get(id);
  if (line && !line.isConnected) document.querySelector("form.filters").reset();
  setTimeout(() => { get(id)?.scrollIntoView({ block: "center" }); open(id); });
}

async function begin() {
  document.head.append(make("style", {}, await unpacked("library-style")));
  await start("table");
  for (const line of document.querySelectorAll("#results tbody tr")) equip(line, later);
  get("tools").append(tools(() => table.draw()));
  table = makeTable(later);
  get("results").addEventListener("click", (event) => {
    const button = event.target.closest("button[data-row]");
    if (button) open(button.dataset.row);
  });
  const unfold = (shown) => () => { for (const part of document.querySelectorAll("body > details")) part.open = shown || part.dataset.was === "1"; };
  for (const part of document.querySelectorAll("body > details")) part.dataset.was = part.open ? "1" : "0";
  addEventListener("beforeprint", unfold(true));
  addEventListener("afterprint", unfold(false));
  addEventListener("hashchange", follow);
  addEventListener("resize", later);
  document.body.dataset.ready = "1";
  follow();
  await start("charts");
  await draw();
}

begin().catch((error) => {
  console.error(error);
  get("tools").append(make("p", { class: "warning" }, `The table stays as it is: ${error.message}`));
});
