// Looks at pages of the site in frames of one width: what overflows, what is asked of other servers, what has too
// little contrast (WCAG AA), what a keyboard cannot reach. Writes its findings as JSON into the element #found.
const channels = (c) => { const m = c.match(/[\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
const light = (c) => {
  const [r, g, b] = c.slice(0, 3).map((v) => (v / 255 <= 0.03928 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
function ground(element, view) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    const c = channels(view.getComputedStyle(e).backgroundColor);
    if (c[3] > 0) layers.push(c);
    if (c[3] === 1) break;
  }
  return layers.reverse().reduce((below, c) => over(c, below), [255, 255, 255, 1]);
}
function faint(page, view) {
  const found = {}, walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = view.getComputedStyle(e), box = e.getBoundingClientRect();
    if (!walker.currentNode.data.trim() || !box.width || style.visibility !== "visible") continue;
    if (e.closest("svg, script, style, noscript, .md-skip")) continue;
    let opacity = 1;
    for (let p = e; p; p = p.parentElement) opacity *= +view.getComputedStyle(p).opacity;
    if (opacity < 0.05) continue;
    const below = ground(e, view), ink = channels(style.color);
    ink[3] *= opacity;
    const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
    const mark = e.getAttribute("aria-hidden") === "true"; // a picture, not text
    if (ratio < (large || mark ? 3 : 4.5) - 0.005) found[`${e.tagName}.${e.className} ${style.color}`] = ratio.toFixed(2);
  }
  return found;
}
function wide(page, view) {
  const width = page.documentElement.clientWidth;
  const hidden = (e) => {
    for (let p = e.parentElement; p; p = p.parentElement) {
      if (view.getComputedStyle(p).overflowX !== "visible" || view.getComputedStyle(p).position === "fixed") return true;
    }
    return view.getComputedStyle(e).position === "fixed";
  };
  const beyond = [...page.body.querySelectorAll("*")].filter((e) => e.getBoundingClientRect().right > width + 1);
  return beyond.filter((e) => e.getBoundingClientRect().width > 0 && !hidden(e)).map((e) => `${e.tagName}.${e.className}`);
}
function unreachable(page, view) {
  const acts = [...page.querySelectorAll("[onclick], [role=button], th[data-sort]")];
  const found = acts.filter((e) => e.tabIndex < 0).map((e) => e.outerHTML.slice(0, 80));
  const first = [...page.querySelectorAll("a[href], button, input, [tabindex]")].find((e) => e.tabIndex >= 0);
  const nameless = [...page.querySelectorAll("a[href], button")].filter(
    (e) => !(e.textContent.trim() || e.title || e.getAttribute("aria-label") || e.querySelector("img[alt], svg[aria-label]")),
  );
  const pictures = [...page.querySelectorAll("img:not([alt])")].map((e) => e.outerHTML.slice(0, 80));
  return { found, pictures, nameless: nameless.map((e) => e.outerHTML.slice(0, 80)), first: first ? first.className : "" };
}
async function main() {
  const findings = {};
  for (const name of PAGES) {
    const frame = document.createElement("iframe");
    frame.style.cssText = "width: 390px; height: 900px; border: 0";
    frame.src = name;
    document.body.append(frame);
    await new Promise((done) => frame.addEventListener("load", done));
    const page = frame.contentDocument, view = frame.contentWindow;
    page.head.append(Object.assign(page.createElement("style"), { textContent: "* { transition: none !important }" }));
    const schemes = page.body.dataset.mdColorScheme ? ["default", "slate"] : [""];
    await new Promise((done) => setTimeout(done, 300));
    const asked = view.performance.getEntriesByType("resource").map((entry) => entry.name);
    const outside = asked.filter((address) => !/^(file|data|blob):/.test(address));
    findings[name] = { wide: wide(page, view), outside, faint: {}, ...unreachable(page, view) };
    for (const scheme of schemes) {
      if (scheme) page.body.dataset.mdColorScheme = scheme;
      Object.assign(findings[name].faint, faint(page, view));
    }
    frame.remove();
  }
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = JSON.stringify(findings);
  document.body.append(told);
}
main();
