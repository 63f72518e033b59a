"use strict";

// A click on a header sorts up, then down, then as it was: numbers by size before words, what is missing last.
const words = new Intl.Collator("en", { numeric: true });
const next = { none: "ascending", ascending: "descending", descending: "none" };

function keyOf(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = Number.parseFloat(text.replace(/^[+×\s]*/, "").replace(/(\d),(?=\d{3})/g, "$1"));
  return { missing: text.startsWith("–"), number, text };
}

function compare(a, b, sign) {
  if (a.missing || b.missing) return a.missing - b.missing;
  if (Number.isNaN(a.number) !== Number.isNaN(b.number)) return sign * (Number.isNaN(a.number) - Number.isNaN(b.number));
  return sign * (a.number - b.number || words.compare(a.text, b.text));
}

for (const table of document.querySelectorAll(".box table")) {
  const rows = [...table.tBodies[0].rows];
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.append(...header.childNodes);
    header.append(button);
    header.ariaSort = "none";
    button.addEventListener("click", () => {
      const order = next[header.ariaSort];
      for (const other of header.parentElement.cells) other.ariaSort = "none";
      header.ariaSort = order;
      const sign = order === "ascending" ? 1 : -1;
      const keys = new Map(rows.map((row) => [row, keyOf(row, header.cellIndex)]));
      const sorted = order === "none" ? rows : [...rows].sort((a, b) => compare(keys.get(a), keys.get(b), sign));
      rows[0].parentElement.append(...sorted);
    });
  }
}

// Paper has nothing to unfold.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
