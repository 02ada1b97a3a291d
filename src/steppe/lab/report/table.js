
function sortKey(cell) {
  const number = parseFloat(cell.textContent.trim().replace("\u2212", "-"));
  return Number.isNaN(number) ? null : number;
}

function sortTable(table, column, ascending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row, order) => ({row, order, text: row.cells[column].textContent, key: sortKey(row.cells[column])}));
  const numeric = rows.some(({key}) => key !== null) && column > 0;
  rows.sort((a, b) => {
    if (numeric && (a.key === null || b.key === null)) return (a.key === null) - (b.key === null) || a.order - b.order;
    const sign = numeric ? a.key - b.key : a.text.localeCompare(b.text, undefined, {numeric: true});
    return (ascending ? sign : -sign) || a.order - b.order;
  });
  body.append(...rows.map(({row}) => row));
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
}

for (const table of document.querySelectorAll(".sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    sortTable(table, column, head.getAttribute("aria-sort") !== "ascending");
  }));
}
