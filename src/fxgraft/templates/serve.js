"use strict";
// The status page of a server: asks for its numbers every second and draws them.
const HISTORY = 300;
const TONES = 6;
const byId = (id) => document.getElementById(id);
const rates = [];
const tones = new Map();

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const whole = (value) => Math.round(value).toLocaleString("en");

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${(value * 1000).toPrecision(3)} ms` : `${value.toPrecision(3)} s`;
}

function duration(value) {
  const [days, hours] = [Math.floor(value / 86400), Math.floor(value / 3600) % 24];
  const minutes = Math.floor(value / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${Math.floor(value) % 60} s`;
}

function list(target, entries) {
  const pairs = entries.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, whole(value))]);
  byId(target).replaceChildren(...pairs);
}

function head(found) {
  const { name, backend, passes, context_length: context, created } = found.model;
  const chip = byId("state");
  chip.textContent = found.state;
  chip.className = `chip ${found.state}`;
  const facts = [
    found.problem, name, backend && `backend ${backend}`,
    passes.length ? `passes ${passes.join(", ")}` : "no passes",
    context && `context ${whole(context)}`, `up ${duration(found.time - created)}`, `fxgraft ${found.version}`,
  ];
  byId("facts").textContent = facts.filter(Boolean).join(" · ");
}

function requests(found) {
  const names = ["running", "prefilling", "queued", "finished", "cancelled", "failed", "refused", "preemptions"];
  list("requests", names.map((name) => [name, found.requests[name]]));
}

function tokens(found) {
  const { per_second: rate, generated, prompt, reused } = found.tokens;
  rates.push(rate);
  if (rates.length > HISTORY) rates.shift();
  byId("rate").textContent = rate < 100 ? rate.toFixed(1) : whole(rate);
  list("tokens", [["generated", generated], ["of prompts", prompt], ["of prompts, reused", reused]]);
  const top = Math.max(...rates, 1e-9);
  const right = 300 - (rates.length - 1);
  const points = rates.map((value, place) => `${right + place},${(58 - 54 * value / top).toFixed(1)}`);
  byId("history").firstElementChild.setAttribute("d", `M${right},60 L${points.join(" L")} L300,60 Z`);
}

function meter(title, total, parts) {
  const bar = element("div", { class: "bar" });
  for (const [kind, count] of parts) {
    bar.append(element("div", { class: kind, style: `width: ${100 * count / total}%` }));
  }
  const words = parts.map(([kind, count]) => `${whole(count)} ${kind}`).join(", ");
  const line = element("p", {}, element("span", {}, title), element("span", {}, `${words} of ${whole(total)}`));
  return element("div", { class: "meter" }, line, bar);
}

function memory(found) {
  const { blocks, slots } = found;
  const meters = [];
  if (blocks.total) meters.push(meter("Blocks", blocks.total, [["used", blocks.used], ["cached", blocks.cached]]));
  if (slots.total) meters.push(meter("Slots", slots.total, [["used", slots.used]]));
  byId("memory").replaceChildren(...(meters.length ? meters : ["nothing is kept"]));
}

function times(found) {
  const names = [["to_first_token", "to first token"], ["per_output_token", "per output token"]];
  const rows = names.map(([key, words]) => {
    const { p50, p99 } = found.seconds[key];
    return element("tr", {}, element("th", { scope: "row" }, words),
      element("td", {}, seconds(p50)), element("td", {}, seconds(p99)));
  });
  const step = found.steps ? found.seconds.last_step : null;
  rows.push(element("tr", {}, element("th", { scope: "row" }, "last step"), element("td", {}, seconds(step)), element("td")));
  byId("times").tBodies[0].replaceChildren(...rows);
}

function tone(name) {
  if (!tones.has(name)) tones.set(name, tones.size % TONES);
  return `tone-${tones.get(name)}`;
}

function layers(found) {
  byId("map").hidden = !found.layers.length;
  const items = found.layers.map(({ index, kind, ops }) => {
    const used = Object.entries(ops).sort((a, b) => b[1] - a[1]);
    const shown = used.length ? used : [[kind, 0]];
    const lines = shown.map(([name, count]) => element("span", {}, name, element("span", {}, whole(count))));
    return element("li", { class: tone(shown[0][0]) }, element("b", {}, `layer ${index}`), ...lines);
  });
  byId("layers").replaceChildren(...items);
}

function policy(found) {
  const gauges = Object.entries(found.policy);
  byId("policy").hidden = !gauges.length;
  const pairs = gauges.flatMap(([name, value]) => {
    const words = name.replace("dsla_", "").replaceAll("_", " ");
    const number = name.endsWith("pressure") ? `${Math.round(100 * value)} %` : whole(value);
    return [element("dt", {}, words), element("dd", {}, number)];
  });
  byId("levels").replaceChildren(...pairs);
}

function show(found) {
  byId("login").hidden = true;
  byId("main").hidden = false;
  for (const part of [head, requests, tokens, memory, times, policy, layers]) part(found);
}

function lost(word) {
  byId("state").textContent = word;
  byId("state").className = "chip lost";
}

async function update() {
  const key = sessionStorage.getItem("key");
  try {
    const answer = await fetch("status.json", key ? { headers: { Authorization: `Bearer ${key}` } } : {});
    if (answer.status === 401) {
      lost("locked");
      byId("login").hidden = false;
      byId("main").hidden = true;
      return;
    }
    show(await answer.json());
  } catch {
    lost("no connection");
  }
  setTimeout(update, 1000);
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key").value);
  update();
});
update();
