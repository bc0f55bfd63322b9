"use strict";
document.documentElement.classList.add("js");

for (const group of document.querySelectorAll(".tabs")) {
  const tabs = [...group.querySelectorAll("[role=tab]")];
  const select = (chosen) => {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
    }
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const targets = {
        ArrowRight: (index + 1) % tabs.length,
        ArrowLeft: (index - 1 + tabs.length) % tabs.length,
        Home: 0,
        End: tabs.length - 1,
      };
      if (!(event.key in targets)) return;
      event.preventDefault();
      select(tabs[targets[event.key]]);
      tabs[targets[event.key]].focus();
    });
  });
  select(tabs[0]);
}

// A column sorts by its numbers if it has any, else by its text; what is missing stays last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      const rows = [...body.rows];
      const number = (row) => {
        const value = row.cells[column].dataset.value;
        return value === undefined ? NaN : Number(value);
      };
      const numeric = rows.some((row) => !Number.isNaN(number(row)));
      rows.sort((a, b) => {
        const sign = descending ? -1 : 1;
        if (!numeric) return sign * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
        const [x, y] = [number(a), number(b)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return sign * (x - y);
      });
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      body.append(...rows);
    });
  });
}

// Paper shows all that a screen folds away.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
