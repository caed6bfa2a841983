"use strict";
// The page of a graph diff. Rows are built when their block is first opened, so that a graph of
// thousands of nodes costs only what is looked at.
const DATA = JSON.parse(document.getElementById("data").textContent);
const KINDS = ["added", "removed", "rewired", "changed", "same"];
const NAMED_KINDS = ["added", "removed", "rewired", "reshaped", "changed"];
const FOLD_FROM = 5;
const MOST_OPEN_ROWS = 1500;
const state = { shown: new Set(KINDS), query: "", zoom: 1 };
const byId = (id) => document.getElementById(id);

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const isChanged = (counts) => KINDS.some((kind) => kind !== "same" && counts[kind]);
const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
const kindName = (kind) => (kind === "same" ? "unchanged" : kind);

// -- searching -------------------------------------------------------------------------------

function rowText(row) {
  return [...(row.before || []), ...(row.after || []), ...(row.details || []).flat()].join(" ");
}

function indexText() {
  for (const group of DATA.groups) {
    for (const module of group.modules) {
      const inside = module.path ? "." + module.path : "";
      module.text = [group.name, ...group.members].map((name) => name + inside).join(" ").toLowerCase();
      for (const row of module.rows) row.text = rowText(row).toLowerCase();
    }
  }
}

function wanted(module, row) {
  const kinds = row.kinds.length ? row.kinds : ["same"];
  if (!kinds.some((kind) => state.shown.has(kind))) return false;
  return !state.query || module.text.includes(state.query) || row.text.includes(state.query);
}

function marked(text) {
  const at = state.query ? text.toLowerCase().indexOf(state.query) : -1;
  if (at < 0) return text;
  const end = at + state.query.length;
  return element("span", {}, text.slice(0, at), element("mark", {}, text.slice(at, end)), text.slice(end));
}

// -- rows ------------------------------------------------------------------------------------

function cell(view) {
  if (!view) return element("div", { class: "cell none" });
  const [label, op, args, value, source, madeBy] = view;
  const number = label.split("#")[1];
  const tip = [op, source, madeBy ? "made by " + madeBy : ""].filter(Boolean).join("\n");
  return element(
    "div", { class: "cell code", "data-tip": tip, tabindex: "0" },
    element("b", {}, marked(op + (number ? " #" + number : ""))),
    "(", marked(args), ") ", element("span", { class: "value" }, marked(value)),
    madeBy ? " " : null, madeBy ? element("span", { class: "made-by" }, marked("made by " + madeBy)) : null,
  );
}

function detailLine([kind, name, before, after]) {
  return element(
    "div", { class: "detail code " + kind },
    element("span", { class: "tag" }, kind), " ", name, ": ",
    element("del", {}, before), " → ", element("ins", {}, after),
  );
}

function rowElement(row) {
  const kind = row.kinds[0] || "same";
  const before = row.kinds.length ? row.before : row.after;
  return element(
    "div", { class: "row " + kind }, cell(before), cell(row.after), ...(row.details || []).map(detailLine),
  );
}

function folded(rows) {
  const button = element("button", { type: "button", class: "fold" }, `${rows.length} unchanged nodes`);
  button.addEventListener("click", () => button.replaceWith(...rows.map(rowElement)));
  return button;
}

function rowElements(rows, foldable) {
  const made = [];
  for (let start = 0, end; start < rows.length; start = end) {
    for (end = start; end < rows.length && !rows[end].kinds.length; end++);
    const run = rows.slice(start, end);
    if (foldable && run.length >= FOLD_FROM) {
      made.push(rowElement(run[0]), folded(run.slice(1, -1)), rowElement(run[run.length - 1]));
    } else made.push(...run.map(rowElement));
    if (end < rows.length) made.push(rowElement(rows[end++]));
  }
  return made;
}

// -- blocks that open and close --------------------------------------------------------------

function chips(counts) {
  const found = [...new Set([...KINDS, ...NAMED_KINDS])].filter((kind) => counts[kind]);
  return element(
    "span", { class: "chips" },
    ...found.map((kind) => element("span", { class: "chip " + kind }, `${counts[kind]} ${kindName(kind)}`)),
  );
}

function block(cls, title, counts, build) {
  const head = element(
    "button", { type: "button", class: "head code", "aria-expanded": "false" }, title, chips(counts),
  );
  const body = element("div", { class: "body", hidden: "" });
  const made = element("div", { class: cls }, head, body);
  made.open = (open) => {
    if (open && !body.firstChild) body.append(...build());
    body.hidden = !open;
    head.setAttribute("aria-expanded", String(open));
  };
  head.addEventListener("click", () => made.open(body.hidden));
  return made;
}

function moduleElement(module, rows, alone) {
  const name = element("span", { class: "name" }, marked(module.path || "(own nodes)"));
  const foldable = !state.query && isChanged(module.counts);
  const made = block("module", name, module.counts, () => [
    element("div", { class: "rows" }, ...rowElements(rows, foldable)),
  ]);
  if (alone || isChanged(module.counts) || state.query) made.open(true);
  return made;
}

function groupElement(group, index) {
  const modules = group.modules
    .map((module) => [module, module.rows.filter((row) => wanted(module, row))])
    .filter(([, rows]) => rows.length);
  if (!modules.length) return null;
  const times = group.members.length > 1 ? ` ×${group.members.length} alike` : "";
  const title = element(
    "span", {}, element("span", { class: "name" }, marked(group.name)), element("span", { class: "faint" }, times),
  );
  const made = block("", title, group.counts, () =>
    modules.map(([module, rows]) => moduleElement(module, rows, modules.length === 1)),
  );
  const section = element("section", { class: "group", id: "group-" + index }, made);
  section.open = made.open;
  section.rows = modules.reduce((total, [, rows]) => total + rows.length, 0);
  return section;
}

function namedElement(table) {
  const rows = table.rows.filter((row) => !state.query || row.join(" ").toLowerCase().includes(state.query));
  if (!rows.length) return null;
  const lines = rows.map(([kind, name, before, after]) => {
    const same = before === after;
    const words = same ? [before + "  other values"] : [
      before ? element("del", {}, before) : null, before && after ? " → " : null,
      after ? element("ins", {}, after) : null,
    ];
    return element(
      "tr", { class: "detail " + kind }, element("td", {}, kind), element("td", {}, marked(name)),
      element("td", {}, ...words.filter((word) => word !== null)),
    );
  });
  const made = block("", element("span", { class: "name" }, table.title), table.counts, () => [
    element("table", { class: "named code" }, ...lines),
  ]);
  made.open(true);
  return element("section", {}, made);
}

function draw() {
  const groups = DATA.groups.map(groupElement).filter(Boolean);
  byId("groups").replaceChildren(...groups);
  byId("named").replaceChildren(...DATA.named.map(namedElement).filter(Boolean));
  byId("nothing").hidden = byId("groups").childElementCount + byId("named").childElementCount > 0;
  let budget = MOST_OPEN_ROWS;
  for (const group of groups) {
    const index = Number(group.id.slice(6));
    if ((state.query || isChanged(DATA.groups[index].counts)) && budget > 0) {
      group.open(true);
      budget -= group.rows;
    }
  }
}

// -- tools -----------------------------------------------------------------------------------

function drawLegend() {
  const totals = { ...DATA.counts };
  for (const group of DATA.groups) {
    totals.same = (totals.same || 0) + (group.counts.same || 0) * group.members.length;
  }
  for (const kind of KINDS) {
    const label = `${totals[kind] || 0} ${kindName(kind)}`;
    const button = element("button", { type: "button", class: kind, "aria-pressed": "true", "data-kind": kind }, label);
    button.addEventListener("click", () => {
      const shown = state.shown.delete(kind) ? false : Boolean(state.shown.add(kind));
      button.setAttribute("aria-pressed", String(shown));
      draw();
    });
    byId("legend").append(button);
  }
}

function drawMap() {
  const largest = Math.max(...DATA.groups.map((group) => sum(group.counts)), 1);
  for (const [index, group] of DATA.groups.entries()) {
    const bars = KINDS.filter((kind) => group.counts[kind]).map((kind) =>
      element("i", { class: kind, style: `width:${Math.max(2, (50 * group.counts[kind]) / largest)}px` }),
    );
    const link = element(
      "a", { href: "#group-" + index, class: isChanged(group.counts) ? "" : "quiet", title: group.name },
      element("span", { class: "code" }, element("bdi", {}, group.name)), element("span", { class: "bar" }, ...bars),
    );
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const target = byId("group-" + index);
      if (!target) return;
      target.open(true);
      const top = target.getBoundingClientRect().top + window.scrollY - byId("map").offsetTop - 4;
      window.scrollTo({ top: top - document.querySelector("header").offsetHeight + byId("map").offsetTop });
    });
    byId("map").append(link);
  }
}

function zoom(factor) {
  state.zoom = factor ? Math.min(3, Math.max(0.4, state.zoom * factor)) : 1;
  document.documentElement.style.setProperty("--zoom", state.zoom.toFixed(3));
  byId("zoom-reset").textContent = Math.round(state.zoom * 100) + "%";
}

function openAll(open) {
  for (const group of document.querySelectorAll(".group")) {
    group.open(open);
    for (const module of group.querySelectorAll(".module")) module.open(open);
  }
}

function showTip(target) {
  const cellWithTip = target.closest && target.closest("[data-tip]");
  const tip = byId("tip");
  tip.hidden = !cellWithTip;
  if (!cellWithTip) return;
  tip.textContent = cellWithTip.dataset.tip;
  const box = cellWithTip.getBoundingClientRect();
  const below = box.bottom + tip.offsetHeight + 8 < window.innerHeight;
  tip.style.top = (below ? box.bottom + 4 : box.top - tip.offsetHeight - 4) + "px";
  tip.style.left = Math.min(box.left, window.innerWidth - tip.offsetWidth - 8) + "px";
}

function search(text) {
  state.query = text.trim().toLowerCase();
  draw();
}

function onKey(event) {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  const actions = {
    "/": () => byId("search").focus(), "+": () => zoom(1.15), "-": () => zoom(1 / 1.15), "0": () => zoom(0),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

function listen() {
  let waiting = 0;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => search(event.target.value), 120);
  });
  byId("expand").addEventListener("click", () => openAll(true));
  byId("collapse").addEventListener("click", () => openAll(false));
  byId("zoom-in").addEventListener("click", () => zoom(1.15));
  byId("zoom-out").addEventListener("click", () => zoom(1 / 1.15));
  byId("zoom-reset").addEventListener("click", () => zoom(0));
  document.addEventListener("keydown", onKey);
  document.addEventListener("mouseover", (event) => showTip(event.target));
  document.addEventListener("focusin", (event) => showTip(event.target));
  window.addEventListener("scroll", () => { byId("tip").hidden = true; }, { passive: true });
  const measure = () =>
    document.documentElement.style.setProperty("--header", document.querySelector("header").offsetHeight + "px");
  window.addEventListener("resize", measure);
  measure();
}

byId("summary").textContent = DATA.summary;
indexText();
drawLegend();
drawMap();
draw();
listen();
document.documentElement.dataset.ready = "yes";
