// The page's own script. It reads the data in the page, unpacks the libraries, and makes the table and the charts live.
// Every text reaches the page as a text node: labels, titles and names of books are never markup.

const get = (id) => document.getElementById(id);
const data = JSON.parse(get("data").textContent);
const byId = new Map(data.rows.map((row) => [row.id, row]));

/** An element with attributes (functions listen to the event of that name) and children; null is left out. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** What was packed into the page under an id. */
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(get(id).textContent), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

/** Starts a library of the page; the page's policy names its hash. */
async function start(name) {
  const source = await unpacked(`library-${name}`);
  const script = make("script", { type: "module" });
  const done = new Promise((resolve, reject) => {
    addEventListener(`ready-${name}`, resolve, { once: true });
    script.addEventListener("error", () => reject(new Error(`the library of ${name} does not start`)));
  });
  script.textContent = source;
  document.head.append(script);
  return done;
}
