"use strict";

// Tables: a click on a header sorts up, then down, then as it was. Numbers stand before words, missing last.
const words = new Intl.Collator("en", { numeric: true });

function keyOf(row, column) {
  const cell = row.cells[column];
  if ("missing" in cell.dataset) return { rank: 2 };
  if (cell.dataset.key) return { rank: 0, number: Number(cell.dataset.key) };
  return { rank: 1, text: cell.textContent.replace(/(\d),(?=\d{3})/g, "$1") };
}

function compare(a, b, sign) {
  if (a.rank === 2 || b.rank === 2) return a.rank - b.rank;
  if (a.rank !== b.rank) return sign * (a.rank - b.rank);
  return sign * (a.rank ? words.compare(a.text, b.text) : a.number - b.number);
}

function sortBy(header, rows) {
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  const order = next[header.ariaSort];
  for (const other of header.parentElement.cells) other.ariaSort = "none";
  header.ariaSort = order;
  const sorted = [...rows];
  if (order !== "none") {
    const sign = order === "ascending" ? 1 : -1;
    const keys = new Map(rows.map((row) => [row, keyOf(row, header.cellIndex)]));
    sorted.sort((a, b) => compare(keys.get(a), keys.get(b), sign));
  }
  rows[0].parentElement.append(...sorted);
}

for (const table of document.querySelectorAll(".box table")) {
  const rows = [...table.tBodies[0].rows];
  for (const header of table.tHead.rows[0].cells) {
    const button = header.querySelector("button");
    if (!button) continue;
    header.ariaSort = "none";
    button.addEventListener("click", () => sortBy(header, rows));
  }
}

// A table that is larger than its box says so: shadows where it goes on, and how many columns are out of sight.
function mark(box, hint) {
  const edge = box.getBoundingClientRect().right;
  const heads = [...box.querySelectorAll("th")];
  const hidden = heads.filter((head) => head.getBoundingClientRect().right > edge + 2).length;
  const wide = box.scrollWidth > box.clientWidth + 1;
  hint.hidden = !wide;
  hint.textContent = hidden ? `scroll → ${hidden} more ${hidden === 1 ? "column" : "columns"}` : "← scroll back";
  box.parentElement.toggleAttribute("data-right", wide && hidden > 0);
  const below = box.scrollHeight - box.clientHeight - box.scrollTop > 2;
  box.parentElement.toggleAttribute("data-below", below);
  box.parentElement.style.setProperty("--top", `${box.offsetTop}px`);
}

for (const box of document.querySelectorAll(".box")) {
  const hint = document.createElement("p");
  hint.className = "scroll";
  box.before(hint);
  box.addEventListener("scroll", () => mark(box, hint), { passive: true });
  new ResizeObserver(() => mark(box, hint)).observe(box);
}

// A link to what is folded unfolds it.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  const details = target && target.closest("details");
  if (details) details.open = true;
}
addEventListener("hashchange", unfold);
unfold();

// Figures: the dialog is modal, so Esc closes it and the focus goes back to the figure.
const dialog = document.querySelector("dialog");
const enlarged = dialog.querySelector("img");

for (const button of document.querySelectorAll(".zoom")) {
  button.addEventListener("click", () => {
    const image = button.querySelector("img");
    enlarged.src = image.src;
    enlarged.alt = image.alt;
    dialog.querySelector("p").textContent = button.nextElementSibling.textContent;
    dialog.showModal();
  });
}
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});

// The contents follow the reader.
const contents = document.querySelector("nav");
const links = new Map();
for (const link of contents.querySelectorAll("a")) {
  links.set(document.querySelector(link.hash), link);
}
const inView = new Set();
const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) inView.add(target);
      else inView.delete(target);
    }
    for (const [target, link] of links) link.toggleAttribute("data-here", inView.has(target));
    const here = contents.querySelector("[data-here]");
    if (here) contents.scrollTo({ left: here.offsetLeft - contents.clientWidth / 4 });
  },
  { rootMargin: "-10% 0px -75% 0px" },
);
for (const target of links.keys()) observer.observe(target);

// Paper has no scrolling and nothing to unfold.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
