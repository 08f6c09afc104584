// The details of a number: what it rests on, what it cost, how to run it again.

const folded = (title, ...content) => make("details", { open: true }, make("summary", {}, title), ...content);
const list = (pairs) => make("dl", {}, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));

function grid(head, lines) {
  const cells = (tag, line) => make("tr", {}, ...line.map((cell) => make(tag, {}, cell === null ? NONE : cell)));
  return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, cells("th", head)), make("tbody", {}, ...lines.map((line) => cells("td", line)))));
}

/** Text for a clipboard, where the browser has one to give. */
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(button.previousElementSibling);
    button.textContent = "Selected: copy it with the keyboard";
  }
}

const copied = (text) => make("p", { class: "command" }, make("code", {}, text), make("button", { type: "button", click: (event) => copy(text, event.target) }, "Copy"));
const valued = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : String(value));

/** Differences to all other rows of the board, the largest first. */
function compared(board, row, all) {
  const me = all.indexOf(row);
  const lines = board.pairs.filter(([a, b]) => a === me || b === me).map(([a, b, value, low, high, p, told, n]) => {
    const turned = b === me, sign = turned ? -1 : 1;
    const ends = turned ? [high === null ? null : -high, low === null ? null : -low] : [low, high];
    return [sign * value, [all[turned ? a : b].label, gap(board, sign * value, ...ends), probability(p), told ? (sign * value > 0) === board.higher ? "better" : "worse" : "not told apart", plain(n)]];
  });
  lines.sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
  return grid(["against", "difference [95 %]", "p (Holm)", "this row is", "n"], lines.map(([, line]) => line));
}

function seedTable(board, row) {
  const lines = row.seeds.map((each) => [
    plain(each.seed), headline(board, each.value), each.status.replace("_", " "), each.ended ? `${plain(each.steps)} steps, ended by ${each.ended}` : "none",
    each.spent.map((s) => (s === null ? NONE : `${plain(Math.round(s))} s`)).join(" / "), each.finished ? String(each.finished).replace("T", " ").slice(0, 16) : NONE, make("code", {}, `cells/${each.key}`),
  ]);
  return grid(["seed", board.name, "status", "training", "train / eval / controls", "finished (UTC)", "log and samples in the run's folder"], lines);
}

function documents(board, found) {
  const lines = (end) => found[end].map(([name, value, count]) => [name, headline(board, value), plain(count)]);
  const part = (end) => [make("h4", {}, `${found[end].length} ${end} of ${found.of} documents`), grid(["document", board.name, found.unit], lines(end))];
  return folded("Documents", ...part("worst"), ...part("best"));
}

/** Opens the details of a row. */
function open(id) {
  const row = byId.get(id), dialog = get("details");
  if (!row) return;
  const board = data.boards[row.board], all = data.rows.filter((other) => other.board === row.board);
  const facts = [...new Set(row.seeds.map((each) => each.made))].map((place) => data.facts[place]);
  const close = make("button", { type: "button", class: "close", click: () => dialog.close() }, "Close");
  const keys = row.seeds.map((each) => each.key).join(", ");
  dialog.replaceChildren(...[
    make("header", {}, make("h2", { tabindex: "-1" }, row.label), close),
    make("p", { class: "scope" }, board.title),
    make("p", { class: "big" }, row.value === null ? row.status.replace("_", " ") : `${within(board, row.value, row.low, row.high)} ${board.name}`),
    make("p", {}, `n = ${plain(row.n)} · seeds ${seedsOf(board, row)}${row.spread === null ? "" : ` · sd between seeds ${headline({ ...board, digits: board.digits + 1 }, row.spread)}`}`),
    row.limits.length ? make("p", { class: "warning" }, row.limits.join("; ")) : null,
    row.notes ? make("p", {}, row.notes) : null,
    folded("Run it again", copied(row.command), make("p", { class: "scope" }, `It makes cells ${keys}; what is in the folder already is not run again.`)),
    folded("Seeds", seedTable(board, row)),
    board.pairs.some(([a, b]) => all[a] === row || all[b] === row) ? folded("Compared with the other rows", compared(board, row, all)) : null,
    folded("All numbers", grid(["metric", "slice", "value", "95 % interval", "n", "unit", "note"], row.numbers.map(([metric, slice, value, low, high, n, unit, note]) => [metric, slice, plain(value), low === null && high === null ? NONE : `${plain(low)} to ${high === null ? "open" : plain(high)}`, plain(n), unit, note]))),
    row.documents.of ? documents(board, row.documents) : null,
    row.reported.length ? folded("Reported beside reproduced", grid(["reported for", "metric", "reported", "ours [95 %]", "verdict", "where"], row.reported)) : null,
    folded("What was asked", list([...Object.entries(row.asked), ...Object.entries(board.budget).map(([name, value]) => [`budget: ${name}`, value])].map(([name, value]) => [name, valued(value)]))),
    folded("What it is", list([["parity with official code", row.parity], ["look-ahead", row.ahead ? `${row.ahead} tokens: not ranked` : "none"], ["pretrained", row.pretrained || "no"], ["role", row.role], ...Object.entries(row.axes).map(([name, value]) => [`memory: ${name.replaceAll("_", " ")}`, value])])),
    folded("Where it was run", ...facts.map((fact) => list(Object.entries(fact).filter(([, value]) => value !== null).map(([name, value]) => [name, valued(value)])))),
  ].filter((part) => part !== null));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  dialog.querySelector("h2").focus();
}
