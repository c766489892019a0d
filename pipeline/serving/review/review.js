import {Picture} from "/canvas.js";
import {Drafts, fromBytes, packed, unpacked} from "/drafts.js";

const byId = id => document.getElementById(id);
const RETRY_MS = 4000, DRAFT_MS = 250;

let queue, drafts, items = [], shown = [], current = null, focused = 0;
let original = null; // the labels of the current image, as it was opened
let dirty = false, kept = Promise.resolve(), sending = new Map(), timer = null, opening = 0;

const picture = new Picture(
  {stage: byId("stage"), sheet: byId("sheet"), photo: byId("photo"), overlay: byId("overlay"), cursor: byId("cursor")},
  () => paintingChanged(),
);

// --- talking to the server ---

async function api(path, options = {}) {
  const reply = await fetch(`/api/review${path}`, {cache: "no-store", ...options});
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => ({}));
  throw Object.assign(new Error(told.message ?? `The server answers ${reply.status}.`), {status: reply.status, told});
}

// Send the draft of an image until the server has it. A draft is deleted only when it is saved.
async function send(item) {
  const draft = drafts.get(item.id);
  if (!draft?.decision || sending.has(item.id)) return;
  const text = JSON.stringify(draft);
  sending.set(item.id, true);
  try {
    const follows = draft.follows ? {"If-Match": `"${draft.follows}"`} : {"If-None-Match": "*"};
    const body = {decision: draft.decision, reviewer: draft.reviewer, ...(draft.mask ? {mask: draft.mask} : {})};
    const reply = await api(`/${item.id}`, {method: "PUT", headers: {"Content-Type": "application/json", ...follows}, body: JSON.stringify(body)});
    item.saved = await reply.json();
    item.fresh = Date.now();
    if (JSON.stringify(drafts.get(item.id)) === text) drafts.delete(item.id);
    else drafts.set(item.id, {...drafts.get(item.id), follows: item.saved.tag});
    tell("");
  } catch (error) {
    if (error.status === 412) conflict(item, error.told);
    else if (error.status && error.status < 500 && error.status !== 429 && error.status !== 408) tell(`${item.name}: ${error.message}`);
    else {
      tell(`Not saved yet: ${error.status ? error.message : "the server does not answer"}. It is kept in this browser and sent again.`);
      setTimeout(() => send(item), RETRY_MS);
    }
  } finally {
    sending.delete(item.id);
    redraw(item);
    if (!current) finish();
  }
}

function conflict(item, told) {
  const dialog = byId("conflict");
  byId("conflict-text").textContent = `${item.name}: ${told.message}`;
  byId("theirs").onclick = () => {
    item.saved = told.saved;
    item.fresh = Date.now();
    drafts.delete(item.id);
    dialog.close();
    if (current === item) open(item); else redraw(item);
  };
  byId("mine").onclick = () => {
    const draft = drafts.get(item.id);
    if (draft) drafts.set(item.id, {...draft, follows: told.saved.tag});
    dialog.close();
    send(item);
  };
  if (!dialog.open) dialog.showModal();
}

function tell(text) {
  byId("alert").hidden = !text;
  byId("alert-text").textContent = text;
}

// --- what a person says ---

const stateOf = item => { const draft = drafts.get(item.id); return draft ? "unsaved" : item.saved?.decision ?? ""; };

async function decide(decision, item = current ?? shown[focused]) {
  if (!item) return;
  const inEditor = current === item;
  if (inEditor && !original) return; // it is still loading
  if (decision === "rejected" && inEditor && dirty) {
    tell("You have painted here: save it with S, or take it back with Z or L, then reject.");
    return;
  }
  if (!inEditor && drafts.get(item.id)?.mask) { open(item); tell("This image has a painting that is not saved: save it with S."); return; }
  const draft = {decision, reviewer: byId("reviewer").value.trim(), follows: item.saved?.tag ?? null};
  // What is on the screen is right: with a painting, or with one that was saved before, that is the painting.
  if (decision !== "rejected" && inEditor && (dirty || item.saved?.decision === "painted")) {
    draft.decision = "painted";
    draft.mask = await packed(picture.ids);
  } else if (decision === "accepted" && item.saved?.decision === "painted") return next(item, inEditor);
  clearTimeout(timer);
  await kept;
  if (!drafts.set(item.id, draft)) tell("This browser keeps nothing: do not close the page before all is saved.");
  if (inEditor) dirty = false;
  send(item);
  next(item, inEditor);
}

function next(item, inEditor) {
  if (!inEditor) {
    redraw(item);
    const at = shown.indexOf(item);
    focusCard(Math.min(at + 1, shown.length - 1));
    return;
  }
  const at = items.indexOf(item), left = [...items.slice(at + 1), ...items.slice(0, at)].find(one => !stateOf(one));
  if (left) open(left); else gallery();
}

function paintingChanged() {
  dirty = picture.undos.length > 0 || !!drafts.get(current.id)?.mask;
  clearTimeout(timer);
  const item = current, ids = picture.ids, count = picture.undos.length;
  timer = setTimeout(() => { kept = keep(item, ids, count); }, DRAFT_MS);
  controls();
}

// Keep a painting in this browser before it is saved.
async function keep(item, ids, count) {
  if (current !== item || picture.ids !== ids) return;
  if (!count && same(ids, original)) { drafts.delete(item.id); dirty = false; controls(); return; }
  const mask = await packed(ids);
  if (current !== item || !dirty) return;
  if (!drafts.set(item.id, {mask, follows: item.saved?.tag ?? null})) tell("This browser does not keep the painting: save it soon.");
  drawCard(item);
}

const same = (one, other) => one.length === other.length && one.every((value, at) => value === other[at]);

// Before the image changes: a stroke of the last moment is kept, too.
async function leave() {
  clearTimeout(timer);
  if (!current || !dirty || !picture.ids) return;
  const item = current, follows = item.saved?.tag ?? null;
  if (!picture.undos.length && drafts.has(item.id)) return;
  const mask = await packed(picture.ids.slice());
  if (!drafts.get(item.id)?.decision && !drafts.set(item.id, {mask, follows})) tell("This browser does not keep the painting: save it soon.");
  redraw(item);
}

// --- one image ---

async function open(item) {
  await leave();
  const mine = ++opening;
  current = item; original = null; dirty = false;
  document.body.dataset.mode = "editor";
  byId("gallery").hidden = true; byId("editor").hidden = false;
  picture.clear();
  byId("waiting").hidden = false; byId("waiting").textContent = "Loading …";
  byId("photo").removeAttribute("src");
  byId("name").textContent = item.name; byId("name").title = item.name;
  byId("position").textContent = `${items.indexOf(item) + 1} of ${items.length}${item.quality === null ? "" : `, quality ${item.quality.toFixed(2)}`}`;
  byId("reasons").replaceChildren(...item.reasons.map(reason => Object.assign(document.createElement("li"), {textContent: reason.text})));
  controls();
  byId("stage").focus({preventScroll: true});
  try {
    const [about, bytes] = await Promise.all([
      api(`/${item.id}`).then(reply => reply.json()),
      api(`/${item.id}/mask`).then(reply => reply.arrayBuffer()),
    ]);
    if (mine !== opening) return;
    item.saved = about.saved;
    item.about = about;
    const ids = fromBytes(new Uint8Array(bytes));
    original = ids.slice();
    byId("photo").src = `/api/review/${item.id}/image`;
    byId("photo").alt = item.name;
    byId("photo").onerror = () => { tell("The image cannot be shown: it is gone, or has changed since it was labelled."); };
    picture.show(ids, about.width, about.height, queue.colors);
    const draft = drafts.get(item.id);
    if (draft?.mask && !sending.has(item.id)) {
      const painted = await unpacked(draft.mask);
      if (mine !== opening) return;
      if (painted.length === ids.length) { picture.replace(painted); dirty = true; }
    }
    byId("waiting").hidden = true;
  } catch (error) {
    if (mine === opening) byId("waiting").textContent = error.message;
  }
  controls();
}

function step(by) {
  const at = items.indexOf(current) + by;
  if (items[at]) open(items[at]);
}

async function asLabelled() {
  if (!original) return;
  const ids = fromBytes(new Uint8Array(await (await api(`/${current.id}/mask?original=true`)).arrayBuffer()));
  if (!same(ids, picture.ids)) picture.replace(ids);
}

function controls() {
  const state = current ? stateOf(current) : "", said = current?.saved?.decision;
  byId("save").hidden = !dirty;
  byId("accept").hidden = dirty;
  byId("accept").dataset.said = String(said === "accepted" || said === "painted");
  byId("reject").dataset.said = String(said === "rejected");
  byId("previous").disabled = !current || items.indexOf(current) === 0;
  byId("next").disabled = !current || items.indexOf(current) === items.length - 1;
  byId("undo").disabled = !picture.undos.length;
  byId("reset").disabled = !original;
  byId("stage").dataset.tool = picture.tool;
  for (const button of document.querySelectorAll("[data-tool]")) if (button.tagName === "BUTTON") button.setAttribute("aria-pressed", String(button.dataset.tool === picture.tool));
  for (const button of document.querySelectorAll("#classes button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.id) === picture.chosen));
    const segment = current?.about?.segments.find(one => one.class_id === Number(button.dataset.id));
    button.querySelector(".num").textContent = segment ? segment.mean_confidence.toFixed(2) : "";
    button.querySelector(".num").title = segment ? "mean confidence of the labels" : "";
  }
  const counts = {accepted: 0, rejected: 0, painted: 0, unsaved: 0, "": 0};
  for (const item of items) counts[stateOf(item)]++;
  const done = items.length - counts[""];
  byId("bar").style.width = `${100 * done / Math.max(1, items.length)}%`;
  byId("counts").textContent = `${done} of ${items.length} reviewed: ${counts.accepted} accepted, ${counts.rejected} rejected, ${counts.painted} painted${counts.unsaved ? `, ${counts.unsaved} not saved yet` : ""}`;
  byId("counts").dataset.unsaved = counts.unsaved;
  document.title = `${done}/${items.length} ${current && state ? `${state} ` : ""}· Review · MaskMill`;
}

function choose(id, tool) {
  picture.chosen = id;
  if (tool || picture.tool === "move") picture.tool = tool ?? "brush";
  controls();
}

// --- all images ---

function gallery() {
  leave();
  const item = current;
  opening++;
  current = null; original = null; dirty = false;
  document.body.dataset.mode = "gallery";
  byId("gallery").hidden = false; byId("editor").hidden = true;
  filter();
  focusCard(Math.max(0, shown.indexOf(item)));
  finish();
}

async function finish() {
  byId("done").hidden = !items.length || !items.every(item => item.saved && !drafts.has(item.id));
  if (byId("done").hidden) return;
  const told = await api("/agreement").then(reply => reply.json()).catch(() => []);
  byId("agreement").replaceChildren(...told.map(text => Object.assign(document.createElement("li"), {textContent: `Images whose truth is known. ${text}`})));
}

function filter() {
  const state = byId("show").value, kind = byId("reason").value;
  shown = items.filter(item => (state === "all" || (stateOf(item) || "open") === state) && (!kind || item.reasons.some(reason => reason.kind === kind)));
  byId("cards").replaceChildren(...shown.map(card));
  byId("found").textContent = `${shown.length} images`;
  byId("none").hidden = shown.length > 0;
  controls();
}

function card(item) {
  const button = document.createElement("button");
  button.type = "button";
  const image = Object.assign(new Image(), {loading: "lazy", alt: "", decoding: "async"});
  const about = Object.assign(document.createElement("span"), {className: "about"});
  about.append(document.createElement("b"), Object.assign(document.createElement("span"), {className: "state"}), document.createElement("span"));
  button.append(image, about);
  button.addEventListener("click", () => open(item));
  button.addEventListener("focus", () => { focused = shown.indexOf(item); });
  item.card = button;
  drawCard(item);
  return button;
}

function drawCard(item) {
  if (!item.card) return;
  const state = stateOf(item), [name, said, why] = item.card.querySelectorAll(".about > *");
  item.card.dataset.state = state;
  name.textContent = item.name;
  said.textContent = {"": "", unsaved: "not saved yet", ...Object.fromEntries(["accepted", "rejected", "painted"].map(one => [one, `${one}${item.saved?.reviewer ? ` by ${item.saved.reviewer}` : ""}`]))}[state];
  why.textContent = item.reasons.map(reason => reason.text).join(", ");
  why.title = why.textContent;
  const source = `/api/review/${item.id}/thumbnail?${item.saved?.tag ?? ""}`;
  const image = item.card.querySelector("img");
  if (image.getAttribute("src") !== source) image.src = source;
}

function redraw(item) {
  drawCard(item);
  controls();
}

function focusCard(at) {
  focused = at;
  shown[at]?.card.focus();
}

// --- keys ---

const inGallery = {
  a: () => decide("accepted"), r: () => decide("rejected"), n: () => open(items.find(item => !stateOf(item)) ?? items[0]),
  arrowright: () => focusCard(Math.min(shown.length - 1, focused + 1)), arrowleft: () => focusCard(Math.max(0, focused - 1)),
  arrowdown: () => focusCard(Math.min(shown.length - 1, focused + across())), arrowup: () => focusCard(Math.max(0, focused - across())),
};
const inEditor = {
  a: () => decide("accepted"), r: () => decide("rejected"), s: () => decide(dirty ? "painted" : "accepted"),
  arrowright: () => step(1), arrowleft: () => step(-1), n: () => next(current, true), g: gallery, escape: gallery,
  b: () => tool("brush"), f: () => tool("fill"), v: () => tool("move"), e: () => choose(queue.ignore_index),
  i: () => { const id = pointed && picture.classAt(pointed); if (id !== null && id !== undefined) choose(id); },
  "[": () => brush(picture.brush / 1.25), "]": () => brush(picture.brush * 1.25), z: () => picture.undo(), l: asLabelled, o: overlay,
  "+": () => picture.zoom(1.3), "-": () => picture.zoom(1 / 1.3), "=": () => picture.fit(),
};
let pointed = null;

const across = () => getComputedStyle(byId("cards")).gridTemplateColumns.split(" ").length;
const tool = name => { picture.tool = name; controls(); };
function brush(radius) {
  picture.brush = Math.min(100, Math.max(1, radius));
  byId("size").value = picture.brush;
}
function overlay() {
  const on = byId("toggle").getAttribute("aria-pressed") !== "true";
  byId("toggle").setAttribute("aria-pressed", String(on));
  byId("toggle").firstChild.textContent = on ? "On " : "Off ";
  byId("overlay").hidden = !on;
}

document.addEventListener("keydown", event => {
  if (event.target.closest("input:not([type=range]), select, textarea, dialog") || event.ctrlKey && event.key !== "z" || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "?") { byId("keys").showModal(); return; }
  if (current && key === " ") { picture.held = true; event.preventDefault(); return; }
  const action = (current ? inEditor : inGallery)[key];
  if (action) action();
  else if (current && /^[1-9]$/.test(key) && queue.classes[Number(key) - 1]) choose(Number(key) - 1);
  else return;
  event.preventDefault();
});
document.addEventListener("keyup", event => { if (event.key === " ") picture.held = false; });
byId("stage").addEventListener("pointermove", event => {
  pointed = event;
  const id = picture.classAt(event);
  byId("tip").hidden = id === null;
  if (id !== null) byId("tip").textContent = queue.classes[id]?.name ?? "no class";
});
byId("stage").addEventListener("pointerleave", () => { pointed = null; byId("tip").hidden = true; });

for (const [id, action] of Object.entries({
  accept: () => decide("accepted"), reject: () => decide("rejected"), save: () => decide("painted"), previous: () => step(-1), next: () => step(1),
  undo: () => picture.undo(), reset: asLabelled, toggle: overlay, "to-gallery": gallery, help: () => byId("keys").showModal(),
  "zoom-in": () => picture.zoom(1.3), "zoom-out": () => picture.zoom(1 / 1.3), "zoom-fit": () => picture.fit(), "alert-close": () => tell(""),
})) byId(id).addEventListener("click", action);
for (const button of document.querySelectorAll(".tools button")) button.addEventListener("click", () => tool(button.dataset.tool));
byId("size").addEventListener("input", () => brush(Number(byId("size").value)));
byId("opacity").addEventListener("input", () => { byId("overlay").style.opacity = byId("opacity").value / 100; });
for (const id of ["show", "reason"]) byId(id).addEventListener("change", filter);
byId("reviewer").addEventListener("change", () => { try { localStorage.setItem("maskmill reviewer", byId("reviewer").value); } catch { /* it keeps nothing */ } });
addEventListener("beforeunload", event => { if (sending.size || dirty && !drafts.has(current.id)) event.preventDefault(); });
addEventListener("online", () => items.filter(item => drafts.has(item.id)).forEach(send));

// --- begin ---

async function begin() {
  try { byId("reviewer").value = localStorage.getItem("maskmill reviewer") ?? ""; } catch { /* it keeps nothing */ }
  queue = await api("").then(reply => reply.json());
  queue.colors = queue.classes.map(one => [1, 3, 5].map(at => parseInt(one.color.slice(at, at + 2), 16)));
  items = queue.items;
  drafts = new Drafts(queue.corrections);
  byId("place").textContent = `\u200e${queue.table}`; // its end is shown
  byId("corrections").textContent = queue.corrections;
  const option = (value, text) => Object.assign(document.createElement("option"), {value, textContent: text});
  byId("show").replaceChildren(option("all", "all"), option("open", "not reviewed"), ...["accepted", "rejected", "painted", "unsaved"].map(name => option(name, name)));
  const kinds = new Set(items.flatMap(item => item.reasons.map(reason => reason.kind)));
  byId("reason").replaceChildren(option("", "any"), ...[...kinds].map(kind => option(kind, queue.reasons[kind])));
  byId("classes").replaceChildren(...[...queue.classes.map((one, id) => [id, one.name, one.color]), [queue.ignore_index, "no class", ""]].map(([id, name, color]) => {
    const button = Object.assign(document.createElement("button"), {type: "button"});
    button.dataset.id = id;
    const swatch = Object.assign(document.createElement("span"), {className: color ? "swatch" : "swatch none"});
    if (color) swatch.style.background = color;
    const key = document.createElement("kbd");
    key.textContent = color ? (id < 9 ? id + 1 : "") : "E";
    key.hidden = !key.textContent;
    button.append(swatch, Object.assign(document.createElement("span"), {className: "name", textContent: name, title: name}), Object.assign(document.createElement("span"), {className: "num"}), key);
    button.addEventListener("click", () => choose(id));
    return Object.assign(document.createElement("li"), {}).appendChild(button).parentNode;
  }));
  byId("overlay").style.opacity = 0.6;
  filter();
  focusCard(Math.max(0, shown.findIndex(item => !stateOf(item))));
  for (const item of items) if (drafts.get(item.id)?.decision) send(item);
  document.body.dataset.ready = "true";
}
begin().catch(error => tell(`The queue cannot be shown: ${error.message}`));
