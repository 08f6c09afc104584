// Numbers as the tables write them.

const NONE = "–";
const minus = (text) => text.replaceAll("-", "−");

function scaled(value) {
  for (const [power, letter] of [[15, "P"], [12, "T"], [9, "G"], [6, "M"], [3, "k"]]) {
    if (Math.abs(value) >= 10 ** power) return `${Number((value / 10 ** power).toPrecision(3))} ${letter}`;
  }
  return `${Number(value.toPrecision(3))}`;
}

/** A number of the board's headline. */
function headline(board, value) {
  if (value === null) return NONE;
  return board.percent ? `${(100 * value).toFixed(1)} %` : minus(value.toFixed(board.digits));
}

/** With its interval. */
function within(board, value, low, high) {
  const ends = low === null || high === null ? "" : ` [${[low, high].map((end) => headline(board, end).replace(" %", "")).join(", ")}]`;
  return headline(board, value) + ends;
}

/** A difference of headlines, with its sign. */
function gap(board, value, low, high) {
  const said = (x) => minus((x < 0 ? "" : "+") + (board.percent ? (100 * x).toFixed(1) : x.toFixed(board.digits)));
  const ends = low === null || high === null ? "" : ` [${said(low)}, ${said(high)}]`;
  return `${said(value)}${board.percent ? " pt" : ""}${ends}`;
}

/** Any other number of a row. */
function plain(value) {
  if (value === null) return NONE;
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return minus(value.toLocaleString("en"));
  return minus(size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3) : `${Number(value.toPrecision(5))}`);
}

const probability = (p) => (p === null ? NONE : p < 0.001 ? "<0.001" : p.toFixed(3));

/** ``0: 2.531 · 1: 2.540``: what each seed has. */
const seedsOf = (board, row) =>
  row.seeds.map((each) => `${each.seed}: ${each.value === null ? each.status.replace("_", " ") : headline(board, each.value)}`).join(" · ");
