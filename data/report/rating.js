"use strict";
// One item after the other; marks are kept in this browser and saved as JSON lines.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
let rater = "", order = [], place = 0, marks = {};

function randomFrom(text) { // the same order for the same rater
  let h = 1779033703 ^ text.length;
  for (const c of text) { h = Math.imul(h ^ c.codePointAt(0), 3432918353); h = (h << 13) | (h >>> 19); }
  return () => {
    h = Math.imul(h ^ (h >>> 16), 2246822507); h = Math.imul(h ^ (h >>> 13), 3266489909); h ^= h >>> 16;
    return (h >>> 0) / 4294967296;
  };
}
function shuffled(n, random) {
  const found = [...Array(n).keys()];
  for (let i = n - 1; i > 0; i--) { const j = Math.floor(random() * (i + 1)); [found[i], found[j]] = [found[j], found[i]]; }
  return found;
}
const store = () => "rating/" + data.study + "/" + rater;
function keep() { try { localStorage.setItem(store(), JSON.stringify({ marks, place })); } catch (e) { /* private window */ } }
function kept() { try { return JSON.parse(localStorage.getItem(store())) || {}; } catch (e) { return {}; } }
const complete = (item) => data.criteria.every((c) => (marks[item.code] || {})[c.name] !== undefined);

function show() {
  const item = data.items[order[place]];
  const done = data.items.filter(complete).length;
  at("bar").textContent = `Rationale ${place + 1} of ${order.length}, ${done} marked`;
  at("question").textContent = item.question;
  at("choices").textContent = item.choices.length ? "Choices: " + item.choices.join("; ") : "";
  at("rationale").textContent = item.rationale || "(no rationale)";
  at("answer").textContent = item.answer === null ? "No answer could be read." : "Answer: " + item.answer;
  at("marks").replaceChildren(...data.criteria.map((c) => fieldset(c, item.code)));
  at("back").disabled = place === 0;
  at("next").textContent = place + 1 < order.length ? "Next" : "Done";
  at("note").textContent = "";
}
function fieldset(criterion, code) {
  const box = document.createElement("fieldset"), legend = document.createElement("legend");
  legend.textContent = criterion.question;
  box.append(legend);
  criterion.marks.forEach(([value, words]) => {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: criterion.name, value: String(value) });
    input.checked = (marks[code] || {})[criterion.name] === value;
    input.addEventListener("change", () => {
      marks[code] = { ...marks[code], [criterion.name]: value };
      keep();
    });
    label.append(input, words);
    box.append(label);
  });
  return box;
}
function lines() {
  const rows = data.items.filter((item) => marks[item.code]);
  return rows.map((item) => JSON.stringify({ study: data.study, code: item.code, rater, marks: marks[item.code] }) + "\n").join("");
}
function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/jsonl" }));
  link.download = "ratings-" + rater.replace(/[^\p{L}\p{N}]+/gu, "-") + ".jsonl";
  document.body.append(link);
  link.click();
  link.remove();
  const done = data.items.filter(complete).length;
  at("note").textContent = `Saved: ${done} of ${data.items.length} are marked. Send the file to whoever asked you.`;
}
function next() {
  if (!complete(data.items[order[place]])) { at("note").textContent = "Please mark every line first."; return; }
  if (place + 1 < order.length) { place++; keep(); show(); window.scrollTo(0, 0); } else save();
}
at("rater").addEventListener("input", () => { at("start").disabled = !at("rater").value.trim(); });
at("start").addEventListener("click", () => {
  rater = at("rater").value.trim();
  order = shuffled(data.items.length, randomFrom(data.study + rater));
  const before = kept();
  marks = before.marks || {};
  place = Math.min(before.place || 0, order.length - 1);
  at("begin").hidden = true;
  at("item").hidden = false;
  show();
});
at("marks").addEventListener("submit", (e) => e.preventDefault());
at("back").addEventListener("click", () => { place--; keep(); show(); });
at("next").addEventListener("click", next);
at("save").addEventListener("click", save);
document.documentElement.dataset.ready = "yes";
