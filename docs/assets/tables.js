/* Gives each cell of a table of more than two columns the name of its column, for narrow windows (assets/site.css). */
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".md-typeset table:not([class])")) {
    const columns = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
    if (columns.length < 3) continue;
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.cells].forEach((cell, index) => {
        if (index > 0 && columns[index]) cell.dataset.column = columns[index];
      });
    }
    table.dataset.stacked = "";
  }
});
