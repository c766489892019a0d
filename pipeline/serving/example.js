// The dialog in which the object of an example image is marked with a brush or a box.

const byId = id => document.getElementById(id);
const MARK = "#ff2d78";
const LONGEST = 1024; // sides of an example; CLIP sees far less

/** Open the dialog on an image; resolves to {name, image, mask, thumbnail} or null if it was cancelled. */
export function editExample(bitmap, name) {
  const dialog = byId("editor"), photo = byId("example-photo"), mask = byId("example-mask");
  const shrink = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * shrink)), height = Math.max(1, Math.round(bitmap.height * shrink));
  for (const canvas of [photo, mask]) [canvas.width, canvas.height] = [width, height];
  const paper = photo.getContext("2d"), ink = mask.getContext("2d", {willReadFrequently: true});
  paper.drawImage(bitmap, 0, 0, width, height);
  byId("example-name").value = name;

  let tool = "brush", from = null, before = null;
  const choose = chosen => {
    tool = chosen;
    for (const button of dialog.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  };
  choose("brush");
  const showSize = () => { byId("brush-size-value").textContent = `${byId("brush-size").value} %`; };
  showSize();
  const place = event => {
    const box = mask.getBoundingClientRect();
    return [(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height];
  };
  const line = (a, b) => {
    ink.globalCompositeOperation = tool === "erase" ? "destination-out" : "source-over";
    ink.strokeStyle = MARK;
    ink.lineWidth = byId("brush-size").value / 100 * Math.max(width, height);
    ink.lineCap = "round";
    ink.beginPath();
    ink.moveTo(...a);
    ink.lineTo(...b);
    ink.stroke();
    ink.globalCompositeOperation = "source-over";
  };
  const ending = new AbortController(), {signal} = ending;
  mask.addEventListener("pointerdown", event => {
    if (event.button) return;
    mask.setPointerCapture(event.pointerId);
    from = place(event);
    if (tool === "box") before = ink.getImageData(0, 0, width, height);
    else line(from, from);
  }, {signal});
  mask.addEventListener("pointermove", event => {
    if (!from) return;
    const to = place(event);
    if (tool === "box") {
      ink.putImageData(before, 0, 0);
      ink.fillStyle = MARK;
      ink.fillRect(Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]));
    } else {
      line(from, to);
      from = to;
    }
  }, {signal});
  for (const end of ["pointerup", "pointercancel"]) mask.addEventListener(end, () => { from = null; }, {signal});
  for (const button of dialog.querySelectorAll("[data-tool]")) button.addEventListener("click", () => choose(button.dataset.tool), {signal});
  byId("brush-size").addEventListener("input", showSize, {signal});
  byId("brush-clear").addEventListener("click", () => ink.clearRect(0, 0, width, height), {signal});
  byId("editor-cancel").addEventListener("click", () => dialog.close(""), {signal});

  dialog.returnValue = "";
  dialog.showModal();
  const room = [Math.min(640, innerWidth - 66), Math.max(160, innerHeight - 330)];
  const scale = Math.min(room[0] / width, room[1] / height, 4);
  photo.style.width = `${Math.round(width * scale)}px`;
  photo.style.height = `${Math.round(height * scale)}px`;

  return new Promise(resolve => dialog.addEventListener("close", async () => {
    ending.abort();
    if (dialog.returnValue !== "add") return resolve(null);
    resolve({
      name: byId("example-name").value.trim() || "example",
      image: await blob(photo),
      mask: await maskBlob(ink, width, height),
      thumbnail: thumbnail(photo, mask),
    });
  }, {once: true}));
}

const blob = canvas => new Promise(resolve => canvas.toBlob(resolve, "image/png"));

/** White where it is marked, black elsewhere; null if nothing is. */
async function maskBlob(ink, width, height) {
  const image = ink.getImageData(0, 0, width, height);
  let marked = false;
  for (let i = 0; i < image.data.length; i += 4) {
    const on = image.data[i + 3] > 127 ? 255 : 0;
    marked ||= on > 0;
    image.data.set([on, on, on, 255], i);
  }
  if (!marked) return null;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(image, 0, 0);
  return blob(canvas);
}

function thumbnail(photo, mask) {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  const side = Math.min(photo.width, photo.height);
  canvas.width = canvas.height = 96;
  const cut = [(photo.width - side) / 2, (photo.height - side) / 2, side, side, 0, 0, 96, 96];
  context.drawImage(photo, ...cut);
  context.globalAlpha = .5;
  context.drawImage(mask, ...cut);
  return canvas.toDataURL("image/jpeg", .8);
}
