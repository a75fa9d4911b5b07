/* A table that is wider than its place is made denser; if it still is, or has three columns or more in a narrow window,
   it is shown row by row. */
const tables = () => document.querySelectorAll(".md-typeset table:not([class])");

function nameCells(table) {
  const columns = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
  for (const row of table.querySelectorAll("tbody tr")) {
    [...row.cells].forEach((cell, index) => {
      if (index > 0 && columns[index]) cell.dataset.column = columns[index];
    });
  }
}

function fit(table) {
  delete table.dataset.dense;
  delete table.dataset.stacked;
  const place = table.closest(".md-typeset__scrollwrap") ?? table.parentElement;
  const isTooWide = () => place.scrollWidth > place.clientWidth;
  const isNarrow = window.matchMedia("(max-width: 44.984375em)").matches;
  const isWide = table.querySelectorAll("thead th").length > 2;
  if (isTooWide()) table.dataset.dense = "";
  if (isTooWide() || (isNarrow && isWide)) table.dataset.stacked = "";
}

window.addEventListener("load", () => {
  tables().forEach(nameCells);
  tables().forEach(fit);
});
window.addEventListener("resize", () => tables().forEach(fit));
