// Charts of the board that is looked at, in Vega-Lite. A model has the colour and the marker it has in every plot.

const outline = (points) => `M${points.map(([x, y]) => `${x.toFixed(3)},${y.toFixed(3)}`).join("L")}Z`;
const around = (count, radius) =>
  Array.from({ length: count }, (_, i) => [radius(i) * Math.sin((2 * Math.PI * i) / count), -radius(i) * Math.cos((2 * Math.PI * i) / count)]);
const SHAPES = {
  o: "circle", s: "square", D: "diamond", "^": "triangle-up", v: "triangle-down", "<": "triangle-left", ">": "triangle-right",
  P: "cross", p: outline(around(5, () => 1)), h: outline(around(6, () => 1)), "*": outline(around(10, (i) => (i % 2 ? 0.45 : 1.1))),
  d: outline([[0, -1], [0.55, 0], [0, 1], [-0.55, 0]]),
};
const FEW = 6; // rows up to which intervals are drawn as bands: more of them hide each other
const soft = "rgba(128,128,128,0.28)";
const CONFIG = {
  background: "transparent", font: "system-ui, sans-serif", view: { stroke: null },
  axis: { labelColor: "currentColor", titleColor: "currentColor", gridColor: soft, domainColor: soft, tickColor: soft, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
  legend: { labelColor: "currentColor", titleColor: "currentColor", labelFontSize: 12, labelLimit: 260, symbolSize: 90 },
};
const TIP = [{ field: "label", title: "model" }, { field: "said", title: "value [95 %]" }, { field: "n" }, { field: "seeds", title: "seeds" }, { field: "at", title: "at" }];

/** Colour and marker of rows; black, which is the window's, is the colour of the text. */
function series(rows, width) {
  const domain = rows.map((row) => row.label);
  const range = rows.map((row) => (row.look[0] === "#000000" ? "currentColor" : row.look[0]));
  const longest = Math.max(...domain.map((label) => label.length));
  const legend = { title: null, orient: "bottom", columns: Math.max(1, Math.floor((width - 60) / (6.6 * Math.min(40, longest) + 34))), symbolOpacity: 1 };
  return {
    color: { field: "label", type: "nominal", sort: null, scale: { domain, range }, legend },
    shape: { field: "label", type: "nominal", sort: null, scale: { domain, range: rows.map((row) => SHAPES[row.look[1]]) }, legend },
  };
}

/** A scale that shows zero and what is far apart, and its ticks where they need be said. */
function spread(values, base) {
  const positive = values.filter((value) => value > 0).sort((a, b) => a - b);
  if (!positive.length) return [{}];
  const first = positive[0], last = positive.at(-1), zero = positive.length < values.length;
  if (last <= 2 * first && !zero) return [{ zero: false }];
  const scale = zero ? { type: "symlog", constant: first } : { type: "log", base };
  const powers = Array.from({ length: 40 }, (_, i) => 10 ** (i - 12));
  for (const digits of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = powers.flatMap((power) => digits.map((digit) => digit * power)).filter((tick) => tick >= first && tick <= last);
    if (ticks.length > 1 && ticks.length <= 7) return [scale, zero ? [0, ...ticks] : ticks];
  }
  return [scale];
}

const short = "datum.value === 0 ? '0' : format(datum.value, datum.value < 1 ? '.3~g' : '.3~s')";
/** Layers that have something to show. */
const full = (layers) => layers.filter((layer) => !layer.data || layer.data.values.length);

const factor = (board) => (board.percent ? 100 : 1);
const axisName = (board) => `${board.name}${board.percent ? " (%)" : ""}, ${board.higher ? "higher" : "lower"} is better`;

/** Value, low and high of a row's headline, or of its paired difference to the window; null where there is none. */
function spot(board, row, all, paired) {
  if (!paired) return row.value === null ? null : [row.value, row.low ?? row.value, row.high ?? row.value];
  if (row.label === board.window) return [0, 0, 0];
  const me = all.indexOf(row), window = all.findIndex((other) => other.label === board.window);
  const pair = board.pairs.find(([a, b]) => (a === me && b === window) || (a === window && b === me));
  if (!pair) return null;
  const sign = pair[0] === me ? 1 : -1, ends = [pair[3] ?? pair[2], pair[4] ?? pair[2]].map((end) => sign * end);
  return [sign * pair[2], Math.min(...ends), Math.max(...ends)];
}

/** The headline (or its difference to the window) against what a row cost, with the front of the whole board. */
function priceChart(board, rows, all, kind, width, paired) {
  const spots = new Map(all.map((row) => [row, spot(board, row, all, paired)]));
  const shown = rows.filter((row) => spots.get(row) && row.prices[kind] !== undefined);
  if (shown.length < 1) return null;
  const front = board.fronts[kind], times = factor(board);
  const place = new Map(all.map((row, i) => [row.label, i]));
  const points = shown.map((row) => ({
    label: row.label, x: row.prices[kind], y: times * spots.get(row)[0], low: times * spots.get(row)[1], high: times * spots.get(row)[2],
    said: (paired ? gap : within)(board, ...spots.get(row)), n: row.n, seeds: seedsOf(board, row), at: scaled(row.prices[kind]),
    hollow: row.look[2], over: row.status !== "ok", behind: front.dominated[place.get(row.label)] !== undefined,
  }));
  const steps = front.steps.filter((i) => spots.get(all[i])).map((i) => ({ x: all[i].prices[kind], y: times * spots.get(all[i])[0] }));
  const last = Math.max(...points.map((point) => point.x));
  if (steps.length && last > steps.at(-1).x) steps.push({ x: last, y: steps.at(-1).y });
  const [scale, ticks] = spread(points.map((point) => point.x), 10);
  const x = { field: "x", type: "quantitative", title: board.prices[kind], scale: { ...scale, nice: false, padding: 14 }, axis: { labelExpr: short, tickCount: 6, values: ticks, labelOverlap: "greedy" } };
  const named = paired ? `difference to ${board.window}${board.percent ? " (points)" : ""}` : axisName(board);
  const y = { field: "y", type: "quantitative", title: named, scale: { zero: false } };
  const faded = { condition: { test: "datum.behind", value: 0.35 }, value: 1 };
  const { color, shape } = series(shown, width);
  return {
    layer: full([
      { data: { values: steps }, mark: { type: "line", interpolate: "step-after", stroke: "currentColor", opacity: 0.6 }, encoding: { x, y } },
      { data: { values: points }, mark: { type: "rule", strokeWidth: 1.5 }, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color, opacity: { condition: { test: "datum.behind", value: 0.2 }, value: 0.55 } } },
      { data: { values: points }, mark: { type: "point", size: 110, strokeWidth: 2, filled: true }, encoding: { x, y, color, shape, opacity: faded, tooltip: TIP, fillOpacity: { condition: { test: "datum.hollow", value: 0 }, value: 1 }, stroke: color } },
      { data: { values: points.filter((point) => point.over) }, mark: { type: "point", shape: "M-1,-1L1,1M-1,1L1,-1", size: 180, strokeWidth: 1.6, stroke: "currentColor", tooltip: false }, encoding: { x, y } },
    ]),
  };
}

/** The points of ``distance=d`` or ``position=a-b`` (its middle), in nats per token where the task gives them. */
function curve(board, row, kind) {
  const cut = row.numbers.filter(([, slice]) => new RegExp(`(^|;)${kind}=`).test(slice));
  const metric = kind === "position" && cut.some(([name]) => name === "nll") ? "nll" : board.metric;
  return cut.flatMap(([name, slice, value, low, high, n]) => {
    const found = slice.split(";").at(-1).match(kind === "position" ? /^position=([\d.]+)-([\d.]+)$/ : /^distance=([\d.]+)$/);
    if (name !== metric || !found || value === null) return [];
    const ends = found.slice(1).map(Number);
    return [{ x: ends.reduce((a, b) => a + b) / ends.length, value, low, high, n, slice, metric }];
  });
}

/** Retention, or loss over the stream. */
function curveChart(board, rows, kind, width) {
  const found = rows.map((row) => [row, curve(board, row, kind)]).filter(([, points]) => points.length > 1);
  if (!found.length) return null;
  const own = found[0][1][0].metric === board.metric, times = own ? factor(board) : 1;
  const said = (p) => (own ? within(board, p.value, p.low, p.high) : `${plain(p.value)} [${plain(p.low)}, ${plain(p.high)}]`);
  const points = found.flatMap(([row, places]) => places.map((p) => ({
    label: row.label, x: p.x, y: times * p.value, low: times * (p.low ?? p.value), high: times * (p.high ?? p.value),
    said: said(p), n: p.n, seeds: row.seeds.map((each) => each.seed).join(", "), at: p.slice, hollow: row.look[2],
  })));
  const places = [...new Set(points.map((point) => point.x))].sort((a, b) => a - b);
  const named = kind === "position" ? "tokens read before" : "tokens between evidence and question";
  const x = { field: "x", type: "quantitative", title: named, scale: { ...spread(places, 2)[0], nice: false, padding: 12 }, axis: { values: places.length > 12 ? undefined : places, format: ",~d", labelOverlap: "greedy" } };
  const y = { field: "y", type: "quantitative", title: own ? axisName(board) : "nats per token, lower is better", scale: { zero: false } };
  const { color, shape } = series(found.map(([row]) => row), width);
  const band = found.length > FEW ? [] : [{ mark: { type: "area", opacity: 0.13 }, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color } }];
  const levels = kind === "distance" ? Object.entries(board.levels).map(([name, value]) => ({ name, y: times * value })) : [];
  return {
    data: { values: points },
    layer: full([
      { data: { values: levels }, mark: { type: "rule", strokeDash: [2, 3], stroke: "currentColor", opacity: 0.6 }, encoding: { y } },
      { data: { values: levels }, mark: { type: "text", align: "left", dy: -6, x: 4, fill: "currentColor", opacity: 0.8 }, encoding: { y, text: { field: "name" } } },
      ...band,
      { mark: { type: "line", strokeWidth: 1.8 }, encoding: { x, y, color, strokeDash: { condition: { test: "datum.hollow", value: [5, 3] }, value: [1, 0] } } },
      { mark: { type: "point", size: 70, strokeWidth: 1.8, filled: true }, encoding: { x, y, color, shape, stroke: color, tooltip: TIP, fillOpacity: { condition: { test: "datum.hollow", value: 0 }, value: 1 } } },
    ]),
  };
}

/** Loss over the training, a line a seed. */
function trainingChart(board, rows, width) {
  const found = rows.filter((row) => row.seeds.some((each) => each.curve.length > 1));
  if (!found.length) return null;
  const points = found.flatMap((row) => row.seeds.flatMap((each) => each.curve.map(([x, y]) => ({
    label: row.label, seed: each.seed, x, y, said: plain(y), n: "", seeds: each.seed, at: `${plain(x)} tokens; ended by ${each.ended} after ${plain(each.steps)} steps`,
  }))));
  const { color } = series(found, width);
  return {
    data: { values: points }, mark: { type: "line", strokeWidth: 1.3, opacity: 0.85, tooltip: true },
    encoding: {
      x: { field: "x", type: "quantitative", title: "training tokens read", axis: { labelExpr: short, tickCount: 6 } },
      y: { field: "y", type: "quantitative", title: "training loss, nats per token", scale: { zero: false } },
      color, detail: { field: "seed" }, tooltip: TIP,
    },
  };
}
