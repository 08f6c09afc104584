// The table of all rows: sorted, filtered, its columns chosen, copied; and which rows the charts draw.

const picked = new Set();
const filters = {};
const FORMULA = /^[=+\-@\t\r]/;
const AXES = [...new Set(data.rows.flatMap((row) => Object.keys(row.axes)))];

/** Whether a row passes every filter but the search field. */
function passes(row) {
  const board = data.boards[row.board];
  if (filters.controls && row.role === "control") return false;
  if (filters.task && board.task !== filters.task) return false;
  if (filters.budget && row.shown.budget !== filters.budget) return false;
  if (filters.backbone && row.shown.backbone !== filters.backbone) return false;
  if (filters.status && row.status !== filters.status) return false;
  if (filters.seeds && row.seeds.length < Number(filters.seeds)) return false;
  if (filters.state && !(row.prices.state_bytes <= 1000 * Number(filters.state))) return false;
  if (filters.memory) {
    const [axis, value] = JSON.parse(filters.memory);
    if (row.axes[axis] !== value) return false;
  }
  return true;
}

function chooser(title, name, values, changed, said = (value) => value) {
  if (values.length < 2) return null;
  const select = make("select", { name, change: (event) => { filters[name] = event.target.value; changed(); } }, make("option", { value: "" }, "all"), ...values.map((value) => make("option", { value }, said(value))));
  return make("label", {}, title, " ", select);
}

function families(changed) {
  const groups = AXES.map((axis) => [axis, [...new Set(data.rows.flatMap((row) => row.axes[axis] ?? []))].sort()]).filter(([, values]) => values.length > 1);
  if (!groups.length) return null;
  const options = groups.map(([axis, values]) => make("optgroup", { label: axis.replaceAll("_", " ") }, ...values.map((value) => make("option", { value: JSON.stringify([axis, value]) }, `${axis.replaceAll("_", " ")}: ${value}`))));
  return make("label", {}, "Memory ", make("select", { name: "memory", change: (event) => { filters.memory = event.target.value; changed(); } }, make("option", { value: "" }, "all"), ...options));
}

function tools(changed) {
  const distinct = (pick) => [...new Set(data.rows.map(pick))].sort();
  const most = Math.max(...data.rows.map((row) => row.seeds.length));
  return make("form", { class: "filters", "aria-label": "Filters", submit: (event) => event.preventDefault(), reset: () => { for (const name of Object.keys(filters)) delete filters[name]; setTimeout(changed); } },
    chooser("Task", "task", [...new Set(data.boards.map((board) => board.task))], changed),
    chooser("Budget", "budget", distinct((row) => row.shown.budget), changed),
    chooser("Backbone", "backbone", distinct((row) => row.shown.backbone), changed),
    families(changed),
    chooser("Seeds", "seeds", Array.from({ length: most - 1 }, (_, i) => String(i + 2)), changed, (value) => `${value} or more`),
    chooser("Status", "status", distinct((row) => row.status), changed, (value) => value.replace("_", " ")),
    make("label", {}, "State at most ", make("input", { name: "state", type: "number", min: "0", step: "any", size: "6", placeholder: "kB", input: (event) => { filters.state = event.target.value; changed(); } }), " kB"),
    make("label", {}, make("input", { name: "controls", type: "checkbox", change: (event) => { filters.controls = event.target.checked; changed(); } }), " hide controls"),
    make("button", { type: "reset" }, "Clear"),
  );
}

/** Checkboxes and hover texts of the rows. */
function equip(line, changed) {
  const row = byId.get(line.id), board = data.boards[row.board], cells = [...line.cells];
  row.shown = { backbone: cells[2].textContent, budget: cells[3].textContent };
  const box = make("input", { type: "checkbox", "aria-label": `draw ${row.label}`, title: "draw in the charts", change: (event) => { event.target.checked ? picked.add(row.id) : picked.delete(row.id); changed(); } });
  cells[0].prepend(box, " ");
  const button = line.querySelector("button[data-row]");
  button.title = `${row.value === null ? row.status : within(board, row.value, row.low, row.high)}\nn = ${row.n}\nseeds ${seedsOf(board, row)}`;
}

/** The text of a cell for the clipboard or a file: no spreadsheet computes a name. */
function exported(inner, line, column, cell) {
  const text = (cell.querySelector("span") ?? cell).textContent.trim();
  return cell.classList.contains("text") && FORMULA.test(text) ? `'${text}` : text;
}

function makeTable(changed) {
  const heads = [...document.querySelectorAll("#results th")];
  const columns = (keep) => heads.flatMap((head, i) => (keep(head) ? [i] : []));
  const order = DataTable.ext.type.order;  // what has no number stands last, whichever way it is sorted
  const last = (sign) => (a, b) => (a === "" || b === "" ? (a === "") - (b === "") : sign * (Number(a) - Number(b)));
  order["number-asc"] = last(1);
  order["number-desc"] = last(-1);
  const options = { columns: ":visible", format: { body: exported } };
  const table = new DataTable("#results", {
    paging: false, order: [], autoWidth: false, orderMulti: true,
    columnDefs: [{ targets: columns((head) => head.dataset.shown === "0"), visible: false }, { targets: columns((head) => !head.classList.contains("text")), type: "number" }],
    layout: { topStart: { buttons: [{ extend: "colvis", text: "Columns" }, { extend: "copyHtml5", text: "Copy", title: null, exportOptions: options }, { extend: "csvHtml5", text: "CSV", filename: "leaderboard", exportOptions: options }] }, topEnd: "search", bottomStart: "info", bottomEnd: null },
    language: { search: "Search", info: "_TOTAL_ rows", infoEmpty: "no rows", infoFiltered: "of _MAX_", zeroRecords: "No row passes the filters." },
  });
  table.search.fixed("filters", (text, values, index) => passes(byId.get(table.row(index).node().id)));
  table.on("draw", changed);
  return table;
}
