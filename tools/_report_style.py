"""How an HTML report looks, and the one script in it. In: nothing. Out: CSS and JavaScript as text."""

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f8; --ink: #1d2024; --soft: #5b636d; --faint:
  #9aa1a9;
  --grid: #e3e6e9; --line: #dde1e5; --link: #1f5fa8; --good: #1d7a46; --warn: #a65a00; --bad: #b3261e;
  --c0: #1f5fa8; --c1: #d1622b; --c2: #2f8f5b; --c3: #8a4fa3; --c4: #b8912a; --c5: #2a8f99; --c6: #c0508a; --c7:
  #7a7f85; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1d2125; --ink: #e4e7ea; --soft: #a3abb4;
  --faint: #6d757d; --grid: #2b3036; --line: #31373d; --link: #7db4f0; --good: #63c990; --warn: #e6a350; --bad:
  #f28b82;
  --c0: #62a5ee; --c1: #f0905c; --c2: #5cc48c; --c3: #bd8ad6; --c4: #d9b650; --c5: #56c1cb; --c6: #e884b7; --c7:
  #989fa6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .6rem; overflow-wrap: anywhere; }
p, ul { max-width: 78ch; } p { margin: .6rem 0; overflow-wrap: anywhere; } ul { padding-left: 1.2rem; }
li { margin: .3rem 0; overflow-wrap: anywhere; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--card); padding: .08em
  .3em;
  border-radius: 4px; overflow-wrap: anywhere; }
nav { font-size: .92rem; background: var(--card); border-radius: 8px; padding: .7rem 1rem; margin: 1.2rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; margin: 0; padding: 0; max-width:
  none; }
nav li { margin: 0; } nav ul ul { width: 100%; padding-left: 1rem; }
nav li.deep { width: 100%; }
.note { border-left: 4px solid var(--faint); background: var(--card); border-radius: 0 8px 8px 0; padding: .6rem
  .9rem;
  max-width: none; }
.good { border-color: var(--good); } .warn { border-color: var(--warn); } .bad { border-color: var(--bad); }
.scroll { overflow-x: auto; margin: .8rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .8rem .38rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align:
  top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
td.long, table.facts td { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; max-width: 44rem; }
td.right, th.right { text-align: right; white-space: nowrap; }
th.right, td.right { padding-left: .6rem; }
table.facts td:first-child { color: var(--soft); min-width: 8rem; max-width: 15rem; overflow-wrap: normal; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--link); outline-offset:
  2px; }
th button::after { content: "\\2195"; opacity: .35; padding-left: .25em; font-size: .85em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; list-style: none; padding: 0; max-width: none; margin: 1rem 0; }
.tiles li { background: var(--card); border-radius: 8px; padding: .55rem .95rem; margin: 0; flex: 1 1 8.2rem; }
.tiles b { display: block; font-size: 1.25rem; white-space: nowrap; }
.tiles span { color: var(--soft); font-size: .86rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1rem 1.6rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; max-width: 640px; }
.bar { display: flex; height: 1.9rem; border-radius: 6px; overflow: hidden; margin: .9rem 0 .5rem; background:
  var(--card); }
.bar span { min-width: 1px; } .key { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; font-size: .88rem; padding:
  0;
  list-style: none; max-width: none; } .key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; } .key li { margin: 0; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 520px) { body { font-size: 15px; } main { padding: .8rem .9rem 3rem; } h1 { font-size: 1.4rem; }
  th, td { padding-right: .55rem; } table { font-size: .88rem; } table.facts td:first-child { min-width: 6.4rem; } }
@media print { nav { display: none; } .scroll { overflow: visible; } figure { break-inside: avoid; } }
"""
# A click on a column's head sorts by it: numbers with their units by size, everything else by letter.
SCRIPT = """
const sizes = {ms: 1e-3, s: 1, min: 60, h: 3600, d: 86400, KiB: 1024, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40,
  "rank-hours": 3600};
const value = text => {
  const parts = [...text.replace(/,/g, "").matchAll(/(-?\\d+(?:\\.\\d+)?)\\s*([A-Za-z][A-Za-z-]*)?/g)];
  if (!/^-?\\d/.test(text) || /^\\d{4}-\\d\\d-/.test(text) || !parts.length) return text === "-" ? -Infinity : text;
  const timed = parts.length > 1 && parts[0][2] in sizes && parts[1][2] in sizes;
  return parts.slice(0, timed ? 2 : 1).reduce((sum, part) => sum + part[1] * (sizes[part[2]] || 1), 0);
};
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].map(row => [value(row.cells[column].textContent.trim()), row]);
  rows.sort(([a], [b]) => (typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1) * (up ? 1 :
  -1));
  body.append(...rows.map(([, row]) => row));
});
"""
