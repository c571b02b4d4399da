
"use strict";
(() => {
const D = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const SVG = "http://www.w3.org/2000/svg";

// Everything from the capture becomes text by textContent, never markup.
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") node.style.cssText = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null) node.append(child);
  return node;
}
function svg(name, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function time(us) {
  if (us === null || us === undefined) return "–";
  const size = Math.abs(us);
  if (size < 1e3) return us.toFixed(1) + " µs";
  if (size < 1e6) return (us / 1e3).toFixed(2) + " ms";
  return (us / 1e6).toFixed(3) + " s";
}
const short = us => us < 1e3 ? +us.toPrecision(3) + " µs" : us < 1e6 ? +(us / 1e3).toPrecision(3) + " ms"
  : +(us / 1e6).toPrecision(4) + " s";
const number = n => n === null || n === undefined ? "–" : n.toLocaleString("en");
function bytes(n) {
  if (n === null || n === undefined) return "–";
  if (n < 1e4) return n + " B";
  return n < 1e7 ? (n / 1e3).toFixed(1) + " kB" : (n / 1e6).toFixed(1) + " MB";
}
const address = (host, port) => (host.includes(":") ? `[${host}]` : host) + ":" + (port ?? "?");
const process = (comm, pid) => comm === null && pid === null ? "" : `${comm ?? "?"} ${pid ?? "?"}`;
const path = c => address(c.saddr, c.sport) + (c.comm ? ` (${process(c.comm, c.pid)})` : "") + " → " +
  address(c.daddr, c.dport) + (c.service_comm ? ` (${process(c.service_comm, c.service_pid)})` : "");
function moment(us) {
  const ms = Number(BigInt(D.time_ns) / 1000000n) + us / 1e3;
  return new Date(ms).toISOString().replace("T", " ");
}

const COLOURS = [["client_send", "send"], ["server_send", "send"], ["wire", "wire"], ["softirq", "irq"],
  ["tcp", "tcp"], ["queue", "queue"], ["server", "server"], ["connect_send", "send"], ["syn", "wire"],
  ["answer", "irq"], ["synack", "wire"], ["connect_done", "tcp"], ["ack", "wire"], ["accept", "queue"],
  ["connect", "wire"], ["total", "other"]];
function colour(stage) {
  const parts = stage.split("+");
  const base = parts[0].replace(/_back$/, "");
  const found = parts.length > 1 && new Set(parts.map(p => p.replace(/_back$/, ""))).size > 2 ? null
    : COLOURS.find(([name]) => name === base);
  return `var(--c-${found ? found[1] : "other"})`;
}

// What is no exchange, or not a whole one.
const OUTCOMES = {unanswered: "unanswered", cut: "reply cut off", open: "open at the end",
  one_way: "no reply awaited", unknown: "outcome unknown", push: "unasked"};

function section(title, words, ...children) {
  const part = el("section", {}, el("h2", {}, title), words === null ? null : el("p", {}, words), ...children);
  main.append(part);
  return part;
}

// --- what it is, and how much
const total = D.stages.find(s => s[0] === "total");
main.replaceChildren(el("header", {},
  el("h1", {}, D.name),
  el("p", {}, D.exchanges || D.connections
    ? `${moment(0)} · ${time(D.span_us)} · times are from the capture's beginning` : "Nothing of a connection is in it.")));
main.append(el("div", {class: "tiles"}, [
  ["answered", number(D.exchanges)], ["unanswered", number(D.outcomes.unanswered)],
  ...["cut", "open", "one_way", "unknown", "push"].filter(o => D.outcomes[o]).map(o => [OUTCOMES[o], number(D.outcomes[o])]), ["p50", total ? time(total[2]) : "–"], ["p90", total ? time(total[3]) : "–"],
  ["p99", total ? time(total[4]) : "–"], ["slowest", total ? time(total[5]) : "–"],
  ["connections", number(D.connections)], ["retransmits", number(D.retransmits)], ["resets", number(D.resets)],
].map(([name, value]) => el("div", {class: "tile"}, el("b", {}, value), el("span", {}, name)))));
if (D.remarks.length) {
  main.append(el("section", {class: "remarks", "aria-label": "What to know of these figures"},
    el("ul", {}, D.remarks.map(words => el("li", {}, words)))));
}

// --- latency over time, as lines and as a heat map over one time axis
const WIDE = 1120, LEFT = 66, RIGHT = 10;
function ticks(low, high) {
  const found = [];
  for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade++)
    for (const step of [1, 2, 5]) {
      const value = step * 10 ** decade;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  const every = Math.ceil(found.length / 7);
  return found.filter((_, i) => i % every === 0);
}
function linearTicks(low, high, count = 8) {
  const raw = (high - low) / count || 1, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(f => f * size).find(s => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(v);
  return found;
}
function drawTimeline() {
  const T = D.timeline;
  if (!T.series.length) return;
  const from = T.from_us, until = from + T.windows * T.window_us;
  const part = section("Latency over time",
    `Requests by when they began, in windows of ${short(T.window_us)}; both axes in the two pictures are the same.`);
  part.append(el("div", {class: "legend"}, ["p50", "p90", "p99"].map(p =>
    el("span", {}, el("i", {style: `background:var(--${p})`}), p)), el("span", {}, "heat map: the stronger, the more requests")));
  const values = T.series.flatMap(s => [s[2], s[5]]).filter(v => v > 0);
  const low = Math.min(...T.cells.map(c => 2 ** (c[1] / T.per_octave)), ...values);
  const high = Math.max(...T.cells.map(c => 2 ** ((c[1] + 1) / T.per_octave)), ...values);
  const tall = 220, top = 8, bottom = 22, plot = tall - top - bottom;
  const x = us => LEFT + (us - from) / (until - from) * (WIDE - LEFT - RIGHT);
  const y = us => top + plot - Math.log(Math.max(us, low) / low) / Math.log(high / low || 2) * plot;
  const axes = picture => {
    for (const tick of ticks(low, high)) {
      picture.append(svg("line", {class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: y(tick), y2: y(tick)}));
      picture.append(svg("text", {x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end"}, short(tick)));
    }
    for (const tick of linearTicks(from, until))
      picture.append(svg("text", {x: x(tick), y: tall - 6, "text-anchor": x(tick) > WIDE - 40 ? "end" : "middle"}, short(Math.max(tick, 0))));
  };
  const lines = svg("svg", {viewBox: `0 0 ${WIDE} ${tall}`, role: "img", id: "lines",
    "aria-label": `p50, p90 and p99 of latency over ${time(D.span_us)}`});
  axes(lines);
  for (const [name, column] of [["p50", 2], ["p90", 3], ["p99", 4]]) {
    let points = "", last = null;
    for (const s of T.series) {
      const at = s[0] + T.window_us / 2;
      points += `${last !== null && at - last < T.window_us * 1.5 ? "L" : "M"}${x(at).toFixed(1)} ${y(s[column]).toFixed(1)}`;
      last = at;
    }
    lines.append(svg("path", {d: points, fill: "none", stroke: `var(--${name})`, "stroke-width": 1.6,
      "stroke-linejoin": "round", "stroke-linecap": "round"}));
  }
  const mark = svg("line", {y1: top, y2: top + plot, stroke: "var(--soft)", "stroke-dasharray": "2 3", visibility: "hidden"});
  const readout = svg("text", {class: "readout", x: LEFT + 8, y: top + 12});
  lines.append(mark, readout);
  lines.addEventListener("pointermove", event => {
    const box = lines.getBoundingClientRect();
    const us = from + ((event.clientX - box.left) / box.width * WIDE - LEFT) / (WIDE - LEFT - RIGHT) * (until - from);
    const s = T.series.reduce((best, one) => Math.abs(one[0] + T.window_us / 2 - us) < Math.abs(best[0] + T.window_us / 2 - us) ? one : best);
    mark.setAttribute("x1", x(s[0] + T.window_us / 2));
    mark.setAttribute("x2", x(s[0] + T.window_us / 2));
    mark.setAttribute("visibility", "visible");
    readout.textContent = `at ${time(Math.max(s[0], 0))}: ${number(s[1])} requests · p50 ${time(s[2])} · p90 ${time(s[3])} · p99 ${time(s[4])} · max ${time(s[5])}`;
  });
  lines.addEventListener("pointerleave", () => { mark.setAttribute("visibility", "hidden"); readout.textContent = ""; });
  part.append(lines);
  const heat = svg("svg", {viewBox: `0 0 ${WIDE} ${tall}`, role: "img", id: "heat",
    "aria-label": "Heat map: how many requests took how long, over time"});
  const most = Math.max(...T.cells.map(c => c[2]));
  const paint = () => {
    heat.replaceChildren();
    axes(heat);
    const mix = (a, b, f) => a.map((v, i) => Math.round(v + (b[i] - v) * f)).join(",");
    const cold = css("--heat0").split(",").map(Number), hot = css("--heat1").split(",").map(Number);
    for (const [column, row, count] of T.cells) {
      const left = x(from + column * T.window_us), right = x(from + (column + 1) * T.window_us);
      const upper = y(2 ** ((row + 1) / T.per_octave)), lower = y(2 ** (row / T.per_octave));
      const share = Math.log(1 + count) / Math.log(1 + most);
      const cell = svg("rect", {x: left.toFixed(1), y: upper.toFixed(1), width: (right - left + 0.2).toFixed(1),
        height: (lower - upper + 0.2).toFixed(1), fill: `rgb(${mix(cold, hot, share)})`});
      cell.append(svg("title", {}, `${number(count)} requests took ${short(2 ** (row / T.per_octave))} to ${short(2 ** ((row + 1) / T.per_octave))}`));
      heat.append(cell);
    }
  };
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  part.append(heat);
}
drawTimeline();

// --- stages
if (D.stages.length) {
  const apart = name => name === "total" || name === "connect" || name in OUTCOMES;
  const shown = D.stages.filter(s => !apart(s[0]));
  const widest = Math.max(...shown.map(s => s[4]));
  const all = shown.reduce((sum, s) => sum + s[6], 0);
  const row = s => {
    const scale = us => Math.min(100, us / widest * 100);
    const whole = apart(s[0]);
    return el("tr", {}, el("td", {class: "l"}, whole ? el("b", {}, OUTCOMES[s[0]] ?? s[0]) : s[0] + (s[7] ? " ±" : "")),
      el("td", {}, number(s[1])), el("td", {}, time(s[2])), el("td", {}, time(s[3])), el("td", {}, time(s[4])),
      el("td", {}, time(s[5])), el("td", {}, whole ? "" : (s[6] / all * 100).toFixed(1) + " %"),
      el("td", {class: "wide l"}, whole ? "" : el("div", {class: "bar", role: "img", "aria-label": `p50 ${time(s[2])}, p99 ${time(s[4])}`},
        el("i", {class: "p99", style: `left:0;width:${scale(s[4])}%;background:${colour(s[0])}`}),
        el("i", {style: `left:0;width:${scale(s[2])}%;background:${colour(s[0])}`}))));
  };
  section("Stages", "Where the time goes, in the order of a request's way. Full colour is p50, pale p99; share is of all time. " +
    "Total is of what was answered; of what was not, the time that it waited.",
    el("div", {class: "scroll"}, el("table", {id: "stages"}, el("thead", {}, el("tr", {},
      ["stage", "count", "p50", "p90", "p99", "max", "share", ""].map((name, i) => el("th", {class: i === 0 ? "l" : "", scope: "col"}, name)))),
      el("tbody", {}, D.stages.map(row)))));
}

// --- the slowest
function fall(split, bound) {
  const rows = [];
  let before = 0;
  const parts = [...split.stages];
  if (split.unexplained_us) parts.push(["unexplained", split.unexplained_us]);
  const known = parts.reduce((sum, part) => sum + part[1], 0), whole = Math.max(split.lasted_us ?? split.total_us, known);
  if (whole - known > 0.0005) parts.push(["waiting", whole - known]);
  for (const [name, us] of parts) {
    const wires = name.split("+").filter(p => ["wire", "wire_back", "syn", "synack"].includes(p)).length;
    rows.push(el("span", {}, name), el("span", {class: "t"}, time(us) + (bound !== undefined && wires === 1 ? ` ± ${time(bound)}` : "")),
      el("div", {class: "bar"}, el("i", {style: `left:${before / whole * 100}%;width:${us / whole * 100}%;background:${colour(name)}`})));
    before += us;
  }
  return rows;
}
if (D.slowest.length) {
  const list = D.slowest.map(one => el("details", {class: "request"},
    el("summary", {}, el("b", {}, time(one.lasted_us)), el("span", {title: path(one)}, path(one) + (one.outcome in OUTCOMES ? ` · ${OUTCOMES[one.outcome]}` : "")),
      el("div", {class: "stack", "aria-hidden": "true"}, one.stages.map(([name, us]) =>
        el("i", {style: `width:${us / one.lasted_us * 100}%;background:${colour(name)}`})))),
    el("div", {class: "fall"},
      el("span", {class: "note"}, `${moment(one.at_us)} · request ${one.number} of connection ${one.conn} · ` +
        `${bytes(one.request_bytes)}, reply ${bytes(one.reply_bytes)}` +
        (one.over_by ? ` · waited ${time(one.waited_us)}, ${one.over_by}` : "") +
        (one.retransmits ? ` · ${one.retransmits} retransmitted` : "") +
        (one.zero_windows ? ` · window closed ${one.zero_windows} times` : "") +
        (one.ended !== "turn" && one.ended !== "closed" && one.ended !== one.over_by ? ` · ${one.ended}` : "")),
      one.connect ? [el("span", {class: "note"}, `connect ${time(one.connect.total_us)}`), ...fall(one.connect, one.wire_bound_us),
        el("span", {class: "note"}, `then ${time(one.lasted_us)}`)] : [],
      fall(one, one.wire_bound_us),
      el("span", {class: "note"}, D.courses[one.conn] ? el("button", {class: "plain", type: "button",
        onclick: () => choose(one.conn, true)}, "Show its packets") : ""))));
  section("Slowest requests", "Each opens to its waterfall. What was never answered comes first, by the time it waited.", el("div", {id: "slowest"}, list));
}

// --- connections
const COLUMNS = [
  ["#", "n", v => v], ["client", c => address(c.saddr, c.sport), v => v, true], ["process", c => process(c.comm, c.pid), v => v, true],
  ["service", c => address(c.daddr, c.dport), v => v, true], ["by", c => process(c.service_comm, c.service_pid), v => v, true],
  ["at", "at_us", time], ["for", "for_us", time], ["connect", "connect_us", time], ["answered", "exchanges", number],
  ["unanswered", "unanswered", number], ["mean", "mean_us", time], ["slowest", "slowest_us", time], ["sent", "sent", bytes], ["received", "received", bytes],
  ["retr.", "retransmits", number], ["rtt", "rtt_us", time], ["end", "ended", v => v ?? "", true],
];
const value = (column, c) => typeof column[1] === "function" ? column[1](c) : c[column[1]];
const PAGE = 50;
// At first as they come: with what was not answered, then with the slowest.
let sorted = -1, down = true, room = PAGE, found = [];
if (D.table.length) {
  const texts = new Map(D.table.map(c => [c, COLUMNS.filter(col => col[3]).map(col => value(col, c) ?? "").join(" ").toLowerCase()]));
  const body = el("tbody", {}), count = el("span", {class: "soft", id: "count", role: "status"});
  const search = el("input", {type: "search", id: "search", placeholder: "Address, port, process …", "aria-label": "Search connections"});
  const more = el("button", {class: "plain", type: "button", id: "more", onclick: () => { room += PAGE * 4; show(); }}, "Show more");
  const heads = COLUMNS.map((column, i) => el("th", {class: column[3] ? "l" : "", scope: "col"},
    el("button", {type: "button", onclick: () => { down = sorted === i ? !down : !column[3]; sorted = i; update(); }}, column[0])));
  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = D.table.filter(c => words.every(w => texts.get(c).includes(w)));
    const column = COLUMNS[sorted], sign = down ? -1 : 1;
    if (column) found.sort((a, b) => {
      const one = value(column, a), other = value(column, b);
      if (one === null || other === null) return (one === null) - (other === null);
      return sign * (typeof one === "string" ? one.localeCompare(other, "en", {numeric: true}) : one - other);
    });
    heads.forEach((head, i) => {
      head.setAttribute("aria-sort", i === sorted ? (down ? "descending" : "ascending") : "none");
      head.firstChild.textContent = COLUMNS[i][0] + (i === sorted ? (down ? " ↓" : " ↑") : "");
    });
    room = PAGE;
    show();
  };
  const show = () => {
    body.replaceChildren(...found.slice(0, room).map(c => el("tr", {},
      el("td", {class: "l"}, D.courses[c.n] ? el("button", {class: "plain small", type: "button", "aria-label": `Packets of connection ${c.n}`,
        onclick: () => choose(c.n, true)}, "packets") : ""),
      COLUMNS.map(column => {
        const v = value(column, c);
        return el("td", {class: column[3] ? "l name" : "", title: column[3] ? v : null}, String(column[2](v)));
      }))));
    count.textContent = `${number(Math.min(room, found.length))} of ${number(found.length)} shown`;
    more.hidden = room >= found.length;
  };
  search.addEventListener("input", update);
  section("Connections", null, el("div", {class: "tools"}, search, count),
    el("div", {class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Connections"}, el("table", {id: "connections"}, el("thead", {}, el("tr", {}, el("th"), heads)), body)),
    el("div", {class: "tools", style: "margin:8px 0 0"}, more));
  update();
}

// --- sequence numbers over time
let choose = () => {};
const LOOKS = {send: ["var(--c-server)", "handed over by the program (send)"], nic_tx: ["var(--c-send)", "leaves (nic_tx)"],
  nic_rx: ["var(--c-irq)", "arrives (nic_rx)"], rx_ip: ["var(--c-tcp)", "at IP (rx_ip)"], ready: ["var(--c-wire)", "in the socket (ready)"],
  recv: ["var(--c-queue)", "read by the program (recv)"], again: ["var(--p99)", "sent again"]};
const chosen = D.table.filter(c => D.courses[c.n]);
if (chosen.length) {
  const select = el("select", {id: "which", "aria-label": "Connection"},
    chosen.map(c => el("option", {value: c.n}, `${c.n}: ${address(c.saddr, c.sport)} → ${address(c.daddr, c.dport)}`)));
  const way = el("select", {id: "way", "aria-label": "Direction"}, el("option", {value: 0}, "client → service"), el("option", {value: 1}, "service → client"));
  const reset = el("button", {class: "plain", type: "button", onclick: () => { view = null; draw(); }}, "Whole connection");
  const words = el("p", {class: "soft", id: "course-words"});
  const HIGH = 340, TOP = 10, BOTTOM = 24;
  const graph = svg("svg", {viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", id: "course", tabindex: 0});
  let view = null, span = [0, 1];
  const draw = () => {
    const course = D.courses[select.value], direction = Number(way.value), points = [];
    for (let i = 0; i < course.points.length; i += 4)
      if (course.points[i + 1] % 2 === direction)
        points.push({at: course.points[i], kind: D.kinds[course.points[i + 1] >> 1], from: course.points[i + 2], count: course.points[i + 3]});
    graph.replaceChildren();
    const kinds = D.kinds.filter(kind => points.some(p => p.kind === kind));
    legend.replaceChildren(...kinds.map(kind => el("span", {}, el("i", {style: `background:${LOOKS[kind][0]}`}), LOOKS[kind][1])));
    words.textContent = (course.every > 1 ? `One event in ${course.every} is kept of this connection. ` : "") +
      (course.short ? "There was no room for its later events. " : "") +
      `Each mark spans the bytes concerned. Drag to look closer; on the keyboard + and −, arrows.`;
    graph.setAttribute("aria-label", `Bytes over time, ${points.length} events`);
    if (!points.length) { graph.append(svg("text", {x: WIDE / 2, y: HIGH / 2, "text-anchor": "middle"}, "No bytes were seen in this direction.")); return; }
    const first = points[0].at, last = points[points.length - 1].at;
    span = [first, Math.max(last, first + 1)];
    const [from, until] = view ?? [span[0] - (span[1] - span[0]) * 0.01, span[1] + (span[1] - span[0]) * 0.01];
    const seen = points.filter(p => p.at >= from && p.at <= until);
    const low = seen.length ? Math.min(...seen.map(p => p.from)) : 0, high = seen.length ? Math.max(...seen.map(p => p.from + p.count)) : 1;
    const x = us => LEFT + (us - from) / (until - from) * (WIDE - LEFT - RIGHT);
    const y = b => HIGH - BOTTOM - (b - low) / (high - low || 1) * (HIGH - TOP - BOTTOM);
    for (const tick of linearTicks(low, high, 6)) {
      graph.append(svg("line", {class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: y(tick), y2: y(tick)}));
      graph.append(svg("text", {x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end"}, bytes(Math.round(tick))));
    }
    for (const tick of linearTicks(from, until))
      graph.append(svg("text", {x: x(tick), y: HIGH - 6, "text-anchor": x(tick) > WIDE - 40 ? "end" : "middle"}, short(Math.round(tick * 1000) / 1000)));
    for (const kind of kinds) {
      const mine = seen.filter(p => p.kind === kind);
      graph.append(svg("path", {fill: "none", stroke: LOOKS[kind][0], "stroke-width": 1, opacity: 0.45,
        d: mine.map((p, i) => (i ? `H${x(p.at).toFixed(1)}V` : `M${x(p.at).toFixed(1)} `) + y(p.from + p.count).toFixed(1)).join("")}));
      for (const p of mine) {
        const mark = svg("rect", {class: `mark ${kind}`, x: (x(p.at) - 1.5).toFixed(1), width: 3, rx: 1, fill: LOOKS[kind][0],
          y: y(p.from + p.count).toFixed(1), height: Math.max(3, y(p.from) - y(p.from + p.count)).toFixed(1)});
        mark.append(svg("title", {}, `${LOOKS[kind][1]}: bytes ${number(p.from)} to ${number(p.from + p.count)} at ${time(p.at)}`));
        graph.append(mark);
      }
    }
  };
  const zoom = (factor, shift) => {
    const [from, until] = view ?? span, half = (until - from) / 2 * factor, middle = (from + until) / 2 + (until - from) * shift;
    view = [middle - half, middle + half];
    draw();
  };
  graph.addEventListener("keydown", event => {
    const does = {"+": [0.5, 0], "=": [0.5, 0], "-": [2, 0], ArrowLeft: [1, -0.25], ArrowRight: [1, 0.25]}[event.key];
    if (does) { event.preventDefault(); zoom(...does); } else if (event.key === "0") { view = null; draw(); }
  });
  let drag = null;
  const at = event => { const box = graph.getBoundingClientRect(); return (event.clientX - box.left) / box.width * WIDE; };
  graph.addEventListener("pointerdown", event => { drag = at(event); graph.setPointerCapture(event.pointerId); });
  graph.addEventListener("pointerup", event => {
    const end = at(event), start = drag;
    drag = null;
    if (start === null || Math.abs(end - start) < 6) return;
    const whole = view ?? [span[0] - (span[1] - span[0]) * 0.01, span[1] + (span[1] - span[0]) * 0.01];
    const us = px => whole[0] + (px - LEFT) / (WIDE - LEFT - RIGHT) * (whole[1] - whole[0]);
    view = [us(Math.min(start, end)), us(Math.max(start, end))];
    draw();
  });
  select.addEventListener("change", () => { view = null; draw(); });
  way.addEventListener("change", () => { view = null; draw(); });
  const legend = el("div", {class: "legend"});
  const part = section("Bytes over time", null, el("div", {class: "tools"}, select, way, reset), words, legend, graph);
  choose = (n, go) => {
    select.value = n;
    view = null;
    draw();
    if (go) { part.scrollIntoView({block: "start"}); graph.focus({preventScroll: true}); }
  };
  choose(chosen[0].n, false);
}
})();
