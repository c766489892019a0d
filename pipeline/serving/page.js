// The page: its state, requests to the server, and rendering.

import {decide, decodeAnswer, indexedPng, paintHeat, paintMasks, rgb, shares} from "/masks.js";
import {editExample} from "/example.js";

const byId = id => document.getElementById(id);
const DISPLAYED = 2048; // longest side of the photo on screen; downloads keep full size

const page = {
  models: [], palette: [], limits: {},
  model: null, // one of models
  image: null, // {blob, name, bitmap}
  prompts: [], // {text | example: {name, image, mask, thumbnail}, slot, visible}
  hidden: new Set(), // names of a model's own classes that are switched off
  answer: null, decision: null, asked: null, // asked: the prompts that the answer is about; null: its own classes
  view: "masks", solo: null, contexts: {}, running: null, timer: 0, drawing: 0, retry: null,
};

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "background") made.style.background = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// --- the server -----------------------------------------------------------------------------------------------

class Failure extends Error {
  constructor({code, message, remedy}, retryAfter = null) {
    super(message);
    Object.assign(this, {code, remedy, retryAfter});
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure({code: "unreachable", message: "The server does not answer.", remedy: "Is it still running? Start it again and reload this page."});
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({code: "unknown", message: `The server answered ${response.status}.`, remedy: ""}));
  throw new Failure(told, Number(response.headers.get("Retry-After")) || null);
}

const askJson = async (path, options) => (await ask(path, options)).json();

async function readModels() {
  const reply = await askJson("/api/models");
  const before = page.model?.state;
  Object.assign(page, reply);
  page.model = page.models.find(model => model.name === page.model?.name) ?? page.models[0];
  showState();
  if (page.model.state !== before) draw();
}

async function loadModel() {
  const name = page.model.name;
  if (page.model.state === "ready") return;
  try {
    await ask(`/api/models/${encodeURIComponent(name)}/load`, {method: "POST"});
    do {
      await new Promise(done => setTimeout(done, 400));
      await readModels();
    } while (page.model.name === name && page.model.state === "loading");
    if (page.model.name === name && page.model.state === "failed") throw new Failure(page.model.error);
  } catch (error) {
    if (page.model.name === name) fail(error, loadModel);
  }
}

// --- asking for masks -----------------------------------------------------------------------------------------

const usable = prompt => prompt.example ? page.model.image : page.model.text;

function request(delay = 150) {
  clearTimeout(page.timer);
  page.timer = setTimeout(run, delay);
}

async function run() {
  page.running?.abort();
  page.running = null;
  const prompts = page.prompts.filter(usable), model = page.model;
  if (!page.image || (!prompts.length && !model.vocabulary.length)) {
    page.answer = page.asked = null;
    busy(false);
    draw();
    return;
  }
  const form = new FormData();
  form.append("image", page.image.blob, "image");
  const listed = prompts.map((prompt, index) => {
    if (!prompt.example) return {text: prompt.text};
    form.append(`example${index}`, prompt.example.image, "example");
    if (prompt.example.mask) form.append(`mask${index}`, prompt.example.mask, "mask");
    return {image: `example${index}`, name: prompt.example.name, ...(prompt.example.mask && {mask: `mask${index}`})};
  });
  const context = page.contexts[model.name];
  form.append("request", JSON.stringify({model: model.name, prompts: listed, ...(context && {context})}));
  const running = page.running = new AbortController();
  busy(true);
  const begun = performance.now();
  try {
    const answer = await decodeAnswer(await askJson("/api/segment", {method: "POST", body: form, signal: running.signal}));
    if (page.running !== running) return;
    page.answer = answer;
    page.asked = prompts.length ? prompts : null;
    page.seconds = (performance.now() - begun) / 1000;
    calm();
    draw();
  } catch (error) {
    if (error.name === "AbortError" || page.running !== running) return;
    if (error.code === "model_loading") {
      page.timer = setTimeout(run, 1000 * (error.retryAfter ?? 2));
      return;
    }
    page.answer = page.asked = null;
    draw();
    fail(error, run);
  }
  if (page.running === running) {
    page.running = null;
    busy(false);
  }
  if (model.state !== "ready") readModels().catch(() => {});
}

// --- the image ------------------------------------------------------------------------------------------------

/** A bitmap of any file that either the browser or the server can read. */
async function readImage(blob) {
  if (blob.size > page.limits.upload_bytes) {
    throw new Failure({
      code: "upload_too_large", message: `The file has ${(blob.size / 2 ** 20).toFixed(1)} MiB; this server takes ${(page.limits.upload_bytes / 2 ** 20).toFixed(0)}.`,
      remedy: "Scale the image down, or save it as JPEG.",
    });
  }
  try {
    const bitmap = await createImageBitmap(blob);
    if (bitmap.width * bitmap.height <= page.limits.image_pixels) return bitmap;
  } catch {
    // The server knows more formats, and better reasons.
  }
  const form = new FormData();
  form.append("image", blob, "image");
  return createImageBitmap(await (await ask("/api/preview", {method: "POST", body: form})).blob());
}

async function setImage(blob, name) {
  busy(true);
  try {
    const bitmap = await readImage(blob);
    page.image = {blob, name: name || "image", bitmap};
    page.answer = null;
    calm();
    byId("drop").hidden = true;
    document.querySelector(".layout").classList.remove("empty");
    byId("view").hidden = false;
    const photo = byId("photo"), shrink = Math.min(1, DISPLAYED / Math.max(bitmap.width, bitmap.height));
    [photo.width, photo.height] = [bitmap.width, bitmap.height].map(side => Math.max(1, Math.round(side * shrink)));
    photo.getContext("2d").drawImage(bitmap, 0, 0, photo.width, photo.height);
    fit();
    draw();
    request(0);
  } catch (error) {
    busy(false);
    failFile(error, name);
  }
}

/** Size the picture to its frame; small images are enlarged, up to four times. */
function fit() {
  if (!page.image) return;
  const {width, height} = page.image.bitmap;
  const room = byId("picture").parentElement.clientWidth, tall = Math.max(220, innerHeight * .64);
  const scale = Math.min(room / width, tall / height, 4);
  byId("photo").style.width = `${Math.max(1, Math.round(width * scale))}px`;
  byId("photo").style.height = `${Math.max(1, Math.round(height * scale))}px`;
}

async function addExample(blob, name) {
  try {
    const example = await editExample(await readImage(blob), name.replace(/\.[^.]*$/, "").slice(0, 60) || "example");
    if (example) addPrompt({example});
  } catch (error) {
    failFile(error, name);
  }
}

// --- prompts --------------------------------------------------------------------------------------------------

function addPrompt(prompt) {
  if (page.prompts.length >= page.limits.prompts) {
    return fail(new Failure({message: `At most ${page.limits.prompts} prompts fit.`, remedy: "Remove one first."}));
  }
  if (prompt.example && page.prompts.filter(p => p.example).length >= page.limits.examples) {
    return fail(new Failure({message: `At most ${page.limits.examples} examples fit.`, remedy: "Remove one first."}));
  }
  const taken = new Set(page.prompts.map(other => other.slot));
  prompt.slot = page.palette.findIndex((_, slot) => !taken.has(slot));
  page.prompts.push({visible: true, ...prompt});
  draw();
  request();
}

function addWords(text) {
  for (const word of text.split(/[,;\n]/).map(part => part.trim().replace(/\s+/g, " ")).filter(Boolean)) {
    const there = page.prompts.some(prompt => prompt.text?.toLowerCase() === word.toLowerCase());
    if (!there) addPrompt({text: word.slice(0, page.limits.prompt_length)});
  }
}

function removePrompt(prompt) {
  page.prompts = page.prompts.filter(other => other !== prompt);
  page.solo = null;
  draw();
  request();
}

/** What the list shows: the prompts, or the classes that a model found by itself. */
function rows() {
  if (page.prompts.length || !page.answer || page.asked) {
    return page.prompts.map(prompt => ({
      prompt, id: page.asked ? page.asked.indexOf(prompt) : -1, name: prompt.text ?? prompt.example.name,
      color: page.palette[prompt.slot], visible: prompt.visible, used: usable(prompt),
    }));
  }
  return page.answer.legend
    .map(({name, color, other}, id) => ({id, name, color, other, visible: !page.hidden.has(name), used: true}))
    .filter(row => !row.other);
}

// --- drawing --------------------------------------------------------------------------------------------------

function draw() {
  cancelAnimationFrame(page.drawing);
  page.drawing = requestAnimationFrame(() => {
    // A button that is being pressed must not be replaced: its click would be lost.
    if (byId("prompts").querySelector("button:active")) return draw();
    const listed = rows();
    paint(listed);
    showPrompts(listed);
    showSuggestions();
  });
}

function paint(listed) {
  const overlay = byId("overlay"), {answer} = page;
  const shown = answer && page.view !== "image";
  overlay.hidden = !shown;
  for (const id of ["save-mask", "save-overlay"]) byId(id).disabled = !answer;
  byId("scale").hidden = page.view !== "heat";
  if (!answer) {
    page.decision = null;
    return;
  }
  const count = answer.legend.length, visible = Array(count).fill(false);
  page.colors = answer.legend.map(entry => rgb(entry.color));
  for (const row of listed) {
    if (row.id < 0) continue;
    visible[row.id] = row.visible;
    page.colors[row.id] = rgb(row.color);
  }
  const threshold = Math.max(1, Math.round(byId("threshold").value * 2.55));
  page.decision = decide(answer, visible, threshold);
  page.shares = shares(page.decision.winner, count);
  const solo = listed.find(row => row.prompt ? row.prompt === page.solo : row.name === page.solo);
  const alone = solo && solo.id >= 0 && solo.visible;
  const drawn = alone ? decide(answer, visible.map((_, id) => id === solo.id), threshold) : page.decision;
  [overlay.width, overlay.height] = [answer.width, answer.height];
  const image = page.view === "heat" ? paintHeat(drawn, answer.width, answer.height)
    : paintMasks(drawn, answer.width, answer.height, page.colors);
  overlay.getContext("2d").putImageData(image, 0, 0);
  overlay.style.opacity = byId("opacity").value / 100;
  overlay.dataset.answer = `${answer.model} ${page.seconds.toFixed(2)}`;
}

function showPrompts(listed) {
  const list = byId("prompts"), focused = document.activeElement?.closest("#prompts li")?.dataset.key;
  const wasRemove = document.activeElement?.classList.contains("remove");
  let shown = listed;
  if (!page.prompts.length && page.decision) {
    shown = listed.filter(row => page.shares[row.id] > 0 || !row.visible).sort((a, b) => page.shares[b.id] - page.shares[a.id]);
  }
  list.replaceChildren(...shown.map(row => {
    const known = row.id >= 0 && page.decision && row.visible && row.used;
    const key = row.prompt ? `${row.prompt.slot}` : row.name;
    const toggle = element("button", {
      type: "button", class: "toggle", "aria-pressed": String(row.visible), title: row.visible ? "Hide its mask" : "Show its mask",
      onclick: () => {
        if (row.prompt) row.prompt.visible = !row.prompt.visible;
        else if (!page.hidden.delete(row.name)) page.hidden.add(row.name);
        draw();
      },
    }, element("span", {class: "swatch", background: row.color}));
    if (row.prompt?.example) toggle.append(element("img", {src: row.prompt.example.thumbnail, alt: "example"}));
    toggle.append(element("span", {class: "name"}, row.name));
    const item = element("li", {"data-key": key, class: row.used ? "" : "unused"}, toggle,
      element("span", {class: "num"}, row.used ? known ? percent(page.shares[row.id]) : "" : "not used"));
    if (row.prompt) {
      item.append(element("button", {type: "button", class: "remove", "aria-label": `Remove ${row.name}`, title: "Remove", onclick: () => removePrompt(row.prompt)}, "×"));
    }
    item.addEventListener("pointerenter", event => { if (event.pointerType === "mouse") solo(row.prompt ?? row.name); });
    item.addEventListener("pointerleave", () => solo(null));
    return item;
  }));
  if (focused !== undefined) {
    const again = [...list.children].find(item => item.dataset.key === focused) ?? list.lastElementChild;
    (again?.querySelector(wasRemove ? ".remove" : ".toggle") ?? byId("word")).focus();
  }
  const empty = byId("prompts-empty");
  empty.hidden = shown.length > 0;
  empty.textContent = page.model?.vocabulary.length
    ? "Without prompts the model shows its own classes."
    : "Type one or more things, with commas between them.";
  showStatus(shown);
}

let soloTimer = 0;
/** Show one prompt alone while the pointer rests on it. The list is left alone: it is under the pointer. */
function solo(which) {
  clearTimeout(soloTimer);
  soloTimer = setTimeout(() => {
    if (page.solo === which) return;
    page.solo = which;
    paint(rows());
  }, which === null ? 0 : 120);
}

function showSuggestions() {
  const box = byId("suggestions"), there = new Set(page.prompts.map(prompt => prompt.text?.toLowerCase()));
  const open = (page.model?.suggestions ?? []).filter(word => !there.has(word.toLowerCase())).slice(0, 14);
  box.hidden = !open.length;
  box.replaceChildren(...open.map(word => element("button", {type: "button", "aria-label": `Add ${word}`, onclick: () => addWords(word)}, `+ ${word}`)));
}

function showStatus(listed) {
  const {answer, image} = page;
  let text = "";
  if (answer && image) {
    const size = answer.width === answer.image_width ? "" : `, masks at ${answer.width} × ${answer.height}`;
    text = `${image.name}: ${answer.image_width} × ${answer.image_height} pixels${size}, ${page.seconds.toFixed(1)} s.`;
    if (page.asked && listed.every(row => row.id < 0 || !(page.shares[row.id] > 0))) text += " Nothing was found above the threshold.";
  }
  if (page.model?.state === "loading") text = `${page.model.name} is being loaded. The first time its weights may have to be fetched.`;
  byId("status").textContent = text;
}

const percent = share => share === 0 ? "0 %" : share < .01 ? "< 1 %" : `${Math.round(100 * share)} %`;

function showState() {
  const {model} = page, select = byId("model"), state = byId("state");
  const names = page.models.map(one => one.name);
  if ([...select.options].map(option => option.value).join("\n") !== names.join("\n")) {
    select.replaceChildren(...page.models.map(one => element("option", {value: one.name}, one.name === one.kind ? one.name : `${one.name} (${one.kind})`)));
    select.disabled = names.length < 2;
  }
  select.value = model.name;
  select.title = model.title;
  state.dataset.state = model.state;
  state.textContent = {idle: "not loaded yet", loading: "loading…", ready: "ready", failed: "could not be loaded"}[model.state];
  byId("notice").hidden = !model.notice;
  byId("notice").textContent = model.notice;
  byId("examples").hidden = !model.image;
}

function showModel() {
  const {model} = page;
  showState();
  byId("threshold").value = Math.round(100 * model.threshold);
  byId("context").hidden = !model.context.length;
  byId("word").placeholder = model.suggestions.length > 1 ? model.suggestions.slice(-3, -1).join(", ") : "a red car, grass";
  showContext();
  showSliders();
}

function showContext() {
  const words = page.contexts[page.model.name] ?? page.model.context;
  byId("context-words").value = words.join(", ");
  byId("context-title").textContent = `Everything else: ${words.length} ${words.length === 1 ? "word" : "words"}`;
}

function showSliders() {
  byId("threshold-value").textContent = (byId("threshold").value / 100).toFixed(2);
  byId("opacity-value").textContent = `${byId("opacity").value} %`;
}

function busy(on) {
  byId("busy").hidden = !on;
  byId("picture").setAttribute("aria-busy", String(on));
}

function fail(error, again = null) {
  if (!(error instanceof Failure)) console.error(error);
  byId("alert-message").textContent = error.message;
  byId("alert-remedy").textContent = error.remedy ?? "";
  page.retry = again;
  byId("alert-retry").hidden = !again;
  byId("alert").hidden = false;
}

function failFile(error, name) {
  if (name) error.message = `${name}: ${error.message}`;
  fail(error);
}

function calm() {
  byId("alert").hidden = true;
}

// --- what is under the pointer --------------------------------------------------------------------------------

function probe(u, v) {
  const tip = byId("tip"), {answer, decision} = page;
  if (!answer || !decision || u < 0 || v < 0 || u >= 1 || v >= 1) {
    tip.hidden = true;
    return;
  }
  const at = Math.floor(v * answer.height) * answer.width + Math.floor(u * answer.width);
  const id = decision.winner[at];
  let text;
  if (id >= 0) text = `${nameOf(id)} ${(decision.strength[at] / 255).toFixed(2)}`;
  else if (answer.kind === "labels") text = `${answer.legend[answer.maps.ids[at]].name} ${(answer.maps.confidence[at] / 255).toFixed(2)}`;
  else text = `nothing (best ${(decision.strength[at] / 255).toFixed(2)})`;
  tip.replaceChildren(...(id >= 0 ? [element("span", {class: "swatch", background: `rgb(${page.colors[id].join(" ")})`})] : []), text);
  tip.hidden = false;
  const picture = byId("picture"), frame = picture.parentElement;
  const x = picture.offsetLeft + u * picture.clientWidth, y = picture.offsetTop + v * picture.clientHeight;
  tip.style.left = `${Math.max(4, Math.min(frame.clientWidth - tip.offsetWidth - 4, x + 14))}px`;
  tip.style.top = `${y + 46 > frame.clientHeight ? y - tip.offsetHeight - 12 : y + 16}px`;
}

const nameOf = id => page.asked ? page.asked[id].text ?? page.asked[id].example.name : page.answer.legend[id].name;

function showCross(u, v) {
  const cross = byId("cross");
  cross.hidden = u === undefined;
  if (u === undefined) return;
  cross.style.left = `${100 * u}%`;
  cross.style.top = `${100 * v}%`;
}

// --- downloads ------------------------------------------------------------------------------------------------

function save(blob, ending) {
  const link = element("a", {href: URL.createObjectURL(blob), download: `${page.image.name.replace(/\.[^.]*$/, "")}-${ending}.png`});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function saveMask() {
  const {answer, decision, image} = page;
  save(await indexedPng(decision, answer.width, answer.height, image.bitmap.width, image.bitmap.height, page.colors), "mask");
}

function saveOverlay() {
  const {bitmap} = page.image, canvas = element("canvas"), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  context.drawImage(bitmap, 0, 0);
  if (page.view !== "image") {
    context.globalAlpha = byId("opacity").value / 100;
    context.drawImage(byId("overlay"), 0, 0, canvas.width, canvas.height);
  }
  canvas.toBlob(blob => save(blob, "overlay"), "image/png");
}

// --- events ---------------------------------------------------------------------------------------------------

function listen() {
  byId("model").addEventListener("change", event => {
    page.model = page.models.find(model => model.name === event.target.value);
    page.answer = page.asked = null;
    calm();
    showModel();
    draw();
    loadModel();
    request(0);
  });
  byId("add").addEventListener("submit", event => {
    event.preventDefault();
    addWords(byId("word").value);
    byId("word").value = "";
  });
  byId("word").addEventListener("keydown", event => {
    if (event.key === "Backspace" && !event.target.value && page.prompts.length) removePrompt(page.prompts.at(-1));
  });
  byId("context-words").addEventListener("change", event => {
    page.contexts[page.model.name] = event.target.value.split(/[,;\n]/).map(word => word.trim()).filter(Boolean);
    showContext();
    request(0);
  });
  byId("context-reset").addEventListener("click", () => {
    delete page.contexts[page.model.name];
    showContext();
    request(0);
  });
  for (const id of ["threshold", "opacity"]) {
    byId(id).addEventListener("input", () => {
      showSliders();
      if (id === "opacity") byId("overlay").style.opacity = byId("opacity").value / 100;
      else draw();
    });
  }
  for (const button of document.querySelectorAll("[data-view]")) {
    button.addEventListener("click", () => {
      page.view = button.dataset.view;
      for (const other of document.querySelectorAll("[data-view]")) other.setAttribute("aria-pressed", String(other === button));
      draw();
    });
  }
  byId("save-mask").addEventListener("click", saveMask);
  byId("save-overlay").addEventListener("click", saveOverlay);
  byId("alert-close").addEventListener("click", calm);
  byId("alert-retry").addEventListener("click", () => {
    calm();
    page.retry?.();
  });

  for (const id of ["choose", "replace"]) byId(id).addEventListener("click", () => byId("file").click());
  byId("add-example").addEventListener("click", () => byId("example-file").click());
  for (const [id, take] of [["file", setImage], ["example-file", addExample]]) {
    byId(id).addEventListener("change", event => {
      const [file] = event.target.files;
      if (file) take(file, file.name);
      event.target.value = "";
    });
  }
  const examples = byId("examples"), stage = document.querySelector(".stage");
  const target = event => examples.contains(event.target) ? examples : stage;
  const mark = which => { for (const zone of [examples, stage]) zone.classList.toggle("over", zone === which); };
  addEventListener("dragover", event => {
    event.preventDefault();
    mark(target(event));
  });
  addEventListener("dragleave", event => { if (!event.relatedTarget) mark(null); });
  addEventListener("drop", event => {
    event.preventDefault();
    mark(null);
    const [file] = event.dataTransfer.files;
    if (!file || byId("editor").open) return;
    (target(event) === examples ? addExample : setImage)(file, file.name);
  });
  addEventListener("paste", event => {
    const [file] = event.clipboardData?.files ?? [];
    if (!file || byId("editor").open) return;
    event.preventDefault();
    (examples.matches(":hover, :focus-within") ? addExample : setImage)(file, file.name);
  });

  const picture = byId("picture");
  const relative = event => {
    const box = picture.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  for (const kind of ["pointermove", "pointerdown"]) {
    picture.addEventListener(kind, event => {
      showCross();
      probe(...relative(event));
    });
  }
  picture.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
  picture.addEventListener("blur", () => {
    showCross();
    byId("tip").hidden = true;
  });
  let [u, v] = [.5, .5];
  picture.addEventListener("keydown", event => {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!step) return;
    event.preventDefault();
    [u, v] = [u + step[0] * .02, v + step[1] * .02].map(value => Math.max(0, Math.min(.999, value)));
    showCross(u, v);
    probe(u, v);
  });
  new ResizeObserver(fit).observe(picture.parentElement);
}

async function showSamples() {
  const samples = await askJson("/api/samples");
  byId("samples").hidden = !samples.length;
  byId("samples").querySelector("ul").replaceChildren(...samples.map(({url, classes}, index) =>
    element("li", {}, element("button", {
      type: "button", title: classes.join(", "),
      onclick: async () => {
        try {
          const blob = await (await ask(url)).blob();
          if (!page.prompts.length && !page.model.vocabulary.length) addWords(classes.slice(0, 3).join(","));
          await setImage(blob, `scene ${index + 1}.png`);
        } catch (error) {
          fail(error);
        }
      },
    }, element("img", {src: url, alt: `Toy scene with ${classes.join(", ")}`, width: "84", height: "84"})))));
}

listen();
try {
  await readModels();
  showModel();
  draw();
  await Promise.all([showSamples(), loadModel()]);
} catch (error) {
  fail(error, () => location.reload());
}
