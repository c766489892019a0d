// The picture with its labels: zoom, pan, brush, fill, undo. Knows nothing of queues and servers.

const UNDOS = 50;

export class Picture {
  // parts: the elements stage, sheet, photo, overlay, cursor. changed(): after each stroke, fill, undo.
  constructor(parts, changed) {
    Object.assign(this, parts);
    this.changed = changed;
    this.context = this.overlay.getContext("2d");
    this.tool = "move";
    this.chosen = 0;
    this.brush = 24; // radius in screen pixels
    this.held = false; // space
    this.pointers = new Map();
    this.clear();
    const stage = this.stage;
    stage.addEventListener("pointerdown", event => this.down(event));
    stage.addEventListener("pointermove", event => this.move(event));
    for (const kind of ["pointerup", "pointercancel"]) stage.addEventListener(kind, event => this.up(event));
    stage.addEventListener("pointerleave", () => { this.cursor.hidden = true; });
    stage.addEventListener("wheel", event => {
      event.preventDefault();
      const box = stage.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY / 400), event.clientX - box.x, event.clientY - box.y);
    }, {passive: false});
    new ResizeObserver(() => { if (this.fitted) this.fit(); else this.place(); }).observe(stage);
  }

  clear() {
    this.ids = null;
    this.width = this.height = 0;
    this.undos = [];
    this.stroke = null;
    this.scale = 1; this.x = this.y = 0; this.fitted = true;
    this.sheet.hidden = true;
  }

  // ids: Uint16Array of height × width. colors: [red, green, blue] by id; others are not shown.
  show(ids, width, height, colors) {
    this.ids = ids; this.width = width; this.height = height; this.colors = colors;
    this.undos = [];
    this.overlay.width = width; this.overlay.height = height;
    this.sheet.style.width = `${width}px`; this.sheet.style.height = `${height}px`;
    this.sheet.hidden = false;
    this.draw(0, 0, width, height);
    this.fit();
  }

  draw(left, top, right, bottom) {
    left = Math.max(0, left); top = Math.max(0, top); right = Math.min(this.width, right); bottom = Math.min(this.height, bottom);
    if (left >= right || top >= bottom) return;
    const data = this.context.createImageData(right - left, bottom - top);
    let at = 0;
    for (let y = top; y < bottom; y++) for (let x = left; x < right; x++, at += 4) {
      const color = this.colors[this.ids[y * this.width + x]];
      if (color) { data.data[at] = color[0]; data.data[at + 1] = color[1]; data.data[at + 2] = color[2]; data.data[at + 3] = 255; }
    }
    this.context.putImageData(data, left, top);
  }

  // --- where it is on the screen ---

  place() {
    this.sheet.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
    this.sheet.classList.toggle("large", this.scale > 2);
  }

  fit() {
    if (!this.width) return;
    const {clientWidth, clientHeight} = this.stage;
    this.scale = Math.min(clientWidth / this.width, clientHeight / this.height) || 1;
    this.x = (clientWidth - this.scale * this.width) / 2;
    this.y = (clientHeight - this.scale * this.height) / 2;
    this.fitted = true;
    this.place();
  }

  zoom(factor, x = this.stage.clientWidth / 2, y = this.stage.clientHeight / 2) {
    const scale = Math.min(40, Math.max(0.02, this.scale * factor));
    this.x = x - (x - this.x) * scale / this.scale;
    this.y = y - (y - this.y) * scale / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.place();
  }

  pan(dx, dy) { this.x += dx; this.y += dy; this.fitted = false; this.place(); }

  at(event) {
    const box = this.stage.getBoundingClientRect();
    return [(event.clientX - box.x - this.x) / this.scale, (event.clientY - box.y - this.y) / this.scale];
  }

  classAt(event) {
    const [x, y] = this.at(event).map(Math.floor);
    return this.ids && x >= 0 && y >= 0 && x < this.width && y < this.height ? this.ids[y * this.width + x] : null;
  }

  // --- pointers ---

  down(event) {
    if (event.target.closest(".zoom") || !this.ids) return;
    this.stage.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (this.pointers.size > 1) { this.cancel(); return; } // two fingers zoom
    if (event.button === 1 || this.held || this.tool === "move") return;
    if (event.button !== 0) return;
    const [x, y] = this.at(event);
    if (this.tool === "fill") this.fill(Math.floor(x), Math.floor(y));
    else {
      this.stroke = {before: this.ids.slice(), box: [Infinity, Infinity, -Infinity, -Infinity], last: [x, y]};
      this.paint(x, y);
    }
  }

  move(event) {
    this.follow(event);
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    if (this.stroke) {
      for (const one of event.getCoalescedEvents?.().length ? event.getCoalescedEvents() : [event]) this.paint(...this.at(one));
    } else if (this.pointers.size === 2) {
      const other = [...this.pointers].find(([id]) => id !== event.pointerId)[1];
      const apart = point => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
      const box = this.stage.getBoundingClientRect();
      this.pan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
      this.zoom(apart(now) / apart(before), (now[0] + other[0]) / 2 - box.x, (now[1] + other[1]) / 2 - box.y);
    } else if (this.tool === "move" || this.held || event.buttons & 4) this.pan(now[0] - before[0], now[1] - before[1]);
    this.pointers.set(event.pointerId, now);
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    if (!this.stroke) return;
    const {before, box} = this.stroke;
    this.stroke = null;
    this.remember(before, box);
  }

  cancel() {
    if (!this.stroke) return;
    this.ids.set(this.stroke.before);
    this.draw(...this.stroke.box);
    this.stroke = null;
  }

  follow(event) {
    this.cursor.hidden = this.tool !== "brush" || this.held || event.pointerType === "touch";
    if (this.cursor.hidden) return;
    const box = this.stage.getBoundingClientRect();
    this.cursor.style.width = this.cursor.style.height = `${2 * this.brush}px`;
    this.cursor.style.left = `${event.clientX - box.x}px`;
    this.cursor.style.top = `${event.clientY - box.y}px`;
  }

  // --- painting ---

  // Everything within the brush of the line from the last place to this one.
  paint(x, y) {
    const radius = Math.max(0.5, this.brush / this.scale), [fromX, fromY] = this.stroke.last, box = this.stroke.box;
    const left = Math.max(0, Math.floor(Math.min(x, fromX) - radius)), right = Math.min(this.width, Math.ceil(Math.max(x, fromX) + radius) + 1);
    const top = Math.max(0, Math.floor(Math.min(y, fromY) - radius)), bottom = Math.min(this.height, Math.ceil(Math.max(y, fromY) + radius) + 1);
    const dx = x - fromX, dy = y - fromY, length = dx * dx + dy * dy;
    for (let row = top; row < bottom; row++) for (let column = left; column < right; column++) {
      const px = column + 0.5 - fromX, py = row + 0.5 - fromY;
      const along = length ? Math.min(1, Math.max(0, (px * dx + py * dy) / length)) : 0;
      const ex = px - along * dx, ey = py - along * dy;
      if (ex * ex + ey * ey <= radius * radius) this.ids[row * this.width + column] = this.chosen;
    }
    this.stroke.last = [x, y];
    this.stroke.box = [Math.min(box[0], left), Math.min(box[1], top), Math.max(box[2], right), Math.max(box[3], bottom)];
    this.draw(left, top, right, bottom);
  }

  // The connected piece of one class under the pointer becomes the chosen class.
  fill(x, y) {
    if (x < 0 || y < 0 || x >= this.width || y >= this.height) return;
    const {ids, width, height, chosen} = this, old = ids[y * width + x];
    if (old === chosen) return;
    const before = ids.slice(), waiting = [y * width + x], box = [x, y, x + 1, y + 1];
    ids[waiting[0]] = chosen;
    while (waiting.length) {
      const at = waiting.pop(), column = at % width, row = (at - column) / width;
      box[0] = Math.min(box[0], column); box[2] = Math.max(box[2], column + 1);
      box[1] = Math.min(box[1], row); box[3] = Math.max(box[3], row + 1);
      if (column > 0 && ids[at - 1] === old) { ids[at - 1] = chosen; waiting.push(at - 1); }
      if (column < width - 1 && ids[at + 1] === old) { ids[at + 1] = chosen; waiting.push(at + 1); }
      if (row > 0 && ids[at - width] === old) { ids[at - width] = chosen; waiting.push(at - width); }
      if (row < height - 1 && ids[at + width] === old) { ids[at + width] = chosen; waiting.push(at + width); }
    }
    this.draw(...box);
    this.remember(before, box);
  }

  remember(before, [left, top, right, bottom]) {
    if (left >= right || top >= bottom) return;
    const piece = new Uint16Array((right - left) * (bottom - top));
    for (let row = top; row < bottom; row++) piece.set(before.subarray(row * this.width + left, row * this.width + right), (row - top) * (right - left));
    this.undos.push({box: [left, top, right, bottom], piece});
    if (this.undos.length > UNDOS) this.undos.shift();
    this.changed();
  }

  undo() {
    const last = this.undos.pop();
    if (!last) return;
    const [left, top, right, bottom] = last.box;
    for (let row = top; row < bottom; row++) this.ids.set(last.piece.subarray((row - top) * (right - left), (row - top + 1) * (right - left)), row * this.width + left);
    this.draw(...last.box);
    this.changed();
  }

  // Other labels for the whole image; may be undone.
  replace(ids) {
    const before = this.ids;
    this.ids = ids;
    this.draw(0, 0, this.width, this.height);
    this.remember(before, [0, 0, this.width, this.height]);
  }
}
