/* Uses the index page as a reader would, and writes what it saw into the page. */
{
  const told = {}, all = what => [...document.querySelectorAll(what)];
  const rows = () => all("tbody tr").map(row => row.cells[1].querySelector("a,span").textContent);
  const press = name => {
    const button = all("button.sort").find(b => b.textContent.startsWith(name));
    button.focus();
    button.click();
  };
  const turn = (select, value) => { select.value = value; select.dispatchEvent(new Event("change")); };
  const key = name => document.querySelector("#curves svg").dispatchEvent(new KeyboardEvent("keydown", { key: name }));
  const curves = () => all("#curves svg path[stroke-linejoin]").length;
  told.first = rows();
  press("Run");
  told.up = rows();
  told.focus = document.activeElement.textContent;
  press("Run");
  told.down = rows();
  told.sort = document.querySelector("[aria-sort]").getAttribute("aria-sort");
  press("Minus");
  told.gain = rows();
  told.curves = [curves()];
  turn(document.querySelector("#curves select"), "loss");
  all("td.pick input").filter(box => !box.checked && !box.disabled).forEach(box => box.click());
  told.curves.push(curves());
  const labels = all("#curves svg text").filter(t => t.querySelector("tspan")).map(t => t.getBoundingClientRect());
  const meet = (a, b) => a.top < b.bottom - 3 && b.top < a.bottom - 3;
  told.collisions = labels.filter((a, i) => labels.some((b, j) => j < i && meet(a, b))).length;
  key("Home");
  key("End");
  told.said = document.getElementById("said").textContent;
  turn(document.querySelector('select[aria-label="status"]'), "unfinished");
  told.unfinished = rows();
  told.fits = document.documentElement.scrollWidth <= window.innerWidth;
  const out = document.createElement("pre");
  out.id = "told";
  out.textContent = JSON.stringify(told);
  document.body.append(out);
}
