// Filters and sorts the results table. Without this script the table is whole and unsorted.
(function () {
  "use strict";

  function start(board) {
    const table = board.querySelector("table");
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    const controls = board.querySelector("[data-controls]");
    const text = board.querySelector("[data-filter-text]");
    const part = board.querySelector("[data-filter-part]");
    const buttons = Array.from(board.querySelectorAll("[data-filter-verdict]"));
    const count = board.querySelector("[data-shown-count]");

    function filter() {
      const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const verdicts = buttons.filter((b) => b.getAttribute("aria-pressed") === "true").map((b) => b.dataset.filterVerdict);
      let shown = 0;
      rows.forEach((row) => {
        const content = row.textContent.toLowerCase();
        const fits =
          words.every((word) => content.includes(word)) &&
          (!part.value || row.dataset.part === part.value) &&
          (!verdicts.length || verdicts.includes(row.dataset.verdict));
        row.hidden = !fits;
        shown += fits ? 1 : 0;
      });
      count.textContent = shown === rows.length ? rows.length + " lines" : shown + " of " + rows.length + " lines";
    }

    function sort(head, column) {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      // An empty key is a key: it marks a line without a value.
      const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
      const numeric = rows.every((row) => key(row) === "" || !isNaN(Number(key(row))));
      const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b));
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        // Lines without a value stay at the end either way.
        if (x === "" || y === "") return (x === "") - (y === "");
        return ascending ? compare(x, y) : compare(y, x);
      });
      rows.forEach((row) => body.appendChild(row));
      Array.from(table.tHead.rows[0].cells).forEach((cell) => cell.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    }

    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.textContent = "";
      head.appendChild(button);
      button.addEventListener("click", () => sort(head, column));
    });
    buttons.forEach((button) => {
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") === "true" ? "false" : "true");
        filter();
      });
    });
    text.addEventListener("input", filter);
    part.addEventListener("change", filter);
    controls.hidden = false;
    filter();
  }

  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("[data-dashboard]").forEach(start));
})();
