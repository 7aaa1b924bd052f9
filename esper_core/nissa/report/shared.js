/* What the pages have in common: elements, figures, scales, tooltips. `D` holds the data of the page. */
const page = document.getElementById("page"), tip = document.getElementById("tip"), said = document.getElementById("said");

/* ---- elements: text is only ever set as text ---- */
function build(node, attrs, kids) {
  for (const [k, v] of Object.entries(attrs || {})) {
    if (k === "on") for (const [name, f] of Object.entries(v)) node.addEventListener(name, f);
    else if (k === "style") for (const [name, x] of Object.entries(v)) node.style.setProperty(name, x);
    else if (v !== null && v !== undefined && v !== false) node.setAttribute(k, v);
  }
  node.append(...kids.flat(2).filter(k => k !== null && k !== undefined && k !== false));
  return node;
}
const h = (tag, attrs, ...kids) => build(document.createElement(tag), attrs, kids);
const s = (tag, attrs, ...kids) => build(document.createElementNS("http://www.w3.org/2000/svg", tag), attrs, kids);

/* ---- figures ---- */
const known = v => typeof v === "number" && Number.isFinite(v);
function quantity(v, unit = "", digits = 3) {
  if (!known(v)) return "unknown";
  const [f, p] = [[1e15, "P"], [1e12, "T"], [1e9, unit ? "G" : "B"], [1e6, "M"], [1e3, "k"], [1, ""]].find(([f]) => Math.abs(v) >= f) || [1, ""];
  return String(+(v / f).toPrecision(digits)) + (unit ? " " : "") + p + unit;
}
/* texts of different values, with as few digits as keep them apart */
function apart(values, show) {
  let texts = [];
  for (let digits = 3; digits < 8; digits++) { texts = values.map(v => show(v, digits)); if (new Set(texts).size === values.length) break; }
  return texts;
}
const percent = (v, digits = 1) => known(v) ? (100 * v).toFixed(digits) + "%" : "unknown";
const nats = v => !known(v) ? "unknown" : v === 0 ? "0" : Math.abs(v) >= 0.1 ? v.toFixed(3) : String(+v.toPrecision(2));
/* names cut to `room` characters each, at the end that keeps most of them apart */
function shorten(names, room) {
  const parts = names.map(n => n.split(".")), least = Math.min(...parts.map(p => p.length));
  let skip = 0; while (names.length > 1 && skip < least - 1 && parts.every(p => p[skip] === parts[0][skip])) skip++;
  const bare = names.some(n => n.length > room) ? parts.map(p => p.slice(skip).join(".")) : names, half = Math.floor((room - 1) / 2);
  const cuts = [n => "…" + n.slice(1 - room), n => n.slice(0, room - 1) + "…", n => n.slice(0, half) + "…" + n.slice(half + 1 - room)];
  const tried = cuts.map(cut => bare.map(n => n.length > room ? cut(n) : n));
  return tried.reduce((a, b) => new Set(b).size > new Set(a).size ? b : a);
}
const cut = (text, room) => text.length > room ? text.slice(0, Math.max(1, room - 1)) + "…" : text;
const command = text => h("code", { class: "command" }, text.split(" ").flatMap(word => [h("span", {}, word), " "])); /* breaks between words alone */
const breakable = text => text.split(/(?<=[./_])/).flatMap(part => [part, document.createElement("wbr")]);
const clock = v => { const m = Math.floor(Math.round(v) / 60), r = n => String(n).padStart(2, "0"); return m >= 60 ? `${Math.floor(m / 60)}:${r(m % 60)}:${r(Math.round(v) % 60)}` : `${m}:${r(Math.round(v) % 60)}`; };
const signed = (v, f = nats) => known(v) ? (v < 0 ? "−" : "+") + f(Math.abs(v)) : "unknown";
const plural = (n, one, many) => n + "\u00a0" + (n === 1 ? one : many || one + "s");
const last = list => { for (let i = (list || []).length - 1; i >= 0; i--) if (known(list[i])) return list[i]; return null; };

/* ---- scales ---- */
function scale(d0, d1, r0, r1) {
  const f = v => r0 + (d1 === d0 ? 0.5 : (v - d0) / (d1 - d0)) * (r1 - r0);
  f.invert = p => d0 + (r1 === r0 ? 0 : (p - r0) / (r1 - r0)) * (d1 - d0);
  return f;
}
function ticks(lo, hi, count) {
  if (!(hi > lo)) return [lo];
  const raw = (hi - lo) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(v => v >= raw) || raw, out = [];
  for (let v = Math.ceil(lo / step - 1e-9) * step; v <= hi + step * 1e-9 && out.length < 50; v += step) out.push(+v.toPrecision(12));
  return out;
}
function extent(lists, pad = 0.06, floor = null) {
  let lo = Infinity, hi = -Infinity;
  for (const list of lists) for (const v of list) if (known(v)) { if (v < lo) lo = v; if (v > hi) hi = v; }
  if (lo > hi) return null;
  const room = (hi - lo) * pad || Math.abs(hi) * 0.05 || 0.01;
  return [floor !== null ? Math.min(floor, lo) : lo - room, hi + room];
}
function line(xs, ys, x, y) {
  let path = "", pen = false;
  xs.forEach((v, i) => { if (known(v) && known(ys[i])) { path += (pen ? "L" : "M") + x(v).toFixed(1) + " " + y(ys[i]).toFixed(1); pen = true; } else pen = false; });
  return path;
}
function nearest(sorted, v) {
  let lo = 0, hi = sorted.length - 1;
  while (lo < hi) { const mid = (lo + hi) >> 1; if (sorted[mid] < v) lo = mid + 1; else hi = mid; }
  return lo > 0 && v - sorted[lo - 1] < sorted[lo] - v ? lo - 1 : lo;
}
const atOrBefore = (steps, step) => { let i = nearest(steps, step); return steps[i] > step ? i - 1 : i; };

/* ---- tooltips: pointer, touch and keyboard drive the same thing ---- */
function showTip(content, clientX, clientY) {
  const [title, pairs, notes] = content;
  tip.replaceChildren(h("strong", {}, title), h("dl", {}, pairs.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])), ...(notes || []).slice(0, 5).map(n => h("p", {}, n)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), wide = document.documentElement.clientWidth, tall = window.innerHeight;
  const x = clientX + 16 + box.width > wide - 8 ? Math.max(8, clientX - box.width - 16) : clientX + 16;
  const y = Math.min(Math.max(8, clientY - box.height / 2), Math.max(8, tall - box.height - 8));
  tip.style.left = x + window.scrollX + "px"; tip.style.top = y + window.scrollY + "px";
}
const speak = ([title, pairs, notes]) => { said.textContent = [title, ...pairs.map(p => p.join(" ")), ...(notes || []).slice(0, 3)].join(", "); };
/* model: start; find(x, y) -> cursor; move(cursor, key) -> cursor; place(cursor) -> [x, y]; mark(cursor|null); tell(cursor) */
function interactive(svg, label, model) {
  let at = null;
  build(svg, { tabindex: 0, role: "img", "aria-roledescription": "interactive chart", "aria-label": label + " Arrow keys move through it." }, []);
  const ratio = () => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width || 1;
  const hide = () => { tip.hidden = true; model.mark(null); };
  const show = (cursor, event) => {
    if (cursor === null || cursor === undefined) return hide();
    at = cursor; model.mark(at);
    const content = model.tell(at), box = svg.getBoundingClientRect(), r = ratio(), [px, py] = model.place(at);
    if (event) showTip(content, event.clientX, event.clientY); else { showTip(content, box.left + px * r, box.top + py * r); speak(content); }
  };
  svg.addEventListener("pointermove", e => { const b = svg.getBoundingClientRect(), r = ratio(); show(model.find((e.clientX - b.left) / r, (e.clientY - b.top) / r), e); });
  svg.addEventListener("pointerdown", e => { const b = svg.getBoundingClientRect(), r = ratio(); show(model.find((e.clientX - b.left) / r, (e.clientY - b.top) / r), e); });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(at ?? model.start); });
  svg.addEventListener("keydown", e => {
    if (e.key === "Escape") return hide();
    if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(e.key)) return;
    e.preventDefault(); show(at === null ? model.start : model.move(at, e.key));
  });
  return svg;
}
const walk = (i, key, n) => key === "Home" ? 0 : key === "End" ? n - 1 : Math.min(n - 1, Math.max(0, i + (key === "ArrowRight" || key === "ArrowDown" ? 1 : -1)));
