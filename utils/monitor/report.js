"use strict";
const find = (id) => document.getElementById(id);
const controls = { words: find("words"), dataset: find("dataset"), bucket: find("bucket"), reason: find("reason") };
const items = [...document.querySelectorAll("[data-item]")].map((element) => ({
  element,
  dataset: element.dataset.dataset,
  bucket: element.dataset.bucket || "",
  reasons: element.dataset.reasons ? element.dataset.reasons.split(" ") : [],
  text: element.textContent.toLowerCase(),
}));

function fits(item, wanted) {
  return (
    wanted.words.every((word) => item.text.includes(word)) &&
    (!wanted.dataset || item.dataset === wanted.dataset) &&
    (!wanted.bucket || item.bucket === wanted.bucket) &&
    (!wanted.reason || (wanted.reason === "any" ? item.bucket && item.reasons.length > 0 : item.reasons.includes(wanted.reason)))
  );
}

function refresh() {
  const wanted = {
    words: controls.words.value.toLowerCase().split(/\s+/).filter(Boolean),
    dataset: controls.dataset.value,
    bucket: controls.bucket.value,
    reason: controls.reason.value,
  };
  const shown = { card: 0, row: 0 };
  for (const item of items) {
    const visible = fits(item, wanted);
    item.element.hidden = !visible;
    if (visible) shown[item.element.dataset.item] += 1;
  }
  const total = items.filter((item) => item.element.dataset.item === "card").length;
  find("count").textContent = `${shown.card} of ${total} clips, ${shown.row} left out`;
  find("none").hidden = shown.card > 0;
  const leftOut = find("left-out");
  if (leftOut) leftOut.hidden = shown.row === 0;
  for (const chip of document.querySelectorAll("[data-control]")) {
    chip.setAttribute("aria-pressed", String(controls[chip.dataset.control].value === chip.value));
  }
  find("reset").hidden = !Object.values(controls).some((control) => control.value);
}

for (const control of Object.values(controls)) control.addEventListener("input", refresh);
for (const chip of document.querySelectorAll("[data-control]")) {
  chip.addEventListener("click", () => {
    const control = controls[chip.dataset.control];
    control.value = control.value === chip.value ? "" : chip.value;
    refresh();
    find("sheet").scrollIntoView({ block: "start" });
  });
}
find("reset").addEventListener("click", () => {
  for (const control of Object.values(controls)) control.value = "";
  refresh();
});
document.addEventListener("click", (event) => {
  if (event.target.classList.contains("caption")) event.target.classList.toggle("open");
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== controls.words) {
    event.preventDefault();
    controls.words.focus();
  }
});
refresh();
