// What is not saved yet, kept in this browser: it outlives a closed tab and a server that is gone.
// A mask is its ids as 16 bits, little-endian, row by row, gzip; in a draft and in a request as base64.

export class Drafts {
  constructor(table) {
    this.prefix = `maskmill review ${table} `;
    this.memory = new Map(); // where the browser keeps nothing, or no more
  }

  get(id) {
    try {
      const text = this.memory.get(id) ?? localStorage.getItem(this.prefix + id);
      return text ? JSON.parse(text) : null;
    } catch {
      return null;
    }
  }

  // Whether the browser keeps it.
  set(id, draft) {
    const text = JSON.stringify(draft);
    try {
      localStorage.setItem(this.prefix + id, text);
      this.memory.delete(id);
      return true;
    } catch {
      this.memory.set(id, text);
      return false;
    }
  }

  delete(id) {
    this.memory.delete(id);
    try { localStorage.removeItem(this.prefix + id); } catch { /* it keeps nothing */ }
  }

  has(id) {
    return this.get(id) !== null;
  }
}

const throughStream = async (bytes, stream) =>
  new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer());

export async function packed(ids) {
  const raw = new Uint8Array(2 * ids.length);
  const view = new DataView(raw.buffer);
  for (let i = 0; i < ids.length; i++) view.setUint16(2 * i, ids[i], true);
  const bytes = await throughStream(raw, new CompressionStream("gzip"));
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}

export async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  return fromBytes(await throughStream(bytes, new DecompressionStream("gzip")));
}

export function fromBytes(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const ids = new Uint16Array(bytes.byteLength / 2);
  for (let i = 0; i < ids.length; i++) ids[i] = view.getUint16(2 * i, true);
  return ids;
}
